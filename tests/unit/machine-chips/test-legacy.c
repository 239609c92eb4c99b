/* 16550, i8042, ACPI power, and what is under them: memory and spaces. */
#include "fixture.h"
#include "machine/debug_exit.h"
#include "machine/pvpanic.h"
#include "machine/vmgenid.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define COM1 0x3f8

struct sink {
	pthread_mutex_t lock;
	char bytes[20000];
	size_t count;
	unsigned rooms, waits;
	bool blocked;
};

/* Takes at most 1000 bytes at a time, nothing while blocked. */
static size_t sink_output(void *opaque, const uint8_t *bytes, size_t n)
{
	struct sink *s = opaque;

	pthread_mutex_lock(&s->lock);
	n = s->blocked ? 0 : min(n, (size_t)1000);
	memcpy(s->bytes + s->count, bytes, n);
	s->count += n;
	pthread_mutex_unlock(&s->lock);
	return n;
}

static void sink_wait(void *opaque)
{
	struct sink *s = opaque;

	pthread_mutex_lock(&s->lock);
	s->waits++;
	s->blocked = false;
	pthread_mutex_unlock(&s->lock);
}

static void sink_room(void *opaque)
{
	((struct sink *)opaque)->rooms++;
}

static void test_serial_output(void **state)
{
	struct fixture f;
	static struct sink sink = {.lock = PTHREAD_MUTEX_INITIALIZER};

	fixture_start(&f, 1);
	serial_set_output(board_serial(f.board), sink_output, sink_wait, &sink);
	for (const char *c = "hello, world\n"; *c; c++) {
		assert_int_equal(in8(&f, COM1 + 5) & 0x60, 0x60);
		out8(&f, COM1, *c);
	}
	/* Without anything further it comes out soon. */
	for (unsigned i = 0; i < 2000; i++) {
		pthread_mutex_lock(&sink.lock);
		size_t n = sink.count;
		pthread_mutex_unlock(&sink.lock);
		if (n == 13)
			break;
		sleep_ns(MS);
	}
	assert_int_equal(sink.count, 13);
	assert_memory_equal(sink.bytes, "hello, world\n", 13);
	/* More than the buffer holds, to a sink that is slow: in order and complete, the writer waits. */
	sink.count = 0;
	sink.blocked = true;
	for (unsigned i = 0; i < 10000; i++)
		out8(&f, COM1, i * 7);
	assert_true(sink.waits > 0);
	board_pio_write(f.board, 0, 0x604, 2, 5 << 10 | 1 << 13);
	assert_int_equal(f.power_offs, 1);
	for (unsigned i = 0; i < 10; i++)
		serial_flush(board_serial(f.board));
	assert_int_equal(sink.count, 10000);
	for (unsigned i = 0; i < 10000; i++)
		assert_int_equal((uint8_t)sink.bytes[i], (uint8_t)(i * 7));
	serial_set_output(board_serial(f.board), NULL, NULL, NULL);
	out8(&f, COM1, 'x');
	fixture_stop(&f);
}

static void test_serial_interrupts(void **state)
{
	struct fixture f;
	struct sink sink = {.lock = PTHREAD_MUTEX_INITIALIZER};

	fixture_start(&f, 1);
	pic_setup(&f, 1 << 4);
	out8(&f, COM1 + 2, 0x81); /* FIFOs, trigger level 8 */
	out8(&f, COM1 + 1, 0x02);
	assert_false(board_interrupt_pending(f.board, 0)); /* OUT2 connects the line */
	out8(&f, COM1 + 4, 0x0b);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x34);
	assert_int_equal(in8(&f, COM1 + 2), 0xc2);
	assert_int_equal(in8(&f, COM1 + 2), 0xc1);
	out8(&f, 0x20, 0x20);
	out8(&f, COM1, 'a'); /* empty again at once: an edge */
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x34);
	out8(&f, 0x20, 0x20);
	out8(&f, COM1, 'b'); /* even when the cause was not looked at */
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x34);
	out8(&f, 0x20, 0x20);
	in8(&f, COM1 + 2);
	/* Input below the trigger level: time-out; at the level: received data */
	serial_set_room(board_serial(f.board), sink_room, &sink);
	out8(&f, COM1 + 1, 0x05);
	assert_int_equal(serial_input(board_serial(f.board), (const uint8_t *)"abc", 3), 3);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x34);
	assert_int_equal(in8(&f, COM1 + 2), 0xcc);
	assert_int_equal(serial_input(board_serial(f.board), (const uint8_t *)"defghijklmnopqrstu", 18), 13);
	assert_int_equal(in8(&f, COM1 + 2), 0xc4);
	for (unsigned i = 0; i < 16; i++) {
		assert_int_equal(sink.rooms, 0);
		assert_int_equal(in8(&f, COM1 + 5) & 3, 1);
		assert_int_equal(in8(&f, COM1), 'a' + i);
	}
	assert_int_equal(in8(&f, COM1 + 5) & 1, 0);
	assert_int_equal(in8(&f, COM1 + 2), 0xc1);
	assert_int_equal(sink.rooms, 1);
	fixture_stop(&f);
}

