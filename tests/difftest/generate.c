/* Cases: one instruction, or a block of several with jumps, calls and loops, and a state in which most of its memory
 * operands fall into the arena. */
#include <string.h>

#include "difftest.h"
#include "base/util.h"

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };

enum fixup_kind { FIXUP_RELATIVE, FIXUP_REGISTER, FIXUP_PATCH };
/* A branch whose target is chosen when the whole block is known. */
struct fixup {
	enum fixup_kind kind;
	unsigned instruction;
	unsigned at;   /* offset in code, register number or patch number */
	unsigned size; /* bytes of the displacement */
	int target;    /* instruction to go to, or -1 for any later one */
};

struct builder {
	const struct generator *g;
	struct rng rng;
	struct test_case *t;
	unsigned pinned; /* registers whose initial value makes some address right */
	unsigned dirty;	 /* registers that an earlier instruction has written */
	unsigned never;	 /* registers that must not be written (a loop's counter) */
	bool sequence;
	struct fixup fixups[CASE_INSTRUCTIONS];
	unsigned n_fixups;
	uint32_t barred; /* instructions that no branch may go to: it would jump over a loop's countdown */
	struct instruction current;
};

static int gpr_number(ZydisRegister reg)
{
	ZydisRegister wide = ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg);

	return ZydisRegisterGetClass(wide) == ZYDIS_REGCLASS_GPR64 ? ZydisRegisterGetId(wide) : -1;
}

static bool settable(const struct builder *b, int reg)
{
	return reg >= 0 && !((b->pinned | b->dirty) >> reg & 1);
}

static void set_register(struct builder *b, int reg, uint64_t value)
{
	b->t->state.gpr[reg] = value;
	b->pinned |= 1u << reg;
}

/* An address for an access of that many bytes. In a block, faults are rarer: they end it. */
static uint64_t pick_target(struct builder *b, unsigned size)
{
	struct rng *r = &b->rng;
	bool risky = !b->sequence || rng_chance(r, 8);
	unsigned kind = rng_below(r, risky ? 100 : 70);
	uint64_t near = rng_below(r, size + 16);
	uint64_t a;

	if (kind < 50)
		a = rng_below(r, 2 * PAGE_BYTES - size);
	else if (kind < 70)
		a = PAGE_BYTES - near;
	else if (kind < 80)
		a = 2 * PAGE_BYTES - near; /* into nothing */
	else if (kind < 83)
		a = 2 * PAGE_BYTES + rng_below(r, PAGE_BYTES);
	else if (kind < 88)
		a = 3 * PAGE_BYTES + rng_below(r, PAGE_BYTES); /* read only */
	else if (kind < 92)
		a = 4 * PAGE_BYTES - near; /* read only, then writable */
	else if (kind < 94)
		a = 0 - near; /* nothing, then writable */
	else if (kind < 97)
		a = ARENA_CODE_FIRST * PAGE_BYTES + rng_below(r, PAGE_BYTES);
	else if (kind < 98)
		return rng_next(r); /* mostly not canonical */
	else if (kind < 99)
		return rng_next(r) | 0xffff800000000000ull;
	else
		a = rng_below(r, ARENA_PAGES * PAGE_BYTES);
	if (rng_chance(r, 2) && kind < 50)
		a &= ~63ull;
	else if (rng_chance(r, 3))
		a &= ~15ull;
	return ARENA_BASE + a;
}

static struct patch *add_patch(struct builder *b, uint64_t address, const void *bytes, unsigned n)
{
	struct patch *p;

	if (b->t->patches == CASE_PATCHES)
		return NULL;
	p = &b->t->patch[b->t->patches++];
	p->address = address;
	p->length = n;
	memcpy(p->bytes, bytes, n);
	return p;
}

static uint64_t register_value(const struct builder *b, ZydisRegister reg)
{
	int n = gpr_number(reg);
	unsigned width = ZydisRegisterGetWidth(ZYDIS_MACHINE_MODE_LONG_64, reg);

	if (n < 0)
		return 0;
	return width == 64 ? b->t->state.gpr[n] : b->t->state.gpr[n] & ((1ull << width) - 1);
}

