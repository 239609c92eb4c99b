/* The host's file or block device that holds an image: opened and locked, whole transfers, holes. */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "disk/vector.h"

struct image_file {
	int fd;
	char *path;
	bool read_only;
	dev_t device; /* device and inode together tell one file from another, whatever their names */
	ino_t inode;
	/* What the file system turned out not to offer, so that it is not asked again. */
	atomic_bool no_punch, no_zero_range;
	atomic_int sync_failed; /* -errno of the first failed sync */
};

/* Opens and locks. On failure nothing is left open; image_file_close may be called all the same. */
int image_file_open(struct image_file *file, const char *path, bool read_only, struct error *err);
/* Takes the lock: one writer, or any number of readers. The bytes locked are those of QEMU, which makes its programs
 * and ours keep out of each other's images. */
int image_file_lock(struct image_file *file, struct error *err);
void image_file_close(struct image_file *file);
/* Bytes now. */
int image_file_length(const struct image_file *file, uint64_t *length, struct error *err);

/* All of it or -errno. A read beyond the end of the file gives zeroes. */
int image_file_readv(struct image_file *file, uint64_t offset, struct vector v);
int image_file_writev(struct image_file *file, uint64_t offset, struct vector v);
int image_file_read(struct image_file *file, uint64_t offset, void *data, size_t length);
int image_file_write(struct image_file *file, uint64_t offset, const void *data, size_t length);
/* The range reads as zeroes afterwards; with unmap its space is freed where the file system can. */
int image_file_zero(struct image_file *file, uint64_t offset, uint64_t length, bool unmap);
/* Frees the space where the file system can; else nothing happens. */
int image_file_discard(struct image_file *file, uint64_t offset, uint64_t length);
/* Once it failed, it fails for good: the kernel tells of lost pages once, and a second try would succeed without them.
 */
int image_file_sync(struct image_file *file);
