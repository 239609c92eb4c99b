/* Instructions of the stack, of control flow, and decimal arithmetic, done in C one at a time, in every mode. */
#include "engine/bt/slow.h"

/* ---- stack ---- */

static uint64_t stack_mask(const struct bt_vcpu *v)
{
	if ((v->mode & BT_MODE_CODE) == BT_MODE_CODE64)
		return UINT64_MAX;
	return v->mode & BT_MODE_STACK32 ? UINT32_MAX : 0xffff;
}

static void set_sp(struct bt_vcpu *v, uint64_t sp)
{
	uint64_t mask = stack_mask(v);

	v->gprs[ENGINE_RSP] = mask == 0xffff ? (v->gprs[ENGINE_RSP] & ~0xffffull) | (sp & 0xffff) : sp & mask;
}

int flow_push(struct bt_vcpu *v, uint64_t value, unsigned size)
{
	uint64_t sp = (v->gprs[ENGINE_RSP] - size) & stack_mask(v), linear;

	if (address_linear(v, ENGINE_SS, sp, size, BT_WRITE, &linear) ||
		bt_write_linear(v, linear, &value, size, is_user(v)))
		return BT_FAULT;
	set_sp(v, sp);
	return 0;
}

/* Reads the slot `depth` bytes up without moving sp. */
static int peek(struct bt_vcpu *v, unsigned depth, unsigned size, uint64_t *value)
{
	uint64_t sp = (v->gprs[ENGINE_RSP] + depth) & stack_mask(v), linear;

	*value = 0;
	if (address_linear(v, ENGINE_SS, sp, size, BT_READ, &linear))
		return BT_FAULT;
	return bt_read_linear(v, linear, value, size, is_user(v));
}

/* Would a write there fault? */
static int check_linear(struct bt_vcpu *v, uint64_t linear, unsigned size)
{
	uint64_t gpa;

	if (bt_translate_address(v, linear, BT_WRITE, is_user(v), &gpa))
		return BT_FAULT;
	if ((linear & 0xfff) + size <= BT_PAGE_SIZE)
		return 0;
	return bt_translate_address(v, (linear + size - 1) & ~0xfffull, BT_WRITE, is_user(v), &gpa);
}

/* ---- control flow ---- */

uint64_t flow_cut_rip(const struct bt_vcpu *v, uint64_t rip, const struct bt_decoded *branch)
{
	if ((v->mode & BT_MODE_CODE) == BT_MODE_CODE64)
		return branch && insn_is_narrow_branch(&branch->insn, v->mode) ? rip & 0xffff : rip;
	return branch && branch->insn.operand_width == 16 ? rip & 0xffff : rip & 0xffffffff;
}

static int check_target(struct bt_vcpu *v, uint64_t rip)
{
	if ((v->mode & BT_MODE_CODE) == BT_MODE_CODE64) {
		if (!address_is_canonical(rip, 1))
			return bt_raise_error(v, VECTOR_GP, 0);
	} else if (rip > v->segments[ENGINE_CS].limit) {
		return bt_raise_error(v, VECTOR_GP, 0);
	}
	return 0;
}

int flow_jump(struct bt_vcpu *v, uint64_t rip)
{
	if (check_target(v, rip))
		return BT_FAULT;
	v->rip = rip;
	return 0;
}

bool flow_condition(const struct bt_vcpu *v, unsigned cc)
{
	uint64_t f = bt_rflags(v);
	bool sf = f & FLAG_SF, of = f & FLAG_OF, zf = f & FLAG_ZF, r;

	switch (cc >> 1) {
	case 0: r = of; break;
	case 1: r = f & FLAG_CF; break;
	case 2: r = zf; break;
	case 3: r = zf || (f & FLAG_CF); break;
	case 4: r = sf; break;
	case 5: r = f & FLAG_PF; break;
	case 6: r = sf != of; break;
	default: r = zf || sf != of; break;
	}
	return r != (cc & 1);
}

uint64_t flow_target(const struct bt_vcpu *v, const struct bt_decoded *d)
{
	return flow_cut_rip(v, v->rip + d->insn.length + (uint64_t)d->operands[0].imm.value.s, d);
}

