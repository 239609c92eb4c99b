/* A further listener at the console, beside its back end: it gets a copy of what the guest writes, and may type. It
 * never holds the guest up: of what it does not fetch the newest 64 KiB stay. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/loop.h"

struct console_tap {
	struct loop *loop;
	/* On the loop's thread: there is output to fetch, or room for input again. */
	void (*ready)(struct console_tap *tap);
	struct console_tap *next; /* the console's */

	pthread_mutex_t lock; /* the rest */
	uint8_t *ring;	      /* TAP_SIZE bytes */
	size_t head, tail;    /* counted on for ever */
	bool told;	      /* the timer is set */
	struct loop_timer timer;
};

#define TAP_SIZE 65536u

/* false: no memory. */
bool console_tap_init(struct console_tap *tap, struct loop *loop, void (*ready)(struct console_tap *tap));
void console_tap_release(struct console_tap *tap);
/* Adds output; any thread. */
void console_tap_put(struct console_tap *tap, const uint8_t *bytes, size_t n);
/* Takes at most n bytes of output; how many. */
size_t console_tap_get(struct console_tap *tap, uint8_t *bytes, size_t n);
/* Has ready() called on the loop; any thread. */
void console_tap_tell(struct console_tap *tap);
