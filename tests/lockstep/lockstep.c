/* A kernel on the bare board with every Nth block checked against its instructions: see README.md. */
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/loop.h"
#include "base/util.h"
#include "engine/cpu_model.h"
#include "engine/engine.h"
#include "engine/tsc.h"
#include "machine/board.h"
#include "machine/boot.h"
#include "machine/memory.h"
#include "machine/serial.h"

#define FEWEST_BLOCKS 1000

struct machine {
	struct guest_memory memory;
	struct loop *loop;
	struct board *board;
	struct board_host host;
	struct engine_board engine_board;
	struct boot_entry entry;
	struct engine_vm *vm;
	struct engine_vcpu *_Atomic vcpu;
	const char *until;
	char line[256]; /* the console's current one */
	unsigned line_used;
	atomic_bool end, seen;
	int status;
};

static void event(void *opaque, enum board_event e)
{
	struct machine *m = opaque;

	(void)e;
	m->end = true;
	if (m->vcpu)
		engine_bt.vcpu_kick(m->vcpu, true);
}

static void interrupt_ready(void *opaque, unsigned cpu)
{
	struct machine *m = opaque;

	(void)cpu;
	if (m->vcpu)
		engine_bt.vcpu_kick(m->vcpu, false);
}

static void no_init(void *opaque, unsigned cpu)
{
	(void)opaque;
	(void)cpu;
}

static void no_startup(void *opaque, unsigned cpu, uint8_t vector)
{
	(void)opaque;
	(void)cpu;
	(void)vector;
}

static uint64_t tsc_now(void *opaque, unsigned cpu)
{
	struct machine *m = opaque;

	(void)cpu;
	return m->vcpu ? engine_bt.vcpu_tsc(m->vcpu) : 0;
}

static size_t console(void *opaque, const uint8_t *bytes, size_t n)
{
	struct machine *m = opaque;

	for (size_t k = 0; k < n; k++) {
		if (bytes[k] == '\n' || m->line_used == sizeof(m->line) - 1)
			m->line_used = 0;
		m->line[m->line_used++] = (char)bytes[k];
		m->line[m->line_used] = 0;
		if (m->until && strstr(m->line, m->until)) {
			m->seen = true;
			event(m, BOARD_EVENT_POWER_OFF);
		}
	}
	return fwrite(bytes, 1, n, stdout);
}

