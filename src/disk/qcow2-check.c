/* The check of a whole image before it is used. All references are counted once, as the specification's "Host cluster
 * management" demands it, and compared with the counts in the file. What a write relies on must hold:
 *   - every table and cluster lies inside the file;
 *   - what is changed in place (root tables, refcount blocks, entries marked COPIED) has exactly one reference;
 *   - no cluster in use has a count that would let it be taken as free. */
#include "disk/qcow2.h"

#include <stdlib.h>

#include "base/cleanup.h"

/* References of each cluster, in chunks made as needed: the file may be sparse and its size a fantasy. */
#define CHUNK 65536u
#define COUNT_MAX 0x7fff  /* saturates; compared as such */
#define EXCLUSIVE 0x8000u /* must be the only reference */
#define CHUNKS_MAX 8192	  /* 1 GiB of memory */

struct check {
	struct qcow2 *q;
	struct error *err;
	const char *path;
	uint64_t clusters; /* in the file, the last one perhaps in part */
	uint16_t **chunks;
	uint64_t chunk_count, chunks_used;
	uint8_t *l2; /* buffer of a cluster */
};

static void check_free(struct check *c)
{
	for (uint64_t i = 0; i < c->chunk_count && c->chunks; i++)
		free(c->chunks[i]);
	free(c->chunks);
	free(c->l2);
}

