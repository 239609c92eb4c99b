/* Fuzzer of the PCI bus: the input is a list of what a guest does (configuration by both mechanisms, accesses to
 * wherever it has put the BARs) and what the devices do in between (INTx, MSI-X). The bus keeps its promises all the
 * while. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../tests/unit/machine-pci/fake-board.h"
#include "base/util.h"
#include "machine/pci_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

static void must(bool holds)
{
	if (!holds)
		abort();
}

static uint64_t read_checked(struct io_region *region, uint64_t offset, unsigned size)
{
	must(region->mapped && offset + size <= region->size);
	return offset;
}

static void write_checked(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	must(region->mapped && offset + size <= region->size);
}

static const struct io_ops ops = {read_checked, write_checked};

static void add_device(struct pci_bus *bus, struct pci_device *d, const char *name, unsigned vectors)
{
	d->name = name;
	d->bar[0] = (struct pci_bar){.size = 0x4000, .region = {.name = name, .ops = &ops}};
	d->bar[1] = (struct pci_bar){.size = 0x1000};
	d->bar[2] = (struct pci_bar){.size = 0x10000, .is_64bit = true, .region = {.name = name, .ops = &ops}};
	d->bar[4] = (struct pci_bar){.size = 0x40, .is_io = true, .region = {.name = name, .ops = &ops}};
	must(!pci_add_msix(d, vectors, 1, NULL) && !pci_add(bus, d, -1, NULL));
}

/* One step of the guest or of a device: 16 bytes. */
struct step {
	uint8_t what, device, size, offset_low;
	uint32_t offset;
	uint64_t value;
};

static void do_step(struct board *board, struct pci_bus *bus, struct pci_device *devices, const struct step *s)
{
	struct pci_device *d = &devices[s->device & 1];
	unsigned size = 1u << (s->size & 3), slot = s->device & 3,
		 offset = (s->offset_low | (s->offset & 15) << 8) & 0xfff;
	/* Somewhere in or near a BAR, as it stands now */
	uint64_t value, at = pci_get32(d, PCI_BAR0 + 4 * (s->device >> 2 & 7) % 24) + (s->offset & 0xffff);

	switch (s->what % 10) {
	case 0:
		space_write(board->mmio, BOARD_ECAM_BASE + (slot << 15 | offset), size, s->value);
		break;
	case 1:
		space_read(board->mmio, BOARD_ECAM_BASE + (s->offset & (BOARD_ECAM_SIZE - 1)), size, &value);
		break;
	case 2:
		space_write(board->pio, 0xcf8, 4, 0x80000000 | slot << 11 | (offset & 0xff));
		space_write(board->pio, 0xcfc + (s->size >> 4 & 3), size, s->value);
		break;
	case 3:
		space_write(board->pio, 0xcf8 + (s->offset & 7), size, s->value);
		break;
	case 4:
		space_write(board->mmio, at, size, s->value);
		break;
	case 5:
		space_read(board->mmio, at, size, &value);
		break;
	case 6:
		space_write(board->pio, at & 0xffff, size, s->value);
		break;
	case 7:
		pci_msix_send(d, s->offset_low);
		break;
	case 8:
		pci_intx(d, s->value & 1);
		break;
	case 9:
		if (s->offset_low == 0)
			pci_reset(bus);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
	struct board board;
	struct pci_bus *bus;
	struct pci_device devices[2] = {0};

	fake_board_create(&board, 0);
	must(!pci_create(&bus, &board, NULL));
	add_device(bus, &devices[0], "a", 3);
	add_device(bus, &devices[1], "b", 128);
	for (; n >= sizeof(struct step); n -= sizeof(struct step), bytes += sizeof(struct step)) {
		struct step s;

		memcpy(&s, bytes, sizeof(s));
		do_step(&board, bus, devices, &s);
		must(pci_config_read(bus, 1, 0, 0x3d, 1) == 1);
	}
	/* Whatever happened: after a reset everything is where it was, and no line is left up. */
	pci_reset(bus);
	for (unsigned i = 0; i < 2; i++) {
		must(devices[i].bar[0].region.mapped && devices[i].bar[1].region.mapped &&
			devices[i].bar[2].region.mapped);
		must(!board.level[pci_slot_gsi(devices[i].slot)]);
		pci_remove(&devices[i]);
	}
	pci_destroy(bus);
	fake_board_destroy(&board);
	return 0;
}
