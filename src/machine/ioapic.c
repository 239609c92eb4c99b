/* The I/O APIC. Polarity is kept but has no effect: devices say "asserted", not a voltage. */
#include "machine/ioapic.h"

#include "base/cleanup.h"
#include "machine/board_internal.h"

/* MMIO registers */
enum { IOREGSEL = 0x00, IOWIN = 0x10, IOEOI = 0x40 };
/* Registers behind IOWIN */
enum { REG_ID = 0, REG_VERSION = 1, REG_ARBITRATION = 2, REG_REDIRECTION = 0x10 };

#define VERSION (0x20 | (IOAPIC_PINS - 1) << 16)

/* Redirection entry */
#define ENTRY_LOGICAL (1u << 11)
#define ENTRY_STATUS (1u << 12)
#define ENTRY_REMOTE_IRR (1u << 14)
#define ENTRY_LEVEL (1u << 15)
#define ENTRY_MASKED (1u << 16)
#define ENTRY_READ_ONLY (ENTRY_STATUS | ENTRY_REMOTE_IRR)
#define ENTRY_WRITABLE 0xff0000000001ffffull

/* Only fixed and lowest priority are level-triggered in effect; the others are always edges (data sheet, 3.2.4). */
static bool entry_is_level(uint64_t entry)
{
	return entry & ENTRY_LEVEL && (entry >> 8 & 7) <= APIC_LOWEST;
}

static void send(struct ioapic *ioapic, unsigned pin, struct wakeups *w)
{
	uint64_t entry = ioapic->redirection[pin];
	const struct apic_message message = {
		.destination = entry >> 56,
		.logical = entry & ENTRY_LOGICAL,
		.mode = entry >> 8 & 7,
		.vector = entry,
		.level = entry_is_level(entry),
	};

	/* Remote IRR says that a local APIC has it and will send an EOI; if none took it there is nothing to wait for.
	 */
	if (lapic_deliver(ioapic->board, &message, w) && message.level)
		ioapic->redirection[pin] |= ENTRY_REMOTE_IRR;
}

/* Sends a level-triggered request that waits for nothing any more. */
static void send_level(struct ioapic *ioapic, unsigned pin, struct wakeups *w)
{
	uint64_t entry = ioapic->redirection[pin];

	if (entry_is_level(entry) && ioapic->lines & 1u << pin && !(entry & (ENTRY_MASKED | ENTRY_REMOTE_IRR)))
		send(ioapic, pin, w);
}

void ioapic_line(struct ioapic *ioapic, unsigned pin, bool level, struct wakeups *w)
{
	uint32_t bit, before;

	if (pin >= IOAPIC_PINS)
		return;
	bit = 1u << pin;
	scope_lock(&ioapic->lock);
	before = ioapic->lines;
	ioapic->lines = level ? before | bit : before & ~bit;
	if (entry_is_level(ioapic->redirection[pin]))
		send_level(ioapic, pin, w);
	/* An edge on a masked input is lost (data sheet, 3.2.4, interrupt mask). */
	else if (level && !(before & bit) && !(ioapic->redirection[pin] & ENTRY_MASKED))
		send(ioapic, pin, w);
}

void ioapic_eoi(struct ioapic *ioapic, uint8_t vector, struct wakeups *w)
{
	scope_lock(&ioapic->lock);
	for (unsigned pin = 0; pin < IOAPIC_PINS; pin++) {
		uint64_t entry = ioapic->redirection[pin];

		if ((uint8_t)entry != vector || !(entry & ENTRY_REMOTE_IRR))
			continue;
		ioapic->redirection[pin] &= ~(uint64_t)ENTRY_REMOTE_IRR;
		send_level(ioapic, pin, w);
	}
}

static void write_redirection(struct ioapic *ioapic, unsigned pin, bool high, uint32_t value, struct wakeups *w)
{
	uint64_t old = ioapic->redirection[pin], entry;

	entry = high ? (uint32_t)old | (uint64_t)value << 32 : (old >> 32 << 32) | value;
	entry = (entry & ENTRY_WRITABLE & ~(uint64_t)ENTRY_READ_ONLY) | (old & ENTRY_READ_ONLY);
	/* Kernels end a stuck level interrupt by making the entry an edge for a moment. */
	if (!entry_is_level(entry))
		entry &= ~(uint64_t)ENTRY_REMOTE_IRR;
	ioapic->redirection[pin] = entry;
	send_level(ioapic, pin, w);
}

static uint32_t window_read(const struct ioapic *ioapic)
{
	unsigned index = ioapic->select - REG_REDIRECTION;

	switch (ioapic->select) {
	case REG_ID:
	case REG_ARBITRATION:
		return ioapic->id;
	case REG_VERSION:
		return VERSION;
	}
	if (ioapic->select < REG_REDIRECTION || index >= 2 * IOAPIC_PINS)
		return 0;
	return ioapic->redirection[index / 2] >> (index & 1 ? 32 : 0);
}

static void window_write(struct ioapic *ioapic, uint32_t value, struct wakeups *w)
{
	unsigned index = ioapic->select - REG_REDIRECTION;

	if (ioapic->select == REG_ID)
		ioapic->id = value & 0x0f000000;
	else if (ioapic->select >= REG_REDIRECTION && index < 2 * IOAPIC_PINS)
		write_redirection(ioapic, index / 2, index & 1, value, w);
}

static uint64_t region_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct ioapic *ioapic = container_of(region, struct ioapic, region);
	scope_lock(&ioapic->lock);

	switch (offset) {
	case IOREGSEL:
		return ioapic->select;
	case IOWIN:
		return window_read(ioapic);
	}
	return 0;
}

static void region_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct ioapic *ioapic = container_of(region, struct ioapic, region);
	struct wakeups w = {0};

	if (offset == IOEOI) {
		ioapic_eoi(ioapic, value, &w);
	} else {
		scope_lock(&ioapic->lock);
		if (offset == IOREGSEL)
			ioapic->select = value;
		else if (offset == IOWIN)
			window_write(ioapic, value, &w);
	}
	board_wake(ioapic->board, &w);
}

static const struct io_ops region_ops = {.read = region_read, .write = region_write};

void ioapic_reset(struct ioapic *ioapic)
{
	scope_lock(&ioapic->lock);
	ioapic->select = 0;
	ioapic->id = 0;
	for (unsigned pin = 0; pin < IOAPIC_PINS; pin++)
		ioapic->redirection[pin] = ENTRY_MASKED;
}

int ioapic_create(struct ioapic *ioapic, struct board *board, struct error *err)
{
	ioapic->board = board;
	ioapic->region =
		(struct io_region){.name = "IOAPIC", .ops = &region_ops, .base = BOARD_IOAPIC_BASE, .size = 0x1000};
	pthread_mutex_init(&ioapic->lock, NULL);
	return space_add(board_mmio(board), &ioapic->region, err);
}

void ioapic_destroy(struct ioapic *ioapic)
{
	if (!ioapic->board)
		return; /* never created */
	pthread_mutex_destroy(&ioapic->lock);
}
