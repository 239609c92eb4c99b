/* The host's time stamp counter. */
#pragma once

#include <stdint.h>

/* Its frequency in Hz, measured once (CPUID where it tells, else against CLOCK_MONOTONIC_RAW over some milliseconds). */
uint64_t engine_tsc_hz(void);

static inline uint64_t host_tsc(void)
{
	uint32_t lo, hi;

	__asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi));
	return (uint64_t)hi << 32 | lo;
}
