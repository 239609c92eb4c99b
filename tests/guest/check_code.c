/* Mappings and code that changes: what an engine that caches translated code must notice. */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"

static sigjmp_buf back;
static void *fault_at;

static void on_fault(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	fault_at = info->si_addr;
	siglongjmp(back, 1);
}

static int faults(volatile char *address, int write)
{
	if (sigsetjmp(back, 1))
		return 1;
	if (write)
		*address = 1;
	else
		(void)*address;
	return 0;
}

/* Protections change and take effect at once, mappings move, files and memory agree. */
int check_mmap(int argc, char **argv)
{
	struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
	size_t bytes = 4 << 20;
	char *area, *moved, *one, *two, name[] = "/tmp/mmapXXXXXX";
	int fd;

	(void)argc, (void)argv;
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	area = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (area == MAP_FAILED)
		FAIL("mmap: %s", strerror(errno));
	memset(area, 0x5a, bytes);
	for (int round = 0; round < 300; round++) {
		char *page = area + (size_t)(round % 1024) * 4096;

		if (mprotect(page, 4096, PROT_READ))
			FAIL("mprotect: %s", strerror(errno));
		if (!faults(page + 8, 1) || fault_at != page + 8)
			FAIL("round %d: a write to a page made read-only did not fault", round);
		if (faults(page + 8, 0))
			FAIL("round %d: a read of a read-only page faulted", round);
		mprotect(page, 4096, PROT_NONE);
		if (!faults(page, 0))
			FAIL("round %d: a page without rights was read", round);
		mprotect(page, 4096, PROT_READ | PROT_WRITE);
		if (faults(page + 8, 1) || page[9] != 0x5a)
			FAIL("round %d: a page made writable again faulted or lost its content", round);
		page[8] = 0x5a;
	}
	moved = mremap(area, bytes, 2 * bytes, MREMAP_MAYMOVE);
	if (moved == MAP_FAILED)
		FAIL("mremap: %s", strerror(errno));
	for (size_t i = 0; i < bytes; i++)
		if (moved[i] != 0x5a)
			FAIL("byte %zu lost in mremap", i);
	if (moved[bytes])
		FAIL("new memory is not zero");
	/* MADV_DONTNEED: zero again, at once. */
	madvise(moved, 8192, MADV_DONTNEED);
	if (moved[0] || moved[8191] || moved[8192] != 0x5a)
		FAIL("MADV_DONTNEED: %d %d %d", moved[0], moved[8191], moved[8192]);
	munmap(moved, 2 * bytes);
	if (!faults(moved, 0))
		FAIL("an unmapped page was read");

	/* One page of a file twice in the address space. */
	fd = mkstemp(name);
	unlink(name);
	if (fd < 0 || ftruncate(fd, 8192))
		FAIL("temporary file: %s", strerror(errno));
	one = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	two = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	for (int i = 0; i < 4096; i++) {
		((volatile char *)one)[i] = (char)i;
		if (((volatile char *)two)[i] != (char)i)
			FAIL("two mappings of one page differ at %d", i);
	}
	/* Another page put under the same address must show at once. */
	one = mmap(one, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 4096);
	two[4096 + 5] = 77;
	if (one[5] != 77)
		FAIL("a page mapped over another shows the old one");
	if (ftruncate(fd, 4096) || !faults(one, 0))
		FAIL("no SIGBUS behind the end of a file");
	/* Copy on write after fork, in both directions. */
	area = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	area[0] = 1;
	if (fork() == 0) {
		if (area[0] != 1)
			_exit(1);
		area[0] = 2;
		_exit(area[0] == 2 ? 0 : 1);
	} else {
		int status;

		area[0] = 3;
		if (syscall(SYS_wait4, -1, &status, 0, NULL) < 0 || status)
			FAIL("child's copy on write: status %#x", status);
		if (area[0] != 3)
			FAIL("parent's page was changed by the child");
	}
	printf("300 changes of protection, mremap, two views of a page, copy on write\n");
	return 0;
}

/* mov $VALUE, %eax; ret */
static void put_return(unsigned char *at, uint32_t value)
{
	at[0] = 0xb8;
	memcpy(at + 1, &value, 4);
	at[5] = 0xc3;
}

typedef uint32_t code(void);

