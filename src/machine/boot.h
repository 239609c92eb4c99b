/* Loading a kernel into guest memory. The loader says how the first vCPU must start; src/vmm turns that into engine
 * state (this folder knows no engine). */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "machine/memory.h"

#define BOOT_MODULES_MAX 16

/* Opened once, where a reset of the guest must find them again without opening anything. */
struct boot_files {
	int kernel, initrd; /* -1: none */
	uint64_t kernel_size, initrd_size;
	unsigned modules; /* of a Multiboot kernel */
	struct boot_opened {
		int fd;
		uint64_t size;
	} module[BOOT_MODULES_MAX];
};

struct boot_module { /* of a Multiboot kernel */
	char *path;
	const char *cmdline;
};

struct boot_config {
	const char *kernel;  /* bzImage, ELF or Multiboot */
	const char *initrd;  /* or NULL */
	const char *cmdline; /* or NULL */
	unsigned modules;
	const struct boot_module *module;
	uint64_t rsdp;	     /* guest address of the ACPI root pointer */
	const struct boot_files *files; /* what these names were opened as; NULL: opened for this one load */
};

struct boot_entry {
	bool long_mode;	 /* true: Linux 64-bit boot protocol (Documentation/x86/boot.rst); false: PVH or Multiboot, 32-bit flat, paging off */
	uint64_t rip;
	uint64_t rsi;	 /* long mode: boot_params */
	uint64_t rbx;	 /* PVH: hvm_start_info; Multiboot: its information */
	uint64_t rax;	 /* Multiboot: its magic number */
	uint64_t cr3;	 /* long mode: identity map of the first 4 GiB */
	uint64_t gdt;	 /* guest address; code selector 0x10, data 0x18, flat */
	uint16_t gdt_limit;
};

/* Opens the kernel, the initrd and the modules that config names, of at most memory's size; closed by boot_close(), also when it has
 * failed. */
int boot_open(struct boot_files *files, const struct guest_memory *memory, const struct boot_config *config, struct error *err);
void boot_close(struct boot_files *files);
int boot_load(struct boot_entry *entry, struct guest_memory *memory, const struct boot_config *config, struct error *err);
