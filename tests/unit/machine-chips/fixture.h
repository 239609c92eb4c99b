/* A board with its loop on a thread of its own, and a host that remembers what it was told. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "base/loop.h"
#include "base/util.h"
#include "machine/board.h"
#include "machine/serial.h"

#define MS 1000000ull
#define FAKE_TSC_HZ 3000000000ull /* the guest's TSC is CLOCK_MONOTONIC times three */

struct fixture {
	struct board *board;
	struct guest_memory memory;
	struct loop *loop;
	pthread_t thread;
	atomic_uint kicks[64], inits[64], startups[64], nmis[64];
	atomic_uint hotplugs, hotplug_event, hotplug_number;
	atomic_uint startup_vector, power_offs, resets, ejected, panics, crash_kernels;
	atomic_uint debug_exits, debug_value;
};

/* Not while several boards' loops must run: each has one thread. */
void fixture_start(struct fixture *f, unsigned cpus);
void fixture_stop(struct fixture *f);

uint64_t fake_tsc(void);
/* Waits up to 2 s for something to be pending at cpu and acknowledges it; -1 when nothing came. */
int wait_interrupt(struct fixture *f, unsigned cpu);
void sleep_ns(uint64_t ns);

static inline uint8_t in8(struct fixture *f, uint16_t port)
{
	return board_pio_read(f->board, 0, port, 1);
}

static inline void out8(struct fixture *f, uint16_t port, uint8_t value)
{
	board_pio_write(f->board, 0, port, 1, value);
}

/* Local APIC registers by their xAPIC offset */
static inline uint32_t apic_read(struct fixture *f, unsigned cpu, uint32_t offset)
{
	return board_mmio_read(f->board, cpu, BOARD_LAPIC_BASE + offset, 4);
}

static inline void apic_write(struct fixture *f, unsigned cpu, uint32_t offset, uint32_t value)
{
	board_mmio_write(f->board, cpu, BOARD_LAPIC_BASE + offset, 4, value);
}

static inline uint32_t ioapic_read(struct fixture *f, uint8_t reg)
{
	board_mmio_write(f->board, 0, BOARD_IOAPIC_BASE, 4, reg);
	return board_mmio_read(f->board, 0, BOARD_IOAPIC_BASE + 0x10, 4);
}

static inline void ioapic_write(struct fixture *f, uint8_t reg, uint32_t value)
{
	board_mmio_write(f->board, 0, BOARD_IOAPIC_BASE, 4, reg);
	board_mmio_write(f->board, 0, BOARD_IOAPIC_BASE + 0x10, 4, value);
}

/* Initializes the 8259s as a kernel does: vectors 0x30 and 0x38, all inputs but `enabled` masked. */
void pic_setup(struct fixture *f, uint16_t enabled);
/* Software-enables cpu's APIC with spurious vector 0xff; its LINT0 no longer passes the 8259. */
void apic_enable(struct fixture *f, unsigned cpu);

extern const struct CMUnitTest pic_tests[], ioapic_tests[], lapic_tests[], timer_tests[], legacy_tests[];
extern const size_t pic_test_count, ioapic_test_count, lapic_test_count, timer_test_count, legacy_test_count;