int check_selfmod(int argc, char **argv)
{
	unsigned char *page = mmap(NULL, 65536, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint32_t got;

	(void)argc, (void)argv;
	if (page == MAP_FAILED)
		FAIL("mmap: %s", strerror(errno));
	/* Written, run, patched, run. */
	for (uint32_t i = 0; i < 3000; i++) {
		put_return(page + 100, i);
		if ((got = ((code *)(page + 100))()) != i)
			FAIL("round %u: the patched function returned %u", i, got);
	}
	/* Across a page boundary, one byte patched on either side. */
	for (int cut = 1; cut < 6; cut++) {
		unsigned char *at = page + 4096 * 3 - cut;

		for (uint32_t i = 0; i < 300; i++) {
			put_return(at, i * 0x01010101u);
			if ((got = ((code *)at)()) != i * 0x01010101u)
				FAIL("cut %d, round %u: returned %#x", cut, i, got);
			at[4] = 0x77; /* the value's highest byte */
			if ((got = ((code *)at)()) != ((i * 0x01010101u & 0xffffff) | 0x77000000))
				FAIL("cut %d, round %u: returned %#x after one byte was patched", cut, i, got);
		}
	}
	/* An instruction that patches the one right behind it: x86 promises that this works. */
	for (uint32_t i = 0; i < 300; i++) {
		unsigned char *at = page + 8192 + (i % 64) * 40;
		int32_t distance = 1; /* from the end of the first instruction to the immediate */

		/* movl $i, 1(%rip) ; mov $0, %eax ; ret */
		at[0] = 0xc7, at[1] = 0x05;
		memcpy(at + 2, &distance, 4);
		memcpy(at + 6, &i, 4);
		put_return(at + 10, 0xdead);
		if ((got = ((code *)at)()) != i)
			FAIL("round %u: an instruction patched by its predecessor gave %#x", i, got);
	}
	/* A loop that patches its own body while it runs: adds 1, 2, 3 ... up. */
	{
		static const unsigned char loop[] = {
			0x31, 0xc0,				  /* xor %eax, %eax */
			0xb9, 0x64, 0, 0, 0,			  /* mov $100, %ecx */
			0x05, 1, 0, 0, 0,			  /* again: add $1, %eax */
			0xff, 0x05, 0xf6, 0xff, 0xff, 0xff,	  /* incl again+1(%rip): from +18 to +8 = -10 */
			0xff, 0xc9,				  /* dec %ecx */
			0x75, 0xf1,				  /* jnz again */
			0xc3,
		};

		for (int i = 0; i < 50; i++) {
			memcpy(page + 20000, loop, sizeof(loop));
			if ((got = ((code *)(page + 20000))()) != 5050)
				FAIL("loop that patches itself: %u instead of 5050", got);
		}
	}
	/* REP MOVSB over code, and code that is replaced by memcpy of whole pages. */
	for (uint32_t i = 0; i < 300; i++) {
		static unsigned char copy[8192];
		unsigned char *to = page + 32768;
		size_t n = sizeof(copy);
		void *d = to, *s = copy;

		put_return(copy + 4093, i ^ 0x5555);
		asm volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n)::"memory");
		if ((got = ((code *)(to + 4093))()) != (i ^ 0x5555))
			FAIL("code copied by rep movsb returned %#x in round %u", got, i);
	}
	/* Through read(2): the kernel writes the code. */
	for (uint32_t i = 0; i < 300; i++) {
		unsigned char text[6];
		int ends[2];

		if (pipe(ends))
			FAIL("pipe: %s", strerror(errno));
		put_return(text, i + 7);
		if (write(ends[1], text, 6) != 6 || read(ends[0], page + 100, 6) != 6)
			FAIL("pipe: %s", strerror(errno));
		if ((got = ((code *)(page + 100))()) != i + 7)
			FAIL("code written by the kernel returned %#x in round %u", got, i);
		close(ends[0]);
		close(ends[1]);
	}
	printf("patched, across pages, by its predecessor, in a loop, by the kernel\n");
	return 0;
}

static unsigned char *shared_code;
static atomic_uint written, answered;
static atomic_int stop;
static uint32_t wrong_round, wrong_got;

/* Runs the code each time the writer says that it has changed it; the cpuid serializes, as the SDM asks of the other
 * processor (volume 3, section 9.1.3, cross-modifying code). */
