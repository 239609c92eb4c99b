#include "base/threads.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"

void thread_begin(const struct threads *threads, enum thread_kind kind)
{
	if (threads && threads->begin)
		threads->begin(threads->opaque, kind);
}

static void *thread_main(void *opaque)
{
	struct thread *t = opaque;

	pthread_setname_np(pthread_self(), t->name);
	thread_begin(t->threads, t->kind);
	return t->function(t->opaque);
}

static int create(struct thread *t, struct error *err)
{
	/* What a thread does to itself; other signals are for the main thread. */
	static const int own[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT};
	sigset_t blocked, before;
	int code;

	sigfillset(&blocked);
	for (size_t i = 0; i < ARRAY_SIZE(own); i++)
		sigdelset(&blocked, own[i]);
	pthread_sigmask(SIG_SETMASK, &blocked, &before);
	code = pthread_create(&t->id, NULL, thread_main, t);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (code)
		return error_set(err, code, "starting the thread '%s': %s", t->name, strerror(code));
	t->runs = true;
	return 0;
}

int thread_start(struct thread *t, struct threads *threads, enum thread_kind kind, const char *name,
	void *(*function)(void *), void *opaque, struct error *err)
{
	*t = (struct thread){.threads = threads, .kind = kind, .function = function, .opaque = opaque};
	snprintf(t->name, sizeof(t->name), "%s", name);
	if (!threads || !threads->held)
		return create(t, err);
	t->waits = true;
	t->next = threads->waiting;
	threads->waiting = t;
	return 0;
}

int threads_release(struct threads *threads, struct error *err)
{
	threads->held = false;
	while (threads->waiting) {
		struct thread *t = threads->waiting;
		int result;

		threads->waiting = t->next;
		t->waits = false;
		result = create(t, err);
		if (result < 0)
			return result;
	}
	return 0;
}

void thread_join(struct thread *t)
{
	if (t->runs)
		pthread_join(t->id, NULL);
	if (t->waits) {
		struct thread **at = &t->threads->waiting;

		while (*at != t)
			at = &(*at)->next;
		*at = t->next;
	}
	t->runs = t->waits = false;
}
