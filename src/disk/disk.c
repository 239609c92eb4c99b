#include "disk/disk.h"

#include <endian.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "disk/backend.h"

/* ---- open and close ---- */

static int check_chain(const struct image_file *file, const struct disk_chain *above, struct error *err)
{
	if (above && above->depth > DISK_CHAIN_MAX)
		return error_set(err, ELOOP,
			"disk %s: more than %d backing files; flatten the chain (qemu-img convert)", file->path,
			DISK_CHAIN_MAX);
	for (const struct disk_chain *c = above; c; c = c->above) {
		if (c->file->device == file->device && c->file->inode == file->inode)
			return error_set(err, ELOOP,
				"disk %s is its own backing file (a cyclic chain); correct it with qemu-img rebase -u",
				file->path);
	}
	return 0;
}

int disk_open_chain(struct disk **disk, const char *path, const struct disk_options *options,
	const struct disk_chain *above, struct error *err)
{
	struct image_file file;
	enum disk_format format = options->format;
	uint32_t magic = 0;
	int result = image_file_open(&file, path, options->read_only, err);

	if (result < 0)
		return result;
	/* Before the lock: in a cycle it would be our own that is in the way. */
	result = check_chain(&file, above, err);
	if (result == 0)
		result = image_file_lock(&file, err);
	if (result == 0 && format == DISK_AUTO) {
		result = image_file_read(&file, 0, &magic, sizeof(magic));
		if (result < 0)
			error_set(err, -result, "disk %s: cannot be read", path);
		format = be32toh(magic) == QCOW2_MAGIC ? DISK_QCOW2 : DISK_RAW;
	}
	if (result < 0) {
		image_file_close(&file);
		return result;
	}
	result = format == DISK_QCOW2 ? qcow2_open(disk, &file, above, err) : raw_open(disk, &file, err);
	if (result == 0)
		(*disk)->guard_magic = options->format == DISK_AUTO && format == DISK_RAW;
	return result;
}

int disk_open(struct disk **disk, const char *path, const struct disk_options *options, struct error *err)
{
	return disk_open_chain(disk, path, options, NULL, err);
}

int disk_close(struct disk *disk, struct error *err)
{
	int result;

	if (!disk)
		return 0;
	result = disk->model->close(disk);
	if (result < 0)
		error_set(err, -result,
			"disk %s: writing back what was still in memory failed; the last writes are lost",
			disk->file.path);
	image_file_close(&disk->file);
	free(disk);
	return result;
}

/* ---- what every format shares ---- */

uint64_t disk_size(const struct disk *disk)
{
	return disk->size;
}

bool disk_read_only(const struct disk *disk)
{
	return disk->read_only;
}

const char *disk_format_name(const struct disk *disk)
{
	return disk->model->name;
}

static int check_range(const struct disk *disk, uint64_t offset, uint64_t length)
{
	if ((offset | length) % DISK_SECTOR || offset > disk->size || length > disk->size - offset)
		return -EINVAL;
	return 0;
}

static int check_change(const struct disk *disk, uint64_t offset, uint64_t length)
{
	return disk->read_only ? -EROFS : check_range(disk, offset, length);
}

static struct vector whole(const struct iovec *iov, int count)
{
	struct vector v = {iov, count, 0, 0};

	for (int i = 0; i < count; i++)
		v.length += iov[i].iov_len;
	return v;
}

int disk_readv(struct disk *disk, uint64_t offset, const struct iovec *iov, int count)
{
	struct vector v = whole(iov, count);
	int result = check_range(disk, offset, v.length);

	return result < 0 || !v.length ? result : disk->model->read(disk, offset, v);
}

static bool looks_like_a_format(struct vector v)
{
	uint32_t magic = 0;
	size_t have = 0;

	for (struct iovec piece = vector_next(&v); piece.iov_len && have < 4; piece = vector_next(&v)) {
		size_t part = min(piece.iov_len, 4 - have);

		memcpy((char *)&magic + have, piece.iov_base, part);
		have += part;
	}
	return be32toh(magic) == QCOW2_MAGIC;
}

int disk_writev(struct disk *disk, uint64_t offset, const struct iovec *iov, int count)
{
	struct vector v = whole(iov, count);
	int result = check_change(disk, offset, v.length);

	if (result < 0 || !v.length)
		return result;
	if (disk->guard_magic && offset == 0 && looks_like_a_format(v))
		return -EPERM;
	return disk->model->write(disk, offset, v);
}

int disk_flush(struct disk *disk)
{
	return disk->read_only ? 0 : disk->model->flush(disk);
}

int disk_discard(struct disk *disk, uint64_t offset, uint64_t length)
{
	int result = check_change(disk, offset, length);

	return result < 0 || !length ? result : disk->model->discard(disk, offset, length);
}

int disk_write_zeroes(struct disk *disk, uint64_t offset, uint64_t length, bool unmap)
{
	int result = check_change(disk, offset, length);

	return result < 0 || !length ? result : disk->model->write_zeroes(disk, offset, length, unmap);
}
