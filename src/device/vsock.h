/* virtio-vsock's inside: what vsock.c (queues and packets) and vsock_connection.c (connections and their Unix sockets)
 * share. All of it lives on the loop's thread. */
#pragma once

#include "base/loop.h"
#include "device/virtio.h"

#define VSOCK_CONNECTIONS_MAX 1024
#define VSOCK_BUCKETS 256
#define VSOCK_BUFFER 65536u /* what the guest may send ahead of the host's reader, a connection */
#define VSOCK_CID_HOST 2

enum vsock_op { /* 5.10.6 */
	VSOCK_REQUEST = 1,
	VSOCK_RESPONSE = 2,
	VSOCK_RST = 3,
	VSOCK_SHUTDOWN = 4,
	VSOCK_RW = 5,
	VSOCK_CREDIT_UPDATE = 6,
	VSOCK_CREDIT_REQUEST = 7,
};

/* Flags of SHUTDOWN (5.10.6.5): of who sends it */
enum { VSOCK_RECEIVES_NO_MORE = 1, VSOCK_SENDS_NO_MORE = 2 };

struct vsock_header { /* struct virtio_vsock_hdr, 5.10.6 */
	uint64_t src_cid, dst_cid;
	uint32_t src_port, dst_port;
	uint32_t len;
	uint16_t type, op;
	uint32_t flags;
	uint32_t buf_alloc, fwd_cnt;
} __attribute__((packed));
_Static_assert(sizeof(struct vsock_header) == 44, "layout of the specification");

enum vsock_state {
	VSOCK_GREETING,	 /* a client of ours has not said yet where it wants to go */
	VSOCK_REQUESTED, /* the guest has not answered yet */
	VSOCK_OPEN,
};

/* Packets that wait for a buffer of the guest's */
enum { PENDING_REQUEST = 1, PENDING_RESPONSE = 2, PENDING_RST = 4, PENDING_SHUTDOWN = 8, PENDING_CREDIT = 16 };

struct vsock_connection {
	struct vsock *v;
	struct vsock_connection *next, **link;		/* among all */
	struct vsock_connection *next_in_bucket;	/* while `hashed` */
	struct vsock_connection *next_ready, **ready_link; /* NULL: has nothing to send */
	enum vsock_state state;
	bool hashed; /* the guest knows it by its ports */
	uint32_t host_port, guest_port;
	int fd;
	unsigned pending;
	uint64_t deadline; /* of the first two states */
	char greeting[32];
	unsigned greeted;

	/* host to guest: read when there is a buffer and credit, never kept */
	bool readable;	       /* epoll said so, and does not look again until we found nothing */
	bool host_ended;       /* nothing more will come */
	unsigned our_shutdown; /* flags */
	uint32_t peer_buf_alloc, peer_fwd_cnt, sent;

	/* guest to host */
	unsigned guest_shutdown; /* flags */
	uint32_t received, forwarded, told; /* bytes; `told`: of `forwarded` */
	uint8_t *buffer;		    /* VSOCK_BUFFER bytes, while the socket takes less than comes */
	uint32_t buffer_at, buffered;
};

/* An answer to a packet of no connection */
struct vsock_stray {
	uint32_t host_port, guest_port;
	uint16_t type;
};
#define VSOCK_STRAYS 64

struct vsock {
	struct virtio_device virtio;
	struct loop *loop;
	struct loop_timer turn, watchman;
	uint32_t cid;
	int listener;
	char path[108];
	bool listens;		  /* epoll watches the listener */
	atomic_bool was_reset;	  /* by the driver: its connections are void */
	unsigned connections;
	uint32_t next_port;
	struct vsock_connection *all, *bucket[VSOCK_BUCKETS];
	struct vsock_connection *ready, **ready_end;
	struct vsock_stray strays[VSOCK_STRAYS];
	unsigned stray_count;
	struct virtq_chain chain;
	struct iovec iov[VIRTQ_SEGMENTS_MAX];
};

/* ---- vsock_connection.c ---- */

void vsock_listen(struct vsock *v, bool listens);
struct vsock_connection *vsock_find(struct vsock *v, uint32_t host_port, uint32_t guest_port);
/* Connects to the socket that listens for that port; NULL: nobody does, or there are too many. */
struct vsock_connection *vsock_connect_host(struct vsock *v, uint32_t host_port, uint32_t guest_port);
/* The guest has taken a connection of ours. */
void vsock_accepted(struct vsock_connection *c);
void vsock_drop(struct vsock_connection *c);
void vsock_drop_all(struct vsock *v);
/* `length` bytes for the host from v->chain, behind the header. */
void vsock_to_host(struct vsock_connection *c, uint64_t length);
/* The guest shuts its side (flags), or has forgotten the connection; what it sent before still goes out. */
void vsock_guest_shuts(struct vsock_connection *c, unsigned flags);
void vsock_guest_forgot(struct vsock_connection *c);
/* It has something for the guest, or may have. */
void vsock_ready(struct vsock_connection *c, unsigned pending);
void vsock_unready(struct vsock_connection *c);
/* Has epoll look for what is wanted now. */
void vsock_watch(struct vsock_connection *c);
/* The watchman's round: greetings and requests that nobody answers, a listener that could not go on. */
void vsock_watchman(struct loop_timer *timer);

/* ---- vsock.c ---- */

/* Something can be sent: soon, on the loop. */
void vsock_turn_soon(struct vsock *v);
/* After a reset by the driver nothing is left of the connections: true, and every pointer to one is void. */
bool vsock_forget_if_reset(struct vsock *v);
static inline uint32_t vsock_credit(const struct vsock_connection *c)
{
	uint32_t on_its_way = c->sent - c->peer_fwd_cnt;

	/* A guest may shrink its buffer. */
	return on_its_way < c->peer_buf_alloc ? c->peer_buf_alloc - on_its_way : 0;
}
