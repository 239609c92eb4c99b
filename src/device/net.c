/* virtio-net (virtio 1.2, section 5.1): one pair of queues. Both directions run on the loop's thread, where the back
 * ends live: a notification of the transmit queue sets a timer that is due at once, so the vCPU goes on in a
 * microsecond and a back end that is slow holds the descriptors back instead of losing frames.
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

enum { RX, TX, QUEUES };

enum { /* features, 5.1.3 */
	F_CSUM = 0,
	F_GUEST_CSUM = 1,
	F_MTU = 3,
	F_MAC = 5,
	F_HOST_TSO4 = 11,
	F_HOST_TSO6 = 12,
	F_MRG_RXBUF = 15,
	F_STATUS = 16,
};

struct net_config { /* struct virtio_net_config, 5.1.4 */
	uint8_t mac[6];
	uint16_t status;
	uint16_t max_virtqueue_pairs;
	uint16_t mtu;
} __attribute__((packed));

#define STATUS_LINK_UP 1

struct frame_header { /* struct virtio_net_hdr, 5.1.6; with num_buffers always, as VERSION_1 says */
	uint8_t flags;
	uint8_t gso_type;
	uint16_t hdr_len;
	uint16_t gso_size;
	uint16_t csum_start;
	uint16_t csum_offset;
	uint16_t num_buffers;
} __attribute__((packed));

#define HEADER_NEEDS_CSUM 1
#define HEADER_DATA_VALID 2
#define GSO_NONE 0
#define GSO_TCPV4 1
#define GSO_TCPV6 4

struct virtio_net {
	struct virtio_device virtio;
	struct net *net;
	struct loop *loop;
	atomic_bool starved; /* the back end keeps a frame until the guest adds buffers */

	struct loop_timer tx_turn;
	atomic_bool tx_soon; /* tx_turn is set */

	struct virtq_chain rx_first, rx_more, tx; /* each under its queue's lock */
	uint8_t frame[NET_FRAME_MAX];		  /* being transmitted */
};

/* ---- to the guest ---- */

/* The frame does not fit, or not now: the buffers taken for it go back. */
static void rx_give_back(struct virtio_queue *q, unsigned taken, unsigned put)
{
	virtq_untake(&q->ring, taken);
	virtq_unput(&q->ring, put);
}

static bool rx_take(struct virtio_net *n, struct virtio_queue *q, struct virtq_chain *chain)
{
	if (virtio_take(q, chain))
		return true;
	/* Said before the guest is asked to notify, so that its notification finds it. */
	n->starved = true;
	if (!virtio_await(q))
		return false;
	n->starved = false;
	return virtio_take(q, chain);
}

/* The queue gives no buffer. Without a driver there is nobody to keep a frame for; full or in a pause, there will be.
 */
static bool rx_is_gone(const struct virtio_net *n)
{
	return !(n->virtio.status & VIRTIO_STATUS_DRIVER_OK) || (n->virtio.status & VIRTIO_STATUS_NEEDS_RESET);
}

static bool rx_usable(struct virtio_net *n, struct virtio_queue *q, const struct virtq_chain *chain)
{
	if (chain->readable == 0 && chain->writable >= sizeof(struct frame_header))
		return true;
	virtio_broken(&n->virtio, q, "a receive buffer that is readable, or smaller than the header");
	return false;
}

