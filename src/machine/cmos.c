/* The CMOS clock: the host's time in UTC plus what the guest has set; nothing ticks unless an interrupt is enabled. */
#include "machine/cmos.h"

#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "machine/board_internal.h"

enum { SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR, A, B, C, D };

enum { A_UIP = 0x80, A_DIVIDER = 0x70, A_RATE = 0x0f };
enum { B_SET = 0x80, B_PIE = 0x40, B_AIE = 0x20, B_UIE = 0x10, B_BINARY = 0x04, B_24H = 0x02 };
enum { C_IRQF = 0x80, C_PF = 0x40, C_AF = 0x20, C_UF = 0x10 };
#define FLAGS_SECOND (C_AF | C_UF)

#define CMOS_IRQ 8
#define A_RESET 0x26 /* 32768 Hz time base, 1024 Hz periodic rate */
#define HOUR_PM 0x80

/* The update-in-progress bit comes this long before the second changes (data sheet, table 6). */
#define UIP_NS 244000

static uint8_t encode(const struct cmos *c, unsigned value)
{
	return c->memory[B] & B_BINARY ? value : value / 10 << 4 | value % 10;
}

static unsigned decode(const struct cmos *c, uint8_t value)
{
	return c->memory[B] & B_BINARY ? value : (value >> 4) * 10 + (value & 15);
}

static uint8_t encode_hour(const struct cmos *c, unsigned hour)
{
	if (c->memory[B] & B_24H)
		return encode(c, hour);
	return encode(c, hour % 12 ? hour % 12 : 12) | (hour >= 12 ? HOUR_PM : 0);
}

static unsigned decode_hour(const struct cmos *c, uint8_t value)
{
	if (c->memory[B] & B_24H)
		return decode(c, value);
	return decode(c, value & ~HOUR_PM) % 12 + (value & HOUR_PM ? 12 : 0);
}

/* The guest's time now. */
static int64_t guest_time(const struct cmos *c, long *ns)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	*ns = now.tv_nsec;
	return now.tv_sec + c->offset;
}

/* The time bytes as they are at second t. */
static void fill_time(struct cmos *c, int64_t t)
{
	time_t seconds = t;
	struct tm tm;

	if (!gmtime_r(&seconds, &tm))
		return;
	c->memory[SECONDS] = encode(c, tm.tm_sec);
	c->memory[MINUTES] = encode(c, tm.tm_min);
	c->memory[HOURS] = encode_hour(c, tm.tm_hour);
	c->memory[WEEKDAY] = encode(c, tm.tm_wday + 1);
	c->memory[DAY] = encode(c, tm.tm_mday);
	c->memory[MONTH] = encode(c, tm.tm_mon + 1);
	c->memory[YEAR] = encode(c, (unsigned)(tm.tm_year + 1900) % 100);
	c->memory[CMOS_CENTURY] = encode(c, (unsigned)(tm.tm_year + 1900) / 100 % 100);
}

/* The time bytes say what time it is from now on. Values out of range are carried over by timegm. */
static void take_time(struct cmos *c)
{
	struct tm tm = {
		.tm_sec = decode(c, c->memory[SECONDS]),
		.tm_min = decode(c, c->memory[MINUTES]),
		.tm_hour = decode_hour(c, c->memory[HOURS]),
		.tm_mday = decode(c, c->memory[DAY]),
		.tm_mon = (int)decode(c, c->memory[MONTH]) - 1,
		.tm_year = decode(c, c->memory[CMOS_CENTURY]) * 100 + decode(c, c->memory[YEAR]) - 1900,
	};
	long ns;

	c->offset += timegm(&tm) - guest_time(c, &ns);
	c->seen = guest_time(c, &ns);
}

static bool is_time_byte(unsigned index)
{
	return index == SECONDS || index == MINUTES || index == HOURS || (index >= WEEKDAY && index <= YEAR) ||
	       index == CMOS_CENTURY;
}

