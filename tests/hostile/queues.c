/* Virtio devices (1.2, section 4.1): found and set up well enough that they look at their queues, which then hold anything:
 * chains that loop, tables that point outside, lengths that overflow, requests of each device's kinds. */
#include "hostile.h"

#define DEVICES 16
#define QUEUES 4
#define RING 256 /* bytes of junk a queue's three areas get, times 64 */

static struct device {
	uint32_t slot; /* for 0xcf8 */
	uint16_t id;
	uint64_t bar[6];
	uint64_t common, notify, isr, specific;
	uint32_t multiplier;
	uint16_t size[QUEUES];
	uint16_t index[QUEUES];
} devices[DEVICES];
static volatile unsigned count;

static uint32_t config_read(uint32_t slot, unsigned at)
{
	out32(0xcf8, slot | (at & 0xfc));
	return in32(0xcfc);
}

static void config_write(uint32_t slot, unsigned at, uint32_t value)
{
	out32(0xcf8, slot | (at & 0xfc));
	out32(0xcfc, value);
}

static uint64_t area(const struct device *d, unsigned queue, unsigned which)
{
	return JUNK + (((uint64_t)(d - devices) * QUEUES + queue) * 3 + which) * RING * 64;
}

static void find_capabilities(struct device *d)
{
	unsigned at = config_read(d->slot, 0x34) & 0xfc;

	for (unsigned i = 0; at && i < 32; i++) {
		uint32_t head = config_read(d->slot, at), where = config_read(d->slot, at + 4);
		uint64_t address = d->bar[where % 6] + config_read(d->slot, at + 8);

		if ((head & 0xff) == 9) {
			switch (head >> 24) {
			case 1:
				d->common = address;
				break;
			case 2:
				d->notify = address;
				d->multiplier = config_read(d->slot, at + 16);
				break;
			case 3:
				d->isr = address;
				break;
			case 4:
				d->specific = address;
			}
		}
		at = head >> 8 & 0xfc;
	}
}

static void set_up_queues(struct rng *r, struct device *d)
{
	if (!d->common)
		return;
	write8(d->common + 20, 0); /* reset, acknowledge, driver */
	write8(d->common + 20, 3);
	write32(d->common + 8, 0);
	write32(d->common + 12, below(r, 4) ? read32(d->common + 4) : (uint32_t)nasty(r));
	write32(d->common, 1);
	write32(d->common + 8, 1);
	write32(d->common + 12, 1);
	write8(d->common + 20, 11);
	for (unsigned q = 0; q < QUEUES; q++) {
		write16(d->common + 22, (uint16_t)q);
		d->size[q] = (uint16_t)(read32(d->common + 24) & 0xffff);
		if (below(r, 3) == 0)
			write16(d->common + 24, d->size[q] = (uint16_t)(1u << below(r, 9)));
		if (!d->size[q])
			continue;
		write64(d->common + 32, below(r, 30) ? area(d, q, 0) : nasty(r));
		write64(d->common + 40, below(r, 30) ? area(d, q, 1) : nasty(r));
		write64(d->common + 48, below(r, 30) ? area(d, q, 2) : nasty(r));
		write16(d->common + 28, 1);
		d->index[q] = 0;
	}
	write8(d->common + 20, 15);
}

void devices_find(struct rng *r)
{
	unsigned n = 0;

	for (unsigned slot = 0; slot < 32 && n < DEVICES; slot++) {
		struct device *d = &devices[n];
		uint32_t id;

		*d = (struct device){.slot = 0x80000000 | slot << 11};
		id = config_read(d->slot, 0);
		if ((id & 0xffff) != 0x1af4)
			continue;
		d->id = (uint16_t)((id >> 16) - 0x1040);
		for (unsigned b = 0; b < 6; b++) {
			uint32_t bar;

			config_write(d->slot, 0x10 + 4 * b, 0xffffffff);
			bar = config_read(d->slot, 0x10 + 4 * b);
			if (!bar || bar & 1)
				continue;
			d->bar[b] = 0xc0000000 + slot * 0x1000000 + b * 0x200000;
			config_write(d->slot, 0x10 + 4 * b, (uint32_t)d->bar[b]);
			if ((bar & 6) == 4)
				config_write(d->slot, 0x10 + 4 * ++b, 0);
		}
		config_write(d->slot, 4, 6);
		find_capabilities(d);
		set_up_queues(r, d);
		n++;
	}
	count = n;
}

