/* What a disk of numbered blocks may contain after a crash. */
#pragma once

#include "support.h"

enum { BLOCK = 4096, BLOCKS = 1024, DISK_BYTES = BLOCK * BLOCKS };

/* A change that was begun: the block and its new number (0: it is to read as zeroes), or a flush. */
struct report {
	uint32_t block, number;
	enum { BEGUN, FLUSHED } what;
};

/* Of one block: the number that is safe, and those that may or may not have got there since. */
struct expectation {
	uint32_t safe, later[256];
	unsigned later_count;
};

/* A block at a time: takes a report in. */
void learn(struct expectation *all, const struct report *r);
/* Reads all and fails the test if something that was safe is lost; then the disk's content is what is safe. */
void expect_safe(struct disk *disk, struct expectation *all);
