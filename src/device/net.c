/* virtio-net (virtio 1.2, section 5.1): as many pairs of queues as the back end has queues. Both directions run on the
 * loop's thread, where the back ends live: a notification of a transmit queue sets a timer that is due at once, so the
 * vCPU goes on in a microsecond and a back end that is slow holds the descriptors back instead of losing frames.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/cleanup.h"
#include "base/loop.h"
#include "base/util.h"
#include "device/virtio.h"
#include "machine/board.h"
#include "net/net.h"

#define QUEUE_SIZE 256
#define FRAMES_A_TURN 128 /* then the loop sees to its timers */
#define FRAMES_A_PUBLISH 16

enum { RX, TX, A_PAIR }; /* queues of a pair; behind the last one comes the control queue, if there are several */

enum { /* features, 5.1.3 */
	F_CSUM = 0,
	F_GUEST_CSUM = 1,
	F_MTU = 3,
	F_MAC = 5,
	F_GUEST_TSO4 = 7,
	F_GUEST_TSO6 = 8,
	F_HOST_TSO4 = 11,
	F_HOST_TSO6 = 12,
	F_MRG_RXBUF = 15,
	F_STATUS = 16,
	F_CTRL_VQ = 17,
	F_MQ = 22,
};

/* Control commands, 5.1.6.5 */
enum { CTRL_OK = 0, CTRL_ERROR = 1, CTRL_MQ = 4, CTRL_MQ_PAIRS_SET = 0 };

struct net_config { /* struct virtio_net_config, 5.1.4 */
	uint8_t mac[6];
	uint16_t status;
	uint16_t max_virtqueue_pairs;
	uint16_t mtu;
} __attribute__((packed));

#define STATUS_LINK_UP 1

#define HEADER_NEEDS_CSUM 1
#define HEADER_DATA_VALID 2
#define GSO_NONE 0
#define GSO_TCPV4 1
#define GSO_TCPV6 4

struct virtio_net;

struct pair {
	struct virtio_net *n;
	struct net *net;
	struct virtio_queue *rx, *tx;
	atomic_bool starved; /* the back end keeps a frame until the guest adds buffers */
	struct loop_timer tx_turn;
	atomic_bool tx_soon; /* tx_turn is set */
	struct loop_timer rx_turn; /* when the limit lets the next frame in */
};

struct virtio_net {
	struct virtio_device virtio;
	struct net *net; /* queue 0 of the back end */
	struct loop *loop;
	struct rate_limit limit[A_PAIR]; /* of each direction, for all pairs together */
	struct loop_timer settle;   /* tells the back end what the driver wants */
	struct loop_timer control;  /* does what the control queue asks for */
	atomic_uint pairs_used;	    /* set by the driver; 1 after a reset (5.1.6.5.5) */
	struct net_offloads taken;  /* by the driver, as the back end was told */

	/* the loop's thread's */
	struct virtq_chain rx_first, rx_more, chain;
	uint8_t frame[sizeof(struct net_header) + NET_FRAME_MAX]; /* being transmitted */

	unsigned pairs;
	struct pair pair[];
};

static bool has_headers(const struct virtio_net *n)
{
	return net_properties(n->net)->headers;
}

enum { SENT_FRAMES, SENT_BYTES, SENT_DROPPED, RECEIVED_FRAMES, RECEIVED_BYTES, DELAYS };
static const char *const counter_names[] = {
	"sent_frames", "sent_bytes", "sent_dropped", "received_frames", "received_bytes", "delays", NULL};

/* When the limit of that direction lets the next frame through; 0: now. */
static uint64_t limited_until(struct virtio_net *n, unsigned direction)
{
	uint64_t now = n->limit[direction].limited ? clock_now() : 0;
	uint64_t wait = rate_limit_wait(&n->limit[direction], now);

	if (!wait)
		return 0;
	virtio_count(&n->virtio, DELAYS, 1);
	return now + wait;
}

/* ---- to the guest ---- */

static void rx_turn(struct loop_timer *timer)
{
	net_room(container_of(timer, struct pair, rx_turn)->net);
}

/* The frame does not fit, or not now: the buffers taken for it go back. */
static void rx_give_back(struct virtio_queue *q, unsigned taken, unsigned put)
{
	virtq_untake(&q->ring, taken);
	virtq_unput(&q->ring, put);
}

