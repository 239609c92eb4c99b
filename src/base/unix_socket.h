/* A Unix stream socket that listens at a path. */
#pragma once

#include <sys/stat.h>

#include "base/error.h"

struct unix_listener {
	int fd; /* not blocking; -1: none */
	const char *path; /* the caller's */
	struct stat status; /* of the socket file as we made it: what is removed at the end is ours */
};

/* what: for messages, "--vsock". A socket file that nobody listens on any more (its owner was killed) is replaced; one in
 * use is not, nor is anything that is no socket. Its owner alone may connect. */
int unix_listen(struct unix_listener *listener, const char *what, const char *path, int backlog, struct error *err);
/* Closes it and removes its file, if it is still ours. */
void unix_unlisten(struct unix_listener *listener);
