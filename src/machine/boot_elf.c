/* ELF vmlinux by PVH (Xen, docs/misc/pvh.pandoc and xen/include/public/arch-x86/hvm/start_info.h): the file's segments
 * go to their physical addresses; a note says where the kernel wants to be entered in 32-bit mode without paging, with
 * hvm_start_info in ebx.
 */
#include "machine/boot_internal.h"

#include <elf.h>
#include <string.h>

#include "base/util.h"

#define NOTE_PHYS32_ENTRY 18 /* XEN_ELFNOTE_PHYS32_ENTRY */
#define SEGMENTS_MAX 64
/* 2 GiB: what Linux states as initrd_addr_max in its bzImages; an ELF file does not say. */
#define INITRD_LIMIT 0x80000000ull
/* Linux's COMMAND_LINE_SIZE on x86 less the terminating zero; an ELF file does not say this either. */
#define CMDLINE_LONGEST 2047

#define START_INFO_MAGIC 0x336ec578

struct hvm_start_info {
	uint32_t magic, version, flags, modules;
	uint64_t module_list, cmdline, rsdp;
	uint64_t memory_map; /* from here: version 1 */
	uint32_t memory_map_entries, reserved;
};

struct hvm_module {
	uint64_t address, size, cmdline, reserved;
};

struct hvm_memory_map_entry {
	uint64_t address, size;
	uint32_t type, reserved;
};

_Static_assert(sizeof(struct hvm_start_info) == 56, "hvm_start_info version 1");

/* Where things lie in the page at BOOT_INFO. */
struct start_page {
	struct hvm_start_info info;
	struct hvm_module module;
	struct hvm_memory_map_entry map[BOOT_RANGES_MAX];
};

struct elf {
	const struct boot_file *file;
	unsigned segments;
	Elf64_Phdr segment[SEGMENTS_MAX];
	uint64_t end; /* of the highest segment in guest memory */
};

static int parse_header(struct elf *elf, const struct boot_file *k, struct error *err)
{
	Elf64_Ehdr h;

	elf->file = k;
	if (k->size < sizeof(h))
		return error_set(err, ENOEXEC,
			"kernel %s is truncated: %llu bytes end within its ELF header; copy it again", k->path,
			(unsigned long long)k->size);
	memcpy(&h, k->bytes, sizeof(h));
	if (h.e_ident[EI_CLASS] != ELFCLASS64 || h.e_ident[EI_DATA] != ELFDATA2LSB || h.e_machine != EM_X86_64)
		return error_set(err, ENOEXEC, "kernel %s is an ELF file for machine %u, class %u; give one for x86-64",
			k->path, h.e_machine, h.e_ident[EI_CLASS]);
	if (h.e_type != ET_EXEC && h.e_type != ET_DYN)
		return error_set(err, ENOEXEC, "kernel %s is an ELF file of type %u, not an executable; give a vmlinux",
			k->path, h.e_type);
	if (h.e_phentsize != sizeof(Elf64_Phdr) || !h.e_phnum || h.e_phnum > SEGMENTS_MAX)
		return error_set(err, ENOEXEC,
			"kernel %s is damaged: %u program headers of %u bytes (e_phnum, e_phentsize); 1 to %d of %zu "
			"are possible",
			k->path, h.e_phnum, h.e_phentsize, SEGMENTS_MAX, sizeof(Elf64_Phdr));

	uint64_t size = h.e_phnum * sizeof(Elf64_Phdr);
	if (h.e_phoff > k->size || size > k->size - h.e_phoff)
		return error_set(err, ENOEXEC,
			"kernel %s is truncated: program headers at 0x%llx, and it ends at 0x%llx; copy it again",
			k->path, (unsigned long long)h.e_phoff, (unsigned long long)k->size);
	elf->segments = h.e_phnum;
	memcpy(elf->segment, k->bytes + h.e_phoff, size);
	return 0;
}

static int check_segment(const struct elf *elf, unsigned i, const struct boot_job *job, struct error *err)
{
	const Elf64_Phdr *p = &elf->segment[i];
	const char *path = elf->file->path;
	uint64_t end = boot_low_end(job->memory);

	if (p->p_offset > elf->file->size || p->p_filesz > elf->file->size - p->p_offset)
		return error_set(err, ENOEXEC,
			"kernel %s is truncated: segment %u has 0x%llx bytes at 0x%llx, and it ends at 0x%llx; copy it "
			"again",
			path, i, (unsigned long long)p->p_filesz, (unsigned long long)p->p_offset,
			(unsigned long long)elf->file->size);
	if (p->p_type != PT_LOAD)
		return 0;
	if (p->p_memsz < p->p_filesz)
		return error_set(err, ENOEXEC,
			"kernel %s is damaged: segment %u has 0x%llx bytes in the file and 0x%llx in memory", path, i,
			(unsigned long long)p->p_filesz, (unsigned long long)p->p_memsz);
	if (p->p_memsz && (p->p_paddr < BOOT_KERNEL_MIN || p->p_paddr >= MEMORY_HOLE))
		return error_set(err, ENOEXEC,
			"kernel %s cannot be loaded: segment %u is for physical address 0x%llx, not within 1 MiB to 3 "
			"GiB",
			path, i, (unsigned long long)p->p_paddr);
	if (p->p_memsz && (p->p_paddr >= end || p->p_memsz > end - p->p_paddr))
		return error_set(err, ENOSPC,
			"kernel %s does not fit: segment %u wants 0x%llx bytes at 0x%llx, and the guest's memory ends "
			"there at %llu MiB; "
			"give --memory more",
			path, i, (unsigned long long)p->p_memsz, (unsigned long long)p->p_paddr,
			(unsigned long long)end >> 20);
	for (unsigned j = 0; p->p_memsz && j < i; j++) {
		const Elf64_Phdr *q = &elf->segment[j];

		if (q->p_type == PT_LOAD && q->p_memsz && p->p_paddr < q->p_paddr + q->p_memsz &&
			q->p_paddr < p->p_paddr + p->p_memsz)
			return error_set(err, ENOEXEC, "kernel %s is damaged: segments %u and %u overlap at 0x%llx",
				path, j, i, (unsigned long long)max(p->p_paddr, q->p_paddr));
	}
	return 0;
}

