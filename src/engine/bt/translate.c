/* Tier 1: guest instructions to host instructions of the same set, one block at a time.
 *
 * A block is code that is entered at its top only, within one guest page (or a single instruction across two), for one
 * mode (BT_MODE_*). It does not know its own virtual address: what depends on it is computed from v->page, so that one
 * translation serves every process that maps the page.
 *
 * Host code of one instruction with a memory operand:
 *	lea r10, [address]; index into the TLB; subtract tag; compare with the page's end; jae slow; add host page
 *	the instruction itself with [r10] as its operand
 * An instruction that itself needs r10 (r11) has its address in r11 (r10) instead. Nothing architectural changes before
 * the last check of an instruction has passed, so every fault leaves the state as it was before.
 *
 * Arithmetic flags: `state` says where the guest's are. They are saved only where a check would destroy live ones.
 */
#include <stdlib.h>

#include "engine/bt/bt.h"
#include "engine/bt/insn.h"

enum flags_state { FLAGS_HOST, FLAGS_MEM, FLAGS_BOTH, FLAGS_DEAD };

/* Code out of line, written after the block's body. */
struct late {
	enum { LATE_SLOW_ACCESS, LATE_LINK, LATE_SYSTEM, LATE_LOOKUP } what;
	uint8_t *place, *place2; /* rel32s that lead here */
	const uint8_t *stub;	 /* SLOW_ACCESS, LOOKUP: common stub */
	const uint8_t *resume;
	uint32_t tag_offset;	 /* SLOW_ACCESS: of the TLB entry's tag; LOOKUP: of the jump cache */
	struct bt_site *site;
	bool save_flags;
};

struct bt_translation {
	struct emitter e;
	struct bt_vm *vm;
	struct bt_block *block;
	uint32_t mode;
	bool code64, bounce, exact, crosses;
	enum flags_state state;
	unsigned n, lates;
	struct insn insns[BT_BLOCK_INSNS];
	struct late late[BT_BLOCK_INSNS * 4 + 8];
	struct bt_side side[BT_BLOCK_INSNS + 1];
};

/* ---- flags ---- */

static void flags_save(struct bt_translation *t)
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
static void flags_clobber(struct bt_translation *t, uint32_t live)
{
	if (live)
		flags_save(t);
	if (t->state == FLAGS_BOTH)
		t->state = FLAGS_MEM;
	else if (t->state == FLAGS_HOST)
		t->state = FLAGS_DEAD;
}

static void emit_restore(struct emitter *e, unsigned temporary)
{
	emit_move(e, temporary, RAX);
	emit_gs(e, 2, 0x8b, RAX, V(arith));
	EMIT(e, 0x04, 0x7f, 0x9e); /* add al, 127 (sets OF if al was 1); sahf */
	emit_move(e, RAX, temporary);
}

/* Brings the flags back into the host's, through a free scratch register. */
static void flags_restore(struct bt_translation *t, unsigned temporary)
{
	if (t->state != FLAGS_MEM)
		return;
	emit_restore(&t->e, temporary);
	t->state = FLAGS_BOTH;
}

/* ---- ways out ---- */

static struct bt_site *new_site(struct bt_translation *t, int32_t offset)
{
	struct bt_site *s = cache_alloc(t->vm, sizeof(*s));

	if (!s) {
		t->e.overflow = 1;
		return NULL;
	}
	memset(s, 0, sizeof(*s));
	s->block = t->block;
	s->offset = offset;
	return s;
}

static struct late *new_late(struct bt_translation *t)
{
	static struct late spare; /* written only together with overflow, which discards the block */

	if (t->lates == ARRAY_SIZE(t->late)) {
		t->e.overflow = 1;
		return &spare;
	}
	memset(&t->late[t->lates], 0, sizeof(struct late));
	return &t->late[t->lates++];
}

static void emit_site_exit(struct bt_translation *t, const uint8_t *stub, struct bt_site *site)
{
	emit_imm64(&t->e, R10, (uint64_t)(uintptr_t)site);
	emit_jump(&t->e, stub);
}

