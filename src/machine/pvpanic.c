/* pvpanic: see pvpanic.h. One byte: reading it tells which events are understood, writing it reports them. */
#include "machine/pvpanic.h"

#include "machine/board_internal.h"

enum { PANICKED = 1 << 0, CRASH_LOADED = 1 << 1 }; /* the latter: a crash kernel takes over and saves what it can */

static uint64_t port_read(struct io_region *region, uint64_t offset, unsigned size)
{
	return PANICKED | CRASH_LOADED;
}

static void port_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct pvpanic *p = container_of(region, struct pvpanic, region);

	if (value & PANICKED)
		board_event(p->board, BOARD_EVENT_PANIC);
	else if (value & CRASH_LOADED)
		board_event(p->board, BOARD_EVENT_CRASH_KERNEL);
}

static const struct io_ops ops = {port_read, port_write};

int pvpanic_create(struct pvpanic *p, struct board *board, struct error *err)
{
	p->board = board;
	return board_add_ports(board, &p->region, "pvpanic", &ops, BOARD_PORT_PVPANIC, 1, err);
}
