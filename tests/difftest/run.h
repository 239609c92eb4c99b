/* The tester's processes: a supervisor, an oracle that generates cases and runs them on the CPU, and a worker that runs
 * the same cases in the engine and compares. Apart, so that a crash of the engine is a finding and not the end, and so
 * that the signal handlers of engine and oracle do not meet. */
#pragma once

#include <semaphore.h>

#include "difftest.h"

#define SLOTS 64
#define BATCH 16 /* slots handed over at a time */

struct slot {
	struct test_case test;
	struct outcome native;
};

struct form_statistics {
	uint32_t runs, completed; /* as a case of its own: run at all, run to its end */
	uint32_t differences;
	uint64_t example; /* a case in which it differed */
};

struct options {
	uint64_t seed, first, cases;
	const char *form;
	const struct engine *engine;
	const char *cpu; /* CPU model of the engine, by name */
	const struct cpu_model *model;
	struct isa_source isa;
	bool single, verbose, keep_going, only, one_instruction_blocks;
	struct compare_options compare;
};

struct shared {
	sem_t free, full;			  /* batches */
	uint64_t consumed;			  /* cases the worker has finished with */
	uint64_t discarded;			  /* endless ones */
	uint64_t differing, crashes, vectors[33]; /* how cases ended; 32: otherwise */
	unsigned reported;			  /* forms with differences */
	bool busy, stop;
	struct slot slot[SLOTS];
	struct slot scratch; /* for oracle_in_child */
	struct form_statistics form[];
};

struct session {
	struct options options;
	struct forms forms;
	struct generator generator;
	struct shared *shared;
	uint8_t pages[ARENA_PAGES][PAGE_BYTES]; /* the arena before the case */
};

/* Runs the slot's test on the CPU, in this process, which has called native_init. */
void oracle_run(struct session *s, struct slot *slot);
/* The same in a child process: for a process that has not. */
int oracle_in_child(struct session *s, struct slot *slot);
/* Drops the forms of instruction sets that CPUID says nothing of and that raise #UD. */
int oracle_probe_forms(struct session *s, unsigned *dropped, struct error *err);
/* The two processes' work; they end the process. */
void oracle_process(struct session *s) __attribute__((noreturn));
void worker_process(struct session *s) __attribute__((noreturn));
/* A form's difference is counted; true when the case shall be shown. */
bool note_difference(struct session *s, uint32_t form, uint64_t number);
void print_replay(const struct session *s, uint64_t number);