static bool rx_take(struct pair *p, struct virtq_chain *chain)
{
	if (virtio_take(p->rx, chain))
		return true;
	/* Said before the guest is asked to notify, so that its notification finds it. */
	p->starved = true;
	if (!virtio_await(p->rx))
		return false;
	p->starved = false;
	return virtio_take(p->rx, chain);
}

/* The queue gives no buffer. Without a driver there is nobody to keep a frame for; full or in a pause, there will be.
 */
static bool rx_is_gone(const struct virtio_net *n)
{
	return !(n->virtio.status & VIRTIO_STATUS_DRIVER_OK) || (n->virtio.status & VIRTIO_STATUS_NEEDS_RESET);
}

static bool rx_usable(struct virtio_net *n, struct virtio_queue *q, const struct virtq_chain *chain)
{
	if (chain->readable == 0 && chain->writable >= sizeof(struct net_header))
		return true;
	virtio_broken(&n->virtio, q, "a receive buffer that is readable, or smaller than the header");
	return false;
}

/* The header that the guest gets. false: the frame is none that it takes: it was sent before the back end knew. */
static bool rx_header(struct virtio_net *n, struct net_header *header)
{
	bool sums = virtio_has(&n->virtio, F_GUEST_CSUM);

	if (!has_headers(n)) {
		*header = (struct net_header){
			.flags = sums && net_properties(n->net)->checksums_valid ? HEADER_DATA_VALID : 0};
		return true;
	}
	switch (header->gso_type) {
	case GSO_NONE:
		break;
	case GSO_TCPV4:
		if (!virtio_has(&n->virtio, F_GUEST_TSO4))
			return false;
		break;
	case GSO_TCPV6:
		if (!virtio_has(&n->virtio, F_GUEST_TSO6))
			return false;
		break;
	default:
		return false;
	}
	if (sums)
		return true;
	/* 5.1.6.4.1: without the feature the flags are zero, and sums are complete */
	if (header->flags & HEADER_NEEDS_CSUM)
		return false;
	header->flags = 0;
	return true;
}

/* A net_receive_function, on the loop's thread. */
static bool receive(void *opaque, const uint8_t *frame, size_t length)
{
	struct pair *p = opaque;
	struct virtio_net *n = p->n;
	struct virtio_queue *q = p->rx;
	struct net_header header;
	size_t sent = 0; /* of the frame */
	uint64_t later;
	unsigned count = 0;
	bool mergeable;

	if (has_headers(n)) {
		if (length < sizeof(header))
			return true;
		memcpy(&header, frame, sizeof(header));
		frame += sizeof(header);
		length -= sizeof(header);
	}
	scope_lock(&q->lock);
	if (!q->running) {
		p->starved = true;
		return rx_is_gone(n);
	}
	later = limited_until(n, RX);
	if (later) { /* the back end keeps it */
		loop_timer_set(n->loop, &p->rx_turn, later);
		return false;
	}
	if (!rx_header(n, &header))
		return true;
	mergeable = virtio_has(&n->virtio, F_MRG_RXBUF);
	virtq_notify_off(&q->ring);
	do {
		struct virtq_chain *chain = count ? &n->rx_more : &n->rx_first;
		size_t offset = count ? 0 : sizeof(header);
		size_t part;

		/* More than all buffers of the ring: it will never fit. */
		if (count == q->ring.size || (count && !mergeable)) {
			rx_give_back(q, count, count);
			return true;
		}
		if (!rx_take(p, chain)) {
			rx_give_back(q, count, count);
			return rx_is_gone(n);
		}
		if (!rx_usable(n, q, chain))
			return true;
		part = virtq_chain_write(&q->ring, chain, offset, frame + sent, length - sent);
		virtq_put(&q->ring, chain->head, offset + part);
		sent += part;
		count++;
	} while (sent < length);
	header.num_buffers = count;
	virtq_chain_write(&q->ring, &n->rx_first, 0, &header, sizeof(header));
	virtio_publish(q);
	rate_limit_spend(&n->limit[RX], length);
	virtio_count(&n->virtio, RECEIVED_FRAMES, 1);
	virtio_count(&n->virtio, RECEIVED_BYTES, length);
	return true;
}

/* ---- from the guest ---- */

