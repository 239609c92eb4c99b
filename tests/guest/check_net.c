/* TCP to a server on the host, which the harness runs: net ADDRESS PORT BYTES. First the guest sends BYTES bytes and reads
 * back their CRC-32 (8 hexadecimal digits); then it asks for as many, and says which CRC-32 it computed. */
#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
/* after the headers it wants */
#include <linux/vm_sockets.h>

#include "check.h"

static uint32_t table[8][256];

static void crc_init(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;

		for (int k = 0; k < 8; k++)
			c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
		table[0][i] = c;
	}
	for (int t = 1; t < 8; t++)
		for (uint32_t i = 0; i < 256; i++)
			table[t][i] = table[t - 1][i] >> 8 ^ table[0][table[t - 1][i] & 255];
}

/* CRC-32 as zlib computes it, eight bytes a step. */
static uint32_t crc_update(uint32_t crc, const unsigned char *p, size_t length)
{
	crc = ~crc;
	for (; length >= 8; length -= 8, p += 8) {
		uint64_t v;

		memcpy(&v, p, 8);
		v ^= crc;
		crc = 0;
		for (int i = 0; i < 8; i++)
			crc ^= table[7 - i][v >> (8 * i) & 255];
	}
	for (; length; length--, p++)
		crc = crc >> 8 ^ table[0][(crc ^ *p) & 255];
	return ~crc;
}

/* The host, whatever its address, when that is "vsock". */
static int open_vsock(const char *port)
{
	struct sockaddr_vm to = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = (unsigned)atoi(port)};
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

static int open_connection(const char *address, const char *port)
{
	if (!strcmp(address, "vsock"))
		return open_vsock(port);

	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	inet_pton(AF_INET, address, &to.sin_addr);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

static int send_all(int fd, const void *data, size_t length)
{
	for (const char *p = data; length;) {
		ssize_t n = write(fd, p, length);

		if (n <= 0)
			return -1;
		p += n;
		length -= (size_t)n;
	}
	return 0;
}

int check_net(int argc, char **argv)
{
	static unsigned char chunk[65536];
	uint64_t state = 0xfeedfacecafef00dull, bytes;
	double start, up, down;
	char text[64] = {0};
	uint32_t crc = 0;
	int fd;

	if (argc != 4)
		FAIL("usage: net ADDRESS PORT BYTES");
	bytes = strtoull(argv[3], NULL, 0);
	crc_init();

	start = clock_seconds(CLOCK_MONOTONIC);
	fd = open_connection(argv[1], argv[2]);
	if (fd < 0)
		FAIL("connecting to %s port %s: %s", argv[1], argv[2], strerror(errno));
	snprintf(text, sizeof(text), "UP %llu\n", (unsigned long long)bytes);
	send_all(fd, text, strlen(text));
	for (uint64_t left = bytes; left;) {
		size_t n = left < sizeof(chunk) ? left : sizeof(chunk);

		for (size_t i = 0; i < n / 8; i++)
			((uint64_t *)chunk)[i] = next_random(&state);
		crc = crc_update(crc, chunk, n);
		if (send_all(fd, chunk, n) < 0)
			FAIL("sending, %llu bytes left: %s", (unsigned long long)left, strerror(errno));
		left -= n;
	}
	memset(text, 0, sizeof(text));
	for (size_t n = 0; n < 9;) {
		ssize_t got = read(fd, text + n, 9 - n);

		if (got <= 0)
			FAIL("no answer to the upload: %s", got ? strerror(errno) : "closed");
		n += (size_t)got;
	}
	close(fd);
	up = clock_seconds(CLOCK_MONOTONIC) - start;
	if (strtoul(text, NULL, 16) != crc)
		FAIL("upload: the host computed %.8s instead of %08x", text, crc);

	start = clock_seconds(CLOCK_MONOTONIC);
	fd = open_connection(argv[1], argv[2]);
	if (fd < 0)
		FAIL("second connection: %s", strerror(errno));
	snprintf(text, sizeof(text), "DOWN %llu\n", (unsigned long long)bytes);
	send_all(fd, text, strlen(text));
	crc = 0;
	for (uint64_t left = bytes; left;) {
		ssize_t n = read(fd, chunk, left < sizeof(chunk) ? left : sizeof(chunk));

		if (n <= 0)
			FAIL("receiving, %llu bytes left: %s", (unsigned long long)left, n ? strerror(errno) : "closed");
		crc = crc_update(crc, chunk, (size_t)n);
		left -= (uint64_t)n;
	}
	snprintf(text, sizeof(text), "%08x\n", crc);
	send_all(fd, text, strlen(text));
	/* The server closes without a word if it agrees, and says what it expected if not. */
	memset(text, 0, sizeof(text));
	if (read(fd, text, sizeof(text) - 1) > 0)
		FAIL("download: computed %08x, the host %.8s", crc, text);
	close(fd);
	down = clock_seconds(CLOCK_MONOTONIC) - start;
	printf("%llu bytes up %.1f MB/s, down %.1f MB/s, CRC-32 equal\n", (unsigned long long)bytes, (double)bytes / up / 1e6,
	       (double)bytes / down / 1e6);
	return 0;
}
