/* How a VM stops, resets and ends, and the signals that the process gets. */
#include "vmm/vm.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "vmm/hotplug.h"
#include "vmm/terminal.h"

#define TOLD_TWICE 200000000ull /* ns within which a signal may arrive by two ways */
#define SETTLE_PERIOD 500000 /* ns between looks at devices that have something in flight */

/* ---- stopping and resuming ---- */

void vm_stop(struct vm *vm, enum vm_cause cause, const struct error *why)
{
	bool last_word;

	pthread_mutex_lock(&vm->lock);
	if (cause > vm->cause) {
		vm->cause = cause;
		if (why)
			vm->error = *why;
	}
	if (atomic_load(&vm->phase) == VM_RUNNING)
		atomic_store(&vm->phase, VM_STOPPING);
	last_word = vm->cause > VM_CAUSE_RESET;
	if (vm->parked == vm->cpus) /* paused: nobody else will say so */
		loop_timer_set(vm->loop, &vm->settle, clock_now());
	pthread_mutex_unlock(&vm->lock);

	/* A vCPU that waits for the console's reader would keep the end waiting. */
	if (last_word && vm->console)
		console_release(vm->console);
	if (last_word && vm->hvc)
		console_release(vm->hvc);
	for (unsigned i = 0; i < vm->cpus; i++)
		vcpu_call(&vm->vcpu[i], 0);
}

void vm_tell(struct vm *vm, enum vm_event event, const char *detail, const struct error *why)
{
	if (vm->observer)
		vm->observer(vm->observer_opaque, event, detail, why);
}

static void end(struct vm *vm)
{
	static const enum vm_event events[] = {[VM_CAUSE_RESET] = VM_EVENT_RESET,
		[VM_CAUSE_POWER_OFF] = VM_EVENT_POWER_OFF,
		[VM_CAUSE_DEBUG_EXIT] = VM_EVENT_POWER_OFF,
		[VM_CAUSE_LEAVE] = VM_EVENT_LEFT,
		[VM_CAUSE_FAILED] = VM_EVENT_FAILED};

	vm_tell(vm, events[vm->cause], NULL, vm->cause == VM_CAUSE_FAILED ? &vm->error : NULL);
	scope_lock(&vm->lock);
	atomic_store(&vm->phase, VM_ENDING);
	vm->parked = 0;
	vm->resumes++;
	pthread_cond_broadcast(&vm->resumed);
	loop_stop(vm->loop);
}

/* The vCPUs are parked and the devices quiet. */
static void reset(struct vm *vm)
{
	struct error err = {0};
	bool failed;

	/* What the guest was asked to let go of, it has now: its next kernel does not find it any more. */
	atomic_fetch_or(&vm->ejected, vm_removals_asked(vm));
	board_reset(vm->board);
	for (unsigned i = 0; i < vm->cpus; i++) {
		atomic_store(&vm->vcpu[i].calls, 0);
		vm->vcpu[i].awaits_startup = i > 0;
	}
	failed = vm_load(vm, &err) < 0;
	pthread_mutex_lock(&vm->lock);
	vm->boots++;
	if (failed) {
		vm->cause = VM_CAUSE_FAILED;
		vm->error = err;
	} else if (vm->cause == VM_CAUSE_RESET) {
		vm->cause = VM_CAUSE_NONE;
	}
	pthread_mutex_unlock(&vm->lock);
	if (!failed)
		vm_tell(vm, VM_EVENT_RESET, NULL, NULL);
}

/* Runs on, unless there is something new to see to. */
static void go_on(struct vm *vm)
{
	bool was_paused = vm->paused;

	vm_devices_resume(vm);
	{
		scope_lock(&vm->lock);
		if (vm->cause != VM_CAUSE_NONE) {
			loop_timer_set(vm->loop, &vm->settle, clock_now());
			return;
		}
		vm->paused = false;
		vm->parked = 0;
		vm->resumes++;
		atomic_store(&vm->phase, VM_RUNNING);
		pthread_cond_broadcast(&vm->resumed);
	}
	if (was_paused)
		vm_tell(vm, VM_EVENT_RESUMED, NULL, NULL);
}

