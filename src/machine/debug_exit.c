/* Debug exit: see debug_exit.h. */
#include "machine/debug_exit.h"

#include "machine/board_internal.h"

#define PORTS 4

static uint64_t port_read(struct io_region *region, uint64_t offset, unsigned size)
{
	return 0;
}

static void port_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	const struct debug_exit *d = container_of(region, struct debug_exit, region);

	serial_flush(d->board->serial);
	d->board->host.debug_exit(d->board->host.opaque, value);
}

static const struct io_ops ops = {port_read, port_write};

int debug_exit_create(struct debug_exit *d, struct board *board, struct error *err)
{
	d->board = board;
	if (!board->host.debug_exit)
		return 0;
	return board_add_ports(board, &d->region, "debug exit", &ops, BOARD_PORT_DEBUG_EXIT, PORTS, err);
}
