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
	/* Frames begin with a struct net_header, in both directions: checksums may be left to the other side, and TCP
	 * frames of up to 64 KiB need not be cut into segments, as net_set_offloads() allows for received ones. */
	bool headers;
};

/* struct virtio_net_hdr (virtio 1.2, 5.1.6), which taps use too; with num_buffers always, as VERSION_1 says. */
struct net_header {
	uint8_t flags;
	uint8_t gso_type;
	uint16_t hdr_len;
	uint16_t gso_size;
	uint16_t csum_start;
	uint16_t csum_offset;
	uint16_t num_buffers;
} __attribute__((packed));

#define NET_QUEUES_MAX 8

/* A frame from the back end, on the loop's thread. false: the guest has no room; the back end
 * keeps the frame and offers it again after net_room(). */
typedef bool net_receive_function(void *opaque, const uint8_t *frame, size_t length);

/* spec: "user[,forward=tcp|udp:ADDR:PORT-[GUESTADDR]:PORT]...[,mtu=N]" or "tap=NAME[,queues=N]"; the mac option has been
 * taken out by the caller. Runs on loop. Errors name the part that is wrong and the remedy. */
/* 0 when spec is well formed, whatever the host says to it later. */
int net_check(const char *spec, struct error *err);
int net_open(struct net **net, const char *spec, struct loop *loop, struct error *err);
/* On the loop's thread, or when the loop no longer runs. NULL is allowed. */
void net_close(struct net *net);
/* NULL: frames are dropped. On the loop's thread, or when the loop does not run. */
void net_set_receiver(struct net *net, net_receive_function *receive, void *opaque);
/* A whole frame of up to NET_FRAME_MAX bytes from the guest, on the loop's thread, outermost checksums complete unless
 * its header says otherwise. Dropped when the back end cannot take it. */
void net_send(struct net *net, const uint8_t *frame, size_t length);
/* The guest has room again for received frames; from any thread. */
void net_room(struct net *net);
const struct net_properties *net_properties(const struct net *net);

/* A back end with several queues is several nets, each with its receiver; the first, which net_open() gave and
 * net_close() takes, is queue 0. Only queue 0 is in use until net_use_queues(). On the loop's thread, or when the loop
 * does not run. */
unsigned net_queues(const struct net *net);
struct net *net_queue(struct net *net, unsigned index);
void net_use_queues(struct net *net, unsigned queues);

/* With properties.headers: what the guest takes. Frames received later are cut and summed up as far as it does not. */
struct net_offloads {
	bool checksum, tso4, tso6; /* the latter two only with the first */
};
void net_set_offloads(struct net *net, struct net_offloads offloads);

#define NET_FRAME_MIN 14		/* an Ethernet header */
#define NET_FRAME_MAX (14 + 4 + 65535u) /* with a VLAN tag and the largest IP packet; without a header */
