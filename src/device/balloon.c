/* virtio-balloon (virtio 1.2, section 5.5): pages that the guest gives up (inflate), takes back (deflate), or reports as
 * free go back to the host by a hole in the memory's file. All of it runs on the loop's thread, some requests a turn:
 * the kernel's work per hole is what costs.
 */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/loop.h"
#include "base/util.h"
#include "device/virtio.h"
#include "machine/board.h"

#define QUEUE_SIZE 128
#define CHAINS_A_TURN 8 /* then the loop sees to its timers */
#define PAGE_SHIFT 12	/* of the balloon, whatever the guest's pages are (5.5.6) */
#define FRAMES_A_PIECE 512
#define REFRESH_LEAST 100000000ull /* ns between two questions for statistics */

/* The queues that exist depend on features (5.5.2). The specification counts the queue for hints even where hints are
 * not offered; Linux and others do not: reports are taken from both places. */
enum { INFLATE, DEFLATE, STATISTICS, REPORTS, REPORTS_BY_THE_BOOK, QUEUES };

enum { F_STATS = 1, F_DEFLATE_ON_OOM = 2, F_REPORTING = 5 }; /* 5.5.3 */

struct balloon_config { /* struct virtio_balloon_config, 5.5.4, without what is not offered */
	uint32_t num_pages;
	uint32_t actual;
} __attribute__((packed));

struct statistic { /* struct virtio_balloon_stat, 5.5.6.3 */
	uint16_t tag;
	uint64_t value;
} __attribute__((packed));

struct balloon {
	struct virtio_device virtio;
	struct loop *loop;
	struct loop_timer turn;
	struct virtq_chain chain; /* the loop's thread's */
	_Atomic uint64_t reported;

	/* under the statistics queue's lock */
	bool holds;	     /* the guest's buffer, which it gets back when new statistics are wanted */
	uint16_t held_head;
	uint64_t asked_at, told_at;
	uint64_t statistics[BALLOON_STATISTICS];
};

/* ---- pages ---- */

static uint64_t memory_pages(const struct balloon *b)
{
	return b->virtio.memory->size >> PAGE_SHIFT;
}

static void discard(struct balloon *b, uint64_t gpa, uint64_t bytes)
{
	int ret = memory_discard(b->virtio.memory, gpa, bytes);

	if (ret < 0)
		virtio_log(&b->virtio, "%llu bytes at 0x%llx are not returned to the host: %s", (unsigned long long)bytes,
			(unsigned long long)gpa, ret == -EFAULT ? "not guest memory" : strerror(-ret));
}

static int compare_frames(const void *a, const void *b)
{
	const uint32_t *x = a, *y = b;

	return *x < *y ? -1 : *x > *y;
}

/* Page frame numbers: neighbours in one hole, in whatever order the guest has found them. */
static void discard_frames(struct balloon *b, uint32_t *frames, unsigned count)
{
	unsigned run;

	qsort(frames, count, sizeof(*frames), compare_frames);
	for (unsigned i = 0; i < count; i += run) {
		/* The same page twice is odd and does no harm. */
		for (run = 1; i + run < count && frames[i + run] - frames[i + run - 1] <= 1; run++)
			;
		discard(b, (uint64_t)frames[i] << PAGE_SHIFT,
			(uint64_t)(frames[i + run - 1] - frames[i] + 1) << PAGE_SHIFT);
	}
}

static bool inflate(struct balloon *b, struct virtio_queue *q)
{
	uint32_t frames[FRAMES_A_PIECE];
	uint64_t offset = 0;
	size_t n;

	if (b->chain.readable / sizeof(frames[0]) > memory_pages(b)) {
		virtio_broken(&b->virtio, q, "more pages in one request than the guest has");
		return false;
	}
	while ((n = virtq_chain_read(&b->chain, offset, frames, sizeof(frames))) >= sizeof(frames[0])) {
		discard_frames(b, frames, n / sizeof(frames[0]));
		offset += n;
	}
	return true;
}

/* 5.5.6.7: the buffers are the free pages themselves, which the guest leaves alone until it gets them back. */
static bool reported(struct balloon *b, struct virtio_queue *q)
{
	if (b->chain.writable > b->virtio.memory->size) {
		virtio_broken(&b->virtio, q, "more free pages in one report than the guest has");
		return false;
	}
	for (unsigned i = 0; i < b->chain.writable_count; i++) {
		unsigned at = b->chain.readable_count + i;

		discard(b, b->chain.gpa[at], b->chain.iov[at].iov_len);
		b->reported += b->chain.iov[at].iov_len;
	}
	return true;
}

/* ---- statistics ---- */

static void give_back(struct balloon *b, struct virtio_queue *q)
{
	virtq_put(&q->ring, b->held_head, 0);
	virtio_publish(q);
	b->holds = false;
}

/* The queue's lock is held; q->running was seen. */
static void take_statistics(struct balloon *b, struct virtio_queue *q)
{
	struct statistic s;

	/* A second buffer: the first one is no longer needed. */
	if (b->holds)
		give_back(b, q);
	b->holds = true;
	b->held_head = b->chain.head;
	/* 5.5.6.3.2: in any order, some perhaps unknown to us. What is repeated counts the last time. */
	for (uint64_t i = 0; i < 4 * BALLOON_STATISTICS; i++) {
		if (virtq_chain_read(&b->chain, i * sizeof(s), &s, sizeof(s)) < sizeof(s))
			break;
		if (s.tag < BALLOON_STATISTICS)
			b->statistics[s.tag] = s.value;
	}
	b->told_at = clock_now();
}

