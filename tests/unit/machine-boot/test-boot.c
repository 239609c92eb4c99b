/* The kernel loaders: what they leave in memory for kernels made here, what they say of broken ones, and, for the files
 * named in HOSTEL_TEST_KERNELS (separated by colons), that real ones are taken.
 */
#include <elf.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
/* after the headers it wants */
#include <cmocka.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "machine/boot_internal.h"

#define MIB (1ull << 20)
#define RSDP 0xe0000

/* ---- kernels ---- */

enum { BZ_CODE = 2560, BZ_SIZE = BZ_CODE + 0x1000 };

static void put(uint8_t *at, uint64_t value, unsigned bytes)
{
	memcpy(at, &value, bytes);
}

static uint64_t get(const uint8_t *at, unsigned bytes)
{
	uint64_t value = 0;

	memcpy(&value, at, bytes);
	return value;
}

static void make_bzimage(uint8_t *k)
{
	memset(k, 0, BZ_CODE);
	for (unsigned i = BZ_CODE; i < BZ_SIZE; i++)
		k[i] = i * 7;
	k[0x1f1] = 4;
	put(k + 0x1f4, 0x100, 4);
	put(k + 0x1fe, 0xaa55, 2);
	put(k + 0x200, 0x6aeb, 2);
	memcpy(k + 0x202, "HdrS", 4);
	put(k + 0x206, 0x20f, 2);
	k[0x211] = 0x41;
	put(k + 0x22c, 0x7fffffff, 4);
	put(k + 0x230, 0x200000, 4);
	k[0x234] = 1;
	put(k + 0x236, 0x7f, 2);
	put(k + 0x238, 2047, 4);
	put(k + 0x250, 0x1234, 8);
	put(k + 0x258, 0x1000000, 8);
	put(k + 0x260, 0x2000000, 4);
}

struct elf_file {
	Elf64_Ehdr header;
	Elf64_Phdr segment[3];
	struct {
		Elf64_Nhdr other;
		char other_name[8], other_value[8];
		Elf64_Nhdr note;
		char name[4];
		uint64_t entry;
	} __attribute__((packed)) notes;
	uint8_t code[0x300];
};

static void make_elf(struct elf_file *k)
{
	*k = (struct elf_file){
		.header = {.e_ident = ELFMAG,
			.e_type = ET_EXEC,
			.e_machine = EM_X86_64,
			.e_version = 1,
			.e_phoff = offsetof(struct elf_file, segment),
			.e_phentsize = sizeof(Elf64_Phdr),
			.e_phnum = 3},
		.segment =
			{
				{.p_type = PT_LOAD,
					.p_offset = offsetof(struct elf_file, code),
					.p_paddr = 0x1000000,
					.p_filesz = 0x200,
					.p_memsz = 0x200},
				{.p_type = PT_LOAD,
					.p_offset = offsetof(struct elf_file, code) + 0x200,
					.p_paddr = 0x1200000,
					.p_filesz = 0x100,
					.p_memsz = 0x5000},
				{.p_type = PT_NOTE,
					.p_offset = offsetof(struct elf_file, notes),
					.p_filesz = sizeof(k->notes),
					.p_align = 4},
			},
		.notes =
			{
				.other = {6, 5, 6},
				.other_name = "Linux",
				.other_value = "abcd",
				.note = {4, 8, 18},
				.name = "Xen",
				.entry = 0x1000040,
			},
	};
	k->header.e_ident[EI_CLASS] = ELFCLASS64;
	k->header.e_ident[EI_DATA] = ELFDATA2LSB;
	for (unsigned i = 0; i < sizeof(k->code); i++)
		k->code[i] = i * 5 + 1;
}

/* ---- loading them ---- */

struct fixture {
	struct guest_memory memory;
	struct boot_config config;
	struct boot_entry entry;
	struct error err;
	char folder[64], kernel[96], initrd[96];
};

static int set_up(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	assert_int_equal(memory_create(&f->memory, 64 * MIB, &f->err), 0);
	strcpy(f->folder, "/tmp/test-boot-XXXXXX");
	assert_non_null(mkdtemp(f->folder));
	snprintf(f->kernel, sizeof(f->kernel), "%s/kernel", f->folder);
	snprintf(f->initrd, sizeof(f->initrd), "%s/initrd", f->folder);
	f->config = (struct boot_config){.kernel = f->kernel, .cmdline = "console=ttyS0", .rsdp = RSDP};
	*state = f;
	return 0;
}

