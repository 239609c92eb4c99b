/* String instructions, page by page (SDM volume 2: MOVS, STOS, LODS, CMPS, SCAS, REP). An interrupt ends a repetition
 * between elements, with the registers as they are then. */
#include "engine/bt/bt.h"

struct string {
	struct bt_vcpu *v;
	unsigned size;
	uint64_t mask; /* of the address size */
	uint64_t source_base, destination_base;
	bool user, back, repeat, repeat_while_equal;
	uint64_t count;
};

static uint64_t get(const struct string *s, unsigned reg)
{
	return s->v->gprs[reg] & s->mask;
}

static void set(struct string *s, unsigned reg, uint64_t value)
{
	uint64_t *r = &s->v->gprs[reg];

	*r = s->mask == 0xffff ? (*r & ~0xffffull) | (value & 0xffff) : value & s->mask;
}

static uint64_t linear_source(const struct string *s)
{
	uint64_t a = s->source_base + get(s, 6);

	return (s->v->mode & BT_MODE_CODE) == BT_MODE_CODE64 ? a : (uint32_t)a;
}

static uint64_t linear_destination(const struct string *s)
{
	uint64_t a = s->destination_base + get(s, 7);

	return (s->v->mode & BT_MODE_CODE) == BT_MODE_CODE64 ? a : (uint32_t)a;
}

static void advance(struct string *s, unsigned reg, uint64_t elements)
{
	uint64_t by = elements * s->size;

	set(s, reg, s->back ? get(s, reg) - by : get(s, reg) + by);
}

static void count_down(struct string *s, uint64_t elements)
{
	if (s->repeat) {
		s->count -= elements;
		set(s, 1, s->count);
	}
}

/* Elements that fit between a linear address and its page's end, without wrapping the address register. */
static uint64_t fit(const struct string *s, unsigned reg, uint64_t linear)
{
	uint64_t room = (BT_PAGE_SIZE - (linear & 0xfff)) / s->size, wrap = (s->mask - get(s, reg)) / s->size;

	return min(room, wrap);
}

static void compare(struct bt_vcpu *v, uint64_t a, uint64_t b, unsigned size)
{
	unsigned shift = 64 - 8 * size;
	uint64_t flags;

	__asm__("cmp %2, %1; pushfq; pop %0" : "=r"(flags) : "r"(a << shift), "r"(b << shift) : "cc");
	/* The shifted operands give all but PF and AF right; those come from the low bits. */
	flags &= ~(uint64_t)(FLAG_PF | FLAG_AF);
	if (!(__builtin_popcount((uint8_t)(a - b)) & 1))
		flags |= FLAG_PF;
	if ((a & 15) < (b & 15))
		flags |= FLAG_AF;
	v->arith = (uint16_t)(((flags & 0xd5) | 2) << 8 | ((flags >> 11) & 1));
}

/* One element, by the general way. */
static int one(struct string *s, ZydisMnemonic kind)
{
	struct bt_vcpu *v = s->v;
	uint64_t a = 0, b = 0;

	switch (kind) {
	case ZYDIS_MNEMONIC_MOVSB:
		if (bt_read_linear(v, linear_source(s), &a, s->size, s->user) ||
			bt_write_linear(v, linear_destination(s), &a, s->size, s->user))
			return BT_FAULT;
		advance(s, 6, 1);
		advance(s, 7, 1);
		return 0;
	case ZYDIS_MNEMONIC_STOSB:
		a = v->gprs[0];
		if (bt_write_linear(v, linear_destination(s), &a, s->size, s->user))
			return BT_FAULT;
		advance(s, 7, 1);
		return 0;
	case ZYDIS_MNEMONIC_LODSB:
		if (bt_read_linear(v, linear_source(s), &a, s->size, s->user))
			return BT_FAULT;
		if (s->size >= 4)
			v->gprs[0] = a;
		else
			v->gprs[0] = (v->gprs[0] & ~((1ull << 8 * s->size) - 1)) | a;
		advance(s, 6, 1);
		return 0;
	case ZYDIS_MNEMONIC_CMPSB:
		if (bt_read_linear(v, linear_source(s), &a, s->size, s->user) ||
			bt_read_linear(v, linear_destination(s), &b, s->size, s->user))
			return BT_FAULT;
		advance(s, 6, 1);
		advance(s, 7, 1);
		compare(v, a, b, s->size);
		return 0;
	default:
		a = v->gprs[0];
		if (bt_read_linear(v, linear_destination(s), &b, s->size, s->user))
			return BT_FAULT;
		advance(s, 7, 1);
		compare(v, a, b, s->size);
		return 0;
	}
}

