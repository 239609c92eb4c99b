/* The packet back ends by themselves: what a specification may say, every refusal, the protocols that user mode answers
 * itself, and a tap that is full or gone. The frames are made by hand. */
#include <arpa/inet.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>
/* after the headers it wants */
#include <cmocka.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "net/net.h"
#include "netns.h"

static const uint8_t mac[6] = {0x52, 0x54, 0, 1, 2, 3};

struct received {
	uint8_t bytes[70000];
	size_t length;
};

struct fixture {
	struct loop *loop;
	struct net *net;
	struct error err;
	bool full;				 /* the "guest" takes nothing */
	bool (*wanted)(const uint8_t *, size_t); /* the loop stops when it accepts one */
	struct received got;
	struct loop_timer deadline;
	unsigned frames;
};

static void timed_out(struct loop_timer *timer)
{
	struct fixture *f = container_of(timer, struct fixture, deadline);

	loop_stop(f->loop);
}

static bool receive(void *opaque, const uint8_t *frame, size_t length)
{
	struct fixture *f = opaque;

	if (f->full)
		return false;
	f->frames++;
	if (f->wanted && f->wanted(frame, length)) {
		memcpy(f->got.bytes, frame, length);
		f->got.length = length;
		f->wanted = NULL;
		loop_stop(f->loop);
	}
	return true;
}

static int set_up(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	f->deadline.function = timed_out;
	*state = f;
	return loop_create(&f->loop, &f->err);
}

static int tear_down(void **state)
{
	struct fixture *f = *state;

	net_close(f->net);
	loop_timer_cancel(f->loop, &f->deadline);
	loop_destroy(f->loop);
	free(f);
	return 0;
}

static void open_net(struct fixture *f, const char *spec)
{
	if (net_open(&f->net, spec, f->loop, &f->err))
		fail_msg("%s", f->err.text);
	net_set_receiver(f->net, receive, f);
}

/* From now on, the first frame that `wanted` accepts is kept. Many answers come while the question is still being sent.
 */
static void expect(struct fixture *f, bool (*wanted)(const uint8_t *, size_t))
{
	f->got.length = 0;
	f->wanted = wanted;
}

/* Runs the loop until it has come, for at most 5 s. */
static bool came(struct fixture *f)
{
	loop_timer_set(f->loop, &f->deadline, clock_now() + 5000000000ull);
	while (!f->got.length && f->deadline.heap_index)
		loop_run(f->loop);
	return f->got.length;
}

static void run_for(struct fixture *f, unsigned ms)
{
	loop_timer_set(f->loop, &f->deadline, clock_now() + ms * 1000000ull);
	while (f->deadline.heap_index)
		loop_run(f->loop);
}

/* ---- specifications ---- */

static void test_bad_specifications(void **state)
{
	struct fixture *f = *state;
	static const struct {
		const char *spec, *word;
	} bad[] = {
		{"", "\"user\" or \"tap=NAME\""},
		{"users", "\"user\" or"},
		{"user=1", "\"user\" or"},
		{"tap", "\"user\" or"},
		{"tap=", "1 to 15 characters"},
		{"tap=a-name-that-is-too-long", "1 to 15 characters"},
		{"tap=../x", "1 to 15 characters"},
		{"tap=x,queues=0", "give queues=N, 1 to 8"},
		{"tap=x,queues=9", "give queues=N, 1 to 8"},
		{"tap=x,rate=1", "\"rate=1\" is unknown"},
		{"tap=nosuchtap,queues=2", "ip tuntap add dev nosuchtap mode tap multi_queue"},
		{"tap=nosuchtap", "tap nosuchtap does not exist: create it with: ip tuntap add dev nosuchtap mode tap"},
		{"user,", "no option \"\""},
		{"user,speed=3", "no option \"speed=3\""},
		{"user,mtu=", "mtu=: give 1280 to 65520"},
		{"user,mtu=1279", "mtu=1279"},
		{"user,mtu=65521", "mtu=65521"},
		{"user,mtu=1500x", "mtu=1500x"},
		{"user,mtu=-1500", "mtu=-1500"},
		{"user,forward=", "forward=:"},
		{"user,forward=tcp", "forward=tcp:"},
		{"user,forward=sctp:127.0.0.1:1-:1", "forward=sctp"},
		{"user,forward=tcp:127.0.0.1:1", "forward=tcp:127.0.0.1:1:"},
		{"user,forward=tcp:127.0.0.1:0-:1", "ports 1 to 65535"},
		{"user,forward=tcp:127.0.0.1:1-:65536", "ports 1 to 65535"},
		{"user,forward=tcp:127.0.0.1:1-:", "ports 1 to 65535"},
		{"user,forward=tcp:localhost:1-:1", "IPv4 addresses"},
		{"user,forward=tcp:::1:1-:1", "IPv4 addresses"},
		{"user,forward=tcp:192.0.2.1:7777-:1", "192.0.2.1 is not an address of this host"},
		{"user,mtu=1500,forward=tcp:127.0.0.1:7777-:1,mtu=1", "mtu=1:"},
	};

	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		f->err.text[0] = 0;
		assert_true(net_open(&f->net, bad[i].spec, f->loop, &f->err) < 0);
		if (!strstr(f->err.text, bad[i].word) || strchr(f->err.text, '\n'))
			fail_msg("%s: \"%s\" does not say \"%s\"", bad[i].spec, f->err.text, bad[i].word);
		assert_null(f->net);
	}
}

