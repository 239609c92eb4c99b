/* Fuzzer of the virtqueue parser and of the devices behind it. The input is guest memory with its rings in it, after a
 * short header that says which device, which features, and what accesses to the device's registers the guest makes once
 * the queues run. The net device has a back end that answers every frame; the disk is a real raw one in memory; vsock has
 * a program that listens at port 1 and one that connects to port 3.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "../tests/unit/virtio/driver.h"
#include "base/util.h"
#include "device/blk.h"
#include "disk/disk.h"
#include "machine/pci.h"
#include "net/net.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

#define MEMORY (1u << 20)
#define DISK_SIZE (256u << 10)
enum { BLK, NET, RNG, BALLOON, VSOCK, CONSOLE, DEVICES }; /* at slots 1 and up */
#define RINGS 0x100u /* queue i: descriptors here times i, the available ring 0x80 behind them */
#define USED 0x4000u

static struct board board;
static struct disk *disk;
static struct virtio_device *devices[DEVICES];
static const unsigned queue_counts[DEVICES] = {1, 2, 1, 5, 3, 2};
static char vsock_path[64];
static int vsock_listener, vsock_server; /* of the device, and of a program on the host */
static int vsock_ends[4] = {-1, -1, -1, -1};
static struct driver drivers[DEVICES];

static void must(bool holds, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "%s\n", what);
	abort();
}

/* ---- a back end without a network ---- */

struct net {
	net_receive_function *receive;
	void *opaque;
	bool room;
	unsigned answers; /* left in this run */
};

static struct net back_end;

void net_set_receiver(struct net *net, net_receive_function *receive, void *opaque)
{
	net->receive = receive;
	net->opaque = opaque;
}

void net_send(struct net *net, const uint8_t *frame, size_t length)
{
	uint8_t last = frame[length - 1]; /* all of it can be read */

	must(length >= NET_FRAME_MIN && length <= NET_FRAME_MAX, "a frame of impossible length");
	if (net->receive && net->answers && net->answers--)
		net->receive(net->opaque, frame, last > 200 ? length : min(length, (size_t)last + 1));
}

void net_room(struct net *net)
{
	net->room = true;
}

const struct net_properties *net_properties(const struct net *net)
{
	static const struct net_properties properties = {
		.mtu = 1500, .large_frames = true, .large_frames6 = true, .checksums_valid = true};

	return &properties;
}

unsigned net_queues(const struct net *net)
{
	return 1;
}

struct net *net_queue(struct net *net, unsigned index)
{
	return net;
}

void net_use_queues(struct net *net, unsigned queues)
{
}

void net_set_offloads(struct net *net, struct net_offloads offloads)
{
}

/* ---- the machine, made once ---- */

/* A socket at the device's path and what is behind it: one that listens, or one that has connected. */
static int vsock_socket(const char *behind, bool connects)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);

	snprintf(a.sun_path, sizeof(a.sun_path), "%s%s", vsock_path, behind);
	if (connects) {
		if (connect(fd, (struct sockaddr *)&a, sizeof(a)) == 0)
			return fd;
		close(fd);
		return -1;
	}
	must(bind(fd, (struct sockaddr *)&a, sizeof(a)) == 0 && listen(fd, 64) == 0, "vsock's socket");
	return fd;
}

static void remove_sockets(void)
{
	char command[100];

	snprintf(command, sizeof(command), "rm -r %.*s", (int)strlen(vsock_path) - 2, vsock_path);
	if (system(command) != 0)
		perror(command);
}

static void set_up_vsock(void)
{
	strcpy(vsock_path, "/tmp/hostel-fuzz-XXXXXX");
	must(mkdtemp(vsock_path), "folder");
	strcat(vsock_path, "/v");
	atexit(remove_sockets);
	signal(SIGPIPE, SIG_IGN);
	vsock_listener = vsock_socket("", false);
	vsock_server = vsock_socket("_1", false);
}

static void set_up(void)
{
	struct virtio_blk_options blk = {.queues = 1, .serial = "fuzz"};
	struct virtio_net_options net = {.mac = {2}};
	struct disk_options raw = {.format = DISK_RAW};
	struct error err = {0};
	int fd = memfd_create("fuzz-disk", 0);
	char path[64];

	must(fd >= 0 && ftruncate(fd, DISK_SIZE) == 0 && board_of_test_create(&board, MEMORY) == 0, "set-up");
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	set_up_vsock();
	struct virtio_vsock_options vsock = {.cid = 3, .listener = vsock_listener, .path = vsock_path};
	struct virtio_balloon_options balloon = {.target = 4096};

	must(disk_open(&disk, path, &raw, &err) == 0 && virtio_blk_create(&devices[0], &board, disk, &blk, &err) == 0 &&
			virtio_net_create(&devices[1], &board, &back_end, &net, &err) == 0 &&
			virtio_rng_create(&devices[2], &board, &err) == 0 &&
			virtio_balloon_create(&devices[3], &board, &balloon, &err) == 0 &&
			virtio_vsock_create(&devices[4], &board, &vsock, &err) == 0 &&
			virtio_console_create(&devices[5], &board, &err) == 0,
		err.text);
	close(fd);
	for (unsigned i = 0; i < DEVICES; i++)
		must(driver_find(&drivers[i], &board, 1 + i), "no device");
}

static void stop_loop(void *opaque)
{
	loop_stop(board.loop);
}

