/* The qcow2 format's parts among themselves. Section names in comments are those of QEMU's docs/interop/qcow2.txt.
 *
 * Who locks what, in this order:
 *   flush_lock  one flush at a time
 *   io          read-held by a guest's read or write from its look-up to the end of its transfer; write-held for a
 * moment before clusters nobody refers to any more become free again, so that no transfer is still on its way
 *   alloc_lock  whoever changes the mapping (allocating write, discard, write zeroes), its data transfer included
 *   lock        the tables in memory; never held during a data transfer
 *
 * What makes it safe against a crash at any moment: changed tables stay in memory, and qcow2_flush writes them in an
 * order in which only unused clusters can be left over: reference counts and data, then L2 tables, then the L1 table;
 * and only when no table on disk refers to a cluster any more is its count lowered. */
#pragma once

#include <pthread.h>

#include "disk/backend.h"

/* ---- what the header says (qcow2-header.c) ---- */

enum {
	INCOMPATIBLE_DIRTY = 1 << 0,
	INCOMPATIBLE_CORRUPT = 1 << 1,
	INCOMPATIBLE_DATA_FILE = 1 << 2,
	INCOMPATIBLE_COMPRESSION = 1 << 3,
	INCOMPATIBLE_EXTENDED_L2 = 1 << 4,
};

/* Byte positions of the fields that are changed in place. */
enum { HEADER_REFCOUNT_TABLE = 48, HEADER_INCOMPATIBLE = 72, HEADER_AUTOCLEAR = 88 };

#define L1_BYTES_MAX (32u << 20)
#define REFCOUNT_TABLE_BYTES_MAX (8u << 20)

struct qcow2_header {
	unsigned version;
	unsigned cluster_bits;
	unsigned refcount_order;
	uint64_t size; /* bytes of the guest's disk */
	uint32_t l1_count;
	uint64_t l1_offset;
	uint64_t refcount_table_offset;
	uint32_t refcount_table_clusters;
	uint32_t snapshot_count;
	uint64_t snapshot_offset;
	uint64_t incompatible, autoclear;
	/* All that may refer to clusters is known to us; if not, a cluster without a reference may yet be in use. */
	bool all_known;
	char backing_name[1024]; /* as written in the image; "": none */
	char backing_format[16];
};

/* Reads and checks it, alone and against the length of the file. */
int qcow2_read_header(struct image_file *file, uint64_t file_length, struct qcow2_header *header, struct error *err);

/* ---- blocks of tables in memory (qcow2-cache.c) ---- */

struct cache_block {
	struct cache_block *next; /* in its hash chain */
	uint64_t offset;	  /* in the file */
	uint32_t dirty_from, dirty_to;
	bool used;    /* since the clock's hand passed */
	bool writing; /* a flush has its content, the file does not yet */
	uint8_t data[];
};

#define CACHE_CHAINS 256

struct cache {
	struct image_file *file;
	uint32_t unit;	/* bytes of a block, a power of two */
	unsigned limit; /* of blocks kept; more only while they are dirty */
	unsigned count, room, hand, dirty;
	struct cache_block **blocks;
	struct cache_block *chains[CACHE_CHAINS];
};

void cache_init(struct cache *cache, struct image_file *file, uint32_t unit, unsigned limit);
void cache_free(struct cache *cache);
/* The block that holds byte `offset` of the file, read if need be; valid until the next call. */
int cache_get(struct cache *cache, uint64_t offset, struct cache_block **block);
void cache_touch(struct cache *cache, struct cache_block *block, uint32_t from, uint32_t to);
/* Forgets what lies in the range: the file is about to be written there directly, or the cluster was freed. */
void cache_drop(struct cache *cache, uint64_t offset, uint64_t length);
int cache_write(struct cache *cache);

/* ---- the image ---- */

/* L1 table or refcount table: all of it in memory, in the host's byte order. */
struct root_table {
	uint64_t offset; /* in the file */
	uint64_t *entry;
	uint32_t count;
	uint32_t dirty_from, dirty_to; /* entries */
};

void root_touch(struct root_table *root, uint32_t index);
int root_read(struct root_table *root, struct image_file *file, uint64_t offset, uint32_t count);

struct qcow2 {
	struct disk disk;
	struct qcow2_header header;
	struct disk *backing; /* NULL: none */
	uint32_t cluster_size;
	unsigned cluster_bits;
	unsigned l2_bits;	/* entries of an L2 table */
	unsigned refblock_bits; /* entries of a refcount block */

	pthread_mutex_t flush_lock;
	pthread_rwlock_t io;
	pthread_mutex_t alloc_lock;
	pthread_mutex_t lock; /* all below */

