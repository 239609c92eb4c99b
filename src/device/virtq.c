/* The split virtqueue: virtio 1.2, section 2.7. The rings' host addresses are taken from the memory gateway once, when
 * the queue starts (guest RAM does not move), for exactly the bytes that the queue's size says. */
#include "device/virtq.h"

#include <stdatomic.h>
#include <string.h>

#include "base/util.h"

struct virtq_ring_desc { /* 2.7.5; packed, since an indirect table may stand at any address */
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
} __attribute__((packed));

#define DESC_NEXT 1
#define DESC_WRITE 2
#define DESC_INDIRECT 4

struct virtq_ring_avail { /* 2.7.6; the ring is followed by used_event */
	uint16_t flags;
	uint16_t idx;
	uint16_t ring[];
};

#define AVAIL_NO_INTERRUPT 1

struct virtq_ring_used { /* 2.7.8; the ring is followed by avail_event */
	uint16_t flags;
	uint16_t idx;
	struct {
		uint32_t id;
		uint32_t len;
	} ring[];
};

#define USED_NO_NOTIFY 1

/* One access that the compiler neither repeats nor splits: the guest writes these fields at any time. */
#define load_once(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define store_once(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)

/* A descriptor by value. Its fields need not be consistent with each other, only read once. */
static struct virtq_ring_desc load_desc(const volatile struct virtq_ring_desc *d)
{
	return (struct virtq_ring_desc){d->addr, d->len, d->flags, d->next};
}

static void wrote(const struct virtq *q, const void *field, size_t length)
{
	memory_wrote(q->memory, q->used_gpa + ((const uint8_t *)field - (const uint8_t *)q->used), length);
}

static int check_ring(const char *name, uint64_t gpa, unsigned align, const void *host, struct error *err)
{
	if (gpa & (align - 1))
		return error_set(err, EINVAL, "its %s at 0x%llx is not aligned to %u bytes", name,
			(unsigned long long)gpa, align);
	if (!host)
		return error_set(err, EINVAL, "its %s at 0x%llx is not in guest memory", name, (unsigned long long)gpa);
	return 0;
}

int virtq_start(struct virtq *q, struct error *err)
{
	const void *desc, *avail;
	void *used;
	int ret;

	if (q->size == 0 || q->size > VIRTQ_SIZE_MAX || (q->size & (q->size - 1)))
		return error_set(err, EINVAL, "its size %u is not a power of two up to %u", q->size, VIRTQ_SIZE_MAX);
	/* Sizes and alignments: 2.7. Six bytes: flags, idx and the event index behind the ring. */
	desc = memory_for_read(q->memory, q->desc_gpa, 16ull * q->size);
	avail = memory_for_read(q->memory, q->avail_gpa, 6 + 2ull * q->size);
	used = memory_for_write(q->memory, q->used_gpa, 6 + 8ull * q->size);
	if ((ret = check_ring("descriptor table", q->desc_gpa, 16, desc, err)) < 0 ||
		(ret = check_ring("available ring", q->avail_gpa, 2, avail, err)) < 0 ||
		(ret = check_ring("used ring", q->used_gpa, 4, used, err)) < 0)
		return ret;
	q->desc = desc;
	q->avail = avail;
	q->used = used;
	q->next_avail = q->next_used = q->published = 0;
	q->quiet = false;
	return 0;
}

void virtq_stop(struct virtq *q)
{
	q->desc = NULL;
	q->avail = NULL;
	q->used = NULL;
	/* What a device had not told yet when its queue was stopped it will never tell. */
	q->next_avail = q->next_used = q->published = 0;
}

/* ---- taking chains ---- */

static int add_segment(struct virtq *q, struct virtq_chain *chain, const struct virtq_ring_desc *d, struct error *err)
{
	unsigned n = chain->readable_count + chain->writable_count;
	bool writable = d->flags & DESC_WRITE;
	void *host;

	if (n == VIRTQ_SEGMENTS_MAX)
		return error_set(err, EINVAL, "chain %u has more than %u buffers", chain->head, VIRTQ_SEGMENTS_MAX);
	/* 2.7.5.1: a chain's total is limited to 2^32 bytes; sums cannot overflow. An empty buffer is not forbidden to
	 * a driver by name, but none makes one: a length of 0 is refused as what it is, a mistake or an attack. */
	if (d->len == 0)
		return error_set(err, EINVAL, "chain %u has a buffer of length 0", chain->head);
	if (chain->readable + chain->writable + d->len > UINT32_MAX)
		return error_set(err, EINVAL, "chain %u is longer than 4 GiB", chain->head);
	if (writable)
		host = memory_for_write(q->memory, d->addr, d->len);
	else
		host = (void *)memory_for_read(q->memory, d->addr, d->len);
	if (!host)
		return error_set(err, EINVAL, "chain %u has a buffer that is not in guest memory: 0x%llx, %u bytes",
			chain->head, (unsigned long long)d->addr, d->len);
	/* 2.7.4.2: writable ones come after all readable ones */
	if (!writable && chain->writable_count)
		return error_set(err, EINVAL, "chain %u has a readable buffer behind a writable one", chain->head);
	chain->iov[n] = (struct iovec){host, d->len};
	chain->gpa[n] = d->addr;
	if (writable) {
		chain->writable_count++;
		chain->writable += d->len;
	} else {
		chain->readable_count++;
		chain->readable += d->len;
	}
	return 0;
}

