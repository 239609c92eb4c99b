/* What disk.c and the formats share; nothing outside this folder includes it. */
#pragma once

#include "disk/disk.h"
#include "disk/file.h"
#include "disk/vector.h"

/* A format. Its functions get ranges that are whole sectors inside the disk, and no change of a read-only disk. */
struct disk_model {
	const char *name;
	int (*close)(struct disk *disk); /* writes back and frees all but the file */
	int (*read)(struct disk *disk, uint64_t offset, struct vector v);
	int (*write)(struct disk *disk, uint64_t offset, struct vector v);
	int (*flush)(struct disk *disk);
	int (*discard)(struct disk *disk, uint64_t offset, uint64_t length);
	int (*write_zeroes)(struct disk *disk, uint64_t offset, uint64_t length, bool unmap);
};

struct disk {
	const struct disk_model *model;
	struct image_file file;
	uint64_t size; /* bytes, rounded up to whole sectors */
	bool read_only;
	/* The format was guessed from the content: the guest must not make its raw disk look like another format, whose
	 * backing file would then be a file of the host that the guest names. */
	bool guard_magic;
};

/* The images above one that is being opened as a backing file. */
struct disk_chain {
	const struct disk_chain *above; /* NULL: none */
	const struct image_file *file;
	unsigned depth;
};

#define DISK_SECTOR 512
#define DISK_CHAIN_MAX 32
#define QCOW2_MAGIC 0x514649fb

int disk_open_chain(struct disk **disk, const char *path, const struct disk_options *options,
	const struct disk_chain *above, struct error *err);

/* Both take over the opened, locked file, also if they fail. */
int raw_open(struct disk **disk, struct image_file *file, struct error *err);
int qcow2_open(struct disk **disk, struct image_file *file, const struct disk_chain *above, struct error *err);
