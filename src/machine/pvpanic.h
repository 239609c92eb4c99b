/* pvpanic: a port by which a guest's kernel says that it panics (QEMU's docs/specs/pvpanic). */
#pragma once

#include "machine/space.h"

struct board;

#define BOARD_PORT_PVPANIC 0x505

struct pvpanic {
	struct board *board;
	struct io_region region;
};

int pvpanic_create(struct pvpanic *p, struct board *board, struct error *err);
