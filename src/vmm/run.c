/* The vCPU threads: each runs its guest code and obeys what comes out of the engine. The board answers port and memory
 * accesses inside the engine's run (struct engine_board), so that what is left is short: the switch in vcpu_main(). */
#include "vmm/vm.h"

#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "vmm/terminal.h"

#define SNAPSHOT_SIZE 4000
#define RFLAGS_IF (1ull << 9)

/* ---- waking and sleeping ---- */

/* The pair with vcpu_sleep(): what is slept for was made true before this; then the count, then the look at asleep. */
static void vcpu_wake(struct vcpu *v)
{
	atomic_fetch_add(&v->wakes, 1);
	if (atomic_load(&v->asleep))
		syscall(SYS_futex, &v->wakes, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

void vcpu_call(struct vcpu *v, unsigned calls)
{
	atomic_fetch_or(&v->calls, calls);
	vcpu_wake(v);
	if (v->engine)
		v->vm->engine->vcpu_kick(v->engine, true);
}

static bool vcpu_is_called(struct vcpu *v)
{
	return atomic_load(&v->calls) || atomic_load(&v->vm->phase) != VM_RUNNING;
}

/* Sleeps until called or, if `interrupts`, until one is pending. No wake is lost: one that comes after the conditions
 * were looked at has changed the count, and the futex then does not wait. */
static void vcpu_sleep(struct vcpu *v, bool interrupts)
{
	for (;;) {
		unsigned seen = atomic_load(&v->wakes);

		if (vcpu_is_called(v) || (interrupts && board_interrupt_pending(v->vm->board, v->index)))
			return;
		atomic_store(&v->asleep, true);
		syscall(SYS_futex, &v->wakes, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
		atomic_store(&v->asleep, false);
	}
}

/* HLT. With interrupts off (a vCPU that a kernel has taken out of service) only INIT or the end of the VM wakes it. */
static void vcpu_halted(struct vcpu *v)
{
	struct engine_state state;

	v->vm->engine->vcpu_get(v->engine, ENGINE_STATE_GPRS, &state);
	vcpu_sleep(v, state.rflags & RFLAGS_IF);
}

/* ---- what the board asks for, from any thread ---- */

void vcpu_interrupt_ready(void *opaque, unsigned cpu)
{
	struct vm *vm = opaque;
	struct vcpu *v = &vm->vcpu[cpu];

	if (!v->engine) /* the board is older than its vCPUs */
		return;
	vm->engine->vcpu_kick(v->engine, false);
	vcpu_wake(v);
}

void vcpu_init(void *opaque, unsigned cpu)
{
	struct vm *vm = opaque;
	struct vcpu *v = &vm->vcpu[cpu];

	/* The boot processor would run its firmware again. There is none: what that would do is a reset. */
	if (cpu == 0) {
		vm_stop(vm, VM_CAUSE_RESET, NULL);
		return;
	}
	scope_lock(&v->lock);
	v->awaits_startup = true;
	atomic_fetch_and(&v->calls, ~(unsigned)VCPU_CALL_STARTUP);
	vcpu_call(v, VCPU_CALL_INIT);
}

void vcpu_startup(void *opaque, unsigned cpu, uint8_t vector)
{
	struct vm *vm = opaque;
	struct vcpu *v = &vm->vcpu[cpu];
	scope_lock(&v->lock);

	if (!v->awaits_startup) /* the second of the two that the protocol has, or a stray one */
		return;
	v->awaits_startup = false;
	v->startup_vector = vector;
	vcpu_call(v, VCPU_CALL_STARTUP);
}

void vcpu_wake_up(void *opaque, unsigned cpu)
{
	struct vm *vm = opaque;

	vcpu_call(&vm->vcpu[cpu], VCPU_CALL_WAKE);
}

/* ---- the thread ---- */

static void tell_statistics(struct vcpu *v)
{
	char text[4000] = "";

	if (v->engine && v->vm->engine->vcpu_statistics)
		v->vm->engine->vcpu_statistics(v->engine, text, sizeof(text));
	terminal_say("hostel-vmm: vCPU %u\n%s", v->index, text);
}

/* On the vCPU's own thread: nobody else may ask the engine. */
static void take_snapshot(struct vcpu *v)
{
	scope_lock(&v->snapshot_lock);

	if (!v->snapshot)
		v->snapshot = calloc(1, SNAPSHOT_SIZE);
	if (v->snapshot && v->engine && v->vm->engine->vcpu_statistics)
		v->vm->engine->vcpu_statistics(v->engine, v->snapshot, SNAPSHOT_SIZE);
	atomic_fetch_add(&v->snapshots, 1);
}

char *vcpu_copy_snapshot(struct vcpu *v)
{
	scope_lock(&v->snapshot_lock);

	return v->snapshot ? strdup(v->snapshot) : NULL;
}

static void power_on(struct vcpu *v);

static void answer_calls(struct vcpu *v)
{
	struct error err = {0};
	unsigned calls;
	uint8_t vector;

	pthread_mutex_lock(&v->lock);
	calls = atomic_exchange(&v->calls, 0);
	vector = v->startup_vector;
	pthread_mutex_unlock(&v->lock);

	if (calls & VCPU_CALL_POWER)
		power_on(v);
	if (!atomic_load(&v->plugged))
		calls &= ~(unsigned)(VCPU_CALL_INIT | VCPU_CALL_STARTUP);
	if (calls & VCPU_CALL_INIT) {
		v->vm->engine->vcpu_reset(v->engine, true);
		v->started = false;
	}
	if (calls & VCPU_CALL_STARTUP) {
		if (vcpu_set_startup_state(v, vector, &err) < 0)
			vm_stop(v->vm, VM_CAUSE_FAILED, &err);
		v->started = true;
	}
	if (calls & VCPU_CALL_STATISTICS)
		tell_statistics(v);
	if (calls & VCPU_CALL_SNAPSHOT)
		take_snapshot(v);
}

static void power_on(struct vcpu *v)
{
	struct error err = {0};

	v->boots = v->vm->boots;
	if (!atomic_load(&v->plugged)) {
		v->started = false;
		return;
	}
	v->vm->engine->vcpu_reset(v->engine, false);
	v->started = v->index == 0 || v->vm->own_chips;
	if (v->index == 0 && vcpu_set_boot_state(v, &v->vm->entry, &err) < 0)
		vm_stop(v->vm, VM_CAUSE_FAILED, &err);
}

/* A fault while handling a fault while handling a fault: the processor shuts down, and boards answer by a reset. */
static void triple_fault(struct vcpu *v)
{
	struct engine_state s;
	struct error err = {0};

	v->vm->engine->vcpu_get(v->engine, ENGINE_STATE_GPRS | ENGINE_STATE_CONTROL, &s);
	error_set(&err, EIO, "guest: triple fault on vCPU %u at rip %#llx, cr2 %#llx", v->index,
		(unsigned long long)s.rip, (unsigned long long)s.cr2);
	if (v->vm->config->exit_on_reset) {
		vm_stop(v->vm, VM_CAUSE_FAILED, &err);
		return;
	}
	if (vm_may_say(v->vm))
		terminal_say("hostel-vmm: %s; the machine is reset\n", err.text);
	vm_stop(v->vm, VM_CAUSE_RESET, NULL);
}

static void engine_failed(struct vcpu *v, const char *message)
{
	static const char *const names[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10",
		"r11", "r12", "r13", "r14", "r15"};
	struct engine_state s;
	struct error err = {0};

	v->vm->engine->vcpu_get(v->engine, ENGINE_STATE_GPRS | ENGINE_STATE_SEGMENTS | ENGINE_STATE_CONTROL, &s);
	for (unsigned i = 0; i < 16; i++)
		terminal_say("%3s %016llx%s", names[i], (unsigned long long)s.gprs[i], i % 4 == 3 ? "\n" : "  ");
	terminal_say("rip %016llx  rflags %08llx  cs %04x base %llx\n", (unsigned long long)s.rip,
		(unsigned long long)s.rflags, s.segments[ENGINE_CS].selector,
		(unsigned long long)s.segments[ENGINE_CS].base);
	terminal_say("cr0 %llx  cr2 %llx  cr3 %llx  cr4 %llx  efer %llx\n", (unsigned long long)s.cr0,
		(unsigned long long)s.cr2, (unsigned long long)s.cr3, (unsigned long long)s.cr4,
		(unsigned long long)s.efer);
	error_set(&err, EIO, "engine %s: vCPU %u at rip %#llx: %s", v->vm->engine->name, v->index,
		(unsigned long long)s.rip, message);
	vm_stop(v->vm, VM_CAUSE_FAILED, &err);
}

/* Signals to the process are the main thread's; an engine that kicks by a signal unblocks its own. */
void *vcpu_main(void *opaque)
{
	struct vcpu *v = opaque;
	struct vm *vm = v->vm;
	struct engine_exit exit;

	power_on(v);
	for (;;) {
		if (atomic_load(&vm->phase) != VM_RUNNING) {
			if (vm->observer)
				take_snapshot(v);
			if (!vm_park(vm))
				return NULL;
			if (v->boots != vm->boots)
				power_on(v);
			continue;
		}
		if (atomic_load(&v->calls))
			answer_calls(v);
		if (!v->started) {
			vcpu_sleep(v, false);
			continue;
		}
		vm->engine->vcpu_run(v->engine, &exit);
		if ((unsigned)exit.reason < ENGINE_EXIT_REASONS)
			atomic_fetch_add_explicit(&v->exits[exit.reason], 1, memory_order_relaxed);
		switch (exit.reason) {
		case ENGINE_EXIT_KICKED:
			break;
		case ENGINE_EXIT_HALTED:
			vcpu_halted(v);
			break;
		case ENGINE_EXIT_TRIPLE_FAULT:
			triple_fault(v);
			break;
		case ENGINE_EXIT_ERROR:
			engine_failed(v, exit.message);
			break;
		case ENGINE_EXIT_STEPPED:   /* vcpu_step is not used here */
		case ENGINE_EXIT_EXCEPTION: /* nor is stop_on_exception */
		case ENGINE_EXIT_REASONS:
			engine_failed(v, "came back for a reason that nobody asked for");
			break;
		}
	}
}