/* As Linux's 8250 autoconfiguration looks for a 16550A. */
static void test_serial_probe(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	out8(&f, COM1 + 1, 0);
	assert_int_equal(in8(&f, COM1 + 1), 0);
	out8(&f, COM1 + 1, 0xff);
	assert_int_equal(in8(&f, COM1 + 1), 0x0f);
	out8(&f, COM1 + 1, 0);
	out8(&f, COM1 + 4, 0x1a); /* loopback, RTS, OUT2 */
	assert_int_equal(in8(&f, COM1 + 6) & 0xf0, 0x90);
	out8(&f, COM1 + 2, 7);
	assert_int_equal(in8(&f, COM1 + 2) >> 6, 3);
	/* Loopback of data, and its overrun */
	for (unsigned i = 0; i < 17; i++)
		out8(&f, COM1, i);
	assert_int_equal(in8(&f, COM1 + 5) & 3, 3);
	assert_int_equal(in8(&f, COM1 + 5) & 3, 1);
	assert_int_equal(in8(&f, COM1), 0);
	assert_int_equal(serial_input(board_serial(f.board), (const uint8_t *)"x", 1), 0);
	out8(&f, COM1 + 2, 7);
	assert_int_equal(in8(&f, COM1 + 5) & 1, 0);
	out8(&f, COM1 + 4, 0x0b);
	assert_int_equal(in8(&f, COM1 + 6) & 0xf0, 0xb0);
	in8(&f, COM1 + 6);
	assert_int_equal(in8(&f, COM1 + 6) & 0x0f, 0);
	/* The divisor latch and the scratch register */
	out8(&f, COM1 + 3, 0x83);
	out8(&f, COM1, 0x34);
	out8(&f, COM1 + 1, 0x12);
	assert_int_equal(in8(&f, COM1), 0x34);
	assert_int_equal(in8(&f, COM1 + 1), 0x12);
	out8(&f, COM1 + 3, 0x03);
	out8(&f, COM1 + 7, 0x5a);
	assert_int_equal(in8(&f, COM1 + 7), 0x5a);
	fixture_stop(&f);
}

/* As Linux's i8042 driver probes, and its ways to reboot. */
static void test_i8042_and_reset(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	assert_int_equal(in8(&f, 0x64) & 3, 0);
	out8(&f, 0x64, 0xaa);
	assert_int_equal(in8(&f, 0x64) & 1, 1);
	assert_int_equal(in8(&f, 0x60), 0x55);
	out8(&f, 0x64, 0x60);
	out8(&f, 0x60, 0x47);
	out8(&f, 0x64, 0x20);
	assert_int_equal(in8(&f, 0x60), 0x47);
	out8(&f, 0x64, 0xd3);
	out8(&f, 0x60, 0x5a);
	assert_int_equal(in8(&f, 0x64) & 0x21, 0x01);
	assert_int_equal(in8(&f, 0x60), 0x5a);
	out8(&f, 0x64, 0xa9);
	assert_int_equal(in8(&f, 0x60), 1);
	out8(&f, 0x60, 0xff); /* to the keyboard: no answer */
	assert_int_equal(in8(&f, 0x64) & 1, 0);
	assert_int_equal(f.resets, 0);
	out8(&f, 0x64, 0xfe);
	assert_int_equal(f.resets, 1);
	out8(&f, 0x92, in8(&f, 0x92) | 1);
	assert_int_equal(f.resets, 2);
	out8(&f, 0xcf9, 2);
	assert_int_equal(in8(&f, 0xcf9), 2);
	out8(&f, 0xcf9, 6);
	assert_int_equal(f.resets, 3);
	fixture_stop(&f);
}

