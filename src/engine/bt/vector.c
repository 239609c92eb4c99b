/* Memory instructions of the vector sets that go element by element: gathers, scatters, maskmov; and the byte masks of all
 * masked ones, whose masked-out elements must not fault (SDM volume 2, VPGATHERDD, VMASKMOV; volume 1, 15.6.4). The vector
 * state is parked while C looks at it. */
#include "engine/bt/bt.h"

#include <cpuid.h>

#define OPMASK 5
#define ZMM_HIGH 6
#define HIGH_16 7

static uint32_t component(unsigned n)
{
	static uint32_t offsets[8];

	if (!offsets[n]) {
		uint32_t a, b, c, d;

		if (__get_cpuid_count(0xd, n, &a, &b, &c, &d))
			offsets[n] = b;
	}
	return offsets[n];
}

/* Where 16 bytes of vector register n lie in the parked area. */
static uint8_t *lane(struct bt_vcpu *v, unsigned n, unsigned part)
{
	uint8_t *area = v->private->fpu;

	if (n >= 16)
		return area + component(HIGH_16) + 64 * (n - 16) + 16 * part;
	if (part >= 2)
		return area + component(ZMM_HIGH) + 32 * n + 16 * (part - 2);
	if (part == 1)
		return area + component(2) + 16 * n;
	return area + 160 + 16 * n;
}

static uint8_t *vector_byte(struct bt_vcpu *v, unsigned n, unsigned byte)
{
	return lane(v, n, byte / 16) + byte % 16;
}

static uint64_t vector_get(struct bt_vcpu *v, unsigned n, unsigned element, unsigned bytes)
{
	uint64_t value = 0;

	for (unsigned k = 0; k < bytes; k++)
		value |= (uint64_t)*vector_byte(v, n, element * bytes + k) << 8 * k;
	return value;
}

static void vector_put(struct bt_vcpu *v, unsigned n, unsigned element, unsigned bytes, uint64_t value)
{
	for (unsigned k = 0; k < bytes; k++)
		*vector_byte(v, n, element * bytes + k) = (uint8_t)(value >> 8 * k);
}

static unsigned vector_bytes(void)
{
	return component(ZMM_HIGH) ? 64 : component(2) ? 32 : 16;
}

/* All components count as in use after C has written some of them. */
static void mark_written(struct bt_vcpu *v)
{
	v->private->fpu[512] |= 2 | (component(2) ? 4 : 0) | (component(ZMM_HIGH) ? 0xe0 : 0);
}

static void clear_above(struct bt_vcpu *v, unsigned n, unsigned bytes)
{
	for (unsigned k = bytes; k < vector_bytes(); k++)
		*vector_byte(v, n, k) = 0;
}

static uint64_t *opmask(struct bt_vcpu *v, unsigned k)
{
	return (uint64_t *)(void *)(v->private->fpu + component(OPMASK) + 8 * k);
}

static unsigned vector_number(ZydisRegister reg)
{
	return (unsigned)ZydisRegisterGetId(reg);
}

/* Exception classes without fault suppression (SDM volume 2, 2.8.1). */
static bool reads_whole_operand(const ZydisDecodedInstruction *d)
{
	switch (d->mnemonic) {
	case ZYDIS_MNEMONIC_VCVTNE2PS2BF16: /* E4NF all of them, as is what mixes elements; not so in Zydis's tables */
	case ZYDIS_MNEMONIC_VDBPSADBW:
	case ZYDIS_MNEMONIC_VGF2P8AFFINEQB:
	case ZYDIS_MNEMONIC_VGF2P8AFFINEINVQB: return true;
	default: break;
	}
	switch (d->meta.exception_class) {
	case ZYDIS_EXCEPTION_CLASS_E1NF:
	case ZYDIS_EXCEPTION_CLASS_E2NF:
	case ZYDIS_EXCEPTION_CLASS_E3NF:
	case ZYDIS_EXCEPTION_CLASS_E4NF:
	case ZYDIS_EXCEPTION_CLASS_E5NF:
	case ZYDIS_EXCEPTION_CLASS_E6NF:
	case ZYDIS_EXCEPTION_CLASS_E9NF:
	case ZYDIS_EXCEPTION_CLASS_E10NF: return true;
	default: return false;
	}
}

