/* The serial console's way out; see console_output.h. */
#include "vmm/console_output.h"

#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/threads.h"
#include "base/util.h"
#include "vmm/terminal.h"

#define OUTPUT_SIZE (64u << 10) /* a power of two */
#define WRITE_MOST 4096u	/* at once: a client that stalls then holds little */
#define FLUSH_SECONDS 2

struct console_output {
	bool socket;
	struct loop *loop;
	void (*room)(void *opaque);
	void *room_opaque;
	struct thread writer;

	pthread_mutex_t lock; /* the rest */
	pthread_cond_t filled, drained;
	uint8_t bytes[OUTPUT_SIZE];
	uint32_t head, tail; /* free-running: head is where the next byte goes, tail the next to be written */
	int sink;	     /* where the writer writes; -1: nobody reads */
	bool writing, released, closing, complained;
	bool refused;	       /* there are bytes that there was no room for */
	bool abandoned, ended; /* a writer that hung at the end and comes back later disposes */
};

/* Under the lock: may bytes that nobody has read be lost? When there is no reader, or no time any more. */
static bool lossy(const struct console_output *o)
{
	return o->sink < 0 || o->released;
}

/* Under the lock. Takes what there is room for; all of it if the oldest bytes may give way. */
static size_t append(struct console_output *o, const uint8_t *bytes, size_t n, bool drop_oldest)
{
	size_t taken = 0;

	while (taken < n) {
		uint32_t room = OUTPUT_SIZE - (o->head - o->tail), at = o->head % OUTPUT_SIZE;
		uint32_t now = (uint32_t)min((size_t)min(room, OUTPUT_SIZE - at), n - taken);

		if (!room && !drop_oldest)
			break;
		if (!room)
			o->tail += (uint32_t)min(n - taken, (size_t)WRITE_MOST);
		memcpy(o->bytes + at, bytes + taken, now);
		o->head += now;
		taken += now;
	}
	pthread_cond_signal(&o->filled);
	return taken;
}

/* Under the lock: there is room, or waiting is over. */
static void drained(struct console_output *o)
{
	pthread_cond_broadcast(&o->drained);
	if (o->refused)
		loop_post(o->loop, o->room, o->room_opaque);
	o->refused = false;
}

static ssize_t write_out(struct console_output *o, int fd, const uint8_t *bytes, size_t n)
{
	if (o->socket)
		return send(fd, bytes, n, MSG_NOSIGNAL);
	return write(fd, bytes, n);
}

/* Under the lock: the sink takes no more. A socket's client is hung up, which the loop sees; other back ends have only
 * one sink, so that the VM goes on without its console. */
static void sink_failed(struct console_output *o, int code)
{
	if (o->socket)
		shutdown(o->sink, SHUT_RDWR);
	else if (!o->complained)
		terminal_say("hostel-vmm: writing the guest's console: %s; what it prints from here on is lost\n",
			strerror(code));
	o->complained = true;
	o->sink = -1;
	drained(o);
}

/* Writes it all, without the lock; 0 or -errno. */
static int write_chunk(struct console_output *o, int fd, const uint8_t *bytes, size_t n)
{
	while (n) {
		ssize_t done = write_out(o, fd, bytes, n);

		if (done >= 0) {
			bytes += done;
			n -= (size_t)done;
		} else if (errno == EAGAIN && !o->socket) {
			/* Somebody who shares the descriptor has made it non-blocking. */
			poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1);
		} else if (errno != EINTR) {
			return -errno; /* EAGAIN from a socket: its client has not read for SO_SNDTIMEO */
		}
	}
	return 0;
}

static void dispose(struct console_output *o)
{
	pthread_cond_destroy(&o->filled);
	pthread_cond_destroy(&o->drained);
	pthread_mutex_destroy(&o->lock);
	free(o);
}

static void *writer_main(void *opaque)
{
	struct console_output *o = opaque;
	uint8_t chunk[WRITE_MOST];
	bool abandoned;

	pthread_mutex_lock(&o->lock);
	for (;;) {
		uint32_t at = o->tail % OUTPUT_SIZE;
		uint32_t n = min(min(o->head - o->tail, OUTPUT_SIZE - at), WRITE_MOST);
		int fd = o->sink, result;

		if (!n || fd < 0) {
			if (o->closing)
				break;
			pthread_cond_wait(&o->filled, &o->lock);
			continue;
		}
		memcpy(chunk, o->bytes + at, n);
		o->tail += n;
		o->writing = true;
		drained(o);
		pthread_mutex_unlock(&o->lock);
		result = write_chunk(o, fd, chunk, n);
		pthread_mutex_lock(&o->lock);
		o->writing = false;
		if (result < 0 && o->sink == fd)
			sink_failed(o, -result);
		pthread_cond_broadcast(&o->drained);
	}
	o->ended = true;
	abandoned = o->abandoned;
	pthread_mutex_unlock(&o->lock);
	if (abandoned)
		dispose(o);
	return NULL;
}

void console_output_set_sink(struct console_output *o, int fd)
{
	scope_lock(&o->lock);

	o->sink = fd;
	drained(o);
	while (o->writing && fd < 0)
		pthread_cond_wait(&o->drained, &o->lock);
	pthread_cond_signal(&o->filled);
}

size_t console_output_put(struct console_output *o, const uint8_t *bytes, size_t n, bool force)
{
	size_t taken;
	scope_lock(&o->lock);

	taken = append(o, bytes, n, force || lossy(o));
	o->refused = o->refused || taken < n;
	return taken;
}

void console_output_wait(struct console_output *o)
{
	scope_lock(&o->lock);

	while (!lossy(o) && o->head - o->tail == OUTPUT_SIZE)
		pthread_cond_wait(&o->drained, &o->lock);
}

void console_output_release(struct console_output *o)
{
	scope_lock(&o->lock);

	o->released = true;
	drained(o);
}

/* ---- life ---- */

int console_output_create(struct console_output **output, bool socket, struct loop *loop, struct threads *threads,
	void (*room)(void *opaque), void *opaque, struct error *err)
{
	struct console_output *o = calloc(1, sizeof(*o));
	pthread_condattr_t attributes;
	int result;

	if (!o)
		return error_errno(err, "the console's output buffer");
	o->socket = socket;
	o->loop = loop;
	o->room = room;
	o->room_opaque = opaque;
	o->sink = -1;
	pthread_mutex_init(&o->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&o->filled, &attributes);
	pthread_cond_init(&o->drained, &attributes);
	pthread_condattr_destroy(&attributes);
	result = thread_start(&o->writer, threads, THREAD_WORKER, "console", writer_main, o, err);
	if (result < 0) {
		dispose(o);
		return result;
	}
	*output = o;
	return 0;
}

bool console_output_destroy(struct console_output *o)
{
	struct timespec deadline;
	bool stuck = false;

	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += FLUSH_SECONDS;
	pthread_mutex_lock(&o->lock);
	o->released = o->closing = true;
	o->refused = false; /* the loop may be gone when a writer that hangs comes back */
	pthread_cond_broadcast(&o->filled);
	while (!stuck && o->writer.runs && (o->writing || (o->sink >= 0 && o->head != o->tail)))
		stuck = pthread_cond_timedwait(&o->drained, &o->lock, &deadline) == ETIMEDOUT;
	stuck = stuck && !o->ended;
	o->abandoned = stuck;
	if (stuck)
		pthread_detach(o->writer.id);
	pthread_mutex_unlock(&o->lock);
	if (stuck) /* the writer disposes, should it ever come back */
		return false;
	thread_join(&o->writer);
	dispose(o);
	return true;
}
