/* Opening and closing a qcow2 image, versions 2 and 3 (QEMU's docs/interop/qcow2.txt). */
#include "disk/qcow2.h"

#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/cleanup.h"

/* Blocks of up to 4 KiB: an L2 block of 512 entries maps 32 MiB at the usual cluster size, so 8 GiB stay mapped. */
#define TABLE_UNIT 4096u
#define L2_BLOCKS 256
#define REFCOUNT_BLOCKS 32

static void qcow2_free(struct qcow2 *q)
{
	disk_close(q->backing, NULL);
	cache_free(&q->l2);
	cache_free(&q->refcounts);
	free(q->l1.entry);
	free(q->refcount_table.entry);
	free(q->released);
	free(q->inflated);
	pthread_mutex_destroy(&q->flush_lock);
	pthread_mutex_destroy(&q->alloc_lock);
	pthread_mutex_destroy(&q->lock);
	pthread_mutex_destroy(&q->inflate_lock);
	pthread_rwlock_destroy(&q->io);
}

static int qcow2_close(struct disk *disk)
{
	struct qcow2 *q = qcow2_of(disk);
	int result = disk->read_only ? 0 : qcow2_flush(disk);

	qcow2_free(q);
	return result;
}

static const struct disk_model qcow2_model = {
	.name = "qcow2",
	.close = qcow2_close,
	.read = qcow2_read,
	.write = qcow2_write,
	.flush = qcow2_flush,
	.discard = qcow2_discard,
	.write_zeroes = qcow2_write_zeroes,
};

/* ---- backing file ---- */

/* A relative name starts at the folder of the image that names it. */
static char *backing_path(const char *image, const char *name)
{
	scope_free char *copy = strdup(image);
	char *path;

	if (name[0] == '/')
		return strdup(name);
	if (!copy || asprintf(&path, "%s/%s", dirname(copy), name) < 0)
		return NULL;
	return path;
}

static int open_backing(struct qcow2 *q, const struct disk_chain *above, struct error *err)
{
	const struct qcow2_header *h = &q->header;
	struct disk_chain here = {above, &q->disk.file, above ? above->depth + 1 : 1};
	struct disk_options options = {.read_only = true};
	scope_free char *path = NULL;
	const char *image = q->disk.file.path;

	if (!h->backing_name[0])
		return 0;
	if (strcmp(h->backing_format, "qcow2") == 0)
		options.format = DISK_QCOW2;
	else if (strcmp(h->backing_format, "raw") == 0)
		options.format = DISK_RAW;
	else if (!h->backing_format[0])
		/* Not guessed: a guest that once wrote the backing file as its raw disk could name any file of the
		 * host. */
		return error_set(err, EINVAL,
			"disk %s does not tell the format of its backing file %s; "
			"add it: qemu-img rebase -u -b %s -F raw|qcow2 %s",
			image, h->backing_name, h->backing_name, image);
	else
		return error_set(err, ENOTSUP,
			"disk %s: its backing file %s has the format \"%s\", which is not supported; "
			"convert it to qcow2 or raw",
			image, h->backing_name, h->backing_format);
	path = backing_path(image, h->backing_name);
	if (!path)
		return error_set(err, ENOMEM, "disk %s: no memory", image);

	int result = disk_open_chain(&q->backing, path, &options, &here, err);

	/* Once is enough in a long chain: the image the user named, and the one that is at fault. */
	return result < 0 && !above ? error_wrap(err, "backing file of disk %s", image) : result;
}

/* ---- open ---- */

static int read_root(
	struct qcow2 *q, struct root_table *root, const char *name, uint64_t offset, uint32_t count, struct error *err)
{
	int result = root_read(root, &q->disk.file, offset, count);

	if (result < 0)
		return error_set(err, -result, "disk %s: its %s at 0x%llx cannot be read", q->disk.file.path, name,
			(unsigned long long)offset);
	return 0;
}

static int write_header_bits(struct qcow2 *q, unsigned position, uint64_t bits)
{
	uint8_t raw[8];

	store_be64(raw, bits);
	return image_file_write(&q->disk.file, position, raw, sizeof(raw));
}

/* The first writes, now that everything was found in order: counts that the check has set right, and the header's notes
 * about them. Features whose data we do not keep up to date while writing lose their autoclear bit, as demanded. */
static int settle_image(struct qcow2 *q, struct error *err)
{
	int result = cache_write(&q->refcounts);

	if (result == 0 && (q->header.incompatible & INCOMPATIBLE_DIRTY)) {
		result = image_file_sync(&q->disk.file);
		q->header.incompatible &= ~(uint64_t)INCOMPATIBLE_DIRTY;
		if (result == 0)
			result = write_header_bits(q, HEADER_INCOMPATIBLE, q->header.incompatible);
	}
	if (result == 0 && q->header.autoclear)
		result = write_header_bits(q, HEADER_AUTOCLEAR, 0);
	return result < 0 ? error_set(err, -result, "disk %s: writing to it failed", q->disk.file.path) : 0;
}

static int open_image(struct qcow2 *q, const struct disk_chain *above, struct error *err)
{
	struct image_file *file = &q->disk.file;
	struct qcow2_header *h = &q->header;
	uint64_t length = 0;
	int result = image_file_length(file, &length, err);

	if (result == 0)
		result = qcow2_read_header(file, length, h, err);
	if (result < 0)
		return result;
	q->disk.size = align_up(h->size, DISK_SECTOR);
	q->cluster_bits = h->cluster_bits;
	q->cluster_size = 1u << h->cluster_bits;
	q->l2_bits = h->cluster_bits - 3;
	q->refblock_bits = h->cluster_bits + 3 - h->refcount_order;
	q->file_end = align_up(length, q->cluster_size);
	cache_init(&q->l2, file, min(q->cluster_size, TABLE_UNIT), L2_BLOCKS);
	cache_init(&q->refcounts, file, min(q->cluster_size, TABLE_UNIT), REFCOUNT_BLOCKS);

	result = read_root(q, &q->l1, "L1 table", h->l1_offset, h->l1_count, err);
	if (result == 0)
		result = read_root(q, &q->refcount_table, "refcount table", h->refcount_table_offset,
			h->refcount_table_clusters * (q->cluster_size / 8), err);
	if (result == 0)
		result = qcow2_check(q, length, err);
	if (result == 0)
		result = open_backing(q, above, err);
	if (result == 0 && !file->read_only)
		result = settle_image(q, err);
	return result;
}

int qcow2_open(struct disk **disk, struct image_file *file, const struct disk_chain *above, struct error *err)
{
	scope_free struct qcow2 *q = calloc(1, sizeof(*q));
	pthread_rwlockattr_t attributes;
	int result;

	if (!q) {
		result = error_set(err, ENOMEM, "disk %s: no memory", file->path);
		image_file_close(file);
		return result;
	}
	q->disk = (struct disk){.model = &qcow2_model, .file = *file, .read_only = file->read_only};
	pthread_mutex_init(&q->flush_lock, NULL);
	pthread_mutex_init(&q->alloc_lock, NULL);
	pthread_mutex_init(&q->lock, NULL);
	pthread_mutex_init(&q->inflate_lock, NULL);
	/* A flush that waits for transfers to end must not wait for those that come after it. */
	pthread_rwlockattr_init(&attributes);
	pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&q->io, &attributes);
	pthread_rwlockattr_destroy(&attributes);

	result = open_image(q, above, err);
	if (result < 0) {
		qcow2_free(q);
		image_file_close(&q->disk.file);
		return result;
	}
	*disk = &take_ptr(q)->disk;
	return 0;
}
