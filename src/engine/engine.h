/* The engine boundary: what runs guest code. The board and the devices do not know which engine runs; the engine knows
 * of the board only the callbacks in struct engine_board. One table of functions per engine (NetBSD's nvmm is the
 * model); the run loop in src/vmm/run.c holds the one visible switch over struct engine_exit.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct engine_vm;
struct engine_vcpu;
struct cpu_model;
struct board_chips; /* machine/board.h */

/* ---- what the engine asks of the board; called on the vCPU's own thread, no engine lock held ---- */
struct engine_board {
	void *opaque;
	/* Port and memory accesses of 1, 2, 4 or 8 bytes. Unclaimed reads give all ones, unclaimed writes vanish. */
	uint64_t (*pio_read)(void *opaque, unsigned cpu, uint16_t port, unsigned size);
	void (*pio_write)(void *opaque, unsigned cpu, uint16_t port, unsigned size, uint64_t value);
	uint64_t (*mmio_read)(void *opaque, unsigned cpu, uint64_t gpa, unsigned size);
	void (*mmio_write)(void *opaque, unsigned cpu, uint64_t gpa, unsigned size, uint64_t value);
	/* APIC_BASE (0x1b), TSC_DEADLINE (0x6e0) and the x2APIC range (0x800 to 0x8ff). false: raise #GP. */
	bool (*msr_read)(void *opaque, unsigned cpu, uint32_t msr, uint64_t *value);
	bool (*msr_write)(void *opaque, unsigned cpu, uint32_t msr, uint64_t value);
	/* CR8: the upper four bits of the task priority. */
	uint8_t (*cr8_read)(void *opaque, unsigned cpu);
	void (*cr8_write)(void *opaque, unsigned cpu, uint8_t value);
	/* The vector to deliver now, acknowledged (IRR to ISR, or 8259 INTA), or -1. Called only with RFLAGS.IF set. */
	int (*interrupt_ack)(void *opaque, unsigned cpu);
	/* Would interrupt_ack give a vector? Cheap; may be called from any state. */
	bool (*interrupt_pending)(void *opaque, unsigned cpu);
	/* For KVM's para-virtual interfaces; NULL: not supplied. May the guest end the interrupt that was just
	 * acknowledged in its own memory? Then settle tells whether it did, before the APIC is looked at again; when another
	 * interrupt arrives meanwhile the vCPU is kicked even if it could not be delivered yet. */
	bool (*eoi_offer)(void *opaque, unsigned cpu);
	void (*eoi_settle)(void *opaque, unsigned cpu, bool ended);
	/* Sends what icr (its low half) says to these vCPUs; how many there were. */
	unsigned (*send_ipi)(void *opaque, unsigned cpu, uint64_t cpus, uint32_t icr);
	/* vCPU `cpu` is to run again, if it is halted, even with interrupts off. */
	void (*wake)(void *opaque, unsigned cpu);
};

/* ---- vCPU state, moved by masks of what is wanted or changed ---- */
enum engine_state_mask {
	ENGINE_STATE_GPRS = 1 << 0,
	ENGINE_STATE_SEGMENTS = 1 << 1,
	ENGINE_STATE_CONTROL = 1 << 2, /* CRs, EFER and the other MSRs below */
	ENGINE_STATE_FPU = 1 << 3,
	ENGINE_STATE_ALL = 15,
};

enum { ENGINE_RAX, ENGINE_RCX, ENGINE_RDX, ENGINE_RBX, ENGINE_RSP, ENGINE_RBP, ENGINE_RSI, ENGINE_RDI };
enum { ENGINE_ES, ENGINE_CS, ENGINE_SS, ENGINE_DS, ENGINE_FS, ENGINE_GS, ENGINE_LDTR, ENGINE_TR, ENGINE_SEGMENTS };

struct engine_segment {
	uint64_t base;
	uint32_t limit;	    /* in bytes, granularity already applied */
	uint16_t selector;
	uint16_t attributes; /* descriptor bits 40 to 47 in 0 to 7, bits 52 to 55 (AVL, L, D/B, G) in 8 to 11 */
};

/* Descriptor attribute bits as stored in struct engine_segment */
#define SEGMENT_TYPE 0x00f
#define SEGMENT_S 0x010
#define SEGMENT_DPL_SHIFT 5
#define SEGMENT_P 0x080
#define SEGMENT_L 0x200
#define SEGMENT_DB 0x400
#define SEGMENT_G 0x800

struct engine_table {
	uint64_t base;
	uint16_t limit;
};

