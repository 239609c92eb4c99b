/* The test guest's checks. A check is a function that returns 0 if all is well; what it prints last is the detail of its
 * "CHECK" line. Lines that begin with "VALUE name" are compared by the harness with what the same program prints on the
 * host, "CLOCK" lines with the host's clock.
 *
 * The checks themselves are proved on QEMU's TCG (tests/tools/qemu-as-hostel), which sets TCG in the environment: it raises
 * no #XM, knows no segment limits, and another processor's patch of a loop of one instruction may never be seen. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#define SKIP 77

/* Ends the check with what was expected and what was found. */
#define FAIL(...) \
	do { \
		printf(__VA_ARGS__); \
		printf("\n"); \
		return 1; \
	} while (0)

typedef int check_function(int argc, char **argv);

check_function check_cpuinfo, check_cpus, check_memory, check_clock, check_timers, check_pattern, check_flush;
check_function check_signals, check_threads, check_futex;
check_function check_mmap, check_selfmod, check_selfmod_threads, check_selfmod_mapping;
check_function check_float, check_strings;
check_function check_net, check_vsock_echo;

static inline double clock_seconds(clockid_t id)
{
	struct timespec t;

	clock_gettime(id, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* A small generator (xorshift64*): the same numbers in the guest, on the host and in 32-bit code. */
static inline uint64_t next_random(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 0x2545f4914f6cdd1dull;
}

/* FNV-1a over bytes. */
static inline uint64_t hash_bytes(uint64_t hash, const void *data, size_t length)
{
	const unsigned char *p = data;

	for (size_t i = 0; i < length; i++)
		hash = (hash ^ p[i]) * 0x100000001b3ull;
	return hash;
}
#define HASH_START 0xcbf29ce484222325ull
