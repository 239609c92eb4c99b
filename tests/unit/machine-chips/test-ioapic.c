/* The IOAPIC and MSIs: destinations, edges, levels and their end. */
#include "fixture.h"

#define LEVEL 0x8000
#define MASKED 0x10000

static void route(struct fixture *f, unsigned pin, uint32_t low, uint8_t destination)
{
	ioapic_write(f, 0x11 + 2 * pin, (uint32_t)destination << 24);
	ioapic_write(f, 0x10 + 2 * pin, low);
}

static void eoi(struct fixture *f, unsigned cpu)
{
	apic_write(f, cpu, 0xb0, 0);
}

static void test_registers(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	assert_int_equal(ioapic_read(&f, 1), 0x170020);
	assert_int_equal(ioapic_read(&f, 0x10), MASKED);
	ioapic_write(&f, 0, 0xffffffff);
	assert_int_equal(ioapic_read(&f, 0), 0x0f000000);
	ioapic_write(&f, 0x3e, 0xffffffff);
	assert_int_equal(ioapic_read(&f, 0x3e), 0x1ffff & ~0x5000); /* status and remote IRR cannot be set */
	ioapic_write(&f, 0x40, 0xffffffff);
	assert_int_equal(ioapic_read(&f, 0x40), 0);
	assert_int_equal(ioapic_read(&f, 0xff), 0);
	fixture_stop(&f);
}

static void test_edge(void **state)
{
	struct fixture f;

	fixture_start(&f, 2);
	apic_enable(&f, 1);
	route(&f, 4, 0x41, 1);
	board_irq(f.board, 4, true);
	assert_int_equal(f.kicks[1], 1);
	assert_int_equal(board_interrupt_ack(f.board, 1), 0x41);
	eoi(&f, 1);
	board_irq(f.board, 4, true);
	assert_int_equal(board_interrupt_ack(f.board, 1), -1);
	board_irq(f.board, 4, false);
	/* Masked edges are lost. */
	route(&f, 4, 0x41 | MASKED, 1);
	board_irq(f.board, 4, true);
	route(&f, 4, 0x41, 1);
	assert_int_equal(board_interrupt_ack(f.board, 1), -1);
	/* Interrupt 0 comes in at pin 2. */
	route(&f, 2, 0x42, 1);
	board_irq(f.board, 0, false);
	board_irq(f.board, 0, true);
	assert_int_equal(board_interrupt_ack(f.board, 1), 0x42);
	fixture_stop(&f);
}

static void test_level(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	apic_enable(&f, 0);
	route(&f, 20, 0x51 | LEVEL, 0);
	board_irq(f.board, 20, true);
	assert_true(ioapic_read(&f, 0x38) & 1 << 14);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x51);
	assert_int_equal(apic_read(&f, 0, 0x1a0), 1 << 17); /* TMR, vectors 0x40 to 0x5f */
	assert_false(board_interrupt_pending(f.board, 0));
	eoi(&f, 0); /* still asserted: at once again */
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x51);
	board_irq(f.board, 20, false);
	eoi(&f, 0);
	assert_false(board_interrupt_pending(f.board, 0));
	assert_false(ioapic_read(&f, 0x38) & 1 << 14);
	/* Masked while asserted, then unmasked. */
	route(&f, 20, 0x51 | LEVEL | MASKED, 0);
	board_irq(f.board, 20, true);
	assert_false(board_interrupt_pending(f.board, 0));
	route(&f, 20, 0x51 | LEVEL, 0);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x51);
	/* No broadcast of the end: the EOI register does it. */
	apic_write(&f, 0, 0xf0, 0x11ff);
	eoi(&f, 0);
	assert_true(ioapic_read(&f, 0x38) & 1 << 14);
	board_irq(f.board, 20, false);
	board_mmio_write(f.board, 0, BOARD_IOAPIC_BASE + 0x40, 4, 0x51);
	assert_false(ioapic_read(&f, 0x38) & 1 << 14);
	/* Making the entry an edge clears a stuck one. */
	board_irq(f.board, 20, true);
	assert_true(ioapic_read(&f, 0x38) & 1 << 14);
	route(&f, 20, 0x51 | MASKED, 0);
	assert_false(ioapic_read(&f, 0x38) & 1 << 14);
	fixture_stop(&f);
}

