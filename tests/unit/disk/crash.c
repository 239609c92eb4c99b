#include "crash.h"

#include <string.h>

#include "base/util.h"

void learn(struct expectation *all, const struct report *r)
{
	if (r->what == BEGUN) {
		struct expectation *e = &all[r->block];

		if (e->later_count == ARRAY_SIZE(e->later))
			memmove(e->later, e->later + 1, sizeof(e->later[0]) * --e->later_count);
		e->later[e->later_count++] = r->number;
		return;
	}
	for (unsigned i = 0; i < BLOCKS; i++) {
		if (all[i].later_count)
			all[i].safe = all[i].later[all[i].later_count - 1];
		all[i].later_count = 0;
	}
}

void expect_safe(struct disk *disk, struct expectation *all)
{
	static uint32_t data[BLOCK / 4];
	struct iovec iov = {data, BLOCK};

	for (unsigned i = 0; i < BLOCKS; i++) {
		struct expectation *e = &all[i];
		bool torn = false;

		assert_int_equal(disk_readv(disk, (uint64_t)i * BLOCK, &iov, 1), 0);
		/* A block that was being written when the end came may be partly old and partly new. */
		for (unsigned k = 0; k < BLOCK / 4; k++) {
			bool known = data[k] == e->safe;

			for (unsigned l = 0; l < e->later_count && !known; l++)
				known = data[k] == e->later[l];
			if (!known)
				fail_msg("block %u word %u is %u; %u was flushed, %u writes were begun since", i, k,
					data[k], e->safe, e->later_count);
			torn |= data[k] != data[0];
		}
		assert_false(torn && !e->later_count);
		e->safe = data[0];
		e->later_count = 0;
		if (torn) { /* make it whole, so that the next round knows what to expect */
			memset(data, 0, sizeof(data));
			e->safe = 0;
			assert_int_equal(disk_writev(disk, (uint64_t)i * BLOCK, &iov, 1), 0);
		}
	}
}
