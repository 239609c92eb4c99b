/* What the guest is told about its processors. */
#include <cpuid.h>
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

/* Prints the number of processors and the flags of the first; all processors must have the same ones. */
int check_cpuinfo(int argc, char **argv)
{
	FILE *file = fopen("/proc/cpuinfo", "r");
	static char line[8192], first[8192];
	int processors = 0;

	(void)argc, (void)argv;
	if (!file)
		FAIL("/proc/cpuinfo: %s", strerror(errno));
	while (fgets(line, sizeof(line), file)) {
		if (!strncmp(line, "processor", 9))
			processors++;
		if (strncmp(line, "flags", 5))
			continue;
		if (!first[0])
			strcpy(first, line);
		else if (strcmp(first, line))
			FAIL("processor %d has other flags than the first", processors - 1);
	}
	fclose(file);
	printf("VALUE cpus %d\n", processors);
	printf("VALUE flags%s", strchr(first, ':') ? strchr(first, ':') + 1 : " none\n");
	/* What every 64-bit Debian program may use. */
	for (const char *const *f = (const char *const[]){" fpu ", " cx8 ", " cmov ", " sse2 ", " fxsr ", " syscall ", " nx ",
							 " lm ", " tsc ", NULL};
	     *f; f++)
		if (!strstr(first, *f))
			FAIL("the flag%sis missing", *f);
	if (processors != sysconf(_SC_NPROCESSORS_CONF))
		FAIL("%d processors online of %ld", processors, sysconf(_SC_NPROCESSORS_CONF));
	printf("%d processors\n", processors);
	return 0;
}

/* Runs on each processor in turn, and asks each who it is. */
int check_cpus(int argc, char **argv)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned seen[256] = {0}, a, b, c, d;

	(void)argc, (void)argv;
	for (int round = 0; round < 20; round++) {
		for (long i = 0; i < cpus; i++) {
			cpu_set_t set;

			CPU_ZERO(&set);
			CPU_SET(i, &set);
			if (sched_setaffinity(0, sizeof(set), &set) < 0)
				FAIL("moving to processor %ld: %s", i, strerror(errno));
			if (sched_getcpu() != i)
				FAIL("on processor %d instead of %ld", sched_getcpu(), i);
			__cpuid(1, a, b, c, d);
			seen[b >> 24]++;
		}
	}
	for (long i = 0; i < 256; i++)
		if (seen[i] && seen[i] != 20)
			FAIL("APIC id %ld belongs to several processors (%u answers)", i, seen[i]);
	printf("%ld processors ran code, each with its own APIC id\n", cpus);
	return 0;
}
