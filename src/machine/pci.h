/* PCI: configuration space by ECAM and by ports 0xcf8/0xcfc, BARs, MSI-X, INTx to the IOAPIC. One bus, devices only. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "machine/space.h"

struct board;
struct pci_bus;
struct pci_device;

#define PCI_BARS 6

struct pci_bar {
	uint64_t size; /* a power of two; 0: absent */
	bool is_64bit, is_io;
	struct io_region region; /* ops and name set by the device; base and size by the bus while the guest decodes */
	struct pci_msix *msix;	 /* pci_add_msix: this BAR is its table */
};

struct pci_device_ops {
	/* Configuration bytes beyond the standard header were written; called without locks; optional. */
	void (*config_written)(struct pci_device *device, unsigned offset, unsigned size);
	/* Reading of configuration bytes that the device computes (virtio's PCI access window); optional, true if it
	 * answered. Asked for every read beyond the standard header, without locks. */
	bool (*config_read)(struct pci_device *device, unsigned offset, unsigned size, uint32_t *value);
	void (*reset)(struct pci_device *device);
};

/* Embedded in the device. Fill vendor, class etc. and bars, then pci_add. */
struct pci_device {
	const char *name;
	const struct pci_device_ops *ops;
	uint16_t vendor, device, subsystem_vendor, subsystem;
	uint8_t revision;
	uint32_t class_code; /* 24 bits: class, subclass, programming interface */
	struct pci_bar bar[PCI_BARS];
	/* The rest is pci.c's, but a device may set bits of `writable` within its own capabilities before the guest
	 * runs. */
	struct pci_bus *bus;
	unsigned slot;
	uint8_t config[4096], writable[4096];
	uint8_t power_on[64]; /* the header as pci_add left it */
	unsigned next_capability, last_capability;
	struct pci_msix *msix;
	pthread_mutex_t lock; /* config, msix, intx_level; never held while a region is unmapped or ops are called */
	bool intx_level, intx_asserted;
};

/* Puts the device on the bus: slot 0 is the host bridge; slot -1 chooses the next free one. The BARs get addresses (as
 * firmware would leave them) and decoding is enabled, so that kernels which trust firmware work. The device must be all
 * zeroes but for what its owner fills; capabilities may be added before or after. */
int pci_add(struct pci_bus *bus, struct pci_device *device, int slot, struct error *err);
/* The vCPUs are stopped: an access that was looked up before may else still reach a handler afterwards. */
void pci_remove(struct pci_device *device);

/* Appends a capability of `size` bytes, body copied from after the two header bytes; returns its offset in
 * configuration space or -errno. */
int pci_add_capability(struct pci_device *device, uint8_t id, const void *body, unsigned size, struct error *err);

/* MSI-X with `vectors` entries; table and pending bits live in BAR `bar` (whose size must be set and which then belongs
 * to pci.c alone). */
int pci_add_msix(struct pci_device *device, unsigned vectors, unsigned bar, struct error *err);
bool pci_msix_enabled(struct pci_device *device);
/* Sends vector's message, or sets it pending when masked. */
void pci_msix_send(struct pci_device *device, unsigned vector);
/* INTx level; used when MSI-X is off. */
void pci_intx(struct pci_device *device, bool level);

uint64_t pci_config_read(struct pci_bus *bus, unsigned slot, unsigned function, unsigned offset, unsigned size);
void pci_config_write(
	struct pci_bus *bus, unsigned slot, unsigned function, unsigned offset, unsigned size, uint64_t v);

/* Slot to GSI routing for INTx (also written into the DSDT's _PRT). */
unsigned pci_slot_gsi(unsigned slot);
