/* The PCI bus: configuration space, BARs, INTx (PCI Local Bus Specification 3.0; ECAM: PCI Express Base Specification
 * 7.2.2). The devices are conventional PCI functions on bus 0; nothing claims to be PCI Express, so no guest looks for
 * links, slots or error reporting.
 *
 * Locks, outermost first: bus->devices (who is on the bus; read-held during every configuration access), bus->mapping
 * (serialises changes of the BARs' regions), device->lock (the device's registers), bus->lines (wired-OR of INTx).
 * Regions come and go under the first two only, which no BAR handler takes: a handler may take device->lock, and so a
 * space is free to wait for handlers under way while it gives up a region.
 */
#include "machine/pci_internal.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "machine/board.h"

#define SLOTS 32
#define PORT_ADDRESS 0xcf8 /* 4 bytes, then 4 of data: PCI 3.0, section 3.2.2.3.2 */
#define PORT_RESET_OFFSET (BOARD_PORT_RESET - PORT_ADDRESS)
#define ADDRESS_ENABLE 0x80000000u

/* Ports for BARs. Below 0x1000 are the board's own. */
#define PCI_IO_BASE 0xc000
#define PCI_IO_SIZE 0x4000

/* A 64-bit BAR larger than this is placed above 512 GiB; smaller ones stay where 32-bit guests reach them. */
#define LARGE_BAR (64ull << 20)

struct pci_bus {
	struct board *board;
	struct io_region ecam, ports;
	_Atomic uint32_t address; /* the last dword written to 0xcf8 */
	pthread_rwlock_t devices;
	struct pci_device *slot[SLOTS];
	pthread_mutex_t mapping;
	pthread_mutex_t lines;
	unsigned asserted[8]; /* devices that assert GSI 16 + n */
	struct pci_device host_bridge;
};

struct window {
	uint64_t base, size;
};

static const struct window window_32 = {BOARD_PCI_MMIO_BASE, BOARD_PCI_MMIO_SIZE};
static const struct window window_64 = {BOARD_PCI_MMIO64_BASE, BOARD_PCI_MMIO64_SIZE};
static const struct window window_io = {PCI_IO_BASE, PCI_IO_SIZE};

static void unlock_devices(pthread_rwlock_t **lock)
{
	pthread_rwlock_unlock(*lock);
}

static pthread_rwlock_t *devices_for_read(struct pci_bus *bus)
{
	pthread_rwlock_rdlock(&bus->devices);
	return &bus->devices;
}

static pthread_rwlock_t *devices_for_write(struct pci_bus *bus)
{
	pthread_rwlock_wrlock(&bus->devices);
	return &bus->devices;
}

#define scope_devices(how, bus)                                                                                        \
	__attribute__((cleanup(unlock_devices), unused)) pthread_rwlock_t *scope_devices_ = devices_for_##how(bus)

unsigned pci_slot_gsi(unsigned slot)
{
	return 16 + slot % 8;
}

struct board *pci_bus_board(struct pci_bus *bus)
{
	return bus->board;
}

/* ---- INTx ---- */

void pci_update_intx(struct pci_device *device)
{
	struct pci_bus *bus = device->bus;
	bool wanted = device->intx_level && !(pci_get16(device, PCI_COMMAND) & PCI_COMMAND_INTX_DISABLE) &&
		      !pci_msix_is_on(device);

	if (!bus || wanted == device->intx_asserted)
		return;
	device->intx_asserted = wanted;

	unsigned gsi = pci_slot_gsi(device->slot);
	unsigned *count = &bus->asserted[gsi - 16];

	/* The board hears of changes in the order in which they happen only if it is told under the lock. */
	scope_lock(&bus->lines);
	*count += wanted ? 1 : -1;
	if (*count == (wanted ? 1 : 0))
		board_irq(bus->board, gsi, wanted);
}

void pci_intx(struct pci_device *device, bool level)
{
	scope_lock(&device->lock);
	device->intx_level = level;
	pci_update_intx(device);
}

/* ---- BARs ---- */

static uint64_t bar_address(const struct pci_device *device, unsigned i)
{
	const struct pci_bar *bar = &device->bar[i];
	uint64_t address = pci_get32(device, PCI_BAR0 + 4 * i);

	if (bar->is_64bit)
		address |= (uint64_t)pci_get32(device, PCI_BAR0 + 4 * i + 4) << 32;
	return address & ~(bar->size - 1) & ~(bar->is_io ? 3ull : 15ull);
}

