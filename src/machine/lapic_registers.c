/* The local APIC's registers, by memory (xAPIC, SDM volume 3, section 11.4.1) and by MSR (x2APIC, section 11.12). */
#include "base/cleanup.h"
#include "machine/board_internal.h"

#define MSR_APIC_BASE 0x1b
#define MSR_TSC_DEADLINE 0x6e0
#define MSR_X2APIC 0x800

/* Integrated APIC, 6 entries in the vector table, EOI broadcast can be suppressed (SDM 11.4.8). */
#define VERSION (0x14u | (LVT_COUNT - 1) << 16 | 1u << 24)

static uint32_t read_register(struct lapic *l, unsigned number)
{
	switch (number) {
	case LAPIC_ID:
		return lapic_is_x2apic(l) ? l->cpu : l->cpu << 24;
	case LAPIC_VERSION:
		return VERSION;
	case LAPIC_TPR:
		return atomic_load(&l->tpr);
	case LAPIC_APR:
	case LAPIC_PPR:
		return atomic_load(&l->ppr);
	case LAPIC_LDR:
		return atomic_load(&l->ldr);
	case LAPIC_DFR:
		return atomic_load(&l->dfr);
	case LAPIC_SVR:
		return atomic_load(&l->svr);
	case LAPIC_ISR ... LAPIC_ISR + 7:
		return l->isr[number - LAPIC_ISR];
	case LAPIC_TMR ... LAPIC_TMR + 7:
		return l->tmr[number - LAPIC_TMR];
	case LAPIC_IRR ... LAPIC_IRR + 7:
		return l->irr[number - LAPIC_IRR];
	case LAPIC_ESR:
		return l->esr;
	case LAPIC_ICR:
		return l->icr;
	case LAPIC_ICR2:
		return l->icr >> 32;
	case LAPIC_LVT ... LAPIC_LVT + LVT_COUNT - 1:
		return l->lvt[number - LAPIC_LVT];
	case LAPIC_TIMER_INITIAL:
		return l->timer.initial;
	case LAPIC_TIMER_CURRENT:
		return lapic_timer_current(l);
	case LAPIC_TIMER_DIVIDE:
		return l->timer.divide;
	}
	return 0;
}

static void write_svr(struct lapic *l, uint32_t value)
{
	atomic_store(&l->svr, value & (0xff | SVR_ENABLED | SVR_NO_EOI_BROADCAST));
	if (value & SVR_ENABLED)
		return;
	for (unsigned i = 0; i < LVT_COUNT; i++)
		l->lvt[i] |= LVT_MASKED;
}

/* Registers whose effect stays within this APIC. */
static void write_locked(struct lapic *l, unsigned number, uint32_t value, struct wakeups *w)
{
	scope_lock(&l->lock);
	switch (number) {
	case LAPIC_TPR:
		atomic_store(&l->tpr, value);
		break;
	case LAPIC_LDR:
		atomic_store(&l->ldr, value & 0xff000000);
		break;
	case LAPIC_DFR:
		atomic_store(&l->dfr, value | 0x0fffffff);
		break;
	case LAPIC_SVR:
		write_svr(l, value);
		break;
	case LAPIC_ESR:
		l->esr = l->esr_new;
		l->esr_new = 0;
		break;
	case LAPIC_ICR2:
		l->icr = (uint32_t)l->icr | (uint64_t)(value & 0xff000000) << 32;
		break;
	case LAPIC_LVT ... LAPIC_LVT + LVT_COUNT - 1:
		lapic_set_lvt(l, number - LAPIC_LVT, value);
		break;
	case LAPIC_TIMER_INITIAL:
		lapic_timer_set_initial(l, value);
		break;
	case LAPIC_TIMER_DIVIDE:
		lapic_timer_set_divide(l, value);
		break;
	case LAPIC_ID ... LAPIC_VERSION:
	case LAPIC_APR ... LAPIC_PPR:
	case LAPIC_ISR ... LAPIC_IRR + 7:
	case LAPIC_TIMER_CURRENT:
		break; /* read-only */
	default:
		lapic_error(l, ESR_ILLEGAL_REGISTER, w);
	}
	lapic_update(l, w);
}