static void test_power(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	apic_enable(&f, 0);
	ioapic_write(&f, 0x10 + 2 * 9, 0x8059);
	assert_int_equal(board_pio_read(f.board, 0, 0x604, 2) & 1, 1); /* SCI_EN */
	board_power_button(f.board);
	assert_false(board_interrupt_pending(f.board, 0));
	board_pio_write(f.board, 0, 0x602, 2, 1 << 8);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x59);
	assert_int_equal(board_pio_read(f.board, 0, 0x600, 2), 1 << 8);
	board_pio_write(f.board, 0, 0x600, 2, 1 << 8);
	apic_write(&f, 0, 0xb0, 0);
	assert_false(board_interrupt_pending(f.board, 0));
	board_power_button(f.board);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x59);
	assert_int_equal(f.power_offs, 0);
	board_pio_write(f.board, 0, 0x604, 2, 3 << 10 | 1 << 13); /* another sleep state: none */
	assert_int_equal(f.power_offs, 0);
	board_pio_write(f.board, 0, 0x605, 1, (5 << 10 | 1 << 13) >> 8);
	assert_int_equal(f.power_offs, 1);
	fixture_stop(&f);
}

/* Nobody there; every port and chip register with every size, as a hostile guest would. */
static void test_everything(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	assert_int_equal(board_pio_read(f.board, 0, 0x300, 1), 0xff);
	assert_int_equal(board_pio_read(f.board, 0, 0x300, 4), 0xffffffff);
	assert_int_equal(board_mmio_read(f.board, 0, 0xd0000000, 2), 0xffff);
	out8(&f, 0x80, 1);
	for (unsigned size = 1; size <= 4; size *= 2) {
		for (unsigned port = 0; port < 0x10000; port++) {
			board_pio_read(f.board, 0, port, size);
			board_pio_write(f.board, 0, port, size, 0xffffffff);
			board_pio_write(f.board, 0, port, size, port * 0x01234567u);
		}
	}
	for (unsigned size = 1; size <= 8; size *= 2) {
		for (unsigned offset = 0; offset < 0x1000; offset++) {
			board_mmio_read(f.board, 0, BOARD_LAPIC_BASE + offset, size);
			board_mmio_write(f.board, 0, BOARD_LAPIC_BASE + offset, size, ~0ull);
			board_mmio_write(f.board, 0, BOARD_LAPIC_BASE + offset, size, offset * 0x12345ull);
			board_mmio_read(f.board, 0, BOARD_IOAPIC_BASE + offset, size);
			board_mmio_write(f.board, 0, BOARD_IOAPIC_BASE + offset, size, ~0ull);
			board_interrupt_ack(f.board, 0);
		}
	}
	board_reset(f.board);
	assert_false(board_interrupt_pending(f.board, 0));
	assert_int_equal(apic_read(&f, 0, 0xf0), 0xff);
	assert_int_equal(ioapic_read(&f, 0x20), 0x10000);
	fixture_stop(&f);
}

/* A hostile guest on two vCPUs: any register, any value, any order, while the timers run. */
static uint64_t next_random(uint64_t *seed)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed;
}

struct hostile {
	struct fixture *f;
	unsigned cpu;
	uint64_t seed;
};

