/* Opening what the serial console is connected to; see console_open.h. */
#include "vmm/console_open.h"

#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include "base/cleanup.h"

int console_open_file(int *fd, const char *path, struct error *err)
{
	/* Not truncated: a wrong name costs nobody his file. */
	*fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY, 0644);
	if (*fd < 0)
		return error_errno(err, "--serial file=%s: cannot be opened for writing", path);
	return 0;
}

/* 0 when the file at path is a socket that nobody listens on, and is gone now. */
static int remove_stale(const char *option, const struct sockaddr_un *address, struct error *err)
{
	const char *path = address->sun_path;
	scope_fd int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	struct stat status;

	if (lstat(path, &status) < 0)
		return errno == ENOENT ? 0 : error_errno(err, "%s%s", option, path);
	if (!S_ISSOCK(status.st_mode))
		return error_set(err, EEXIST,
			"%s%s: a file that is no socket is there; remove it or give "
			"another path",
			option, path);
	if (probe < 0)
		return error_errno(err, "%s%s: making a socket", option, path);
	if (connect(probe, (const struct sockaddr *)address, sizeof(*address)) == 0 || errno != ECONNREFUSED)
		return error_set(err, EADDRINUSE,
			"%s%s: another process listens there; end it or give "
			"another path",
			option, path);
	if (unlink(path) < 0 && errno != ENOENT)
		return error_errno(err, "%s%s: removing what a killed process left", option, path);
	return 0;
}

void console_remove_stale(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};

	if (strlen(path) >= sizeof(address.sun_path))
		return;
	strcpy(address.sun_path, path);
	remove_stale("", &address, NULL);
}

int console_listen(struct console_socket *s, const char *option, const char *path, struct error *err)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	scope_fd int fd = -1;
	int bound;

	if (strlen(path) >= sizeof(address.sun_path))
		return error_set(err, ENAMETOOLONG,
			"%s%s: the path has %zu bytes, %zu are the most; give a "
			"shorter one",
			option, path, strlen(path), sizeof(address.sun_path) - 1);
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return error_errno(err, "%s%s: making a socket", option, path);
	/* The file takes over the socket's mode: a console is its owner's alone. */
	fchmod(fd, 0600);
	bound = bind(fd, (struct sockaddr *)&address, sizeof(address));
	if (bound < 0 && errno == EADDRINUSE) {
		int result = remove_stale(option, &address, err);

		if (result < 0)
			return result;
		bound = bind(fd, (struct sockaddr *)&address, sizeof(address));
	}
	if (bound < 0)
		return error_errno(err, "%s%s: cannot be made", option, path);
	s->path = path;
	if (stat(path, &s->status) < 0 || listen(fd, 128) < 0) {
		unlink(path);
		return error_errno(err, "%s%s: cannot listen", option, path);
	}
	s->fd = take_fd(&fd);
	return 0;
}

void console_unlisten(struct console_socket *s)
{
	struct stat now;

	if (s->fd < 0)
		return;
	/* Somebody may have taken the path since: then it is his. */
	if (stat(s->path, &now) == 0 && now.st_dev == s->status.st_dev && now.st_ino == s->status.st_ino)
		unlink(s->path);
	close(take_fd(&s->fd));
}

int console_accept(struct console_socket *s)
{
	const struct timeval most = {.tv_sec = 2};
	int fd = accept4(s->fd, NULL, NULL, SOCK_CLOEXEC);

	if (fd >= 0)
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof(most));
	return fd;
}
