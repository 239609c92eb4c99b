/* qcow2 images of all kinds under random operations, beside a model in memory, with qemu-img as the judge. */
/* Else <fcntl.h> would rename fallocate to fallocate64, and both are defined here. */
#undef _FILE_OFFSET_BITS
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>
#include <fcntl.h>
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

/* Rounds of random operations with a full judgement after each. */
static void ordeal(const char *path, unsigned rounds, unsigned steps)
{
	struct modelled m;

	modelled_open(&m, path, DISK_QCOW2);
	for (unsigned i = 0; i < rounds; i++) {
		modelled_steps(&m, steps);
		modelled_judge(&m);
	}
	modelled_close(&m);
	check_clean(path);
}

static void options(void **state)
{
	static const char *const variants[] = {
		"compat=1.1 3M",
		"compat=0.10 3M",
		"cluster_size=512 3000320",
		"cluster_size=512,refcount_bits=64 3M",
		"cluster_size=512,refcount_bits=1 3M",
		"cluster_size=512,compat=0.10 2M",
		"cluster_size=1k,refcount_bits=2 3M",
		"cluster_size=2k,refcount_bits=4 3M",
		"cluster_size=4k,refcount_bits=8 5M",
		"cluster_size=8k,refcount_bits=32 5M",
		"cluster_size=128k 5M",
		"cluster_size=2M 20M",
		"cluster_size=2M,refcount_bits=64 20M",
		"lazy_refcounts=on 5M",
		"preallocation=metadata 5M",
		"preallocation=metadata,cluster_size=512 2M",
		"preallocation=falloc 5M",
		"preallocation=full 5M",
		"size=777728",
	};

	for (size_t i = 0; i < ARRAY_SIZE(variants); i++) {
		print_message("  %s\n", variants[i]);
		random_seed(100 + i);
		run("rm -f o.qcow2; qemu-img create -q -f qcow2 o.qcow2 -o %s", variants[i]);
		ordeal("o.qcow2", 2, 150);
	}
}

/* A raw file with something in it, and holes. */
static void make_base(const char *path, uint64_t size)
{
	uint8_t *data = calloc(1, size);

	for (uint64_t i = 0; i < size; i += 8) {
		uint64_t value = random_u64();

		/* text-like, so that it can be compressed; every third 64 KiB empty */
		if (i / 65536 % 3)
			memcpy(data + i, &(uint64_t){value & 0x0f0f0f0f00000000ull}, 8);
	}
	write_file(path, data, size);
	free(data);
}

static void backing(void **state)
{
	static const struct {
		const char *base, *overlay;
	} variants[] = {
		{"raw", "3M"},
		{"raw", "-o compat=0.10 3M"},
		{"raw", "-o cluster_size=4k 3M"},
		{"raw", "2M"}, /* overlay shorter than its base */
		{"raw", "6M"}, /* and longer */
		{"raw", "-o compat=0.10 6M"},
		{"qcow2", "3M"},
		{"qcow2", "-o cluster_size=512 3M"},
		{"qcow2", "-o cluster_size=2M 6M"},
		{"qcow2 -c", "3M"}, /* compressed */
		{"qcow2 -c -o cluster_size=4k", "-o compat=0.10 5M"},
	};

	for (size_t i = 0; i < ARRAY_SIZE(variants); i++) {
		print_message("  base %s, overlay %s\n", variants[i].base, variants[i].overlay);
		random_seed(200 + i);
		make_base("plain", 3 << 20);
		run("rm -rf sub; mkdir sub; qemu-img convert -f raw -O %s plain sub/base; cp sub/base saved",
			variants[i].base);
		run("qemu-img create -q -f qcow2 -b base -F %.5s sub/over.qcow2 %s", variants[i].base,
			variants[i].overlay);
		ordeal("sub/over.qcow2", 2, 80);
		run("cmp sub/base saved"); /* never written */
	}
}

/* raw <- qcow2 (compressed) <- qcow2 <- qcow2, each with its own writes and of its own size. */
static void chain(void **state)
{
	random_seed(300);
	make_base("c0", 3 << 20);
	run("qemu-img create -q -f qcow2 -b c0 -F raw c1 3500032");
	ordeal("c1", 1, 30);
	run("qemu-img create -q -f qcow2 -b c1 -F qcow2 -o cluster_size=4k c2 4M");
	ordeal("c2", 1, 30);
	run("qemu-img create -q -f qcow2 -b $PWD/c2 -F qcow2 c3 4M");
	ordeal("c3", 3, 60);
}

