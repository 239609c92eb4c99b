/* A packet back end for a virtio-net device: user mode (libslirp) or tap. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/error.h"
#include "base/loop.h"

struct net;

/* A frame from the back end, without virtio header, on the loop's thread. false: the guest has no room; the back end
 * keeps the frame and offers it again after net_room(). */
typedef bool net_receive_function(void *opaque, const uint8_t *frame, size_t length);

/* spec: "user[,forward=tcp:ADDR:PORT-:PORT]..." or "tap=NAME"; the mac option has been taken out by the caller. Runs on
 * loop. Errors name the part that is wrong and the remedy. */
int net_open(struct net **net, const char *spec, struct loop *loop, struct error *err);
void net_close(struct net *net);
void net_set_receiver(struct net *net, net_receive_function *receive, void *opaque);
/* A frame from the guest, from any thread. Dropped when the back end cannot take it. */
void net_send(struct net *net, const struct iovec *iov, int count);
/* The guest has room again for received frames; from any thread. */
void net_room(struct net *net);
