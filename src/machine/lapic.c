/* The local APIC's core: what is requested, in service and deliverable; reset. */
#include "machine/lapic.h"

#include <string.h>

#include "base/cleanup.h"
#include "machine/board_internal.h"

/* The highest vector whose bit is set, or -1. */
static int highest(const uint32_t bits[8])
{
	for (int i = 7; i >= 0; i--) {
		if (bits[i])
			return i * 32 + 31 - __builtin_clz(bits[i]);
	}
	return -1;
}

static void set_bit(uint32_t bits[8], uint8_t vector, bool value)
{
	uint32_t bit = 1u << (vector & 31);

	bits[vector >> 5] = value ? bits[vector >> 5] | bit : bits[vector >> 5] & ~bit;
}

/* SDM 11.8.3.1: the processor priority is that of the task or of the interrupt in service, whichever class is higher; a
 * request is delivered when its class is above. */
void lapic_update(struct lapic *l, struct wakeups *w)
{
	int request = highest(l->irr), service = highest(l->isr);
	uint8_t tpr = atomic_load(&l->tpr), ppr = tpr;
	uint32_t lint0 = l->lvt[LVT_LINT0];
	bool enabled = lapic_is_enabled(l), extint, pending;

	if (service >= 0 && (service & 0xf0) > (tpr & 0xf0))
		ppr = service & 0xf0;
	atomic_store(&l->ppr, ppr);

	pending = enabled && request >= 0 && (request & 0xf0) > (ppr & 0xf0);
	/* While an end is on offer a request below what seems in service may be deliverable: the vCPU has to look. */
	if (w && ((pending && !atomic_load(&l->pending)) || (enabled && request >= 0 && l->eoi_offered)))
		w->kick |= 1ull << l->cpu;
	atomic_store(&l->pending, pending);

	/* With the APIC globally disabled the LINT0 pin is the processor's INTR pin (SDM 11.4.3). */
	extint = !enabled || (!(lint0 & LVT_MASKED) && (lint0 >> 8 & 7) == APIC_EXTINT);
	if (extint != atomic_load(&l->extint)) {
		atomic_store(&l->extint, extint);
		/* Pairs with lapic_extint_raised: INTR and this flag change independently, one of the two sees both. */
		if (extint && l->cpu == 0 && atomic_load(&l->board->pic.output) && w)
			w->kick |= 1;
	}
}

void lapic_extint_raised(struct lapic *l, struct wakeups *w)
{
	if (atomic_load(&l->extint))
		w->kick |= 1ull << l->cpu;
}

/* A fixed interrupt arrives. The lock is held. */
static bool accept_locked(struct lapic *l, uint8_t vector, bool level, struct wakeups *w)
{
	/* Software-disabled: only INIT, NMI, SMI and SIPI are answered (SDM 11.4.7.2). */
	if (!lapic_is_enabled(l) || !(atomic_load(&l->svr) & SVR_ENABLED))
		return false;
	if (vector < 16) {
		lapic_error(l, ESR_RECEIVE_ILLEGAL_VECTOR, w);
		return false;
	}
	set_bit(l->irr, vector, true);
	set_bit(l->tmr, vector, level);
	lapic_update(l, w);
	return true;
}

bool lapic_accept(struct lapic *l, uint8_t vector, bool level, struct wakeups *w)
{
	scope_lock(&l->lock);
	return accept_locked(l, vector, level, w);
}

int lapic_acknowledge(struct lapic *l)
{
	scope_lock(&l->lock);
	int vector = highest(l->irr);

	if (!atomic_load(&l->pending))
		return -1;
	set_bit(l->irr, vector, false);
	set_bit(l->isr, vector, true);
	lapic_update(l, NULL);
	return vector;
}

void lapic_set_tpr(struct lapic *l, uint8_t tpr, struct wakeups *w)
{
	scope_lock(&l->lock);
	atomic_store(&l->tpr, tpr);
	lapic_update(l, w);
}

/* SDM 11.8.5. The vector whose end the IOAPIC must hear of, or -1. Takes the lock. */
static int end_of_interrupt(struct lapic *l, struct wakeups *w)
{
	scope_lock(&l->lock);
	int vector = highest(l->isr);

	if (vector < 0)
		return -1;
	set_bit(l->isr, vector, false);
	lapic_update(l, w);
	if (!(l->tmr[vector >> 5] & 1u << (vector & 31)) || atomic_load(&l->svr) & SVR_NO_EOI_BROADCAST)
		return -1;
	return vector;
}

void lapic_eoi(struct lapic *l, struct wakeups *w)
{
	int vector = end_of_interrupt(l, w);

	/* Without our lock: the IOAPIC may deliver to us at once. */
	if (vector >= 0)
		ioapic_eoi(&l->board->ioapic, vector, w);
}

