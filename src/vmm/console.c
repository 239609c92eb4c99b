/* Back ends of the serial port; see console.h. Opening of files and sockets is in console_open.c. */
#include "vmm/console.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "vmm/console_open.h"
#include "vmm/terminal.h"

#define OUTPUT_SIZE (64u << 10) /* a power of two */
#define WRITE_MOST 4096u	/* at once: a client that stalls then holds little */
#define INPUT_SIZE 4096u
#define FLUSH_SECONDS 2

struct console {
	enum vmm_serial kind;
	struct serial *serial;
	struct loop *loop;
	void (*leave)(void *opaque);
	void *leave_opaque;

	/* output; under lock */
	pthread_mutex_t lock;
	pthread_cond_t filled, drained;
	uint8_t output[OUTPUT_SIZE];
	uint32_t head, tail; /* free-running: head is where the next byte goes, tail the next to be written */
	int file;	     /* of VMM_SERIAL_FILE */
	int sink;	     /* where the writer writes; -1: nobody reads */
	bool writing, released, closing, complained;
	bool refused;	       /* the serial port holds bytes that there was no room for */
	bool abandoned, ended; /* the later of console_destroy() and a writer that hung disposes */
	pthread_t writer;

	/* input; on the loop */
	int source; /* -1: none */
	bool watched, pollable, terminal, running;
	struct terminal_filter filter;
	uint8_t input[INPUT_SIZE];
	size_t input_at, input_end;
	atomic_bool pump_posted;

	struct console_socket socket;
};

/* ---- output ---- */

/* Under the lock: may bytes that nobody has read be lost? When there is no reader, or no time any more. */
static bool lossy(const struct console *c)
{
	return c->sink < 0 || c->released;
}

/* Under the lock. Takes what there is room for; all of it if the oldest bytes may give way. */
static size_t append(struct console *c, const uint8_t *bytes, size_t n, bool drop_oldest)
{
	size_t taken = 0;

	while (taken < n) {
		uint32_t room = OUTPUT_SIZE - (c->head - c->tail), at = c->head % OUTPUT_SIZE;
		uint32_t now = (uint32_t)min((size_t)min(room, OUTPUT_SIZE - at), n - taken);

		if (!room && !drop_oldest)
			break;
		if (!room)
			c->tail += (uint32_t)min(n - taken, (size_t)WRITE_MOST);
		memcpy(c->output + at, bytes + taken, now);
		c->head += now;
		taken += now;
	}
	pthread_cond_signal(&c->filled);
	return taken;
}

/* From the serial port: on the loop's thread or a vCPU's. */
static size_t console_output(void *opaque, const uint8_t *bytes, size_t n)
{
	struct console *c = opaque;
	size_t taken;
	scope_lock(&c->lock);

	taken = append(c, bytes, n, lossy(c));
	c->refused = taken < n;
	return taken;
}

/* From the serial port, on the thread of a vCPU that cannot go on. */
static void console_wait(void *opaque)
{
	struct console *c = opaque;
	scope_lock(&c->lock);

	while (!lossy(c) && c->head - c->tail == OUTPUT_SIZE)
		pthread_cond_wait(&c->drained, &c->lock);
}

static void offer_again(void *opaque)
{
	struct console *c = opaque;

	serial_flush(c->serial);
}

/* Under the lock: there is room, or waiting is over. */
static void drained(struct console *c)
{
	pthread_cond_broadcast(&c->drained);
	if (c->refused)
		loop_post(c->loop, offer_again, c);
	c->refused = false;
}

static ssize_t write_out(struct console *c, int fd, const uint8_t *bytes, size_t n)
{
	if (c->kind == VMM_SERIAL_SOCKET)
		return send(fd, bytes, n, MSG_NOSIGNAL);
	return write(fd, bytes, n);
}

/* Under the lock: the sink takes no more. A socket's client is hung up, which the loop sees; other back ends have only
 * one sink, so that the VM goes on without its console. */
