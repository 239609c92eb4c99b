#include "base/token_bucket.h"

#include "base/cleanup.h"
#include "base/util.h"

#define NS_PER_SECOND 1000000000ull
/* Nobody sleeps longer at once; a rate so slow is looked at again. */
#define WAIT_MOST (3600 * NS_PER_SECOND)

static int64_t capacity(const struct token_rate *rate)
{
	uint64_t most = rate->burst ? rate->burst : rate->rate;

	return (int64_t)min(most, (uint64_t)INT64_MAX / 2);
}

void token_bucket_set(struct token_bucket *b, struct token_rate rate, uint64_t now)
{
	bool had = b->rate.rate;

	/* What is owed under the old rate stays owed: changing the rate again and again gives nothing for free. */
	if (had)
		token_bucket_wait(b, now);
	b->rate = rate;
	b->level = had ? min(b->level, capacity(&rate)) : capacity(&rate);
	b->remainder = 0;
	b->filled = now;
}

uint64_t token_bucket_wait(struct token_bucket *b, uint64_t now)
{
	unsigned __int128 earned;
	uint64_t wanted;

	if (!b->rate.rate)
		return 0;
	if (now > b->filled) {
		earned = (unsigned __int128)(now - b->filled) * b->rate.rate + b->remainder;
		b->filled = now;
		b->remainder = (uint64_t)(earned % NS_PER_SECOND);
		earned /= NS_PER_SECOND;
		if (earned >= (unsigned __int128)((__int128)capacity(&b->rate) - b->level)) {
			b->level = capacity(&b->rate);
			b->remainder = 0;
		} else {
			b->level += (int64_t)earned;
		}
	}
	if (b->level > 0)
		return 0;
	/* Until the first whole token; not less, or the caller would come too early and turn in circles. */
	wanted = (uint64_t)(1 - b->level);
	earned = (unsigned __int128)wanted * NS_PER_SECOND - b->remainder + b->rate.rate - 1;
	earned /= b->rate.rate;
	return earned > WAIT_MOST ? WAIT_MOST : (uint64_t)earned;
}

void token_bucket_spend(struct token_bucket *b, uint64_t tokens)
{
	if (!b->rate.rate)
		return;
	tokens = min(tokens, (uint64_t)INT64_MAX / 4);
	b->level = b->level < INT64_MIN / 4 ? b->level : b->level - (int64_t)tokens;
}

void rate_limit_init(struct rate_limit *limit)
{
	*limit = (struct rate_limit){0};
	pthread_mutex_init(&limit->lock, NULL);
}

void rate_limit_destroy(struct rate_limit *limit)
{
	pthread_mutex_destroy(&limit->lock);
}

void rate_limit_set(struct rate_limit *limit, const struct rate_limits *limits, uint64_t now)
{
	scope_lock(&limit->lock);
	token_bucket_set(&limit->bandwidth, limits->bandwidth, now);
	token_bucket_set(&limit->operations, limits->operations, now);
	__atomic_store_n(&limit->limited, limits->bandwidth.rate || limits->operations.rate, __ATOMIC_RELEASE);
}

void rate_limit_get(struct rate_limit *limit, struct rate_limits *limits)
{
	scope_lock(&limit->lock);
	limits->bandwidth = limit->bandwidth.rate;
	limits->operations = limit->operations.rate;
}

uint64_t rate_limit_wait(struct rate_limit *limit, uint64_t now)
{
	uint64_t bytes, operations;

	if (!__atomic_load_n(&limit->limited, __ATOMIC_ACQUIRE))
		return 0;
	scope_lock(&limit->lock);
	bytes = token_bucket_wait(&limit->bandwidth, now);
	operations = token_bucket_wait(&limit->operations, now);
	return max(bytes, operations);
}

void rate_limit_spend(struct rate_limit *limit, uint64_t bytes)
{
	if (!__atomic_load_n(&limit->limited, __ATOMIC_ACQUIRE))
		return;
	scope_lock(&limit->lock);
	token_bucket_spend(&limit->bandwidth, bytes);
	token_bucket_spend(&limit->operations, 1);
}
