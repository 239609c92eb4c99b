/* The I/O APIC: 24 inputs (Intel 82093AA data sheet, order 290566; the EOI register is of version 0x20, Intel ICH9 data
 * sheet, section 13.5). */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "machine/space.h"

struct board;
struct wakeups;

#define IOAPIC_PINS 24

struct ioapic {
	struct board *board;
	pthread_mutex_t lock;
	uint8_t select;
	uint32_t id;	/* bits 24 to 27 */
	uint32_t lines; /* input levels now; 1 is asserted, whatever the polarity */
	uint64_t redirection[IOAPIC_PINS];
	struct io_region region;
};

int ioapic_create(struct ioapic *ioapic, struct board *board, struct error *err);
void ioapic_destroy(struct ioapic *ioapic);
void ioapic_reset(struct ioapic *ioapic);
void ioapic_line(struct ioapic *ioapic, unsigned pin, bool level, struct wakeups *w);
/* A local APIC ended a level-triggered interrupt with this vector. */
void ioapic_eoi(struct ioapic *ioapic, uint8_t vector, struct wakeups *w);