/* Vector register n full of small indices, whichever their element size. */
static void set_vector_index(struct builder *b, unsigned n)
{
	const struct xsave_layout *l = xsave_layout();
	uint8_t *x = b->t->state.xsave;
	uint64_t lanes[8];

	for (unsigned i = 0; i < 8; i++)
		lanes[i] = (int64_t)rng_below(&b->rng, 256) - 128;
	if (n < 16) {
		memcpy(x + 160 + 16 * n, lanes, 16);
		if (l->avx)
			memcpy(x + l->avx + 16 * n, lanes + 2, 16);
		if (l->zmm_high)
			memcpy(x + l->zmm_high + 32 * n, lanes + 4, 32);
	} else if (l->zmm_16) {
		memcpy(x + l->zmm_16 + 64 * (n - 16), lanes, 64);
	}
}

static uint64_t segment_base(const struct builder *b, ZydisRegister segment)
{
	return segment == ZYDIS_REGISTER_FS   ? b->t->state.fs_base
	       : segment == ZYDIS_REGISTER_GS ? b->t->state.gs_base
					      : 0;
}

static uint64_t effective_address(const struct builder *b, const ZydisDecodedOperand *o)
{
	uint64_t ea = o->mem.disp.value;

	if (o->mem.base == ZYDIS_REGISTER_RIP || o->mem.base == ZYDIS_REGISTER_EIP)
		ea += b->t->code_address + b->t->code_length + b->current.length;
	else if (o->mem.base != ZYDIS_REGISTER_NONE)
		ea += register_value(b, o->mem.base);
	if (o->mem.index != ZYDIS_REGISTER_NONE && o->mem.type != ZYDIS_MEMOP_TYPE_VSIB)
		ea += register_value(b, o->mem.index) * (o->mem.scale ? o->mem.scale : 1);
	if (b->current.info.address_width == 32)
		ea = (uint32_t)ea;
	return ea + segment_base(b, o->mem.segment);
}

/* Rewrites the displacement so that the operand's address moves by delta. */
static bool adjust_displacement(struct builder *b, uint64_t delta)
{
	struct instruction *i = &b->current;
	uint64_t value = i->info.raw.disp.value + delta;

	if (i->info.raw.disp.size == 64) {
		memcpy(i->bytes + i->info.raw.disp.offset, &value, 8);
	} else if (i->info.raw.disp.size == 32 && (i->info.address_width == 32 || (int64_t)value == (int32_t)value)) {
		memcpy(i->bytes + i->info.raw.disp.offset, &value, 4);
	} else {
		return false;
	}
	return instruction_decode(i);
}

/* Makes the operand's address `target`, by whatever may still be chosen. false: it stays where it is. */
static bool aim(struct builder *b, unsigned op, uint64_t target)
{
	const ZydisDecodedOperand *o = &b->current.ops[op];
	bool narrow = b->current.info.address_width == 32;
	int base = gpr_number(o->mem.base), index = gpr_number(o->mem.index);
	uint64_t delta;

	if (o->mem.type == ZYDIS_MEMOP_TYPE_VSIB)
		set_vector_index(b, ZydisRegisterGetId(o->mem.index));
	else if (settable(b, index) && index != base && o->mem.index >= ZYDIS_REGISTER_EAX && !rng_chance(&b->rng, 6))
		set_register(b, index, (int64_t)rng_below(&b->rng, 128) - 64);
	delta = target - effective_address(b, o);
	if (settable(b, base)) {
		uint64_t value = b->t->state.gpr[base] + delta;

		if (index == base && o->mem.type != ZYDIS_MEMOP_TYPE_VSIB) {
			unsigned factor = 1 + (o->mem.scale ? o->mem.scale : 1);

			value = (target - o->mem.disp.value - segment_base(b, o->mem.segment)) / factor;
		}
		if (narrow)
			value = (uint32_t)value | rng_next(&b->rng) << 32;
		set_register(b, base, value);
		if (index >= 0)
			b->pinned |= 1u << index;
		return true;
	}
	/* A fixed register, or none: the displacement can still move, if the register holds what it held at first. */
	if (base >= 0 && b->dirty >> base & 1)
		return false;
	if (index >= 0 && b->dirty >> index & 1)
		return false;
	if (adjust_displacement(b, delta))
		return true;
	if (settable(b, index) && o->mem.scale) {
		set_register(b, index, b->t->state.gpr[index] + (int64_t)delta / o->mem.scale);
		return true;
	}
	return false;
}

static bool in_arena(uint64_t address)
{
	return address - ARENA_BASE < 2 * PAGE_BYTES;
}

