/* The split virtqueue (virtio 1.2, section 2.7), the one place where rings and descriptors are parsed. Everything in it
 * is written by the guest, and may change while it is read: each field is read once, checked, and kept as a value.
 *
 * Whoever uses a virtq serialises the calls on it; struct virtio_queue (virtio.h) holds the lock.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/error.h"
#include "machine/memory.h"

#define VIRTQ_SIZE_MAX 1024	/* entries of a ring that any of our devices offers */
#define VIRTQ_SEGMENTS_MAX 1024 /* buffers of one chain, indirect ones included; also what preadv(2) takes */

struct virtq_ring_desc; /* layouts in guest memory, virtq.c's */
struct virtq_ring_avail;
struct virtq_ring_used;

struct virtq {
	struct guest_memory *memory;
	uint16_t size; /* entries, a power of two */
	uint64_t desc_gpa, avail_gpa, used_gpa;
	bool event_idx, indirect; /* features negotiated: VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC */

	/* valid from virtq_start to virtq_stop */
	const struct virtq_ring_desc *desc;
	const struct virtq_ring_avail *avail;
	struct virtq_ring_used *used;
	uint16_t next_avail; /* the next entry of the available ring to take */
	uint16_t next_used;  /* where the next used entry goes; ahead of what was published by those put */
	uint16_t published;  /* used index the guest sees */
	bool quiet;	     /* without event_idx: NO_NOTIFY stands in the used ring's flags */
};

/* One request: first the buffers that the device reads, then those it writes. The addresses are checked: each lies in
 * RAM as a whole. What they hold may change at any time. */
struct virtq_chain {
	uint16_t head; /* the descriptor that names the chain in the used ring */
	unsigned readable_count, writable_count;
	uint64_t readable, writable; /* bytes */
	struct iovec iov[VIRTQ_SEGMENTS_MAX];
	uint64_t gpa[VIRTQ_SEGMENTS_MAX]; /* of each iov */
};

/* Checks size, alignment and place of the three rings and begins at index 0. -EINVAL: err says what is wrong. */
int virtq_start(struct virtq *q, struct error *err);
void virtq_stop(struct virtq *q);
static inline bool virtq_started(const struct virtq *q)
{
	return q->desc != NULL;
}

/* Takes the next available chain: 1, 0 when there is none, -EINVAL when the guest breaks the rules (err says which).
 * After an error the ring must not be used any more. */
int virtq_next(struct virtq *q, struct virtq_chain *chain, struct error *err);
/* Gives back the last `count` chains taken, as if virtq_next had not been called. */
void virtq_untake(struct virtq *q, unsigned count);

/* Puts a chain with `written` bytes into the used ring; the guest sees it after the next virtq_publish. */
void virtq_put(struct virtq *q, uint16_t head, uint32_t written);
/* Forgets the last `count` entries that were put but not published. */
void virtq_unput(struct virtq *q, unsigned count);
/* Shows the guest all entries put; true when it wants an interrupt for them. */
bool virtq_publish(struct virtq *q);

/* The guest need not notify while the device is looking anyway (a hint), or must from now on. After virtq_notify_on
 * returned true there are chains that it may not have announced: look again. */
void virtq_notify_off(struct virtq *q);
bool virtq_notify_on(struct virtq *q);

/* Copy bytes at an offset of a chain's readable or writable part; return how many there were. */
size_t virtq_chain_read(const struct virtq_chain *chain, uint64_t offset, void *to, size_t length);
size_t virtq_chain_write(
	const struct virtq *q, const struct virtq_chain *chain, uint64_t offset, const void *from, size_t length);
/* Makes `out` (room for VIRTQ_SEGMENTS_MAX) the pieces of bytes [offset, offset + length) of the readable or writable
 * part, for I/O without a copy; returns how many. Bytes written that way are announced by virtq_chain_wrote. */
int virtq_chain_slice(
	const struct virtq_chain *chain, bool writable, uint64_t offset, uint64_t length, struct iovec *out);
void virtq_chain_wrote(const struct virtq *q, const struct virtq_chain *chain, uint64_t offset, uint64_t length);
