/* The keyboard controller without a keyboard (IBM PS/2 Technical Reference, "Keyboard and auxiliary device
 * controller"): what remains of it is the reset line. Also port 0x92, "fast A20" and reset. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "machine/space.h"

struct board;

struct i8042 {
	struct board *board;
	pthread_mutex_t lock;
	uint8_t status, output; /* the output buffer is full when status says so */
	uint8_t command;	/* command byte (RAM byte 0) */
	uint8_t expecting;	/* command whose data byte comes next on port 0x60; 0: none */
	uint8_t port92;
	struct io_region data, control, fast;
};

int i8042_create(struct i8042 *i8042, struct board *board, struct error *err);
void i8042_destroy(struct i8042 *i8042);
void i8042_reset(struct i8042 *i8042);
