/* What a jailed VM may ask of the kernel: every system call that passes, who may make it, and why. Anything else ends the
 * process. Read as a table; a line is added only with its reason, after looking for a way to do without.
 *
 * What is absent on purpose, beside all that opens, connects, executes and mounts: clone and clone3 (every thread is
 * made before the filters), kill and tkill, prctl, seccomp, io_uring_* (its requests pass no filter), memfd_create,
 * process_vm_*, pidfd_*, userfaultfd, personality, ptrace, bpf, keyctl. */
#include "vmm/seccomp_filter.h"

#include <asm/prctl.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <termios.h>

#include "base/util.h"

#define MAIN (1u << THREAD_MAIN)
#define VCPU (1u << THREAD_VCPU)
#define WORKER (1u << THREAD_WORKER)
#define ALL (MAIN | VCPU | WORKER)
#define USER_NET (MAIN | CALLED_WITH_USER_NET)
#define VSOCK (MAIN | CALLED_WITH_VSOCK)

#define CALL(name) SCMP_SYS(name)
#define ANY 0, {{0}}
/* Conditions on arguments, counted from 0. They compare all 64 bits of a register, of which the kernel may take the low
 * 32: so a condition may only name what passes, never what does not. */
#define IS(n, value) 1, {SCMP_CMP(n, SCMP_CMP_EQ, value)}
#define IS_AND(n, value, m, other) 2, {SCMP_CMP(n, SCMP_CMP_EQ, value), SCMP_CMP(m, SCMP_CMP_EQ, other)}
#define HAS_NONE(n, bits) 1, {SCMP_CMP(n, SCMP_CMP_MASKED_EQ, bits, 0)}
#define BITS(n, mask, value) 1, {SCMP_CMP(n, SCMP_CMP_MASKED_EQ, mask, value)}

#define OWN_PID 1 /* the first and only process of its PID namespace */

