/* virtio-net and its back ends. Two set-ups: the kernel's own TCP in a network namespace plays the guest, its frames
 * (with offloads) pumped through the queues into user mode; and a tap whose other end is a packet socket, for single
 * frames. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>
/* after the headers it wants */
#include <cmocka.h>

#include "base/util.h"
#include "driver.h"
#include "net/net.h"
#include "netns.h"

#define MEMORY (32ull << 20)
#define HEADER 12
#define RX_BUFFER 4096
#define TX_BUFFER (68u << 10)
#define TX_SLOTS 32
#define TRANSFER (100u << 20)

enum { F_CSUM = 0, F_GUEST_CSUM = 1, F_MTU = 3, F_HOST_TSO4 = 11, F_HOST_TSO6 = 12, F_MRG_RXBUF = 15 };

static const uint8_t mac[6] = {0x52, 0x54, 0, 1, 2, 3};

struct fixture {
	struct board board;
	struct driver d;
	struct net *net;
	struct virtio_device *device;
	struct error err;
	uint64_t rx_memory, tx_memory;
	uint32_t rx_buffer, rx_count;

	/* the pump */
	int tap;
	pthread_t pump;
	atomic_bool pump_stops;
	uint8_t merged[TX_BUFFER];
	atomic_uint large_frames; /* transmitted */
};

/* ---- driving ---- */

static void rx_offer(struct fixture *f, unsigned slot)
{
	struct driver_queue *q = &f->d.queue[0];

	q->next_desc = slot; /* one descriptor a buffer, slot and descriptor the same */
	driver_add(&f->d, q, (struct buffer[]){{f->rx_memory + slot * f->rx_buffer, f->rx_buffer, true}}, 1);
}

static void start(struct fixture *f, uint64_t features, uint32_t rx_buffer, unsigned rx_count)
{
	struct driver *d = &f->d;

	assert_true(driver_find(d, &f->board, 1));
	assert_true(driver_negotiate(d, features | VIRTIO_F_VERSION_1));
	driver_msix(d, 3);
	driver_queue_up(d, 0, 256, true);
	driver_queue_up(d, 1, TX_SLOTS, true);
	f->rx_buffer = rx_buffer;
	f->rx_count = rx_count;
	f->rx_memory = driver_alloc(d, rx_buffer * 256);
	f->tx_memory = driver_alloc(d, TX_BUFFER * TX_SLOTS);
	for (unsigned i = 0; i < rx_count; i++)
		rx_offer(f, i);
	driver_ok(d);
	driver_notify(d, &d->queue[0]);
}

/* The next received frame, merged, with its header; 0: none. */
static size_t rx_take(struct fixture *f, uint8_t *to, size_t room, unsigned *buffers)
{
	struct driver *d = &f->d;
	struct driver_queue *q = &d->queue[0];
	uint32_t id, length;
	uint16_t count, avail;
	size_t done = 0;

	if (!driver_used_now(d, q, &id, &length))
		return 0;
	memcpy(&count, driver_memory(d, f->rx_memory + id * f->rx_buffer + 10, 2), 2);
	if (buffers)
		*buffers = count;
	avail = q->avail_idx;
	for (unsigned i = 0;; i++) {
		assert_true(length <= f->rx_buffer && done + length <= room);
		memcpy(to + done, driver_memory(d, f->rx_memory + id * f->rx_buffer, length), length);
		done += length;
		rx_offer(f, id);
		if (i + 1 == count)
			break;
		assert_true(driver_used_now(d, q, &id, &length)); /* all are published together */
	}
	if (avail != q->avail_idx)
		driver_notify(d, q);
	return done;
}

static size_t rx_wait(struct fixture *f, uint8_t *to, size_t room, unsigned *buffers)
{
	size_t n = 0;

	for (unsigned i = 0; i < 2000 && !(n = rx_take(f, to, room, buffers)); i++)
		usleep(1000);
	return n;
}