/* Walks a table from entry `i`. 2.7.5.3: an indirect table stands alone or at the end of a chain, and has none in it.
 */
static int walk(struct virtq *q, struct virtq_chain *chain, const struct virtq_ring_desc *table, unsigned size,
	unsigned i, bool is_indirect, struct error *err)
{
	/* A chain visits no entry twice, so it has no more of them than the table: this ends every loop. */
	for (unsigned steps = 0; steps < size; steps++) {
		struct virtq_ring_desc d = load_desc(&table[i]);
		int ret;

		if (d.flags & DESC_INDIRECT) {
			if (is_indirect || !q->indirect)
				return error_set(err, EINVAL, "chain %u has an indirect table %s", chain->head,
					is_indirect ? "inside an indirect table" : "but did not negotiate them");
			if ((d.flags & DESC_NEXT) || d.len == 0 || d.len % sizeof(d))
				return error_set(err, EINVAL,
					"chain %u has an indirect table of %u bytes, flags 0x%x: must be the last, and "
					"whole entries",
					chain->head, d.len, d.flags);
			if (d.len / sizeof(d) > VIRTQ_SEGMENTS_MAX)
				return error_set(err, EINVAL,
					"chain %u has an indirect table of %zu entries, more than %u", chain->head,
					d.len / sizeof(d), VIRTQ_SEGMENTS_MAX);
			table = memory_for_read(q->memory, d.addr, d.len);
			if (!table)
				return error_set(err, EINVAL,
					"chain %u has an indirect table that is not in guest memory: 0x%llx, %u bytes",
					chain->head, (unsigned long long)d.addr, d.len);
			return walk(q, chain, table, d.len / sizeof(d), 0, true, err);
		}
		ret = add_segment(q, chain, &d, err);
		if (ret < 0)
			return ret;
		if (!(d.flags & DESC_NEXT))
			return 1;
		i = d.next;
		if (i >= size)
			return error_set(err, EINVAL, "chain %u goes on at descriptor %u of %u", chain->head, i, size);
	}
	return error_set(err, EINVAL, "chain %u is a loop", chain->head);
}

int virtq_next(struct virtq *q, struct virtq_chain *chain, struct error *err)
{
	uint16_t idx = __atomic_load_n(&q->avail->idx, __ATOMIC_ACQUIRE);
	uint16_t waiting = idx - q->next_avail;

	if (waiting == 0)
		return 0;
	if (waiting > q->size)
		return error_set(err, EINVAL, "the available index jumped from %u to %u in a ring of %u", q->next_avail,
			idx, q->size);
	chain->head = load_once(&q->avail->ring[q->next_avail & (q->size - 1)]);
	chain->readable_count = chain->writable_count = 0;
	chain->readable = chain->writable = 0;
	if (chain->head >= q->size)
		return error_set(err, EINVAL, "the available ring names descriptor %u of %u", chain->head, q->size);
	q->next_avail++;
	return walk(q, chain, q->desc, q->size, chain->head, false, err);
}

void virtq_untake(struct virtq *q, unsigned count)
{
	q->next_avail -= count;
}

/* ---- giving them back ---- */

void virtq_put(struct virtq *q, uint16_t head, uint32_t written)
{
	unsigned slot = q->next_used++ & (q->size - 1);

	store_once(&q->used->ring[slot].id, head);
	store_once(&q->used->ring[slot].len, written);
	wrote(q, &q->used->ring[slot], 8);
}

void virtq_unput(struct virtq *q, unsigned count)
{
	q->next_used -= count;
}