/* Compressed clusters in the image itself: read, overwritten in parts and whole, discarded. */
static void compressed(void **state)
{
	static const char *const sizes[] = {"64k", "512", "4k", "2M"};

	for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		random_seed(400 + i);
		make_base("plain", 4 << 20);
		run("qemu-img convert -c -f raw -O qcow2 -o cluster_size=%s plain z.qcow2", sizes[i]);
		ordeal("z.qcow2", 3, 60);
	}
}

/* A snapshot's content survives whatever is written afterwards, and so do those after it. */
static void snapshots(void **state)
{
	static const char *const variants[] = {
		"", "-o cluster_size=512", "-o compat=0.10", "-o cluster_size=4k,refcount_bits=8", "-c"};

	for (size_t i = 0; i < ARRAY_SIZE(variants); i++) {
		random_seed(500 + i);
		make_base("plain", 3 << 20);
		run("qemu-img convert -f raw -O qcow2 %s plain s.qcow2", variants[i]);
		for (int n = 0; n < 3; n++) {
			run("qemu-img snapshot -c snap%d s.qcow2; qemu-img convert -f qcow2 -O raw s.qcow2 want%d", n,
				n);
			ordeal("s.qcow2", 2, 40);
			for (int k = 0; k <= n; k++)
				run("qemu-img convert -l snapshot.name=snap%d -f qcow2 -O raw s.qcow2 is && cmp is "
				    "want%d",
					k, k);
		}
		run("qemu-img snapshot -d snap1 s.qcow2 && qemu-img snapshot -a snap0 s.qcow2");
		ordeal("s.qcow2", 1, 40);
		run("qemu-img convert -l snapshot.name=snap2 -f qcow2 -O raw s.qcow2 is && cmp is want2");
	}
}

/* Zero clusters with a cluster of their own, made by QEMU. */
static void zero_clusters(void **state)
{
	random_seed(600);
	run("qemu-img create -q -f qcow2 n.qcow2 4M");
	run("qemu-io -f qcow2 -c 'write -P 7 0 4M' -c 'write -z 128k 1M' -c 'write -z -u 2M 512k' n.qcow2");
	ordeal("n.qcow2", 3, 60);
}

/* An image whose program died with lazy counts: they are set right before anything else. */
static void dirty(void **state)
{
	struct disk *disk;
	uint8_t data[65536];
	struct iovec iov = {data, sizeof(data)};

	run("qemu-img create -q -f qcow2 -o lazy_refcounts=on d.qcow2 16M");
	run("qemu-io -f qcow2 -c 'write -P 90 0 5M' -c flush -c abort d.qcow2 >/dev/null 2>&1; true");
	run("qemu-img info d.qcow2 | grep -q 'corrupt: false'");
	assert_int_not_equal(run_status("qemu-img check d.qcow2"), 0);
	/* Who only reads changes nothing. */
	run("cp d.qcow2 before");
	disk = open_disk("d.qcow2", DISK_AUTO, true);
	close_disk(disk);
	run("cmp d.qcow2 before");
	disk = open_disk("d.qcow2", DISK_AUTO, false);
	assert_int_equal(disk_readv(disk, 1 << 20, &iov, 1), 0);
	assert_true(data[0] == 90 && data[65535] == 90);
	close_disk(disk);
	check_clean("d.qcow2");
	random_seed(650);
	ordeal("d.qcow2", 1, 60);
}

/* Space that a crash left unused is given back at the next opening. */
static void leaks(void **state)
{
	run("qemu-img create -q -f qcow2 k.qcow2 4M");
	run("qemu-io -f qcow2 -c 'write -P 90 0 1M' k.qcow2");
	/* forget the only L2 table: 17 clusters are left over */
	run("printf '\\0\\0\\0\\0\\0\\0\\0\\0' | dd of=k.qcow2 bs=1 seek=196608 conv=notrunc status=none");
	assert_int_equal(run_status("qemu-img check k.qcow2"), 3);
	close_disk(open_disk("k.qcow2", DISK_AUTO, false));
	check_clean("k.qcow2");
}

/* Persistent bitmaps are not kept up to date by us: their autoclear bit is cleared, as the format demands, and nothing
 * of theirs is given away as free. */