static uint64_t store_icr(struct lapic *l, uint64_t value, uint64_t keep)
{
	scope_lock(&l->lock);
	/* Delivery is immediate: the status bit never shows. */
	l->icr = (l->icr & keep) | (value & ~(1ull << 12));
	return l->icr;
}

/* ---- xAPIC ---- */

bool lapic_is_mapped_at(const struct lapic *l, uint64_t gpa)
{
	uint64_t base = atomic_load_explicit(&l->base, memory_order_relaxed);

	return (gpa ^ base) <= 0xfff && (base & (APIC_BASE_ENABLED | APIC_BASE_X2APIC)) == APIC_BASE_ENABLED;
}

/* Registers are 32 bits wide at multiples of 16; other accesses are "undefined" (SDM 11.4.1.2) and harmless here. */
uint64_t lapic_mmio_read(struct lapic *l, uint32_t offset, unsigned size)
{
	scope_lock(&l->lock);

	if (offset % 16 >= 4)
		return 0;
	return read_register(l, offset >> 4) >> (8 * (offset % 4));
}

void lapic_mmio_write(struct lapic *l, uint32_t offset, unsigned size, uint64_t value)
{
	unsigned number = offset >> 4;
	struct wakeups w = {0};

	if (offset % 16 || size < 4)
		return;
	if (number == LAPIC_EOI)
		lapic_eoi(l, &w);
	else if (number == LAPIC_ICR)
		lapic_send_ipi(l, store_icr(l, (uint32_t)value, ~0ull << 32), false, &w);
	else
		write_locked(l, number, value, &w);
	board_wake(l->board, &w);
}

/* ---- x2APIC ---- */

/* Bits that must be zero in a written value (SDM table 11-6 and the registers' figures); all ones: not writable. */
static uint64_t reserved_bits(unsigned number)
{
	switch (number) {
	case LAPIC_TPR:
	case LAPIC_SELF_IPI:
		return ~0xffull;
	case LAPIC_SVR:
		return ~(0xffull | SVR_ENABLED | SVR_NO_EOI_BROADCAST | 1 << 9);
	case LAPIC_ICR:
		return 0xfff32000;
	case LAPIC_LVT + LVT_TIMER:
		return ~0x710ffull;
	case LAPIC_LVT + LVT_THERMAL:
	case LAPIC_LVT + LVT_PERFORMANCE:
		return ~0x117ffull;
	case LAPIC_LVT + LVT_LINT0:
	case LAPIC_LVT + LVT_LINT1:
		return ~0x1f7ffull;
	case LAPIC_LVT + LVT_ERROR:
		return ~0x110ffull;
	case LAPIC_TIMER_INITIAL:
		return ~0xffffffffull;
	case LAPIC_TIMER_DIVIDE:
		return ~0xbull;
	}
	/* EOI and ESR take zero alone. */
	return ~0ull;
}

static bool x2apic_is_writable(unsigned number)
{
	switch (number) {
	case LAPIC_TPR:
	case LAPIC_EOI:
	case LAPIC_SVR:
	case LAPIC_ESR:
	case LAPIC_ICR:
	case LAPIC_LVT ... LAPIC_LVT + LVT_COUNT - 1:
	case LAPIC_TIMER_INITIAL:
	case LAPIC_TIMER_DIVIDE:
	case LAPIC_SELF_IPI:
		return true;
	}
	return false;
}

