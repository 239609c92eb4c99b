/* Multiboot kernels: what is loaded where, what the kernel is told, and every way in which a file can be wrong. And SMBIOS,
 * the other thing that is put into guest memory at each start. */
#include <elf.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* after the headers it wants */
#include <cmocka.h>

#include "base/util.h"
#include "machine/boot_internal.h"
#include "machine/smbios.h"

#define MEMORY (16ull << 20)
#define MAGIC 0x1badb002u
#define LOAD 0x200000u

struct fixture {
	struct guest_memory memory;
	struct boot_config config;
	struct error err;
};

static int set_up(void **state)
{
	struct fixture *f = *state = calloc(1, sizeof(*f));

	f->config.cmdline = "console=ttyS0 x";
	return memory_create(&f->memory, MEMORY, &f->err);
}

static int tear_down(void **state)
{
	struct fixture *f = *state;

	memory_destroy(&f->memory);
	free(f);
	return 0;
}

/* A flat kernel of 4096 bytes, its header at byte 64. */
static void make_flat(uint32_t *file)
{
	for (unsigned i = 0; i < 1024; i++)
		file[i] = 0xa0a0a000 + i;
	uint32_t header[] = {MAGIC, 0x10003, -(MAGIC + 0x10003), LOAD + 64, LOAD, LOAD + 4000, LOAD + 8192, LOAD + 128};
	memcpy(file + 16, header, sizeof(header));
}

static int load(struct fixture *f, const void *bytes, uint64_t n, struct boot_entry *entry)
{
	struct boot_job job = {.memory = &f->memory, .config = &f->config, .kernel = {"K", bytes, n}, .initrd_fd = -1};

	return boot_load_bytes(entry, &job, &f->err);
}

static uint32_t word(struct fixture *f, uint64_t gpa)
{
	uint32_t value;

	assert_true(memory_read(&f->memory, gpa, &value, 4));
	return value;
}

static void test_flat(void **state)
{
	struct fixture *f = *state;
	struct boot_entry entry;
	uint32_t file[1024];

	make_flat(file);
	memset(memory_for_write(&f->memory, LOAD, 65536), 0xff, 65536);
	assert_int_equal(load(f, file, sizeof(file), &entry), 0);
	assert_false(entry.long_mode);
	assert_int_equal(entry.rip, LOAD + 128);
	assert_int_equal(entry.rax, 0x2badb002);
	assert_memory_equal(memory_for_read(&f->memory, LOAD, 4000), file, 4000);
	assert_int_equal(word(f, LOAD + 4000), 0); /* load_end: the rest is .bss */
	assert_int_equal(word(f, LOAD + 8188), 0);
	assert_int_equal(word(f, LOAD + 8192), 0xffffffff);
	/* the information */
	assert_int_equal(word(f, entry.rbx) & 0x4d, 0x4d);
	assert_int_equal(word(f, entry.rbx + 4), 639);
	assert_int_equal(word(f, entry.rbx + 8), (MEMORY >> 10) - 1024);
	assert_string_equal(memory_for_read(&f->memory, word(f, entry.rbx + 16), 100), "K console=ttyS0 x");
	assert_int_equal(word(f, entry.rbx + 20), 0);
	/* the memory map: its first entry is the RAM from 0 */
	uint64_t map = word(f, entry.rbx + 48);
	assert_int_equal(word(f, map), 20);
	assert_int_equal(word(f, map + 4), 0);
	assert_int_equal(word(f, map + 12), 639 << 10);
	assert_int_equal(word(f, map + 20), 1);
}

