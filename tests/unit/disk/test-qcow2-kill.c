/* kill -9 at any moment: what was flushed is there afterwards, and the image has no errors.
 *
 * A child writes blocks that carry a number that only grows, and reports through a pipe which numbers a flush has made
 * safe. It is killed at a random time; every block must then hold the last number that was safe, or a later one. */
#include "crash.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
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

static void tell(int pipe, uint32_t block, uint32_t number, int what)
{
	struct report r = {block, number, what};

	if (write(pipe, &r, sizeof(r)) != sizeof(r))
		_exit(1);
}

static void child(const char *path, int pipe, unsigned seed)
{
	struct disk_options options = {.format = DISK_QCOW2};
	static uint32_t data[BLOCK / 4 * 16];
	struct error err = {0};
	struct disk *disk;

	if (disk_open(&disk, path, &options, &err) < 0) {
		fprintf(stderr, "%s\n", err.text);
		_exit(1);
	}
	random_seed(seed);
	for (uint32_t number = 1 + seed * 1000000;; number++) {
		unsigned count = 1 + random_below(16), first = random_below(BLOCKS - count + 1),
			 kind = random_below(16);
		struct iovec iov = {data, count * BLOCK};
		int result;

		for (unsigned i = 0; i < count * BLOCK / 4; i++)
			data[i] = number;
		if (kind < 11) {
			for (unsigned i = 0; i < count; i++)
				tell(pipe, first + i, number, BEGUN);
			result = disk_writev(disk, (uint64_t)first * BLOCK, &iov, 1);
		} else if (kind < 13) {
			for (unsigned i = 0; i < count; i++)
				tell(pipe, first + i, 0, BEGUN);
			result = disk_write_zeroes(disk, (uint64_t)first * BLOCK, count * BLOCK, true);
		} else {
			result = disk_flush(disk);
			tell(pipe, 0, 0, FLUSHED);
		}
		if (result < 0)
			_exit(2);
	}
}

static void ordeal(const char *create, unsigned rounds)
{
	static struct expectation all[BLOCKS];
	unsigned flushes = 0, leaks = 0;

	memset(all, 0, sizeof(all));
	run("rm -f k.qcow2; %s", create);
	for (unsigned round = 1; round <= rounds; round++) {
		struct report r;
		int pipe_fds[2];
		pid_t pid;

		assert_int_equal(pipe(pipe_fds), 0);
		pid = fork();
		if (pid == 0) {
			close(pipe_fds[0]);
			child("k.qcow2", pipe_fds[1], round);
		}
		close(pipe_fds[1]);

		/* The reports are read on meanwhile, else the child would wait for us. */
		struct timespec now, end;

		random_seed(round * 77);
		clock_gettime(CLOCK_MONOTONIC, &end);
		end.tv_nsec += 3000000 + random_below(80000000);
		for (bool killed = false; read(pipe_fds[0], &r, sizeof(r)) == sizeof(r);) {
			learn(all, &r);
			flushes += r.what == FLUSHED;
			clock_gettime(CLOCK_MONOTONIC, &now);
			if (!killed && (now.tv_sec - end.tv_sec) * 1000000000ll + now.tv_nsec - end.tv_nsec > 0) {
				kill(pid, SIGKILL);
				killed = true;
			}
		}
		close(pipe_fds[0]);

		int status;

		waitpid(pid, &status, 0);
		assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);

		/* 3: clusters left over unused, and nothing else. */
		status = run_status("qemu-img check -f qcow2 k.qcow2");
		if (status != 0 && status != 3)
			fail_msg("round %u of \"%s\": qemu-img check ends with %d", round, create, status);
		leaks += status == 3;

		struct disk *disk = open_disk("k.qcow2", DISK_QCOW2, false);

		expect_safe(disk, all);
		close_disk(disk);
		check_clean("k.qcow2"); /* what was left over is given back */
	}
	print_message("  %s: %u kills, %u flushes, unused clusters left over in %u\n", create, rounds, flushes, leaks);
	assert_true(flushes > 0);
}

static void killed(void **state)
{
	static const char *const images[] = {
		"qemu-img create -q -f qcow2 k.qcow2 4M",
		"qemu-img create -q -f qcow2 -o cluster_size=512 k.qcow2 4M",
		"qemu-img create -q -f qcow2 -o cluster_size=4k,compat=0.10 k.qcow2 4M",
		"truncate -s 4M base; qemu-img create -q -f qcow2 -b base -F raw k.qcow2",
		"truncate -s 4M base; qemu-img convert -c -O qcow2 base k.qcow2; qemu-img snapshot -c s k.qcow2",
		"qemu-img create -q -f qcow2 -o cluster_size=2M k.qcow2 4M",
	};
	const char *rounds = getenv("KILL_ROUNDS");

	for (size_t i = 0; i < ARRAY_SIZE(images); i++)
		ordeal(images[i], rounds ? atoi(rounds) : 8);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(killed)};

	return cmocka_run_group_tests(tests, enter, leave);
}
