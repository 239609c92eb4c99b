/* vCPU threads and the life of a VM: sleeping and waking, INIT and SIPI, reset, power-off, triple fault. The engine,
 * the board and the kernel loader are played by the test: a "guest program" is a function that runs as one vcpu_run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vmm/hotplug.h"
#include "vmm/vm.h"

/* ---- the engine ---- */
struct engine_vcpu {
	unsigned cpu;
	struct engine_state state;
	atomic_bool leave;
	unsigned runs; /* since the last reset */
};

static struct stage {
	struct vm *vm;
	struct vmm_config config;
	struct engine_vcpu vcpu[4];
	void (*program)(struct engine_vcpu *v, struct engine_exit *exit);
	atomic_bool pending[4];
	atomic_uint resets, loads, released, inits;
	atomic_uint count; /* the program's own */
} stage;

static void fake_reset(struct engine_vcpu *v, bool init)
{
	memset(&v->state, 0, sizeof(v->state));
	v->state.rip = 0xfff0;
	v->state.rflags = 2;
	v->runs = 0;
	if (init)
		stage.inits++;
}

static void fake_get(struct engine_vcpu *v, unsigned mask, struct engine_state *state)
{
	*state = v->state;
}

static int fake_set(struct engine_vcpu *v, unsigned mask, const struct engine_state *state, struct error *err)
{
	v->state = *state;
	return 0;
}

static void fake_run(struct engine_vcpu *v, struct engine_exit *exit)
{
	if (atomic_exchange(&v->leave, false)) {
		exit->reason = ENGINE_EXIT_KICKED;
		return;
	}
	stage.program(v, exit);
	v->runs++;
}

static void fake_kick(struct engine_vcpu *v, bool leave)
{
	if (leave)
		atomic_store(&v->leave, true);
}

static const struct engine fake_engine = {.name = "fake",
	.vcpu_reset = fake_reset,
	.vcpu_get = fake_get,
	.vcpu_set = fake_set,
	.vcpu_run = fake_run,
	.vcpu_kick = fake_kick};

/* ---- the board, the loader, the console ---- */
bool board_interrupt_pending(void *board, unsigned cpu)
{
	return atomic_load(&stage.pending[cpu]);
}

void board_reset(struct board *board)
{
	stage.resets++;
}

int vm_load(struct vm *vm, struct error *err)
{
	if (++stage.loads == 3 && vm->config->kernel)
		return error_set(err, ENOENT, "kernel %s has gone", vm->config->kernel);
	return 0;
}

bool vm_devices_quiet(struct vm *vm, uint32_t slots)
{
	return true;
}

void vm_devices_resume(struct vm *vm)
{
}

void vm_remove_slots(struct vm *vm, uint32_t slots)
{
}

uint32_t vm_removals_asked(const struct vm *vm)
{
	return 0;
}

void console_release(struct console *console)
{
	stage.released++;
}

void console_suspend(struct console *console)
{
}

void console_resume(struct console *console)
{
}

/* ---- running a program ---- */
static vm_observer *observer;

static int play(unsigned cpus, bool exit_on_reset, void (*program)(struct engine_vcpu *v, struct engine_exit *exit),
	struct error *err)
{
	struct vm *vm = calloc(1, sizeof(*vm) + cpus * sizeof(vm->vcpu[0]));
	const char *kernel = stage.config.kernel;
	int status;

