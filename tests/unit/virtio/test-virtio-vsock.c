/* virtio-vsock through PCI: the test is the guest's kernel at one end and programs with Unix sockets at the other. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
/* after the headers it wants */
#include <cmocka.h>

#include "base/util.h"
#include "device/vsock.h"
#include "driver.h"

#define MEMORY (32ull << 20)
#define CID 42
#define RX_BUFFER 4096u
#define RX_SLOTS 64u
#define TX_SLOTS 16u
#define TX_BUFFER (80u << 10)
#define CREDIT (1u << 20)
#define MANY 200

struct packet {
	struct vsock_header h;
	uint8_t data[RX_BUFFER];
};

struct fixture {
	struct board board;
	struct driver d;
	struct virtio_device *device;
	struct error err;
	char folder[40], path[60];
	int listener;
	uint64_t rx, tx;
	uint32_t credit; /* what the guest says in each packet */
};

/* ---- the host's side ---- */

static struct sockaddr_un address_of(const char *path)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};

	snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
	return a;
}

static int listen_at(const char *path)
{
	struct sockaddr_un a = address_of(path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	assert_true(fd >= 0 && bind(fd, (struct sockaddr *)&a, sizeof(a)) == 0 && listen(fd, 500) == 0);
	return fd;
}

static int dial(struct fixture *f, const char *greeting)
{
	struct sockaddr_un a = address_of(f->path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct timeval patience = {.tv_sec = 10};

	assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof(a)), 0);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	assert_int_equal(send(fd, greeting, strlen(greeting), MSG_NOSIGNAL), strlen(greeting));
	return fd;
}

static void expect_text(int fd, const char *text)
{
	char got[100] = "";

	assert_int_equal(recv(fd, got, strlen(text), MSG_WAITALL), strlen(text));
	assert_string_equal(got, text);
}

static int set_up(void **state)
{
	struct fixture *f = *state = calloc(1, sizeof(*f));
	struct virtio_vsock_options options = {.cid = CID};

	strcpy(f->folder, "/tmp/hostel-vsock-XXXXXX");
	assert_non_null(mkdtemp(f->folder));
	snprintf(f->path, sizeof(f->path), "%s/v", f->folder);
	f->listener = options.listener = listen_at(f->path);
	options.path = f->path;
	f->credit = CREDIT;
	assert_int_equal(board_of_test_create(&f->board, MEMORY), 0);
	if (virtio_vsock_create(&f->device, &f->board, &options, &f->err))
		fail_msg("%s", f->err.text);
	assert_true(driver_find(&f->d, &f->board, 1));
	board_of_test_run_loop(&f->board);
	return 0;
}

static int tear_down(void **state)
{
	struct fixture *f = *state;
	char command[100];

	board_of_test_stop_loop(&f->board);
	virtio_device_destroy(f->device);
	board_of_test_destroy(&f->board);
	close(f->listener);
	snprintf(command, sizeof(command), "rm -r %s", f->folder);
	assert_int_equal(system(command), 0);
	free(f);
	return 0;
}

/* ---- the guest's side ---- */

static void rx_offer(struct fixture *f, unsigned slot)
{
	struct driver_queue *q = &f->d.queue[0];

	q->next_desc = slot;
	driver_add(&f->d, q, (struct buffer[]){{f->rx + slot * sizeof(struct packet), sizeof(struct packet), true}}, 1);
	driver_notify(&f->d, q);
}

static void start(struct fixture *f, unsigned buffers)
{
	struct driver *d = &f->d;

	d->next_free = 0x10000;
	assert_true(driver_negotiate(d, VIRTIO_F_VERSION_1));
	assert_int_equal(driver_read(d, d->device, 4), CID);
	driver_msix(d, 4);
	driver_queue_up(d, 0, RX_SLOTS, true);
	driver_queue_up(d, 1, TX_SLOTS, true);
	driver_queue_up(d, 2, 4, true);
	f->rx = driver_alloc(d, RX_SLOTS * sizeof(struct packet));
	f->tx = driver_alloc(d, TX_BUFFER);
	driver_ok(d);
	for (unsigned i = 0; i < buffers; i++)
		rx_offer(f, i);
}

/* The next packet for the guest, whose buffer it offers again. */
static bool receive(struct fixture *f, struct packet *p, bool wait)
{
	uint32_t id, length;

	if (!(wait ? driver_used : driver_used_now)(&f->d, &f->d.queue[0], &id, &length))
		return false;
	memcpy(p, driver_memory(&f->d, f->rx + id * sizeof(*p), sizeof(*p)), sizeof(*p));
	assert_int_equal(length, sizeof(p->h) + p->h.len);
	assert_int_equal(p->h.src_cid, 2);
	assert_int_equal(p->h.dst_cid, CID);
	rx_offer(f, id);
	return true;
}

