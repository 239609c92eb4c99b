/* What a guest would try that has taken over a thread of hostel-vmm: built into hostel-vmm-attempts only, a hostel-vmm
 * that runs this list on every thread as soon as its filter is there, prints a line an attempt, and goes on to its guest.
 * An attempt is refused when its call raised SIGSYS, or failed with an error that a right or an empty root explains. */
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <linux/io_uring.h>
#include <linux/keyctl.h>
#include <linux/perf_event.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "base/util.h"
#include "vmm/seccomp_filter.h"

static __thread volatile sig_atomic_t trapped;

static void count_trap(int number, siginfo_t *info, void *context)
{
	trapped = 1;
	((ucontext_t *)context)->uc_mcontext.gregs[REG_RAX] = -EPERM;
}

void jail_attempts_guard(void)
{
	/* Before the filters: behind them nobody can. */
	struct sigaction action = {.sa_sigaction = count_trap, .sa_flags = SA_SIGINFO | SA_ONSTACK};

	if (!getenv("HOSTEL_JAIL_BREAK"))
		sigaction(SIGSYS, &action, NULL);
}

static char page[8192] __attribute__((aligned(4096)));
static char *const no_arguments[] = {NULL};
static struct sock_filter allow_all[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};

static long by_32_bit_table(void)
{
	long result;

	__asm__ volatile("int $0x80" : "=a"(result) : "a"(20 /* getpid */) : "memory");
	return result < 0 ? -1 : result;
}

static long executable_file_mapping(void)
{
	/* Any descriptor will do: guest memory, the code cache and disks are among them. */
	for (int fd = 3; fd < 40; fd++)
		if (mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0) != MAP_FAILED)
			return fd;
	return -1;
}

static long spawn(void)
{
	struct clone_args args = {.flags = CLONE_FILES, .exit_signal = SIGCHLD};
	long child = syscall(SYS_clone3, &args, sizeof(args));

	if (child == 0)
		_exit(0);
	return child;
}

static long fork_old(long number)
{
	long child = number == SYS_clone ? syscall(number, SIGCHLD, 0, 0, 0, 0) : syscall(number);

	if (child == 0)
		_exit(0);
	return child;
}

#define S(name, ...) syscall(SYS_##name, ##__VA_ARGS__)

