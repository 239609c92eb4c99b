/* The virtqueue parser: rings made by hand in guest memory, honest ones and every lie a driver can tell. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
/* after the headers it wants */
#include <cmocka.h>

#include "base/util.h"
#include "device/virtq.h"

#define SIZE 8
#define MEMORY (8ull << 20)
#define DESC 0x1000ull
#define AVAIL 0x2000ull
#define USED 0x3000ull
#define INDIRECT 0x4001ull /* unaligned, as it may be */
#define DATA 0x10000ull

enum { NEXT = 1, WRITE = 2, INDIRECT_FLAG = 4 };

struct fixture {
	struct guest_memory memory;
	struct virtq q;
	struct virtq_chain chain;
	struct error err;
	uint16_t avail_idx;
	unsigned writes_seen; /* of pages flagged as code */
};

static void put(struct fixture *f, uint64_t gpa, uint64_t value, unsigned size)
{
	assert_true(memory_write(&f->memory, gpa, &value, size));
}

static uint64_t get(struct fixture *f, uint64_t gpa, unsigned size)
{
	uint64_t value = 0;

	assert_true(memory_read(&f->memory, gpa, &value, size));
	return value;
}

static void desc_at(
	struct fixture *f, uint64_t table, unsigned i, uint64_t addr, uint32_t len, unsigned flags, unsigned next)
{
	put(f, table + 16 * i, addr, 8);
	put(f, table + 16 * i + 8, len, 4);
	put(f, table + 16 * i + 12, flags, 2);
	put(f, table + 16 * i + 14, next, 2);
}

static void desc(struct fixture *f, unsigned i, uint64_t addr, uint32_t len, unsigned flags, unsigned next)
{
	desc_at(f, DESC, i, addr, len, flags, next);
}

static void offer(struct fixture *f, unsigned head)
{
	put(f, AVAIL + 4 + 2 * (f->avail_idx % f->q.size), head, 2);
	put(f, AVAIL + 2, ++f->avail_idx, 2);
}

static int next(struct fixture *f)
{
	return virtq_next(&f->q, &f->chain, &f->err);
}

static void start(struct fixture *f)
{
	f->avail_idx = 0;
	assert_int_equal(virtq_start(&f->q, &f->err), 0);
}

static int set_up(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	assert_int_equal(memory_create(&f->memory, MEMORY, &f->err), 0);
	f->q = (struct virtq){.memory = &f->memory,
		.size = SIZE,
		.desc_gpa = DESC,
		.avail_gpa = AVAIL,
		.used_gpa = USED,
		.indirect = true};
	start(f);
	*state = f;
	return 0;
}

static int tear_down(void **state)
{
	struct fixture *f = *state;

	memory_destroy(&f->memory);
	free(f);
	return 0;
}

/* ---- honest guests ---- */

static void test_chain_is_read_and_written(void **state)
{
	struct fixture *f = *state;
	char text[16] = {0};

	desc(f, 2, DATA, 5, NEXT, 5);
	desc(f, 5, DATA + 0x100, 6, NEXT, 0);
	desc(f, 0, DATA + 0x200, 4, NEXT | WRITE, 7);
	desc(f, 7, DATA + 0x300, 12, WRITE, 0);
	memory_write(&f->memory, DATA, "hello", 5);
	memory_write(&f->memory, DATA + 0x100, " world", 6);
	assert_int_equal(next(f), 0);
	offer(f, 2);
	assert_int_equal(next(f), 1);
	assert_int_equal(f->chain.head, 2);
	assert_int_equal(f->chain.readable, 11);
	assert_int_equal(f->chain.writable, 16);
	assert_int_equal(f->chain.readable_count, 2);
	assert_int_equal(f->chain.writable_count, 2);
	assert_int_equal(virtq_chain_read(&f->chain, 3, text, sizeof(text)), 8);
	assert_string_equal(text, "lo world");
	assert_int_equal(virtq_chain_read(&f->chain, 11, text, 1), 0);
	assert_int_equal(virtq_chain_read(&f->chain, UINT64_MAX, text, 1), 0);
	assert_int_equal(virtq_chain_write(&f->q, &f->chain, 2, "abcdef", 6), 6);
	assert_int_equal(virtq_chain_write(&f->q, &f->chain, 15, "xy", 2), 1);
	assert_memory_equal(memory_for_read(&f->memory, DATA + 0x200, 4), "\0\0ab", 4);
	assert_memory_equal(memory_for_read(&f->memory, DATA + 0x300, 12), "cdef\0\0\0\0\0\0\0x", 12);

	assert_int_equal(get(f, USED + 2, 2), 0);
	virtq_put(&f->q, f->chain.head, 9);
	assert_int_equal(get(f, USED + 2, 2), 0); /* not before it is published */
	assert_true(virtq_publish(&f->q));
	assert_int_equal(get(f, USED + 2, 2), 1);
	assert_int_equal(get(f, USED + 4, 4), 2);
	assert_int_equal(get(f, USED + 8, 4), 9);
	assert_int_equal(next(f), 0);
}