static void *hostile_thread(void *opaque)
{
	static const uint16_t ports[] = {0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x40, 0x41, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70,
		0x71, 0x92, 0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x600, 0x602, 0x604, 0x608, 0xcf8, 0xcfc, 0xcf9};
	static const uint32_t msrs[] = {0x1b, 0x6e0};
	struct hostile *h = opaque;
	struct board *b = h->f->board;

	for (unsigned i = 0; i < 60000; i++) {
		uint64_t r = next_random(&h->seed), value = next_random(&h->seed) >> (r >> 8 & 63);
		uint16_t port = ports[(r >> 16) % ARRAY_SIZE(ports)];
		uint32_t offset = (r >> 16 & 0x3f) * 16;
		uint32_t msr = r >> 40 & 1 ? msrs[r >> 41 & 1] : 0x800 + (r >> 16 & 0x3f);
		unsigned size = 1 << (r >> 32 & 3);

		switch (r & 15) {
		case 0 ... 3:
			board_pio_write(b, h->cpu, port, min(size, 4u), value);
			break;
		case 4:
			board_pio_read(b, h->cpu, port, min(size, 4u));
			break;
		case 5 ... 7:
			board_mmio_write(b, h->cpu, BOARD_LAPIC_BASE + offset, size, value);
			break;
		case 8:
			board_mmio_read(b, h->cpu, BOARD_LAPIC_BASE + offset, size);
			break;
		case 9 ... 10:
			board_mmio_write(b, h->cpu, BOARD_IOAPIC_BASE + (r >> 20 & 1) * 16, 4, value);
			break;
		case 11:
			board_msr_write(b, h->cpu, msr, msr == 0x1b ? 0xfee00000 | (value & 0xd00) : value);
			break;
		case 12:
			board_msr_read(b, h->cpu, msr, &value);
			break;
		case 13:
			board_irq(b, r >> 20 & 31, r >> 25 & 1);
			break;
		case 14:
			board_msi(b, 0xfee00000 | (value & 0xfffff), r >> 16);
			break;
		default:
			if (board_interrupt_pending(b, h->cpu))
				board_interrupt_ack(b, h->cpu);
		}
	}
	return NULL;
}

