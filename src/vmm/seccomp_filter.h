/* System call filters, one per kind of thread (seccomp(2)). What they let pass is in seccomp_calls.c. */
#pragma once

#include <linux/filter.h>
#include <seccomp.h>
#include <stdbool.h>

#include "base/error.h"
#include "base/threads.h"

/* Who may make a call: bits of 1 << enum thread_kind, and: */
#define CALLED_WITH_USER_NET (1u << 8) /* only where a network is in user mode */
#define CALLED_WITH_VSOCK (1u << 9)    /* only with --vsock */

struct seccomp_call {
	int number;
	unsigned by;
	unsigned conditions; /* all of them must hold; a call may stand in several lines */
	struct scmp_arg_cmp condition[2];
	const char *why;
	int error; /* not 0: the call is refused by this error instead of ending the process */
};

extern const struct seccomp_call seccomp_calls[];
extern const unsigned seccomp_calls_count;

/* Translates the lists of one kind of thread into a program of the kernel's; with is what of CALLED_WITH_ applies; its instructions are the caller's to
 * free. */
int seccomp_compile(struct sock_fprog *program, enum thread_kind kind, unsigned with, struct error *err);
/* Binds the calling thread to it for ever; no_new_privs is set already. 0 or -errno. */
int seccomp_install(const struct sock_fprog *program, enum thread_kind kind);
/* A refused call ends the process with a line that names it. Once, before the first filter. */
void seccomp_guard(void);