/* RFC 1071, over memory of any alignment; the sum is in the byte order of the data. */
static uint16_t checksum(const uint8_t *bytes, size_t length)
{
	uint64_t sum = 0;
	uint32_t word;

	for (; length >= 4; bytes += 4, length -= 4) {
		memcpy(&word, bytes, 4);
		sum += word;
	}
	word = 0;
	memcpy(&word, bytes, length);
	sum += word;
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* 5.1.6.2: the driver has put the sum of the pseudo header into the field, we add the rest. A frame that TSO leaves
 * uncut has the pseudo header of its whole length, so that its sum is right as one packet. */
static bool complete_checksum(uint8_t *frame, size_t length, const struct net_header *h)
{
	size_t field = (size_t)h->csum_start + h->csum_offset;
	uint16_t sum;

	if (h->csum_start >= length || field + 2 > length)
		return false;
	sum = checksum(frame + h->csum_start, length - h->csum_start);
	if (sum == 0) /* means "none" in UDP, and is the same number */
		sum = 0xffff;
	memcpy(frame + field, &sum, 2);
	return true;
}

static bool offload_negotiated(struct virtio_net *n, const struct net_header *h)
{
	if ((h->flags & HEADER_NEEDS_CSUM) && !virtio_has(&n->virtio, F_CSUM))
		return false;
	switch (h->gso_type) {
	case GSO_NONE:
		return true;
	case GSO_TCPV4:
		return virtio_has(&n->virtio, F_HOST_TSO4);
	case GSO_TCPV6:
		return virtio_has(&n->virtio, F_HOST_TSO6);
	}
	return false;
}

static void sent(struct virtio_net *n, size_t length)
{
	virtio_count(&n->virtio, SENT_FRAMES, 1);
	virtio_count(&n->virtio, SENT_BYTES, length);
}

static bool dropped(struct virtio_net *n)
{
	virtio_count(&n->virtio, SENT_DROPPED, 1);
	return true;
}

/* false: not a frame at all. A frame that is merely wrong is lost, as on a wire. */
static bool transmit(struct pair *p, const struct virtq_chain *chain)
{
	struct virtio_net *n = p->n;
	struct net_header h;
	uint8_t *frame = n->frame + sizeof(h);
	size_t length;

	if (virtq_chain_read(chain, 0, &h, sizeof(h)) < sizeof(h))
		return false;
	rate_limit_spend(&n->limit[TX], chain->readable - sizeof(h));
	if (chain->readable - sizeof(h) > NET_FRAME_MAX || !offload_negotiated(n, &h))
		return dropped(n);
	length = virtq_chain_read(chain, sizeof(h), frame, NET_FRAME_MAX);
	if (length < NET_FRAME_MIN)
		return dropped(n);
	if (!has_headers(n) && (h.flags & HEADER_NEEDS_CSUM) && !complete_checksum(frame, length, &h))
		return dropped(n);
	sent(n, length);
	if (has_headers(n)) {
		h.flags &= HEADER_NEEDS_CSUM; /* the one that a driver may set (5.1.6.2) */
		memcpy(n->frame, &h, sizeof(h));
		net_send(p->net, n->frame, sizeof(h) + length);
		return true;
	}
	net_send(p->net, frame, length);
	return true;
}

static void tx_later(struct pair *p)
{
	if (!atomic_exchange(&p->tx_soon, true))
		loop_timer_set(p->n->loop, &p->tx_turn, clock_now());
}

static void tx_turn(struct loop_timer *timer)
{
	struct pair *p = container_of(timer, struct pair, tx_turn);
	struct virtio_net *n = p->n;
	struct virtio_queue *q = p->tx;

	p->tx_soon = false;
	scope_lock(&q->lock);
	if (!q->running)
		return;
	virtq_notify_off(&q->ring);
	for (unsigned i = 1; i <= FRAMES_A_TURN; i++) {
		uint64_t later = limited_until(n, TX);

		if (later) {
			virtio_publish(q);
			p->tx_soon = true;
			loop_timer_set(n->loop, &p->tx_turn, later);
			return;
		}
		if (!virtio_take(q, &n->chain)) {
			virtio_publish(q); /* also when a pause has come between: what was sent is completed */
			if (!virtio_await(q))
				return;
			continue;
		}
		if (!transmit(p, &n->chain)) {
			virtio_broken(&n->virtio, q, "a frame to transmit without its header of 12 bytes");
			return;
		}
		virtq_put(&q->ring, n->chain.head, 0);
		if (i % FRAMES_A_PUBLISH == 0)
			virtio_publish(q);
	}
	virtio_publish(q);
	tx_later(p);
}

/* ---- control (5.1.6.5) ---- */

/* Where the control queue stands: behind the pairs that the driver knows of. */
static unsigned control_index(const struct virtio_net *n)
{
	return A_PAIR * (virtio_has(&n->virtio, F_MQ) ? n->pairs : 1);
}

static bool is_control(const struct virtio_net *n, const struct virtio_queue *q)
{
	return virtio_has(&n->virtio, F_CTRL_VQ) && q->index == control_index(n);
}

/* Tells the back end what the driver takes and how many pairs it serves. On the loop's thread, no queue's lock held. */
static void settle(struct loop_timer *timer)
{
	struct virtio_net *n = container_of(timer, struct virtio_net, settle);
	scope_lock(&n->virtio.lock);
	struct net_offloads taken = {
		.checksum = virtio_has(&n->virtio, F_GUEST_CSUM),
		.tso4 = virtio_has(&n->virtio, F_GUEST_TSO4),
		.tso6 = virtio_has(&n->virtio, F_GUEST_TSO6),
	};

	if (has_headers(n) && memcmp(&taken, &n->taken, sizeof(taken)) != 0)
		net_set_offloads(n->net, taken);
	n->taken = taken;
	if (n->pairs > 1)
		net_use_queues(n->net, n->pairs_used);
}

static uint8_t control(struct virtio_net *n, const struct virtq_chain *chain)
{
	struct {
		uint8_t class, command;
		uint16_t pairs;
	} c;

	if (virtq_chain_read(chain, 0, &c, sizeof(c)) < sizeof(c) || c.class != CTRL_MQ ||
		c.command != CTRL_MQ_PAIRS_SET || !virtio_has(&n->virtio, F_MQ) || c.pairs < 1 || c.pairs > n->pairs)
		return CTRL_ERROR;
	n->pairs_used = c.pairs;
	return CTRL_OK;
}

static void control_turn(struct loop_timer *timer)
{
	struct virtio_net *n = container_of(timer, struct virtio_net, control);
	struct virtio_queue *q = &n->virtio.queues[control_index(n)];
	bool more = false;

	for (unsigned i = 0; i <= FRAMES_A_TURN; i++) {
		scope_lock(&q->lock);
		if (i == FRAMES_A_TURN) {
			more = true;
		} else if (!is_control(n, q) || !virtio_take(q, &n->chain)) {
			if (!virtio_await(q))
				break;
		} else {
			uint8_t answer = control(n, &n->chain);

			if (n->chain.writable < 1) {
				virtio_broken(&n->virtio, q, "a command without room for its answer");
				break;
			}
			virtq_chain_write(&q->ring, &n->chain, 0, &answer, 1);
			virtio_complete(q, &n->chain, 1);
		}
	}
	settle(&n->settle);
	if (more)
		loop_timer_set(n->loop, &n->control, clock_now());
}

/* ---- the device ---- */

void virtio_net_limit(struct virtio_device *device, bool received, const struct rate_limits *limits)
{
	struct virtio_net *n = container_of(device, struct virtio_net, virtio);

	rate_limit_set(&n->limit[received ? RX : TX], limits, clock_now());
	/* What waits looks again. */
	for (unsigned i = 0; i < n->pairs; i++) {
		if (!received)
			n->pair[i].tx_soon = true;
		loop_timer_set(n->loop, received ? &n->pair[i].rx_turn : &n->pair[i].tx_turn, clock_now());
	}
}

static void notify(struct virtio_device *device, struct virtio_queue *queue)
{
	struct virtio_net *n = container_of(device, struct virtio_net, virtio);
	struct pair *p;

	if (is_control(n, queue)) {
		loop_timer_set(n->loop, &n->control, clock_now());
		return;
	}
	if (queue->index >= A_PAIR * n->pairs)
		return;
	p = &n->pair[queue->index / A_PAIR];
	if (queue == p->tx)
		tx_later(p);
	else if (atomic_exchange(&p->starved, false))
		net_room(p->net);
}

static void started(struct virtio_device *device)
{
	struct virtio_net *n = container_of(device, struct virtio_net, virtio);

	loop_timer_set(n->loop, &n->settle, clock_now());
}

static void reset(struct virtio_device *device)
{
	struct virtio_net *n = container_of(device, struct virtio_net, virtio);

	n->pairs_used = 1;
	loop_timer_set(n->loop, &n->settle, clock_now());
}

static void destroy(struct virtio_device *device)
{
	struct virtio_net *n = container_of(device, struct virtio_net, virtio);

	for (unsigned i = 0; i < n->pairs; i++) {
		net_set_receiver(n->pair[i].net, NULL, NULL);
		loop_timer_cancel(n->loop, &n->pair[i].tx_turn);
		loop_timer_cancel(n->loop, &n->pair[i].rx_turn);
	}
	loop_timer_cancel(n->loop, &n->settle);
	loop_timer_cancel(n->loop, &n->control);
	virtio_release(device);
	for (unsigned i = 0; i < A_PAIR; i++)
		rate_limit_destroy(&n->limit[i]);
	free(n);
}

static const struct virtio_model model = {
	.name = "virtio-net",
	.id = 1,
	.pci_class = 0x020000, /* Ethernet controller */
	.notify = notify,
	.started = started,
	.reset = reset,
	.counters = counter_names,
	.destroy = destroy,
};

static void describe(struct virtio_net *n, const struct virtio_net_options *options)
{
	const struct net_properties *p = net_properties(n->net);
	struct net_config config = {.status = STATUS_LINK_UP, .max_virtqueue_pairs = n->pairs, .mtu = min(p->mtu, 65535u)};

	memcpy(config.mac, options->mac, sizeof(config.mac));
	if (memcmp(config.mac, (uint8_t[6]){0}, 6) == 0 && getrandom(config.mac, 6, 0) == 6)
		config.mac[0] = (config.mac[0] & 0xfc) | 2; /* an individual's, locally administered */
	memcpy(n->virtio.config, &config, sizeof(config));
	n->virtio.config_size = sizeof(config);
	n->virtio.offered |= 1 << F_CSUM | 1 << F_MAC | 1 << F_MRG_RXBUF | 1 << F_STATUS;
	if (p->mtu)
		n->virtio.offered |= 1 << F_MTU;
	if (p->large_frames)
		n->virtio.offered |= 1 << F_HOST_TSO4;
	if (p->large_frames6)
		n->virtio.offered |= 1 << F_HOST_TSO6;
	if (p->checksums_valid)
		n->virtio.offered |= 1 << F_GUEST_CSUM;
	if (p->headers)
		n->virtio.offered |= 1 << F_GUEST_CSUM | 1 << F_GUEST_TSO4 | 1 << F_GUEST_TSO6;
	if (n->pairs > 1)
		n->virtio.offered |= 1 << F_CTRL_VQ | 1 << F_MQ;
}

int virtio_net_create(struct virtio_device **device, struct board *board, struct net *net,
	const struct virtio_net_options *options, struct error *err)
{
	unsigned pairs = min(net_queues(net), (unsigned)NET_QUEUES_MAX);
	struct virtio_net *n = calloc(1, sizeof(*n) + pairs * sizeof(n->pair[0]));
	int ret;

	if (!n)
		return error_set(err, ENOMEM, "virtio-net: no memory");
	n->net = net;
	n->loop = board_loop(board);
	n->settle.function = settle;
	n->control.function = control_turn;
	n->pairs_used = 1;
	n->pairs = pairs;
	for (unsigned i = 0; i < A_PAIR; i++)
		rate_limit_init(&n->limit[i]);
	describe(n, options);
	ret = virtio_init(&n->virtio, &model, board_memory(board), A_PAIR * pairs + (pairs > 1), QUEUE_SIZE, err);
	for (unsigned i = 0; i < pairs; i++) {
		struct pair *p = &n->pair[i];

		*p = (struct pair){.n = n, .net = net_queue(net, i), .tx_turn = {.function = tx_turn}, .rx_turn = {.function = rx_turn}};
		if (ret == 0) {
			p->rx = &n->virtio.queues[A_PAIR * i + RX];
			p->tx = &n->virtio.queues[A_PAIR * i + TX];
		}
	}
	if (ret == 0)
		ret = virtio_pci_attach(&n->virtio, board, err);
	if (ret < 0) {
		destroy(&n->virtio);
		return ret;
	}
	for (unsigned i = 0; i < pairs; i++)
		net_set_receiver(n->pair[i].net, receive, &n->pair[i]);
	*device = &n->virtio;
	return 0;
}
