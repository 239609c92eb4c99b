/* What the files that make host code of a block share: translate.c decodes it and has it written, one instruction after
 * the other, by emit_insn.c (single instructions), emit_flow.c (stack, jumps, calls, ways out) and emit_memory.c
 * (flags, addresses, the check of an access). The host's instructions themselves are in emit.h. */
#pragma once

#include "engine/bt/bt.h"
#include "engine/bt/insn.h"

/* Where the guest's arithmetic flags are while a block is written. */
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

static inline bool in_page(int64_t offset)
{
	return offset >= 0 && offset < (int64_t)BT_PAGE_SIZE;
}

/* ---- emit_memory.c: flags ---- */
/* If the flags are in the host's only: in memory too. */
void flags_save(struct bt_translation *t);
/* The host's flags are about to be destroyed; `live` ones must survive in memory. */
void flags_clobber(struct bt_translation *t, uint32_t live);
/* Brings the flags back into the host's, through a free scratch register. */
void flags_restore(struct bt_translation *t, unsigned temporary);
void emit_restore(struct emitter *e, unsigned temporary);

/* ---- emit_memory.c: accesses ---- */
/* r10 = linear address of the memory operand; flags are destroyed. */
void emit_address(struct bt_translation *t, const struct insn *i, const ZydisDecodedOperand *op);
/* r10: linear address in, host address out; `live` flags survive in memory. Uses r11. */
void emit_check(struct bt_translation *t, unsigned bytes, bool write, bool masked);
/* Both for an instruction's memory operand, or its bounce buffer: the host address is in r10. */
void emit_operand(struct bt_translation *t, const struct insn *i, const ZydisDecodedOperand *op);

/* ---- emit_flow.c: ways out of a block ---- */
/* NULL (or a spare one): no room, the overflow is noted and the block will be discarded. */
struct bt_site *new_site(struct bt_translation *t, int32_t offset);
struct bt_site *new_decoded_site(struct bt_translation *t, const struct insn *i);
struct late *new_late(struct bt_translation *t);
/* Leaves for C to execute the instruction there; all flags must be right in memory. */
void emit_system_exit(struct bt_translation *t, const struct insn *i, bool slow);
/* r10 holds the target pc, flags are in memory (or dead). Look it up in the jump cache of `set` and go there. */
void emit_indirect(struct bt_translation *t, enum bt_set set);
/* Goes to the instruction at offset (from the page's start): by way of the jump cache; or, linked if possible, from the
 * instruction at `from`. Both end a path of the block. */
void emit_far_goto(struct bt_translation *t, int64_t offset);
void emit_goto(struct bt_translation *t, int64_t offset, int32_t from, const uint8_t *page_bytes);
/* The code out of line, behind the block's body. */
void emit_lates(struct bt_translation *t);

/* ---- emit_flow.c: instructions; page: the guest page's bytes, to see which flags the target needs ---- */
void emit_push(struct bt_translation *t, struct insn *i);
void emit_pop(struct bt_translation *t, struct insn *i);
void emit_leave(struct bt_translation *t, struct insn *i);
void emit_call(struct bt_translation *t, struct insn *i, const uint8_t *page);
void emit_ret(struct bt_translation *t, struct insn *i);
void emit_jcc_insn(struct bt_translation *t, struct insn *i, const uint8_t *page);
void emit_loop(struct bt_translation *t, struct insn *i, const uint8_t *page);
/* r10 = the target of an indirect jump or call; may fault */
void emit_target(struct bt_translation *t, struct insn *i);
/* Of a direct branch, from the page's start. */
int64_t branch_target(const struct bt_translation *t, const struct insn *i);

/* ---- emit_insn.c ---- */
/* The host code of one instruction; false: the block ends here. */
bool emit_insn(struct bt_translation *t, struct insn *i, const uint8_t *page);
void emit_plain(struct bt_translation *t, struct insn *i);
void emit_bits(struct bt_translation *t, struct insn *i);
