/* The 8254 interval timer (Intel 8254 data sheet, order 231164) and port 0x61, which gates its channel 2. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/loop.h"
#include "machine/space.h"

struct board;

#define PIT_HZ 1193182
#define PIT_CHANNELS 3

struct pit_channel {
	uint8_t mode;	/* 0 to 5 */
	uint8_t access; /* 1: low byte, 2: high byte, 3: low then high */
	bool bcd;
	bool gate;
	bool loaded;	/* a count was written since the control word */
	bool running;	/* counting since `start`; else frozen at `elapsed` */
	bool high_next; /* access 3: the other byte comes next; for writes and for reads */
	bool read_high_next;
	bool latched, status_latched;
	uint8_t low; /* first byte of a count being written */
	uint8_t status;
	uint16_t latch;
	uint32_t count;	  /* 1 to 65536 */
	uint64_t start;	  /* CLOCK_MONOTONIC when the count was loaded */
	uint64_t elapsed; /* ticks counted when the gate closed */
};

struct pit {
	struct board *board;
	pthread_mutex_t lock;
	struct pit_channel channel[PIT_CHANNELS];
	struct loop_timer timer; /* channel 0's output to interrupt 0 */
	uint64_t next_tick;	 /* ticks after channel 0's start of the next rising edge; 0: none */
	uint8_t port61;		 /* bits 0 to 3 */
	struct io_region ports, control_b;
};

int pit_create(struct pit *pit, struct board *board, struct error *err);
void pit_destroy(struct pit *pit);
void pit_reset(struct pit *pit);