static struct packet expect_op(struct fixture *f, unsigned op)
{
	struct packet p;

	assert_true(receive(f, &p, true));
	assert_int_equal(p.h.op, op);
	return p;
}

static void transmit(struct fixture *f, struct vsock_header h, const void *data)
{
	struct driver_queue *q = &f->d.queue[1];

	memcpy(driver_memory(&f->d, f->tx, sizeof(h)), &h, sizeof(h));
	if (h.len)
		memcpy(driver_memory(&f->d, f->tx + sizeof(h), h.len), data, h.len);
	driver_add(&f->d, q, (struct buffer[]){{f->tx, sizeof(h), false}, {f->tx + sizeof(h), h.len, false}},
		h.len ? 2 : 1);
	driver_notify(&f->d, q);
	assert_true(driver_used(&f->d, q, NULL, NULL));
}

static struct vsock_header header(struct fixture *f, uint32_t guest_port, uint32_t host_port, unsigned op, uint32_t len)
{
	return (struct vsock_header){.src_cid = CID,
		.dst_cid = 2,
		.src_port = guest_port,
		.dst_port = host_port,
		.type = 1,
		.op = op,
		.len = len,
		.buf_alloc = f->credit};
}

static void say(struct fixture *f, uint32_t guest_port, uint32_t host_port, unsigned op, const void *data, uint32_t len)
{
	transmit(f, header(f, guest_port, host_port, op, len), data);
}

/* A connection from the host to the guest's port 7; *port is the host's. */
static int host_connects(struct fixture *f, uint32_t *port)
{
	int fd = dial(f, "CONNECT 7\n");
	struct packet p = expect_op(f, VSOCK_REQUEST);
	char ok[40];

	assert_int_equal(p.h.dst_port, 7);
	assert_true(p.h.buf_alloc >= 4096);
	*port = p.h.src_port;
	say(f, 7, *port, VSOCK_RESPONSE, NULL, 0);
	snprintf(ok, sizeof(ok), "OK %u\n", *port);
	expect_text(fd, ok);
	return fd;
}

/* ---- tests ---- */

static void test_from_host(void **state)
{
	struct fixture *f = *state;
	struct packet p;
	uint32_t port;
	int fd;

	start(f, RX_SLOTS);
	fd = host_connects(f, &port);
	assert_int_equal(send(fd, "question", 8, 0), 8);
	p = expect_op(f, VSOCK_RW);
	assert_int_equal(p.h.len, 8);
	assert_memory_equal(p.data, "question", 8);
	say(f, 7, port, VSOCK_RW, "answer", 6);
	expect_text(fd, "answer");
	/* the host has said all; the guest still answers, then closes */
	shutdown(fd, SHUT_WR);
	p = expect_op(f, VSOCK_SHUTDOWN);
	assert_int_equal(p.h.flags, VSOCK_SENDS_NO_MORE);
	say(f, 7, port, VSOCK_RW, "more", 4);
	struct vsock_header h = header(f, 7, port, VSOCK_SHUTDOWN, 0);
	h.flags = 3;
	transmit(f, h, NULL);
	expect_op(f, VSOCK_RST);
	expect_text(fd, "more");
	assert_int_equal(recv(fd, &p, 1, 0), 0);
	close(fd);

	/* the guest shuts first, and the host goes on */
	fd = host_connects(f, &port);
	h = header(f, 7, port, VSOCK_SHUTDOWN, 0);
	h.flags = VSOCK_SENDS_NO_MORE;
	transmit(f, h, NULL);
	assert_int_equal(recv(fd, &p, 1, 0), 0);
	assert_int_equal(send(fd, "late", 4, 0), 4);
	assert_int_equal(expect_op(f, VSOCK_RW).h.len, 4);
	close(fd);
	p = expect_op(f, VSOCK_SHUTDOWN);
	assert_int_equal(p.h.flags, 3);
	say(f, 7, port, VSOCK_RST, NULL, 0);
	say(f, 7, port, VSOCK_RW, "x", 1); /* nobody's any more */
	expect_op(f, VSOCK_RST);

	/* refused by the guest */
	fd = dial(f, "connect 9\n");
	p = expect_op(f, VSOCK_REQUEST);
	say(f, 9, p.h.src_port, VSOCK_RST, NULL, 0);
	assert_int_equal(recv(fd, &p, 1, 0), 0);
	close(fd);
}

