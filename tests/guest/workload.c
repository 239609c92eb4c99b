/* The guest's side of bench/run: each workload is timed with the guest's own clock and bracketed by lines that the host
 * stamps with its clock, so that a guest whose clock is wrong is found out. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static void run(char *const argv[])
{
	pid_t pid = vfork();
	int status;

	if (pid == 0) {
		execv("/bin/busybox", argv);
		_exit(127);
	}
	waitpid(pid, &status, 0);
	if (status)
		printf("BENCH-FAILED %s status %#x\n", argv[1], status);
}

static void work_sh(void)
{
	run((char *[]){"busybox", "sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done", NULL});
}

static void work_md5(void)
{
	run((char *[]){"busybox", "sh", "-c", "head -c 536870912 /dev/zero | md5sum >/dev/null", NULL});
}

static void work_spawn(void)
{
	for (int i = 0; i < 500; i++)
		run((char *[]){"busybox", "true", NULL});
}

static void work_dd(void)
{
	run((char *[]){"busybox", "sh", "-c", "dd if=/dev/zero of=/dev/null bs=1 count=600000 2>/dev/null", NULL});
}

static void work_faults(void)
{
	size_t pages = 40000;
	char *memory = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED) {
		printf("BENCH-FAILED faults no memory\n");
		return;
	}
	madvise(memory, pages * 4096, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < pages; i++)
		memory[i * 4096] = 1;
	munmap(memory, pages * 4096);
}

/* Integer, pointers and branches: a hash table of strings, a linked list, a sort, a sieve. */
static int compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

static volatile uint64_t sink;

static void work_integer(void)
{
	enum { ITEMS = 60000, SLOTS = 1 << 16, SIEVE = 2000000 };
	struct node {
		struct node *next;
		char key[16];
		uint32_t count;
	} *nodes = calloc(ITEMS, sizeof(*nodes)), **slots = calloc(SLOTS, sizeof(*slots));
	uint32_t *numbers = malloc(4 * 200000), used = 0;
	unsigned char *sieve = malloc(SIEVE);
	uint64_t state = 7, sum = 0;

	for (int round = 0; round < 11; round++) {
		for (int i = 0; i < 100000; i++) {
			char key[16];
			uint32_t value = (uint32_t)(next_random(&state) % ITEMS), slot;
			struct node *n;
			int length = 0;

			do
				key[length++] = (char)('a' + value % 26);
			while ((value /= 26));
			key[length] = 0;
			slot = (uint32_t)hash_bytes(HASH_START, key, (size_t)length) & (SLOTS - 1);
			for (n = slots[slot]; n && strcmp(n->key, key); n = n->next)
				;
			if (!n && used < ITEMS) {
				n = &nodes[used++];
				strcpy(n->key, key);
				n->next = slots[slot];
				slots[slot] = n;
			}
			if (n)
				sum += ++n->count;
		}
		for (int i = 0; i < 200000; i++)
			numbers[i] = (uint32_t)next_random(&state);
		qsort(numbers, 200000, 4, compare);
		sum += numbers[1000];
		memset(sieve, 1, SIEVE);
		for (uint32_t i = 2; i * i < SIEVE; i++)
			if (sieve[i])
				for (uint32_t k = i * i; k < SIEVE; k += i)
					sieve[k] = 0;
		for (uint32_t i = 2; i < SIEVE; i++)
			sum += sieve[i];
	}
	sink = sum;
	free(nodes);
	free(slots);
	free(numbers);
	free(sieve);
}

/* Floating point: matrix product, an n-body step, a Mandelbrot set. */
static void work_float(void)
{
	enum { N = 200, BODIES = 8 };
	static double a[N][N], b[N][N], c[N][N], x[BODIES][3], v[BODIES][3];
	double total = 0;
	long inside = 0;

	for (int i = 0; i < N; i++)
		for (int k = 0; k < N; k++)
			a[i][k] = i * 0.5 + k, b[i][k] = k * 0.25 - i;
	for (int round = 0; round < 100; round++)
		for (int i = 0; i < N; i++)
			for (int k = 0; k < N; k++) {
				double s = 0;

				for (int j = 0; j < N; j++)
					s += a[i][j] * b[j][k];
				c[i][k] = s;
				total += s;
			}
	for (int i = 0; i < BODIES; i++)
		for (int d = 0; d < 3; d++)
			x[i][d] = (i + 1) * (d + 1) * 0.37, v[i][d] = 0.01 * (i - d);
	for (int step = 0; step < 450000; step++) {
		for (int i = 0; i < BODIES; i++)
			for (int k = i + 1; k < BODIES; k++) {
				double dx = x[i][0] - x[k][0], dy = x[i][1] - x[k][1], dz = x[i][2] - x[k][2];
				double r2 = dx * dx + dy * dy + dz * dz + 0.01, m = 0.0001 / (r2 * __builtin_sqrt(r2));

				v[i][0] -= dx * m, v[i][1] -= dy * m, v[i][2] -= dz * m;
				v[k][0] += dx * m, v[k][1] += dy * m, v[k][2] += dz * m;
			}
		for (int i = 0; i < BODIES; i++)
			for (int d = 0; d < 3; d++)
				x[i][d] += v[i][d] * 0.001;
	}
	for (int py = 0; py < 300; py++)
		for (int px = 0; px < 300; px++) {
			double cx = px / 100.0 - 2, cy = py / 150.0 - 1, zx = 0, zy = 0, t;
			int n = 0;

			while (n < 600 && zx * zx + zy * zy < 4) {
				t = zx * zx - zy * zy + cx;
				zy = 2 * zx * zy + cy;
				zx = t;
				n++;
			}
			inside += n;
		}
	sink = (uint64_t)(int64_t)(total + x[0][0] * 1e6 + (double)inside + c[1][1]);
}

static const struct {
	const char *name;
	void (*work)(void);
} workloads[] = {
	{"sh", work_sh},	 {"md5", work_md5},	    {"spawn", work_spawn}, {"dd", work_dd},
	{"faults", work_faults}, {"integer", work_integer}, {"float", work_float},
};

/* workload all|NAME...: "BENCH name begin", then "BENCH name SECONDS". */
int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (size_t i = 0; i < sizeof(workloads) / sizeof(workloads[0]); i++) {
		int wanted = argc > 1 && !strcmp(argv[1], "all");
		double start;

		for (int k = 1; k < argc; k++)
			wanted |= !strcmp(argv[k], workloads[i].name);
		if (!wanted)
			continue;
		printf("BENCH %s begin\n", workloads[i].name);
		start = clock_seconds(CLOCK_MONOTONIC);
		workloads[i].work();
		printf("BENCH %s %.6f\n", workloads[i].name, clock_seconds(CLOCK_MONOTONIC) - start);
	}
	return 0;
}
