/* The oracle's process. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

#include "run.h"
#include "base/util.h"

#define ATTEMPTS 3 /* a case that the watchdog stops so often is endless */

void oracle_run(struct session *s, struct slot *slot)
{
	for (unsigned attempt = 0; attempt < ATTEMPTS; attempt++) {
		generate_memory(&s->generator, &slot->test, s->pages);
		for (unsigned i = 0; i < ARENA_PAGES; i++)
			if (arena_layout[i] != ARENA_NONE && memcmp(native_page(i), s->pages[i], PAGE_BYTES))
				memcpy(native_page(i), s->pages[i], PAGE_BYTES);
		native_execute(&slot->test.state, &slot->native);
		if (slot->native.vector != OUTCOME_TIMEOUT)
			break;
	}
	for (unsigned i = 0; i < ARENA_PAGES; i++)
		if (arena_layout[i] == ARENA_DATA)
			memcpy(slot->native.pages[i], native_page(i), PAGE_BYTES);
}

static void require_native(void)
{
	struct error err = {0};

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (native_init(&err)) {
		fprintf(stderr, "difftest: %s\n", err.text);
		_exit(3);
	}
}

int oracle_in_child(struct session *s, struct slot *slot)
{
	int status = 0;
	pid_t pid;

	s->shared->scratch.test = slot->test;
	fflush(stdout);
	pid = fork();
	if (pid == 0) {
		require_native();
		oracle_run(s, &s->shared->scratch);
		_exit(0);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
		return -EIO;
	slot->native = s->shared->scratch.native;
	return 0;
}

void oracle_process(struct session *s)
{
	struct shared *shared = s->shared;

	require_native();
	for (uint64_t n = 0; n < s->options.cases && !shared->stop; n++) {
		struct slot *slot = &shared->slot[n % SLOTS];

		if (n % BATCH == 0)
			while (sem_wait(&shared->free) && errno == EINTR)
				;
		generate_case(&s->generator, s->options.first + n, &slot->test);
		oracle_run(s, slot);
		if (n % BATCH == BATCH - 1 || n + 1 == s->options.cases)
			sem_post(&shared->full);
	}
	_exit(0);
}

/* In a child: whether form n raises #UD whatever its operands. */
static bool always_undefined(struct session *s, size_t n)
{
	struct generator g = s->generator;
	struct slot *slot = &s->shared->scratch;

	g.chosen = &n;
	g.chosen_count = 1;
	g.filter = "";
	g.single = true;
	for (unsigned i = 0; i < 8; i++) {
		generate_case(&g, i, &slot->test);
		oracle_run(s, slot);
		if (slot->native.vector != 6 || slot->native.state.rip != slot->test.code_address)
			return false;
	}
	return true;
}

int oracle_probe_forms(struct session *s, unsigned *dropped, struct error *err)
{
	struct forms *forms = &s->forms;
	uint8_t *drop = mmap(NULL, forms->count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int status = 0;
	size_t kept = 0;
	pid_t pid;

	if (drop == MAP_FAILED)
		return error_errno(err, "no memory to probe %zu forms", forms->count);
	pid = fork();
	if (pid == 0) {
		require_native();
		for (size_t n = 0; n < forms->count; n++)
			drop[n] = isa_offered(&s->options.isa, forms->list[n].isa_set) < 0 && always_undefined(s, n);
		_exit(0);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status) {
		munmap(drop, forms->count);
		return error_set(err, EIO, "probing the instruction forms on this CPU failed (status %#x)", status);
	}
	*dropped = 0;
	for (size_t n = 0; n < forms->count; n++) {
		if (drop[n])
			++*dropped;
		else
			forms->list[kept++] = forms->list[n];
	}
	munmap(drop, forms->count);
	forms->count = kept;
	return forms_list_general(forms, err);
}
