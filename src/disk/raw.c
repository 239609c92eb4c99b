/* A raw image: the disk's bytes in a regular file or a block device. */
#include "disk/backend.h"

#include <stdlib.h>

#include "base/cleanup.h"

static int raw_close(struct disk *disk)
{
	return disk->read_only ? 0 : image_file_sync(&disk->file);
}

static int raw_read(struct disk *disk, uint64_t offset, struct vector v)
{
	return image_file_readv(&disk->file, offset, v);
}

static int raw_write(struct disk *disk, uint64_t offset, struct vector v)
{
	return image_file_writev(&disk->file, offset, v);
}

static int raw_flush(struct disk *disk)
{
	return image_file_sync(&disk->file);
}

static int raw_discard(struct disk *disk, uint64_t offset, uint64_t length)
{
	return image_file_discard(&disk->file, offset, length);
}

static int raw_write_zeroes(struct disk *disk, uint64_t offset, uint64_t length, bool unmap)
{
	return image_file_zero(&disk->file, offset, length, unmap);
}

static const struct disk_model raw_model = {
	.name = "raw",
	.close = raw_close,
	.read = raw_read,
	.write = raw_write,
	.flush = raw_flush,
	.discard = raw_discard,
	.write_zeroes = raw_write_zeroes,
};

int raw_open(struct disk **out, struct image_file *file, struct error *err)
{
	scope_free struct disk *disk = calloc(1, sizeof(*disk));
	uint64_t length = 0;
	int result =
		disk ? image_file_length(file, &length, err) : error_set(err, ENOMEM, "disk %s: no memory", file->path);

	if (result == 0 && !length)
		result = error_set(err, EINVAL, "disk %s is empty (0 bytes); give it a size (truncate -s 10G %s)",
			file->path, file->path);
	if (result < 0) {
		image_file_close(file);
		return result;
	}
	disk->model = &raw_model;
	disk->file = *file;
	disk->read_only = file->read_only;
	/* A length that is no multiple of a sector is rounded up: the missing bytes read as zeroes, and the first write
	 * to the last sector makes the file longer. */
	disk->size = align_up(length, DISK_SECTOR);
	*out = take_ptr(disk);
	return 0;
}