static void test_hostile(void **state)
{
	struct fixture f;
	struct hostile hostile[2];
	pthread_t threads[2];
	uint64_t seed = clock_now();

	print_message("seed %llu\n", (unsigned long long)seed);
	fixture_start(&f, 2);
	for (unsigned i = 0; i < 2; i++) {
		hostile[i] = (struct hostile){&f, i, (seed + i) | 1};
		pthread_create(&threads[i], NULL, hostile_thread, &hostile[i]);
	}
	for (unsigned i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	/* The board still works. */
	board_reset(f.board);
	apic_enable(&f, 1);
	board_msi(f.board, 0xfee01000, 0x81);
	assert_int_equal(board_interrupt_ack(f.board, 1), 0x81);
	fixture_stop(&f);
}

static void test_bad_configuration(void **state)
{
	struct fixture f;
	struct board *board = NULL;
	struct board_host host = {0};
	struct error err = {0};

	fixture_start(&f, 64);
	struct board_config config = {.memory = &f.memory, .loop = f.loop, .host = &host, .tsc_hz = 1};

	assert_int_equal(board_create(&board, &config, &err), -EINVAL);
	config.cpus = 65;
	assert_int_equal(board_create(&board, &config, &err), -EINVAL);
	assert_string_equal(err.text, "board: 65 CPUs; choose 1 to 64");
	config.cpus = 1;
	config.tsc_hz = 0;
	assert_int_equal(board_create(&board, &config, &err), -EINVAL);
	assert_null(board);
	fixture_stop(&f);
}

/* ---- memory ---- */

struct written {
	unsigned calls;
	uint64_t gpa, len;
};

static void on_written(void *opaque, uint64_t gpa, uint64_t len)
{
	struct written *w = opaque;

	w->calls++;
	w->gpa = gpa;
	w->len = len;
}

struct changes {
	unsigned came, gone;
	bool refuse;
};

static int on_slot(void *opaque, const struct memory_range *slot, bool comes, struct error *err)
{
	struct changes *c = opaque;

	if (comes && c->refuse)
		return error_set(err, ENOMEM, "no");
	c->came += comes;
	c->gone += !comes;
	return 0;
}

static void test_memory_slots(void **state)
{
	struct guest_memory m;
	struct error err = {0};
	struct changes c = {0};
	uint8_t bytes[16] = {1, 2, 3}, got[16];
	uint64_t index, base;
	struct stat before, after;

	assert_int_equal(memory_create_with_slots(&m, 32 << 20, 1 << 20, &err), -EINVAL);
	assert_int_equal(memory_create_with_slots(&m, 32 << 20, 300ull << 30, &err), -EINVAL);
	assert_int_equal(memory_create_with_slots(&m, (32 << 20) + 4096, 1ull << 30, &err), 0);
	m.slot_changes = on_slot;
	m.opaque = &c;
	assert_int_equal(m.slots.count, 7); /* of 128 MiB */
	base = m.slots.all.gpa;
	assert_int_equal(base, MEMORY_HIGH);
	assert_false(memory_write(&m, base, bytes, 1));
	assert_null(memory_page(&m, base, &index));
	assert_int_equal(memory_plug(&m, 1, &err), 0);
	assert_int_equal(memory_plug(&m, 2, &err), 0);
	assert_int_equal(c.came, 2);
	assert_false(memory_write(&m, base, bytes, 1));
	assert_false(memory_write(&m, base + (1 << 27) - 1, bytes, 2));
	assert_true(memory_write(&m, base + (1 << 27), bytes, 16));
	assert_true(memory_write(&m, base + (2 << 27) - 8, bytes, 16)); /* over two slots */
	assert_true(memory_write(&m, base + (3 << 27) - 16, bytes, 16));
	assert_false(memory_write(&m, base + (3 << 27) - 15, bytes, 16));
	assert_false(memory_write(&m, base + (7ull << 27) - 1, bytes, 2));
	assert_ptr_equal(memory_page(&m, base + (1 << 27) + 5, &index), m.slots.all.host + (1 << 27));
	assert_true(index < memory_page_count(&m));
	assert_int_equal(index, ((34 << 20) + (1 << 27)) >> 12);
	fstat(m.fd, &before);
	memory_unplug(&m, 1);
	fstat(m.fd, &after);
	assert_true(after.st_blocks < before.st_blocks); /* the host has it back */
	assert_int_equal(c.gone, 1);
	assert_false(memory_read(&m, base + (1 << 27), got, 16));
	assert_false(memory_read(&m, base + (2 << 27) - 8, got, 16));
	c.refuse = true;
	assert_int_equal(memory_plug(&m, 1, &err), -ENOMEM);
	assert_false(memory_read(&m, base + (1 << 27), got, 16));
	c.refuse = false;
	assert_int_equal(memory_plug(&m, 1, &err), 0);
	assert_true(memory_read(&m, base + (1 << 27), got, 16));
	assert_int_equal(got[0], 0);
	memory_destroy(&m);
}

static uint32_t in32(struct fixture *f, uint16_t port)
{
	return board_pio_read(f->board, 0, port, 4);
}

static void out32(struct fixture *f, uint16_t port, uint32_t value)
{
	board_pio_write(f->board, 0, port, 4, value);
}

/* The registers of hotplug.h as the DSDT uses them, and as a hostile guest does. */
static void test_hotplug(void **state)
{
	struct fixture f;
	const uint16_t cpu = BOARD_PORT_HOTPLUG, memory = cpu + 32;

	fixture_start(&f, 4);
	assert_int_equal(in32(&f, cpu), 0xf);
	assert_int_equal(in32(&f, cpu + 4), 0);
	assert_int_equal(in32(&f, memory), 0);
	/* ejection: never of vCPU 0 or of what is not there */
	static const uint32_t none[] = {0, 4, 63, 64, 0x100, 0xffffffff};
	for (unsigned i = 0; i < ARRAY_SIZE(none); i++)
		out32(&f, cpu + 24, none[i]);
	assert_int_equal(f.hotplugs, 0);
	board_hotplug_ask_removal(f.board, BOARD_HOTPLUG_CPU, 3);
	assert_int_equal(in32(&f, cpu + 16), 8);
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_GPE, 2), 1 << BOARD_GPE_CPU);
	out32(&f, cpu + 16, 8);
	assert_int_equal(in32(&f, cpu + 16), 0);
	out32(&f, cpu + 28, 3u << 16 | 0x82 << 8 | 3); /* _OST: busy */
	assert_int_equal(f.hotplugs, 1);
	assert_int_equal(f.hotplug_event, BOARD_HOTPLUG_REFUSED);
	out32(&f, cpu + 28, 3u << 16 | 0x84 << 8 | 3); /* in progress */
	out32(&f, cpu + 28, 1u << 16 | 0x01 << 8 | 3); /* of an addition */
	assert_int_equal(f.hotplugs, 1);
	out32(&f, cpu + 24, 3);
	assert_int_equal(f.hotplugs, 2);
	assert_int_equal(f.hotplug_event, BOARD_HOTPLUG_GONE);
	assert_int_equal(f.hotplug_number, 3);
	assert_int_equal(in32(&f, cpu), 7);
	out32(&f, cpu + 24, 3); /* again */
	assert_int_equal(f.hotplugs, 2);
	/* an interrupt does not reach it any more, until it is there again */
	assert_int_equal(board_send_ipi(f.board, 0, 0xf, 0x55), 3);
	board_hotplug_add(f.board, BOARD_HOTPLUG_CPU, 3);
	assert_int_equal(in32(&f, cpu), 0xf);
	assert_int_equal(in32(&f, cpu + 8), 8);
	assert_int_equal(board_send_ipi(f.board, 0, 0xf, 0x55), 4);
	board_hotplug_add(f.board, BOARD_HOTPLUG_MEMORY, 40);
	assert_int_equal(in32(&f, memory + 4), 1 << 8);
	assert_int_equal(in32(&f, memory + 12), 1 << 8);
	board_reset(f.board);
	assert_int_equal(in32(&f, memory + 4), 1 << 8);
	assert_int_equal(in32(&f, memory + 12), 0);
	/* odd widths */
	assert_int_equal(board_pio_read(f.board, 0, cpu, 1), 0);
	board_pio_write(f.board, 0, cpu + 24, 1, 2);
	board_pio_write(f.board, 0, memory + 30, 2, 2);
	assert_int_equal(in32(&f, cpu), 0xf);
	fixture_stop(&f);
}