/* Leaves for C to execute the instruction there; all flags must be right in memory. */
static void emit_system_exit(struct bt_translation *t, const struct insn *i, bool slow)
{
	struct bt_site *site = new_site(t, i->offset);

	if (!site)
		return;
	if (!slow) {
		struct bt_decoded *copy = cache_alloc(t->vm, sizeof(*copy));

		if (!copy) {
			t->e.overflow = 1;
			return;
		}
		memcpy(copy, &i->d, sizeof(*copy));
		site->decoded = copy;
	}
	if (t->state == FLAGS_HOST)
		flags_save(t);
	emit_site_exit(t, slow ? t->vm->exit_slow : t->vm->exit_system[0], site);
}

/* Leaves for C to find the code at r10; r11 and v->resume say from where, for targets that are not canonical. */
static void emit_lookup(struct bt_translation *t)
{
	EMIT(&t->e, 0x4c, 0x8d, 0x1d, 0, 0, 0, 0); /* lea r11, [rip] */
	emit_store(&t->e, V(resume), R11);
	emit_jump(&t->e, t->vm->exit_lookup);
}

/* r10 holds the target pc, flags are in memory (or dead). Look it up in the jump cache of `set` and go there. */
static void emit_indirect(struct bt_translation *t, enum bt_set set)
{
	struct emitter *e = &t->e;
	uint32_t pc = V(jump) + (uint32_t)set * sizeof(((struct bt_vcpu *)0)->jump[0]);
	struct late *late;

	if (t->mode & (BT_MODE_SINGLE | BT_MODE_ALONE)) {
		emit_lookup(t);
		return;
	}
	emit_move(e, R11, R10);
	EMIT(e, 0x49, 0xc1, 0xeb, 12); /* shr r11, 12 */
	EMIT(e, 0x45, 0x31, 0xd3);     /* xor r11d, r10d */
	EMIT(e, 0x41, 0x81, 0xe3);     /* and r11d, entries - 1 */
	emit32(e, BT_JUMP_ENTRIES - 1);
	EMIT(e, 0x41, 0xc1, 0xe3, 5);  /* shl r11d, 5 */
	EMIT(e, 0x65, 0x4d, 0x3b, 0x93); /* cmp r10, gs:[r11 + pc] */
	emit32(e, pc);
	late = new_late(t);
	late->what = LATE_LOOKUP;
	late->place = emit_jcc_forward(e, CC_NE);
	late->stub = t->vm->second_way[set];
	late->tag_offset = pc;
	emit_test_byte(e, V(kick));
	emit_jcc(e, CC_NE, t->vm->exit_lookup);
	emit_alu_imm(e, ALU_AND, R10, -4096);
	emit_store(e, V(page), R10);
	EMIT(e, 0x65, 0x41, 0xff, 0xa3); /* jmp gs:[r11 + code] */
	emit32(e, pc + 8);
}

/* r10 = v->page + offset, cut to the mode's width */
static void emit_pc(struct bt_translation *t, unsigned reg, int32_t offset)
{
	emit_load(&t->e, reg, V(page));
	if (offset || !t->code64)
		emit_lea(&t->e, t->code64, reg, reg, offset);
}

/* Goes to the instruction at offset (from the page's start) by way of the jump cache. */
static void emit_far_goto(struct bt_translation *t, int64_t offset)
{
	flags_save(t);
	if (t->code64 && offset != (int32_t)offset) {
		emit_imm64(&t->e, R10, (uint64_t)offset);
		EMIT(&t->e, 0x65, 0x4c, 0x03, 0x14, 0x25); /* add r10, gs:[page] */
		emit32(&t->e, V(page));
	} else {
		emit_pc(t, R10, (int32_t)offset);
	}
	emit_indirect(t, t->mode & BT_MODE_SET);
}

static bool in_page(int64_t offset)
{
	return offset >= 0 && offset < (int64_t)BT_PAGE_SIZE;
}

