/* Address spaces: a sorted table of regions, read under a sequence counter so that look-up takes no lock. */
#include "machine/space.h"

#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "base/cleanup.h"

/* 31 PCI slots with 6 BARs each and the chips. A table of fixed size needs no reclamation of old tables while somebody
 * may still read them. */
#define SPACE_REGIONS 256

/* base and size are copies: the owner may change its region while it is not in the space. Fields are atomic because a
 * reader may look at them during a change; it then throws away what it saw. */
struct slot {
	_Atomic uint64_t base, size;
	struct io_region *_Atomic region;
};

struct space {
	const char *name;
	uint64_t limit;	      /* addresses are below this */
	pthread_mutex_t lock; /* of those who change the table */
	space_bell_function *bell;
	void *bell_opaque;
	atomic_uint sequence; /* odd during a change */
	atomic_uint count;
	struct slot slots[SPACE_REGIONS]; /* by ascending base, no overlaps */
};

int space_create(struct space **space, const char *name, uint64_t limit, struct error *err)
{
	struct space *s = calloc(1, sizeof(*s));

	if (!s)
		return error_set(err, ENOMEM, "%s space: out of memory", name);
	s->name = name;
	s->limit = limit;
	pthread_mutex_init(&s->lock, NULL);
	*space = s;
	return 0;
}

void space_destroy(struct space *space)
{
	if (!space)
		return;
	pthread_mutex_destroy(&space->lock);
	free(space);
}

void space_use_bells(struct space *space, space_bell_function *bell, void *opaque)
{
	scope_lock(&space->lock);
	space->bell = bell;
	space->bell_opaque = opaque;
}

static void hang_bells(struct space *space, const struct io_region *region, uint64_t base, bool on)
{
	for (unsigned i = 0; space->bell && i < region->bell_count; i++)
		space->bell(space->bell_opaque, base + region->bells[i].offset, region->bells[i].fd, on);
}

static uint64_t slot_base(const struct slot *s)
{
	return atomic_load_explicit(&s->base, memory_order_relaxed);
}

static uint64_t slot_size(const struct slot *s)
{
	return atomic_load_explicit(&s->size, memory_order_relaxed);
}

/* Index of the first slot whose base is above address. Ends also on a table that is being changed. */
static unsigned upper_bound(const struct space *space, uint64_t address)
{
	unsigned low = 0, high = atomic_load_explicit(&space->count, memory_order_relaxed);

	while (low < high) {
		unsigned middle = low + (high - low) / 2;

		if (slot_base(&space->slots[middle]) <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static void copy_slot(struct slot *to, const struct slot *from)
{
	atomic_store_explicit(&to->base, slot_base(from), memory_order_relaxed);
	atomic_store_explicit(&to->size, slot_size(from), memory_order_relaxed);
	atomic_store_explicit(
		&to->region, atomic_load_explicit(&from->region, memory_order_relaxed), memory_order_relaxed);
}

/* Writer's side of the sequence lock; space->lock is held. */
static void change_begin(struct space *space)
{
	atomic_fetch_add_explicit(&space->sequence, 1, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);
}

static void change_end(struct space *space)
{
	atomic_fetch_add_explicit(&space->sequence, 1, memory_order_release);
}

int space_add(struct space *space, struct io_region *region, struct error *err)
{
	scope_lock(&space->lock);
	unsigned count = atomic_load_explicit(&space->count, memory_order_relaxed);
	uint64_t base = region->base, size = region->size;
	unsigned at;

	if (!size || base >= space->limit || size > space->limit - base)
		return error_set(err, EINVAL, "%s space: %s at 0x%" PRIx64 ", size 0x%" PRIx64 ", does not fit",
			space->name, region->name, base, size);
	if (count == SPACE_REGIONS)
		return error_set(err, ENOSPC, "%s space: no room for %s: all %d regions are in use", space->name,
			region->name, SPACE_REGIONS);
	at = upper_bound(space, base);
	for (unsigned i = at ? at - 1 : 0; i <= at && i < count; i++) {
		struct slot *s = &space->slots[i];

		if (base < slot_base(s) + slot_size(s) && slot_base(s) < base + size)
			return error_set(err, EEXIST, "%s space: %s at 0x%" PRIx64 " overlaps %s", space->name,
				region->name, base, atomic_load_explicit(&s->region, memory_order_relaxed)->name);
	}
	change_begin(space);
	for (unsigned i = count; i > at; i--)
		copy_slot(&space->slots[i], &space->slots[i - 1]);
	atomic_store_explicit(&space->slots[at].base, base, memory_order_relaxed);
	atomic_store_explicit(&space->slots[at].size, size, memory_order_relaxed);
	atomic_store_explicit(&space->slots[at].region, region, memory_order_relaxed);
	atomic_store_explicit(&space->count, count + 1, memory_order_relaxed);
	change_end(space);
	region->mapped = true;
	hang_bells(space, region, base, true);
	return 0;
}

void space_remove(struct space *space, struct io_region *region)
{
	scope_lock(&space->lock);
	unsigned count = atomic_load_explicit(&space->count, memory_order_relaxed);
	unsigned at = 0;

	while (at < count && atomic_load_explicit(&space->slots[at].region, memory_order_relaxed) != region)
		at++;
	if (at == count)
		return;
	hang_bells(space, region, slot_base(&space->slots[at]), false);
	change_begin(space);
	for (unsigned i = at; i + 1 < count; i++)
		copy_slot(&space->slots[i], &space->slots[i + 1]);
	atomic_store_explicit(&space->count, count - 1, memory_order_relaxed);
	change_end(space);
	region->mapped = false;
}

/* The region that holds all of [address, address + size), and the offset in it; NULL: none. A look-up that ended just
 * before a removal may still call the region just after it: an owner frees a region only when the vCPUs are stopped. */
static struct io_region *find(struct space *space, uint64_t address, unsigned size, uint64_t *offset)
{
	for (;;) {
		unsigned before = atomic_load_explicit(&space->sequence, memory_order_acquire);
		struct io_region *region = NULL;
		unsigned i;

		if (before & 1) {
			sched_yield();
			continue;
		}
		i = upper_bound(space, address);
		if (i > 0) {
			const struct slot *s = &space->slots[i - 1];
			uint64_t length = slot_size(s);

			*offset = address - slot_base(s);
			if (*offset < length && size <= length - *offset)
				region = atomic_load_explicit(&s->region, memory_order_relaxed);
		}
		atomic_thread_fence(memory_order_acquire);
		if (atomic_load_explicit(&space->sequence, memory_order_relaxed) == before)
			return region;
	}
}

bool space_read(struct space *space, uint64_t address, unsigned size, uint64_t *value)
{
	uint64_t offset;
	struct io_region *region = find(space, address, size, &offset);

	if (!region)
		return false;
	*value = region->ops->read(region, offset, size);
	return true;
}

bool space_write(struct space *space, uint64_t address, unsigned size, uint64_t value)
{
	uint64_t offset;
	struct io_region *region = find(space, address, size, &offset);

	if (!region)
		return false;
	region->ops->write(region, offset, size, value);
	return true;
}
