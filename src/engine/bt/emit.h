/* Writing x86-64 machine code. Registers are numbers in encoding order; only the forms that the translator needs. All
 * vCPU fields are addressed as gs:[offset]. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "engine/bt/vcpu.h"

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 };

/* Condition codes as in the opcodes 0f 80 to 0f 8f */
enum { CC_O, CC_NO, CC_B, CC_AE, CC_E, CC_NE, CC_BE, CC_A, CC_S, CC_NS, CC_P, CC_NP, CC_L, CC_GE, CC_LE, CC_G };

/* Opcode extensions of 81 /n and 83 /n */
enum { ALU_ADD, ALU_OR, ALU_ADC, ALU_SBB, ALU_AND, ALU_SUB, ALU_XOR, ALU_CMP };

struct emitter {
	uint8_t *p;	  /* where the next byte goes (writable mapping) */
	uint8_t *end;	  /* nothing is written from here on; overflow is set instead */
	ptrdiff_t to_run; /* add to a writable address to get the executable one */
	int overflow;
};

#define V(field) ((uint32_t)offsetof(struct bt_vcpu, field))
#define V_GPR(n) ((uint32_t)(offsetof(struct bt_vcpu, gprs) + 8 * (n)))

static inline void emit8(struct emitter *e, uint8_t b)
{
	if (e->p < e->end)
		*e->p++ = b;
	else
		e->overflow = 1;
}

static inline void emit_bytes(struct emitter *e, const uint8_t *bytes, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		emit8(e, bytes[i]);
}

static inline void emit32(struct emitter *e, uint32_t v)
{
	for (int i = 0; i < 4; i++)
		emit8(e, (uint8_t)(v >> 8 * i));
}

static inline void emit64(struct emitter *e, uint64_t v)
{
	emit32(e, (uint32_t)v);
	emit32(e, (uint32_t)(v >> 32));
}

#define EMIT(e, ...)                                                                                                   \
	do {                                                                                                           \
		const uint8_t bytes_[] = { __VA_ARGS__ };                                                              \
		emit_bytes(e, bytes_, sizeof(bytes_));                                                                 \
	} while (0)

static inline const uint8_t *emit_here(const struct emitter *e)
{
	return e->p + e->to_run;
}

/* opcode with reg field and gs:[offset]; size 1, 2, 4, 8 */
static inline void emit_gs(struct emitter *e, unsigned size, uint8_t opcode, unsigned reg, uint32_t offset)
{
	uint8_t rex = 0x40 | (size == 8) << 3 | (reg >> 3) << 2;

	emit8(e, 0x65);
	if (size == 2)
		emit8(e, 0x66);
	if (rex != 0x40 || (size == 1 && reg >= 4))
		emit8(e, rex);
	EMIT(e, opcode, (reg & 7) << 3 | 4, 0x25);
	emit32(e, offset);
}

static inline void emit_load(struct emitter *e, unsigned reg, uint32_t offset)
{
	emit_gs(e, 8, 0x8b, reg, offset);
}

static inline void emit_load32(struct emitter *e, unsigned reg, uint32_t offset)
{
	emit_gs(e, 4, 0x8b, reg, offset);
}

static inline void emit_store(struct emitter *e, uint32_t offset, unsigned reg)
{
	emit_gs(e, 8, 0x89, reg, offset);
}

static inline void emit_store_imm8(struct emitter *e, uint32_t offset, uint8_t value)
{
	EMIT(e, 0x65, 0xc6, 0x04, 0x25);
	emit32(e, offset);
	emit8(e, value);
}

static inline void emit_store_imm32(struct emitter *e, uint32_t offset, uint32_t value)
{
	EMIT(e, 0x65, 0xc7, 0x04, 0x25);
	emit32(e, offset);
	emit32(e, value);
}