/* How many elements the instruction computes: as many as its widest elements fit into its vector length. */
static unsigned lanes_of(const struct bt_decoded *d, unsigned memory_bits)
{
	unsigned bits = memory_bits;

	for (unsigned k = 0; k < d->insn.operand_count; k++) {
		const ZydisDecodedOperand *op = &d->operands[k];
		ZydisRegisterClass c;

		if (op->type != ZYDIS_OPERAND_TYPE_REGISTER)
			continue;
		c = ZydisRegisterGetClass(op->reg.value);
		if (c == ZYDIS_REGCLASS_XMM || c == ZYDIS_REGCLASS_YMM || c == ZYDIS_REGCLASS_ZMM)
			bits = max(bits, op->element_size);
	}
	return d->insn.avx.vector_length / bits;
}

uint64_t vector_enabled(struct bt_vcpu *v, const struct bt_decoded *d)
{
	unsigned elements, bytes;
	uint64_t enabled = 0, spread = 0;
	const ZydisDecodedOperand *memory = NULL;

	for (unsigned k = 0; k < d->insn.operand_count; k++)
		if (d->operands[k].type == ZYDIS_OPERAND_TYPE_MEMORY)
			memory = &d->operands[k];
	if (!memory)
		return UINT64_MAX;
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_VMASKMOVPS:
	case ZYDIS_MNEMONIC_VPMASKMOVD:
		bytes = 4;
		break;
	case ZYDIS_MNEMONIC_VMASKMOVPD:
	case ZYDIS_MNEMONIC_VPMASKMOVQ:
		bytes = 8;
		break;
	default:
		bytes = 0;
	}
	if (bytes) {
		unsigned mask = vector_number(d->operands[1].reg.value);

		fpu_park(v);
		for (unsigned k = 0; k < memory->size / 8u / bytes; k++)
			if (vector_get(v, mask, k, bytes) >> (8 * bytes - 1))
				enabled |= ((1ull << bytes) - 1) << k * bytes;
		return enabled;
	}
	if (d->insn.encoding != ZYDIS_INSTRUCTION_ENCODING_EVEX || d->insn.avx.mask.mode <= ZYDIS_MASK_MODE_DISABLED ||
		d->insn.avx.mask.reg == ZYDIS_REGISTER_K0 || d->insn.avx.mask.reg == ZYDIS_REGISTER_NONE ||
		reads_whole_operand(&d->insn))
		return UINT64_MAX;
	fpu_park(v);
	enabled = *opmask(v, (unsigned)(d->insn.avx.mask.reg - ZYDIS_REGISTER_K0));
	bytes = memory->element_size / 8u;
	elements = bytes ? memory->size / 8u / bytes : 0;
	if (!bytes || elements > 64)
		return UINT64_MAX;
	if (d->insn.avx.broadcast.mode != ZYDIS_BROADCAST_MODE_INVALID) {
		/* an element is read if any lane that it goes to wants it */
		unsigned lanes = max(lanes_of(d, memory->element_size), elements);
		uint64_t folded = 0;

		for (unsigned k = 0; k < min(lanes, 64u); k++)
			folded |= (enabled >> k & 1) << k % elements;
		enabled = folded;
	}
	if (elements <= 1) /* a scalar goes by mask bit 0 */
		return enabled & 1 ? UINT64_MAX : 0;
	if (bytes == 1)
		return elements == 64 ? enabled : enabled & ((1ull << elements) - 1);
	if (bytes > 8)
		return UINT64_MAX;
	for (unsigned k = 0; k < elements && k * bytes < 64; k++)
		if (enabled >> k & 1)
			spread |= ((1ull << bytes) - 1) << k * bytes;
	return spread;
}

struct indexed {
	unsigned index_bytes, data_bytes;
	bool scatter;
};

static bool indexed_kind(ZydisMnemonic m, struct indexed *k)
{
	switch (m) {
	case ZYDIS_MNEMONIC_VGATHERDPS:
	case ZYDIS_MNEMONIC_VPGATHERDD: *k = (struct indexed){ 4, 4, false }; return true;
	case ZYDIS_MNEMONIC_VGATHERDPD:
	case ZYDIS_MNEMONIC_VPGATHERDQ: *k = (struct indexed){ 4, 8, false }; return true;
	case ZYDIS_MNEMONIC_VGATHERQPS:
	case ZYDIS_MNEMONIC_VPGATHERQD: *k = (struct indexed){ 8, 4, false }; return true;
	case ZYDIS_MNEMONIC_VGATHERQPD:
	case ZYDIS_MNEMONIC_VPGATHERQQ: *k = (struct indexed){ 8, 8, false }; return true;
	case ZYDIS_MNEMONIC_VSCATTERDPS:
	case ZYDIS_MNEMONIC_VPSCATTERDD: *k = (struct indexed){ 4, 4, true }; return true;
	case ZYDIS_MNEMONIC_VSCATTERDPD:
	case ZYDIS_MNEMONIC_VPSCATTERDQ: *k = (struct indexed){ 4, 8, true }; return true;
	case ZYDIS_MNEMONIC_VSCATTERQPS:
	case ZYDIS_MNEMONIC_VPSCATTERQD: *k = (struct indexed){ 8, 4, true }; return true;
	case ZYDIS_MNEMONIC_VSCATTERQPD:
	case ZYDIS_MNEMONIC_VPSCATTERQQ: *k = (struct indexed){ 8, 8, true }; return true;
	default: return false;
	}
}

