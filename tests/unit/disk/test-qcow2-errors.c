/* System calls that fail, any of them and at any moment: the guest sees an error, loses nothing that it was not told
 * of, and the image stays whole. */

/* Else <sys/uio.h> would rename pwritev to pwritev64, and both are defined here. */
#undef _FILE_OFFSET_BITS
#include "support.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

/* ---- failing system calls, standing before the C library's ---- */

static unsigned one_in; /* 0: none fails */
static int failure;
static unsigned failures;
static bool sync_fails;

static bool fails(void)
{
	if (!one_in || random_below(one_in))
		return false;
	failures++;
	errno = failure;
	return true;
}

ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t offset)
{
	if (fails())
		return -1;
	/* And short writes. */
	if (one_in && count > 1 && random_below(4) == 0)
		count = 1;
	return syscall(SYS_pwritev, fd, iov, (long)count, (long)offset, 0l);
}

ssize_t pwritev64(int fd, const struct iovec *iov, int count, off64_t offset)
{
	return pwritev(fd, iov, count, offset);
}

ssize_t preadv(int fd, const struct iovec *iov, int count, off_t offset)
{
	if (failure == EIO && fails())
		return -1;
	return syscall(SYS_preadv, fd, iov, (long)count, (long)offset, 0l);
}

ssize_t preadv64(int fd, const struct iovec *iov, int count, off64_t offset)
{
	return preadv(fd, iov, count, offset);
}

int fdatasync(int fd)
{
	if (!sync_fails)
		return 0;
	errno = EIO;
	return -1;
}

/* ---- the test ---- */

enum { SECTORS = 8192 };

/* Each sector is filled with one number. After a failed change it holds the old or the new one. */
static void settle(struct disk *disk, uint32_t *model, unsigned first, unsigned count, uint32_t new, bool failed)
{
	static uint32_t data[SECTORS * 128];
	struct iovec iov = {data, count * 512};
	unsigned keep = one_in;

	one_in = 0;
	assert_int_equal(disk_readv(disk, first * 512ull, &iov, 1), 0);
	one_in = keep;
	for (unsigned i = 0; i < count; i++) {
		uint32_t found = data[i * 128];

		for (unsigned k = 1; k < 128; k++)
			assert_int_equal(data[i * 128 + k], found);
		if (found != new && !(failed && found == model[first + i]))
			fail_msg("sector %u holds %u, not %u%s", first + i, found, new,
				failed ? " nor what it had" : "");
		model[first + i] = found;
	}
}

static void step(struct disk *disk, uint32_t *model, uint32_t number)
{
	static uint32_t data[SECTORS * 128];
	unsigned count = 1 + random_below(random_below(4) ? 40 : 600), first = random_below(SECTORS - count + 1);
	struct iovec iov[2] = {{data, 512}, {data + 128, (count - 1) * 512}};
	unsigned kind = random_below(10);
	int result;

	if (kind < 6) {
		for (unsigned i = 0; i < count * 128; i++)
			data[i] = number;
		result = disk_writev(disk, first * 512ull, iov, 2);
		settle(disk, model, first, count, number, result < 0);
	} else if (kind < 8) {
		result = disk_write_zeroes(disk, first * 512ull, count * 512ull, kind == 6);
		settle(disk, model, first, count, 0, result < 0);
	} else if (kind == 8) {
		result = disk_discard(disk, first * 512ull, count * 512ull);
		settle(disk, model, first, count, 0, true);
	} else {
		result = disk_flush(disk);
	}
	if (result < 0)
		assert_int_equal(result, -failure);
}

static void ordeal(const char *create, int error)
{
	static uint32_t model[SECTORS];
	uint32_t number = 1;

	memset(model, 0, sizeof(model));
	print_message("  %s, %s\n", create, strerror(error));
	run("rm -f e.qcow2 base; %s", create);
	failure = error;
	failures = 0;
	for (unsigned round = 0; round < 10; round++) {
		struct disk *disk = open_disk("e.qcow2", DISK_QCOW2, false);
		struct error err = {0};
		int status;

		one_in = 4 + 8 * round;
		for (unsigned i = 0; i < 80; i++)
			step(disk, model, number++);
		one_in = 0;
		/* All that was not told to have failed is there after a flush that works, also after those that did
		 * not. */
		assert_int_equal(disk_flush(disk), 0);
		settle(disk, model, 0, SECTORS, UINT32_MAX, true);
		if (disk_close(disk, &err) < 0)
			fail_msg("%s", err.text);
		status = run_status("qemu-img check -f qcow2 e.qcow2");
		if (status != 0 && status != 3)
			fail_msg("round %u: qemu-img check ends with %d", round, status);
		disk = open_disk("e.qcow2", DISK_QCOW2, false);
		settle(disk, model, 0, SECTORS, UINT32_MAX, true);
		close_disk(disk);
		check_clean("e.qcow2");
	}
	assert_true(failures > 50);
}

static void failing_calls(void **state)
{
	static const char *const images[] = {
		"qemu-img create -q -f qcow2 e.qcow2 4M",
		"qemu-img create -q -f qcow2 -o cluster_size=512 e.qcow2 4M",
		"qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=64 e.qcow2 4M",
		"truncate -s 4M base; qemu-img create -q -f qcow2 -o compat=0.10 -b base -F raw e.qcow2",
		"truncate -s 4M base; qemu-img convert -c -O qcow2 -o cluster_size=4k base e.qcow2; "
		"qemu-img snapshot -c s e.qcow2",
	};

	for (size_t i = 0; i < ARRAY_SIZE(images); i++) {
		random_seed(40 + i);
		ordeal(images[i], EIO);
		ordeal(images[i], ENOSPC);
	}
}

/* What could not be written back is told at the end. */
static void failing_close(void **state)
{
	static uint8_t data[65536];
	struct iovec iov = {data, sizeof(data)};
	struct error err = {0};
	struct disk *disk;

	run("qemu-img create -q -f qcow2 c.qcow2 4M");
	disk = open_disk("c.qcow2", DISK_QCOW2, false);
	assert_int_equal(disk_writev(disk, 0, &iov, 1), 0);
	failure = EIO;
	one_in = 1;
	assert_int_equal(disk_close(disk, &err), -EIO);
	one_in = 0;
	assert_non_null(strstr(err.text, "c.qcow2"));
	check_clean("c.qcow2");
}

/* The kernel forgets about pages that it could not write once it has told so: no later flush may claim that they are
 * safe. */
static void failing_sync(void **state)
{
	static const char *const formats[] = {"qcow2", "raw"};

	for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
		static uint8_t data[65536];
		struct iovec iov = {data, sizeof(data)};
		struct error err = {0};
		struct disk *disk;

		run("qemu-img create -q -f %s s.img 4M", formats[i]);
		disk = open_disk("s.img", DISK_AUTO, false);
		assert_int_equal(disk_writev(disk, 0, &iov, 1), 0);
		sync_fails = true;
		assert_int_equal(disk_flush(disk), -EIO);
		sync_fails = false;
		assert_int_equal(disk_flush(disk), -EIO);
		assert_int_equal(disk_close(disk, &err), -EIO);
		close_disk(open_disk("s.img", DISK_AUTO, false));
		if (i == 0)
			check_clean("s.img");
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(failing_calls),
		cmocka_unit_test(failing_close),
		cmocka_unit_test(failing_sync),
	};

	return cmocka_run_group_tests(tests, enter, leave);
}
