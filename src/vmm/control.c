/* The control socket: clients, their lines and answers, and events; see control.h. What a client asks is answered
 * before its next line is looked at. Nothing here blocks: what a client does not read waits in a buffer, up to a limit.
 */
#include "vmm/control_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "vmm/console.h"

#define READ_BYTES 4096u

static void serve(struct control_client *client);

/* ---- coming and going ---- */

static void close_client(struct control_client *c)
{
	if (c->attached) {
		console_remove_tap(c->control->vm->console, &c->tap);
		console_tap_release(&c->tap);
	}
	loop_timer_cancel(c->control->vm->loop, &c->wait_timer);
	loop_remove_fd(c->control->vm->loop, c->fd);
	close(c->fd);
	json_decref(c->wait_id);
	free(c->wait_snapshots);
	free(c->input);
	free(c->output);
	*c = (struct control_client){.control = c->control, .fd = -1};
}

/* What to wait for now; closes a client that is done. */
static void watch(struct control_client *c)
{
	size_t unread = c->output_end - c->output_at;
	bool lines_wait =
		c->input_used == c->input_room && c->input_room; /* no room: the line at hand is not complete */
	uint32_t events = unread ? EPOLLOUT : 0;

	if ((c->broken || (c->ended && c->wait == WAIT_NOTHING)) && !unread) {
		close_client(c);
		return;
	}
	if (!c->ended && !c->broken && c->wait == WAIT_NOTHING && unread < CONTROL_OUTPUT_SLOW &&
		(!c->attached || !lines_wait))
		events |= EPOLLIN;
	loop_change_fd(c->control->vm->loop, c->fd, events);
}

/* ---- output ---- */

static void flush(struct control_client *c)
{
	while (c->output_at < c->output_end) {
		ssize_t n = send(
			c->fd, c->output + c->output_at, c->output_end - c->output_at, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno != EAGAIN) { /* gone: nobody reads the rest */
			c->broken = true;
			c->output_at = c->output_end;
		}
		if (n <= 0)
			break;
		c->output_at += (size_t)n;
	}
	if (c->output_at == c->output_end)
		c->output_at = c->output_end = 0;
}

static void put(struct control_client *c, const char *bytes, size_t n)
{
	size_t used = c->output_end - c->output_at;

	if (c->broken)
		return;
	if (used + n > CONTROL_OUTPUT_MAX) {
		c->broken = true;
		c->output_at = c->output_end = 0;
		return;
	}
	if (c->output_end + n > c->output_room) {
		size_t room = max(2 * (used + n), (size_t)4096);
		char *grown = malloc(room);

		if (!grown) {
			c->broken = true;
			return;
		}
		if (used)
			memcpy(grown, c->output + c->output_at, used);
		free(c->output);
		c->output = grown;
		c->output_room = room;
		c->output_at = 0;
		c->output_end = used;
	}
	memcpy(c->output + c->output_end, bytes, n);
	c->output_end += n;
}

void control_send(struct control_client *c, json_t *object)
{
	char *text = object ? json_dumps(object, JSON_COMPACT) : NULL;

	json_decref(object);
	if (!text)
		return;
	put(c, text, strlen(text));
	put(c, "\n", 1);
	free(text);
	flush(c);
}

void control_complete(struct control_client *c, json_t *result)
{
	json_t *id = take_ptr(c->wait_id);

	c->wait = WAIT_NOTHING;
	free(take_ptr(c->wait_snapshots));
	loop_timer_cancel(c->control->vm->loop, &c->wait_timer);
	if (id && !json_is_null(id))
		control_send(c, rpc_result(id, result));
	else
		json_decref(result);
	json_decref(id);
	serve(c); /* the lines that have waited */
}

void control_announce(struct control *control, const char *event, json_t *params)
{
	for (unsigned i = 0; i < CONTROL_CLIENTS_MAX; i++) {
		struct control_client *c = &control->client[i];

		if (c->fd < 0 || !c->events || c->attached)
			continue;
		control_send(c, rpc_notification(event, json_incref(params)));
		watch(c);
	}
	json_decref(params);
}