bool virtq_publish(struct virtq *q)
{
	uint16_t before = q->published, now = q->next_used, event;

	if (before == now)
		return false;
	q->published = now;
	__atomic_store_n(&q->used->idx, now, __ATOMIC_RELEASE);
	wrote(q, &q->used->idx, 2);
	/* The driver enables interrupts and then looks at the index again; we, the other way round (2.7.7.2, 2.7.10).
	 */
	atomic_thread_fence(memory_order_seq_cst);
	if (!q->event_idx)
		return !(load_once(&q->avail->flags) & AVAIL_NO_INTERRUPT);
	event = load_once(&q->avail->ring[q->size]);
	return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

/* ---- notifications ---- */

static uint16_t *avail_event(struct virtq *q)
{
	return (uint16_t *)&q->used->ring[q->size];
}

void virtq_notify_off(struct virtq *q)
{
	/* With event_idx the event index, left where it was, is behind what the driver adds: nothing to write. */
	if (q->event_idx || q->quiet)
		return;
	q->quiet = true;
	store_once(&q->used->flags, USED_NO_NOTIFY);
	wrote(q, &q->used->flags, 2);
}

bool virtq_notify_on(struct virtq *q)
{
	if (q->event_idx) {
		store_once(avail_event(q), q->next_avail);
		wrote(q, avail_event(q), 2);
	} else if (q->quiet) {
		q->quiet = false;
		store_once(&q->used->flags, 0);
		wrote(q, &q->used->flags, 2);
	}
	/* As in virtq_publish: what the driver added before it saw this is found by the look after the fence. */
	atomic_thread_fence(memory_order_seq_cst);
	return load_once(&q->avail->idx) != q->next_avail;
}

/* ---- what is in a chain ---- */

/* Walks the pieces of [offset, offset + length) of one part of a chain. */
struct cursor {
	const struct virtq_chain *chain;
	unsigned i, end;
	uint64_t offset, left;
};

static struct cursor cursor_at(const struct virtq_chain *chain, bool writable, uint64_t offset, uint64_t length)
{
	uint64_t total = writable ? chain->writable : chain->readable;
	unsigned first = writable ? chain->readable_count : 0;

	return (struct cursor){
		.chain = chain,
		.i = first,
		.end = first + (writable ? chain->writable_count : chain->readable_count),
		.offset = offset,
		.left = offset < total ? min(length, total - offset) : 0,
	};
}

static bool cursor_next(struct cursor *c, struct iovec *piece, uint64_t *gpa)
{
	while (c->left && c->i < c->end) {
		const struct iovec *iov = &c->chain->iov[c->i];
		uint64_t start = c->offset;

		if (start >= iov->iov_len) {
			c->offset -= iov->iov_len;
			c->i++;
			continue;
		}
		piece->iov_base = (uint8_t *)iov->iov_base + start;
		piece->iov_len = min((uint64_t)iov->iov_len - start, c->left);
		*gpa = c->chain->gpa[c->i] + start;
		c->left -= piece->iov_len;
		c->offset = 0;
		c->i++;
		return true;
	}
	return false;
}

size_t virtq_chain_read(const struct virtq_chain *chain, uint64_t offset, void *to, size_t length)
{
	struct cursor c = cursor_at(chain, false, offset, length);
	struct iovec piece;
	size_t done = 0;
	uint64_t gpa;

	while (cursor_next(&c, &piece, &gpa)) {
		memcpy((uint8_t *)to + done, piece.iov_base, piece.iov_len);
		done += piece.iov_len;
	}
	return done;
}

size_t virtq_chain_write(
	const struct virtq *q, const struct virtq_chain *chain, uint64_t offset, const void *from, size_t length)
{
	struct cursor c = cursor_at(chain, true, offset, length);
	struct iovec piece;
	size_t done = 0;
	uint64_t gpa;

	while (cursor_next(&c, &piece, &gpa)) {
		memcpy(piece.iov_base, (const uint8_t *)from + done, piece.iov_len);
		memory_wrote(q->memory, gpa, piece.iov_len);
		done += piece.iov_len;
	}
	return done;
}

int virtq_chain_slice(
	const struct virtq_chain *chain, bool writable, uint64_t offset, uint64_t length, struct iovec *out)
{
	struct cursor c = cursor_at(chain, writable, offset, length);
	uint64_t gpa;
	int count = 0;

	while (cursor_next(&c, &out[count], &gpa))
		count++;
	return count;
}

void virtq_chain_wrote(const struct virtq *q, const struct virtq_chain *chain, uint64_t offset, uint64_t length)
{
	struct cursor c = cursor_at(chain, true, offset, length);
	struct iovec piece;
	uint64_t gpa;

	while (cursor_next(&c, &piece, &gpa))
		memory_wrote(q->memory, gpa, piece.iov_len);
}