	memset(&stage, 0, sizeof(stage));
	stage.vm = vm;
	stage.program = program;
	stage.config.kernel = kernel;
	stage.config.exit_on_reset = exit_on_reset;
	vm->config = &stage.config;
	vm->engine = &fake_engine;
	vm->cpus = cpus;
	vm->observer = observer;
	vm->observer_opaque = vm;
	vm->console = (struct console *)&stage; /* only passed on */
	vm->entry = (struct boot_entry){
		.long_mode = true, .rip = 0x1000200, .rsi = 0x7000, .cr3 = 0x9000, .gdt = 0x500, .gdt_limit = 31};
	pthread_mutex_init(&vm->lock, NULL);
	pthread_cond_init(&vm->resumed, NULL);
	for (unsigned i = 0; i < cpus; i++) {
		stage.vcpu[i].cpu = i;
		vm->vcpu[i] = (struct vcpu){.vm = vm, .index = i, .engine = &stage.vcpu[i], .awaits_startup = i > 0, .plugged = true};
		pthread_mutex_init(&vm->vcpu[i].lock, NULL);
		pthread_mutex_init(&vm->vcpu[i].snapshot_lock, NULL);
	}
	assert_int_equal(loop_create(&vm->loop, NULL), 0);
	assert_int_equal(vm_watch_signals(vm, NULL), 0);
	*err = (struct error){0};
	alarm(20);
	status = vm_run(vm, err);
	alarm(0);
	close(vm->signal_fd);
	loop_destroy(vm->loop);
	for (unsigned i = 0; i < cpus; i++)
		free(vm->vcpu[i].snapshot);
	free(vm);
	return status;
}

static void halt(struct engine_vcpu *v, struct engine_exit *exit, bool interrupts)
{
	v->state.rflags = interrupts ? 0x202 : 2;
	exit->reason = ENGINE_EXIT_HALTED;
}

/* ---- programs and tests ---- */

static void boots_and_powers_off(struct engine_vcpu *v, struct engine_exit *exit)
{
	const struct engine_state *s = &v->state;

	exit->reason = ENGINE_EXIT_KICKED;
	/* Linux's 64-bit entry: long mode, flat, interrupts off. */
	if (s->rip == 0x1000200 && s->gprs[ENGINE_RSI] == 0x7000 && s->cr3 == 0x9000 && s->cr0 == 0x80000011 &&
		s->cr4 == 0x20 && s->efer == 0x500 && s->rflags == 2 && s->gdt.base == 0x500 && s->gdt.limit == 31 &&
		s->segments[ENGINE_CS].selector == 0x10 && s->segments[ENGINE_CS].attributes == 0xa9b &&
		s->segments[ENGINE_DS].selector == 0x18 && s->segments[ENGINE_DS].attributes == 0xc93 &&
		s->segments[ENGINE_SS].limit == 0xffffffff)
		stage.count++;
	vm_stop(stage.vm, VM_CAUSE_POWER_OFF, NULL);
}

static void test_power_off(void **state)
{
	struct error err;

	assert_int_equal(play(4, false, boots_and_powers_off, &err), 0);
	assert_int_equal(stage.count, 1);
	assert_int_equal(err.code, 0);
	assert_true(stage.released > 0);
}

static void test_pvh_state(void **state)
{
	struct vm *vm = calloc(1, sizeof(*vm));
	struct engine_vcpu engine = {0};
	struct vcpu v = {.vm = vm, .engine = &engine};
	struct boot_entry entry = {.rip = 0x1000000, .rbx = 0x6000};

	vm->engine = &fake_engine;
	assert_int_equal(vcpu_set_boot_state(&v, &entry, NULL), 0);
	assert_int_equal(engine.state.rip, 0x1000000);
	assert_int_equal(engine.state.gprs[ENGINE_RBX], 0x6000);
	assert_int_equal(engine.state.cr0, 0x11);
	assert_int_equal(engine.state.cr4, 0);
	assert_int_equal(engine.state.efer, 0);
	assert_int_equal(engine.state.segments[ENGINE_CS].attributes, 0xc9b);
	assert_int_equal(engine.state.segments[ENGINE_ES].attributes, 0xc93);
	assert_int_equal(engine.state.segments[ENGINE_TR].attributes, 0x8b);
	free(vm);
}

/* Two vCPUs pass an interrupt to and fro, each halting for it: a lost wake-up hangs. The second is started by INIT and
 * two SIPIs in a row, as kernels do. */
