/* The test guest's checks, one subcommand each; and those about memory, time and the disk. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "check.h"

/* Touches all free memory but a margin, each page with its own number, and reads it back. */
int check_memory(int argc, char **argv)
{
	struct sysinfo info;
	size_t bytes, pages;
	uint64_t *memory;

	(void)argc, (void)argv;
	sysinfo(&info);
	bytes = (size_t)info.freeram * info.mem_unit;
	bytes = bytes > (64 << 20) ? bytes - (48 << 20) : bytes / 2;
	if (bytes > (size_t)1 << 30)
		bytes = (size_t)1 << 30;
	pages = bytes / 4096;
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		FAIL("mmap of %zu bytes: %s", bytes, strerror(errno));
	for (size_t i = 0; i < pages; i++) {
		if (memory[i * 512 + 7])
			FAIL("page %zu was not zero", i);
		memory[i * 512 + 7] = i * 0x9e3779b97f4a7c15ull;
	}
	for (size_t i = 0; i < pages; i++)
		if (memory[i * 512 + 7] != i * 0x9e3779b97f4a7c15ull)
			FAIL("page %zu lost its value", i);
	printf("%zu MiB touched and read back\n", bytes >> 20);
	return 0;
}

/* Prints a line at the start and the end of N seconds; the harness stamps both with the host's clock. */
int check_clock(int argc, char **argv)
{
	double seconds = argc > 1 ? atof(argv[1]) : 10;
	double mono = clock_seconds(CLOCK_MONOTONIC), raw = clock_seconds(CLOCK_MONOTONIC_RAW), last = mono;
	double real = clock_seconds(CLOCK_REALTIME), now;
	FILE *console = fopen("/dev/console", "w");

	if (!console)
		console = stdout;
	fprintf(console, "CLOCK begin %.6f\n", real);
	fflush(console);
	/* Half of it busy, half asleep. Time never runs backwards, and sleeping lasts at least what was asked. */
	while ((now = clock_seconds(CLOCK_MONOTONIC)) < mono + seconds / 2) {
		if (now < last)
			FAIL("CLOCK_MONOTONIC ran backwards by %.9f s", last - now);
		last = now;
	}
	while ((now = clock_seconds(CLOCK_MONOTONIC)) < mono + seconds)
		usleep(10000);
	fprintf(console, "CLOCK end %.6f\n", clock_seconds(CLOCK_REALTIME));
	fflush(console);
	mono = now - mono;
	raw = clock_seconds(CLOCK_MONOTONIC_RAW) - raw;
	real = clock_seconds(CLOCK_REALTIME) - real;
	if (raw < mono * 0.99 || raw > mono * 1.01 || real < mono * 0.99 || real > mono * 1.01)
		FAIL("clocks differ: monotonic %.4f, raw %.4f, real %.4f s", mono, raw, real);
	printf("%.3f s by every clock\n", mono);
	return 0;
}

static volatile sig_atomic_t alarms;

static void on_alarm(int signal)
{
	(void)signal;
	alarms++;
}

/* Timers of a few kinds: they fire, not early, and not absurdly late. */
int check_timers(int argc, char **argv)
{
	struct itimerval every = {{0, 10000}, {0, 10000}}, off = {0};
	struct itimerspec at = {.it_value = {0, 200000000}};
	double start, late, worst = 0;
	uint64_t ticks;
	int fd;

	(void)argc, (void)argv;
	signal(SIGALRM, on_alarm);
	start = clock_seconds(CLOCK_MONOTONIC);
	setitimer(ITIMER_REAL, &every, NULL);
	while (clock_seconds(CLOCK_MONOTONIC) < start + 1)
		;
	setitimer(ITIMER_REAL, &off, NULL);
	if (alarms < 20 || alarms > 101)
		FAIL("%d alarms of 10 ms in a busy second", (int)alarms);
	for (int i = 0; i < 50; i++) {
		struct timespec nap = {0, 5000000};

		start = clock_seconds(CLOCK_MONOTONIC);
		clock_nanosleep(CLOCK_MONOTONIC, 0, &nap, NULL);
		late = clock_seconds(CLOCK_MONOTONIC) - start - 0.005;
		if (late < 0)
			FAIL("a sleep of 5 ms ended %.6f s early", -late);
		if (late > worst)
			worst = late;
	}
	fd = timerfd_create(CLOCK_MONOTONIC, 0);
	start = clock_seconds(CLOCK_MONOTONIC);
	timerfd_settime(fd, 0, &at, NULL);
	if (read(fd, &ticks, sizeof(ticks)) != sizeof(ticks) || ticks != 1)
		FAIL("timerfd did not fire once");
	late = clock_seconds(CLOCK_MONOTONIC) - start - 0.2;
	if (late < 0 || late > 0.5)
		FAIL("timerfd of 200 ms came %.4f s late", late);
	printf("%d alarms in a second, worst sleep %.2f ms late\n", (int)alarms, worst * 1000);
	return 0;
}