static void test_ports_in_use(void **state)
{
	struct fixture *f = *state;

	for (unsigned udp = 0; udp < 2; udp++) {
		struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
		scope_fd int fd = socket(AF_INET, udp ? SOCK_DGRAM : SOCK_STREAM, 0);
		socklen_t length = sizeof(in);
		char spec[100], expected[100];

		bind(fd, (struct sockaddr *)&in, sizeof(in));
		if (!udp)
			listen(fd, 1);
		getsockname(fd, (struct sockaddr *)&in, &length);
		snprintf(spec, sizeof(spec), "user,forward=%s:127.0.0.1:%u-:22", udp ? "udp" : "tcp",
			ntohs(in.sin_port));
		snprintf(expected, sizeof(expected), "%s port %u on 127.0.0.1 is in use", udp ? "udp" : "tcp",
			ntohs(in.sin_port));
		assert_int_equal(net_open(&f->net, spec, f->loop, &f->err), -EADDRINUSE);
		assert_non_null(strstr(f->err.text, expected));
	}
}

/* ---- what user mode answers itself ---- */

static uint16_t checksum(const void *bytes, size_t length)
{
	const uint8_t *b = bytes;
	uint32_t sum = 0;

	for (size_t i = 0; i < length; i++)
		sum += i % 2 ? b[i] : b[i] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return htons(~sum);
}

/* Ethernet and IPv4 headers for a payload at frame + 34. */
static size_t ip_frame(uint8_t *frame, const char *from, const char *to, uint8_t protocol, size_t payload)
{
	uint16_t word;

	memset(frame, 0, 34);
	memset(frame, 0xff, 6);
	memcpy(frame + 6, mac, 6);
	frame[12] = 0x08;
	frame[14] = 0x45;
	word = htons(20 + payload);
	memcpy(frame + 16, &word, 2);
	frame[22] = 64;
	frame[23] = protocol;
	inet_pton(AF_INET, from, frame + 26);
	inet_pton(AF_INET, to, frame + 30);
	word = checksum(frame + 14, 20);
	memcpy(frame + 24, &word, 2);
	return 34 + payload;
}

static size_t udp_frame(uint8_t *frame, const char *from, uint16_t from_port, const char *to, uint16_t to_port,
	const void *data, size_t length)
{
	uint16_t words[4] = {htons(from_port), htons(to_port), htons(8 + length), 0};

	memcpy(frame + 34, words, 8);
	memcpy(frame + 42, data, length);
	return ip_frame(frame, from, to, 17, 8 + length);
}

static bool is_arp_reply(const uint8_t *frame, size_t length)
{
	return length >= 42 && frame[12] == 8 && frame[13] == 6 && frame[21] == 2;
}

static bool is_echo_reply(const uint8_t *frame, size_t length)
{
	return length >= 42 && frame[12] == 8 && frame[13] == 0 && frame[23] == 1 && frame[34] == 0;
}

static bool is_dhcp(const uint8_t *frame, size_t length)
{
	return length > 282 && frame[12] == 8 && frame[13] == 0 && frame[23] == 17 && frame[36] == 0 && frame[37] == 68;
}

static bool is_udp(const uint8_t *frame, size_t length)
{
	return length >= 42 && frame[12] == 8 && frame[13] == 0 && frame[23] == 17;
}

static bool is_router_advertisement(const uint8_t *frame, size_t length)
{
	return length >= 70 && frame[12] == 0x86 && frame[13] == 0xdd && frame[20] == 58 && frame[54] == 134;
}

static void send_arp(struct fixture *f, const char *target)
{
	uint8_t frame[42] = {[12] = 8, 6, 0, 1, 8, 0, 6, 4, 0, 1};

	memset(frame, 0xff, 6);
	memcpy(frame + 6, mac, 6);
	memcpy(frame + 22, mac, 6);
	inet_pton(AF_INET, "10.0.2.15", frame + 28);
	inet_pton(AF_INET, target, frame + 38);
	net_send(f->net, frame, sizeof(frame));
}