/* Goes to offset from the instruction at `from`; ends a path of the block. */
static void emit_goto(struct bt_translation *t, int64_t offset, int32_t from, const uint8_t *page_bytes)
{
	struct emitter *e = &t->e;
	struct bt_site *site;
	struct late *late;
	uint8_t *poll = NULL;

	if (!in_page(offset) || (t->mode & (BT_MODE_SINGLE | BT_MODE_ALONE)) || t->block->second_page) {
		emit_far_goto(t, offset);
		return;
	}
	site = new_site(t, (int32_t)offset);
	if (!site)
		return;
	if (offset <= from) {
		/* Polls of v->kick are what ends a loop when an interrupt comes. */
		uint32_t live = t->exact ? FLAGS_ARITHMETIC : insn_flags_live(page_bytes, (unsigned)offset, t->mode);

		flags_clobber(t, live);
		emit_test_byte(e, V(kick));
		poll = emit_jcc_forward(e, CC_NE);
	}
	site->linkable = true;
	site->wants_mem = t->state == FLAGS_MEM;
	while (((uintptr_t)e->p + 1) & 3)
		emit8(e, 0x90); /* the rel32 is changed while other vCPUs may run it: one aligned store */
	late = new_late(t);
	late->what = LATE_LINK;
	late->place2 = poll;
	late->place = emit_jump_forward(e);
	late->site = site;
	late->save_flags = t->state == FLAGS_HOST;
	site->patch = late->place;
}

static void emit_lates(struct bt_translation *t)
{
	struct emitter *e = &t->e;

	for (unsigned k = 0; k < t->lates && !e->overflow; k++) {
		struct late *l = &t->late[k];

		emit_land(e, l->place);
		switch (l->what) {
		case LATE_SLOW_ACCESS:
			EMIT(e, 0x65, 0x4d, 0x03, 0x93); /* add r10, gs:[r11 + tag]: the address again */
			emit32(e, l->tag_offset);
			EMIT(e, 0x4c, 0x8d, 0x1d); /* lea r11, [rip + resume] */
			emit_rel32(e, l->resume);
			emit_jump(e, l->stub);
			break;
		case LATE_LINK:
			if (l->place2)
				emit_land(e, l->place2);
			memcpy(&l->site->unlinked, l->site->patch, 4);
			emit_site_exit(t, t->vm->exit_link[l->save_flags], l->site);
			break;
		case LATE_LOOKUP:
			EMIT(e, 0x65, 0x4d, 0x3b, 0x93); /* cmp r10, gs:[r11 + pc of the second way] */
			emit32(e, l->tag_offset + 16);
			emit_jcc(e, CC_E, l->stub);
			emit_lookup(t);
			break;
		case LATE_SYSTEM:
			emit_site_exit(t, t->vm->exit_system[l->save_flags], l->site);
			break;
		}
	}
}

/* ---- memory ---- */

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

/* r10: linear address in, host address out; `live` flags survive in memory. Uses r11. */
static void emit_check(struct bt_translation *t, unsigned bytes, bool write, bool masked, uint32_t live)
{
	struct emitter *e = &t->e;
	unsigned set = t->mode & BT_MODE_SET, class = size_class(bytes);
	uint32_t table = V(tlb) + set * (uint32_t)sizeof(((struct bt_vcpu *)0)->tlb[0]);
	struct late *late;

	if (class > 7) {
		t->e.overflow = 1; /* insn_classify lets none of these through */
		return;
	}
	(void)live;
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
static void emit_address(struct bt_translation *t, const struct insn *i, const ZydisDecodedOperand *op)
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
static void emit_operand(struct bt_translation *t, const struct insn *i, const ZydisDecodedOperand *op)
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
	emit_check(t, op->size / 8, write, masked, i->live_before);
}

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

static void emit_plain(struct bt_translation *t, struct insn *i)
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
static void emit_bits(struct bt_translation *t, struct insn *i)
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
		emit_check(t, width / 8, write, false, i->live_before);
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

/* ---- stack and control flow ---- */

static unsigned slot(const struct bt_translation *t)
{
	return t->code64 ? 8 : 4;
}

/* mov [r10], r11 or mov r11, [r10] of a stack slot's size */
static void emit_slot(struct bt_translation *t, bool store, unsigned reg, unsigned address)
{
	EMIT(&t->e, 0x40 | (t->code64 ? 8 : 0) | (reg >> 3) << 2 | address >> 3, store ? 0x89 : 0x8b,
		(reg & 7) << 3 | (address & 7));
}

