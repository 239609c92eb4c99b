/* What the files of the privileged architecture share (system.h is what the rest of the engine sees of them). */
#pragma once

#include "engine/bt/system.h"

static inline bool in_real_mode(const struct bt_vcpu *v)
{
	return !(v->cr0 & CR0_PE);
}

static inline bool in_vm86(const struct bt_vcpu *v)
{
	return v->eflags & FLAG_VM;
}

static inline bool in_long_mode(const struct bt_vcpu *v)
{
	return v->efer & EFER_LMA;
}

static inline bool in_code64(const struct bt_vcpu *v)
{
	return in_long_mode(v) && v->segments[ENGINE_CS].attributes & SEGMENT_L;
}

static inline bool is_user(const struct bt_vcpu *v)
{
	return v->cpl == 3;
}

static inline bool is_amd(const struct bt_vcpu *v)
{
	return v->model->vendor == CPU_AMD;
}

static inline bool is_canonical(uint64_t address)
{
	return (uint64_t)((int64_t)(address << 16) >> 16) == address;
}

static inline unsigned iopl(const struct bt_vcpu *v)
{
	return v->eflags >> 12 & 3;
}

static inline bool is_null(uint16_t selector)
{
	return !(selector & 0xfffc);
}

/* The address of what follows the instruction at v->rip. */
static inline uint64_t next_rip(const struct bt_vcpu *v, const struct bt_decoded *d)
{
	uint64_t next = v->rip + d->insn.length;

	return in_code64(v) ? next : (uint32_t)next;
}

/* ---- descriptors (SDM volume 3, 3.4.5) ---- */
#define TYPE_ACCESSED 0x1
#define TYPE_WRITABLE 0x2    /* data */
#define TYPE_READABLE 0x2    /* code */
#define TYPE_EXPAND_DOWN 0x4 /* data */
#define TYPE_CONFORMING 0x4  /* code */
#define TYPE_CODE 0x8

/* Attributes of the flat segments that SYSCALL and its kin load without a descriptor: present, granular. */
#define FLAT_CODE64 0xa9b
#define FLAT_CODE32 0xc9b
#define FLAT_DATA 0xc93
#define FLAT_DPL3 0x60

static inline uint16_t descriptor_attributes(uint64_t raw)
{
	return (uint16_t)((raw >> 40 & 0xff) | (raw >> 44 & 0xf00));
}

static inline unsigned attributes_dpl(uint16_t attributes)
{
	return attributes >> SEGMENT_DPL_SHIFT & 3;
}

static inline bool is_code(uint16_t attributes)
{
	return (attributes & (SEGMENT_S | TYPE_CODE)) == (SEGMENT_S | TYPE_CODE);
}

static inline bool is_writable_data(uint16_t attributes)
{
	return (attributes & (SEGMENT_S | TYPE_CODE | TYPE_WRITABLE)) == (SEGMENT_S | TYPE_WRITABLE);
}

static inline uint64_t descriptor_base(uint64_t raw)
{
	return (raw >> 16 & 0xffffff) | (raw >> 32 & 0xff000000);
}

static inline uint32_t descriptor_limit(uint64_t raw)
{
	uint32_t limit = (uint32_t)((raw & 0xffff) | (raw >> 32 & 0xf0000));

	return raw >> 55 & 1 ? limit << 12 | 0xfff : limit;
}

static inline void segment_set(
	struct bt_vcpu *v, int s, uint16_t selector, uint64_t base, uint32_t limit, uint16_t attributes)
{
	v->segments[s].selector = selector;
	v->segments[s].base = base;
	v->segments[s].limit = limit;
	v->segments[s].attributes = attributes;
}

/* A null selector: nothing may be accessed through it (64-bit mode does not look). SS keeps the CPL as its DPL. */
static inline void segment_set_null(struct bt_vcpu *v, int s, uint16_t selector, unsigned dpl)
{
	segment_set(v, s, selector, 0, 0, (uint16_t)(dpl << SEGMENT_DPL_SHIFT));
}

static inline void segment_set_raw(struct bt_vcpu *v, int s, uint16_t selector, uint64_t raw)
{
	segment_set(v, s, selector, descriptor_base(raw), descriptor_limit(raw), descriptor_attributes(raw));
}

/* Reads the 8 bytes of selector's descriptor; outside its table: `vector` with the selector. */
int descriptor_read(struct bt_vcpu *v, uint16_t selector, int vector, uint64_t *raw);
/* Sets the accessed bit in the table, and in *raw, if it is clear. */
int descriptor_accessed(struct bt_vcpu *v, uint16_t selector, uint64_t *raw);
/* Loads DS, ES, SS, FS or GS as MOV does. */
int segment_load(struct bt_vcpu *v, int s, uint16_t selector);
int segment_load_ldt(struct bt_vcpu *v, uint16_t selector);
int segment_load_task(struct bt_vcpu *v, uint16_t selector);
/* Nulls DS, ES, FS and GS where the new CPL may not use them (after a return outwards). */
void segments_drop_privileged(struct bt_vcpu *v);
/* A segment register of real or virtual-8086 mode. */
void segment_set_real(struct bt_vcpu *v, int s, uint16_t selector);
/* Makes selector and raw CS at the privilege cpl; bt_mode_update is the caller's. */
void code_set(struct bt_vcpu *v, uint16_t selector, uint64_t raw, unsigned cpl);
/* Is rip a place where code of descriptor raw may go on? #GP(0) if not. *rip is cut to 32 bits outside 64-bit code. */
int code_check_target(struct bt_vcpu *v, uint64_t raw, uint64_t *rip);

