/* What the disk tests share: a scratch folder, QEMU's tools as judges, and a disk beside a model of it in plain memory.
 */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "disk/disk.h"

/* Makes an empty scratch folder and goes there. Removed by scratch_leave. */
void scratch_enter(void);
void scratch_leave(void);

/* Runs a shell command; the test fails with its output unless it ends with 0. */
void run(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The same, and returns its exit status. */
int run_status(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* A new file with this content. */
void write_file(const char *path, const void *data, size_t length);
void *read_file(const char *path, size_t *length);

uint64_t random_u64(void);
void random_seed(uint64_t seed);
/* Below n. */
uint64_t random_below(uint64_t n);

struct disk *open_disk(const char *path, enum disk_format format, bool read_only);
/* Opening must fail with a message that has `part` in it and is one line that names the file. */
void open_fails(const char *path, enum disk_format format, bool read_only, const char *part);
void close_disk(struct disk *disk);

/* `qemu-img check` finds neither errors nor leaks. */
void check_clean(const char *path);

/* A disk and what it should read as. */
struct modelled {
	const char *path;
	enum disk_format format;
	struct disk *disk;
	uint8_t *model;
	uint64_t size;
};
void modelled_open(
	struct modelled *m, const char *path, enum disk_format format); /* the model is what qemu-img reads */
void modelled_steps(struct modelled *m, unsigned steps);		/* random operations */
void modelled_judge(struct modelled *m); /* closes, qemu-img checks and compares, opens again */
void modelled_close(struct modelled *m);