/* Memory whose contents must make sense for the instruction to do more than fault. */
static void prepare_contents(struct builder *b, uint64_t address)
{
	struct rng *r = &b->rng;
	uint32_t mxcsr = rng_chance(r, 4) ? rng_next(r) & 0xffff : 0x1f80 | (rng_next(r) & 0xe07f);
	uint16_t fcw = rng_chance(r, 4) ? rng_next(r) : 0x37f;
	uint64_t flags = (rng_next(r) & 0x240cd5) | 0x202;
	uint8_t header[64] = {0};

	switch (b->current.info.mnemonic) {
	case ZYDIS_MNEMONIC_LDMXCSR:
	case ZYDIS_MNEMONIC_VLDMXCSR:
		add_patch(b, address, &mxcsr, 4);
		break;
	case ZYDIS_MNEMONIC_FLDCW:
	case ZYDIS_MNEMONIC_FLDENV:
	case ZYDIS_MNEMONIC_FRSTOR:
		add_patch(b, address, &fcw, 2);
		break;
	case ZYDIS_MNEMONIC_FXRSTOR:
	case ZYDIS_MNEMONIC_FXRSTOR64:
		add_patch(b, address, &fcw, 2);
		add_patch(b, address + 24, &mxcsr, 4);
		break;
	case ZYDIS_MNEMONIC_XRSTOR:
	case ZYDIS_MNEMONIC_XRSTOR64:
		header[0] = rng_next(r) & xsave_layout()->xcr0;
		if (rng_chance(r, 16)) /* mostly refused */
			header[rng_below(r, 64)] = rng_next(r);
		add_patch(b, address, &fcw, 2);
		add_patch(b, address + 24, &mxcsr, 4);
		add_patch(b, address + 512, header, 64);
		break;
	case ZYDIS_MNEMONIC_POPF:
	case ZYDIS_MNEMONIC_POPFQ:
		if (rng_chance(r, 8))
			flags |= FLAG_TF;
		if (!rng_chance(r, 8))
			flags &= ~0x240000ull; /* AC, ID */
		add_patch(b, address, &flags, 8);
		break;
	default:
		break;
	}
}

/* Notes the bytes of an FPU image that hold instruction and data pointers (SDM volume 1, figures 8-9 to 8-12 and table
 * 13-1): offsets 12 to 27 of a 28-byte environment, 6 to 13 of a 14-byte one, 6 to 23 of an FXSAVE image. */
static void ignore_pointers(struct builder *b, uint64_t address, unsigned operand_bytes)
{
	bool small = operand_bytes == 14 || operand_bytes == 94;

	switch (b->current.info.mnemonic) {
	case ZYDIS_MNEMONIC_FNSTENV:
	case ZYDIS_MNEMONIC_FNSAVE:
		b->t->ignore_address = address + (small ? 6 : 12);
		b->t->ignore_length = small ? 8 : 16;
		break;
	case ZYDIS_MNEMONIC_FXSAVE:
	case ZYDIS_MNEMONIC_FXSAVE64:
	case ZYDIS_MNEMONIC_XSAVE:
	case ZYDIS_MNEMONIC_XSAVE64:
	case ZYDIS_MNEMONIC_XSAVEC:
	case ZYDIS_MNEMONIC_XSAVEC64:
	case ZYDIS_MNEMONIC_XSAVEOPT:
	case ZYDIS_MNEMONIC_XSAVEOPT64:
		b->t->ignore_address = address + 6;
		b->t->ignore_length = 18;
		break;
	default:
		break;
	}
}

/* Chooses addresses for every memory operand. false: not possible here, better another instruction. */
static bool prepare_memory(struct builder *b)
{
	for (unsigned i = 0; i < b->current.info.operand_count; i++) {
		const ZydisDecodedOperand *o = &b->current.ops[i];
		unsigned size = max(1, o->size / 8);
		bool stack = gpr_number(o->mem.base) == RSP && o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN;

		if (o->type != ZYDIS_OPERAND_TYPE_MEMORY || o->mem.type == ZYDIS_MEMOP_TYPE_AGEN)
			continue;
		if (!stack || !(b->dirty >> RSP & 1)) {
			bool aimed = !stack && aim(b, i, pick_target(b, min(size, 1024u)));

			if (!aimed && !stack && !rng_chance(&b->rng, 8) &&
				!(in_arena(effective_address(b, o)) &&
					!(gpr_number(o->mem.base) >= 0 && b->dirty >> gpr_number(o->mem.base) & 1)))
				return false;
		}
		prepare_contents(b, effective_address(b, &b->current.ops[i]));
		ignore_pointers(b, effective_address(b, &b->current.ops[i]), size);
	}
	if (b->current.info.mnemonic == ZYDIS_MNEMONIC_CLZERO && settable(b, RAX))
		set_register(b, RAX, pick_target(b, 64));
	return true;
}