static void test_greetings(void **state)
{
	static const char *const bad[] = {"\n", "CONNECT\n", "CONNECT x\n", "CONNECT 7 8\n", "CONNECT 4294967296\n",
		"CONNECT -1\n", "GET / HTTP/1.1\r\nHost: somewhere\r\n", "CONNECT 00000000000000000000000000007\n"};
	struct fixture *f = *state;
	char byte;
	int fd;

	/* without a driver nobody listens */
	fd = dial(f, "CONNECT 7\n");
	assert_int_equal(recv(fd, &byte, 1, 0), 0);
	close(fd);
	start(f, RX_SLOTS);
	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		fd = dial(f, bad[i]);
		assert_true(recv(fd, &byte, 1, 0) <= 0);
		close(fd);
	}
	/* in pieces, with the stream's first bytes behind it */
	fd = dial(f, "CON");
	usleep(20000);
	assert_int_equal(send(fd, "NECT 7\nabc", 10, 0), 10);
	struct packet p = expect_op(f, VSOCK_REQUEST);
	say(f, 7, p.h.src_port, VSOCK_RESPONSE, NULL, 0);
	p = expect_op(f, VSOCK_RW);
	assert_memory_equal(p.data, "abc", 3);
	close(fd);
}

static void test_from_guest(void **state)
{
	struct fixture *f = *state;
	char path[80];
	int server, fd;

	start(f, RX_SLOTS);
	say(f, 1000, 52, VSOCK_REQUEST, NULL, 0); /* nobody listens */
	expect_op(f, VSOCK_RST);
	snprintf(path, sizeof(path), "%s_52", f->path);
	server = listen_at(path);
	say(f, 1000, 52, VSOCK_REQUEST, NULL, 0);
	struct packet p = expect_op(f, VSOCK_RESPONSE);
	assert_int_equal(p.h.src_port, 52);
	assert_int_equal(p.h.dst_port, 1000);
	fd = accept4(server, NULL, NULL, 0);
	assert_true(fd >= 0);
	say(f, 1000, 52, VSOCK_RW, "hello", 5);
	expect_text(fd, "hello");
	say(f, 1000, 52, VSOCK_CREDIT_REQUEST, NULL, 0);
	p = expect_op(f, VSOCK_CREDIT_UPDATE);
	assert_int_equal(p.h.fwd_cnt, 5);
	/* strangers: another guest's address, another host's, a type and an operation that are not ours */
	struct vsock_header h = header(f, 1000, 52, VSOCK_RW, 0);
	h.src_cid = CID + 1;
	transmit(f, h, NULL);
	h = header(f, 1000, 52, VSOCK_RW, 0);
	h.dst_cid = 5;
	transmit(f, h, NULL);
	h = header(f, 1001, 52, VSOCK_REQUEST, 0);
	h.type = 2;
	transmit(f, h, NULL);
	p = expect_op(f, VSOCK_RST);
	assert_int_equal(p.h.type, 2);
	say(f, 1000, 52, 99, NULL, 0);
	expect_op(f, VSOCK_RST);
	char byte;
	assert_int_equal(recv(fd, &byte, 1, 0), 0);
	close(fd);
	close(server);
}

/* Neither side may run over the other. */
static void test_credit(void **state)
{
	struct fixture *f = *state;
	static uint8_t block[65536], back[65536];
	struct packet p;
	uint32_t port, sent = 0, got = 0, room;
	int fd;

	for (unsigned i = 0; i < sizeof(block); i++)
		block[i] = i * 31 ^ i >> 8;
	/* to the guest: no more than its buffer, until it says that it has read */
	start(f, RX_SLOTS);
	f->credit = 10000;
	fd = host_connects(f, &port);
	assert_int_equal(send(fd, block, 50000, 0), 50000);
	for (uint32_t told = 0; got < 50000; told = got) {
		while (got - told < 10000 && got < 50000) {
			p = expect_op(f, VSOCK_RW);
			assert_memory_equal(p.data, block + got, p.h.len);
			got += p.h.len;
		}
		assert_true(got - told <= 10000);
		usleep(5000);
		assert_false(receive(f, &p, false));
		struct vsock_header h = header(f, 7, port, VSOCK_CREDIT_UPDATE, 0);
		h.fwd_cnt = got;
		transmit(f, h, NULL);
	}
	/* to the host, which does not read: what was promised is kept, in order */
	room = p.h.buf_alloc;
	while (sent < 4 * 65536 && room >= 1000) {
		say(f, 7, port, VSOCK_RW, block + sent % 64000, 1000);
		sent += 1000;
		room -= 1000;
		while (receive(f, &p, false))
			room = p.h.buf_alloc - (sent - p.h.fwd_cnt);
	}
	for (uint32_t done = 0; done < sent; done += 1000) {
		assert_int_equal(recv(fd, back, 1000, MSG_WAITALL), 1000);
		assert_memory_equal(back, block + done % 64000, 1000);
	}
	do /* told in time, although nobody asks */
		assert_true(receive(f, &p, true));
	while (sent - p.h.fwd_cnt > 32768);
	assert_int_equal(p.h.op, VSOCK_CREDIT_UPDATE);
	/* a guest that sends more than it may loses the connection, and only that */
	for (unsigned i = 0; i < 8; i++)
		say(f, 7, port, VSOCK_RW, block, 65536);
	do
		assert_true(receive(f, &p, true));
	while (p.h.op == VSOCK_CREDIT_UPDATE);
	assert_int_equal(p.h.op, VSOCK_RST);
	close(fd);
	usleep(20000);
	while (receive(f, &p, false)) /* what it sent on to nobody */
		assert_int_equal(p.h.op, VSOCK_RST);
	f->credit = CREDIT;
	close(host_connects(f, &port));
	assert_false(driver_status(&f->d) & VIRTIO_STATUS_NEEDS_RESET);
}

