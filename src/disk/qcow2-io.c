/* The guest's reads and writes. */
#include "disk/qcow2.h"

#include <stdlib.h>
#include <zlib.h>

#include "base/cleanup.h"

/* One allocation's worth at most, so that a huge request does not keep others from allocating for long. */
#define RUN_BYTES_MAX (4u << 20)

/* ---- read ---- */

static int read_backing(struct qcow2 *q, uint64_t offset, struct vector v)
{
	size_t there = 0;
	int result = 0;

	if (q->backing && offset < q->backing->size)
		there = min((uint64_t)v.length, q->backing->size - offset);
	if (there)
		result = q->backing->model->read(q->backing, offset, vector_cut(v, 0, there));
	vector_zero(vector_cut(v, there, v.length - there));
	return result;
}

/* A raw deflate stream that must fill the cluster. */
static int inflate_cluster(const struct qcow2 *q, const uint8_t *from, uint32_t length, uint8_t *to)
{
	z_stream z = {.next_in = (uint8_t *)from, .avail_in = length, .next_out = to, .avail_out = q->cluster_size};
	int result;

	if (inflateInit2(&z, -15) != Z_OK)
		return -ENOMEM;
	result = inflate(&z, Z_FINISH);
	inflateEnd(&z);
	/* What follows the stream in its last sector is not ours: running out of output is as good as the end. */
	return (result == Z_STREAM_END || result == Z_BUF_ERROR) && !z.avail_out ? 0 : -EIO;
}

static int read_compressed(struct qcow2 *q, uint64_t entry, uint32_t in_cluster, struct vector v)
{
	struct compressed c = qcow2_compressed(q, entry);
	scope_lock(&q->inflate_lock);

	/* Compressed clusters are never written, so an entry stands for its content as long as the image is open. */
	if (q->inflated_entry != entry) {
		scope_free uint8_t *packed = malloc(c.bytes);
		int result;

		if (!q->inflated)
			q->inflated = malloc(q->cluster_size);
		if (!packed || !q->inflated)
			return -ENOMEM;
		q->inflated_entry = 0;
		result = image_file_read(&q->disk.file, c.offset, packed, c.bytes);
		if (result == 0)
			result = inflate_cluster(q, packed, c.bytes, q->inflated);
		if (result < 0)
			return result;
		q->inflated_entry = entry;
	}
	vector_fill(v, q->inflated + in_cluster);
	return 0;
}

/* With `io` held. */
static int read_range(struct qcow2 *q, uint64_t offset, struct vector v)
{
	while (v.length) {
		struct mapping m;
		struct vector part;
		int result;

		pthread_mutex_lock(&q->lock);
		result = map_range(q, offset, v.length, &m);
		pthread_mutex_unlock(&q->lock);
		if (result < 0)
			return result;
		part = vector_cut(v, 0, m.length);
		switch (m.kind) {
		case MAPPED_NOT:
			result = read_backing(q, offset, part);
			break;
		case MAPPED_ZERO:
			vector_zero(part);
			break;
		case MAPPED_DATA:
			result = image_file_readv(&q->disk.file, m.host, part);
			break;
		case MAPPED_COMPRESSED:
			result = read_compressed(q, m.entry, offset & (q->cluster_size - 1), part);
			break;
		}
		if (result < 0)
			return result;
		offset += m.length;
		v = vector_cut(v, m.length, v.length - m.length);
	}
	return 0;
}

int qcow2_read(struct disk *disk, uint64_t offset, struct vector v)
{
	struct qcow2 *q = qcow2_of(disk);
	int result;

	pthread_rwlock_rdlock(&q->io);
	result = read_range(q, offset, v);
	pthread_rwlock_unlock(&q->io);
	return result;
}

/* ---- write ---- */

/* Fills a part of a new cluster that the guest does not write with what is read there now. */
static int copy_old(struct qcow2 *q, uint64_t offset, uint64_t length, uint64_t host, bool fresh)
{
	scope_free uint8_t *old = NULL;
	struct mapping m;
	int result;

	if (!length)
		return 0;
	if (fresh) {
		pthread_mutex_lock(&q->lock);
		result = map_range(q, offset, length, &m);
		pthread_mutex_unlock(&q->lock);
		if (result < 0)
			return result;
		if (m.length == length &&
			(m.kind == MAPPED_ZERO ||
				(m.kind == MAPPED_NOT && (!q->backing || offset >= q->backing->size))))
			return 0; /* zeroes are there already */
	}
	old = malloc(length);
	if (!old)
		return -ENOMEM;

	struct iovec iov = {old, length};

	result = read_range(q, offset, (struct vector){&iov, 1, 0, length});
	return result < 0 ? result : image_file_write(&q->disk.file, host, old, length);
}

