/* The local APIC's timer: one-shot, periodic and TSC deadline (SDM volume 3, section 11.5.4), on the board's loop. */
#include "base/cleanup.h"
#include "base/util.h"
#include "machine/board_internal.h"

/* Timer modes, bits 17 and 18 of the table entry */
enum { ONE_SHOT, PERIODIC, TSC_DEADLINE };

/* A deadline this far away is as good as never; keeps sums from overflowing. */
#define FAR_AWAY (1ull << 60)

static unsigned mode(uint32_t lvt)
{
	return lvt >> 17 & 3;
}

/* Divide configuration register: bits 0, 1 and 3 are log2 of the divisor less one; 7 means 1 (SDM figure 11-10). */
static unsigned divisor(const struct lapic *l)
{
	unsigned code = (l->timer.divide & 3) | (l->timer.divide >> 1 & 4);

	return 1u << ((code + 1) & 7);
}

static void stop(struct lapic *l)
{
	if (l->timer.deadline)
		loop_timer_cancel(l->board->config.loop, &l->timer.loop);
	l->timer.deadline = 0;
}

static void arm(struct lapic *l, uint64_t deadline)
{
	l->timer.deadline = deadline;
	loop_timer_set(l->board->config.loop, &l->timer.loop, deadline);
}

/* Starts counting `ticks` down from now; later periods are whole initial counts. */
static void start(struct lapic *l, uint32_t ticks)
{
	uint64_t now = clock_now(), length = (uint64_t)ticks * divisor(l);

	l->timer.period = max((uint64_t)l->timer.initial * divisor(l), TIMER_PERIOD_MIN);
	if (!ticks)
		stop(l);
	else
		arm(l, now + (mode(l->lvt[LVT_TIMER]) == PERIODIC ? max(length, TIMER_PERIOD_MIN) : length));
}

void lapic_timer_fired(struct loop_timer *timer)
{
	struct lapic *l = container_of(timer, struct lapic, timer.loop);
	struct wakeups w = {0};
	uint64_t now = clock_now();

	{
		scope_lock(&l->lock);
		/* Stopped, or set anew, after this call had begun. */
		if (!l->timer.deadline || now < l->timer.deadline)
			return;
		if (mode(l->lvt[LVT_TIMER]) == PERIODIC) {
			/* From the deadline, not from now: no drift. Periods we came too late for would only have found
			 * their bit in IRR set. */
			uint64_t missed = (now - l->timer.deadline) / l->timer.period;

			arm(l, l->timer.deadline + (missed + 1) * l->timer.period);
		} else {
			l->timer.deadline = l->timer.tsc_deadline = 0;
		}
		lapic_raise_lvt(l, LVT_TIMER, &w);
	}
	board_wake(l->board, &w);
}

void lapic_timer_reset(struct lapic *l)
{
	stop(l);
	l->timer.initial = l->timer.divide = 0;
	l->timer.period = l->timer.tsc_deadline = 0;
}

bool lapic_timer_in_tsc_mode(const struct lapic *l)
{
	return mode(l->lvt[LVT_TIMER]) == TSC_DEADLINE;
}

void lapic_timer_mode_changes(struct lapic *l, uint32_t value)
{
	/* Entering or leaving TSC deadline mode disarms the timer (SDM 11.5.4.1). */
	if (lapic_timer_in_tsc_mode(l) != (mode(value) == TSC_DEADLINE)) {
		stop(l);
		l->timer.initial = 0;
		l->timer.tsc_deadline = 0;
	}
}

void lapic_timer_set_initial(struct lapic *l, uint32_t value)
{
	if (lapic_timer_in_tsc_mode(l))
		return;
	l->timer.initial = value;
	start(l, value);
}

void lapic_timer_set_divide(struct lapic *l, uint32_t value)
{
	uint32_t left = lapic_timer_current(l);

	l->timer.divide = value & 0xb;
	/* What is left goes on at the new speed. */
	if (l->timer.deadline && !lapic_timer_in_tsc_mode(l))
		start(l, left);
}

uint32_t lapic_timer_current(struct lapic *l)
{
	uint64_t now = clock_now(), left;

	if (!l->timer.deadline || lapic_timer_in_tsc_mode(l))
		return 0;
	if (now < l->timer.deadline)
		left = l->timer.deadline - now;
	else if (mode(l->lvt[LVT_TIMER]) != PERIODIC)
		return 0;
	else /* the loop is late */
		left = l->timer.period - (now - l->timer.deadline) % l->timer.period;
	return min((left + divisor(l) - 1) / divisor(l), (uint64_t)l->timer.initial);
}

void lapic_timer_set_tsc_deadline(struct lapic *l, uint64_t value, struct wakeups *w)
{
	const struct board_config *config = &l->board->config;
	uint64_t tsc = config->tsc_now(l->board->host.opaque, l->cpu), now = clock_now();
	unsigned __int128 wait;

	scope_lock(&l->lock);
	/* In the other modes the MSR reads zero and writes are ignored (SDM 11.5.4.1). */
	if (!lapic_timer_in_tsc_mode(l))
		return;
	if (value <= tsc) {
		stop(l);
		l->timer.tsc_deadline = 0;
		/* Zero disarms; a deadline that has passed is due now. */
		if (value)
			lapic_raise_lvt(l, LVT_TIMER, w);
		return;
	}
	l->timer.tsc_deadline = value;
	/* Rounded up: at the interrupt the guest's TSC has reached the deadline. */
	wait = ((unsigned __int128)(value - tsc) * NS_PER_SECOND + config->tsc_hz - 1) / config->tsc_hz;
	arm(l, now + (uint64_t)min(wait, (unsigned __int128)FAR_AWAY));
}