/* Once all vCPU threads are parked: ends, resets, removes devices or pauses, as was asked for, and goes on. Nothing in
 * it waits: while a device still has something in flight (which may take the disk's time) it comes again, and
 * the loop serves others. It may run once too often. */
static void settle(struct loop_timer *timer)
{
	struct vm *vm = container_of(timer, struct vm, settle);
	enum vm_cause cause;
	uint32_t ejected;
	bool parked, pause;

	pthread_mutex_lock(&vm->lock);
	parked = atomic_load(&vm->phase) == VM_STOPPING && vm->parked == vm->cpus;
	cause = vm->cause;
	pause = vm->pause_wanted;
	pthread_mutex_unlock(&vm->lock);
	if (!parked)
		return;
	if (cause > VM_CAUSE_RESET || (cause == VM_CAUSE_RESET && vm->config->exit_on_reset)) {
		end(vm);
		return;
	}
	ejected = atomic_load(&vm->ejected);
	if (!vm_devices_quiet(vm, cause == VM_CAUSE_RESET || pause ? VM_ALL_DEVICES : ejected)) {
		loop_timer_set(vm->loop, &vm->settle, clock_now() + SETTLE_PERIOD);
		return;
	}
	if (cause == VM_CAUSE_RESET)
		reset(vm);
	ejected = atomic_exchange(&vm->ejected, 0);
	if (ejected)
		vm_remove_slots(vm, ejected);
	if (!pause) {
		go_on(vm);
	} else if (!vm->paused) {
		vm->paused = true;
		vm_tell(vm, VM_EVENT_PAUSED, NULL, NULL);
	}
	if (vm->paused && cause == VM_CAUSE_RESET) /* which may have failed */
		loop_timer_set(vm->loop, &vm->settle, clock_now());
}

void vm_pause(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	vm->pause_wanted = true;
	pthread_mutex_unlock(&vm->lock);
	vm_stop(vm, VM_CAUSE_NONE, NULL);
}

void vm_resume(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	vm->pause_wanted = false;
	pthread_mutex_unlock(&vm->lock);
	loop_timer_set(vm->loop, &vm->settle, clock_now());
}

void vm_pci_ejected(void *opaque, uint32_t slots)
{
	struct vm *vm = opaque;

	atomic_fetch_or(&vm->ejected, slots);
	vm_stop(vm, VM_CAUSE_NONE, NULL);
}

bool vm_park(struct vm *vm)
{
	unsigned resumes;
	scope_lock(&vm->lock);

	if (atomic_load(&vm->phase) == VM_STOPPING) {
		resumes = vm->resumes;
		if (++vm->parked == vm->cpus)
			loop_timer_set(vm->loop, &vm->settle, clock_now());
		/* By count and not by phase: it may have been resumed and stopped again before we wake. */
		while (vm->resumes == resumes)
			pthread_cond_wait(&vm->resumed, &vm->lock);
	}
	return atomic_load(&vm->phase) != VM_ENDING;
}

bool vm_may_say(struct vm *vm)
{
	uint64_t now = clock_now();
	scope_lock(&vm->lock);

	if (now - vm->said_since > 60000000000ull) {
		vm->said_since = now;
		vm->said = 0;
	}
	return vm->said++ < 10;
}

/* ---- signals ---- */

static const int ending_signals[] = {SIGTERM, SIGINT, SIGHUP};
static const int other_signals[] = {SIGTSTP, SIGCONT, SIGUSR1};

static void signal_sets(sigset_t *handled, sigset_t *blocked)
{
	sigemptyset(handled);
	for (unsigned i = 0; i < sizeof(ending_signals) / sizeof(int); i++)
		sigaddset(handled, ending_signals[i]);
	for (unsigned i = 0; i < sizeof(other_signals) / sizeof(int); i++)
		sigaddset(handled, other_signals[i]);
	*blocked = *handled;
	/* A background process that touches the terminal gets an error instead of being suspended with its guest. */
	sigaddset(blocked, SIGTTIN);
	sigaddset(blocked, SIGTTOU);
}