/* ---- requests ---- */

static bool make_room(struct control_client *c)
{
	size_t room = max(2 * c->input_room, (size_t)READ_BYTES);
	char *grown;

	if (c->input_used < c->input_room)
		return true;
	grown = room <= CONTROL_LINE_MAX ? realloc(c->input, room) : NULL;
	if (!grown)
		return false;
	c->input = grown;
	c->input_room = room;
	return true;
}

static void answer_line(struct control_client *c, const char *line, size_t length)
{
	json_t *later = NULL, *answer;

	if (length && line[length - 1] == '\r')
		length--;
	if (!length)
		return;
	answer = rpc_handle(control_methods, c, line, length, &later);
	control_send(c, answer);
	if (later) {
		c->wait_id = later;
		c->wait_until = clock_now() + CONTROL_ANSWER_NS;
		control_look(c);
	}
}

/* Answers the lines that have arrived, one after the other, as long as none has to wait. */
static void serve_lines(struct control_client *c)
{
	size_t at = 0;

	while (c->input && c->wait == WAIT_NOTHING && !c->broken && !c->attached) {
		char *end = memchr(c->input + at, '\n', c->input_used - at);
		size_t length = end ? (size_t)(end - (c->input + at)) : c->input_used - at;
		scope_free char *line = NULL;

		/* The last one need not have an end. */
		if (!end && (!c->ended || !length))
			break;
		line = malloc(length + 1);
		if (!line) {
			c->broken = true;
			break;
		}
		memcpy(line, c->input + at, length);
		at += length + (end != NULL);
		memmove(c->input, c->input + at, c->input_used - at);
		c->input_used -= at;
		at = 0;
		answer_line(c, line, length);
		if (c->fd < 0)
			return;
	}
}

/* The console's part of an attached client: what it has typed. */
static void type(struct control_client *c)
{
	size_t taken;

	if (!c->input_used)
		return;
	taken = console_type(c->control->vm->console, (uint8_t *)c->input, c->input_used);

	memmove(c->input, c->input + taken, c->input_used - taken);
	c->input_used -= taken;
}

static void serve(struct control_client *c)
{
	/* Not twice at once: a request that is completed at once comes here from within. */
	if (c->serving)
		return;
	c->serving = true;
	if (!c->attached)
		serve_lines(c);
	if (c->attached)
		type(c);
	c->serving = false;
	flush(c);
	watch(c);
}

static void readable(struct control_client *c)
{
	ssize_t n;

	if (!make_room(c)) {
		if (!c->attached) {
			control_send(c, rpc_error(NULL, RPC_PARSE, "the line is longer than 65536 bytes"));
			c->broken = true;
		}
		watch(c);
		return;
	}
	n = recv(c->fd, c->input + c->input_used, c->input_room - c->input_used, MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0)
		c->ended = true;
	else
		c->input_used += (size_t)n;
	serve(c);
}

