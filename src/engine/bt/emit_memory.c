/* What the host code of one instruction needs around it: its flags, its memory operand's address, the TLB check. */
#include "engine/bt/translation.h"

/* ---- flags ---- */

void flags_save(struct bt_translation *t)
{
	struct emitter *e = &t->e;

	if (t->state != FLAGS_HOST)
		return;
	emit_move(e, R11, RAX);
	EMIT(e, 0x9f, 0x0f, 0x90, 0xc0); /* lahf; seto al */
	emit_gs(e, 2, 0x89, RAX, V(arith));
	emit_move(e, RAX, R11);
	t->state = FLAGS_BOTH;
}

/* The host's flags are about to be destroyed; `live` ones must survive in memory. */
void flags_clobber(struct bt_translation *t, uint32_t live)
{
	if (live)
		flags_save(t);
	if (t->state == FLAGS_BOTH)
		t->state = FLAGS_MEM;
	else if (t->state == FLAGS_HOST)
		t->state = FLAGS_DEAD;
}

void emit_restore(struct emitter *e, unsigned temporary)
{
	emit_move(e, temporary, RAX);
	emit_gs(e, 2, 0x8b, RAX, V(arith));
	EMIT(e, 0x04, 0x7f, 0x9e); /* add al, 127 (sets OF if al was 1); sahf */
	emit_move(e, RAX, temporary);
}

/* Brings the flags back into the host's, through a free scratch register. */
void flags_restore(struct bt_translation *t, unsigned temporary)
{
	if (t->state != FLAGS_MEM)
		return;
	emit_restore(&t->e, temporary);
	t->state = FLAGS_BOTH;
}

/* ---- accesses ---- */

static unsigned size_class(unsigned bytes)
{
	switch (bytes) {
	case 1: return 0;
	case 2: return 1;
	case 4: return 2;
	case 8: return 3;
	case 16: return 4;
	case 32: return 5;
	case 64: return 6;
	case 10: return 7;
	default: return 8;
	}
}

/* r10: linear address in, host address out. Destroys the flags (flags_clobber comes first) and r11. */
void emit_check(struct bt_translation *t, unsigned bytes, bool write, bool masked)
{
	struct emitter *e = &t->e;
	unsigned set = t->mode & BT_MODE_SET, class = size_class(bytes);
	uint32_t table = V(tlb) + set * (uint32_t)sizeof(((struct bt_vcpu *)0)->tlb[0]);
	struct late *late;

	if (class > 7) {
		t->e.overflow = 1; /* insn_classify lets none of these through */
		return;
	}
	EMIT(e, 0x45, 0x89, 0xd3);    /* mov r11d, r10d */
	EMIT(e, 0x41, 0xc1, 0xeb, 7); /* shr r11d, 7 */
	EMIT(e, 0x41, 0x81, 0xe3);    /* and r11d, (entries - 1) << 5 */
	emit32(e, (BT_TLB_ENTRIES - 1) << 5);
	EMIT(e, 0x65, 0x4d, 0x2b, 0x93); /* sub r10, gs:[r11 + tag] */
	emit32(e, table + (write ? 8 : 0));
	EMIT(e, 0x49, 0x81, 0xfa); /* cmp r10, 4097 - bytes */
	emit32(e, BT_PAGE_SIZE + 1 - bytes);
	late = new_late(t);
	late->what = LATE_SLOW_ACCESS;
	late->place = emit_jcc_forward(e, CC_AE);
	late->stub = t->vm->slow[set][class][(write ? 1 : 0) | (masked ? 2 : 0)];
	late->tag_offset = table + (write ? 8 : 0);
	EMIT(e, 0x65, 0x4d, 0x03, 0x93); /* add r10, gs:[r11 + addend] */
	emit32(e, table + 16);
	late->resume = emit_here(e);
}

