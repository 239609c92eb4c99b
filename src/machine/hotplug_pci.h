/* PCI hot plug by ACPI: which slots have a device that has come or is asked to go, told to the guest by a
 * general-purpose event; the guest answers by ejecting a slot (ACPI 6.4, sections 5.6.6 and 6.3.3).
 *
 * Registers at BOARD_PORT_PCI_HOTPLUG, 32 bits each, bit n for slot n, used by the DSDT alone:
 * +0 read: slots whose device is new, and forgets them; +4 read: slots asked to be freed, and forgets them;
 * +8 write: the guest has let go of these slots.
 */
#pragma once

#include <pthread.h>
#include <stdint.h>

#include "machine/aml.h"
#include "machine/space.h"

struct board;

#define HOTPLUG_PCI_PORTS 12

struct hotplug_pci {
	struct board *board;
	pthread_mutex_t lock;
	uint32_t up, down;
	struct io_region region;
};

int hotplug_pci_create(struct hotplug_pci *h, struct board *board, struct error *err);
void hotplug_pci_destroy(struct hotplug_pci *h);
void hotplug_pci_reset(struct hotplug_pci *h);

/* acpi_hotplug.c: what the DSDT has to say within \_SB.PCI0; its method PCNT answers the event. */
void hotplug_pci_describe(struct aml *aml);