/* What is not canonical raises #SS off the stack's registers. */
static void on_stack(struct bt_vcpu *v, const ZydisDecodedOperand *memory)
{
	if (v->fault.vector == VECTOR_GP && memory->mem.segment == ZYDIS_REGISTER_SS)
		v->fault.vector = VECTOR_SS;
}

static enum system_result gather_scatter(struct bt_vcpu *v, const struct bt_decoded *d, const struct indexed *kind)
{
	bool evex = d->insn.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX, user = (v->mode & BT_MODE_SET) == BT_SET_USER;
	unsigned elements = d->insn.avx.vector_length / 8u / max(kind->index_bytes, kind->data_bytes);
	const ZydisDecodedOperand *memory = NULL;
	ZydisRegister data = ZYDIS_REGISTER_NONE, mask_vector = ZYDIS_REGISTER_NONE;
	unsigned vector, index, mask = 0;
	bool some = false; /* elements were read: the register's upper part is gone even if a later one faults */
	uint64_t *k = NULL, base = 0;

	for (unsigned n = 0; n < d->insn.operand_count; n++) {
		const ZydisDecodedOperand *op = &d->operands[n];

		if (op->type == ZYDIS_OPERAND_TYPE_MEMORY)
			memory = op;
		else if (op->type == ZYDIS_OPERAND_TYPE_REGISTER && op->visibility == ZYDIS_OPERAND_VISIBILITY_EXPLICIT &&
			ZydisRegisterGetClass(op->reg.value) != ZYDIS_REGCLASS_MASK) {
			if (data == ZYDIS_REGISTER_NONE)
				data = op->reg.value;
			else
				mask_vector = op->reg.value;
		}
	}
	if (!memory || data == ZYDIS_REGISTER_NONE)
		return SYSTEM_UNKNOWN;
	vector = vector_number(data);
	index = vector_number(memory->mem.index);
	if (!evex)
		mask = vector_number(mask_vector);
	if ((!kind->scatter && vector == index) || (!evex && (mask == vector || mask == index)) ||
		(evex && (d->insn.avx.mask.reg == ZYDIS_REGISTER_K0 || d->insn.avx.mask.reg == ZYDIS_REGISTER_NONE))) {
		bt_raise(v, VECTOR_UD);
		return SYSTEM_FAULT;
	}
	fpu_park(v);
	mark_written(v);
	if (evex)
		k = opmask(v, (unsigned)(d->insn.avx.mask.reg - ZYDIS_REGISTER_K0));
	if (memory->mem.base != ZYDIS_REGISTER_NONE)
		base = bt_register_read(v, memory->mem.base);
	base += (uint64_t)memory->mem.disp.value;
	for (unsigned n = 0; n < elements; n++) {
		uint64_t at, value = 0, offset = vector_get(v, index, n, kind->index_bytes);

		if (evex ? !(*k >> n & 1) : !(vector_get(v, mask, n, kind->data_bytes) >> (8 * kind->data_bytes - 1))) {
			if (!evex)
				vector_put(v, mask, n, kind->data_bytes, 0); /* all of it, as of those that are done */
			continue;
		}
		if (kind->index_bytes == 4)
			offset = (uint64_t)(int64_t)(int32_t)offset;
		at = base + offset * memory->mem.scale;
		if (d->insn.address_width == 32)
			at = (uint32_t)at;
		if (memory->mem.segment == ZYDIS_REGISTER_FS)
			at += v->fs_base;
		else if (memory->mem.segment == ZYDIS_REGISTER_GS)
			at += v->gs_base;
		if (kind->scatter) {
			value = vector_get(v, vector, n, kind->data_bytes);
			if (bt_write_linear(v, at, &value, kind->data_bytes, user)) {
				on_stack(v, memory);
				return SYSTEM_FAULT;
			}
		} else {
			if (bt_read_linear(v, at, &value, kind->data_bytes, user)) {
				on_stack(v, memory);
				if (some && evex)
					clear_above(v, vector, d->insn.avx.vector_length / 8u);
				return SYSTEM_FAULT;
			}
			vector_put(v, vector, n, kind->data_bytes, value);
			some = true;
		}
		if (evex)
			*k &= ~(1ull << n);
		else
			vector_put(v, mask, n, kind->data_bytes, 0);
	}
	if (evex) {
		*k = 0;
	} else {
		for (unsigned n = 0; n < vector_bytes(); n++)
			*vector_byte(v, mask, n) = 0;
	}
	if (!kind->scatter)
		clear_above(v, vector, elements * kind->data_bytes);
	v->rip += d->insn.length;
	return SYSTEM_DONE;
}