static void emit_push_check(struct bt_translation *t, const struct insn *i)
{
	flags_clobber(t, i->live_before);
	emit_lea(&t->e, t->code64, R10, RSP, -(int)slot(t));
	emit_check(t, slot(t), true, false, i->live_before);
}

static void emit_move_rsp(struct bt_translation *t, int by)
{
	emit_lea(&t->e, t->code64, RSP, RSP, by);
}

static void emit_push(struct bt_translation *t, struct insn *i)
{
	const ZydisDecodedOperand *op = &i->d.operands[0];

	if (i->memory) {
		emit_operand(t, i, i->memory);
		emit_slot(t, false, R11, R10);
		emit_store(&t->e, V(scratch) + 8, R11);
		emit_push_check(t, i);
		emit_load(&t->e, R11, V(scratch) + 8);
		emit_slot(t, true, R11, R10);
	} else if (op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
		emit_push_check(t, i);
		EMIT(&t->e, t->code64 ? 0x49 : 0x41, 0xc7, 0x02); /* mov [r10], imm32 */
		emit32(&t->e, (uint32_t)op->imm.value.s);
	} else {
		unsigned reg = reg_number(op->reg.value);

		emit_push_check(t, i);
		if (reg == R10 || reg == R11) {
			emit_load(&t->e, R11, V_GPR(reg));
			reg = R11;
		}
		emit_slot(t, true, reg, R10);
	}
	emit_move_rsp(t, -(int)slot(t));
}

static void emit_pop_check(struct bt_translation *t, const struct insn *i, unsigned base)
{
	flags_clobber(t, i->live_before);
	if (t->code64)
		emit_move(&t->e, R10, base);
	else
		emit_move32(&t->e, R10, base);
	emit_check(t, slot(t), false, false, i->live_before);
}

static void emit_pop(struct bt_translation *t, struct insn *i)
{
	unsigned reg = reg_number(i->d.operands[0].reg.value);

	emit_pop_check(t, i, RSP);
	if (reg == RSP) {
		emit_slot(t, false, RSP, R10);
		return;
	}
	if (reg == R10 || reg == R11) {
		emit_slot(t, false, R11, R10);
		emit_store(&t->e, V_GPR(reg), R11);
	} else {
		emit_slot(t, false, reg, R10);
	}
	emit_move_rsp(t, (int)slot(t));
}

static void emit_leave(struct bt_translation *t, struct insn *i)
{
	emit_pop_check(t, i, RBP);
	emit_lea(&t->e, t->code64, RSP, RBP, (int)slot(t));
	emit_slot(t, false, RBP, R10);
}

static int64_t branch_target(const struct bt_translation *t, const struct insn *i)
{
	int64_t target = i->offset + i->d.insn.length + i->d.operands[0].imm.value.s;

	return t->code64 ? target : (int32_t)target;
}

/* r10 = the target of an indirect jump or call; may fault */
static void emit_target(struct bt_translation *t, struct insn *i)
{
	if (i->memory) {
		emit_operand(t, i, i->memory);
		emit_slot(t, false, R10, R10);
	} else {
		unsigned reg = reg_number(i->d.operands[0].reg.value);

		if (reg == R10 || reg == R11)
			emit_load(&t->e, R10, V_GPR(reg));
		else if (t->code64)
			emit_move(&t->e, R10, reg);
		else
			emit_move32(&t->e, R10, reg);
	}
}

static void emit_call(struct bt_translation *t, struct insn *i, const uint8_t *page)
{
	bool direct = i->d.operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE;

	if (!direct) {
		emit_target(t, i);
		emit_store(&t->e, V(scratch) + 8, R10);
	}
	emit_push_check(t, i);
	if (!direct) { /* what slow_branch_fault puts back */
		emit_slot(t, false, R11, R10);
		emit_store(&t->e, V(scratch) + 16, R11);
	}
	emit_pc(t, R11, i->offset + i->d.insn.length);
	emit_slot(t, true, R11, R10);
	emit_move_rsp(t, -(int)slot(t));
	if (direct) {
		emit_goto(t, branch_target(t, i), i->offset, page);
	} else {
		emit_load(&t->e, R10, V(scratch) + 8);
		emit_indirect(t, t->mode & BT_MODE_SET);
	}
}

