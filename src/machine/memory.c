/* Guest memory: one sealed memfd, mapped in one or two ranges around the hole below 4 GiB, and one for what can be
 * plugged in. */
#include "machine/memory.h"

#include <inttypes.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

#define PAGE_SIZE 4096ull
#define MEMORY_SIZE_MIN (1ull << 20)
#define MEMORY_SIZE_MAX (1ull << 38) /* 256 GiB; the 64-bit PCI window begins at 512 GiB */
#define SLOT_SHIFT_MIN 27
#define HUGE_PAGE_SIZE (2ull << 20)

static int map_range(struct guest_memory *memory, struct memory_range *r, uint64_t gpa, uint64_t offset, uint64_t size,
	struct error *err)
{
	void *host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory->fd, (off_t)offset);

	if (host == MAP_FAILED)
		return error_errno(
			err, "guest memory: mapping %" PRIu64 " MiB (choose a smaller --memory)", size >> 20);
	/* Best effort: fewer host TLB misses; a kernel without huge pages for shared memory refuses. A dump of this
	 * process should not hold the guest's secrets. */
	madvise(host, size, MADV_HUGEPAGE);
	madvise(host, size, MADV_DONTDUMP);
	*r = (struct memory_range){.gpa = gpa, .size = size, .host = host, .offset = offset};
	return 0;
}

/* Behind the RAM that is always there, at a multiple of 4 GiB or of their size: no kernel's unit is larger. */
static void lay_out_slots(struct guest_memory *memory, uint64_t most)
{
	struct memory_slots *s = &memory->slots;
	uint64_t room = most - memory->size, end = MEMORY_HIGH;

	if (memory->size > MEMORY_HOLE)
		end += memory->size - MEMORY_HOLE;
	for (s->shift = SLOT_SHIFT_MIN; room >> s->shift > MEMORY_SLOTS_MAX;)
		s->shift++;
	s->count = (unsigned)(room >> s->shift);
	if (!s->count)
		return;
	s->all.gpa = align_up(end, max(MEMORY_HIGH, 1ull << s->shift));
	s->all.size = (uint64_t)s->count << s->shift;
	s->all.offset = align_up(memory->size, HUGE_PAGE_SIZE); /* so that huge pages fit, and bitmaps of pages */
}

