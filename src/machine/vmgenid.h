/* VMGENID (Microsoft, "Virtual Machine Generation ID", 2012): a number in guest memory that changes when the machine goes
 * on from an earlier state, so that its guest makes new random numbers and addresses of its own. */
#pragma once

#include <stdint.h>

#include "base/error.h"

#define BOARD_GENERATION 0xef000ull /* guest address, in a reserved page of its own */
#define GENERATION_BYTES 16

struct vmgenid {
	uint8_t value[GENERATION_BYTES];
};

int vmgenid_create(struct vmgenid *g, struct error *err);
