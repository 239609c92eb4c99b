/* Signals and threads. */
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include "check.h"

static sigjmp_buf back;
static siginfo_t seen;
static uint64_t seen_ip, seen_error, seen_trap;
static void *seen_sp;

static void on_signal(int signal, siginfo_t *info, void *context)
{
	ucontext_t *u = context;
	int local;

	(void)signal;
	seen = *info;
	seen_ip = (uint64_t)u->uc_mcontext.gregs[REG_RIP];
	seen_error = (uint64_t)u->uc_mcontext.gregs[REG_ERR];
	seen_trap = (uint64_t)u->uc_mcontext.gregs[REG_TRAPNO];
	seen_sp = &local;
	siglongjmp(back, 1);
}

/* Does what TEXT says and expects signal SIGNAL with si_code CODE from it. */
#define EXPECT_SIGNAL(text, signal, code, ...) \
	do { \
		memset(&seen, 0, sizeof(seen)); \
		if (!sigsetjmp(back, 1)) { \
			__VA_ARGS__; \
			FAIL(text ": no signal"); \
		} \
		if (seen.si_signo != (signal) || seen.si_code != (code)) \
			FAIL(text ": signal %d code %d", seen.si_signo, seen.si_code); \
	} while (0)

static void on_trap(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	seen = *info;
}

static atomic_int steps;

static void on_step(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)info, (void)context;
	steps++;
}

static int unmasked_sse(void)
{
	/* A masked exception in the MXCSR is quiet, an unmasked one comes as #XM. */
	EXPECT_SIGNAL("SSE division by zero, unmasked", SIGFPE, FPE_FLTDIV, {
		unsigned csr = 0x1f80 & ~0x200;
		double one = 1, nothing = 0;

		asm volatile("ldmxcsr %0" ::"m"(csr));
		asm volatile("divsd %1, %0" : "+x"(one) : "x"(nothing));
	});
	asm volatile("ldmxcsr %0" ::"m"((unsigned){0x1f80}));
	return 0;
}

