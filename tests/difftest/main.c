/* difftest: command line and supervision; see README.md. */
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "run.h"
#include "base/util.h"
#include "engine/cpu_model.h"
#include "engine/engine.h"

#define HANG_SECONDS 4

#ifdef HAVE_BT
static const struct engine *const testable[] = {&engine_bt, &engine_native};

static void model_cpuid(const void *model, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
	cpu_model_cpuid(model, 0, 1, leaf, subleaf, out);
}

/* The engine offers what its CPU model says, the stand-in what the host has. */
static int choose_isa(struct options *o, struct error *err)
{
	o->isa = (struct isa_source){.cpuid = isa_host_cpuid};
	if (o->engine == &engine_native)
		return 0;
	o->model = cpu_model_find(o->cpu ? o->cpu : "host", err);
	o->isa = (struct isa_source){.cpuid = model_cpuid,
		.model = o->model,
		.fewer_components = o->model && o->model->xcr0 != xsave_layout()->xcr0};
	return o->model ? 0 : -err->code;
}
#else
static const struct engine *const testable[] = {&engine_native};

static int choose_isa(struct options *o, struct error *err)
{
	o->isa = (struct isa_source){.cpuid = isa_host_cpuid};
	return 0;
}
#endif

static const char usage[] =
	"usage: difftest [options]\n"
	"Compares a software engine with the CPU it runs on, one random case after the other.\n"
	"  --cases N       how many cases (default 100000)\n"
	"  --seed S        where random numbers start (default: from the clock, printed)\n"
	"  --engine E      bt, or native: the CPU against itself, which proves the tester\n"
	"  --cpu MODEL     the engine's CPU model: host (default), x86-64-v2, x86-64-v3\n"
	"  --form TEXT     only instruction forms whose name contains TEXT\n"
	"  --single        no sequences, one instruction a case\n"
	"  --only CASE     this case only, shown in full\n"
	"  --first CASE    start at this case\n"
	"  --keep-going    do not stop after ten forms with differences\n"
	"  --lax-fault-flags         at a fault, flags that nobody reads any more need not be right\n"
	"  --one-instruction-blocks  ask the engine for blocks of one instruction\n"
	"  --list          print the instruction forms and end\n"
	"  --verbose       every difference, and the forms that never ran to their end\n";

static uint64_t number(const char *option, const char *text)
{
	char *end;
	uint64_t value;

	errno = 0;
	value = strtoull(text, &end, 0);
	if (errno || *end || !*text || *text == '-') {
		fprintf(stderr, "difftest: --%s %s: not a number\n", option, text);
		exit(2);
	}
	return value;
}

static const struct engine *engine_named(const char *name)
{
	for (unsigned i = 0; i < ARRAY_SIZE(testable); i++)
		if (!strcmp(testable[i]->name, name))
			return testable[i];
	fprintf(stderr, "difftest: --engine %s: this build has only", name);
	for (unsigned i = 0; i < ARRAY_SIZE(testable); i++)
		fprintf(stderr, " %s", testable[i]->name);
	fprintf(stderr, "\n");
	exit(2);
}

enum { CASES = 1, SEED, ENGINE, FORM, SINGLE, ONLY, FIRST, KEEP_GOING, LAX, ONE, LIST, VERBOSE, CPU, HELP };

