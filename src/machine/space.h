/* An address space of device registers: ports or memory-mapped. Look-up is lock-free against concurrent add and remove
 * of regions (PCI BARs move while the guest runs). */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

struct io_region;

/* offset is relative to the region; size is 1, 2, 4 or 8; the region's owner does its own locking. */
struct io_ops {
	uint64_t (*read)(struct io_region *region, uint64_t offset, unsigned size);
	void (*write)(struct io_region *region, uint64_t offset, unsigned size, uint64_t value);
};

/* A register that is only rung: writing to it, whatever it is, means no more than "look". An engine that can lets such
 * a write add 1 to the eventfd and the vCPU run on; otherwise it comes to ops->write as any other. */
struct io_bell {
	uint64_t offset; /* in the region */
	int fd;
};

/* Embedded in the device that answers for it (container_of leads back). */
struct io_region {
	const char *name;
	const struct io_ops *ops;
	uint64_t base, size;
	bool mapped;
	const struct io_bell *bells; /* the owner's; unchanged while mapped */
	unsigned bell_count;
};

struct space;

/* bell(opaque, address, fd, on) is told of the bells of each region that comes and goes from now on. */
typedef int space_bell_function(void *opaque, uint64_t address, int fd, bool on);

int space_create(struct space **space, const char *name, uint64_t limit, struct error *err);
void space_destroy(struct space *space);
void space_use_bells(struct space *space, space_bell_function *bell, void *opaque);
/* -EEXIST when it overlaps another region. The region stays owned by the caller. */
int space_add(struct space *space, struct io_region *region, struct error *err);
/* After it returns no new access reaches the region. */
void space_remove(struct space *space, struct io_region *region);

/* false: nobody there. An access that straddles a region's end is refused likewise. */
bool space_read(struct space *space, uint64_t address, unsigned size, uint64_t *value);
bool space_write(struct space *space, uint64_t address, unsigned size, uint64_t value);