uint64_t devices_window(struct rng *r)
{
	unsigned n = count;

	if (!n)
		return JUNK;
	const struct device *d = &devices[below(r, n)];
	const uint64_t places[] = {d->common, d->isr, d->specific, d->notify, d->bar[0], d->bar[2]};

	return places[below(r, 6)] + below(r, below(r, 2) ? 64 : 0x1000);
}

/* What the bytes at the front of a request may be, so that a device gets further than its first check. */
static void write_request(struct rng *r, const struct device *d, uint64_t at)
{
	switch (d->id) {
	case 2: /* blk: type, reserved, sector */
		write32(at, (uint32_t[]){0, 1, 4, 8, 11, 13, 14, 0xffff}[below(r, 8)]);
		write64(at + 8, below(r, 2) ? below(r, 4096) : nasty(r));
		break;
	case 1: /* net: flags, gso type, lengths */
		write64(at, next(r));
		write32(at + 8, (uint32_t)nasty(r));
		write64(at + 12, below(r, 2) ? 0xffffffffffff5254 : next(r));
		write64(at + 24, below(r, 2) ? 0x4500000800000000 | next(r) : next(r));
		break;
	case 19: /* vsock: source, destination, ports, length, type and operation */
		write64(at, 3);
		write64(at + 8, 2);
		write64(at + 16, next(r) % 4096 << 32 | below(r, 3));
		write32(at + 24, (uint32_t)nasty(r));
		write32(at + 28, 1 | (uint32_t)below(r, 9) << 16);
		write64(at + 36, nasty(r));
		break;
	default:
		write64(at, nasty(r));
	}
}

static void write_descriptors(struct rng *r, const struct device *d, unsigned q)
{
	uint64_t table = area(d, q, 0);
	unsigned size = d->size[q] ? d->size[q] : 1, chain = 1 + (unsigned)below(r, 6), at = (unsigned)below(r, size);

	for (unsigned i = 0; i < chain; i++) {
		uint64_t address = below(r, 8) ? JUNK + below(r, JUNK_SIZE) : nasty(r);
		uint32_t length = below(r, 8) ? (uint32_t[]){16, 1, 512, 4096, 12, 44, 1526, 65536}[below(r, 8)] : (uint32_t)nasty(r);
		unsigned flags = (i + 1 < chain ? 1 : 0) | (i && below(r, 2) ? 2 : 0);
		unsigned next_at = below(r, 10) ? (at + 1) % size : (unsigned)next(r) & 0xffff;

		if (below(r, 12) == 0)
			flags = (unsigned)next(r) & 0xffff;
		if (below(r, 16) == 0) { /* an indirect table, of anything */
			flags = 4;
			for (unsigned k = 0; k < 16; k++)
				write64(JUNK + JUNK_SIZE / 2 + k * 8, below(r, 2) ? nasty(r) : JUNK + below(r, 4096));
			address = JUNK + JUNK_SIZE / 2;
			length = 16 * (uint32_t)below(r, 9);
		}
		if (i == 0 && length >= 16 && address >= JUNK && address < JUNK + JUNK_SIZE)
			write_request(r, d, address);
		write64(table + 16 * at, address);
		write32(table + 16 * at + 8, length);
		write32(table + 16 * at + 12, flags | next_at << 16);
		if (i == 0)
			write16(area(d, q, 1) + 4 + 2 * ((unsigned)d->index[q] % size), (uint16_t)(below(r, 20) ? at : next(r)));
		at = next_at % size;
	}
}

void devices_attack(struct rng *r)
{
	unsigned n = count, q = (unsigned)below(r, QUEUES);
	struct device *d = n ? &devices[below(r, n)] : 0;

	if (!d || !d->common)
		return;
	if (below(r, 200) == 0)
		set_up_queues(r, d);
	write_descriptors(r, d, q);
	d->index[q] += below(r, 40) ? 1 : (uint16_t)next(r);
	write16(area(d, q, 1), (uint16_t)(below(r, 2)));
	write16(area(d, q, 1) + 2, d->index[q]);
	if (below(r, 2))
		write16(d->notify + (uint64_t)q * d->multiplier, (uint16_t)q);
}