void vm_block_signals(void)
{
	sigset_t handled, blocked;

	signal_sets(&handled, &blocked);
	pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	/* A reader that goes away is an error of write(), not our death. */
	signal(SIGPIPE, SIG_IGN);
}

static void signal_arrived(void *opaque, int fd, uint32_t events)
{
	struct vm *vm = opaque;
	struct signalfd_siginfo info;

	if (read(fd, &info, sizeof(info)) != sizeof(info))
		return;
	switch (info.ssi_signo) {
	case SIGTSTP:
		console_suspend(vm->console);
		if (vm->hvc)
			console_suspend(vm->hvc);
		raise(SIGSTOP); /* goes on with SIGCONT */
		break;
	case SIGCONT:
		console_resume(vm->console);
		if (vm->hvc)
			console_resume(vm->hvc);
		break;
	case SIGUSR1:
		for (unsigned i = 0; i < vm->cpus; i++)
			vcpu_call(&vm->vcpu[i], VCPU_CALL_STATISTICS);
		break;
	default:
		/* Where a whole process group is told, a jail's keeper and VM both are, and the keeper passes it on: that is
		 * one wish and not two. */
		if (vm->signal && vm->config->jail && clock_now() - vm->signalled < TOLD_TWICE)
			break;
		if (vm->signal) { /* the second: whoever sends it does not want to wait */
			terminal_restore();
			_exit(128 + (int)info.ssi_signo);
		}
		vm->signal = (int)info.ssi_signo;
		vm->signalled = clock_now();
		vm_stop(vm, VM_CAUSE_LEAVE, NULL);
	}
}

int vm_watch_signals(struct vm *vm, struct error *err)
{
	sigset_t handled, blocked;

	signal_sets(&handled, &blocked);
	vm->signal_fd = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
	if (vm->signal_fd < 0)
		return error_errno(err, "signalfd");
	return loop_add_fd(vm->loop, vm->signal_fd, EPOLLIN, signal_arrived, vm, err);
}

/* ---- the whole life ---- */

static int exit_status(struct vm *vm, struct error *err)
{
	switch (vm->cause) {
	case VM_CAUSE_FAILED:
		*err = vm->error;
		return 1;
	case VM_CAUSE_DEBUG_EXIT:
		return vm->debug_exit;
	case VM_CAUSE_LEAVE:
		return vm->signal ? 128 + vm->signal : 0;
	case VM_CAUSE_POWER_OFF:
	case VM_CAUSE_RESET: /* and --on-reset exit */
	case VM_CAUSE_NONE:
		break;
	}
	return 0;
}

int vm_run(struct vm *vm, struct error *err)
{
	struct error why = {0};
	int result = 0;

	vm->settle.function = settle;
	for (unsigned i = 0; i < vm->cpus && result == 0; i++) {
		char name[16];

		snprintf(name, sizeof(name), "vcpu%u", i);
		result = thread_start(&vm->vcpu[i].thread, &vm->threads, THREAD_VCPU, name, vcpu_main, &vm->vcpu[i], &why);
	}
	if (result < 0) {
		error_wrap(&why, "give fewer --cpus");
		vm_stop(vm, VM_CAUSE_FAILED, &why);
		/* Not all can park: no hand-over to the loop, the threads end at once. */
		pthread_mutex_lock(&vm->lock);
		atomic_store(&vm->phase, VM_ENDING);
		vm->resumes++;
		pthread_cond_broadcast(&vm->resumed);
		pthread_mutex_unlock(&vm->lock);
	} else {
		thread_begin(&vm->threads, THREAD_MAIN);
		vm_tell(vm, VM_EVENT_STARTED, NULL, NULL);
		loop_run(vm->loop);
	}
	for (unsigned i = 0; i < vm->cpus; i++)
		thread_join(&vm->vcpu[i].thread);
	return exit_status(vm, err);
}
