/* One instruction at a time, for what translated code hands over: accesses that cross pages, go to devices or to pages with
 * code; 16-bit and segmented code; rare instructions. Control flow and stack instructions are done in C; everything else
 * runs as it is, on the host CPU, with its memory operand in a bounce buffer (or right in guest memory). */
#include <stdlib.h>
#include <string.h>

#include "engine/bt/bt.h"
#include "engine/bt/insn.h"

#define SLOW_ENTRIES 128

struct slow_entry {
	uint64_t phys, generation, flushes;
	uint32_t mode;
	bool valid;
	struct insn i;
	struct bt_block *stub;
};

struct bt_slow_cache {
	struct slow_entry entries[SLOW_ENTRIES];
	struct slow_entry once; /* for instructions that are not to be kept */
};

int slow_create(struct bt_vcpu *v)
{
	v->private->slow_cache = calloc(1, sizeof(*v->private->slow_cache));
	return v->private->slow_cache ? 0 : -ENOMEM;
}

void slow_destroy(struct bt_vcpu *v)
{
	free(v->private->slow_cache);
}

/* ---- registers and addresses ---- */

uint64_t bt_register_read(const struct bt_vcpu *v, ZydisRegister reg)
{
	uint64_t value;

	if (reg == ZYDIS_REGISTER_RIP || reg == ZYDIS_REGISTER_EIP || reg == ZYDIS_REGISTER_IP)
		return v->rip;
	if (!reg_is_gpr(reg))
		return 0;
	value = v->gprs[reg_number(reg)];
	if (reg_is_high_byte(reg))
		return value >> 8 & 0xff;
	if (reg >= ZYDIS_REGISTER_RAX)
		return value;
	if (reg >= ZYDIS_REGISTER_EAX)
		return (uint32_t)value;
	return reg >= ZYDIS_REGISTER_AX ? (uint16_t)value : (uint8_t)value;
}

void bt_register_write(struct bt_vcpu *v, ZydisRegister reg, uint64_t value)
{
	uint64_t *r = &v->gprs[reg_number(reg)];

	if (reg_is_high_byte(reg))
		*r = (*r & ~0xff00ull) | (value & 0xff) << 8;
	else if (reg >= ZYDIS_REGISTER_RAX)
		*r = value;
	else if (reg >= ZYDIS_REGISTER_EAX)
		*r = (uint32_t)value;
	else if (reg >= ZYDIS_REGISTER_AX)
		*r = (*r & ~0xffffull) | (value & 0xffff);
	else
		*r = (*r & ~0xffull) | (value & 0xff);
}

/* Limit and type of a segment outside 64-bit mode (SDM volume 3, 5.3 and 5.5). */
static int check_segment(struct bt_vcpu *v, int s, uint64_t offset, unsigned size, enum bt_access access)
{
	const struct engine_segment *g = &v->segments[s];
	int vector = s == ENGINE_SS ? VECTOR_SS : VECTOR_GP;
	unsigned type = g->attributes & SEGMENT_TYPE;
	bool real = v->mode & BT_MODE_REAL, code = type & 8;
	uint64_t last = offset + size - 1;

	if (!real && !(g->attributes & SEGMENT_P))
		return bt_raise_error(v, vector, 0);
	if (!real && access == BT_WRITE && (code || !(type & 2)))
		return bt_raise_error(v, VECTOR_GP, 0);
	if (!real && access == BT_READ && code && !(type & 2))
		return bt_raise_error(v, VECTOR_GP, 0);
	if (!code && (type & 4) && !real) {
		uint64_t top = g->attributes & SEGMENT_DB ? 0xffffffff : 0xffff;

		if (offset <= g->limit || last > top)
			return bt_raise_error(v, vector, 0);
	} else if (last > g->limit) {
		return bt_raise_error(v, vector, 0);
	}
	return 0;
}

static bool is_canonical_range(uint64_t a, unsigned size)
{
	uint64_t b = a + size - 1;

	return (uint64_t)((int64_t)(a << 16) >> 16) == a && (uint64_t)((int64_t)(b << 16) >> 16) == b;
}

static uint64_t base_of(const struct bt_vcpu *v, int s)
{
	if (s == ENGINE_FS)
		return v->fs_base;
	if (s == ENGINE_GS)
		return v->gs_base;
	return (v->mode & BT_MODE_CODE) == BT_MODE_CODE64 ? 0 : v->segments[s].base;
}

static int linear_of(struct bt_vcpu *v, int s, uint64_t offset, unsigned size, enum bt_access access, uint64_t *linear)
{
	if ((v->mode & BT_MODE_CODE) == BT_MODE_CODE64) {
		*linear = offset + base_of(v, s);
		if (!is_canonical_range(*linear, size ? size : 1))
			return bt_raise_error(v, s == ENGINE_SS ? VECTOR_SS : VECTOR_GP, 0);
		return 0;
	}
	if (check_segment(v, s, offset, size ? size : 1, access))
		return BT_FAULT;
	*linear = (uint32_t)(v->segments[s].base + offset);
	return 0;
}

static int segment_of(ZydisRegister segment)
{
	return segment == ZYDIS_REGISTER_NONE ? ENGINE_DS : (int)(segment - ZYDIS_REGISTER_ES);
}

static uint64_t cut_address(const struct bt_decoded *d, uint64_t offset)
{
	return d->insn.address_width == 64 ? offset : d->insn.address_width == 32 ? (uint32_t)offset : (uint16_t)offset;
}