static void test_memory(void **state)
{
	struct guest_memory m;
	struct error err = {0};
	struct written w = {0};
	uint8_t bytes[16] = {1, 2, 3};
	uint64_t index;

	assert_int_equal(memory_create(&m, 12345, &err), -EINVAL);
	assert_int_equal(memory_create(&m, 4096, &err), -EINVAL);
	/* 4 GiB: 3 below, 1 above */
	assert_int_equal(memory_create(&m, 4ull << 30, &err), 0);
	assert_int_equal(m.ranges, 2);
	assert_int_equal(ftruncate(m.fd, 0), -1); /* sealed */
	assert_true(memory_write(&m, MEMORY_HOLE - 16, bytes, 16));
	assert_false(memory_write(&m, MEMORY_HOLE - 15, bytes, 16));
	assert_false(memory_write(&m, MEMORY_HOLE, bytes, 1));
	assert_false(memory_write(&m, MEMORY_HIGH - 1, bytes, 2));
	assert_true(memory_write(&m, MEMORY_HIGH, bytes, 16));
	assert_true(memory_write(&m, (5ull << 30) - 16, bytes, 16));
	assert_false(memory_write(&m, (5ull << 30) - 15, bytes, 16));
	assert_false(memory_read(&m, ~0ull, bytes, 2));
	assert_null(memory_for_read(&m, 8, ~0ull - 4));
	assert_null(memory_for_write(&m, 5ull << 30, 1));
	assert_true(memory_read(&m, MEMORY_HIGH, bytes, 0));
	assert_ptr_equal(memory_page(&m, MEMORY_HIGH + 0x1234, &index), m.range[1].host + 0x1000);
	assert_int_equal(index, (MEMORY_HOLE >> 12) + 1);
	assert_null(memory_page(&m, MEMORY_HOLE, &index));
	/* Writes to pages with code are told, those pages alone */
	m.written = on_written;
	m.opaque = &w;
	m.page_flags[(MEMORY_HOLE >> 12) + 1] = MEMORY_PAGE_CODE;
	assert_true(memory_write(&m, MEMORY_HIGH, bytes, 16));
	assert_int_equal(w.calls, 0);
	assert_true(memory_write(&m, MEMORY_HIGH + 0xff8, bytes, 16));
	assert_int_equal(w.calls, 1);
	assert_int_equal(w.gpa, MEMORY_HIGH + 0x1000);
	assert_int_equal(w.len, 8);
	memory_destroy(&m);
}