/* New clusters for a run of guest clusters from `start` on. */
struct run {
	uint64_t start; /* guest offset */
	uint64_t host;
	uint64_t count; /* clusters */
	bool fresh;
	bool reused; /* a cluster that was allocated in advance and reads as zeroes */
};

static bool has_own_cluster(uint64_t entry)
{
	return !(entry & ENTRY_COMPRESSED) && (entry & ENTRY_COPIED) && (entry & ENTRY_OFFSET);
}

/* With `lock` and alloc_lock, for a cluster that cannot be written in place. */
static int prepare_run(struct qcow2 *q, uint64_t offset, uint64_t length, struct run *run)
{
	uint64_t table_bytes = (uint64_t)q->cluster_size << q->l2_bits, entry, first, want = 1;
	uint64_t end = min(offset + length, align_down(offset, table_bytes) + table_bytes);
	int result;

	run->start = align_down(offset, q->cluster_size);
	end = min(end, run->start + max(RUN_BYTES_MAX, q->cluster_size));
	result = map_prepare(q, offset);
	if (result == 0)
		result = map_get(q, offset, &entry);
	if (result < 0)
		return result;
	if (has_own_cluster(entry)) {
		run->host = entry & ENTRY_OFFSET;
		run->count = 1;
		run->reused = true;
		return 0;
	}
	for (uint64_t next = run->start + q->cluster_size; next < end; next += q->cluster_size, want++) {
		if (map_get(q, next, &entry) < 0 || has_own_cluster(entry))
			break;
	}
	result = clusters_alloc(q, want, &first, &run->count, &run->fresh);
	run->host = first << q->cluster_bits;
	return result;
}

/* With `lock` and alloc_lock: the run's data is in the file, from now on the guest's offsets lead there. */
static int link_run(struct qcow2 *q, const struct run *run)
{
	for (uint64_t i = 0; i < run->count; i++) {
		uint64_t offset = run->start + (i << q->cluster_bits), old;
		int result = map_get(q, offset, &old);

		if (result == 0)
			result = map_set(q, offset, (run->host + (i << q->cluster_bits)) | ENTRY_COPIED);
		if (result < 0) {
			if (!run->reused)
				clusters_unalloc(q, (run->host >> q->cluster_bits) + i, run->count - i);
			return result;
		}
		if (!run->reused)
			entry_release(q, old);
	}
	return 0;
}

/* Writes the beginning of v, *done bytes of it, to clusters that only become the guest's when all is in the file. With
 * `io` and alloc_lock. */
static int write_new(struct qcow2 *q, uint64_t offset, struct vector v, uint64_t *done)
{
	struct run run = {0};
	struct mapping m;
	uint64_t end, run_end;
	int result;

	pthread_mutex_lock(&q->lock);
	result = map_range(q, offset, v.length, &m);
	*done = m.length;
	/* Another writer may have been quicker. */
	if (result == 0 && !(m.kind == MAPPED_DATA && m.writable))
		result = prepare_run(q, offset, v.length, &run);
	pthread_mutex_unlock(&q->lock);
	if (result < 0)
		return result;
	if (!run.count)
		return image_file_writev(&q->disk.file, m.host, vector_cut(v, 0, m.length));

	run_end = run.start + (run.count << q->cluster_bits);
	end = min(offset + v.length, run_end);
	*done = end - offset;
	result = copy_old(q, run.start, offset - run.start, run.host, run.fresh);
	if (result == 0)
		result = image_file_writev(&q->disk.file, run.host + offset - run.start, vector_cut(v, 0, *done));
	if (result == 0)
		result = copy_old(q, end, run_end - end, run.host + end - run.start, run.fresh);

	scope_lock(&q->lock);
	if (result == 0)
		return link_run(q, &run);
	if (!run.reused)
		clusters_unalloc(q, run.host >> q->cluster_bits, run.count);
	return result;
}

static int write_range(struct qcow2 *q, uint64_t offset, struct vector v)
{
	while (v.length) {
		struct mapping m;
		uint64_t done;
		int result;

		pthread_mutex_lock(&q->lock);
		result = map_range(q, offset, v.length, &m);
		pthread_mutex_unlock(&q->lock);
		if (result < 0)
			return result;
		done = m.length;
		if (m.kind == MAPPED_DATA && m.writable) {
			result = image_file_writev(&q->disk.file, m.host, vector_cut(v, 0, done));
		} else {
			scope_lock(&q->alloc_lock);
			result = write_new(q, offset, v, &done);
		}
		if (result < 0)
			return result;
		offset += done;
		v = vector_cut(v, done, v.length - done);
	}
	return 0;
}

int qcow2_write(struct disk *disk, uint64_t offset, struct vector v)
{
	struct qcow2 *q = qcow2_of(disk);
	int result = qcow2_throttle(q);

	if (result < 0)
		return result;
	pthread_rwlock_rdlock(&q->io);
	result = write_range(q, offset, v);
	pthread_rwlock_unlock(&q->io);
	return result;
}