static int tear_down(void **state)
{
	struct fixture *f = *state;

	unlink(f->kernel);
	unlink(f->initrd);
	rmdir(f->folder);
	memory_destroy(&f->memory);
	free(f);
	return 0;
}

static void write_file(const char *path, const void *bytes, size_t n)
{
	FILE *file = fopen(path, "w");

	assert_non_null(file);
	assert_int_equal(fwrite(bytes, 1, n, file), n);
	fclose(file);
}

static int load_bytes(struct fixture *f, const void *bytes, size_t n)
{
	/* A copy of exactly this length, so that a sanitizer sees any read behind it. */
	scope_free uint8_t *copy = malloc(n ? n : 1);
	struct boot_job job = {.memory = &f->memory, .config = &f->config, .kernel = {"K", copy, n}, .initrd_fd = -1};

	memcpy(copy, bytes, n);
	f->err = (struct error){0};
	return boot_load_bytes(&f->entry, &job, &f->err);
}

static void assert_says(struct fixture *f, const char *part)
{
	if (!strstr(f->err.text, part) || strchr(f->err.text, '\n'))
		fail_msg("the message is \"%s\", without \"%s\"", f->err.text, part);
}

static const uint8_t *at(struct fixture *f, uint64_t gpa, uint64_t n)
{
	const uint8_t *bytes = memory_for_read(&f->memory, gpa, n);

	assert_non_null(bytes);
	return bytes;
}

static void check_initrd(struct fixture *f, uint64_t gpa, uint64_t size, uint64_t floor)
{
	assert_int_equal(size, 100000);
	assert_int_equal(gpa % 4096, 0);
	assert_true(gpa >= floor);
	assert_true(gpa + size <= 64 * MIB && gpa + size > 64 * MIB - 4096); /* as high as there is memory */
	for (unsigned i = 0; i < size; i++)
		assert_int_equal(at(f, gpa, size)[i], i & 0xff);
}

static void make_initrd(struct fixture *f)
{
	uint8_t bytes[100000];

	for (unsigned i = 0; i < sizeof(bytes); i++)
		bytes[i] = i;
	write_file(f->initrd, bytes, sizeof(bytes));
	f->config.initrd = f->initrd;
}

static void test_bzimage(void **state)
{
	struct fixture *f = *state;
	uint8_t k[BZ_SIZE + 10] = {0}; /* a signature may follow */

	make_bzimage(k);
	write_file(f->kernel, k, sizeof(k));
	make_initrd(f);
	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), 0);
	assert_true(f->entry.long_mode);
	assert_int_equal(f->entry.rip, 0x1000200);
	assert_memory_equal(at(f, 0x1000000, 0x1000), k + BZ_CODE, 0x1000);

	const uint8_t *zero = at(f, f->entry.rsi, 4096);
	assert_memory_equal(zero + 0x1f1, k + 0x1f1, 9);
	assert_int_equal(get(zero + 0x1fe, 2), 0xaa55);
	assert_memory_equal(zero + 0x202, "HdrS", 4);
	assert_int_equal(zero[0x1ef], 0); /* the sentinel */
	assert_int_equal(zero[0x210], 0xff);
	assert_int_equal(zero[0x211], 1);
	assert_int_equal(get(zero + 0x250, 8), 0);
	assert_int_equal(get(zero + 0x70, 8), RSDP);
	assert_string_equal(at(f, get(zero + 0x228, 4), 20), "console=ttyS0");
	check_initrd(f, get(zero + 0x218, 4), get(zero + 0x21c, 4), 0x3000000);

	/* The memory map: 64 MiB of RAM less what is reserved below 1 MiB, ascending, without overlaps. */
	uint64_t ram = 0, end = 0;
	assert_true(zero[0x1e8] >= 3 && zero[0x1e8] <= 128);
	for (unsigned i = 0; i < zero[0x1e8]; i++) {
		const uint8_t *e = zero + 0x2d0 + 20 * i;

		assert_true(get(e, 8) >= end);
		end = get(e, 8) + get(e + 8, 8);
		if (get(e + 16, 4) == BOOT_RAM)
			ram += get(e + 8, 8);
	}
	assert_int_equal(ram, 63 * MIB + 0x9fc00);

	/* Every large page of the first 4 GiB maps to itself. */
	uint64_t pdpt = get(at(f, f->entry.cr3, 8), 8) & ~0xfffull;
	for (uint64_t a = 0; a < 1ull << 32; a += 2 * MIB) {
		uint64_t directory = get(at(f, pdpt + 8 * (a >> 30), 8), 8);

		assert_int_equal(directory & 0x83, 3);
		assert_int_equal(get(at(f, (directory & ~0xfffull) + 8 * (a >> 21 & 511), 8), 8), a | 0x83);
	}
	assert_int_equal(f->entry.gdt_limit, 31);
	assert_int_equal(get(at(f, f->entry.gdt + 0x10, 8), 8), 0x00af9b000000ffff);
	assert_int_equal(get(at(f, f->entry.gdt + 0x18, 8), 8), 0x00cf93000000ffff);
}

