/* virtio-blk's inside, for tests and fuzzers only. */
#pragma once

struct virtio_device;

/* Does on the caller's thread what the queue's worker does when it is woken. */
void virtio_blk_serve(struct virtio_device *device, unsigned queue);
