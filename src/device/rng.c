/* virtio-rng (virtio 1.2, section 5.4): entropy from getrandom(2). One queue; each chain gets at most a chunk, which a
 * driver that wants more asks for again. Short enough to be done on the vCPU's thread.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/cleanup.h"
#include "base/loop.h"
#include "base/util.h"
#include "device/virtio.h"
#include "machine/board.h"

#define QUEUE_SIZE 16
#define CHUNK 4096
#define CHAINS_A_TURN 32 /* then the loop goes on: a guest that keeps the queue full holds up no vCPU's pause */

struct rng {
	struct virtio_device virtio;
	struct loop *loop;
	struct loop_timer rest;
	struct virtq_chain chain;
};

static void fill(struct rng *rng, struct virtio_queue *q)
{
	uint8_t bytes[CHUNK];
	size_t length = min(rng->chain.writable, (uint64_t)CHUNK);
	ssize_t got = length ? getrandom(bytes, length, 0) : 0;

	if (got < 0) /* cannot fail for up to 256 bytes once the host has booted; signals may cut longer ones short */
		got = getrandom(bytes, min(length, (size_t)256), 0);
	if (got < 0)
		got = 0;
	virtq_chain_write(&q->ring, &rng->chain, 0, bytes, got);
	virtio_complete(q, &rng->chain, got);
}

static void serve(struct rng *rng)
{
	struct virtio_queue *q = &rng->virtio.queues[0];

	scope_lock(&q->lock);
	for (unsigned i = 0; i < CHAINS_A_TURN; i++) {
		if (virtio_take(q, &rng->chain))
			fill(rng, q);
		else if (!virtio_await(q))
			return;
	}
	loop_timer_set(rng->loop, &rng->rest, clock_now());
}

static void serve_rest(struct loop_timer *timer)
{
	serve(container_of(timer, struct rng, rest));
}

static void notify(struct virtio_device *device, struct virtio_queue *queue)
{
	serve(container_of(device, struct rng, virtio));
}

static void destroy(struct virtio_device *device)
{
	struct rng *rng = container_of(device, struct rng, virtio);

	loop_timer_cancel(rng->loop, &rng->rest);
	virtio_release(device);
	free(rng);
}

static const struct virtio_model model = {
	.name = "virtio-rng",
	.id = 4,
	.pci_class = 0x00ff00, /* no class fits */
	.notify = notify,
	.destroy = destroy,
};

int virtio_rng_create(struct virtio_device **device, struct board *board, struct error *err)
{
	struct rng *rng = calloc(1, sizeof(*rng));
	int ret;

	if (!rng)
		return error_set(err, ENOMEM, "virtio-rng: no memory");
	rng->loop = board_loop(board);
	rng->rest.function = serve_rest;
	ret = virtio_init(&rng->virtio, &model, board_memory(board), 1, QUEUE_SIZE, err);
	if (ret == 0)
		ret = virtio_pci_attach(&rng->virtio, board, err);
	if (ret < 0) {
		destroy(&rng->virtio);
		return ret;
	}
	*device = &rng->virtio;
	return 0;
}
