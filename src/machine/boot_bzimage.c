/* bzImage by the 64-bit boot protocol (Linux, Documentation/x86/boot.rst and zero-page.rst, protocol 2.12 and later):
 * the decompressor is entered in long mode with an identity map of the first 4 GiB and the zero page in rsi.
 */
#include "machine/boot_internal.h"

#include <string.h>

#include "base/util.h"

#define PROTOCOL_MIN 0x020c /* the first with xloadflags */
#define SECTOR 512
#define ENTRY_64 0x200
#define LOADER_UNKNOWN 0xff

#define LOADED_HIGH 0x01
#define KEEP_SEGMENTS 0x40
#define XLF_KERNEL_64 0x01

/* The setup header, at the same offsets in the file and in the zero page */
enum {
	HDR_START = 0x1f1,
	HDR_SETUP_SECTS = 0x1f1,
	HDR_SYSSIZE = 0x1f4, /* in units of 16 bytes */
	HDR_VID_MODE = 0x1fa,
	HDR_JUMP_LENGTH = 0x201, /* the header ends this far behind 0x202 */
	HDR_VERSION = 0x206,
	HDR_TYPE_OF_LOADER = 0x210,
	HDR_LOADFLAGS = 0x211,
	HDR_RAMDISK_IMAGE = 0x218,
	HDR_RAMDISK_SIZE = 0x21c,
	HDR_CMD_LINE_PTR = 0x228,
	HDR_INITRD_ADDR_MAX = 0x22c,
	HDR_XLOADFLAGS = 0x236,
	HDR_CMDLINE_SIZE = 0x238,
	HDR_SETUP_DATA = 0x250,
	HDR_PREF_ADDRESS = 0x258,
	HDR_INIT_SIZE = 0x260,
	HDR_LEAST_END = 0x264, /* of a header that has all the fields above */
	HDR_MOST_END = 0x290,  /* what comes then in the zero page is the loader's */
};

/* The rest of the zero page */
enum {
	ZERO_PAGE_RSDP = 0x070,
	ZERO_PAGE_E820_COUNT = 0x1e8,
	ZERO_PAGE_E820 = 0x2d0, /* entries of 20 bytes */
	ZERO_PAGE_SIZE = 4096,
};

/* What the file's header says, checked. */
struct setup {
	const uint8_t *header; /* the file from its start */
	uint64_t header_end;
	const uint8_t *code; /* the protected-mode part */
	uint64_t code_size;
	uint64_t load, room; /* where it wants to be, and how much it needs there */
	uint64_t initrd_limit, cmdline_max;
};

static uint64_t get(const uint8_t *at, unsigned bytes)
{
	uint64_t value = 0;

	memcpy(&value, at, bytes);
	return value;
}

static int parse(struct setup *s, const struct boot_job *job, struct error *err)
{
	const struct boot_file *k = &job->kernel;
	const uint8_t *h = k->bytes;

	if (k->size < HDR_LEAST_END)
		return error_set(err, ENOEXEC,
			"kernel %s is truncated: %llu bytes end within its setup header; copy it again", k->path,
			(unsigned long long)k->size);
	if (get(h + HDR_VERSION, 2) < PROTOCOL_MIN)
		return error_set(err, ENOEXEC,
			"kernel %s has boot protocol %u.%02u; 2.12 (Linux 3.8) or later is needed", k->path,
			h[HDR_VERSION + 1], h[HDR_VERSION]);
	if (!(h[HDR_LOADFLAGS] & LOADED_HIGH) || !(get(h + HDR_XLOADFLAGS, 2) & XLF_KERNEL_64))
		return error_set(err, ENOEXEC,
			"kernel %s has no 64-bit entry (xloadflags 0x%04llx); give one for x86-64", k->path,
			(unsigned long long)get(h + HDR_XLOADFLAGS, 2));

	s->header = h;
	s->header_end = 0x202 + h[HDR_JUMP_LENGTH];
	if (s->header_end < HDR_LEAST_END || s->header_end > HDR_MOST_END)
		return error_set(err, ENOEXEC,
			"kernel %s is damaged: its setup header ends at 0x%llx, not within 0x%x to 0x%x", k->path,
			(unsigned long long)s->header_end, HDR_LEAST_END, HDR_MOST_END);

	/* Zero sectors mean four, for history's sake. */
	uint64_t code_start = ((h[HDR_SETUP_SECTS] ? h[HDR_SETUP_SECTS] : 4) + 1) * SECTOR;
	s->code_size = get(h + HDR_SYSSIZE, 4) * 16;
	if (s->header_end > k->size || code_start > k->size || s->code_size > k->size - code_start)
		return error_set(err, ENOEXEC, "kernel %s is truncated: %llu bytes of %llu are there; copy it again",
			k->path, (unsigned long long)k->size, (unsigned long long)(code_start + s->code_size));
	if (s->code_size <= ENTRY_64)
		return error_set(err, ENOEXEC, "kernel %s is damaged: syssize gives it %llu bytes of code", k->path,
			(unsigned long long)s->code_size);
	s->code = h + code_start;

	s->load = get(h + HDR_PREF_ADDRESS, 8);
	s->room = max(get(h + HDR_INIT_SIZE, 4), s->code_size);
	s->initrd_limit = get(h + HDR_INITRD_ADDR_MAX, 4) + 1;
	s->cmdline_max = get(h + HDR_CMDLINE_SIZE, 4);
	return 0;
}

