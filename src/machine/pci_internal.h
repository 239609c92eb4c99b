/* What board.c and pci.c ask of each other; nothing of it is a device's business. */
#pragma once

#include <stdint.h>

#include "base/error.h"
#include "machine/pci.h"

/* Registers ECAM and ports 0xcf8 to 0xcff in the board's spaces (which must exist) and puts the host bridge at slot 0.
 */
int pci_create(struct pci_bus **bus, struct board *board, struct error *err);
/* The devices were removed before. bus may be NULL. */
void pci_destroy(struct pci_bus *bus);
/* Power-on state of the bus and of every device on it (device ops->reset is called). The BARs keep the addresses given
 * by pci_add and decoding is on again, as firmware would leave it. vCPUs are stopped. */
void pci_reset(struct pci_bus *bus);

/* The ACPI reset register is a byte in the middle of PCI's configuration address (0xcf8 to 0xcfb), and a space has one
 * owner per port: pci.c owns them all and hands byte accesses of 0xcf9 to these two, which board.c supplies. */
uint8_t board_reset_port_read(struct board *board);
void board_reset_port_write(struct board *board, uint8_t value);

/* ---- between pci.c and pci_msix.c ---- */

/* Offsets in configuration space and bits (PCI Local Bus Specification 3.0, section 6.1 and 6.8.2). */
enum {
	PCI_VENDOR = 0x00,
	PCI_DEVICE = 0x02,
	PCI_COMMAND = 0x04,
	PCI_STATUS = 0x06,
	PCI_REVISION = 0x08,
	PCI_CLASS = 0x09,
	PCI_CACHE_LINE = 0x0c,
	PCI_BAR0 = 0x10,
	PCI_SUBSYSTEM_VENDOR = 0x2c,
	PCI_SUBSYSTEM = 0x2e,
	PCI_CAPABILITIES = 0x34,
	PCI_INTERRUPT_LINE = 0x3c,
	PCI_INTERRUPT_PIN = 0x3d,
	PCI_HEADER_SIZE = 0x40,
	PCI_CONFIG_SIZE = 0x100, /* what follows, up to 4096, is PCI Express's and reads as zero */

	PCI_COMMAND_IO = 1 << 0,
	PCI_COMMAND_MEMORY = 1 << 1,
	PCI_COMMAND_MASTER = 1 << 2,
	PCI_COMMAND_PARITY = 1 << 6,
	PCI_COMMAND_SERR = 1 << 8,
	PCI_COMMAND_INTX_DISABLE = 1 << 10,
	PCI_STATUS_INTERRUPT = 1 << 3,
	PCI_STATUS_CAPABILITIES = 1 << 4,
};

struct board *pci_bus_board(struct pci_bus *bus);
/* Makes the regions in the board's spaces follow what the BARs and command registers say now. Call without locks. */
void pci_map_bars(struct pci_bus *bus);
/* Drives the interrupt line to what level, command register and MSI-X say now; the device's lock is held. */
void pci_update_intx(struct pci_device *device);

/* The device's lock is held. Sends what has become deliverable after a change of message control or command. */
void pci_msix_update(struct pci_device *device);
void pci_msix_reset(struct pci_device *device);
void pci_msix_free(struct pci_device *device);
/* As pci_msix_enabled, with the device's lock held. */
bool pci_msix_is_on(const struct pci_device *device);

static inline uint16_t pci_get16(const struct pci_device *device, unsigned offset)
{
	return device->config[offset] | device->config[offset + 1] << 8;
}

static inline uint32_t pci_get32(const struct pci_device *device, unsigned offset)
{
	return pci_get16(device, offset) | (uint32_t)pci_get16(device, offset + 2) << 16;
}

static inline void pci_set16(uint8_t *bytes, unsigned offset, uint16_t value)
{
	bytes[offset] = value;
	bytes[offset + 1] = value >> 8;
}

static inline void pci_set32(uint8_t *bytes, unsigned offset, uint32_t value)
{
	pci_set16(bytes, offset, value);
	pci_set16(bytes, offset + 2, value >> 16);
}
