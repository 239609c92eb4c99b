/* Multiboot 1 kernels (the Multiboot Specification, version 0.6.96): entered in 32-bit protected mode without paging, eax
 * a magic number and ebx the information structure. Either the header says where the file's bytes go (the "a.out kludge"
 * of a flat file), or they are a 32-bit ELF file's segments. Modules follow behind the kernel, the initrd first.
 */
#include "machine/boot_internal.h"

#include <elf.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"

#define SEARCHED 8192 /* bytes of the file that may hold the header, at multiples of 4 */
#define HEADER_MAGIC 0x1badb002u
#define LOADER_MAGIC 0x2badb002u
#define PAGE 4096u
#define SEGMENTS_MAX 64

enum { /* flags of the header (3.1.2) */
	HEADER_ADDRESSES = 1 << 16,
	/* Of those that must be understood: modules on pages and memory information are always there. A video mode is
	 * not, and the information says so: kernels that would like one go on without. */
	HEADER_MUST = 0xffff,
	HEADER_UNDERSTOOD = 7,
};

struct header {
	uint32_t magic, flags, checksum;
	uint32_t header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr;
};

enum { /* flags of the information (3.3) */
	INFO_MEMORY = 1 << 0,
	INFO_CMDLINE = 1 << 2,
	INFO_MODULES = 1 << 3,
	INFO_MEMORY_MAP = 1 << 6,
	INFO_LOADER_NAME = 1 << 9,
};

struct info {
	uint32_t flags;
	uint32_t mem_lower, mem_upper; /* KiB from 0, and from 1 MiB */
	uint32_t boot_device;
	uint32_t cmdline;
	uint32_t mods_count, mods_addr;
	uint32_t syms[4];
	uint32_t mmap_length, mmap_addr;
	uint32_t drives_length, drives_addr;
	uint32_t config_table, boot_loader_name, apm_table;
};

struct module {
	uint32_t start, end, string, reserved;
};

struct map_entry {
	uint32_t size; /* of what follows */
	uint64_t base, length;
	uint32_t type;
} __attribute__((packed));

struct info_page { /* at BOOT_INFO */
	struct info info;
	struct module modules[BOOT_MODULES_MAX + 1];
	struct map_entry map[BOOT_RANGES_MAX];
	char loader[16];
};
_Static_assert(sizeof(struct info_page) <= PAGE, "one page");

/* ---- the header ---- */

static bool find_header(const struct boot_file *k, struct header *h, uint64_t *offset)
{
	for (uint64_t at = 0; at + 12 <= min(k->size, (uint64_t)SEARCHED); at += 4) {
		*h = (struct header){0};
		memcpy(h, k->bytes + at, min(sizeof(*h), (size_t)(k->size - at)));
		if (h->magic == HEADER_MAGIC && h->magic + h->flags + h->checksum == 0) {
			*offset = at;
			return true;
		}
	}
	return false;
}

bool boot_is_multiboot(const struct boot_file *k)
{
	struct header h;
	uint64_t offset;

	if (!find_header(k, &h, &offset))
		return false;
	/* A 64-bit ELF file has nothing that this protocol could load, if its header does not say it. */
	return h.flags & HEADER_ADDRESSES || k->size <= EI_CLASS || memcmp(k->bytes, ELFMAG, SELFMAG) ||
	       k->bytes[EI_CLASS] == ELFCLASS32;
}

/* ---- the kernel ---- */

/* `bytes` of the file from `offset`, and zeroes up to `room`, at a physical address that is checked here. */
static int place(const struct boot_job *job, uint64_t gpa, uint64_t offset, uint64_t bytes, uint64_t room,
	uint64_t *end, struct error *err)
{
	const struct boot_file *k = &job->kernel;
	uint64_t top = boot_low_end(job->memory);

	if (offset > k->size || bytes > k->size - offset)
		return error_set(err, ENOEXEC,
			"kernel %s is truncated: 0x%llx bytes at 0x%llx are to be loaded, and it ends at 0x%llx; copy it "
			"again",
			k->path, (unsigned long long)bytes, (unsigned long long)offset, (unsigned long long)k->size);
	if (gpa < BOOT_KERNEL_MIN)
		return error_set(err, ENOEXEC, "kernel %s cannot be loaded: it is for physical address 0x%llx, below 1 MiB",
			k->path, (unsigned long long)gpa);
	room = max(room, bytes);
	if (gpa >= top || room > top - gpa)
		return error_set(err, ENOSPC,
			"kernel %s does not fit: it wants 0x%llx bytes at 0x%llx, and the guest's memory ends there at %llu "
			"MiB; give --memory more",
			k->path, (unsigned long long)room, (unsigned long long)gpa, (unsigned long long)top >> 20);
	*end = max(*end, gpa + room);
	int ret = boot_put(job, gpa, k->bytes + offset, bytes, "the kernel", err);
	return ret ? ret : boot_clear(job, gpa + bytes, room - bytes, "the kernel", err);
}