static unsigned x87_top(const struct bt_vcpu *v)
{
	return v->private->fpu[3] >> 3 & 7;
}

/* mm0 to mm7 are physical registers; XSAVE keeps them by their place on the stack (SDM volume 1, 10.5.1). */
static uint8_t *mmx_register(struct bt_vcpu *v, unsigned n)
{
	return v->private->fpu + 32 + 16 * ((n - x87_top(v)) & 7);
}

/* What every MMX instruction does: all x87 tags valid, top of stack 0. */
static void enter_mmx(struct bt_vcpu *v)
{
	uint8_t *area = v->private->fpu, old[128];
	unsigned top = x87_top(v);

	bytes_copy(old, area + 32, sizeof(old));
	for (unsigned n = 0; n < 8; n++)
		bytes_copy(area + 32 + 16 * ((n + top) & 7), old + 16 * n, 16);
	area[512] |= 1;
	area[4] = 0xff;
	area[3] &= (uint8_t)~0x38;
}

/* maskmovq and maskmovdqu: bytes of the first register go to [rdi] where the second's sign bits are set. */
static enum system_result mask_move(struct bt_vcpu *v, const struct bt_decoded *d)
{
	bool mmx = d->insn.mnemonic == ZYDIS_MNEMONIC_MASKMOVQ, user = (v->mode & BT_MODE_SET) == BT_SET_USER;
	const ZydisDecodedOperand *memory = NULL;
	ZydisRegister source = ZYDIS_REGISTER_NONE, mask = ZYDIS_REGISTER_NONE;
	uint64_t linear, index, enabled = 0;
	unsigned bytes = mmx ? 8 : 16;

	for (unsigned n = 0; n < d->insn.operand_count; n++) {
		const ZydisDecodedOperand *op = &d->operands[n];

		if (op->type == ZYDIS_OPERAND_TYPE_MEMORY)
			memory = op;
		else if (op->type == ZYDIS_OPERAND_TYPE_REGISTER && op->visibility == ZYDIS_OPERAND_VISIBILITY_EXPLICIT) {
			if (source == ZYDIS_REGISTER_NONE)
				source = op->reg.value;
			else
				mask = op->reg.value;
		}
	}
	if (!memory || mask == ZYDIS_REGISTER_NONE)
		return SYSTEM_UNKNOWN;
	fpu_park(v);
	if (mmx && v->private->fpu[2] & 0x80) {
		bt_raise(v, VECTOR_MF);
		return SYSTEM_FAULT;
	}
	if (mmx)
		enter_mmx(v); /* even if it faults */
	if (bt_effective_address(v, d, memory, bytes, BT_WRITE, &linear))
		return SYSTEM_FAULT;
	for (unsigned n = 0; n < bytes; n++) {
		uint8_t *m = mmx ? mmx_register(v, vector_number(mask)) + n : vector_byte(v, vector_number(mask), n);

		enabled |= (uint64_t)(*m >> 7) << n;
	}
	/* The whole operand is checked before the first byte is written, whatever the mask (SDM volume 2, MASKMOVDQU, leaves it
	 * to the implementation). */
	for (uint64_t at = linear; at < linear + bytes; at = (at & ~0xfffull) + BT_PAGE_SIZE) {
		bool fault;

		tlb_host_page(v, at, true, user, &index, &fault);
		if (fault)
			return SYSTEM_FAULT;
	}
	for (unsigned n = 0; n < bytes; n++) {
		uint8_t *s = mmx ? mmx_register(v, vector_number(source)) + n : vector_byte(v, vector_number(source), n);
		uint8_t value = *s;

		if (enabled >> n & 1 && bt_write_linear(v, linear + n, &value, 1, user))
			return SYSTEM_FAULT;
	}
	v->rip += d->insn.length;
	return SYSTEM_DONE;
}

enum system_result vector_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	struct indexed kind;

	if (indexed_kind(d->insn.mnemonic, &kind))
		return gather_scatter(v, d, &kind);
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_MASKMOVQ:
	case ZYDIS_MNEMONIC_MASKMOVDQU:
	case ZYDIS_MNEMONIC_VMASKMOVDQU: return mask_move(v, d);
	default: return SYSTEM_UNKNOWN;
	}
}
