/* The 8254. Nothing counts: a counter's value is computed from the time since it was loaded. A new count takes effect
 * at once also in modes 2 and 3, where the chip would end the current period first. */
#include "machine/pit.h"

#include "base/cleanup.h"
#include "base/util.h"
#include "machine/board_internal.h"

#define TIMER_PERIOD_MIN_TICKS 24 /* TIMER_PERIOD_MIN */

static uint64_t ticks_since_load(const struct pit_channel *c, uint64_t now)
{
	return c->running ? scale(now - c->start, PIT_HZ, NS_PER_SECOND) : c->elapsed;
}

/* Level of the OUT pin (data sheet, "Mode definitions"). */
static bool output(const struct pit_channel *c, uint64_t now)
{
	uint64_t t = ticks_since_load(c, now);

	if (!c->loaded)
		return c->mode != 0;
	switch (c->mode) {
	case 0: /* interrupt on terminal count */
	case 1: /* hardware one-shot: low from the trigger to the end */
		return t >= c->count;
	case 2: /* rate generator: low for the last tick of a period */
		return !c->gate || t % c->count != c->count - 1;
	case 3: /* square wave */
		return !c->gate || t % c->count < (c->count + 1) / 2;
	default: /* software and hardware triggered strobe: low for one tick at the end */
		return t != c->count;
	}
}

/* The counting element as the guest reads it. */
static uint16_t counter(const struct pit_channel *c, uint64_t now)
{
	uint64_t t = ticks_since_load(c, now);
	uint32_t wrap = c->bcd ? 10000 : 65536, value;

	if (c->mode == 2)
		value = c->count - t % c->count;
	else if (c->mode == 3) /* counts down by two, twice a period */
		value = c->count - (2 * (t % c->count)) % c->count;
	else /* goes on below zero */
		value = (c->count + wrap - t % wrap) % wrap;
	if (!c->bcd)
		return value;
	return value / 1000 % 10 << 12 | value / 100 % 10 << 8 | value / 10 % 10 << 4 | value % 10;
}

static uint32_t decode_count(const struct pit_channel *c, uint16_t written)
{
	uint32_t decimal =
		(written >> 12) * 1000 + (written >> 8 & 15) * 100 + (written >> 4 & 15) * 10 + (written & 15);

	if (!c->bcd)
		return written ? written : 65536;
	return written ? decimal : 10000;
}

/* ---- channel 0's interrupt ---- */

static bool is_periodic(const struct pit_channel *c)
{
	return c->mode == 2 || c->mode == 3;
}

/* Sets the timer for the next rising edge; the lock is held. */
static void schedule(struct pit *pit)
{
	struct pit_channel *c = &pit->channel[0];

	if (!pit->next_tick)
		loop_timer_cancel(pit->board->config.loop, &pit->timer);
	else
		loop_timer_set(pit->board->config.loop, &pit->timer,
			c->start + scale_up(pit->next_tick, NS_PER_SECOND, PIT_HZ));
}

/* Ticks between two interrupts: whole periods, as many as the limit on timers asks for. */
static uint64_t interrupt_period(const struct pit_channel *c)
{
	return c->count * (uint64_t)((TIMER_PERIOD_MIN_TICKS + c->count - 1) / c->count);
}

static void timer_fired(struct loop_timer *timer)
{
	struct pit *pit = container_of(timer, struct pit, timer);
	struct pit_channel *c = &pit->channel[0];
	struct wakeups w = {0};

	{
		scope_lock(&pit->lock);
		uint64_t t = ticks_since_load(c, clock_now());

		/* Stopped, or set anew, after this call had begun. */
		if (!pit->next_tick || t < pit->next_tick)
			return;
		if (is_periodic(c)) {
			/* From the deadline, so that it does not drift; edges we are too late for are lost, as on the
			 * chip when nobody acknowledges them. */
			uint64_t period = interrupt_period(c);

			pit->next_tick += ((t - pit->next_tick) / period + 1) * period;
			schedule(pit);
		} else {
			pit->next_tick = 0;
		}
		board_line(pit->board, 0, false, &w);
		board_line(pit->board, 0, true, &w);
	}
	board_wake(pit->board, &w);
}

/* Channel 0's count or mode changed. Its gate is always open. */
static void channel0_changed(struct pit *pit, struct wakeups *w)
{
	struct pit_channel *c = &pit->channel[0];

	pit->next_tick = 0;
	if (c->loaded && is_periodic(c))
		pit->next_tick = interrupt_period(c);
	else if (c->loaded && (c->mode == 0 || c->mode == 4))
		pit->next_tick = c->count + (c->mode == 4);
	/* Modes 1 and 5 wait for an edge of the gate, which cannot come. */
	schedule(pit);
	/* Between edges the line rests at OUT, so that mode 0 has its low level before the end. */
	board_line(pit->board, 0, output(c, clock_now()), w);
}

/* ---- registers ---- */

static void load(struct pit_channel *c, uint16_t written)
{
	c->count = decode_count(c, written);
	c->loaded = true;
	c->start = clock_now();
	c->elapsed = 0;
	/* Modes 1 and 5 start by the gate's edge; the others count while it is open. */
	c->running = c->gate && c->mode != 1 && c->mode != 5;
	if (c->mode == 1 || c->mode == 5)
		c->elapsed = c->count + 1; /* not triggered: OUT is high */
}

static void latch_count(struct pit_channel *c, uint64_t now)
{
	if (c->latched)
		return; /* the first latch holds until it is read */
	c->latch = counter(c, now);
	c->latched = true;
}

static void latch_status(struct pit_channel *c, uint64_t now)
{
	if (c->status_latched)
		return;
	c->status = output(c, now) << 7 | !c->loaded << 6 | c->access << 4 | c->mode << 1 | c->bcd;
	c->status_latched = true;
}

