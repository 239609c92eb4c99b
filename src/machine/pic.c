/* The two 8259A. Priorities rotate; everything is computed from the registers, nothing is cached but the INTR line. */
#include "machine/pic.h"

#include "base/cleanup.h"
#include "base/util.h"
#include "machine/board_internal.h"

#define CASCADE 2

enum { OCW3_READ_ISR = 3, OCW3_READ_IRR = 2 };

/* Inputs that have no level-triggered mode: timer, keyboard, cascade on the master; clock and FPU on the slave. */
static const uint8_t elcr_mask[2] = {0xf8, 0xde};

/* The input of highest priority among `inputs`, as its distance from the top; 8: none. */
static unsigned rank_of(const struct pic_chip *c, uint8_t inputs)
{
	unsigned rank = 0;

	while (rank < 8 && !(inputs & 1 << ((c->lowest + 1 + rank) & 7)))
		rank++;
	return rank;
}

/* The input to be served now, or -1: requested, not masked, and above whatever is in service. */
static int chip_request(const struct pic_chip *c, bool master)
{
	uint8_t blocking = c->isr;
	unsigned request = rank_of(c, c->irr & ~c->imr);

	/* Special mask mode: a level in service that is also masked lets lower ones through. */
	if (c->special_mask)
		blocking &= ~c->imr;
	/* Special fully nested mode: the slave may interrupt its own service with a higher input. */
	if (c->special_nested && master)
		blocking &= ~(1 << CASCADE);
	if (request >= rank_of(c, blocking))
		return -1;
	return (c->lowest + 1 + request) & 7;
}

static void chip_line(struct pic_chip *c, unsigned input, bool level)
{
	uint8_t bit = 1 << input;

	if (c->elcr & bit)
		c->irr = level ? c->irr | bit : c->irr & ~bit;
	else if (level && !(c->lines & bit))
		c->irr |= bit;
	c->lines = level ? c->lines | bit : c->lines & ~bit;
}

/* Recomputes the cascade and INTR; the lock is held. */
static void update(struct pic *pic, struct wakeups *w)
{
	bool before = atomic_load(&pic->output), now;

	/* The cascade as a level: initializing only the master must not lose what the slave still asks for. */
	if (chip_request(&pic->chip[1], false) >= 0)
		pic->chip[0].irr |= 1 << CASCADE;
	else
		pic->chip[0].irr &= ~(1 << CASCADE);
	now = chip_request(&pic->chip[0], true) >= 0;
	atomic_store(&pic->output, now);
	if (now && !before && w)
		lapic_extint_raised(&pic->board->lapics[0], w);
}

void pic_line(struct pic *pic, unsigned irq, bool level, struct wakeups *w)
{
	if (irq == CASCADE || irq > 15)
		return;
	scope_lock(&pic->lock);
	chip_line(&pic->chip[irq >> 3], irq & 7, level);
	update(pic, w);
}

/* INTA of one chip for its input: IRR to ISR, or straight to the end with automatic EOI. */
static void chip_acknowledge(struct pic_chip *c, unsigned input)
{
	if (!(c->elcr & 1 << input))
		c->irr &= ~(1 << input);
	if (!c->auto_eoi)
		c->isr |= 1 << input;
	else if (c->rotate_auto_eoi)
		c->lowest = input;
}

int pic_acknowledge(struct pic *pic)
{
	struct pic_chip *master = &pic->chip[0], *slave = &pic->chip[1];
	int input, vector;

	scope_lock(&pic->lock);
	input = chip_request(master, true);
	if (input < 0)
		return -1;
	chip_acknowledge(master, input);
	vector = master->vector + input;
	if (input == CASCADE) {
		/* A request that vanished since gives the slave's input 7, not marked in service (data sheet, "default
		 * IR7"). */
		input = chip_request(slave, false);
		if (input >= 0)
			chip_acknowledge(slave, input);
		vector = slave->vector + (input >= 0 ? input : 7);
	}
	/* No wake-up: whoever acknowledges looks at the pending state again when interrupts are enabled. */
	update(pic, NULL);
	return vector;
}

/* ---- registers ---- */

static void chip_init(struct pic_chip *c, uint8_t icw1)
{
	/* ICW1 clears the edge sense, IMR and modes (data sheet, "Initialization Command Words"). */
	c->irr &= c->elcr;
	c->imr = c->isr = 0;
	c->lowest = 7;
	c->read_isr = c->poll = c->special_mask = c->special_nested = c->auto_eoi = c->rotate_auto_eoi = false;
	c->init4 = icw1 & 1;
	c->init = 2;
}

