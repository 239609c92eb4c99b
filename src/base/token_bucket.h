/* Rate limits: token buckets for bytes and operations, changed while in use. Safe from any thread. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

/* A rate a second, and how much may come at once after a rest. rate 0: no limit. */
struct token_rate {
	uint64_t rate;
	uint64_t burst; /* 0: one second's worth */
};

struct rate_limits {
	struct token_rate bandwidth;  /* bytes */
	struct token_rate operations; /* requests or frames */
};

/* May go into debt: what comes is let through whole while anything is left, so that a request larger than the burst is
 * not stuck for ever; what follows waits until the debt is paid. The average is the rate, exactly. */
struct token_bucket {
	struct token_rate rate;
	int64_t level;	    /* tokens; negative: debt */
	uint64_t remainder; /* of tokens, in 1/NS_PER_SECOND: so that slow rates lose nothing */
	uint64_t filled;    /* when, CLOCK_MONOTONIC in ns */
};

/* A new rate: the burst is there at once, unless the bucket had less under its old rate. */
void token_bucket_set(struct token_bucket *b, struct token_rate rate, uint64_t now);
/* 0: something may go now; else nanoseconds until then. */
uint64_t token_bucket_wait(struct token_bucket *b, uint64_t now);
void token_bucket_spend(struct token_bucket *b, uint64_t tokens);

/* Both at once, for a device. */
struct rate_limit {
	pthread_mutex_t lock;
	bool limited; /* read without the lock: most devices have no limits */
	struct token_bucket bandwidth, operations;
};

void rate_limit_init(struct rate_limit *limit);
void rate_limit_destroy(struct rate_limit *limit);
void rate_limit_set(struct rate_limit *limit, const struct rate_limits *limits, uint64_t now);
void rate_limit_get(struct rate_limit *limit, struct rate_limits *limits);
/* 0, or how long until the next operation may begin; before it is known how many bytes it has. */
uint64_t rate_limit_wait(struct rate_limit *limit, uint64_t now);
/* One operation of that many bytes begins. */
void rate_limit_spend(struct rate_limit *limit, uint64_t bytes);
