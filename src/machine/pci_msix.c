/* MSI-X (PCI Local Bus Specification 3.0, section 6.8.2): the capability, the table and the pending bits. The first
 * half of the BAR is the table, the second the pending bits, so that a page-sized half can be mapped on its own.
 */
#include "machine/pci_internal.h"

#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "machine/board.h"

#define CAPABILITY_ID 0x11
#define CAPABILITY_SIZE 12
#define CONTROL 2 /* offset of message control in the capability */
#define CONTROL_MASK_ALL 0x4000
#define CONTROL_ENABLE 0x8000
#define MAX_VECTORS 2048
#define ENTRY_SIZE 16
#define ENTRY_MASKED 1

/* An entry of the table as the guest sees it, in dwords. */
enum { ADDRESS, ADDRESS_HIGH, DATA, VECTOR_CONTROL, ENTRY_DWORDS };

struct pci_msix {
	struct pci_device *device;
	unsigned vectors, bar, capability;
	uint64_t pending_offset; /* in the BAR */
	uint64_t *pending;
	uint32_t table[][ENTRY_DWORDS];
};

static unsigned pending_words(const struct pci_msix *m)
{
	return (m->vectors + 63) / 64;
}

static bool control_has(const struct pci_device *device, uint16_t bits)
{
	return pci_get16(device, device->msix->capability + CONTROL) & bits;
}

bool pci_msix_is_on(const struct pci_device *device)
{
	return device->msix && control_has(device, CONTROL_ENABLE);
}

bool pci_msix_enabled(struct pci_device *device)
{
	scope_lock(&device->lock);
	return pci_msix_is_on(device);
}

/* A message is a write by the device, and so needs it to be a bus master. */
static bool function_may_send(const struct pci_device *device)
{
	return pci_msix_is_on(device) && !control_has(device, CONTROL_MASK_ALL) &&
	       (pci_get16(device, PCI_COMMAND) & PCI_COMMAND_MASTER);
}

/* The lock stays held while the message goes out: a guest that has masked a vector and read that back must not get its
 * message afterwards. */
static void send_or_keep(struct pci_device *device, unsigned vector)
{
	struct pci_msix *m = device->msix;
	const uint32_t *entry = m->table[vector];
	uint64_t bit = 1ull << vector % 64, *word = &m->pending[vector / 64];

	if (!function_may_send(device) || (entry[VECTOR_CONTROL] & ENTRY_MASKED)) {
		*word |= bit;
		return;
	}
	*word &= ~bit;
	board_msi(pci_bus_board(device->bus), entry[ADDRESS] | (uint64_t)entry[ADDRESS_HIGH] << 32, entry[DATA]);
}

void pci_msix_send(struct pci_device *device, unsigned vector)
{
	scope_lock(&device->lock);
	if (device->bus && pci_msix_is_on(device) && vector < device->msix->vectors)
		send_or_keep(device, vector);
}

void pci_msix_update(struct pci_device *device)
{
	struct pci_msix *m = device->msix;

	if (!m || !device->bus || !function_may_send(device))
		return;
	for (unsigned w = 0; w < pending_words(m); w++)
		for (uint64_t left = m->pending[w]; left; left &= left - 1)
			send_or_keep(device, w * 64 + __builtin_ctzll(left));
}

static struct pci_msix *region_msix(struct io_region *region)
{
	/* The region is embedded in one of six BARs, so its place does not lead to the device: the table knows. */
	return container_of(region, struct pci_bar, region)->msix;
}

static uint32_t read_dword(const struct pci_msix *m, uint64_t offset)
{
	if (offset < (uint64_t)m->vectors * ENTRY_SIZE)
		return m->table[offset / ENTRY_SIZE][offset % ENTRY_SIZE / 4];
	if (offset >= m->pending_offset && offset - m->pending_offset < 8 * pending_words(m))
		return m->pending[(offset - m->pending_offset) / 8] >> 8 * (offset & 4);
	return 0;
}

