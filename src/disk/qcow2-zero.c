/* Discard and write zeroes: whole clusters change their L2 entry, parts of a cluster get real zeroes. */
#include "disk/qcow2.h"

#include <stdlib.h>

#include "base/cleanup.h"

/* Clusters changed between two looks at whether a flush is due. */
#define BATCH 8192

enum zero_mode {
	ZERO_DISCARD, /* free the space; what was never written may stay as it is */
	ZERO_UNMAP,   /* must read as zeroes, free the space */
	ZERO_KEEP,    /* must read as zeroes, keep the space */
};

static bool has_backing_at(const struct qcow2 *q, uint64_t offset)
{
	return q->backing && offset < q->backing->size;
}

/* The entry that makes the cluster read as zeroes. False: this version of the format has none, as the backing file
 * would show through. */
static bool zero_entry(const struct qcow2 *q, uint64_t offset, uint64_t old, enum zero_mode mode, uint64_t *new)
{
	bool own = !(old & ENTRY_COMPRESSED) && (old & ENTRY_COPIED) && (old & ENTRY_OFFSET);

	*new = old;
	if (!old && (mode == ZERO_DISCARD || !has_backing_at(q, offset)))
		return true;
	if (q->header.version < 3) {
		*new = 0;
		return !has_backing_at(q, offset);
	}
	if (mode == ZERO_KEEP && own)
		*new = old | ENTRY_ZERO;
	else if (!(old & ENTRY_COMPRESSED) && (old & ENTRY_ZERO) && mode == ZERO_KEEP)
		*new = old;
	else
		*new = has_backing_at(q, offset) ? ENTRY_ZERO : 0;
	return true;
}

/* Changes up to BATCH clusters from *offset on and advances it. -ENOTSUP: see zero_entry. */
static int zero_batch(struct qcow2 *q, uint64_t *offset, uint64_t end, enum zero_mode mode)
{
	uint64_t table_bytes = (uint64_t)q->cluster_size << q->l2_bits;

	scope_lock(&q->alloc_lock);
	scope_lock(&q->lock);
	for (unsigned i = 0; i < BATCH && *offset < end; i++) {
		uint64_t old, new;
		int result;

		/* Where there is not even a table, all of what it would cover stays as it is in one step. */
		if (!q->l1.entry[*offset / table_bytes] && (mode == ZERO_DISCARD || !has_backing_at(q, *offset))) {
			*offset = min(end, align_down(*offset, table_bytes) + table_bytes);
			continue;
		}
		result = map_get(q, *offset, &old);
		if (result < 0)
			return result;
		if (!zero_entry(q, *offset, old, mode, &new)) {
			if (mode != ZERO_DISCARD)
				return -ENOTSUP;
			new = old;
		}
		if (new != old) {
			result = map_prepare(q, *offset);
			if (result == 0)
				result = map_set(q, *offset, new);
			if (result < 0)
				return result;
			if ((new &ENTRY_OFFSET) != (old & ENTRY_OFFSET) || (old & ENTRY_COMPRESSED))
				entry_release(q, old);
		}
		*offset += q->cluster_size;
	}
	return 0;
}

/* Real zeroes, unless the range (inside one cluster) reads as zeroes already. */
static int write_real_zeroes(struct qcow2 *q, uint64_t offset, uint64_t length)
{
	static const char zeroes[65536];
	struct iovec iov[(2 << 20) / sizeof(zeroes)];
	struct mapping m;
	int count = 0, result;

	if (!length)
		return 0;
	pthread_mutex_lock(&q->lock);
	result = map_range(q, offset, length, &m);
	pthread_mutex_unlock(&q->lock);
	if (result < 0)
		return result;
	if (m.kind == MAPPED_ZERO || (m.kind == MAPPED_NOT && !has_backing_at(q, offset)))
		return 0;
	for (uint64_t left = length; left; count++) {
		iov[count] = (struct iovec){(void *)zeroes, min(left, (uint64_t)sizeof(zeroes))};
		left -= iov[count].iov_len;
	}
	return qcow2_write(&q->disk, offset, (struct vector){iov, count, 0, length});
}

static int zero_clusters(struct qcow2 *q, uint64_t offset, uint64_t end, enum zero_mode mode)
{
	while (offset < end) {
		int result = qcow2_throttle(q);

		if (result == 0)
			result = zero_batch(q, &offset, end, mode);
		if (result == -ENOTSUP) {
			/* A version 2 image over a backing file. */
			result = write_real_zeroes(q, offset, min((uint64_t)q->cluster_size, q->disk.size - offset));
			offset += q->cluster_size;
		}
		if (result < 0)
			return result;
	}
	return 0;
}

/* The whole clusters in a range; the last one of the disk counts as whole even if the disk ends inside it. */
static void whole_clusters(const struct qcow2 *q, uint64_t offset, uint64_t length, uint64_t *first, uint64_t *end)
{
	*first = align_up(offset, q->cluster_size);
	*end = align_down(offset + length, q->cluster_size);
	if (offset + length == q->disk.size)
		*end = align_up(q->disk.size, q->cluster_size);
}

int qcow2_discard(struct disk *disk, uint64_t offset, uint64_t length)
{
	struct qcow2 *q = qcow2_of(disk);
	uint64_t first, end;

	whole_clusters(q, offset, length, &first, &end);
	return zero_clusters(q, first, end, ZERO_DISCARD);
}

int qcow2_write_zeroes(struct disk *disk, uint64_t offset, uint64_t length, bool unmap)
{
	struct qcow2 *q = qcow2_of(disk);
	uint64_t first, end;
	int result;

	whole_clusters(q, offset, length, &first, &end);
	if (first >= end) /* no whole cluster: one part, or a part on each side of a boundary */
		first = end = min(first, offset + length);
	result = write_real_zeroes(q, offset, first - offset);
	if (result == 0)
		result = zero_clusters(q, first, end, unmap ? ZERO_UNMAP : ZERO_KEEP);
	if (result == 0 && offset + length > end)
		result = write_real_zeroes(q, end, offset + length - end);
	return result;
}