static bool needs_reset(struct fixture *f)
{
	for (unsigned i = 0; i < 1000; i++) {
		if (driver_status(&f->d) & VIRTIO_STATUS_NEEDS_RESET)
			return true;
		usleep(1000);
	}
	return false;
}

/* ---- the pump: the kernel's frames, with header, into the queues and back ---- */

static bool tx_from_tap(struct fixture *f, unsigned *in_flight)
{
	struct driver *d = &f->d;
	struct driver_queue *q = &d->queue[1];
	unsigned slot = q->avail_idx % TX_SLOTS;
	uint64_t at = f->tx_memory + slot * TX_BUFFER;
	uint8_t *bytes = driver_memory(d, at, TX_BUFFER);
	ssize_t n;

	while (driver_used_now(d, q, NULL, NULL))
		--*in_flight;
	if (*in_flight == TX_SLOTS || (n = read(f->tap, bytes, TX_BUFFER)) <= HEADER)
		return false;
	f->large_frames += bytes[1] != 0;
	q->next_desc = slot;
	driver_add(d, q, (struct buffer[]){{at, n, false}}, 1);
	++*in_flight;
	atomic_thread_fence(memory_order_seq_cst);
	/* with event_idx: was the index that it waits for passed? without: does it want to be told? */
	bool by_event = d->accepted & VIRTIO_F_EVENT_IDX;
	uint16_t *field = driver_memory(d, q->used + (by_event ? 4 + 8 * q->size : 0), 2);
	uint16_t event = __atomic_load_n(field, __ATOMIC_RELAXED);

	if (by_event ? event == (uint16_t)(q->avail_idx - 1) : !event)
		driver_notify(d, q);
	return true;
}

static void *pump(void *opaque)
{
	struct fixture *f = opaque;
	unsigned in_flight = 0;

	while (!f->pump_stops) {
		bool busy = false;
		size_t n;

		for (unsigned i = 0; i < 16 && tx_from_tap(f, &in_flight); i++)
			busy = true;
		while ((n = rx_take(f, f->merged, sizeof(f->merged), NULL))) {
			busy = true;
			if (write(f->tap, f->merged, n) < 0)
				perror("tap");
		}
		if (!busy)
			poll(&(struct pollfd){f->tap, POLLIN, 0}, 1, 0);
	}
	return NULL;
}

static struct fixture *user_fixture(const char *spec)
{
	struct fixture *f = calloc(1, sizeof(*f));
	struct virtio_net_options options = {0};

	memcpy(options.mac, mac, 6);
	assert_int_equal(board_of_test_create(&f->board, MEMORY), 0);
	if (net_open(&f->net, spec, f->board.loop, &f->err) ||
		virtio_net_create(&f->device, &f->board, f->net, &options, &f->err))
		fail_msg("%s", f->err.text);
	board_of_test_run_loop(&f->board);
	return f;
}

static void pump_start(struct fixture *f)
{
	f->pump_stops = false;
	pthread_create(&f->pump, NULL, pump, f);
}

static void pump_stop(struct fixture *f)
{
	f->pump_stops = true;
	pthread_join(f->pump, NULL);
}

static void fixture_end(struct fixture *f)
{
	board_of_test_stop_loop(&f->board);
	virtio_device_destroy(f->device);
	net_close(f->net);
	board_of_test_destroy(&f->board);
	free(f);
}

/* ---- transfers ---- */

struct transfer {
	int fd;
	size_t bytes;
	uint64_t hash;
	bool sends;
};

static void *run_transfer(void *opaque)
{
	struct transfer *t = opaque;
	static __thread uint64_t block[8192];
	uint64_t x = 88172645463325252ull;
	size_t done = 0;

	while (done < t->bytes) {
		size_t want = min(sizeof(block), t->bytes - done);
		ssize_t n;

		if (t->sends) {
			for (unsigned i = 0; i < ARRAY_SIZE(block); i++)
				block[i] = x += x << 7 ^ x >> 9 ^ 0x9e3779b97f4a7c15ull;
			for (size_t sent = 0; sent < want; sent += n)
				if ((n = send(t->fd, (char *)block + sent, want - sent, MSG_NOSIGNAL)) <= 0)
					return NULL;
			n = want;
		} else {
			n = recv(t->fd, block, want, MSG_WAITALL);
			if (n <= 0)
				break;
		}
		for (ssize_t i = 0; i < n / 8; i++)
			t->hash = (t->hash ^ block[i]) * 0x100000001b3ull;
		done += n;
	}
	t->bytes = done;
	return NULL;
}