/* ---- spaces ---- */

struct probe {
	struct io_region region;
	uint64_t last;
};

static uint64_t probe_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct probe *p = container_of(region, struct probe, region);

	return p->region.size << 32 | offset;
}

static void probe_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	container_of(region, struct probe, region)->last = value;
}

static const struct io_ops probe_ops = {probe_read, probe_write};

static void test_space(void **state)
{
	struct space *s;
	struct error err = {0};
	struct probe p[4];
	uint64_t v;

	assert_int_equal(space_create(&s, "test", 0x10000, &err), 0);
	for (unsigned i = 0; i < 4; i++)
		p[i] = (struct probe){.region = {"probe", &probe_ops, 0x100 * (4 - i), 0x100 - 0x10 * i, false}};
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(space_add(s, &p[i].region, &err), 0);
	assert_int_equal(space_add(s, &p[0].region, &err), -EEXIST);
	struct probe q = {.region = {"q", &probe_ops, 0x1d0, 0x30, false}};

	assert_int_equal(space_add(s, &q.region, &err), 0); /* just in the gap */
	q.region.base = 0x1c0;
	space_remove(s, &q.region);
	assert_int_equal(space_add(s, &q.region, &err), -EEXIST);
	assert_non_null(strstr(err.text, "overlaps"));
	q.region.base = 0xfff0;
	assert_int_equal(space_add(s, &q.region, &err), -EINVAL);
	q.region.base = ~0ull - 4;
	assert_int_equal(space_add(s, &q.region, &err), -EINVAL);
	assert_true(space_read(s, 0x4fc, 4, &v));
	assert_int_equal(v, 0x100ull << 32 | 0xfc);
	assert_false(space_read(s, 0x4fd, 4, &v));
	assert_false(space_read(s, 0xff, 1, &v));
	assert_false(space_read(s, ~0ull, 8, &v));
	assert_true(space_write(s, 0x200, 1, 7));
	assert_int_equal(p[2].last, 7);
	space_remove(s, &p[2].region);
	assert_false(p[2].region.mapped);
	assert_false(space_write(s, 0x200, 1, 8));
	space_remove(s, &p[2].region);
	space_destroy(s);
}

struct mover {
	struct space *space;
	struct probe probe;
	atomic_bool stop;
};

static void *move(void *opaque)
{
	struct mover *m = opaque;

	for (unsigned i = 0; !atomic_load(&m->stop); i++) {
		space_remove(m->space, &m->probe.region);
		m->probe.region.base = i & 1 ? 0x1000 : 0x3000;
		space_add(m->space, &m->probe.region, NULL);
	}
	return NULL;
}

/* A region that stays is always found, while another moves around it. */
static void test_space_threads(void **state)
{
	struct mover m = {.probe = {.region = {"mover", &probe_ops, 0x1000, 0x100, false}}};
	struct probe fixed = {.region = {"fixed", &probe_ops, 0x2000, 0x100, false}};
	pthread_t thread;
	uint64_t v;

	assert_int_equal(space_create(&m.space, "test", 0x10000, NULL), 0);
	assert_int_equal(space_add(m.space, &fixed.region, NULL), 0);
	pthread_create(&thread, NULL, move, &m);
	for (unsigned i = 0; i < 200000; i++) {
		assert_true(space_read(m.space, 0x2010, 4, &v));
		assert_int_equal(v, 0x100ull << 32 | 0x10);
		if (space_read(m.space, 0x1020, 4, &v))
			assert_int_equal(v, 0x100ull << 32 | 0x20);
	}
	atomic_store(&m.stop, true);
	pthread_join(thread, NULL);
	space_destroy(m.space);
}