static void sink_failed(struct console *c, int code)
{
	if (c->kind == VMM_SERIAL_SOCKET)
		shutdown(c->sink, SHUT_RDWR);
	else if (!c->complained)
		terminal_say("hostel-vmm: writing the guest's console: %s; what it prints from here on is lost\n",
			strerror(code));
	c->complained = true;
	c->sink = -1;
	drained(c);
}

/* Writes it all, without the lock; 0 or -errno. */
static int write_chunk(struct console *c, int fd, const uint8_t *bytes, size_t n)
{
	while (n) {
		ssize_t done = write_out(c, fd, bytes, n);

		if (done >= 0) {
			bytes += done;
			n -= (size_t)done;
		} else if (errno == EAGAIN && c->kind != VMM_SERIAL_SOCKET) {
			/* Somebody who shares the descriptor has made it non-blocking. */
			poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1);
		} else if (errno != EINTR) {
			return -errno; /* EAGAIN from a socket: its client has not read for SO_SNDTIMEO */
		}
	}
	return 0;
}

static void dispose(struct console *c)
{
	cleanup_close(&c->file);
	pthread_cond_destroy(&c->filled);
	pthread_cond_destroy(&c->drained);
	pthread_mutex_destroy(&c->lock);
	free(c);
}

static void *writer_main(void *opaque)
{
	struct console *c = opaque;
	uint8_t chunk[WRITE_MOST];
	bool abandoned;

	pthread_mutex_lock(&c->lock);
	for (;;) {
		uint32_t at = c->tail % OUTPUT_SIZE;
		uint32_t n = min(min(c->head - c->tail, OUTPUT_SIZE - at), WRITE_MOST);
		int fd = c->sink, result;

		if (!n || fd < 0) {
			if (c->closing)
				break;
			pthread_cond_wait(&c->filled, &c->lock);
			continue;
		}
		memcpy(chunk, c->output + at, n);
		c->tail += n;
		c->writing = true;
		drained(c);
		pthread_mutex_unlock(&c->lock);
		result = write_chunk(c, fd, chunk, n);
		pthread_mutex_lock(&c->lock);
		c->writing = false;
		if (result < 0 && c->sink == fd)
			sink_failed(c, -result);
		pthread_cond_broadcast(&c->drained);
	}
	c->ended = true;
	abandoned = c->abandoned;
	pthread_mutex_unlock(&c->lock);
	if (abandoned)
		dispose(c);
	return NULL;
}

/* The writer uses no more what was the sink until now; the caller may close it. */
static void set_sink(struct console *c, int fd)
{
	scope_lock(&c->lock);

	c->sink = fd;
	drained(c);
	while (c->writing && fd < 0)
		pthread_cond_wait(&c->drained, &c->lock);
	pthread_cond_signal(&c->filled);
}

void console_release(struct console *c)
{
	scope_lock(&c->lock);

	c->released = true;
	drained(c);
}

/* ---- input, on the loop's thread ---- */

static void source_closed(struct console *c);

/* Reads once into the free end of the input buffer; false when there is nothing more to read now. */
static bool read_source(struct console *c)
{
	uint8_t bytes[INPUT_SIZE / 2];
	size_t room, used, produced;
	ssize_t n;

	if (c->input_at) {
		memmove(c->input, c->input + c->input_at, c->input_end - c->input_at);
		c->input_end -= c->input_at;
		c->input_at = 0;
	}
	room = INPUT_SIZE - c->input_end;
	if (!c->terminal && !room)
		return false;
	n = read(c->source, bytes, c->terminal ? sizeof(bytes) : min(room, sizeof(bytes)));
	if (n < 0 && (errno == EINTR || errno == EAGAIN))
		return false;
	if (n <= 0) {
		source_closed(c);
		return false;
	}
	if (!c->terminal) {
		memcpy(c->input + c->input_end, bytes, (size_t)n);
		c->input_end += (size_t)n;
		return true;
	}
	for (size_t at = 0; at < (size_t)n; at += used) {
		uint8_t out[INPUT_SIZE];
		enum terminal_key key = terminal_filter(&c->filter, bytes + at, (size_t)n - at, &used, out, &produced);

		/* What a guest that does not listen leaves no room for is lost, as on a real line. */
		produced = min(produced, INPUT_SIZE - c->input_end);
		memcpy(c->input + c->input_end, out, produced);
		c->input_end += produced;
		if (key == TERMINAL_KEY_LEAVE) {
			c->leave(c->leave_opaque);
		} else if (key == TERMINAL_KEY_HELP) {
			scope_lock(&c->lock);

			append(c, (const uint8_t *)terminal_help, strlen(terminal_help), true);
		}
	}
	return true;
}

