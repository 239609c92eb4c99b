#include "engine/tsc.h"

#include <cpuid.h>
#include <pthread.h>
#include <time.h>

static uint64_t tsc_hz;

static uint64_t monotonic(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC_RAW, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* CPUID leaf 0x15 (SDM volume 2, CPUID): crystal frequency and ratio, where the CPU tells both. */
static uint64_t hz_by_cpuid(void)
{
	uint32_t a, b, c, d;

	if (!__get_cpuid_count(0x15, 0, &a, &b, &c, &d) || !a || !b || !c)
		return 0;
	return (uint64_t)c * b / a;
}

/* The tightest of several readings of both clocks at each end, so that a preemption in between does not count. */
static void read_both(uint64_t *ns, uint64_t *tsc)
{
	uint64_t best = UINT64_MAX;

	for (int i = 0; i < 8; i++) {
		uint64_t before = host_tsc(), now = monotonic(), after = host_tsc();

		if (after - before < best) {
			best = after - before;
			*ns = now;
			*tsc = before + (after - before) / 2;
		}
	}
}

static void measure(void)
{
	uint64_t ns0 = 0, tsc0 = 0, ns1 = 0, tsc1 = 0; /* read_both always sets them; gcc cannot see it */
	struct timespec pause = { .tv_nsec = 20000000 };

	tsc_hz = hz_by_cpuid();
	if (tsc_hz)
		return;
	read_both(&ns0, &tsc0);
	nanosleep(&pause, NULL);
	read_both(&ns1, &tsc1);
	tsc_hz = (uint64_t)((unsigned __int128)(tsc1 - tsc0) * 1000000000 / (ns1 - ns0));
	tsc_hz = (tsc_hz + 500) / 1000 * 1000;
}

uint64_t engine_tsc_hz(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, measure);
	return tsc_hz;
}
