/* See driver.h. */
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "machine/pci.h"
#include "machine/pci_internal.h"

/* ---- the board ---- */

int board_of_test_create(struct board *board, uint64_t memory)
{
	struct error err = {0};

	memset(board, 0, sizeof(*board));
	if (memory_create(&board->memory, memory, &err) || space_create(&board->pio, "ports", 0x10000, &err) ||
		space_create(&board->mmio, "memory", 1ull << 52, &err) || loop_create(&board->loop, &err) ||
		pci_create(&board->pci, board, &err)) {
		fprintf(stderr, "%s\n", err.text);
		return -1;
	}
	return 0;
}

void board_of_test_stop_loop(struct board *board)
{
	if (!board->loop_runs)
		return;
	loop_stop(board->loop);
	pthread_join(board->loop_thread, NULL);
	board->loop_runs = false;
}

void board_of_test_destroy(struct board *board)
{
	board_of_test_stop_loop(board);
	pci_destroy(board->pci);
	loop_destroy(board->loop);
	space_destroy(board->mmio);
	space_destroy(board->pio);
	memory_destroy(&board->memory);
}

static void *run_loop(void *opaque)
{
	loop_run(opaque);
	return NULL;
}

void board_of_test_run_loop(struct board *board)
{
	board->loop_runs = pthread_create(&board->loop_thread, NULL, run_loop, board->loop) == 0;
}

struct space *board_pio(struct board *board)
{
	return board->pio;
}

struct space *board_mmio(struct board *board)
{
	return board->mmio;
}

struct pci_bus *board_pci(struct board *board)
{
	return board->pci;
}

struct guest_memory *board_memory(struct board *board)
{
	return &board->memory;
}

bool board_has_bells(struct board *board)
{
	return false;
}

struct loop *board_loop(struct board *board)
{
	return board->loop;
}

void board_irq(struct board *board, unsigned gsi, bool level)
{
	board->level[gsi] = level;
}

void board_msi(struct board *board, uint64_t address, uint32_t data)
{
	board->messages[data & 255]++;
}

uint8_t board_reset_port_read(struct board *board)
{
	return 0;
}

void board_reset_port_write(struct board *board, uint8_t value)
{
}

/* ---- the driver ---- */

uint64_t driver_read(struct driver *d, uint64_t gpa, unsigned size)
{
	uint64_t value = 0;

	return space_read(d->board->mmio, gpa, size, &value) ? value : ~0ull;
}

void driver_write(struct driver *d, uint64_t gpa, unsigned size, uint64_t value)
{
	space_write(d->board->mmio, gpa, size, value);
}

static uint32_t config(struct driver *d, unsigned offset, unsigned size)
{
	return pci_config_read(d->board->pci, d->slot, 0, offset, size);
}

bool driver_find(struct driver *d, struct board *board, unsigned slot)
{
	unsigned cap;

	memset(d, 0, sizeof(*d));
	d->board = board;
	d->slot = slot;
	d->next_free = 0x10000;
	if (config(d, 0, 2) != 0x1af4 || config(d, 2, 2) < 0x1040 || config(d, 2, 2) > 0x107f)
		return false;
	pci_config_write(board->pci, slot, 0, 4, 2, 6); /* memory, bus master */
	for (cap = config(d, 0x34, 1); cap; cap = config(d, cap + 1, 1)) {
		uint64_t at;

		if (config(d, cap, 1) != 9)
			continue;
		at = (config(d, 0x10 + 4 * config(d, cap + 4, 1), 4) & ~15u) + config(d, cap + 8, 4);
		switch (config(d, cap + 3, 1)) {
		case 1:
			d->common = at;
			break;
		case 2:
			d->notify = at;
			d->notify_multiplier = config(d, cap + 16, 4);
			break;
		case 3:
			d->isr = at;
			break;
		case 4:
			d->device = at;
			break;
		case 5:
			d->window = cap;
			break;
		}
	}
	return d->common && d->notify && d->isr && d->window;
}

uint64_t driver_alloc(struct driver *d, uint64_t size)
{
	uint64_t at = d->next_free;

	d->next_free += (size + 4095) & ~4095ull;
	return at;
}

unsigned driver_status(struct driver *d)
{
	return driver_read(d, d->common + 0x14, 1);
}

bool driver_negotiate(struct driver *d, uint64_t wanted)
{
	driver_write(d, d->common + 0x14, 1, 0);
	driver_write(d, d->common + 0x14, 1, 1);
	driver_write(d, d->common + 0x14, 1, 3);
	driver_write(d, d->common, 4, 0);
	d->offered = driver_read(d, d->common + 4, 4);
	driver_write(d, d->common, 4, 1);
	d->offered |= driver_read(d, d->common + 4, 4) << 32;
	d->accepted = wanted & d->offered;
	driver_write(d, d->common + 8, 4, 0);
	driver_write(d, d->common + 12, 4, (uint32_t)d->accepted);
	driver_write(d, d->common + 8, 4, 1);
	driver_write(d, d->common + 12, 4, d->accepted >> 32);
	driver_write(d, d->common + 0x14, 1, 3 | VIRTIO_STATUS_FEATURES_OK);
	return driver_status(d) & VIRTIO_STATUS_FEATURES_OK;
}

