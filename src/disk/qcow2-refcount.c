/* Reference counts ("Host cluster management") and the search for free clusters.
 *
 * A refcount block that is missing describes clusters that are all free, so the new block is put into the first of
 * them: it counts itself, and no second allocation is needed for it. */
#include "disk/qcow2.h"

#include <stdlib.h>

#include "base/cleanup.h"

void root_touch(struct root_table *root, uint32_t index)
{
	if (!root->dirty_to) {
		root->dirty_from = index;
		root->dirty_to = index + 1;
		return;
	}
	root->dirty_from = min(root->dirty_from, index);
	root->dirty_to = max(root->dirty_to, index + 1);
}

int root_read(struct root_table *root, struct image_file *file, uint64_t offset, uint32_t count)
{
	int result;

	*root = (struct root_table){.offset = offset, .count = count};
	root->entry = calloc(count ? count : 1, 8);
	if (!root->entry)
		return -ENOMEM;
	result = image_file_read(file, offset, root->entry, count * 8ull);
	if (result < 0)
		return result;
	for (uint32_t i = 0; i < count; i++)
		root->entry[i] = load_be64(&root->entry[i]);
	return 0;
}

/* ---- single counts ---- */

/* A count has 1 << order bits; below a byte, the lowest bits come first; above, big-endian. */
uint64_t refcount_load(const uint8_t *table, uint64_t index, unsigned order)
{
	uint64_t value = 0;

	if (order < 3) {
		unsigned bits = 1u << order;

		return table[index * bits / 8] >> index * bits % 8 & ((1u << bits) - 1);
	}
	for (unsigned i = 0, bytes = 1u << (order - 3); i < bytes; i++)
		value = value << 8 | table[index * bytes + i];
	return value;
}

static void refcount_store(uint8_t *table, uint64_t index, unsigned order, uint64_t value)
{
	if (order < 3) {
		unsigned bits = 1u << order, shift = index * bits % 8, mask = ((1u << bits) - 1) << shift;

		table[index * bits / 8] = (table[index * bits / 8] & ~mask) | value << shift;
		return;
	}
	for (unsigned bytes = 1u << (order - 3), i = bytes; i-- > 0; value >>= 8)
		table[index * bytes + i] = value;
}

/* The block of memory that holds the count of `cluster`, whose number inside it is *index. NULL: the refcount block
 * does not exist. */
static int counts_of(struct qcow2 *q, uint64_t cluster, struct cache_block **block, uint64_t *index)
{
	uint64_t in_table = cluster >> q->refblock_bits;
	uint64_t in_block = cluster & ((1ull << q->refblock_bits) - 1);
	uint64_t byte = (in_block << q->header.refcount_order) / 8;

	*block = NULL;
	if (in_table >= q->refcount_table.count || !q->refcount_table.entry[in_table])
		return 0;
	*index = in_block - (align_down(byte, q->refcounts.unit) * 8 >> q->header.refcount_order);
	return cache_get(&q->refcounts, q->refcount_table.entry[in_table] + byte, block);
}

int refcount_get(struct qcow2 *q, uint64_t cluster, uint64_t *count)
{
	struct cache_block *block;
	uint64_t index;
	int result = counts_of(q, cluster, &block, &index);

	*count = result == 0 && block ? refcount_load(block->data, index, q->header.refcount_order) : 0;
	return result;
}

int refcount_set(struct qcow2 *q, uint64_t cluster, uint64_t count)
{
	struct cache_block *block;
	uint64_t index, bit;
	int result = counts_of(q, cluster, &block, &index);

	if (result < 0)
		return result;
	if (!block)
		return -EIO;
	refcount_store(block->data, index, q->header.refcount_order, count);
	bit = index << q->header.refcount_order;
	cache_touch(&q->refcounts, block, bit / 8, (bit + (1u << q->header.refcount_order) + 7) / 8);
	return 0;
}

/* ---- growth of the tables ---- */

/* Really written, no hole: a table must be inside the file. */
static int write_zero_cluster(struct qcow2 *q, uint64_t offset)
{
	scope_free uint8_t *zeroes = calloc(1, q->cluster_size);

	return zeroes ? image_file_write(&q->disk.file, offset, zeroes, q->cluster_size) : -ENOMEM;
}

