/* Rate limits against a clock of the test's own: averages are exact, bursts come once, debts are paid. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>

#include "base/token_bucket.h"
#include "base/util.h"

#define SECOND 1000000000ull

/* How many operations of that size go through in a time, each begun as soon as it may. */
static uint64_t run(struct rate_limit *limit, uint64_t *now, uint64_t duration, uint64_t bytes)
{
	uint64_t end = *now + duration, n = 0;

	for (;;) {
		uint64_t wait = rate_limit_wait(limit, *now);

		if (*now + wait >= end)
			break;
		*now += wait;
		if (wait)
			continue; /* looks again, as devices do */
		rate_limit_spend(limit, bytes);
		n++;
	}
	*now = end;
	return n;
}

static void test_averages(void **state)
{
	static const uint64_t rates[] = {1, 3, 1000, 10000000, 5000000000};
	static const uint64_t sizes[] = {1, 512, 4096, 1 << 20};

	for (unsigned r = 0; r < ARRAY_SIZE(rates); r++) {
		for (unsigned s = 0; s < ARRAY_SIZE(sizes); s++) {
			struct rate_limit limit;
			uint64_t now = 77, n, seconds = max(20 * sizes[s] / rates[r], (uint64_t)10);
			uint64_t expected = rates[r] * (seconds + 1) / sizes[s]; /* with the burst of one second */

			if (expected > 3000000)
				continue;
			rate_limit_init(&limit);
			rate_limit_set(&limit, &(struct rate_limits){.bandwidth = {rates[r], 0}}, now);
			n = run(&limit, &now, seconds * SECOND, sizes[s]);
			/* The last one is let through whole; the time ends just before the next. */
			assert_in_range(n, expected - (expected > 0), expected + 1);
			rate_limit_destroy(&limit);
		}
	}
}

static void test_burst(void **state)
{
	struct rate_limit limit;
	uint64_t now = 0;

	rate_limit_init(&limit);
	rate_limit_set(&limit, &(struct rate_limits){.operations = {100, 500}}, now);
	assert_int_equal(run(&limit, &now, 1, 0), 500);
	assert_in_range(run(&limit, &now, SECOND, 0), 99, 101);
	now += 3600 * SECOND; /* a rest gives no more than the burst */
	assert_in_range(run(&limit, &now, SECOND, 0), 599, 601);
	rate_limit_destroy(&limit);
}

/* Both limits hold; the tighter one rules. */
static void test_both(void **state)
{
	struct rate_limit limit;
	uint64_t now = 0;

	rate_limit_init(&limit);
	rate_limit_set(&limit, &(struct rate_limits){.bandwidth = {1 << 20, 1}, .operations = {10, 1}}, now);
	assert_in_range(run(&limit, &now, 10 * SECOND, 4096), 100, 101);
	assert_in_range(run(&limit, &now, 10 * SECOND, 1 << 20), 9, 11);
	rate_limit_destroy(&limit);
}

/* Changing a limit again and again gives nothing for free; taking it away lets everything through. */
static void test_changes(void **state)
{
	struct rate_limits slow = {.bandwidth = {1000, 100}};
	struct rate_limit limit;
	uint64_t now = 0, bytes = 0;

	rate_limit_init(&limit);
	assert_int_equal(rate_limit_wait(&limit, now), 0);
	rate_limit_set(&limit, &slow, now);
	for (unsigned i = 0; i < 1000; i++) {
		rate_limit_set(&limit, &slow, now);
		bytes += run(&limit, &now, SECOND / 100, 1);
	}
	assert_in_range(bytes, 10000, 10200);
	rate_limit_spend(&limit, 5000); /* into debt */
	assert_in_range(rate_limit_wait(&limit, now), 4 * SECOND, 6 * SECOND);
	rate_limit_set(&limit, &(struct rate_limits){.bandwidth = {1000000, 0}}, now);
	assert_in_range(rate_limit_wait(&limit, now), 1, SECOND / 100);
	rate_limit_set(&limit, &(struct rate_limits){0}, now);
	assert_int_equal(rate_limit_wait(&limit, now), 0);
	rate_limit_spend(&limit, UINT64_MAX);
	assert_int_equal(rate_limit_wait(&limit, now), 0);
	rate_limit_destroy(&limit);
}

static void test_extremes(void **state)
{
	struct rate_limit limit;
	uint64_t now = 1;

	rate_limit_init(&limit);
	rate_limit_set(&limit, &(struct rate_limits){.bandwidth = {UINT64_MAX, UINT64_MAX}, .operations = {1, 1}}, now);
	for (unsigned i = 0; i < 100; i++) {
		rate_limit_spend(&limit, UINT64_MAX);
		now += rate_limit_wait(&limit, now);
	}
	assert_true(now > SECOND);
	now = UINT64_MAX;
	rate_limit_wait(&limit, now);
	rate_limit_destroy(&limit);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_averages), cmocka_unit_test(test_burst),
		cmocka_unit_test(test_both), cmocka_unit_test(test_changes), cmocka_unit_test(test_extremes)};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
