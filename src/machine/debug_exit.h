/* Debug exit, as QEMU's isa-debug-exit: a test kernel ends the program by writing to a port. There only if asked for. */
#pragma once

#include "machine/space.h"

struct board;

#define BOARD_PORT_DEBUG_EXIT 0xf4 /* four of them */

struct debug_exit {
	struct board *board;
	struct io_region region;
};

/* Without host->debug_exit there is no such port. */
int debug_exit_create(struct debug_exit *d, struct board *board, struct error *err);