int check_signals(int argc, char **argv)
{
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK};
	struct sigaction trap = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_ONSTACK};
	struct sigaction step = {.sa_sigaction = on_step, .sa_flags = SA_SIGINFO | SA_ONSTACK};
	static char alternate[65536];
	stack_t stack = {.ss_sp = alternate, .ss_size = sizeof(alternate)};
	char *page = mmap(NULL, 8192, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	volatile int zero = 0;
	int status;

	(void)argc, (void)argv;
	sigaltstack(&stack, NULL);
	for (const int *s = (const int[]){SIGSEGV, SIGFPE, SIGILL, SIGBUS, 0}; *s; s++)
		sigaction(*s, &action, NULL);
	munmap(page + 4096, 4096);

	EXPECT_SIGNAL("write to a read-only page", SIGSEGV, SEGV_ACCERR, *(volatile char *)(page + 5) = 1);
	/* Error code: user (4), write (2), and present (1) only if the page was ever mapped in. */
	if (seen.si_addr != page + 5 || seen_trap != 14 || (seen_error & ~1ull) != 6)
		FAIL("write to %p: si_addr %p trap %d error %#x", (void *)(page + 5), seen.si_addr, (int)seen_trap,
		     (int)seen_error);
	if ((char *)seen_sp < alternate || (char *)seen_sp >= alternate + sizeof(alternate))
		FAIL("the handler ran at %p, not on the alternate stack", seen_sp);
	EXPECT_SIGNAL("read of an unmapped page", SIGSEGV, SEGV_MAPERR, (void)*(volatile char *)(page + 4096 + 9));
	if (seen.si_addr != page + 4096 + 9 || seen_error != 4)
		FAIL("read: si_addr %p error %#x", seen.si_addr, (int)seen_error);
	/* An access across the end of the mapping names the first byte that is missing. */
	EXPECT_SIGNAL("read across a page end", SIGSEGV, SEGV_MAPERR, (void)*(volatile uint64_t *)(page + 4096 - 3));
	if (seen.si_addr != page + 4096)
		FAIL("read across a page end: si_addr %p instead of %p", seen.si_addr, (void *)(page + 4096));
	EXPECT_SIGNAL("jump to an unmapped page", SIGSEGV, SEGV_MAPERR, ((void (*)(void))(page + 4096 + 64))());
	if (seen.si_addr != page + 4096 + 64 || seen_ip != (uint64_t)(page + 4096 + 64))
		FAIL("jump: si_addr %p, ip %#llx", seen.si_addr, (unsigned long long)seen_ip);
	EXPECT_SIGNAL("jump to a page without execute right", SIGSEGV, SEGV_ACCERR, ((void (*)(void))(page + 16))());
	EXPECT_SIGNAL("address that is not canonical", SIGSEGV, SI_KERNEL,
		      (void)*(volatile char *)0x1234567890123456ull);
	EXPECT_SIGNAL("integer division by zero", SIGFPE, FPE_INTDIV, zero = 5 / zero);
	zero = 0;
	EXPECT_SIGNAL("quotient too large", SIGFPE, FPE_INTDIV,
		      asm volatile("mov $0x80000000, %%eax; cltd; mov $-1, %%ecx; idiv %%ecx" ::: "eax", "ecx", "edx", "cc"));
	EXPECT_SIGNAL("ud2", SIGILL, ILL_ILLOPN, asm volatile("ud2"));
	EXPECT_SIGNAL("hlt in user mode", SIGSEGV, SI_KERNEL, asm volatile("hlt"));
	EXPECT_SIGNAL("cli in user mode", SIGSEGV, SI_KERNEL, asm volatile("cli"));
	EXPECT_SIGNAL("aligned SSE access to an odd address", SIGSEGV, SI_KERNEL,
		      asm volatile("movaps (%0), %%xmm0" ::"r"(page + 1) : "xmm0"));
	EXPECT_SIGNAL("x87 division by zero, unmasked", SIGFPE, FPE_FLTDIV, {
		unsigned short cw = 0x37f & ~4;

		asm volatile("fninit; fldcw %0; fld1; fldz; fdivrp; fwait" ::"m"(cw));
	});
	asm volatile("fninit");

	sigaction(SIGTRAP, &trap, NULL);
	memset(&seen, 0, sizeof(seen));
	asm volatile("int3");
	if (seen.si_signo != SIGTRAP)
		FAIL("int3: no SIGTRAP");
	/* The trap flag: one signal per instruction until it is cleared. */
	sigaction(SIGTRAP, &step, NULL);
	asm volatile("pushf\n\torl $0x100, (%%rsp)\n\tpopf\n\tnop\n\tnop\n\tnop\n\tpushf\n\tandl $~0x100, (%%rsp)\n\tpopf" ::
			     : "memory", "cc");
	if (steps != 6)
		FAIL("single steps: %d instead of 6", (int)steps);

	/* A child that dies of its fault is reported so. */
	if (fork() == 0) {
		signal(SIGSEGV, SIG_DFL);
		*(volatile char *)(uintptr_t)zero = 1;
		_exit(0);
	}
	wait(&status);
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGSEGV)
		FAIL("child: status %#x", status);
	/* Signals by the thousand, to interrupt all kinds of places. */
	sigaction(SIGUSR1, &step, NULL);
	steps = 0;
	for (int i = 0; i < 5000; i++)
		kill(getpid(), SIGUSR1);
	if (steps != 5000)
		FAIL("%d of 5000 signals arrived", (int)steps);
	if (!getenv("TCG") && unmasked_sse())
		return 1;
	printf("15 faults with their addresses and codes, steps, 5000 signals\n");
	return 0;
}

#define THREADS 8
#define ROUNDS 100000
static atomic_ulong counter64, order_failures;
static atomic_uint counter32, bits;
static atomic_ushort counter16;
static _Alignas(16) struct {
	uint64_t low, high;
} counter128;
static unsigned long plain;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static atomic_int spin;
static unsigned long guarded;

static void *count(void *argument)
{
	unsigned self = (unsigned)(uintptr_t)argument;

	for (int i = 0; i < ROUNDS; i++) {
		unsigned long expected;
		int unlocked = 0;

		atomic_fetch_add(&counter64, 3);
		atomic_fetch_sub(&counter32, 1);
		atomic_fetch_add(&counter16, 1);
		atomic_fetch_xor(&bits, 1u << self);
		expected = atomic_load(&order_failures);
		while (!atomic_compare_exchange_weak(&order_failures, &expected, expected))
			;
		if (i % 4 == 0) {
			uint64_t low = counter128.low, high = counter128.high;
			unsigned char done;

			do {
				asm volatile("lock cmpxchg16b %1; sete %0"
					     : "=q"(done), "+m"(counter128), "+a"(low), "+d"(high)
					     : "b"(low + 1), "c"(high + 2)
					     : "cc");
			} while (!done);
		}
		if (i % 16 == 0) {
			pthread_mutex_lock(&mutex);
			plain++;
			pthread_mutex_unlock(&mutex);
			while (!atomic_compare_exchange_weak(&spin, &unlocked, 1)) {
				unlocked = 0;
				if (i % 256 == 0)
					sched_yield();
				__builtin_ia32_pause();
			}
			guarded++;
			atomic_store(&spin, 0);
		}
	}
	return NULL;
}

