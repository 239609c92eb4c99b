/* What the translator must know of one guest instruction. */
#pragma once

#include "engine/bt/vcpu.h"

enum insn_kind {
	INSN_PLAIN,  /* runs as it is, with its memory operand re-addressed and r10, r11 stood in for */
	INSN_NOTHING,
	INSN_SYSTEM, /* system_execute */
	INSN_SLOW,   /* slow_execute */
	INSN_STRING, INSN_LEA, INSN_PUSH, INSN_POP, INSN_LEAVE, INSN_CALL, INSN_RET, INSN_JUMP, INSN_JCC, INSN_LOOP,
	INSN_CLI, INSN_STI, INSN_CLD, INSN_STD, INSN_SWAPGS, INSN_BITS, INSN_PUSHF, INSN_RDTSC, INSN_STAC, INSN_CLAC
};

struct insn {
	struct bt_decoded d;
	uint8_t bytes[15];
	bool too_long;	/* not decoded: more than 15 bytes */
	int32_t offset; /* from the start of the page */
	enum insn_kind kind;
	bool bits;	/* bt and its kin with a bit number that moves the address */
	uint32_t tested, killed, touched; /* flags: read; surely overwritten; perhaps written */
	uint32_t live_before, live_after;
	const ZydisDecodedOperand *memory; /* the explicit memory operand, or NULL */
};

/* Decodes from bytes (n of them are there); false: not an instruction, or longer than n (then *more is set). */
bool insn_decode(struct insn *i, uint32_t mode, const uint8_t *bytes, unsigned n, bool *more);
/* An exception that an x87 instruction left pending comes before the faults of the next one's operand (SDM volume 3, table
 * 6-2), but for the control instructions that do not wait. */
bool insn_waits_for_x87(const struct bt_decoded *d);
/* In 64-bit mode, a near branch whose operand-size prefix counts: AMD's cut rip to 16 bits. */
bool insn_is_narrow_branch(const ZydisDecodedInstruction *d, uint32_t mode);
/* The host's maker: what differs between makers and is not the model's to choose. */
bool host_is_amd(void);
/* Fills kind, flags and memory of a decoded instruction. */
void insn_classify(struct insn *i, uint32_t mode);
/* x87, MMX, SSE and above: what CR0.TS and CR0.EM hold off. */
bool insn_is_floating(const ZydisDecodedInstruction *d);
/* FXSAVE and the XSAVE family: whole images of that state (xsave.c). */
bool insn_moves_state(ZydisMnemonic m);
/* Arithmetic flags that code at bytes (n of them to the page's end) may read before it overwrites them. */
uint32_t insn_flags_live(const uint8_t *page, unsigned offset, uint32_t mode);

static inline bool reg_is_gpr(ZydisRegister reg)
{
	return reg >= ZYDIS_REGISTER_AL && reg <= ZYDIS_REGISTER_R15;
}

/* 0 to 15; high-byte registers give that of their parent. */
static inline unsigned reg_number(ZydisRegister reg)
{
	if (reg >= ZYDIS_REGISTER_AX && reg <= ZYDIS_REGISTER_R15W)
		return (unsigned)(reg - ZYDIS_REGISTER_AX);
	if (reg >= ZYDIS_REGISTER_EAX && reg <= ZYDIS_REGISTER_R15D)
		return (unsigned)(reg - ZYDIS_REGISTER_EAX);
	if (reg >= ZYDIS_REGISTER_RAX && reg <= ZYDIS_REGISTER_R15)
		return (unsigned)(reg - ZYDIS_REGISTER_RAX);
	if (reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH)
		return (unsigned)(reg - ZYDIS_REGISTER_AH);
	if (reg >= ZYDIS_REGISTER_SPL)
		return (unsigned)(reg - ZYDIS_REGISTER_SPL) + 4;
	return (unsigned)(reg - ZYDIS_REGISTER_AL);
}

static inline bool reg_is_high_byte(ZydisRegister reg)
{
	return reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH;
}
