/* Errors, sizes and the event loop. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <fcntl.h>

#include "base/cleanup.h"
#include "base/loop.h"
#include "base/size.h"
#include "base/util.h"

#define MS 1000000ull

static void sizes(void **state)
{
	static const struct {
		const char *text;
		int result;
		uint64_t bytes;
	} cases[] = {
		{"0", 0, 0},
		{"65536", 0, 65536},
		{"512B", 0, 512},
		{"512M", 0, 512ull << 20},
		{"1g", 0, 1ull << 30},
		{"3KiB", 0, 3072},
		{"2TB", 0, 2ull << 40},
		{"16777215T", 0, 16777215ull << 40},
		{"16777216T", -ERANGE, 0},
		{"99999999999999999999", -ERANGE, 0},
		{"", -EINVAL, 0},
		{"M", -EINVAL, 0},
		{"-1", -EINVAL, 0},
		{" 1", -EINVAL, 0},
		{"1.5G", -EINVAL, 0},
		{"1GG", -EINVAL, 0},
		{"12 ", -EINVAL, 0},
		{"12x", -EINVAL, 0},
		{"5iB", -EINVAL, 0},
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct error err = {0};
		uint64_t bytes = 0;

		if (size_parse(cases[i].text, &bytes, &err) != cases[i].result || bytes != cases[i].bytes)
			fail_msg("size \"%s\": %llu, %s", cases[i].text, (unsigned long long)bytes, err.text);
		if (cases[i].result < 0) {
			assert_int_equal(err.code, -cases[i].result);
			assert_non_null(strstr(err.text, cases[i].text));
		}
	}
}

static void errors(void **state)
{
	struct error err = {0};

	assert_int_equal(error_set(&err, EINVAL, "value %d", 7), -EINVAL);
	assert_int_equal(error_wrap(&err, "disk %s", "x"), -EINVAL);
	assert_string_equal(err.text, "disk x: value 7");
	errno = ENOENT;
	assert_int_equal(error_errno(&err, "opening"), -ENOENT);
	assert_string_equal(err.text, "opening: No such file or directory");
	assert_int_equal(error_set(NULL, EIO, "nobody listens"), -EIO);
}

/* ---- timers ---- */

struct shot {
	struct loop_timer timer;
	struct loop *loop;
	uint64_t at, late;
	unsigned *order, number;
	bool last;
};

static void shoot(struct loop_timer *timer)
{
	struct shot *s = container_of(timer, struct shot, timer);

	s->late = clock_now() - s->at;
	s->number = ++*s->order;
	if (s->last)
		loop_stop(s->loop);
}