static int listen_on(const char *address, uint16_t *port)
{
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(*port)};
	socklen_t length = sizeof(in);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

	inet_pton(AF_INET, address, &in.sin_addr);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	assert_int_equal(bind(fd, (struct sockaddr *)&in, sizeof(in)), 0);
	assert_int_equal(listen(fd, 10), 0);
	getsockname(fd, (struct sockaddr *)&in, &length);
	*port = ntohs(in.sin_port);
	return fd;
}

static int connect_to(const char *address, uint16_t port)
{
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(port)};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	inet_pton(AF_INET, address, &in.sin_addr);
	return connect(fd, (struct sockaddr *)&in, sizeof(in)) == 0 ? fd : -1;
}

static void move(int from, int to, size_t bytes, const char *what)
{
	struct transfer out = {.fd = from, .bytes = bytes, .sends = true}, in = {.fd = to, .bytes = bytes};
	uint64_t begin = clock_now();
	pthread_t a, b;

	pthread_create(&a, NULL, run_transfer, &out);
	pthread_create(&b, NULL, run_transfer, &in);
	pthread_join(a, NULL);
	pthread_join(b, NULL);
	assert_int_equal(in.bytes, bytes);
	assert_int_equal(out.bytes, bytes);
	assert_true(in.hash == out.hash);
	printf("%s: %.0f MB/s\n", what, bytes * 1e3 / (clock_now() - begin));
}

static void both_ways(struct fixture *f, size_t bytes, const char *what)
{
	uint16_t port = 0;
	int server = listen_on("127.0.0.1", &port), client, peer;
	char text[64];

	netns_enter();
	client = connect_to("10.0.2.2", port);
	netns_leave();
	assert_true(client >= 0);
	peer = accept(server, NULL, NULL);
	snprintf(text, sizeof(text), "%s, from the guest", what);
	move(client, peer, bytes, text);
	snprintf(text, sizeof(text), "%s, to the guest", what);
	move(peer, client, bytes, text);
	close(client);
	close(peer);
	close(server);
}

static void transfer_test(const char *spec, unsigned mtu, uint64_t features, size_t bytes, const char *what)
{
	struct fixture *f;

	if (!netns_create())
		skip();
	f = user_fixture(spec);
	start(f, features, RX_BUFFER, 256);
	netns_enter();
	f->tap = netns_tap("guest0", true, "10.0.2.15", mtu, mac);
	if (!(features & 1 << F_HOST_TSO4))
		assert_int_equal(ioctl(f->tap, TUNSETOFFLOAD, 0), 0);
	netns_leave();
	pump_start(f);
	both_ways(f, bytes, what);
	if (features & 1 << F_HOST_TSO4)
		assert_true(f->large_frames > 0);
	pump_stop(f);
	close(f->tap);
	fixture_end(f);
	netns_destroy();
}

static void test_transfer(void **state)
{
	transfer_test("user", 65520, ~0ull, TRANSFER, "100 MB, MTU 65520");
}

static void test_transfer_mtu_1500(void **state)
{
	transfer_test("user,mtu=1500", 1500, ~0ull, TRANSFER / 10, "10 MB, MTU 1500");
}

/* As the plainest driver: no offloads, no merged buffers, no event index. */
static void test_transfer_plain(void **state)
{
	transfer_test("user,mtu=1500", 1500, 0, TRANSFER / 10, "10 MB, no features");
}