static bool within(const struct window *w, uint64_t base, uint64_t size)
{
	return base >= w->base && size <= w->size && base - w->base <= w->size - size;
}

/* Whether the guest wants this BAR decoded, and where. The bridge forwards only its windows: a BAR that holds the all
 * ones of a size probe, or the address of something on the board, answers nowhere. */
static bool bar_decoded(struct pci_device *device, unsigned i, uint64_t *base)
{
	const struct pci_bar *bar = &device->bar[i];

	scope_lock(&device->lock);
	*base = bar_address(device, i);
	if (!bar->size || !bar->region.ops)
		return false;
	if (!(pci_get16(device, PCI_COMMAND) & (bar->is_io ? PCI_COMMAND_IO : PCI_COMMAND_MEMORY)))
		return false;
	if (bar->is_io)
		return within(&(struct window){0x1000, 0xf000}, *base, bar->size);
	return within(&window_32, *base, bar->size) || (bar->is_64bit && within(&window_64, *base, bar->size));
}

static struct space *bar_space(struct pci_bus *bus, const struct pci_bar *bar)
{
	return bar->is_io ? board_pio(bus->board) : board_mmio(bus->board);
}

static void unmap_stale(struct pci_bus *bus, struct pci_device *device)
{
	for (unsigned i = 0; i < PCI_BARS; i++) {
		struct pci_bar *bar = &device->bar[i];
		uint64_t base;

		if (bar->region.mapped && (!bar_decoded(device, i, &base) || base != bar->region.base))
			space_remove(bar_space(bus, bar), &bar->region);
	}
}

static void map_wanted(struct pci_bus *bus, struct pci_device *device)
{
	for (unsigned i = 0; i < PCI_BARS; i++) {
		struct pci_bar *bar = &device->bar[i];
		uint64_t base;

		if (bar->region.mapped || !bar_decoded(device, i, &base))
			continue;
		bar->region.base = base;
		bar->region.size = bar->size;
		/* Two BARs at one address are the guest's mistake: the first keeps it. */
		space_add(bar_space(bus, bar), &bar->region, NULL);
	}
}

/* All devices are looked at, since the one that moved away may have made room for another. */
void pci_map_bars(struct pci_bus *bus)
{
	scope_lock(&bus->mapping);
	for (unsigned s = 0; s < SLOTS; s++)
		if (bus->slot[s])
			unmap_stale(bus, bus->slot[s]);
	for (unsigned s = 0; s < SLOTS; s++)
		if (bus->slot[s])
			map_wanted(bus, bus->slot[s]);
}

/* The end of a power-on allocation that overlaps [base, base + size) in the same kind of space, or 0. Power-on
 * addresses, not today's: they must be free again after each reset. */
static uint64_t overlap_end(struct pci_bus *bus, bool is_io, uint64_t base, uint64_t size)
{
	for (unsigned s = 0; s < SLOTS; s++) {
		struct pci_device *device = bus->slot[s];

		for (unsigned i = 0; device && i < PCI_BARS; i++) {
			const struct pci_bar *bar = &device->bar[i];
			uint64_t other = 0;

			if (!bar->size || bar->is_io != is_io)
				continue;
			memcpy(&other, device->power_on + PCI_BAR0 + 4 * i, bar->is_64bit ? 8 : 4);
			other &= ~(bar->is_io ? 3ull : 15ull);
			/* Address 0: not placed yet */
			if (other && base < other + bar->size && other < base + size)
				return other + bar->size;
		}
	}
	return 0;
}

static int bar_place(struct pci_bus *bus, const struct window *w, const struct pci_bar *bar, uint64_t *base)
{
	uint64_t end;

	*base = align_up(w->base, bar->size);
	while ((end = overlap_end(bus, bar->is_io, *base, bar->size)))
		*base = align_up(end, bar->size);
	return within(w, *base, bar->size) ? 0 : -ENOSPC;
}