static bool parse(int argc, char **argv, struct options *o)
{
	static const struct option options[] = {{"cases", 1, NULL, CASES}, {"seed", 1, NULL, SEED},
		{"engine", 1, NULL, ENGINE}, {"form", 1, NULL, FORM}, {"single", 0, NULL, SINGLE},
		{"only", 1, NULL, ONLY}, {"first", 1, NULL, FIRST}, {"keep-going", 0, NULL, KEEP_GOING},
		{"lax-fault-flags", 0, NULL, LAX}, {"one-instruction-blocks", 0, NULL, ONE}, {"list", 0, NULL, LIST},
		{"verbose", 0, NULL, VERBOSE}, {"cpu", 1, NULL, CPU}, {"help", 0, NULL, HELP}, {0}};
	struct timespec now;
	bool list = false;
	int option;

	clock_gettime(CLOCK_REALTIME, &now);
	*o = (struct options){.seed = (now.tv_sec * 1000003ull + now.tv_nsec / 1000) % 1000000000,
		.cases = 100000,
		.engine = testable[0]};
	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case CASES:
			o->cases = number("cases", optarg);
			break;
		case SEED:
			o->seed = number("seed", optarg);
			break;
		case ENGINE:
			o->engine = engine_named(optarg);
			break;
		case FORM:
			o->form = optarg;
			break;
		case SINGLE:
			o->single = true;
			break;
		case ONLY:
			o->only = true;
			o->first = number("only", optarg);
			break;
		case FIRST:
			o->first = number("first", optarg);
			break;
		case KEEP_GOING:
			o->keep_going = true;
			break;
		case LAX:
			o->compare.lax_fault_flags = true;
			break;
		case ONE:
			o->one_instruction_blocks = true;
			break;
		case LIST:
			list = true;
			break;
		case VERBOSE:
			o->verbose = true;
			break;
		case CPU:
			o->cpu = optarg;
			break;
		case HELP:
			fputs(usage, stdout);
			exit(0);
		default:
			fputs(usage, stderr);
			exit(2);
		}
	}
	if (optind != argc) {
		fprintf(stderr, "difftest: %s: no such argument; --help lists the options\n", argv[optind]);
		exit(2);
	}
	if (o->only)
		o->cases = 1;
	return list;
}

static int share(struct session *s, struct error *err)
{
	size_t size = sizeof(struct shared) + s->forms.count * sizeof(struct form_statistics);

	s->shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (s->shared == MAP_FAILED)
		return error_errno(err, "sharing %zu bytes between the tester's processes", size);
	sem_init(&s->shared->free, 1, SLOTS / BATCH);
	sem_init(&s->shared->full, 1, 0);
	return 0;
}

struct child {
	pid_t pid;
	int pidfd;
};

static struct child start(struct session *s, void (*process)(struct session *s))
{
	struct child c;

	fflush(stdout);
	c.pid = fork();
	if (c.pid == 0)
		process(s);
	c.pidfd = c.pid < 0 ? -1 : syscall(SYS_pidfd_open, c.pid, 0);
	if (c.pidfd < 0) {
		perror("difftest: starting a process");
		exit(3);
	}
	return c;
}

static int finish(struct child *c, bool force)
{
	int status = 0;

	if (force)
		kill(c->pid, SIGKILL);
	waitpid(c->pid, &status, 0);
	close(c->pidfd);
	return status;
}

/* The worker died or hung in a case: that is a difference. The next worker goes on behind it. */
static void report_crash(struct session *s, int status, bool hung)
{
	struct shared *shared = s->shared;
	struct slot *slot = &shared->slot[shared->consumed % SLOTS];
	uint32_t form = 0;

	for (unsigned n = 0; n < slot->test.instructions; n++)
		if (slot->test.form[n] != UINT32_MAX)
			form = slot->test.form[n];
	shared->crashes++;
	if (note_difference(s, form, slot->test.number)) {
		printf("\nENGINE %s%s in a case with %s\n", hung ? "HANGS" : "DIES of ",
			hung ? "" : strsignal(WIFSIGNALED(status) ? WTERMSIG(status) : 0), s->forms.list[form].name);
		if (!s->options.only)
			print_case(&slot->test, &s->forms);
		print_replay(s, slot->test.number);
	}
	shared->consumed++;
	shared->busy = shared->consumed % BATCH;
	if (!shared->busy)
		sem_post(&shared->free);
	if (shared->reported >= 10 && !s->options.keep_going)
		shared->stop = true;
}

/* Runs all cases; false when the tester itself failed. */
static bool supervise(struct session *s)
{
	struct shared *shared = s->shared;
	struct child oracle = start(s, oracle_process), worker = start(s, worker_process);
	uint64_t last = 0;
	unsigned idle = 0;
	bool oracle_done = false;

	for (;;) {
		struct pollfd fds[2] = {{worker.pidfd, POLLIN, 0}, {oracle_done ? -1 : oracle.pidfd, POLLIN, 0}};
		int status, n = poll(fds, 2, 1000);

		idle = n == 0 && shared->consumed == last ? idle + 1 : 0;
		last = shared->consumed;
		if (fds[1].revents) {
			status = finish(&oracle, false);
			oracle_done = true;
			if (status) {
				fprintf(stderr, "difftest: the oracle died (status %#x) near case %" PRIu64 "\n",
					status, s->options.first + shared->consumed);
				finish(&worker, true);
				return false;
			}
		}
		if (!fds[0].revents && idle < HANG_SECONDS)
			continue;
		status = finish(&worker, !fds[0].revents);
		if (!status)
			break;
		if (fds[0].revents && (!shared->busy || WIFEXITED(status))) {
			fprintf(stderr, "difftest: the worker ended (status %#x) outside a case\n", status);
			if (!oracle_done)
				finish(&oracle, true);
			return false;
		}
		report_crash(s, status, !fds[0].revents);
		idle = 0;
		if (shared->stop || shared->consumed >= s->options.cases)
			break;
		worker = start(s, worker_process);
	}
	if (!oracle_done)
		finish(&oracle, true);
	return true;
}