static int socket6(const char *address, uint16_t *port, bool server)
{
	struct sockaddr_in6 in = {.sin6_family = AF_INET6, .sin6_port = htons(*port)};
	socklen_t length = sizeof(in);
	int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);

	inet_pton(AF_INET6, address, &in.sin6_addr);
	if (!server)
		return connect(fd, (struct sockaddr *)&in, sizeof(in)) == 0 ? fd : -1;
	if (bind(fd, (struct sockaddr *)&in, sizeof(in)) < 0 || listen(fd, 1) < 0)
		return -1;
	getsockname(fd, (struct sockaddr *)&in, &length);
	*port = ntohs(in.sin6_port);
	return fd;
}

/* IPv6, its segments left uncut where that is allowed. */
static void test_transfer_ipv6(void **state)
{
	static const char *const specs[] = {"user", "user,mtu=1500"};

	for (unsigned i = 0; i < 2; i++) {
		uint16_t port = 0;
		int server = socket6("::1", &port, true), client, peer;
		struct fixture *f;

		if (server < 0) {
			printf("skipped: no IPv6 on this machine\n");
			skip();
		}
		if (!netns_create())
			skip();
		f = user_fixture(specs[i]);
		start(f, ~0ull, RX_BUFFER, 256);
		netns_enter();
		f->tap = netns_tap("guest0", true, NULL, i ? 1500 : 65520, mac);
		if (!(f->d.offered & 1 << F_HOST_TSO6))
			assert_int_equal(ioctl(f->tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4), 0);
		assert_int_equal(system("ip -6 addr add fec0::15/64 dev guest0 nodad"), 0);
		pump_start(f);
		client = socket6("fec0::2", &port, false);
		netns_leave();
		assert_true(client >= 0);
		peer = accept(server, NULL, NULL);
		move(client, peer, TRANSFER / 5, "20 MB by IPv6, from the guest");
		move(peer, client, TRANSFER / 5, "20 MB by IPv6, to the guest");
		assert_int_equal(f->large_frames > 0, i == 0);
		pump_stop(f);
		close(client);
		close(peer);
		close(server);
		close(f->tap);
		fixture_end(f);
		netns_destroy();
	}
}

/* A port forwarded to a server in the guest; a reset while data flows, and a second life. */
static void test_forward_and_reset(void **state)
{
	struct fixture *f;
	uint16_t port = 0, guest_port = 7;
	int server, client, peer;
	char spec[64];

	if (!netns_create())
		skip();
	close(listen_on("127.0.0.1", &port)); /* a free one */
	snprintf(spec, sizeof(spec), "user,forward=tcp:127.0.0.1:%u-:7", port);
	f = user_fixture(spec);
	netns_enter();
	f->tap = netns_tap("guest0", true, "10.0.2.15", 65520, mac);
	server = listen_on("10.0.2.15", &guest_port);
	netns_leave();
	for (unsigned round = 0; round < 3; round++) {
		start(f, ~0ull, RX_BUFFER, 256);
		pump_start(f);
		client = connect_to("127.0.0.1", port);
		assert_true(client >= 0);
		peer = accept(server, NULL, NULL);
		move(client, peer, 1 << 20, "forwarded port");
		/* data on its way to a guest that resets its device */
		assert_true(send(client, spec, sizeof(spec), MSG_NOSIGNAL) > 0);
		pump_stop(f);
		driver_write(&f->d, f->d.common + 0x14, 1, 0);
		assert_int_equal(driver_status(&f->d), 0);
		close(client);
		close(peer);
	}
	close(server);
	close(f->tap);
	fixture_end(f);
	netns_destroy();
}

/* ---- single frames, by a tap ---- */

struct tap_fixture {
	struct fixture *f;
	int wire;
};

/* An experimental Ethernet type, so that no stack minds; number and length tell frames apart. */
static void make_frame(uint8_t *frame, size_t length, unsigned number)
{
	memset(frame, 0xff, 6);
	memcpy(frame + 6, mac, 6);
	frame[12] = 0x88;
	frame[13] = 0xb5;
	for (size_t i = 14; i < length; i++)
		frame[i] = i + number;
}