	struct root_table l1, refcount_table;
	struct cache l2, refcounts;
	uint64_t free_hint; /* no free cluster has a lower number */
	uint64_t file_end;  /* bytes; never used beyond, so zeroes there */
	/* Clusters that lost a reference, once for each: their counts are lowered after the next write-back of L2. */
	uint64_t *released;
	size_t released_count, released_room;

	pthread_mutex_t inflate_lock; /* both below */
	uint8_t *inflated;	      /* the last compressed cluster that was read, unpacked */
	uint64_t inflated_entry;
};

static inline struct qcow2 *qcow2_of(struct disk *disk)
{
	return container_of(disk, struct qcow2, disk);
}

static inline uint64_t load_be64(const void *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return __builtin_bswap64(v);
}

static inline void store_be64(void *p, uint64_t v)
{
	v = __builtin_bswap64(v);
	memcpy(p, &v, sizeof(v));
}

static inline uint32_t load_be32(const void *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return __builtin_bswap32(v);
}

/* "L1 table entry", "L2 table entry", "Standard Cluster Descriptor" */
#define ENTRY_OFFSET 0x00fffffffffffe00ull
#define ENTRY_COPIED (1ull << 63) /* the reference count is exactly one: may be written in place */
#define ENTRY_COMPRESSED (1ull << 62)
#define ENTRY_ZERO 1ull
#define L1_RESERVED 0x7f000000000001ffull
#define L2_RESERVED 0x3f000000000001feull
#define REFCOUNT_RESERVED 0x1ffull

/* "Compressed Clusters Descriptor" */
struct compressed {
	uint64_t offset; /* bytes */
	uint32_t bytes;	 /* at most; ends with a sector */
};
struct compressed qcow2_compressed(const struct qcow2 *q, uint64_t entry);

/* ---- reference counts and free clusters (qcow2-refcount.c); `lock` held ---- */

uint64_t refcount_load(const uint8_t *table, uint64_t index, unsigned order);
int refcount_get(struct qcow2 *q, uint64_t cluster, uint64_t *count);
int refcount_set(struct qcow2 *q, uint64_t cluster, uint64_t count);
/* Takes up to `want` free clusters in a row: at least one, *got of them, from number *first on; their count becomes 1.
 * *fresh: the file reads as zeroes there. */
int clusters_alloc(struct qcow2 *q, uint64_t want, uint64_t *first, uint64_t *got, bool *fresh);
/* Gives back what no table has ever referred to. */
void clusters_unalloc(struct qcow2 *q, uint64_t first, uint64_t count);
/* An entry of an L2 table is about to be overwritten: what it refers to loses a reference with the next flush. */
void entry_release(struct qcow2 *q, uint64_t entry);
void cluster_release(struct qcow2 *q, uint64_t offset);
/* Lowers the counts; the tables on disk must not refer to them any more. Locks by itself, flush_lock is held. */
int released_free(struct qcow2 *q, uint64_t *clusters, size_t count);

/* ---- mapping of guest offsets to clusters (qcow2-map.c); `lock` held ---- */

enum mapping_kind { MAPPED_NOT, MAPPED_ZERO, MAPPED_DATA, MAPPED_COMPRESSED };

struct mapping {
	enum mapping_kind kind;
	uint64_t entry; /* of the first cluster */
	uint64_t host;	/* MAPPED_DATA: where the first byte is */
	uint64_t length;
	bool writable; /* MAPPED_DATA: in place */
};

/* What [offset, offset + length) is mapped to, as far as it is of one kind and in one piece. */
int map_range(struct qcow2 *q, uint64_t offset, uint64_t length, struct mapping *m);
int map_get(struct qcow2 *q, uint64_t offset, uint64_t *entry);
/* map_set needs map_prepare before for the same L2 table: makes a table that may be written, if there is none.
 * alloc_lock is held too. */
int map_prepare(struct qcow2 *q, uint64_t offset);
int map_set(struct qcow2 *q, uint64_t offset, uint64_t entry);

/* ---- whole image ---- */

/* Writes back in the safe order (qcow2-flush.c). */
int qcow2_flush(struct disk *disk);
/* Flushes if much is dirty; no lock may be held. */
int qcow2_throttle(struct qcow2 *q);

/* Walks all tables before the image is used: every reference inside the file, none that would let a write damage
 * another cluster. Repairs counts that are too high, and after a crash of a program with lazy counts those that are too
 * low (qcow2-check.c). */
int qcow2_check(struct qcow2 *q, uint64_t file_length, struct error *err);

/* Guest I/O (qcow2-io.c, qcow2-zero.c). */
int qcow2_read(struct disk *disk, uint64_t offset, struct vector v);
int qcow2_write(struct disk *disk, uint64_t offset, struct vector v);
int qcow2_discard(struct disk *disk, uint64_t offset, uint64_t length);
int qcow2_write_zeroes(struct disk *disk, uint64_t offset, uint64_t length, bool unmap);
