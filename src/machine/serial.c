/* The 16550A. It has no baud rate: a transmitted byte is gone at once, so THRE and TEMT are always set. */
#include "machine/serial.h"

#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "machine/board_internal.h"

/* Registers (PC16550D data sheet, table II) */
enum { RBR_THR = 0, IER = 1, IIR_FCR = 2, LCR = 3, MCR = 4, LSR = 5, MSR = 6, SCR = 7 };

enum { IER_RECEIVED = 1, IER_TRANSMIT = 2, IER_LINE = 4, IER_MODEM = 8 };
enum {
	IIR_NONE = 0x01,
	IIR_MODEM = 0x00,
	IIR_TRANSMIT = 0x02,
	IIR_RECEIVED = 0x04,
	IIR_LINE = 0x06,
	IIR_TIMEOUT = 0x0c
};
enum { IIR_FIFO = 0xc0 };
enum { FCR_ENABLE = 1, FCR_CLEAR_RECEIVE = 2, FCR_CLEAR_TRANSMIT = 4 };
enum { LCR_DLAB = 0x80 };
enum { MCR_DTR = 1, MCR_RTS = 2, MCR_OUT1 = 4, MCR_OUT2 = 8, MCR_LOOP = 16 };
enum { LSR_READY = 1, LSR_OVERRUN = 2, LSR_EMPTY = 0x60 };
enum { MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80, MSR_RI_DELTA = 4 };

#define FIFO_SIZE 16
/* Console output between two runs of the loop; when it is full the vCPU that writes gives it out itself. */
#define OUTPUT_SIZE 4096

struct serial {
	struct board *board;
	unsigned irq;
	bool level; /* of the interrupt line */
	struct io_region region;

	pthread_mutex_t lock; /* the registers and the two FIFOs */
	uint8_t ier, lcr, mcr, scratch, divisor[2];
	uint8_t modem; /* MSR: levels and deltas */
	bool fifo_enabled, overrun;
	bool thre_pending; /* the transmitter became empty and the guest has not seen it */
	unsigned trigger;  /* receive FIFO level that interrupts */
	uint8_t fifo[FIFO_SIZE];
	unsigned fifo_head, fifo_count;
	bool refused; /* somebody waits for room */
	uint8_t pending[OUTPUT_SIZE];
	size_t pending_count;
	bool posted; /* the loop will call flush_posted */

	pthread_mutex_t
		output_lock; /* held while bytes are given out, so that they stay in order; taken before `lock` */
	size_t (*output)(void *opaque, const uint8_t *bytes, size_t n);
	void (*output_wait)(void *opaque);
	void *output_opaque;
	void (*room)(void *opaque);
	void *room_opaque;
};

/* ---- output ---- */

/* Gives out what is buffered, as far as the sink takes it. No lock is held. False: it took nothing. */
static bool flush(struct serial *s)
{
	uint8_t bytes[OUTPUT_SIZE];
	size_t n, taken;

	scope_lock(&s->output_lock);
	{
		scope_lock(&s->lock);
		n = s->pending_count;
		memcpy(bytes, s->pending, n);
	}
	taken = n && s->output ? s->output(s->output_opaque, bytes, n) : n;
	/* Others have only appended meanwhile. */
	scope_lock(&s->lock);
	s->pending_count -= taken;
	memmove(s->pending, s->pending + taken, s->pending_count);
	return taken || !n;
}

static void flush_posted(void *opaque)
{
	struct serial *s = opaque;

	{
		scope_lock(&s->lock);
		s->posted = false;
	}
	flush(s);
}

void serial_flush(struct serial *s)
{
	flush(s);
}

void serial_set_output(struct serial *s, size_t (*output)(void *opaque, const uint8_t *bytes, size_t n),
	void (*wait)(void *opaque), void *opaque)
{
	scope_lock(&s->output_lock);
	s->output = output;
	s->output_wait = wait;
	s->output_opaque = opaque;
}

/* ---- interrupts ---- */

static unsigned receive_room(const struct serial *s)
{
	return (s->fifo_enabled ? FIFO_SIZE : 1) - s->fifo_count;
}

/* The cause of highest priority (data sheet, table IV). */
static uint8_t cause(const struct serial *s)
{
	if (s->ier & IER_LINE && s->overrun)
		return IIR_LINE;
	/* The time-out means: below the trigger level and nothing more came for four characters' time. Input comes in
	 * whole and at once, so that time counts as over. */
	if (s->ier & IER_RECEIVED && s->fifo_count)
		return !s->fifo_enabled || s->fifo_count >= s->trigger ? IIR_RECEIVED : IIR_TIMEOUT;
	if (s->ier & IER_TRANSMIT && s->thre_pending)
		return IIR_TRANSMIT;
	if (s->ier & IER_MODEM && s->modem & 0x0f)
		return IIR_MODEM;
	return IIR_NONE;
}