/* Gives BAR i an address and its writable bits; the device is already in its slot, with no power-on address yet. */
static int bar_set_up(struct pci_bus *bus, struct pci_device *device, unsigned i, struct error *err)
{
	struct pci_bar *bar = &device->bar[i];
	unsigned offset = PCI_BAR0 + 4 * i;
	uint64_t base, size = bar->size;

	if ((size & (size - 1)) || size < (bar->is_io ? 4 : 16) || (bar->is_io && bar->is_64bit) ||
		(bar->is_64bit && (i + 1 == PCI_BARS || device->bar[i + 1].size)) ||
		(!bar->is_64bit && size > BOARD_PCI_MMIO_SIZE))
		return error_set(err, EINVAL, "PCI device %s: BAR %u of %llu bytes is impossible", device->name, i,
			(unsigned long long)size);

	int ret = -ENOSPC;
	if (bar->is_io)
		ret = bar_place(bus, &window_io, bar, &base);
	else if (size <= LARGE_BAR || !bar->is_64bit)
		ret = bar_place(bus, &window_32, bar, &base);
	if (ret && bar->is_64bit)
		ret = bar_place(bus, &window_64, bar, &base);
	if (ret)
		return error_set(err, ENOSPC,
			"PCI device %s: no address is left for BAR %u of %llu bytes; attach fewer devices",
			device->name, i, (unsigned long long)size);

	pci_set32(device->config, offset, base | (bar->is_io ? 1 : bar->is_64bit ? 4 : 0));
	pci_set32(device->writable, offset, ~(size - 1) & (bar->is_io ? 0xfffc : 0xfffffff0));
	memcpy(device->power_on + offset, device->config + offset, 4);
	if (bar->is_64bit) {
		pci_set32(device->config, offset + 4, base >> 32);
		pci_set32(device->writable, offset + 4, ~(size - 1) >> 32);
		memcpy(device->power_on + offset + 4, device->config + offset + 4, 4);
	}
	return 0;
}

/* ---- configuration space ---- */

static struct pci_device *device_at(struct pci_bus *bus, unsigned slot, unsigned function)
{
	return slot < SLOTS && function == 0 ? bus->slot[slot] : NULL;
}

static uint64_t all_ones(unsigned size)
{
	return ~0ull >> (64 - 8 * size);
}

uint64_t pci_config_read(struct pci_bus *bus, unsigned slot, unsigned function, unsigned offset, unsigned size)
{
	if (size == 8) {
		uint64_t low = pci_config_read(bus, slot, function, offset, 4);

		return low | pci_config_read(bus, slot, function, offset + 4, 4) << 32;
	}
	scope_devices(read, bus);
	struct pci_device *device = device_at(bus, slot, function);
	uint32_t value = 0;

	if (!device || (size != 1 && size != 2 && size != 4) || offset > sizeof(device->config) - size)
		return all_ones(size);
	if (offset >= PCI_HEADER_SIZE && device->ops && device->ops->config_read &&
		device->ops->config_read(device, offset, size, &value))
		return value;

	scope_lock(&device->lock);
	for (unsigned i = 0; i < size; i++) {
		uint8_t byte = device->config[offset + i];

		/* Interrupt status is the line as the device drives it, whether or not the guest lets it out. */
		if (offset + i == PCI_STATUS && device->intx_level)
			byte |= PCI_STATUS_INTERRUPT;
		value |= (uint32_t)byte << 8 * i;
	}
	return value;
}

void pci_config_write(struct pci_bus *bus, unsigned slot, unsigned function, unsigned offset, unsigned size, uint64_t v)
{
	if (size == 8) {
		pci_config_write(bus, slot, function, offset, 4, (uint32_t)v);
		pci_config_write(bus, slot, function, offset + 4, 4, v >> 32);
		return;
	}
	scope_devices(read, bus);
	struct pci_device *device = device_at(bus, slot, function);

	if (!device || (size != 1 && size != 2 && size != 4) || offset > sizeof(device->config) - size)
		return;
	{
		scope_lock(&device->lock);
		for (unsigned i = 0; i < size; i++) {
			uint8_t mask = device->writable[offset + i], *byte = &device->config[offset + i];

			*byte = (*byte & ~mask) | ((uint8_t)(v >> 8 * i) & mask);
		}
		pci_update_intx(device);
		pci_msix_update(device);
	}
	/* An access is 4 bytes at most, but need not be aligned: it may begin before what it changes. */
	if (offset < PCI_BAR0 + 4 * PCI_BARS)
		pci_map_bars(bus);
	if (offset + size > PCI_HEADER_SIZE && device->ops && device->ops->config_written)
		device->ops->config_written(device, offset, size);
}

/* Offset in ECAM: bus 20 to 27, slot 15 to 19, function 12 to 14, register 0 to 11. */
static uint64_t ecam_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct pci_bus *bus = container_of(region, struct pci_bus, ecam);

	if (offset >> 20)
		return all_ones(size);
	return pci_config_read(bus, offset >> 15 & 31, offset >> 12 & 7, offset & 0xfff, size);
}

