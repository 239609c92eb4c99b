/* virtio-vsock: connections, and the Unix sockets at their host ends. A stream's bytes are kept here only where the host's
 * reader is slower than its credit lets the guest send; towards the guest the socket itself is the buffer.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "device/vsock.h"

#define ACCEPTS_A_TURN 16
#define PATIENCE 30000000000ull	     /* ns for a greeting, and for the guest's answer */
#define ROUND 1000000000ull	     /* ns between the watchman's rounds */
#define FIRST_PORT 0x40000000u	     /* of our own connections: far from those that programs listen at */
#define LAST_PORT 0x7fffffffu

/* ---- finding ---- */

static struct vsock_connection **bucket_of(struct vsock *v, uint32_t host_port, uint32_t guest_port)
{
	return &v->bucket[(host_port * 31 + guest_port) % VSOCK_BUCKETS];
}

struct vsock_connection *vsock_find(struct vsock *v, uint32_t host_port, uint32_t guest_port)
{
	struct vsock_connection *c = *bucket_of(v, host_port, guest_port);

	while (c && (c->host_port != host_port || c->guest_port != guest_port))
		c = c->next_in_bucket;
	return c;
}

static void hash(struct vsock_connection *c, uint32_t host_port, uint32_t guest_port)
{
	struct vsock_connection **bucket = bucket_of(c->v, host_port, guest_port);

	c->host_port = host_port;
	c->guest_port = guest_port;
	c->next_in_bucket = *bucket;
	*bucket = c;
	c->hashed = true;
}

static void unhash(struct vsock_connection *c)
{
	struct vsock_connection **at = bucket_of(c->v, c->host_port, c->guest_port);

	if (!c->hashed)
		return;
	while (*at != c)
		at = &(*at)->next_in_bucket;
	*at = c->next_in_bucket;
	c->hashed = false;
}

/* ---- readiness ---- */

void vsock_ready(struct vsock_connection *c, unsigned pending)
{
	struct vsock *v = c->v;

	c->pending |= pending;
	if (!c->ready_link) {
		c->ready_link = v->ready_end;
		c->next_ready = NULL;
		*v->ready_end = c;
		v->ready_end = &c->next_ready;
	}
	vsock_turn_soon(v);
}

void vsock_unready(struct vsock_connection *c)
{
	if (!c->ready_link)
		return;
	*c->ready_link = c->next_ready;
	if (c->next_ready)
		c->next_ready->ready_link = c->ready_link;
	else
		c->v->ready_end = c->ready_link;
	c->ready_link = NULL;
}

void vsock_watch(struct vsock_connection *c)
{
	uint32_t events = 0;

	if (c->pending & PENDING_RST)
		events = 0;
	else if (c->state == VSOCK_GREETING)
		events = EPOLLIN;
	else if (c->state == VSOCK_REQUESTED || !c->hashed)
		events = EPOLLHUP;
	else if (c->readable)
		events = 0; /* what there is to see is known already */
	else if (!c->host_ended && !(c->guest_shutdown & VSOCK_RECEIVES_NO_MORE))
		events = EPOLLIN;
	else if (c->our_shutdown != (VSOCK_RECEIVES_NO_MORE | VSOCK_SENDS_NO_MORE))
		events = EPOLLHUP;
	if (c->buffered)
		events |= EPOLLOUT;
	loop_change_fd(c->v->loop, c->fd, events);
}

/* ---- from the guest to the host ---- */

/* It is of no use any more: the guest is told, and then it goes. */
static void fail(struct vsock_connection *c)
{
	c->readable = false;
	c->buffered = 0;
	c->pending = 0;
	vsock_ready(c, PENDING_RST);
	vsock_watch(c);
}

/* Nothing is buffered: what the guest has shut is shut for the host too. */
static void pass_on_shutdown(struct vsock_connection *c)
{
	if (c->guest_shutdown & VSOCK_SENDS_NO_MORE)
		shutdown(c->fd, SHUT_WR);
	/* Both ways: the guest waits for our word that it is done (5.10.6.5). */
	if (c->guest_shutdown == (VSOCK_RECEIVES_NO_MORE | VSOCK_SENDS_NO_MORE))
		fail(c);
}

void vsock_guest_shuts(struct vsock_connection *c, unsigned flags)
{
	c->guest_shutdown |= flags & (VSOCK_RECEIVES_NO_MORE | VSOCK_SENDS_NO_MORE);
	if (!c->buffered)
		pass_on_shutdown(c);
	vsock_watch(c);
}

void vsock_guest_forgot(struct vsock_connection *c)
{
	if (!c->buffered) {
		vsock_drop(c);
		return;
	}
	unhash(c);
	vsock_unready(c);
	c->pending = 0;
	c->readable = false;
	vsock_watch(c);
}

/* The guest may send more only when it knows that there is room again; not for every byte. */
static void tell_room(struct vsock_connection *c)
{
	if (c->hashed && c->forwarded - c->told >= VSOCK_BUFFER / 2)
		vsock_ready(c, PENDING_CREDIT);
}

