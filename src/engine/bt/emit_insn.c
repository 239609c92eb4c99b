/* The host code of one instruction: most as they are, some by a template of their own. */
#include "engine/bt/translation.h"

/* ---- instructions as they are ---- */

static bool is_legacy_prefix(uint8_t b)
{
	return b == 0x66 || b == 0x67 || b == 0xf0 || b == 0xf2 || b == 0xf3 || b == 0x2e || b == 0x36 || b == 0x3e ||
		b == 0x26 || b == 0x64 || b == 0x65;
}

/* To a VEX or EVEX prefix: a REX among the legacy ones before it means nothing. */
static const uint8_t *skip_prefixes(const struct bt_translation *t, const uint8_t *b)
{
	while (is_legacy_prefix(*b) || (t->code64 && (*b & 0xf0) == 0x40))
		b++;
	return b;
}

/* Copies legacy prefixes that still mean something (not segments, not address size) and finds REX. In 16-bit code the
 * operand-size prefix means the opposite. */
static const uint8_t *emit_prefixes(struct bt_translation *t, const struct insn *i, uint8_t *rex)
{
	const uint8_t *b = i->bytes;
	bool has66 = false, code16 = (t->mode & BT_MODE_CODE) == BT_MODE_CODE16;

	*rex = 0;
	for (;; b++) {
		if (is_legacy_prefix(*b)) {
			has66 |= *b == 0x66;
			if (*b == 0xf0 || *b == 0xf2 || *b == 0xf3 || (*b == 0x66 && !code16))
				emit8(&t->e, *b);
			*rex = 0;
		} else if (t->code64 && (*b & 0xf0) == 0x40) {
			*rex = *b;
		} else {
			break;
		}
	}
	if (code16 && !has66)
		emit8(&t->e, 0x66);
	return b;
}

/* The instruction with its ModRM memory operand replaced by [address]; reg, if not negative, replaces ModRM.reg. */
static void emit_readdressed(struct bt_translation *t, const struct insn *i, unsigned address, int reg)
{
	struct emitter *e = &t->e;
	const ZydisDecodedInstruction *d = &i->d.insn;
	unsigned modrm_at = d->raw.modrm.offset, immediate_at;
	uint8_t rex, modrm;
	const uint8_t *b;

	if (d->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && !(d->attributes & ZYDIS_ATTRIB_HAS_MODRM)) {
		/* mov between the accumulator and an absolute address: a0 to a3, as 8a, 8b, 88, 89 */
		static const uint8_t opcodes[4] = { 0x8a, 0x8b, 0x88, 0x89 };

		b = emit_prefixes(t, i, &rex);
		emit8(e, 0x40 | (rex & 8) | (uint8_t)(address >> 3));
		emit8(e, opcodes[*b & 3]);
		emit8(e, address & 7);
		return;
	}
	modrm = (uint8_t)((reg >= 0 ? (unsigned)reg & 7 : d->raw.modrm.reg) << 3 | (address & 7));
	immediate_at = modrm_at + 1u + (d->attributes & ZYDIS_ATTRIB_HAS_SIB ? 1 : 0) + d->raw.disp.size / 8;
	switch (d->encoding) {
	case ZYDIS_INSTRUCTION_ENCODING_VEX:
		b = skip_prefixes(t, i->bytes);
		if (*b == 0xc5)
			EMIT(e, 0xc4, (b[1] & 0x80) | 0x40 | (address >= 8 ? 0 : 0x20) | 1, b[1] & 0x7f, b[2]);
		else
			EMIT(e, 0xc4, (b[1] & 0x9f) | 0x40 | (address >= 8 ? 0 : 0x20), b[2], b[3]);
		break;
	case ZYDIS_INSTRUCTION_ENCODING_EVEX:
		b = skip_prefixes(t, i->bytes);
		EMIT(e, 0x62, (b[1] & 0x9f) | 0x40 | (address >= 8 ? 0 : 0x20), b[2], b[3], b[4]);
		break;
	default:
		b = emit_prefixes(t, i, &rex);
		if (reg >= 0)
			rex = (rex & ~4) | (reg >> 3) << 2;
		rex = (rex & 0x0c) | (uint8_t)(address >> 3);
		if (rex || (i->bytes + modrm_at > b && (b > i->bytes && (b[-1] & 0xf0) == 0x40)))
			emit8(e, 0x40 | rex);
		emit_bytes(e, b, (unsigned)(i->bytes + modrm_at - b));
		break;
	}
	emit8(e, modrm);
	emit_bytes(e, i->bytes + immediate_at, d->length - immediate_at);
}

