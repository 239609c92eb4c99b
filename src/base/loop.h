/* The event loop of a thread: descriptors and timers. One per program's main thread; devices whose work is short run on
 * it (user-mode network, serial input, chip timers). */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

struct loop;

int loop_create(struct loop **loop, struct error *err);
void loop_destroy(struct loop *loop);
/* Runs until loop_stop. Only one thread runs a loop. */
void loop_run(struct loop *loop);
void loop_stop(struct loop *loop); /* from any thread or a signal handler */

/* Watches fd for epoll events (EPOLLIN, EPOLLOUT, ...; level-triggered). events 0 keeps it registered but quiet.
 * Add, change and remove: from any thread; after remove returns on the loop's own thread the callback does not run
 * again. */
typedef void loop_fd_function(void *opaque, int fd, uint32_t events);
int loop_add_fd(
	struct loop *loop, int fd, uint32_t events, loop_fd_function *function, void *opaque, struct error *err);
void loop_change_fd(struct loop *loop, int fd, uint32_t events);
void loop_remove_fd(struct loop *loop, int fd);

/* A one-shot timer, embedded in its owner; set to zero before first use. Deadlines are CLOCK_MONOTONIC nanoseconds. Set
 * and cancel are cheap and safe from any thread; the callback runs on the loop's thread without loop locks held. After
 * a cancel from another thread a callback that had already begun may still be running. */
struct loop_timer {
	void (*function)(struct loop_timer *timer);
	uint64_t deadline;
	unsigned heap_index; /* 0: not armed */
};
void loop_timer_set(struct loop *loop, struct loop_timer *timer, uint64_t deadline);
void loop_timer_cancel(struct loop *loop, struct loop_timer *timer);

/* Runs function(opaque) on the loop's thread soon; from any thread. */
void loop_post(struct loop *loop, void (*function)(void *opaque), void *opaque);

uint64_t clock_now(void); /* CLOCK_MONOTONIC in nanoseconds */