/* How many of them the socket takes; -1: none, ever. */
static ssize_t put(struct vsock_connection *c, const struct iovec *iov, int count)
{
	struct msghdr message = {.msg_iov = (struct iovec *)iov, .msg_iovlen = count};
	ssize_t n = sendmsg(c->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);

	return n < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOBUFS) ? 0 : n;
}

void vsock_to_host(struct vsock_connection *c, uint64_t length)
{
	struct vsock *v = c->v;
	ssize_t n = 0;
	uint32_t at, part;

	if (!length)
		return;
	/* More than it was told there is room for, or after it said that no more will come */
	if (length > VSOCK_BUFFER - (c->received - c->forwarded) || (c->guest_shutdown & VSOCK_SENDS_NO_MORE)) {
		fail(c);
		return;
	}
	c->received += length;
	if (!c->buffered)
		n = put(c, v->iov,
			virtq_chain_slice(&v->chain, false, sizeof(struct vsock_header), length, v->iov));
	if (n >= 0 && (uint64_t)n < length && !c->buffer)
		c->buffer = malloc(VSOCK_BUFFER);
	if (n < 0 || ((uint64_t)n < length && !c->buffer)) {
		fail(c);
		return;
	}
	c->forwarded += n;
	for (uint64_t done = n; done < length; done += part) {
		at = (c->buffer_at + c->buffered) % VSOCK_BUFFER;
		part = min(length - done, (uint64_t)(VSOCK_BUFFER - at));
		virtq_chain_read(&v->chain, sizeof(struct vsock_header) + done, c->buffer + at, part);
		c->buffered += part;
	}
	tell_room(c);
	vsock_watch(c);
}

/* false: the connection is gone. */
static bool flush(struct vsock_connection *c)
{
	uint32_t first = min(c->buffered, VSOCK_BUFFER - c->buffer_at);
	struct iovec iov[2] = {{c->buffer + c->buffer_at, first}, {c->buffer, c->buffered - first}};
	ssize_t n = put(c, iov, 2);

	if (n < 0) {
		if (!c->hashed) {
			vsock_drop(c);
			return false;
		}
		fail(c);
		return true;
	}
	c->buffer_at = (c->buffer_at + n) % VSOCK_BUFFER;
	c->buffered -= n;
	c->forwarded += n;
	tell_room(c);
	if (c->buffered)
		return true;
	free(take_ptr(c->buffer));
	c->buffer_at = 0;
	if (!c->hashed) {
		vsock_drop(c);
		return false;
	}
	pass_on_shutdown(c);
	return true;
}

/* ---- sockets ---- */

static void greet(struct vsock_connection *c)
{
	struct vsock *v = c->v;
	char *text = c->greeting, *end;
	unsigned long port;
	ssize_t n = recv(c->fd, text + c->greeted, sizeof(c->greeting) - 1 - c->greeted, MSG_PEEK | MSG_DONTWAIT);
	const char *newline;

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		vsock_drop(c);
		return;
	}
	/* Nothing is taken out of the socket from behind the line: that is the stream's already. */
	newline = memchr(text + c->greeted, '\n', n);
	if (newline)
		n = newline + 1 - (text + c->greeted);
	n = recv(c->fd, text + c->greeted, n, MSG_DONTWAIT);
	c->greeted += max(n, (ssize_t)0);
	if (!newline && c->greeted < sizeof(c->greeting) - 1)
		return;
	text[c->greeted] = '\0';
	if (!newline || strncasecmp(text, "CONNECT ", 8) || text[8] < '0' || text[8] > '9') {
		vsock_drop(c);
		return;
	}
	errno = 0;
	port = strtoul(text + 8, &end, 10);
	/* A guest without a driver will not answer: better told at once, so that the client can try again. */
	if (errno || port > UINT32_MAX || *end != '\n' || !(v->virtio.status & VIRTIO_STATUS_DRIVER_OK)) {
		vsock_drop(c);
		return;
	}
	do
		v->next_port = v->next_port < FIRST_PORT || v->next_port >= LAST_PORT ? FIRST_PORT : v->next_port + 1;
	while (vsock_find(v, v->next_port, port));
	hash(c, v->next_port, port);
	c->state = VSOCK_REQUESTED;
	c->deadline = clock_now() + PATIENCE;
	vsock_ready(c, PENDING_REQUEST);
	vsock_watch(c);
}

void vsock_accepted(struct vsock_connection *c)
{
	char text[32];
	struct iovec iov = {text, snprintf(text, sizeof(text), "OK %u\n", c->host_port)};

	c->state = VSOCK_OPEN;
	if (put(c, &iov, 1) != (ssize_t)iov.iov_len) /* the first bytes of a fresh socket: its other end is gone */
		fail(c);
	else
		vsock_watch(c);
}

