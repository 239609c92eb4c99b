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
#include "machine/smbios.h"
#include "net/net.h"
#include "vmm/console.h"
#include "vmm/console_open.h"
#include "vmm/jail.h"
#include "vmm/options.h"

enum vm_phase {
	VM_RUNNING,
	VM_STOPPING, /* vCPUs are in vm_park() or on their way there */
	VM_ENDING,   /* vCPU threads end */
};

/* Why the vCPUs were stopped. A greater one overrules a lesser one that is not yet carried out. */
enum vm_cause {
	VM_CAUSE_NONE,
	VM_CAUSE_RESET,
	VM_CAUSE_POWER_OFF,
	VM_CAUSE_DEBUG_EXIT, /* a test kernel said so, with its status */
	VM_CAUSE_LEAVE, /* the user at the console, or a signal */
	VM_CAUSE_FAILED,
};

/* What is told to whoever watches (the control socket). */
enum vm_event {
	VM_EVENT_STARTED,
	VM_EVENT_PAUSED,
	VM_EVENT_RESUMED,
	VM_EVENT_RESET,
	VM_EVENT_POWER_OFF, /* by the guest */
	VM_EVENT_PANIC,	    /* the guest's kernel says so (pvpanic) */
	VM_EVENT_FAILED,
	VM_EVENT_LEFT,	  /* ended by the control socket, the console's user or a signal */
	VM_EVENT_REMOVED, /* a device, a vCPU or a unit of memory, when the guest has let go of it */
	VM_EVENT_REFUSED, /* to let go of it */
};

/* On the loop's thread. detail: the device's name or NULL; why: what failed or NULL. */
typedef void vm_observer(void *opaque, enum vm_event event, const char *detail, const struct error *why);

/* Calls to a vCPU thread, in vcpu.calls. */
enum vcpu_call {
	VCPU_CALL_INIT = 1,	  /* INIT IPI */
	VCPU_CALL_STARTUP = 2,	  /* SIPI, of startup_vector; after the INIT if both are there */
	VCPU_CALL_STATISTICS = 4, /* tell the engine's counters */
	VCPU_CALL_WAKE = 8,	  /* run on, whatever it waits for: the engine knows why */
	VCPU_CALL_SNAPSHOT = 16,  /* copy the engine's counters to vcpu.snapshot */
	VCPU_CALL_POWER = 32,	  /* plugged has changed: power-on state, or nothing to run any more */
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

	atomic_bool plugged; /* written by the loop's thread; while false the thread sleeps and engine may be NULL */
	bool started; /* the thread's own: has been given a place to run from */
	unsigned boots; /* the thread's own: vm->boots when it was last powered on */

	_Atomic uint64_t exits[ENGINE_EXIT_REASONS]; /* from vcpu_run, by reason */
	pthread_mutex_t snapshot_lock;
	char *snapshot; /* NULL until the first; the engine's counters as text */
	atomic_uint snapshots; /* how many were taken */
};

struct control;

/* A slot is free while its device and its back end are NULL. */
struct vm_disk {
	struct vm *vm;
	struct disk *disk; /* left without a device while it is written back and closed */
	struct thread closer;
	struct error close_error;
	struct virtio_device *device;
	char serial[21];
	char *path;
	struct rate_limits limits;
};

struct vm_net {
	struct net *net;
	struct virtio_device *device;
	char *spec;
	struct rate_limits limits[2]; /* of frames sent by the guest, and received */
};

#define VM_DEVICES_MAX 8

struct vm {
	const struct vmm_config *config;
	const struct engine *engine;
	char engine_note[700]; /* why auto did not take the first one; empty: it did */
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
	struct vm_disk disk[VMM_DISKS_MAX];
	struct vm_net net[VMM_NETS_MAX];
	uint32_t removals; /* PCI slots whose removal was asked for */
	struct virtio_device *device[VM_DEVICES_MAX]; /* all that are not disks or networks */
	struct console *hvc;		    /* or NULL */
	struct virtio_device *hvc_device;   /* among `device`, as is the next one; or NULL */
	struct virtio_device *balloon;
	struct console_socket vsock;
	struct smbios_identity identity;
	atomic_int debug_exit; /* the exit status that the guest wants, or -1 */
	atomic_bool panicked;
	unsigned devices;
	struct control *control; /* NULL: none */
	vm_observer *observer;	 /* or NULL */
	void *observer_opaque;
	int signal_fd;

