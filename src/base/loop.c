/* The event loop: epoll for descriptors, one timerfd for all timers, one eventfd for stop and post.
 *
 * A timerfd and not the time-out of epoll_wait: it is not subject to the timer slack of the thread (50 us), and another
 * thread that needs an earlier deadline moves it with one system call, without waking the loop. */
#include "base/loop.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

#define NEVER UINT64_MAX
#define EVENTS_PER_WAIT 32

/* What is watched of one descriptor; the table of them is indexed by the descriptor. */
struct watch {
	loop_fd_function *function; /* NULL: not watched */
	void *opaque;
	uint32_t events;
	uint32_t generation; /* of the registration: an event collected for an earlier one is dropped */
};

struct post {
	void (*function)(void *opaque);
	void *opaque;
};

struct loop {
	int epoll_fd;
	int wake_fd;
	int timer_fd;
	atomic_bool stopping;

	pthread_mutex_t lock; /* all below; never held during a callback */
	struct watch *watches;
	unsigned watch_count;
	struct loop_timer **heap; /* binary heap by deadline, root at index 1 */
	unsigned heap_count, heap_room;
	uint64_t armed; /* what timer_fd is set to; never later than the root's deadline, but possibly earlier */
	struct post *posts;
	unsigned post_count, post_room;
};

/* The descriptors of the loop itself are told from watched ones by a high word no generation reaches. */
#define OWN_WAKE UINT64_MAX
#define OWN_TIMER (UINT64_MAX - 1)

uint64_t clock_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