static void write_dword(struct pci_device *device, uint64_t offset, uint32_t value)
{
	struct pci_msix *m = device->msix;

	if (offset >= (uint64_t)m->vectors * ENTRY_SIZE)
		return;
	unsigned vector = offset / ENTRY_SIZE, field = offset % ENTRY_SIZE / 4;

	if (field == ADDRESS)
		value &= ~3u;
	if (field == VECTOR_CONTROL)
		value &= ENTRY_MASKED;
	m->table[vector][field] = value;
	if (field == VECTOR_CONTROL && (m->pending[vector / 64] >> vector % 64 & 1))
		send_or_keep(device, vector);
}

/* Aligned dwords and qwords are all that software may use (section 6.8.2); narrower reads are served too. */
static uint64_t msix_read(struct io_region *region, uint64_t offset, unsigned size)
{
	struct pci_msix *m = region_msix(region);

	scope_lock(&m->device->lock);
	if (offset & (size - 1))
		return 0;
	if (size == 8)
		return read_dword(m, offset) | (uint64_t)read_dword(m, offset + 4) << 32;
	return read_dword(m, offset & ~3ull) >> 8 * (offset & 3) & (~0u >> (32 - 8 * size));
}

static void msix_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct pci_msix *m = region_msix(region);

	scope_lock(&m->device->lock);
	if (size < 4 || (offset & (size - 1)))
		return;
	write_dword(m->device, offset, value);
	if (size == 8)
		write_dword(m->device, offset + 4, value >> 32);
}

static const struct io_ops msix_ops = {msix_read, msix_write};

int pci_add_msix(struct pci_device *device, unsigned vectors, unsigned bar, struct error *err)
{
	uint64_t half = bar < PCI_BARS ? device->bar[bar].size / 2 : 0;

	if (device->msix || !vectors || vectors > MAX_VECTORS || (uint64_t)vectors * ENTRY_SIZE > half)
		return error_set(err, EINVAL, "PCI device %s: BAR %u of %llu bytes cannot hold %u MSI-X vectors",
			device->name, bar, (unsigned long long)half * 2, vectors);

	scope_free struct pci_msix *m = calloc(1, sizeof(*m) + vectors * sizeof(m->table[0]));
	scope_free uint64_t *pending = calloc((vectors + 63) / 64, sizeof(*pending));
	if (!m || !pending)
		return error_set(err, ENOMEM, "PCI device %s: no memory for %u MSI-X vectors", device->name, vectors);

	uint8_t body[CAPABILITY_SIZE - 2] = {0};
	pci_set16(body, CONTROL - 2, vectors - 1);
	pci_set32(body, 4 - 2, 0 | bar);
	pci_set32(body, 8 - 2, half | bar);
	int offset = pci_add_capability(device, CAPABILITY_ID, body, CAPABILITY_SIZE, err);
	if (offset < 0)
		return offset;
	pci_set16(device->writable, offset + CONTROL, CONTROL_ENABLE | CONTROL_MASK_ALL);

	m->device = device;
	m->vectors = vectors;
	m->bar = bar;
	m->capability = offset;
	m->pending_offset = half;
	m->pending = take_ptr(pending);
	device->bar[bar].msix = m;
	device->bar[bar].region.ops = &msix_ops;
	if (!device->bar[bar].region.name)
		device->bar[bar].region.name = "msix";
	device->msix = take_ptr(m);
	pci_msix_reset(device);
	if (device->bus)
		pci_map_bars(device->bus);
	return 0;
}

void pci_msix_reset(struct pci_device *device)
{
	struct pci_msix *m = device->msix;

	if (!m)
		return;
	memset(m->pending, 0, pending_words(m) * sizeof(*m->pending));
	for (unsigned i = 0; i < m->vectors; i++)
		memcpy(m->table[i], (uint32_t[ENTRY_DWORDS]){[VECTOR_CONTROL] = ENTRY_MASKED}, ENTRY_SIZE);
}

void pci_msix_free(struct pci_device *device)
{
	if (!device->msix)
		return;
	device->bar[device->msix->bar].msix = NULL;
	device->bar[device->msix->bar].region.ops = NULL;
	free(device->msix->pending);
	free(take_ptr(device->msix));
}
