/* A tap device (Linux, Documentation/networking/tuntap.rst), which must exist: making and bridging it is the
 * administrator's or hosteld's. One frame a read or write, no virtio header. */
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
	size_t kept; /* length of a frame in `frame` that the guest had no room for; 0: none */
	uint8_t frame[NET_FRAME_MAX];
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

static const struct net_ops tap_ops = {.close = tap_close, .send = tap_send, .room = tap_room};

static int attach(int fd, const char *name, struct error *err)
{
	struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};

	/* TUNSETIFF would make a device that does not exist, with nobody at its other end. */
	if (if_nametoindex(name) == 0)
		return error_set(err, ENODEV, "tap %s does not exist: create it with: ip tuntap add dev %s mode tap",
			name, name);
	memcpy(request.ifr_name, name, strlen(name));
	if (ioctl(fd, TUNSETIFF, &request) == 0)
		return 0;
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
			"%s is not a tap (or is one with multi_queue): create one with: ip tuntap add dev NAME mode "
			"tap",
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

static int set_up(struct tap *tap, const char *name, struct error *err)
{
	int ret;

	if (!*name || strlen(name) >= IFNAMSIZ || strpbrk(name, "/ ,"))
		return error_set(err, EINVAL, "tap name \"%s\": must have 1 to %d characters, no slash, space or comma",
			name, IFNAMSIZ - 1);
	tap->fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (tap->fd < 0)
		return error_errno(err,
			"tap %s: opening /dev/net/tun (is the tun module loaded, and may this user open it?)", name);
	ret = attach(tap->fd, name, err);
	if (ret < 0)
		return ret;
	tap->net.properties.mtu = device_mtu(name);
	return loop_add_fd(tap->net.loop, tap->fd, EPOLLIN, tap_readable, tap, err);
}

int net_tap_open(struct net **net, const char *name, struct loop *loop, struct error *err)
{
	struct tap *tap = calloc(1, sizeof(*tap));
	int ret;

	if (!tap)
		return error_set(err, ENOMEM, "tap %s: no memory", name);
	tap->net.ops = &tap_ops;
	tap->net.loop = loop;
	tap->fd = -1;
	ret = set_up(tap, name, err);
	if (ret < 0) {
		tap_close(&tap->net);
		return ret;
	}
	*net = &tap->net;
	return 0;
}