static void test_elf(void **state)
{
	struct fixture *f = *state;
	struct boot_entry entry;
	uint8_t file[4096] = {0};
	Elf32_Ehdr e = {.e_ident = {0x7f, 'E', 'L', 'F', ELFCLASS32, ELFDATA2LSB, EV_CURRENT},
		.e_type = ET_EXEC,
		.e_machine = EM_386,
		.e_entry = LOAD + 16,
		.e_phoff = sizeof(e),
		.e_phentsize = sizeof(Elf32_Phdr),
		.e_phnum = 1};
	Elf32_Phdr p = {
		.p_type = PT_LOAD, .p_offset = 512, .p_vaddr = 0xc0000000, .p_paddr = LOAD, .p_filesz = 100, .p_memsz = 200};
	uint32_t header[] = {MAGIC, 0, -MAGIC};

	memcpy(file, &e, sizeof(e));
	memcpy(file + sizeof(e), &p, sizeof(p));
	memcpy(file + 256, header, sizeof(header));
	memset(file + 512, 7, 100);
	assert_int_equal(load(f, file, sizeof(file), &entry), 0);
	assert_int_equal(entry.rip, LOAD + 16);
	assert_int_equal(word(f, LOAD + 96), 0x07070707);
	assert_int_equal(word(f, LOAD + 100), 0);

	static const struct {
		size_t offset;
		uint32_t value;
		const char *wanted;
	} bad[] = {
		{offsetof(Elf32_Ehdr, e_entry), LOAD + 100, "in none of its segments"},
		{offsetof(Elf32_Ehdr, e_phoff), 4090, "is damaged: 1 program headers"},
		{sizeof(e) + offsetof(Elf32_Phdr, p_offset), 4000, "is truncated"},
		{sizeof(e) + offsetof(Elf32_Phdr, p_filesz), 201, "in memory"},
		{sizeof(e) + offsetof(Elf32_Phdr, p_paddr), 0x9000, "below 1 MiB"},
		{sizeof(e) + offsetof(Elf32_Phdr, p_paddr), MEMORY - 100, "does not fit"},
		{sizeof(e) + offsetof(Elf32_Phdr, p_memsz), 0xffffffff, "does not fit"},
		{sizeof(e) + offsetof(Elf32_Phdr, p_type), PT_NOTE, "in none of its segments"},
		{260, 0x20, "asks its boot loader for what is not known here"},
	};
	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		uint8_t copy[sizeof(file)];

		memcpy(copy, file, sizeof(file));
		memcpy(copy + bad[i].offset, &bad[i].value, 4);
		header[1] = i + 1 == ARRAY_SIZE(bad) ? 0x20 : 0;
		header[2] = -(header[0] + header[1]);
		memcpy(copy + 256, header, sizeof(header));
		assert_true(load(f, copy, sizeof(copy), &entry) < 0);
		if (!strstr(f->err.text, bad[i].wanted))
			fail_msg("%u: %s", i, f->err.text);
	}
}

static void test_bad_flat(void **state)
{
	static const struct {
		unsigned field;
		uint32_t value;
		const char *wanted;
	} bad[] = {
		{3, LOAD - 4, "header_addr"},	      /* the header before the first byte */
		{3, LOAD + 68, "header_addr"},	      /* the first byte before the file's */
		{4, 0x10000, "header_addr"},	      /* likewise, far */
		{5, LOAD - 1, "load_end_addr"},
		{5, LOAD + 5000, "is truncated"},
		{6, LOAD + 3999, "bss_end_addr"},
		{6, 0xfffffff0, "does not fit"},
		{7, LOAD - 1, "its entry"},
		{7, LOAD + 4000, "its entry"},
	};
	struct fixture *f = *state;
	struct boot_entry entry;
	uint32_t file[1024];

	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		make_flat(file);
		file[16 + bad[i].field] = bad[i].value;
		assert_true(load(f, file, sizeof(file), &entry) < 0);
		if (!strstr(f->err.text, bad[i].wanted))
			fail_msg("%u: %s", i, f->err.text);
	}
	/* a checksum that is wrong: no Multiboot kernel, and nothing else either */
	make_flat(file);
	file[18]++;
	assert_true(load(f, file, sizeof(file), &entry) < 0);
	assert_non_null(strstr(f->err.text, "is not a bzImage or ELF file"));
	/* a file that ends within its header */
	make_flat(file);
	assert_true(load(f, file, 64 + 14, &entry) < 0);
}

