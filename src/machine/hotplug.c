/* Hot plug of vCPUs and memory: see hotplug.h. */
#include "machine/hotplug.h"

#include "base/cleanup.h"
#include "machine/board_internal.h"

enum { THERE = 0, ADDED = 8, LEAVING = 16, EJECT = 24, STATUS = 28 };

/* Source events and status of _OST (ACPI 6.4, tables 6.61 to 6.65) */
enum { EVENT_EJECT_REQUEST = 3, EVENT_EJECTION = 0x103, STATUS_SUCCESS = 0, STATUS_IN_PROGRESS = 0x84 };

static uint64_t registers_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct hotplug *h = container_of(region, struct hotplug, region);
	const struct hotplug_kind *k = &h->kind[offset / HOTPLUG_KIND_PORTS];
	unsigned shift = offset & 4 ? 32 : 0;
	scope_lock(&h->lock);

	if (size != 4)
		return 0;
	switch (offset % HOTPLUG_KIND_PORTS & ~4u) {
	case THERE:
		return (uint32_t)(k->there >> shift);
	case ADDED:
		return (uint32_t)(k->added >> shift);
	case LEAVING:
		return (uint32_t)(k->leaving >> shift);
	}
	return 0;
}

/* The guest lets go of number n, whether somebody asked or not. What is not there, and vCPU 0, cannot go. */
static bool eject(struct hotplug *h, enum board_hotplug kind, uint64_t n)
{
	struct hotplug_kind *k = &h->kind[kind];
	uint64_t bit;
	scope_lock(&h->lock);

	if (n >= 64 || (kind == BOARD_HOTPLUG_CPU && n == 0))
		return false;
	bit = 1ull << n;
	k->leaving &= ~bit;
	k->added &= ~bit;
	return atomic_fetch_and(&k->there, ~bit) & bit;
}

/* What has become of an ejection; _OST reports on additions too, which nobody waits for. */
static bool is_refusal(uint64_t value)
{
	unsigned event = value >> 16 & 0xffff, status = value >> 8 & 0xff;

	return (event == EVENT_EJECT_REQUEST || event == EVENT_EJECTION) && status != STATUS_SUCCESS &&
	       status != STATUS_IN_PROGRESS;
}

static void registers_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct hotplug *h = container_of(region, struct hotplug, region);
	const struct board_host *host = &h->board->host;
	enum board_hotplug kind = offset / HOTPLUG_KIND_PORTS;
	unsigned at = offset % HOTPLUG_KIND_PORTS;

	if (size != 4 || !host->hotplug)
		return;
	if (at == EJECT) {
		if (!eject(h, kind, value))
			return;
		if (kind == BOARD_HOTPLUG_CPU) /* its timer too */
			lapic_reset(&h->board->lapics[value], false);
		host->hotplug(host->opaque, kind, (unsigned)value, BOARD_HOTPLUG_GONE);
	} else if (at == STATUS) {
		if (is_refusal(value) && (value & 0xff) < 64)
			host->hotplug(host->opaque, kind, value & 0xff, BOARD_HOTPLUG_REFUSED);
	} else if (at >= ADDED) {
		scope_lock(&h->lock);
		uint64_t *set = at < LEAVING ? &h->kind[kind].added : &h->kind[kind].leaving;

		*set &= ~(value << (at & 4 ? 32 : 0));
	}
}

static const struct io_ops ops = {.read = registers_read, .write = registers_write};

int hotplug_create(struct hotplug *h, struct board *board, struct error *err)
{
	unsigned cpus = board->config.cpus_there;

	h->board = board;
	pthread_mutex_init(&h->lock, NULL);
	h->kind[BOARD_HOTPLUG_CPU].there = cpus >= 64 ? ~0ull : (1ull << cpus) - 1;
	return board_add_ports(board, &h->region, "hot plug", &ops, BOARD_PORT_HOTPLUG, HOTPLUG_PORTS, err);
}

void hotplug_destroy(struct hotplug *h)
{
	if (h->board)
		pthread_mutex_destroy(&h->lock);
}

/* What is there stays; the kernel that starts finds it so. */
void hotplug_reset(struct hotplug *h)
{
	scope_lock(&h->lock);
	for (unsigned i = 0; i < HOTPLUG_KINDS; i++)
		h->kind[i].added = h->kind[i].leaving = 0;
}

uint64_t board_hotplug_there(struct board *board, enum board_hotplug kind)
{
	return atomic_load(&board->hotplug.kind[kind].there);
}

bool board_cpus_can_change(struct board *board)
{
	return board->config.cpus_change;
}

static void tell(struct board *board, enum board_hotplug kind)
{
	board_gpe(board, kind == BOARD_HOTPLUG_CPU ? BOARD_GPE_CPU : BOARD_GPE_MEMORY);
}

void board_hotplug_add(struct board *board, enum board_hotplug kind, unsigned n)
{
	struct hotplug *h = &board->hotplug;

	{
		scope_lock(&h->lock);
		h->kind[kind].added |= 1ull << n;
		h->kind[kind].leaving &= ~(1ull << n);
		atomic_fetch_or(&h->kind[kind].there, 1ull << n);
	}
	tell(board, kind);
}

void board_hotplug_ask_removal(struct board *board, enum board_hotplug kind, unsigned n)
{
	struct hotplug *h = &board->hotplug;

	{
		scope_lock(&h->lock);
		h->kind[kind].leaving |= 1ull << n & h->kind[kind].there;
	}
	tell(board, kind);
}
