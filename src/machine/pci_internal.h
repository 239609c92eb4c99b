/* What board.c and pci.c ask of each other; nothing of it is a device's business. */
#pragma once

#include <stdint.h>

#include "base/error.h"
#include "machine/pci.h"

/* Registers ECAM and ports 0xcf8 to 0xcff in the board's spaces (which must exist) and puts the host bridge at slot 0. */
int pci_create(struct pci_bus **bus, struct board *board, struct error *err);
/* The devices were removed before. bus may be NULL. */
void pci_destroy(struct pci_bus *bus);
/* Power-on state of the bus and of every device on it (device ops->reset is called). The BARs keep the addresses given by
 * pci_add and decoding is on again, as firmware would leave it. vCPUs are stopped. */
void pci_reset(struct pci_bus *bus);

/* The ACPI reset register is a byte in the middle of PCI's configuration address (0xcf8 to 0xcfb), and a space has one
 * owner per port: pci.c owns them all and hands byte accesses of 0xcf9 to these two, which board.c supplies. */
uint8_t board_reset_port_read(struct board *board);
void board_reset_port_write(struct board *board, uint8_t value);
