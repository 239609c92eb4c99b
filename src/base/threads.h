/* The threads of a program that is confined between opening things and running: what is asked for while opening starts
 * only when it is released, so that namespaces, rights and filters, which belong to each thread of its own, are those of
 * the confined program from a thread's first instruction. */
#pragma once

#include <pthread.h>
#include <stdbool.h>

#include "base/error.h"

enum thread_kind {
	THREAD_MAIN,   /* runs the loop */
	THREAD_VCPU,   /* runs guest code */
	THREAD_WORKER, /* makes blocking calls on descriptors: disks, the console's output */
	THREAD_KINDS,
};

struct threads {
	bool held; /* starts wait for threads_release() */
	/* Unless NULL: what each new thread does first, and the main one when all others are made (thread_begin). */
	void (*begin)(void *opaque, enum thread_kind kind);
	void *opaque;
	struct thread *waiting;
};

struct thread { /* embedded in its owner; zero before thread_start() */
	struct threads *threads;
	struct thread *next;
	enum thread_kind kind;
	char name[16];
	void *(*function)(void *opaque);
	void *opaque;
	pthread_t id;
	bool waits, runs;
};

/* Starts function(opaque) on a thread of that name, with all signals blocked but its own
 * faults; at the release if threads are held.
 * threads may be NULL: at once, without more. */
int thread_start(struct thread *thread, struct threads *threads, enum thread_kind kind, const char *name,
	void *(*function)(void *), void *opaque, struct error *err);
/* Starts what waits, and from here on at once. */
int threads_release(struct threads *threads, struct error *err);
/* Waits for its end; of one that was never released nothing is left to wait for. */
void thread_join(struct thread *thread);
/* What is first done on a thread of that kind; threads may be NULL. */
void thread_begin(const struct threads *threads, enum thread_kind kind);
