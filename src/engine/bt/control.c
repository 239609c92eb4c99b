/* Control and debug registers (SDM volume 3, 2.5 and 17.2), descriptor-table and task registers. */
#include "engine/bt/system_internal.h"

#include "engine/bt/bt.h"

#define CR0_WRITABLE ((uint64_t)CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG)
#define DR6_ONES 0xffff0ff0ull
#define DR6_WRITABLE 0xe00full
#define DR6_BD (1ull << 13)
#define DR7_ONES 0x400ull
#define DR7_WRITABLE 0xffff2bffull
#define DR7_GD (1ull << 13)

int cr0_write(struct bt_vcpu *v, uint64_t value)
{
	uint64_t changed;

	if (value >> 32 || (value & CR0_PG && !(value & CR0_PE)) || (value & CR0_NW && !(value & CR0_CD)))
		return bt_raise_error(v, VECTOR_GP, 0);
	value = (value & CR0_WRITABLE) | CR0_ET;
	changed = v->cr0 ^ value;
	if (changed & value & CR0_PG && v->efer & EFER_LME) {
		if (!(v->cr4 & CR4_PAE) || v->segments[ENGINE_CS].attributes & SEGMENT_L)
			return bt_raise_error(v, VECTOR_GP, 0);
		v->efer |= EFER_LMA;
	} else if (changed & CR0_PG && in_long_mode(v)) {
		if (in_code64(v))
			return bt_raise_error(v, VECTOR_GP, 0);
		v->efer &= ~(uint64_t)EFER_LMA;
	}
	v->cr0 = value;
	if (changed & (CR0_PG | CR0_WP | CR0_PE))
		bt_tlb_flush(v, false);
	if (changed)
		bt_mode_update(v);
	return 0;
}

static int cr3_write(struct bt_vcpu *v, uint64_t value)
{
	if (in_long_mode(v) && value >> v->model->physical_bits)
		return bt_raise_error(v, VECTOR_GP, 0);
	v->cr3 = value;
	bt_tlb_flush(v, v->cr4 & CR4_PGE);
	return 0;
}

static int cr4_write(struct bt_vcpu *v, uint64_t value)
{
	uint64_t changed = v->cr4 ^ value;

	if (value & ~cpuid_cr4_mask(v) || (in_long_mode(v) && !(value & CR4_PAE)))
		return bt_raise_error(v, VECTOR_GP, 0);
	v->cr4 = value;
	if (changed & (CR4_PGE | CR4_PAE | CR4_PSE | CR4_SMEP | CR4_SMAP))
		bt_tlb_flush(v, false);
	if (changed)
		bt_mode_update(v);
	return 0;
}

static int control_write(struct bt_vcpu *v, unsigned number, uint64_t value)
{
	switch (number) {
	case 0:
		return cr0_write(v, value);
	case 2:
		v->cr2 = value;
		return 0;
	case 3:
		return cr3_write(v, value);
	case 4:
		return cr4_write(v, value);
	case 8:
		if (value >> 4)
			return bt_raise_error(v, VECTOR_GP, 0);
		fpu_park(v);
		v->board->cr8_write(v->board->opaque, v->index, (uint8_t)value);
		return 0;
	}
	return bt_raise(v, VECTOR_UD);
}

static int control_read(struct bt_vcpu *v, unsigned number, uint64_t *value)
{
	switch (number) {
	case 0:
		*value = v->cr0;
		return 0;
	case 2:
		*value = v->cr2;
		return 0;
	case 3:
		*value = v->cr3;
		return 0;
	case 4:
		*value = v->cr4;
		return 0;
	case 8:
		fpu_park(v);
		*value = v->board->cr8_read(v->board->opaque, v->index);
		return 0;
	}
	return bt_raise(v, VECTOR_UD);
}

/* DR4 and DR5 are the old names of DR6 and DR7 while CR4.DE is clear. */
static int debug_check(struct bt_vcpu *v, unsigned *number)
{
	if (*number == 4 || *number == 5) {
		if (v->cr4 & CR4_DE)
			return bt_raise(v, VECTOR_UD);
		*number += 2;
	}
	if (*number > 7)
		return bt_raise(v, VECTOR_UD);
	if (v->dr[7] & DR7_GD) {
		v->dr[6] |= DR6_BD;
		v->dr[7] &= ~DR7_GD;
		return bt_raise(v, VECTOR_DB);
	}
	return 0;
}