/* Base, index and displacement, cut to the address size. */
static uint64_t effective_offset(const struct bt_vcpu *v, const struct bt_decoded *d, const ZydisDecodedOperand *op)
{
	uint64_t offset = op->mem.disp.has_displacement ? (uint64_t)op->mem.disp.value : 0;

	if (op->mem.base == ZYDIS_REGISTER_RIP || op->mem.base == ZYDIS_REGISTER_EIP)
		offset += v->rip + d->insn.length;
	else if (op->mem.base != ZYDIS_REGISTER_NONE)
		offset += bt_register_read(v, op->mem.base);
	if (op->mem.index != ZYDIS_REGISTER_NONE && reg_is_gpr(op->mem.index))
		offset += bt_register_read(v, op->mem.index) * op->mem.scale;
	return cut_address(d, offset);
}

int bt_effective_address(struct bt_vcpu *v, const struct bt_decoded *d, const ZydisDecodedOperand *op, unsigned size,
	enum bt_access access, uint64_t *linear)
{
	return linear_of(v, segment_of(op->mem.segment), effective_offset(v, d, op), size, access, linear);
}

static bool is_user(const struct bt_vcpu *v)
{
	return (v->mode & BT_MODE_SET) == BT_SET_USER;
}

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

static int push(struct bt_vcpu *v, uint64_t value, unsigned size)
{
	uint64_t sp = (v->gprs[ENGINE_RSP] - size) & stack_mask(v), linear;

	if (linear_of(v, ENGINE_SS, sp, size, BT_WRITE, &linear) || bt_write_linear(v, linear, &value, size, is_user(v)))
		return BT_FAULT;
	set_sp(v, sp);
	return 0;
}

/* Reads the slot `depth` bytes up without moving sp. */
static int peek(struct bt_vcpu *v, unsigned depth, unsigned size, uint64_t *value)
{
	uint64_t sp = (v->gprs[ENGINE_RSP] + depth) & stack_mask(v), linear;

	*value = 0;
	if (linear_of(v, ENGINE_SS, sp, size, BT_READ, &linear))
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

static uint64_t cut_rip(const struct bt_vcpu *v, uint64_t rip, const struct bt_decoded *branch)
{
	if ((v->mode & BT_MODE_CODE) == BT_MODE_CODE64)
		return branch && insn_is_narrow_branch(&branch->insn, v->mode) ? rip & 0xffff : rip;
	return branch && branch->insn.operand_width == 16 ? rip & 0xffff : rip & 0xffffffff;
}

static int check_target(struct bt_vcpu *v, uint64_t rip)
{
	if ((v->mode & BT_MODE_CODE) == BT_MODE_CODE64) {
		if (!is_canonical_range(rip, 1))
			return bt_raise_error(v, VECTOR_GP, 0);
	} else if (rip > v->segments[ENGINE_CS].limit) {
		return bt_raise_error(v, VECTOR_GP, 0);
	}
	return 0;
}

static int jump_to(struct bt_vcpu *v, uint64_t rip)
{
	if (check_target(v, rip))
		return BT_FAULT;
	v->rip = rip;
	return 0;
}

static bool condition(const struct bt_vcpu *v, unsigned cc)
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

static uint64_t target_of(const struct bt_vcpu *v, const struct bt_decoded *d)
{
	return cut_rip(v, v->rip + d->insn.length + (uint64_t)d->operands[0].imm.value.s, d);
}

/* The value of a register, immediate or memory operand of an integer instruction. */
static int operand_value(struct bt_vcpu *v, const struct bt_decoded *d, const ZydisDecodedOperand *op, uint64_t *value)
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

static unsigned slot_size(const struct bt_vcpu *v, const struct bt_decoded *d)
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
	return slot_size(v, d);
}