static void write_control(struct pit *pit, uint8_t v, struct wakeups *w)
{
	uint64_t now = clock_now();
	unsigned which = v >> 6;
	struct pit_channel *c;

	if (which == 3) { /* read-back command */
		for (unsigned i = 0; i < PIT_CHANNELS; i++) {
			if (!(v & 2 << i))
				continue;
			if (!(v & 0x20))
				latch_count(&pit->channel[i], now);
			if (!(v & 0x10))
				latch_status(&pit->channel[i], now);
		}
		return;
	}
	c = &pit->channel[which];
	if (!(v & 0x30)) { /* counter latch command */
		latch_count(c, now);
		return;
	}
	*c = (struct pit_channel){
		.gate = c->gate,
		.access = v >> 4 & 3,
		/* Modes 6 and 7 are 2 and 3. */
		.mode = (v >> 1 & 7) > 5 ? (v >> 1 & 3) : (v >> 1 & 7),
		.bcd = v & 1,
		.count = v & 1 ? 10000 : 65536,
	};
	if (which == 0)
		channel0_changed(pit, w);
}

static void write_count(struct pit *pit, unsigned which, uint8_t v, struct wakeups *w)
{
	struct pit_channel *c = &pit->channel[which];

	if (c->access == 3 && !c->high_next) {
		c->low = v;
		c->high_next = true;
		return;
	}
	load(c, c->access == 1 ? v : c->access == 2 ? v << 8 : c->low | v << 8);
	c->high_next = false;
	if (which == 0)
		channel0_changed(pit, w);
}

static uint8_t read_count(struct pit_channel *c)
{
	uint16_t value = c->latched ? c->latch : counter(c, clock_now());

	if (c->status_latched) {
		c->status_latched = false;
		return c->status;
	}
	if (c->access == 3 && !c->read_high_next) {
		c->read_high_next = true;
		return value;
	}
	c->read_high_next = false;
	c->latched = false;
	return c->access == 1 ? value : value >> 8;
}

static uint64_t ports_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct pit *pit = container_of(region, struct pit, ports);
	scope_lock(&pit->lock);

	/* The control word cannot be read. */
	return offset < PIT_CHANNELS ? read_count(&pit->channel[offset]) : 0xff;
}

static void ports_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct pit *pit = container_of(region, struct pit, ports);
	struct wakeups w = {0};

	{
		scope_lock(&pit->lock);
		if (offset < PIT_CHANNELS)
			write_count(pit, offset, value, &w);
		else
			write_control(pit, value, &w);
	}
	board_wake(pit->board, &w);
}

/* ---- port 0x61 (Intel ICH9 data sheet, section 13.7.1, "NMI status and control") ---- */

enum { GATE2 = 0x01, REFRESH = 0x10, OUT2 = 0x20 };

static void set_gate(struct pit_channel *c, bool gate)
{
	uint64_t now = clock_now();

	if (gate == c->gate)
		return;
	/* Counted up to here; what the gate does next depends on the mode (data sheet, "Gate pin operations"). */
	c->elapsed = ticks_since_load(c, now);
	c->gate = gate;
	if (!c->loaded)
		return;
	switch (c->mode) {
	case 0:
	case 4: /* closed: stands still; open: goes on */
		c->start = now - scale(c->elapsed, NS_PER_SECOND, PIT_HZ);
		c->running = gate;
		break;
	case 1:
	case 5: /* a rising edge triggers */
		if (gate) {
			c->start = now;
			c->running = true;
		}
		break;
	default: /* 2 and 3: a rising edge begins a new period */
		c->start = now;
		c->running = gate;
	}
}

static uint64_t control_b_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct pit *pit = container_of(region, struct pit, control_b);
	scope_lock(&pit->lock);
	uint64_t now = clock_now();

	/* The refresh bit toggles every 15 us, which very old delay loops count. */
	return pit->port61 | (now / 15085 & 1 ? REFRESH : 0) | (output(&pit->channel[2], now) ? OUT2 : 0);
}

static void control_b_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct pit *pit = container_of(region, struct pit, control_b);
	scope_lock(&pit->lock);

	pit->port61 = value & 0x0f;
	set_gate(&pit->channel[2], value & GATE2);
}

static const struct io_ops ports_ops = {.read = ports_read, .write = ports_write};
static const struct io_ops control_b_ops = {.read = control_b_read, .write = control_b_write};

void pit_reset(struct pit *pit)
{
	struct wakeups w = {0};

	scope_lock(&pit->lock);
	/* Square waves without a count: OUT is high, so that the first mode a kernel sets makes no edge. */
	for (unsigned i = 0; i < PIT_CHANNELS; i++)
		pit->channel[i] = (struct pit_channel){.mode = 3, .access = 3, .count = 65536, .gate = i != 2};
	pit->port61 = 0;
	channel0_changed(pit, &w); /* nothing counts, and there is nobody to wake */
}

int pit_create(struct pit *pit, struct board *board, struct error *err)
{
	int ret;

	pit->board = board;
	pit->timer.function = timer_fired;
	pthread_mutex_init(&pit->lock, NULL);
	ret = board_add_ports(board, &pit->ports, "8254", &ports_ops, 0x40, 4, err);
	if (!ret)
		ret = board_add_ports(board, &pit->control_b, "port 61", &control_b_ops, 0x61, 1, err);
	return ret;
}

void pit_destroy(struct pit *pit)
{
	if (!pit->board)
		return; /* never created */
	loop_timer_cancel(pit->board->config.loop, &pit->timer);
	pthread_mutex_destroy(&pit->lock);
}
