/* Writing back the tables, in the order that keeps the image whole if the process or the host dies between any two
 * writes (qcow2.h tells it in words). */
#include "disk/qcow2.h"

#include <stdlib.h>

#include "base/cleanup.h"

/* How much may be dirty before a write has to flush by itself: L2 and refcount blocks of 4 KiB, and clusters. */
#define DIRTY_BLOCKS_MAX 512
#define RELEASED_MAX 65536

/* What one flush writes after the counts: copies, so that the tables can go on changing meanwhile. */
struct write_back {
	struct cache_block **blocks; /* of L2, marked as being written */
	struct cache_block **copies;
	size_t count;
	struct root_table l1, refcount_table; /* only the dirty entries, big-endian */
	uint64_t *released;
	size_t released_count;
};

static int copy_root(struct root_table *root, struct root_table *copy)
{
	*copy = *root;
	copy->entry = NULL;
	if (!root->dirty_to)
		return 0;
	copy->entry = malloc((root->dirty_to - root->dirty_from) * 8ull);
	if (!copy->entry)
		return -ENOMEM;
	for (uint32_t i = root->dirty_from; i < root->dirty_to; i++)
		store_be64(&copy->entry[i - root->dirty_from], root->entry[i]);
	return 0;
}

static int write_root(struct qcow2 *q, const struct root_table *copy)
{
	return image_file_write(&q->disk.file, copy->offset + copy->dirty_from * 8ull, copy->entry,
		(copy->dirty_to - copy->dirty_from) * 8ull);
}

static int copy_blocks(struct cache *cache, struct write_back *w)
{
	if (!cache->dirty)
		return 0;
	w->blocks = calloc(cache->dirty, sizeof(*w->blocks));
	w->copies = calloc(cache->dirty, sizeof(*w->copies));
	if (!w->blocks || !w->copies)
		return -ENOMEM;
	for (unsigned i = 0; i < cache->count; i++) {
		struct cache_block *block = cache->blocks[i];

		if (!block->dirty_to)
			continue;
		w->copies[w->count] = malloc(sizeof(*block) + cache->unit);
		if (!w->copies[w->count])
			return -ENOMEM;
		memcpy(w->copies[w->count], block, sizeof(*block) + cache->unit);
		w->blocks[w->count++] = block;
	}
	return 0;
}

/* Writes the counts and takes a copy of the rest. With `lock`. */
static int begin(struct qcow2 *q, struct write_back *w)
{
	/* Counts may be written at any time: raised ones belong to clusters that no table on disk refers to yet,
	 * lowered ones to clusters that none refers to any more. */
	int result = cache_write(&q->refcounts);

	if (result == 0)
		result = copy_root(&q->refcount_table, &w->refcount_table);
	if (result == 0)
		result = copy_root(&q->l1, &w->l1);
	if (result == 0)
		result = copy_blocks(&q->l2, w);
	if (result < 0)
		return result;
	for (size_t i = 0; i < w->count; i++) {
		w->blocks[i]->writing = true;
		w->blocks[i]->dirty_from = w->blocks[i]->dirty_to = 0;
	}
	q->l2.dirty = 0;
	q->l1.dirty_from = q->l1.dirty_to = q->refcount_table.dirty_from = q->refcount_table.dirty_to = 0;
	w->released = take_ptr(q->released);
	w->released_count = q->released_count;
	q->released_count = q->released_room = 0;
	return 0;
}

static int write_tables(struct qcow2 *q, const struct write_back *w)
{
	struct image_file *file = &q->disk.file;
	int result = 0;

	if (w->refcount_table.entry) {
		result = image_file_sync(file); /* the new refcount blocks */
		if (result == 0)
			result = write_root(q, &w->refcount_table);
	}
	if (result == 0)
		result = image_file_sync(file); /* guest data and counts */
	for (size_t i = 0; i < w->count && result == 0; i++) {
		const struct cache_block *c = w->copies[i];

		result = image_file_write(
			file, c->offset + c->dirty_from, c->data + c->dirty_from, c->dirty_to - c->dirty_from);
	}
	/* No sync between the two: a new L2 table was written as a whole when it was made, and is on the disk by now.
	 * If the L1 table gets there first, it leads to what the table said before. */
	if (result == 0 && w->l1.entry)
		result = write_root(q, &w->l1);
	if (result == 0 && (w->l1.entry || w->count))
		result = image_file_sync(file);
	return result;
}

static void touch_again(struct root_table *root, const struct root_table *copy)
{
	if (!copy->entry)
		return;
	root_touch(root, copy->dirty_from);
	root_touch(root, copy->dirty_to - 1);
}

/* With `lock`. If writing failed, everything is dirty again as it was, and the next flush tries it once more. */
static void end(struct qcow2 *q, struct write_back *w, bool failed)
{
	for (size_t i = 0; i < w->count; i++) {
		w->blocks[i]->writing = false;
		if (failed)
			cache_touch(&q->l2, w->blocks[i], w->copies[i]->dirty_from, w->copies[i]->dirty_to);
	}
	if (!failed)
		return;
	touch_again(&q->l1, &w->l1);
	touch_again(&q->refcount_table, &w->refcount_table);
	for (size_t i = 0; i < w->released_count; i++)
		cluster_release(q, w->released[i] << q->cluster_bits);
	w->released_count = 0;
}

static void write_back_free(struct write_back *w)
{
	/* copies was filled in order; a failed allocation left NULL behind the last one counted */
	for (size_t i = 0; i < w->count; i++)
		free(w->copies[i]);
	free(w->copies);
	free(w->blocks);
	free(w->l1.entry);
	free(w->refcount_table.entry);
	free(w->released);
}

int qcow2_flush(struct disk *disk)
{
	struct qcow2 *q = qcow2_of(disk);
	__attribute__((cleanup(write_back_free))) struct write_back w = {0};
	int result;

	scope_lock(&q->flush_lock);
	pthread_mutex_lock(&q->lock);
	result = begin(q, &w);
	pthread_mutex_unlock(&q->lock);
	if (result < 0)
		return result;

	result = write_tables(q, &w);
	pthread_mutex_lock(&q->lock);
	end(q, &w, result < 0);
	pthread_mutex_unlock(&q->lock);
	if (result < 0 || !w.released_count)
		return result;

	/* Whoever looked up a mapping that led to these clusters has done with them once this lock was had. */
	pthread_rwlock_wrlock(&q->io);
	pthread_rwlock_unlock(&q->io);
	return released_free(q, w.released, w.released_count);
}

int qcow2_throttle(struct qcow2 *q)
{
	bool much;

	pthread_mutex_lock(&q->lock);
	much = q->l2.dirty + q->refcounts.dirty > DIRTY_BLOCKS_MAX || q->released_count > RELEASED_MAX;
	pthread_mutex_unlock(&q->lock);
	return much ? qcow2_flush(&q->disk) : 0;
}
