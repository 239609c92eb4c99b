/* Images that must be refused: each with one line that names the file, the field and what to do, and without a byte
 * written to it. */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/util.h"

/* Where `qemu-img create` puts things with clusters of 64 KiB: refcount table, first refcount block, L1 table; and in
 * the base image made here, L2 table and data behind them. */
enum { REFCOUNT_TABLE = 0x10000, REFCOUNT_BLOCK = 0x20000, L1 = 0x30000, L2 = 0x40000, DATA = 0x50000 };

static int enter(void **state)
{
	scratch_enter();
	run("qemu-img create -q -f qcow2 v3 256M && qemu-img create -q -f qcow2 -o compat=0.10 v2 256M");
	run("qemu-io -f qcow2 -c 'write -P 5 0 128k' v3; qemu-io -f qcow2 -c 'write -P 5 0 128k' v2");
	return 0;
}

static int leave(void **state)
{
	scratch_leave();
	return 0;
}

struct patch {
	uint32_t at;
	unsigned bytes; /* 4 or 8; 0: no patch */
	uint64_t value;
};

static void apply(uint8_t *image, const struct patch *p)
{
	for (unsigned i = 0; i < p->bytes; i++)
		image[p->at + i] = p->value >> (p->bytes - 1 - i) * 8;
}

