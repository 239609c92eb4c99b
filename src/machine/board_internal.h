/* The board as its chips see it: what they share, and how an interrupt travels between them.
 *
 * Locks: every chip has one. They nest in this order: serial, pit, cmos, pm → pic, ioapic → one lapic → the loop's. The
 * host's callbacks run without any of them: a chip notes in a struct wakeups what is to be done, the outermost function
 * does it (board_wake) after its lock is released. */
#pragma once

#include "base/util.h"
#include "machine/board.h"
#include "machine/cmos.h"
#include "machine/hotplug.h"
#include "machine/debug_exit.h"
#include "machine/hotplug_pci.h"
#include "machine/i8042.h"
#include "machine/ioapic.h"
#include "machine/lapic.h"
#include "machine/pic.h"
#include "machine/pit.h"
#include "machine/pm.h"
#include "machine/pvpanic.h"
#include "machine/serial.h"
#include "machine/vmgenid.h"

#define BOARD_CPUS_MAX 64

/* What has to be told to which vCPUs (bit n: vCPU n) once no lock is held. */
struct wakeups {
	uint64_t kick; /* something became deliverable */
	uint64_t nmi;
	uint64_t init;
	uint64_t startup; /* at startup_vector */
	uint8_t startup_vector;
};

struct board {
	struct board_config config;
	struct board_host host;
	const struct board_chips *chips; /* of the engine; NULL: our own */
	struct space *pio, *mmio;
	struct pic pic;
	struct ioapic ioapic;
	struct lapic *lapics; /* one per vCPU */
	struct pit pit;
	struct cmos cmos;
	struct pm pm;
	struct i8042 i8042;
	struct pvpanic pvpanic;
	struct debug_exit debug_exit;
	struct vmgenid vmgenid;
	struct serial *serial;
	struct pci_bus *pci;
	struct hotplug_pci hotplug_pci;
	struct hotplug hotplug;
};

/* board_irq for callers that hold a chip's lock: what the level causes at the host is noted in w. */
void board_line(struct board *board, unsigned gsi, bool level, struct wakeups *w);
/* Tells the host; no board lock is held. */
void board_wake(struct board *board, const struct wakeups *w);
/* Tells the host; output that is still on its way goes out before. No board lock is held. */
void board_event(struct board *board, enum board_event event);
/* Claims size ports from base for a chip of the board. */
int board_add_ports(struct board *board, struct io_region *region, const char *name, const struct io_ops *ops,
	uint16_t base, unsigned size, struct error *err);

/* a * b / c without overflow of the product; c is not zero, the result fits. */
static inline uint64_t scale(uint64_t a, uint64_t b, uint64_t c)
{
	return (uint64_t)((unsigned __int128)a * b / c);
}

/* As scale, rounded up. */
static inline uint64_t scale_up(uint64_t a, uint64_t b, uint64_t c)
{
	return (uint64_t)(((unsigned __int128)a * b + c - 1) / c);
}

#define NS_PER_SECOND 1000000000ull
/* No chip's timer may fire more often, whatever the guest programs: the loop serves the whole VM. */
#define TIMER_PERIOD_MIN 20000ull /* ns */

int serial_create(struct serial **serial, struct board *board, uint16_t port, unsigned irq, struct error *err);
void serial_destroy(struct serial *serial); /* gives out what is still buffered; may be NULL */
void serial_reset(struct serial *serial);