static void test_slice(void **state)
{
	struct fixture *f = *state;
	static struct iovec iov[VIRTQ_SEGMENTS_MAX];

	desc(f, 0, DATA, 16, NEXT, 1);
	desc(f, 1, DATA + 0x1000, 100, NEXT, 2);
	desc(f, 2, DATA + 0x2000, 50, WRITE, 0);
	offer(f, 0);
	assert_int_equal(next(f), 1);
	assert_int_equal(virtq_chain_slice(&f->chain, false, 16, 100, iov), 1);
	assert_int_equal(iov[0].iov_len, 100);
	assert_ptr_equal(iov[0].iov_base, memory_for_read(&f->memory, DATA + 0x1000, 1));
	assert_int_equal(virtq_chain_slice(&f->chain, false, 10, 1000, iov), 2);
	assert_int_equal(iov[0].iov_len, 6);
	assert_int_equal(iov[1].iov_len, 100);
	assert_int_equal(virtq_chain_slice(&f->chain, true, 49, 1, iov), 1);
	assert_ptr_equal(iov[0].iov_base, memory_for_read(&f->memory, DATA + 0x2000 + 49, 1));
	assert_int_equal(virtq_chain_slice(&f->chain, true, 50, 1, iov), 0);
}

static void test_indirect(void **state)
{
	struct fixture *f = *state;

	/* one direct buffer, then a table of 20: longer than the ring */
	desc(f, 3, DATA, 1, NEXT, 4);
	desc(f, 4, INDIRECT, 16 * 20, INDIRECT_FLAG, 0);
	for (unsigned i = 0; i < 20; i++)
		desc_at(f, INDIRECT, i, DATA + 0x100 * i, 2, (i < 19 ? NEXT : 0) | (i >= 10 ? WRITE : 0), i + 1);
	offer(f, 3);
	assert_int_equal(next(f), 1);
	assert_int_equal(f->chain.readable, 21);
	assert_int_equal(f->chain.writable, 20);
	assert_int_equal(f->chain.head, 3);
}

static void test_index_wraps(void **state)
{
	struct fixture *f = *state;

	desc(f, 1, DATA, 1, WRITE, 0);
	for (unsigned i = 0; i < 70000; i++) {
		offer(f, 1);
		assert_int_equal(next(f), 1);
		assert_int_equal(next(f), 0);
		virtq_put(&f->q, 1, i);
		assert_true(virtq_publish(&f->q));
		assert_int_equal(get(f, USED + 2, 2), (uint16_t)(i + 1));
		assert_int_equal(get(f, USED + 4 + 8 * (i % SIZE) + 4, 4), i);
	}
}

static void test_give_back(void **state)
{
	struct fixture *f = *state;

	for (unsigned i = 0; i < 3; i++) {
		desc(f, i, DATA, 1, WRITE, 0);
		offer(f, i);
	}
	assert_int_equal(next(f), 1);
	virtq_put(&f->q, 0, 0);
	assert_int_equal(next(f), 1);
	virtq_put(&f->q, 1, 0);
	virtq_untake(&f->q, 2);
	virtq_unput(&f->q, 2);
	assert_false(virtq_publish(&f->q));
	assert_int_equal(get(f, USED + 2, 2), 0);
	assert_int_equal(next(f), 1);
	assert_int_equal(f->chain.head, 0);
}

/* A reset between a device's put and its publishing: there is no ring to tell it in. */
static void test_stopped_before_it_was_told(void **state)
{
	struct fixture *f = *state;

	desc(f, 0, DATA, 1, WRITE, 0);
	offer(f, 0);
	assert_int_equal(next(f), 1);
	virtq_put(&f->q, 0, 0);
	virtq_stop(&f->q);
	assert_false(virtq_publish(&f->q));
}