static void client_ready(void *opaque, int fd, uint32_t events)
{
	struct control_client *c = opaque;

	if (events & EPOLLOUT) {
		flush(c);
		/* A console that was held back */
		if (c->attached)
			c->tap.ready(&c->tap);
	}
	if (c->fd >= 0 && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
		readable(c);
	else if (c->fd >= 0)
		watch(c);
}

/* ---- the console ---- */

static void tap_ready(struct console_tap *tap)
{
	struct control_client *c = container_of(tap, struct control_client, tap);
	uint8_t bytes[READ_BYTES];
	size_t n;

	while (!c->broken && c->output_end - c->output_at < CONTROL_OUTPUT_SLOW &&
		(n = console_tap_get(tap, bytes, sizeof(bytes)))) {
		put(c, (char *)bytes, n);
		flush(c);
	}
	if (c->input_used)
		type(c);
	watch(c);
}

void control_attach(struct control_client *c)
{
	if (!console_tap_init(&c->tap, c->control->vm->loop, tap_ready)) {
		c->broken = true;
		return;
	}
	c->attached = true;
	console_add_tap(c->control->vm->console, &c->tap);
}

/* ---- the socket ---- */

static void wait_over(struct loop_timer *timer)
{
	struct control_client *c = container_of(timer, struct control_client, wait_timer);

	if (c->wait != WAIT_NOTHING)
		control_look(c);
}

static void client_arrived(void *opaque, int listener, uint32_t events)
{
	static const char busy[] = "{\"jsonrpc\":\"2.0\",\"error\":{\"code\":-32000,\"message\":\"16 clients are the "
				   "most; leave one\"},\"id\":null}\n";
	struct control *control = opaque;
	scope_fd int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	struct control_client *c = NULL;
	struct error err;

	if (fd < 0)
		return;
	for (unsigned i = 0; i < CONTROL_CLIENTS_MAX && !c; i++)
		if (control->client[i].fd < 0)
			c = &control->client[i];
	if (!c) {
		(void)!send(fd, busy, sizeof(busy) - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
		return;
	}
	if (loop_add_fd(control->vm->loop, fd, EPOLLIN, client_ready, c, &err) < 0)
		return;
	c->wait_timer.function = wait_over;
	c->fd = take_fd(&fd);
}

static void observe(void *opaque, enum vm_event event, const char *detail, const struct error *why)
{
	static const char *const names[] = {[VM_EVENT_STARTED] = "started",
		[VM_EVENT_PAUSED] = "paused",
		[VM_EVENT_RESUMED] = "resumed",
		[VM_EVENT_RESET] = "reset",
		[VM_EVENT_POWER_OFF] = "power-off",
		[VM_EVENT_PANIC] = "panic",
		[VM_EVENT_FAILED] = "failed",
		[VM_EVENT_LEFT] = "quit",
		[VM_EVENT_REMOVED] = "removed",
		[VM_EVENT_REFUSED] = "refused"};
	struct control *control = opaque;
	json_t *params = json_object();

	if (detail)
		json_object_set_new(params, "device", json_string(detail));
	if (why)
		json_object_set_new(params, "message", json_string(why->text));
	control_announce(control, names[event], params);
	/* Somebody may have waited for just that. */
	for (unsigned i = 0; i < CONTROL_CLIENTS_MAX; i++)
		if (control->client[i].fd >= 0 && control->client[i].wait != WAIT_NOTHING)
			control_look(&control->client[i]);
}

int control_create(struct control **out, const char *path, struct vm *vm, struct error *err)
{
	struct control *control = calloc(1, sizeof(*control));
	size_t seed;
	int result;

	if (!control)
		return error_errno(err, "--control %s", path);
	/* Now: jansson's own seed comes from /dev/urandom, which a jail does not have. */
	if (getrandom(&seed, sizeof(seed), 0) == sizeof(seed))
		json_object_seed(seed | 1);
	control->vm = vm;
	control->started = clock_now();
	control->socket.fd = -1;
	for (unsigned i = 0; i < CONTROL_CLIENTS_MAX; i++)
		control->client[i] = (struct control_client){.control = control, .fd = -1};
	result = console_listen(&control->socket, "--control ", path, err);
	if (result == 0)
		result = loop_add_fd(vm->loop, control->socket.fd, EPOLLIN, client_arrived, control, err);
	if (result < 0) {
		control_destroy(control);
		return result;
	}
	vm->observer = observe;
	vm->observer_opaque = control;
	*out = control;
	return 0;
}

void control_destroy(struct control *control)
{
	if (!control)
		return;
	control->vm->observer = NULL;
	for (unsigned i = 0; i < CONTROL_CLIENTS_MAX; i++)
		if (control->client[i].fd >= 0)
			close_client(&control->client[i]);
	if (control->socket.fd >= 0)
		loop_remove_fd(control->vm->loop, control->socket.fd);
	console_unlisten(&control->socket);
	free(control);
}
