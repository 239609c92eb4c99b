/* Local APICs: priorities, IPIs, the timer in its modes, x2APIC. */
#include "fixture.h"

#include <pthread.h>

#define MSR_APIC_BASE 0x1b
#define MSR_TSC_DEADLINE 0x6e0

static void self_ipi(struct fixture *f, unsigned cpu, uint8_t vector)
{
	apic_write(f, cpu, 0x300, 1 << 18 | vector);
}

static void ipi(struct fixture *f, unsigned from, unsigned to, uint32_t low)
{
	apic_write(f, from, 0x310, to << 24);
	apic_write(f, from, 0x300, low);
}

static bool wrmsr(struct fixture *f, unsigned cpu, uint32_t msr, uint64_t value)
{
	return board_msr_write(f->board, cpu, msr, value);
}

static uint64_t rdmsr(struct fixture *f, unsigned cpu, uint32_t msr)
{
	uint64_t value;

	assert_true(board_msr_read(f->board, cpu, msr, &value));
	return value;
}

/* KVM's para-virtual EOI: the guest's end of an interrupt is known here only later. */
static void test_offered_end(void **state)
{
	struct fixture f;
	unsigned kicks;

	fixture_start(&f, 1);
	apic_enable(&f, 0);
	assert_false(board_eoi_offer(f.board, 0)); /* nothing in service */
	self_ipi(&f, 0, 0x61);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x61);
	assert_true(board_eoi_offer(f.board, 0));
	/* A request below: not deliverable as far as is known, but the vCPU has to look. */
	kicks = atomic_load(&f.kicks[0]);
	self_ipi(&f, 0, 0x41);
	assert_false(board_interrupt_pending(f.board, 0));
	assert_true(atomic_load(&f.kicks[0]) > kicks);
	board_eoi_settle(f.board, 0, true);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x41);
	/* Not ended: it stays in service. */
	assert_true(board_eoi_offer(f.board, 0));
	board_eoi_settle(f.board, 0, false);
	self_ipi(&f, 0, 0x31);
	assert_false(board_interrupt_pending(f.board, 0));
	assert_false(board_eoi_offer(f.board, 0)); /* a request waits for the end */
	apic_write(&f, 0, 0xb0, 0);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x31);
	board_eoi_settle(f.board, 0, true); /* without an offer: nothing */
	self_ipi(&f, 0, 0x21);
	assert_false(board_interrupt_pending(f.board, 0));
	fixture_stop(&f);
}

static void test_send_to(void **state)
{
	struct fixture f;

	fixture_start(&f, 3);
	for (unsigned i = 0; i < 3; i++)
		apic_enable(&f, i);
	assert_int_equal(board_send_ipi(f.board, 0, ~1ull, 0x55), 2);
	assert_false(board_interrupt_pending(f.board, 0));
	assert_int_equal(board_interrupt_ack(f.board, 1), 0x55);
	assert_int_equal(board_interrupt_ack(f.board, 2), 0x55);
	assert_int_equal(board_send_ipi(f.board, 0, 7, 3), 0); /* no vector */
	fixture_stop(&f);
}

static void test_power_on(void **state)
{
	struct fixture f;

	fixture_start(&f, 2);
	assert_int_equal(rdmsr(&f, 0, MSR_APIC_BASE), 0xfee00900);
	assert_int_equal(rdmsr(&f, 1, MSR_APIC_BASE), 0xfee00800);
	assert_int_equal(apic_read(&f, 1, 0x20), 1 << 24);
	assert_int_equal(apic_read(&f, 0, 0x30) & 0xff00ff, 0x50014);
	assert_int_equal(apic_read(&f, 0, 0xf0), 0xff);
	assert_int_equal(apic_read(&f, 0, 0x350), 0x700);
	assert_int_equal(apic_read(&f, 1, 0x350), 0x10000);
	assert_int_equal(apic_read(&f, 1, 0xe0), 0xffffffff);
	/* Software-disabled: vector table masked, fixed interrupts not taken. */
	apic_write(&f, 1, 0x320, 0x40);
	assert_int_equal(apic_read(&f, 1, 0x320), 0x10040);
	ipi(&f, 0, 1, 0x55);
	assert_false(board_interrupt_pending(f.board, 1));
	fixture_stop(&f);
}

