/* The privileged architecture of engine `bt` in C: instructions that touch machine state, exceptions and interrupts,
 * segments, MSRs, CPUID. All integer state is in struct bt_vcpu when these are called; floating-point and vector state
 * is the host's, so none of this touches it (the files are compiled with -mgeneral-regs-only) and, for the same reason,
 * nothing here calls the C library. v->rip is at the instruction.
 */
#pragma once

#include "engine/bt/vcpu.h"

enum system_result {
	SYSTEM_DONE,	/* v->rip is where to go on */
	SYSTEM_FAULT,	/* v->fault: the instruction had no effect */
	SYSTEM_HALT,	/* HLT; v->rip is after it */
	SYSTEM_UNKNOWN, /* not an instruction of this file */
};

/* Executes one instruction of these kinds, with every check that the architecture makes (SDM volume 2 under each name):
 * CPUID RDMSR WRMSR, MOV to and from CR and DR, LMSW SMSW CLTS, LGDT LIDT SGDT SIDT LLDT SLDT LTR STR LAR LSL VERR VERW,
 * IN OUT INS OUTS (with REP; all sizes), HLT, INVLPG INVPCID WBINVD INVD WBNOINVD, RDTSC RDTSCP RDPMC RDPID, SYSCALL SYSRET
 * SYSENTER SYSEXIT, IRET (16, 32, 64), INT n INT3 INT1 INTO, far JMP CALL RET, MOV to and from segment registers, PUSH and
 * POP of them, LDS LES LFS LGS LSS, SWAPGS, RDFSBASE and its three sisters, CLI STI PUSHF POPF STAC CLAC, XGETBV XSETBV,
 * MONITOR MWAIT (#UD), CLFLUSH and its sisters (no effect but #PF), UD0-2, and in 32-bit and 16-bit code too where it
 * exists there. VMCALL and VMMCALL are KVM's hypercalls (paravirt.c). RSM, SKINIT etc. raise #UD. */
enum system_result system_execute(struct bt_vcpu *v, const struct bt_decoded *d);

/* Delivers v->fault through the IDT (long mode: IST, privilege change, error code; protected mode: 16 and 32-bit
 * interrupt and trap gates with privilege change by the TSS, task gates may be refused with #GP; real mode: vector table)
 * with double and triple fault rules (SDM volume 3, 6.15, table 6-5). Sets v->triple_fault when all fails. */
void exception_deliver(struct bt_vcpu *v);
/* An external interrupt; RFLAGS.IF has been checked by the caller. Faults while delivering are delivered instead. */
void interrupt_deliver(struct bt_vcpu *v, uint8_t vector);

/* Power-on or INIT state of everything in struct bt_vcpu that is architectural (SDM volume 3, 10.1.1): real mode, CS
 * 0xf000 base 0xffff0000, rip 0xfff0. On INIT, MSRs, MTRRs, TSC and XCR0/x87 survive as the table says. Calls
 * bt_mode_update and bt_tlb_flush. */
void system_reset(struct bt_vcpu *v, bool init);

/* KVM's para-virtual interfaces around the running of a vCPU (paravirt.c); the vector state is parked. The time between
 * enter and leave is the vCPU's own but for what is stolen; tick brings that up to date now and then. */
void paravirt_enter(struct bt_vcpu *v);
void paravirt_leave(struct bt_vcpu *v);
void paravirt_tick(struct bt_vcpu *v);
/* The interrupt just acknowledged may be ended by the guest in its memory; has it been? Settled before anybody looks at
 * the vCPU's APIC again. Settle parks the vector state itself. */
void paravirt_eoi_offer(struct bt_vcpu *v);
void paravirt_eoi_settle(struct bt_vcpu *v);

/* After segments[s] was changed from outside (vcpu_set): keeps fs_base, gs_base, cpl in step. */
void bt_segment_loaded(struct bt_vcpu *v, int s);
