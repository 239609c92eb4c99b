/* Small arithmetic and layout helpers used everywhere. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

#define min(a, b)                                                                                                      \
	({                                                                                                             \
		__typeof__(a) a_ = (a);                                                                                \
		__typeof__(b) b_ = (b);                                                                                \
		a_ < b_ ? a_ : b_;                                                                                     \
	})
#define max(a, b)                                                                                                      \
	({                                                                                                             \
		__typeof__(a) a_ = (a);                                                                                \
		__typeof__(b) b_ = (b);                                                                                \
		a_ > b_ ? a_ : b_;                                                                                     \
	})

/* align is a power of two */
static inline uint64_t align_down(uint64_t v, uint64_t align)
{
	return v & ~(align - 1);
}

static inline uint64_t align_up(uint64_t v, uint64_t align)
{
	return (v + align - 1) & ~(align - 1);
}
