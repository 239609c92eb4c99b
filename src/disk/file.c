#include "disk/file.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"

/* ---- locks ----
 *
 * QEMU's scheme (facts from its documentation of image locking): byte 100 + p is read-locked by who uses permission p,
 * byte 200 + p by who lets nobody else use it; whoever comes looks whether the other byte is locked by another. All are
 * shared locks, so a reader needs no writable descriptor. OFD locks belong to the open file: they vanish with the last
 * descriptor, whatever way the process ends, and hold against another opening in the same process. */
enum { PERMISSION_READ = 0, PERMISSION_WRITE = 1, PERMISSION_RESIZE = 3 };
#define LOCK_USED(p) (100 + (p))
#define LOCK_DENIED(p) (200 + (p))

static int lock_byte(struct image_file *file, off_t byte, struct error *err)
{
	struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};

	if (fcntl(file->fd, F_OFD_SETLK, &lock) < 0)
		return error_errno(err, "disk %s: locking it against use by two programs", file->path);
	return 0;
}

static bool locked_by_another(struct image_file *file, off_t byte)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};

	return fcntl(file->fd, F_OFD_GETLK, &lock) < 0 || lock.l_type != F_UNLCK;
}

int image_file_lock(struct image_file *file, struct error *err)
{
	static const int changes[] = {PERMISSION_WRITE, PERMISSION_RESIZE};
	int result = lock_byte(file, LOCK_USED(PERMISSION_READ), err);

	for (size_t i = 0; i < ARRAY_SIZE(changes) && result == 0; i++) {
		result = lock_byte(file, LOCK_DENIED(changes[i]), err);
		if (result == 0 && !file->read_only)
			result = lock_byte(file, LOCK_USED(changes[i]), err);
	}
	if (result < 0)
		return result;

	/* Looked for after our own are set: of two that come at once, at least one sees the other. */
	for (size_t i = 0; i < ARRAY_SIZE(changes); i++) {
		if (locked_by_another(file, LOCK_USED(changes[i])))
			return error_set(err, EBUSY,
				"disk %s is in use by another process, which may write to it; stop that first",
				file->path);
		if (!file->read_only && locked_by_another(file, LOCK_DENIED(changes[i])))
			return error_set(err, EBUSY,
				"disk %s is in use by another process; stop it first, or open it readonly", file->path);
	}
	if (locked_by_another(file, LOCK_DENIED(PERMISSION_READ)))
		return error_set(err, EBUSY,
			"disk %s is in use by another process, which lets nobody read it; stop it first", file->path);
	return 0;
}

/* ---- open and close ---- */

int image_file_open(struct image_file *file, const char *path, bool read_only, struct error *err)
{
	struct stat status;
	int result = 0;

	memset(file, 0, sizeof(*file));
	file->read_only = read_only;
	/* Non-blocking: opening a FIFO by mistake must be refused, not waited for. No effect on files and block
	 * devices. */
	file->fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK);
	if (file->fd < 0) {
		if (errno == ENOENT)
			return error_set(
				err, ENOENT, "disk %s does not exist; make it first (truncate, qemu-img create)", path);
		if ((errno == EACCES || errno == EROFS) && !read_only)
			return error_errno(err, "disk %s cannot be opened for writing (or use readonly)", path);
		if (errno != EISDIR)
			return error_errno(err, "disk %s", path);
	}
	if (file->fd < 0 || fstat(file->fd, &status) < 0 || !(S_ISREG(status.st_mode) || S_ISBLK(status.st_mode)))
		result = error_set(err, EINVAL, "disk %s is neither a regular file nor a block device", path);
	file->path = strdup(path);
	if (result == 0 && !file->path)
		result = error_set(err, ENOMEM, "disk %s: no memory", path);
	if (result < 0) {
		image_file_close(file);
		return result;
	}
	file->device = status.st_dev;
	file->inode = status.st_ino;
	return 0;
}

