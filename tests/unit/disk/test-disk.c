/* Raw disks, and what is the same for all formats: ranges, locks, guessing of the format. */
#include "support.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
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

static void raw_model(void **state)
{
	struct modelled m;

	run("truncate -s 5M a.raw");
	random_seed(1);
	modelled_open(&m, "a.raw", DISK_RAW);
	assert_string_equal(disk_format_name(m.disk), "raw");
	for (int i = 0; i < 4; i++) {
		modelled_steps(&m, 150);
		modelled_judge(&m);
	}
	modelled_close(&m);
}

/* A length of 1000 bytes: a disk of two sectors whose missing bytes are zeroes. */
static void raw_odd_length(void **state)
{
	char data[1024];
	struct iovec iov = {data, sizeof(data)};
	struct disk *disk;
	struct stat status;

	memset(data, 'x', 1000);
	write_file("odd.raw", data, 1000);
	disk = open_disk("odd.raw", DISK_RAW, false);
	assert_int_equal(disk_size(disk), 1024);
	memset(data, 'y', sizeof(data));
	assert_int_equal(disk_readv(disk, 0, &iov, 1), 0);
	assert_true(data[999] == 'x' && data[1000] == 0 && data[1023] == 0);
	memset(data, 'z', sizeof(data));
	assert_int_equal(disk_writev(disk, 512, &(struct iovec){data, 512}, 1), 0);
	close_disk(disk);
	stat("odd.raw", &status);
	assert_int_equal(status.st_size, 1024);
}

static void ranges(void **state)
{
	static char data[4096];
	struct iovec iov = {data, 512};
	struct disk *disk;

	run("truncate -s 8192 r.raw");
	run("qemu-img create -q -f qcow2 r.qcow2 8192");
	for (int i = 0; i < 2; i++) {
		disk = open_disk(i ? "r.qcow2" : "r.raw", DISK_AUTO, false);
		assert_int_equal(disk_readv(disk, 0, &iov, 1), 0);
		assert_int_equal(disk_readv(disk, 7680, &iov, 1), 0);
		assert_int_equal(disk_readv(disk, 8192, &iov, 1), -EINVAL);
		assert_int_equal(disk_readv(disk, 1, &iov, 1), -EINVAL);
		assert_int_equal(disk_readv(disk, UINT64_MAX - 511, &iov, 1), -EINVAL);
		assert_int_equal(disk_writev(disk, 8192, &iov, 1), -EINVAL);
		assert_int_equal(disk_writev(disk, 0, &(struct iovec){data, 100}, 1), -EINVAL);
		assert_int_equal(disk_writev(disk, 7680, &(struct iovec){data, 1024}, 1), -EINVAL);
		assert_int_equal(disk_discard(disk, 512, UINT64_MAX - 511), -EINVAL);
		assert_int_equal(disk_write_zeroes(disk, 7680, 1024, true), -EINVAL);
		assert_int_equal(disk_readv(disk, 0, NULL, 0), 0);
		assert_int_equal(disk_discard(disk, 8192, 0), 0);
		close_disk(disk);

		disk = open_disk(i ? "r.qcow2" : "r.raw", DISK_AUTO, true);
		assert_true(disk_read_only(disk));
		assert_int_equal(disk_readv(disk, 0, &iov, 1), 0);
		assert_int_equal(disk_writev(disk, 0, &iov, 1), -EROFS);
		assert_int_equal(disk_discard(disk, 0, 512), -EROFS);
		assert_int_equal(disk_write_zeroes(disk, 0, 512, false), -EROFS);
		assert_int_equal(disk_flush(disk), 0);
		close_disk(disk);
	}
}

/* More pieces than one system call takes. */
static void many_pieces(void **state)
{
	enum { PIECES = 3000 };
	static uint8_t data[PIECES * 512], back[PIECES * 512];
	static struct iovec iov[PIECES], whole = {back, sizeof(back)};

	run("truncate -s 4M p.raw");
	run("qemu-img create -q -f qcow2 p.qcow2 4M");
	for (int i = 0; i < PIECES; i++) {
		memset(data + i * 512, i * 7, 512);
		iov[i] = (struct iovec){data + i * 512, 512};
	}
	for (int i = 0; i < 2; i++) {
		struct disk *disk = open_disk(i ? "p.qcow2" : "p.raw", DISK_AUTO, false);

		assert_int_equal(disk_writev(disk, 1024, iov, PIECES), 0);
		assert_int_equal(disk_readv(disk, 1024, &whole, 1), 0);
		assert_memory_equal(data, back, sizeof(data));
		close_disk(disk);
	}
}

