/* A tap device (Linux, Documentation/networking/tuntap.rst), which must exist: making and bridging it is the
 * administrator's or hosteld's. One frame a read or write, with the header of virtio-net in front (IFF_VNET_HDR), so that
 * the host's kernel and the guest leave checksums and segmentation to each other. Several queues are several
 * descriptors of one device. */
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "net/net_internal.h"

#define FRAMES_A_TURN 64 /* then the loop sees to its timers */

struct tap {
	struct net net;
	int fd;
	bool in_use; /* a queue that is not gets no frames */
	size_t kept; /* length of a frame in `frame` that the guest had no room for; 0: none */
	uint8_t frame[sizeof(struct net_header) + NET_FRAME_MAX];
};

static void tap_readable(void *opaque, int fd, uint32_t events)
{
	struct tap *tap = opaque;

	for (unsigned i = 0; i < FRAMES_A_TURN; i++) {
		ssize_t n = read(tap->fd, tap->frame, sizeof(tap->frame));

		if (n <= 0) {
			/* The device was deleted under us: it never comes back. (While it is merely down, EIO or
			 * nothing.) */
			if (n < 0 && errno == EBADFD)
				loop_change_fd(tap->net.loop, tap->fd, 0);
			return;
		}
		if (!net_deliver(&tap->net, tap->frame, n)) {
			/* The kernel's queue holds the rest, and drops what is too much, as any network card does. */
			tap->kept = n;
			loop_change_fd(tap->net.loop, tap->fd, 0);
			return;
		}
	}
}

static void tap_room(struct net *net)
{
	struct tap *tap = container_of(net, struct tap, net);

	if (!tap->kept || !net_deliver(net, tap->frame, tap->kept))
		return;
	tap->kept = 0;
	loop_change_fd(net->loop, tap->fd, EPOLLIN);
}

static void tap_send(struct net *net, const uint8_t *frame, size_t length)
{
	struct tap *tap = container_of(net, struct tap, net);

	/* EAGAIN (its queue is full), EIO (it is down): the frame is lost, as on a wire. */
	if (write(tap->fd, frame, length) < 0)
		return;
}

static void tap_close(struct net *net)
{
	struct tap *tap = container_of(net, struct tap, net);

	if (tap->fd >= 0) {
		loop_remove_fd(net->loop, tap->fd);
		close(tap->fd);
	}
	free(tap);
}

static void tap_set_offloads(struct net *net, struct net_offloads offloads)
{
	struct tap *tap = container_of(net, struct tap, net);
	unsigned flags = offloads.checksum ? TUN_F_CSUM : 0;

	if (offloads.checksum && offloads.tso4)
		flags |= TUN_F_TSO4;
	if (offloads.checksum && offloads.tso6)
		flags |= TUN_F_TSO6;
	/* Of the whole device, whichever queue it is asked of. These have been there since Linux 2.6.27: nothing is
	 * refused. */
	if (ioctl(tap->fd, TUNSETOFFLOAD, flags) < 0)
		return;
}

static void tap_use(struct net *net, bool in_use)
{
	struct tap *tap = container_of(net, struct tap, net);
	struct ifreq request = {.ifr_flags = in_use ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE};

	if (tap->in_use == in_use || ioctl(tap->fd, TUNSETQUEUE, &request) < 0)
		return;
	tap->in_use = in_use;
	tap->kept = 0;
	/* A detached queue reports an error for as long as it is detached. */
	loop_change_fd(net->loop, tap->fd, in_use ? EPOLLIN : 0);
}

static const struct net_ops tap_ops = {
	.close = tap_close, .send = tap_send, .room = tap_room, .set_offloads = tap_set_offloads, .use = tap_use};