static void test_notifications_by_flags(void **state)
{
	struct fixture *f = *state;

	desc(f, 0, DATA, 1, WRITE, 0);
	virtq_notify_off(&f->q);
	assert_int_equal(get(f, USED, 2), 1);
	assert_false(virtq_notify_on(&f->q));
	assert_int_equal(get(f, USED, 2), 0);
	virtq_notify_off(&f->q);
	offer(f, 0);
	assert_true(virtq_notify_on(&f->q)); /* it came meanwhile */
	assert_int_equal(next(f), 1);
	put(f, AVAIL, 1, 2); /* NO_INTERRUPT */
	virtq_put(&f->q, 0, 0);
	assert_false(virtq_publish(&f->q));
	put(f, AVAIL, 0, 2);
	assert_false(virtq_publish(&f->q)); /* nothing new */
	virtq_put(&f->q, 0, 0);
	assert_true(virtq_publish(&f->q));
}

static void test_notifications_by_event_index(void **state)
{
	struct fixture *f = *state;
	uint64_t used_event = AVAIL + 4 + 2 * SIZE, avail_event = USED + 4 + 8 * SIZE;

	f->q.event_idx = true;
	desc(f, 0, DATA, 1, WRITE, 0);
	for (unsigned i = 0; i < 5; i++)
		offer(f, 0);
	virtq_notify_off(&f->q);
	assert_int_equal(get(f, USED, 2), 0); /* the flags stay zero: 2.7.10.1 */
	for (unsigned i = 0; i < 5; i++)
		assert_int_equal(next(f), 1);
	assert_false(virtq_notify_on(&f->q));
	assert_int_equal(get(f, avail_event, 2), 5);

	put(f, used_event, 2, 2); /* tell me when the third is used */
	put(f, AVAIL, 1, 2);	  /* must be ignored */
	virtq_put(&f->q, 0, 0);
	virtq_put(&f->q, 0, 0);
	assert_false(virtq_publish(&f->q));
	virtq_put(&f->q, 0, 0);
	assert_true(virtq_publish(&f->q));
	virtq_put(&f->q, 0, 0);
	assert_false(virtq_publish(&f->q));
	put(f, used_event, 4, 2);
	virtq_put(&f->q, 0, 0);
	virtq_put(&f->q, 0, 0);
	assert_true(virtq_publish(&f->q));
}

static void written(void *opaque, uint64_t gpa, uint64_t len)
{
	((struct fixture *)opaque)->writes_seen++;
}

/* An engine that holds translations of a page hears of every write to it. */
static void test_writes_are_announced(void **state)
{
	struct fixture *f = *state;

	f->memory.opaque = f;
	f->memory.written = written;
	f->memory.page_flags[USED >> 12] = MEMORY_PAGE_CODE;
	f->memory.page_flags[DATA >> 12] = MEMORY_PAGE_CODE;
	desc(f, 0, DATA, 10, WRITE, 0);
	offer(f, 0);
	assert_int_equal(next(f), 1);
	f->writes_seen = 0;
	virtq_chain_write(&f->q, &f->chain, 0, "x", 1);
	assert_int_equal(f->writes_seen, 1);
	virtq_chain_wrote(&f->q, &f->chain, 0, 10);
	assert_int_equal(f->writes_seen, 2);
	virtq_put(&f->q, 0, 1);
	assert_int_equal(f->writes_seen, 3);
	virtq_publish(&f->q);
	assert_int_equal(f->writes_seen, 4);
	virtq_notify_off(&f->q);
	virtq_notify_on(&f->q);
	assert_int_equal(f->writes_seen, 6);
}

/* ---- rings that cannot be ---- */

static void refused(struct fixture *f, const char *word)
{
	virtq_stop(&f->q);
	assert_int_equal(virtq_start(&f->q, &f->err), -EINVAL);
	assert_non_null(strstr(f->err.text, word));
	assert_false(virtq_started(&f->q));
}

