/* virtio-console (virtio 1.2, section 5.3): one port, the guest's /dev/hvc0. Output is given out on the thread of the vCPU
 * that notifies, as the serial port's is, so that a guest's last words are out before it powers off.
 */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/loop.h"
#include "base/util.h"
#include "device/virtio.h"
#include "machine/board.h"

#define QUEUE_SIZE 64
#define CHAINS_A_TURN 64 /* then the loop goes on: a guest that keeps the queue full holds up no vCPU's pause */
#define PIECE 4096u

enum { RX, TX, QUEUES };

struct console_config { /* struct virtio_console_config, 5.3.4; without features none of it is valid */
	uint16_t cols, rows;
	uint32_t max_nr_ports, emerg_wr;
};

struct virtio_console {
	struct virtio_device virtio;
	struct loop *loop;
	struct loop_timer rest;
	virtio_console_output *output;
	void *output_opaque;
	void (*room)(void *opaque);
	void *room_opaque;

	struct virtq_chain rx, tx; /* each under its queue's lock */
	uint64_t given;		   /* bytes of the next transmitted chain that are out already; under its queue's lock */
	atomic_bool wants_room;	   /* input waits for the guest's buffers */
};

/* ---- output ---- */

/* true: all of the chain is out. */
static bool give(struct virtio_console *c)
{
	uint8_t bytes[PIECE];
	size_t n, taken;

	while ((n = virtq_chain_read(&c->tx, c->given, bytes, sizeof(bytes))) > 0) {
		taken = c->output ? c->output(c->output_opaque, bytes, n) : n;
		c->given += taken;
		if (taken < n)
			return false;
	}
	c->given = 0;
	return true;
}

static void transmit(struct virtio_console *c)
{
	struct virtio_queue *q = &c->virtio.queues[TX];
	scope_lock(&q->lock);

	for (unsigned i = 0; i < CHAINS_A_TURN; i++) {
		if (!virtio_take(q, &c->tx)) {
			if (!virtio_await(q))
				return;
			continue;
		}
		if (!give(c)) {
			/* The sink is full; virtio_console_flush() comes when it no longer is. */
			virtq_untake(&q->ring, 1);
			return;
		}
		virtio_complete(q, &c->tx, 0);
	}
	loop_timer_set(c->loop, &c->rest, clock_now());
}

static void transmit_rest(struct loop_timer *timer)
{
	transmit(container_of(timer, struct virtio_console, rest));
}

void virtio_console_flush(struct virtio_device *device)
{
	transmit(container_of(device, struct virtio_console, virtio));
}

void virtio_console_set_output(struct virtio_device *device, virtio_console_output *output, void *opaque)
{
	struct virtio_console *c = container_of(device, struct virtio_console, virtio);
	scope_lock(&device->queues[TX].lock);

	c->output_opaque = opaque;
	c->output = output;
}

/* ---- input ---- */

size_t virtio_console_input(struct virtio_device *device, const uint8_t *bytes, size_t n)
{
	struct virtio_console *c = container_of(device, struct virtio_console, virtio);
	struct virtio_queue *q = &device->queues[RX];
	size_t done = 0;
	scope_lock(&q->lock);

	while (done < n) {
		size_t part;

		if (!virtio_take(q, &c->rx)) {
			/* Said before the guest is asked to notify, so that its notification finds it. */
			c->wants_room = true;
			if (virtio_await(q))
				continue;
			return done;
		}
		part = virtq_chain_write(&q->ring, &c->rx, 0, bytes + done, n - done);
		virtio_complete(q, &c->rx, part);
		done += part;
	}
	return done;
}

void virtio_console_set_room(struct virtio_device *device, void (*room)(void *opaque), void *opaque)
{
	struct virtio_console *c = container_of(device, struct virtio_console, virtio);

	c->room_opaque = opaque;
	c->room = room;
}

/* ---- the device ---- */

static void notify(struct virtio_device *device, struct virtio_queue *queue)
{
	struct virtio_console *c = container_of(device, struct virtio_console, virtio);

	if (queue->index == TX)
		transmit(c);
	else if (atomic_exchange(&c->wants_room, false) && c->room)
		c->room(c->room_opaque);
}

static void reset(struct virtio_device *device)
{
	struct virtio_console *c = container_of(device, struct virtio_console, virtio);
	scope_lock(&device->queues[TX].lock);

	c->given = 0;
}

static void destroy(struct virtio_device *device)
{
	struct virtio_console *c = container_of(device, struct virtio_console, virtio);

	loop_timer_cancel(c->loop, &c->rest);
	virtio_release(device);
	free(c);
}

static const struct virtio_model model = {
	.name = "virtio-console",
	.id = 3,
	.pci_class = 0x078000, /* communication controller of another kind */
	.notify = notify,
	.reset = reset,
	.destroy = destroy,
};

int virtio_console_create(struct virtio_device **device, struct board *board, struct error *err)
{
	struct virtio_console *c = calloc(1, sizeof(*c));
	int ret;

	if (!c)
		return error_set(err, ENOMEM, "virtio-console: no memory");
	c->loop = board_loop(board);
	c->rest.function = transmit_rest;
	c->wants_room = true; /* input may wait before the guest has a driver */
	c->virtio.config_size = sizeof(struct console_config);
	ret = virtio_init(&c->virtio, &model, board_memory(board), QUEUES, QUEUE_SIZE, err);
	if (ret == 0)
		ret = virtio_pci_attach(&c->virtio, board, err);
	if (ret < 0) {
		destroy(&c->virtio);
		return ret;
	}
	*device = &c->virtio;
	return 0;
}