static void test_priority(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	apic_enable(&f, 0);
	self_ipi(&f, 0, 0x31);
	self_ipi(&f, 0, 0x42);
	self_ipi(&f, 0, 0x45);
	assert_int_equal(apic_read(&f, 0, 0x220), 1 << 2 | 1 << 5); /* IRR, vectors 0x40 to 0x5f */
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x45);
	assert_int_equal(apic_read(&f, 0, 0xa0), 0x40);
	assert_false(board_interrupt_pending(f.board, 0)); /* 0x42 is of the same class */
	self_ipi(&f, 0, 0x52);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x52);
	apic_write(&f, 0, 0xb0, 0);
	assert_false(board_interrupt_pending(f.board, 0));
	apic_write(&f, 0, 0xb0, 0);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x42);
	apic_write(&f, 0, 0xb0, 0);
	/* Task priority, by register and by CR8 */
	apic_write(&f, 0, 0x80, 0x30);
	assert_false(board_interrupt_pending(f.board, 0));
	assert_int_equal(board_cr8_read(f.board, 0), 3);
	board_cr8_write(f.board, 0, 2);
	assert_int_equal(apic_read(&f, 0, 0x80), 0x20);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0x31);
	apic_write(&f, 0, 0xb0, 0);
	apic_write(&f, 0, 0xb0, 0); /* one too many */
	/* A kick for each time something becomes deliverable */
	unsigned kicks = f.kicks[0];

	board_cr8_write(f.board, 0, 15);
	self_ipi(&f, 0, 0xe0);
	assert_int_equal(f.kicks[0], kicks);
	board_cr8_write(f.board, 0, 0);
	assert_int_equal(f.kicks[0], kicks + 1);
	fixture_stop(&f);
}

static void test_ipis(void **state)
{
	struct fixture f;

	fixture_start(&f, 4);
	for (unsigned i = 0; i < 4; i++)
		apic_enable(&f, i);
	apic_write(&f, 1, 0x300, 3 << 18 | 0x90); /* all but self */
	for (unsigned i = 0; i < 4; i++) {
		assert_int_equal(f.kicks[i], i != 1);
		assert_int_equal(board_interrupt_ack(f.board, i), i == 1 ? -1 : 0x90);
		apic_write(&f, i, 0xb0, 0);
	}
	apic_write(&f, 1, 0x300, 2 << 18 | 0x91); /* all */
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(board_interrupt_ack(f.board, i), 0x91);
	ipi(&f, 0, 2, 4 << 8);
	assert_int_equal(f.nmis[2], 1);
	/* Waking an application processor as kernels do */
	ipi(&f, 0, 3, 0xc500);
	assert_int_equal(f.inits[3], 1);
	assert_int_equal(apic_read(&f, 3, 0xf0), 0xff);
	assert_int_equal(apic_read(&f, 3, 0x20), 3 << 24);
	ipi(&f, 0, 3, 0x8500); /* de-assert */
	assert_int_equal(f.inits[3], 1);
	ipi(&f, 0, 3, 0x469a);
	assert_int_equal(f.startups[3], 1);
	assert_int_equal(f.startup_vector, 0x9a);
	/* An illegal vector is the sender's error. */
	apic_write(&f, 0, 0x370, 0xfe);
	ipi(&f, 0, 1, 0x0f);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0xfe);
	apic_write(&f, 0, 0x280, 0);
	assert_int_equal(apic_read(&f, 0, 0x280), 1 << 5);
	apic_write(&f, 0, 0x280, 0);
	assert_int_equal(apic_read(&f, 0, 0x280), 0);
	/* An error entry with an illegal vector itself */
	apic_write(&f, 0, 0x370, 0x03);
	ipi(&f, 0, 1, 0x0f);
	fixture_stop(&f);
}