static void patched(void **state)
{
	static const struct {
		const char *base;
		struct patch patches[3];
		const char *message;
	} cases[] = {
		/* header */
		{"v3", {{0, 4, 0x51464900}}, "no qcow2 image"},
		{"v3", {{4, 4, 1}}, "version 1"},
		{"v3", {{4, 4, 4}}, "version 4"},
		{"v3", {{20, 4, 8}}, "cluster_bits is 8"},
		{"v3", {{20, 4, 22}}, "cluster_bits is 22"},
		{"v3", {{20, 4, 0xffffffff}}, "cluster_bits is 4294967295"},
		{"v3", {{24, 8, 0}}, "size is 0"},
		{"v3", {{24, 8, UINT64_MAX}}, "size is 18446744073709551615"},
		{"v3", {{24, 8, 1ull << 40}}, "l1_size is 1 entries, but a disk of 1099511627776 bytes needs 2048"},
		{"v3", {{32, 4, 1}}, "encrypted"},
		{"v3", {{32, 4, 2}}, "encrypted"},
		{"v3", {{36, 4, 0}}, "l1_size is 0"},
		{"v3", {{36, 4, 0x400001}}, "l1_size is 4194305"},
		{"v3", {{36, 4, 0xffffffff}}, "l1_size is"},
		{"v3", {{36, 4, 0x40000}}, "l1_table_offset"}, /* reaches beyond the file */
		{"v3", {{40, 8, 0}}, "l1_table_offset is 0x0, which overlaps the header"},
		{"v3", {{40, 8, L1 + 8}}, "l1_table_offset is 0x30008, no multiple"},
		{"v3", {{40, 8, 1ull << 40}}, "l1_table_offset"},
		{"v3", {{40, 8, UINT64_MAX << 16}}, "l1_table_offset"},
		{"v3", {{40, 8, REFCOUNT_TABLE}}, "used twice"},
		{"v3", {{48, 8, 0}}, "refcount_table_offset is 0x0"},
		{"v3", {{48, 8, REFCOUNT_TABLE + 512}}, "refcount_table_offset is 0x10200"},
		{"v3", {{48, 8, 1ull << 50}}, "refcount_table_offset"},
		{"v3", {{48, 8, L1}}, "used twice"},
		{"v3", {{56, 4, 0}}, "refcount_table_clusters is 0"},
		{"v3", {{56, 4, 0xffffffff}}, "refcount_table_clusters is 4294967295"},
		{"v3", {{56, 4, 100}}, "refcount_table_offset"},
		{"v3", {{60, 4, 65537}}, "nb_snapshots is 65537"},
		{"v3", {{60, 4, 1}}, "snapshots_offset is 0x0"},
		{"v3", {{60, 4, 1}, {64, 8, 1ull << 33}}, "snapshots_offset"},
		{"v3", {{60, 4, 1}, {64, 8, L1}}, "snapshot"},
		{"v3", {{72, 8, 2}}, "marked as corrupt"},
		{"v3", {{72, 8, 4}}, "external file"},
		{"v3", {{72, 8, 8}, {104, 4, 1 << 24}}, "compressed with zstd"},
		{"v3", {{72, 8, 8}, {104, 4, 9 << 24}}, "compressed with an unknown method"},
		{"v3", {{72, 8, 16}}, "extended L2"},
		{"v3", {{72, 8, 1ull << 63}}, "unknown qcow2 feature \"bit 63\""},
		{"v3", {{96, 4, 7}}, "refcount_order is 7"},
		{"v3", {{100, 4, 72}}, "header_length is 72"},
		{"v3", {{100, 4, 108}}, "header_length is 108"},
		{"v3", {{100, 4, 0x10008}}, "header_length is 65544"},
		{"v3", {{112, 4, 0x12345678}, {116, 4, 0xfffffff0}}, "extension 0x12345678"},
		{"v3", {{112, 4, 0xe2792aca}, {116, 4, 16}}, "the backing format's name"},
		/* backing file */
		{"v3", {{8, 8, 0x10000 - 4}, {16, 4, 8}}, "backing_file_offset"},
		{"v3", {{8, 8, 8}, {16, 4, 8}}, "backing_file_offset"},
		{"v3", {{8, 8, 1ull << 60}, {16, 4, 8}}, "backing_file_offset"},
		{"v3", {{8, 8, 1024}, {16, 4, 1024}}, "backing_file_size 1024"},
		{"v3", {{8, 8, 1024}, {16, 4, 0}}, "backing_file_size 0"},
		{"v3", {{8, 8, 1024}, {16, 4, 4}}, "zero byte"},
		{"v2", {{8, 8, 1024}, {16, 4, 4}, {1024, 4, 0x62617365}}, "does not tell the format"},
		/* root tables */
		{"v3", {{REFCOUNT_TABLE, 8, 0}}, "refcount table entry 0 is 0"},
		{"v3", {{REFCOUNT_TABLE, 8, REFCOUNT_BLOCK | 1}}, "refcount table entry 0"},
		{"v3", {{REFCOUNT_TABLE, 8, 1ull << 41}}, "beyond the end of the file"},
		{"v3", {{REFCOUNT_TABLE, 8, L1}}, "used twice"},
		{"v3", {{REFCOUNT_TABLE + 8, 8, REFCOUNT_BLOCK}}, "used twice"},
		{"v3", {{L1, 8, (1ull << 63) | L2 | 2}}, "L1 entry 0 is 0x8000000000040002"},
		{"v3", {{L1, 8, 1ull << 63}}, "L1 entry 0"},
		{"v3", {{L1, 8, (1ull << 63) | (L2 + 512)}}, "L1 entry 0"},
		{"v3", {{L1, 8, (1ull << 63) | 1ull << 40}}, "beyond the end of the file"},
		{"v3", {{L1, 8, (1ull << 63) | REFCOUNT_BLOCK}}, "used twice"},
		{"v3", {{L1, 8, (1ull << 63) | L1}}, "used twice"},
		/* L2 tables and counts */
		{"v3", {{L2, 8, (1ull << 63) | DATA | 4}}, "L2 entry 0x8000000000050004"},
		{"v2", {{L2, 8, (1ull << 63) | DATA | 1}}, "reserved bits"},
		{"v3", {{L2, 8, (1ull << 63) | (DATA + 512)}}, "no multiple of the cluster size"},
		{"v3", {{L2, 8, (1ull << 63) | 1ull << 45}}, "beyond the end of the file"},
		{"v3", {{L2, 8, (1ull << 63) | REFCOUNT_TABLE}}, "used twice"},
		{"v3", {{L2 + 8, 8, (1ull << 63) | DATA}}, "used twice"},
		{"v3", {{L2 + 8, 8, DATA}}, "used twice"},
		{"v3", {{L2, 8, (1ull << 62) | 1ull << 53}}, "beyond the end of the file"},
		{"v3", {{L2, 8, (3ull << 62) | DATA}}, "compressed and marked for writing"},
		{"v3", {{REFCOUNT_BLOCK + 10, 4, 0}}, "reference count is 0"},
		{"v3", {{REFCOUNT_BLOCK, 8, 0}}, "reference count is 0"},
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		size_t length, after_length;
		uint8_t *image = read_file(cases[i].base, &length), *after;

		for (unsigned k = 0; k < 3; k++)
			apply(image, &cases[i].patches[k]);
		write_file("bad", image, length);
		open_fails("bad", DISK_QCOW2, false, cases[i].message);
		after = read_file("bad", &after_length);
		assert_int_equal(length, after_length);
		assert_memory_equal(image, after, length);
		free(image);
		free(after);
	}
}

/* Cut off anywhere, an image is refused or, if nothing that is referred to is missing, opened. Never worse. */
static void truncated(void **state)
{
	size_t length;
	uint8_t *image = read_file("v3", &length);
	static const char *const messages[] = {"damaged", "truncated"};

	for (size_t cut = 0; cut <= DATA; cut += cut < 256 ? 1 : 4096) {
		write_file("bad", image, cut);
		open_fails("bad", DISK_QCOW2, false, messages[cut < 72]);
	}
	free(image);
}