/* Timers and posts have no way to report a failure and must not get lost: a small allocation is waited for. */
static void *grow_or_wait(void *array, size_t bytes)
{
	for (;;) {
		void *grown = realloc(array, bytes);

		if (grown)
			return grown;
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
}

/* ---- making and ending ---- */

static int watch_own(struct loop *loop, int fd, uint32_t events, uint64_t tag, struct error *err)
{
	struct epoll_event event = {.events = events, .data.u64 = tag};

	if (epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
		return error_errno(err, "event loop: epoll_ctl");
	return 0;
}

int loop_create(struct loop **out, struct error *err)
{
	struct loop *loop = calloc(1, sizeof(*loop));
	int result = 0;

	if (!loop)
		return error_set(err, ENOMEM, "event loop: no memory");
	pthread_mutex_init(&loop->lock, NULL);
	loop->armed = NEVER;
	loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	loop->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (loop->epoll_fd < 0 || loop->wake_fd < 0 || loop->timer_fd < 0)
		result = error_errno(err, "event loop: making its epoll, eventfd and timerfd descriptors");
	if (result == 0)
		result = watch_own(loop, loop->wake_fd, EPOLLIN, OWN_WAKE, err);
	/* Edge-triggered: an expiry is reported once and need not be read off. */
	if (result == 0)
		result = watch_own(loop, loop->timer_fd, EPOLLIN | EPOLLET, OWN_TIMER, err);
	if (result < 0) {
		loop_destroy(loop);
		return result;
	}
	*out = loop;
	return 0;
}

void loop_destroy(struct loop *loop)
{
	if (!loop)
		return;
	cleanup_close(&loop->epoll_fd);
	cleanup_close(&loop->wake_fd);
	cleanup_close(&loop->timer_fd);
	pthread_mutex_destroy(&loop->lock);
	free(loop->watches);
	free(loop->heap);
	free(loop->posts);
	free(loop);
}

static void loop_wake(struct loop *loop)
{
	int saved = errno; /* may run in a signal handler */
	uint64_t one = 1;

	/* The only possible failure is a full counter, and then the loop is about to wake anyway. */
	if (write(loop->wake_fd, &one, sizeof(one)) < 0)
		errno = saved;
}

void loop_stop(struct loop *loop)
{
	atomic_store(&loop->stopping, true);
	loop_wake(loop);
}

/* ---- descriptors ---- */

static int watch_apply(struct loop *loop, int operation, int fd)
{
	struct watch *w = &loop->watches[fd];
	struct epoll_event event = {.events = w->events, .data.u64 = (uint64_t)w->generation << 32 | (uint32_t)fd};

	return epoll_ctl(loop->epoll_fd, operation, fd, &event);
}

int loop_add_fd(struct loop *loop, int fd, uint32_t events, loop_fd_function *function, void *opaque, struct error *err)
{
	if (fd < 0)
		return error_set(err, EBADF, "event loop: descriptor %d is not open", fd);
	scope_lock(&loop->lock);
	if ((unsigned)fd >= loop->watch_count) {
		unsigned count = max((unsigned)fd + 1, loop->watch_count * 2);
		struct watch *grown = realloc(loop->watches, count * sizeof(*grown));

		if (!grown)
			return error_set(err, ENOMEM, "event loop: no memory to watch descriptor %d", fd);
		memset(grown + loop->watch_count, 0, (count - loop->watch_count) * sizeof(*grown));
		loop->watches = grown;
		loop->watch_count = count;
	}

	struct watch *w = &loop->watches[fd];

	if (w->function)
		return error_set(err, EEXIST, "event loop: descriptor %d is watched already", fd);
	w->events = events;
	w->generation = (w->generation + 1) & INT32_MAX;
	/* Registered even if quiet, so that a descriptor that cannot be waited for is found out here. */
	if (watch_apply(loop, EPOLL_CTL_ADD, fd) < 0) {
		if (errno == EPERM)
			return error_set(err, EPERM,
				"event loop: descriptor %d cannot be waited for (a regular file or /dev/null?)", fd);
		return error_errno(err, "event loop: watching descriptor %d", fd);
	}
	if (!events)
		watch_apply(loop, EPOLL_CTL_DEL, fd);
	w->function = function;
	w->opaque = opaque;
	return 0;
}

void loop_change_fd(struct loop *loop, int fd, uint32_t events)
{
	scope_lock(&loop->lock);
	if (fd < 0 || (unsigned)fd >= loop->watch_count || !loop->watches[fd].function)
		return;

	struct watch *w = &loop->watches[fd];
	uint32_t before = w->events;

	if (events == before)
		return;
	w->events = events;
	/* Quiet means out of the epoll set: inside it, EPOLLHUP and EPOLLERR would be reported whatever was asked for.
	 */
	watch_apply(loop, !events ? EPOLL_CTL_DEL : !before ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd);
}

void loop_remove_fd(struct loop *loop, int fd)
{
	scope_lock(&loop->lock);
	if (fd < 0 || (unsigned)fd >= loop->watch_count || !loop->watches[fd].function)
		return;
	if (loop->watches[fd].events)
		watch_apply(loop, EPOLL_CTL_DEL, fd);
	loop->watches[fd].function = NULL;
}

static void run_fd(struct loop *loop, uint64_t tag, uint32_t events)
{
	int fd = (uint32_t)tag;
	struct watch w;

	pthread_mutex_lock(&loop->lock);
	w = loop->watches[fd];
	pthread_mutex_unlock(&loop->lock);
	/* A callback earlier in the same batch may have removed or silenced it. */
	if (w.function && w.generation == tag >> 32 && w.events)
		w.function(w.opaque, fd, events);
}

/* ---- timers ---- */

static void heap_put(struct loop *loop, unsigned index, struct loop_timer *timer)
{
	loop->heap[index] = timer;
	timer->heap_index = index;
}

static void heap_up(struct loop *loop, unsigned index, struct loop_timer *timer)
{
	while (index > 1 && loop->heap[index / 2]->deadline > timer->deadline) {
		heap_put(loop, index, loop->heap[index / 2]);
		index /= 2;
	}
	heap_put(loop, index, timer);
}

static void heap_down(struct loop *loop, unsigned index, struct loop_timer *timer)
{
	for (;;) {
		unsigned child = index * 2;

		if (child > loop->heap_count)
			break;
		if (child < loop->heap_count && loop->heap[child + 1]->deadline < loop->heap[child]->deadline)
			child++;
		if (loop->heap[child]->deadline >= timer->deadline)
			break;
		heap_put(loop, index, loop->heap[child]);
		index = child;
	}
	heap_put(loop, index, timer);
}

static void heap_settle(struct loop *loop, unsigned index, struct loop_timer *timer)
{
	if (index > 1 && loop->heap[index / 2]->deadline > timer->deadline)
		heap_up(loop, index, timer);
	else
		heap_down(loop, index, timer);
}

static void heap_remove(struct loop *loop, struct loop_timer *timer)
{
	unsigned hole = timer->heap_index;
	struct loop_timer *last = loop->heap[loop->heap_count--];

	timer->heap_index = 0;
	if (last != timer)
		heap_settle(loop, hole, last);
}

static void arm(struct loop *loop, uint64_t deadline)
{
	/* All zero would disarm; one nanosecond after the start of the clock is as long past. */
	uint64_t at = deadline ? deadline : 1;
	struct itimerspec spec = {.it_value = {.tv_sec = at / 1000000000, .tv_nsec = at % 1000000000}};

	loop->armed = deadline;
	timerfd_settime(loop->timer_fd, TFD_TIMER_ABSTIME, &spec, NULL);
}

void loop_timer_set(struct loop *loop, struct loop_timer *timer, uint64_t deadline)
{
	/* Beyond what a timespec may say (292 years): never. */
	deadline = min(deadline, (uint64_t)INT64_MAX);
	scope_lock(&loop->lock);
	if (timer->heap_index) {
		timer->deadline = deadline;
		heap_settle(loop, timer->heap_index, timer);
	} else {
		if (loop->heap_count + 1 >= loop->heap_room) {
			loop->heap_room = loop->heap_room ? loop->heap_room * 2 : 32;
			loop->heap = grow_or_wait(loop->heap, loop->heap_room * sizeof(*loop->heap));
		}
		timer->deadline = deadline;
		heap_up(loop, ++loop->heap_count, timer);
	}
	/* A root that moved later leaves the timerfd alone: one early wake-up costs less than a system call a set. */
	if (deadline < loop->armed)
		arm(loop, deadline);
}

void loop_timer_cancel(struct loop *loop, struct loop_timer *timer)
{
	scope_lock(&loop->lock);
	if (timer->heap_index)
		heap_remove(loop, timer);
}

/* The root, if it is due at `now`; else the timerfd is set for it. */
static struct loop_timer *next_due(struct loop *loop, uint64_t now)
{
	scope_lock(&loop->lock);
	if (loop->heap_count && loop->heap[1]->deadline <= now) {
		struct loop_timer *timer = loop->heap[1];

		heap_remove(loop, timer);
		return timer;
	}
	if (loop->armed <= now)
		loop->armed = NEVER; /* has fired or is about to: worth nothing any more */
	if (loop->heap_count && loop->heap[1]->deadline < loop->armed)
		arm(loop, loop->heap[1]->deadline);
	return NULL;
}

static void run_timers(struct loop *loop)
{
	/* One reading of the clock for the whole pass: a timer that sets itself again cannot starve the descriptors. */
	uint64_t now = clock_now();
	struct loop_timer *timer;

	while ((timer = next_due(loop, now)))
		timer->function(timer);
}

/* ---- posts ---- */

void loop_post(struct loop *loop, void (*function)(void *opaque), void *opaque)
{
	bool first;

	pthread_mutex_lock(&loop->lock);
	if (loop->post_count == loop->post_room) {
		loop->post_room = loop->post_room ? loop->post_room * 2 : 16;
		loop->posts = grow_or_wait(loop->posts, loop->post_room * sizeof(*loop->posts));
	}
	first = loop->post_count == 0;
	loop->posts[loop->post_count++] = (struct post){function, opaque};
	pthread_mutex_unlock(&loop->lock);
	if (first)
		loop_wake(loop);
}

static void run_posts(struct loop *loop)
{
	struct post *posts;
	unsigned count;

	pthread_mutex_lock(&loop->lock);
	posts = take_ptr(loop->posts);
	count = loop->post_count;
	loop->post_count = loop->post_room = 0;
	pthread_mutex_unlock(&loop->lock);
	for (unsigned i = 0; i < count; i++)
		posts[i].function(posts[i].opaque);
	free(posts);
}

void loop_run(struct loop *loop)
{
	/* Timers and posts made before the first run. */
	run_timers(loop);
	while (!atomic_exchange(&loop->stopping, false)) {
		struct epoll_event events[EVENTS_PER_WAIT];
		int count = epoll_wait(loop->epoll_fd, events, EVENTS_PER_WAIT, -1);

		run_timers(loop);
		for (int i = 0; i < count; i++) {
			uint64_t tag = events[i].data.u64, counter;

			if (tag == OWN_TIMER)
				continue;
			if (tag != OWN_WAKE) {
				run_fd(loop, tag, events[i].events);
				continue;
			}
			/* Emptied before the posts are taken: a later post writes it again. */
			if (read(loop->wake_fd, &counter, sizeof(counter)) == sizeof(counter))
				run_posts(loop);
		}
	}
}