/* The instruction as it is; only what 32 and 16-bit code spells differently is changed. */
static void emit_verbatim(struct bt_translation *t, const struct insn *i)
{
	const uint8_t *b = i->bytes;
	uint8_t rex;

	if (t->code64) {
		emit_bytes(&t->e, i->bytes, i->d.insn.length);
		return;
	}
	if (i->d.insn.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX || i->d.insn.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX) {
		b = skip_prefixes(t, b);
	} else {
		b = emit_prefixes(t, i, &rex);
		if ((*b & 0xf0) == 0x40) { /* inc, dec */
			EMIT(&t->e, 0xff, 0xc0 | (*b & 0x0f));
			return;
		}
		if (*b == 0x82) { /* an alias of 80 that 64-bit mode does not have */
			emit8(&t->e, 0x80);
			b++;
		}
	}
	emit_bytes(&t->e, b, (unsigned)(i->bytes + i->d.insn.length - b));
}

/* Which of the guest's r10 and r11 an instruction uses other than in its address, and how. */
struct scratch_use {
	bool used[2], written[2]; /* [0]: r10, [1]: r11 */
	bool high_byte;
	uint16_t others; /* all other registers used, by number */
};

static struct scratch_use scratch_use(const struct insn *i)
{
	struct scratch_use u = { 0 };

	for (unsigned k = 0; k < i->d.insn.operand_count; k++) {
		const ZydisDecodedOperand *op = &i->d.operands[k];

		if (op->type == ZYDIS_OPERAND_TYPE_REGISTER && reg_is_gpr(op->reg.value)) {
			unsigned n = reg_number(op->reg.value);

			u.high_byte |= reg_is_high_byte(op->reg.value);
			u.others |= (uint16_t)(1u << n);
			if (n == R10 || n == R11) {
				u.used[n - R10] = true;
				u.written[n - R10] |= !!(op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE);
			}
		} else if (op->type == ZYDIS_OPERAND_TYPE_MEMORY && op != i->memory &&
			op->mem.type != ZYDIS_MEMOP_TYPE_INVALID) {
			/* address generation only (bounds, LEA-like): r10, r11 as they are */
			if (op->mem.base != ZYDIS_REGISTER_NONE && reg_is_gpr(op->mem.base)) {
				unsigned n = reg_number(op->mem.base);

				if (n == R10 || n == R11)
					u.used[n - R10] = true;
			}
			if (op->mem.index != ZYDIS_REGISTER_NONE && reg_is_gpr(op->mem.index)) {
				unsigned n = reg_number(op->mem.index);

				if (n == R10 || n == R11)
					u.used[n - R10] = true;
			}
		}
	}
	return u;
}

static void load_scratch(struct bt_translation *t, const struct scratch_use *u)
{
	for (unsigned k = 0; k < 2; k++)
		if (u->used[k])
			emit_load(&t->e, R10 + k, V_GPR(R10 + k));
}

static void store_scratch(struct bt_translation *t, const struct scratch_use *u)
{
	for (unsigned k = 0; k < 2; k++)
		if (u->written[k])
			emit_store(&t->e, V_GPR(R10 + k), R10 + k);
}

/* Before an instruction that looks at flags, or changes some and leaves others that are live. */
static void flags_for(struct bt_translation *t, const struct insn *i, unsigned temporary)
{
	if ((i->tested & FLAGS_ARITHMETIC) || (i->touched && (i->live_after & ~i->killed)))
		flags_restore(t, temporary);
}

static void flags_after(struct bt_translation *t, const struct insn *i)
{
	if (i->touched)
		t->state = FLAGS_HOST;
}

void emit_plain(struct bt_translation *t, struct insn *i)
{
	struct scratch_use u = scratch_use(i);
	unsigned address = R10;

	if (!i->memory) {
		flags_for(t, i, R11);
		load_scratch(t, &u);
		t->side[t->n].flags_in_host = t->state == FLAGS_HOST;
		emit_verbatim(t, i);
		store_scratch(t, &u);
		flags_after(t, i);
		return;
	}
	if ((u.used[0] && u.used[1]) || (u.high_byte && (u.used[0] || u.used[1]))) {
		/* Both scratch registers are the instruction's own: an address in a third one, which it does not use. */
		static const uint8_t free_ones[] = { RBX, RSI, RDI, RBP, RDX, RCX };
		unsigned third = RBX;

		for (unsigned k = 0; k < ARRAY_SIZE(free_ones); k++) {
			if (!(u.others & 1u << free_ones[k])) {
				third = free_ones[k];
				break;
			}
		}
		emit_operand(t, i, i->memory);
		flags_for(t, i, R11);
		emit_store(&t->e, V(scratch), third);
		emit_move(&t->e, third, R10);
		load_scratch(t, &u);
		t->side[t->n].flags_in_host = 0x80 | third; /* signals.c puts it back when the instruction faults */
		emit_readdressed(t, i, third, -1);
		store_scratch(t, &u);
		emit_load(&t->e, third, V(scratch));
		flags_after(t, i);
		return;
	}
	emit_operand(t, i, i->memory);
	flags_for(t, i, R11);
	if (u.high_byte) {
		/* ah, ch, dh and bh cannot be named beside REX, so the address goes to a register without it. */
		static const uint8_t low[] = { RSI, RDI, RBX };
		unsigned third = low[0];

		for (unsigned k = 0; k < ARRAY_SIZE(low); k++) {
			if (!(u.others & 1u << low[k])) {
				third = low[k];
				break;
			}
		}
		emit_move(&t->e, R11, third);
		emit_move(&t->e, third, R10);
		emit_readdressed(t, i, third, -1); /* cannot fault: byte operations */
		emit_move(&t->e, third, R11);
		flags_after(t, i);
		return;
	}
	if (u.used[0]) {
		emit_move(&t->e, R11, R10);
		address = R11;
	}
	load_scratch(t, &u);
	t->side[t->n].flags_in_host = t->state == FLAGS_HOST;
	emit_readdressed(t, i, address, -1);
	store_scratch(t, &u);
	flags_after(t, i);
}