static int attach(int fd, const char *name, unsigned queues, struct error *err)
{
	struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
	int header = sizeof(struct net_header), ret;

	/* TUNSETIFF would make a device that does not exist, with nobody at its other end. */
	if (if_nametoindex(name) == 0)
		return error_set(err, ENODEV, "tap %s does not exist: create it with: ip tuntap add dev %s mode tap%s",
			name, name, queues > 1 ? " multi_queue" : "");
	memcpy(request.ifr_name, name, strlen(name));
	if (queues > 1)
		request.ifr_flags |= IFF_MULTI_QUEUE;
	ret = ioctl(fd, TUNSETIFF, &request);
	if (ret < 0 && errno == EINVAL && queues == 1) { /* a device made for several queues serves with one too */
		request.ifr_flags |= IFF_MULTI_QUEUE;
		ret = ioctl(fd, TUNSETIFF, &request);
	}
	if (ret == 0)
		return ioctl(fd, TUNSETVNETHDRSZ, &header) == 0 ? 0 : error_errno(err, "tap %s: TUNSETVNETHDRSZ", name);
	switch (errno) {
	case EBUSY:
		return error_set(
			err, EBUSY, "tap %s is in use by another program: stop that, or give another tap", name);
	case EPERM:
		return error_set(err, EPERM,
			"tap %s belongs to another user: run as root, or create it with: ip tuntap add dev %s mode tap "
			"user NAME",
			name, name);
	case EINVAL:
		return error_set(err, EINVAL,
			queues > 1 ? "%s is not a tap with several queues: create it with: ip tuntap add dev NAME mode "
				     "tap multi_queue"
				   : "%s is not a tap: create one with: ip tuntap add dev NAME mode tap",
			name);
	}
	return error_errno(err, "tap %s", name);
}

static unsigned device_mtu(const char *name)
{
	scope_fd int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq request = {0};

	memcpy(request.ifr_name, name, strlen(name));
	return fd >= 0 && ioctl(fd, SIOCGIFMTU, &request) == 0 ? request.ifr_mtu : 0;
}

/* "NAME[,queues=N]" */
static int parse(const char *options, char name[IFNAMSIZ], unsigned *queues, struct error *err)
{
	size_t length = strcspn(options, ",");
	const char *rest = options + length;

	if (!length || length >= IFNAMSIZ || memchr(options, '/', length) || memchr(options, ' ', length))
		return error_set(err, EINVAL,
			"tap name \"%.*s\": must have 1 to %d characters, no slash, space or comma", (int)length, options,
			IFNAMSIZ - 1);
	memcpy(name, options, length);
	name[length] = '\0';
	*queues = 1;
	if (!*rest)
		return 0;
	if (strncmp(rest, ",queues=", 8) || rest[8] < '1' || rest[8] > '0' + NET_QUEUES_MAX || rest[9])
		return error_set(err, EINVAL, "tap %s: \"%s\" is unknown; give queues=N, 1 to %d", name, rest + 1,
			NET_QUEUES_MAX);
	*queues = rest[8] - '0';
	return 0;
}

int net_tap_check(const char *options, struct error *err)
{
	char name[IFNAMSIZ] = "";
	unsigned queues;

	return parse(options, name, &queues, err);
}

static int open_queue(struct net **net, const char *name, unsigned queues, struct loop *loop, struct error *err)
{
	struct tap *tap = calloc(1, sizeof(*tap));
	int ret;

	if (!tap)
		return error_set(err, ENOMEM, "tap %s: no memory", name);
	*net = &tap->net;
	tap->net.ops = &tap_ops;
	tap->net.loop = loop;
	tap->net.properties = (struct net_properties){.large_frames = true, .large_frames6 = true, .headers = true};
	tap->in_use = true;
	tap->fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (tap->fd < 0)
		return error_errno(err,
			"tap %s: opening /dev/net/tun (is the tun module loaded, and may this user open it?)", name);
	ret = attach(tap->fd, name, queues, err);
	if (ret < 0)
		return ret;
	tap->net.properties.mtu = device_mtu(name);
	return loop_add_fd(loop, tap->fd, EPOLLIN, tap_readable, tap, err);
}

int net_tap_open(struct net **net, const char *options, struct loop *loop, struct error *err)
{
	struct net **last = net;
	char name[IFNAMSIZ];
	unsigned queues = 0;
	int ret = parse(options, name, &queues, err);

	*net = NULL;
	for (unsigned i = 0; i < queues && ret == 0; i++) {
		ret = open_queue(last, name, queues, loop, err);
		if (*last)
			last = &(*last)->next_queue;
	}
	if (ret < 0) {
		net_close(*net);
		*net = NULL;
		return ret;
	}
	net_set_offloads(*net, (struct net_offloads){0});
	net_use_queues(*net, 1);
	return 0;
}