static void print_summary(const struct session *s, double seconds)
{
	const struct shared *shared = s->shared;
	unsigned never_run = 0, never_completed = 0;

	for (size_t i = 0; i < s->generator.chosen_count; i++) {
		const struct form_statistics *f = &shared->form[s->generator.chosen[i]];

		never_run += !f->runs;
		never_completed += !f->completed;
		if (s->options.verbose && !f->completed && !s->options.only)
			printf("never ran to its end: %s (%u tries)\n", s->forms.list[s->generator.chosen[i]].name,
				f->runs);
	}
	if (shared->reported)
		printf("\nforms with differences:\n");
	for (size_t i = 0; i < s->forms.count; i++)
		if (shared->form[i].differences)
			printf("%8u  %-50s e.g. case %" PRIu64 "\n", shared->form[i].differences, s->forms.list[i].name,
				shared->form[i].example);
	printf("endings:");
	for (unsigned i = 0; i < ARRAY_SIZE(shared->vectors); i++)
		if (shared->vectors[i])
			printf(" %s%u: %" PRIu64, i == 32 ? "other " : "#", i, shared->vectors[i]);
	printf("; endless and left out: %" PRIu64 "\n", shared->discarded);
	printf("forms alone in a case: %zu of %zu run, %zu of them to their end\n",
		s->generator.chosen_count - never_run, s->generator.chosen_count,
		s->generator.chosen_count - never_completed);
	printf("%" PRIu64 " cases in %.1f s (%.0f a second), seed %" PRIu64 ", engine %s: %" PRIu64
	       " differ, in %u forms"
	       " (%" PRIu64 " crashes)\n",
		shared->consumed, seconds, shared->consumed / seconds, s->options.seed, s->options.engine->name,
		shared->differing, shared->reported, shared->crashes);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static int prepare(struct session *s, struct error *err)
{
	unsigned undefined = 0;
	int ret = choose_isa(&s->options, err);

	if (!ret)
		ret = forms_enumerate(&s->forms, &s->options.isa, err);
	if (!ret)
		ret = share(s, err);
	if (!ret)
		ret = generator_init(&s->generator, &s->forms, s->options.seed, NULL, true, err);
	if (!ret)
		ret = oracle_probe_forms(s, &undefined, err);
	if (ret)
		return ret;
	generator_free(&s->generator);
	printf("seed %" PRIu64 ", engine %s, %zu instruction forms (left out: %u not offered by this CPU, %u excluded,"
	       " %u undefined here)\n",
		s->options.seed, s->options.engine->name, s->forms.count, s->forms.dropped_isa,
		s->forms.dropped_excluded, undefined);
	return generator_init(&s->generator, &s->forms, s->options.seed, s->options.form, s->options.single, err);
}

int main(int argc, char **argv)
{
	static struct session session;
	struct error err = {0};
	bool list = parse(argc, argv, &session.options), good;
	double begin;

	setvbuf(stdout, NULL, _IOFBF, 1 << 16);
	if (prepare(&session, &err)) {
		fprintf(stderr, "difftest: %s\n", err.text);
		return 3;
	}
	if (list) {
		for (size_t i = 0; i < session.generator.chosen_count; i++)
			puts(session.forms.list[session.generator.chosen[i]].name);
		return 0;
	}
	begin = now();
	good = supervise(&session);
	print_summary(&session, now() - begin);
	generator_free(&session.generator);
	forms_free(&session.forms);
	return !good ? 3 : session.shared->differing ? 1 : 0;
}
