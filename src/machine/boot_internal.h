/* What the loaders share: a file's bytes, and where the structures for the kernel go in guest memory. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "machine/boot.h"

/* Below 640 KiB, all of it ordinary RAM that the kernel takes back when it has read it. Kernels go to 1 MiB and above,
 * so nothing here can meet them. */
#define BOOT_GDT 0x6000ull
#define BOOT_INFO 0x7000ull	   /* boot_params, or hvm_start_info with its tables; one page */
#define BOOT_PAGE_TABLES 0x9000ull /* six pages */
#define BOOT_CMDLINE 0x20000ull
#define BOOT_CMDLINE_MAX 0x10000ull
#define BOOT_LOW_END 0x9fc00ull
#define BOOT_KERNEL_MIN 0x100000ull

/* Types of the e820 map, which PVH uses too */
enum { BOOT_RAM = 1, BOOT_RESERVED = 2 };

struct boot_range {
	uint64_t start, size;
	uint32_t type;
};

#define BOOT_RANGES_MAX 6

/* A kernel file, read into memory. */
struct boot_file {
	const char *path;
	const uint8_t *bytes;
	uint64_t size;
};

struct boot_job {
	struct guest_memory *memory;
	const struct boot_config *config;
	struct boot_file kernel;
	int initrd_fd; /* -1: none */
	uint64_t initrd_size;
	unsigned modules;
	const struct boot_opened *module;
};

/* The kernel has been told apart by its magic and is loaded by one of these. */
int boot_load_bzimage(struct boot_entry *entry, const struct boot_job *job, struct error *err);
int boot_load_elf(struct boot_entry *entry, const struct boot_job *job, struct error *err);
int boot_load_multiboot(struct boot_entry *entry, const struct boot_job *job, struct error *err);
bool boot_is_multiboot(const struct boot_file *kernel);
/* Tells which it is, and loads; job is filled by boot_load, or by a test. */
int boot_load_bytes(struct boot_entry *entry, const struct boot_job *job, struct error *err);

unsigned boot_memory_map(const struct guest_memory *memory, struct boot_range ranges[BOOT_RANGES_MAX]);
/* End of the RAM below the hole. */
uint64_t boot_low_end(const struct guest_memory *memory);
/* Reads the initrd to the highest page-aligned address that leaves it below `limit`, and not below `floor`; *gpa is 0
 * when there is none. */
int boot_place_initrd(const struct boot_job *job, uint64_t floor, uint64_t limit, uint64_t *gpa, struct error *err);
/* Reads a file of `size` bytes to gpa, which ends below the hole. */
int boot_read(const struct boot_job *job, const char *path, int fd, uint64_t gpa, uint64_t size, struct error *err);
/* Copies the command line to BOOT_CMDLINE; longest counts without the terminating zero. */
int boot_place_cmdline(const struct boot_job *job, uint64_t longest, struct error *err);
/* A flat GDT at BOOT_GDT: null, null, code (64-bit or 32-bit), data. */
int boot_place_gdt(struct boot_entry *entry, const struct boot_job *job, bool long_mode, struct error *err);
/* "kernel PATH: WHAT": copies, and says so when the guest's memory is too small. */
int boot_put(
	const struct boot_job *job, uint64_t gpa, const void *bytes, uint64_t n, const char *what, struct error *err);
/* Zeroes that a kernel expects after its file's bytes. */
int boot_clear(const struct boot_job *job, uint64_t gpa, uint64_t n, const char *what, struct error *err);
