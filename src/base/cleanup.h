/* Clean-up by scope: a variable so marked is released on every way out of its block. */
#pragma once

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static inline void cleanup_free(void *p)
{
	free(*(void **)p);
}

static inline void cleanup_close(int *fd)
{
	if (*fd >= 0)
		close(*fd);
}

static inline void cleanup_unlock(pthread_mutex_t **lock)
{
	if (*lock)
		pthread_mutex_unlock(*lock);
}

static inline pthread_mutex_t *cleanup_locked(pthread_mutex_t *lock)
{
	pthread_mutex_lock(lock);
	return lock;
}

#define scope_free __attribute__((cleanup(cleanup_free)))
#define scope_fd __attribute__((cleanup(cleanup_close)))

#define SCOPE_NAME_(a, b) a##b
#define SCOPE_NAME(a, b) SCOPE_NAME_(a, b)

/* Holds the mutex from here to the end of the enclosing block. */
#define scope_lock(mutex)                                                                                              \
	__attribute__((cleanup(cleanup_unlock), unused)) pthread_mutex_t *SCOPE_NAME(scope_lock_, __LINE__) =          \
		cleanup_locked(mutex)

/* Hands a pointer or descriptor out of its scope: the variable no longer owns it. */
#define take_ptr(p)                                                                                                    \
	({                                                                                                             \
		__typeof__(p) taken_ = (p);                                                                            \
		(p) = NULL;                                                                                            \
		taken_;                                                                                                \
	})

static inline int take_fd(int *fd)
{
	int taken = *fd;

	*fd = -1;
	return taken;
}