static void test_destinations(void **state)
{
	struct fixture f;

	fixture_start(&f, 4);
	for (unsigned i = 0; i < 4; i++) {
		apic_enable(&f, i);
		apic_write(&f, i, 0xd0, 1u << (24 + i)); /* flat logical */
	}
	route(&f, 16, 0x61 | 1 << 11, 0x0a);
	board_irq(f.board, 16, true);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(board_interrupt_ack(f.board, i), i & 1 ? 0x61 : -1);
	for (unsigned i = 0; i < 4; i++)
		eoi(&f, i);
	route(&f, 17, 0x62, 0xff); /* broadcast */
	board_irq(f.board, 17, true);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(board_interrupt_ack(f.board, i), 0x62);
	/* Lowest priority */
	for (unsigned i = 0; i < 4; i++) {
		eoi(&f, i);
		apic_write(&f, i, 0x80, i == 2 ? 0x10 : 0x40);
	}
	route(&f, 18, 0x63 | 1 << 11 | 1 << 8, 0x0f);
	board_irq(f.board, 18, true);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(board_interrupt_ack(f.board, i), i == 2 ? 0x63 : -1);
	/* Cluster model: 0x11 0x12 0x21 0x22 */
	for (unsigned i = 0; i < 4; i++) {
		apic_write(&f, i, 0x80, 0);
		apic_write(&f, i, 0xe0, 0x0fffffff);
		apic_write(&f, i, 0xd0, (i / 2 + 1) << 28 | (i % 2 + 1) << 24);
	}
	route(&f, 19, 0x71 | 1 << 11, 0x23);
	board_irq(f.board, 19, true);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(board_interrupt_ack(f.board, i), i >= 2 ? 0x71 : -1);
	/* Nobody there: nothing happens, and the level does not hang on a remote IRR. */
	route(&f, 21, 0x72 | LEVEL, 9);
	board_irq(f.board, 21, true);
	assert_false(ioapic_read(&f, 0x3a) & 1 << 14);
	/* NMI by a pin */
	route(&f, 22, 4 << 8, 3);
	board_irq(f.board, 22, true);
	assert_int_equal(f.nmis[3], 1);
	fixture_stop(&f);
}

static void test_msi(void **state)
{
	struct fixture f;
	uint32_t word = 0;

	fixture_start(&f, 2);
	apic_enable(&f, 1);
	board_msi(f.board, 0xfee01000, 0x81);
	assert_int_equal(board_interrupt_ack(f.board, 1), 0x81);
	board_msi(f.board, 0xfee02000, 0x82); /* no such vCPU */
	board_msi(f.board, 0xfee01000, 0x05); /* not a vector one can receive */
	assert_false(board_interrupt_pending(f.board, 1));
	apic_write(&f, 1, 0x280, 0);
	assert_int_equal(apic_read(&f, 1, 0x280), 1 << 6);
	/* An address that is no interrupt is memory. */
	board_msi(f.board, 0x2000, 0x1234567);
	assert_true(memory_read(&f.memory, 0x2000, &word, 4));
	assert_int_equal(word, 0x1234567);
	board_msi(f.board, ~0ull, 1);
	fixture_stop(&f);
}

const struct CMUnitTest ioapic_tests[] = {
	cmocka_unit_test(test_registers),
	cmocka_unit_test(test_edge),
	cmocka_unit_test(test_level),
	cmocka_unit_test(test_destinations),
	cmocka_unit_test(test_msi),
};
const size_t ioapic_test_count = ARRAY_SIZE(ioapic_tests);