static void *runner(void *argument)
{
	(void)argument;
	for (uint32_t last = 0; !stop;) {
		uint32_t round = atomic_load(&written), got;

		if (round == last) {
			sched_yield();
			continue;
		}
		asm volatile("xor %%eax, %%eax; cpuid" ::: "eax", "ebx", "ecx", "edx", "memory");
		got = ((code *)shared_code)();
		if (got != round && !wrong_round) {
			wrong_round = round;
			wrong_got = got;
		}
		last = round;
		atomic_store(&answered, round);
	}
	return NULL;
}

/* A tight loop on a byte of code that another thread flips, without any hand-shake: it must notice within a second. */
static void *spinner(void *argument)
{
	(void)argument;
	/* jmp self, until the writer turns the jump into a return */
	((void (*)(void))(shared_code + 256))();
	return NULL;
}

int check_selfmod_threads(int argc, char **argv)
{
	pthread_t thread;

	(void)argc, (void)argv;
	shared_code = mmap(NULL, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (int place = 0; place < 2; place++) {
		unsigned char *base = shared_code;

		shared_code = base + (place ? 4093 : 0); /* once across the page boundary */
		written = answered = 0;
		stop = 0;
		put_return(shared_code, 0);
		pthread_create(&thread, NULL, runner, NULL);
		for (uint32_t round = 1; round <= 2000; round++) {
			double start = clock_seconds(CLOCK_MONOTONIC);

			put_return(shared_code, round);
			atomic_store(&written, round);
			while (atomic_load(&answered) != round) {
				if (clock_seconds(CLOCK_MONOTONIC) > start + 20)
					FAIL("round %u: no answer for 20 s", round);
				sched_yield();
			}
		}
		stop = 1;
		pthread_join(thread, NULL);
		if (wrong_round)
			FAIL("round %u: the other processor ran old code (%u)", wrong_round, wrong_got);
		shared_code = base;
	}
	for (int i = 0; i < 20 && !getenv("TCG"); i++) {
		shared_code[256] = 0xeb;
		shared_code[257] = 0xfe;
		shared_code[258] = 0xc3;
		pthread_create(&thread, NULL, spinner, NULL);
		usleep(5000);
		/* One aligned two-byte store: jmp +0, then ret. */
		atomic_store((atomic_ushort *)(shared_code + 256), 0x00eb);
		pthread_join(thread, NULL);
	}
	printf("4000 patches by another thread, 20 spinning loops released\n");
	return 0;
}

/* The same virtual address with other code behind it, and the same code written through another mapping. */
int check_selfmod_mapping(int argc, char **argv)
{
	int fd = (int)syscall(SYS_memfd_create, "code", 0);
	unsigned char *writer, *reader, *fixed;
	uint32_t got;

	(void)argc, (void)argv;
	if (fd < 0 || ftruncate(fd, 16384))
		FAIL("memfd: %s", strerror(errno));
	writer = mmap(NULL, 16384, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	reader = mmap(NULL, 16384, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
	if (writer == MAP_FAILED || reader == MAP_FAILED)
		FAIL("mmap: %s", strerror(errno));
	for (uint32_t i = 0; i < 2000; i++) {
		size_t at = i % 3 ? 4090 : 128;

		put_return(writer + at, i);
		if ((got = ((code *)(reader + at))()) != i)
			FAIL("round %u: code written through another mapping returned %u", i, got);
	}
	for (uint32_t i = 0; i < 4; i++)
		put_return(writer + i * 4096, 1000 + i);
	fixed = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
	for (uint32_t i = 0; i < 400; i++) {
		if (mmap(fixed, 4096, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED, fd, (off_t)(i % 4) * 4096) != fixed)
			FAIL("mmap: %s", strerror(errno));
		if ((got = ((code *)fixed)()) != 1000 + i % 4)
			FAIL("round %u: page %u mapped at the address, %u ran", i, i % 4, got);
	}
	/* Taking the execute right away works although the code ran a moment ago. */
	{
		struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};

		sigaction(SIGSEGV, &action, NULL);
		mprotect(fixed, 4096, PROT_READ);
		if (!sigsetjmp(back, 1)) {
			((code *)fixed)();
			FAIL("code ran on a page without the execute right");
		}
	}
	printf("2000 patches through a second mapping, 400 exchanged pages\n");
	return 0;
}