/* The guest gets its buffer back, and fills it anew. */
static void ask_for_statistics(struct balloon *b)
{
	struct virtio_queue *q = &b->virtio.queues[STATISTICS];
	scope_lock(&q->lock);

	if (!b->holds || !q->running || clock_now() - b->asked_at < REFRESH_LEAST)
		return;
	b->asked_at = clock_now();
	give_back(b, q);
}

/* ---- queues ---- */

static bool handle(struct balloon *b, struct virtio_queue *q)
{
	switch (q->index) {
	case INFLATE:
		if (!inflate(b, q))
			return false;
		break;
	case STATISTICS:
		take_statistics(b, q);
		return true; /* and the chain is kept */
	case REPORTS:
	case REPORTS_BY_THE_BOOK:
		if (!reported(b, q))
			return false;
		break;
	}
	/* DEFLATE: the guest may use its pages again without being told so, and finds zeroes (5.5.6.1). */
	virtio_complete(q, &b->chain, 0);
	return true;
}

/* true: there may be more. */
static bool serve(struct balloon *b, struct virtio_queue *q)
{
	scope_lock(&q->lock);

	for (unsigned i = 0; i < CHAINS_A_TURN; i++) {
		if (virtio_take(q, &b->chain)) {
			if (!handle(b, q))
				return false;
		} else if (!virtio_await(q)) {
			return false;
		}
	}
	return true;
}

static void turn(struct loop_timer *timer)
{
	struct balloon *b = container_of(timer, struct balloon, turn);
	bool more = false;

	for (unsigned i = 0; i < QUEUES; i++)
		more |= serve(b, &b->virtio.queues[i]);
	if (more)
		loop_timer_set(b->loop, &b->turn, clock_now());
}

static void notify(struct virtio_device *device, struct virtio_queue *queue)
{
	struct balloon *b = container_of(device, struct balloon, virtio);

	loop_timer_set(b->loop, &b->turn, clock_now());
}

/* ---- the device ---- */

static void config_write(struct virtio_device *device, unsigned offset, unsigned size, uint32_t value)
{
	struct balloon_config *config = (struct balloon_config *)device->config;

	if (offset == offsetof(struct balloon_config, actual) && size == 4)
		config->actual = value;
}

static void reset(struct virtio_device *device)
{
	struct balloon *b = container_of(device, struct balloon, virtio);
	struct balloon_config *config = (struct balloon_config *)device->config;
	struct virtio_queue *q = &device->queues[STATISTICS];
	scope_lock(&q->lock);

	/* A new driver begins with no page given up; the target stays. */
	config->actual = 0;
	b->holds = false;
	b->told_at = b->asked_at = 0;
	for (unsigned i = 0; i < BALLOON_STATISTICS; i++)
		b->statistics[i] = BALLOON_UNKNOWN;
}

static void destroy(struct virtio_device *device)
{
	struct balloon *b = container_of(device, struct balloon, virtio);

	loop_timer_cancel(b->loop, &b->turn);
	virtio_release(device);
	free(b);
}

static const struct virtio_model model = {
	.name = "virtio-balloon",
	.id = 5,
	.pci_class = 0x00ff00, /* no class fits */
	.notify = notify,
	.config_write = config_write,
	.reset = reset,
	.destroy = destroy,
};

void virtio_balloon_set_target(struct virtio_device *device, uint64_t bytes)
{
	struct balloon *b = container_of(device, struct balloon, virtio);
	uint32_t pages = min(bytes >> PAGE_SHIFT, memory_pages(b));

	virtio_config_change(device, offsetof(struct balloon_config, num_pages), &pages, sizeof(pages));
}

void virtio_balloon_get(struct virtio_device *device, struct virtio_balloon_state *state)
{
	struct balloon *b = container_of(device, struct balloon, virtio);
	struct virtio_queue *q = &device->queues[STATISTICS];

	{
		scope_lock(&device->lock);
		const struct balloon_config *config = (const struct balloon_config *)device->config;

		state->target = (uint64_t)config->num_pages << PAGE_SHIFT;
		state->actual = (uint64_t)config->actual << PAGE_SHIFT;
	}
	state->reported = b->reported;
	{
		scope_lock(&q->lock);
		state->told_at = b->told_at;
		memcpy(state->statistics, b->statistics, sizeof(state->statistics));
	}
	ask_for_statistics(b);
}

int virtio_balloon_create(struct virtio_device **device, struct board *board,
	const struct virtio_balloon_options *options, struct error *err)
{
	struct balloon *b = calloc(1, sizeof(*b));
	struct balloon_config config = {0};
	int ret;

	if (!b)
		return error_set(err, ENOMEM, "virtio-balloon: no memory");
	b->loop = board_loop(board);
	b->turn.function = turn;
	for (unsigned i = 0; i < BALLOON_STATISTICS; i++)
		b->statistics[i] = BALLOON_UNKNOWN;
	b->virtio.offered = 1 << F_STATS | 1 << F_DEFLATE_ON_OOM | 1 << F_REPORTING;
	ret = virtio_init(&b->virtio, &model, board_memory(board), QUEUES, QUEUE_SIZE, err);
	if (ret == 0) {
		config.num_pages = min(options->target >> PAGE_SHIFT, memory_pages(b));
		memcpy(b->virtio.config, &config, sizeof(config));
		b->virtio.config_size = sizeof(config);
		ret = virtio_pci_attach(&b->virtio, board, err);
	}
	if (ret < 0) {
		destroy(&b->virtio);
		return ret;
	}
	*device = &b->virtio;
	return 0;
}