/* bt, bts, btr, btc with a bit number in a register: the number also moves the address (SDM volume 2, BT). */
void emit_bits(struct bt_translation *t, struct insn *i)
{
	struct emitter *e = &t->e;
	unsigned width = i->d.insn.operand_width, bit = reg_number(i->d.operands[1].reg.value);
	unsigned shift = width == 64 ? 6 : width == 32 ? 5 : 4;
	bool write = i->memory->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;

	if (t->bounce) {
		emit_load(e, R10, V(bounce));
	} else {
		flags_clobber(t, i->live_before);
		emit_address(t, i, i->memory);
		if (bit == R10 || bit == R11)
			emit_load(e, R11, V_GPR(bit));
		else
			emit_move(e, R11, bit);
		if (width == 32)
			EMIT(e, 0x4d, 0x63, 0xdb); /* movsxd r11, r11d */
		else if (width == 16)
			EMIT(e, 0x4d, 0x0f, 0xbf, 0xdb); /* movsx r11, r11w */
		EMIT(e, 0x49, 0xc1, 0xfb, shift);    /* sar r11, shift */
		EMIT(e, t->code64 ? 0x4f : 0x47, 0x8d, 0x14, (shift - 3) << 6 | 3 << 3 | 2); /* lea r10, [r10 + r11 * bytes] */
		emit_check(t, width / 8, write, false);
	}
	if (t->bounce)
		flags_clobber(t, i->live_before);
	if (bit == R10 || bit == R11)
		emit_load(e, R11, V_GPR(bit));
	else
		emit_move(e, R11, bit);
	EMIT(e, 0x41, 0x83, 0xe3, width - 1); /* and r11d, width - 1 */
	if ((i->tested & FLAGS_ARITHMETIC) || (i->live_after & ~i->killed) || t->exact) {
		/* no scratch register is free: r11 holds the bit number, r10 the address */
		if (t->state == FLAGS_MEM) {
			emit_store(e, V(scratch), RAX);
			emit_gs(e, 2, 0x8b, RAX, V(arith));
			EMIT(e, 0x04, 0x7f, 0x9e);
			emit_load(e, RAX, V(scratch));
		}
	}
	emit_readdressed(t, i, R10, R11);
	t->state = FLAGS_HOST;
}

/* ---- templates ---- */

static void emit_lea_insn(struct bt_translation *t, struct insn *i)
{
	struct scratch_use u = scratch_use(i);
	const ZydisDecodedOperand *op = &i->d.operands[1];
	unsigned to = reg_number(i->d.operands[0].reg.value), width = i->d.insn.operand_width;

	if (op->mem.base == ZYDIS_REGISTER_RIP || op->mem.base == ZYDIS_REGISTER_EIP) {
		int64_t offset = op->mem.disp.value + i->offset + i->d.insn.length;

		emit_load(&t->e, R10, V(page));
		if (offset == (int32_t)offset) {
			emit_lea(&t->e, op->mem.base == ZYDIS_REGISTER_RIP, R10, R10, (int32_t)offset);
		} else {
			emit_lea(&t->e, 1, R10, R10, (int32_t)op->mem.disp.value);
			emit_lea(&t->e, op->mem.base == ZYDIS_REGISTER_RIP, R10, R10, (int32_t)(offset - op->mem.disp.value));
		}
		if (to == R10 || to == R11) {
			if (width == 16) {
				emit_gs(&t->e, 2, 0x89, R10, V_GPR(to));
			} else {
				if (width == 32)
					emit_move32(&t->e, R10, R10);
				emit_store(&t->e, V_GPR(to), R10);
			}
		} else if (width == 64) {
			emit_move(&t->e, to, R10);
		} else if (width == 32) {
			emit_move32(&t->e, to, R10);
		} else {
			EMIT(&t->e, 0x66, 0x44 | to >> 3, 0x89, 0xc0 | (R10 & 7) << 3 | (to & 7));
		}
		return;
	}
	if (!t->code64 && op->mem.base == ZYDIS_REGISTER_NONE && op->mem.index == ZYDIS_REGISTER_NONE) {
		/* Without base and index, 64-bit mode would take the displacement as relative to rip. */
		if (width == 16)
			EMIT(&t->e, 0x66, 0xb8 | to, (uint8_t)op->mem.disp.value, (uint8_t)(op->mem.disp.value >> 8));
		else
			emit_imm64(&t->e, to, (uint32_t)op->mem.disp.value);
		return;
	}
	load_scratch(t, &u);
	emit_verbatim(t, i);
	store_scratch(t, &u);
}

