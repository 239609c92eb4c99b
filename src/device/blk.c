/* virtio-blk (virtio 1.2, section 5.2). Each queue has a worker thread, which makes the blocking disk calls straight
 * from and to guest memory; the vCPU that notifies only wakes it. A request is parsed as the specification frames it,
 * without assumptions about where its buffers begin: 16 bytes of header, data, and one status byte at the very end.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "base/cleanup.h"
#include "base/loop.h"
#include "base/threads.h"
#include "base/util.h"
#include "device/blk.h"
#include "device/virtio.h"
#include "disk/disk.h"
#include "machine/board.h"

#define SECTOR 512u
#define QUEUE_SIZE 256
#define SEGMENTS_MAX (QUEUE_SIZE - 2) /* beside header and status, so that it fits without indirect tables too */
#define ID_BYTES 20

/* What one request may ask of a worker that cannot be interrupted: Linux splits what is larger. */
#define DISCARD_SECTORS_MAX (1u << 21)	    /* 1 GiB in a segment */
#define WRITE_ZEROES_SECTORS_MAX (1u << 19) /* 256 MiB in a segment: zeroes may have to be written out */
#define RANGES_MAX 16			    /* segments */

enum { /* features, 5.2.3 */
	F_SEG_MAX = 2,
	F_RO = 5,
	F_BLK_SIZE = 6,
	F_FLUSH = 9,
	F_TOPOLOGY = 10,
	F_CONFIG_WCE = 11,
	F_MQ = 12,
	F_DISCARD = 13,
	F_WRITE_ZEROES = 14,
};

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 }; /* 5.2.6 */
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2 };

