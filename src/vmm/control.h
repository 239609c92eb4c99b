/* The control socket: JSON-RPC 2.0 on a Unix stream socket, one object a line (docs/control.md). Everything runs on the
 * loop's thread; no request waits for the guest. */
#pragma once

#include "base/error.h"
#include "vmm/vm.h"

struct control;

/* Listens at path, and watches the machine's events; while the loop does not run. */
int control_create(struct control **control, const char *path, struct vm *vm, struct error *err);
/* The loop does not run any more. NULL is allowed. */
void control_destroy(struct control *control);
