/* virtio-balloon and virtio-console through PCI, as a kernel drives them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
/* after the headers it wants */
#include <cmocka.h>

#include "base/util.h"
#include "driver.h"

#define MEMORY (32ull << 20)
#define MIB (1ull << 20)

enum { INFLATE, DEFLATE, STATISTICS, REPORTS };

struct fixture {
	struct board board;
	struct driver d;
	struct virtio_device *device;
	struct error err;
	uint64_t page; /* guest memory for requests */
	uint8_t printed[10000];
	size_t printed_length, sink_room;
	unsigned rooms;
};

static int set_up(void **state)
{
	struct fixture *f = *state = calloc(1, sizeof(*f));

	assert_int_equal(board_of_test_create(&f->board, MEMORY), 0);
	return 0;
}

static int tear_down(void **state)
{
	struct fixture *f = *state;

	board_of_test_stop_loop(&f->board);
	virtio_device_destroy(f->device);
	board_of_test_destroy(&f->board);
	free(f);
	return 0;
}

static uint64_t resident(struct fixture *f)
{
	struct stat st;

	assert_int_equal(fstat(f->board.memory.fd, &st), 0);
	return st.st_blocks * 512ull;
}

static void start_balloon(struct fixture *f, uint64_t target)
{
	struct virtio_balloon_options options = {.target = target};

	if (virtio_balloon_create(&f->device, &f->board, &options, &f->err))
		fail_msg("%s", f->err.text);
	assert_true(driver_find(&f->d, &f->board, 1));
	assert_true(driver_negotiate(&f->d, ~0ull));
	driver_msix(&f->d, 6);
	for (unsigned i = 0; i < 4; i++)
		driver_queue_up(&f->d, i, 16, true);
	driver_ok(&f->d);
	f->page = driver_alloc(&f->d, 65536);
	board_of_test_run_loop(&f->board);
}

static void request(struct fixture *f, unsigned queue, uint64_t gpa, uint32_t length, bool writable)
{
	struct driver_queue *q = &f->d.queue[queue];

	driver_add(&f->d, q, (struct buffer[]){{gpa, length, writable}}, 1);
	driver_notify(&f->d, q);
	assert_true(driver_used(&f->d, q, NULL, NULL));
}

static void test_inflate(void **state)
{
	struct fixture *f = *state;
	uint32_t frames[512];
	uint8_t *memory;

	start_balloon(f, 5 * MIB);
	assert_int_equal(driver_read(&f->d, f->d.device, 4), 5 * 256);
	memory = driver_memory(&f->d, 0, MEMORY);
	memset(memory + 16 * MIB, 0xaa, 8 * MIB);
	/* pages in falling order, one of them twice, and one that is no memory */
	for (unsigned i = 0; i < 512; i++)
		frames[i] = 16 * 256 + 511 - i;
	frames[7] = frames[8];
	frames[0] = 1u << 30;
	memcpy(driver_memory(&f->d, f->page, sizeof(frames)), frames, sizeof(frames));
	uint64_t before = resident(f);
	request(f, INFLATE, f->page, sizeof(frames), false);
	assert_true(before - resident(f) >= 2 * MIB - 8 * 4096);
	for (uint64_t at = 16 * MIB; at < 24 * MIB; at += 4096)
		if (at != (16 * 256 + 511) * 4096ull && at != (16 * 256 + 504) * 4096ull)
			assert_int_equal(memory[at], at < 18 * MIB ? 0 : 0xaa);
	/* the guest has them back when it likes */
	request(f, DEFLATE, f->page, 64, false);
	memory[16 * MIB] = 1;
	driver_write(&f->d, f->d.device + 4, 4, 512);

	struct virtio_balloon_state s;
	virtio_balloon_get(f->device, &s);
	assert_int_equal(s.actual, 2 * MIB);
	assert_int_equal(s.target, 5 * MIB);
	virtio_balloon_set_target(f->device, 7 * MIB);
	assert_int_equal(driver_read(&f->d, f->d.device, 4), 7 * 256);
	assert_int_equal(f->board.messages[DRIVER_MSI_BASE], 1);
	virtio_balloon_set_target(f->device, 1 << 30);
	assert_int_equal(driver_read(&f->d, f->d.device, 4), MEMORY / 4096);
}

static void test_reports(void **state)
{
	struct fixture *f = *state;
	struct virtio_balloon_state s;
	uint8_t *memory;

	start_balloon(f, 0);
	memory = driver_memory(&f->d, 0, MEMORY);
	memset(memory + 8 * MIB, 0xbb, 16 * MIB);
	uint64_t before = resident(f);
	driver_add(&f->d, &f->d.queue[REPORTS],
		(struct buffer[]){{8 * MIB, 4 * MIB, true}, {20 * MIB + 100, 8192, true}}, 2);
	driver_notify(&f->d, &f->d.queue[REPORTS]);
	assert_true(driver_used(&f->d, &f->d.queue[REPORTS], NULL, NULL));
	assert_true(before - resident(f) >= 4 * MIB);
	/* what is no whole page stays */
	assert_int_equal(memory[20 * MIB + 4095], 0xbb);
	assert_int_equal(memory[20 * MIB + 4096], 0);
	assert_int_equal(memory[20 * MIB + 8192], 0xbb);
	assert_int_equal(memory[12 * MIB], 0xbb);
	virtio_balloon_get(f->device, &s);
	assert_int_equal(s.reported, 4 * MIB + 8192);
}