static int debug_write(struct bt_vcpu *v, unsigned number, uint64_t value)
{
	if (number >= 6) {
		if (value >> 32)
			return bt_raise_error(v, VECTOR_GP, 0);
		value = number == 6 ? (value & DR6_WRITABLE) | DR6_ONES : (value & DR7_WRITABLE) | DR7_ONES;
	} else if (!is_canonical(value)) {
		return bt_raise_error(v, VECTOR_GP, 0);
	}
	v->dr[number] = value;
	return 0;
}

static bool is_within(ZydisRegister reg, ZydisRegister first, ZydisRegister last)
{
	return reg >= first && reg <= last;
}

int control_move(struct bt_vcpu *v, const struct bt_decoded *d)
{
	ZydisRegister to = d->operands[0].reg.value, from = d->operands[1].reg.value;
	bool write = is_within(to, ZYDIS_REGISTER_CR0, ZYDIS_REGISTER_CR15) ||
		     is_within(to, ZYDIS_REGISTER_DR0, ZYDIS_REGISTER_DR15);
	ZydisRegister special = write ? to : from;
	bool debug = is_within(special, ZYDIS_REGISTER_DR0, ZYDIS_REGISTER_DR15);
	unsigned number = special - (debug ? ZYDIS_REGISTER_DR0 : ZYDIS_REGISTER_CR0);
	uint64_t value = 0;

	if (v->cpl != 0)
		return bt_raise_error(v, VECTOR_GP, 0);
	if (debug && debug_check(v, &number) < 0)
		return BT_FAULT;
	if (write) {
		value = bt_register_read(v, from);
		return debug ? debug_write(v, number, value) : control_write(v, number, value);
	}
	if (debug)
		value = v->dr[number];
	else if (control_read(v, number, &value) < 0)
		return BT_FAULT;
	bt_register_write(v, to, value);
	return 0;
}

/* ---- descriptor-table registers ---- */

static int table_store(struct bt_vcpu *v, const struct bt_decoded *d, const struct engine_table *table)
{
	unsigned width = in_code64(v) ? 8 : 4;
	uint64_t linear;
	uint8_t bytes[10];

	if (bt_effective_address(v, d, &d->operands[0], 2 + width, BT_WRITE, &linear) < 0)
		return BT_FAULT;
	bytes[0] = (uint8_t)table->limit;
	bytes[1] = (uint8_t)(table->limit >> 8);
	for (unsigned i = 0; i < width; i++)
		bytes[2 + i] = (uint8_t)(table->base >> 8 * i);
	return bt_write_linear(v, linear, bytes, 2 + width, is_user(v));
}

static int table_load(struct bt_vcpu *v, const struct bt_decoded *d, struct engine_table *table)
{
	unsigned width = in_code64(v) ? 8 : 4;
	uint64_t linear, base = 0;
	uint8_t bytes[10];

	if (bt_effective_address(v, d, &d->operands[0], 2 + width, BT_READ, &linear) < 0 ||
		bt_read_linear(v, linear, bytes, 2 + width, is_user(v)) < 0)
		return BT_FAULT;
	for (unsigned i = 0; i < width; i++)
		base |= (uint64_t)bytes[2 + i] << 8 * i;
	if (width == 4 && d->insn.operand_width == 16)
		base &= 0xffffff;
	if (!is_canonical(base))
		return bt_raise_error(v, VECTOR_GP, 0);
	table->limit = (uint16_t)(bytes[0] | bytes[1] << 8);
	table->base = base;
	return 0;
}

/* SGDT and its like tell user code where the kernel lives: UMIP forbids them. */
static int umip_check(struct bt_vcpu *v)
{
	return v->cpl > 0 && v->cr4 & CR4_UMIP ? bt_raise_error(v, VECTOR_GP, 0) : 0;
}

