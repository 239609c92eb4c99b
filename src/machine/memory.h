/* Guest memory and the one gateway to it: (guest address, length, direction), which can fail. Below MEMORY_HOLE and from
 * 4 GiB up, one sealed memfd; above that slots, into which more memory can be plugged while the guest runs. Nothing outside this file turns a guest address into a pointer.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define MEMORY_HOLE 0xc0000000ull   /* RAM below ends here at most: 3 GiB */
#define MEMORY_HIGH 0x100000000ull  /* the rest of RAM begins here */

struct memory_range {
	uint64_t gpa, size;
	uint8_t *host;	 /* mapped read-write, shared, from fd */
	uint64_t offset; /* in fd */
};

/* Per page (gpa >> 12 within a range, indexed by memfd offset >> 12): bit 0 is set by an engine while it holds
 * translations of that page's code; a write through the gateway then calls written(). */
#define MEMORY_PAGE_CODE 1

/* Memory that can come and go: up to 64 slots of one size, one after the other in guest addresses and in the file. All of
 * it is mapped from the beginning, so a host address stays valid whatever happens; what is not plugged is not RAM and
 * takes no room. */
#define MEMORY_SLOTS_MAX 64

struct memory_slots {
	struct memory_range all; /* from the first slot to the end of the last; size 0: none */
	unsigned count, shift;	 /* 1 << shift bytes each */
	_Atomic uint64_t plugged;
};

struct guest_memory {
	int fd;
	uint64_t size; /* of range[] */
	unsigned ranges;
	struct memory_range range[2];
	struct memory_slots slots;
	uint8_t *page_flags; /* memory_page_count() entries; engines use atomic operations on them */
	void (*written)(void *opaque, uint64_t gpa, uint64_t len);
	/* An engine that keeps host addresses, or tells them to somebody, learns of slots: before memory comes (a failure
	 * refuses it) and after it has gone. On the loop's thread. May be NULL. */
	int (*slot_changes)(void *opaque, const struct memory_range *slot, bool comes, struct error *err);
	void *opaque;
};

/* size: a multiple of 4096, at least 1 MiB. */
int memory_create(struct guest_memory *memory, uint64_t size, struct error *err);
/* It can grow to `most` by slots, which are as small as 64 of them allow (a power of two, 128 MiB at least: what Linux
 * adds and removes at a time); the last bytes that fill no slot are left out. */
int memory_create_with_slots(struct guest_memory *memory, uint64_t size, uint64_t most, struct error *err);
void memory_destroy(struct guest_memory *memory);

/* A slot that is not plugged becomes RAM (zeroes); one that is plugged goes, with all that it holds. On the loop's thread,
 * and only when the guest does not use it any more. */
int memory_plug(struct guest_memory *memory, unsigned slot, struct error *err);
void memory_unplug(struct guest_memory *memory, unsigned slot);
struct memory_range memory_slot(const struct guest_memory *memory, unsigned slot);

/* The host address of [gpa, gpa + len), or NULL when not all of it is RAM, contiguous in one range. Reading only; for
 * writing use memory_for_write and, when the bytes have been put there, memory_wrote. */
const void *memory_for_read(const struct guest_memory *memory, uint64_t gpa, uint64_t len);
void *memory_for_write(struct guest_memory *memory, uint64_t gpa, uint64_t len);
void memory_wrote(struct guest_memory *memory, uint64_t gpa, uint64_t len);

/* Copies; false, and nothing copied, when not all of the range is RAM. */
bool memory_read(const struct guest_memory *memory, uint64_t gpa, void *to, uint64_t len);
bool memory_write(struct guest_memory *memory, uint64_t gpa, const void *from, uint64_t len);

/* Gives the whole pages of [gpa, gpa + len) back to the host: they read as zeroes until the guest writes to them again.
 * Host addresses of them stay valid. -EFAULT when not all of the range is RAM, else what fallocate(2) says. */
int memory_discard(struct guest_memory *memory, uint64_t gpa, uint64_t len);

/* Pages in the file: those of range[], a gap up to a multiple of 2 MiB, then those of all slots. */
static inline uint64_t memory_page_count(const struct guest_memory *memory)
{
	const struct memory_range *slots = &memory->slots.all;

	return (slots->size ? slots->offset + slots->size : memory->size) >> 12;
}

static inline bool memory_is_plugged(const struct guest_memory *memory, uint64_t gpa)
{
	const struct memory_slots *s = &memory->slots;

	return gpa - s->all.gpa < s->all.size &&
	       atomic_load_explicit(&s->plugged, memory_order_acquire) >> ((gpa - s->all.gpa) >> s->shift) & 1;
}

/* The RAM page that holds gpa: its host address and its index into page_flags; NULL when gpa is not RAM. */
static inline uint8_t *memory_page(const struct guest_memory *memory, uint64_t gpa, uint64_t *index)
{
	for (unsigned i = 0; i < memory->ranges; i++) {
		const struct memory_range *r = &memory->range[i];
		uint64_t page = gpa & ~0xfffull;

		if (page >= r->gpa && page - r->gpa < r->size) {
			*index = (page - r->gpa + r->offset) >> 12;
			return r->host + (page - r->gpa);
		}
	}
	if (memory_is_plugged(memory, gpa)) {
		uint64_t offset = (gpa & ~0xfffull) - memory->slots.all.gpa;

		*index = (memory->slots.all.offset + offset) >> 12;
		return memory->slots.all.host + offset;
	}
	return NULL;
}
