/* virtio-vsock (virtio 1.2, section 5.10): streams between programs in the guest and Unix sockets on the host, in the
 * manner of Firecracker (docs/vsock.md there). Everything happens on the loop's thread.
 *
 * Packets to the guest need a buffer of its; whoever has something to send stands in a queue (v->ready) and sends one
 * packet a turn. Packets from the guest are answered out of the same queue; while answers to strangers pile up, nothing
 * more is taken from the guest.
 */
#include "device/vsock.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "machine/board.h"

#define QUEUE_SIZE 128
#define PACKETS_A_TURN 64 /* then the loop sees to its timers */
#define PACKET_MOST 65536u
#define TYPE_STREAM 1

enum { RX, TX, EVENT, QUEUES };

/* ---- to the guest ---- */

static bool has_data(const struct vsock_connection *c)
{
	return c->readable && c->state == VSOCK_OPEN && !c->host_ended && vsock_credit(c) > 0 &&
	       !(c->guest_shutdown & VSOCK_RECEIVES_NO_MORE);
}

static void put(struct vsock *v, const struct vsock_header *h)
{
	struct virtio_queue *q = &v->virtio.queues[RX];

	virtq_chain_write(&q->ring, &v->chain, 0, h, sizeof(*h));
	virtq_put(&q->ring, v->chain.head, sizeof(*h) + h->len);
}

static struct vsock_header header_to(const struct vsock *v, uint32_t host_port, uint32_t guest_port, uint16_t op)
{
	return (struct vsock_header){.src_cid = VSOCK_CID_HOST,
		.dst_cid = v->cid,
		.src_port = host_port,
		.dst_port = guest_port,
		.type = TYPE_STREAM,
		.op = op};
}

/* Bytes from the socket straight into the guest's buffer; false: there were none, and the buffer is still to be used. */
static bool send_data(struct vsock *v, struct vsock_connection *c, struct vsock_header *h)
{
	struct virtio_queue *q = &v->virtio.queues[RX];
	uint64_t room = min(v->chain.writable - sizeof(*h), (uint64_t)PACKET_MOST);
	struct pollfd both_ways = {.fd = c->fd};
	ssize_t n;

	room = min(room, (uint64_t)vsock_credit(c));
	n = readv(c->fd, v->iov, virtq_chain_slice(&v->chain, true, sizeof(*h), room, v->iov));
	if (n > 0) {
		virtq_chain_wrote(&q->ring, &v->chain, sizeof(*h), n);
		c->sent += n;
		h->op = VSOCK_RW;
		h->len = n;
		return true;
	}
	c->readable = false;
	if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
		vsock_watch(c);
		return false;
	}
	if (n < 0) {
		c->pending = PENDING_RST;
		return false;
	}
	/* The client has shut its side; or is gone, and will not read either. */
	poll(&both_ways, 1, 0);
	c->host_ended = true;
	c->our_shutdown = VSOCK_SENDS_NO_MORE | (both_ways.revents & POLLHUP ? VSOCK_RECEIVES_NO_MORE : 0);
	c->pending |= PENDING_SHUTDOWN;
	vsock_watch(c);
	return false;
}

/* One packet of a connection; false: it had none after all. *gone: it was its last one. */
static bool send_one(struct vsock *v, struct vsock_connection *c, bool *gone)
{
	struct vsock_header h = header_to(v, c->host_port, c->guest_port, 0);

	h.buf_alloc = VSOCK_BUFFER;
	h.fwd_cnt = c->forwarded;
	if (c->pending & PENDING_REQUEST) {
		h.op = VSOCK_REQUEST;
		c->pending &= ~PENDING_REQUEST;
	} else if (c->pending & PENDING_RESPONSE) {
		h.op = VSOCK_RESPONSE;
		c->pending &= ~PENDING_RESPONSE;
	} else if (!(c->pending & PENDING_RST) && has_data(c) && send_data(v, c, &h)) {
		;
	} else if (c->pending & PENDING_RST) {
		h.op = VSOCK_RST;
		*gone = true;
	} else if (c->pending & PENDING_SHUTDOWN && !has_data(c)) {
		h.op = VSOCK_SHUTDOWN;
		h.flags = c->our_shutdown;
		c->pending &= ~PENDING_SHUTDOWN;
	} else if (c->pending & PENDING_CREDIT) {
		h.op = VSOCK_CREDIT_UPDATE;
	} else {
		return false;
	}
	c->pending &= ~PENDING_CREDIT; /* every packet tells it */
	c->told = c->forwarded;
	put(v, &h);
	return true;
}