#define ROUNDS 100000

static void ping_pong(struct engine_vcpu *v, struct engine_exit *exit)
{
	unsigned other = !v->cpu;

	exit->reason = ENGINE_EXIT_KICKED;
	if (v->runs == 0 && v->cpu == 0) {
		vcpu_init(stage.vm, 1);
		vcpu_startup(stage.vm, 1, 0x9f);
		vcpu_startup(stage.vm, 1, 0x13);
		atomic_store(&stage.pending[0], true);
	}
	if (v->runs == 0 && v->cpu == 1 &&
		(v->state.rip || v->state.segments[ENGINE_CS].base != 0x9f000 ||
			v->state.segments[ENGINE_CS].selector != 0x9f00)) {
		exit->reason = ENGINE_EXIT_ERROR;
		strcpy(exit->message, "started wrongly");
		return;
	}
	if (atomic_exchange(&stage.pending[v->cpu], false)) {
		if (++stage.count == ROUNDS) {
			vm_stop(stage.vm, VM_CAUSE_POWER_OFF, NULL);
			return;
		}
		atomic_store(&stage.pending[other], true);
		vcpu_interrupt_ready(stage.vm, other);
	}
	halt(v, exit, true);
}

static void test_wake_ups(void **state)
{
	struct error err;

	assert_int_equal(play(2, false, ping_pong, &err), 0);
	assert_int_equal(stage.count, ROUNDS);
	assert_int_equal(stage.inits, 1);
}

/* Many resets, with vCPUs that run, sleep, and were never started; the one reset after the other. */
static void resets(struct engine_vcpu *v, struct engine_exit *exit)
{
	halt(v, exit, true);
	if (v->cpu != 0)
		return;
	if (v->runs < 3) {
		vcpu_init(stage.vm, v->runs + 1);
		if (v->runs < 2)
			vcpu_startup(stage.vm, v->runs + 1, 1);
		exit->reason = ENGINE_EXIT_KICKED;
		return;
	}
	if (++stage.count == 500)
		vm_stop(stage.vm, VM_CAUSE_POWER_OFF, NULL);
	else
		vm_stop(stage.vm, VM_CAUSE_RESET, NULL);
}

static void test_resets(void **state)
{
	struct error err;

	stage.config.kernel = NULL;
	assert_int_equal(play(4, false, resets, &err), 0);
	assert_int_equal(stage.count, 500);
	assert_int_equal(stage.resets, 499);
	assert_int_equal(stage.loads, 499);

	assert_int_equal(play(4, true, resets, &err), 0); /* --on-reset exit */
	assert_int_equal(stage.count, 1);
	assert_int_equal(stage.resets, 0);

	stage.config.kernel = "k"; /* which goes between two resets */
	assert_int_equal(play(4, false, resets, &err), 1);
	assert_int_equal(stage.count, 3);
	assert_string_equal(err.text, "kernel k has gone");
	stage.config.kernel = NULL;
}

/* INIT of the boot processor is a reset. */
static void inits_first(struct engine_vcpu *v, struct engine_exit *exit)
{
	halt(v, exit, false);
	vcpu_init(stage.vm, 0);
}

static void test_init_of_first(void **state)
{
	struct error err;

	assert_int_equal(play(2, true, inits_first, &err), 0);
}

static void faults(struct engine_vcpu *v, struct engine_exit *exit)
{
	exit->reason = ENGINE_EXIT_TRIPLE_FAULT;
	v->state.rip = 0x1234;
	v->state.cr2 = 0x5678;
	if (stage.count++ == 2)
		vm_stop(stage.vm, VM_CAUSE_POWER_OFF, NULL);
}

static void test_triple_fault(void **state)
{
	struct error err;

	assert_int_equal(play(1, true, faults, &err), 1);
	assert_string_equal(err.text, "guest: triple fault on vCPU 0 at rip 0x1234, cr2 0x5678");
	assert_int_equal(play(2, false, faults, &err), 0);
	assert_int_equal(stage.resets, 2);
}

