/* The 8254, the CMOS clock and the ACPI PM timer. */
#include "fixture.h"

#include <time.h>

/* The 8259 gives the interrupt and gets its EOI. */
static int take(struct fixture *f)
{
	int vector = wait_interrupt(f, 0);

	if (vector >= 0x38)
		out8(f, 0xa0, 0x20);
	out8(f, 0x20, 0x20);
	return vector;
}

/* As Linux's pit_calibrate_tsc: channel 2 in mode 0 for 50 ms, polling OUT2. */
static void test_pit_calibration(void **state)
{
	struct fixture f;
	unsigned count = 1193182 / 20;
	uint64_t start, spent;

	fixture_start(&f, 1);
	out8(&f, 0x61, (in8(&f, 0x61) & ~2) | 1);
	out8(&f, 0x43, 0xb0);
	out8(&f, 0x42, count & 0xff);
	out8(&f, 0x42, count >> 8);
	start = clock_now();
	assert_false(in8(&f, 0x61) & 0x20);
	while (!(in8(&f, 0x61) & 0x20) && clock_now() - start < 1000 * MS)
		;
	spent = clock_now() - start;
	assert_true(spent >= 49 * MS && spent < 1000 * MS);
	/* As its quick form: the most significant byte counts down, 214 us a step. */
	out8(&f, 0x43, 0xb0);
	out8(&f, 0x42, 0xff);
	start = clock_now();
	out8(&f, 0x42, 0xff);
	sleep_ns(5 * MS);
	in8(&f, 0x42);
	unsigned high = in8(&f, 0x42), steps = (clock_now() - start) / 214000 + 1;

	assert_true(high <= 0xe9 && (steps > 0xff || high >= 0xff - steps));
	/* A closed gate stops it. */
	out8(&f, 0x61, 0);
	out8(&f, 0x43, 0x80);
	unsigned before = in8(&f, 0x42);

	before |= in8(&f, 0x42) << 8;
	sleep_ns(2 * MS);
	out8(&f, 0x43, 0xd8); /* read-back: count of channel 2 */
	unsigned after = in8(&f, 0x42);

	after |= in8(&f, 0x42) << 8;
	assert_int_equal(before, after);
	fixture_stop(&f);
}

static void test_pit_periodic(void **state)
{
	struct fixture f;
	unsigned count = 1193182 / 200;
	uint64_t start;

	fixture_start(&f, 1);
	pic_setup(&f, 1);
	out8(&f, 0x43, 0x34);
	out8(&f, 0x40, count & 0xff);
	out8(&f, 0x40, count >> 8);
	start = clock_now();
	for (unsigned i = 0; i < 20; i++)
		assert_int_equal(take(&f), 0x30);
	assert_true(clock_now() - start >= 99 * MS);
	/* Read-back of the status: OUT, access, mode */
	out8(&f, 0x43, 0xe2);
	assert_int_equal(in8(&f, 0x40) & 0x7f, 0x34);
	/* A hostile rate is stretched, and the loop stays alive. */
	out8(&f, 0x40, 1);
	out8(&f, 0x40, 0);
	sleep_ns(10 * MS);
	assert_int_equal(take(&f), 0x30);
	/* One-shot */
	out8(&f, 0x43, 0x30);
	while (board_interrupt_ack(f.board, 0) >= 0)
		out8(&f, 0x20, 0x20);
	out8(&f, 0x40, 0);
	out8(&f, 0x40, 0x20);
	assert_int_equal(take(&f), 0x30);
	sleep_ns(20 * MS);
	assert_false(board_interrupt_pending(f.board, 0));
	fixture_stop(&f);
}

static void test_pit_modes(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	out8(&f, 0x61, 1);
	for (unsigned mode = 0; mode < 8; mode++) {
		for (unsigned access = 1; access < 4; access++) {
			for (unsigned bcd = 0; bcd < 2; bcd++) {
				out8(&f, 0x43, 0x80 | access << 4 | mode << 1 | bcd);
				out8(&f, 0x42, 0x0f);
				out8(&f, 0x42, 0xff);
				in8(&f, 0x61);
				for (unsigned i = 0; i < 4; i++)
					in8(&f, 0x42);
				out8(&f, 0x43, 0xc8);
				in8(&f, 0x42);
				out8(&f, 0x61, 0);
				out8(&f, 0x61, 1);
				in8(&f, 0x61);
				in8(&f, 0x42);
			}
		}
	}
	/* BCD, frozen by the gate: 1234 reads back as written. */
	out8(&f, 0x61, 0);
	out8(&f, 0x43, 0xb1);
	out8(&f, 0x42, 0x34);
	out8(&f, 0x42, 0x12);
	assert_int_equal(in8(&f, 0x42), 0x34);
	assert_int_equal(in8(&f, 0x42), 0x12);
	fixture_stop(&f);
}

static uint8_t cmos(struct fixture *f, uint8_t index)
{
	out8(f, 0x70, index);
	return in8(f, 0x71);
}

static void cmos_set(struct fixture *f, uint8_t index, uint8_t value)
{
	out8(f, 0x70, index);
	out8(f, 0x71, value);
}