static void emit_ret(struct bt_translation *t, struct insn *i)
{
	int extra = i->d.operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? (int)(i->d.operands[0].imm.value.u & 0xffff) : 0;

	emit_pop_check(t, i, RSP);
	emit_slot(t, false, R10, R10);
	emit_move_rsp(t, (int)slot(t) + extra);
	emit_indirect(t, t->mode & BT_MODE_SET);
}

static void emit_jcc_insn(struct bt_translation *t, struct insn *i, const uint8_t *page)
{
	unsigned cc = i->d.insn.opcode & 15;
	enum flags_state state;
	uint8_t *over;

	flags_restore(t, R11);
	over = emit_jcc_forward(&t->e, cc ^ 1);
	state = t->state;
	emit_goto(t, branch_target(t, i), i->offset, page);
	emit_land(&t->e, over);
	t->state = state;
	emit_goto(t, i->offset + i->d.insn.length, i->offset, page);
}

/* loop, loope, loopne, jcxz, jecxz, jrcxz: none of them changes flags */
static void emit_loop(struct bt_translation *t, struct insn *i, const uint8_t *page)
{
	struct emitter *e = &t->e;
	int wide = i->d.insn.address_width == 64;
	bool counts = i->d.insn.mnemonic == ZYDIS_MNEMONIC_LOOP || i->d.insn.mnemonic == ZYDIS_MNEMONIC_LOOPE ||
		i->d.insn.mnemonic == ZYDIS_MNEMONIC_LOOPNE;
	uint8_t *taken = NULL, *not_taken = NULL, *not_taken2 = NULL;
	enum flags_state state;

	if (i->d.insn.mnemonic == ZYDIS_MNEMONIC_LOOPE || i->d.insn.mnemonic == ZYDIS_MNEMONIC_LOOPNE)
		flags_restore(t, R11);
	if (counts)
		emit_lea(e, wide, RCX, RCX, -1);
	/* jrcxz reaches 127 bytes only: jrcxz +5; jmp A; jmp B */
	if (!wide)
		emit8(e, 0x67);
	EMIT(e, 0xe3, 5);
	if (counts) {
		if (i->d.insn.mnemonic == ZYDIS_MNEMONIC_LOOP) {
			taken = emit_jump_forward(e);
			not_taken = emit_jump_forward(e);
		} else {
			uint8_t *check = emit_jump_forward(e);

			not_taken = emit_jump_forward(e);
			emit_land(e, check);
			taken = emit_jcc_forward(e, i->d.insn.mnemonic == ZYDIS_MNEMONIC_LOOPE ? CC_E : CC_NE);
			not_taken2 = emit_jump_forward(e);
		}
	} else {
		not_taken = emit_jump_forward(e);
		taken = emit_jump_forward(e);
	}
	state = t->state;
	emit_land(e, taken);
	emit_goto(t, branch_target(t, i), i->offset, page);
	t->state = state;
	emit_land(e, not_taken);
	if (not_taken2)
		emit_land(e, not_taken2);
	emit_goto(t, i->offset + i->d.insn.length, i->offset, page);
}

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
	struct bt_site *site = new_site(t, i->offset);
	struct bt_decoded *copy = cache_alloc(t->vm, sizeof(*copy));

	if (!site || !copy) {
		t->e.overflow = 1;
		return;
	}
	memcpy(copy, &i->d, sizeof(*copy));
	site->decoded = copy;
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
	struct bt_site *site = new_site(t, i->offset);
	struct bt_decoded *copy = cache_alloc(t->vm, sizeof(*copy));
	uint8_t *resume;
	int32_t distance;

	if (!site || !copy) {
		t->e.overflow = 1;
		return;
	}
	memcpy(copy, &i->d, sizeof(*copy));
	site->decoded = copy;
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
static bool emit_insn(struct bt_translation *t, struct insn *i, const uint8_t *page)
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

static bool ends_block(enum insn_kind kind)
{
	return kind == INSN_SYSTEM || kind == INSN_SLOW || kind == INSN_CALL || kind == INSN_RET || kind == INSN_JUMP ||
		kind == INSN_JCC || kind == INSN_LOOP;
}

