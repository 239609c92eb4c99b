/* A part of a scattered buffer: bytes [from, from + length) of an iovec array. Passed by value and cut smaller, so that
 * nobody has to copy an array of iovecs to work on a piece of a request. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include "base/util.h"

struct vector {
	const struct iovec *iov;
	int count;
	size_t from, length;
};

static inline struct vector vector_cut(struct vector v, size_t from, size_t length)
{
	v.from += from;
	v.length = length;
	return v;
}

/* Steps over the pieces that are left: the next contiguous piece is taken off the front of v and returned. An empty
 * piece means the end. */
static inline struct iovec vector_next(struct vector *v)
{
	while (v->count && v->from >= v->iov->iov_len) {
		v->from -= v->iov->iov_len;
		v->iov++;
		v->count--;
	}
	if (!v->count || !v->length)
		return (struct iovec){0};

	struct iovec piece = {(char *)v->iov->iov_base + v->from, min(v->iov->iov_len - v->from, v->length)};

	v->from += piece.iov_len;
	v->length -= piece.iov_len;
	return piece;
}

static inline void vector_zero(struct vector v)
{
	for (struct iovec piece = vector_next(&v); piece.iov_len; piece = vector_next(&v))
		memset(piece.iov_base, 0, piece.iov_len);
}

static inline void vector_fill(struct vector v, const void *from)
{
	for (struct iovec piece = vector_next(&v); piece.iov_len; piece = vector_next(&v)) {
		memcpy(piece.iov_base, from, piece.iov_len);
		from = (const char *)from + piece.iov_len;
	}
}
