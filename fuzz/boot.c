/* Fuzzer of the kernel loaders: any bytes as a bzImage or ELF file. The memory is small and is kept from run to run. */
#include <stdint.h>
#include <stdlib.h>

#include "machine/boot_internal.h"

#define MEMORY_SIZE (32ull << 20)

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

static void must(bool holds)
{
	if (!holds)
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
	static struct guest_memory memory;
	const struct boot_config config = {.cmdline = "console=ttyS0", .rsdp = 0xe0000};
	const struct boot_job job = {
		.memory = &memory, .config = &config, .kernel = {"fuzz", bytes, n}, .initrd_fd = -1};
	struct boot_entry entry;
	struct error err = {0};

	if (!memory.ranges && memory_create(&memory, MEMORY_SIZE, &err))
		abort();
	if (boot_load_bytes(&entry, &job, &err)) {
		must(err.code && err.text[0]);
		return 0;
	}
	/* What was taken starts within memory, above everything that the loader itself puts there. */
	must(entry.rip >= BOOT_KERNEL_MIN && entry.rip < MEMORY_SIZE);
	must(entry.long_mode ? entry.rsi == BOOT_INFO && entry.cr3 == BOOT_PAGE_TABLES : entry.rbx == BOOT_INFO);
	return 0;
}
