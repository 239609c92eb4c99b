/* A machine for tests of the control socket: one that does nothing but note what it was asked for. The fuzzer uses it
 * too. */
#pragma once

#include "vmm/vm.h"

struct fake_vm {
	struct vm *vm; /* with two vCPUs that never run, a disk0, a net0, a virtio-rng and a virtio-balloon */
	unsigned pauses, resumes, stops, buttons, adds, removals, limits, calls, targets;
	enum vm_cause cause;
	struct rate_limits limit; /* the last one set */
	bool limit_received;
	char path[200]; /* of the last disk or network added */
	uint64_t target;
	bool pauses_at_once;
	char typed[100]; /* at the console */
	_Atomic size_t typed_length;
	struct console_tap *_Atomic tap;
};

extern struct fake_vm fake;

void fake_vm_create(void); /* its loop runs on the thread that calls loop_run() */
void fake_vm_destroy(void);
