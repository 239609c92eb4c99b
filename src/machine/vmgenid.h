/* VMGENID (Microsoft, "Virtual Machine Generation ID", 2012): a number in guest memory that changes when the machine goes
 * on from an earlier state, so that its guest makes new random numbers and addresses of its own. */
#pragma once

#include <stdint.h>

#include "base/error.h"

struct board;
struct aml;

#define BOARD_GENERATION 0xef000ull /* guest address, in a reserved page of its own */
#define GENERATION_BYTES 16

struct vmgenid {
	uint8_t value[GENERATION_BYTES];
};

int vmgenid_create(struct vmgenid *g, struct error *err);
/* Puts the number where the guest finds it: with the ACPI tables, at each start. */
int vmgenid_write(struct board *board, struct error *err);
void vmgenid_describe(struct aml *aml);
/* What the DSDT does at BOARD_GPE_GENERATION. */
void vmgenid_describe_event(struct aml *aml);
