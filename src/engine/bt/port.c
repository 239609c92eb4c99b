/* Port input and output (SDM volume 1, chapter 19; volume 2, IN, OUT, INS, OUTS). */
#include "engine/bt/system_internal.h"

#include "engine/bt/bt.h"

/* An instruction that repeats stays on its place after so many, so that interrupts get their turn. */
#define REPEAT_MAX 1024

/* Above IOPL, and always in virtual-8086 mode, the TSS says which ports are allowed (SDM volume 1, 19.5.2). */
static int port_check(struct bt_vcpu *v, unsigned port, unsigned size)
{
	const struct engine_segment *tr = &v->segments[ENGINE_TR];
	uint16_t map, bits;

	if (in_real_mode(v) || (v->cpl <= iopl(v) && !in_vm86(v)))
		return 0;
	/* only the 32 and 64-bit TSS has a bit map */
	if (!(tr->attributes & SEGMENT_P) || !(tr->attributes & 8) || tr->limit < 0x67)
		return bt_raise_error(v, VECTOR_GP, 0);
	if (bt_read_linear(v, tr->base + 0x66, &map, sizeof(map), false) < 0)
		return BT_FAULT;
	if (map + port / 8 + 1 > tr->limit)
		return bt_raise_error(v, VECTOR_GP, 0);
	if (bt_read_linear(v, tr->base + map + port / 8, &bits, sizeof(bits), false) < 0)
		return BT_FAULT;
	if (bits >> (port & 7) & ((1u << size) - 1))
		return bt_raise_error(v, VECTOR_GP, 0);
	return 0;
}

static uint64_t port_read(struct bt_vcpu *v, uint16_t port, unsigned size)
{
	fpu_park(v);
	return v->board->pio_read(v->board->opaque, v->index, port, size);
}

static void port_write(struct bt_vcpu *v, uint16_t port, unsigned size, uint64_t value)
{
	fpu_park(v);
	v->board->pio_write(v->board->opaque, v->index, port, size, value);
}

int port_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	bool in = d->insn.mnemonic == ZYDIS_MNEMONIC_IN;
	const ZydisDecodedOperand *port = &d->operands[in ? 1 : 0], *data = &d->operands[in ? 0 : 1];
	unsigned size = data->size / 8;
	uint16_t number =
		port->type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? (uint8_t)port->imm.value.u : (uint16_t)v->gprs[ENGINE_RDX];

	if (port_check(v, number, size) < 0)
		return BT_FAULT;
	if (in)
		bt_register_write(v, data->reg.value, port_read(v, number, size));
	else
		port_write(v, number, size, bt_register_read(v, data->reg.value));
	return 0;
}

/* Adds to a register as far as the address size reaches: 16 bits keep the rest, 32 clear it. */
static void register_add(uint64_t *reg, unsigned address_width, int64_t step)
{
	uint64_t value = *reg + (uint64_t)step;

	if (address_width == 16)
		*reg = (*reg & ~0xffffull) | (value & 0xffff);
	else
		*reg = address_width == 32 ? (uint32_t)value : value;
}

static uint64_t register_part(uint64_t value, unsigned address_width)
{
	return address_width == 64 ? value : value & ((1ull << address_width) - 1);
}

/* One element. The memory is known to take the bytes before a port is read, as a device's read cannot be undone. */
static int port_string_once(struct bt_vcpu *v, const struct bt_decoded *d, const ZydisDecodedOperand *memory, bool in)
{
	unsigned size = memory->size / 8;
	uint16_t port = (uint16_t)v->gprs[ENGINE_RDX];
	enum bt_access access = in ? BT_WRITE : BT_READ;
	uint64_t linear, gpa, value = 0;

	if (bt_effective_address(v, d, memory, size, access, &linear) < 0)
		return BT_FAULT;
	if (!in) {
		if (bt_read_linear(v, linear, &value, size, is_user(v)) < 0)
			return BT_FAULT;
		port_write(v, port, size, value);
		return 0;
	}
	if (bt_translate_address(v, linear, access, is_user(v), &gpa) < 0 ||
		bt_translate_address(v, linear + size - 1, access, is_user(v), &gpa) < 0)
		return BT_FAULT;
	value = port_read(v, port, size);
	return bt_write_linear(v, linear, &value, size, is_user(v));
}

int port_string_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	bool repeated = d->insn.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPNE | ZYDIS_ATTRIB_HAS_REPE);
	const ZydisDecodedOperand *memory = NULL;
	unsigned width = d->insn.address_width;
	bool in;
	int64_t step;

	for (unsigned i = 0; i < d->insn.operand_count; i++)
		if (d->operands[i].type == ZYDIS_OPERAND_TYPE_MEMORY && !memory)
			memory = &d->operands[i];
	if (!memory)
		return bt_raise(v, VECTOR_UD);
	in = memory->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
	if (port_check(v, (uint16_t)v->gprs[ENGINE_RDX], memory->size / 8) < 0)
		return BT_FAULT;
	step = v->dflag ? -(int64_t)(memory->size / 8) : memory->size / 8;
	for (unsigned i = 0; i < REPEAT_MAX; i++) {
		if (repeated && !register_part(v->gprs[ENGINE_RCX], width))
			return 0;
		if (port_string_once(v, d, memory, in) < 0)
			return BT_FAULT;
		register_add(&v->gprs[in ? ENGINE_RDI : ENGINE_RSI], width, step);
		if (!repeated)
			return 0;
		register_add(&v->gprs[ENGINE_RCX], width, -1);
	}
	return register_part(v->gprs[ENGINE_RCX], width) ? REPEAT : 0;
}
