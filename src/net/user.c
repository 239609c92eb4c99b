/* User mode: a network of its own behind this process's sockets, by libslirp. The guest is 10.0.2.15 (by DHCP), the
 * gateway and this host 10.0.2.2, a name server 10.0.2.3; fec0::/64 with router advertisements for IPv6.
 *
 * libslirp wants to be called around a poll(2): "fill" names the descriptors and the time-out, "poll" is told what
 * happened. Here both happen in one turn of the loop, made when a descriptor has an event, a time-out is over or the
 * guest has sent something; between turns epoll watches what the last fill named.
 */
#include <poll.h>
#include <signal.h>
#include <slirp/libslirp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "net/user.h"

/* Large, since no frame crosses a wire: what the guest's stack does once for 64 KiB it would do 45 times for 1500. */
#define MTU_DEFAULT 65520
#define BACKLOG_MAX (4u << 20) /* bytes kept for a guest without room; more is dropped */
#define STALE 50000000ull      /* nanoseconds after which libslirp must be told the time before it gets a frame */
#define IDLE_TIMEOUT 1000      /* ms: what fill says when nothing waits for a time-out */

struct frame {
	struct frame *next;
	size_t length;
	uint8_t bytes[];
};

struct watched {	 /* a descriptor of libslirp's, by its number */
	bool added;	 /* to the loop */
	uint32_t events; /* asked of the loop */
	unsigned fill;	 /* the last one that named it */
};

struct user {
	struct net net;
	Slirp *slirp;
	struct loop_timer turn, timeout;
	uint64_t told; /* clock_now() when libslirp last looked at the clock */

	struct watched *fds;
	unsigned fds_room;
	struct pollfd *listed; /* by the last fill; fd -1: closed since */
	unsigned listed_count, listed_room;
	unsigned fill;
	bool ready; /* epoll has said that something is */

	struct frame *backlog, **backlog_end;
	size_t backlog_bytes;
};

struct user_timer {
	struct loop_timer timer;
	struct user *user;
	SlirpTimerCb function;
	void *opaque;
};

/* ---- frames to the guest ---- */

static void keep(struct user *u, const void *bytes, size_t length)
{
	struct frame *f;

	if (u->backlog_bytes + length > BACKLOG_MAX || !(f = malloc(sizeof(*f) + length)))
		return; /* lost: TCP in libslirp sends it again */
	f->next = NULL;
	f->length = length;
	memcpy(f->bytes, bytes, length);
	*u->backlog_end = f;
	u->backlog_end = &f->next;
	u->backlog_bytes += length;
}

static void backlog_drop_first(struct user *u)
{
	struct frame *f = u->backlog;

	u->backlog = f->next;
	if (!u->backlog)
		u->backlog_end = &u->backlog;
	u->backlog_bytes -= f->length;
	free(f);
}

static ssize_t send_packet(const void *bytes, size_t length, void *opaque)
{
	struct user *u = opaque;

	if (u->backlog || !net_deliver(&u->net, bytes, length))
		keep(u, bytes, length);
	return length;
}

static void user_room(struct net *net)
{
	struct user *u = container_of(net, struct user, net);

	while (u->backlog && net_deliver(net, u->backlog->bytes, u->backlog->length))
		backlog_drop_first(u);
}

/* ---- descriptors ---- */

static void turn_soon(struct user *u)
{
	if (!u->turn.heap_index)
		loop_timer_set(u->net.loop, &u->turn, clock_now());
}

/* SLIRP_POLL_* and poll(2)'s bits; epoll's are the same as poll's for these. */
static short to_poll(int events)
{
	return (events & SLIRP_POLL_IN ? POLLIN : 0) | (events & SLIRP_POLL_OUT ? POLLOUT : 0) |
	       (events & SLIRP_POLL_PRI ? POLLPRI : 0);
}

static int from_poll(short events)
{
	return (events & POLLIN ? SLIRP_POLL_IN : 0) | (events & POLLOUT ? SLIRP_POLL_OUT : 0) |
	       (events & POLLPRI ? SLIRP_POLL_PRI : 0) | (events & POLLERR ? SLIRP_POLL_ERR : 0) |
	       (events & POLLHUP ? SLIRP_POLL_HUP : 0);
}

static void fd_event(void *opaque, int fd, uint32_t events)
{
	struct user *u = opaque;

	u->ready = true;
	turn_soon(u);
}

static bool grow(void **array, unsigned *room, unsigned needed, size_t size)
{
	unsigned count = max(needed, *room * 2);
	void *grown;

	if (needed <= *room)
		return true;
	grown = realloc(*array, count * size);
	if (!grown)
		return false;
	memset((char *)grown + *room * size, 0, (count - *room) * size);
	*array = grown;
	*room = count;
	return true;
}