struct request_header {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

struct range { /* struct virtio_blk_discard_write_zeroes */
	uint64_t sector;
	uint32_t sectors;
	uint32_t flags;
};

#define RANGE_UNMAP 1

struct blk_config { /* struct virtio_blk_config, 5.2.4 */
	uint64_t capacity;
	uint32_t size_max;
	uint32_t seg_max;
	uint8_t geometry[4];
	uint32_t blk_size;
	uint8_t physical_block_exp;
	uint8_t alignment_offset;
	uint16_t min_io_size;
	uint32_t opt_io_size;
	uint8_t writeback;
	uint8_t unused0;
	uint16_t num_queues;
	uint32_t max_discard_sectors;
	uint32_t max_discard_seg;
	uint32_t discard_sector_alignment;
	uint32_t max_write_zeroes_sectors;
	uint32_t max_write_zeroes_seg;
	uint8_t write_zeroes_may_unmap;
	uint8_t unused1[3];
} __attribute__((packed));
_Static_assert(sizeof(struct blk_config) == 60, "layout of the specification");

struct blk;

struct worker {
	struct blk *blk;
	struct virtio_queue *queue;
	struct thread thread;
	bool started;
	pthread_mutex_t lock;
	pthread_cond_t wake;
	bool notified, leave, limits_changed;
	struct virtq_chain chain;	      /* the request at hand */
	struct iovec iov[VIRTQ_SEGMENTS_MAX]; /* its data */
};

struct blk {
	struct virtio_device virtio;
	struct disk *disk;
	char serial[ID_BYTES + 1];
	atomic_bool write_through; /* each write is flushed before it completes */
	struct rate_limit limit;
	struct worker *workers[VIRTIO_BLK_QUEUES_MAX];
};

enum { READS, READ_BYTES, WRITES, WRITTEN_BYTES, FLUSHES, DISCARDS, ZEROES, ERRORS, DELAYS };
static const char *const counter_names[] = {"reads", "read_bytes", "writes", "written_bytes", "flushes", "discards",
	"write_zeroes", "errors", "delays", NULL};

/* ---- requests ---- */

static uint8_t status_of(struct blk *blk, const char *what, uint64_t sector, int ret)
{
	if (ret == 0)
		return S_OK;
	virtio_log(&blk->virtio, "%s at sector %llu failed: %s", what, (unsigned long long)sector, strerror(-ret));
	return S_IOERR;
}

static bool in_disk(const struct blk *blk, uint64_t sector, uint64_t bytes)
{
	uint64_t sectors = disk_size(blk->disk) / SECTOR;

	return bytes % SECTOR == 0 && sector <= sectors && bytes / SECTOR <= sectors - sector;
}

static uint8_t flush(struct blk *blk)
{
	return status_of(blk, "flush", 0, disk_flush(blk->disk));
}

/* A completed change: stable already if the guest runs the disk as write-through (5.2.5.1, 5.2.6.2). */
static uint8_t changed(struct blk *blk, uint8_t status)
{
	return status == S_OK && blk->write_through ? flush(blk) : status;
}

static uint8_t do_read(struct worker *w, uint64_t sector, uint32_t *written)
{
	uint64_t bytes = w->chain.writable - 1;
	uint8_t status;
	int count;

	if (!in_disk(w->blk, sector, bytes))
		return S_IOERR;
	if (bytes == 0)
		return S_OK;
	count = virtq_chain_slice(&w->chain, true, 0, bytes, w->iov);
	status = status_of(w->blk, "read", sector, disk_readv(w->blk->disk, sector * SECTOR, w->iov, count));
	/* After an error too: some of it may have been written. */
	virtq_chain_wrote(&w->queue->ring, &w->chain, 0, bytes);
	*written = bytes;
	return status;
}

static uint8_t do_write(struct worker *w, uint64_t sector)
{
	uint64_t bytes = w->chain.readable - sizeof(struct request_header);
	int count;

	if (disk_read_only(w->blk->disk) || !in_disk(w->blk, sector, bytes))
		return S_IOERR;
	if (bytes == 0)
		return S_OK;
	count = virtq_chain_slice(&w->chain, false, sizeof(struct request_header), bytes, w->iov);
	return changed(
		w->blk, status_of(w->blk, "write", sector, disk_writev(w->blk->disk, sector * SECTOR, w->iov, count)));
}

static uint8_t do_range(struct blk *blk, uint32_t type, const struct range *r)
{
	uint64_t offset = r->sector * SECTOR, bytes = (uint64_t)r->sectors * SECTOR;
	bool zero = type == T_WRITE_ZEROES;

	/* Reserved flags, and unmap in a discard: 5.2.6.2 */
	if (r->flags & (zero ? ~(uint32_t)RANGE_UNMAP : ~0u))
		return S_UNSUPP;
	if (!in_disk(blk, r->sector, bytes) || r->sectors > (zero ? WRITE_ZEROES_SECTORS_MAX : DISCARD_SECTORS_MAX))
		return S_IOERR;
	if (bytes == 0)
		return S_OK;
	if (zero)
		return status_of(blk, "write zeroes", r->sector,
			disk_write_zeroes(blk->disk, offset, bytes, r->flags & RANGE_UNMAP));
	return status_of(blk, "discard", r->sector, disk_discard(blk->disk, offset, bytes));
}

static uint8_t do_ranges(struct worker *w, uint32_t type)
{
	struct range ranges[RANGES_MAX];
	uint64_t bytes = w->chain.readable - sizeof(struct request_header);
	uint8_t status = S_OK;

	if (disk_read_only(w->blk->disk) || bytes == 0 || bytes % sizeof(ranges[0]) || bytes > sizeof(ranges))
		return S_IOERR;
	virtq_chain_read(&w->chain, sizeof(struct request_header), ranges, bytes);
	for (unsigned i = 0; i < bytes / sizeof(ranges[0]) && status == S_OK; i++)
		status = do_range(w->blk, type, &ranges[i]);
	return changed(w->blk, status);
}

static uint8_t do_get_id(struct worker *w, uint32_t *written)
{
	/* 5.2.6.1: 20 bytes, ended by a zero only if shorter */
	*written = virtq_chain_write(
		&w->queue->ring, &w->chain, 0, w->blk->serial, min(w->chain.writable - 1, (uint64_t)ID_BYTES));
	return S_OK;
}

/* Counted, and charged against the limits: before it is done, so that the other workers already wait for it. */
static void account(struct worker *w, uint32_t type)
{
	struct blk *blk = w->blk;
	uint64_t bytes = 0;

	switch (type) {
	case T_IN:
		bytes = w->chain.writable - 1;
		virtio_count(&blk->virtio, READS, 1);
		virtio_count(&blk->virtio, READ_BYTES, bytes);
		break;
	case T_OUT:
		bytes = w->chain.readable - sizeof(struct request_header);
		virtio_count(&blk->virtio, WRITES, 1);
		virtio_count(&blk->virtio, WRITTEN_BYTES, bytes);
		break;
	case T_FLUSH:
		virtio_count(&blk->virtio, FLUSHES, 1);
		break;
	case T_DISCARD:
		virtio_count(&blk->virtio, DISCARDS, 1);
		break;
	case T_WRITE_ZEROES:
		virtio_count(&blk->virtio, ZEROES, 1);
		break;
	}
	rate_limit_spend(&blk->limit, bytes);
}

/* false: the guest did not send a request. */
static bool handle(struct worker *w)
{
	struct virtq_chain *c = &w->chain;
	struct request_header h;
	uint32_t written = 0;
	uint8_t status;

	if (virtq_chain_read(c, 0, &h, sizeof(h)) < sizeof(h) || c->writable < 1)
		return false;
	account(w, h.type);
	switch (h.type) {
	case T_IN:
		status = do_read(w, h.sector, &written);
		break;
	case T_OUT:
		status = do_write(w, h.sector);
		break;
	case T_FLUSH:
		status = flush(w->blk);
		break;
	case T_GET_ID:
		status = do_get_id(w, &written);
		break;
	case T_DISCARD:
	case T_WRITE_ZEROES:
		status = do_ranges(w, h.type);
		break;
	default:
		status = S_UNSUPP;
	}
	if (status != S_OK)
		virtio_count(&w->blk->virtio, ERRORS, 1);
	virtq_chain_write(&w->queue->ring, c, c->writable - 1, &status, 1);
	/* The length counts from the start without gaps (2.7.8.2), so the status byte only where data fills what is
	 * before. */
	virtio_complete(w->queue, c, written == c->writable - 1 ? written + 1 : written);
	return true;
}

/* Waits until the limits let a request begin; no queue's lock is held, so that a pause or reset finds nothing in flight.
 * false: the worker is to end. */
static bool within_limits(struct worker *w)
{
	uint64_t wait, until;

	while ((wait = rate_limit_wait(&w->blk->limit, clock_now()))) {
		scope_lock(&w->lock);
		virtio_count(&w->blk->virtio, DELAYS, 1);
		until = clock_now() + wait;
		while (!w->leave && !w->limits_changed) {
			const struct timespec at = {
				.tv_sec = (time_t)(until / 1000000000), .tv_nsec = (long)(until % 1000000000)};

			if (pthread_cond_timedwait(&w->wake, &w->lock, &at) == ETIMEDOUT)
				break;
		}
		w->limits_changed = false;
		if (w->leave)
			return false;
	}
	return true;
}

/* Everything the queue holds. */
static void serve(struct worker *w)
{
	struct virtio_queue *q = w->queue;

	do {
		bool more = true;

		while (more) {
			if (!within_limits(w))
				return;
			/* Let go after each request: a reset or pause gets in between. */
			scope_lock(&q->lock);
			if (q->running)
				virtq_notify_off(&q->ring);
			more = virtio_take(q, &w->chain);
			if (more && !handle(w)) {
				virtio_broken(
					&w->blk->virtio, q, "a request without a header of 16 bytes or a status byte");
				more = false;
			}
		}
		scope_lock(&q->lock);
		if (!virtio_await(q))
			return;
	} while (true);
}

void virtio_blk_serve(struct virtio_device *device, unsigned queue)
{
	serve(container_of(device, struct blk, virtio)->workers[queue]);
}

/* ---- workers ---- */

/* False: the worker is to end. */
static bool await_notification(struct worker *w)
{
	eventfd_t count;

	if (w->queue->bell >= 0)
		eventfd_read(w->queue->bell, &count);
	scope_lock(&w->lock);
	while (w->queue->bell < 0 && !w->notified && !w->leave)
		pthread_cond_wait(&w->wake, &w->lock);
	w->notified = false;
	return !w->leave;
}

static void *worker_main(void *opaque)
{
	struct worker *w = opaque;

	while (await_notification(w))
		serve(w);
	return NULL;
}

static void worker_wake(struct worker *w, bool leave)
{
	scope_lock(&w->lock);
	w->leave |= leave;
	w->notified = true;
	pthread_cond_signal(&w->wake);
	if (w->queue->bell >= 0)
		eventfd_write(w->queue->bell, 1);
}

void virtio_blk_limit(struct virtio_device *device, const struct rate_limits *limits)
{
	struct blk *blk = container_of(device, struct blk, virtio);

	rate_limit_set(&blk->limit, limits, clock_now());
	for (unsigned i = 0; i < VIRTIO_BLK_QUEUES_MAX; i++) {
		struct worker *w = blk->workers[i];

		if (!w)
			continue;
		scope_lock(&w->lock);
		w->limits_changed = true;
		pthread_cond_signal(&w->wake);
	}
}

static void notify(struct virtio_device *device, struct virtio_queue *queue)
{
	worker_wake(container_of(device, struct blk, virtio)->workers[queue->index], false);
}

static int worker_start(struct blk *blk, unsigned i, struct threads *threads, struct error *err)
{
	struct worker *w = calloc(1, sizeof(*w));
	pthread_condattr_t attributes;
	char name[16];

	if (!w)
		return error_set(err, ENOMEM, "virtio-blk: no memory for a worker");
	blk->workers[i] = w;
	w->blk = blk;
	w->queue = &blk->virtio.queues[i];
	pthread_mutex_init(&w->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC); /* as clock_now() */
	pthread_cond_init(&w->wake, &attributes);
	pthread_condattr_destroy(&attributes);
	snprintf(name, sizeof(name), "blk queue %u", i);
	if (thread_start(&w->thread, threads, THREAD_WORKER, name, worker_main, w, err) < 0)
		return error_wrap(err, "virtio-blk");
	w->started = true;
	return 0;
}

static void worker_end(struct worker *w)
{
	if (!w)
		return;
	if (w->started) {
		worker_wake(w, true);
		thread_join(&w->thread);
	}
	pthread_cond_destroy(&w->wake);
	pthread_mutex_destroy(&w->lock);
	free(w);
}

/* ---- the device ---- */

static void apply_write_cache(struct blk *blk)
{
	struct blk_config *config = (struct blk_config *)blk->virtio.config;

	/* 5.2.5.1: the field rules if it was negotiated; else a driver that knows flushes gets a write-back cache. */
	if (virtio_has(&blk->virtio, F_CONFIG_WCE))
		blk->write_through = !config->writeback;
	else
		blk->write_through = !virtio_has(&blk->virtio, F_FLUSH);
}

static void config_write(struct virtio_device *device, unsigned offset, unsigned size, uint32_t value)
{
	struct blk *blk = container_of(device, struct blk, virtio);
	struct blk_config *config = (struct blk_config *)device->config;

	if (offset != offsetof(struct blk_config, writeback) || size != 1 || value > 1)
		return;
	config->writeback = value;
	apply_write_cache(blk);
}

static void started(struct virtio_device *device)
{
	apply_write_cache(container_of(device, struct blk, virtio));
}

static void destroy(struct virtio_device *device)
{
	struct blk *blk = container_of(device, struct blk, virtio);

	for (unsigned i = 0; i < VIRTIO_BLK_QUEUES_MAX; i++)
		worker_end(blk->workers[i]);
	virtio_release(device);
	rate_limit_destroy(&blk->limit);
	free(blk);
}

static const struct virtio_model model = {
	.name = "virtio-blk",
	.id = 2,
	.pci_class = 0x010000, /* SCSI storage controller, as other implementations say */
	.notify = notify,
	.reads_bells = true,
	.config_write = config_write,
	.started = started,
	.counters = counter_names,
	.destroy = destroy,
};

static void describe(struct blk *blk, unsigned queues)
{
	struct virtio_device *d = &blk->virtio;
	struct blk_config config = {
		.capacity = disk_size(blk->disk) / SECTOR,
		.seg_max = SEGMENTS_MAX,
		.blk_size = SECTOR,
		.physical_block_exp = 3, /* 4096 bytes: guests align to it, and so do host file systems */
		.opt_io_size = 0,
		.writeback = 1,
		.num_queues = queues,
		.max_discard_sectors = DISCARD_SECTORS_MAX,
		.max_discard_seg = RANGES_MAX,
		.discard_sector_alignment = 8,
		.max_write_zeroes_sectors = WRITE_ZEROES_SECTORS_MAX,
		.max_write_zeroes_seg = RANGES_MAX,
		.write_zeroes_may_unmap = 1,
	};

	memcpy(d->config, &config, sizeof(config));
	d->config_size = sizeof(config);
	d->offered |= 1 << F_SEG_MAX | 1 << F_BLK_SIZE | 1 << F_FLUSH | 1 << F_TOPOLOGY | 1 << F_CONFIG_WCE | 1 << F_MQ;
	d->offered |= disk_read_only(blk->disk) ? 1 << F_RO : 1 << F_DISCARD | 1 << F_WRITE_ZEROES;
}

int virtio_blk_create(struct virtio_device **device, struct board *board, struct disk *disk,
	const struct virtio_blk_options *options, struct error *err)
{
	unsigned queues = options->queues ? min(options->queues, (unsigned)VIRTIO_BLK_QUEUES_MAX) : 1;
	struct blk *blk = calloc(1, sizeof(*blk));
	int ret;

	if (!blk)
		return error_set(err, ENOMEM, "virtio-blk: no memory");
	blk->disk = disk;
	rate_limit_init(&blk->limit);
	snprintf(blk->serial, sizeof(blk->serial), "%s", options->serial ? options->serial : "");
	ret = virtio_init(&blk->virtio, &model, board_memory(board), queues, QUEUE_SIZE, err);
	if (ret == 0)
		ret = virtio_make_bells(&blk->virtio, board, err);
	if (ret == 0)
		describe(blk, queues);
	for (unsigned i = 0; i < queues && ret == 0; i++)
		ret = worker_start(blk, i, options->threads, err);
	if (ret == 0)
		ret = virtio_pci_attach(&blk->virtio, board, err);
	if (ret < 0) {
		destroy(&blk->virtio);
		return ret;
	}
	*device = &blk->virtio;
	return 0;
}
