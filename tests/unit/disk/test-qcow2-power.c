/* The host loses power at any moment: of what was written since the last sync any part may be missing on the disk. The
 * system calls that change the image are recorded with their data; an image as it could be after a loss of power is
 * made of all that came before the last sync and of a random part of what came after it, sector by sector. */
/* Else <sys/uio.h> would rename pwritev to pwritev64, and both are defined here. */
#undef _FILE_OFFSET_BITS
#include "crash.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/util.h"

static int enter(void **state)
{
	scratch_enter();
	return 0;
}

static int leave(void **state)
{
	scratch_leave();
	return 0;
}

/* ---- the recording ---- */

struct event {
	enum { WRITE, SYNC, REPORT } kind;
	uint64_t offset, length;
	uint8_t *data; /* NULL: zeroes */
	struct report report;
};

static struct event *events;
static size_t event_count, event_room;
static bool recording;

static struct event *add_event(int kind)
{
	if (event_count == event_room) {
		event_room = event_room ? event_room * 2 : 1024;
		events = realloc(events, event_room * sizeof(*events));
	}
	events[event_count] = (struct event){.kind = kind};
	return &events[event_count++];
}

static void forget_events(void)
{
	for (size_t i = 0; i < event_count; i++)
		free(events[i].data);
	event_count = 0;
}

/* These stand before the C library's in the test program; the disk library calls them. The names with 64 are what is
 * called where off_t is asked to have 64 bits. */
ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t offset)
{
	ssize_t moved = syscall(SYS_pwritev, fd, iov, (long)count, (long)offset, 0l);

	if (recording && moved > 0) {
		struct event *e = add_event(WRITE);
		ssize_t done = 0;

		e->offset = offset;
		e->length = moved;
		e->data = malloc(moved);
		for (int i = 0; done < moved; done += min((ssize_t)iov[i].iov_len, moved - done), i++)
			memcpy(e->data + done, iov[i].iov_base, min((ssize_t)iov[i].iov_len, moved - done));
	}
	return moved;
}

ssize_t pwritev64(int fd, const struct iovec *iov, int count, off64_t offset)
{
	return pwritev(fd, iov, count, offset);
}

int fdatasync(int fd)
{
	if (recording)
		add_event(SYNC);
	return 0; /* nothing is really lost here, so nothing needs to be waited for */
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
	int result = syscall(SYS_fallocate, fd, (long)mode, (long)offset, (long)length);

	if (recording && result == 0) {
		struct event *e = add_event(WRITE);

		e->offset = offset;
		e->length = length;
	}
	return result;
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
	return fallocate(fd, mode, offset, length);
}

/* ---- the life of a disk, and its ends ---- */

static void report(uint32_t block, uint32_t number, int what)
{
	add_event(REPORT)->report = (struct report){block, number, what};
}

static void live(struct disk *disk, uint32_t *number, unsigned steps)
{
	static uint32_t data[BLOCK / 4 * 16];

	while (steps--) {
		unsigned count = 1 + random_below(16), first = random_below(BLOCKS - count + 1),
			 kind = random_below(16);
		uint64_t offset = (uint64_t)first * BLOCK, length = count * BLOCK;
		struct iovec iov = {data, length};
		uint32_t n = kind < 11 ? ++*number : 0;

		for (unsigned i = 0; i < length / 4; i++)
			data[i] = n;
		if (kind < 14) {
			for (unsigned i = 0; i < count; i++)
				report(first + i, n, BEGUN);
			if (kind < 11)
				assert_int_equal(disk_writev(disk, offset, &iov, 1), 0);
			else
				assert_int_equal(disk_write_zeroes(disk, offset, length, kind < 13), 0);
		} else {
			assert_int_equal(disk_flush(disk), 0);
			report(0, 0, FLUSHED);
		}
	}
}

static void apply(int fd, const struct event *e, bool in_part)
{
	static const uint8_t zeroes[512];
	unsigned chance = in_part ? random_below(4) : 3; /* of three */
	struct stat status;

	fstat(fd, &status);
	for (uint64_t at = 0; at < e->length;) {
		/* Sectors reach the disk as a whole. */
		uint64_t part = min(512 - (e->offset + at) % 512, e->length - at);

		if (e->data || e->offset + at < (uint64_t)status.st_size) {
			if (random_below(3) < chance)
				assert_int_equal(syscall(SYS_pwrite64, fd, e->data ? e->data + at : zeroes, part,
							 e->offset + at),
					part);
			/* The file's length is recorded beside the data: it may have grown without it. */
			else if (e->data && random_below(2))
				assert_int_equal(fallocate(fd, 0, e->offset + at, part), 0);
		}
		at += part;
	}
}

/* A moment to end at: any, or one with as much as possible not synced. */
static size_t random_end(void)
{
	size_t end = random_below(event_count + 1);

	if (random_below(2)) {
		while (end < event_count && events[end].kind != SYNC)
			end++;
	}
	return end;
}

/* An image as it may be when the power fails after event `end`. */
static void crash(size_t end, struct expectation *all)
{
	size_t synced = 0;
	int fd;

	for (size_t i = 0; i < end; i++) {
		if (events[i].kind == SYNC)
			synced = i;
	}
	run("cp start.qcow2 crash.qcow2");
	fd = open("crash.qcow2", O_RDWR | O_CLOEXEC);
	memset(all, 0, sizeof(*all) * BLOCKS);
	for (size_t i = 0; i < end; i++) {
		if (events[i].kind == REPORT)
			learn(all, &events[i].report);
		if (events[i].kind == WRITE)
			apply(fd, &events[i], i > synced);
	}
	close(fd);
}

static void ordeal(const char *create, unsigned lives, unsigned crashes)
{
	static struct expectation all[BLOCKS];

	print_message("  %s\n", create);
	for (unsigned life = 0; life < lives; life++) {
		uint32_t number = life * 100000;
		struct disk *disk;

		random_seed(9000 + life);
		run("rm -f start.qcow2; %s; cp start.qcow2 p.qcow2", create);
		disk = open_disk("p.qcow2", DISK_QCOW2, false);
		recording = true;
		live(disk, &number, 150);
		recording = false;
		close_disk(disk);
		for (unsigned i = 0; i < crashes; i++) {
			crash(random_end(), all);
			if (i % 8 == 0 && (run_status("qemu-img check -f qcow2 crash.qcow2") & ~3) != 0)
				fail_msg("crash %u of life %u: qemu-img check finds errors", i, life);
			/* Our own check is the stricter one. */
			disk = open_disk("crash.qcow2", DISK_QCOW2, false);
			expect_safe(disk, all);
			close_disk(disk);
		}
		check_clean("crash.qcow2");
		forget_events();
	}
}

static void power_loss(void **state)
{
	static const char *const images[] = {
		"qemu-img create -q -f qcow2 start.qcow2 4M",
		"qemu-img create -q -f qcow2 -o cluster_size=512 start.qcow2 4M",
		"qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=64 start.qcow2 4M",
		"qemu-img create -q -f qcow2 -o cluster_size=4k,compat=0.10 start.qcow2 4M",
		"truncate -s 4M base; qemu-img create -q -f qcow2 -b base -F raw start.qcow2",
		"truncate -s 4M base; qemu-img convert -c -O qcow2 base start.qcow2; qemu-img snapshot -c s "
		"start.qcow2",
	};
	const char *lives = getenv("POWER_LIVES");

	for (size_t i = 0; i < ARRAY_SIZE(images); i++)
		ordeal(images[i], lives ? atoi(lives) : 2, 32);
	free(events);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(power_loss)};

	return cmocka_run_group_tests(tests, enter, leave);
}