/* Stopped while the guest sets the time or holds the divider in reset. */
static bool is_ticking(const struct cmos *c)
{
	return !(c->memory[B] & B_SET) && (c->memory[A] & A_DIVIDER) < 0x60;
}

/* ---- interrupts ---- */

/* Nanoseconds between periodic interrupts, 0: none (data sheet, table 5, 32768 Hz time base). */
static uint64_t periodic_ns(const struct cmos *c)
{
	unsigned rate = c->memory[A] & A_RATE;

	if (!rate || !(c->memory[B] & B_PIE))
		return 0;
	/* Rates 1 and 2 are those of 8 and 9. */
	return scale(1ull << (rate < 3 ? rate + 6 : rate - 1), NS_PER_SECOND, 32768);
}

/* An alarm byte of 0xc0 and above matches everything. */
static bool alarm_matches(const struct cmos *c, int64_t t)
{
	time_t seconds = t;
	struct tm tm;

	if (!gmtime_r(&seconds, &tm))
		return false;
	return (c->memory[SECONDS_ALARM] >= 0xc0 || decode(c, c->memory[SECONDS_ALARM]) == (unsigned)tm.tm_sec) &&
	       (c->memory[MINUTES_ALARM] >= 0xc0 || decode(c, c->memory[MINUTES_ALARM]) == (unsigned)tm.tm_min) &&
	       (c->memory[HOURS_ALARM] >= 0xc0 || decode_hour(c, c->memory[HOURS_ALARM]) == (unsigned)tm.tm_hour);
}

/* Notes in the flags what happened since the last look, drives interrupt 8, and sets the timer for what comes next. The
 * lock is held. */
static void update(struct cmos *c, struct wakeups *w)
{
	struct loop *loop = c->board->config.loop;
	uint64_t now = clock_now(), deadline = UINT64_MAX, period = periodic_ns(c);
	long ns;
	int64_t t = guest_time(c, &ns);
	uint8_t enabled = c->memory[B] & (C_PF | C_AF | C_UF);

	if (is_ticking(c) && t != c->seen) {
		c->flags |= C_UF;
		/* The timer looks every second while it matters; after a longer gap the alarm may have been in it, and
		 * a guest that had it disabled then does not expect it now. */
		if (alarm_matches(c, t))
			c->flags |= C_AF;
		c->seen = t;
	}
	if (period && c->next_periodic && now >= c->next_periodic) {
		c->flags |= C_PF;
		c->next_periodic += ((now - c->next_periodic) / period + 1) * period;
	} else if (period && !c->next_periodic) {
		c->next_periodic = now + period;
	} else if (!period) {
		c->next_periodic = 0;
	}
	/* A flag already up needs no timer before it is read: the line is high. */
	if (period && !(c->flags & C_PF))
		deadline = c->next_periodic;
	if (is_ticking(c) && enabled & FLAGS_SECOND & ~c->flags)
		deadline = min(deadline, now + NS_PER_SECOND - ns);
	if (deadline != UINT64_MAX)
		loop_timer_set(loop, &c->timer, deadline);
	else
		loop_timer_cancel(loop, &c->timer);
	board_line(c->board, CMOS_IRQ, c->flags & enabled, w);
}

static void timer_fired(struct loop_timer *timer)
{
	struct cmos *c = container_of(timer, struct cmos, timer);
	struct wakeups w = {0};

	{
		scope_lock(&c->lock);
		update(c, &w);
	}
	board_wake(c->board, &w);
}

/* ---- registers ---- */

static uint8_t read_byte(struct cmos *c, struct wakeups *w)
{
	unsigned index = c->index;
	uint8_t value;
	int64_t t;
	long ns;

	switch (index) {
	case A:
		guest_time(c, &ns);
		return c->memory[A] | (is_ticking(c) && ns >= (long)NS_PER_SECOND - UIP_NS ? A_UIP : 0);
	case C:
		update(c, w);
		value = c->flags | (c->flags & c->memory[B] & (C_PF | C_AF | C_UF) ? C_IRQF : 0);
		c->flags = 0;
		update(c, w);
		return value;
	case D:
		return 0x80; /* the battery is good */
	}
	if (is_time_byte(index) && is_ticking(c)) {
		t = guest_time(c, &ns);
		fill_time(c, t);
	}
	return c->memory[index];
}