static void test_one_shot(void **state)
{
	struct fixture f;
	uint64_t start;

	fixture_start(&f, 1);
	apic_enable(&f, 0);
	apic_write(&f, 0, 0x3e0, 0xb); /* by 1 */
	apic_write(&f, 0, 0x320, 0xec);
	start = clock_now();
	apic_write(&f, 0, 0x380, 20 * MS);
	assert_true(apic_read(&f, 0, 0x390) <= 20 * MS);
	assert_int_equal(wait_interrupt(&f, 0), 0xec);
	assert_true(clock_now() - start >= 20 * MS);
	assert_int_equal(apic_read(&f, 0, 0x390), 0);
	apic_write(&f, 0, 0xb0, 0);
	sleep_ns(30 * MS);
	assert_false(board_interrupt_pending(f.board, 0));
	/* Stopped before it ends */
	apic_write(&f, 0, 0x380, 200 * MS);
	apic_write(&f, 0, 0x380, 0);
	sleep_ns(220 * MS);
	assert_false(board_interrupt_pending(f.board, 0));
	/* Calibration: a long count at divisor 16, read after a while */
	apic_write(&f, 0, 0x3e0, 3);
	start = clock_now();
	apic_write(&f, 0, 0x380, 0xffffffff);
	sleep_ns(50 * MS);
	uint64_t ticks = 0xffffffff - apic_read(&f, 0, 0x390), spent = clock_now() - start;
	assert_true(ticks * 16 <= spent + 16 && ticks * 16 >= 50 * MS);
	fixture_stop(&f);
}

static void test_periodic(void **state)
{
	struct fixture f;
	uint64_t start;

	fixture_start(&f, 1);
	apic_enable(&f, 0);
	apic_write(&f, 0, 0x3e0, 0xb);
	apic_write(&f, 0, 0x320, 0x200ec);
	start = clock_now();
	apic_write(&f, 0, 0x380, 5 * MS);
	for (unsigned i = 0; i < 40; i++) {
		assert_int_equal(wait_interrupt(&f, 0), 0xec);
		apic_write(&f, 0, 0xb0, 0);
	}
	/* Never early; later than 200 ms only by what this machine makes the loop miss. */
	assert_true(clock_now() - start >= 200 * MS);
	assert_true(apic_read(&f, 0, 0x390) <= 5 * MS);
	/* A hostile period does not eat the loop: it is stretched. */
	apic_write(&f, 0, 0x380, 1);
	sleep_ns(20 * MS);
	assert_int_equal(wait_interrupt(&f, 0), 0xec);
	assert_true(apic_read(&f, 0, 0x390) <= 1);
	fixture_stop(&f);
}

static void test_tsc_deadline(void **state)
{
	struct fixture f;
	uint64_t deadline;

	fixture_start(&f, 1);
	apic_enable(&f, 0);
	assert_true(wrmsr(&f, 0, MSR_TSC_DEADLINE, fake_tsc())); /* another mode: ignored */
	assert_int_equal(rdmsr(&f, 0, MSR_TSC_DEADLINE), 0);
	apic_write(&f, 0, 0x320, 0x400ec);
	deadline = fake_tsc() + FAKE_TSC_HZ / 5;
	wrmsr(&f, 0, MSR_TSC_DEADLINE, deadline);
	assert_int_equal(rdmsr(&f, 0, MSR_TSC_DEADLINE), deadline);
	assert_false(board_interrupt_pending(f.board, 0));
	assert_int_equal(wait_interrupt(&f, 0), 0xec);
	assert_true(fake_tsc() >= deadline);
	assert_int_equal(rdmsr(&f, 0, MSR_TSC_DEADLINE), 0);
	apic_write(&f, 0, 0xb0, 0);
	/* Past: at once */
	wrmsr(&f, 0, MSR_TSC_DEADLINE, fake_tsc() - 1);
	assert_int_equal(board_interrupt_ack(f.board, 0), 0xec);
	apic_write(&f, 0, 0xb0, 0);
	/* Disarmed by zero, and by a change of mode; never within an age */
	wrmsr(&f, 0, MSR_TSC_DEADLINE, fake_tsc() + FAKE_TSC_HZ / 5);
	wrmsr(&f, 0, MSR_TSC_DEADLINE, 0);
	wrmsr(&f, 0, MSR_TSC_DEADLINE, fake_tsc() + FAKE_TSC_HZ / 5);
	apic_write(&f, 0, 0x320, 0xec);
	apic_write(&f, 0, 0x320, 0x400ec);
	wrmsr(&f, 0, MSR_TSC_DEADLINE, ~0ull);
	sleep_ns(220 * MS);
	assert_false(board_interrupt_pending(f.board, 0));
	apic_write(&f, 0, 0x380, 1000); /* the initial count has no effect here */
	sleep_ns(5 * MS);
	assert_false(board_interrupt_pending(f.board, 0));
	fixture_stop(&f);
}