static void test_elf(void **state)
{
	struct fixture *f = *state;
	struct elf_file k;

	make_elf(&k);
	write_file(f->kernel, &k, sizeof(k));
	make_initrd(f);
	memset(memory_for_write(&f->memory, 0x1200000, 0x6000), 0xee, 0x6000); /* as after a reboot */
	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), 0);
	assert_false(f->entry.long_mode);
	assert_int_equal(f->entry.rip, 0x1000040);
	assert_memory_equal(at(f, 0x1000000, 0x200), k.code, 0x200);
	assert_memory_equal(at(f, 0x1200000, 0x100), k.code + 0x200, 0x100);
	for (unsigned i = 0x100; i < 0x5000; i++)
		assert_int_equal(at(f, 0x1200000, 0x6000)[i], 0);
	assert_int_equal(at(f, 0x1200000, 0x6000)[0x5000], 0xee);

	const uint8_t *info = at(f, f->entry.rbx, 56);
	assert_int_equal(get(info, 4), 0x336ec578);
	assert_int_equal(get(info + 4, 4), 1);
	assert_int_equal(get(info + 12, 4), 1);
	assert_string_equal(at(f, get(info + 24, 8), 20), "console=ttyS0");
	assert_int_equal(get(info + 32, 8), RSDP);
	const uint8_t *module = at(f, get(info + 16, 8), 32);
	check_initrd(f, get(module, 8), get(module + 8, 8), 0x1205000);
	const uint8_t *map = at(f, get(info + 40, 8), 24 * get(info + 48, 4));
	assert_int_equal(get(map + 16, 4), BOOT_RAM);
	assert_int_equal(get(map + 8, 8), 0x9fc00);
	assert_int_equal(get(at(f, f->entry.gdt + 0x10, 8), 8), 0x00cf9b000000ffff);

	f->config.initrd = NULL;
	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), 0);
	assert_int_equal(get(info + 12, 4), 0);
}

/* ---- what is refused, and how ---- */

struct damage {
	unsigned offset, bytes;
	uint64_t value;
	const char *says;
};

static void test_damaged_bzimage(void **state)
{
	static const struct damage damages[] = {
		{0x202, 1, 'X', "kernel K is not a bzImage or ELF file"},
		{0x206, 2, 0x20b, "boot protocol 2.11"},
		{0x211, 1, 0, "no 64-bit entry"},
		{0x236, 2, 0x7e, "no 64-bit entry (xloadflags 0x007e)"},
		{0x201, 1, 0x61, "header ends at 0x263"},
		{0x201, 1, 0x8f, "header ends at 0x291"},
		{0x1f1, 1, 5, "truncated: 6656 bytes of 7168"},
		{0x1f1, 1, 255, "truncated"},
		{0x1f4, 4, 0x101, "truncated: 6656 bytes of 6672"},
		{0x1f4, 4, 0xffffffff, "truncated"},
		{0x1f4, 4, 0x20, "syssize"},
		{0x258, 8, 0x1000, "0x1000 (pref_address)"},
		{0x258, 8, ~0ull, "pref_address"},
		{0x258, 8, 0x4000000, "give --memory more"},
		{0x260, 4, 0x3000001, "needs 49 MiB from 0x1000000 (pref_address, init_size)"},
		{0x260, 4, 0xffffffff, "give --memory more"},
		{0x238, 4, 5, "at most 5 bytes, not 13; shorten --cmdline"},
	};
	struct fixture *f = *state;
	uint8_t k[BZ_SIZE];

	for (unsigned i = 0; i < ARRAY_SIZE(damages); i++) {
		make_bzimage(k);
		put(k + damages[i].offset, damages[i].value, damages[i].bytes);
		assert_int_not_equal(load_bytes(f, k, sizeof(k)), 0);
		assert_says(f, damages[i].says);
	}
	make_bzimage(k);
	for (unsigned n = 0; n < sizeof(k); n++) {
		assert_int_not_equal(load_bytes(f, k, n), 0);
		assert_says(f, "truncated");
	}
	assert_int_equal(load_bytes(f, k, sizeof(k)), 0);
}