/* Gives the guest what it takes, reads on when it took all, and asks for more only then. */
static void pump(void *opaque)
{
	struct console *c = opaque;

	atomic_store(&c->pump_posted, false);
	for (;;) {
		if (c->input_at < c->input_end)
			c->input_at += serial_input(c->serial, c->input + c->input_at, c->input_end - c->input_at);
		if (c->input_at < c->input_end || c->source < 0 || c->pollable)
			break;
		if (!read_source(c)) /* a plain file is always ready */
			break;
	}
	if (c->source >= 0 && c->watched)
		loop_change_fd(c->loop, c->source, c->input_at < c->input_end && !c->terminal ? 0 : EPOLLIN);
}

/* From the serial port: the guest has read. On a vCPU's thread, inside the port's register access: so only a note. */
static void console_room(void *opaque)
{
	struct console *c = opaque;

	if (!atomic_exchange(&c->pump_posted, true))
		loop_post(c->loop, pump, c);
}

static void source_ready(void *opaque, int fd, uint32_t events)
{
	struct console *c = opaque;

	read_source(c);
	pump(c);
}

/* Starts reading c->source. Plain files and /dev/null cannot be watched (epoll says EPERM); they are read on demand. */
static int watch_source(struct console *c, struct error *err)
{
	struct error why = {0};

	if (loop_add_fd(c->loop, c->source, EPOLLIN, source_ready, c, &why) == 0) {
		c->pollable = c->watched = true;
		return 0;
	}
	if (why.code != EPERM) {
		if (err)
			*err = why;
		return -why.code;
	}
	c->pollable = false;
	console_room(c);
	return 0;
}

/* End of input: no end for the guest. A socket's client may be followed by another. */
static void source_closed(struct console *c)
{
	if (c->watched)
		loop_remove_fd(c->loop, c->source);
	c->watched = false;
	if (c->kind == VMM_SERIAL_SOCKET) {
		/* Wakes a writer that waits for this client. */
		shutdown(c->source, SHUT_RDWR);
		set_sink(c, -1);
		close(c->source);
	}
	c->source = -1;
}

