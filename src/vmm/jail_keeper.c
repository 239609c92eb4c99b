/* The keeper: starts the VM's process in a PID namespace of its own, and stands for it outside. See jail.h. */
#include "vmm/jail.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "vmm/console_open.h"
#include "vmm/jail_internal.h"

#define LOCKS "/run/hostel-vmm"

/* ---- an id of its own ---- */

/* Two VMs of one user id could reach each other where the jail has a hole; so each id that is in use is locked. The
 * lock goes away with the keeper. */
static int lock_id(uint32_t id, int *lock, struct error *err)
{
	char path[64];
	scope_fd int fd = -1;

	snprintf(path, sizeof(path), LOCKS "/id-%u", id);
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return error_errno(err, "--jail: %s cannot be opened; give one id by --jail-ids to do without", path);
	if (flock(fd, LOCK_EX | LOCK_NB) < 0)
		return -EAGAIN;
	*lock = take_fd(&fd);
	return 0;
}

static int choose_id(struct vmm_config *config, int *lock, struct error *err)
{
	uint32_t first = config->jail_first, last = config->jail_last;

	if (first == last) /* whoever names one knows who else has it */
		return 0;
	if (mkdir(LOCKS, 0700) < 0 && errno != EEXIST)
		return error_errno(err, "--jail: making " LOCKS "; give one id by --jail-ids to do without");
	for (uint32_t id = first;; id++) {
		int result = lock_id(id, lock, err);

		if (result == 0) {
			config->jail_first = config->jail_last = id;
			return 0;
		}
		if (result != -EAGAIN)
			return result;
		if (id == last)
			return error_set(err, EAGAIN, "--jail: all ids from %u to %u are in use; give more by --jail-ids",
				first, last);
	}
}

/* ---- standing for the VM ---- */

struct keeper {
	pid_t vm;
	bool terminal;
	struct termios settings; /* as they were found */
};

static void restore_terminal(const struct keeper *k)
{
	if (k->terminal)
		tcsetattr(STDIN_FILENO, TCSANOW, &k->settings);
}

/* The first process of a PID namespace cannot stop itself. Its terminal is given back here; it takes it again when it
 * sees SIGCONT. */
static void suspend(const struct keeper *k)
{
	kill(k->vm, SIGSTOP);
	restore_terminal(k);
	raise(SIGSTOP);
	kill(k->vm, SIGCONT);
}

static int keep(const struct keeper *k, const sigset_t *handled)
{
	siginfo_t info;
	int status, number;

	for (;;) {
		number = sigwaitinfo(handled, &info);
		if (number == SIGCHLD && waitpid(k->vm, &status, WNOHANG) == k->vm)
			break;
		if (number == SIGTSTP)
			suspend(k);
		else if (number > 0 && number != SIGCHLD && info.si_code != SI_KERNEL)
			kill(k->vm, number); /* the kernel's own go to all processes of the terminal, the VM's too */
	}
	if (WIFEXITED(status))
		return WEXITSTATUS(status);
	restore_terminal(k);
	fprintf(stderr, "hostel-vmm: jail: the VM's process was ended by signal %d (%s)\n", WTERMSIG(status),
		strsignal(WTERMSIG(status)));
	return 128 + WTERMSIG(status);
}

static void handled_signals(sigset_t *set)
{
	static const int numbers[] = {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT, SIGUSR1};

	sigemptyset(set);
	for (size_t i = 0; i < ARRAY_SIZE(numbers); i++)
		sigaddset(set, numbers[i]);
}

static void remove_socket(const char *path)
{
	if (path)
		console_remove_stale(path);
}

/* ---- the fork ---- */

int jail_fork(struct vmm_config *config, enum jail_role *role, int *exit_status, struct error *err)
{
	struct keeper k = {.terminal = isatty(STDIN_FILENO) && tcgetattr(STDIN_FILENO, &k.settings) == 0};
	sigset_t handled, before, blocked;
	scope_fd int lock = -1;
	int result;

	if (geteuid() != 0)
		return error_set(err, EPERM, "--jail needs root to build the jail: run as root, or leave it out");
	result = choose_id(config, &lock, err);
	if (result < 0)
		return result;
	if (unshare(CLONE_NEWPID) < 0)
		return error_errno(err, "--jail: a PID namespace of its own (is CAP_SYS_ADMIN there?)");
	handled_signals(&handled);
	blocked = handled;
	sigaddset(&blocked, SIGTTIN);
	sigaddset(&blocked, SIGTTOU);
	sigprocmask(SIG_BLOCK, &blocked, &before);
	k.vm = fork();
	if (k.vm < 0)
		return error_errno(err, "--jail: starting the VM's process");
	if (k.vm == 0) {
		sigprocmask(SIG_SETMASK, &before, NULL);
		*role = JAIL_VM;
		return jail_note_inherited(err);
	}
	/* Nothing of the VM's is kept from here on but the id's lock. */
	if (lock > 3)
		close_range(3, (unsigned)lock - 1, 0);
	close_range((unsigned)max(lock + 1, 3), ~0u, 0);
	prctl(PR_SET_NAME, "hostel-keeper");
	*role = JAIL_KEEPER;
	*exit_status = keep(&k, &handled);
	/* What the VM cannot do in there: a socket's file is removed by its path. */
	remove_socket(config->serial == VMM_SERIAL_SOCKET ? config->serial_path : NULL);
	remove_socket(config->has_hvc && config->hvc == VMM_SERIAL_SOCKET ? config->hvc_path : NULL);
	remove_socket(config->control);
	remove_socket(config->vsock_path);
	return 0;
}
