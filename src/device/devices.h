/* The devices that can be put on a board. A constructor puts its device on the board's PCI bus; the back end (disk,
 * net) stays the caller's and must outlive the device. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/token_bucket.h"

struct board;
struct disk;
struct net;
struct threads;
struct virtio_device;

#define VIRTIO_BLK_QUEUES_MAX 8

struct virtio_blk_options {
	unsigned queues;    /* 1 to VIRTIO_BLK_QUEUES_MAX, as many as vCPUs at best; 0: one */
	const char *serial; /* at most 20 characters ("hostel-disk-0"), seen in the guest's /dev/disk/by-id; or NULL */
	struct threads *threads; /* what its workers are started by (base/threads.h); or NULL */
};

struct virtio_net_options {
	uint8_t mac[6]; /* all zero: a random, locally administered one */
};

int virtio_blk_create(struct virtio_device **device, struct board *board, struct disk *disk,
	const struct virtio_blk_options *options, struct error *err);
/* The net's loop must be the board's. */
int virtio_net_create(struct virtio_device **device, struct board *board, struct net *net,
	const struct virtio_net_options *options, struct error *err);
int virtio_rng_create(struct virtio_device **device, struct board *board, struct error *err);

/* ---- balloon: memory that the guest gives back ---- */

struct virtio_balloon_options {
	uint64_t target; /* bytes that the guest is asked to give up from the start */
};

/* As the guest's kernel tells them (virtio 1.2, 5.5.6.3); in bytes where they are sizes */
enum virtio_balloon_statistic {
	BALLOON_SWAP_IN,
	BALLOON_SWAP_OUT,
	BALLOON_MAJOR_FAULTS,
	BALLOON_MINOR_FAULTS,
	BALLOON_FREE,
	BALLOON_TOTAL,
	BALLOON_AVAILABLE,
	BALLOON_CACHES,
	BALLOON_HUGETLB_ALLOCATIONS,
	BALLOON_HUGETLB_FAILURES,
	BALLOON_STATISTICS
};
#define BALLOON_UNKNOWN UINT64_MAX /* the guest has not told this one */

struct virtio_balloon_state {
	uint64_t target, actual; /* bytes wanted, and given up by the guest so far */
	uint64_t reported;	 /* bytes of free pages returned to the host on the guest's reports, all together */
	uint64_t told_at;	 /* clock_now() when the statistics came; 0: none yet */
	uint64_t statistics[BALLOON_STATISTICS];
};

/* Free pages that the guest reports go back to the host at once; the guest takes pages back by itself when it runs out
 * of memory. */
int virtio_balloon_create(struct virtio_device **device, struct board *board,
	const struct virtio_balloon_options *options, struct error *err);
/* At most the guest's memory. From any thread. */
void virtio_balloon_set_target(struct virtio_device *device, uint64_t bytes);
/* What is known now; also asks the guest for new statistics, which a later call gives. From any thread, never waits for
 * the guest. */
void virtio_balloon_get(struct virtio_device *device, struct virtio_balloon_state *state);

/* ---- vsock: streams between host and guest, by Unix sockets on the host ---- */

struct virtio_vsock_options {
	uint32_t cid; /* the guest's address, 3 to 0xfffffffe */
	/* A listening Unix socket that does not block, and the path it listens at, which stay the caller's. A client
	 * writes "CONNECT PORT\n" and, when a program in the guest has taken the connection, reads "OK NUMBER\n"; what
	 * follows is the stream. What the guest connects to port N of the host (CID 2) goes to the socket PATH_N. */
	int listener;
	const char *path;
};

int virtio_vsock_create(struct virtio_device **device, struct board *board, const struct virtio_vsock_options *options,
	struct error *err);

/* ---- console: the guest's /dev/hvc0 ---- */

int virtio_console_create(struct virtio_device **device, struct board *board, struct error *err);
/* Where the guest's output goes: says how many bytes it took and does not block. What it did not take waits in the guest's
 * memory until virtio_console_flush(). On vCPU threads and the loop's, by one at a time. */
typedef size_t virtio_console_output(void *opaque, const uint8_t *bytes, size_t n);
void virtio_console_set_output(struct virtio_device *device, virtio_console_output *output, void *opaque);
void virtio_console_flush(struct virtio_device *device);
/* Offers input; returns how many bytes the guest had room for. room() is called, on a vCPU's thread, when there may be
 * more; it is set before the guest runs. */
size_t virtio_console_input(struct virtio_device *device, const uint8_t *bytes, size_t n);
void virtio_console_set_room(struct virtio_device *device, void (*room)(void *opaque), void *opaque);

/* Takes the device off the bus when what it was doing is done. Called on the loop's thread, or when the loop no longer
 * runs; the vCPUs are stopped. NULL is allowed. */
void virtio_device_destroy(struct virtio_device *device);

/* Pause: when quiesce returns no request is in flight, nothing is written to guest memory or to the back end, and
 * nothing starts until resume, which takes up what the guest has asked for meanwhile. Any thread but a device's own. */
void virtio_device_quiesce(struct virtio_device *device);
void virtio_device_resume(struct virtio_device *device);
/* As quiesce, but never waits: false while something is still in flight; ask again. The device is on its way to the
 * pause either way, until resume. */
bool virtio_device_try_quiesce(struct virtio_device *device);

/* The PCI slot it is in. */
unsigned virtio_device_slot(const struct virtio_device *device);
const char *virtio_device_type(const struct virtio_device *device); /* "virtio-blk" */

/* What the device has counted since it was made. */
struct virtio_counter {
	const char *name;
	uint64_t value;
};
#define VIRTIO_COUNTERS_MAX 12
/* Fills `counters` (room for VIRTIO_COUNTERS_MAX) and returns how many there are. Any thread. */
unsigned virtio_device_counters(const struct virtio_device *device, struct virtio_counter *counters);

/* Rate limits; none at the start. Any thread, also while requests are under way: those that wait take up the new rate
 * at once. A request that is too much waits, it does not fail. */
void virtio_blk_limit(struct virtio_device *device, const struct rate_limits *limits);
/* Frames sent by the guest, or those it receives. */
void virtio_net_limit(struct virtio_device *device, bool received, const struct rate_limits *limits);