static void client_arrived(void *opaque, int listener, uint32_t events)
{
	static const char busy[] = "hostel-vmm: another client has this console; leave that one first\r\n";
	struct console *c = opaque;
	scope_fd int client = console_accept(&c->socket);

	if (client < 0)
		return;
	if (c->source >= 0) {
		(void)!send(client, busy, sizeof(busy) - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
		return;
	}
	c->source = take_fd(&client);
	if (watch_source(c, NULL) < 0) {
		close(take_fd(&c->source));
		return;
	}
	set_sink(c, c->source);
}

/* ---- terminal ---- */

void console_suspend(struct console *c)
{
	if (c->kind == VMM_SERIAL_STDIO)
		terminal_restore();
}

void console_resume(struct console *c)
{
	if (c->kind != VMM_SERIAL_STDIO || !isatty(STDIN_FILENO) || !terminal_raw(STDIN_FILENO))
		return;
	/* In the background nothing was read: reading would have failed, and the keys are somebody else's. */
	if (c->source < 0) {
		c->source = STDIN_FILENO;
		c->terminal = true;
		watch_source(c, NULL);
	}
}

static int open_stdio(struct console *c, struct error *err)
{
	c->sink = STDOUT_FILENO;
	if (isatty(STDIN_FILENO)) {
		console_resume(c);
		if (c->terminal)
			terminal_say("hostel-vmm: Ctrl-A x leaves, Ctrl-A h shows help\n");
		return 0;
	}
	if (fcntl(STDIN_FILENO, F_GETFD) < 0) /* started with standard input closed */
		return 0;
	c->source = STDIN_FILENO;
	return watch_source(c, err);
}

/* ---- life ---- */

static int open_back_end(struct console *c, const char *path, struct error *err)
{
	int result;

	switch (c->kind) {
	case VMM_SERIAL_STDIO:
		return open_stdio(c, err);
	case VMM_SERIAL_FILE:
		result = console_open_file(&c->file, path, err);
		c->sink = c->file;
		return result;
	case VMM_SERIAL_SOCKET:
		result = console_listen(&c->socket, path, err);
		return result < 0 ? result : loop_add_fd(c->loop, c->socket.fd, EPOLLIN, client_arrived, c, err);
	case VMM_SERIAL_NONE:
		break;
	}
	return 0;
}

int console_create(struct console **console, enum vmm_serial kind, const char *path, struct serial *serial,
	struct loop *loop, void (*leave)(void *opaque), void *opaque, struct error *err)
{
	struct console *c = calloc(1, sizeof(*c));
	pthread_condattr_t attributes;
	int result;

	if (!c)
		return error_errno(err, "serial console");
	*c = (struct console){.kind = kind,
		.serial = serial,
		.loop = loop,
		.leave = leave,
		.leave_opaque = opaque,
		.file = -1,
		.sink = -1,
		.source = -1,
		.socket.fd = -1};
	pthread_mutex_init(&c->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&c->filled, &attributes);
	pthread_cond_init(&c->drained, &attributes);
	pthread_condattr_destroy(&attributes);
	if (kind == VMM_SERIAL_NONE) {
		*console = c;
		return 0;
	}

	result = open_back_end(c, path, err);
	if (result == 0) {
		int code = pthread_create(&c->writer, NULL, writer_main, c);

		c->running = code == 0;
		if (code)
			result = error_set(err, code, "starting the console's thread: %s", strerror(code));
	}
	if (result < 0) {
		console_destroy(c);
		return result;
	}
	serial_set_output(serial, console_output, console_wait, c);
	serial_set_room(serial, console_room, c);
	*console = c;
	return 0;
}

/* false: it hangs in a write that nobody takes, and is left to the end of the process. */
static bool stop_writer(struct console *c)
{
	struct timespec deadline;
	bool stuck = false;

	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += FLUSH_SECONDS;
	pthread_mutex_lock(&c->lock);
	c->released = c->closing = true;
	pthread_cond_broadcast(&c->filled);
	while (!stuck && (c->writing || (c->sink >= 0 && c->head != c->tail)))
		stuck = pthread_cond_timedwait(&c->drained, &c->lock, &deadline) == ETIMEDOUT;
	pthread_mutex_unlock(&c->lock);
	if (stuck)
		pthread_detach(c->writer);
	else
		pthread_join(c->writer, NULL);
	return !stuck;
}

void console_destroy(struct console *c)
{
	bool stopped;

	if (!c)
		return;
	stopped = !c->running || stop_writer(c);
	if (c->watched)
		loop_remove_fd(c->loop, c->source);
	if (c->kind == VMM_SERIAL_SOCKET) {
		if (c->source >= 0)
			close(c->source);
		if (c->socket.fd >= 0)
			loop_remove_fd(c->loop, c->socket.fd);
		console_unlisten(&c->socket);
	} else if (c->kind == VMM_SERIAL_STDIO) {
		terminal_restore();
	}
	pthread_mutex_lock(&c->lock);
	c->abandoned = !stopped && !c->ended;
	stopped = !c->abandoned;
	pthread_mutex_unlock(&c->lock);
	if (stopped)
		dispose(c);
}