static void locks(void **state)
{
	run("qemu-img create -q -f qcow2 l.qcow2 1M");
	run("qemu-img create -q -f qcow2 -b l.qcow2 -F qcow2 over.qcow2");
	run("qemu-img create -q -f qcow2 -b l.qcow2 -F qcow2 over2.qcow2");

	struct disk *writer = open_disk("l.qcow2", DISK_AUTO, false);

	open_fails("l.qcow2", DISK_AUTO, false, "in use by another process");
	open_fails("l.qcow2", DISK_AUTO, true, "in use by another process");
	open_fails("over.qcow2", DISK_AUTO, false, "in use by another process");
	/* QEMU sees our lock too. */
	assert_int_not_equal(run_status("qemu-img check l.qcow2"), 0);
	assert_int_not_equal(run_status("qemu-io -f qcow2 -c 'write 0 512' l.qcow2"), 0);
	close_disk(writer);

	struct disk *reader = open_disk("l.qcow2", DISK_AUTO, true), *another = open_disk("l.qcow2", DISK_AUTO, true);

	open_fails("l.qcow2", DISK_AUTO, false, "or open it readonly");
	assert_int_not_equal(run_status("qemu-io -f qcow2 -c 'write 0 512' l.qcow2"), 0);
	run("qemu-img check l.qcow2");
	close_disk(reader);
	close_disk(another);

	/* Many may share a backing file. */
	struct disk *over = open_disk("over.qcow2", DISK_AUTO, false),
		    *over2 = open_disk("over2.qcow2", DISK_AUTO, false);

	open_fails("l.qcow2", DISK_AUTO, false, "or open it readonly");
	close_disk(over);
	close_disk(over2);
	writer = open_disk("l.qcow2", DISK_AUTO, false);
	close_disk(writer);

	/* And we see QEMU's. */
	run("mkfifo hold; (sleep 20 > hold & echo $! > holder); "
	    "(qemu-io -f qcow2 l.qcow2 < hold > /dev/null 2>&1 & echo $! > user); sleep 0.5");
	open_fails("l.qcow2", DISK_AUTO, false, "in use by another process");
	run("kill $(cat holder user)");
}

static void wrong_files(void **state)
{
	run("truncate -s 0 empty; mkdir folder; mkfifo pipe; truncate -s 1M other; chmod 0400 other");
	open_fails("missing", DISK_AUTO, false, "does not exist");
	open_fails("empty", DISK_AUTO, false, "empty");
	open_fails("folder", DISK_AUTO, false, "neither a regular file nor a block device");
	open_fails("folder", DISK_AUTO, true, "neither a regular file nor a block device");
	open_fails("pipe", DISK_AUTO, true, "neither a regular file nor a block device");
	open_fails("/dev/null", DISK_AUTO, false, "neither a regular file nor a block device");
	open_fails("other", DISK_QCOW2, true, "no qcow2 image");
	open_fails("empty", DISK_QCOW2, true, "truncated");
	if (geteuid() != 0)
		open_fails("other", DISK_RAW, false, "readonly");
}

/* A guest must not turn a raw disk whose format was guessed into a qcow2 image that names a file of the host. */
static void guessed_format(void **state)
{
	char sector[512] = "QFI\xfb";
	struct iovec iov[2] = {{sector, 3}, {sector + 3, 509}};
	struct disk *disk;

	run("truncate -s 1M g.raw");
	disk = open_disk("g.raw", DISK_AUTO, false);
	assert_string_equal(disk_format_name(disk), "raw");
	assert_int_equal(disk_writev(disk, 0, iov, 2), -EPERM);
	assert_int_equal(disk_writev(disk, 512, iov, 2), 0);
	sector[0] = 'q';
	assert_int_equal(disk_writev(disk, 0, iov, 2), 0);
	close_disk(disk);
	sector[0] = 'Q';
	disk = open_disk("g.raw", DISK_RAW, false);
	assert_int_equal(disk_writev(disk, 0, iov, 2), 0);
	close_disk(disk);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(raw_model),
		cmocka_unit_test(raw_odd_length),
		cmocka_unit_test(ranges),
		cmocka_unit_test(many_pieces),
		cmocka_unit_test(locks),
		cmocka_unit_test(wrong_files),
		cmocka_unit_test(guessed_format),
	};

	if (argc > 1) /* one test by name */
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, enter, leave);
}