static void native_move(uint8_t *to, const uint8_t *from, uint64_t n, unsigned size)
{
	switch (size) {
	case 1: __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory"); break;
	case 2: __asm__ volatile("rep movsw" : "+D"(to), "+S"(from), "+c"(n)::"memory"); break;
	case 4: __asm__ volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(n)::"memory"); break;
	default: __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(n)::"memory"); break;
	}
}

static void native_store(uint8_t *to, uint64_t value, uint64_t n, unsigned size)
{
	switch (size) {
	case 1: __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory"); break;
	case 2: __asm__ volatile("rep stosw" : "+D"(to), "+c"(n) : "a"(value) : "memory"); break;
	case 4: __asm__ volatile("rep stosl" : "+D"(to), "+c"(n) : "a"(value) : "memory"); break;
	default: __asm__ volatile("rep stosq" : "+D"(to), "+c"(n) : "a"(value) : "memory"); break;
	}
}

/* The host address of a linear one, through the TLB; NULL: do it one by one (which raises what is to be raised). */
static uint8_t *host_of(struct string *s, uint64_t linear, bool write, uint64_t *code_index)
{
	enum bt_set which = s->v->mode & BT_MODE_SET;
	struct tlb_entry *e = &s->v->tlb[which][(linear >> 12) & (BT_TLB_ENTRIES - 1)];
	uint8_t *page;
	bool fault;

	*code_index = UINT64_MAX;
	if ((write ? e->write : e->read) == (linear & ~0xfffull))
		return (uint8_t *)(uintptr_t)e->addend + (linear & 0xfff);
	page = tlb_fill(s->v, which, linear, write, &fault);
	if (!page && !fault && write)
		page = tlb_host_page(s->v, linear, true, s->user, code_index, &fault);
	return page ? page + (linear & 0xfff) : NULL;
}

/* As many elements of MOVS or STOS as fit in the current pages; 0: none could be done this way. */
static uint64_t bulk(struct string *s, ZydisMnemonic kind)
{
	uint64_t to_linear = linear_destination(s), from_linear = linear_source(s), n, index, unused;
	uint8_t *to, *from = NULL;

	if (s->back || !s->repeat || s->v->eflags & FLAG_TF)
		return 0;
	n = min(s->count, fit(s, 7, to_linear));
	if (kind == ZYDIS_MNEMONIC_MOVSB)
		n = min(n, fit(s, 6, from_linear));
	if (!n)
		return 0;
	if (kind == ZYDIS_MNEMONIC_MOVSB) {
		from = host_of(s, from_linear, false, &unused);
		if (!from)
			return 0;
	}
	to = host_of(s, to_linear, true, &index);
	if (!to)
		return 0;
	if (from)
		native_move(to, from, n, s->size);
	else
		native_store(to, s->v->gprs[0], n, s->size);
	if (index != UINT64_MAX)
		cache_page_written(s->v, index, (unsigned)(to_linear & 0xfff), (unsigned)(n * s->size));
	advance(s, 7, n);
	if (from)
		advance(s, 6, n);
	return n;
}

