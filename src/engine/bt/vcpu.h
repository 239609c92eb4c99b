/* The state of a vCPU of engine `bt`. Translated code addresses this structure through %gs (its base is the structure's
 * address on the thread that runs the vCPU), so the fields in front have short displacements and the order matters only
 * for speed. Every field is owned by the vCPU's thread unless marked atomic.
 *
 * While translated code runs, the guest's general registers are in the host's of the same name, but r10 and r11, which
 * live in gprs[] and serve as scratch; the guest's floating-point and vector state is in the host's registers; its
 * arithmetic flags are in the host's flags, or saved in `arith`. In C everything integer is in memory.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <Zydis/Zydis.h>

#include "base/util.h"
#include "engine/cpu_model.h"
#include "engine/engine.h"
#include "machine/memory.h"

struct bt_vm;

/* Software TLB: one set per way of accessing memory. Index: bits 12 to 21 of the address. */
enum bt_set {
	BT_SET_USER,	   /* CPL 3 */
	BT_SET_SUPERVISOR, /* CPL 0 to 2 */
	BT_SET_AC,	   /* CPL 0 to 2, CR4.SMAP on and EFLAGS.AC set: user pages are open */
	BT_SETS
};
#define BT_TLB_ENTRIES 1024

struct tlb_entry {
	uint64_t read, write; /* virtual page address, or TLB_INVALID(index) */
	uint64_t addend;      /* host address of the page */
	uint64_t flags;	      /* TLB_GLOBAL ... */
};
#define TLB_GLOBAL 1

/* Jump cache: virtual pc to translated code, per set. Two ways: the newer is probed inline, the older by a common stub. */
#define BT_JUMP_ENTRIES 2048
struct jump_entry {
	struct {
		uint64_t pc;
		const uint8_t *code; /* entry that takes the flags from memory */
	} way[2];
};

/* How the current code runs; part of a block's key. */
enum bt_mode_bits {
	BT_MODE_SET = 0x3,	  /* enum bt_set */
	BT_MODE_CODE16 = 0x0,	  /* code size in bits 2 and 3 */
	BT_MODE_CODE32 = 0x4,
	BT_MODE_CODE64 = 0x8,
	BT_MODE_CODE = 0xc,
	BT_MODE_STACK32 = 0x10,
	BT_MODE_FLAT = 0x20,	  /* CS, DS, ES and SS: base 0, limit 4 GiB (always in 64-bit mode) */
	BT_MODE_NO_FPU = 0x40,	  /* CR0.TS or CR0.EM: floating point raises #NM */
	BT_MODE_SINGLE = 0x80,	  /* blocks of one instruction */
	BT_MODE_NO_XSAVE = 0x100, /* CR4.OSXSAVE clear: VEX and EVEX raise #UD */
	BT_MODE_REAL = 0x200,	  /* CR0.PE clear or EFLAGS.VM set */
	BT_MODE_ALONE = 0x800,	  /* blocks without direct jumps out of them (lockstep.c) */
	BT_MODE_OPEN_FS = 0x1000, /* outside 64-bit mode: FS (GS) is writable data up to 4 GiB, so that only its base matters */
	BT_MODE_OPEN_GS = 0x2000,
	BT_MODE_AMD = 0x400,	  /* the CPU model's vendor: near branches with an operand-size prefix differ */
};

enum { /* exception vectors */
	VECTOR_DE = 0, VECTOR_DB = 1, VECTOR_NMI = 2, VECTOR_BP = 3, VECTOR_OF = 4, VECTOR_BR = 5, VECTOR_UD = 6,
	VECTOR_NM = 7, VECTOR_DF = 8, VECTOR_TS = 10, VECTOR_NP = 11, VECTOR_SS = 12, VECTOR_GP = 13, VECTOR_PF = 14,
	VECTOR_MF = 16, VECTOR_AC = 17, VECTOR_XM = 19,
};

enum { /* EFLAGS */
	FLAG_CF = 1 << 0, FLAG_PF = 1 << 2, FLAG_AF = 1 << 4, FLAG_ZF = 1 << 6, FLAG_SF = 1 << 7, FLAG_TF = 1 << 8,
	FLAG_IF = 1 << 9, FLAG_DF = 1 << 10, FLAG_OF = 1 << 11, FLAG_IOPL = 3 << 12, FLAG_NT = 1 << 14, FLAG_RF = 1 << 16,
	FLAG_VM = 1 << 17, FLAG_AC = 1 << 18, FLAG_VIF = 1 << 19, FLAG_VIP = 1 << 20, FLAG_ID = 1 << 21,
	FLAGS_ARITHMETIC = FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF,
};

