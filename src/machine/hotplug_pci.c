/* PCI hot plug: see hotplug_pci.h. */
#include "machine/hotplug_pci.h"

#include "base/cleanup.h"
#include "machine/board_internal.h"

enum { UP = 0, DOWN = 4, EJECT = 8, HOST_BRIDGE = 1 << 0 };

static uint64_t registers_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct hotplug_pci *h = container_of(region, struct hotplug_pci, region);
	scope_lock(&h->lock);
	uint32_t value = 0;

	if (size != 4)
		return 0;
	if (offset == UP) {
		value = h->up;
		h->up = 0;
	} else if (offset == DOWN) {
		value = h->down;
		h->down = 0;
	}
	return value;
}

static void registers_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct hotplug_pci *h = container_of(region, struct hotplug_pci, region);
	const struct board_host *host = &h->board->host;

	value &= 0xffffffffull & ~(uint64_t)HOST_BRIDGE;
	if (offset == EJECT && size == 4 && value && host->pci_ejected)
		host->pci_ejected(host->opaque, value);
}

static const struct io_ops ops = {registers_read, registers_write};

int hotplug_pci_create(struct hotplug_pci *h, struct board *board, struct error *err)
{
	h->board = board;
	pthread_mutex_init(&h->lock, NULL);
	return board_add_ports(board, &h->region, "PCI hot plug", &ops, BOARD_PORT_PCI_HOTPLUG, HOTPLUG_PCI_PORTS, err);
}

void hotplug_pci_destroy(struct hotplug_pci *h)
{
	if (h->board)
		pthread_mutex_destroy(&h->lock);
}

void hotplug_pci_reset(struct hotplug_pci *h)
{
	scope_lock(&h->lock);
	h->up = h->down = 0;
}

void board_pci_added(struct board *board, unsigned slot)
{
	struct hotplug_pci *h = &board->hotplug_pci;

	{
		scope_lock(&h->lock);
		h->up |= 1u << slot;
		h->down &= ~(1u << slot);
	}
	board_gpe(board, BOARD_GPE_PCI);
}

void board_pci_ask_removal(struct board *board, unsigned slot)
{
	struct hotplug_pci *h = &board->hotplug_pci;

	{
		scope_lock(&h->lock);
		h->down |= 1u << slot;
	}
	board_gpe(board, BOARD_GPE_PCI);
}