static void inject(struct tap_fixture *t, size_t length, unsigned number)
{
	uint8_t frame[9100];

	make_frame(frame, length, number);
	for (unsigned i = 0; send(t->wire, frame, length, 0) != (ssize_t)length; i++) {
		assert_true(i < 1000);
		usleep(1000);
	}
}

static bool probe_received(void *opaque, const uint8_t *frame, size_t length)
{
	if (frame[HEADER + 12] == 0x88 && frame[HEADER + 13] == 0xb5)
		*(atomic_bool *)opaque = true;
	return true;
}

/* The kernel drops what is sent on a tap until it has noticed, in its own time, that somebody has opened it. */
static void wait_for_carrier(struct tap_fixture *t)
{
	atomic_bool seen = false;

	net_set_receiver(t->f->net, probe_received, &seen);
	board_of_test_run_loop(&t->f->board);
	for (unsigned i = 0; i < 1000 && !seen; i++) {
		inject(t, 60, 0);
		usleep(1000);
	}
	usleep(5000); /* those that are still on their way */
	board_of_test_stop_loop(&t->f->board);
	assert_true(seen);
}

static struct tap_fixture tap_fixture(void)
{
	struct tap_fixture t = {.f = calloc(1, sizeof(*t.f))};
	struct virtio_net_options options = {0};

	if (!netns_create())
		skip();
	assert_int_equal(board_of_test_create(&t.f->board, MEMORY), 0);
	netns_enter();
	netns_tap("wire0", false, NULL, 9000, NULL);
	t.wire = netns_packet_socket("wire0");
	if (net_open(&t.f->net, "tap=wire0", t.f->board.loop, &t.f->err))
		fail_msg("%s", t.f->err.text);
	netns_leave();
	wait_for_carrier(&t);
	if (virtio_net_create(&t.f->device, &t.f->board, t.f->net, &options, &t.f->err))
		fail_msg("%s", t.f->err.text);
	board_of_test_run_loop(&t.f->board);
	return t;
}

static void tap_fixture_end(struct tap_fixture *t)
{
	close(t->wire);
	fixture_end(t->f);
	netns_destroy();
}

/* The next frame of ours that the device has sent; 0: none. */
static size_t captured(struct tap_fixture *t, uint8_t *frame, size_t room)
{
	for (unsigned i = 0; i < 1000; i++) {
		struct sockaddr_storage from;
		socklen_t size = sizeof(from);
		ssize_t n = recvfrom(t->wire, frame, room, 0, (struct sockaddr *)&from, &size);

		if (n >= 14 && frame[12] == 0x88 && frame[13] == 0xb5)
			return n;
		if (n < 0)
			usleep(1000);
	}
	return 0;
}

static size_t our_frame(struct fixture *f, uint8_t *to, size_t room, unsigned *buffers)
{
	size_t n;

	/* the kernel sends some of its own (IPv6) */
	do
		n = rx_wait(f, to, room, buffers);
	while (n && !(to[HEADER + 12] == 0x88 && to[HEADER + 13] == 0xb5));
	return n;
}

static void test_receive(void **state)
{
	struct tap_fixture t = tap_fixture();
	struct fixture *f = t.f;
	uint8_t got[16384], expected[9100];
	static const size_t lengths[] = {60, 1514, 244, 245, 256, 512, 4000, 9014};
	unsigned buffers;

	start(f, ~0ull & ~(1ull << F_GUEST_CSUM), 256, 256);
	assert_int_equal(driver_read(&f->d, f->d.device + 10, 2), 9000);
	for (unsigned i = 0; i < ARRAY_SIZE(lengths); i++) {
		inject(&t, lengths[i], i);
		make_frame(expected, lengths[i], i);
		assert_int_equal(our_frame(f, got, sizeof(got), &buffers), HEADER + lengths[i]);
		assert_memory_equal(got + HEADER, expected, lengths[i]);
		assert_int_equal(buffers, (lengths[i] + HEADER + 255) / 256);
		assert_int_equal(got[0], 0);
	}
	tap_fixture_end(&t);
}

