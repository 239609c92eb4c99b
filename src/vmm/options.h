/* hostel-vmm's command line: one table of options, parsed into a typed configuration. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"
#include "base/token_bucket.h"
#include "disk/disk.h"
#include "machine/boot.h"

struct engine;
struct cpu_model;

#define VMM_CPUS_MAX 64
#define VMM_DISKS_MAX 16
#define VMM_NETS_MAX 8

enum vmm_action { VMM_RUN, VMM_HELP, VMM_VERSION, VMM_PROBE };
enum vmm_serial { VMM_SERIAL_STDIO, VMM_SERIAL_NONE, VMM_SERIAL_FILE, VMM_SERIAL_SOCKET };

struct vmm_disk {
	char *path;
	struct disk_options options;
	struct rate_limits limits;
	char serial[21]; /* "": hostel-disk-N */
};

struct vmm_net {
	char *spec; /* as net_open() wants it */
	struct rate_limits limits; /* of each direction */
	bool has_mac;
	uint8_t mac[6];
};

/* Strings that are not freed by vmm_config_free() point into argv. */
struct vmm_config {
	enum vmm_action action;
	bool probe_json;	     /* for VMM_PROBE */
	const struct engine *engine; /* NULL: the first that can run here */
	const struct cpu_model *cpu;
	unsigned cpus, cpus_max;
	bool cpus_change; /* max= was given, be it the same number */
	uint64_t memory, memory_max; /* bytes */
	const char *kernel, *initrd, *cmdline;
	unsigned disks;
	struct vmm_disk disk[VMM_DISKS_MAX];
	unsigned nets;
	struct vmm_net net[VMM_NETS_MAX];
	bool has_serial; /* it was said */
	enum vmm_serial serial;
	const char *serial_path; /* of file= and socket= */
	bool exit_on_reset;
	const char *control; /* path, or NULL */
	char **kept;	     /* values that came from a file */
	unsigned kept_count;
	bool jail;
	uint32_t jail_first, jail_last; /* user and group ids to choose from */
	/* options_devices.c */
	bool has_balloon;
	uint64_t balloon; /* bytes given up from the start */
	char *vsock_path; /* NULL: none; freed by vmm_config_free() */
	uint32_t vsock_cid;
	bool has_hvc;
	enum vmm_serial hvc; /* virtio console */
	const char *hvc_path;
	const char *name;
	bool has_uuid;
	uint8_t uuid[16];
	bool debug_exit;
	unsigned modules; /* of a Multiboot kernel; their paths are freed by vmm_config_free() */
	struct boot_module module[BOOT_MODULES_MAX];
};

/* Fills config, defaults included. An error names the option, the value found and the remedy; the configuration must be
 * freed either way; its code is EINVAL or ERANGE when the usage is wrong. --help and --version win over whatever stands
 * behind them. */
int vmm_config_parse(struct vmm_config *config, int argc, char *const argv[], struct error *err);
void vmm_config_free(struct vmm_config *config);
/* Applies one option; value is malloc'ed or NULL, and the configuration's from now on (also after an error). */
int vmm_config_apply(struct vmm_config *config, const char *name, char *value, struct error *err);

/* The text of --help, made from the same table. */
void vmm_help(FILE *to);