bool lapic_eoi_offer(struct lapic *l)
{
	scope_lock(&l->lock);
	int vector = highest(l->isr);

	/* Not where somebody waits for the end: a request of lower priority, or the IOAPIC for a level. */
	l->eoi_offered = vector >= 0 && highest(l->irr) < 0 && !(l->tmr[vector >> 5] & 1u << (vector & 31));
	return l->eoi_offered;
}

void lapic_eoi_settle(struct lapic *l, bool ended, struct wakeups *w)
{
	{
		scope_lock(&l->lock);
		if (!l->eoi_offered) /* an INIT came between */
			return;
		l->eoi_offered = false;
	}
	if (ended)
		lapic_eoi(l, w);
}

/* An interrupt of the local vector table (SDM 11.5.1). */
void lapic_raise_lvt(struct lapic *l, enum lapic_lvt which, struct wakeups *w)
{
	uint32_t lvt = l->lvt[which];

	if (lvt & LVT_MASKED || !lapic_is_enabled(l))
		return;
	switch (lvt >> 8 & 7) {
	case APIC_FIXED:
		accept_locked(l, lvt, false, w);
		break;
	case APIC_NMI:
		w->nmi |= 1ull << l->cpu;
		break;
	}
}

/* SDM 11.5.3 */
void lapic_error(struct lapic *l, uint32_t bit, struct wakeups *w)
{
	bool fresh = !(l->esr_new & bit);

	l->esr_new |= bit;
	/* The error entry may itself have an illegal vector: that error is not reported a second time. */
	if (fresh)
		lapic_raise_lvt(l, LVT_ERROR, w);
}

void lapic_set_lvt(struct lapic *l, enum lapic_lvt which, uint32_t value)
{
	/* Vector, delivery mode where there is a choice, polarity and trigger of the pins, mask, timer mode. */
	static const uint32_t writable[LVT_COUNT] = {
		[LVT_TIMER] = 0x700ff,
		[LVT_THERMAL] = 0x107ff,
		[LVT_PERFORMANCE] = 0x107ff,
		[LVT_LINT0] = 0x1a7ff,
		[LVT_LINT1] = 0x1a7ff,
		[LVT_ERROR] = 0x100ff,
	};

	value &= writable[which];
	if (!(atomic_load(&l->svr) & SVR_ENABLED))
		value |= LVT_MASKED;
	if (which == LVT_TIMER)
		lapic_timer_mode_changes(l, value);
	l->lvt[which] = value;
}

void lapic_reset(struct lapic *l, bool init)
{
	scope_lock(&l->lock);
	uint64_t base = atomic_load(&l->base);

	/* An INIT leaves IA32_APIC_BASE and with it the mode alone (SDM 11.4.7.3, 11.12.5.1). */
	if (!init) {
		base = BOARD_LAPIC_BASE | APIC_BASE_ENABLED | (l->cpu == 0 ? APIC_BASE_BSP : 0);
		atomic_store(&l->base, base);
	}
	memset(l->irr, 0, sizeof(l->irr));
	memset(l->isr, 0, sizeof(l->isr));
	memset(l->tmr, 0, sizeof(l->tmr));
	l->eoi_offered = false;
	atomic_store(&l->tpr, 0);
	atomic_store(&l->svr, 0xff);
	atomic_store(&l->dfr, 0xffffffff);
	atomic_store(&l->ldr, base & APIC_BASE_X2APIC ? (l->cpu >> 4) << 16 | 1u << (l->cpu & 15) : 0);
	l->esr = l->esr_new = 0;
	l->icr = 0;
	for (unsigned i = 0; i < LVT_COUNT; i++)
		l->lvt[i] = LVT_MASKED;
	/* As firmware leaves the boot processor: virtual wire mode, the 8259 through LINT0 (MultiProcessor
	 * Specification 1.4, section 3.6.2.2). Here also before the APIC is software-enabled, since no firmware runs.
	 */
	if (l->cpu == 0)
		l->lvt[LVT_LINT0] = APIC_EXTINT << 8;
	lapic_timer_reset(l);
	lapic_update(l, NULL);
}

void lapic_create(struct lapic *l, struct board *board, unsigned cpu)
{
	*l = (struct lapic){.board = board, .cpu = cpu};
	pthread_mutex_init(&l->lock, NULL);
	l->timer.loop.function = lapic_timer_fired;
	lapic_reset(l, false);
}

void lapic_destroy(struct lapic *l)
{
	loop_timer_cancel(l->board->config.loop, &l->timer.loop);
	pthread_mutex_destroy(&l->lock);
}