static void test_bad_rings(void **state)
{
	struct fixture *f = *state;
	struct virtq good = f->q;
	static const struct {
		uint64_t desc, avail, used;
		uint16_t size;
		const char *word;
	} bad[] = {
		{DESC, AVAIL, USED, 0, "size"},
		{DESC, AVAIL, USED, 3, "size"},
		{DESC, AVAIL, USED, 2048, "size"},
		{DESC, AVAIL, USED, 0xffff, "size"},
		{DESC + 8, AVAIL, USED, SIZE, "aligned"},
		{DESC, AVAIL + 1, USED, SIZE, "aligned"},
		{DESC, AVAIL, USED + 2, SIZE, "aligned"},
		{MEMORY, AVAIL, USED, SIZE, "descriptor table"},
		{MEMORY - 16 * (SIZE - 1), AVAIL, USED, SIZE, "descriptor table"},
		{DESC, MEMORY - 4 - 2 * SIZE, USED, SIZE, "available ring"},
		{DESC, AVAIL, MEMORY - 4 - 8 * SIZE, SIZE, "used ring"},
		{-16ull, AVAIL, USED, SIZE, "descriptor table"},
		{DESC, -2ull, USED, SIZE, "available ring"},
		{DESC, AVAIL, -4ull, SIZE, "used ring"},
		{0xc0000000ull, AVAIL, USED, SIZE, "descriptor table"},
	};

	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		f->q.desc_gpa = bad[i].desc;
		f->q.avail_gpa = bad[i].avail;
		f->q.used_gpa = bad[i].used;
		f->q.size = bad[i].size;
		refused(f, bad[i].word);
	}
	/* and just as far as it goes */
	f->q = good;
	f->q.desc_gpa = MEMORY - 16 * SIZE;
	assert_int_equal(virtq_start(&f->q, &f->err), 0);
}

/* ---- lies ---- */

static void lie(struct fixture *f, unsigned head, const char *word)
{
	offer(f, head);
	assert_int_equal(next(f), -EINVAL);
	if (!strstr(f->err.text, word))
		fail_msg("\"%s\" does not say \"%s\"", f->err.text, word);
	start(f);
	put(f, AVAIL + 2, 0, 2);
}

static void test_loops(void **state)
{
	struct fixture *f = *state;

	desc(f, 0, DATA, 1, NEXT, 0);
	lie(f, 0, "loop");
	for (unsigned i = 0; i < SIZE; i++)
		desc(f, i, DATA, 1, NEXT, (i + 1) % SIZE);
	lie(f, 5, "loop");
	desc(f, 0, INDIRECT, 32, INDIRECT_FLAG, 0);
	desc_at(f, INDIRECT, 0, DATA, 1, NEXT, 1);
	desc_at(f, INDIRECT, 1, DATA, 1, NEXT, 0);
	lie(f, 0, "loop");
	/* the longest that is none */
	for (unsigned i = 0; i < SIZE; i++)
		desc(f, i, DATA, 1, i < SIZE - 1 ? NEXT : 0, i + 1);
	offer(f, 0);
	assert_int_equal(next(f), 1);
	assert_int_equal(f->chain.readable, SIZE);
}

static void test_descriptor_numbers(void **state)
{
	struct fixture *f = *state;

	lie(f, SIZE, "names descriptor");
	lie(f, 0xffff, "names descriptor");
	desc(f, 0, DATA, 1, NEXT, SIZE);
	lie(f, 0, "goes on at");
	desc(f, 0, DATA, 1, NEXT, 0xffff);
	lie(f, 0, "goes on at");
	desc(f, 0, INDIRECT, 16, INDIRECT_FLAG, 0);
	desc_at(f, INDIRECT, 0, DATA, 1, NEXT, 1); /* there is in the ring's table, not in this one */
	lie(f, 0, "goes on at");
}

static void test_addresses_and_lengths(void **state)
{
	struct fixture *f = *state;

	desc(f, 0, DATA, 0, 0, 0);
	lie(f, 0, "length 0");
	desc(f, 0, MEMORY, 1, 0, 0);
	lie(f, 0, "not in guest memory");
	desc(f, 0, MEMORY - 1, 2, WRITE, 0);
	lie(f, 0, "not in guest memory");
	desc(f, 0, 0, UINT32_MAX, 0, 0);
	lie(f, 0, "not in guest memory");
	desc(f, 0, UINT64_MAX, 1, WRITE, 0);
	lie(f, 0, "not in guest memory");
	desc(f, 0, UINT64_MAX - 0xfff, 0x2000, 0, 0); /* its end wraps to 0x1000 */
	lie(f, 0, "not in guest memory");
	desc(f, 0, 0xfee00000, 4, WRITE, 0); /* a device's registers are no memory */
	lie(f, 0, "not in guest memory");
	desc(f, 0, DATA, 1, NEXT | WRITE, 1);
	desc(f, 1, DATA, 1, 0, 0);
	lie(f, 0, "behind a writable");
	desc(f, 0, 0, MEMORY, 0, 0); /* all of memory is allowed */
	offer(f, 0);
	assert_int_equal(next(f), 1);
}