/* The value of a register, immediate or memory operand of an integer instruction. */
int flow_operand(struct bt_vcpu *v, const struct bt_decoded *d, const ZydisDecodedOperand *op, uint64_t *value)
{
	uint64_t linear;
	unsigned size;

	*value = 0;
	if (op->type == ZYDIS_OPERAND_TYPE_REGISTER) {
		*value = bt_register_read(v, op->reg.value);
		return 0;
	}
	if (op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
		*value = op->imm.value.u;
		return 0;
	}
	size = insn_is_narrow_branch(&d->insn, v->mode) ? 2 : op->size / 8u;
	if (bt_effective_address(v, d, op, size, BT_READ, &linear))
		return BT_FAULT;
	return bt_read_linear(v, linear, value, size, is_user(v));
}

unsigned flow_slot_size(const struct bt_vcpu *v, const struct bt_decoded *d)
{
	if ((v->mode & BT_MODE_CODE) == BT_MODE_CODE64)
		return d->insn.operand_width == 16 ? 2 : 8;
	return d->insn.operand_width / 8u;
}

/* Bytes of a return address. */
static unsigned return_size(const struct bt_vcpu *v, const struct bt_decoded *d)
{
	if ((v->mode & BT_MODE_CODE) == BT_MODE_CODE64)
		return insn_is_narrow_branch(&d->insn, v->mode) ? 2 : 8;
	return flow_slot_size(v, d);
}

