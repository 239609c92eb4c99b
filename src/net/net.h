/* A packet back end for a virtio-net device: user mode (libslirp) or tap. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/error.h"
#include "base/loop.h"

struct net;

/* What a device may offer its guest with this back end. */
struct net_properties {
	unsigned mtu;	      /* what the guest should use; 0: no opinion */
	bool large_frames;    /* TCP over IPv4 may come in frames of up to 64 KiB, not cut into segments */
	bool large_frames6;   /* likewise over IPv6 */
	bool checksums_valid; /* frames received have never left this process: their checksums need not be looked at */
};

/* A frame from the back end, without virtio header, on the loop's thread. false: the guest has no room; the back end
 * keeps the frame and offers it again after net_room(). */
typedef bool net_receive_function(void *opaque, const uint8_t *frame, size_t length);

/* spec: "user[,forward=tcp|udp:ADDR:PORT-[GUESTADDR]:PORT]...[,mtu=N]" or "tap=NAME"; the mac option has been taken out
 * by the caller. Runs on loop. Errors name the part that is wrong and the remedy. */
int net_open(struct net **net, const char *spec, struct loop *loop, struct error *err);
/* On the loop's thread, or when the loop no longer runs. NULL is allowed. */
void net_close(struct net *net);
/* NULL: frames are dropped. On the loop's thread, or when the loop does not run. */
void net_set_receiver(struct net *net, net_receive_function *receive, void *opaque);
/* A whole frame of up to NET_FRAME_MAX bytes from the guest, on the loop's thread, outermost checksums complete.
 * Dropped when the back end cannot take it. */
void net_send(struct net *net, const uint8_t *frame, size_t length);
/* The guest has room again for received frames; from any thread. */
void net_room(struct net *net);
const struct net_properties *net_properties(const struct net *net);

#define NET_FRAME_MIN 14		/* an Ethernet header */
#define NET_FRAME_MAX (14 + 4 + 65535u) /* with a VLAN tag and the largest IP packet */
