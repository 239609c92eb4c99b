/* The devices that can be put on a board. A constructor puts its device on the board's PCI bus; the back end (disk,
 * net) stays the caller's and must outlive the device. */
#pragma once

#include <stdint.h>

#include "base/error.h"

struct board;
struct disk;
struct net;
struct virtio_device;

#define VIRTIO_BLK_QUEUES_MAX 8

struct virtio_blk_options {
	unsigned queues;    /* 1 to VIRTIO_BLK_QUEUES_MAX, as many as vCPUs at best; 0: one */
	const char *serial; /* at most 20 characters ("hostel-disk-0"), seen in the guest's /dev/disk/by-id; or NULL */
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

/* Takes the device off the bus when what it was doing is done. Called on the loop's thread, or when the loop no longer
 * runs; the vCPUs are stopped. NULL is allowed. */
void virtio_device_destroy(struct virtio_device *device);

/* Pause: when quiesce returns no request is in flight, nothing is written to guest memory or to the back end, and
 * nothing starts until resume, which takes up what the guest has asked for meanwhile. Any thread but a device's own. */
void virtio_device_quiesce(struct virtio_device *device);
void virtio_device_resume(struct virtio_device *device);