static int add_poll(int fd, int events, void *opaque)
{
	struct user *u = opaque;

	/* Without memory the socket is not watched in this turn; -1 is what libslirp itself says of such. */
	if (fd < 0 || !grow((void **)&u->fds, &u->fds_room, fd + 1, sizeof(*u->fds)) ||
		!grow((void **)&u->listed, &u->listed_room, u->listed_count + 1, sizeof(*u->listed)))
		return -1;
	u->fds[fd].fill = u->fill;
	u->listed[u->listed_count] = (struct pollfd){.fd = fd, .events = to_poll(events)};
	return u->listed_count++;
}

static int get_revents(int index, void *opaque)
{
	struct user *u = opaque;

	return index >= 0 && (unsigned)index < u->listed_count && u->listed[index].fd >= 0
		       ? from_poll(u->listed[index].revents)
		       : 0;
}

static void register_poll_fd(int fd, void *opaque)
{
	/* The next fill lists it. */
	turn_soon(opaque);
}

static void unregister_poll_fd(int fd, void *opaque)
{
	struct user *u = opaque;

	if (fd < 0 || (unsigned)fd >= u->fds_room)
		return;
	if (u->fds[fd].added)
		loop_remove_fd(u->net.loop, fd);
	u->fds[fd] = (struct watched){0};
	/* The number may be another socket's by the time of the next poll. */
	for (unsigned i = 0; i < u->listed_count; i++)
		if (u->listed[i].fd == fd)
			u->listed[i].fd = -1;
}

static void watch(struct user *u, int fd, uint32_t events)
{
	struct watched *w = &u->fds[fd];

	if (w->added)
		loop_change_fd(u->net.loop, fd, events);
	else if (events && loop_add_fd(u->net.loop, fd, events, fd_event, u, NULL) == 0)
		w->added = true;
	w->events = w->added ? events : 0;
}

/* ---- turns ---- */

static void tell(struct user *u)
{
	u->told = clock_now();
	for (unsigned i = 0; i < u->listed_count; i++)
		u->listed[i].revents = 0;
	/* What epoll reported may be out of date by now, and libslirp's listening sockets block: asked again. */
	if (u->ready)
		poll(u->listed, u->listed_count, 0);
	u->ready = false;
	slirp_pollfds_poll(u->slirp, 0, get_revents, u);
}

static void fill(struct user *u)
{
	uint32_t timeout = UINT32_MAX;
	scope_free struct pollfd *before = take_ptr(u->listed);
	unsigned before_count = u->listed_count;

	u->listed_count = u->listed_room = 0;
	u->fill++;
	slirp_pollfds_fill(u->slirp, &timeout, add_poll, u);
	for (unsigned i = 0; i < before_count; i++)
		if (before[i].fd >= 0 && u->fds[before[i].fd].fill != u->fill && u->fds[before[i].fd].events)
			watch(u, before[i].fd, 0);
	for (unsigned i = 0; i < u->listed_count; i++)
		if (u->listed[i].fd >= 0 && u->fds[u->listed[i].fd].events != (uint32_t)u->listed[i].events)
			watch(u, u->listed[i].fd, u->listed[i].events);
	/* A guest without connections must not wake the host every second. */
	if (timeout < IDLE_TIMEOUT)
		loop_timer_set(u->net.loop, &u->timeout, clock_now() + timeout * 1000000ull);
	else
		loop_timer_cancel(u->net.loop, &u->timeout);
}

static void turn(struct loop_timer *timer)
{
	struct user *u = container_of(timer, struct user, turn);

	tell(u);
	fill(u);
}

static void timed_out(struct loop_timer *timer)
{
	struct user *u = container_of(timer, struct user, timeout);

	tell(u);
	fill(u);
}

static void user_send(struct net *net, const uint8_t *frame, size_t length)
{
	struct user *u = container_of(net, struct user, net);

	/* Sockets and ARP entries made now get their time to live from the time libslirp was told last. */
	if (clock_now() - u->told > STALE)
		tell(u);
	slirp_input(u->slirp, frame, length);
	turn_soon(u);
}

/* ---- libslirp's timers and the rest of its callbacks ---- */

static int64_t clock_get_ns(void *opaque)
{
	return clock_now();
}

static void timer_fired(struct loop_timer *timer)
{
	struct user_timer *t = container_of(timer, struct user_timer, timer);

	t->function(t->opaque);
	turn_soon(t->user);
}