/* The checks of a far RET or IRET on the CS and SS that it popped. */
int return_check_code(struct bt_vcpu *v, uint16_t selector, uint64_t *raw);
int return_check_stack(struct bt_vcpu *v, uint16_t selector, unsigned cpl, bool to_code64, uint64_t *raw);

/* Far transfers; size is the operand's in bytes. v->rip is set on success. next: the return address. */
int far_jump(struct bt_vcpu *v, uint16_t selector, uint64_t offset, unsigned size);
int far_call(struct bt_vcpu *v, uint16_t selector, uint64_t offset, unsigned size, uint64_t next);
int far_return(struct bt_vcpu *v, unsigned size, unsigned release);

/* LAR, LSL, VERR, VERW: true when the selector passes; the caller sets ZF. -1: fault. */
enum segment_query { QUERY_LAR, QUERY_LSL, QUERY_VERR, QUERY_VERW };
int segment_query(struct bt_vcpu *v, enum segment_query query, uint16_t selector, uint32_t *value);

/* ---- the stack, in steps that take effect only with stack_commit ---- */
struct stack {
	uint64_t base, sp, mask;
	uint32_t limit;
	bool checked, expand_down, big, user;
	int fault_selector; /* error code of #SS */
};

struct stack stack_current(const struct bt_vcpu *v);
/* A stack that an inner privilege will use; raw: its descriptor. */
struct stack stack_inner(uint16_t selector, uint64_t raw, uint64_t sp, unsigned cpl);
int stack_push(struct bt_vcpu *v, struct stack *s, uint64_t value, unsigned size);
int stack_pop(struct bt_vcpu *v, struct stack *s, uint64_t *value, unsigned size);
void stack_commit(struct bt_vcpu *v, const struct stack *s);
/* SS:SP for an inner privilege from a legacy TSS, with the checks on SS (SDM volume 3, 6.12.1). */
int stack_from_task(struct bt_vcpu *v, unsigned cpl, uint16_t *selector, uint64_t *raw, uint64_t *sp);
/* A quadword of the 64-bit TSS: RSP0 to 2 or IST 1 to 7. */
int task_read64(struct bt_vcpu *v, unsigned offset, uint64_t *value);

/* ---- exception.c: instructions that change privilege ---- */
int iret_execute(struct bt_vcpu *v, unsigned size);
int syscall_execute(struct bt_vcpu *v, uint64_t next);
int sysret_execute(struct bt_vcpu *v, unsigned size);
int sysenter_execute(struct bt_vcpu *v);
int sysexit_execute(struct bt_vcpu *v, unsigned size);
/* RFLAGS from a popped image, as far as `cpl` may change them; image bits above size are kept. */
uint64_t flags_merge(const struct bt_vcpu *v, uint64_t image, unsigned size);

/* ---- paravirt.c ---- */
/* True: msr is one of KVM's and was read; *result of a write: 0 or BT_FAULT. */
bool paravirt_read(struct bt_vcpu *v, uint32_t msr, uint64_t *value);
bool paravirt_write(struct bt_vcpu *v, uint32_t msr, uint64_t value, int *result);
/* The guest has moved its TSC: its clock has to stay. */
void paravirt_tsc_moved(struct bt_vcpu *v);
void paravirt_reset(struct bt_vcpu *v, bool init);
/* VMCALL or VMMCALL; RAX is the result. */
void paravirt_hypercall(struct bt_vcpu *v);

/* ---- msr.c, cpuid.c ---- */
int msr_read(struct bt_vcpu *v, uint32_t msr, uint64_t *value);
int msr_write(struct bt_vcpu *v, uint32_t msr, uint64_t value);
void msr_reset(struct bt_vcpu *v);
void cpuid_execute(struct bt_vcpu *v);
/* The bits of CR4 that the model has. */
uint64_t cpuid_cr4_mask(const struct bt_vcpu *v);
/* May XCR0 have this value? */
bool cpuid_xcr0_valid(const struct bt_vcpu *v, uint64_t value);

/* ---- system.c ---- */
/* A segment, control or general register, or memory: operand i of d, size bytes. */
int operand_read(struct bt_vcpu *v, const struct bt_decoded *d, unsigned i, unsigned size, uint64_t *value);
int operand_write(struct bt_vcpu *v, const struct bt_decoded *d, unsigned i, unsigned size, uint64_t value);
#define REPEAT (1) /* instead of 0 or BT_FAULT: the instruction has not ended, v->rip stays on it */

/* ---- control.c: control and debug registers, descriptor-table registers ---- */
int control_move(struct bt_vcpu *v, const struct bt_decoded *d);
int cr0_write(struct bt_vcpu *v, uint64_t value);
int table_execute(struct bt_vcpu *v, const struct bt_decoded *d);

/* ---- port.c ---- */
/* IN and OUT, INS and OUTS: 0, BT_FAULT or REPEAT. */
int port_execute(struct bt_vcpu *v, const struct bt_decoded *d);
int port_string_execute(struct bt_vcpu *v, const struct bt_decoded *d);