int flow_call(struct bt_vcpu *v, const struct bt_decoded *d)
{
	uint64_t target, next = v->rip + d->insn.length, linear;
	unsigned size = return_size(v, d);

	if (d->operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
		target = flow_target(v, d);
	else if (flow_operand(v, d, &d->operands[0], &target))
		return BT_FAULT;
	target = flow_cut_rip(v, target, d);
	/* The stack's faults come before the target's, and those before anything is written. */
	if (address_linear(v, ENGINE_SS, (v->gprs[ENGINE_RSP] - size) & stack_mask(v), size, BT_WRITE, &linear) ||
		check_linear(v, linear, size) || check_target(v, target))
		return BT_FAULT;
	if (flow_push(v, flow_cut_rip(v, next, d), size))
		return BT_FAULT;
	v->rip = target;
	return 0;
}

int flow_return(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned size = return_size(v, d);
	uint64_t target, extra = 0;

	if (d->operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
		extra = d->operands[0].imm.value.u & 0xffff;
	if (peek(v, 0, size, &target) || flow_jump(v, flow_cut_rip(v, target, d)))
		return BT_FAULT;
	set_sp(v, v->gprs[ENGINE_RSP] + size + extra);
	return 0;
}

int flow_pop(struct bt_vcpu *v, const struct bt_decoded *d)
{
	const ZydisDecodedOperand *op = &d->operands[0];
	unsigned size = flow_slot_size(v, d);
	uint64_t value, before = v->gprs[ENGINE_RSP], linear;

	if (peek(v, 0, size, &value))
		return BT_FAULT;
	set_sp(v, before + size);
	if (op->type == ZYDIS_OPERAND_TYPE_REGISTER) {
		bt_register_write(v, op->reg.value, value);
		return 0;
	}
	/* The address is formed with the stack pointer as it is after the pop. */
	if (bt_effective_address(v, d, op, size, BT_WRITE, &linear) ||
		bt_write_linear(v, linear, &value, size, is_user(v))) {
		v->gprs[ENGINE_RSP] = before;
		return BT_FAULT;
	}
	return 0;
}

int flow_enter(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned size = flow_slot_size(v, d), level = d->operands[1].imm.value.u & 31;
	uint64_t before = v->gprs[ENGINE_RSP], frame, mask = stack_mask(v), bp = v->gprs[ENGINE_RBP], value, linear;
	uint64_t room = d->operands[0].imm.value.u & 0xffff;

	if (flow_push(v, bp, size))
		return BT_FAULT;
	frame = v->gprs[ENGINE_RSP];
	for (unsigned k = 1; k < level; k++) {
		value = 0;
		if (address_linear(v, ENGINE_SS, (bp - size * k) & mask, size, BT_READ, &linear) ||
			bt_read_linear(v, linear, &value, size, is_user(v)) || flow_push(v, value, size))
			goto undo;
	}
	if (level && flow_push(v, frame, size))
		goto undo;
	/* The new stack pointer must be writable. */
	if (address_linear(v, ENGINE_SS, (v->gprs[ENGINE_RSP] - room) & mask, size, BT_WRITE, &linear) ||
		bt_translate_address(v, linear, BT_WRITE, is_user(v), &value))
		goto undo;
	set_sp(v, v->gprs[ENGINE_RSP] - room);
	if (size == 2)
		v->gprs[ENGINE_RBP] = (bp & ~0xffffull) | (frame & 0xffff);
	else
		v->gprs[ENGINE_RBP] = size == 4 ? (uint32_t)frame : frame;
	return 0;
undo:
	v->gprs[ENGINE_RSP] = before;
	return BT_FAULT;
}

int flow_leave(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned size = flow_slot_size(v, d);
	uint64_t before = v->gprs[ENGINE_RSP], value;

	set_sp(v, v->gprs[ENGINE_RBP]);
	if (peek(v, 0, size, &value)) {
		v->gprs[ENGINE_RSP] = before;
		return BT_FAULT;
	}
	set_sp(v, v->gprs[ENGINE_RSP] + size);
	if (size == 2)
		v->gprs[ENGINE_RBP] = (v->gprs[ENGINE_RBP] & ~0xffffull) | value;
	else
		v->gprs[ENGINE_RBP] = value;
	return 0;
}

int flow_push_all(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned size = flow_slot_size(v, d);
	uint64_t before = v->gprs[ENGINE_RSP];

	for (unsigned k = 0; k < 8; k++) {
		if (flow_push(v, k == ENGINE_RSP ? before : v->gprs[k], size)) {
			v->gprs[ENGINE_RSP] = before;
			return BT_FAULT;
		}
	}
	return 0;
}

int flow_pop_all(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned size = flow_slot_size(v, d);
	uint64_t values[8];

	for (unsigned k = 0; k < 8; k++)
		if (peek(v, k * size, size, &values[7 - k]))
			return BT_FAULT;
	for (unsigned k = 0; k < 8; k++)
		if (k != ENGINE_RSP)
			v->gprs[k] = size == 2 ? (v->gprs[k] & ~0xffffull) | values[k] : values[k];
	set_sp(v, v->gprs[ENGINE_RSP] + 8 * size);
	return 0;
}

/* loop, loope, loopne (kind 0, 1, 2), jcxz (3) */
int flow_loop(struct bt_vcpu *v, const struct bt_decoded *d)
{
	uint64_t mask = d->insn.address_width == 64 ? UINT64_MAX : d->insn.address_width == 32 ? UINT32_MAX : 0xffff;
	uint64_t count = v->gprs[ENGINE_RCX] & mask, target = flow_target(v, d);
	bool taken, zf = bt_rflags(v) & FLAG_ZF;

	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_LOOP:
	case ZYDIS_MNEMONIC_LOOPE:
	case ZYDIS_MNEMONIC_LOOPNE:
		count = (count - 1) & mask;
		taken = count && (d->insn.mnemonic == ZYDIS_MNEMONIC_LOOP || zf == (d->insn.mnemonic == ZYDIS_MNEMONIC_LOOPE));
		if (taken && flow_jump(v, target))
			return BT_FAULT;
		if (!taken)
			v->rip += d->insn.length;
		v->gprs[ENGINE_RCX] = mask == 0xffff ? (v->gprs[ENGINE_RCX] & ~0xffffull) | count : count;
		return 0;
	default:
		if (!count)
			return flow_jump(v, target);
		v->rip += d->insn.length;
		return 0;
	}
}

/* A signed index against the two bounds in memory; outside them #BR. */
int flow_bound(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned size = d->insn.operand_width / 8u;
	int32_t bounds[2] = { 0, 0 }, index = (int32_t)bt_register_read(v, d->operands[0].reg.value);
	uint64_t linear;

	if (bt_effective_address(v, d, &d->operands[1], 2 * size, BT_READ, &linear) ||
		bt_read_linear(v, linear, &bounds[0], size, is_user(v)) ||
		bt_read_linear(v, linear + size, &bounds[1], size, is_user(v)))
		return BT_FAULT;
	if (size == 2) {
		index = (int16_t)index;
		bounds[0] = (int16_t)bounds[0];
		bounds[1] = (int16_t)bounds[1];
	}
	return index < bounds[0] || index > bounds[1] ? bt_raise(v, VECTOR_BR) : 0;
}

/* Raises the requested privilege level of a selector to that of another; ZF says whether it did. */
int flow_arpl(struct bt_vcpu *v, const struct bt_decoded *d)
{
	const ZydisDecodedOperand *op = &d->operands[0];
	uint64_t wanted = bt_register_read(v, d->operands[1].reg.value) & 3, value, linear = 0;
	bool lower;

	if (v->mode & BT_MODE_REAL)
		return bt_raise(v, VECTOR_UD);
	if (flow_operand(v, d, op, &value))
		return BT_FAULT;
	lower = (value & 3) < wanted;
	value = (value & ~3ull) | max(wanted, value & 3);
	if (op->type == ZYDIS_OPERAND_TYPE_REGISTER) {
		if (lower)
			bt_register_write(v, op->reg.value, value);
	} else if (bt_effective_address(v, d, op, 2, BT_WRITE, &linear) || bt_write_linear(v, linear, &value, 2, is_user(v))) {
		return BT_FAULT;
	}
	bt_set_rflags(v, (bt_rflags(v) & ~(uint64_t)FLAG_ZF) | (lower ? FLAG_ZF : 0));
	return 0;
}

/* ---- decimal arithmetic, which 64-bit mode does not have (SDM volume 2, AAA to DAS) ---- */

static void set_result_flags(struct bt_vcpu *v, uint8_t al, bool cf, bool af)
{
	uint64_t f = bt_rflags(v) & ~(uint64_t)FLAGS_ARITHMETIC;

	f |= (cf ? FLAG_CF : 0) | (af ? FLAG_AF : 0) | (al & 0x80 ? FLAG_SF : 0) | (al ? 0 : FLAG_ZF) |
		(__builtin_popcount(al) & 1 ? 0 : FLAG_PF);
	bt_set_rflags(v, f);
}

int flow_decimal(struct bt_vcpu *v, const struct bt_decoded *d)
{
	uint64_t f = bt_rflags(v);
	uint8_t al = (uint8_t)v->gprs[0], ah = (uint8_t)(v->gprs[0] >> 8), base, old = al;
	bool cf = f & FLAG_CF, af = f & FLAG_AF, old_cf = cf;

	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_AAA:
	case ZYDIS_MNEMONIC_AAS: {
		uint16_t ax = (uint16_t)v->gprs[0];

		af = cf = (al & 15) > 9 || af;
		if (af)
			ax = d->insn.mnemonic == ZYDIS_MNEMONIC_AAA ? ax + 0x106 : (uint16_t)(ax - 6 - 0x100);
		ax &= 0xff0f;
		al = (uint8_t)ax;
		ah = (uint8_t)(ax >> 8);
		break;
	}
	case ZYDIS_MNEMONIC_AAM:
		base = (uint8_t)d->operands[0].imm.value.u;
		if (!base)
			return bt_raise(v, VECTOR_DE);
		ah = al / base;
		al = al % base;
		cf = af = false;
		break;
	case ZYDIS_MNEMONIC_AAD:
		base = (uint8_t)d->operands[0].imm.value.u;
		al = (uint8_t)(al + ah * base);
		ah = 0;
		cf = af = false;
		break;
	case ZYDIS_MNEMONIC_DAA:
		cf = false;
		if ((al & 15) > 9 || af) {
			cf = old_cf || al > 0xf9;
			al += 6;
			af = true;
		}
		if (old > 0x99 || old_cf) {
			al += 0x60;
			cf = true;
		}
		break;
	default: /* DAS */
		cf = false;
		if ((al & 15) > 9 || af) {
			cf = old_cf || al < 6;
			al -= 6;
			af = true;
		}
		if (old > 0x99 || old_cf) {
			al -= 0x60;
			cf = true;
		}
		break;
	}
	v->gprs[0] = (v->gprs[0] & ~0xffffull) | (uint64_t)ah << 8 | al;
	set_result_flags(v, al, cf, af);
	return 0;
}