static void test_modes(void **state)
{
	struct fixture f;
	uint64_t value;

	fixture_start(&f, 2);
	assert_false(board_msr_read(f.board, 0, 0x802, &value)); /* not in x2APIC mode */
	assert_false(wrmsr(&f, 0, MSR_APIC_BASE, 0xfee00500));	 /* x2APIC without enable */
	assert_false(wrmsr(&f, 0, MSR_APIC_BASE, 0xfee00901));	 /* reserved bit */
	assert_true(wrmsr(&f, 0, MSR_APIC_BASE, 0xfee00900 | 1 << 10));
	assert_false(wrmsr(&f, 0, MSR_APIC_BASE, 0xfee00900)); /* not straight back */
	assert_int_equal(apic_read(&f, 0, 0x30), 0xffffffff);  /* the page is gone */
	assert_true(wrmsr(&f, 0, MSR_APIC_BASE, 0xfee00100));
	assert_false(wrmsr(&f, 0, MSR_APIC_BASE, 0xfee00d00)); /* not from disabled */
	assert_true(wrmsr(&f, 0, MSR_APIC_BASE, 0xfee00900));
	assert_true(wrmsr(&f, 0, MSR_APIC_BASE, 0x12300900));
	assert_int_equal(board_mmio_read(f.board, 0, 0x12300030, 1), 0x14);
	assert_int_equal(board_mmio_read(f.board, 1, 0x12300030, 4), 0xffffffff);
	fixture_stop(&f);
}

static void test_x2apic(void **state)
{
	struct fixture f;

	fixture_start(&f, 18);
	for (unsigned i = 0; i < 18; i++) {
		assert_true(wrmsr(&f, i, MSR_APIC_BASE, rdmsr(&f, i, MSR_APIC_BASE) | 1 << 10));
		assert_true(wrmsr(&f, i, 0x80f, 0x1ff));
	}
	assert_int_equal(rdmsr(&f, 17, 0x802), 17);
	assert_int_equal(rdmsr(&f, 17, 0x80d), 1 << 16 | 1 << 1);
	/* Physical, logical, broadcast, self */
	assert_true(wrmsr(&f, 0, 0x830, 17ull << 32 | 0x41));
	assert_int_equal(board_interrupt_ack(f.board, 17), 0x41);
	assert_true(wrmsr(&f, 17, 0x80b, 0));
	assert_true(wrmsr(&f, 0, 0x830, (uint64_t)(1 << 16 | 3) << 32 | 1 << 11 | 0x42));
	for (unsigned i = 0; i < 18; i++) {
		assert_int_equal(board_interrupt_ack(f.board, i), i >= 16 ? 0x42 : -1);
		assert_true(wrmsr(&f, i, 0x80b, 0));
	}
	assert_true(wrmsr(&f, 0, 0x830, 0xffffffffull << 32 | 0x43));
	for (unsigned i = 0; i < 18; i++)
		assert_int_equal(board_interrupt_ack(f.board, i), 0x43);
	assert_true(wrmsr(&f, 5, 0x83f, 0x74));
	assert_int_equal(board_interrupt_ack(f.board, 5), 0x74);
	assert_int_equal(rdmsr(&f, 5, 0x813), 1 << 20); /* ISR */
	/* An 8-bit destination finds them, too. */
	board_msi(f.board, 0xfee11000, 0x85);
	assert_int_equal(board_interrupt_ack(f.board, 17), 0x85);
	/* INIT leaves the mode. */
	assert_true(wrmsr(&f, 0, 0x830, 3ull << 32 | 0x4500));
	assert_int_equal(f.inits[3], 1);
	assert_int_equal(rdmsr(&f, 3, 0x80d), 1 << 3);
	assert_int_equal(rdmsr(&f, 3, 0x80f), 0xff);
	/* What faults */
	uint64_t value;

	assert_false(wrmsr(&f, 0, 0x802, 0));
	assert_false(wrmsr(&f, 0, 0x80b, 1));
	assert_false(wrmsr(&f, 0, 0x808, 0x100));
	assert_false(wrmsr(&f, 0, 0x80e, 0));
	assert_false(wrmsr(&f, 0, 0x831, 0));
	assert_false(wrmsr(&f, 0, 0x832, 1 << 20));
	assert_false(wrmsr(&f, 0, 0x83f, 0x100));
	assert_false(wrmsr(&f, 0, 0x8ff, 0));
	assert_false(board_msr_read(f.board, 0, 0x80b, &value));
	assert_false(board_msr_read(f.board, 0, 0x831, &value));
	assert_false(board_msr_read(f.board, 0, 0x900, &value));
	assert_false(board_msr_read(f.board, 0, 0x7ff, &value));
	fixture_stop(&f);
}