#define PHDR(i, field) offsetof(struct elf_file, segment) + (i) * sizeof(Elf64_Phdr) + offsetof(Elf64_Phdr, field)

static void test_damaged_elf(void **state)
{
	static const struct damage damages[] = {
		{EI_CLASS, 1, ELFCLASS32, "for machine 62, class 1"},
		{offsetof(Elf64_Ehdr, e_machine), 2, EM_AARCH64, "for machine 183"},
		{offsetof(Elf64_Ehdr, e_type), 2, ET_REL, "type 1, not an executable"},
		{offsetof(Elf64_Ehdr, e_phnum), 2, 0, "0 program headers"},
		{offsetof(Elf64_Ehdr, e_phnum), 2, 0xffff, "65535 program headers"},
		{offsetof(Elf64_Ehdr, e_phentsize), 2, 32, "headers of 32 bytes"},
		{offsetof(Elf64_Ehdr, e_phoff), 8, ~0ull, "truncated"},
		{PHDR(0, p_offset), 8, ~0ull, "segment 0 has 0x200 bytes at 0xffffffffffffffff"},
		{PHDR(0, p_filesz), 8, 1 << 20, "truncated"},
		{PHDR(0, p_memsz), 8, 0x1ff, "0x200 bytes in the file and 0x1ff in memory"},
		{PHDR(1, p_memsz), 8, ~0ull, "segment 1 wants 0xffffffffffffffff bytes"},
		{PHDR(1, p_paddr), 8, 0x4000000, "give --memory more"},
		{PHDR(1, p_paddr), 8, 0x7000, "physical address 0x7000"},
		{PHDR(1, p_paddr), 8, ~0xfffull, "physical address 0xfffffffffffff000"},
		{PHDR(1, p_paddr), 8, 0x10001ff, "segments 0 and 1 overlap at 0x10001ff"},
		{PHDR(2, p_offset), 8, 0x10000, "truncated"},
		{PHDR(2, p_type), 4, PT_NULL, "no PVH entry"},
		{PHDR(2, p_filesz), 8, sizeof(((struct elf_file *)0)->notes) - 1, "no PVH entry"},
		{offsetof(struct elf_file, notes), 4, 0xffffffff, "no PVH entry"},
		{offsetof(struct elf_file, notes) + 4, 4, 0xfffffff0, "no PVH entry"},
		{offsetof(struct elf_file, notes.entry), 8, 0x1000200, "entry 0x1000200 is in none"},
		{offsetof(struct elf_file, notes.entry), 8, 1ull << 32 | 0x1000040, "is in none"},
	};
	struct fixture *f = *state;
	struct elf_file k;

	for (unsigned i = 0; i < ARRAY_SIZE(damages); i++) {
		make_elf(&k);
		put((uint8_t *)&k + damages[i].offset, damages[i].value, damages[i].bytes);
		assert_int_not_equal(load_bytes(f, &k, sizeof(k)), 0);
		assert_says(f, damages[i].says);
	}
	make_elf(&k);
	for (unsigned n = 0; n < offsetof(struct elf_file, code) + 0x300; n++)
		assert_int_not_equal(load_bytes(f, &k, n), 0);
	assert_int_equal(load_bytes(f, &k, sizeof(k)), 0);
}