static bool rx_take(struct vsock *v, struct virtio_queue *q)
{
	if (!virtio_take(q, &v->chain) && !(virtio_await(q) && virtio_take(q, &v->chain)))
		return false;
	if (v->chain.readable == 0 && v->chain.writable > sizeof(struct vsock_header))
		return true;
	virtio_broken(&v->virtio, q, "a receive buffer that is readable, or not larger than the header");
	return false;
}

/* true: there is more to send, and buffers may be there too. */
static bool send_turn(struct vsock *v)
{
	struct virtio_queue *q = &v->virtio.queues[RX];
	scope_lock(&q->lock);

	for (unsigned i = 0; i < PACKETS_A_TURN; i++) {
		struct vsock_connection *c = v->ready;
		bool gone = false;

		if (!v->stray_count && c && !c->pending && !has_data(c)) {
			vsock_unready(c); /* it waits for credit, or for its socket */
			continue;
		}
		if ((!v->stray_count && !c) || !rx_take(v, q)) {
			virtio_publish(q);
			return false;
		}
		if (v->stray_count) {
			struct vsock_stray *s = &v->strays[--v->stray_count];
			struct vsock_header h = header_to(v, s->host_port, s->guest_port, VSOCK_RST);

			h.type = s->type;
			put(v, &h);
			continue;
		}
		/* To the end of the queue: others come before its next packet. */
		vsock_unready(c);
		if (!send_one(v, c, &gone))
			virtq_untake(&q->ring, 1);
		if (gone)
			vsock_drop(c);
		else if (c->pending || has_data(c))
			vsock_ready(c, 0);
	}
	virtio_publish(q);
	return v->ready || v->stray_count;
}

/* ---- from the guest ---- */

static void answer_stray(struct vsock *v, const struct vsock_header *h)
{
	if (h->op != VSOCK_RST && v->stray_count < VSOCK_STRAYS)
		v->strays[v->stray_count++] = (struct vsock_stray){h->dst_port, h->src_port, h->type};
}

static void requested(struct vsock *v, const struct vsock_header *h)
{
	struct vsock_connection *c = vsock_connect_host(v, h->dst_port, h->src_port);

	if (!c) {
		answer_stray(v, h);
		return;
	}
	c->peer_buf_alloc = h->buf_alloc;
	c->peer_fwd_cnt = h->fwd_cnt;
	vsock_ready(c, PENDING_RESPONSE);
	vsock_watch(c);
}

static void handle(struct vsock *v, const struct vsock_header *h)
{
	struct vsock_connection *c;

	/* 5.10.6.4: neither from another guest nor to one. */
	if (h->src_cid != v->cid || h->dst_cid != VSOCK_CID_HOST)
		return;
	if (h->type != TYPE_STREAM) {
		answer_stray(v, h);
		return;
	}
	c = vsock_find(v, h->dst_port, h->src_port);
	if (!c) {
		if (h->op == VSOCK_REQUEST)
			requested(v, h);
		else
			answer_stray(v, h);
		return;
	}
	if (c->pending & PENDING_RST) { /* it is about to hear that this is over */
		if (h->op == VSOCK_RST)
			vsock_drop(c);
		return;
	}
	c->peer_buf_alloc = h->buf_alloc;
	c->peer_fwd_cnt = h->fwd_cnt;
	switch (h->op) {
	case VSOCK_RST:
		vsock_guest_forgot(c);
		return;
	case VSOCK_RESPONSE:
		if (c->state != VSOCK_REQUESTED)
			break;
		vsock_accepted(c);
		return;
	case VSOCK_SHUTDOWN:
		if (c->state != VSOCK_OPEN)
			break;
		vsock_guest_shuts(c, h->flags);
		return;
	case VSOCK_RW:
		if (c->state != VSOCK_OPEN)
			break;
		vsock_to_host(c, h->len);
		if (has_data(c))
			vsock_ready(c, 0);
		return;
	case VSOCK_CREDIT_UPDATE:
		if (has_data(c))
			vsock_ready(c, 0);
		return;
	case VSOCK_CREDIT_REQUEST:
		vsock_ready(c, PENDING_CREDIT);
		return;
	}
	/* What makes no sense now ends the connection (5.10.6.6). */
	answer_stray(v, h);
	vsock_drop(c);
}