static void bitmaps(void **state)
{
	random_seed(700);
	run("qemu-img create -q -f qcow2 b.qcow2 4M && qemu-img bitmap --add b.qcow2 mine");
	run("qemu-io -f qcow2 -c 'write -P 1 0 64k' b.qcow2");

	struct modelled m;

	modelled_open(&m, "b.qcow2", DISK_QCOW2);
	modelled_steps(&m, 60);
	write_file("model.raw", m.model, m.size);
	modelled_close(&m);
	assert_int_equal(run_status("qemu-img check b.qcow2") & ~3, 0); /* at most leaks: the bitmap's */
	run("qemu-img compare -f qcow2 -F raw b.qcow2 model.raw");
}

/* Discarded space really goes back to the file system. */
static void space(void **state)
{
	enum { BYTES = 16 << 20 };
	uint8_t *data = malloc(BYTES);
	struct iovec iov = {data, BYTES};
	struct stat before, after;
	struct disk *disk;

	memset(data, 1, BYTES);
	run("qemu-img create -q -f qcow2 f.qcow2 64M");
	disk = open_disk("f.qcow2", DISK_AUTO, false);
	assert_int_equal(disk_writev(disk, 0, &iov, 1), 0);
	assert_int_equal(disk_flush(disk), 0);
	stat("f.qcow2", &before);
	assert_int_equal(disk_discard(disk, 0, BYTES), 0);
	assert_int_equal(disk_flush(disk), 0);
	stat("f.qcow2", &after);
	assert_true(before.st_blocks > BYTES / 512);
	assert_true(after.st_blocks < before.st_blocks / 8);
	/* And is used again: the file does not grow. */
	assert_int_equal(disk_writev(disk, BYTES, &iov, 1), 0);
	close_disk(disk);
	stat("f.qcow2", &after);
	assert_int_equal(after.st_size, before.st_size);
	check_clean("f.qcow2");
	free(data);
}

/* ---- several threads ---- */

#define THREADS 4
#define PART 4096
#define PARTS 1024

struct worker {
	struct disk *disk;
	unsigned number, seed;
	uint32_t content[PARTS]; /* of the parts that are this worker's: every fourth */
};

static void *work(void *opaque)
{
	struct worker *w = opaque;
	static __thread uint32_t data[PART / 4];
	struct iovec iov = {data, PART};

	for (unsigned i = 0; i < 1500; i++) {
		unsigned part = rand_r(&w->seed) % (PARTS / THREADS) * THREADS + w->number;
		uint64_t offset = (uint64_t)part * PART;

		switch (rand_r(&w->seed) % 8) {
		case 0 ... 3:
			w->content[part] = rand_r(&w->seed) | 1;
			for (unsigned k = 0; k < PART / 4; k++)
				data[k] = w->content[part];
			if (disk_writev(w->disk, offset, &iov, 1) < 0)
				return "write";
			break;
		case 4:
			w->content[part] = 0;
			if (disk_write_zeroes(w->disk, offset, PART, true) < 0)
				return "write zeroes";
			break;
		case 5:
			if (i % 16 == 0 && disk_flush(w->disk) < 0)
				return "flush";
			break;
		default:
			if (disk_readv(w->disk, offset, &iov, 1) < 0)
				return "read";
			for (unsigned k = 0; k < PART / 4; k++) {
				if (data[k] != w->content[part])
					return "content";
			}
		}
	}
	return NULL;
}

static void threads(void **state)
{
	static const char *const variants[] = {"", "-o cluster_size=4k", "-o cluster_size=512"};

	for (size_t v = 0; v < ARRAY_SIZE(variants); v++) {
		static struct worker workers[THREADS];
		pthread_t ids[THREADS];
		struct disk *disk;

		run("rm -f t.qcow2; qemu-img create -q -f qcow2 %s t.qcow2 4M", variants[v]);
		disk = open_disk("t.qcow2", DISK_AUTO, false);
		for (unsigned i = 0; i < THREADS; i++) {
			workers[i] = (struct worker){.disk = disk, .number = i, .seed = i + 1};
			assert_int_equal(pthread_create(&ids[i], NULL, work, &workers[i]), 0);
		}
		for (unsigned i = 0; i < THREADS; i++) {
			void *wrong;

			pthread_join(ids[i], &wrong);
			if (wrong)
				fail_msg("thread %u: wrong %s", i, (char *)wrong);
		}
		close_disk(disk);
		check_clean("t.qcow2");
		disk = open_disk("t.qcow2", DISK_AUTO, true);
		for (unsigned part = 0; part < PARTS; part++) {
			uint32_t data[PART / 4];
			struct iovec iov = {data, PART};

			assert_int_equal(disk_readv(disk, (uint64_t)part * PART, &iov, 1), 0);
			assert_int_equal(data[0], workers[part % THREADS].content[part]);
			assert_int_equal(data[PART / 4 - 1], workers[part % THREADS].content[part]);
		}
		close_disk(disk);
	}
}

