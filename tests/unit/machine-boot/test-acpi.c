/* The ACPI tables: reachable from the root pointer, checksums right, and taken by the reference compiler, which
 * disassembles them and compiles what it read without an error or a warning.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* after the headers it wants */
#include <cmocka.h>

#include "../machine-pci/fake-board.h"
#include "base/util.h"
#include "machine/acpi_tables.h"
#include "machine/aml.h"
#include "machine/pci.h"

#define TABLES 6

struct fixture {
	struct board board;
	struct acpi_header *tables[TABLES]; /* XSDT, FADT, MADT, MCFG, DSDT, FACS */
};

static void *at(struct fixture *f, uint64_t gpa, uint64_t n)
{
	const void *bytes = memory_for_read(&f->board.memory, gpa, n);

	assert_non_null(bytes);
	return (void *)bytes;
}

static uint8_t sum(const void *bytes, size_t n)
{
	uint8_t sum = 0;

	for (size_t i = 0; i < n; i++)
		sum += ((const uint8_t *)bytes)[i];
	return sum;
}

static struct acpi_header *table_at(struct fixture *f, uint64_t gpa, const char *signature)
{
	struct acpi_header *t = at(f, gpa, sizeof(*t));

	assert_memory_equal(t->signature, signature, 4);
	assert_true(gpa >= 0xe0000 && gpa + t->length <= 0x100000);
	if (strcmp(signature, "FACS"))
		assert_int_equal(sum(at(f, gpa, t->length), t->length), 0);
	return t;
}

static void write_tables(struct fixture *f, unsigned cpus)
{
	struct error err = {0};
	uint64_t root, entries[3];

	assert_int_equal(acpi_write_tables(&f->board, cpus, &root, &err), 0);
	assert_int_equal(root, 0xe0000);

	struct acpi_rsdp *rsdp = at(f, root, sizeof(*rsdp));
	assert_memory_equal(rsdp->signature, "RSD PTR ", 8);
	assert_int_equal(sum(rsdp, 20), 0);
	assert_int_equal(sum(rsdp, 36), 0);
	f->tables[0] = table_at(f, rsdp->xsdt, "XSDT");
	assert_int_equal(f->tables[0]->length, 36 + sizeof(entries));
	memcpy(entries, f->tables[0] + 1, sizeof(entries));
	f->tables[1] = table_at(f, entries[0], "FACP");
	f->tables[2] = table_at(f, entries[1], "APIC");
	f->tables[3] = table_at(f, entries[2], "MCFG");

	struct acpi_fadt *fadt = (struct acpi_fadt *)f->tables[1];
	f->tables[4] = table_at(f, fadt->dsdt, "DSDT");
	f->tables[5] = table_at(f, fadt->facs, "FACS");
	assert_int_equal(fadt->x_dsdt, fadt->dsdt);
	assert_int_equal(fadt->facs % 64, 0);
}

static void test_walk(void **state)
{
	struct fixture *f = *state;
	struct error err = {0};
	uint64_t root;

	for (unsigned cpus = 1; cpus <= 64; cpus++) {
		unsigned found = 0;

		write_tables(f, cpus);
		const uint8_t *entry = (uint8_t *)f->tables[2] + sizeof(struct acpi_madt);
		const uint8_t *end = (uint8_t *)f->tables[2] + f->tables[2]->length;
		for (; entry < end; entry += entry[1]) {
			assert_true(entry[1] >= 2);
			found += entry[0] == 0 && entry[3] == entry[2];
		}
		assert_ptr_equal(entry, end);
		assert_int_equal(found, cpus);
	}
	assert_int_equal(acpi_write_tables(&f->board, 0, &root, &err), -EINVAL);
	assert_int_equal(acpi_write_tables(&f->board, 65, &root, &err), -EINVAL);
}

/* Runs a command in folder; its output must hold `wanted` and no more errors, warnings or remarks than none. */
static void run(const char *folder, const char *command, const char *wanted)
{
	char line[512], output[65536];

	snprintf(line, sizeof(line), "cd %s && %s 2>&1", folder, command);
	FILE *pipe = popen(line, "r");
	assert_non_null(pipe);
	size_t n = fread(output, 1, sizeof(output) - 1, pipe);
	output[n] = 0;
	int status = pclose(pipe);
	if (status || !strstr(output, wanted) || strstr(output, "Warning  ") || strstr(output, "Error  "))
		fail_msg("%s:\n%s", command, output);
}

