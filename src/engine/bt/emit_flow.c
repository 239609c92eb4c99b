/* Ways out of a block, to another one or to C; instructions of the stack and of control flow. */
#include "engine/bt/translation.h"

/* ---- ways out ---- */

struct bt_site *new_site(struct bt_translation *t, int32_t offset)
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

/* A site at an instruction that C executes, with as much of its decoded form as there is. */
struct bt_site *new_decoded_site(struct bt_translation *t, const struct insn *i)
{
	size_t size = offsetof(struct bt_decoded, operands) +
		max((unsigned)i->d.insn.operand_count, 2u) * sizeof(i->d.operands[0]);
	struct bt_site *site = new_site(t, i->offset);
	struct bt_decoded *copy = cache_alloc(t->vm, size);

	if (!site || !copy) {
		t->e.overflow = 1;
		return NULL;
	}
	memcpy(copy, &i->d, size);
	site->decoded = copy;
	return site;
}

struct late *new_late(struct bt_translation *t)
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
void emit_system_exit(struct bt_translation *t, const struct insn *i, bool slow)
{
	struct bt_site *site = slow ? new_site(t, i->offset) : new_decoded_site(t, i);

	if (!site)
		return;
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
void emit_indirect(struct bt_translation *t, enum bt_set set)
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
void emit_far_goto(struct bt_translation *t, int64_t offset)
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

/* Goes to offset from the instruction at `from`; ends a path of the block. */
void emit_goto(struct bt_translation *t, int64_t offset, int32_t from, const uint8_t *page_bytes)
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

void emit_lates(struct bt_translation *t)
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

/* ---- instructions of the stack and of control flow ---- */

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
	emit_check(t, slot(t), true, false);
}

static void emit_move_rsp(struct bt_translation *t, int by)
{
	emit_lea(&t->e, t->code64, RSP, RSP, by);
}

void emit_push(struct bt_translation *t, struct insn *i)
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
	emit_check(t, slot(t), false, false);
}

void emit_pop(struct bt_translation *t, struct insn *i)
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

void emit_leave(struct bt_translation *t, struct insn *i)
{
	emit_pop_check(t, i, RBP);
	emit_lea(&t->e, t->code64, RSP, RBP, (int)slot(t));
	emit_slot(t, false, RBP, R10);
}

int64_t branch_target(const struct bt_translation *t, const struct insn *i)
{
	int64_t target = i->offset + i->d.insn.length + i->d.operands[0].imm.value.s;

	return t->code64 ? target : (int32_t)target;
}

/* r10 = the target of an indirect jump or call; may fault */
void emit_target(struct bt_translation *t, struct insn *i)
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

void emit_call(struct bt_translation *t, struct insn *i, const uint8_t *page)
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

void emit_ret(struct bt_translation *t, struct insn *i)
{
	int extra = i->d.operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? (int)(i->d.operands[0].imm.value.u & 0xffff) : 0;

	emit_pop_check(t, i, RSP);
	emit_slot(t, false, R10, R10);
	emit_move_rsp(t, (int)slot(t) + extra);
	emit_indirect(t, t->mode & BT_MODE_SET);
}

void emit_jcc_insn(struct bt_translation *t, struct insn *i, const uint8_t *page)
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
void emit_loop(struct bt_translation *t, struct insn *i, const uint8_t *page)
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