/* true: there may be more. */
static bool receive_turn(struct vsock *v)
{
	struct virtio_queue *q = &v->virtio.queues[TX];
	scope_lock(&q->lock);

	for (unsigned i = 0; i < PACKETS_A_TURN; i++) {
		struct vsock_header h;

		/* The guest gives no buffers for our answers: it has to wait for its own sake. */
		if (v->stray_count == VSOCK_STRAYS) {
			virtio_publish(q);
			return false;
		}
		if (!virtio_take(q, &v->chain)) {
			virtio_publish(q);
			if (!virtio_await(q))
				return false;
			continue;
		}
		if (virtq_chain_read(&v->chain, 0, &h, sizeof(h)) < sizeof(h) ||
			h.len > v->chain.readable - sizeof(h)) {
			virtio_broken(&v->virtio, q, "a packet that is shorter than its header says");
			return false;
		}
		handle(v, &h);
		virtq_put(&q->ring, v->chain.head, 0);
	}
	virtio_publish(q);
	return true;
}

/* ---- turns ---- */

void vsock_turn_soon(struct vsock *v)
{
	loop_timer_set(v->loop, &v->turn, clock_now());
}

bool vsock_forget_if_reset(struct vsock *v)
{
	if (!atomic_exchange(&v->was_reset, false))
		return false;
	vsock_drop_all(v);
	v->stray_count = 0;
	return true;
}

static void turn(struct loop_timer *timer)
{
	struct vsock *v = container_of(timer, struct vsock, turn);
	bool more;

	vsock_forget_if_reset(v);
	more = receive_turn(v);
	more |= send_turn(v);
	if (more)
		vsock_turn_soon(v);
}

static void notify(struct virtio_device *device, struct virtio_queue *queue)
{
	/* Nothing ever happens to a vsock by itself here: the event queue's buffers stay with us. */
	if (queue->index != EVENT)
		vsock_turn_soon(container_of(device, struct vsock, virtio));
}

/* ---- the device ---- */

static void reset(struct virtio_device *device)
{
	struct vsock *v = container_of(device, struct vsock, virtio);

	v->was_reset = true;
	vsock_turn_soon(v);
}

static void destroy(struct virtio_device *device)
{
	struct vsock *v = container_of(device, struct vsock, virtio);

	if (v->listens)
		vsock_listen(v, false);
	vsock_drop_all(v);
	loop_timer_cancel(v->loop, &v->turn);
	loop_timer_cancel(v->loop, &v->watchman);
	virtio_release(device);
	free(v);
}

static const struct virtio_model model = {
	.name = "virtio-vsock",
	.id = 19,
	.pci_class = 0x028000, /* network controller of another kind */
	.notify = notify,
	.reset = reset,
	.destroy = destroy,
};

static int set_up(struct vsock *v, struct board *board, const struct virtio_vsock_options *options, struct error *err)
{
	uint64_t cid = options->cid; /* struct virtio_vsock_config, 5.10.4 */
	int ret = virtio_init(&v->virtio, &model, board_memory(board), QUEUES, QUEUE_SIZE, err);

	if (ret < 0)
		return ret;
	if (options->cid <= VSOCK_CID_HOST || options->cid == UINT32_MAX)
		return error_set(err, EINVAL, "virtio-vsock: address (CID) %u is not a guest's; give one from 3 to %u",
			options->cid, UINT32_MAX - 1);
	if (strlen(options->path) > 96) /* with _PORT behind it, it still is a socket's address */
		return error_set(err, ENAMETOOLONG, "virtio-vsock: the path %s has %zu bytes; 96 are the most",
			options->path, strlen(options->path));
	v->cid = options->cid;
	v->listener = options->listener;
	strcpy(v->path, options->path);
	memcpy(v->virtio.config, &cid, sizeof(cid));
	v->virtio.config_size = sizeof(cid);
	ret = virtio_pci_attach(&v->virtio, board, err);
	if (ret == 0)
		vsock_listen(v, true);
	return ret;
}

int virtio_vsock_create(struct virtio_device **device, struct board *board, const struct virtio_vsock_options *options,
	struct error *err)
{
	struct vsock *v = calloc(1, sizeof(*v));
	int ret;

	if (!v)
		return error_set(err, ENOMEM, "virtio-vsock: no memory");
	v->loop = board_loop(board);
	v->turn.function = turn;
	v->watchman.function = vsock_watchman;
	v->ready_end = &v->ready;
	ret = set_up(v, board, options, err);
	if (ret < 0) {
		destroy(&v->virtio);
		return ret;
	}
	*device = &v->virtio;
	return 0;
}