static void judge(struct fixture *f, const unsigned *counts, unsigned n)
{
	char folder[] = "/tmp/test-acpi-XXXXXX", path[64], command[128];

	if (system("command -v iasl >/dev/null"))
		skip();
	assert_non_null(mkdtemp(folder));
	for (unsigned c = 0; c < n; c++) {
		write_tables(f, counts[c]);
		for (unsigned i = 0; i < TABLES; i++) {
			const char *name = f->tables[i]->signature;

			snprintf(path, sizeof(path), "%s/%.4s.dat", folder, name);
			FILE *file = fopen(path, "w");
			assert_non_null(file);
			fwrite(f->tables[i], 1, f->tables[i]->length, file);
			fclose(file);
			snprintf(command, sizeof(command), "iasl -d %.4s.dat", name);
			run(folder, command, "utput:");
			snprintf(command, sizeof(command), "iasl -oe -oa -p again %.4s.dsl", name);
			run(folder, command, "0 Errors, 0 Warnings, 0 Remarks");
			/* The compiler writes the very bytes that we did, but for its own name in the header. */
			if (i != 5) {
				snprintf(command, sizeof(command),
					"tail -c +37 %.4s.dat >a; tail -c +37 again.aml >b; cmp a b && echo same",
					name);
				run(folder, command, "same");
			}
		}
	}
	snprintf(command, sizeof(command), "rm -r %s", folder);
	assert_int_equal(system(command), 0);
}

static void test_iasl(void **state)
{
	static const unsigned counts[] = {1, 2, 64};

	judge(*state, counts, ARRAY_SIZE(counts));
}

/* With vCPUs and memory that come and go; the latter in all 64 slots. */
static void test_iasl_hotplug(void **state)
{
	static const unsigned counts[] = {2, 64};
	struct fixture *f = *state;
	struct error err = {0};
	unsigned enabled = 0, can_come = 0;

	memory_destroy(&f->board.memory);
	assert_int_equal(memory_create_with_slots(&f->board.memory, 16 << 20, 66ull << 30, &err), 0);
	assert_int_equal(f->board.memory.slots.count, 32); /* of 2 GiB: 65 of 1 GiB are too many */
	f->board.cpus_change = true;
	f->board.cpus_absent = 12;
	write_tables(f, 6);
	const uint8_t *entry = (uint8_t *)f->tables[2] + sizeof(struct acpi_madt);
	const uint8_t *end = (uint8_t *)f->tables[2] + f->tables[2]->length;
	for (; entry < end; entry += entry[1]) {
		enabled += entry[0] == 0 && entry[4] == 1;
		can_come += entry[0] == 0 && entry[4] == 2;
	}
	assert_int_equal(enabled, 4);
	assert_int_equal(can_come, 2);
	judge(f, counts, ARRAY_SIZE(counts));
	memory_destroy(&f->board.memory);
	assert_int_equal(memory_create_with_slots(&f->board.memory, 16 << 20, (64ull << 27) + (16 << 20), &err), 0);
	assert_int_equal(f->board.memory.slots.count, 64);
	judge(f, counts, ARRAY_SIZE(counts));
	f->board.cpus_change = false;
	f->board.cpus_absent = 0;
}

/* Package lengths of one, two and three bytes at their limits. */
static void test_package_lengths(void **state)
{
	static const struct {
		unsigned body;
		uint8_t encoded[3];
	} cases[] = {{4, {5}}, {62, {63}}, {63, {0x41, 4}}, {4093, {0x4f, 0xff}}, {4094, {0x81, 0x00, 0x01}}};

	for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
		struct aml aml = {0};
		size_t begin = aml_begin_scope(&aml, "\\_SB_");

		/* The scope's own name has five bytes; four in the first case by leaving one away. */
		while (aml.length - begin < cases[i].body)
			aml_append(&aml, "", 1);
		aml.length = begin + cases[i].body;
		aml_end(&aml, begin);
		assert_false(aml.failed);
		assert_memory_equal(aml.bytes + 1, cases[i].encoded, aml.length - begin - cases[i].body);
		aml_free(&aml);
	}
}

static int set_up(void **state)
{
	static struct fixture f;

	fake_board_create(&f.board, 1 << 20);
	*state = &f;
	return 0;
}

static int tear_down(void **state)
{
	struct fixture *f = *state;

	fake_board_destroy(&f->board);
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_walk), cmocka_unit_test(test_iasl), cmocka_unit_test(test_iasl_hotplug), cmocka_unit_test(test_package_lengths)};

	return cmocka_run_group_tests(tests, set_up, tear_down);
}