/* Backwards over the block: which flags each instruction must find. */
static void find_live_flags(struct bt_translation *t, unsigned n, const uint8_t *page)
{
	struct insn *last = &t->insns[n - 1];
	uint32_t live = FLAGS_ARITHMETIC;
	int64_t next = last->offset + last->d.insn.length;

	if (!t->exact && !t->block->second_page && in_page(next)) {
		int64_t target;

		if (last->kind == INSN_JCC) {
			target = branch_target(t, last);
			live = insn_flags_live(page, (unsigned)next, t->mode) |
				(in_page(target) ? insn_flags_live(page, (unsigned)target, t->mode) : FLAGS_ARITHMETIC);
		} else if ((last->kind == INSN_JUMP || last->kind == INSN_CALL) &&
			last->d.operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
			target = branch_target(t, last);
			live = in_page(target) ? insn_flags_live(page, (unsigned)target, t->mode) : FLAGS_ARITHMETIC;
		} else if (!ends_block(last->kind)) {
			live = insn_flags_live(page, (unsigned)next, t->mode);
		}
	}
	for (unsigned k = n; k-- > 0;) {
		struct insn *i = &t->insns[k];

		if (t->exact || i->kind == INSN_SYSTEM || i->kind == INSN_SLOW || i->kind == INSN_STI)
			live = FLAGS_ARITHMETIC;
		if (t->exact)
			i->killed = 0; /* nor are undefined flags given up */
		i->live_after = live;
		live = (live & ~i->killed) | i->tested;
		if (i->kind == INSN_SYSTEM || i->kind == INSN_SLOW || i->kind == INSN_STI)
			live = FLAGS_ARITHMETIC;
		i->live_before = live;
	}
}

/* Decodes a block's instructions; returns how many. */
static unsigned decode_block(struct bt_translation *t, const uint8_t *page, unsigned offset, unsigned most, bool *crosses)
{
	unsigned n = 0;
	bool more;

	*crosses = false;
	while (n < most && offset < BT_PAGE_SIZE) {
		struct insn *i = &t->insns[n];

		i->offset = (int32_t)offset;
		if (!insn_decode(i, t->mode, page + offset, BT_PAGE_SIZE - offset, &more)) {
			*crosses = more;
			break;
		}
		insn_classify(i, t->mode);
		offset += i->d.insn.length;
		n++;
		if (ends_block(i->kind))
			break;
	}
	return n;
}

/* Writes the code of t->insns[0..n) as t->block. false: no room. */
static bool emit_block(struct bt_translation *t, unsigned n, const uint8_t *page)
{
	struct emitter *e = &t->e;
	struct bt_block *b = t->block;
	uint8_t *start;
	bool open = true;

	find_live_flags(t, n, page);
	while ((uintptr_t)e->p & 15)
		emit8(e, 0xcc);
	start = e->p;
	b->entry_mem = emit_here(e);
	t->state = FLAGS_DEAD;
	if (t->insns[0].live_before) {
		emit_restore(e, R11);
		t->state = FLAGS_BOTH;
	}
	b->entry_host = emit_here(e);
	/* Who comes in by entry_host has the flags in the host's only. */
	if (t->state == FLAGS_BOTH)
		t->state = FLAGS_HOST;
	for (t->n = 0; t->n < n && !e->overflow; t->n++) {
		struct insn *i = &t->insns[t->n];

		t->side[t->n].host = (uint16_t)(e->p - start);
		t->side[t->n].guest = (uint16_t)i->offset;
		t->side[t->n].flags_in_host = t->state == FLAGS_HOST;
		open = emit_insn(t, i, page);
	}
	if (open) {
		struct insn *last = &t->insns[n - 1];

		/* Blocks over two pages depend on the mapping of the second: they are not linked to. */
		if (t->crosses)
			emit_far_goto(t, last->offset + last->d.insn.length);
		else
			emit_goto(t, last->offset + last->d.insn.length, last->offset, page);
	}
	emit_lates(t);
	if (e->overflow)
		return false;
	b->sides = (uint16_t)n;
	b->side = cache_alloc(t->vm, n * sizeof(*b->side));
	if (!b->side)
		return false;
	memcpy(b->side, t->side, n * sizeof(*b->side));
	b->size = (uint16_t)(t->insns[n - 1].offset + t->insns[n - 1].d.insn.length - t->insns[0].offset);
	b->host_size = (uint32_t)(e->p - start);
	t->vm->code_used = (size_t)(e->p - t->vm->code_write);
	return true;
}

