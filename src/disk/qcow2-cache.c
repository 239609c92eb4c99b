/* Blocks of L2 tables and refcount blocks in memory. The unit is at most 4 KiB, whatever the cluster size, so that a
 * small cache serves an image of any size. Dirty blocks are never evicted: only a flush may write them, in its order;
 * so the cache grows while much is dirty, and qcow2_throttle keeps that bounded. */
#include "disk/qcow2.h"

#include <stdlib.h>

void cache_init(struct cache *cache, struct image_file *file, uint32_t unit, unsigned limit)
{
	*cache = (struct cache){.file = file, .unit = unit, .limit = limit};
}

void cache_free(struct cache *cache)
{
	for (unsigned i = 0; i < cache->count; i++)
		free(cache->blocks[i]);
	free(cache->blocks);
	cache->blocks = NULL;
	cache->count = 0;
}

static struct cache_block **chain_of(struct cache *cache, uint64_t offset)
{
	return &cache->chains[offset / cache->unit * 0x9e3779b97f4a7c15ull >> 56];
}

static void unchain(struct cache *cache, struct cache_block *block)
{
	struct cache_block **link = chain_of(cache, block->offset);

	while (*link != block)
		link = &(*link)->next;
	*link = block->next;
}

/* A block to read into, in blocks[] but in no chain. NULL: no memory. */
static struct cache_block *take_block(struct cache *cache)
{
	struct cache_block *block;

	if (cache->count >= cache->limit) {
		/* The clock: who was used since the hand passed gets a second turn. */
		for (unsigned i = 0; i < 2 * cache->count; i++) {
			block = cache->blocks[cache->hand];
			cache->hand = (cache->hand + 1) % cache->count;
			if (block->dirty_to || block->writing)
				continue;
			if (!block->used) {
				unchain(cache, block);
				return block;
			}
			block->used = false;
		}
	}
	if (cache->count == cache->room) {
		unsigned room = cache->room ? cache->room * 2 : 16;
		struct cache_block **grown = realloc(cache->blocks, room * sizeof(*grown));

		if (!grown)
			return NULL;
		cache->blocks = grown;
		cache->room = room;
	}
	block = calloc(1, sizeof(*block) + cache->unit);
	if (block)
		cache->blocks[cache->count++] = block;
	return block;
}

int cache_get(struct cache *cache, uint64_t offset, struct cache_block **out)
{
	struct cache_block *block;
	int result;

	offset = align_down(offset, cache->unit);
	for (block = *chain_of(cache, offset); block && block->offset != offset; block = block->next)
		;
	if (!block) {
		block = take_block(cache);
		if (!block)
			return -ENOMEM;
		result = image_file_read(cache->file, offset, block->data, cache->unit);
		/* After a failed read it must be found by nobody: an offset that no table has. */
		block->offset = result < 0 ? UINT64_MAX - cache->unit + 1 : offset;
		block->dirty_from = block->dirty_to = 0;
		block->next = *chain_of(cache, block->offset);
		*chain_of(cache, block->offset) = block;
		if (result < 0)
			return result;
	}
	block->used = true;
	*out = block;
	return 0;
}

void cache_touch(struct cache *cache, struct cache_block *block, uint32_t from, uint32_t to)
{
	if (!block->dirty_to) {
		cache->dirty++;
		block->dirty_from = from;
		block->dirty_to = to;
		return;
	}
	block->dirty_from = min(block->dirty_from, from);
	block->dirty_to = max(block->dirty_to, to);
}

void cache_drop(struct cache *cache, uint64_t offset, uint64_t length)
{
	for (unsigned i = 0; i < cache->count; i++) {
		struct cache_block *block = cache->blocks[i];

		if (block->offset < offset || block->offset - offset >= length)
			continue;
		if (block->dirty_to)
			cache->dirty--;
		unchain(cache, block);
		block->dirty_from = block->dirty_to = 0;
		block->used = false;
		block->offset = UINT64_MAX - cache->unit + 1;
		block->next = *chain_of(cache, block->offset);
		*chain_of(cache, block->offset) = block;
	}
}

int cache_write(struct cache *cache)
{
	for (unsigned i = 0; i < cache->count && cache->dirty; i++) {
		struct cache_block *block = cache->blocks[i];
		int result;

		if (!block->dirty_to)
			continue;
		result = image_file_write(cache->file, block->offset + block->dirty_from,
			block->data + block->dirty_from, block->dirty_to - block->dirty_from);
		if (result < 0)
			return result;
		block->dirty_from = block->dirty_to = 0;
		cache->dirty--;
	}
	return 0;
}