static int add_refcount_block(struct qcow2 *q, uint32_t index)
{
	uint64_t cluster = (uint64_t)index << q->refblock_bits;
	uint64_t offset = cluster << q->cluster_bits;
	int result;

	if (offset & ~ENTRY_OFFSET)
		return -EFBIG;
	result = write_zero_cluster(q, offset);
	if (result < 0)
		return result;
	cache_drop(&q->refcounts, offset, q->cluster_size);
	q->refcount_table.entry[index] = offset;
	q->file_end = max(q->file_end, offset + q->cluster_size);
	result = refcount_set(q, cluster, 1);
	if (result < 0) {
		q->refcount_table.entry[index] = 0;
		return result;
	}
	root_touch(&q->refcount_table, index);
	return 0;
}

/* Makes the refcount table longer. The new one lies behind everything that the old one covers, together with the
 * refcount blocks for itself; the header changes last. */
static int grow_refcount_table(struct qcow2 *q)
{
	struct root_table *old = &q->refcount_table;
	uint64_t first = (uint64_t)old->count << q->refblock_bits; /* number of the first new cluster: a block */
	uint64_t per_block = 1ull << q->refblock_bits, per_table = q->cluster_size / 8;
	uint64_t old_clusters = old->count / per_table, clusters = old_clusters + old_clusters / 2 + 1, blocks;

	for (;; clusters++) {
		/* Blocks describe themselves too; a few rounds settle it. */
		for (blocks = 1; blocks * per_block < blocks + clusters; blocks++)
			;
		if (clusters * per_table >= old->count + blocks)
			break;
	}
	if (clusters << q->cluster_bits > max(REFCOUNT_TABLE_BYTES_MAX, q->cluster_size) ||
		(first + blocks + clusters) << q->cluster_bits & ~ENTRY_OFFSET)
		return -EFBIG;

	uint32_t count = clusters * per_table;
	uint64_t offset = (first + blocks) << q->cluster_bits;
	scope_free uint64_t *entry = calloc(count, 8);
	scope_free uint8_t *raw = calloc(count, 8);
	scope_free uint8_t *block = malloc(q->cluster_size);
	/* The new table on disk will refer to blocks that so far only the old one in memory knows. */
	int result = entry && raw && block ? cache_write(&q->refcounts) : -ENOMEM;

	for (uint64_t i = 0; i < blocks && result == 0; i++) {
		memset(block, 0, q->cluster_size);
		for (uint64_t c = i * per_block; c < min((i + 1) * per_block, blocks + clusters); c++)
			refcount_store(block, c - i * per_block, q->header.refcount_order, 1);
		result = image_file_write(&q->disk.file, (first + i) << q->cluster_bits, block, q->cluster_size);
	}
	if (result < 0)
		return result;
	memcpy(entry, old->entry, old->count * 8ull);
	for (uint64_t i = 0; i < blocks; i++)
		entry[old->count + i] = (first + i) << q->cluster_bits;
	for (uint32_t i = 0; i < count; i++)
		store_be64(raw + i * 8ull, entry[i]);
	result = image_file_write(&q->disk.file, offset, raw, count * 8ull);
	if (result == 0)
		result = image_file_sync(&q->disk.file);
	if (result < 0)
		return result;

	uint8_t header[12];

	store_be64(header, offset);
	header[8] = clusters >> 24;
	header[9] = clusters >> 16;
	header[10] = clusters >> 8;
	header[11] = clusters;
	result = image_file_write(&q->disk.file, HEADER_REFCOUNT_TABLE, header, sizeof(header));
	if (result == 0)
		result = image_file_sync(&q->disk.file);
	if (result < 0)
		return result;

	uint64_t old_offset = old->offset;

	cache_drop(&q->refcounts, first << q->cluster_bits, (blocks + clusters) << q->cluster_bits);
	free(old->entry);
	*old = (struct root_table){.offset = offset, .entry = take_ptr(entry), .count = count};
	q->file_end = max(q->file_end, offset + (clusters << q->cluster_bits));
	/* Not free at once: a flush that is under way may still write to the old place. */
	for (uint64_t i = 0; i < old_clusters; i++)
		cluster_release(q, old_offset + (i << q->cluster_bits));
	return 0;
}

/* ---- taking and giving back ---- */

/* The first free cluster with a number of at least `from`. */
static int find_free(struct qcow2 *q, uint64_t from, uint64_t *found)
{
	for (uint64_t cluster = from;;) {
		struct cache_block *block;
		uint64_t index, per_unit = q->refcounts.unit * 8ull >> q->header.refcount_order;
		uint64_t in_table = cluster >> q->refblock_bits;
		int result = 0;

		if (in_table >= q->refcount_table.count)
			result = grow_refcount_table(q);
		else if (!q->refcount_table.entry[in_table])
			result = add_refcount_block(q, in_table);
		if (result == 0)
			result = counts_of(q, cluster, &block, &index);
		if (result < 0)
			return result;
		if (!block) /* grown, but this block is still missing */
			continue;
		for (; index < per_unit; index++, cluster++) {
			if (!refcount_load(block->data, index, q->header.refcount_order)) {
				*found = cluster;
				return 0;
			}
		}
	}
}