const struct seccomp_call seccomp_calls[] = {
	/* ---- on descriptors that are open: which those are is what confines here ---- */
	{CALL(read), ALL, ANY, "tap, console, eventfds, timerfd, signalfd; the kernel's image at a reset"},
	{CALL(readv), ALL, ANY, "the same"},
	{CALL(pread64), ALL, ANY, "disks; kernel and initrd at a reset"},
	{CALL(preadv), ALL, ANY, "disks"},
	{CALL(write), ALL, ANY, "tap, console, wake-ups of the loop, messages on standard error"},
	{CALL(writev), ALL, ANY, "tap; libc's messages when it aborts"},
	{CALL(pwrite64), ALL, ANY, "disks; by the main thread when they are closed at the end"},
	{CALL(pwritev), ALL, ANY, "disks"},
	{CALL(lseek), ALL, ANY, "disks: holes and sizes"},
	{CALL(fdatasync), ALL, ANY, "disks: a flush"},
	{CALL(fsync), ALL, ANY, "disks: a flush that counts the size"},
	{CALL(fallocate), ALL, ANY, "disks: discard and zeroes; guest memory that a balloon gives back"},
	{CALL(ftruncate), ALL, ANY, "disks: a qcow2 image grows"},
	{CALL(fstat), ALL, ANY, "what a descriptor is (libc's streams, disks)"},
	{CALL(newfstatat), ALL, ANY, "fstat as libc spells it; by name, the empty root has nothing to tell"},
	{CALL(close), ALL, ANY, "a console client that left; the end"},
	{CALL(fcntl), MAIN | WORKER, IS(1, F_GETFL), "sockets' flags (libslirp); what a descriptor was opened for"},
	{CALL(fcntl), MAIN | WORKER, IS(1, F_SETFL), "non-blocking sockets (libslirp)"},
	{CALL(fcntl), MAIN | WORKER, IS(1, F_SETFD), "close-on-exec (libslirp)"},
	{CALL(fcntl), MAIN | WORKER, IS(1, F_GETFD), "is standard input open"},
	{CALL(fcntl), MAIN | WORKER, IS(1, F_OFD_SETLK), "disks: the lock is given up when one is closed"},
	{CALL(poll), MAIN | WORKER, ANY, "an output that somebody has made non-blocking; libslirp"},
	{CALL(ppoll), MAIN | WORKER, ANY, "the same"},

	/* ---- the loop ---- */
	{CALL(epoll_wait), MAIN, ANY, "the loop waits"},
	{CALL(epoll_pwait), MAIN, ANY, "the same, as some libcs spell it"},
	{CALL(epoll_ctl), ALL, ANY, "descriptors to watch; a device's vCPU may quiet or wake its back end"},
	{CALL(timerfd_settime), ALL, ANY, "chip timers: armed by the vCPU that programs them"},

	/* ---- threads, signals, time ---- */
	{CALL(futex), ALL, ANY, "locks, and sleeping vCPUs"},
	{CALL(sched_yield), ALL, ANY, "waiting for another thread to leave a table"},
	{CALL(set_robust_list), ALL, ANY, "libc, as a thread begins"},
	{CALL(rseq), ALL, ANY, "libc, as a thread begins or ends"},
	{CALL(clock_gettime), ALL, ANY, "where the vDSO cannot answer"},
	{CALL(clock_nanosleep), ALL, ANY, "short waits"},
	{CALL(nanosleep), ALL, ANY, "short waits"},
	{CALL(gettimeofday), ALL, ANY, "libslirp's glib, where the vDSO cannot answer"},
	{CALL(getpid), ALL, ANY, "raising a signal"},
	{CALL(gettid), ALL, ANY, "raising a signal"},
	{CALL(getpgrp), MAIN, ANY, "is the terminal ours (SIGCONT)"},
	{CALL(tgkill), ALL, IS(0, OWN_PID), "abort(); a vCPU's kick"},
	{CALL(rt_sigreturn), ALL, ANY, "the end of a handler: guest faults arrive as signals"},
	{CALL(rt_sigprocmask), ALL, ANY, "handlers, and threads that end"},
	{CALL(rt_sigaction), ALL, IS(0, SIGSEGV), "a fault of our own goes back to its default; SIGSYS, this filter's, stays"},
	{CALL(rt_sigaction), ALL, IS(0, SIGBUS), "the same"},
	{CALL(rt_sigaction), ALL, IS(0, SIGFPE), "the same"},
	{CALL(rt_sigaction), ALL, IS(0, SIGILL), "the same"},
	{CALL(rt_sigaction), ALL, IS(0, SIGTRAP), "the same"},
	{CALL(rt_sigaction), ALL, IS(0, SIGABRT), "the same"},
	{CALL(sigaltstack), ALL, ANY, "handlers run on a stack of ours, also while the guest's rsp is loaded"},
	{CALL(restart_syscall), ALL, ANY, "the kernel's, after a stop"},
	{CALL(exit), ALL, ANY, "a thread ends"},
	{CALL(exit_group), ALL, ANY, "the process ends"},
	{CALL(madvise), ALL, ANY, "freed memory goes back to the host; a thread's stack at its end"},
	{CALL(arch_prctl), VCPU, IS(0, ARCH_SET_GS), "engine bt finds its vCPU by gs"},
	{CALL(getrandom), ALL, ANY, "virtio-rng; libc's allocator"},
	{CALL(sched_getaffinity), ALL, ANY, "libc's allocator: how many arenas"},
	{CALL(sysinfo), ALL, ANY, "libc's qsort() asks how much memory there is"},

	/* ---- memory: never executable, whatever it is backed by. The translator's two views of its code cache, one
	 * written and one run, were mapped before ---- */
	{CALL(mmap), ALL, HAS_NONE(2, PROT_EXEC), "the allocator"},
	{CALL(mprotect), ALL, HAS_NONE(2, PROT_EXEC), "the allocator's arenas"},
	{CALL(mremap), ALL, ANY, "the allocator; what is executable stays read-only where it moves"},
	{CALL(munmap), ALL, ANY, "the allocator; the end"},
	{CALL(brk), ALL, ANY, "the allocator"},

	/* ---- ioctl: by request; TIOCSTI, which types for the user, is not here ---- */
	{CALL(ioctl), ALL, IS(1, TCGETS), "is it a terminal; its settings"},
	{CALL(ioctl), ALL, IS(1, TCSETS), "the terminal's settings come back, also when a thread crashes"},
	{CALL(ioctl), MAIN, IS(1, TIOCGPGRP), "are we in the foreground (SIGCONT)"},
	{CALL(ioctl), ALL, BITS(1, 0xff00, KVMIO << 8), "engine kvm: interrupts, state, memory slots, on its open descriptors"},

	/* ---- sockets that are open: consoles, control ---- */
	{CALL(accept4), MAIN, ANY, "a client of a socket that was made before"},
	{CALL(setsockopt), MAIN, IS_AND(1, SOL_SOCKET, 2, SO_SNDTIMEO), "a client that reads nothing is hung up"},
	{CALL(shutdown), MAIN | WORKER, ANY, "a client is hung up"},
	{CALL(sendto), MAIN | WORKER, ANY, "a client's output"},
	{CALL(recvfrom), MAIN | WORKER, ANY, "a client's input"},
	{CALL(sendmsg), MAIN, ANY, "a client's output"},
	{CALL(recvmsg), MAIN, ANY, "a client's input"},

	{CALL(unlink), MAIN, ANY, "a socket's file at the end: refused, the keeper does it", EROFS},

	/* ---- a tap: what a guest's driver takes, and how many of its queues ---- */
	{CALL(ioctl), MAIN, IS(1, TUNSETOFFLOAD), "tap: checksums and segments that the guest takes as they are"},
	{CALL(ioctl), MAIN, IS(1, TUNSETQUEUE), "tap: a queue of it is used, or no longer"},

	/* ---- a guest that connects to the host by vsock: the root then holds the folder of --vsock's socket ---- */
	{CALL(socket), VSOCK, IS_AND(0, AF_UNIX, 1, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK),
		"the host's end of a stream"},
	{CALL(connect), VSOCK, ANY, "to PATH_PORT"},

	/* ---- user-mode networking makes the guest's connections from this process, so it needs the host's network and
	 * sockets of it: Internet ones only, and no raw ones ---- */
	{CALL(socket), USER_NET, IS_AND(0, AF_INET, 1, SOCK_STREAM), "the guest's TCP"},
	{CALL(socket), USER_NET, IS_AND(0, AF_INET, 1, SOCK_DGRAM), "the guest's UDP and pings"},
	{CALL(socket), USER_NET, IS_AND(0, AF_INET6, 1, SOCK_STREAM), "the guest's TCP"},
	{CALL(socket), USER_NET, IS_AND(0, AF_INET6, 1, SOCK_DGRAM), "the guest's UDP and pings"},
	{CALL(socket), USER_NET, IS_AND(0, AF_INET, 1, SOCK_STREAM | SOCK_CLOEXEC), "the same"},
	{CALL(socket), USER_NET, IS_AND(0, AF_INET, 1, SOCK_DGRAM | SOCK_CLOEXEC), "the same"},
	{CALL(socket), USER_NET, IS_AND(0, AF_INET6, 1, SOCK_STREAM | SOCK_CLOEXEC), "the same"},
	{CALL(socket), USER_NET, IS_AND(0, AF_INET6, 1, SOCK_DGRAM | SOCK_CLOEXEC), "the same"},
	{CALL(bind), USER_NET, ANY, "libslirp: a source address"},
	{CALL(listen), USER_NET, ANY, "libslirp: forwarded ports come back after a use"},
	{CALL(accept), USER_NET, ANY, "libslirp: a connection to a forwarded port"},
	{CALL(connect), USER_NET, ANY, "libslirp: the guest's connections"},
	{CALL(getsockname), USER_NET, ANY, "libslirp: addresses"},
	{CALL(getpeername), USER_NET, ANY, "libslirp: addresses"},
	{CALL(getsockopt), USER_NET, ANY, "libslirp: did a connection succeed"},
	{CALL(setsockopt), USER_NET, IS(1, SOL_SOCKET), "libslirp: reuse of addresses, urgent data"},
	{CALL(setsockopt), USER_NET, IS(1, IPPROTO_TCP), "libslirp: no delay"},
	{CALL(setsockopt), USER_NET, IS(1, IPPROTO_IP), "libslirp: type of service, time to live"},
	{CALL(setsockopt), USER_NET, IS(1, IPPROTO_IPV6), "libslirp: IPv6 only, hop limit"},
	{CALL(ioctl), USER_NET, IS(1, FIONREAD), "libslirp: how much has arrived"},
	{CALL(ioctl), USER_NET, IS(1, FIONBIO), "libslirp: non-blocking sockets"},
	/* The root holds one file, etc/resolv.conf: libslirp looks at it to find the host's name servers. */
	{CALL(openat), USER_NET, BITS(2, O_ACCMODE | O_CREAT | O_TRUNC, O_RDONLY), "libslirp: reads resolv.conf"},
};

const unsigned seccomp_calls_count = ARRAY_SIZE(seccomp_calls);