static void engine_breaks(struct engine_vcpu *v, struct engine_exit *exit)
{
	v->state.rip = 0x42;
	exit->reason = ENGINE_EXIT_ERROR;
	strcpy(exit->message, "out of ideas");
}

static void test_engine_error(void **state)
{
	struct error err;

	assert_int_equal(play(2, false, engine_breaks, &err), 1);
	assert_string_equal(err.text, "engine fake: vCPU 0 at rip 0x42: out of ideas");
}

/* Interrupts off: a pending one does not end the halt (no busy loop), a signal to the process does. */
static void dies_quietly(struct engine_vcpu *v, struct engine_exit *exit)
{
	halt(v, exit, false);
	stage.count++;
	atomic_store(&stage.pending[0], true);
	vcpu_interrupt_ready(stage.vm, 0);
	if (v->runs == 0)
		kill(getpid(), SIGTERM);
}

static void test_signal(void **state)
{
	struct error err;

	assert_int_equal(play(1, false, dies_quietly, &err), 128 + SIGTERM);
	assert_int_equal(stage.count, 1);
}

/* Pauses in the middle of a program, is reset while paused, runs on, and powers off. All but the program runs on the
 * loop's thread. */
static struct {
	struct loop_timer timer;
	unsigned events, count;
} pausing;

static void still_paused(struct loop_timer *timer)
{
	struct vm *vm = stage.vm;

	if (vm->paused && atomic_load(&stage.count) == pausing.count)
		pausing.events |= 1 << 20; /* nothing has run */
	vm_stop(vm, VM_CAUSE_RESET, NULL);
}

static void pause_observer(void *opaque, enum vm_event event, const char *detail, const struct error *why)
{
	struct vm *vm = opaque;

	pausing.events |= 1 << event;
	if (event == VM_EVENT_STARTED) {
		vm_pause(vm);
		vm_resume(vm); /* taken back before it has happened: nothing has */
		vm_pause(vm);
	} else if (event == VM_EVENT_PAUSED && !(pausing.events & 1 << VM_EVENT_RESET)) {
		pausing.count = atomic_load(&stage.count);
		pausing.timer.function = still_paused;
		loop_timer_set(vm->loop, &pausing.timer, clock_now() + 30000000);
	} else if (event == VM_EVENT_RESET) {
		vm_resume(vm);
	} else if (event == VM_EVENT_RESUMED) {
		vm_stop(vm, VM_CAUSE_POWER_OFF, NULL);
	}
}

static void counts(struct engine_vcpu *v, struct engine_exit *exit)
{
	exit->reason = ENGINE_EXIT_KICKED;
	atomic_fetch_add(&stage.count, 1);
	usleep(1000);
}

static void test_pause(void **state)
{
	struct error err;

	memset(&pausing, 0, sizeof(pausing));
	observer = pause_observer;
	assert_int_equal(play(2, false, counts, &err), 0);
	observer = NULL;
	assert_int_equal(pausing.events, 1 << VM_EVENT_STARTED | 1 << VM_EVENT_PAUSED | 1 << VM_EVENT_RESET |
						 1 << VM_EVENT_RESUMED | 1 << VM_EVENT_POWER_OFF | 1 << 20);
	assert_int_equal(stage.resets, 1);
	assert_int_equal(stage.loads, 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_power_off),
		cmocka_unit_test(test_pvh_state),
		cmocka_unit_test(test_wake_ups),
		cmocka_unit_test(test_resets),
		cmocka_unit_test(test_init_of_first),
		cmocka_unit_test(test_triple_fault),
		cmocka_unit_test(test_engine_error),
		cmocka_unit_test(test_signal),
		cmocka_unit_test(test_pause),
	};

	vm_block_signals();
	return cmocka_run_group_tests(tests, NULL, NULL);
}