static void test_receive_unmerged(void **state)
{
	struct tap_fixture t = tap_fixture();
	struct fixture *f = t.f;
	uint8_t got[16384];

	start(f, 0, 1526, 256);
	inject(&t, 9000, 1); /* fits no buffer: lost */
	inject(&t, 1515, 2); /* neither */
	inject(&t, 1514, 3);
	assert_int_equal(our_frame(f, got, sizeof(got), NULL), HEADER + 1514);
	assert_int_equal(got[HEADER + 14], 14 + 3);
	assert_int_equal(got[10], 1); /* num_buffers */
	tap_fixture_end(&t);
}

/* Frames that come when there is no buffer wait, in order; so do those that come in a pause. */
static void test_receive_without_room(void **state)
{
	struct tap_fixture t = tap_fixture();
	struct fixture *f = t.f;
	uint8_t got[16384];

	start(f, ~0ull, 2048, 0);
	for (unsigned i = 0; i < 20; i++)
		inject(&t, 1000, i);
	usleep(20000);
	assert_int_equal(rx_take(f, got, sizeof(got), NULL), 0);
	for (unsigned i = 0; i < 256; i++)
		rx_offer(f, i);
	driver_notify(&f->d, &f->d.queue[0]);
	for (unsigned i = 0; i < 20; i++) {
		assert_int_equal(our_frame(f, got, sizeof(got), NULL), HEADER + 1000);
		assert_int_equal(got[HEADER + 14], 14 + i);
	}
	virtio_device_quiesce(f->device);
	while (rx_take(f, got, sizeof(got), NULL))
		;
	for (unsigned i = 20; i < 40; i++)
		inject(&t, 1000, i);
	usleep(20000);
	assert_int_equal(rx_take(f, got, sizeof(got), NULL), 0);
	virtio_device_resume(f->device);
	for (unsigned i = 20; i < 40; i++) {
		assert_int_equal(our_frame(f, got, sizeof(got), NULL), HEADER + 1000);
		assert_int_equal(got[HEADER + 14], 14 + i);
	}
	tap_fixture_end(&t);
}

/* A frame larger than all buffers there are does not block what comes after it for ever. */
static void test_receive_too_little_room(void **state)
{
	struct tap_fixture t = tap_fixture();
	struct fixture *f = t.f;
	uint8_t got[16384];

	start(f, ~0ull, 16, 256);
	inject(&t, 8000, 1);
	inject(&t, 100, 2);
	assert_int_equal(our_frame(f, got, sizeof(got), NULL), HEADER + 100);
	tap_fixture_end(&t);
}

static void send_frame(struct fixture *f, const uint8_t *header, const uint8_t *frame, size_t length)
{
	struct driver *d = &f->d;
	struct driver_queue *q = &d->queue[1];

	memcpy(driver_memory(d, f->tx_memory, HEADER), header, HEADER);
	if (length)
		memcpy(driver_memory(d, f->tx_memory + 4096, length), frame, length);
	driver_add(d, q, (struct buffer[]){{f->tx_memory, HEADER, false}, {f->tx_memory + 4096, length, false}},
		length ? 2 : 1);
	driver_notify(d, q);
	assert_true(driver_used(d, q, NULL, NULL));
}

