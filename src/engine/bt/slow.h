/* What the files that execute one instruction at a time share: slow.c (fetching it, running it as it is, entry points),
 * address.c (registers, segments, addresses), flow.c (stack, control flow, decimal arithmetic, in C), xsave.c. */
#pragma once

#include "engine/bt/bt.h"
#include "engine/bt/insn.h"

/* One instruction, kept so that it need not be decoded again, and the host code that runs it. */
struct slow_entry {
	uint64_t phys, generation, flushes;
	uint32_t mode;
	bool valid;
	struct insn i;
	struct bt_block *stub;
};

static inline bool is_user(const struct bt_vcpu *v)
{
	return (v->mode & BT_MODE_SET) == BT_SET_USER;
}

/* ---- address.c; int: 0, or BT_FAULT with v->fault set ---- */
/* The linear address of `size` bytes at `offset` in segment s, after the segment's checks (the canonical one in 64-bit
 * mode). */
int address_linear(struct bt_vcpu *v, int s, uint64_t offset, unsigned size, enum bt_access access, uint64_t *linear);
/* Base, index and displacement of a memory operand, cut to the address size. */
uint64_t address_offset(const struct bt_vcpu *v, const struct bt_decoded *d, const ZydisDecodedOperand *op);
uint64_t address_cut(const struct bt_decoded *d, uint64_t offset);
/* ENGINE_ES to ENGINE_GS, by Zydis's name. */
int address_segment(ZydisRegister segment);
uint64_t address_base(const struct bt_vcpu *v, int s);
bool address_is_canonical(uint64_t a, unsigned size);

/* ---- flow.c; int: 0, or BT_FAULT with v->fault set and the registers as they were ---- */
/* Those that jump set v->rip, also where they go on to the next instruction. */
int flow_jump(struct bt_vcpu *v, uint64_t rip);
int flow_call(struct bt_vcpu *v, const struct bt_decoded *d);
int flow_return(struct bt_vcpu *v, const struct bt_decoded *d);
int flow_loop(struct bt_vcpu *v, const struct bt_decoded *d); /* jcxz and its kin too */
/* These leave v->rip alone. */
int flow_push(struct bt_vcpu *v, uint64_t value, unsigned size);
int flow_pop(struct bt_vcpu *v, const struct bt_decoded *d);
int flow_enter(struct bt_vcpu *v, const struct bt_decoded *d);
int flow_leave(struct bt_vcpu *v, const struct bt_decoded *d);
int flow_push_all(struct bt_vcpu *v, const struct bt_decoded *d);
int flow_pop_all(struct bt_vcpu *v, const struct bt_decoded *d);
int flow_bound(struct bt_vcpu *v, const struct bt_decoded *d);
int flow_arpl(struct bt_vcpu *v, const struct bt_decoded *d);
int flow_decimal(struct bt_vcpu *v, const struct bt_decoded *d);
/* The value of a register, immediate or memory operand of an integer instruction. */
int flow_operand(struct bt_vcpu *v, const struct bt_decoded *d, const ZydisDecodedOperand *op, uint64_t *value);
/* Where a direct branch goes. */
uint64_t flow_target(const struct bt_vcpu *v, const struct bt_decoded *d);
/* rip as wide as code here, or what `branch` (NULL: any other instruction) leaves of it. */
uint64_t flow_cut_rip(const struct bt_vcpu *v, uint64_t rip, const struct bt_decoded *branch);
/* Bytes that a push or pop moves. */
unsigned flow_slot_size(const struct bt_vcpu *v, const struct bt_decoded *d);
/* Does condition code cc (the low four bits of a Jcc's opcode) hold? */
bool flow_condition(const struct bt_vcpu *v, unsigned cc);

/* ---- xsave.c ---- */
int xsave_execute(struct bt_vcpu *v, struct slow_entry *e);

/* ---- slow.c ---- */
/* Host code that runs d (encoded as bytes) with its memory operand in a buffer; kept in e. NULL: cannot be done. */
struct bt_block *slow_stub(struct bt_vcpu *v, struct slow_entry *e, const struct bt_decoded *d, const uint8_t *bytes);
/* Runs it; its memory operand is at `memory`. BT_FAULT: the instruction itself faulted. */
int slow_run_stub(struct bt_vcpu *v, const struct bt_block *stub, void *memory);
