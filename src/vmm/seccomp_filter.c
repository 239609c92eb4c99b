#include "vmm/seccomp_filter.h"

#include <linux/audit.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "vmm/terminal.h"

#ifdef HOSTEL_JAIL_ATTEMPTS
/* tests/jail/attempts.c, in the program of that test only */
void jail_attempts(enum thread_kind kind);
void jail_attempts_guard(void);
#endif

static const char *const kind_names[THREAD_KINDS] = {
	[THREAD_MAIN] = "main", [THREAD_VCPU] = "vCPU", [THREAD_WORKER] = "worker"};

static __thread const char *kind_name = "unconfined";

/* ---- from list to program ---- */

static int add_calls(scmp_filter_ctx filter, enum thread_kind kind, unsigned with, struct error *err)
{
	for (unsigned i = 0; i < seccomp_calls_count; i++) {
		const struct seccomp_call *c = &seccomp_calls[i];
		unsigned needed = c->by & (CALLED_WITH_USER_NET | CALLED_WITH_VSOCK);
		int code;

		if (!(c->by & 1u << kind) || (needed & with) != needed)
			continue;
		code = seccomp_rule_add_array(filter, c->error ? SCMP_ACT_ERRNO(c->error) : SCMP_ACT_ALLOW, c->number,
			c->conditions, c->condition);
		/* The same call without conditions from another line is no error. */
		if (code < 0 && code != -EEXIST)
			return error_set(err, -code, "jail: the filter's line of system call %d: %s", c->number,
				strerror(-code));
	}
	return 0;
}

/* libseccomp writes the program to a file only. */
static int export(scmp_filter_ctx filter, struct sock_fprog *program, struct error *err)
{
	scope_fd int fd = memfd_create("filter", MFD_CLOEXEC);
	struct stat status;
	int code;

	if (fd < 0)
		return error_errno(err, "jail: memory for a filter");
	code = seccomp_export_bpf(filter, fd);
	if (code < 0)
		return error_set(err, -code, "jail: making a filter: %s", strerror(-code));
	if (fstat(fd, &status) < 0)
		return error_errno(err, "jail: reading a filter");
	program->filter = malloc((size_t)status.st_size);
	program->len = (unsigned short)((size_t)status.st_size / sizeof(program->filter[0]));
	if (!program->filter || pread(fd, program->filter, (size_t)status.st_size, 0) != status.st_size)
		return error_errno(err, "jail: reading a filter");
	return 0;
}

int seccomp_compile(struct sock_fprog *program, enum thread_kind kind, unsigned with, struct error *err)
{
	/* A trap and not an error: nothing here is ready to go on without a call that it makes, and what makes others
	 * is a guest that has broken out. */
	scmp_filter_ctx filter = seccomp_init(SCMP_ACT_TRAP);
	int result;

	*program = (struct sock_fprog){0};
	if (!filter)
		return error_set(err, ENOMEM, "jail: making a filter");
	/* Calls by way of the 32-bit and x32 tables have other numbers, and none is wanted. */
	seccomp_attr_set(filter, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_TRAP);
	/* A tree instead of a chain: the lists are long, and vCPUs sleep and wake often. */
	seccomp_attr_set(filter, SCMP_FLTATR_CTL_OPTIMIZE, 2);
	result = add_calls(filter, kind, with, err);
	if (result == 0)
		result = export(filter, program, err);
	seccomp_release(filter);
	return result;
}

int seccomp_install(const struct sock_fprog *program, enum thread_kind kind)
{
	kind_name = kind_names[kind];
	if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, program) < 0)
		return -errno;
#ifdef HOSTEL_JAIL_ATTEMPTS
	jail_attempts(kind);
#endif
	return 0;
}

/* ---- a refused call ---- */

static void refused(int number, siginfo_t *info, void *context)
{
	char text[200];
	int length = snprintf(text, sizeof(text),
		"hostel-vmm: jail: a %s thread made system call %d%s, which its filter refuses; the VM is ended\r\n",
		kind_name, info->si_syscall, info->si_arch == AUDIT_ARCH_X86_64 ? "" : " of another architecture");

	(void)!write(STDERR_FILENO, text, (size_t)length);
	terminal_restore();
	_exit(1);
}

void seccomp_guard(void)
{
	/* On the engine's alternate stack: the stack pointer may be the guest's. */
	struct sigaction action = {.sa_sigaction = refused, .sa_flags = SA_SIGINFO | SA_ONSTACK};

	sigemptyset(&action.sa_mask);
	sigaction(SIGSYS, &action, NULL);
#ifdef HOSTEL_JAIL_ATTEMPTS
	jail_attempts_guard();
#endif
}
