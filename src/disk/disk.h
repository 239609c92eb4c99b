/* A disk image behind one table of functions: raw and qcow2. Calls block; they are safe from several threads. Offsets
 * and lengths are bytes and multiples of 512; what lies beyond the end is refused with -EINVAL. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/error.h"

struct disk;

enum disk_format { DISK_AUTO, DISK_RAW, DISK_QCOW2 };

struct disk_options {
	enum disk_format format; /* DISK_AUTO: qcow2 by its magic, else raw */
	bool read_only;
};

/* Opens, checks fully and locks (OFD lock: one writer or many readers over all programs) before anything is written. */
int disk_open(struct disk **disk, const char *path, const struct disk_options *options, struct error *err);
/* Writes back everything; the error of a failed write-back is returned, the disk is gone all the same. */
int disk_close(struct disk *disk, struct error *err);

uint64_t disk_size(const struct disk *disk); /* bytes */
bool disk_read_only(const struct disk *disk);
const char *disk_format_name(const struct disk *disk);

/* 0 or -errno. A read of what was never written gives zeroes. A write may still be in a cache when it returns. */
int disk_readv(struct disk *disk, uint64_t offset, const struct iovec *iov, int count);
int disk_writev(struct disk *disk, uint64_t offset, const struct iovec *iov, int count);
/* Everything written before is on stable storage when it returns 0. */
int disk_flush(struct disk *disk);
/* The range reads as zeroes or as before (discard), as zeroes (write_zeroes; space is freed if unmap). */
int disk_discard(struct disk *disk, uint64_t offset, uint64_t length);
int disk_write_zeroes(struct disk *disk, uint64_t offset, uint64_t length, bool unmap);