/* All sizes of an instruction under the name of its byte form. */
static ZydisMnemonic family(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_MOVSB:
	case ZYDIS_MNEMONIC_MOVSW:
	case ZYDIS_MNEMONIC_MOVSD:
	case ZYDIS_MNEMONIC_MOVSQ: return ZYDIS_MNEMONIC_MOVSB;
	case ZYDIS_MNEMONIC_STOSB:
	case ZYDIS_MNEMONIC_STOSW:
	case ZYDIS_MNEMONIC_STOSD:
	case ZYDIS_MNEMONIC_STOSQ: return ZYDIS_MNEMONIC_STOSB;
	case ZYDIS_MNEMONIC_LODSB:
	case ZYDIS_MNEMONIC_LODSW:
	case ZYDIS_MNEMONIC_LODSD:
	case ZYDIS_MNEMONIC_LODSQ: return ZYDIS_MNEMONIC_LODSB;
	case ZYDIS_MNEMONIC_CMPSB:
	case ZYDIS_MNEMONIC_CMPSW:
	case ZYDIS_MNEMONIC_CMPSD:
	case ZYDIS_MNEMONIC_CMPSQ: return ZYDIS_MNEMONIC_CMPSB;
	default: return ZYDIS_MNEMONIC_SCASB;
	}
}

uint64_t bt_string(struct bt_vcpu *v, const struct bt_site *site)
{
	uint64_t generation = v->vm->generation, rip = v->page + (uint64_t)(int64_t)site->offset;
	const struct bt_decoded *d = site->decoded;

	v->rip = rip;
	if (string_execute(v, d) == SYSTEM_FAULT) {
		v->exit_code = BT_EXIT_FAULT;
		return 0;
	}
	/* A store may have dropped the very block that called; an interrupt may want to come between two elements. */
	v->exit_code = BT_EXIT_LOOKUP;
	if (v->rip == rip || generation != v->vm->generation)
		return 0;
	fpu_unpark(v); /* a device may have been among the operands */
	return 1;
}

enum system_result string_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	ZydisMnemonic kind = family(d->insn.mnemonic);
	bool compares = kind == ZYDIS_MNEMONIC_CMPSB || kind == ZYDIS_MNEMONIC_SCASB;
	bool code64 = (v->mode & BT_MODE_CODE) == BT_MODE_CODE64;
	struct string s = { .v = v, .size = d->insn.operand_width / 8u,
		.mask = d->insn.address_width == 64 ? UINT64_MAX : d->insn.address_width == 32 ? UINT32_MAX : 0xffff,
		.user = (v->mode & BT_MODE_SET) == BT_SET_USER, .back = v->dflag };

	v->private->statistics[STAT_STRING]++;
	for (unsigned k = 0; k < d->insn.operand_count; k++) {
		const ZydisDecodedOperand *op = &d->operands[k];

		if (op->type != ZYDIS_OPERAND_TYPE_MEMORY)
			continue;
		s.size = op->size / 8u;
		if (op->mem.base == ZYDIS_REGISTER_RSI || op->mem.base == ZYDIS_REGISTER_ESI ||
			op->mem.base == ZYDIS_REGISTER_SI) {
			if (op->mem.segment == ZYDIS_REGISTER_FS)
				s.source_base = v->fs_base;
			else if (op->mem.segment == ZYDIS_REGISTER_GS)
				s.source_base = v->gs_base;
			else if (!code64)
				s.source_base = v->segments[op->mem.segment - ZYDIS_REGISTER_ES].base;
		}
	}
	if (!code64)
		s.destination_base = v->segments[ENGINE_ES].base;
	s.repeat = d->insn.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE);
	s.repeat_while_equal = !(d->insn.attributes & ZYDIS_ATTRIB_HAS_REPNE);
	s.count = s.repeat ? get(&s, 1) : 1;
	while (s.count) {
		uint64_t n = kind == ZYDIS_MNEMONIC_MOVSB || kind == ZYDIS_MNEMONIC_STOSB ? bulk(&s, kind) : 0;

		if (!n) {
			if (one(&s, kind))
				return SYSTEM_FAULT;
			n = 1;
		}
		if (!s.repeat)
			break;
		count_down(&s, n);
		if (compares && s.repeat_while_equal != !!(v->arith & FLAG_ZF << 8))
			break;
		if (s.count && (v->kick || v->eflags & FLAG_TF))
			return SYSTEM_DONE; /* rip stays: the rest comes after the interrupt, or the single-step trap */
	}
	v->rip += d->insn.length;
	return SYSTEM_DONE;
}