static int place_segments(struct elf *elf, const struct boot_job *job, struct error *err)
{
	for (unsigned i = 0; i < elf->segments; i++) {
		int ret = check_segment(elf, i, job, err);

		if (ret)
			return ret;
	}
	for (unsigned i = 0; i < elf->segments; i++) {
		const Elf64_Phdr *p = &elf->segment[i];

		if (p->p_type != PT_LOAD || !p->p_memsz)
			continue;
		int ret = boot_put(job, p->p_paddr, elf->file->bytes + p->p_offset, p->p_filesz, "a segment", err);
		if (!ret)
			ret = boot_clear(job, p->p_paddr + p->p_filesz, p->p_memsz - p->p_filesz, "a segment", err);
		if (ret)
			return ret;
		elf->end = max(elf->end, p->p_paddr + p->p_memsz);
	}
	return 0;
}

/* The entry that one note segment names; false: none. The segment lies within the file. */
static bool find_entry_note(const struct elf *elf, const Elf64_Phdr *p, uint64_t *entry)
{
	const uint8_t *at = elf->file->bytes + p->p_offset;
	uint64_t left = p->p_filesz, align = p->p_align == 8 ? 8 : 4;
	Elf64_Nhdr note;

	while (left >= sizeof(note)) {
		memcpy(&note, at, sizeof(note));
		uint64_t desc = align_up(sizeof(note) + note.n_namesz, align);
		uint64_t next = align_up(desc + note.n_descsz, align);

		if (desc > left || note.n_descsz > left - desc)
			return false;
		if (note.n_type == NOTE_PHYS32_ENTRY && note.n_namesz == 4 && !memcmp(at + sizeof(note), "Xen", 4) &&
			(note.n_descsz == 4 || note.n_descsz == 8)) {
			*entry = 0;
			memcpy(entry, at + desc, note.n_descsz);
			return true;
		}
		if (next >= left)
			return false;
		at += next;
		left -= next;
	}
	return false;
}

static int find_entry(const struct elf *elf, uint64_t *entry, struct error *err)
{
	const char *path = elf->file->path;
	bool found = false;

	for (unsigned i = 0; i < elf->segments && !found; i++)
		if (elf->segment[i].p_type == PT_NOTE)
			found = find_entry_note(elf, &elf->segment[i], entry);
	if (!found)
		return error_set(err, ENOEXEC,
			"kernel %s has no PVH entry (note XEN_ELFNOTE_PHYS32_ENTRY); give a bzImage or build it with "
			"CONFIG_PVH",
			path);
	for (unsigned i = 0; i < elf->segments; i++) {
		const Elf64_Phdr *p = &elf->segment[i];

		if (p->p_type == PT_LOAD && *entry >= p->p_paddr && *entry - p->p_paddr < p->p_filesz)
			return 0;
	}
	return error_set(err, ENOEXEC, "kernel %s is damaged: its PVH entry 0x%llx is in none of its segments", path,
		(unsigned long long)*entry);
}

static int place_start_info(const struct boot_job *job, uint64_t initrd, struct error *err)
{
	struct boot_range ranges[BOOT_RANGES_MAX];
	unsigned n = boot_memory_map(job->memory, ranges);
	struct start_page page = {
		.info =
			{
				.magic = START_INFO_MAGIC,
				.version = 1,
				.modules = initrd ? 1 : 0,
				.module_list = initrd ? BOOT_INFO + offsetof(struct start_page, module) : 0,
				.cmdline = BOOT_CMDLINE,
				.rsdp = job->config->rsdp,
				.memory_map = BOOT_INFO + offsetof(struct start_page, map),
				.memory_map_entries = n,
			},
		.module = {.address = initrd, .size = initrd ? job->initrd_size : 0},
	};

	for (unsigned i = 0; i < n; i++)
		page.map[i] = (struct hvm_memory_map_entry){ranges[i].start, ranges[i].size, ranges[i].type};
	return boot_put(job, BOOT_INFO, &page, sizeof(page), "the start information", err);
}

int boot_load_elf(struct boot_entry *entry, const struct boot_job *job, struct error *err)
{
	struct elf elf = {0};
	uint64_t initrd;
	int ret;

	ret = parse_header(&elf, &job->kernel, err);
	if (!ret)
		ret = place_segments(&elf, job, err);
	if (!ret)
		ret = find_entry(&elf, &entry->rip, err);
	if (!ret)
		ret = boot_place_initrd(job, elf.end, INITRD_LIMIT, &initrd, err);
	if (!ret)
		ret = boot_place_cmdline(job, CMDLINE_LONGEST, err);
	if (!ret)
		ret = boot_place_gdt(entry, job, false, err);
	if (!ret)
		ret = place_start_info(job, initrd, err);
	if (ret)
		return ret;
	entry->rbx = BOOT_INFO;
	return 0;
}
