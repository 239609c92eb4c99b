/* The jail of --jail: a VM's process that holds nothing but what it was given before its guest ran. docs/threat-model.md
 * says what that keeps from a guest that has taken the process over.
 *
 * Two processes. The keeper is what the user or hosteld started: it stays outside, reads nothing that a guest writes,
 * passes signals on and hands the exit status out. Its child is the VM: it opens everything as root, enters the jail,
 * and only then makes its threads, each of which installs the filter of its kind before anything else. */
#pragma once

#include <stdbool.h>

#include "base/error.h"
#include "base/threads.h"
#include "vmm/options.h"

struct jail;

enum jail_role { JAIL_VM, JAIL_KEEPER };

/* Before anything else is opened and before any thread is made. Forks; role says which of the two returns. In the VM's
 * process the range of ids has become the one that it will have. In the keeper it returns when the VM has ended, with
 * the exit status. Fails, with one process, when the rights or the kernel do not allow a jail. */
int jail_fork(struct vmm_config *config, enum jail_role *role, int *status, struct error *err);

/* In the VM's process, which still has one thread: from here on it has no rights, no files but the open ones, and no
 * network unless its guest has one in user mode. `threads` is the number that are to come, `load` what loading the guest
 * takes for a moment, in bytes: the limits leave room for both. */
int jail_enter(struct jail **jail, const struct vmm_config *config, unsigned threads, uint64_t load,
	struct error *err);
/* Frees the memory of the filters; nothing gets out by it. */
void jail_forget(struct jail *jail);

/* For struct threads: installs the filter of the calling thread, or ends the process. opaque is the struct jail. */
void jail_thread_begin(void *opaque, enum thread_kind kind);
