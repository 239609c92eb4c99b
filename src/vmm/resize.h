/* vCPUs and memory of a running machine: how much there is, and more or less of it. On the loop's thread. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "machine/board.h"

struct vm;

struct vm_size {
	unsigned cpus, cpus_max;
	uint64_t memory, memory_max; /* bytes */
	uint64_t memory_unit;	     /* comes and goes at a time; 0: fixed */
};

/* As it is now: what was asked to go and has not is still counted. */
void vm_size(struct vm *vm, struct vm_size *size);

/* Adds what is missing at once (the guest is told and may take it or not), or asks the guest to let go of what is too
 * much, the last first; it does later (VM_EVENT_REMOVED), refuses (VM_EVENT_REFUSED), or never answers. */
int vm_set_cpus(struct vm *vm, unsigned wanted, struct error *err);
int vm_set_memory(struct vm *vm, uint64_t wanted, struct error *err);

/* For struct board_host; opaque is the struct vm. */
void vm_resize_answered(void *opaque, enum board_hotplug kind, unsigned number, enum board_hotplug_event event);