static void ecam_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct pci_bus *bus = container_of(region, struct pci_bus, ecam);

	if (!(offset >> 20))
		pci_config_write(bus, offset >> 15 & 31, offset >> 12 & 7, offset & 0xfff, size, value);
}

static const struct io_ops ecam_ops = {ecam_read, ecam_write};

/* Whether the address register selects bus 0 and the data port access stays within its dword. */
static bool data_port_selects(uint32_t address, uint64_t offset, unsigned size)
{
	return (address & ADDRESS_ENABLE) && !(address >> 16 & 0xff) && offset >= 4 && offset + size <= 8;
}

/* Only a dword access at 0xcf8 is the address register; others there are different devices' ports. */
static uint64_t ports_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct pci_bus *bus = container_of(region, struct pci_bus, ports);
	uint32_t address = bus->address;

	if (offset == 0 && size == 4)
		return address;
	if (offset == PORT_RESET_OFFSET && size == 1)
		return board_reset_port_read(bus->board);
	if (!data_port_selects(address, offset, size))
		return all_ones(size);
	return pci_config_read(bus, address >> 11 & 31, address >> 8 & 7, (address & 0xfc) + offset - 4, size);
}

static void ports_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct pci_bus *bus = container_of(region, struct pci_bus, ports);
	uint32_t address = bus->address;

	if (offset == 0 && size == 4)
		bus->address = value & 0x80fffffc; /* the rest is reserved and reads as zero */
	else if (offset == PORT_RESET_OFFSET && size == 1)
		board_reset_port_write(bus->board, value);
	else if (data_port_selects(address, offset, size))
		pci_config_write(bus, address >> 11 & 31, address >> 8 & 7, (address & 0xfc) + offset - 4, size, value);
}

static const struct io_ops ports_ops = {ports_read, ports_write};

/* ---- devices come and go ---- */

static int header_set_up(struct pci_bus *bus, struct pci_device *device, struct error *err)
{
	uint8_t *config = device->config;
	uint16_t command = 0;

	pci_set16(config, PCI_VENDOR, device->vendor);
	pci_set16(config, PCI_DEVICE, device->device);
	config[PCI_REVISION] = device->revision;
	config[PCI_CLASS] = device->class_code;
	pci_set16(config, PCI_CLASS + 1, device->class_code >> 8);
	pci_set16(config, PCI_SUBSYSTEM_VENDOR, device->subsystem_vendor);
	pci_set16(config, PCI_SUBSYSTEM, device->subsystem);
	device->writable[PCI_CACHE_LINE] = 0xff;

	for (unsigned i = 0; i < PCI_BARS; i++) {
		if (!device->bar[i].size)
			continue;
		int ret = bar_set_up(bus, device, i, err);
		if (ret)
			return ret;
		command |= device->bar[i].is_io ? PCI_COMMAND_IO : PCI_COMMAND_MEMORY;
	}
	/* A device without registers (the host bridge) has nothing to decode and no interrupt. */
	if (command) {
		pci_set16(device->writable, PCI_COMMAND,
			PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_PARITY |
				PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE);
		pci_set16(config, PCI_COMMAND, command);
		config[PCI_INTERRUPT_PIN] = 1;
		config[PCI_INTERRUPT_LINE] = 0xff; /* not an 8259 input */
		device->writable[PCI_INTERRUPT_LINE] = 0xff;
	}
	memcpy(device->power_on, config, sizeof(device->power_on));
	return 0;
}

int pci_add(struct pci_bus *bus, struct pci_device *device, int slot, struct error *err)
{
	scope_devices(write, bus);

	if (slot < 0)
		for (slot = 1; slot < SLOTS && bus->slot[slot]; slot++)
			;
	if (slot >= SLOTS)
		return error_set(err, ENOSPC, "PCI device %s: all %d slots are taken; attach fewer devices",
			device->name, SLOTS);
	if (bus->slot[slot])
		return error_set(err, EEXIST, "PCI device %s: slot %d already holds %s; choose another", device->name,
			slot, bus->slot[slot]->name);

	bus->slot[slot] = device;
	int ret = header_set_up(bus, device, err);
	if (ret) {
		bus->slot[slot] = NULL;
		return ret;
	}
	pthread_mutex_init(&device->lock, NULL);
	device->bus = bus;
	device->slot = slot;
	pci_map_bars(bus);
	return 0;
}

