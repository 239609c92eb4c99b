/* Guest memory and the one gateway to it: (guest address, length, direction), which can fail. Below MEMORY_HOLE and from
 * 4 GiB up, one sealed memfd. Nothing outside this file turns a guest address into a pointer.
 */
#pragma once

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

struct guest_memory {
	int fd;
	uint64_t size;
	unsigned ranges;
	struct memory_range range[2];
	uint8_t *page_flags; /* size >> 12 entries; engines use atomic operations on them */
	void (*written)(void *opaque, uint64_t gpa, uint64_t len);
	void *opaque;
};

/* size: a multiple of 4096, at least 1 MiB. */
int memory_create(struct guest_memory *memory, uint64_t size, struct error *err);
void memory_destroy(struct guest_memory *memory);

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
	return NULL;
}