static unsigned bcd(uint8_t v)
{
	return (v >> 4) * 10 + (v & 15);
}

static time_t cmos_time(struct fixture *f)
{
	struct tm tm;

	while (cmos(f, 0x0a) & 0x80)
		;
	tm = (struct tm){
		.tm_sec = bcd(cmos(f, 0)),
		.tm_min = bcd(cmos(f, 2)),
		.tm_hour = bcd(cmos(f, 4)),
		.tm_mday = bcd(cmos(f, 7)),
		.tm_mon = bcd(cmos(f, 8)) - 1,
		.tm_year = bcd(cmos(f, 9)) + bcd(cmos(f, 0x32)) * 100 - 1900,
	};
	return timegm(&tm);
}

static void test_cmos_time(void **state)
{
	struct fixture f;
	time_t now;

	fixture_start(&f, 1);
	now = time(NULL);
	assert_in_range(cmos_time(&f) - now, 0, 2);
	assert_int_equal(cmos(&f, 0x0d), 0x80);
	assert_int_equal(cmos(&f, 0x0b), 2);
	/* Set to 2001-02-03 04:05:06 as a kernel does: SET, the bytes, SET off; then it goes on. */
	cmos_set(&f, 0x0b, 0x82);
	cmos_set(&f, 0, 0x06);
	cmos_set(&f, 2, 0x05);
	cmos_set(&f, 4, 0x04);
	cmos_set(&f, 7, 0x03);
	cmos_set(&f, 8, 0x02);
	cmos_set(&f, 9, 0x01);
	cmos_set(&f, 0x32, 0x20);
	assert_int_equal(cmos(&f, 0), 0x06);
	cmos_set(&f, 0x0b, 0x02);
	assert_in_range(cmos_time(&f) - 981173106, 0, 2);
	board_reset(f.board);
	assert_in_range(cmos_time(&f) - 981173106, 0, 2); /* the battery */
	/* Binary, 12 hours: 4 in the afternoon */
	cmos_set(&f, 0x0b, 0x84);
	cmos_set(&f, 4, 0x84);
	cmos_set(&f, 0x0b, 0x04);
	assert_int_equal(cmos(&f, 4), 0x84);
	cmos_set(&f, 0x0b, 0x06);
	assert_int_equal(cmos(&f, 4), 16);
	/* Nonsense is taken without harm. */
	for (unsigned i = 0; i < 128; i++)
		cmos_set(&f, i, 0xff);
	for (unsigned i = 0; i < 128; i++)
		cmos(&f, i);
	board_reset(f.board);
	/* Size of RAM: 32 MiB */
	assert_int_equal(cmos(&f, 0x30) | cmos(&f, 0x31) << 8, 31 << 10);
	assert_int_equal(cmos(&f, 0x34) | cmos(&f, 0x35) << 8, 16 << 4);
	fixture_stop(&f);
}

static void test_cmos_interrupts(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	pic_setup(&f, 1 << 8 | 1 << 2);
	cmos_set(&f, 0x0a, 0x2a); /* 64 Hz */
	cmos_set(&f, 0x0b, 0x42);
	uint64_t start = clock_now();

	for (unsigned i = 0; i < 8; i++) {
		assert_int_equal(take(&f), 0x38);
		assert_int_equal(cmos(&f, 0x0c) & 0xc0, 0xc0);
	}
	assert_true(clock_now() - start >= 110 * MS);
	/* The update interrupt: every second */
	cmos_set(&f, 0x0b, 0x12);
	cmos(&f, 0x0c);
	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(take(&f), 0x38);
		assert_int_equal(cmos(&f, 0x0c) & 0x90, 0x90);
	}
	/* Alarm at every second (bytes of 0xc0 match all) */
	cmos_set(&f, 0x0b, 0x22);
	for (unsigned i = 1; i < 6; i += 2)
		cmos_set(&f, i, 0xff);
	cmos(&f, 0x0c);
	assert_int_equal(take(&f), 0x38);
	assert_int_equal(cmos(&f, 0x0c) & 0xa0, 0xa0);
	fixture_stop(&f);
}

static void test_pm_timer(void **state)
{
	struct fixture f;

	fixture_start(&f, 1);
	uint64_t start = clock_now();
	uint32_t first = board_pio_read(f.board, 0, 0x608, 4);

	sleep_ns(50 * MS);
	uint32_t ticks = board_pio_read(f.board, 0, 0x608, 4) - first;
	uint64_t spent = clock_now() - start;

	assert_in_range(ticks, 3579545 / 20, spent * 3579545 / 1000000000 + 1);
	fixture_stop(&f);
}

const struct CMUnitTest timer_tests[] = {
	cmocka_unit_test(test_pit_calibration),
	cmocka_unit_test(test_pit_periodic),
	cmocka_unit_test(test_pit_modes),
	cmocka_unit_test(test_cmos_time),
	cmocka_unit_test(test_cmos_interrupts),
	cmocka_unit_test(test_pm_timer),
};
const size_t timer_test_count = ARRAY_SIZE(timer_tests);