/* Random bytes in the headers: any answer will do, the sanitizers judge. */
static void test_random_damage(void **state)
{
	struct fixture *f = *state;
	union {
		uint8_t bytes[BZ_SIZE];
		struct elf_file elf;
	} k;

	srandom(1);
	for (unsigned i = 0; i < 20000; i++) {
		bool elf = i & 1;
		unsigned span = elf ? offsetof(struct elf_file, code) - 4 : 0x264 - 0x1f1, base = elf ? 4 : 0x1f1;

		if (elf)
			make_elf(&k.elf);
		else
			make_bzimage(k.bytes);
		for (unsigned n = random() % 4; n < 4; n++)
			k.bytes[base + random() % span] = random() % 3 ? random() : -(random() & 1);
		load_bytes(f, k.bytes, elf ? sizeof(k.elf) : sizeof(k.bytes));
	}
}

static void test_files(void **state)
{
	struct fixture *f = *state;
	uint8_t k[BZ_SIZE];

	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), -ENOENT);
	assert_says(f, "/kernel cannot be opened; check the path: No such file or directory");
	f->config.kernel = f->folder;
	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), -EINVAL);
	assert_says(f, "is not a regular file");
	f->config.kernel = f->kernel;
	assert_int_equal(mkfifo(f->kernel, 0600), 0);
	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), -EINVAL);
	assert_says(f, "is not a regular file");
	unlink(f->kernel);
	write_file(f->kernel, "", 0);
	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), -EINVAL);
	assert_says(f, "is empty");

	make_bzimage(k);
	write_file(f->kernel, k, sizeof(k));
	f->config.initrd = f->initrd;
	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), -ENOENT);
	assert_says(f, "initrd /tmp/");
	make_initrd(f);
	assert_int_equal(truncate(f->initrd, 17 * MIB), 0);
	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), -ENOSPC);
	assert_says(f, "17 MiB are needed above the kernel's end at 48 MiB, and memory for it ends at 64 MiB; give "
		       "--memory more");
	assert_int_equal(truncate(f->initrd, 65 * MIB), 0);
	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), -E2BIG);
	assert_says(f, "of 65 MiB is larger than the guest's memory of 64 MiB; give --memory more");
	assert_int_equal(truncate(f->initrd, 16 * MIB), 0);
	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), 0);

	/* The kernel's own limit for the initrd counts too. */
	put(k + 0x22c, 0x33fffff, 4);
	write_file(f->kernel, k, sizeof(k));
	assert_int_equal(boot_load(&f->entry, &f->memory, &f->config, &f->err), -ENOSPC);
	assert_says(f, "memory for it ends at 52 MiB");
}

/* Above the hole: RAM from 4 GiB on is in the map, and nothing is placed there. */
static void test_much_memory(void **state)
{
	struct fixture *f = *state;
	struct boot_range ranges[BOOT_RANGES_MAX];
	uint64_t ram = 0;

	memory_destroy(&f->memory);
	assert_int_equal(memory_create(&f->memory, 5120 * MIB, &f->err), 0);
	unsigned n = boot_memory_map(&f->memory, ranges);
	for (unsigned i = 0; i < n; i++)
		ram += ranges[i].type == BOOT_RAM ? ranges[i].size : 0;
	assert_int_equal(ranges[n - 1].start, MEMORY_HIGH);
	assert_int_equal(ranges[n - 1].size, 2048 * MIB);
	assert_int_equal(ram, 5119 * MIB + 0x9fc00);
}

static void test_real_kernels(void **state)
{
	struct fixture *f = *state;
	const char *list = getenv("HOSTEL_TEST_KERNELS");

	if (!list)
		skip();
	memory_destroy(&f->memory);
	assert_int_equal(memory_create(&f->memory, 256 * MIB, &f->err), 0);
	scope_free char *paths = strdup(list);
	for (char *path = strtok(paths, ":"); path; path = strtok(NULL, ":")) {
		f->config.kernel = path;
		if (boot_load(&f->entry, &f->memory, &f->config, &f->err))
			fail_msg("%s", f->err.text);
		assert_true(f->entry.rip >= MIB);
	}
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {TEST(test_bzimage), TEST(test_elf), TEST(test_damaged_bzimage),
		TEST(test_damaged_elf), TEST(test_random_damage), TEST(test_files), TEST(test_much_memory),
		TEST(test_real_kernels)};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