#define corrupt(c, format, ...)                                                                                        \
	error_set((c)->err, EINVAL,                                                                                    \
		"disk %s: damaged qcow2 image: " format                                                                \
		"; repair it (qemu-img check -r all) or restore it from a copy",                                       \
		(c)->path, ##__VA_ARGS__)

static uint16_t references(const struct check *c, uint64_t cluster)
{
	const uint16_t *chunk = cluster / CHUNK < c->chunk_count ? c->chunks[cluster / CHUNK] : NULL;

	return chunk ? chunk[cluster % CHUNK] : 0;
}

/* Counts a reference from `what` to each cluster that has a part of [offset, offset + length). */
static int refer(struct check *c, const char *what, uint64_t offset, uint64_t length, bool exclusive)
{
	unsigned bits = c->q->cluster_bits;

	for (uint64_t n = offset >> bits; n <= (offset + length - 1) >> bits; n++) {
		if (n >= c->clusters)
			return corrupt(c, "%s at 0x%llx lies beyond the end of the file at 0x%llx", what,
				(unsigned long long)offset, (unsigned long long)(c->clusters << bits));

		uint16_t **chunk = &c->chunks[n / CHUNK];

		if (!*chunk) {
			if (c->chunks_used++ == CHUNKS_MAX)
				return error_set(c->err, EFBIG,
					"disk %s: too large to be checked; convert it to larger clusters", c->path);
			*chunk = calloc(CHUNK, sizeof(**chunk));
			if (!*chunk)
				return error_set(c->err, ENOMEM, "disk %s: no memory to check it", c->path);
		}

		uint16_t *count = &(*chunk)[n % CHUNK];
		unsigned before = *count & COUNT_MAX;

		if (before && (exclusive || (*count & EXCLUSIVE)))
			return corrupt(c, "the cluster at 0x%llx is used twice, once as %s",
				(unsigned long long)(n << bits), what);
		*count = (*count & EXCLUSIVE) | (exclusive ? EXCLUSIVE : 0) | min(before + 1, (unsigned)COUNT_MAX);
	}
	return 0;
}

static int check_l2_entry(struct check *c, uint64_t entry, bool active)
{
	struct qcow2 *q = c->q;

	if (entry & ENTRY_COMPRESSED) {
		struct compressed packed = qcow2_compressed(q, entry);

		if (entry & ENTRY_COPIED)
			return corrupt(c, "L2 entry 0x%016llx is compressed and marked for writing",
				(unsigned long long)entry);
		/* To the byte: the last sector may be cut off by the end of the file. */
		return refer(c, "compressed data", align_down(packed.offset, 512),
			align_up(packed.offset + packed.bytes, 512) - align_down(packed.offset, 512), false);
	}
	if ((entry & L2_RESERVED) || (q->header.version < 3 && (entry & ENTRY_ZERO)))
		return corrupt(c, "L2 entry 0x%016llx has reserved bits set", (unsigned long long)entry);
	if ((entry & ENTRY_OFFSET) % q->cluster_size)
		return corrupt(c, "L2 entry 0x%016llx: its offset is no multiple of the cluster size %u",
			(unsigned long long)entry, q->cluster_size);
	if (!(entry & ENTRY_OFFSET))
		return 0;
	return refer(c, "guest data", entry & ENTRY_OFFSET, q->cluster_size, active && (entry & ENTRY_COPIED));
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* An L2 table that stands twice in one L1 table makes no sense, and would make this walk as long as somebody likes. */
static int check_repeated(struct check *c, const struct root_table *l1)
{
	scope_free uint64_t *sorted = malloc(max(l1->count, 1u) * 8ull);

	if (!sorted)
		return error_set(c->err, ENOMEM, "disk %s: no memory to check it", c->path);
	for (uint32_t i = 0; i < l1->count; i++)
		sorted[i] = l1->entry[i] & ENTRY_OFFSET;
	qsort(sorted, l1->count, 8, by_value);
	for (uint32_t i = 1; i < l1->count; i++) {
		if (sorted[i] && sorted[i] == sorted[i - 1])
			return corrupt(c, "the L2 table at 0x%llx is used twice by an L1 table",
				(unsigned long long)sorted[i]);
	}
	return 0;
}

/* An L1 table's L2 tables and what they refer to. */
static int check_l1(struct check *c, const struct root_table *l1, bool active)
{
	struct qcow2 *q = c->q;
	int result = check_repeated(c, l1);

	for (uint32_t i = 0; i < l1->count && result == 0; i++) {
		uint64_t entry = l1->entry[i], offset = entry & ENTRY_OFFSET;

		if ((entry & L1_RESERVED) || offset % q->cluster_size)
			return corrupt(c, "L1 entry %u is 0x%016llx: reserved bits, or no multiple of the cluster size",
				i, (unsigned long long)entry);
		if (!offset) {
			if (active && (entry & ENTRY_COPIED))
				return corrupt(c, "L1 entry %u is 0x%016llx: marked for writing without a table", i,
					(unsigned long long)entry);
			continue;
		}
		result = refer(c, "an L2 table", offset, q->cluster_size, active && (entry & ENTRY_COPIED));
		if (result < 0)
			return result;
		result = image_file_read(&q->disk.file, offset, c->l2, q->cluster_size);
		if (result < 0)
			return error_set(c->err, -result, "disk %s: reading the L2 table at 0x%llx failed", c->path,
				(unsigned long long)offset);
		for (uint32_t e = 0; e < 1u << q->l2_bits && result == 0; e++) {
			uint64_t l2_entry = load_be64(c->l2 + e * 8);

			if (l2_entry)
				result = check_l2_entry(c, l2_entry, active);
		}
	}
	return result;
}

/* ---- snapshots ("Snapshots") ---- */

#define SNAPSHOT_BYTES_MAX (64u << 20)

static int check_snapshot(struct check *c, uint64_t offset, uint32_t count, uint32_t number)
{
	__attribute__((cleanup(cleanup_free))) uint64_t *entries = NULL;
	struct root_table l1;
	int result;

	if (!count)
		return 0;
	if (count > L1_BYTES_MAX / 8 || !offset || offset % c->q->cluster_size)
		return corrupt(c, "snapshot %u has its L1 table at 0x%llx with %u entries", number,
			(unsigned long long)offset, count);
	result = refer(c, "a snapshot's L1 table", offset, count * 8ull, true);
	if (result < 0)
		return result;
	result = root_read(&l1, &c->q->disk.file, offset, count);
	entries = l1.entry;
	if (result < 0)
		return error_set(
			c->err, -result, "disk %s: reading the L1 table of snapshot %u failed", c->path, number);
	return check_l1(c, &l1, false);
}

static int check_snapshots(struct check *c)
{
	const struct qcow2_header *h = &c->q->header;
	uint64_t at = h->snapshot_offset;

	for (uint32_t i = 0; i < h->snapshot_count; i++) {
		uint8_t fixed[40];
		int result = image_file_read(&c->q->disk.file, at, fixed, sizeof(fixed));

		if (result < 0)
			return error_set(c->err, -result, "disk %s: reading snapshot %u failed", c->path, i);

		uint64_t id = load_be32(fixed + 12) >> 16, name = load_be32(fixed + 12) & 0xffff,
			 extra = load_be32(fixed + 36);

		at += align_up(sizeof(fixed) + extra + id + name, 8);
		if (extra > 1024 || at - h->snapshot_offset > SNAPSHOT_BYTES_MAX)
			return corrupt(c, "snapshot %u of %u has %llu bytes of extra data; the table is too long", i,
				h->snapshot_count, (unsigned long long)extra);
		result = check_snapshot(c, load_be64(fixed), load_be32(fixed + 8), i);
		if (result < 0)
			return result;
	}
	if (!h->snapshot_count)
		return 0;
	return refer(c, "the snapshot table", h->snapshot_offset, at - h->snapshot_offset, true);
}

/* ---- the counts ---- */

static int check_refcount_table(struct check *c)
{
	const struct root_table *table = &c->q->refcount_table;
	int result = refer(c, "the refcount table", table->offset, table->count * 8ull, true);

	for (uint32_t i = 0; i < table->count && result == 0; i++) {
		uint64_t entry = table->entry[i];

		if (!entry)
			continue;
		if ((entry & REFCOUNT_RESERVED) || entry % c->q->cluster_size || entry & ~ENTRY_OFFSET)
			return corrupt(c, "refcount table entry %u is 0x%016llx: no offset of a cluster", i,
				(unsigned long long)entry);
		result = refer(c, "a refcount block", entry, c->q->cluster_size, true);
	}
	return result;
}

/* Brings one count in line with the references. Too low: only right after a crash of a program that keeps the counts
 * lazily. Too high: space that a crash left over; given back. */
static int settle(struct check *c, uint64_t cluster, uint64_t stored, uint64_t counted)
{
	struct qcow2 *q = c->q;
	bool dirty = q->header.incompatible & INCOMPATIBLE_DIRTY;

	if (stored < counted && !dirty)
		return corrupt(c, "the cluster at 0x%llx is used %llu times, but its reference count is %llu",
			(unsigned long long)(cluster << q->cluster_bits), (unsigned long long)counted,
			(unsigned long long)stored);
	if (stored > counted && (!q->header.all_known || counted == COUNT_MAX))
		return 0;

	uint64_t most = q->header.refcount_order == 6 ? UINT64_MAX : (1ull << (1u << q->header.refcount_order)) - 1;

	if (counted > most || refcount_set(q, cluster, counted) < 0)
		return corrupt(c, "the reference count of the cluster at 0x%llx cannot be set right",
			(unsigned long long)(cluster << q->cluster_bits));
	return 0;
}

static bool range_unused(const struct check *c, uint64_t from, uint64_t to)
{
	for (uint64_t n = from; n < to && n < c->clusters;) {
		if (!c->chunks[n / CHUNK])
			n = align_down(n, CHUNK) + CHUNK;
		else if (c->chunks[n / CHUNK][n % CHUNK])
			return false;
		else
			n++;
	}
	return true;
}

static int compare_counts(struct check *c)
{
	struct qcow2 *q = c->q;
	uint64_t per_block = 1ull << q->refblock_bits;
	uint64_t covered = (uint64_t)q->refcount_table.count << q->refblock_bits;

	q->free_hint = UINT64_MAX;
	if (!range_unused(c, covered, UINT64_MAX))
		return corrupt(c, "the refcount table of %u entries does not cover all clusters in use",
			q->refcount_table.count);
	for (uint32_t i = 0; i < q->refcount_table.count; i++) {
		uint64_t first = (uint64_t)i << q->refblock_bits;
		int result;

		if (!q->refcount_table.entry[i]) {
			q->free_hint = min(q->free_hint, first);
			if (!range_unused(c, first, first + per_block))
				return corrupt(c,
					"refcount table entry %u is 0, but clusters from 0x%llx on are in use", i,
					(unsigned long long)(first << q->cluster_bits));
			continue;
		}
		result = image_file_read(&q->disk.file, q->refcount_table.entry[i], c->l2, q->cluster_size);
		if (result < 0)
			return error_set(c->err, -result, "disk %s: reading a refcount block failed", c->path);
		for (uint64_t n = first; n < first + per_block; n++) {
			uint64_t stored = refcount_load(c->l2, n - first, q->header.refcount_order);
			uint64_t counted = references(c, n) & COUNT_MAX;

			if (stored != counted) {
				result = settle(c, n, stored, counted);
				if (result < 0)
					return result;
			}
			if (!counted && (!stored || q->header.all_known))
				q->free_hint = min(q->free_hint, n);
		}
	}
	q->free_hint = min(q->free_hint, covered);
	return 0;
}

int qcow2_check(struct qcow2 *q, uint64_t file_length, struct error *err)
{
	__attribute__((cleanup(check_free))) struct check c = {.q = q, .err = err, .path = q->disk.file.path};
	int result;

	c.clusters = (file_length + q->cluster_size - 1) >> q->cluster_bits;
	c.chunk_count = (c.clusters + CHUNK - 1) / CHUNK;
	c.chunks = calloc(c.chunk_count, sizeof(*c.chunks));
	c.l2 = malloc(q->cluster_size);
	if (!c.chunks || !c.l2)
		return error_set(err, ENOMEM, "disk %s: no memory to check it", c.path);
	result = refer(&c, "the header", 0, q->cluster_size, true);
	if (result == 0)
		result = refer(&c, "the L1 table", q->l1.offset, q->l1.count * 8ull, true);
	if (result == 0)
		result = check_refcount_table(&c);
	if (result == 0)
		result = check_snapshots(&c);
	if (result == 0)
		result = check_l1(&c, &q->l1, true);
	/* Who only reads does not depend on the counts. */
	if (result == 0 && !q->disk.read_only)
		result = compare_counts(&c);
	return result;
}