/* Sets up t for writing a new block; false: the cache is full. */
static bool begin_block(struct bt_vm *vm, struct bt_translation *t, uint32_t mode)
{
	if (!cache_has_room(vm))
		return false;
	t->vm = vm;
	t->mode = mode;
	t->code64 = (mode & BT_MODE_CODE) == BT_MODE_CODE64;
	t->exact = vm->exact_flags;
	t->bounce = false;
	t->lates = 0;
	t->block = cache_alloc(vm, sizeof(*t->block));
	memset(t->block, 0, sizeof(*t->block));
	t->block->mode = mode;
	t->e = (struct emitter){ .p = vm->code_write + vm->code_used,
		.end = vm->code_write + vm->code_size,
		.to_run = vm->code_run - vm->code_write };
	return true;
}

static void flush_everything(struct bt_vcpu *v)
{
	exclusive_begin(v);
	cache_flush(v->vm);
	exclusive_end(v);
}

enum made { MADE, MADE_SLOW, MADE_FAULT, MADE_AGAIN };

/* Translates the block at v->rip (in page f); the page is already protected. */
static enum made make_block(struct bt_vcpu *v, const struct fetch_entry *f, struct bt_block **made)
{
	struct bt_vm *vm = v->vm;
	struct bt_translation *t = vm->translation;
	unsigned offset = (unsigned)(v->rip & 0xfff), most = v->mode & BT_MODE_SINGLE ? 1 : BT_BLOCK_INSNS, n;
	uint8_t joined[32];
	bool crosses;

	scope_lock(&vm->translate_lock);
	if (!begin_block(vm, t, v->mode))
		return MADE_AGAIN;
	n = decode_block(t, f->host, offset, most, &crosses);
	t->crosses = crosses;
	t->block->phys = f->gpa | offset;
	if (n == 0 && !crosses)
		return MADE_SLOW; /* slow_execute raises #UD */
	if (n == 0) {
		/* One instruction over two pages, decoded from a copy; the second page is fetched only now. */
		const struct fetch_entry *second;
		struct fetch_entry first = *f;
		unsigned have = BT_PAGE_SIZE - offset;
		bool more;

		second = tlb_fetch(v, (v->rip & ~0xfffull) + BT_PAGE_SIZE);
		if (!second)
			return MADE_FAULT;
		memcpy(joined, first.host + offset, have);
		memcpy(joined + have, second->host, 16);
		t->insns[0].offset = (int32_t)offset;
		if (!insn_decode(&t->insns[0], t->mode, joined, have + 16, &more))
			return MADE_SLOW;
		insn_classify(&t->insns[0], t->mode);
		t->block->second_page = second->gpa | 1;
		if (!emit_block(t, 1, first.host))
			return MADE_AGAIN;
		cache_add(vm, t->block, first.index, second->index);
	} else {
		if (!emit_block(t, n, f->host))
			return MADE_AGAIN;
		cache_add(vm, t->block, f->index, f->index);
	}
	v->private->statistics[STAT_TRANSLATIONS]++;
	v->private->statistics[STAT_TRANSLATED_INSNS] += n ? n : 1;
	*made = t->block;
	return MADE;
}

struct bt_block *block_find(struct bt_vcpu *v, bool *slow)
{
	struct bt_vm *vm = v->vm;

