/* Hot plug of vCPUs and memory by ACPI (ACPI 6.4, sections 5.6.6 and 6.3): what is there, what has come and what is asked to
 * go, told to the guest by a general-purpose event; the guest answers by ejecting, or says why it does not (_OST).
 *
 * Registers at BOARD_PORT_HOTPLUG, used by the DSDT alone (acpi_resize.c): for each kind 32 bytes of 32-bit registers; in
 * pairs, bit n of the first for number n, of the second for number 32 + n:
 * +0 read: there; +8: has come, +16: is asked to go, cleared by writing ones; +24 write: the guest lets go of that number;
 * +28 write: what came of it: the number, the status << 8, the event << 16.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "machine/aml.h"
#include "machine/space.h"

struct board;

#define HOTPLUG_KINDS 2 /* enum board_hotplug */
#define HOTPLUG_KIND_PORTS 32
#define HOTPLUG_PORTS (HOTPLUG_KINDS * HOTPLUG_KIND_PORTS)

struct hotplug_kind {
	_Atomic uint64_t there; /* read without the lock to find an interrupt's destinations */
	uint64_t added, leaving;
};

struct hotplug {
	struct board *board;
	pthread_mutex_t lock;
	struct hotplug_kind kind[HOTPLUG_KINDS];
	struct io_region region;
};

int hotplug_create(struct hotplug *h, struct board *board, struct error *err);
void hotplug_destroy(struct hotplug *h);
void hotplug_reset(struct hotplug *h);

/* acpi_resize.c, within \_SB: the registers; what a vCPU's device has beside its identity; the devices of memory; the
 * methods CSCN and MSCN that answer the events. */
void hotplug_describe_registers(struct aml *aml);
void hotplug_describe_cpu(struct aml *aml, unsigned cpu);
void hotplug_describe_cpu_event(struct aml *aml, unsigned cpus);
void hotplug_describe_memory(struct aml *aml, struct board *board);
/* The name of vCPU n's device: "CP" and two digits. */
const char *hotplug_cpu_name(char name[5], unsigned cpu);