enum { CR0_PE = 1u << 0, CR0_MP = 1u << 1, CR0_EM = 1u << 2, CR0_TS = 1u << 3, CR0_ET = 1u << 4, CR0_NE = 1u << 5,
	CR0_WP = 1u << 16, CR0_AM = 1u << 18, CR0_NW = 1u << 29, CR0_CD = 1u << 30, CR0_PG = 1u << 31 };
enum { CR4_VME = 1 << 0, CR4_PVI = 1 << 1, CR4_TSD = 1 << 2, CR4_DE = 1 << 3, CR4_PSE = 1 << 4, CR4_PAE = 1 << 5,
	CR4_MCE = 1 << 6, CR4_PGE = 1 << 7, CR4_PCE = 1 << 8, CR4_OSFXSR = 1 << 9, CR4_OSXMMEXCPT = 1 << 10,
	CR4_UMIP = 1 << 11, CR4_LA57 = 1 << 12, CR4_FSGSBASE = 1 << 16, CR4_PCIDE = 1 << 17, CR4_OSXSAVE = 1 << 18,
	CR4_SMEP = 1 << 20, CR4_SMAP = 1 << 21, CR4_PKE = 1 << 22 };
enum { EFER_SCE = 1 << 0, EFER_LME = 1 << 8, EFER_LMA = 1 << 10, EFER_NXE = 1 << 11 };

/* What stopped translated code; in v->exit_code. */
enum bt_exit {
	BT_EXIT_LOOKUP,	  /* rip is set: find the block there */
	BT_EXIT_SYSTEM,	  /* rip is at an instruction for the C side; exit_argument: its struct bt_decoded, or NULL */
	BT_EXIT_FAULT,	  /* v->fault is set, rip is at the faulting instruction */
	BT_EXIT_SLOW,	  /* rip is at an instruction to be run through bounce buffers */
	BT_EXIT_LINK,	  /* rip is set; exit_argument: the direct jump to be linked to the block there */
	BT_EXIT_CODES
};

/* An exception on its way to the guest. */
struct bt_fault {
	int vector;
	uint32_t error;
	bool has_error;
	bool software;	    /* INT n, INT3, INTO: privilege of the gate is checked, rip is after the instruction */
	uint64_t next_rip;  /* for software ones: the return address */
};

#define BT_FAULT (-1) /* returned by functions that may raise an exception: v->fault says which */

struct bt_vcpu {
	uint64_t gprs[16];
	uint64_t rip;	     /* valid in C */
	uint64_t page;	     /* virtual address of the page that translated code is in */
	uint64_t host_rsp;
	struct bt_vcpu *self; /* what %gs points at */
	uint64_t scratch[4]; /* of translated code within one instruction */
	uint16_t arith;	     /* lahf's AH in bits 8 to 15, OF in bit 0 */
	uint8_t iflag;	     /* EFLAGS.IF, .DF, .AC as 0 or 1 */
	uint8_t dflag;
	uint8_t acflag;
	_Atomic uint8_t kick;	     /* any thread sets it: polls leave translated code */
	_Atomic uint8_t irq_pending; /* any thread sets it: the board may have an interrupt for us */
	uint8_t shadow;		     /* interrupts held off for one instruction (sti, mov ss) */
	uint32_t exit_code;	     /* enum bt_exit */
	uint32_t access;	     /* of a slow path: descriptor of the access */
	uint64_t exit_argument;
	uint64_t resume;	     /* host address in translated code where a slow path came from */
	uint64_t fs_base, gs_base;   /* copies of segments[].base, kept equal by bt_segment_loaded() */
	uint64_t bounce[8];	     /* host address for each memory operand of an instruction run through bounce buffers */
	uint64_t tsc_offset;
	uint32_t mode;		     /* enum bt_mode_bits, kept by bt_mode_update() */
	uint8_t cpl;

