/* The worker's process: the engine under test, and the comparison. */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "run.h"
#include "base/util.h"
#include "engine/engine.h"

#define REPORT_BYTES 16384

bool note_difference(struct session *s, uint32_t form, uint64_t number)
{
	struct form_statistics *f = &s->shared->form[form];

	s->shared->differing++;
	if (f->differences++)
		return s->options.verbose;
	f->example = number;
	s->shared->reported++;
	return true;
}

void print_replay(const struct session *s, uint64_t number)
{
	const struct options *o = &s->options;

	printf("replay: difftest --engine %s --seed %" PRIu64 " --only %" PRIu64 "%s", o->engine->name, o->seed, number,
		o->single ? " --single" : "");
	if (o->form)
		printf(" --form '%s'", o->form);
	if (o->cpu)
		printf(" --cpu %s", o->cpu);
	printf("%s%s\n", o->compare.lax_fault_flags ? " --lax-fault-flags" : "",
		o->one_instruction_blocks ? " --one-instruction-blocks" : "");
}

/* The same block ending before instruction n: int3 from there on. */
static void truncate_case(struct test_case *t, unsigned n)
{
	unsigned end = t->offset[n];

	memset(t->code + end, 0xcc, t->code_length - end);
	t->code_length = end + 1;
	t->instructions = n;
}

/* Which instruction of a block brings the difference in: the last one of the shortest prefix that differs. */
static unsigned blame(struct session *s, struct guest *guest, const struct slot *slot)
{
	static struct slot shorter;
	static struct outcome engine;
	static char text[REPORT_BYTES];

	for (unsigned n = 1; n < slot->test.instructions; n++) {
		shorter.test = slot->test;
		truncate_case(&shorter.test, n);
		if (oracle_in_child(s, &shorter) || shorter.native.vector < 0)
			continue;
		generate_memory(&s->generator, &shorter.test, s->pages);
		guest_execute(guest, &shorter.test, s->pages, &engine);
		if (compare_outcomes(
			    &shorter.test, &s->options.compare, s->pages, &shorter.native, &engine, text, sizeof(text)))
			return n - 1;
	}
	return slot->test.instructions - 1;
}

static uint32_t form_of(const struct test_case *t, unsigned instruction)
{
	/* the generator's own instructions count as their neighbour */
	for (int n = instruction; n >= 0; n--)
		if (t->form[n] != UINT32_MAX)
			return t->form[n];
	for (unsigned n = instruction; n < t->instructions; n++)
		if (t->form[n] != UINT32_MAX)
			return t->form[n];
	return 0;
}

static void count(struct session *s, const struct slot *slot)
{
	const struct test_case *t = &slot->test;
	int vector = slot->native.vector;
	uint64_t end = t->code_address + t->code_length;

	s->shared->vectors[vector >= 0 && vector < 32 ? vector : 32]++;
	for (unsigned n = 0; n < t->instructions; n++)
		if (t->form[n] != UINT32_MAX) {
			struct form_statistics *f = &s->shared->form[t->form[n]];

			if (t->instructions == 1) {
				f->runs++;
				/* at the terminator, or wherever a branch led */
				f->completed += (vector == 3 && slot->native.state.rip == end) ||
						(vector == 6 && slot->native.state.rip == end - 2) ||
						(vector == 3 && s->forms.list[t->form[n]].control_flow);
			}
		}
}

static void run_case(struct session *s, struct guest *guest, struct slot *slot)
{
	static struct outcome engine;
	static char text[REPORT_BYTES];
	unsigned culprit;

	if (slot->native.vector < 0 || !slot->test.instructions) {
		s->shared->discarded++;
		if (s->options.verbose) {
			printf("\nendless or empty, left out:\n");
			print_case(&slot->test, &s->forms);
		}
		return;
	}
	generate_memory(&s->generator, &slot->test, s->pages);
	if (s->options.only) {
		print_case(&slot->test, &s->forms);
		print_outcome("native", &slot->native);
		fflush(stdout);
	}
	guest_execute(guest, &slot->test, s->pages, &engine);
	count(s, slot);
	if (s->options.only)
		print_outcome("engine", &engine);
	if (!compare_outcomes(&slot->test, &s->options.compare, s->pages, &slot->native, &engine, text, sizeof(text)))
		return;
	culprit = blame(s, guest, slot);
	if (note_difference(s, form_of(&slot->test, culprit), slot->test.number)) {
		printf("\nDIFFERENCE in %s (instruction %u of %u)\n", s->forms.list[form_of(&slot->test, culprit)].name,
			culprit + 1, slot->test.instructions);
		if (!s->options.only)
			print_case(&slot->test, &s->forms);
		printf("ended natively with vector %d at %#" PRIx64 "; differing:\n%s", slot->native.vector,
			slot->native.state.rip, text);
		print_replay(s, slot->test.number);
		fflush(stdout);
	}
}

void worker_process(struct session *s)
{
	struct shared *shared = s->shared;
	struct guest *guest;
	struct error err = {0};

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (guest_create(&guest, s->options.engine, s->options.model, s->options.one_instruction_blocks,
		    !s->options.compare.lax_fault_flags, &err)) {
		fprintf(stderr, "difftest: %s\n", err.text);
		_exit(3);
	}
	while (shared->consumed < s->options.cases && !shared->stop) {
		struct slot *slot = &shared->slot[shared->consumed % SLOTS];

		if (shared->consumed % BATCH == 0 && !shared->busy)
			while (sem_wait(&shared->full) && errno == EINTR)
				;
		shared->busy = true;
		run_case(s, guest, slot);
		shared->consumed++;
		shared->busy = shared->consumed % BATCH;
		if (!shared->busy)
			sem_post(&shared->free);
		if (shared->reported >= 10 && !s->options.keep_going)
			shared->stop = true;
	}
	fflush(stdout);
	guest_destroy(guest);
	_exit(0);
}