/* Several threads send, each vCPU takes its own: every interrupt sent to an idle vCPU arrives. */
struct storm {
	struct fixture *f;
	unsigned cpu;
	unsigned taken;
};

static void *storm_thread(void *opaque)
{
	struct storm *s = opaque;
	struct fixture *f = s->f;
	unsigned next = (s->cpu + 1) % 4;

	for (unsigned i = 0; i < 5000; i++) {
		int vector;

		ipi(f, s->cpu, next, 0x40 + i % 64);
		board_irq(f->board, 16 + s->cpu, i & 1);
		/* Not all there are: a line that stays asserted has another one after each end. */
		vector = board_interrupt_ack(f->board, s->cpu);
		if (vector >= 0) {
			s->taken++;
			apic_write(f, s->cpu, 0xb0, 0);
		}
	}
	return NULL;
}

static void test_threads(void **state)
{
	struct fixture f;
	pthread_t threads[4];
	struct storm storms[4];

	fixture_start(&f, 4);
	for (unsigned i = 0; i < 4; i++) {
		apic_enable(&f, i);
		ioapic_write(&f, 0x11 + 2 * (16 + i), ((i + 2) % 4) << 24);
		ioapic_write(&f, 0x10 + 2 * (16 + i), 0x8000 | (0xc0 + i));
	}
	for (unsigned i = 0; i < 4; i++) {
		storms[i] = (struct storm){&f, i, 0};
		pthread_create(&threads[i], NULL, storm_thread, &storms[i]);
	}
	for (unsigned i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	for (unsigned i = 0; i < 4; i++)
		board_irq(f.board, 16 + i, false);
	for (unsigned i = 0; i < 4; i++) {
		while (board_interrupt_ack(f.board, i) >= 0) {
			storms[i].taken++;
			apic_write(&f, i, 0xb0, 0);
		}
		assert_false(board_interrupt_pending(f.board, i));
		assert_true(storms[i].taken > 0);
	}
	for (unsigned i = 0; i < 4; i++)
		assert_false(ioapic_read(&f, 0x10 + 2 * (16 + i)) & 1 << 14);
	fixture_stop(&f);
}

const struct CMUnitTest lapic_tests[] = {
	cmocka_unit_test(test_power_on),
	cmocka_unit_test(test_priority),
	cmocka_unit_test(test_ipis),
	cmocka_unit_test(test_one_shot),
	cmocka_unit_test(test_periodic),
	cmocka_unit_test(test_tsc_deadline),
	cmocka_unit_test(test_modes),
	cmocka_unit_test(test_x2apic),
	cmocka_unit_test(test_offered_end),
	cmocka_unit_test(test_send_to),
	cmocka_unit_test(test_threads),
};
const size_t lapic_test_count = ARRAY_SIZE(lapic_tests);