static void test_many(void **state)
{
	struct fixture *f = *state;
	static uint32_t port[MANY];
	static int fd[MANY];
	struct packet p;
	char text[20];

	start(f, 4); /* few buffers: everybody waits for one */
	for (unsigned i = 0; i < MANY; i++)
		fd[i] = host_connects(f, &port[i]);
	for (unsigned i = 0; i < MANY; i++) {
		snprintf(text, sizeof(text), "%u", i);
		assert_int_equal(send(fd[i], text, strlen(text), 0), strlen(text));
	}
	for (unsigned i = 0; i < MANY; i++) {
		p = expect_op(f, VSOCK_RW);
		p.data[p.h.len] = '\0';
		unsigned which = atoi((char *)p.data);
		assert_true(which < MANY && port[which] == p.h.src_port);
		say(f, 7, port[which], VSOCK_RW, p.data, p.h.len);
	}
	for (unsigned i = 0; i < MANY; i++) {
		snprintf(text, sizeof(text), "%u", i);
		expect_text(fd[i], text);
	}
	/* a reset of the device ends them all, and the next driver begins afresh */
	driver_write(&f->d, f->d.common + 0x14, 1, 0);
	for (unsigned i = 0; i < MANY; i++) {
		assert_int_equal(recv(fd[i], text, 1, 0), 0);
		close(fd[i]);
	}
	start(f, RX_SLOTS);
	close(host_connects(f, &port[0]));
}

/* A guest without receive buffers: its packets wait after a while, and memory does not grow. */
static void test_no_buffers(void **state)
{
	struct fixture *f = *state;
	struct driver_queue *q;

	start(f, 0);
	q = &f->d.queue[1];
	for (unsigned i = 0; i < VSOCK_STRAYS + 1; i++) {
		struct vsock_header h = header(f, 100 + i, 1, VSOCK_RW, 0);

		memcpy(driver_memory(&f->d, f->tx, sizeof(h)), &h, sizeof(h));
		driver_add(&f->d, q, (struct buffer[]){{f->tx, sizeof(h), false}}, 1);
		driver_notify(&f->d, q);
		if (i < VSOCK_STRAYS)
			assert_true(driver_used(&f->d, q, NULL, NULL));
	}
	usleep(30000);
	assert_false(driver_used_now(&f->d, q, NULL, NULL));
	for (unsigned i = 0; i < RX_SLOTS; i++)
		rx_offer(f, i);
	for (unsigned i = 0; i < VSOCK_STRAYS + 1; i++)
		expect_op(f, VSOCK_RST);
}

static void test_lies(void **state)
{
	struct fixture *f = *state;
	struct vsock_header h;

	start(f, RX_SLOTS);
	h = header(f, 1, 2, VSOCK_RW, 1000); /* and no data */
	memcpy(driver_memory(&f->d, f->tx, sizeof(h)), &h, sizeof(h));
	driver_add(&f->d, &f->d.queue[1], (struct buffer[]){{f->tx, sizeof(h), false}}, 1);
	driver_notify(&f->d, &f->d.queue[1]);
	for (unsigned i = 0; i < 1000 && !(driver_status(&f->d) & VIRTIO_STATUS_NEEDS_RESET); i++)
		usleep(1000);
	assert_true(driver_status(&f->d) & VIRTIO_STATUS_NEEDS_RESET);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
		TEST(test_from_host),
		TEST(test_greetings),
		TEST(test_from_guest),
		TEST(test_credit),
		TEST(test_many),
		TEST(test_no_buffers),
		TEST(test_lies),
	};

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