/* A net_receive_function, on the loop's thread. */
static bool receive(void *opaque, const uint8_t *frame, size_t length)
{
	struct virtio_net *n = opaque;
	struct virtio_queue *q = &n->virtio.queues[RX];
	struct frame_header header = {.num_buffers = 1};
	size_t sent = 0; /* of the frame */
	unsigned count = 0;
	bool mergeable;

	scope_lock(&q->lock);
	if (!q->running) {
		n->starved = true;
		return rx_is_gone(n);
	}
	mergeable = virtio_has(&n->virtio, F_MRG_RXBUF);
	if (virtio_has(&n->virtio, F_GUEST_CSUM) && net_properties(n->net)->checksums_valid)
		header.flags = HEADER_DATA_VALID;
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
		if (!rx_take(n, q, chain)) {
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
static bool complete_checksum(uint8_t *frame, size_t length, const struct frame_header *h)
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

static bool offload_negotiated(struct virtio_net *n, const struct frame_header *h)
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

/* false: not a frame at all. A frame that is merely wrong is lost, as on a wire. */
static bool transmit(struct virtio_net *n, const struct virtq_chain *chain)
{
	struct frame_header h;
	size_t length;

	if (virtq_chain_read(chain, 0, &h, sizeof(h)) < sizeof(h))
		return false;
	if (chain->readable - sizeof(h) > sizeof(n->frame) || !offload_negotiated(n, &h))
		return true;
	length = virtq_chain_read(chain, sizeof(h), n->frame, sizeof(n->frame));
	if (length < NET_FRAME_MIN)
		return true;
	if ((h.flags & HEADER_NEEDS_CSUM) && !complete_checksum(n->frame, length, &h))
		return true;
	net_send(n->net, n->frame, length);
	return true;
}

static void tx_later(struct virtio_net *n)
{
	if (!atomic_exchange(&n->tx_soon, true))
		loop_timer_set(n->loop, &n->tx_turn, clock_now());
}

static void tx_turn(struct loop_timer *timer)
{
	struct virtio_net *n = container_of(timer, struct virtio_net, tx_turn);
	struct virtio_queue *q = &n->virtio.queues[TX];

	n->tx_soon = false;
	scope_lock(&q->lock);
	if (!q->running)
		return;
	virtq_notify_off(&q->ring);
	for (unsigned i = 1; i <= FRAMES_A_TURN; i++) {
		if (!virtio_take(q, &n->tx)) {
			virtio_publish(q); /* also when a pause has come between: what was sent is completed */
			if (!virtio_await(q))
				return;
			continue;
		}
		if (!transmit(n, &n->tx)) {
			virtio_broken(&n->virtio, q, "a frame to transmit without its header of 12 bytes");
			return;
		}
		virtq_put(&q->ring, n->tx.head, 0);
		if (i % FRAMES_A_PUBLISH == 0)
			virtio_publish(q);
	}
	virtio_publish(q);
	tx_later(n);
}

/* ---- the device ---- */

static void notify(struct virtio_device *device, struct virtio_queue *queue)
{
	struct virtio_net *n = container_of(device, struct virtio_net, virtio);

	if (queue->index == TX)
		tx_later(n);
	else if (atomic_exchange(&n->starved, false))
		net_room(n->net);
}

static void destroy(struct virtio_device *device)
{
	struct virtio_net *n = container_of(device, struct virtio_net, virtio);

	net_set_receiver(n->net, NULL, NULL);
	loop_timer_cancel(n->loop, &n->tx_turn);
	virtio_release(device);
	free(n);
}

static const struct virtio_model model = {
	.name = "virtio-net",
	.id = 1,
	.pci_class = 0x020000, /* Ethernet controller */
	.notify = notify,
	.destroy = destroy,
};

static void describe(struct virtio_net *n, const struct virtio_net_options *options)
{
	const struct net_properties *p = net_properties(n->net);
	struct net_config config = {.status = STATUS_LINK_UP, .max_virtqueue_pairs = 1, .mtu = min(p->mtu, 65535u)};

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
}

int virtio_net_create(struct virtio_device **device, struct board *board, struct net *net,
	const struct virtio_net_options *options, struct error *err)
{
	struct virtio_net *n = calloc(1, sizeof(*n));
	int ret;

	if (!n)
		return error_set(err, ENOMEM, "virtio-net: no memory");
	n->net = net;
	n->loop = board_loop(board);
	n->tx_turn.function = tx_turn;
	describe(n, options);
	ret = virtio_init(&n->virtio, &model, board_memory(board), QUEUES, QUEUE_SIZE, err);
	if (ret == 0)
		ret = virtio_pci_attach(&n->virtio, board, err);
	if (ret < 0) {
		destroy(&n->virtio);
		return ret;
	}
	net_set_receiver(net, receive, n);
	*device = &n->virtio;
	return 0;
}