static void test_lies(void **state)
{
	struct fixture *f = *state;

	start_balloon(f, 0);
	/* more pages than there are, in one report */
	driver_add(&f->d, &f->d.queue[REPORTS],
		(struct buffer[]){{0, MEMORY, true}, {0, MEMORY, true}}, 2);
	driver_notify(&f->d, &f->d.queue[REPORTS]);
	for (unsigned i = 0; i < 1000 && !(driver_status(&f->d) & VIRTIO_STATUS_NEEDS_RESET); i++)
		usleep(1000);
	assert_true(driver_status(&f->d) & VIRTIO_STATUS_NEEDS_RESET);
	driver_write(&f->d, f->d.common + 0x14, 1, 0);
	assert_int_equal(driver_status(&f->d), 0);
}

static void test_statistics(void **state)
{
	struct fixture *f = *state;
	struct __attribute__((packed)) {
		uint16_t tag;
		uint64_t value;
	} told[] = {{4, 123456}, {5, 1 << 20}, {99, 1}, {0, 7}};
	struct virtio_balloon_state s;
	struct driver_queue *q;

	start_balloon(f, 0);
	q = &f->d.queue[STATISTICS];
	virtio_balloon_get(f->device, &s);
	assert_int_equal(s.told_at, 0);
	assert_true(s.statistics[BALLOON_FREE] == BALLOON_UNKNOWN);
	memcpy(driver_memory(&f->d, f->page, sizeof(told)), told, sizeof(told));
	driver_add(&f->d, q, (struct buffer[]){{f->page, sizeof(told), false}}, 1);
	driver_notify(&f->d, q);
	for (unsigned i = 0; i < 1000 && !s.told_at; i++) {
		usleep(1000);
		virtio_balloon_get(f->device, &s);
	}
	assert_int_equal(s.statistics[BALLOON_FREE], 123456);
	assert_int_equal(s.statistics[BALLOON_TOTAL], 1 << 20);
	assert_int_equal(s.statistics[BALLOON_SWAP_IN], 7);
	assert_true(s.statistics[BALLOON_CACHES] == BALLOON_UNKNOWN);
	/* asking gave the buffer back: the guest fills it again */
	assert_true(driver_used(&f->d, q, NULL, NULL));
	assert_false(driver_used_now(&f->d, q, NULL, NULL));
	told[0].value = 99;
	memcpy(driver_memory(&f->d, f->page, sizeof(told)), told, sizeof(told));
	driver_add(&f->d, q, (struct buffer[]){{f->page, sizeof(told), false}}, 1);
	driver_notify(&f->d, q);
	for (unsigned i = 0; i < 1000 && s.statistics[BALLOON_FREE] != 99; i++) {
		usleep(1000);
		virtio_balloon_get(f->device, &s);
	}
	assert_int_equal(s.statistics[BALLOON_FREE], 99);
	/* a reset in between: nothing is given back into a ring that is gone */
	driver_write(&f->d, f->d.common + 0x14, 1, 0);
	usleep(110000);
	virtio_balloon_get(f->device, &s);
	assert_int_equal(s.told_at, 0);
}

/* ---- console ---- */

static size_t sink(void *opaque, const uint8_t *bytes, size_t n)
{
	struct fixture *f = opaque;

	n = min(n, f->sink_room);
	memcpy(f->printed + f->printed_length, bytes, n);
	f->printed_length += n;
	f->sink_room -= n;
	return n;
}

static void room(void *opaque)
{
	((struct fixture *)opaque)->rooms++;
}

static void test_console(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;
	uint8_t text[5000];
	uint32_t length;

	if (virtio_console_create(&f->device, &f->board, &f->err))
		fail_msg("%s", f->err.text);
	virtio_console_set_output(f->device, sink, f);
	virtio_console_set_room(f->device, room, f);
	assert_int_equal(virtio_console_input(f->device, text, 10), 0);
	assert_true(driver_find(d, &f->board, 1));
	assert_true(driver_negotiate(d, ~0ull));
	driver_msix(d, 3);
	driver_queue_up(d, 0, 16, true);
	driver_queue_up(d, 1, 16, true);
	driver_ok(d);
	f->page = driver_alloc(d, 65536);
	for (unsigned i = 0; i < sizeof(text); i++)
		text[i] = i * 7;

	/* the sink takes some: the rest comes when it has room again, and nothing twice */
	memcpy(driver_memory(d, f->page, sizeof(text)), text, sizeof(text));
	f->sink_room = 4500;
	driver_add(d, &d->queue[1], (struct buffer[]){{f->page, 100, false}, {f->page + 100, 4900, false}}, 2);
	driver_notify(d, &d->queue[1]);
	assert_false(driver_used_now(d, &d->queue[1], NULL, NULL));
	f->sink_room = 10000;
	virtio_console_flush(f->device);
	assert_true(driver_used_now(d, &d->queue[1], NULL, NULL));
	assert_int_equal(f->printed_length, sizeof(text));
	assert_memory_equal(f->printed, text, sizeof(text));

	/* input waits for buffers */
	driver_add(d, &d->queue[0], (struct buffer[]){{f->page + 8192, 16, true}}, 1);
	driver_notify(d, &d->queue[0]);
	assert_int_equal(f->rooms, 1);
	assert_int_equal(virtio_console_input(f->device, text, 40), 16);
	assert_true(driver_used_now(d, &d->queue[0], NULL, &length));
	assert_int_equal(length, 16);
	assert_memory_equal(driver_memory(d, f->page + 8192, 16), text, 16);
	driver_add(d, &d->queue[0], (struct buffer[]){{f->page + 8192, 100, true}}, 1);
	driver_notify(d, &d->queue[0]);
	assert_int_equal(f->rooms, 2);
	assert_int_equal(virtio_console_input(f->device, text + 16, 24), 24);
	assert_true(driver_used_now(d, &d->queue[0], NULL, &length));
	assert_int_equal(length, 24);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
		TEST(test_inflate),
		TEST(test_reports),
		TEST(test_lies),
		TEST(test_statistics),
		TEST(test_console),
	};

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