static void emit_swapgs(struct bt_translation *t)
{
	struct emitter *e = &t->e;

	emit_load(e, R10, V(gs_base));
	emit_load(e, R11, V(kernel_gs_base));
	emit_store(e, V(gs_base), R11);
	emit_store(e, V(segments) + ENGINE_GS * sizeof(struct engine_segment) + offsetof(struct engine_segment, base), R11);
	emit_store(e, V(kernel_gs_base), R10);
}

/* sti goes on without leaving unless an interrupt waits; then C executes it, with its shadow. */
static void emit_sti(struct bt_translation *t, struct insn *i)
{
	struct late *late;
	struct bt_site *site = new_decoded_site(t, i);

	if (!site)
		return;
	flags_clobber(t, FLAGS_ARITHMETIC);
	emit_test_byte(&t->e, V(irq_pending));
	late = new_late(t);
	late->what = LATE_SYSTEM;
	late->site = site;
	late->place = emit_jcc_forward(&t->e, CC_NE);
	emit_store_imm8(&t->e, V(iflag), 1);
}

/* A call of C, with all registers where it looks for them. Comparing ones leave their flags in memory. */
static void emit_string(struct bt_translation *t, struct insn *i)
{
	struct emitter *e = &t->e;
	struct bt_site *site = new_decoded_site(t, i);
	uint8_t *resume;
	int32_t distance;

	if (!site)
		return;
	flags_clobber(t, i->live_before | (i->touched ? FLAGS_ARITHMETIC : 0));
	emit_imm64(e, R10, (uint64_t)(uintptr_t)site);
	EMIT(e, 0x4c, 0x8d, 0x1d); /* lea r11, [rip + resume] */
	emit32(e, 0);
	resume = e->p;
	emit_jump(e, t->vm->string);
	distance = (int32_t)(e->p - resume);
	if (!e->overflow)
		memcpy(resume - 4, &distance, 4);
	if (i->touched)
		t->state = FLAGS_MEM;
}

/* false: the block ends here */
bool emit_insn(struct bt_translation *t, struct insn *i, const uint8_t *page)
{
	switch (i->kind) {
	case INSN_PLAIN: emit_plain(t, i); return true;
	case INSN_NOTHING: return true;
	case INSN_BITS: emit_bits(t, i); return true;
	case INSN_STRING: emit_string(t, i); return true;
	case INSN_LEA: emit_lea_insn(t, i); return true;
	case INSN_PUSH: emit_push(t, i); return true;
	case INSN_POP: emit_pop(t, i); return true;
	case INSN_LEAVE: emit_leave(t, i); return true;
	case INSN_CLI: emit_store_imm8(&t->e, V(iflag), 0); return true;
	case INSN_STI: emit_sti(t, i); return true;
	case INSN_CLD: emit_store_imm8(&t->e, V(dflag), 0); return true;
	case INSN_STD: emit_store_imm8(&t->e, V(dflag), 1); return true;
	case INSN_SWAPGS: emit_swapgs(t); return true;
	case INSN_CALL: emit_call(t, i, page); return false;
	case INSN_RET: emit_ret(t, i); return false;
	case INSN_JUMP:
		if (i->d.operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
			emit_goto(t, branch_target(t, i), i->offset, page);
		} else {
			flags_clobber(t, FLAGS_ARITHMETIC);
			emit_target(t, i);
			emit_indirect(t, t->mode & BT_MODE_SET);
		}
		return false;
	case INSN_JCC: emit_jcc_insn(t, i, page); return false;
	case INSN_LOOP: emit_loop(t, i, page); return false;
	default: emit_system_exit(t, i, i->kind != INSN_SYSTEM); return false;
	}
}