/* One line each: a name, and an expression that is not negative if it worked. */
#define ATTEMPTS(TRY)                                                                                                  \
	/* files */                                                                                                    \
	TRY(open_passwd, S(openat, AT_FDCWD, "/etc/passwd", O_RDONLY))                                                 \
	TRY(open_old_call, S(open, "/etc/passwd", O_RDONLY))                                                           \
	TRY(openat2, S(openat2, AT_FDCWD, "/etc/passwd", page, 24))                                                    \
	TRY(open_proc_mem, S(openat, AT_FDCWD, "/proc/self/mem", O_RDWR))                                              \
	TRY(open_dev_kmsg, S(openat, AT_FDCWD, "/dev/kmsg", O_RDONLY))                                                 \
	TRY(open_by_parent, S(openat, AT_FDCWD, "../../../../etc/passwd", O_RDONLY))                                   \
	TRY(create_file, S(openat, AT_FDCWD, "/x", O_WRONLY | O_CREAT, 0600))                                          \
	TRY(create_temporary, S(openat, AT_FDCWD, "/", O_RDWR | O_TMPFILE, 0600))                                      \
	TRY(write_resolv_conf, S(openat, AT_FDCWD, "/etc/resolv.conf", O_RDWR))                                        \
	TRY(stat_passwd, S(newfstatat, AT_FDCWD, "/etc/passwd", page, 0))                                              \
	TRY(list_root, S(getdents64, 0, page, sizeof(page)))                                                           \
	TRY(mkdir, S(mkdir, "/x", 0700))                                                                               \
	TRY(mknod, S(mknodat, AT_FDCWD, "/x", 0020600, 0x0101))                                                        \
	TRY(symlink, S(symlink, "/etc", "/x"))                                                                         \
	TRY(link, S(link, "/etc/passwd", "/x"))                                                                        \
	TRY(rename, S(rename, "/etc", "/x"))                                                                           \
	TRY(unlink, S(unlink, "/etc/resolv.conf"))                                                                     \
	TRY(chmod, S(fchmod, 2, 0777))                                                                                 \
	TRY(chown, S(fchown, 2, 0, 0))                                                                                 \
	TRY(chdir, S(chdir, "/etc"))                                                                                   \
	TRY(handle_to_file, S(open_by_handle_at, AT_FDCWD, page, O_RDONLY))                                            \
	TRY(inotify, S(inotify_init1, 0))                                                                              \
	TRY(fanotify, S(fanotify_init, 0, 0))                                                                          \
	TRY(memfd, S(memfd_create, "x", 0))                                                                            \
	TRY(splice, S(splice, 0, NULL, 1, NULL, 1, 0))                                                                 \
	/* sockets */                                                                                                  \
	TRY(socket_unix, S(socket, AF_UNIX, SOCK_DGRAM, 0))                                                            \
	TRY(socket_pair, S(socketpair, AF_UNIX, SOCK_STREAM, 0, page))                                                 \
	TRY(socket_netlink, S(socket, AF_NETLINK, SOCK_RAW, 0))                                                        \
	TRY(socket_packet, S(socket, AF_PACKET, SOCK_RAW, 0))                                                          \
	TRY(socket_raw, S(socket, AF_INET, SOCK_RAW, 1))                                                               \
	TRY(socket_vsock, S(socket, AF_VSOCK, SOCK_STREAM, 0))                                                         \
	TRY(socket_tcp, S(socket, AF_INET, SOCK_STREAM, 0))                                                            \
	TRY(socket_udp, S(socket, AF_INET6, SOCK_DGRAM, 0))                                                            \
	/* programs and processes */                                                                                   \
	TRY(exec, S(execve, "/bin/sh", no_arguments, no_arguments))                                                    \
	TRY(exec_descriptor, S(execveat, 0, "", no_arguments, no_arguments, AT_EMPTY_PATH))                            \
	TRY(clone3, spawn())                                                                                           \
	TRY(clone, fork_old(SYS_clone))                                                                                \
	TRY(fork, fork_old(SYS_fork))                                                                                  \
	TRY(ptrace_me, S(ptrace, PTRACE_TRACEME, 0, 0, 0))                                                             \
	TRY(ptrace_other, S(ptrace, PTRACE_SEIZE, 2, 0, 0))                                                            \
	TRY(kill_all, S(kill, -1, SIGTERM))                                                                            \
	TRY(kill_group, S(kill, 0, SIGWINCH))                                                                          \
	TRY(kill_one, S(kill, 2, SIGTERM))                                                                             \
	TRY(tkill, S(tkill, 2, SIGTERM))                                                                               \
	TRY(tgkill_other, S(tgkill, 2, 2, SIGTERM))                                                                    \
	TRY(queue_signal, S(rt_sigqueueinfo, 2, SIGTERM, page))                                                        \
	TRY(pidfd_open, S(pidfd_open, 1, 0))                                                                           \
	TRY(pidfd_getfd, S(pidfd_getfd, 3, 0, 0))                                                                      \
	TRY(read_other_memory, S(process_vm_readv, 1, page, 0, page, 0, 0))                                            \
	TRY(write_other_memory, S(process_vm_writev, 1, page, 0, page, 0, 0))                                          \
	TRY(process_madvise, S(process_madvise, 3, page, 0, 0, 0))                                                     \
	TRY(sched_affinity, S(sched_setaffinity, 0, 8, page))                                                          \
	TRY(priority, S(setpriority, PRIO_PROCESS, 0, -10))                                                            \
	TRY(raise_limit, S(prlimit64, 0, RLIMIT_NOFILE, page, NULL))                                                   \
	TRY(own_sigsys_handler, S(rt_sigaction, SIGSYS, page, NULL, 8))                                                \
	TRY(own_sigsys_handler_64, S(rt_sigaction, 0x100000000ull | SIGSYS, page, NULL, 8))                            \
	TRY(another_filter, S(seccomp, SECCOMP_SET_MODE_FILTER, 0, &(struct sock_fprog){1, allow_all}))                \
	TRY(timer, S(timer_create, CLOCK_MONOTONIC, NULL, page))                                                       \
	/* memory */                                                                                                   \
	TRY(map_rwx, S(mmap, NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))      \
	TRY(map_rx, S(mmap, NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))                    \
	TRY(map_x, S(mmap, NULL, 4096, PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))                                 \
	TRY(map_file_rx, executable_file_mapping())                                                                    \
	TRY(protect_rwx, S(mprotect, page, 4096, PROT_READ | PROT_WRITE | PROT_EXEC))                                  \
	TRY(protect_rx, S(mprotect, page, 4096, PROT_READ | PROT_EXEC))                                                \
	TRY(protect_code_rwx, S(mprotect, (uintptr_t)jail_attempts_guard & ~4095ull, 4096, 7))                         \
	TRY(protect_by_key, S(pkey_mprotect, page, 4096, PROT_READ | PROT_EXEC, -1))                                   \
	TRY(remap_pages, S(remap_file_pages, page, 4096, 0, 0, 0))                                                     \
	TRY(shared_memory, S(shmget, 0, 4096, 0600))                                                                   \
	TRY(attach_executable, S(shmat, 0, NULL, 0100000))                                                             \
	TRY(user_fault, S(userfaultfd, 0))                                                                             \
	TRY(lock_memory, S(mlockall, 1))                                                                               \
	TRY(read_implies_exec, S(personality, READ_IMPLIES_EXEC))                                                      \
	TRY(segments, S(modify_ldt, 0, page, 16))                                                                      \
	TRY(thread_base, S(arch_prctl, 0x1002 /* ARCH_SET_FS */, page))                                                \
	/* namespaces and mounts */                                                                                    \
	TRY(unshare_user, S(unshare, CLONE_NEWUSER))                                                                   \
	TRY(unshare_net, S(unshare, CLONE_NEWNET))                                                                     \
	TRY(set_namespace, S(setns, 0, 0))                                                                             \
	TRY(chroot, S(chroot, "/"))                                                                                    \
	TRY(pivot_root, S(pivot_root, "/", "/"))                                                                       \
	TRY(mount, S(mount, "x", "/", "tmpfs", 0, NULL))                                                               \
	TRY(unmount, S(umount2, "/", MNT_DETACH))                                                                      \
	TRY(open_tree, S(open_tree, AT_FDCWD, "/", 1))                                                                 \
	TRY(fsopen, S(fsopen, "tmpfs", 0))                                                                             \
	TRY(move_mount, S(move_mount, AT_FDCWD, "/", AT_FDCWD, "/", 0))                                                \
	TRY(mount_setattr, S(mount_setattr, AT_FDCWD, "/", 0, page, 32))                                               \
	TRY(host_name, S(sethostname, "x", 1))                                                                         \
	/* rights */                                                                                                   \
	TRY(become_root, S(setresuid, 0, 0, 0))                                                                        \
	TRY(become_root_group, S(setresgid, 0, 0, 0))                                                                  \
	TRY(groups, S(setgroups, 0, NULL))                                                                             \
	TRY(capabilities, S(capset, page, page + 16))                                                                  \
	TRY(dumpable, S(prctl, PR_SET_DUMPABLE, 1))                                                                    \
	TRY(keep_capabilities, S(prctl, PR_SET_SECUREBITS, 0))                                                         \
	TRY(survive_keeper, S(prctl, PR_SET_PDEATHSIG, 0))                                                             \
	/* the kernel's wide interfaces */                                                                             \
	TRY(bpf, S(bpf, BPF_MAP_CREATE, page, 72))                                                                     \
	TRY(perf, S(perf_event_open, page, 0, -1, -1, 0))                                                              \
	TRY(io_uring_setup, S(io_uring_setup, 1, page))                                                                \
	TRY(io_uring_enter, S(io_uring_enter, 3, 1, 0, 0, NULL, 0))                                                    \
	TRY(aio, S(io_setup, 1, page))                                                                                 \
	TRY(add_key, S(add_key, "user", "x", "y", 1, KEY_SPEC_PROCESS_KEYRING))                                        \
	TRY(request_key, S(request_key, "user", "x", NULL, 0))                                                         \
	TRY(keyctl, S(keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 1))                                     \
	TRY(load_module, S(init_module, page, 0, ""))                                                                  \
	TRY(load_module_file, S(finit_module, 0, "", 0))                                                               \
	TRY(kexec, S(kexec_load, 0, 0, NULL, 0))                                                                       \
	TRY(reboot, S(reboot, 0xfee1dead, 672274793, 0, NULL))                                                         \
	TRY(kernel_log, S(syslog, 10, NULL, 0))                                                                        \
	TRY(set_clock, S(clock_settime, CLOCK_REALTIME, &(struct timespec){1, 0}))                                     \
	TRY(port_access, S(iopl, 3))                                                                                   \
	TRY(port_list, S(ioperm, 0x80, 1, 1))                                                                          \
	TRY(swap, S(swapon, "/x", 0))                                                                                  \
	TRY(quota, S(quotactl, 0, NULL, 0, NULL))                                                                      \
	TRY(accounting, S(acct, NULL))                                                                                 \
	TRY(semaphore, S(semget, 0, 1, 0600))                                                                          \
	TRY(message_queue, S(mq_open, "x", O_RDWR | O_CREAT, 0600, NULL))                                              \
	TRY(landlock, S(landlock_create_ruleset, page, 8, 0))                                                          \
	TRY(type_for_the_user, S(ioctl, 0, TIOCSTI, "x"))                                                              \
	TRY(terminal_selection, S(ioctl, 0, TIOCLINUX, page))                                                          \
	TRY(tap_device, S(ioctl, 3, 0x400454ca /* TUNSETIFF */, page))                                                 \
	TRY(by_x32_table, syscall(0x40000000 | SYS_getpid))                                                            \
	TRY(by_32_bit_table, by_32_bit_table())

