/* Streams by vsock: vsock-echo PORT serves connections from the host for ever, each in a process of its own, and sends back
 * what comes until the other side has sent all. */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
/* after the headers it wants */
#include <linux/vm_sockets.h>

#include "check.h"

static void echo(int fd)
{
	static char bytes[65536];
	ssize_t n;

	while ((n = read(fd, bytes, sizeof(bytes))) > 0)
		for (ssize_t sent = 0, part; sent < n; sent += part)
			if ((part = write(fd, bytes + sent, (size_t)(n - sent))) <= 0)
				_exit(1);
	shutdown(fd, SHUT_WR);
	/* The other side closes first, when it has read all. */
	while (read(fd, bytes, sizeof(bytes)) > 0)
		;
	_exit(0);
}

int check_vsock_echo(int argc, char **argv)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY,
		.svm_port = argc > 1 ? (unsigned)atoi(argv[1]) : 7};
	int server = socket(AF_VSOCK, SOCK_STREAM, 0), client;

	signal(SIGCHLD, SIG_IGN);
	if (server < 0 || bind(server, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(server, 128) < 0)
		FAIL("vsock: %s", strerror(errno));
	printf("listening\n");
	fflush(stdout);
	while ((client = accept(server, NULL, NULL)) >= 0) {
		if (fork() == 0) {
			close(server);
			echo(client);
		}
		close(client);
	}
	FAIL("accept: %s", strerror(errno));
}