static void *run_loop(void *opaque)
{
	loop_run(opaque);
	return NULL;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* As src/vmm/start.c: Linux's 64-bit boot protocol, or PVH. */
static int start(struct machine *m, struct error *err)
{
	const unsigned mask = ENGINE_STATE_GPRS | ENGINE_STATE_SEGMENTS | ENGINE_STATE_CONTROL;
	static struct engine_state s;
	bool wide = m->entry.long_mode;

	engine_bt.vcpu_get(m->vcpu, mask, &s);
	memset(s.gprs, 0, sizeof(s.gprs));
	s.rip = m->entry.rip;
	s.rflags = 2;
	for (unsigned k = ENGINE_ES; k <= ENGINE_GS; k++)
		s.segments[k] = (struct engine_segment){.limit = 0xffffffff,
			.selector = k == ENGINE_CS ? 0x10 : 0x18,
			.attributes = (uint16_t)(SEGMENT_P | SEGMENT_S | SEGMENT_G |
				(k == ENGINE_CS ? 0xb | (wide ? SEGMENT_L : SEGMENT_DB) : 0x3 | SEGMENT_DB))};
	s.segments[ENGINE_TR] = (struct engine_segment){.limit = 0x67, .attributes = 0xb | SEGMENT_P};
	s.gdt = (struct engine_table){.base = m->entry.gdt, .limit = m->entry.gdt_limit};
	s.idt = (struct engine_table){0};
	s.cr0 = 0x11 | (wide ? 1u << 31 : 0); /* PE, ET; PG */
	s.cr4 = wide ? 0x20 : 0;	      /* PAE */
	s.efer = wide ? 0x500 : 0;	      /* LME, LMA */
	s.cr3 = wide ? m->entry.cr3 : 0;
	s.gprs[ENGINE_RSI] = wide ? m->entry.rsi : 0;
	s.gprs[ENGINE_RBX] = wide ? 0 : m->entry.rbx;
	return engine_bt.vcpu_set(m->vcpu, mask, &s, err);
}

static int build(struct machine *m, uint64_t memory, const struct boot_config *files, unsigned every, bool exact, struct error *err)
{
	const struct cpu_model *model = cpu_model_find("host", err);
	struct boot_config boot = *files;
	struct engine_vcpu *vcpu;
	int ret = model ? 0 : -err->code;

	m->host = (struct board_host){.opaque = m, .event = event, .interrupt_ready = interrupt_ready, .init = no_init,
		.startup = no_startup};
	m->engine_board = (struct engine_board){.pio_read = board_pio_read, .pio_write = board_pio_write,
		.mmio_read = board_mmio_read, .mmio_write = board_mmio_write, .msr_read = board_msr_read,
		.msr_write = board_msr_write, .cr8_read = board_cr8_read, .cr8_write = board_cr8_write,
		.interrupt_ack = board_interrupt_ack, .interrupt_pending = board_interrupt_pending};
	if (ret == 0)
		ret = memory_create(&m->memory, memory, err);
	if (ret == 0)
		ret = loop_create(&m->loop, err);
	if (ret == 0)
		ret = board_create(&m->board,
			&(struct board_config){.cpus = 1, .memory = &m->memory, .loop = m->loop, .host = &m->host,
				.tsc_hz = engine_tsc_hz(), .tsc_now = tsc_now},
			err);
	if (ret < 0)
		return ret;
	serial_set_output(board_serial(m->board), console, NULL, m);
	m->engine_board.opaque = m->board;
	board_reset(m->board);
	ret = engine_bt.vm_create(&m->vm,
		&(struct engine_config){.cpus = 1, .model = model, .board = &m->engine_board, .memory = &m->memory,
			.lockstep = every, .exact_flags = exact},
		err);
	if (ret == 0)
		ret = engine_bt.vcpu_create(m->vm, 0, &vcpu, err);
	if (ret < 0)
		return ret;
	m->vcpu = vcpu;
	ret = acpi_write_tables(m->board, 1, &boot.rsdp, err);
	return ret < 0 ? ret : boot_load(&m->entry, &m->memory, &boot, err);
}

static uint64_t counter(struct machine *m, const char *name)
{
	static char text[4096];
	const char *at;

	engine_bt.vcpu_statistics(m->vcpu, text, sizeof(text));
	at = strstr(text, name);
	return at ? strtoull(at + strlen(name), NULL, 10) : 0;
}

/* On this thread, which is the vCPU's, until the end; then the exit status. */
static int run(struct machine *m, double seconds)
{
	double end = now() + seconds;
	struct engine_exit exit;
	struct error err = {0};

	engine_bt.vcpu_reset(m->vcpu, false);
	if (start(m, &err)) {
		fprintf(stderr, "lockstep: %s\n", err.text);
		return 3;
	}
	while (!m->end && now() < end) {
		engine_bt.vcpu_run(m->vcpu, &exit);
		switch (exit.reason) {
		case ENGINE_EXIT_HALTED:
			while (!m->end && now() < end && !board_interrupt_pending(m->board, 0))
				poll(NULL, 0, 1);
			break;
		case ENGINE_EXIT_ERROR:
			fprintf(stderr, "lockstep: %s\n", exit.message);
			return 1;
		case ENGINE_EXIT_TRIPLE_FAULT:
			fprintf(stderr, "lockstep: the guest's triple fault at %#lx\n", exit.address);
			return 3;
		default:
			break;
		}
	}
	return m->until && !m->seen ? 3 : 0;
}

/* Wakes the vCPU when its time is over: it may never leave by itself. */
static void *watch(void *opaque)
{
	struct machine *m = opaque;

	while (!m->end) {
		poll(NULL, 0, 100);
		engine_bt.vcpu_kick(m->vcpu, true);
	}
	return NULL;
}

static uint64_t number(const char *text)
{
	char *end;
	uint64_t value = strtoull(text, &end, 0);

	if (*end || !*text || *text == '-') {
		fprintf(stderr, "lockstep: %s: not a number\n", text);
		exit(2);
	}
	return value;
}

int main(int argc, char **argv)
{
	enum { EVERY = 1, SECONDS, UNTIL, EXACT, MEMORY, INITRD, APPEND };
	static const struct option options[] = {{"every", 1, NULL, EVERY}, {"seconds", 1, NULL, SECONDS}, {"until", 1, NULL, UNTIL},
		{"exact", 0, NULL, EXACT}, {"memory", 1, NULL, MEMORY}, {"initrd", 1, NULL, INITRD}, {"append", 1, NULL, APPEND}, {0}};
	struct boot_config boot = {.cmdline = "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1"};
	static struct machine m;
	unsigned every = 1;
	uint64_t memory = 256, compared;
	double seconds = 10;
	bool exact = false;
	struct error err = {0};
	pthread_t loop, watcher;
	int option, status;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case EVERY: every = (unsigned)number(optarg); break;
		case SECONDS: seconds = (double)number(optarg); break;
		case UNTIL: m.until = optarg; break;
		case EXACT: exact = true; break;
		case MEMORY: memory = number(optarg); break;
		case INITRD: boot.initrd = optarg; break;
		case APPEND: boot.cmdline = optarg; break;
		default: return 2;
		}
	}
	if (optind + 1 != argc) {
		fprintf(stderr, "usage: lockstep [--every N] [--seconds S] [--until TEXT] [--exact] [--memory MIB] [--initrd FILE]"
				" [--append TEXT] KERNEL\n");
		return 2;
	}
	boot.kernel = argv[optind];
	if (build(&m, memory << 20, &boot, every, exact, &err)) {
		fprintf(stderr, "lockstep: %s\n", err.text);
		return 3;
	}
	if (pthread_create(&loop, NULL, run_loop, m.loop) || pthread_create(&watcher, NULL, watch, &m)) {
		fprintf(stderr, "lockstep: no thread\n");
		return 3;
	}
	status = run(&m, seconds);
	m.end = true;
	pthread_join(watcher, NULL);
	loop_stop(m.loop);
	pthread_join(loop, NULL);
	compared = counter(&m, "lockstep_blocks ");
	printf("\nlockstep: %lu blocks compared, %lu left out\n", compared, counter(&m, "lockstep_left_out "));
	fflush(stdout);
	if (status == 0 && compared < FEWEST_BLOCKS) {
		fprintf(stderr, "lockstep: fewer than %d blocks compared: too short a time, or --every is too large\n", FEWEST_BLOCKS);
		status = 3;
	}
	engine_bt.vcpu_destroy(m.vcpu);
	engine_bt.vm_destroy(m.vm);
	board_destroy(m.board);
	loop_destroy(m.loop);
	memory_destroy(&m.memory);
	return status;
}