/* r10 = linear address of the memory operand; flags are destroyed. */
void emit_address(struct bt_translation *t, const struct insn *i, const ZydisDecodedOperand *op)
{
	struct emitter *e = &t->e;
	const ZydisDecodedInstruction *d = &i->d.insn;
	int wide = d->address_width == 64;
	int64_t disp = op->mem.disp.has_displacement ? op->mem.disp.value : 0;
	bool based = op->mem.segment == ZYDIS_REGISTER_FS || op->mem.segment == ZYDIS_REGISTER_GS;

	if (op->mem.base == ZYDIS_REGISTER_RIP || op->mem.base == ZYDIS_REGISTER_EIP) {
		/* disp32 plus an offset inside the page may need 33 bits */
		emit_imm64(e, R10, (uint64_t)(disp + i->offset + d->length));
		EMIT(e, 0x65, 0x4c, 0x03, 0x14, 0x25); /* add r10, gs:[page] */
		emit32(e, V(page));
		if (!wide)
			emit_move32(e, R10, R10);
	} else if (op->mem.base == ZYDIS_REGISTER_NONE && op->mem.index == ZYDIS_REGISTER_NONE) {
		emit_imm64(e, R10, wide ? (uint64_t)disp : (uint32_t)disp);
	} else {
		bool has_base = op->mem.base != ZYDIS_REGISTER_NONE, has_index = op->mem.index != ZYDIS_REGISTER_NONE;
		unsigned base = has_base ? reg_number(op->mem.base) : 5;
		unsigned index = has_index ? reg_number(op->mem.index) : 4, scale = 0;
		bool disp8 = has_base && disp == (int8_t)disp, disp0 = disp == 0 && has_base && (base & 7) != 5;

		while (has_index && 1u << scale < op->mem.scale)
			scale++;
		if ((has_base && base == R10) || (has_index && index == R10))
			emit_load(e, R10, V_GPR(R10));
		if ((has_base && base == R11) || (has_index && index == R11))
			emit_load(e, R11, V_GPR(R11));
		EMIT(e, 0x44 | (wide ? 8 : 0) | (has_index ? (index >> 3) << 1 : 0) | (has_base ? base >> 3 : 0), 0x8d,
			(!has_base || disp0 ? 0x00 : disp8 ? 0x40 : 0x80) | 2 << 3 | 4,
			scale << 6 | (index & 7) << 3 | (base & 7));
		if (!has_base)
			emit32(e, (uint32_t)disp);
		else if (!disp0 && disp8)
			emit8(e, (uint8_t)disp);
		else if (!disp0)
			emit32(e, (uint32_t)disp);
	}
	if (based) {
		uint32_t field = op->mem.segment == ZYDIS_REGISTER_FS ? V(fs_base) : V(gs_base);

		/* add r10, gs:[base]; outside 64-bit mode the sum wraps at 4 GiB */
		EMIT(e, 0x65, t->code64 ? 0x4c : 0x44, 0x03, 0x14, 0x25);
		emit32(e, field);
	}
}

/* Address and check of an instruction's memory operand, or its bounce buffer: the host address is in r10. */
void emit_operand(struct bt_translation *t, const struct insn *i, const ZydisDecodedOperand *op)
{
	bool write = op->actions & (ZYDIS_OPERAND_ACTION_WRITE | ZYDIS_OPERAND_ACTION_CONDWRITE);
	/* slow.c knows which of two faults comes first, and what a mask leaves out */
	bool masked = insn_waits_for_x87(&i->d) ||
		i->d.insn.avx.mask.mode > ZYDIS_MASK_MODE_DISABLED ||
		i->d.insn.mnemonic == ZYDIS_MNEMONIC_VPMASKMOVD || i->d.insn.mnemonic == ZYDIS_MNEMONIC_VPMASKMOVQ ||
		i->d.insn.mnemonic == ZYDIS_MNEMONIC_VMASKMOVPS || i->d.insn.mnemonic == ZYDIS_MNEMONIC_VMASKMOVPD;

	if (t->bounce) {
		emit_load(&t->e, R10, V(bounce));
		return;
	}
	flags_clobber(t, i->live_before);
	emit_address(t, i, op);
	emit_check(t, op->size / 8, write, masked);
}