static void socket_event(void *opaque, int fd, uint32_t events)
{
	struct vsock_connection *c = opaque;

	if (vsock_forget_if_reset(c->v))
		return;
	if (c->state == VSOCK_GREETING) {
		greet(c);
		return;
	}
	if (c->buffered && !flush(c))
		return;
	if (c->state == VSOCK_REQUESTED && events & EPOLLHUP) {
		/* The client does not want it any more; the guest may not even know of it yet. */
		if (c->pending & PENDING_REQUEST) {
			vsock_drop(c);
			return;
		}
		fail(c);
	} else if (events & EPOLLHUP && (c->host_ended || c->guest_shutdown & VSOCK_RECEIVES_NO_MORE)) {
		c->host_ended = true;
		c->our_shutdown = VSOCK_RECEIVES_NO_MORE | VSOCK_SENDS_NO_MORE;
		vsock_ready(c, PENDING_SHUTDOWN);
	} else if (events & (EPOLLIN | EPOLLHUP | EPOLLERR) && c->state == VSOCK_OPEN && !c->host_ended) {
		c->readable = true;
		vsock_ready(c, 0);
	}
	vsock_watch(c);
}

/* Takes over the descriptor, also when it fails. */
static struct vsock_connection *add(struct vsock *v, int fd, enum vsock_state state)
{
	struct vsock_connection *c = calloc(1, sizeof(*c));

	if (!c) {
		close(fd);
		return NULL;
	}
	c->v = v;
	c->fd = fd;
	c->state = state;
	c->deadline = clock_now() + PATIENCE;
	c->next = v->all;
	c->link = &v->all;
	if (c->next)
		c->next->link = &c->next;
	v->all = c;
	v->connections++;
	if (loop_add_fd(v->loop, fd, state == VSOCK_GREETING ? EPOLLIN : 0, socket_event, c, NULL) < 0) {
		vsock_drop(c);
		return NULL;
	}
	if (state == VSOCK_GREETING)
		loop_timer_set(v->loop, &v->watchman, clock_now() + ROUND);
	return c;
}

void vsock_drop(struct vsock_connection *c)
{
	unhash(c);
	vsock_unready(c);
	*c->link = c->next;
	if (c->next)
		c->next->link = c->link;
	loop_remove_fd(c->v->loop, c->fd);
	close(c->fd);
	c->v->connections--;
	free(c->buffer);
	free(c);
}

void vsock_drop_all(struct vsock *v)
{
	while (v->all)
		vsock_drop(v->all);
}

struct vsock_connection *vsock_connect_host(struct vsock *v, uint32_t host_port, uint32_t guest_port)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	scope_fd int fd = -1;
	struct vsock_connection *c;

	if (v->connections >= VSOCK_CONNECTIONS_MAX)
		return NULL;
	/* Its length was looked at when the device was made. */
	snprintf(address.sun_path, sizeof(address.sun_path), "%.96s_%u", v->path, host_port);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	/* A Unix socket connects at once or not at all. */
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		return NULL;
	c = add(v, take_fd(&fd), VSOCK_OPEN);
	if (c)
		hash(c, host_port, guest_port);
	return c;
}

/* ---- clients ---- */

static void client_waits(void *opaque, int listener, uint32_t events)
{
	struct vsock *v = opaque;

	vsock_forget_if_reset(v);
	for (unsigned i = 0; i < ACCEPTS_A_TURN; i++) {
		int fd = v->connections < VSOCK_CONNECTIONS_MAX
				 ? accept4(v->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)
				 : (errno = EMFILE, -1);

		if (fd < 0 && (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED))
			return;
		if (fd < 0) { /* no descriptor is free: they wait in the queue until the next round */
			vsock_listen(v, false);
			loop_timer_set(v->loop, &v->watchman, clock_now() + ROUND);
			return;
		}
		add(v, fd, VSOCK_GREETING);
	}
}

void vsock_listen(struct vsock *v, bool listens)
{
	struct error err;

	v->listens = listens;
	if (listens && loop_add_fd(v->loop, v->listener, EPOLLIN, client_waits, v, &err) < 0)
		virtio_log(&v->virtio, "%s: %s", v->path, err.text);
	else if (!listens)
		loop_remove_fd(v->loop, v->listener);
}

void vsock_watchman(struct loop_timer *timer)
{
	struct vsock *v = container_of(timer, struct vsock, watchman);
	uint64_t now = clock_now();
	bool again = false;

	vsock_forget_if_reset(v);
	for (struct vsock_connection *c = v->all, *next; c; c = next) {
		next = c->next;
		if (c->state == VSOCK_OPEN || c->pending & PENDING_RST)
			continue;
		again = true;
		if (now < c->deadline)
			continue;
		if (c->state == VSOCK_GREETING || c->pending & PENDING_REQUEST)
			vsock_drop(c);
		else
			fail(c);
	}
	if (!v->listens)
		vsock_listen(v, true);
	if (again)
		loop_timer_set(v->loop, &v->watchman, now + ROUND);
}