static bool x2apic_is_readable(unsigned number)
{
	switch (number) {
	case LAPIC_ID:
	case LAPIC_VERSION:
	case LAPIC_PPR:
	case LAPIC_LDR:
	case LAPIC_ISR ... LAPIC_IRR + 7:
	case LAPIC_TIMER_CURRENT:
		return true;
	case LAPIC_EOI:
	case LAPIC_SELF_IPI:
		return false;
	}
	return x2apic_is_writable(number);
}

static bool x2apic_read(struct lapic *l, unsigned number, uint64_t *value)
{
	if (!lapic_is_x2apic(l) || !x2apic_is_readable(number))
		return false;
	scope_lock(&l->lock);
	*value = number == LAPIC_ICR ? l->icr : read_register(l, number);
	return true;
}

static bool x2apic_write(struct lapic *l, unsigned number, uint64_t value, struct wakeups *w)
{
	if (!lapic_is_x2apic(l) || !x2apic_is_writable(number) || value & reserved_bits(number))
		return false;
	switch (number) {
	case LAPIC_EOI:
		lapic_eoi(l, w);
		break;
	case LAPIC_ICR:
		lapic_send_ipi(l, store_icr(l, value, 0), true, w);
		break;
	case LAPIC_SELF_IPI: /* an ICR write with the shorthand "self" (SDM 11.12.11) */
		lapic_send_ipi(l, 1 << 18 | value, true, w);
		break;
	default:
		write_locked(l, number, value, w);
	}
	return true;
}

/* ---- MSRs ---- */

/* The modes' state machine (SDM figure 11-27): disabled ↔ xAPIC → x2APIC → disabled. */
static bool write_base(struct lapic *l, uint64_t value, struct wakeups *w)
{
	uint64_t old = atomic_load(&l->base);
	bool was_x2apic = old & APIC_BASE_X2APIC, x2apic = value & APIC_BASE_X2APIC,
	     enabled = value & APIC_BASE_ENABLED;

	if (value & ~(APIC_BASE_ADDRESS | APIC_BASE_BSP | APIC_BASE_X2APIC | APIC_BASE_ENABLED))
		return false;
	if ((x2apic && !enabled) || (was_x2apic && enabled && !x2apic) ||
		(x2apic && !was_x2apic && !(old & APIC_BASE_ENABLED)))
		return false;
	/* A disabled APIC loses its state (SDM 11.4.3). */
	if (!enabled && old & APIC_BASE_ENABLED)
		lapic_reset(l, true);
	scope_lock(&l->lock);
	atomic_store(&l->base, (value & ~(uint64_t)APIC_BASE_BSP) | (old & APIC_BASE_BSP));
	if (x2apic && !was_x2apic) {
		atomic_store(&l->ldr, (l->cpu >> 4) << 16 | 1u << (l->cpu & 15));
		l->icr = (uint32_t)l->icr;
	} else if (!x2apic && was_x2apic) {
		atomic_store(&l->ldr, 0);
	}
	lapic_update(l, w);
	return true;
}

bool lapic_msr_read(struct lapic *l, uint32_t msr, uint64_t *value)
{
	if (msr == MSR_APIC_BASE) {
		*value = atomic_load(&l->base);
		return true;
	}
	if (msr == MSR_TSC_DEADLINE) {
		scope_lock(&l->lock);
		*value = l->timer.tsc_deadline;
		return true;
	}
	return msr - MSR_X2APIC < 0x100 && x2apic_read(l, msr - MSR_X2APIC, value);
}

bool lapic_msr_write(struct lapic *l, uint32_t msr, uint64_t value)
{
	struct wakeups w = {0};
	bool ok = true;

	if (msr == MSR_APIC_BASE)
		ok = write_base(l, value, &w);
	else if (msr == MSR_TSC_DEADLINE)
		lapic_timer_set_tsc_deadline(l, value, &w);
	else
		ok = msr - MSR_X2APIC < 0x100 && x2apic_write(l, msr - MSR_X2APIC, value, &w);
	board_wake(l->board, &w);
	return ok;
}