static int create(struct guest_memory *memory, struct error *err)
{
	uint64_t low = min(memory->size, MEMORY_HOLE), all = memory_page_count(memory) * PAGE_SIZE;
	struct memory_range *slots = &memory->slots.all;
	int ret;

	memory->fd = memfd_create("guest-memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (memory->fd < 0)
		return error_errno(err, "guest memory: creating its file");
	if (ftruncate(memory->fd, (off_t)all) < 0)
		return error_errno(err, "guest memory: setting its size to %" PRIu64 " MiB", all >> 20);
	/* Whoever receives the descriptor (migration, vhost-user) cannot shrink it under our mappings: no SIGBUS. */
	if (fcntl(memory->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
		return error_errno(err, "guest memory: sealing its size");
	ret = map_range(memory, &memory->range[0], 0, 0, low, err);
	if (ret)
		return ret;
	memory->ranges = 1;
	if (memory->size > low) {
		ret = map_range(memory, &memory->range[1], MEMORY_HIGH, low, memory->size - low, err);
		if (ret)
			return ret;
		memory->ranges = 2;
	}
	if (slots->size) {
		ret = map_range(memory, slots, slots->gpa, slots->offset, slots->size, err);
		if (ret)
			return ret;
	}
	memory->page_flags = calloc(all / PAGE_SIZE, 1);
	if (!memory->page_flags)
		return error_set(err, ENOMEM, "guest memory: no room for the page flags of %" PRIu64 " MiB", all >> 20);
	return 0;
}

int memory_create_with_slots(struct guest_memory *memory, uint64_t size, uint64_t most, struct error *err)
{
	int ret;

	*memory = (struct guest_memory){.fd = -1, .size = size};
	if (size % PAGE_SIZE || size < MEMORY_SIZE_MIN || size > MEMORY_SIZE_MAX)
		return error_set(err, EINVAL,
			"guest memory: size %" PRIu64 " is not a multiple of 4096 from 1 MiB to 256 GiB", size);
	if (most < size || most > MEMORY_SIZE_MAX)
		return error_set(err, EINVAL,
			"guest memory: it cannot grow from %" PRIu64 " MiB to %" PRIu64 " MiB; give from its size to 256 GiB",
			size >> 20, most >> 20);
	lay_out_slots(memory, most);
	ret = create(memory, err);
	if (ret)
		memory_destroy(memory);
	return ret;
}

int memory_create(struct guest_memory *memory, uint64_t size, struct error *err)
{
	return memory_create_with_slots(memory, size, size, err);
}

void memory_destroy(struct guest_memory *memory)
{
	for (unsigned i = 0; i < memory->ranges; i++)
		munmap(memory->range[i].host, memory->range[i].size);
	if (memory->slots.all.host)
		munmap(memory->slots.all.host, memory->slots.all.size);
	if (memory->fd >= 0)
		close(memory->fd);
	free(memory->page_flags);
	*memory = (struct guest_memory){.fd = -1};
}

/* Is [gpa, gpa + len) in slots that are all plugged? */
static bool all_plugged(const struct guest_memory *memory, uint64_t gpa, uint64_t len)
{
	const struct memory_slots *s = &memory->slots;
	uint64_t at = gpa - s->all.gpa;

	if (gpa < s->all.gpa || at >= s->all.size || len > s->all.size - at)
		return false;
	for (uint64_t slot = at >> s->shift; slot <= (at + max(len, 1ull) - 1) >> s->shift; slot++) {
		if (!(atomic_load_explicit(&s->plugged, memory_order_acquire) >> slot & 1))
			return false;
	}
	return true;
}

/* The range that holds all of [gpa, gpa + len), or NULL. Written so that no sum can overflow. */
static const struct memory_range *find(const struct guest_memory *memory, uint64_t gpa, uint64_t len)
{
	for (unsigned i = 0; i < memory->ranges; i++) {
		const struct memory_range *r = &memory->range[i];

		if (gpa >= r->gpa && gpa - r->gpa <= r->size && len <= r->size - (gpa - r->gpa))
			return r;
	}
	return all_plugged(memory, gpa, len) ? &memory->slots.all : NULL;
}

struct memory_range memory_slot(const struct guest_memory *memory, unsigned slot)
{
	const struct memory_slots *s = &memory->slots;
	uint64_t at = (uint64_t)slot << s->shift;

	return (struct memory_range){.gpa = s->all.gpa + at,
		.size = 1ull << s->shift,
		.host = s->all.host + at,
		.offset = s->all.offset + at};
}

int memory_plug(struct guest_memory *memory, unsigned slot, struct error *err)
{
	struct memory_range range = memory_slot(memory, slot);
	int ret = memory->slot_changes ? memory->slot_changes(memory->opaque, &range, true, err) : 0;

	if (!ret)
		atomic_fetch_or(&memory->slots.plugged, 1ull << slot);
	return ret;
}

void memory_unplug(struct guest_memory *memory, unsigned slot)
{
	struct memory_range range = memory_slot(memory, slot);

	/* Translations of its code go while its pages can still be found. */
	memory_wrote(memory, range.gpa, range.size);
	atomic_fetch_and(&memory->slots.plugged, ~(1ull << slot));
	if (memory->slot_changes)
		memory->slot_changes(memory->opaque, &range, false, NULL);
	/* What a device still has under way to it lands in a page that is zeroed or given back later, at worst. */
	madvise(range.host, range.size, MADV_REMOVE); /* a hole in the file, whose descriptor a jail has closed */
}

const void *memory_for_read(const struct guest_memory *memory, uint64_t gpa, uint64_t len)
{
	const struct memory_range *r = find(memory, gpa, len);

	return r ? r->host + (gpa - r->gpa) : NULL;
}

void *memory_for_write(struct guest_memory *memory, uint64_t gpa, uint64_t len)
{
	const struct memory_range *r = find(memory, gpa, len);

	return r ? r->host + (gpa - r->gpa) : NULL;
}

void memory_wrote(struct guest_memory *memory, uint64_t gpa, uint64_t len)
{
	const struct memory_range *r = find(memory, gpa, len);
	uint64_t at = gpa, end = gpa + len;

	if (!memory->written || !r || !len)
		return;
	/* The engine sets the flag, then reads the code; we wrote the bytes, then read the flag. With a full fence on
	 * both sides at least one of us sees the other. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	while (at < end) {
		uint64_t next = min(align_down(at, PAGE_SIZE) + PAGE_SIZE, end);
		uint64_t page = (at - r->gpa + r->offset) / PAGE_SIZE;

		if (__atomic_load_n(&memory->page_flags[page], __ATOMIC_RELAXED) & MEMORY_PAGE_CODE)
			memory->written(memory->opaque, at, next - at);
		at = next;
	}
}

bool memory_read(const struct guest_memory *memory, uint64_t gpa, void *to, uint64_t len)
{
	const void *from = memory_for_read(memory, gpa, len);

	if (from)
		memcpy(to, from, len);
	return from;
}

bool memory_write(struct guest_memory *memory, uint64_t gpa, const void *from, uint64_t len)
{
	void *to = memory_for_write(memory, gpa, len);

	if (!to)
		return false;
	memcpy(to, from, len);
	memory_wrote(memory, gpa, len);
	return true;
}

int memory_discard(struct guest_memory *memory, uint64_t gpa, uint64_t len)
{
	const struct memory_range *r = find(memory, gpa, len);
	uint64_t from = align_up(gpa, PAGE_SIZE), to = align_down(gpa + len, PAGE_SIZE);

	if (!r)
		return -EFAULT;
	if (from >= to)
		return 0;
	/* The mapping stays, and with it every pointer into it; only the pages behind it go. */
	if (fallocate(memory->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(from - r->gpa + r->offset),
		    (off_t)(to - from)) < 0)
		return -errno;
	memory_wrote(memory, from, to - from);
	return 0;
}