void driver_msix(struct driver *d, unsigned vectors)
{
	for (unsigned cap = config(d, 0x34, 1); cap; cap = config(d, cap + 1, 1)) {
		uint32_t table = config(d, cap + 4, 4);
		uint64_t at = (config(d, 0x10 + 4 * (table & 7), 4) & ~15u) + (table & ~7u);

		if (config(d, cap, 1) != 0x11)
			continue;
		pci_config_write(d->board->pci, d->slot, 0, cap + 2, 2, 0x8000);
		for (unsigned i = 0; i < vectors; i++) {
			driver_write(d, at + 16 * i, 4, 0xfee00000);
			driver_write(d, at + 16 * i + 4, 4, 0);
			driver_write(d, at + 16 * i + 8, 4, DRIVER_MSI_BASE + i);
			driver_write(d, at + 16 * i + 12, 4, 0);
		}
	}
	driver_write(d, d->common + 0x10, 2, 0);
}

struct driver_queue *driver_queue_up(struct driver *d, unsigned index, unsigned size, bool msix)
{
	struct driver_queue *q = &d->queue[index];
	uint64_t rings[3];

	driver_write(d, d->common + 0x16, 2, index);
	if (!size)
		size = driver_read(d, d->common + 0x18, 2);
	*q = (struct driver_queue){.index = index, .size = size};
	q->desc = rings[0] = driver_alloc(d, 16 * size);
	q->avail = rings[1] = driver_alloc(d, 6 + 2 * size);
	q->used = rings[2] = driver_alloc(d, 6 + 8 * size);
	memset(driver_memory(d, q->avail, 6 + 2 * size), 0, 6 + 2 * size);
	memset(driver_memory(d, q->used, 6 + 8 * size), 0, 6 + 8 * size);
	driver_write(d, d->common + 0x18, 2, size);
	if (msix)
		driver_write(d, d->common + 0x1a, 2, 1 + index);
	for (unsigned i = 0; i < 3; i++) {
		driver_write(d, d->common + 0x20 + 8 * i, 4, (uint32_t)rings[i]);
		driver_write(d, d->common + 0x24 + 8 * i, 4, rings[i] >> 32);
	}
	q->notify = d->notify + driver_read(d, d->common + 0x1e, 2) * d->notify_multiplier;
	driver_write(d, d->common + 0x1c, 2, 1);
	return q;
}

void driver_ok(struct driver *d)
{
	driver_write(d, d->common + 0x14, 1, 3 | VIRTIO_STATUS_FEATURES_OK | VIRTIO_STATUS_DRIVER_OK);
}

uint16_t driver_add(struct driver *d, struct driver_queue *q, const struct buffer *buffers, unsigned count)
{
	uint16_t head = q->next_desc % q->size;
	uint16_t *avail = driver_memory(d, q->avail, 4 + 2 * q->size);

	for (unsigned i = 0; i < count; i++) {
		uint8_t *desc = driver_memory(d, q->desc + 16 * ((head + i) % q->size), 16);
		uint16_t flags = (i + 1 < count ? DESC_NEXT : 0) | (buffers[i].writable ? DESC_WRITE : 0);
		uint16_t next = (head + i + 1) % q->size;

		memcpy(desc, &buffers[i].gpa, 8);
		memcpy(desc + 8, &buffers[i].length, 4);
		memcpy(desc + 12, &flags, 2);
		memcpy(desc + 14, &next, 2);
	}
	q->next_desc = (head + count) % q->size;
	avail[2 + q->avail_idx % q->size] = head;
	__atomic_store_n(&avail[1], ++q->avail_idx, __ATOMIC_RELEASE);
	return head;
}

void driver_notify(struct driver *d, struct driver_queue *q)
{
	driver_write(d, q->notify, 2, q->index);
}

bool driver_used_now(struct driver *d, struct driver_queue *q, uint32_t *id, uint32_t *length)
{
	uint16_t *used = driver_memory(d, q->used, 4 + 8 * q->size);
	uint32_t *entry = (uint32_t *)(used + 2) + 2 * (q->used_idx % q->size);

	if (__atomic_load_n(&used[1], __ATOMIC_ACQUIRE) == q->used_idx)
		return false;
	q->used_idx++;
	if (id)
		*id = entry[0];
	if (length)
		*length = entry[1];
	return true;
}

bool driver_used(struct driver *d, struct driver_queue *q, uint32_t *id, uint32_t *length)
{
	uint64_t end = clock_now() + 10000000000ull;

	while (!driver_used_now(d, q, id, length)) {
		if (clock_now() > end)
			return false;
		usleep(20);
	}
	return true;
}