/* Registers whose values decide whether the instruction does something interesting. */
static void prepare_values(struct builder *b)
{
	struct instruction *i = &b->current;
	struct rng *r = &b->rng;

	if (i->info.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE) &&
		settable(b, RCX)) {
		uint64_t count = rng_chance(r, 12) ? rng_below(r, 6000) : rng_below(r, 40);

		if (i->info.address_width == 32)
			count |= rng_next(r) << 32;
		set_register(b, RCX, count);
	}
	switch (i->info.mnemonic) {
	case ZYDIS_MNEMONIC_DIV:
	case ZYDIS_MNEMONIC_IDIV:
		if (settable(b, RDX) && rng_below(r, 4))
			b->t->state.gpr[RDX] =
				rng_chance(r, 2) ? rng_below(r, 16) : (uint64_t)((int64_t)b->t->state.gpr[RAX] >> 63);
		if (settable(b, RAX) && i->ops[0].size == 8 && rng_chance(r, 2))
			b->t->state.gpr[RAX] &= 0x3ff;
		break;
	case ZYDIS_MNEMONIC_BT:
	case ZYDIS_MNEMONIC_BTS:
	case ZYDIS_MNEMONIC_BTR:
	case ZYDIS_MNEMONIC_BTC:
		/* a register offset reaches any byte of memory */
		if (i->ops[1].type == ZYDIS_OPERAND_TYPE_REGISTER && settable(b, gpr_number(i->ops[1].reg.value)) &&
			!rng_chance(r, 6))
			set_register(b, gpr_number(i->ops[1].reg.value), (int64_t)rng_below(r, 4000) - 2000);
		break;
	case ZYDIS_MNEMONIC_CMPXCHG:
	case ZYDIS_MNEMONIC_CMPXCHG8B:
	case ZYDIS_MNEMONIC_CMPXCHG16B:
		/* zeros match the zero image */
		if (settable(b, RAX) && rng_chance(r, 2))
			b->t->state.gpr[RAX] = 0;
		if (settable(b, RDX) && rng_chance(r, 2))
			b->t->state.gpr[RDX] = 0;
		break;
	case ZYDIS_MNEMONIC_ENTER:
		if (!rng_chance(r, 8))
			i->bytes[i->info.raw.imm[0].offset + 1] = 0;
		i->bytes[i->info.raw.imm[1].offset] &= rng_chance(r, 2) ? 0 : 3;
		instruction_decode(i);
		break;
	default:
		break;
	}
}

static bool writes(const ZydisDecodedOperand *o)
{
	return o->type == ZYDIS_OPERAND_TYPE_REGISTER && o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
}

/* Would the instruction spoil what later or earlier ones rely on? */
static bool harmful(struct builder *b)
{
	for (unsigned i = 0; i < b->current.info.operand_count; i++) {
		const ZydisDecodedOperand *o = &b->current.ops[i];
		int n = writes(o) ? gpr_number(o->reg.value) : -1;

		if (n < 0)
			continue;
		if (b->never >> n & 1)
			return true;
		if (b->sequence && b->pinned >> n & 1 && o->visibility != ZYDIS_OPERAND_VISIBILITY_HIDDEN &&
			!rng_chance(&b->rng, 8))
			return true;
	}
	return false;
}

static void note_writes(struct builder *b)
{
	for (unsigned i = 0; i < b->current.info.operand_count; i++) {
		const ZydisDecodedOperand *o = &b->current.ops[i];
		int n = writes(o) ? gpr_number(o->reg.value) : -1;

		/* stack and string instructions move their registers only a little */
		if (n >= 0 && !(o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN && (n == RSP || n == RSI || n == RDI)))
			b->dirty |= 1u << n;
	}
}

static void append(struct builder *b, uint32_t form)
{
	struct test_case *t = b->t;

	t->offset[t->instructions] = t->code_length;
	t->form[t->instructions++] = form;
	memcpy(t->code + t->code_length, b->current.bytes, b->current.length);
	t->code_length += b->current.length;
}

