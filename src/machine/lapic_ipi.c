/* Who receives an interrupt message, and the interrupt command register. */
#include "base/cleanup.h"
#include "machine/board_internal.h"

#define BROADCAST 0xffu
#define BROADCAST_WIDE 0xffffffffu

/* Logical destinations (SDM 11.6.2.2; 11.12.10 for x2APIC). */
static bool matches_logical(const struct lapic *l, const struct apic_message *m)
{
	uint32_t ldr = atomic_load_explicit(&l->ldr, memory_order_relaxed), destination = m->destination;

	/* x2APIC: the cluster in the upper half, one bit per member in the lower one. An 8-bit destination reaches
	 * cluster 0. */
	if (lapic_is_x2apic(l))
		return destination >> 16 == ldr >> 16 && destination & ldr & 0xffff;
	ldr >>= 24;
	if (m->wide && destination > 0xff)
		return false;
	if (atomic_load_explicit(&l->dfr, memory_order_relaxed) >> 28 == 0xf)
		return destination & ldr;
	/* Cluster model: cluster 15 means all of them. */
	return (destination >> 4 == ldr >> 4 || destination >> 4 == 0xf) && destination & ldr & 0xf;
}

/* The set of local APICs a message is for. APIC IDs are vCPU numbers. */
static uint64_t targets(struct board *board, const struct apic_message *m)
{
	unsigned cpus = board->config.cpus;
	uint64_t all = board_hotplug_there(board, BOARD_HOTPLUG_CPU), set = 0;

	if (m->destination == (m->wide ? BROADCAST_WIDE : BROADCAST))
		return all;
	if (!m->logical)
		return m->destination < cpus ? 1ull << m->destination & all : 0;
	for (unsigned i = 0; i < cpus; i++) {
		if (all >> i & 1 && matches_logical(&board->lapics[i], m))
			set |= 1ull << i;
	}
	return set;
}

/* Lowest priority arbitration (SDM 11.6.2.4) among those that can take it; of equals the lowest number. */
static uint64_t lowest_priority(struct board *board, uint64_t set)
{
	unsigned best = BOARD_CPUS_MAX, best_ppr = 256;

	for (uint64_t rest = set; rest; rest &= rest - 1) {
		unsigned cpu = __builtin_ctzll(rest);
		const struct lapic *l = &board->lapics[cpu];
		unsigned ppr = atomic_load_explicit(&l->ppr, memory_order_relaxed) & 0xf0;

		if (atomic_load(&l->svr) & SVR_ENABLED && lapic_is_enabled(l) && ppr < best_ppr) {
			best = cpu;
			best_ppr = ppr;
		}
	}
	return best < BOARD_CPUS_MAX ? 1ull << best : 0;
}

/* Without those whose APIC is globally disabled: they are not on the bus. */
static uint64_t on_bus(struct board *board, uint64_t set)
{
	uint64_t result = 0;

	for (uint64_t rest = set; rest; rest &= rest - 1) {
		unsigned cpu = __builtin_ctzll(rest);

		if (lapic_is_enabled(&board->lapics[cpu]))
			result |= 1ull << cpu;
	}
	return result;
}

static bool send(struct board *board, uint64_t set, const struct apic_message *m, struct wakeups *w)
{
	bool accepted = false;

	set = on_bus(board, set);
	switch (m->mode) {
	case APIC_LOWEST:
		set = lowest_priority(board, set);
		/* fall through */
	case APIC_FIXED:
		for (uint64_t rest = set; rest; rest &= rest - 1)
			accepted |= lapic_accept(&board->lapics[__builtin_ctzll(rest)], m->vector, m->level, w);
		return accepted;
	case APIC_NMI:
		w->nmi |= set;
		break;
	case APIC_INIT:
		for (uint64_t rest = set; rest; rest &= rest - 1)
			lapic_reset(&board->lapics[__builtin_ctzll(rest)], true);
		w->init |= set;
		break;
	case APIC_STARTUP:
		w->startup |= set;
		w->startup_vector = m->vector;
		break;
	default:
		/* SMI: there is no system management mode. ExtINT: the 8259 reaches the boot processor by LINT0 alone.
		 */
		return false;
	}
	return set;
}

bool lapic_deliver(struct board *board, const struct apic_message *m, struct wakeups *w)
{
	return send(board, targets(board, m), m, w);
}

void lapic_send_ipi(struct lapic *l, uint64_t icr, bool wide, struct wakeups *w)
{
	struct board *board = l->board;
	struct apic_message m = {
		.destination = wide ? icr >> 32 : icr >> 56,
		.wide = wide,
		.logical = icr & 1 << 11,
		.mode = icr >> 8 & 7,
		.vector = icr,
		/* IPIs are edges whatever the trigger bit says (SDM 11.6.1). */
	};
	uint64_t self = 1ull << l->cpu, all, set;

	/* INIT de-assert means nothing since the Pentium 4 (SDM 11.6.1), but kernels still send it. */
	if (m.mode == APIC_INIT && icr & 1 << 15 && !(icr & 1 << 14))
		return;
	if ((m.mode == APIC_FIXED || m.mode == APIC_LOWEST) && m.vector < 16) {
		scope_lock(&l->lock);
		lapic_error(l, ESR_SEND_ILLEGAL_VECTOR, w);
		return;
	}
	all = targets(board, &(struct apic_message){.destination = BROADCAST});
	switch (icr >> 18 & 3) {
	case 1:
		set = self;
		break;
	case 2:
		set = all;
		break;
	case 3:
		set = all & ~self;
		break;
	default:
		set = targets(board, &m);
	}
	/* INIT and SIPI to oneself are not valid (SDM table 11-4). */
	if (m.mode == APIC_INIT || m.mode == APIC_STARTUP)
		set &= ~self;
	send(board, set, &m, w);
}

unsigned lapic_send_to(struct board *board, uint64_t set, uint32_t icr, struct wakeups *w)
{
	const struct apic_message m = {.mode = icr >> 8 & 7, .vector = icr};

	set &= targets(board, &(struct apic_message){.destination = BROADCAST});
	if ((m.mode == APIC_FIXED || m.mode == APIC_LOWEST) && m.vector < 16)
		return 0;
	send(board, set, &m, w);
	return (unsigned)__builtin_popcountll(set);
}
