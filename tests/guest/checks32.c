/* The 32-bit static program: arithmetic, segments and TLS, signals, system calls (through int 0x80 and the vDSO), threads. */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <asm/ldt.h>
#include <ucontext.h>
#include <unistd.h>

#include "check.h"

static sigjmp_buf back;
static siginfo_t seen;
static __thread uint32_t own = 17;
static atomic_uint total;

static void on_signal(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	seen = *info;
	siglongjmp(back, 1);
}

#define EXPECT_SIGNAL(text, signal, ...) \
	do { \
		memset(&seen, 0, sizeof(seen)); \
		if (!sigsetjmp(back, 1)) { \
			__VA_ARGS__; \
			FAIL(text ": no signal"); \
		} \
		if (seen.si_signo != (signal)) \
			FAIL(text ": signal %d", seen.si_signo); \
	} while (0)

static void *worker(void *argument)
{
	own = (uint32_t)(uintptr_t)argument;
	for (int i = 0; i < 20000; i++) {
		own += 3;
		atomic_fetch_add(&total, 1);
	}
	return (void *)(uintptr_t)own;
}

/* Instructions that exist in 32-bit code alone. */
static int legacy_instructions(void)
{
	uint32_t a, b, flags;

	asm volatile("mov $0x0f, %%al; add $1, %%al; daa" : "=a"(a) : "0"(0) : "cc");
	if ((a & 255) != 0x16)
		FAIL("daa gives %#x", a & 255);
	asm volatile("mov $0x0207, %%eax; aad" : "=a"(a)::"cc");
	if ((a & 0xffff) != 27)
		FAIL("aad gives %#x", a & 0xffff);
	asm volatile("mov $63, %%eax; aam" : "=a"(a)::"cc");
	if ((a & 0xffff) != 0x0603)
		FAIL("aam gives %#x", a & 0xffff);
	asm volatile("mov $0x0f, %%eax; aaa" : "=a"(a)::"cc");
	if ((a & 0xffff) != 0x0105)
		FAIL("aaa gives %#x", a & 0xffff);
	/* inc and dec by their one-byte forms leave the carry alone */
	asm volatile("stc; mov $0xffffffff, %%eax; .byte 0x40; setc %%bl; movzbl %%bl, %%ebx" : "=a"(a), "=b"(b)::"cc");
	if (a != 0 || b != 1)
		FAIL("inc: %#x, carry %u", a, b);
	/* pusha, popa */
	asm volatile("mov $0x1234567, %%ecx; pusha; xor %%ecx, %%ecx; popa; mov %%ecx, %%eax" : "=a"(a)::"ecx", "memory");
	if (a != 0x1234567)
		FAIL("pusha and popa: %#x", a);
	asm volatile("pushf; pop %0; and $2, %0" : "=r"(flags)::"memory");
	if (flags != 2)
		FAIL("flags: %#x", flags);
	/* 16-bit operands and addresses, salc, and a far call through the code segment */
	asm volatile("stc; .byte 0xd6; movsbl %%al, %%eax" : "=a"(a)::"cc");
	if (a != 0xffffffff)
		FAIL("salc gives %#x", a);
	asm volatile("xor %%eax, %%eax; push %%cs; call 1f; jmp 2f; 1: mov $77, %%eax; lret; 2:" : "=a"(a)::"memory", "cc");
	if (a != 77)
		FAIL("far return: %u", a);
	EXPECT_SIGNAL("bound", SIGSEGV, asm volatile("bound %0, %1" ::"r"(9), "m"(((int[2]){1, 5}))));
	EXPECT_SIGNAL("into", SIGSEGV, asm volatile("mov $0x7fffffff, %%eax; add $1, %%eax; into" ::: "eax", "cc"));
	EXPECT_SIGNAL("invalid opcode in 32-bit code", SIGILL, asm volatile("ud2"));
	return 0;
}

