/* The pair of 8259A interrupt controllers (Intel 8259A data sheet, order 231468), cascaded on the master's input 2. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "machine/space.h"

struct board;
struct wakeups;

struct pic_chip {
	uint8_t lines; /* input levels now */
	uint8_t irr, imr, isr;
	uint8_t elcr;	/* inputs that are level-triggered */
	uint8_t vector; /* of input 0 */
	uint8_t lowest; /* input with the lowest priority; 7 unless rotated */
	uint8_t init;	/* the initialization command word expected next, 0: none */
	bool init4;	/* ICW4 will come */
	bool read_isr, poll, special_mask, special_nested, auto_eoi, rotate_auto_eoi;
};

struct pic {
	struct board *board;
	pthread_mutex_t lock;
	struct pic_chip chip[2]; /* master, slave */
	atomic_bool output;	 /* the INTR line to the boot processor's LINT0; read without the lock */
	struct io_region ports[2], elcr;
};

int pic_create(struct pic *pic, struct board *board, struct error *err);
void pic_destroy(struct pic *pic);
void pic_reset(struct pic *pic);
/* Level of input irq, 0 to 15 (2 is the cascade and ignored). */
void pic_line(struct pic *pic, unsigned irq, bool level, struct wakeups *w);
/* The interrupt acknowledge cycle: the vector; -1 when INTR is no longer asserted. */
int pic_acknowledge(struct pic *pic);
