/* Engine kvm, between its own files. */
#pragma once

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include "base/error.h"
#include "engine/cpu_model.h"
#include "engine/engine.h"
#include "machine/board.h"

#define KVM_CPUS_MAX 64

enum kvm_statistic {
	KVM_STAT_EXITS,
	KVM_STAT_PORT,
	KVM_STAT_MMIO,
	KVM_STAT_HALT,
	KVM_STAT_INTERRUPTED,
	KVM_STAT_OTHER,
	KVM_STATS
};

struct engine_vcpu {
	struct engine_vm *vm;
	unsigned index;
	int fd;
	struct kvm_run *run;
	size_t run_size;
	atomic_int thread; /* that is or was in vcpu_run; 0: none yet */
	atomic_bool leave; /* vcpu_run is to come back */
	bool changed;	   /* is not in its power-on state any more */
	uint64_t tsc_offset;
	uint64_t statistics[KVM_STATS];

	/* Power-on state, as KVM itself made it */
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_debugregs debug;
	struct kvm_xsave *xsave;
	struct kvm_xcrs xcrs;
	struct kvm_lapic_state lapic;
	struct kvm_vcpu_events events;
	struct kvm_msrs *msrs;
};

struct engine_vm {
	const struct engine_board *board;
	struct guest_memory *memory;
	int kvm, fd;
	unsigned cpus;
	struct cpu_model model; /* what of the wanted one KVM has */
	size_t run_size, xsave_size;
	bool logs_writes;
	struct board_chips chips;
	struct kvm_irqchip pic[2], ioapic; /* power-on state */
	struct kvm_pit_state2 pit;
	struct engine_vcpu *vcpu[KVM_CPUS_MAX];
};

/* vm.c */
int kvm_open(int *fd, struct error *err);
/* The signal that makes a thread leave KVM_RUN. Its handler does nothing; vCPU threads alone do not block it. */
int kvm_signal(void);
void kvm_install_signal(void);

/* probe.c */
int kvm_probe(struct error *err);

/* chips.c */
/* The kernel's 8259s, IOAPIC, local APICs and 8254, and who gets which interrupt. Before the vCPUs. */
int kvm_create_chips(int vm, struct error *err);
int kvm_chips_init(struct engine_vm *vm, struct error *err);

/* cpuid.c */
int kvm_supported_cpuid(int kvm, struct kvm_cpuid2 **cpuid, struct error *err); /* to be freed */
int kvm_model_init(struct engine_vm *vm, const struct cpu_model *model, struct error *err);
int kvm_set_cpuid(struct engine_vcpu *v, struct error *err);

/* state.c */
int kvm_state_init(struct engine_vcpu *v, struct error *err);
void kvm_state_free(struct engine_vcpu *v);
void kvm_state_reset(struct engine_vcpu *v);
void kvm_vcpu_get(struct engine_vcpu *v, unsigned mask, struct engine_state *state);
int kvm_vcpu_set(struct engine_vcpu *v, unsigned mask, const struct engine_state *state, struct error *err);

/* run.c */
void kvm_vcpu_run(struct engine_vcpu *v, struct engine_exit *exit);
void kvm_vcpu_kick(struct engine_vcpu *v, bool leave);
void kvm_vcpu_statistics(struct engine_vcpu *v, char *text, size_t size);
/* Says an exit that nobody expected. */
void kvm_describe_exit(const struct kvm_run *run, char *text, size_t size);