static void test_transmit(void **state)
{
	struct tap_fixture t = tap_fixture();
	struct fixture *f = t.f;
	uint8_t frame[9100], got[9100], header[HEADER] = {0};
	uint16_t word;

	start(f, ~0ull, 2048, 256);
	make_frame(frame, 1514, 7);
	send_frame(f, header, frame, 1514);
	assert_int_equal(captured(&t, got, sizeof(got)), 1514);
	assert_memory_equal(got, frame, 1514);

	/* a checksum is left to the host's kernel, which leaves it to whoever gets the frame in the end */
	header[0] = 1;
	header[6] = 20; /* csum_start */
	header[8] = 4;	/* csum_offset */
	make_frame(frame, 101, 8);
	send_frame(f, header, frame, 101);
	assert_int_equal(captured(&t, got, sizeof(got)), 101);
	assert_memory_equal(got, frame, 101);

	/* what is wrong is lost, and what comes after it is not */
	static const struct {
		uint8_t flags, gso;
		uint16_t start, offset;
		size_t length;
	} bad[] = {
		{1, 0, 1000, 0, 100},
		{1, 0, 50, 50, 100},
		{1, 0, 50, 49, 100},
		{1, 0, 0xffff, 0xffff, 100},
		{0, 1, 0, 0, 100},
		{0, 4, 0, 0, 100},
		{0, 3, 0, 0, 100},
		{0, 0xff, 0, 0, 100},
		{0, 0, 0, 0, 13},
		{0, 0, 0, 0, 0},
	};
	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		memset(header, 0, sizeof(header));
		header[0] = bad[i].flags;
		header[1] = bad[i].gso;
		word = bad[i].start;
		memcpy(header + 6, &word, 2);
		word = bad[i].offset;
		memcpy(header + 8, &word, 2);
		make_frame(frame, 100, 9);
		send_frame(f, header, frame, bad[i].length);
	}
	memset(header, 0, sizeof(header));
	make_frame(frame, 200, 10);
	send_frame(f, header, frame, 200);
	assert_int_equal(captured(&t, got, sizeof(got)), 200);
	/* the largest chain possible is too large a frame: lost */
	driver_add(&f->d, &f->d.queue[1],
		(struct buffer[]){{f->tx_memory, 1 << 20, false}, {f->tx_memory, 1 << 20, false}}, 2);
	driver_notify(&f->d, &f->d.queue[1]);
	assert_true(driver_used(&f->d, &f->d.queue[1], NULL, NULL));
	assert_false(driver_status(&f->d) & VIRTIO_STATUS_NEEDS_RESET);
	tap_fixture_end(&t);
}

static void test_lies(void **state)
{
	struct tap_fixture t = tap_fixture();
	struct fixture *f = t.f;

	/* transmit without header */
	start(f, ~0ull, 2048, 256);
	driver_add(&f->d, &f->d.queue[1], (struct buffer[]){{f->tx_memory, 11, false}}, 1);
	driver_notify(&f->d, &f->d.queue[1]);
	assert_true(needs_reset(f));
	/* receive into what is readable */
	start(f, ~0ull, 2048, 0);
	driver_add(&f->d, &f->d.queue[0], (struct buffer[]){{f->rx_memory, 2048, false}}, 1);
	inject(&t, 100, 1);
	driver_notify(&f->d, &f->d.queue[0]);
	assert_true(needs_reset(f));
	/* into less than a header */
	start(f, ~0ull, 2048, 0);
	driver_add(&f->d, &f->d.queue[0], (struct buffer[]){{f->rx_memory, 11, true}}, 1);
	inject(&t, 100, 1);
	driver_notify(&f->d, &f->d.queue[0]);
	assert_true(needs_reset(f));
	/* and all is well again */
	uint8_t got[4096];
	start(f, ~0ull, 2048, 256);
	inject(&t, 100, 2);
	do
		assert_true(our_frame(f, got, sizeof(got), NULL) > 0);
	while (got[HEADER + 14] != 14 + 2);
	tap_fixture_end(&t);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_receive),
		cmocka_unit_test(test_receive_unmerged),
		cmocka_unit_test(test_receive_without_room),
		cmocka_unit_test(test_receive_too_little_room),
		cmocka_unit_test(test_transmit),
		cmocka_unit_test(test_lies),
		cmocka_unit_test(test_forward_and_reset),
		cmocka_unit_test(test_transfer),
		cmocka_unit_test(test_transfer_mtu_1500),
		cmocka_unit_test(test_transfer_plain),
		cmocka_unit_test(test_transfer_ipv6),
	};

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
