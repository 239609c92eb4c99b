/* The serial console's way out: a buffer, and a thread that writes it to a sink (a descriptor). */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/loop.h"
#include "base/threads.h"

struct console_output;

/* socket: sinks are clients of a socket, which come and go; else the one sink is a file, pipe or terminal. room(opaque)
 * is posted to the loop when bytes that console_output_put() refused would now be taken. */
int console_output_create(struct console_output **output, bool socket, struct loop *loop, struct threads *threads,
	void (*room)(void *opaque), void *opaque, struct error *err);
/* Writes out what there is, for two seconds at most. The sink is not used any more after it, unless it returns false: a
 * write hangs, and its thread is left to the end of the process. */
bool console_output_destroy(struct console_output *output);

/* Where to write from now on; -1: nowhere. When it returns from that, the old sink may be closed; a client's connection
 * must be shut down before, so that a write which waits for it ends. A sink that fails is dropped by itself, and a
 * client's connection shut down. */
void console_output_set_sink(struct console_output *output, int fd);
/* How many bytes were taken. Without a sink, after release, or if forced, all: the oldest ones give way. Does not
 * block. */
size_t console_output_put(struct console_output *output, const uint8_t *bytes, size_t n, bool force);
/* Blocks until something would be taken. */
void console_output_wait(struct console_output *output);
/* For the end: nobody waits any more. */
void console_output_release(struct console_output *output);
