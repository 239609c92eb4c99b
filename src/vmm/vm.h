/* One virtual machine: its parts, its vCPU threads and its life. vm.c puts the parts together, start.c gives the vCPUs
 * their first state, run.c runs them, life.c stops, resets and ends them.
 *
 * Threads: the main thread runs the loop (timers, network, console input, signals, stopping and resetting); each vCPU
 * has a thread of its own; disks and the console's output have theirs. A guest that stops or resets is a request from
 * any thread (vm_stop); every vCPU thread then parks, and the last one hands over to the main thread, which never waits
 * for a vCPU: so that a vCPU may wait for what the loop serves.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "base/loop.h"
#include "base/threads.h"
#include "device/devices.h"
#include "engine/engine.h"
#include "machine/board.h"
#include "machine/boot.h"
#include "machine/memory.h"
#include "net/net.h"
#include "vmm/console.h"
#include "vmm/jail.h"
#include "vmm/options.h"

enum vm_phase {
	VM_RUNNING,
	VM_STOPPING, /* vCPUs are on their way to vm_park() */
	VM_ENDING,   /* vCPU threads end */
};

/* Why the vCPUs were stopped. A greater one overrules a lesser one that is not yet carried out. */
enum vm_cause {
	VM_CAUSE_NONE,
	VM_CAUSE_RESET,
	VM_CAUSE_POWER_OFF,
	VM_CAUSE_LEAVE, /* the user at the console, or a signal */
	VM_CAUSE_FAILED,
};

/* Calls to a vCPU thread, in vcpu.calls. */
enum vcpu_call {
	VCPU_CALL_INIT = 1,	  /* INIT IPI */
	VCPU_CALL_STARTUP = 2,	  /* SIPI, of startup_vector; after the INIT if both are there */
	VCPU_CALL_STATISTICS = 4, /* tell the engine's counters */
	VCPU_CALL_WAKE = 8,	  /* run on, whatever it waits for: the engine knows why */
};

struct vcpu {
	struct vm *vm;
	unsigned index;
	struct engine_vcpu *engine;
	struct thread thread;

	atomic_uint calls;
	atomic_uint wakes; /* counts up at each wake; what a sleeping vCPU thread waits on (futex) */
	atomic_bool asleep;

	pthread_mutex_t lock; /* INIT and SIPI keep their order */
	bool awaits_startup;
	uint8_t startup_vector;

	bool started; /* the thread's own: has been given a place to run from */
};

struct vm {
	const struct vmm_config *config;
	const struct engine *engine;
	struct guest_memory memory;
	bool has_memory;
	struct loop *loop;
	struct threads threads;
	struct jail *jail; /* NULL: none */
	struct board *board;
	struct board_host host;
	struct engine_board engine_board;
	struct engine_vm *engine_vm;
	bool own_chips; /* the engine's, which start and halt vCPUs too */
	struct boot_files boot_files;
	struct boot_entry entry;
	struct console *console;
	struct disk *disk[VMM_DISKS_MAX];
	char disk_serial[VMM_DISKS_MAX][21];
	struct net *net[VMM_NETS_MAX];
	struct virtio_device *device[VMM_DISKS_MAX + VMM_NETS_MAX + 1];
	unsigned devices;
	int signal_fd;

	pthread_mutex_t lock; /* the rest */
	pthread_cond_t resumed;
	atomic_uint phase; /* enum vm_phase; written under the lock, read anywhere */
	enum vm_cause cause;
	int signal;	    /* which ended it, or 0 */
	struct error error; /* why it failed */
	unsigned parked, resumes;

	unsigned cpus;
	struct vcpu vcpu[];
};

/* vm.c: everything from the configuration, up to the point of running; nothing is left when it fails. */
int vm_create(struct vm **vm, const struct vmm_config *config, struct error *err);
/* Ends it all; an error of writing a disk back is returned. */
int vm_destroy(struct vm *vm, struct error *err);
/* Firmware tables and kernel into guest memory: at the start and after each reset. */
int vm_load(struct vm *vm, struct error *err);

/* life.c */
void vm_block_signals(void);
int vm_watch_signals(struct vm *vm, struct error *err);
/* Runs the guest until it ends; the exit status. A failure is also in err. */
int vm_run(struct vm *vm, struct error *err);
/* Stops all vCPUs for that cause; why is for VM_CAUSE_FAILED. From any thread; returns at once. */
void vm_stop(struct vm *vm, enum vm_cause cause, const struct error *why);
/* A vCPU thread waits here while the VM is stopped. false: the thread is to end; true: power on and run again. */
bool vm_park(struct vm *vm);

/* run.c */
void *vcpu_main(void *vcpu);
/* The vCPU thread looks at the phase and at its calls soon. From any thread. */
void vcpu_call(struct vcpu *v, unsigned calls);
/* What the board asks for: see struct board_host. opaque is the struct vm. */
void vcpu_interrupt_ready(void *opaque, unsigned cpu);
void vcpu_init(void *opaque, unsigned cpu);
void vcpu_startup(void *opaque, unsigned cpu, uint8_t vector);
void vcpu_wake_up(void *opaque, unsigned cpu);

/* start.c: first states, set on the vCPU's own thread. */
int vcpu_set_boot_state(struct vcpu *v, const struct boot_entry *entry, struct error *err);
int vcpu_set_startup_state(struct vcpu *v, uint8_t vector, struct error *err);