static struct fixup *add_fixup(struct builder *b, enum fixup_kind kind, unsigned at, unsigned size)
{
	struct fixup *f = &b->fixups[b->n_fixups++];

	*f = (struct fixup){kind, b->t->instructions, at, size, -1};
	return f;
}

static void prepare_branch(struct builder *b)
{
	struct instruction *i = &b->current;
	const ZydisDecodedOperand *o = &i->ops[0];
	uint64_t zero = 0;

	if (i->info.raw.imm[0].is_relative) {
		add_fixup(
			b, FIXUP_RELATIVE, b->t->code_length + i->info.raw.imm[0].offset, i->info.raw.imm[0].size / 8);
		return;
	}
	if (i->info.meta.category == ZYDIS_CATEGORY_RET) {
		if (!(b->dirty >> RSP & 1) && add_patch(b, b->t->state.gpr[RSP], &zero, 8))
			add_fixup(b, FIXUP_PATCH, b->t->patches - 1, 8);
	} else if (o->type == ZYDIS_OPERAND_TYPE_REGISTER) {
		if (settable(b, gpr_number(o->reg.value))) {
			set_register(b, gpr_number(o->reg.value), 0);
			add_fixup(b, FIXUP_REGISTER, gpr_number(o->reg.value), 8);
		}
	} else if (o->type == ZYDIS_OPERAND_TYPE_MEMORY && add_patch(b, effective_address(b, o), &zero, 8)) {
		add_fixup(b, FIXUP_PATCH, b->t->patches - 1, 8);
	}
}

static size_t pick_form(struct builder *b)
{
	const struct generator *g = b->g;

	if (!g->filter && g->forms->general_count && rng_below(&b->rng, 5) < (b->sequence ? 3u : 2u))
		return g->forms->general[rng_below(&b->rng, g->forms->general_count)];
	return g->chosen[rng_below(&b->rng, g->chosen_count)];
}

/* A base register for the next memory operand: in blocks often one that an earlier operand used, as compilers do and as
 * translators exploit. */
static int pick_base(struct builder *b)
{
	unsigned candidates = b->pinned & ~b->dirty & ~b->never;
	unsigned start = rng_below(&b->rng, 16);

	if (!b->sequence || rng_chance(&b->rng, 2))
		return -1;
	for (unsigned i = 0; i < 16; i++)
		if (candidates >> (start + i) % 16 & 1)
			return (start + i) % 16;
	return -1;
}

/* Spoils the instruction: what must raise #UD, or #GP for its length. */
static void make_illegal(struct builder *b)
{
	static const uint8_t no_opcodes[] = {0x06, 0x07, 0x0e, 0x16, 0x17, 0x1e, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x60,
		0x61, 0x82, 0x9a, 0xce, 0xd4, 0xd6, 0xea};
	static const uint8_t vex_prefixes[] = {0xf0, 0x66, 0xf2, 0xf3, 0x48};
	struct instruction *i = &b->current;
	const struct form *f = i->form;
	unsigned pad = 16 - i->length;

	switch (rng_below(&b->rng, 3)) {
	case 0: /* sixteen bytes, by prefixes that are legal in themselves */
		memmove(i->bytes + pad, i->bytes, i->length);
		memset(i->bytes, 0x2e, pad);
		i->length = 16;
		return;
	case 1:
		i->bytes[0] = no_opcodes[rng_below(&b->rng, sizeof(no_opcodes))];
		return;
	default:
		/* lock and mov to or from a control register: AMD's way to name cr8 */
		if ((f->encoding == FORM_LEGACY && f->may_lock) || f->privileged || i->length == 15)
			return;
		memmove(i->bytes + 1, i->bytes, i->length);
		i->bytes[0] =
			f->encoding == FORM_LEGACY ? 0xf0 : vex_prefixes[rng_below(&b->rng, sizeof(vex_prefixes))];
		i->length++;
	}
}

/* These write which components are in use, and of those that have their initial values that is the processor's to say. */
static bool shows_use(ZydisMnemonic m)
{
	return m == ZYDIS_MNEMONIC_XSAVE || m == ZYDIS_MNEMONIC_XSAVE64 || m == ZYDIS_MNEMONIC_XSAVEC || m == ZYDIS_MNEMONIC_XSAVEC64 || m == ZYDIS_MNEMONIC_XSAVEOPT ||
	       m == ZYDIS_MNEMONIC_XSAVEOPT64;
}