static void test_arp_and_ping(void **state)
{
	struct fixture *f = *state;
	uint8_t frame[100] = {0};
	uint16_t sum;

	open_net(f, "user");
	assert_int_equal(net_properties(f->net)->mtu, 65520);
	expect(f, is_arp_reply);
	send_arp(f, "10.0.2.2");
	assert_true(came(f));
	assert_memory_equal(f->got.bytes, mac, 6);
	assert_memory_equal(f->got.bytes + 28, "\x0a\0\2\2", 4);
	frame[34] = 8;
	memcpy(frame + 38, "\x12\x34\0\1payload", 11);
	sum = checksum(frame + 34, 16);
	memcpy(frame + 36, &sum, 2);
	expect(f, is_echo_reply);
	net_send(f->net, frame, ip_frame(frame, "10.0.2.15", "10.0.2.2", 1, 16));
	assert_true(came(f));
	assert_memory_equal(f->got.bytes + 38, "\x12\x34\0\1payload", 11);
}

static void test_dhcp(void **state)
{
	struct fixture *f = *state;
	uint8_t dhcp[300] = {1, 1, 6, 0, 0xaa, 0xbb, 0xcc, 0xdd}, frame[400];

	open_net(f, "user");
	memcpy(dhcp + 28, mac, 6);
	memcpy(dhcp + 236, "\x63\x82\x53\x63\x35\1\1\xff", 8); /* discover */
	expect(f, is_dhcp);
	net_send(f->net, frame, udp_frame(frame, "0.0.0.0", 68, "255.255.255.255", 67, dhcp, sizeof(dhcp)));
	assert_true(came(f));
	assert_int_equal(f->got.bytes[42], 2);
	assert_memory_equal(f->got.bytes + 42 + 16, "\x0a\0\2\x0f", 4); /* yours: 10.0.2.15 */
}

static void test_ipv6_router(void **state)
{
	struct fixture *f = *state;
	uint8_t frame[62] = {0x33, 0x33, 0, 0, 0, 2}, pseudo[48] = {0};
	uint16_t sum;

	open_net(f, "user");
	memcpy(frame + 6, mac, 6);
	memcpy(frame + 12, "\x86\xdd\x60\0\0\0\0\x08\x3a\xff", 10);
	inet_pton(AF_INET6, "fe80::5054:ff:fe01:203", frame + 22);
	inet_pton(AF_INET6, "ff02::2", frame + 38);
	frame[54] = 133; /* router solicitation, RFC 4861, section 4.1 */
	memcpy(pseudo, frame + 22, 32);
	pseudo[35] = 8;
	pseudo[39] = 58;
	memcpy(pseudo + 40, frame + 54, 8);
	sum = checksum(pseudo, sizeof(pseudo));
	memcpy(frame + 56, &sum, 2);
	expect(f, is_router_advertisement);
	net_send(f->net, frame, sizeof(frame));
	assert_true(came(f));
}

/* Frames that are nothing, too short, too long or only claim to be something. */
static void test_odd_frames(void **state)
{
	struct fixture *f = *state;
	static uint8_t frame[70000];
	uint32_t x = 1;

	open_net(f, "user");
	for (unsigned i = 0; i < 20000; i++) {
		size_t length = i % 100 == 0 ? i % 70000 : i % 200;

		for (size_t n = 0; n < min(length, (size_t)200); n++)
			frame[n] = (x = x * 1664525 + 1013904223) >> 24;
		if (length >= 24) {
			memcpy(frame + 12, i % 3 ? "\x08\0" : i % 2 ? "\x86\xdd" : "\x08\6", 2);
			if (i % 3)
				ip_frame(frame, "10.0.2.15", "10.0.2.2", i % 5 ? 17 : 1, length > 34 ? length - 34 : 0);
		}
		net_send(f->net, frame, length);
		if (i % 100 == 0)
			run_for(f, 1);
	}
	expect(f, is_arp_reply);
	send_arp(f, "10.0.2.2");
	assert_true(came(f));
}