int clusters_alloc(struct qcow2 *q, uint64_t want, uint64_t *first, uint64_t *got, bool *fresh)
{
	uint64_t cluster, count, taken = 0;
	int result = find_free(q, q->free_hint, &cluster);

	if (result < 0)
		return result;
	*first = cluster;
	do {
		/* L2 entries have no room for an offset beyond 2^56. */
		if (cluster << q->cluster_bits & ~ENTRY_OFFSET)
			result = -EFBIG;
		else
			result = refcount_set(q, cluster, 1);
		if (result < 0)
			break;
		cluster++;
		taken++;
		/* Only inside blocks that exist: where one is missing, its own cluster would be the next. */
		if (cluster >> q->refblock_bits >= q->refcount_table.count ||
			!q->refcount_table.entry[cluster >> q->refblock_bits])
			break;
		result = refcount_get(q, cluster, &count);
	} while (result == 0 && !count && taken < want);
	if (!taken)
		return result;

	uint64_t end = cluster << q->cluster_bits;

	*got = taken;
	*fresh = *first << q->cluster_bits >= q->file_end;
	q->free_hint = cluster;
	q->file_end = max(q->file_end, end);
	return 0;
}

static int count_down(struct qcow2 *q, uint64_t cluster)
{
	uint64_t count;
	int result = refcount_get(q, cluster, &count);

	if (result < 0)
		return result;
	if (!count)
		return -EIO;
	result = refcount_set(q, cluster, count - 1);
	if (result == 0 && count == 1)
		q->free_hint = min(q->free_hint, cluster);
	return result;
}

void clusters_unalloc(struct qcow2 *q, uint64_t first, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		count_down(q, first + i);
}

/* ---- released clusters ---- */

void cluster_release(struct qcow2 *q, uint64_t offset)
{
	if (q->released_count == q->released_room) {
		size_t room = q->released_room ? q->released_room * 2 : 64;
		uint64_t *grown = realloc(q->released, room * sizeof(*grown));

		if (!grown) /* it stays allocated without use, until the image is opened the next time */
			return;
		q->released = grown;
		q->released_room = room;
	}
	q->released[q->released_count++] = offset >> q->cluster_bits;
}

void entry_release(struct qcow2 *q, uint64_t entry)
{
	if (entry & ENTRY_COMPRESSED) {
		struct compressed c = qcow2_compressed(q, entry);

		for (uint64_t at = align_down(c.offset, q->cluster_size); at < c.offset + c.bytes;
			at += q->cluster_size)
			cluster_release(q, at);
	} else if (entry & ENTRY_OFFSET) {
		cluster_release(q, entry & ENTRY_OFFSET);
	}
}

static int by_number(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* Keeps of the sorted list those whose count is going to be 0, each once; returns how many. */
static size_t keep_unused(struct qcow2 *q, const uint64_t *clusters, size_t count, uint64_t *unused)
{
	size_t kept = 0;

	for (size_t i = 0, next; i < count; i = next) {
		uint64_t references;

		for (next = i + 1; next < count && clusters[next] == clusters[i]; next++)
			;
		if (refcount_get(q, clusters[i], &references) == 0 && references == next - i)
			unused[kept++] = clusters[i];
	}
	return kept;
}

int released_free(struct qcow2 *q, uint64_t *clusters, size_t count)
{
	scope_free uint64_t *unused = malloc(max(count, (size_t)1) * sizeof(*unused));
	size_t unused_count = 0;
	int result = 0;

	qsort(clusters, count, sizeof(*clusters), by_number);
	/* Space first, while nobody can take the clusters yet; whether it could be freed changes nothing else. */
	if (unused) {
		pthread_mutex_lock(&q->lock);
		unused_count = keep_unused(q, clusters, count, unused);
		pthread_mutex_unlock(&q->lock);
	}
	for (size_t i = 0, next; i < unused_count; i = next) {
		for (next = i + 1; next < unused_count && unused[next] == unused[next - 1] + 1; next++)
			;
		image_file_discard(&q->disk.file, unused[i] << q->cluster_bits, (next - i) << q->cluster_bits);
	}

	scope_lock(&q->lock);
	for (size_t i = 0; i < count && result == 0; i++)
		result = count_down(q, clusters[i]);
	/* Only unused clusters are at stake now, so no sync. */
	return result < 0 ? result : cache_write(&q->refcounts);
}
