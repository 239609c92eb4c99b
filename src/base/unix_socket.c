/* See unix_socket.h. */
#include "base/unix_socket.h"

#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"

/* 0 when the file at the address is a socket that nobody listens on, and is gone now. */
static int remove_stale(const char *what, const struct sockaddr_un *address, struct error *err)
{
	const char *path = address->sun_path;
	scope_fd int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	struct stat status;

	if (lstat(path, &status) < 0)
		return errno == ENOENT ? 0 : error_errno(err, "%s %s", what, path);
	if (!S_ISSOCK(status.st_mode))
		return error_set(err, EEXIST, "%s %s: a file that is no socket is there; remove it or give another path",
			what, path);
	if (probe < 0)
		return error_errno(err, "%s %s: making a socket", what, path);
	if (connect(probe, (const struct sockaddr *)address, sizeof(*address)) == 0 || errno != ECONNREFUSED)
		return error_set(err, EADDRINUSE,
			"%s %s: another process listens there; end it or give another path", what, path);
	if (unlink(path) < 0 && errno != ENOENT)
		return error_errno(err, "%s %s: removing what a killed process left", what, path);
	return 0;
}

int unix_listen(struct unix_listener *listener, const char *what, const char *path, int backlog, struct error *err)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	scope_fd int fd = -1;
	int bound;

	listener->fd = -1;
	if (strlen(path) >= sizeof(address.sun_path))
		return error_set(err, ENAMETOOLONG,
			"%s %s: the path has %zu bytes, %zu are the most; give a shorter one", what, path, strlen(path),
			sizeof(address.sun_path) - 1);
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return error_errno(err, "%s %s: making a socket", what, path);
	/* The file takes over the socket's mode. */
	fchmod(fd, 0600);
	bound = bind(fd, (struct sockaddr *)&address, sizeof(address));
	if (bound < 0 && errno == EADDRINUSE) {
		int result = remove_stale(what, &address, err);

		if (result < 0)
			return result;
		bound = bind(fd, (struct sockaddr *)&address, sizeof(address));
	}
	if (bound < 0)
		return error_errno(err, "%s %s: cannot be made", what, path);
	if (stat(path, &listener->status) < 0 || listen(fd, backlog) < 0) {
		unlink(path);
		return error_errno(err, "%s %s: cannot listen", what, path);
	}
	listener->path = path;
	listener->fd = take_fd(&fd);
	return 0;
}

void unix_unlisten(struct unix_listener *listener)
{
	struct stat now;

	if (listener->fd < 0)
		return;
	/* Somebody may have taken the path since: then it is his. */
	if (stat(listener->path, &now) == 0 && now.st_dev == listener->status.st_dev &&
		now.st_ino == listener->status.st_ino)
		unlink(listener->path);
	close(take_fd(&listener->fd));
}