void image_file_close(struct image_file *file)
{
	cleanup_close(&file->fd);
	file->fd = -1;
	free(take_ptr(file->path));
}

int image_file_length(const struct image_file *file, uint64_t *length, struct error *err)
{
	off_t end = lseek(file->fd, 0, SEEK_END);

	if (end < 0)
		return error_errno(err, "disk %s: finding its length", file->path);
	*length = end;
	return 0;
}

/* ---- transfers ---- */

/* One system call's worth of pieces; whatever it did not move is tried again. */
#define PIECES 64

static int transfer(struct image_file *file, uint64_t offset, struct vector v, bool write)
{
	while (v.length) {
		struct iovec pieces[PIECES];
		struct vector rest = v;
		int count = 0;

		while (count < PIECES) {
			pieces[count] = vector_next(&rest);
			if (!pieces[count].iov_len)
				break;
			count++;
		}

		ssize_t moved =
			write ? pwritev(file->fd, pieces, count, offset) : preadv(file->fd, pieces, count, offset);

		if (moved < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		if (moved == 0) {
			if (write)
				return -ENOSPC; /* a block device's end */
			vector_zero(v);
			return 0;
		}
		v = vector_cut(v, moved, v.length - moved);
		offset += moved;
	}
	return 0;
}

int image_file_readv(struct image_file *file, uint64_t offset, struct vector v)
{
	return transfer(file, offset, v, false);
}

int image_file_writev(struct image_file *file, uint64_t offset, struct vector v)
{
	return transfer(file, offset, v, true);
}

int image_file_read(struct image_file *file, uint64_t offset, void *data, size_t length)
{
	struct iovec iov = {data, length};

	return transfer(file, offset, (struct vector){&iov, 1, 0, length}, false);
}

int image_file_write(struct image_file *file, uint64_t offset, const void *data, size_t length)
{
	struct iovec iov = {(void *)data, length};

	return transfer(file, offset, (struct vector){&iov, 1, 0, length}, true);
}

/* ---- holes ---- */

/* True: done, or failed with *result; false: the file system does not offer it. */
static bool try_fallocate(
	struct image_file *file, atomic_bool *missing, int mode, uint64_t offset, uint64_t length, int *result)
{
	*result = 0;
	if (atomic_load_explicit(missing, memory_order_relaxed))
		return false;
	while (fallocate(file->fd, mode | FALLOC_FL_KEEP_SIZE, offset, length) < 0) {
		if (errno == EINTR)
			continue;
		if (errno == EOPNOTSUPP || errno == ENOSYS || errno == ENODEV) {
			atomic_store_explicit(missing, true, memory_order_relaxed);
			return false;
		}
		/* A block device refuses what is not aligned to its own sectors; the caller can still write zeroes. */
		if (errno == EINVAL)
			return false;
		*result = -errno;
		return true;
	}
	return true;
}

int image_file_zero(struct image_file *file, uint64_t offset, uint64_t length, bool unmap)
{
	static const char zeroes[65536];
	int result;

	if (unmap && try_fallocate(file, &file->no_punch, FALLOC_FL_PUNCH_HOLE, offset, length, &result))
		return result;
	if (try_fallocate(file, &file->no_zero_range, FALLOC_FL_ZERO_RANGE, offset, length, &result))
		return result;
	while (length) {
		size_t part = min(length, (uint64_t)sizeof(zeroes));

		result = image_file_write(file, offset, zeroes, part);
		if (result < 0)
			return result;
		offset += part;
		length -= part;
	}
	return 0;
}

int image_file_discard(struct image_file *file, uint64_t offset, uint64_t length)
{
	int result;

	if (try_fallocate(file, &file->no_punch, FALLOC_FL_PUNCH_HOLE, offset, length, &result))
		return result;
	return 0;
}

int image_file_sync(struct image_file *file)
{
	int result = atomic_load(&file->sync_failed);

	if (result == 0 && fdatasync(file->fd) < 0) {
		result = -errno;
		atomic_store(&file->sync_failed, result);
	}
	return result;
}