/* The name of an unknown feature comes from the image itself. */
static void feature_by_name(void **state)
{
	size_t length;
	uint8_t *image = read_file("v3", &length);
	uint8_t *table = NULL;

	for (size_t i = 104; i < 4096 && !table; i += 8) {
		if (memcmp(image + i, "\x68\x03\xf8\x57", 4) == 0)
			table = image + i + 8;
	}
	assert_non_null(table);
	table[0] = 0;
	table[1] = 9;
	memset(table + 2, 0, 46);
	strcpy((char *)table + 2, "time travel");
	image[72 + 6] = 2;
	write_file("bad", image, length);
	open_fails("bad", DISK_QCOW2, true, "unknown qcow2 feature \"time travel\"");
	free(image);
}

static void chains(void **state)
{
	run("qemu-img create -q -f qcow2 x 1M; qemu-img create -q -f qcow2 -b x -F qcow2 y; "
	    "qemu-img rebase -u -f qcow2 -b y -F qcow2 x; qemu-img create -q -f qcow2 self 1M; "
	    "qemu-img rebase -u -f qcow2 -b $PWD/self -F qcow2 self");
	open_fails("x", DISK_AUTO, false, "cyclic");
	open_fails("y", DISK_AUTO, true, "cyclic");
	open_fails("self", DISK_AUTO, false, "cyclic");

	run("qemu-img create -q -f qcow2 d0 1M; for i in $(seq 40); do "
	    "qemu-img create -q -f qcow2 -u -b d$((i-1)) -F qcow2 d$i 1M; done");
	close_disk(open_disk("d32", DISK_AUTO, false));
	open_fails("d33", DISK_AUTO, false, "more than 32 backing files");

	run("qemu-img create -q -f qcow2 -u -b gone -F raw lost 1M");
	open_fails("lost", DISK_AUTO, false, "does not exist");
	run("qemu-img create -q -f qcow2 -u -b x -F vmdk strange 1M");
	open_fails("strange", DISK_AUTO, false, "vmdk");
	run("head -c 70000 v3 > broken; qemu-img create -q -f qcow2 -u -b broken -F qcow2 over 1M");
	open_fails("over", DISK_AUTO, false, "backing file of disk over: disk ./broken: damaged");
}

static void unsupported(void **state)
{
	run("qemu-img create -q -f qcow2 -o extended_l2=on e 1M; qemu-img create -q -f qcow2 -o data_file=ext f 1M; "
	    "qemu-img create -q -f qcow2 -o compression_type=zstd g 1M; qemu-img create -q --object secret,id=s,data=x "
	    "-f qcow2 -o encrypt.format=aes,encrypt.key-secret=s h 1M");
	open_fails("e", DISK_AUTO, false, "extended L2");
	open_fails("f", DISK_AUTO, false, "external file");
	open_fails("g", DISK_AUTO, false, "zstd");
	open_fails("h", DISK_AUTO, false, "encrypted");
}

/* Compressed data that is none: an I/O error where it is read, nothing else. */
static void bad_compressed(void **state)
{
	uint8_t data[65536];
	struct iovec iov = {data, sizeof(data)};
	size_t length;
	uint8_t *image;
	struct disk *disk;

	run("dd if=/dev/zero of=p bs=64k count=4 status=none; printf x | dd of=p conv=notrunc status=none; "
	    "printf x | dd of=p bs=64k seek=1 conv=notrunc status=none; qemu-img convert -c -f raw -O qcow2 p c");
	image = read_file("c", &length);
	memset(image + DATA, 0xff, 16);
	write_file("bad", image, length);
	free(image);
	disk = open_disk("bad", DISK_QCOW2, false);
	assert_int_equal(disk_readv(disk, 0, &iov, 1), -EIO);
	assert_int_equal(disk_readv(disk, 65536, &iov, 1), 0);
	assert_int_equal(data[0], 'x');
	/* A write to a part of it needs the rest; a write of all does not. */
	assert_int_equal(disk_writev(disk, 512, &(struct iovec){data, 512}, 1), -EIO);
	assert_int_equal(disk_writev(disk, 0, &iov, 1), 0);
	close_disk(disk);
	check_clean("bad");
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(patched),
		cmocka_unit_test(truncated),
		cmocka_unit_test(feature_by_name),
		cmocka_unit_test(chains),
		cmocka_unit_test(unsupported),
		cmocka_unit_test(bad_compressed),
	};

	if (argc > 1) /* one test by name */
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, enter, leave);
}
