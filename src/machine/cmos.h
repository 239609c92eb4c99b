/* The CMOS clock (Motorola MC146818A data sheet) and its memory, ports 0x70 and 0x71. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/loop.h"
#include "machine/space.h"

struct board;

#define CMOS_CENTURY 0x32 /* the usual place; the FADT need not name it for years up to 2069 */

struct cmos {
	struct board *board;
	pthread_mutex_t lock;
	uint8_t index;
	uint8_t memory[128]; /* registers A and B, alarm bytes, size of RAM; time bytes only while SET is on */
	uint8_t flags;	     /* register C without IRQF */
	int64_t offset;	     /* guest's time less the host's, seconds */
	int64_t seen;	     /* guest second up to which updates are noted in flags */
	struct loop_timer timer;
	uint64_t next_periodic; /* CLOCK_MONOTONIC; 0: off */
	struct io_region region;
};

int cmos_create(struct cmos *cmos, struct board *board, struct error *err);
void cmos_destroy(struct cmos *cmos);
void cmos_reset(struct cmos *cmos);