/* cmp byte gs:[offset], 0 */
static inline void emit_test_byte(struct emitter *e, uint32_t offset)
{
	EMIT(e, 0x65, 0x80, 0x3c, 0x25);
	emit32(e, offset);
	emit8(e, 0);
}

/* mov to, from (64 bits, or 32) */
static inline void emit_move(struct emitter *e, unsigned to, unsigned from)
{
	EMIT(e, 0x48 | (from >> 3) << 2 | to >> 3, 0x89, 0xc0 | (from & 7) << 3 | (to & 7));
}

static inline void emit_move32(struct emitter *e, unsigned to, unsigned from)
{
	EMIT(e, 0x40 | (from >> 3) << 2 | to >> 3, 0x89, 0xc0 | (from & 7) << 3 | (to & 7));
}

static inline void emit_imm64(struct emitter *e, unsigned reg, uint64_t value)
{
	if (value <= UINT32_MAX) {
		EMIT(e, 0x40 | reg >> 3, 0xb8 | (reg & 7));
		emit32(e, (uint32_t)value);
	} else if ((int64_t)value == (int32_t)value) {
		EMIT(e, 0x48 | reg >> 3, 0xc7, 0xc0 | (reg & 7));
		emit32(e, (uint32_t)value);
	} else {
		EMIT(e, 0x48 | reg >> 3, 0xb8 | (reg & 7));
		emit64(e, value);
	}
}

/* add/and/cmp ... reg, imm32 (sign extended), 64 bits */
static inline void emit_alu_imm(struct emitter *e, unsigned op, unsigned reg, int32_t value)
{
	if (value == (int8_t)value) {
		EMIT(e, 0x48 | reg >> 3, 0x83, 0xc0 | op << 3 | (reg & 7), (uint8_t)value);
	} else {
		EMIT(e, 0x48 | reg >> 3, 0x81, 0xc0 | op << 3 | (reg & 7));
		emit32(e, (uint32_t)value);
	}
}

/* lea reg, [base + disp] without touching flags; 32-bit result if wide is 0 */
static inline void emit_lea(struct emitter *e, int wide, unsigned reg, unsigned base, int32_t disp)
{
	EMIT(e, 0x40 | (wide ? 8 : 0) | (reg >> 3) << 2 | base >> 3, 0x8d);
	if (disp == (int8_t)disp) {
		emit8(e, 0x40 | (reg & 7) << 3 | (base & 7));
		if ((base & 7) == 4)
			emit8(e, 0x24);
		emit8(e, (uint8_t)disp);
	} else {
		emit8(e, 0x80 | (reg & 7) << 3 | (base & 7));
		if ((base & 7) == 4)
			emit8(e, 0x24);
		emit32(e, (uint32_t)disp);
	}
}

static inline void emit_rel32(struct emitter *e, const uint8_t *target)
{
	emit32(e, (uint32_t)(target - (emit_here(e) + 4)));
}

static inline void emit_jump(struct emitter *e, const uint8_t *target)
{
	emit8(e, 0xe9);
	emit_rel32(e, target);
}

static inline void emit_jcc(struct emitter *e, unsigned cc, const uint8_t *target)
{
	EMIT(e, 0x0f, 0x80 | cc);
	emit_rel32(e, target);
}

/* A jump forward whose target is not known yet: returns the place of its rel32. */
static inline uint8_t *emit_jcc_forward(struct emitter *e, unsigned cc)
{
	EMIT(e, 0x0f, 0x80 | cc);
	emit32(e, 0);
	return e->p - 4;
}

static inline uint8_t *emit_jump_forward(struct emitter *e)
{
	emit8(e, 0xe9);
	emit32(e, 0);
	return e->p - 4;
}

/* Lets the jump at `place` lead to the current position. */
static inline void emit_land(struct emitter *e, uint8_t *place)
{
	int32_t distance = (int32_t)(e->p - (place + 4));

	if (!e->overflow)
		memcpy(place, &distance, 4);
}