/* PCI hot plug's registers as the DSDT uses them, and the event's status and enable (ACPI 6.4, section 4.8.4.1). */
static void test_pci_hotplug(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	board_pci_added(f.board, 3);
	board_pci_ask_removal(f.board, 5);
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_GPE, 2), 1 << BOARD_GPE_PCI);
	board_pio_write(f.board, 0, BOARD_PORT_GPE, 2, 1 << BOARD_GPE_PCI); /* a one clears */
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_GPE, 2), 0);
	board_pio_write(f.board, 0, BOARD_PORT_GPE + 2, 1, 0xff);
	board_pio_write(f.board, 0, BOARD_PORT_GPE + 3, 1, 0x80);
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_GPE, 4), 0x80ff0000);
	/* Each register forgets what it told. */
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_PCI_HOTPLUG, 2), 0);
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_PCI_HOTPLUG, 4), 1 << 3);
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_PCI_HOTPLUG, 4), 0);
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_PCI_HOTPLUG + 4, 4), 1 << 5);
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_PCI_HOTPLUG + 4, 4), 0);
	assert_int_equal(f.ejected, 0);
	board_pio_write(f.board, 0, BOARD_PORT_PCI_HOTPLUG + 8, 4, 1 << 5 | 1); /* the host bridge stays */
	assert_int_equal(f.ejected, 1 << 5);
	board_pio_write(f.board, 0, BOARD_PORT_PCI_HOTPLUG + 8, 2, 1 << 6);
	board_pio_write(f.board, 0, BOARD_PORT_PCI_HOTPLUG, 4, 1 << 6);
	assert_int_equal(f.ejected, 1 << 5);
	board_pci_added(f.board, 4);
	board_reset(f.board);
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_PCI_HOTPLUG, 4), 0);
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_GPE, 4), 0);
	fixture_stop(&f);
}

/* Ports by which a guest's kernel says something about itself, and the number that tells it that it was copied. */
static void test_words(void **state)
{
	struct fixture f;
	uint8_t first[GENERATION_BYTES], second[GENERATION_BYTES];
	static const uint8_t none[GENERATION_BYTES];

	fixture_start(&f, 1);
	assert_int_equal(in8(&f, BOARD_PORT_PVPANIC), 3);
	out8(&f, BOARD_PORT_PVPANIC, 2);
	out8(&f, BOARD_PORT_PVPANIC, 1);
	out8(&f, BOARD_PORT_PVPANIC, 0xfc);
	assert_int_equal(f.panics, 1);
	assert_int_equal(f.crash_kernels, 1);
	assert_int_equal(f.resets + f.power_offs, 0);

	board_pio_write(f.board, 0, BOARD_PORT_DEBUG_EXIT, 4, 0x12345678);
	assert_int_equal(f.debug_exits, 1);
	assert_int_equal(f.debug_value, 0x12345678);

	assert_int_equal(board_write_generation(f.board, NULL), 0);
	assert_true(memory_read(&f.memory, BOARD_GENERATION, first, sizeof(first)));
	assert_memory_not_equal(first, none, sizeof(first));
	board_reset(f.board); /* a reset is no copy */
	assert_int_equal(board_write_generation(f.board, NULL), 0);
	assert_true(memory_read(&f.memory, BOARD_GENERATION, second, sizeof(second)));
	assert_memory_equal(first, second, sizeof(first));
	assert_int_equal(board_new_generation(f.board, NULL), 0);
	assert_true(memory_read(&f.memory, BOARD_GENERATION, second, sizeof(second)));
	assert_memory_not_equal(first, second, sizeof(first));
	assert_int_equal(board_pio_read(f.board, 0, BOARD_PORT_GPE, 2), 1 << BOARD_GPE_GENERATION);
	fixture_stop(&f);
}

const struct CMUnitTest legacy_tests[] = {
	cmocka_unit_test(test_serial_output),
	cmocka_unit_test(test_serial_interrupts),
	cmocka_unit_test(test_serial_probe),
	cmocka_unit_test(test_i8042_and_reset),
	cmocka_unit_test(test_power),
	cmocka_unit_test(test_everything),
	cmocka_unit_test(test_hostile),
	cmocka_unit_test(test_bad_configuration),
	cmocka_unit_test(test_memory),
	cmocka_unit_test(test_memory_slots),
	cmocka_unit_test(test_hotplug),
	cmocka_unit_test(test_pci_hotplug),
	cmocka_unit_test(test_words),
	cmocka_unit_test(test_space),
	cmocka_unit_test(test_space_threads),
};
const size_t legacy_test_count = ARRAY_SIZE(legacy_tests);