static void *timer_new(SlirpTimerCb function, void *function_opaque, void *opaque)
{
	struct user_timer *t = calloc(1, sizeof(*t));

	if (!t)
		abort(); /* libslirp does the same when it has no memory; there is no way to tell it */
	t->timer.function = timer_fired;
	t->user = opaque;
	t->function = function;
	t->opaque = function_opaque;
	return t;
}

static void timer_free(void *timer, void *opaque)
{
	struct user_timer *t = timer;

	if (!t)
		return;
	loop_timer_cancel(t->user->net.loop, &t->timer);
	free(t);
}

static void timer_mod(void *timer, int64_t expire_ms, void *opaque)
{
	struct user_timer *t = timer;

	loop_timer_set(t->user->net.loop, &t->timer, max(expire_ms, (int64_t)0) * 1000000ull);
}

static void guest_error(const char *message, void *opaque)
{
	/* What a guest sends wrongly is its own affair, and no reason to fill the host's log. */
}

static void notify(void *opaque)
{
	turn_soon(opaque);
}

static const SlirpCb callbacks = {
	.send_packet = send_packet,
	.guest_error = guest_error,
	.clock_get_ns = clock_get_ns,
	.timer_new = timer_new,
	.timer_free = timer_free,
	.timer_mod = timer_mod,
	.register_poll_fd = register_poll_fd,
	.unregister_poll_fd = unregister_poll_fd,
	.notify = notify,
};

/* ---- opening and closing ---- */

static void user_close(struct net *net)
{
	struct user *u = container_of(net, struct user, net);

	if (u->slirp)
		slirp_cleanup(u->slirp); /* frees its timers and unregisters its descriptors */
	loop_timer_cancel(net->loop, &u->turn);
	loop_timer_cancel(net->loop, &u->timeout);
	while (u->backlog)
		backlog_drop_first(u);
	free(u->listed);
	free(u->fds);
	free(u);
}

static const struct net_ops user_ops = {.close = user_close, .send = user_send, .room = user_room};

static int set_up(struct user *u, const struct user_options *o, struct error *err)
{
	SlirpConfig config = {
		.version = 4,
		.in_enabled = true,
		.vnetwork.s_addr = htonl(0x0a000200),
		.vnetmask.s_addr = htonl(0xffffff00),
		.vhost.s_addr = htonl(0x0a000202),
		.vdhcp_start.s_addr = htonl(0x0a00020f),
		.vnameserver.s_addr = htonl(0x0a000203),
		.in6_enabled = true,
		.vprefix_len = 64,
		.vhostname = "hostel",
		.if_mtu = o->mtu,
		.if_mru = o->mtu,
	};

	inet_pton(AF_INET6, "fec0::", &config.vprefix_addr6);
	inet_pton(AF_INET6, "fec0::2", &config.vhost6);
	inet_pton(AF_INET6, "fec0::3", &config.vnameserver6);
	u->told = clock_now();
	u->slirp = slirp_new(&config, &callbacks, u);
	if (!u->slirp)
		return error_set(err, EIO, "net user: libslirp %s does not start", slirp_version_string());
	for (unsigned i = 0; i < o->forwards; i++) {
		int ret = user_forward(u->slirp, &o->forward[i], err);

		if (ret < 0)
			return ret;
	}
	turn_soon(u);
	return 0;
}

int net_user_open(struct net **net, const char *options, struct loop *loop, struct error *err)
{
	struct user_options o = {.mtu = MTU_DEFAULT};
	struct sigaction pipe_action;
	struct user *u;
	int ret;

	ret = user_parse(&o, options, err);
	if (ret < 0)
		return ret;
	u = calloc(1, sizeof(*u));
	if (!u)
		return error_set(err, ENOMEM, "net user: no memory");
	/* libslirp writes to sockets whose peer may be gone; it leaves SIGPIPE to the program. */
	if (sigaction(SIGPIPE, NULL, &pipe_action) == 0 && pipe_action.sa_handler == SIG_DFL)
		signal(SIGPIPE, SIG_IGN);
	u->net.ops = &user_ops;
	u->net.loop = loop;
	/* For IPv6 libslirp holds the guest to the MTU, uncut frames included; for IPv4 it does not. */
	u->net.properties = (struct net_properties){
		.mtu = o.mtu,
		.large_frames = true,
		.large_frames6 = o.mtu == MTU_DEFAULT,
		.checksums_valid = true,
	};
	u->backlog_end = &u->backlog;
	u->turn.function = turn;
	u->timeout.function = timed_out;
	ret = set_up(u, &o, err);
	if (ret < 0) {
		user_close(&u->net);
		return ret;
	}
	*net = &u->net;
	return 0;
}