/* One random instruction; last says that it is the block's last. */
static void add_random(struct builder *b, bool last)
{
	for (unsigned attempt = 0; attempt < 40; attempt++) {
		size_t n = pick_form(b);
		const struct form *f = &b->g->forms->list[n];
		unsigned pinned = b->pinned, patches = b->t->patches;
		uint64_t gpr[16];

		if (b->t->ring0 && (f->privileged || f->popf))
			continue;
		if (b->sequence && !last && (f->image || f->privileged))
			continue;
		if (b->sequence && shows_use(f->mnemonic))
			continue;
		if (!form_encode(f, &b->rng, pick_base(b), &b->current) || harmful(b))
			continue;
		memcpy(gpr, b->t->state.gpr, sizeof(gpr));
		prepare_values(b);
		if (!prepare_memory(b)) {
			b->pinned = pinned;
			b->t->patches = patches;
			memcpy(b->t->state.gpr, gpr, sizeof(gpr));
			continue;
		}
		if (last && !f->control_flow && b->t->code_address + b->t->code_length + 16 <= CODE_END &&
			rng_chance(&b->rng, 100))
			make_illegal(b);
		if (f->control_flow)
			prepare_branch(b);
		note_writes(b);
		append(b, n);
		return;
	}
}

static void add_bytes(struct builder *b, const void *bytes, unsigned n)
{
	memcpy(b->current.bytes, bytes, n);
	b->current.length = n;
	append(b, UINT32_MAX);
}

/* counter = 1..4; body; dec counter; jnz body (or loop body) */
static void add_loop(struct builder *b)
{
	unsigned reg = rng_chance(&b->rng, 3) ? RCX : rng_below(&b->rng, 16);
	unsigned first = b->t->instructions, body = 1 + rng_below(&b->rng, 3);
	bool use_loop = reg == RCX && rng_chance(&b->rng, 2);
	struct fixup *f;

	if (!settable(b, reg))
		return;
	set_register(b, reg, 1 + rng_below(&b->rng, 4));
	b->never |= 1u << reg;
	for (unsigned i = 0; i < body; i++)
		add_random(b, false);
	if (!use_loop)
		add_bytes(b, (uint8_t[]){0x48 | (reg >> 3), 0xff, 0xc8 | (reg & 7)}, 3);
	f = add_fixup(b, FIXUP_RELATIVE, b->t->code_length + 1, 1);
	f->target = first;
	if (!use_loop)
		b->barred |= 1u << b->t->instructions;
	/* too far for a short jump: the fixup then falls through to the end */
	add_bytes(b, (uint8_t[]){use_loop ? 0xe2 : 0x75, 0}, 2);
	b->never &= ~(1u << reg);
	b->dirty |= 1u << reg;
}

/* call f; some; jmp end; f: some; ret */
static void add_call(struct builder *b)
{
	unsigned call_fixup = b->n_fixups, jump_fixup;

	add_fixup(b, FIXUP_RELATIVE, b->t->code_length + 1, 4);
	add_bytes(b, (uint8_t[]){0xe8, 0, 0, 0, 0}, 5);
	if (rng_chance(&b->rng, 2))
		add_random(b, false);
	jump_fixup = b->n_fixups;
	add_fixup(b, FIXUP_RELATIVE, b->t->code_length + 1, 4);
	add_bytes(b, (uint8_t[]){0xe9, 0, 0, 0, 0}, 5);
	b->fixups[call_fixup].target = b->t->instructions;
	for (unsigned i = rng_below(&b->rng, 3); i; i--)
		add_random(b, false);
	add_bytes(b, (uint8_t[]){0xc3}, 1);
	b->fixups[jump_fixup].target = b->t->instructions;
}

static uint64_t boundary(const struct test_case *t, unsigned instruction, unsigned end)
{
	return t->code_address + (instruction < t->instructions ? t->offset[instruction] : end);
}

static void put_relative(struct test_case *t, const struct fixup *f, uint64_t target)
{
	/* the displacement is the last thing in the instruction */
	int64_t value = target - (t->code_address + f->at + f->size);

	memcpy(t->code + f->at, &value, f->size);
}

static bool reachable(const struct test_case *t, const struct fixup *f, uint64_t target)
{
	int64_t value = target - (t->code_address + f->at + f->size);

	return f->kind != FIXUP_RELATIVE || f->size > 1 || value == (int8_t)value;
}