/* A relocatable kernel may be put higher than it prefers, but would move itself up from anywhere lower: so the
 * preferred address decides whether there is room, and there is no reason for another. */
static int place_code(const struct setup *s, const struct boot_job *job, struct error *err)
{
	uint64_t end = boot_low_end(job->memory);

	if (s->load < BOOT_KERNEL_MIN || s->load >= MEMORY_HOLE)
		return error_set(err, ENOEXEC, "kernel %s is damaged: it wants to be loaded at 0x%llx (pref_address)",
			job->kernel.path, (unsigned long long)s->load);
	if (s->load >= end || s->room > end - s->load)
		return error_set(err, ENOSPC,
			"kernel %s needs %llu MiB from 0x%llx (pref_address, init_size), and the guest's memory ends "
			"there at %llu MiB; "
			"give --memory more",
			job->kernel.path, (unsigned long long)(s->room + (1 << 20) - 1) >> 20,
			(unsigned long long)s->load, (unsigned long long)end >> 20);
	return boot_put(job, s->load, s->code, s->code_size, "the kernel", err);
}

/* Two-megabyte pages: one PML4 entry, four PDPT entries, four directories (SDM volume 3, section 4.5). */
static int place_page_tables(struct boot_entry *entry, const struct boot_job *job, struct error *err)
{
	enum { PRESENT_WRITABLE = 3, LARGE = 0x80, ENTRIES = 512, DIRECTORIES = 4 };
	uint64_t tables[2 + DIRECTORIES][ENTRIES] = {0};

	tables[0][0] = (BOOT_PAGE_TABLES + 0x1000) | PRESENT_WRITABLE;
	for (uint64_t d = 0; d < DIRECTORIES; d++) {
		tables[1][d] = (BOOT_PAGE_TABLES + 0x2000 + d * 0x1000) | PRESENT_WRITABLE;
		for (uint64_t i = 0; i < ENTRIES; i++)
			tables[2 + d][i] = (d << 30 | i << 21) | LARGE | PRESENT_WRITABLE;
	}
	entry->cr3 = BOOT_PAGE_TABLES;
	return boot_put(job, BOOT_PAGE_TABLES, tables, sizeof(tables), "the page tables", err);
}

static int place_zero_page(const struct setup *s, const struct boot_job *job, uint64_t initrd, struct error *err)
{
	uint8_t page[ZERO_PAGE_SIZE] = {0};
	struct boot_range ranges[BOOT_RANGES_MAX];
	unsigned n = boot_memory_map(job->memory, ranges);

	memcpy(page + HDR_START, s->header + HDR_START, s->header_end - HDR_START);
	memcpy(page + HDR_VID_MODE, &(uint16_t){0xffff}, 2); /* "normal" */
	page[HDR_TYPE_OF_LOADER] = LOADER_UNKNOWN;
	page[HDR_LOADFLAGS] &= ~KEEP_SEGMENTS;
	memcpy(page + HDR_RAMDISK_IMAGE, &(uint32_t){initrd}, 4);
	memcpy(page + HDR_RAMDISK_SIZE, &(uint32_t){initrd ? job->initrd_size : 0}, 4);
	memcpy(page + HDR_CMD_LINE_PTR, &(uint32_t){BOOT_CMDLINE}, 4);
	memset(page + HDR_SETUP_DATA, 0, 8); /* a list of ours, and we have none */
	memcpy(page + ZERO_PAGE_RSDP, &job->config->rsdp, 8);
	page[ZERO_PAGE_E820_COUNT] = n;
	for (unsigned i = 0; i < n; i++) {
		uint8_t *entry = page + ZERO_PAGE_E820 + 20 * i;

		memcpy(entry, &ranges[i].start, 8);
		memcpy(entry + 8, &ranges[i].size, 8);
		memcpy(entry + 16, &ranges[i].type, 4);
	}
	return boot_put(job, BOOT_INFO, page, sizeof(page), "the boot parameters", err);
}

int boot_load_bzimage(struct boot_entry *entry, const struct boot_job *job, struct error *err)
{
	struct setup setup = {0};
	uint64_t initrd;
	int ret;

	ret = parse(&setup, job, err);
	if (!ret)
		ret = place_code(&setup, job, err);
	if (!ret)
		ret = boot_place_initrd(job, setup.load + setup.room, setup.initrd_limit, &initrd, err);
	if (!ret)
		ret = boot_place_cmdline(job, setup.cmdline_max, err);
	if (!ret)
		ret = boot_place_gdt(entry, job, true, err);
	if (!ret)
		ret = place_page_tables(entry, job, err);
	if (!ret)
		ret = place_zero_page(&setup, job, initrd, err);
	if (ret)
		return ret;
	entry->long_mode = true;
	entry->rip = setup.load + ENTRY_64;
	entry->rsi = BOOT_INFO;
	return 0;
}
