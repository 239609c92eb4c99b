/* See console_tap.h. */
#include "vmm/console_tap.h"

#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"

static void told(struct loop_timer *timer)
{
	struct console_tap *tap = container_of(timer, struct console_tap, timer);

	pthread_mutex_lock(&tap->lock);
	tap->told = false;
	pthread_mutex_unlock(&tap->lock);
	tap->ready(tap);
}

bool console_tap_init(struct console_tap *tap, struct loop *loop, void (*ready)(struct console_tap *tap))
{
	*tap = (struct console_tap){.loop = loop, .ready = ready, .timer = {.function = told}};
	tap->ring = malloc(TAP_SIZE);
	if (!tap->ring)
		return false;
	pthread_mutex_init(&tap->lock, NULL);
	return true;
}

void console_tap_release(struct console_tap *tap)
{
	loop_timer_cancel(tap->loop, &tap->timer);
	pthread_mutex_destroy(&tap->lock);
	free(take_ptr(tap->ring));
}

static void tell_locked(struct console_tap *tap)
{
	/* A timer that is due at once, and not a post: it can be cancelled when the tap goes. */
	if (!tap->told)
		loop_timer_set(tap->loop, &tap->timer, clock_now());
	tap->told = true;
}

void console_tap_tell(struct console_tap *tap)
{
	scope_lock(&tap->lock);
	tell_locked(tap);
}

void console_tap_put(struct console_tap *tap, const uint8_t *bytes, size_t n)
{
	scope_lock(&tap->lock);

	for (size_t i = 0; i < n; i++)
		tap->ring[tap->head++ % TAP_SIZE] = bytes[i];
	if (tap->head - tap->tail > TAP_SIZE)
		tap->tail = tap->head - TAP_SIZE;
	tell_locked(tap);
}

size_t console_tap_get(struct console_tap *tap, uint8_t *bytes, size_t n)
{
	scope_lock(&tap->lock);

	n = min(n, tap->head - tap->tail);
	for (size_t i = 0; i < n; i++)
		bytes[i] = tap->ring[tap->tail++ % TAP_SIZE];
	return n;
}