static void write_byte(struct cmos *c, uint8_t value, struct wakeups *w)
{
	unsigned index = c->index;
	bool was_ticking = is_ticking(c);
	long ns;

	switch (index) {
	case A:
		value &= ~A_UIP;
		break;
	case B:
		if (value & B_SET)
			value &= ~B_UIE; /* data sheet, "SET" */
		break;
	case C:
	case D:
		return;
	}
	/* What the bytes meant before the change is what they mean after it: the clock stops at its time, or a single
	 * byte of it is replaced. */
	if (was_ticking && (index == A || index == B || is_time_byte(index)))
		fill_time(c, guest_time(c, &ns));
	c->memory[index] = value;
	if (is_time_byte(index) ? is_ticking(c) : !was_ticking && is_ticking(c))
		take_time(c);
	update(c, w);
}

static uint64_t region_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct cmos *c = container_of(region, struct cmos, region);
	struct wakeups w = {0};
	uint64_t value;

	if (offset == 0)
		return 0xff; /* the index cannot be read */
	{
		scope_lock(&c->lock);
		value = read_byte(c, &w);
	}
	board_wake(c->board, &w);
	return value;
}

static void region_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct cmos *c = container_of(region, struct cmos, region);
	struct wakeups w = {0};

	{
		scope_lock(&c->lock);
		if (offset == 0)
			c->index = value & 0x7f; /* bit 7 masks NMIs, of which there are none */
		if (offset == 1)
			write_byte(c, value, &w);
		else if (size == 2)
			write_byte(c, value >> 8, &w);
	}
	board_wake(c->board, &w);
}

static const struct io_ops region_ops = {.read = region_read, .write = region_write};

static void put16(struct cmos *c, unsigned index, uint64_t value)
{
	value = min(value, (uint64_t)0xffff);
	c->memory[index] = value;
	c->memory[index + 1] = value >> 8;
}

/* Where firmware looks for the size of RAM (the AT's bytes, and those of SeaBIOS's docs/Memory_layout and QEMU's pc).
 */
static void fill_memory_size(struct cmos *c)
{
	const struct guest_memory *memory = c->board->config.memory;
	uint64_t low = min(memory->size, MEMORY_HOLE), high = (memory->size - low) >> 16;

	put16(c, 0x15, 640);			 /* KiB */
	put16(c, 0x17, (low - (1 << 20)) >> 10); /* KiB above 1 MiB */
	put16(c, 0x30, (low - (1 << 20)) >> 10);
	put16(c, 0x34, low > 16 << 20 ? (low - (16 << 20)) >> 16 : 0); /* 64 KiB above 16 MiB */
	for (unsigned i = 0; i < 3; i++)			       /* 64 KiB above 4 GiB */
		c->memory[0x5b + i] = high >> (8 * i);
}

void cmos_reset(struct cmos *c)
{
	struct wakeups w = {0};
	long ns;

	scope_lock(&c->lock);
	/* The battery keeps the time: offset stays. */
	memset(c->memory, 0, sizeof(c->memory));
	c->memory[A] = A_RESET;
	c->memory[B] = B_24H;
	c->index = c->flags = 0;
	c->next_periodic = 0;
	c->seen = guest_time(c, &ns);
	fill_memory_size(c);
	update(c, &w); /* lowers the line; there is nobody to wake */
}

int cmos_create(struct cmos *c, struct board *board, struct error *err)
{
	c->board = board;
	c->timer.function = timer_fired;
	pthread_mutex_init(&c->lock, NULL);
	return board_add_ports(board, &c->region, "CMOS clock", &region_ops, 0x70, 2, err);
}

void cmos_destroy(struct cmos *c)
{
	if (!c->board)
		return; /* never created */
	loop_timer_cancel(c->board->config.loop, &c->timer);
	pthread_mutex_destroy(&c->lock);
}
