/* A guest's side of virtio over PCI, for tests and fuzzers: a board of spaces, memory, loop and a real PCI bus, and a
 * driver that finds the device's structures by its capabilities and makes its accesses as a kernel does. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>

#include "device/virtio.h"
#include "machine/board.h"

#define DRIVER_QUEUES 9
#define DRIVER_MSI_BASE 0x40u /* message data of vector n is this plus n */

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };

struct board {
	struct space *pio, *mmio;
	struct guest_memory memory;
	struct loop *loop;
	struct pci_bus *pci;
	atomic_uint messages[256]; /* by data */
	atomic_uint level[24];
	pthread_t loop_thread;
	bool loop_runs;
};

int board_of_test_create(struct board *board, uint64_t memory);
void board_of_test_destroy(struct board *board);
/* Runs the loop on a thread of its own until it is destroyed (stop). */
void board_of_test_run_loop(struct board *board);
void board_of_test_stop_loop(struct board *board);

struct driver_queue {
	unsigned index, size;
	uint64_t desc, avail, used, notify;
	uint16_t avail_idx, used_idx;
	uint16_t next_desc; /* descriptors are handed out round and round */
};

struct driver {
	struct board *board;
	unsigned slot;
	uint64_t common, notify, isr, device; /* guest addresses */
	uint32_t notify_multiplier;
	unsigned window; /* offset of the PCI access capability */
	uint64_t offered, accepted;
	struct driver_queue queue[DRIVER_QUEUES];
	uint64_t next_free; /* guest memory handed out so far */
};

struct buffer {
	uint64_t gpa;
	uint32_t length;
	bool writable;
};

uint64_t driver_read(struct driver *d, uint64_t gpa, unsigned size);
void driver_write(struct driver *d, uint64_t gpa, unsigned size, uint64_t value);
/* Finds the structures of the device in this slot; false when it is not a modern virtio device. */
bool driver_find(struct driver *d, struct board *board, unsigned slot);
uint64_t driver_alloc(struct driver *d, uint64_t size);

/* Reset, acknowledge, take `wanted` out of what is offered, FEATURES_OK; false when the device does not keep that bit.
 */
bool driver_negotiate(struct driver *d, uint64_t wanted);
void driver_msix(struct driver *d, unsigned vectors);
struct driver_queue *driver_queue_up(struct driver *d, unsigned index, unsigned size, bool msix);
void driver_ok(struct driver *d);
unsigned driver_status(struct driver *d);

/* Offers a chain and returns its head; does not notify. */
uint16_t driver_add(struct driver *d, struct driver_queue *q, const struct buffer *buffers, unsigned count);
void driver_notify(struct driver *d, struct driver_queue *q);
/* Waits up to 10 s for the next used entry; false when none comes. */
bool driver_used(struct driver *d, struct driver_queue *q, uint32_t *id, uint32_t *length);
/* As driver_used, without waiting. */
bool driver_used_now(struct driver *d, struct driver_queue *q, uint32_t *id, uint32_t *length);

static inline void *driver_memory(struct driver *d, uint64_t gpa, uint64_t length)
{
	return memory_for_write(&d->board->memory, gpa, length);
}