/* Drives the interrupt line; a PC connects it through OUT2, which loopback disconnects. The lock is held. */
static void update(struct serial *s, struct wakeups *w)
{
	bool connected = s->mcr & MCR_OUT2 && !(s->mcr & MCR_LOOP), level = connected && cause(s) != IIR_NONE;

	if (level != s->level)
		board_line(s->board, s->irq, level, w);
	s->level = level;
}

/* ---- input ---- */

static void receive(struct serial *s, uint8_t byte)
{
	if (!receive_room(s)) {
		s->overrun = true;
		return;
	}
	s->fifo[(s->fifo_head + s->fifo_count++) % FIFO_SIZE] = byte;
}

size_t serial_input(struct serial *s, const uint8_t *bytes, size_t n)
{
	struct wakeups w = {0};
	size_t taken = 0;

	{
		scope_lock(&s->lock);
		/* In loopback the input pin is disconnected. */
		while (taken < n && receive_room(s) && !(s->mcr & MCR_LOOP))
			receive(s, bytes[taken++]);
		if (taken < n)
			s->refused = true;
		update(s, &w);
	}
	board_wake(s->board, &w);
	return taken;
}

void serial_set_room(struct serial *s, void (*room)(void *opaque), void *opaque)
{
	scope_lock(&s->lock);
	s->room = room;
	s->room_opaque = opaque;
}

/* ---- registers ---- */

/* Modem inputs: a peer that is always there, or in loopback our own outputs. */
static void update_modem(struct serial *s)
{
	uint8_t levels = MSR_CTS | MSR_DSR | MSR_DCD, changed;

	if (s->mcr & MCR_LOOP)
		levels = (s->mcr & MCR_RTS ? MSR_CTS : 0) | (s->mcr & MCR_DTR ? MSR_DSR : 0) |
			 (s->mcr & MCR_OUT1 ? MSR_RI : 0) | (s->mcr & MCR_OUT2 ? MSR_DCD : 0);
	changed = (s->modem ^ levels) >> 4;
	/* The ring indicator reports its falling edge only. */
	if (levels & MSR_RI)
		changed &= ~MSR_RI_DELTA;
	s->modem = levels | (s->modem & 0x0f) | changed;
}

static void write_fcr(struct serial *s, uint8_t v)
{
	static const uint8_t triggers[4] = {1, 4, 8, 14};
	bool enable = v & FCR_ENABLE;

	/* A change of the mode clears the FIFOs, too (data sheet, section 8.3). */
	if (v & FCR_CLEAR_RECEIVE || enable != s->fifo_enabled)
		s->fifo_head = s->fifo_count = 0;
	s->fifo_enabled = enable;
	s->trigger = enable ? triggers[v >> 6] : 1;
}

/* There is room in the output buffer. */
static void transmit(struct serial *s, uint8_t byte, struct wakeups *w)
{
	/* Full for an instant, then empty: the line drops and rises again, since what it drives waits for an edge. */
	s->thre_pending = false;
	update(s, w);
	s->thre_pending = true;
	if (s->mcr & MCR_LOOP) {
		receive(s, byte);
		return;
	}
	s->pending[s->pending_count++] = byte;
	if (!s->posted) {
		s->posted = true;
		loop_post(s->board->config.loop, flush_posted, s);
	}
}

static void write_register(struct serial *s, unsigned offset, uint8_t v, struct wakeups *w)
{
	switch (offset) {
	case RBR_THR:
		if (s->lcr & LCR_DLAB)
			s->divisor[0] = v;
		else
			transmit(s, v, w);
		break;
	case IER:
		if (s->lcr & LCR_DLAB) {
			s->divisor[1] = v;
			break;
		}
		/* Enabling the interrupt with an empty transmitter raises it (data sheet, section 8.6). */
		if (v & ~s->ier & IER_TRANSMIT)
			s->thre_pending = true;
		s->ier = v & 0x0f;
		break;
	case IIR_FCR:
		write_fcr(s, v);
		break;
	case LCR:
		s->lcr = v;
		break;
	case MCR:
		s->mcr = v & 0x1f;
		update_modem(s);
		break;
	case SCR:
		s->scratch = v;
		break;
	}
	update(s, w);
}

