/* What the back ends share: the head of each, and its functions. */
#pragma once

#include "net/net.h"

struct net_ops {
	void (*close)(struct net *net);
	void (*send)(struct net *net, const uint8_t *frame, size_t length);
	void (*room)(struct net *net); /* on the loop's thread */
	/* May be NULL: without headers; with one queue */
	void (*set_offloads)(struct net *net, struct net_offloads offloads);
	void (*use)(struct net *net, bool in_use); /* one queue */
};

struct net {
	const struct net_ops *ops;
	struct loop *loop;
	struct net_properties properties;
	net_receive_function *receive;
	void *opaque;
	struct loop_timer room;
	struct net *next_queue; /* owned by the one before */
};

/* options: what follows "user" or "tap=" in the specification. */
int net_user_open(struct net **net, const char *options, struct loop *loop, struct error *err);
int net_tap_check(const char *options, struct error *err);
int net_user_check(const char *options, struct error *err);
int net_tap_open(struct net **net, const char *options, struct loop *loop, struct error *err);

/* false: keep the frame until ops->room is called. */
static inline bool net_deliver(struct net *net, const uint8_t *frame, size_t length)
{
	return !net->receive || net->receive(net->opaque, frame, length);
}
