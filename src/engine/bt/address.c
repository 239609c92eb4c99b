/* The general registers by name, and where a memory operand is: base, index and displacement, segments with their
 * limits and rights, canonical addresses. */
#include "engine/bt/slow.h"

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

bool address_is_canonical(uint64_t a, unsigned size)
{
	uint64_t b = a + size - 1;

	return (uint64_t)((int64_t)(a << 16) >> 16) == a && (uint64_t)((int64_t)(b << 16) >> 16) == b;
}

uint64_t address_base(const struct bt_vcpu *v, int s)
{
	if (s == ENGINE_FS)
		return v->fs_base;
	if (s == ENGINE_GS)
		return v->gs_base;
	return (v->mode & BT_MODE_CODE) == BT_MODE_CODE64 ? 0 : v->segments[s].base;
}

int address_linear(struct bt_vcpu *v, int s, uint64_t offset, unsigned size, enum bt_access access, uint64_t *linear)
{
	if ((v->mode & BT_MODE_CODE) == BT_MODE_CODE64) {
		*linear = offset + address_base(v, s);
		if (!address_is_canonical(*linear, size ? size : 1))
			return bt_raise_error(v, s == ENGINE_SS ? VECTOR_SS : VECTOR_GP, 0);
		return 0;
	}
	if (check_segment(v, s, offset, size ? size : 1, access))
		return BT_FAULT;
	*linear = (uint32_t)(v->segments[s].base + offset);
	return 0;
}

int address_segment(ZydisRegister segment)
{
	return segment == ZYDIS_REGISTER_NONE ? ENGINE_DS : (int)(segment - ZYDIS_REGISTER_ES);
}

uint64_t address_cut(const struct bt_decoded *d, uint64_t offset)
{
	return d->insn.address_width == 64 ? offset : d->insn.address_width == 32 ? (uint32_t)offset : (uint16_t)offset;
}

/* Base, index and displacement, cut to the address size. */
uint64_t address_offset(const struct bt_vcpu *v, const struct bt_decoded *d, const ZydisDecodedOperand *op)
{
	uint64_t offset = op->mem.disp.has_displacement ? (uint64_t)op->mem.disp.value : 0;

	if (op->mem.base == ZYDIS_REGISTER_RIP || op->mem.base == ZYDIS_REGISTER_EIP)
		offset += v->rip + d->insn.length;
	else if (op->mem.base != ZYDIS_REGISTER_NONE)
		offset += bt_register_read(v, op->mem.base);
	if (op->mem.index != ZYDIS_REGISTER_NONE && reg_is_gpr(op->mem.index))
		offset += bt_register_read(v, op->mem.index) * op->mem.scale;
	return address_cut(d, offset);
}

int bt_effective_address(struct bt_vcpu *v, const struct bt_decoded *d, const ZydisDecodedOperand *op, unsigned size,
	enum bt_access access, uint64_t *linear)
{
	return address_linear(v, address_segment(op->mem.segment), address_offset(v, d, op), size, access, linear);
}
