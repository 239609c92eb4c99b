/* Opening what the serial console is connected to. */
#pragma once

#include <stdint.h>
#include <sys/stat.h>

#include "base/error.h"

/* A Unix stream socket that listens; fd -1: none. */
struct console_socket {
	int fd;
	const char *path;
	struct stat status; /* of the socket file as we made it: what is removed at the end is ours */
};

/* Appends to the file at path, which is made if it does not exist. */
int console_open_file(int *fd, const char *path, struct error *err);
/* A socket file that nobody listens on any more (its owner was killed) is replaced; one in use is not. option stands in
 * front of the path in messages: "--serial socket=". */
int console_listen(struct console_socket *s, const char *option, const char *path, struct error *err);
/* Removes the file at path if it is a socket on which nobody listens. */
void console_remove_stale(const char *path);
void console_unlisten(struct console_socket *s);
/* The next client, or -1. Its writes fail when it has read nothing for two seconds. */
int console_accept(struct console_socket *s);