static void test_modules(void **state)
{
	struct fixture *f = *state;
	char path[] = "/tmp/hostel-boot-XXXXXX", kernel[] = "/tmp/hostel-boot-XXXXXX";
	int fd = mkstemp(path), kernel_fd = mkstemp(kernel);
	struct boot_module modules[2] = {{path, "one a=1"}, {path, "two"}};
	struct boot_entry entry;
	uint32_t file[1024];

	make_flat(file);
	assert_int_equal(write(kernel_fd, file, sizeof(file)), sizeof(file));
	assert_int_equal(write(fd, "contents", 8), 8);
	f->config.kernel = kernel;
	f->config.initrd = path;
	f->config.modules = 2;
	f->config.module = modules;
	if (boot_load(&entry, &f->memory, &f->config, &f->err))
		fail_msg("%s", f->err.text);
	assert_int_equal(word(f, entry.rbx + 20), 3);
	uint64_t list = word(f, entry.rbx + 24);
	uint32_t last = LOAD + 8192;
	for (unsigned i = 0; i < 3; i++) {
		static const char *const strings[] = {NULL, "one a=1", "two"};
		uint32_t begin = word(f, list + 16 * i), end = word(f, list + 16 * i + 4);

		assert_true(begin % 4096 == 0 && begin >= last && end == begin + 8);
		assert_memory_equal(memory_for_read(&f->memory, begin, 8), "contents", 8);
		assert_string_equal(memory_for_read(&f->memory, word(f, list + 16 * i + 8), 64), i ? strings[i] : path);
		last = end;
	}
	/* one that does not fit */
	assert_int_equal(truncate(path, MEMORY - (1 << 20)), 0);
	assert_true(boot_load(&entry, &f->memory, &f->config, &f->err) < 0);
	assert_non_null(strstr(f->err.text, "give --memory more"));
	/* one that is not there */
	unlink(path);
	f->config.initrd = NULL;
	assert_true(boot_load(&entry, &f->memory, &f->config, &f->err) < 0);
	assert_non_null(strstr(f->err.text, "module /tmp/hostel-boot-"));
	unlink(kernel);
	close(fd);
	close(kernel_fd);
}

/* ---- SMBIOS ---- */

static uint8_t sum(const uint8_t *bytes, size_t n)
{
	uint8_t s = 0;

	while (n--)
		s += *bytes++;
	return s;
}

static const char *string_of(const uint8_t *structure, unsigned number)
{
	const char *at = (const char *)structure + structure[1];

	while (--number)
		at += strlen(at) + 1;
	return at;
}

static void test_smbios(void **state)
{
	struct fixture *f = *state;
	struct smbios_identity identity = {.name = "web-1",
		.uuid = {0x12, 0x3e, 0x45, 0x67, 0xe8, 0x9b, 0x42, 0xd3, 0xa4, 0x56, 0x42, 0x66, 0x14, 0x17, 0x40, 0x00}};
	const uint8_t *area = memory_for_read(&f->memory, 0xf0000, 0x10000), *at, *end;
	unsigned seen = 0, count = 0;

	assert_int_equal(smbios_write_tables(&f->memory, &identity, &f->err), 0);
	assert_memory_equal(area, "_SM3_", 5);
	assert_int_equal(sum(area, area[6]), 0);
	assert_memory_equal(area + 0x20, "_SM_", 4);
	assert_int_equal(sum(area + 0x20, area[0x25]), 0);
	assert_memory_equal(area + 0x30, "_DMI_", 5);
	assert_int_equal(sum(area + 0x30, 15), 0);
	at = area + word(f, 0xf0010) - 0xf0000;
	end = at + word(f, 0xf000c);
	while (at < end) {
		const uint8_t *s = at;

		count++;
		if (s[0] == 1) {
			static const uint8_t uuid[] = {0x67, 0x45, 0x3e, 0x12, 0x9b, 0xe8, 0xd3, 0x42, 0xa4, 0x56};

			assert_memory_equal(s + 8, uuid, sizeof(uuid));
			assert_string_equal(string_of(s, s[7]), "123e4567-e89b-42d3-a456-426614174000");
		} else if (s[0] == 3) {
			assert_string_equal(string_of(s, s[8]), "web-1");
		} else if (s[0] == 11) {
			assert_string_equal(string_of(s, 1), "hostel.name=web-1");
		}
		seen |= s[0] < 32 ? 1u << s[0] : 0;
		for (at += s[1]; at[0] || at[1]; at++)
			;
		at += 2;
		if (s[0] == 127)
			break;
	}
	assert_true(at == end);
	assert_int_equal(seen & 0x3080b, 0x3080b);
	assert_int_equal(count, area[0x20 + 28] | area[0x20 + 29] << 8);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
		TEST(test_flat),
		TEST(test_elf),
		TEST(test_bad_flat),
		TEST(test_modules),
		TEST(test_smbios),
	};

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