/* A descriptor of one's own in the LDT: base and limit take effect. */
static int segments(void)
{
	static uint32_t words[4] = {0x11, 0x22, 0x33, 0x44};
	struct user_desc d = {.entry_number = 3, .base_addr = (unsigned)(uintptr_t)words, .limit = 11, .seg_32bit = 1,
			      .useable = 1};
	unsigned short old;
	uint32_t a;

	if (syscall(SYS_modify_ldt, 1, &d, sizeof(d))) {
		if (errno == ENOSYS)
			return 0; /* CONFIG_MODIFY_LDT_SYSCALL is off */
		FAIL("modify_ldt: %s", strerror(errno));
	}
	asm volatile("mov %%fs, %0" : "=r"(old));
	asm volatile("mov %w1, %%fs; mov %%fs:8, %0; mov %w2, %%fs" : "=&r"(a) : "r"(3 << 3 | 7), "r"(old));
	if (a != 0x33)
		FAIL("a segment's base: %#x instead of 0x33", a);
	EXPECT_SIGNAL("a selector without a descriptor", SIGSEGV, asm volatile("mov %w0, %%fs" ::"r"(0x7f7)));
	asm volatile("mov %w0, %%fs" ::"r"(old));
	return 0;
}

static int segment_limit(void)
{
	static uint32_t words[4] = {0x11, 0x22, 0x33, 0x44};
	struct user_desc d = {.entry_number = 4, .base_addr = (unsigned)(uintptr_t)words, .limit = 11, .seg_32bit = 1,
			      .useable = 1};
	unsigned short old;

	if (getenv("TCG") || syscall(SYS_modify_ldt, 1, &d, sizeof(d)))
		return 0;
	asm volatile("mov %%fs, %0" : "=r"(old));
	EXPECT_SIGNAL("read beyond a segment's limit", SIGSEGV,
		      asm volatile("mov %w0, %%fs; mov %%fs:12, %%eax" ::"r"(4 << 3 | 7) : "eax"));
	asm volatile("mov %w0, %%fs" ::"r"(old));
	return 0;
}

int main(void)
{
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO};
	uint64_t hash = HASH_START, state = 42, a, b;
	pthread_t thread[4];
	struct utsname name;
	volatile int zero = 0;
	volatile char *page;
	uint32_t id;
	int status;

	for (const int *s = (const int[]){SIGSEGV, SIGFPE, SIGILL, SIGBUS, 0}; *s; s++)
		sigaction(*s, &action, NULL);
	for (int i = 0; i < 20000; i++) {
		a = next_random(&state);
		b = next_random(&state) | 1;
		a = a / b + a % (b >> 20 | 1) + (a << (b & 63)) + (uint64_t)((int64_t)a >> (b & 31));
		a ^= (uint64_t)((double)(uint32_t)a * 1.5);
		hash = hash_bytes(hash, &a, sizeof(a));
	}
	printf("VALUE i386-arithmetic %016llx\n", (unsigned long long)hash);
	if (legacy_instructions() || segments())
		return 1;
	EXPECT_SIGNAL("division by zero", SIGFPE, zero = 5 / zero);
	page = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	EXPECT_SIGNAL("read without right", SIGSEGV, (void)page[40]);
	if (seen.si_addr != (void *)(page + 40))
		FAIL("si_addr %p instead of %p", seen.si_addr, (void *)(page + 40));
	EXPECT_SIGNAL("read of the last page", SIGSEGV, (void)*(volatile char *)0xfffff010);
	if (seen.si_addr != (void *)0xfffff010)
		FAIL("si_addr %p instead of 0xfffff010", seen.si_addr);
	asm volatile("int $0x80" : "=a"(id) : "0"(SYS_getpid));
	if ((pid_t)id != getpid())
		FAIL("int 0x80 says pid %u", id);
	for (uintptr_t i = 0; i < 4; i++)
		pthread_create(&thread[i], NULL, worker, (void *)(i * 1000));
	for (uintptr_t i = 0; i < 4; i++) {
		void *result;

		pthread_join(thread[i], &result);
		if ((uintptr_t)result != i * 1000 + 60000)
			FAIL("thread %u ends with %u", (unsigned)i, (unsigned)(uintptr_t)result);
	}
	if (total != 80000 || own != 17)
		FAIL("counted %u, own %u", total, own);
	for (int i = 0; i < 20; i++) {
		if (fork() == 0)
			_exit(i);
		wait(&status);
		if (WEXITSTATUS(status) != i)
			FAIL("child %d: status %#x", i, status);
	}
	uname(&name);
	if (segment_limit())
		return 1;
	printf("legacy instructions, segments, faults, threads, children under %s\n", name.machine);
	return 0;
}