static int do_call(struct bt_vcpu *v, const struct bt_decoded *d)
{
	uint64_t target, next = v->rip + d->insn.length, linear;
	unsigned size = return_size(v, d);

	if (d->operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
		target = target_of(v, d);
	else if (operand_value(v, d, &d->operands[0], &target))
		return BT_FAULT;
	target = cut_rip(v, target, d);
	/* The stack's faults come before the target's, and those before anything is written. */
	if (linear_of(v, ENGINE_SS, (v->gprs[ENGINE_RSP] - size) & stack_mask(v), size, BT_WRITE, &linear) ||
		check_linear(v, linear, size) || check_target(v, target))
		return BT_FAULT;
	if (push(v, cut_rip(v, next, d), size))
		return BT_FAULT;
	v->rip = target;
	return 0;
}

static int do_return(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned size = return_size(v, d);
	uint64_t target, extra = 0;

	if (d->operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
		extra = d->operands[0].imm.value.u & 0xffff;
	if (peek(v, 0, size, &target) || jump_to(v, cut_rip(v, target, d)))
		return BT_FAULT;
	set_sp(v, v->gprs[ENGINE_RSP] + size + extra);
	return 0;
}

static int do_pop(struct bt_vcpu *v, const struct bt_decoded *d)
{
	const ZydisDecodedOperand *op = &d->operands[0];
	unsigned size = slot_size(v, d);
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

static int do_enter(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned size = slot_size(v, d), level = d->operands[1].imm.value.u & 31;
	uint64_t before = v->gprs[ENGINE_RSP], frame, mask = stack_mask(v), bp = v->gprs[ENGINE_RBP], value, linear;
	uint64_t room = d->operands[0].imm.value.u & 0xffff;

	if (push(v, bp, size))
		return BT_FAULT;
	frame = v->gprs[ENGINE_RSP];
	for (unsigned k = 1; k < level; k++) {
		value = 0;
		if (linear_of(v, ENGINE_SS, (bp - size * k) & mask, size, BT_READ, &linear) ||
			bt_read_linear(v, linear, &value, size, is_user(v)) || push(v, value, size))
			goto undo;
	}
	if (level && push(v, frame, size))
		goto undo;
	/* The new stack pointer must be writable. */
	if (linear_of(v, ENGINE_SS, (v->gprs[ENGINE_RSP] - room) & mask, size, BT_WRITE, &linear) ||
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

static int do_leave(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned size = slot_size(v, d);
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

static int do_push_all(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned size = slot_size(v, d);
	uint64_t before = v->gprs[ENGINE_RSP];

	for (unsigned k = 0; k < 8; k++) {
		if (push(v, k == ENGINE_RSP ? before : v->gprs[k], size)) {
			v->gprs[ENGINE_RSP] = before;
			return BT_FAULT;
		}
	}
	return 0;
}

static int do_pop_all(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned size = slot_size(v, d);
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
static int do_loop(struct bt_vcpu *v, const struct bt_decoded *d)
{
	uint64_t mask = d->insn.address_width == 64 ? UINT64_MAX : d->insn.address_width == 32 ? UINT32_MAX : 0xffff;
	uint64_t count = v->gprs[ENGINE_RCX] & mask, target = target_of(v, d);
	bool taken, zf = bt_rflags(v) & FLAG_ZF;

	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_LOOP:
	case ZYDIS_MNEMONIC_LOOPE:
	case ZYDIS_MNEMONIC_LOOPNE:
		count = (count - 1) & mask;
		taken = count && (d->insn.mnemonic == ZYDIS_MNEMONIC_LOOP || zf == (d->insn.mnemonic == ZYDIS_MNEMONIC_LOOPE));
		if (taken && jump_to(v, target))
			return BT_FAULT;
		if (!taken)
			v->rip += d->insn.length;
		v->gprs[ENGINE_RCX] = mask == 0xffff ? (v->gprs[ENGINE_RCX] & ~0xffffull) | count : count;
		return 0;
	default:
		if (!count)
			return jump_to(v, target);
		v->rip += d->insn.length;
		return 0;
	}
}

/* A signed index against the two bounds in memory; outside them #BR. */
static int do_bound(struct bt_vcpu *v, const struct bt_decoded *d)
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
static int do_arpl(struct bt_vcpu *v, const struct bt_decoded *d)
{
	const ZydisDecodedOperand *op = &d->operands[0];
	uint64_t wanted = bt_register_read(v, d->operands[1].reg.value) & 3, value, linear = 0;
	bool lower;

	if (v->mode & BT_MODE_REAL)
		return bt_raise(v, VECTOR_UD);
	if (operand_value(v, d, op, &value))
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

static int do_decimal(struct bt_vcpu *v, const struct bt_decoded *d)
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

/* ---- running an instruction as it is ---- */

static struct bt_block *stub_of(struct bt_vcpu *v, struct slow_entry *e, const struct bt_decoded *d, const uint8_t *bytes)
{
	if (e->stub && e->flushes == v->vm->flushes)
		return e->stub;
	for (int tries = 0; tries < 2; tries++) {
		fpu_park(v);
		e->stub = translate_stub(v, d, bytes);
		e->flushes = v->vm->flushes;
		if (e->stub)
			return e->stub;
		exclusive_begin(v);
		cache_flush(v->vm);
		exclusive_end(v);
	}
	return NULL;
}

/* Runs the stub; its memory operand is at `memory`. BT_FAULT: the instruction itself faulted. */
static int run_stub(struct bt_vcpu *v, const struct bt_block *stub, void *memory)
{
	v->bounce[0] = (uint64_t)(uintptr_t)memory;
	fpu_unpark(v);
	v->vm->enter(v, stub->entry_mem);
	return v->exit_code == BT_EXIT_FAULT ? BT_FAULT : 0;
}

struct piece {
	uint8_t *host; /* NULL: a device's */
	uint64_t gpa, index;
	unsigned size;
};

/* The pages under an operand. Pages of which no byte is enabled are not looked at: size is kept, gpa is ~0. */
static int find_pieces(struct bt_vcpu *v, uint64_t linear, unsigned size, bool write, uint64_t enabled, struct piece *pieces,
	unsigned *count)
{
	unsigned done = 0;

	*count = 0;
	while (done < size) {
		unsigned part = min(size - done, BT_PAGE_SIZE - (unsigned)((linear + done) & 0xfff));
		uint64_t ours = done >= 64 ? UINT64_MAX : enabled >> done & (part >= 64 ? UINT64_MAX : (1ull << part) - 1);
		struct piece *p = &pieces[(*count)++];
		uint8_t *page;

		p->size = part;
		p->host = NULL;
		p->gpa = UINT64_MAX;
		if (ours || size > 64) {
			unsigned skip = ours && done < 64 ? (unsigned)__builtin_ctzll(ours) : 0;

			if (bt_translate_address(v, linear + done + skip, write ? BT_WRITE : BT_READ, is_user(v), &p->gpa))
				return BT_FAULT;
			p->gpa -= skip;
			page = memory_page(v->vm->memory, p->gpa, &p->index);
			p->host = page ? page + (p->gpa & 0xfff) : NULL;
		}
		done += part;
	}
	return 0;
}

static uint64_t device_read(struct bt_vcpu *v, uint64_t gpa, unsigned size)
{
	fpu_park(v);
	return v->board->mmio_read(v->board->opaque, v->index, gpa, size);
}

static void device_write(struct bt_vcpu *v, uint64_t gpa, unsigned size, uint64_t value)
{
	fpu_park(v);
	v->board->mmio_write(v->board->opaque, v->index, gpa, size, value);
	v->irq_pending = 1; /* the access may have lowered a priority */
}

static unsigned device_step(uint64_t gpa, unsigned size)
{
	return size >= 8 && !(gpa & 7) ? 8 : size >= 4 && !(gpa & 3) ? 4 : size >= 2 && !(gpa & 1) ? 2 : 1;
}

static void gather_bytes(struct bt_vcpu *v, const struct piece *p, uint8_t *to)
{
	if (p->host) {
		bytes_copy(to, p->host, p->size);
		return;
	}
	for (unsigned at = 0, n; p->gpa != UINT64_MAX && at < p->size; at += n) {
		uint64_t value;

		n = device_step(p->gpa + at, p->size - at);
		value = device_read(v, p->gpa + at, n);
		bytes_copy(to + at, &value, n);
	}
}

static void scatter_bytes(struct bt_vcpu *v, const struct piece *p, const uint8_t *from, uint64_t enabled)
{
	uint64_t all = p->size >= 64 ? UINT64_MAX : (1ull << p->size) - 1;

	if (p->host) {
		if ((enabled & all) == all)
			bytes_copy(p->host, from, p->size);
		else
			for (unsigned k = 0; k < p->size; k++)
				if (enabled >> k & 1)
					p->host[k] = from[k];
		cache_page_written(v, p->index, (unsigned)(p->gpa & 0xfff), p->size);
		return;
	}
	for (unsigned at = 0, n; p->gpa != UINT64_MAX && at < p->size; at += n) {
		uint64_t value = 0;

		n = device_step(p->gpa + at, p->size - at);
		if (!(enabled >> at & 1) && (enabled & all) != all)
			n = 1;
		bytes_copy(&value, from + at, n);
		if ((enabled & all) == all || enabled >> at & 1)
			device_write(v, p->gpa + at, n, value);
	}
}

/* What SDM volume 2 calls the bit string form of BT and its kin: the bit number moves the address. */
static uint64_t bit_offset(const struct bt_vcpu *v, const struct bt_decoded *d)
{
	int64_t bit = (int64_t)bt_register_read(v, d->operands[1].reg.value);
	unsigned width = d->insn.operand_width;

	if (width == 32)
		bit = (int32_t)bit;
	else if (width == 16)
		bit = (int16_t)bit;
	return (uint64_t)((bit >> (width == 64 ? 6 : width == 32 ? 5 : 4)) * (int64_t)(width / 8));
}

/* Operands that must be aligned to their size: #GP otherwise, before any page fault (SDM volume 1, 4.1.1 and 14.9). */
static bool requires_alignment(const struct bt_decoded *d, unsigned size)
{
	if (size < 16)
		return false;
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_CMPXCHG16B:
	case ZYDIS_MNEMONIC_VMOVAPS:
	case ZYDIS_MNEMONIC_VMOVAPD:
	case ZYDIS_MNEMONIC_VMOVDQA:
	case ZYDIS_MNEMONIC_VMOVDQA32:
	case ZYDIS_MNEMONIC_VMOVDQA64:
	case ZYDIS_MNEMONIC_VMOVNTPS:
	case ZYDIS_MNEMONIC_VMOVNTPD:
	case ZYDIS_MNEMONIC_VMOVNTDQ:
	case ZYDIS_MNEMONIC_VMOVNTDQA: return true;
	case ZYDIS_MNEMONIC_MOVUPS:
	case ZYDIS_MNEMONIC_MOVUPD:
	case ZYDIS_MNEMONIC_MOVDQU:
	case ZYDIS_MNEMONIC_LDDQU:
	case ZYDIS_MNEMONIC_PCMPESTRI:
	case ZYDIS_MNEMONIC_PCMPESTRM:
	case ZYDIS_MNEMONIC_PCMPISTRI:
	case ZYDIS_MNEMONIC_PCMPISTRM: return false;
	case ZYDIS_MNEMONIC_SHA1MSG1:
	case ZYDIS_MNEMONIC_SHA1MSG2:
	case ZYDIS_MNEMONIC_SHA1NEXTE:
	case ZYDIS_MNEMONIC_SHA1RNDS4:
	case ZYDIS_MNEMONIC_SHA256MSG1:
	case ZYDIS_MNEMONIC_SHA256MSG2:
	case ZYDIS_MNEMONIC_SHA256RNDS2: return !host_is_amd(); /* as where the instruction itself meets its operand */
	default: return d->insn.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && size == 16 && insn_is_floating(&d->insn);
	}
}

static enum system_result run_as_is(struct bt_vcpu *v, struct slow_entry *e)
{
	const struct bt_decoded *d = &e->i.d;
	const ZydisDecodedOperand *op = e->i.memory;
	uint64_t offset, linear, enabled = UINT64_MAX, next = v->rip + d->insn.length;
	struct piece pieces[3];
	struct bt_block *stub;
	unsigned size, count, first, last;
	bool write, read, locked;
	uint8_t *memory;

	stub = stub_of(v, e, d, e->i.bytes);
	if (!stub)
		return SYSTEM_UNKNOWN;
	if (!op) {
		if (run_stub(v, stub, NULL))
			return SYSTEM_FAULT;
		v->rip = next;
		return SYSTEM_DONE;
	}
	write = op->actions & (ZYDIS_OPERAND_ACTION_WRITE | ZYDIS_OPERAND_ACTION_CONDWRITE);
	read = op->actions & (ZYDIS_OPERAND_ACTION_READ | ZYDIS_OPERAND_ACTION_CONDREAD);
	size = op->size / 8u;
	if (size == 0 || size > 512)
		return SYSTEM_UNKNOWN;
	if (size <= 64)
		enabled = vector_enabled(v, d);
	if (d->insn.meta.category == ZYDIS_CATEGORY_EXPAND || d->insn.meta.category == ZYDIS_CATEGORY_COMPRESS) {
		/* as many elements as the mask has ones, side by side */
		unsigned ones = (unsigned)__builtin_popcountll(enabled);

		enabled = ones >= 64 ? UINT64_MAX : (1ull << ones) - 1;
	}
	/* Only what the mask lets through counts: the first enabled byte to the last. */
	first = enabled ? (unsigned)__builtin_ctzll(enabled) : 0;
	last = enabled == UINT64_MAX || !enabled ? size - 1 : 63 - (unsigned)__builtin_clzll(enabled);
	offset = effective_offset(v, d, op);
	if (e->i.bits)
		offset = cut_address(d, offset + bit_offset(v, d));
	if (enabled && requires_alignment(d, size) && (offset + base_of(v, segment_of(op->mem.segment))) & (size - 1)) {
		bt_raise_error(v, VECTOR_GP, 0);
		return SYSTEM_FAULT;
	}
	if (enabled) {
		if (linear_of(v, segment_of(op->mem.segment), offset + first, last - first + 1, write ? BT_WRITE : BT_READ,
			&linear))
			return SYSTEM_FAULT;
		linear -= first;
	} else {
		linear = offset;
	}
	if (find_pieces(v, linear, size, write, enabled, pieces, &count))
		return SYSTEM_FAULT;
	if (count == 1 && pieces[0].host) {
		/* right in guest memory: atomic if the instruction is */
		if (run_stub(v, stub, pieces[0].host))
			return SYSTEM_FAULT;
		v->rip = next;
		if (write)
			cache_page_written(v, pieces[0].index, (unsigned)(pieces[0].gpa & 0xfff), size);
		return SYSTEM_DONE;
	}
	locked = d->insn.attributes & ZYDIS_ATTRIB_HAS_LOCK ||
		(d->insn.mnemonic == ZYDIS_MNEMONIC_XCHG && write);
	/* The buffer is as (un)aligned as the operand, so that alignment faults are what they would be. */
	memory = v->private->wide_bounce + (linear & 63);
	if (locked)
		exclusive_begin(v);
	bytes_zero(memory, size);
	for (unsigned k = 0, at = 0; k < count; at += pieces[k++].size)
		if (pieces[k].host || read)
			gather_bytes(v, &pieces[k], memory + at);
	if (run_stub(v, stub, memory)) {
		if (locked)
			exclusive_end(v);
		return SYSTEM_FAULT;
	}
	v->rip = next;
	if (locked)
		exclusive_end(v);
	for (unsigned k = 0, at = 0; write && k < count; at += pieces[k++].size)
		scatter_bytes(v, &pieces[k], memory + at, at >= 64 ? UINT64_MAX : at ? enabled >> at | ~(UINT64_MAX >> at) : enabled);
	return SYSTEM_DONE;
}

/* ---- the x87 and vector state in memory ---- */

/* Where an area of these components ends (SDM volume 1, 13.4.2 and 13.4.3). */
static unsigned area_end(const struct bt_vcpu *v, uint64_t components, bool compacted)
{
	unsigned end = 576;

	for (unsigned k = 2; k < CPU_XSTATES; k++) {
		if (!(components >> k & 1))
			continue;
		if (!compacted)
			end = max(end, v->model->xstate[k].offset + v->model->xstate[k].size);
		else
			end = (v->model->xstate[k].flags & 2 ? (unsigned)align_up(end, 64) : end) + v->model->xstate[k].size;
	}
	return end;
}

/* What XRSTOR refuses in a header, before it looks at the rest (SDM volume 1, 13.8.1 and 13.8.2). */
static bool is_good_header(const uint64_t *header, uint64_t xcr0)
{
	uint64_t compacted = header[1] & ~(1ull << 63);

	if (!(header[1] >> 63))
		return !(header[0] & ~xcr0) && !header[1] && !header[2];
	for (unsigned k = 2; k < 8; k++)
		if (header[k])
			return false;
	return !(compacted & ~xcr0) && !(header[0] & ~compacted);
}

/* FXSAVE and the XSAVE family, over a copy: what the host's instruction makes of the host's registers, which are the
 * guest's. XSAVES and XRSTORS are XSAVEC and XRSTOR: no supervisor component is offered. XSAVEs go to
 * a place from which nothing is ever restored, or XSAVEOPT would leave out what it believes unchanged there. */
static int do_state(struct bt_vcpu *v, struct slow_entry *e)
{
	const struct bt_decoded *d = &e->i.d;
	ZydisMnemonic m = d->insn.mnemonic;
	bool fx = false, restore = false, privileged = false, compact = false, wide = false, optimize = false;
	uint64_t mask = (v->gprs[2] << 32 | (uint32_t)v->gprs[0]) & v->xcr0, linear, *header;
	uint8_t *area = v->private->wide_bounce;
	uint32_t lo = (uint32_t)mask;
	unsigned size;

	switch (m) {
	case ZYDIS_MNEMONIC_FXSAVE64: wide = true; /* fall through */
	case ZYDIS_MNEMONIC_FXSAVE: fx = true; break;
	case ZYDIS_MNEMONIC_FXRSTOR64:
	case ZYDIS_MNEMONIC_FXRSTOR: fx = restore = true; break;
	case ZYDIS_MNEMONIC_XSAVEC64: wide = true; /* fall through */
	case ZYDIS_MNEMONIC_XSAVEC: compact = true; break;
	case ZYDIS_MNEMONIC_XSAVES64: wide = true; /* fall through */
	case ZYDIS_MNEMONIC_XSAVES: compact = privileged = true; break;
	case ZYDIS_MNEMONIC_XRSTORS64:
	case ZYDIS_MNEMONIC_XRSTORS: restore = privileged = true; break;
	case ZYDIS_MNEMONIC_XRSTOR64:
	case ZYDIS_MNEMONIC_XRSTOR: restore = true; break;
	case ZYDIS_MNEMONIC_XSAVEOPT64: wide = true; /* fall through */
	case ZYDIS_MNEMONIC_XSAVEOPT: optimize = true; break;
	case ZYDIS_MNEMONIC_XSAVE64: wide = true; break;
	default: break;
	}
	if (!fx && !(v->cr4 & CR4_OSXSAVE))
		return bt_raise(v, VECTOR_UD);
	if (v->cr0 & CR0_TS || (fx && v->cr0 & CR0_EM))
		return bt_raise(v, VECTOR_NM);
	if (privileged && v->cpl)
		return bt_raise_error(v, VECTOR_GP, 0);
	linear = effective_offset(v, d, e->i.memory) + base_of(v, segment_of(e->i.memory->mem.segment));
	if (!fx && linear & 63)
		return bt_raise_error(v, VECTOR_GP, 0);
	if (bt_effective_address(v, d, e->i.memory, 1, restore ? BT_READ : BT_WRITE, &linear))
		return BT_FAULT;
	if (fx && linear & 15)
		return bt_raise_error(v, VECTOR_GP, 0);
	if (!restore)
		area += sizeof(v->private->wide_bounce) / 2;
	size = fx ? 512 : area_end(v, mask, compact);
	header = (uint64_t *)(void *)(area + 512);
	if (restore && !fx) {
		if (bt_read_linear(v, linear, area, 576, is_user(v)))
			return BT_FAULT;
		if ((privileged && !(header[1] >> 63)) || !is_good_header(header, v->xcr0))
			return bt_raise_error(v, VECTOR_GP, 0);
		size = header[1] >> 63 ? area_end(v, header[1] & v->model->xcr0, true) : area_end(v, mask, false);
	}
	for (uint64_t at = linear; !restore && at < linear + size; at = (at & ~0xfffull) + BT_PAGE_SIZE) {
		uint64_t gpa;

		if (bt_translate_address(v, at, BT_WRITE, is_user(v), &gpa))
			return BT_FAULT; /* writable throughout before anything is written */
	}
	if (bt_read_linear(v, linear, area, size, is_user(v)))
		return BT_FAULT;
	if (restore) {
		/* It may fault on what the guest put there: through a stub, whose faults are the guest's. */
		uint64_t rax = v->gprs[0], rdx = v->gprs[2];
		struct bt_decoded plain;
		uint8_t bytes[15];
		struct bt_block *stub;
		int fault;

		bytes_copy(bytes, e->i.bytes, sizeof(bytes));
		if (!e->stub || e->flushes != v->vm->flushes)
			bytes_copy(&plain, d, sizeof(plain));
		if (privileged) { /* 0f c7 /3 as 0f ae /5 */
			unsigned at = d->insn.raw.modrm.offset;

			bytes[at - 1] = 0xae;
			bytes[at] = (uint8_t)((bytes[at] & 0xc7) | 5 << 3);
			plain.insn.raw.modrm.reg = 5;
		}
		stub = stub_of(v, e, &plain, bytes);
		if (!stub)
			return bt_raise(v, VECTOR_UD);
		if (!fx) {
			v->gprs[0] = lo;
			v->gprs[2] = 0;
		}
		fault = run_stub(v, stub, area);
		v->gprs[0] = rax;
		v->gprs[2] = rdx;
		return fault;
	}
	fpu_unpark(v);
	if (fx) {
		if (wide)
			__asm__ volatile("fxsave64 (%0)" ::"r"(area) : "memory");
		else
			__asm__ volatile("fxsave (%0)" ::"r"(area) : "memory");
	} else if (compact) {
		if (wide)
			__asm__ volatile("xsavec64 (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
		else
			__asm__ volatile("xsavec (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
	} else if (optimize) {
		if (wide)
			__asm__ volatile("xsaveopt64 (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
		else
			__asm__ volatile("xsaveopt (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
	} else if (wide) {
		__asm__ volatile("xsave64 (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
	} else {
		__asm__ volatile("xsave (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
	}
	if (fx || mask & 1)
		bytes_zero(area + 8, 16); /* where the last x87 instruction was: an address of ours */
	return bt_write_linear(v, linear, area, fx ? 464 : size, is_user(v));
}

/* ---- the entry points ---- */

/* Fetches and decodes the instruction at v->rip; NULL: v->fault is set. */
static struct slow_entry *fetch(struct bt_vcpu *v)
{
	struct bt_slow_cache *c = v->private->slow_cache;
	uint64_t linear = (v->mode & BT_MODE_CODE) == BT_MODE_CODE64 ? v->rip
								      : (uint32_t)(v->segments[ENGINE_CS].base + v->rip);
	const struct fetch_entry *f;
	struct fetch_entry first;
	struct slow_entry *e;
	unsigned have = BT_PAGE_SIZE - (unsigned)(linear & 0xfff);
	uint64_t generation = v->vm->generation, phys;
	uint32_t mode = v->mode & ~(uint32_t)BT_MODE_SINGLE;
	uint8_t bytes[32];
	bool more, keep;

	if ((v->mode & BT_MODE_CODE) != BT_MODE_CODE64 && v->rip > v->segments[ENGINE_CS].limit) {
		bt_raise_error(v, VECTOR_GP, 0);
		return NULL;
	}
	f = tlb_fetch(v, linear);
	if (!f)
		return NULL;
	first = *f;
	phys = first.gpa | (linear & 0xfff);
	e = &c->entries[(phys ^ phys >> 7) % SLOW_ENTRIES];
	if (e->valid && e->phys == phys && e->generation == generation && e->mode == mode)
		return e;
	fpu_park(v);
	/* Kept only where a change of the bytes is noticed, and not across pages, whose mapping may change. */
	keep = have >= 15 && first.host &&
		(__atomic_load_n(&v->vm->memory->page_flags[first.index], __ATOMIC_SEQ_CST) & MEMORY_PAGE_CODE);
	if (!keep)
		e = &c->once;
	e->valid = keep;
	e->stub = NULL;
	bytes_zero(bytes, sizeof(bytes));
	if (!first.host) {
		for (unsigned k = 0; k < min(have, 15u); k++)
			bytes[k] = (uint8_t)v->board->mmio_read(v->board->opaque, v->index, first.gpa + (linear & 0xfff) + k, 1);
	} else {
		bytes_copy(bytes, first.host + (linear & 0xfff), min(have, 15u));
	}
	if (!insn_decode(&e->i, v->mode, bytes, min(have, 15u), &more)) {
		const struct fetch_entry *second;

		if (!more) {
			bt_raise_error(v, e->i.too_long ? VECTOR_GP : VECTOR_UD, 0);
			v->fault.has_error = e->i.too_long;
			return NULL;
		}
		second = tlb_fetch(v, (linear & ~0xfffull) + BT_PAGE_SIZE);
		if (!second)
			return NULL;
		if (second->host)
			bytes_copy(bytes + have, second->host, 15 - have);
		if (!insn_decode(&e->i, v->mode, bytes, 15, &more)) {
			bt_raise_error(v, e->i.too_long ? VECTOR_GP : VECTOR_UD, 0);
			v->fault.has_error = e->i.too_long;
			return NULL;
		}
	}
	insn_classify(&e->i, v->mode);
	e->phys = phys;
	e->mode = mode;
	e->generation = generation;
	return e;
}

static bool needs_board(const struct bt_decoded *d)
{
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_IN:
	case ZYDIS_MNEMONIC_OUT:
	case ZYDIS_MNEMONIC_INSB:
	case ZYDIS_MNEMONIC_INSW:
	case ZYDIS_MNEMONIC_INSD:
	case ZYDIS_MNEMONIC_OUTSB:
	case ZYDIS_MNEMONIC_OUTSW:
	case ZYDIS_MNEMONIC_OUTSD:
	case ZYDIS_MNEMONIC_RDMSR:
	case ZYDIS_MNEMONIC_WRMSR:
		return true;
	case ZYDIS_MNEMONIC_MOV:
		return d->operands[0].reg.value == ZYDIS_REGISTER_CR8 || d->operands[1].reg.value == ZYDIS_REGISTER_CR8;
	default:
		return false;
	}
}

enum system_result slow_system(struct bt_vcpu *v, const struct bt_decoded *d)
{
	bool board = needs_board(d);
	enum system_result r;

	if (board)
		fpu_park(v);
	r = system_execute(v, d);
	if (board)
		v->irq_pending = 1; /* a priority may have been lowered */
	return r;
}

static enum system_result as_result(int fault)
{
	return fault ? SYSTEM_FAULT : SYSTEM_DONE;
}

/* Instructions whose C function leaves rip alone. */
static enum system_result and_next(struct bt_vcpu *v, const struct bt_decoded *d, int fault)
{
	if (fault)
		return SYSTEM_FAULT;
	v->rip = cut_rip(v, v->rip + d->insn.length, NULL);
	return SYSTEM_DONE;
}

enum system_result slow_branch_fault(struct bt_vcpu *v)
{
	uint64_t target = v->rip, sp = v->gprs[ENGINE_RSP];
	const struct slow_entry *e;
	const struct bt_decoded *d;

	tlb_find_rip(v, v->resume - 1);
	e = v->rip == target ? NULL : fetch(v);
	if (!e)
		return SYSTEM_FAULT;
	d = &e->i.d;
	switch (e->i.kind) {
	case INSN_RET:
		v->gprs[ENGINE_RSP] = sp - 8 - (d->operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? d->operands[0].imm.value.u : 0);
		return slow_execute(v);
	case INSN_CALL:
		if (d->operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
			break;
		bt_write_linear(v, sp, &v->scratch[2], 8, is_user(v));
		v->gprs[ENGINE_RSP] = sp + 8;
		return slow_execute(v);
	case INSN_JUMP:
		return slow_execute(v);
	default:
		break;
	}
	v->rip = target;
	bt_raise_error(v, VECTOR_GP, 0);
	return SYSTEM_FAULT;
}

enum system_result slow_execute(struct bt_vcpu *v)
{
	struct slow_entry *e = fetch(v);
	const struct bt_decoded *d;
	enum system_result r;
	uint64_t value;

	if (!e)
		return SYSTEM_FAULT;
	d = &e->i.d;
	if (insn_is_floating(&d->insn)) {
		if (v->mode & BT_MODE_NO_FPU) {
			bool vector = e->i.d.insn.meta.isa_ext != ZYDIS_ISA_EXT_X87;

			bt_raise(v, vector && v->cr0 & CR0_EM ? VECTOR_UD : VECTOR_NM);
			return SYSTEM_FAULT;
		}
		if (v->mode & BT_MODE_NO_XSAVE && d->insn.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY &&
			d->insn.meta.isa_ext != ZYDIS_ISA_EXT_BMI1 && d->insn.meta.isa_ext != ZYDIS_ISA_EXT_BMI2) {
			bt_raise(v, VECTOR_UD);
			return SYSTEM_FAULT;
		}
	}
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_CALL:
		if (d->insn.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR)
			return as_result(do_call(v, d));
		break;
	case ZYDIS_MNEMONIC_RET:
		if (d->insn.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR)
			return as_result(do_return(v, d));
		break;
	case ZYDIS_MNEMONIC_JMP:
		if (d->insn.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR) {
			if (d->operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
				return as_result(jump_to(v, target_of(v, d)));
			return as_result(operand_value(v, d, &d->operands[0], &value) || jump_to(v, cut_rip(v, value, d)));
		}
		break;
	case ZYDIS_MNEMONIC_LOOP:
	case ZYDIS_MNEMONIC_LOOPE:
	case ZYDIS_MNEMONIC_LOOPNE:
	case ZYDIS_MNEMONIC_JCXZ:
	case ZYDIS_MNEMONIC_JECXZ:
	case ZYDIS_MNEMONIC_JRCXZ:
		return as_result(do_loop(v, d));
	case ZYDIS_MNEMONIC_PUSH:
		if (e->i.kind == INSN_SYSTEM)
			break;
		if (operand_value(v, d, &d->operands[0], &value))
			return SYSTEM_FAULT;
		return and_next(v, d, push(v, value, slot_size(v, d)));
	case ZYDIS_MNEMONIC_POP:
		if (e->i.kind == INSN_SYSTEM)
			break;
		return and_next(v, d, do_pop(v, d));
	case ZYDIS_MNEMONIC_LEAVE: return and_next(v, d, do_leave(v, d));
	case ZYDIS_MNEMONIC_ENTER: return and_next(v, d, do_enter(v, d));
	case ZYDIS_MNEMONIC_PUSHA:
	case ZYDIS_MNEMONIC_PUSHAD: return and_next(v, d, do_push_all(v, d));
	case ZYDIS_MNEMONIC_POPA:
	case ZYDIS_MNEMONIC_POPAD: return and_next(v, d, do_pop_all(v, d));
	case ZYDIS_MNEMONIC_AAA:
	case ZYDIS_MNEMONIC_AAS:
	case ZYDIS_MNEMONIC_AAM:
	case ZYDIS_MNEMONIC_AAD:
	case ZYDIS_MNEMONIC_DAA:
	case ZYDIS_MNEMONIC_DAS: return and_next(v, d, do_decimal(v, d));
	case ZYDIS_MNEMONIC_SALC:
		bt_register_write(v, ZYDIS_REGISTER_AL, bt_rflags(v) & FLAG_CF ? 0xff : 0);
		return and_next(v, d, 0);
	case ZYDIS_MNEMONIC_XLAT: {
		for (unsigned k = 0; k < d->insn.operand_count; k++) {
			const ZydisDecodedOperand *op = &d->operands[k];
			uint64_t offset, linear, mask = d->insn.address_width == 64 ? UINT64_MAX
				: d->insn.address_width == 32			    ? UINT32_MAX
										    : 0xffff;

			if (op->type != ZYDIS_OPERAND_TYPE_MEMORY)
				continue;
			offset = (v->gprs[ENGINE_RBX] + (uint8_t)v->gprs[ENGINE_RAX]) & mask;
			value = 0;
			if (linear_of(v, segment_of(op->mem.segment), offset, 1, BT_READ, &linear) ||
				bt_read_linear(v, linear, &value, 1, is_user(v)))
				return SYSTEM_FAULT;
			bt_register_write(v, ZYDIS_REGISTER_AL, value);
		}
		return and_next(v, d, 0);
	}
	case ZYDIS_MNEMONIC_CLD: v->dflag = 0; return and_next(v, d, 0);
	case ZYDIS_MNEMONIC_STD: v->dflag = 1; return and_next(v, d, 0);
	case ZYDIS_MNEMONIC_LEA:
		bt_register_write(v, d->operands[0].reg.value, effective_offset(v, d, &d->operands[1]));
		return and_next(v, d, 0);
	case ZYDIS_MNEMONIC_FXSAVE:
	case ZYDIS_MNEMONIC_FXSAVE64:
	case ZYDIS_MNEMONIC_FXRSTOR:
	case ZYDIS_MNEMONIC_FXRSTOR64:
	case ZYDIS_MNEMONIC_XSAVE:
	case ZYDIS_MNEMONIC_XSAVE64:
	case ZYDIS_MNEMONIC_XSAVEC:
	case ZYDIS_MNEMONIC_XSAVEC64:
	case ZYDIS_MNEMONIC_XSAVEOPT:
	case ZYDIS_MNEMONIC_XSAVEOPT64:
	case ZYDIS_MNEMONIC_XSAVES:
	case ZYDIS_MNEMONIC_XSAVES64:
	case ZYDIS_MNEMONIC_XRSTOR:
	case ZYDIS_MNEMONIC_XRSTOR64:
	case ZYDIS_MNEMONIC_XRSTORS:
	case ZYDIS_MNEMONIC_XRSTORS64:
		return and_next(v, d, do_state(v, e));
	case ZYDIS_MNEMONIC_BOUND: return and_next(v, d, do_bound(v, d));
	case ZYDIS_MNEMONIC_ARPL: return and_next(v, d, do_arpl(v, d));
	case ZYDIS_MNEMONIC_MOVDIR64B:
		return SYSTEM_UNKNOWN;
	default:
		break;
	}
	if (e->i.kind == INSN_JCC || d->insn.meta.category == ZYDIS_CATEGORY_COND_BR) {
		if (condition(v, d->insn.opcode & 15))
			return as_result(jump_to(v, target_of(v, d)));
		return and_next(v, d, 0);
	}
	if (d->insn.meta.category == ZYDIS_CATEGORY_STRINGOP)
		return string_execute(v, d);
	if (e->i.kind == INSN_NOTHING)
		return and_next(v, d, 0);
	r = vector_execute(v, d);
	if (r != SYSTEM_UNKNOWN)
		return r;
	if (e->i.kind == INSN_SYSTEM || e->i.kind == INSN_CLI || e->i.kind == INSN_STI || e->i.kind == INSN_SWAPGS)
		return slow_system(v, d);
	r = run_as_is(v, e);
	if (r == SYSTEM_FAULT && v->fault.vector != VECTOR_MF && insn_waits_for_x87(d)) {
		fpu_park(v);
		if (v->private->fpu[2] & 0x80)
			bt_raise(v, VECTOR_MF);
	}
	if (r == SYSTEM_DONE)
		v->rip = cut_rip(v, v->rip, NULL);
	return r;
}
