/* Back ends of the serial port; see console.h. Opening of files and sockets is in console_open.c. */
#include "vmm/console.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "vmm/console_open.h"
#include "vmm/console_output.h"
#include "vmm/console_tap.h"
#include "vmm/terminal.h"

#define INPUT_SIZE 4096u

struct console {
	enum vmm_serial kind;
	struct console_port port;
	struct loop *loop;
	void (*leave)(void *opaque);
	void *leave_opaque;

	struct console_output *output; /* NULL: none */
	int file;		       /* of VMM_SERIAL_FILE */

	/* input; on the loop */
	int source; /* -1: none */
	bool watched, pollable, terminal;
	struct terminal_filter filter;
	uint8_t input[INPUT_SIZE];
	size_t input_at, input_end;
	atomic_bool pump_posted;

	struct console_socket socket;

	pthread_mutex_t taps_lock;
	struct console_tap *taps;
	bool typing_refused; /* some tap waits for room; on the loop */
};

/* ---- output: from the serial port ---- */

/* On the loop's thread or a vCPU's. */
static size_t port_output(void *opaque, const uint8_t *bytes, size_t n)
{
	struct console *c = opaque;
	size_t taken = c->output ? console_output_put(c->output, bytes, n, false) : n;
	scope_lock(&c->taps_lock);

	for (struct console_tap *tap = c->taps; tap; tap = tap->next)
		console_tap_put(tap, bytes, taken);
	return taken;
}

/* On the thread of a vCPU that cannot go on. */
static void port_wait(void *opaque)
{
	struct console *c = opaque;

	if (c->output)
		console_output_wait(c->output);
}

/* On the loop's thread: what the port kept may come now. */
static void output_has_room(void *opaque)
{
	struct console *c = opaque;

	c->port.flush(c->port.port);
}

void console_release(struct console *c)
{
	if (c->output)
		console_output_release(c->output);
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
			console_output_put(c->output, (const uint8_t *)terminal_help, strlen(terminal_help), true);
		}
	}
	return true;
}

static void tell_taps(struct console *c)
{
	scope_lock(&c->taps_lock);

	for (struct console_tap *tap = c->taps; tap; tap = tap->next)
		console_tap_tell(tap);
}

/* Gives the guest what it takes, reads on when it took all, and asks for more only then. */
static void pump(void *opaque)
{
	struct console *c = opaque;

	atomic_store(&c->pump_posted, false);
	for (;;) {
		if (c->input_at < c->input_end)
			c->input_at += c->port.input(
				c->port.port, c->input + c->input_at, c->input_end - c->input_at);
		if (c->input_at < c->input_end || c->source < 0 || c->pollable)
			break;
		if (!read_source(c)) /* a plain file is always ready */
			break;
	}
	if (c->typing_refused && c->input_end - c->input_at < INPUT_SIZE) {
		c->typing_refused = false;
		tell_taps(c);
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

void console_add_tap(struct console *c, struct console_tap *tap)
{
	scope_lock(&c->taps_lock);

	tap->next = c->taps;
	c->taps = tap;
}

void console_remove_tap(struct console *c, struct console_tap *tap)
{
	scope_lock(&c->taps_lock);

	for (struct console_tap **at = &c->taps; *at; at = &(*at)->next) {
		if (*at == tap) {
			*at = tap->next;
			return;
		}
	}
}

size_t console_type(struct console *c, const uint8_t *bytes, size_t n)
{
	size_t wanted = n;

	if (c->input_at) {
		memmove(c->input, c->input + c->input_at, c->input_end - c->input_at);
		c->input_end -= c->input_at;
		c->input_at = 0;
	}
	n = min(n, INPUT_SIZE - c->input_end);
	memcpy(c->input + c->input_end, bytes, n);
	c->input_end += n;
	pump(c);
	if (n < wanted)
		c->typing_refused = true;
	return n;
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
		console_output_set_sink(c->output, -1);
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
	console_output_set_sink(c->output, c->source);
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
	console_output_set_sink(c->output, STDOUT_FILENO);
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
	char option[40];
	int result;

	switch (c->kind) {
	case VMM_SERIAL_STDIO:
		return open_stdio(c, err);
	case VMM_SERIAL_FILE:
		result = console_open_file(&c->file, path, err);
		if (result == 0)
			console_output_set_sink(c->output, c->file);
		return result;
	case VMM_SERIAL_SOCKET:
		snprintf(option, sizeof(option), "%s socket=", c->port.option);
		result = console_listen(&c->socket, option, path, err);
		return result < 0 ? result : loop_add_fd(c->loop, c->socket.fd, EPOLLIN, client_arrived, c, err);
	case VMM_SERIAL_NONE:
		break;
	}
	return 0;
}

int console_create_on(struct console **console, enum vmm_serial kind, const char *path, struct console_port port,
	struct loop *loop, struct threads *threads, void (*leave)(void *opaque), void *opaque, struct error *err)
{
	struct console *c = calloc(1, sizeof(*c));
	int result = 0;

	if (!c)
		return error_errno(err, "serial console");
	c->kind = kind;
	c->port = port;
	c->loop = loop;
	c->leave = leave;
	c->leave_opaque = opaque;
	c->file = c->source = c->socket.fd = -1;
	pthread_mutex_init(&c->taps_lock, NULL);
	if (kind != VMM_SERIAL_NONE)
		result = console_output_create(
			&c->output, kind == VMM_SERIAL_SOCKET, loop, threads, output_has_room, c, err);
	if (result == 0)
		result = open_back_end(c, path, err);
	if (result < 0) {
		console_destroy(c);
		return result;
	}
	port.set_output(port.port, port_output, port_wait, c);
	port.set_room(port.port, console_room, c);
	*console = c;
	return 0;
}

static void serial_port_set_output(void *port, size_t (*output)(void *opaque, const uint8_t *bytes, size_t n),
	void (*wait)(void *opaque), void *opaque)
{
	serial_set_output(port, output, wait, opaque);
}

static void serial_port_set_room(void *port, void (*room)(void *opaque), void *opaque)
{
	serial_set_room(port, room, opaque);
}

static size_t serial_port_input(void *port, const uint8_t *bytes, size_t n)
{
	return serial_input(port, bytes, n);
}

static void serial_port_flush(void *port)
{
	serial_flush(port);
}

int console_create(struct console **console, enum vmm_serial kind, const char *path, struct serial *serial,
	struct loop *loop, struct threads *threads, void (*leave)(void *opaque), void *opaque, struct error *err)
{
	const struct console_port port = {.port = serial,
		.option = "--serial",
		.set_output = serial_port_set_output,
		.set_room = serial_port_set_room,
		.input = serial_port_input,
		.flush = serial_port_flush};

	return console_create_on(console, kind, path, port, loop, threads, leave, opaque, err);
}

void console_destroy(struct console *c)
{
	if (!c)
		return;
	/* First, so that the last words reach their reader. A write that hangs does so on a descriptor that is not ours
	 * to close or that the end of the process closes: a client's writes end by themselves. */
	if (c->output && !console_output_destroy(c->output))
		c->file = -1;
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
	cleanup_close(&c->file);
	pthread_mutex_destroy(&c->taps_lock);
	free(c);
}