/* 3.1.3 */
static int place_flat(const struct boot_job *job, const struct header *h, uint64_t at, uint64_t *end, struct error *err)
{
	const char *path = job->kernel.path;
	uint64_t offset = at - (h->header_addr - h->load_addr), bytes, room;

	if (h->load_addr > h->header_addr || h->header_addr - h->load_addr > at)
		return error_set(err, ENOEXEC,
			"kernel %s is damaged: its Multiboot header is for 0x%x, its first byte for 0x%x (header_addr, "
			"load_addr)",
			path, h->header_addr, h->load_addr);
	if ((h->load_end_addr && h->load_end_addr < h->load_addr) ||
		(h->bss_end_addr && h->bss_end_addr < max(h->load_end_addr, h->load_addr)))
		return error_set(err, ENOEXEC,
			"kernel %s is damaged: it is to be loaded from 0x%x to 0x%x, with zeroes up to 0x%x (load_addr, "
			"load_end_addr, bss_end_addr)",
			path, h->load_addr, h->load_end_addr, h->bss_end_addr);
	bytes = h->load_end_addr ? h->load_end_addr - h->load_addr : job->kernel.size - offset;
	room = h->bss_end_addr ? h->bss_end_addr - h->load_addr : bytes;
	if (h->entry_addr < h->load_addr || h->entry_addr - h->load_addr >= bytes)
		return error_set(err, ENOEXEC, "kernel %s is damaged: its entry 0x%x is not in what is loaded", path,
			h->entry_addr);
	return place(job, h->load_addr, offset, bytes, room, end, err);
}

static int place_elf(const struct boot_job *job, uint64_t *entry, uint64_t *end, struct error *err)
{
	const struct boot_file *k = &job->kernel;
	Elf32_Ehdr e;
	Elf32_Phdr p;
	bool entered = false;

	if (k->size < sizeof(e))
		return error_set(err, ENOEXEC, "kernel %s is truncated: %llu bytes end within its ELF header; copy it again",
			k->path, (unsigned long long)k->size);
	memcpy(&e, k->bytes, sizeof(e));
	if (memcmp(e.e_ident, ELFMAG, SELFMAG) || e.e_ident[EI_CLASS] != ELFCLASS32 || e.e_machine != EM_386)
		return error_set(err, ENOEXEC,
			"kernel %s has a Multiboot header without addresses, and is no 32-bit ELF file for x86 either", k->path);
	if (e.e_phentsize != sizeof(p) || !e.e_phnum || e.e_phnum > SEGMENTS_MAX || e.e_phoff > k->size ||
		e.e_phnum * sizeof(p) > k->size - e.e_phoff)
		return error_set(err, ENOEXEC,
			"kernel %s is damaged: %u program headers of %u bytes at 0x%x (e_phnum, e_phentsize, e_phoff)",
			k->path, e.e_phnum, e.e_phentsize, e.e_phoff);
	for (unsigned i = 0; i < e.e_phnum; i++) {
		memcpy(&p, k->bytes + e.e_phoff + i * sizeof(p), sizeof(p));
		if (p.p_type != PT_LOAD || !p.p_memsz)
			continue;
		if (p.p_memsz < p.p_filesz)
			return error_set(err, ENOEXEC,
				"kernel %s is damaged: segment %u has 0x%x bytes in the file and 0x%x in memory", k->path, i,
				p.p_filesz, p.p_memsz);
		int ret = place(job, p.p_paddr, p.p_offset, p.p_filesz, p.p_memsz, end, err);
		if (ret)
			return ret;
		entered |= e.e_entry >= p.p_paddr && e.e_entry - p.p_paddr < p.p_filesz;
	}
	if (!entered)
		return error_set(err, ENOEXEC,
			"kernel %s is damaged: its entry 0x%x is a physical address in none of its segments", k->path,
			e.e_entry);
	*entry = e.e_entry;
	return 0;
}

/* ---- modules and information ---- */

