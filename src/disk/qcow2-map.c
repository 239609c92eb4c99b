/* From guest offsets to clusters: the L1 table and, through the cache, L2 tables ("Cluster mapping"). */
#include "disk/qcow2.h"

#include <stdlib.h>

#include "base/cleanup.h"

struct compressed qcow2_compressed(const struct qcow2 *q, uint64_t entry)
{
	unsigned offset_bits = 62 - (q->cluster_bits - 8);
	uint64_t offset = entry & ((1ull << offset_bits) - 1);
	uint64_t sectors = ((entry & ~(ENTRY_COPIED | ENTRY_COMPRESSED)) >> offset_bits) + 1;

	return (struct compressed){offset, sectors * 512 - offset % 512};
}

static uint64_t *l1_entry(struct qcow2 *q, uint64_t offset)
{
	return &q->l1.entry[offset >> (q->cluster_bits + q->l2_bits)];
}

/* Where in the file the L2 entry for `offset` is. */
static uint64_t l2_position(struct qcow2 *q, uint64_t offset)
{
	return (*l1_entry(q, offset) & ENTRY_OFFSET) + (offset >> q->cluster_bits & ((1u << q->l2_bits) - 1)) * 8;
}

int map_get(struct qcow2 *q, uint64_t offset, uint64_t *entry)
{
	struct cache_block *block;
	uint64_t at = l2_position(q, offset);
	int result;

	*entry = 0;
	if (!(*l1_entry(q, offset) & ENTRY_OFFSET))
		return 0;
	result = cache_get(&q->l2, at, &block);
	if (result == 0)
		*entry = load_be64(block->data + at % q->l2.unit);
	return result;
}

static enum mapping_kind kind_of(uint64_t entry)
{
	if (entry & ENTRY_COMPRESSED)
		return MAPPED_COMPRESSED;
	if (entry & ENTRY_ZERO)
		return MAPPED_ZERO;
	return entry & ENTRY_OFFSET ? MAPPED_DATA : MAPPED_NOT;
}

int map_range(struct qcow2 *q, uint64_t offset, uint64_t length, struct mapping *m)
{
	uint32_t in_cluster = offset & (q->cluster_size - 1);
	int result = map_get(q, offset, &m->entry);

	if (result < 0)
		return result;
	m->kind = kind_of(m->entry);
	m->host = (m->entry & ENTRY_OFFSET) + in_cluster;
	m->writable = m->entry & ENTRY_COPIED;
	m->length = min(length, (uint64_t)q->cluster_size - in_cluster);
	if (m->kind == MAPPED_COMPRESSED)
		return 0;
	while (m->length < length) {
		uint64_t entry;

		if (map_get(q, offset + m->length, &entry) < 0 || kind_of(entry) != m->kind)
			break; /* an error is found again when that piece's turn comes */
		if (m->kind == MAPPED_DATA &&
			((entry & ENTRY_OFFSET) != m->host + m->length || !(entry & ENTRY_COPIED) != !m->writable))
			break;
		m->length = min(length, m->length + q->cluster_size);
	}
	return 0;
}

int map_prepare(struct qcow2 *q, uint64_t offset)
{
	uint64_t *entry = l1_entry(q, offset), old = *entry, cluster, got;
	scope_free uint8_t *table = NULL;
	bool fresh;
	int result;

	if (old & ENTRY_COPIED)
		return 0;
	table = calloc(1, q->cluster_size);
	if (!table)
		return -ENOMEM;
	/* A table that is shared with a snapshot is never changed, so the file has it as it is. The clusters it refers
	 * to were counted for each of the two when the snapshot was made; only the table's own count changes. */
	if (old & ENTRY_OFFSET) {
		result = image_file_read(&q->disk.file, old & ENTRY_OFFSET, table, q->cluster_size);
		if (result < 0)
			return result;
	}
	result = clusters_alloc(q, 1, &cluster, &got, &fresh);
	if (result < 0)
		return result;
	/* Straight to the file: nothing refers to it before a flush writes the L1 table. */
	result = image_file_write(&q->disk.file, cluster << q->cluster_bits, table, q->cluster_size);
	if (result < 0) {
		clusters_unalloc(q, cluster, 1);
		return result;
	}
	cache_drop(&q->l2, cluster << q->cluster_bits, q->cluster_size);
	if (old & ENTRY_OFFSET)
		cluster_release(q, old & ENTRY_OFFSET);
	*entry = cluster << q->cluster_bits | ENTRY_COPIED;
	root_touch(&q->l1, entry - q->l1.entry);
	return 0;
}

int map_set(struct qcow2 *q, uint64_t offset, uint64_t entry)
{
	struct cache_block *block;
	uint64_t at = l2_position(q, offset);
	uint32_t in_block = at % q->l2.unit;
	int result = cache_get(&q->l2, at, &block);

	if (result < 0)
		return result;
	store_be64(block->data + in_block, entry);
	cache_touch(&q->l2, block, in_block, in_block + 8);
	return 0;
}