/* pattern write|verify FILE BYTES */
int check_pattern(int argc, char **argv)
{
	uint64_t state = 0x123456789abcdefull, block[512], expected[512];
	size_t bytes;
	int fd, writing;

	if (argc != 4)
		FAIL("usage: pattern write|verify FILE BYTES");
	writing = !strcmp(argv[1], "write");
	bytes = strtoull(argv[3], NULL, 0);
	fd = open(argv[2], writing ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY, 0600);
	if (fd < 0)
		FAIL("%s: %s", argv[2], strerror(errno));
	for (size_t at = 0; at < bytes; at += sizeof(block)) {
		for (int i = 0; i < 512; i++)
			expected[i] = next_random(&state);
		if (writing) {
			if (write(fd, expected, sizeof(expected)) != sizeof(expected))
				FAIL("%s at %zu: %s", argv[2], at, strerror(errno));
		} else {
			if (read(fd, block, sizeof(block)) != sizeof(block))
				FAIL("%s ends at %zu", argv[2], at);
			if (memcmp(block, expected, sizeof(block)))
				FAIL("%s at %zu differs", argv[2], at);
		}
	}
	if (writing && fsync(fd) < 0)
		FAIL("fsync: %s", strerror(errno));
	printf("%zu bytes\n", bytes);
	return 0;
}

/* flush DEVICE: writes block n full of n, flushes it, and only then says "FLUSHED n". Blocks are 64 KiB apart, so that a
 * qcow2 file has to allocate for each. The harness kills the VM and looks for every block that was announced. */
int check_flush(int argc, char **argv)
{
	static uint64_t block[512] __attribute__((aligned(4096)));
	int fd = open(argc > 1 ? argv[1] : "/dev/vda", O_RDWR | O_DIRECT);
	FILE *console = fopen("/dev/console", "w");
	off_t end;

	if (fd < 0 || !console)
		FAIL("%s: %s", argv[1], strerror(errno));
	end = lseek(fd, 0, SEEK_END);
	for (uint64_t n = 1; (off_t)((n + 1) * 65536) <= end; n++) {
		for (int i = 0; i < 512; i++)
			block[i] = n;
		if (pwrite(fd, block, sizeof(block), (off_t)(n * 65536)) != sizeof(block))
			FAIL("block %llu: %s", (unsigned long long)n, strerror(errno));
		if (fdatasync(fd) < 0)
			FAIL("flush: %s", strerror(errno));
		fprintf(console, "FLUSHED %llu\n", (unsigned long long)n);
		fflush(console);
	}
	return 0;
}

static const struct {
	const char *name;
	check_function *run;
} checks[] = {
	{"cpuinfo", check_cpuinfo},
	{"cpus", check_cpus},
	{"memory", check_memory},
	{"clock", check_clock},
	{"timers", check_timers},
	{"pattern", check_pattern},
	{"flush", check_flush},
	{"signals", check_signals},
	{"threads", check_threads},
	{"futex", check_futex},
	{"mmap", check_mmap},
	{"selfmod", check_selfmod},
	{"selfmod-threads", check_selfmod_threads},
	{"selfmod-mapping", check_selfmod_mapping},
	{"float", check_float},
	{"strings", check_strings},
	{"net", check_net},
	{"vsock-echo", check_vsock_echo},
};

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (size_t i = 0; argc > 1 && i < sizeof(checks) / sizeof(checks[0]); i++)
		if (!strcmp(argv[1], checks[i].name))
			return checks[i].run(argc - 1, argv + 1);
	fprintf(stderr, "usage: checks NAME [ARGUMENT]...\n");
	return 2;
}