void pci_remove(struct pci_device *device)
{
	struct pci_bus *bus = device->bus;

	if (!bus) { /* never came onto one */
		pci_msix_free(device);
		return;
	}
	{
		scope_devices(write, bus);
		{
			scope_lock(&device->lock);
			pci_set16(device->config, PCI_COMMAND, 0);
			device->intx_level = false;
			pci_update_intx(device);
		}
		pci_map_bars(bus); /* takes its regions away, since nothing is decoded any more */
		bus->slot[device->slot] = NULL;
	}
	device->bus = NULL;
	pci_msix_free(device);
	pthread_mutex_destroy(&device->lock);
}

int pci_add_capability(struct pci_device *device, uint8_t id, const void *body, unsigned size, struct error *err)
{
	unsigned offset = device->next_capability ? device->next_capability : PCI_HEADER_SIZE;

	if (size < 2 || size > PCI_CONFIG_SIZE - offset)
		return error_set(err, ENOSPC,
			"PCI device %s: no room for capability 0x%02x of %u bytes at 0x%02x of 0x100", device->name, id,
			size, offset);
	device->config[offset] = id;
	device->config[offset + 1] = 0;
	memcpy(device->config + offset + 2, body, size - 2);

	if (device->last_capability)
		device->config[device->last_capability + 1] = offset;
	else
		device->config[PCI_CAPABILITIES] = device->power_on[PCI_CAPABILITIES] = offset;
	device->config[PCI_STATUS] |= PCI_STATUS_CAPABILITIES;
	device->power_on[PCI_STATUS] |= PCI_STATUS_CAPABILITIES;
	device->last_capability = offset;
	device->next_capability = align_up(offset + size, 4);
	return offset;
}

/* ---- the bus ---- */

int pci_create(struct pci_bus **out, struct board *board, struct error *err)
{
	struct pci_bus *bus = calloc(1, sizeof(*bus));

	if (!bus)
		return error_set(err, ENOMEM, "PCI bus: out of memory");
	bus->board = board;
	pthread_rwlock_init(&bus->devices, NULL);
	pthread_mutex_init(&bus->mapping, NULL);
	pthread_mutex_init(&bus->lines, NULL);
	bus->ecam = (struct io_region){
		.name = "pci-ecam", .ops = &ecam_ops, .base = BOARD_ECAM_BASE, .size = BOARD_ECAM_SIZE};
	bus->ports = (struct io_region){.name = "pci-config", .ops = &ports_ops, .base = PORT_ADDRESS, .size = 8};
	/* QEMU's generic host bridge: known to every system's tables of names, and no quirks are tied to it. */
	bus->host_bridge.name = "host-bridge";
	bus->host_bridge.vendor = 0x1b36;
	bus->host_bridge.device = 0x0008;
	bus->host_bridge.class_code = 0x060000;

	int ret = space_add(board_mmio(board), &bus->ecam, err);
	if (!ret)
		ret = space_add(board_pio(board), &bus->ports, err);
	if (!ret)
		ret = pci_add(bus, &bus->host_bridge, 0, err);
	if (ret) {
		pci_destroy(bus);
		return error_wrap(err, "PCI bus");
	}
	*out = bus;
	return 0;
}

void pci_destroy(struct pci_bus *bus)
{
	if (!bus)
		return;
	pci_remove(&bus->host_bridge);
	if (bus->ports.mapped)
		space_remove(board_pio(bus->board), &bus->ports);
	if (bus->ecam.mapped)
		space_remove(board_mmio(bus->board), &bus->ecam);
	pthread_mutex_destroy(&bus->lines);
	pthread_mutex_destroy(&bus->mapping);
	pthread_rwlock_destroy(&bus->devices);
	free(bus);
}

static void device_reset(struct pci_device *device)
{
	{
		scope_lock(&device->lock);
		memcpy(device->config, device->power_on, sizeof(device->power_on));
		for (unsigned i = PCI_HEADER_SIZE; i < PCI_CONFIG_SIZE; i++)
			device->config[i] &= ~device->writable[i];
		pci_msix_reset(device);
		device->intx_level = false;
		pci_update_intx(device);
	}
	if (device->ops && device->ops->reset)
		device->ops->reset(device);
}

void pci_reset(struct pci_bus *bus)
{
	scope_devices(read, bus);

	bus->address = 0;
	for (unsigned s = 0; s < SLOTS; s++)
		if (bus->slot[s])
			device_reset(bus->slot[s]);
	pci_map_bars(bus);
}
