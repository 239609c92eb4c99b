/* SMBIOS tables (DMTF DSP0134, version 3.0): who the machine is, for guests that look there (dmidecode, /sys/class/dmi). */
#pragma once

#include <stdint.h>

#include "base/error.h"
#include "machine/memory.h"

struct smbios_identity {
	const char *name; /* the instance's; NULL: none */
	uint8_t uuid[16]; /* in the order in which it is written */
};

/* Into the BIOS area, where guests search for them. */
int smbios_write_tables(struct guest_memory *memory, const struct smbios_identity *identity, struct error *err);