struct engine_state {
	uint64_t gprs[16]; /* in encoding order: rax rcx rdx rbx rsp rbp rsi rdi r8..r15 */
	uint64_t rip, rflags;
	struct engine_segment segments[ENGINE_SEGMENTS];
	struct engine_table gdt, idt;
	uint64_t cr0, cr2, cr3, cr4, cr8, efer, xcr0;
	uint64_t dr[8];
	uint64_t star, lstar, cstar, sfmask, kernel_gs_base, sysenter_cs, sysenter_esp, sysenter_eip, pat, tsc_aux;
	uint64_t tsc; /* the guest's time stamp counter now */
	size_t xsave_size;
	uint8_t xsave[4096] __attribute__((aligned(64))); /* standard (not compacted) XSAVE layout */
};

/* ---- why vcpu_run came back ---- */
enum engine_exit_reason {
	ENGINE_EXIT_KICKED,	  /* engine vcpu_kick was called, or a host signal */
	ENGINE_EXIT_HALTED,	  /* HLT with nothing pending: wait until interrupt_pending or kick, then run again */
	ENGINE_EXIT_TRIPLE_FAULT, /* the vCPU is shut down */
	ENGINE_EXIT_STEPPED,	  /* vcpu_step did its instructions */
	ENGINE_EXIT_EXCEPTION,	  /* only with stop_on_exception: vector, error_code and cr2 in the exit; not delivered */
	ENGINE_EXIT_ERROR,	  /* the engine cannot go on; message */
	ENGINE_EXIT_REASONS,
};

struct engine_exit {
	enum engine_exit_reason reason;
	int vector;
	uint32_t error_code;
	uint64_t address;
	char message[256];
};

struct engine_config {
	unsigned cpus;
	const struct cpu_model *model;
	const struct engine_board *board;
	struct guest_memory *memory; /* machine/memory.h */
	bool stop_on_exception;	     /* for tests: vcpu_run returns instead of delivering exceptions */
	bool one_instruction_blocks; /* for lockstep tests */
	unsigned lockstep;	     /* for tests, of `bt` with one vCPU: every so many entries into translated code, a block is
				      * compared with its instructions one by one; 0: never. A difference is an ERROR exit. */
	bool exact_flags;	     /* for tests: at a fault even those flags are right that nothing would read */
};

struct engine {
	const char *name;
	/* 0 when the engine can run a stock kernel here, else -errno and err says why not. Takes 200 ms at most. */
	int (*probe)(struct error *err);
	int (*vm_create)(struct engine_vm **vm, const struct engine_config *config, struct error *err);
	void (*vm_destroy)(struct engine_vm *vm);
	/* NULL: the engine uses the board's interrupt chips. Else it brings its own, which live as long as the VM: they
	 * start and halt vCPUs too, so that all threads enter vcpu_run at once, and of struct engine_board only port and
	 * memory accesses are used. */
	const struct board_chips *(*vm_chips)(struct engine_vm *vm);
	/* Logging of guest memory that guest code writes (not devices); NULL: the engine has none yet. On: from now. May
	 * say more than was written, never less. */
	int (*vm_log_writes)(struct engine_vm *vm, bool on, struct error *err);
	/* Sets in bitmap (a bit per page by offset in the memory's file, in whole words) what was written since the last
	 * time; other bits stay. */
	int (*vm_written)(struct engine_vm *vm, uint64_t *bitmap, struct error *err);
	/* Creates vCPU `cpu`; everything else on it (but kick and tsc) is called on the thread that runs it, and destroy
	 * when that thread has ended. */
	int (*vcpu_create)(struct engine_vm *vm, unsigned cpu, struct engine_vcpu **vcpu, struct error *err);
	void (*vcpu_destroy)(struct engine_vcpu *vcpu);
	/* Power-on state (SDM volume 3, section 10.1.1), or after INIT. */
	void (*vcpu_reset)(struct engine_vcpu *vcpu, bool init);
	void (*vcpu_get)(struct engine_vcpu *vcpu, unsigned mask, struct engine_state *state);
	int (*vcpu_set)(struct engine_vcpu *vcpu, unsigned mask, const struct engine_state *state, struct error *err);
	void (*vcpu_run)(struct engine_vcpu *vcpu, struct engine_exit *exit);
	/* Runs n instructions, or fewer when something else happens first. */
	void (*vcpu_step)(struct engine_vcpu *vcpu, unsigned n, struct engine_exit *exit);
	/* From any thread: the vCPU looks at interrupt_pending soon; with `leave` vcpu_run returns KICKED, the one under
	 * way or, if none is, the next one: a kick is never lost. */
	void (*vcpu_kick)(struct engine_vcpu *vcpu, bool leave);
	uint64_t (*vcpu_tsc)(struct engine_vcpu *vcpu); /* the guest's TSC now; any thread */
	/* Writes counters (exits by reason, translations, misses, ...) as text, one "name value" a line. */
	void (*vcpu_statistics)(struct engine_vcpu *vcpu, char *text, size_t size);
};

extern const struct engine engine_kvm, engine_bt;

/* All engines, in the order `auto` tries them; ends with NULL. */
extern const struct engine *const engines[];