	/* the rest of the architectural state */
	uint64_t eflags; /* without the arithmetic flags, IF, DF, AC: use bt_rflags() and bt_set_rflags() */
	struct engine_segment segments[ENGINE_SEGMENTS];
	struct engine_table gdt, idt;
	uint64_t cr0, cr2, cr3, cr4, efer, xcr0;
	uint64_t dr[8];
	uint64_t star, lstar, cstar, sfmask, kernel_gs_base, sysenter_cs, sysenter_esp, sysenter_eip, pat, tsc_aux;
	uint64_t mtrr_def_type, mtrr_fixed[11], mtrr_base[8], mtrr_mask[8], misc_enable, spec_ctrl;
	uint64_t tsc_adjust, unknown_msrs; /* unknown_msrs: accesses refused with #GP */
	/* paravirt.c: KVM's MSRs; ns of steal time, and the clocks when it was last counted */
	uint64_t pv_system_time, pv_wall_clock, pv_steal, pv_eoi;
	uint64_t pv_stolen, pv_since, pv_cpu_since;
	bool pv_eoi_offered;
	_Atomic bool pv_unhalted; /* any thread sets it: the next HLT, or the one it is in, ends */
	struct bt_fault fault;
	bool halted, triple_fault;

	unsigned index;
	struct bt_vm *vm;
	const struct cpu_model *model;
	const struct engine_board *board;

	/* software TLB and jump caches */
	struct jump_entry jump[BT_SETS][BT_JUMP_ENTRIES] __attribute__((aligned(64)));
	struct tlb_entry tlb[BT_SETS][BT_TLB_ENTRIES] __attribute__((aligned(64)));

	struct bt_private *private; /* of run.c, tlb.c, translate.c: not for others */
};

/* ---- flags (run.c) ---- */
uint64_t bt_rflags(const struct bt_vcpu *v);
/* Sets all of RFLAGS as given (reserved bits are forced right); the caller has applied IOPL and mode rules. */
void bt_set_rflags(struct bt_vcpu *v, uint64_t rflags);

/* To be called after CR0, CR4, EFER, CS, SS, DS, ES, CPL, EFLAGS.VM, .AC have changed: recomputes v->mode. */
void bt_mode_update(struct bt_vcpu *v);

/* ---- virtual memory, for C code (tlb.c) ---- */
enum bt_access { BT_READ = 0, BT_WRITE = 1, BT_FETCH = 2 };

/* Translates one linear address for an access at the given privilege (user: CPL 3 rules; implicit supervisor accesses,
 * such as descriptor tables, pass user = false). *gpa is set, or the page fault is recorded in v->fault and v->cr2 and
 * BT_FAULT returned. Sets accessed and dirty bits. */
int bt_translate_address(struct bt_vcpu *v, uint64_t linear, enum bt_access access, bool user, uint64_t *gpa);

/* Copies to and from linear memory (device memory too), all or nothing for the checks; 0 or BT_FAULT with v->fault set. */
int bt_read_linear(struct bt_vcpu *v, uint64_t linear, void *to, unsigned size, bool user);
int bt_write_linear(struct bt_vcpu *v, uint64_t linear, const void *from, unsigned size, bool user);

/* CR3 writes and the like: every translation, or all but the global ones. */
void bt_tlb_flush(struct bt_vcpu *v, bool keep_global);
void bt_tlb_flush_page(struct bt_vcpu *v, uint64_t linear);

/* ---- exceptions: record one in v->fault and return BT_FAULT ---- */
int bt_raise(struct bt_vcpu *v, int vector);			       /* no error code */
int bt_raise_error(struct bt_vcpu *v, int vector, uint32_t error);     /* with error code */

/* ---- decoded instructions (address.c) ---- */
struct bt_decoded {
	ZydisDecodedInstruction insn;
	ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
};

/* Segment override, base and index, address size: the linear address of memory operand `op` of d, whose instruction is at
 * v->rip; registers from v->gprs. No limit check in 64-bit mode; outside it the segment's limit and type are checked:
 * 0 or BT_FAULT. */
int bt_effective_address(struct bt_vcpu *v, const struct bt_decoded *d, const ZydisDecodedOperand *op, unsigned size,
	enum bt_access access, uint64_t *linear);
/* A general register (any size, high bytes too), by Zydis's name; 32-bit writes clear the upper half. */
uint64_t bt_register_read(const struct bt_vcpu *v, ZydisRegister reg);
void bt_register_write(struct bt_vcpu *v, ZydisRegister reg, uint64_t value);

/* The guest's TSC now. */
uint64_t bt_tsc(const struct bt_vcpu *v);
