/* See netns.h. */
#include "netns.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static int outside = -1, inside = -1;

static void check(int result, const char *what)
{
	if (result >= 0)
		return;
	perror(what);
	abort();
}

void netns_enter(void)
{
	check(setns(inside, CLONE_NEWNET), "entering the namespace");
}

void netns_leave(void)
{
	check(setns(outside, CLONE_NEWNET), "leaving the namespace");
}

void netns_destroy(void)
{
	close(inside);
	close(outside);
}

static void set_flags(int fd, struct ifreq *r, short flags)
{
	check(ioctl(fd, SIOCGIFFLAGS, r), "SIOCGIFFLAGS");
	r->ifr_flags |= flags;
	check(ioctl(fd, SIOCSIFFLAGS, r), "SIOCSIFFLAGS");
}

bool netns_create(void)
{
	struct ifreq lo = {.ifr_name = "lo"};
	int fd;

	outside = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
	if (outside < 0 || access("/dev/net/tun", W_OK) < 0 || unshare(CLONE_NEWNET) < 0) {
		printf("skipped: no right to make network namespaces and taps\n");
		return false;
	}
	inside = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	set_flags(fd, &lo, IFF_UP);
	close(fd);
	netns_leave();
	return true;
}

int netns_tap(const char *name, bool vnet_header, const char *address, unsigned mtu, const uint8_t *mac)
{
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), s, size = 12;
	struct ifreq r = {.ifr_flags = IFF_TAP | IFF_NO_PI | (vnet_header ? IFF_VNET_HDR : 0)};
	struct sockaddr_in *in = (struct sockaddr_in *)&r.ifr_addr;

	strcpy(r.ifr_name, name);
	check(fd, "/dev/net/tun");
	check(ioctl(fd, TUNSETIFF, &r), "TUNSETIFF");
	if (vnet_header) {
		check(ioctl(fd, TUNSETVNETHDRSZ, &size), "TUNSETVNETHDRSZ");
		check(ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6), "TUNSETOFFLOAD");
	} else {
		check(ioctl(fd, TUNSETPERSIST, 1), "TUNSETPERSIST");
		close(fd);
		fd = 0;
	}
	s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	check(s, "socket");
	if (mac) {
		r.ifr_hwaddr.sa_family = ARPHRD_ETHER;
		memcpy(r.ifr_hwaddr.sa_data, mac, 6);
		check(ioctl(s, SIOCSIFHWADDR, &r), "SIOCSIFHWADDR");
	}
	r.ifr_mtu = mtu;
	check(ioctl(s, SIOCSIFMTU, &r), "SIOCSIFMTU");
	if (address) {
		in->sin_family = AF_INET;
		inet_pton(AF_INET, address, &in->sin_addr);
		check(ioctl(s, SIOCSIFADDR, &r), "SIOCSIFADDR");
		inet_pton(AF_INET, "255.255.255.0", &in->sin_addr);
		check(ioctl(s, SIOCSIFNETMASK, &r), "SIOCSIFNETMASK");
	}
	set_flags(s, &r, IFF_UP);
	close(s);
	return fd;
}

int netns_packet_socket(const char *name)
{
	int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, htons(ETH_P_ALL));
	struct sockaddr_ll address = {
		.sll_family = AF_PACKET,
		.sll_protocol = htons(ETH_P_ALL),
		.sll_ifindex = if_nametoindex(name),
	};

	check(fd, "packet socket");
	check(bind(fd, (struct sockaddr *)&address, sizeof(address)), "binding the packet socket");
	return fd;
}