/* One file behind *end, which moves; *string is where its command line goes. */
static int place_module(const struct boot_job *job, struct module *m, const char *path, const char *cmdline, int fd,
	uint64_t size, uint64_t *end, uint64_t *string, struct error *err)
{
	uint64_t length = strlen(cmdline) + 1, room = BOOT_CMDLINE + BOOT_CMDLINE_MAX - *string;
	int ret;

	*m = (struct module){.start = align_up(*end, PAGE), .string = *string};
	if (length > room)
		return error_set(err, E2BIG, "module %s: no room for its command line of %llu bytes; shorten it", path,
			(unsigned long long)length);
	ret = boot_read(job, path, fd, align_up(*end, PAGE), size, err);
	if (!ret)
		ret = boot_put(job, *string, cmdline, length, "a module's command line", err);
	m->end = m->start + size;
	*end = m->end;
	*string += length;
	return ret;
}

static int place_modules(
	const struct boot_job *job, struct info_page *page, uint64_t end, uint64_t string, struct error *err)
{
	const struct boot_config *config = job->config;
	unsigned n = 0;
	int ret = 0;

	if (job->initrd_fd >= 0)
		ret = place_module(job, &page->modules[n++], config->initrd, config->initrd, job->initrd_fd,
			job->initrd_size, &end, &string, err);
	for (unsigned i = 0; i < job->modules && !ret; i++)
		ret = place_module(job, &page->modules[n++], config->module[i].path, config->module[i].cmdline,
			job->module[i].fd, job->module[i].size, &end, &string, err);
	page->info.mods_count = n;
	page->info.mods_addr = BOOT_INFO + offsetof(struct info_page, modules);
	return ret;
}

/* As boot loaders pass it: the file's name, then what was given. *end is behind its zero. */
static int place_cmdline(const struct boot_job *job, uint64_t *end, struct error *err)
{
	const char *cmdline = job->config->cmdline ? job->config->cmdline : "", *path = job->kernel.path;
	uint64_t name = strlen(path), given = strlen(cmdline);
	int ret;

	if (name + given + 2 > BOOT_CMDLINE_MAX / 2)
		return error_set(err, E2BIG, "kernel %s: a command line of %llu bytes is too long; shorten --cmdline", path,
			(unsigned long long)given);
	ret = boot_put(job, BOOT_CMDLINE, path, name, "the command line", err);
	if (!ret)
		ret = boot_put(job, BOOT_CMDLINE + name, " ", 1, "the command line", err);
	if (!ret)
		ret = boot_put(job, BOOT_CMDLINE + name + 1, cmdline, given + 1, "the command line", err);
	*end = BOOT_CMDLINE + name + given + 2;
	return ret;
}

static void describe_memory(const struct boot_job *job, struct info_page *page)
{
	struct boot_range ranges[BOOT_RANGES_MAX];
	unsigned n = boot_memory_map(job->memory, ranges);

	page->info.mem_lower = BOOT_LOW_END >> 10;
	page->info.mem_upper = (boot_low_end(job->memory) - BOOT_KERNEL_MIN) >> 10;
	page->info.mmap_length = n * sizeof(page->map[0]);
	page->info.mmap_addr = BOOT_INFO + offsetof(struct info_page, map);
	for (unsigned i = 0; i < n; i++)
		page->map[i] = (struct map_entry){
			sizeof(page->map[i]) - 4, ranges[i].start, ranges[i].size, ranges[i].type};
}

int boot_load_multiboot(struct boot_entry *entry, const struct boot_job *job, struct error *err)
{
	struct info_page page = {
		.info = {.flags = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME,
			.cmdline = BOOT_CMDLINE,
			.boot_loader_name = BOOT_INFO + offsetof(struct info_page, loader)},
		.loader = "hostel-vmm"};
	struct header h;
	uint64_t at, end = 0, string = BOOT_CMDLINE;
	int ret;

	if (!find_header(&job->kernel, &h, &at))
		return error_set(err, ENOEXEC, "kernel %s has no Multiboot header", job->kernel.path);
	if (h.flags & HEADER_MUST & ~HEADER_UNDERSTOOD)
		return error_set(err, ENOEXEC, "kernel %s asks its boot loader for what is not known here (flags 0x%x)",
			job->kernel.path, h.flags);
	entry->rip = h.entry_addr;
	if (h.flags & HEADER_ADDRESSES)
		ret = place_flat(job, &h, at, &end, err);
	else
		ret = place_elf(job, &entry->rip, &end, err);
	if (!ret)
		ret = place_cmdline(job, &string, err);
	if (!ret)
		ret = place_modules(job, &page, end, string, err);
	if (!ret)
		ret = boot_place_gdt(entry, job, false, err);
	if (ret)
		return ret;
	describe_memory(job, &page);
	entry->rax = LOADER_MAGIC;
	entry->rbx = BOOT_INFO;
	return boot_put(job, BOOT_INFO, &page, sizeof(page), "the Multiboot information", err);
}