static uint8_t read_register(struct serial *s, unsigned offset)
{
	uint8_t value = 0;

	switch (offset) {
	case RBR_THR:
		if (s->lcr & LCR_DLAB)
			return s->divisor[0];
		if (s->fifo_count) {
			value = s->fifo[s->fifo_head];
			s->fifo_head = (s->fifo_head + 1) % FIFO_SIZE;
			s->fifo_count--;
		}
		return value;
	case IER:
		return s->lcr & LCR_DLAB ? s->divisor[1] : s->ier;
	case IIR_FCR:
		value = cause(s);
		/* Seeing the transmitter's cause clears it. */
		if (value == IIR_TRANSMIT)
			s->thre_pending = false;
		return value | (s->fifo_enabled ? IIR_FIFO : 0);
	case LCR:
		return s->lcr;
	case MCR:
		return s->mcr;
	case LSR:
		value = LSR_EMPTY | (s->fifo_count ? LSR_READY : 0) | (s->overrun ? LSR_OVERRUN : 0);
		s->overrun = false;
		return value;
	case MSR:
		value = s->modem;
		s->modem &= 0xf0;
		return value;
	case SCR:
		return s->scratch;
	}
	return 0xff;
}

/* Who was refused is told once, when there is room for him again. */
static bool take_refused(struct serial *s)
{
	bool tell = s->refused && !s->fifo_count && !(s->mcr & MCR_LOOP);

	if (tell)
		s->refused = false;
	return tell;
}

static void call_room(struct serial *s)
{
	void (*room)(void *opaque);
	void *opaque;

	{
		scope_lock(&s->lock);
		room = s->room;
		opaque = s->room_opaque;
	}
	if (room)
		room(opaque);
}

static uint64_t region_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct serial *s = container_of(region, struct serial, region);
	struct wakeups w = {0};
	uint64_t value;
	bool tell;

	{
		scope_lock(&s->lock);
		value = read_register(s, offset);
		update(s, &w);
		tell = take_refused(s);
	}
	board_wake(s->board, &w);
	if (tell)
		call_room(s);
	return value;
}

/* False: the output buffer is full and has to be given out first. */
static bool try_write(struct serial *s, unsigned offset, uint8_t v, struct wakeups *w, bool *tell)
{
	scope_lock(&s->lock);
	if (offset == RBR_THR && s->pending_count == OUTPUT_SIZE)
		return false;
	write_register(s, offset, v, w);
	*tell = take_refused(s);
	return true;
}

static void region_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct serial *s = container_of(region, struct serial, region);
	struct wakeups w = {0};
	bool tell;

	while (!try_write(s, offset, value, &w, &tell)) {
		if (!flush(s))
			s->output_wait(s->output_opaque);
	}
	board_wake(s->board, &w);
	if (tell)
		call_room(s);
}

static const struct io_ops region_ops = {.read = region_read, .write = region_write};

void serial_reset(struct serial *s)
{
	struct wakeups w = {0};
	bool tell;

	flush(s);
	{
		scope_lock(&s->lock);
		s->ier = s->lcr = s->mcr = s->scratch = 0;
		s->divisor[0] = 12; /* 9600 baud, as firmware leaves it */
		s->divisor[1] = 0;
		s->fifo_enabled = s->overrun = s->thre_pending = false;
		s->trigger = 1;
		s->fifo_head = s->fifo_count = 0;
		s->modem = MSR_CTS | MSR_DSR | MSR_DCD;
		update(s, &w); /* lowers the line; there is nobody to wake */
		tell = take_refused(s);
	}
	if (tell)
		call_room(s);
}

int serial_create(struct serial **out, struct board *board, uint16_t port, unsigned irq, struct error *err)
{
	struct serial *s = calloc(1, sizeof(*s));
	int ret;

	if (!s)
		return error_set(err, ENOMEM, "serial port 0x%x: out of memory", port);
	s->board = board;
	s->irq = irq;
	pthread_mutex_init(&s->lock, NULL);
	pthread_mutex_init(&s->output_lock, NULL);
	ret = board_add_ports(board, &s->region, "16550A", &region_ops, port, 8, err);
	if (ret) {
		free(s);
		return ret;
	}
	*out = s;
	return 0;
}

void serial_destroy(struct serial *s)
{
	if (!s)
		return;
	flush(s);
	pthread_mutex_destroy(&s->lock);
	pthread_mutex_destroy(&s->output_lock);
	free(s);
}