/* Dekker's test: with sequential consistency, two threads cannot both see the other's store missing. */
static atomic_int dekker_x, dekker_y, dekker_go, dekker_done;
static int dekker_seen_x, dekker_seen_y;

static void *dekker(void *argument)
{
	(void)argument;
	for (int round = 1; round <= 20000; round++) {
		while (atomic_load(&dekker_go) < round)
			sched_yield();
		atomic_store(&dekker_y, 1);
		dekker_seen_x = atomic_load(&dekker_x);
		atomic_store(&dekker_done, round);
	}
	return NULL;
}

int check_threads(int argc, char **argv)
{
	pthread_t thread[THREADS];

	(void)argc, (void)argv;
	for (int i = 0; i < THREADS; i++)
		if (pthread_create(&thread[i], NULL, count, (void *)(uintptr_t)i))
			FAIL("thread %d: %s", i, strerror(errno));
	for (int i = 0; i < THREADS; i++)
		pthread_join(thread[i], NULL);
	if (counter64 != 3ul * THREADS * ROUNDS || counter32 != -(unsigned)(THREADS * ROUNDS) ||
	    counter16 != (unsigned short)(THREADS * ROUNDS) || bits != 0)
		FAIL("counters: %lu %u %u %#x", counter64, counter32, counter16, bits);
	if (counter128.low != THREADS * ROUNDS / 4 || counter128.high != THREADS * ROUNDS / 2)
		FAIL("cmpxchg16b: %lu %lu", counter128.low, counter128.high);
	if (plain != THREADS * ROUNDS / 16 || guarded != THREADS * ROUNDS / 16)
		FAIL("mutex: %lu, spin lock: %lu of %d", plain, guarded, THREADS * ROUNDS / 16);

	pthread_create(&thread[0], NULL, dekker, NULL);
	for (int round = 1; round <= 20000; round++) {
		dekker_x = dekker_y = 0;
		atomic_store(&dekker_go, round);
		atomic_store(&dekker_x, 1);
		dekker_seen_y = atomic_load(&dekker_y);
		while (atomic_load(&dekker_done) < round)
			sched_yield();
		if (!dekker_seen_x && !dekker_seen_y)
			FAIL("a store passed a later load in round %d", round);
	}
	pthread_join(thread[0], NULL);
	printf("%d threads of %d rounds, no count lost\n", THREADS, ROUNDS);
	return 0;
}

static uint32_t turn;

static void *pass_back(void *argument)
{
	(void)argument;
	for (uint32_t i = 0; i < 2000; i++) {
		while (__atomic_load_n(&turn, __ATOMIC_SEQ_CST) != 2 * i + 1)
			syscall(SYS_futex, &turn, FUTEX_WAIT, 2 * i, NULL, NULL, 0);
		__atomic_store_n(&turn, 2 * i + 2, __ATOMIC_SEQ_CST);
		syscall(SYS_futex, &turn, FUTEX_WAKE, 1, NULL, NULL, 0);
	}
	return NULL;
}

/* Two threads hand a turn to and fro through the kernel: a lost wake-up or interrupt hangs it. */
int check_futex(int argc, char **argv)
{
	double start = clock_seconds(CLOCK_MONOTONIC);
	pthread_t other;

	(void)argc, (void)argv;
	pthread_create(&other, NULL, pass_back, NULL);
	for (uint32_t i = 0; i < 2000; i++) {
		__atomic_store_n(&turn, 2 * i + 1, __ATOMIC_SEQ_CST);
		syscall(SYS_futex, &turn, FUTEX_WAKE, 1, NULL, NULL, 0);
		while (__atomic_load_n(&turn, __ATOMIC_SEQ_CST) != 2 * i + 2)
			syscall(SYS_futex, &turn, FUTEX_WAIT, 2 * i + 1, NULL, NULL, 0);
	}
	pthread_join(other, NULL);
	printf("2000 turns, %.0f us each\n", (clock_seconds(CLOCK_MONOTONIC) - start) / 2000 * 1e6);
	return 0;
}