static void chip_ocw2(struct pic_chip *c, uint8_t v)
{
	bool rotate = v & 0x80, specific = v & 0x40, eoi = v & 0x20;
	unsigned input = v & 7;

	if (!eoi) {
		if (specific && rotate)
			c->lowest = input;
		else if (!specific)
			c->rotate_auto_eoi = rotate;
		return;
	}
	if (!specific) {
		unsigned rank = rank_of(c, c->special_mask ? c->isr & ~c->imr : c->isr);

		if (rank == 8)
			return;
		input = (c->lowest + 1 + rank) & 7;
	}
	c->isr &= ~(1 << input);
	if (rotate)
		c->lowest = input;
}

static void chip_write(struct pic_chip *c, unsigned port, uint8_t v)
{
	if (port == 0 && v & 0x10) {
		chip_init(c, v);
	} else if (port == 0 && v & 0x08) {
		if (v & 0x40)
			c->special_mask = v & 0x20;
		c->poll = v & 0x04;
		if ((v & 3) == OCW3_READ_ISR || (v & 3) == OCW3_READ_IRR)
			c->read_isr = (v & 3) == OCW3_READ_ISR;
	} else if (port == 0) {
		chip_ocw2(c, v);
	} else if (c->init == 2) {
		c->vector = v & 0xf8;
		c->init = 3;
	} else if (c->init == 3) { /* how the chips are cascaded, which is fixed here */
		c->init = c->init4 ? 4 : 0;
	} else if (c->init == 4) {
		c->special_nested = v & 0x10;
		c->auto_eoi = v & 0x02;
		c->init = 0;
	} else {
		c->imr = v;
	}
}

static uint8_t chip_read(struct pic_chip *c, unsigned port, bool master)
{
	int input;

	if (!c->poll)
		return port ? c->imr : c->read_isr ? c->isr : c->irr;
	/* The poll command: this read is the acknowledge. */
	c->poll = false;
	input = chip_request(c, master);
	if (input < 0)
		return 0;
	chip_acknowledge(c, input);
	return 0x80 | input;
}

static uint64_t ports_read(struct io_region *region, uint64_t offset, unsigned size)
{
	unsigned which = region->base == 0x20 ? 0 : 1;
	struct pic *pic = container_of(region - which, struct pic, ports[0]);
	struct wakeups w = {0};
	uint64_t value;

	{
		scope_lock(&pic->lock);
		value = chip_read(&pic->chip[which], offset, which == 0);
		update(pic, &w);
	}
	board_wake(pic->board, &w);
	return value;
}

static void ports_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	unsigned which = region->base == 0x20 ? 0 : 1;
	struct pic *pic = container_of(region - which, struct pic, ports[0]);
	struct wakeups w = {0};

	{
		scope_lock(&pic->lock);
		chip_write(&pic->chip[which], offset, value);
		update(pic, &w);
	}
	board_wake(pic->board, &w);
}

static uint64_t elcr_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct pic *pic = container_of(region, struct pic, elcr);
	scope_lock(&pic->lock);

	return (pic->chip[0].elcr | pic->chip[1].elcr << 8) >> (8 * offset);
}

static void elcr_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct pic *pic = container_of(region, struct pic, elcr);
	struct wakeups w = {0};

	{
		scope_lock(&pic->lock);
		for (; size > 0 && offset < 2; size--, offset++, value >>= 8) {
			struct pic_chip *c = &pic->chip[offset];

			c->elcr = value & elcr_mask[offset];
			/* A level-triggered request is the line itself. */
			c->irr = (c->irr & ~c->elcr) | (c->lines & c->elcr);
		}
		update(pic, &w);
	}
	board_wake(pic->board, &w);
}

static const struct io_ops ports_ops = {.read = ports_read, .write = ports_write};
static const struct io_ops elcr_ops = {.read = elcr_read, .write = elcr_write};

void pic_reset(struct pic *pic)
{
	scope_lock(&pic->lock);
	for (unsigned i = 0; i < 2; i++) {
		/* The lines belong to the devices; those are reset too and lower them. */
		pic->chip[i] = (struct pic_chip){.lines = pic->chip[i].lines, .lowest = 7, .imr = 0xff};
	}
	/* As firmware leaves it: the ACPI interrupt is level-triggered. */
	pic->chip[BOARD_SCI_IRQ >> 3].elcr = 1 << (BOARD_SCI_IRQ & 7);
	update(pic, NULL);
}

int pic_create(struct pic *pic, struct board *board, struct error *err)
{
	int ret;

	pic->board = board;
	pthread_mutex_init(&pic->lock, NULL);
	ret = board_add_ports(board, &pic->ports[0], "8259 master", &ports_ops, 0x20, 2, err);
	if (!ret)
		ret = board_add_ports(board, &pic->ports[1], "8259 slave", &ports_ops, 0xa0, 2, err);
	if (!ret)
		ret = board_add_ports(board, &pic->elcr, "8259 edge/level", &elcr_ops, 0x4d0, 2, err);
	return ret;
}

void pic_destroy(struct pic *pic)
{
	if (!pic->board)
		return; /* never created */
	pthread_mutex_destroy(&pic->lock);
}