static void table_of_everything(struct fixture *f, unsigned count)
{
	desc(f, 0, 0x40000, 16 * count, INDIRECT_FLAG, 0);
	for (unsigned i = 0; i < count; i++)
		desc_at(f, 0x40000, i, 0, MEMORY, i < count - 1 ? NEXT : 0, i + 1);
}

static void test_total_length(void **state)
{
	struct fixture *f = *state;

	table_of_everything(f, 512);
	lie(f, 0, "longer than 4 GiB");
	table_of_everything(f, 511);
	offer(f, 0);
	assert_int_equal(next(f), 1);
	assert_int_equal(f->chain.readable, 511 * MEMORY);
}

static void test_bad_indirect(void **state)
{
	struct fixture *f = *state;

	desc(f, 0, INDIRECT, 16, INDIRECT_FLAG | NEXT, 1);
	desc(f, 1, DATA, 1, 0, 0);
	lie(f, 0, "must be the last");
	desc(f, 0, INDIRECT, 0, INDIRECT_FLAG, 0);
	lie(f, 0, "whole entries");
	desc(f, 0, INDIRECT, 17, INDIRECT_FLAG, 0);
	lie(f, 0, "whole entries");
	desc(f, 0, 0x40000, 16 * 1025, INDIRECT_FLAG, 0);
	lie(f, 0, "more than");
	desc(f, 0, 0, 0xfffffff0, INDIRECT_FLAG, 0);
	lie(f, 0, "more than");
	desc(f, 0, MEMORY - 16, 32, INDIRECT_FLAG, 0);
	lie(f, 0, "not in guest memory");
	desc(f, 0, -16ull, 32, INDIRECT_FLAG, 0);
	lie(f, 0, "not in guest memory");
	desc(f, 0, INDIRECT, 16, INDIRECT_FLAG, 0);
	desc_at(f, INDIRECT, 0, INDIRECT, 16, INDIRECT_FLAG, 0);
	lie(f, 0, "inside an indirect");
	f->q.indirect = false;
	lie(f, 0, "did not negotiate");
	/* more buffers in all than one chain may have */
	f->q.indirect = true;
	desc(f, 0, DATA, 1, NEXT, 1);
	desc(f, 1, 0x40000, 16 * 1024, INDIRECT_FLAG, 0);
	for (unsigned i = 0; i < 1024; i++)
		desc_at(f, 0x40000, i, DATA, 1, i < 1023 ? NEXT : 0, i + 1);
	lie(f, 0, "more than 1024 buffers");
}

static void test_index_jumps(void **state)
{
	struct fixture *f = *state;

	desc(f, 0, DATA, 1, 0, 0);
	put(f, AVAIL + 2, SIZE, 2); /* a full ring */
	assert_int_equal(next(f), 1);
	start(f);
	put(f, AVAIL + 2, SIZE + 1, 2);
	assert_int_equal(next(f), -EINVAL);
	assert_non_null(strstr(f->err.text, "jumped"));
	start(f);
	put(f, AVAIL + 2, 0xffff, 2); /* backwards */
	assert_int_equal(next(f), -EINVAL);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
		TEST(test_chain_is_read_and_written),
		TEST(test_slice),
		TEST(test_indirect),
		TEST(test_index_wraps),
		TEST(test_give_back),
		TEST(test_stopped_before_it_was_told),
		TEST(test_notifications_by_flags),
		TEST(test_notifications_by_event_index),
		TEST(test_writes_are_announced),
		TEST(test_bad_rings),
		TEST(test_loops),
		TEST(test_descriptor_numbers),
		TEST(test_addresses_and_lengths),
		TEST(test_total_length),
		TEST(test_bad_indirect),
		TEST(test_index_jumps),
	};

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