/* SLDT, STR and SMSW: 16 bits to memory, the operand's size, extended by zeros, to a register. */
static int selector_store(struct bt_vcpu *v, const struct bt_decoded *d, uint64_t value)
{
	if (umip_check(v) < 0)
		return BT_FAULT;
	if (d->operands[0].type == ZYDIS_OPERAND_TYPE_MEMORY)
		return operand_write(v, d, 0, 2, value);
	bt_register_write(v, d->operands[0].reg.value, value);
	return 0;
}

static int lmsw(struct bt_vcpu *v, const struct bt_decoded *d)
{
	const uint64_t bits = CR0_PE | CR0_MP | CR0_EM | CR0_TS;
	uint64_t value;

	if (v->cpl != 0)
		return bt_raise_error(v, VECTOR_GP, 0);
	if (operand_read(v, d, 0, 2, &value) < 0)
		return BT_FAULT;
	/* it can set PE but not clear it */
	return cr0_write(v, (v->cr0 & ~(bits & ~(uint64_t)CR0_PE)) | (value & bits));
}

/* Sets ZF, and on success the destination of LAR and LSL. */
static int query_execute(struct bt_vcpu *v, const struct bt_decoded *d, enum segment_query query)
{
	unsigned source = query <= QUERY_LSL ? 1 : 0;
	uint64_t selector, flags;
	uint32_t value = 0;
	int passed;

	if (in_real_mode(v) || in_vm86(v))
		return bt_raise(v, VECTOR_UD);
	if (operand_read(v, d, source, 2, &selector) < 0)
		return BT_FAULT;
	passed = segment_query(v, query, (uint16_t)selector, &value);
	if (passed < 0)
		return BT_FAULT;
	if (passed && source)
		bt_register_write(v, d->operands[0].reg.value, value);
	flags = bt_rflags(v) & ~(uint64_t)FLAG_ZF;
	bt_set_rflags(v, passed ? flags | FLAG_ZF : flags);
	return 0;
}

static int load_system_segment(struct bt_vcpu *v, const struct bt_decoded *d, bool task)
{
	uint64_t selector;

	if (in_real_mode(v) || in_vm86(v))
		return bt_raise(v, VECTOR_UD);
	if (v->cpl != 0)
		return bt_raise_error(v, VECTOR_GP, 0);
	if (operand_read(v, d, 0, 2, &selector) < 0)
		return BT_FAULT;
	return task ? segment_load_task(v, (uint16_t)selector) : segment_load_ldt(v, (uint16_t)selector);
}

int table_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_SGDT:
		return umip_check(v) < 0 ? BT_FAULT : table_store(v, d, &v->gdt);
	case ZYDIS_MNEMONIC_SIDT:
		return umip_check(v) < 0 ? BT_FAULT : table_store(v, d, &v->idt);
	case ZYDIS_MNEMONIC_LGDT:
		return v->cpl ? bt_raise_error(v, VECTOR_GP, 0) : table_load(v, d, &v->gdt);
	case ZYDIS_MNEMONIC_LIDT:
		return v->cpl ? bt_raise_error(v, VECTOR_GP, 0) : table_load(v, d, &v->idt);
	case ZYDIS_MNEMONIC_SLDT:
		if (in_real_mode(v) || in_vm86(v))
			return bt_raise(v, VECTOR_UD);
		return selector_store(v, d, v->segments[ENGINE_LDTR].selector);
	case ZYDIS_MNEMONIC_STR:
		if (in_real_mode(v) || in_vm86(v))
			return bt_raise(v, VECTOR_UD);
		return selector_store(v, d, v->segments[ENGINE_TR].selector);
	case ZYDIS_MNEMONIC_SMSW:
		return selector_store(v, d, v->cr0);
	case ZYDIS_MNEMONIC_LMSW:
		return lmsw(v, d);
	case ZYDIS_MNEMONIC_LLDT:
		return load_system_segment(v, d, false);
	case ZYDIS_MNEMONIC_LTR:
		return load_system_segment(v, d, true);
	case ZYDIS_MNEMONIC_LAR:
		return query_execute(v, d, QUERY_LAR);
	case ZYDIS_MNEMONIC_LSL:
		return query_execute(v, d, QUERY_LSL);
	case ZYDIS_MNEMONIC_VERR:
		return query_execute(v, d, QUERY_VERR);
	default:
		return query_execute(v, d, QUERY_VERW);
	}
}