	*slow = false;
	if ((v->mode & BT_MODE_CODE) == BT_MODE_CODE16 || !(v->mode & BT_MODE_FLAT)) {
		*slow = true;
		return NULL;
	}
	if (v->mode & BT_MODE_CODE32)
		v->rip &= 0xffffffff;
	for (int tries = 0; tries < 4; tries++) {
		const struct fetch_entry *f = tlb_fetch(v, v->rip), *second = NULL;
		struct fetch_entry first;
		struct bt_block *block;
		uint64_t phys;

		if (!f)
			return NULL;
		first = *f;
		phys = first.gpa | (v->rip & 0xfff);
		block = cache_find(vm, phys, v->mode, 0);
		if (!block && (v->rip & 0xfff) > BT_PAGE_SIZE - 15) {
			/* Perhaps one over two pages: right only if the second page is mapped as it was then. */
			block = cache_find(vm, phys, v->mode, 1);
			if (block) {
				second = tlb_fetch(v, (v->rip & ~0xfffull) + BT_PAGE_SIZE);
				if (!second)
					return NULL;
				block = cache_find(vm, phys, v->mode, second->gpa | 1);
			}
		}
		if (block)
			return block;
		if (!first.host) {
			*slow = true; /* code in device memory */
			return NULL;
		}
		cache_protect_page(v, first.index, (uint8_t *)(uintptr_t)first.host);
		if ((v->rip & 0xfff) > BT_PAGE_SIZE - 15) {
			uint32_t error = v->fault.error;
			int vector = v->fault.vector;
			uint64_t cr2 = v->cr2;

			second = tlb_fetch(v, (v->rip & ~0xfffull) + BT_PAGE_SIZE);
			if (second && second->host) {
				cache_protect_page(v, second->index, (uint8_t *)(uintptr_t)second->host);
			} else if (second) {
				*slow = true;
				return NULL;
			} else {
				/* not needed unless the instruction reaches there: make_block will ask again */
				v->fault.error = error;
				v->fault.vector = vector;
				v->cr2 = cr2;
			}
		}
		fpu_park(v); /* Zydis and the C library use vector registers */
		switch (make_block(v, &first, &block)) {
		case MADE:
			return block;
		case MADE_SLOW:
			*slow = true;
			return NULL;
		case MADE_FAULT:
			return NULL;
		case MADE_AGAIN:
			flush_everything(v);
			break;
		}
	}
	*slow = true;
	return NULL;
}

struct bt_block *translate_stub(struct bt_vcpu *v, const struct bt_decoded *d, const uint8_t *bytes)
{
	struct bt_vm *vm = v->vm;
	struct bt_translation *t = vm->translation;
	struct insn *i = &t->insns[0];
	uint8_t *start;

	scope_lock(&vm->translate_lock);
	if (!begin_block(vm, t, v->mode & ~(uint32_t)BT_MODE_SINGLE))
		return NULL;
	memcpy(&i->d, d, sizeof(i->d));
	memcpy(i->bytes, bytes, 15);
	i->offset = 0;
	insn_classify(i, t->mode);
	i->kind = i->bits ? INSN_BITS : INSN_PLAIN;
	i->killed = 0; /* undefined flags are what the host makes of those before */
	i->live_before = i->live_after = FLAGS_ARITHMETIC;
	t->bounce = true;
	t->block->stub = true;
	while ((uintptr_t)t->e.p & 15)
		emit8(&t->e, 0xcc);
	start = t->e.p;
	t->block->entry_mem = t->block->entry_host = emit_here(&t->e);
	t->n = 0;
	t->state = FLAGS_MEM;
	memset(&t->side[0], 0, sizeof(t->side[0]));
	if (i->kind == INSN_BITS)
		emit_bits(t, i);
	else
		emit_plain(t, i);
	flags_save(t);
	emit_store_imm32(&t->e, V(exit_code), BT_EXIT_CODES);
	emit_jump(&t->e, vm->exit_mem);
	if (t->e.overflow)
		return NULL;
	t->block->sides = 1;
	t->block->side = cache_alloc(vm, sizeof(*t->block->side));
	if (!t->block->side)
		return NULL;
	*t->block->side = t->side[0];
	t->block->host_size = (uint32_t)(t->e.p - start);
	vm->code_used = (size_t)(t->e.p - vm->code_write);
	cache_add(vm, t->block, UINT64_MAX, UINT64_MAX);
	return t->block;
}

int translate_create(struct bt_vm *vm, struct error *err)
{
	vm->translation = calloc(1, sizeof(*vm->translation));
	if (!vm->translation)
		return error_set(err, ENOMEM, "no memory for the translator's tables");
	return 0;
}

void translate_destroy(struct bt_vm *vm)
{
	free(vm->translation);
}