	pthread_mutex_t lock; /* the rest */
	pthread_cond_t resumed;
	atomic_uint phase; /* enum vm_phase; written under the lock, read anywhere */
	enum vm_cause cause;
	int signal;	    /* which ended it, or 0 */
	uint64_t signalled; /* clock_now() when it came */
	uint64_t said_since; /* see vm_may_say() */
	unsigned said;
	struct error error; /* why it failed */
	unsigned parked, resumes;
	unsigned boots; /* power-ons and resets */
	bool pause_wanted;

	/* the loop's */
	struct loop_timer settle; /* sees to what the vCPUs were stopped for */
	bool paused;		  /* nothing runs until vm_resume() */
	atomic_uint ejected;	  /* PCI slots that the guest has let go of */

	/* resize.c: what the guest has let go of or refused (bit n), by enum board_hotplug */
	_Atomic uint64_t resize_gone[2], resize_refused[2];

	unsigned cpus; /* that there can be; not all need be plugged */
	struct vcpu vcpu[];
};

/* vm.c: everything from the configuration, up to the point of running; nothing is left when it fails. */
int vm_create(struct vm **vm, const struct vmm_config *config, struct error *err);
/* Ends it all; an error of writing a disk back is returned. */
int vm_destroy(struct vm *vm, struct error *err);
/* Firmware tables and kernel into guest memory: at the start and after each reset. */
int vm_load(struct vm *vm, struct error *err);

/* vm_devices.c */
int vm_add_small_devices(struct vm *vm, struct error *err);
struct console_port vm_hvc_port(struct vm *vm);
int vm_make_identity(struct vm *vm, struct error *err);
void vm_debug_exit(void *vm, uint32_t value);
void vm_panicked(struct vm *vm);

/* life.c */
/* For lines that a guest can provoke as often as it resets: ten a minute. From any thread. */
bool vm_may_say(struct vm *vm);
void vm_block_signals(void);
int vm_watch_signals(struct vm *vm, struct error *err);
/* Runs the guest until it ends; the exit status. A failure is also in err. */
int vm_run(struct vm *vm, struct error *err);
/* Stops all vCPUs for that cause; why is for VM_CAUSE_FAILED. From any thread; returns at once. */
void vm_stop(struct vm *vm, enum vm_cause cause, const struct error *why);
/* A vCPU thread waits here while the VM is stopped. false: the thread is to end; true: run on, and power on before if
 * vm->boots has changed. */
bool vm_park(struct vm *vm);
/* Pausing stops the vCPUs, then lets devices complete what is in flight: VM_EVENT_PAUSED. A guest paused can still be
 * reset, and ended. On the loop's thread. */
void vm_pause(struct vm *vm);
void vm_resume(struct vm *vm);
/* A struct board_host's pci_ejected. */
void vm_pci_ejected(void *opaque, uint32_t slots);
/* Tells the observer, on the loop's thread. */
void vm_tell(struct vm *vm, enum vm_event event, const char *detail, const struct error *why);

/* run.c */
void *vcpu_main(void *vcpu);
/* The vCPU thread looks at the phase and at its calls soon. From any thread. */
void vcpu_call(struct vcpu *v, unsigned calls);
/* The last snapshot of the engine's counters, which is the caller's to free; NULL: none yet. Any thread. */
char *vcpu_copy_snapshot(struct vcpu *v);
/* What the board asks for: see struct board_host. opaque is the struct vm. */
void vcpu_interrupt_ready(void *opaque, unsigned cpu);
void vcpu_init(void *opaque, unsigned cpu);
void vcpu_startup(void *opaque, unsigned cpu, uint8_t vector);
void vcpu_wake_up(void *opaque, unsigned cpu);

/* start.c: first states, set on the vCPU's own thread. */
int vcpu_set_boot_state(struct vcpu *v, const struct boot_entry *entry, struct error *err);
int vcpu_set_startup_state(struct vcpu *v, uint8_t vector, struct error *err);