/* A datagram to a server on the host's loopback, and its answer; then again after a silence. */
static void test_udp_echo(void **state)
{
	struct fixture *f = *state;
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}, from;
	scope_fd int fd = socket(AF_INET, SOCK_DGRAM, 0);
	socklen_t length = sizeof(in);
	uint8_t frame[100];
	char text[32];

	bind(fd, (struct sockaddr *)&in, sizeof(in));
	getsockname(fd, (struct sockaddr *)&in, &length);
	open_net(f, "user");
	expect(f, is_arp_reply);
	send_arp(f, "10.0.2.2");
	assert_true(came(f));
	for (unsigned i = 0; i < 2; i++) {
		net_send(f->net, frame,
			udp_frame(frame, "10.0.2.15", 5000, "10.0.2.2", ntohs(in.sin_port), "question", 9));
		run_for(f, 50);
		length = sizeof(from);
		assert_int_equal(recvfrom(fd, text, sizeof(text), MSG_DONTWAIT, (struct sockaddr *)&from, &length), 9);
		expect(f, is_udp);
		sendto(fd, "answer", 7, 0, (struct sockaddr *)&from, length);
		assert_true(came(f));
		assert_string_equal((char *)f->got.bytes + 42, "answer");
		run_for(f, 1500);
	}
}

/* A guest without room: frames are kept in order up to a bound, and offered again. */
static void test_backlog(void **state)
{
	struct fixture *f = *state;

	open_net(f, "user");
	expect(f, is_arp_reply);
	send_arp(f, "10.0.2.2");
	assert_true(came(f));
	f->full = true;
	for (unsigned i = 0; i < 1000; i++)
		send_arp(f, "10.0.2.2");
	run_for(f, 50);
	f->frames = 0;
	f->full = false;
	net_room(f->net);
	run_for(f, 50);
	assert_true(f->frames >= 1000);
}

/* An idle guest must cost nothing. */
static void test_idle(void **state)
{
	struct fixture *f = *state;
	struct rusage before, after;

	open_net(f, "user");
	run_for(f, 300);
	getrusage(RUSAGE_SELF, &before);
	run_for(f, 2500);
	getrusage(RUSAGE_SELF, &after);
	assert_true(after.ru_nvcsw - before.ru_nvcsw < 5);
}

/* ---- tap ---- */

static bool is_ours(const uint8_t *frame, size_t length)
{
	const size_t header = sizeof(struct net_header);

	return length >= header + 14 && frame[header + 12] == 0x88 && frame[header + 13] == 0xb5;
}

static void test_tap(void **state)
{
	struct fixture *f = *state;
	struct net *second = NULL;
	uint8_t frame[100] = {1, 2, 3, [12] = 0x88, 0xb5}, got[2000], sent[sizeof(struct net_header) + sizeof(frame)] = {0};
	ssize_t n = 0;
	int wire;

	if (!netns_create())
		skip();
	netns_enter();
	assert_int_equal(netns_tap("tap7", false, NULL, 1400, NULL), 0);
	wire = netns_packet_socket("tap7");
	open_net(f, "tap=tap7");
	assert_int_equal(net_properties(f->net)->mtu, 1400);
	assert_true(net_properties(f->net)->large_frames && net_properties(f->net)->headers);
	assert_int_equal(net_queues(f->net), 1);
	assert_int_equal(net_open(&second, "tap=tap7", f->loop, &f->err), -EBUSY);
	assert_non_null(strstr(f->err.text, "tap7 is in use by another program"));
	assert_true(net_open(&second, "tap=lo", f->loop, &f->err) < 0);
	assert_non_null(strstr(f->err.text, "lo is not a tap"));
	netns_leave();

	/* the kernel drops frames until it has noticed the carrier */
	f->full = false;
	for (unsigned i = 0; i < 100; i++) {
		assert_int_equal(send(wire, frame, sizeof(frame), 0), sizeof(frame));
		expect(f, is_ours);
		run_for(f, 20);
		if (f->got.length)
			break;
	}
	assert_int_equal(f->got.length, sizeof(sent));
	run_for(f, 20);
	/* no room: nothing lost, nothing spins */
	f->full = true;
	f->frames = 0;
	for (unsigned i = 0; i < 100; i++)
		assert_int_equal(send(wire, frame, sizeof(frame), 0), sizeof(frame));
	run_for(f, 50);
	assert_int_equal(f->frames, 0);
	f->full = false;
	net_room(f->net);
	run_for(f, 50);
	assert_true(f->frames >= 100);
	/* and out */
	while (recv(wire, got, sizeof(got), 0) > 0)
		;
	memcpy(sent + sizeof(struct net_header), frame, sizeof(frame));
	net_send(f->net, sent, sizeof(sent));
	for (unsigned i = 0; i < 1000 && (n = recv(wire, got, sizeof(got), 0)) < 0; i++)
		usleep(1000);
	assert_int_equal(n, sizeof(frame));
	close(wire);
	netns_destroy();
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
		TEST(test_bad_specifications),
		TEST(test_ports_in_use),
		TEST(test_arp_and_ping),
		TEST(test_dhcp),
		TEST(test_ipv6_router),
		TEST(test_odd_frames),
		TEST(test_udp_echo),
		TEST(test_backlog),
		TEST(test_idle),
		TEST(test_tap),
	};

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
