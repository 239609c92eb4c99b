/* User mode's options, between user.c and user_options.c. */
#pragma once

#include <netinet/in.h>
#include <slirp/libslirp.h>

#include "net/net_internal.h"

#define USER_FORWARDS_MAX 64

struct user_forward {
	bool udp;
	struct in_addr host, guest; /* guest 0.0.0.0: the one that has the DHCP address */
	uint16_t host_port, guest_port;
};

struct user_options {
	unsigned mtu;
	unsigned forwards;
	struct user_forward forward[USER_FORWARDS_MAX];
};

/* options: "" or ",KEY=VALUE...". What is not mentioned keeps the value it has in o. */
int user_parse(struct user_options *o, const char *options, struct error *err);
int user_forward(Slirp *slirp, const struct user_forward *forward, struct error *err);