/* The programs at the host's end of vsock take what connects, say something and go after a while. */
static void serve_vsock(void)
{
	static unsigned turn;
	int fd;

	while ((fd = accept4(vsock_server, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
		if (write(fd, "hello, guest", 12) < 0) /* it may be gone already */
			turn++;
		close(vsock_ends[turn % 4]);
		vsock_ends[turn++ % 4] = fd;
	}
	if (turn % 3 == 0) {
		fd = vsock_socket("", true);
		if (fd >= 0 && write(fd, "CONNECT 3\nfirst words", 21) == 21) {
			close(vsock_ends[turn % 4]);
			vsock_ends[turn % 4] = fd;
		}
	}
	turn++;
}

/* Lets all that has been asked for happen. */
static void serve(unsigned which)
{
	struct virtio_balloon_state state;

	if (which == BLK)
		virtio_blk_serve(devices[BLK], 0);
	if (which == VSOCK)
		serve_vsock();
	if (which == BALLOON)
		virtio_balloon_get(devices[BALLOON], &state);
	if (which == CONSOLE)
		virtio_console_input(devices[CONSOLE], (const uint8_t *)"typed", 5);
	loop_post(board.loop, stop_loop, NULL);
	loop_run(board.loop); /* what is due runs before the stop */
	if (back_end.room && back_end.receive)
		back_end.receive(back_end.opaque, (const uint8_t[64]){0}, 64);
	back_end.room = false;
}

/* ---- one guest ---- */

struct header {
	uint8_t device;
	uint8_t features; /* bit 0: event index, 1: indirect, 2: the device's own, 3: MSI-X */
	uint8_t log_size; /* of the rings: 1 to 8 entries */
	uint8_t steps;
};

struct step {
	uint8_t what;
	uint8_t log_size;
	uint16_t offset;
	uint32_t value;
};

static void start_queues(struct driver *d, const struct header *h, unsigned queues)
{
	for (unsigned i = 0; i < queues; i++) {
		uint64_t rings[3] = {RINGS * i, RINGS * i + 0x80, USED + 0x100 * i};

		driver_write(d, d->common + 0x16, 2, i);
		driver_write(d, d->common + 0x18, 2, 1u << (h->log_size & 3));
		driver_write(d, d->common + 0x1a, 2, h->features & 8 ? 1 + i : VIRTIO_NO_VECTOR);
		for (unsigned r = 0; r < 3; r++)
			driver_write(d, d->common + 0x20 + 8 * r, 8, rings[r]);
		driver_write(d, d->common + 0x1c, 2, 1);
	}
	driver_ok(d);
	for (unsigned i = 0; i < queues; i++)
		driver_write(d, d->notify + i * d->notify_multiplier, 2, i);
}

static void do_step(struct driver *d, const struct step *s)
{
	unsigned size = 1u << (s->log_size & 3), offset = s->offset & 0x3fff;

	switch (s->what % 5) {
	case 0:
		driver_write(d, d->common + offset, size, s->value);
		break;
	case 1:
		driver_read(d, d->common + offset, size);
		break;
	case 2: /* the fields that matter most, more often than by chance */
		driver_write(d, d->common + offset % 0x40, 1u << (s->log_size % 3), s->value);
		break;
	case 3:
		pci_config_write(board.pci, d->slot, 0, d->window + 4 + offset % 16, min(size, 4u), s->value);
		pci_config_read(board.pci, d->slot, 0, d->window + offset % 24, min(size, 4u));
		break;
	case 4: /* the guest adds to its ring and notifies */
		driver_write(d, d->notify + offset % 5 * d->notify_multiplier, 2, 0);
		memory_write(&board.memory, RINGS * (offset % 5) + 0x82, &s->value, 2);
		driver_write(d, d->notify + offset % 5 * d->notify_multiplier, 2, 0);
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
	static bool ready;
	struct header h;
	struct step s;
	unsigned which, queues;

	if (!ready)
		set_up();
	ready = true;
	if (n < sizeof(h))
		return 0;
	memcpy(&h, bytes, sizeof(h));
	bytes += sizeof(h);
	n -= sizeof(h);
	h.steps = min((size_t)(h.steps & 15), n / sizeof(s));
	which = h.device % DEVICES;
	queues = queue_counts[which];

	struct driver *d = &drivers[which];
	const uint8_t *steps = bytes;

	bytes += h.steps * sizeof(s);
	n -= h.steps * sizeof(s);
	memset(memory_for_write(&board.memory, 0, MEMORY), 0, MEMORY);
	memory_write(&board.memory, 0, bytes, min(n, (size_t)MEMORY));
	back_end.answers = 20;
	must(driver_negotiate(d, VIRTIO_F_VERSION_1 | (h.features & 1 ? VIRTIO_F_EVENT_IDX : 0) |
					 (h.features & 2 ? VIRTIO_F_INDIRECT_DESC : 0) |
					 (h.features & 4 ? 0xffffff : 0)),
		"the features offered are refused");
	if (h.features & 8)
		driver_msix(d, 1 + queues);
	start_queues(d, &h, queues);
	serve(which);
	for (unsigned i = 0; i < h.steps; i++) {
		memcpy(&s, steps + i * sizeof(s), sizeof(s));
		do_step(d, &s);
		serve(which);
	}
	if (which == 1 && back_end.receive)
		back_end.receive(back_end.opaque, (const uint8_t[1514]){0}, 1514);
	/* A reset always works, and leaves nothing behind. */
	pci_config_write(board.pci, d->slot, 0, 4, 2, 6);
	driver_write(d, d->common + 0x14, 1, 0);
	must(driver_status(d) == 0, "a reset that does not reset");
	return 0;
}