/* Somewhere outside the block: int3 there, or no page at all. Never into the block: it would loop or land inside an
 * instruction. */
static uint64_t outside_target(struct builder *b, const struct fixup *f)
{
	struct test_case *t = b->t;

	for (unsigned i = 0; i < 8; i++) {
		uint64_t a = f->size == 1 ? t->code_address + f->at + 1 - rng_below(&b->rng, 129)
					  : CODE_BASE - 16 + rng_below(&b->rng, CODE_END - CODE_BASE + 32);

		if (f->kind != FIXUP_RELATIVE && rng_chance(&b->rng, 16))
			a = pick_target(b, 1); /* not executable, not present, not canonical */
		if (a < t->code_address || a >= t->code_address + sizeof(t->code))
			return a;
	}
	return t->code_address + t->code_length;
}

/* The address of any instruction after the branch, or of the block's end. */
static uint64_t later_boundary(struct builder *b, const struct fixup *f, unsigned end)
{
	unsigned n = f->instruction + 1 + rng_below(&b->rng, b->t->instructions - f->instruction);

	if (b->barred >> n & 1)
		n--; /* the countdown itself, or the branch's own successor */
	return boundary(b->t, n, end);
}

static void resolve(struct builder *b, const struct fixup *f, unsigned end)
{
	struct test_case *t = b->t;
	uint64_t target;

	if (f->target >= 0)
		target = boundary(t, f->target, end);
	else if (rng_chance(&b->rng, b->sequence ? 8 : 2))
		target = outside_target(b, f);
	else
		target = later_boundary(b, f, end);
	if (!reachable(t, f, target)) /* the next instruction always is */
		target = boundary(t, f->instruction + 1, end);
	if (f->kind == FIXUP_RELATIVE)
		put_relative(t, f, target);
	else if (f->kind == FIXUP_REGISTER)
		t->state.gpr[f->at] = target;
	else
		memcpy(t->patch[f->at].bytes, &target, 8);
}

static uint64_t pick_code_address(struct builder *b)
{
	struct rng *r = &b->rng;
	unsigned length = b->sequence ? 60 : 15;

	switch (rng_below(r, 16)) {
	case 0: /* runs off the last page */
		return CODE_END - 1 - rng_below(r, length);
	case 1 ... 6: /* across the two pages */
		return CODE_BASE + PAGE_BYTES - 1 - rng_below(r, length);
	default:
		return CODE_BASE + rng_below(r, CODE_END - CODE_BASE - sizeof(b->t->code));
	}
}

void generate_case(const struct generator *g, uint64_t number, struct test_case *t)
{
	struct builder b = {.g = g, .t = t};
	struct rng *r = &b.rng;
	unsigned end;

	rng_seed(r, g->seed, number);
	t->number = number;
	t->code_length = t->instructions = t->patches = 0;
	t->ignore_length = 0;
	t->ring0 = rng_chance(r, 8);
	t->image = rng_below(r, BACKGROUND_IMAGES);
	b.sequence = !g->single && rng_chance(r, 2);
	state_randomize(&t->state, r);
	t->code_address = t->state.rip = pick_code_address(&b);
	if (!rng_chance(r, 10))
		set_register(&b, RSP,
			ARENA_BASE + 256 + (rng_below(r, 2 * PAGE_BYTES - 512) & (rng_chance(r, 8) ? ~0ull : ~7ull)));
	else
		set_register(&b, RSP, rng_chance(r, 2) ? pick_target(&b, 8) : t->state.gpr[RSP]);
	if (!b.sequence) {
		add_random(&b, true);
	} else {
		for (unsigned n = 2 + rng_below(r, 5); n && t->instructions < CASE_INSTRUCTIONS - 10; n--) {
			unsigned kind = rng_below(r, 24);

			if (kind == 0)
				add_loop(&b);
			else if (kind == 1)
				add_call(&b);
			else
				add_random(&b, n == 1);
		}
	}
	end = t->code_length;
	if (rng_chance(r, 4)) {
		t->code[t->code_length++] = 0x0f; /* ud2 */
		t->code[t->code_length++] = 0x0b;
	} else {
		t->code[t->code_length++] = 0xcc;
	}
	for (unsigned i = 0; i < b.n_fixups; i++)
		resolve(&b, &b.fixups[i], end);
}
