#include "fixture.h"

#include <time.h>

static void on_event(void *opaque, enum board_event event)
{
	struct fixture *f = opaque;

	switch (event) {
	case BOARD_EVENT_RESET:
		atomic_fetch_add(&f->resets, 1);
		break;
	case BOARD_EVENT_POWER_OFF:
		atomic_fetch_add(&f->power_offs, 1);
		break;
	case BOARD_EVENT_PANIC:
		atomic_fetch_add(&f->panics, 1);
		break;
	case BOARD_EVENT_CRASH_KERNEL:
		atomic_fetch_add(&f->crash_kernels, 1);
		break;
	}
}

static void on_debug_exit(void *opaque, uint32_t value)
{
	struct fixture *f = opaque;

	atomic_fetch_add(&f->debug_exits, 1);
	atomic_store(&f->debug_value, value);
}

static void on_ready(void *opaque, unsigned cpu)
{
	atomic_fetch_add(&((struct fixture *)opaque)->kicks[cpu], 1);
}

static void on_init(void *opaque, unsigned cpu)
{
	atomic_fetch_add(&((struct fixture *)opaque)->inits[cpu], 1);
}

static void on_startup(void *opaque, unsigned cpu, uint8_t vector)
{
	struct fixture *f = opaque;

	atomic_store(&f->startup_vector, vector);
	atomic_fetch_add(&f->startups[cpu], 1);
}

static void on_nmi(void *opaque, unsigned cpu)
{
	atomic_fetch_add(&((struct fixture *)opaque)->nmis[cpu], 1);
}

static void on_hotplug(void *opaque, enum board_hotplug kind, unsigned number, enum board_hotplug_event event)
{
	struct fixture *f = opaque;

	atomic_fetch_add(&f->hotplugs, 1);
	atomic_store(&f->hotplug_event, event);
	atomic_store(&f->hotplug_number, number);
}

static void on_pci_ejected(void *opaque, uint32_t slots)
{
	struct fixture *f = opaque;

	atomic_fetch_or(&f->ejected, slots);
}

uint64_t fake_tsc(void)
{
	return clock_now() * 3;
}

static uint64_t tsc_now(void *opaque, unsigned cpu)
{
	return fake_tsc();
}

static void *run_loop(void *opaque)
{
	loop_run(opaque);
	return NULL;
}

void fixture_start(struct fixture *f, unsigned cpus)
{
	struct board_host host = {f, on_event, on_ready, on_init, on_startup, on_nmi, .hotplug = on_hotplug,
		.pci_ejected = on_pci_ejected, .debug_exit = on_debug_exit};
	struct board_config config = {
		.cpus = cpus,
		.memory = &f->memory,
		.host = &host,
		.tsc_hz = FAKE_TSC_HZ,
		.tsc_now = tsc_now,
	};
	struct error err = {0};

	*f = (struct fixture){0};
	assert_int_equal(memory_create(&f->memory, 32 << 20, &err), 0);
	assert_int_equal(loop_create(&f->loop, &err), 0);
	config.loop = f->loop;
	if (board_create(&f->board, &config, &err))
		fail_msg("%s", err.text);
	assert_int_equal(pthread_create(&f->thread, NULL, run_loop, f->loop), 0);
}

void fixture_stop(struct fixture *f)
{
	loop_stop(f->loop);
	pthread_join(f->thread, NULL);
	board_destroy(f->board);
	loop_destroy(f->loop);
	memory_destroy(&f->memory);
}

void sleep_ns(uint64_t ns)
{
	nanosleep(&(struct timespec){ns / 1000000000, ns % 1000000000}, NULL);
}

int wait_interrupt(struct fixture *f, unsigned cpu)
{
	uint64_t end = clock_now() + 2000 * MS;

	while (!board_interrupt_pending(f->board, cpu) && clock_now() < end)
		sleep_ns(MS / 10);
	return board_interrupt_ack(f->board, cpu);
}

void pic_setup(struct fixture *f, uint16_t enabled)
{
	out8(f, 0x20, 0x11);
	out8(f, 0x21, 0x30);
	out8(f, 0x21, 0x04);
	out8(f, 0x21, 0x01);
	out8(f, 0xa0, 0x11);
	out8(f, 0xa1, 0x38);
	out8(f, 0xa1, 0x02);
	out8(f, 0xa1, 0x01);
	out8(f, 0x21, ~enabled & 0xff);
	out8(f, 0xa1, ~enabled >> 8);
}

void apic_enable(struct fixture *f, unsigned cpu)
{
	apic_write(f, cpu, 0xf0, 0x1ff);
	apic_write(f, cpu, 0x350, 0x10000);
}