static void timers_in_order(void **state)
{
	enum { COUNT = 300 };
	static struct shot shots[COUNT];
	struct loop *loop;
	struct error err;
	unsigned order = 0;
	uint64_t start;

	assert_int_equal(loop_create(&loop, &err), 0);
	memset(shots, 0, sizeof(shots));
	start = clock_now() + 5 * MS;
	for (int i = 0; i < COUNT; i++) {
		int slot = (i * 7) % COUNT; /* 7 and 300 share no factor: a permutation */

		shots[i] = (struct shot){.timer.function = shoot, .loop = loop, .order = &order};
		shots[i].at = start + slot * 100000ull;
		shots[i].last = slot == COUNT - 1;
		/* First somewhere else, so that moving both ways is exercised. */
		loop_timer_set(loop, &shots[i].timer, start + (i * 13 % COUNT) * 100000ull);
	}
	for (int i = 0; i < COUNT; i++)
		loop_timer_set(loop, &shots[i].timer, shots[i].at);
	for (int i = 0; i < COUNT; i += 3)
		loop_timer_cancel(loop, &shots[i].timer);
	for (int i = 0; i < COUNT; i += 6)
		loop_timer_set(loop, &shots[i].timer, shots[i].at);
	for (int i = 0; i < COUNT; i++) {
		if (shots[i].last && !shots[i].timer.heap_index)
			loop_timer_set(loop, &shots[i].timer, shots[i].at);
	}
	loop_run(loop);

	unsigned before = 0;

	for (int slot = 0; slot < COUNT; slot++) {
		for (int i = 0; i < COUNT; i++) {
			if ((i * 7) % COUNT != slot || !shots[i].number)
				continue;
			assert_true(shots[i].number == before + 1);
			before++;
		}
	}
	assert_true(before >= COUNT * 2 / 3);
	loop_destroy(loop);
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* How late a timer is, set from the loop's thread: the median must be far below the scheduler's 50 us timer slack plus
 * a tick. The bound is loose since the machine may be busy. */
static void timer_precision(void **state)
{
	enum { ROUNDS = 101 };
	uint64_t late[ROUNDS];
	struct loop *loop;
	struct error err;

	assert_int_equal(loop_create(&loop, &err), 0);
	for (int i = 0; i < ROUNDS; i++) {
		unsigned order = 0;
		struct shot s = {.timer.function = shoot, .loop = loop, .order = &order, .last = true};

		s.at = clock_now() + 300000;
		loop_timer_set(loop, &s.timer, s.at);
		loop_run(loop);
		late[i] = s.late;
		assert_true(s.late < INT64_MAX); /* never early */
	}
	qsort(late, ROUNDS, sizeof(*late), by_value);
	print_message("timer lateness: median %llu ns, 90th percentile %llu ns\n", (unsigned long long)late[ROUNDS / 2],
		(unsigned long long)late[ROUNDS * 9 / 10]);
	assert_true(late[ROUNDS / 2] < 5 * MS);
	loop_destroy(loop);
}

/* ---- other threads ---- */

struct storm {
	struct loop *loop;
	struct loop_timer timer;
	atomic_uint fired;
	unsigned posted, last_post, run;
	bool order_broken;
};

static void storm_fire(struct loop_timer *timer)
{
	atomic_fetch_add(&container_of(timer, struct storm, timer)->fired, 1);
}

static void storm_post(void *opaque)
{
	struct storm *s = opaque;

	s->run++;
}

static void storm_end(void *opaque)
{
	struct storm *s = opaque;

	loop_stop(s->loop);
}

static void *storm_thread(void *opaque)
{
	struct storm *s = opaque;

	for (int i = 0; i < 2000; i++) {
		/* As a guest does with its deadline timer: near, far, cancelled, in the past. */
		loop_timer_set(s->loop, &s->timer, clock_now() + (i % 4) * 50000);
		if (i % 5 == 0)
			loop_timer_cancel(s->loop, &s->timer);
		if (i % 3 == 0) {
			s->posted++;
			loop_post(s->loop, storm_post, s);
		}
	}

	/* A far deadline, then one that is earlier while the loop sleeps: it must not be missed. */
	unsigned before;

	loop_timer_set(s->loop, &s->timer, clock_now() + 3600000 * MS);
	usleep(20000);
	before = atomic_load(&s->fired);
	loop_timer_set(s->loop, &s->timer, clock_now() + MS);
	for (int i = 0; i < 5000 && atomic_load(&s->fired) == before; i++)
		usleep(1000);
	s->order_broken = atomic_load(&s->fired) != before + 1;
	loop_post(s->loop, storm_end, s);
	return NULL;
}

static void other_threads(void **state)
{
	struct storm s = {.timer.function = storm_fire};
	struct error err;
	pthread_t thread;

	assert_int_equal(loop_create(&s.loop, &err), 0);
	assert_int_equal(pthread_create(&thread, NULL, storm_thread, &s), 0);
	loop_run(s.loop);
	pthread_join(thread, NULL);
	assert_false(s.order_broken);
	assert_int_equal(s.run, s.posted);
	assert_true(atomic_load(&s.fired) > 0);
	loop_destroy(s.loop);
}

/* ---- descriptors ---- */

struct pair {
	struct loop *loop;
	int a[2], b[2];
	unsigned seen_a, seen_b;
};

static void on_b(void *opaque, int fd, uint32_t events)
{
	((struct pair *)opaque)->seen_b++;
}

static void on_a(void *opaque, int fd, uint32_t events)
{
	struct pair *p = opaque;
	char byte;

	p->seen_a++;
	assert_int_equal(read(fd, &byte, 1), 1);
	if (byte == 'r') /* b is readable in the same batch, but removed before its turn: must not run */
		loop_remove_fd(p->loop, p->b[0]);
	if (byte == 'q')
		loop_change_fd(p->loop, p->b[0], 0);
	if (byte == 's')
		loop_stop(p->loop);
}

static void descriptors(void **state)
{
	struct pair p = {0};
	struct error err;
	char byte;
	int null;

	assert_int_equal(loop_create(&p.loop, &err), 0);
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, p.a), 0);
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, p.b), 0);
	assert_int_equal(loop_add_fd(p.loop, p.a[0], EPOLLIN, on_a, &p, &err), 0);
	assert_int_equal(loop_add_fd(p.loop, p.a[0], EPOLLIN, on_a, &p, &err), -EEXIST);
	assert_int_equal(loop_add_fd(p.loop, p.b[0], 0, on_b, &p, &err), 0);

	/* Quiet: readable and even hung up, and yet not reported. */
	assert_int_equal(write(p.b[1], "x", 1), 1);
	assert_int_equal(write(p.a[1], "s", 1), 1);
	loop_run(p.loop);
	assert_int_equal(p.seen_a, 1);
	assert_int_equal(p.seen_b, 0);

	/* a is first in the ready list, as it became ready first. */
	assert_int_equal(read(p.b[0], &byte, 1), 1);
	loop_change_fd(p.loop, p.b[0], EPOLLIN);
	assert_int_equal(write(p.a[1], "qs", 2), 2);
	assert_int_equal(write(p.b[1], "x", 1), 1);
	loop_run(p.loop);
	assert_int_equal(p.seen_b, 0);
	loop_change_fd(p.loop, p.b[0], EPOLLIN);
	assert_int_equal(write(p.a[1], "s", 1), 1);
	loop_run(p.loop);
	assert_true(p.seen_b >= 1);

	/* Removed, closed, and its number used again by another: nothing of the old registration is left. */
	loop_remove_fd(p.loop, p.b[0]);
	close(p.b[0]);
	close(p.b[1]);
	p.seen_b = 0;
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, p.b), 0);
	assert_int_equal(loop_add_fd(p.loop, p.b[0], EPOLLIN, on_b, &p, &err), 0);
	assert_int_equal(write(p.a[1], "rs", 2), 2);
	assert_int_equal(write(p.b[1], "x", 1), 1);
	loop_run(p.loop);
	assert_int_equal(p.seen_b, 0);

	null = open("/dev/null", O_RDONLY | O_CLOEXEC);
	assert_int_equal(loop_add_fd(p.loop, null, EPOLLIN, on_b, &p, &err), -EPERM);
	assert_non_null(strstr(err.text, "cannot be waited for"));
	close(null);
	assert_int_equal(loop_add_fd(p.loop, -1, EPOLLIN, on_b, &p, &err), -EBADF);
	for (int i = 0; i < 2; i++) {
		close(p.a[i]);
		close(p.b[i]);
	}
	loop_destroy(p.loop);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(sizes),
		cmocka_unit_test(errors),
		cmocka_unit_test(timers_in_order),
		cmocka_unit_test(timer_precision),
		cmocka_unit_test(other_threads),
		cmocka_unit_test(descriptors),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