static bool is_refusal(int code)
{
	return code == EPERM || code == EACCES || code == ENOENT || code == EROFS;
}

static void tell(const char *kind, const char *name, long result, int code)
{
	char text[200];
	int length;

	if (trapped)
		length = snprintf(text, sizeof(text), "ATTEMPT %s %s refused trapped\n", kind, name);
	else if (result < 0)
		length = snprintf(text, sizeof(text), "ATTEMPT %s %s %s %s\n", kind, name,
			is_refusal(code) ? "refused" : "PASSED", strerrorname_np(code));
	else
		length = snprintf(text, sizeof(text), "ATTEMPT %s %s PASSED %ld\n", kind, name, result);
	(void)!write(STDERR_FILENO, text, (size_t)length);
}

void jail_attempts(enum thread_kind kind)
{
	static const char *const names[THREAD_KINDS] = {"main", "vcpu", "worker"};
	static atomic_flag done[THREAD_KINDS];
	char text[60];
	unsigned count = 0;

	const char *only = getenv("HOSTEL_JAIL_BREAK");

	if (only) { /* one call that is not listed, and hostel-vmm's own answer to it */
		if (!strcmp(only, names[kind]))
			syscall(SYS_getuid);
		return;
	}
	/* One thread of each kind is enough to read. */
	if (atomic_flag_test_and_set(&done[kind]))
		return;
#define TRY(name, expression)                                                                                          \
	{                                                                                                              \
		long result;                                                                                           \
		trapped = 0;                                                                                           \
		errno = 0;                                                                                             \
		result = (long)(expression);                                                                           \
		tell(names[kind], #name, result, errno);                                                               \
		count++;                                                                                               \
	}
	ATTEMPTS(TRY)
	(void)!write(STDERR_FILENO, text,
		(size_t)snprintf(text, sizeof(text), "ATTEMPTS %s %u made\n", names[kind], count));
}