/* All threads write to different parts of the same cluster at the same time, while it is being allocated. */
struct racer {
	struct disk *disk;
	pthread_barrier_t *start;
	unsigned number, clusters;
};

static void *race(void *opaque)
{
	struct racer *r = opaque;
	uint8_t data[PART];
	struct iovec iov = {data, PART};

	memset(data, r->number + 1, PART);
	for (unsigned c = 0; c < r->clusters; c++) {
		pthread_barrier_wait(r->start);
		if (disk_writev(r->disk, c * 65536ull + r->number * PART, &iov, 1) < 0)
			return "write";
	}
	return NULL;
}

static void same_cluster(void **state)
{
	static struct racer racers[THREADS];
	static uint8_t data[65536], expected[65536];
	struct iovec iov = {data, sizeof(data)};
	pthread_t ids[THREADS];
	pthread_barrier_t start;
	struct disk *disk;

	run("truncate -s 64M base; qemu-img create -q -f qcow2 -b base -F raw r.qcow2 64M");
	for (unsigned i = 0; i < THREADS; i++)
		memset(expected + i * PART, i + 1, PART);
	pthread_barrier_init(&start, NULL, THREADS);
	disk = open_disk("r.qcow2", DISK_AUTO, false);
	for (unsigned i = 0; i < THREADS; i++) {
		racers[i] = (struct racer){disk, &start, i, 1000};
		assert_int_equal(pthread_create(&ids[i], NULL, race, &racers[i]), 0);
	}
	for (unsigned i = 0; i < THREADS; i++) {
		void *wrong;

		pthread_join(ids[i], &wrong);
		assert_null(wrong);
	}
	for (unsigned c = 0; c < racers[0].clusters; c++) {
		assert_int_equal(disk_readv(disk, c * sizeof(data), &iov, 1), 0);
		assert_memory_equal(data, expected, sizeof(data));
	}
	close_disk(disk);
	check_clean("r.qcow2");
	pthread_barrier_destroy(&start);
}

/* On a file system without holes, freed clusters keep their old bytes until they are used again. */
static bool no_holes;

/* Stands before the C library's; the disk library calls it. */
int fallocate(int fd, int mode, off_t offset, off_t length)
{
	if (no_holes) {
		errno = EOPNOTSUPP;
		return -1;
	}
	return syscall(SYS_fallocate, fd, (long)mode, (long)offset, (long)length);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
	return fallocate(fd, mode, offset, length);
}

static void without_holes(void **state)
{
	no_holes = true;
	random_seed(800);
	run("qemu-img create -q -f qcow2 h.qcow2 4M; qemu-img create -q -f qcow2 -o cluster_size=2M h2.qcow2 20M; "
	    "truncate -s 4M h.raw");
	ordeal("h.qcow2", 3, 120);
	ordeal("h2.qcow2", 3, 120);

	struct modelled m;

	modelled_open(&m, "h.raw", DISK_RAW);
	modelled_steps(&m, 200);
	modelled_judge(&m);
	modelled_close(&m);
	no_holes = false;
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(options),
		cmocka_unit_test(backing),
		cmocka_unit_test(chain),
		cmocka_unit_test(compressed),
		cmocka_unit_test(snapshots),
		cmocka_unit_test(zero_clusters),
		cmocka_unit_test(dirty),
		cmocka_unit_test(leaks),
		cmocka_unit_test(bitmaps),
		cmocka_unit_test(space),
		cmocka_unit_test(threads),
		cmocka_unit_test(same_cluster),
		cmocka_unit_test(without_holes),
	};

	if (argc > 1) /* one test by name */
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, enter, leave);
}
