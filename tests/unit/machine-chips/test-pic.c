/* The 8259 pair, driven as kernels and DOS do. */
#include "fixture.h"

static int ack(struct fixture *f)
{
	return board_interrupt_pending(f->board, 0) ? board_interrupt_ack(f->board, 0) : -1;
}

static void pulse(struct fixture *f, unsigned irq)
{
	board_irq(f->board, irq, true);
	board_irq(f->board, irq, false);
}

/* Edge, INTA, EOI; the boot processor hears of it. */
static void test_edge(void **state)
{
	struct fixture f;

	fixture_start(&f, 2);
	pic_setup(&f, 1 << 4 | 1 << 2);
	assert_int_equal(ack(&f), -1);
	pulse(&f, 4);
	assert_int_equal(f.kicks[0], 1);
	assert_int_equal(f.kicks[1], 0);
	assert_false(board_interrupt_pending(f.board, 1));
	assert_int_equal(ack(&f), 0x34);
	assert_int_equal(ack(&f), -1);
	out8(&f, 0x20, 0x0b);
	assert_int_equal(in8(&f, 0x20), 1 << 4); /* in service */
	pulse(&f, 4);
	assert_int_equal(ack(&f), -1); /* blocked by itself */
	out8(&f, 0x20, 0x0a);
	assert_int_equal(in8(&f, 0x20), 1 << 4); /* requested */
	out8(&f, 0x20, 0x20);
	assert_int_equal(ack(&f), 0x34);
	out8(&f, 0x20, 0x64);
	assert_int_equal(ack(&f), -1);
	/* A level that stays makes one edge. */
	board_irq(f.board, 4, true);
	assert_int_equal(ack(&f), 0x34);
	out8(&f, 0x20, 0x20);
	board_irq(f.board, 4, true);
	assert_int_equal(ack(&f), -1);
	fixture_stop(&f);
}

static void test_cascade_and_priority(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	pic_setup(&f, 0xffff);
	pulse(&f, 12);
	pulse(&f, 3);
	/* Slave inputs rank between 1 and 3. */
	assert_int_equal(ack(&f), 0x38 + 4);
	assert_int_equal(ack(&f), -1);
	out8(&f, 0xa0, 0x20);
	out8(&f, 0x20, 0x20);
	assert_int_equal(ack(&f), 0x33);
	pulse(&f, 1);
	assert_int_equal(ack(&f), 0x31); /* nests */
	out8(&f, 0x20, 0x20);
	out8(&f, 0x20, 0x20);
	/* Two on the slave: the second after the EOIs of the first. */
	pulse(&f, 11);
	pulse(&f, 10);
	assert_int_equal(ack(&f), 0x3a);
	assert_int_equal(ack(&f), -1);
	out8(&f, 0xa0, 0x62);
	assert_int_equal(ack(&f), -1); /* the master still serves its input 2 */
	out8(&f, 0x20, 0x62);
	assert_int_equal(ack(&f), 0x3b);
	fixture_stop(&f);
}

static void test_mask_and_level(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	pic_setup(&f, 1 << 2);
	pulse(&f, 5);
	assert_int_equal(ack(&f), -1);
	out8(&f, 0x21, 0xff & ~(1 << 5 | 1 << 2));
	assert_int_equal(f.kicks[0], 1);
	assert_int_equal(ack(&f), 0x35); /* an edge waits behind the mask */
	out8(&f, 0x20, 0x20);
	/* Level-triggered: again while it stays high, gone when it falls. */
	board_pio_write(f.board, 0, 0x4d0, 2, 0xffff);
	assert_int_equal(board_pio_read(f.board, 0, 0x4d0, 2), 0xdef8);
	board_irq(f.board, 5, true);
	assert_int_equal(ack(&f), 0x35);
	out8(&f, 0x20, 0x20);
	assert_int_equal(ack(&f), 0x35);
	out8(&f, 0x20, 0x20);
	board_irq(f.board, 5, false);
	assert_int_equal(ack(&f), -1);
	fixture_stop(&f);
}

static void test_modes(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	pic_setup(&f, 0xff);
	/* Special mask mode: a masked level in service lets lower ones through. */
	pulse(&f, 3);
	assert_int_equal(ack(&f), 0x33);
	pulse(&f, 6);
	assert_int_equal(ack(&f), -1);
	out8(&f, 0x20, 0x68);
	out8(&f, 0x21, 1 << 3);
	assert_int_equal(ack(&f), 0x36);
	out8(&f, 0x20, 0x48);
	out8(&f, 0x20, 0x66);
	out8(&f, 0x20, 0x63);
	out8(&f, 0x21, 0);
	/* Rotation: after the EOI of 4 it is the lowest, 5 the highest. */
	pulse(&f, 4);
	assert_int_equal(ack(&f), 0x34);
	out8(&f, 0x20, 0xa0);
	pulse(&f, 1);
	pulse(&f, 5);
	assert_int_equal(ack(&f), 0x35);
	out8(&f, 0x20, 0x20);
	assert_int_equal(ack(&f), 0x31);
	out8(&f, 0x20, 0x20);
	out8(&f, 0x20, 0xc7); /* back to normal */
	/* Poll */
	pulse(&f, 6);
	out8(&f, 0x20, 0x0c);
	assert_int_equal(in8(&f, 0x20), 0x86);
	out8(&f, 0x20, 0x0c);
	assert_int_equal(in8(&f, 0x20), 0);
	out8(&f, 0x20, 0x20);
	/* Automatic EOI */
	out8(&f, 0x20, 0x11);
	out8(&f, 0x21, 0x30);
	out8(&f, 0x21, 0x04);
	out8(&f, 0x21, 0x03);
	pulse(&f, 1);
	assert_int_equal(ack(&f), 0x31);
	pulse(&f, 1);
	assert_int_equal(ack(&f), 0x31);
	fixture_stop(&f);
}

/* A request that goes before its INTA. */
static void test_vanished(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	pic_setup(&f, 0xffff);
	board_pio_write(f.board, 0, 0x4d0, 2, 0xffff);
	board_irq(f.board, 11, true);
	assert_true(board_interrupt_pending(f.board, 0));
	board_irq(f.board, 11, false);
	assert_false(board_interrupt_pending(f.board, 0));
	assert_int_equal(board_interrupt_ack(f.board, 0), -1);
	fixture_stop(&f);
}

/* The APIC switches the virtual wire off and on. */
static void test_virtual_wire(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	pic_setup(&f, 0xff);
	apic_write(&f, 0, 0x350, 0x10000);
	pulse(&f, 4);
	assert_int_equal(f.kicks[0], 0);
	assert_false(board_interrupt_pending(f.board, 0));
	apic_write(&f, 0, 0xf0, 0x1ff);
	apic_write(&f, 0, 0x350, 0x700);
	assert_int_equal(f.kicks[0], 1);
	apic_write(&f, 0, 0x80, 0xff); /* the task priority does not hold ExtINT back */
	assert_int_equal(ack(&f), 0x34);
	fixture_stop(&f);
}

const struct CMUnitTest pic_tests[] = {
	cmocka_unit_test(test_edge),
	cmocka_unit_test(test_cascade_and_priority),
	cmocka_unit_test(test_mask_and_level),
	cmocka_unit_test(test_modes),
	cmocka_unit_test(test_vanished),
	cmocka_unit_test(test_virtual_wire),
};
const size_t pic_test_count = ARRAY_SIZE(pic_tests);
