/* Reading "user,forward=tcp:ADDR:PORT-:PORT,mtu=N", and opening the forwarded ports. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "net/user.h"

#define MTU_MIN 1280 /* what IPv6 needs (RFC 8200, section 5) */
#define MTU_MAX 65520

/* A decimal number that fills the whole text. */
static bool number(const char *text, unsigned long low, unsigned long high, unsigned long *value)
{
	char *end;

	if (*text < '0' || *text > '9')
		return false;
	errno = 0;
	*value = strtoul(text, &end, 10);
	return !*end && !errno && *value >= low && *value <= high;
}

/* "[ADDR]:PORT"; an empty ADDR leaves the default. text is cut up. */
static bool address_port(char *text, struct in_addr *address, uint16_t *port)
{
	char *colon = strrchr(text, ':');
	unsigned long value;

	if (!colon || !number(colon + 1, 1, 65535, &value))
		return false;
	*colon = 0;
	*port = value;
	return !*text || inet_pton(AF_INET, text, address) == 1;
}

static int parse_forward(struct user_options *o, const char *value, struct error *err)
{
	struct user_forward f = {.host.s_addr = htonl(INADDR_LOOPBACK)};
	scope_free char *copy = strdup(value);
	char *dash = copy ? strchr(copy, '-') : NULL;

	if (o->forwards == USER_FORWARDS_MAX)
		return error_set(err, EINVAL, "net user: more than %d forwards; use a tap instead", USER_FORWARDS_MAX);
	if (dash && (strncmp(copy, "tcp:", 4) == 0 || strncmp(copy, "udp:", 4) == 0)) {
		f.udp = *copy == 'u';
		*dash = 0;
		if (address_port(copy + 4, &f.host, &f.host_port) && address_port(dash + 1, &f.guest, &f.guest_port)) {
			o->forward[o->forwards++] = f;
			return 0;
		}
	}
	return error_set(err, EINVAL,
		"net user: forward=%s: give tcp:ADDR:PORT-:PORT or udp:ADDR:PORT-:PORT, host first, IPv4 addresses, "
		"ports 1 to 65535",
		value);
}

static int parse_option(struct user_options *o, const char *option, struct error *err)
{
	unsigned long value;

	if (strncmp(option, "forward=", 8) == 0)
		return parse_forward(o, option + 8, err);
	if (strncmp(option, "mtu=", 4) == 0) {
		if (!number(option + 4, MTU_MIN, MTU_MAX, &value))
			return error_set(err, EINVAL, "net user: mtu=%s: give %d to %d", option + 4, MTU_MIN, MTU_MAX);
		o->mtu = value;
		return 0;
	}
	return error_set(
		err, EINVAL, "net user: no option \"%s\": there are forward=tcp:ADDR:PORT-:PORT, mtu=N", option);
}

int user_parse(struct user_options *o, const char *options, struct error *err)
{
	scope_free char *copy = strdup(options);
	char *rest = copy, *option;

	if (!copy)
		return error_set(err, ENOMEM, "net user: no memory");
	strsep(&rest, ","); /* the text begins with the comma, or is empty */
	while ((option = strsep(&rest, ","))) {
		int ret = parse_option(o, option, err);

		if (ret < 0)
			return ret;
	}
	return 0;
}

/* libslirp lets sockets share a UDP port; then one of the two programs would silently get nothing. */
static int probe_udp(const struct user_forward *f)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(f->host_port), .sin_addr = f->host};
	scope_fd int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	return fd < 0 ? -1 : bind(fd, (struct sockaddr *)&address, sizeof(address));
}

int user_forward(Slirp *slirp, const struct user_forward *f, struct error *err)
{
	const char *protocol = f->udp ? "udp" : "tcp";
	char host[INET_ADDRSTRLEN];

	errno = 0;
	if ((!f->udp || probe_udp(f) == 0) &&
		slirp_add_hostfwd(slirp, f->udp, f->host, f->host_port, f->guest, f->guest_port) == 0)
		return 0;
	inet_ntop(AF_INET, &f->host, host, sizeof(host));
	switch (errno) {
	case EADDRINUSE:
		return error_set(err, EADDRINUSE,
			"net user: forward: %s port %u on %s is in use by another program: stop that, or give another "
			"port",
			protocol, f->host_port, host);
	case EADDRNOTAVAIL:
		return error_set(err, EADDRNOTAVAIL,
			"net user: forward: %s is not an address of this host: give one that is, or 0.0.0.0 for all",
			host);
	case EACCES:
		return error_set(err, EACCES,
			"net user: forward: %s port %u on %s needs root: give a port from 1024 up", protocol,
			f->host_port, host);
	}
	return error_errno(err, "net user: forward: %s port %u on %s", protocol, f->host_port, host);
}

int net_user_check(const char *options, struct error *err)
{
	struct user_options o = {0};

	return user_parse(&o, options, err);
}
