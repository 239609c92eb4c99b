/* One instruction at a time, for what translated code hands over: accesses that cross pages, go to devices or to pages
 * with code; 16-bit and segmented code; rare instructions. Control flow and stack instructions are done in C (flow.c);
 * everything else runs as it is, on the host CPU, with its memory operand in a bounce buffer (or in guest memory). */
#include <stdlib.h>

#include "engine/bt/slow.h"

#define SLOW_ENTRIES 128

struct bt_slow_cache {
	struct slow_entry entries[SLOW_ENTRIES];
	struct slow_entry once; /* for instructions that are not to be kept */
};

int slow_create(struct bt_vcpu *v)
{
	v->private->slow_cache = calloc(1, sizeof(*v->private->slow_cache));
	return v->private->slow_cache ? 0 : -ENOMEM;
}

void slow_destroy(struct bt_vcpu *v)
{
	free(v->private->slow_cache);
}

/* ---- running an instruction as it is ---- */

struct bt_block *slow_stub(struct bt_vcpu *v, struct slow_entry *e, const struct bt_decoded *d, const uint8_t *bytes)
{
	if (e->stub && e->flushes == v->vm->flushes)
		return e->stub;
	for (int tries = 0; tries < 2; tries++) {
		fpu_park(v);
		e->stub = translate_stub(v, d, bytes);
		e->flushes = v->vm->flushes;
		if (e->stub)
			return e->stub;
		exclusive_begin(v);
		cache_flush(v->vm);
		exclusive_end(v);
	}
	return NULL;
}

/* Runs the stub; its memory operand is at `memory`. BT_FAULT: the instruction itself faulted. */
int slow_run_stub(struct bt_vcpu *v, const struct bt_block *stub, void *memory)
{
	v->bounce[0] = (uint64_t)(uintptr_t)memory;
	fpu_unpark(v);
	v->vm->enter(v, stub->entry_mem);
	return v->exit_code == BT_EXIT_FAULT ? BT_FAULT : 0;
}

struct piece {
	uint8_t *host; /* NULL: a device's */
	uint64_t gpa, index;
	unsigned size;
};

/* The pages under an operand. Pages of which no byte is enabled are not looked at: size is kept, gpa is ~0. */
static int find_pieces(struct bt_vcpu *v, uint64_t linear, unsigned size, bool write, uint64_t enabled, struct piece *pieces,
	unsigned *count)
{
	unsigned done = 0;

	*count = 0;
	while (done < size) {
		unsigned part = min(size - done, BT_PAGE_SIZE - (unsigned)((linear + done) & 0xfff));
		uint64_t ours = done >= 64 ? UINT64_MAX : enabled >> done & (part >= 64 ? UINT64_MAX : (1ull << part) - 1);
		struct piece *p = &pieces[(*count)++];
		uint8_t *page;

		p->size = part;
		p->host = NULL;
		p->gpa = UINT64_MAX;
		if (ours || size > 64) {
			unsigned skip = ours && done < 64 ? (unsigned)__builtin_ctzll(ours) : 0;

			if (bt_translate_address(v, linear + done + skip, write ? BT_WRITE : BT_READ, is_user(v), &p->gpa))
				return BT_FAULT;
			p->gpa -= skip;
			page = memory_page(v->vm->memory, p->gpa, &p->index);
			p->host = page ? page + (p->gpa & 0xfff) : NULL;
		}
		done += part;
	}
	return 0;
}

static uint64_t device_read(struct bt_vcpu *v, uint64_t gpa, unsigned size)
{
	fpu_park(v);
	return v->board->mmio_read(v->board->opaque, v->index, gpa, size);
}

static void device_write(struct bt_vcpu *v, uint64_t gpa, unsigned size, uint64_t value)
{
	fpu_park(v);
	v->board->mmio_write(v->board->opaque, v->index, gpa, size, value);
	v->irq_pending = 1; /* the access may have lowered a priority */
}

static unsigned device_step(uint64_t gpa, unsigned size)
{
	return size >= 8 && !(gpa & 7) ? 8 : size >= 4 && !(gpa & 3) ? 4 : size >= 2 && !(gpa & 1) ? 2 : 1;
}

static void gather_bytes(struct bt_vcpu *v, const struct piece *p, uint8_t *to)
{
	if (p->host) {
		bytes_copy(to, p->host, p->size);
		return;
	}
	for (unsigned at = 0, n; p->gpa != UINT64_MAX && at < p->size; at += n) {
		uint64_t value;

		n = device_step(p->gpa + at, p->size - at);
		value = device_read(v, p->gpa + at, n);
		bytes_copy(to + at, &value, n);
	}
}

static void scatter_bytes(struct bt_vcpu *v, const struct piece *p, const uint8_t *from, uint64_t enabled)
{
	uint64_t all = p->size >= 64 ? UINT64_MAX : (1ull << p->size) - 1;

	if (p->host) {
		if ((enabled & all) == all)
			bytes_copy(p->host, from, p->size);
		else
			for (unsigned k = 0; k < p->size; k++)
				if (enabled >> k & 1)
					p->host[k] = from[k];
		cache_page_written(v, p->index, (unsigned)(p->gpa & 0xfff), p->size);
		return;
	}
	for (unsigned at = 0, n; p->gpa != UINT64_MAX && at < p->size; at += n) {
		uint64_t value = 0;

		n = device_step(p->gpa + at, p->size - at);
		if (!(enabled >> at & 1) && (enabled & all) != all)
			n = 1;
		bytes_copy(&value, from + at, n);
		if ((enabled & all) == all || enabled >> at & 1)
			device_write(v, p->gpa + at, n, value);
	}
}

/* What SDM volume 2 calls the bit string form of BT and its kin: the bit number moves the address. */
static uint64_t bit_offset(const struct bt_vcpu *v, const struct bt_decoded *d)
{
	int64_t bit = (int64_t)bt_register_read(v, d->operands[1].reg.value);
	unsigned width = d->insn.operand_width;

	if (width == 32)
		bit = (int32_t)bit;
	else if (width == 16)
		bit = (int16_t)bit;
	return (uint64_t)((bit >> (width == 64 ? 6 : width == 32 ? 5 : 4)) * (int64_t)(width / 8));
}

/* Operands that must be aligned to their size: #GP otherwise, before any page fault (SDM volume 1, 4.1.1 and 14.9). */
static bool requires_alignment(const struct bt_decoded *d, unsigned size)
{
	if (size < 16)
		return false;
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_CMPXCHG16B:
	case ZYDIS_MNEMONIC_VMOVAPS:
	case ZYDIS_MNEMONIC_VMOVAPD:
	case ZYDIS_MNEMONIC_VMOVDQA:
	case ZYDIS_MNEMONIC_VMOVDQA32:
	case ZYDIS_MNEMONIC_VMOVDQA64:
	case ZYDIS_MNEMONIC_VMOVNTPS:
	case ZYDIS_MNEMONIC_VMOVNTPD:
	case ZYDIS_MNEMONIC_VMOVNTDQ:
	case ZYDIS_MNEMONIC_VMOVNTDQA: return true;
	case ZYDIS_MNEMONIC_MOVUPS:
	case ZYDIS_MNEMONIC_MOVUPD:
	case ZYDIS_MNEMONIC_MOVDQU:
	case ZYDIS_MNEMONIC_LDDQU:
	case ZYDIS_MNEMONIC_PCMPESTRI:
	case ZYDIS_MNEMONIC_PCMPESTRM:
	case ZYDIS_MNEMONIC_PCMPISTRI:
	case ZYDIS_MNEMONIC_PCMPISTRM: return false;
	case ZYDIS_MNEMONIC_SHA1MSG1:
	case ZYDIS_MNEMONIC_SHA1MSG2:
	case ZYDIS_MNEMONIC_SHA1NEXTE:
	case ZYDIS_MNEMONIC_SHA1RNDS4:
	case ZYDIS_MNEMONIC_SHA256MSG1:
	case ZYDIS_MNEMONIC_SHA256MSG2:
	case ZYDIS_MNEMONIC_SHA256RNDS2: return !host_is_amd(); /* as where the instruction itself meets its operand */
	default: return d->insn.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && size == 16 && insn_is_floating(&d->insn);
	}
}

static enum system_result run_as_is(struct bt_vcpu *v, struct slow_entry *e)
{
	const struct bt_decoded *d = &e->i.d;
	const ZydisDecodedOperand *op = e->i.memory;
	uint64_t offset, linear, enabled = UINT64_MAX, next = v->rip + d->insn.length;
	struct piece pieces[3];
	struct bt_block *stub;
	unsigned size, count, first, last;
	bool write, read, locked, environment;
	uint8_t *memory;

	stub = slow_stub(v, e, d, e->i.bytes);
	if (!stub)
		return SYSTEM_UNKNOWN;
	if (!op) {
		if (slow_run_stub(v, stub, NULL))
			return SYSTEM_FAULT;
		v->rip = next;
		return SYSTEM_DONE;
	}
	write = op->actions & (ZYDIS_OPERAND_ACTION_WRITE | ZYDIS_OPERAND_ACTION_CONDWRITE);
	read = op->actions & (ZYDIS_OPERAND_ACTION_READ | ZYDIS_OPERAND_ACTION_CONDREAD);
	size = op->size / 8u;
	if (size == 0 || size > 512)
		return SYSTEM_UNKNOWN;
	if (size <= 64)
		enabled = vector_enabled(v, d);
	if (d->insn.meta.category == ZYDIS_CATEGORY_EXPAND || d->insn.meta.category == ZYDIS_CATEGORY_COMPRESS) {
		/* as many elements as the mask has ones, side by side */
		unsigned ones = (unsigned)__builtin_popcountll(enabled);

		enabled = ones >= 64 ? UINT64_MAX : (1ull << ones) - 1;
	}
	/* Only what the mask lets through counts: the first enabled byte to the last. */
	first = enabled ? (unsigned)__builtin_ctzll(enabled) : 0;
	last = enabled == UINT64_MAX || !enabled ? size - 1 : 63 - (unsigned)__builtin_clzll(enabled);
	offset = address_offset(v, d, op);
	if (e->i.bits)
		offset = address_cut(d, offset + bit_offset(v, d));
	if (enabled && requires_alignment(d, size) &&
		(offset + address_base(v, address_segment(op->mem.segment))) & (size - 1)) {
		bt_raise_error(v, VECTOR_GP, 0);
		return SYSTEM_FAULT;
	}
	if (enabled) {
		if (address_linear(v, address_segment(op->mem.segment), offset + first, last - first + 1,
			write ? BT_WRITE : BT_READ, &linear))
			return SYSTEM_FAULT;
		linear -= first;
	} else {
		linear = offset;
	}
	if (find_pieces(v, linear, size, write, enabled, pieces, &count))
		return SYSTEM_FAULT;
	/* These tell where the last x87 instruction was, which is an address of ours: it does not reach the guest. */
	environment = d->insn.mnemonic == ZYDIS_MNEMONIC_FNSTENV || d->insn.mnemonic == ZYDIS_MNEMONIC_FNSAVE;
	if (count == 1 && pieces[0].host && !environment) {
		/* right in guest memory: atomic if the instruction is */
		if (slow_run_stub(v, stub, pieces[0].host))
			return SYSTEM_FAULT;
		v->rip = next;
		if (write)
			cache_page_written(v, pieces[0].index, (unsigned)(pieces[0].gpa & 0xfff), size);
		return SYSTEM_DONE;
	}
	locked = d->insn.attributes & ZYDIS_ATTRIB_HAS_LOCK ||
		(d->insn.mnemonic == ZYDIS_MNEMONIC_XCHG && write);
	/* The buffer is as (un)aligned as the operand, so that alignment faults are what they would be. */
	memory = v->private->wide_bounce + (linear & 63);
	if (locked)
		exclusive_begin(v);
	bytes_zero(memory, size);
	for (unsigned k = 0, at = 0; k < count; at += pieces[k++].size)
		if (pieces[k].host || read)
			gather_bytes(v, &pieces[k], memory + at);
	if (slow_run_stub(v, stub, memory)) {
		if (locked)
			exclusive_end(v);
		return SYSTEM_FAULT;
	}
	v->rip = next;
	if (locked)
		exclusive_end(v);
	if (environment) {
		bool narrow = size == 14 || size == 94; /* the 16-bit formats (SDM volume 1, 8.1.10) */

		bytes_zero(memory + (narrow ? 6 : 12), narrow ? 8 : 14);
	}
	for (unsigned k = 0, at = 0; write && k < count; at += pieces[k++].size)
		scatter_bytes(v, &pieces[k], memory + at, at >= 64 ? UINT64_MAX : at ? enabled >> at | ~(UINT64_MAX >> at) : enabled);
	return SYSTEM_DONE;
}

/* ---- the entry points ---- */

/* Fetches and decodes the instruction at v->rip; NULL: v->fault is set. */
static struct slow_entry *fetch(struct bt_vcpu *v)
{
	struct bt_slow_cache *c = v->private->slow_cache;
	uint64_t linear = (v->mode & BT_MODE_CODE) == BT_MODE_CODE64 ? v->rip
								      : (uint32_t)(v->segments[ENGINE_CS].base + v->rip);
	const struct fetch_entry *f;
	struct fetch_entry first;
	struct slow_entry *e;
	unsigned have = BT_PAGE_SIZE - (unsigned)(linear & 0xfff);
	uint64_t generation = v->vm->generation, phys;
	uint32_t mode = v->mode & ~(uint32_t)BT_MODE_SINGLE;
	uint8_t bytes[32];
	bool more, keep;

	if ((v->mode & BT_MODE_CODE) != BT_MODE_CODE64 && v->rip > v->segments[ENGINE_CS].limit) {
		bt_raise_error(v, VECTOR_GP, 0);
		return NULL;
	}
	f = tlb_fetch(v, linear);
	if (!f)
		return NULL;
	first = *f;
	phys = first.gpa | (linear & 0xfff);
	e = &c->entries[(phys ^ phys >> 7) % SLOW_ENTRIES];
	if (e->valid && e->phys == phys && e->generation == generation && e->mode == mode)
		return e;
	fpu_park(v);
	/* Kept only where a change of the bytes is noticed, and not across pages, whose mapping may change. */
	keep = have >= 15 && first.host &&
		(__atomic_load_n(&v->vm->memory->page_flags[first.index], __ATOMIC_SEQ_CST) & MEMORY_PAGE_CODE);
	if (!keep)
		e = &c->once;
	e->valid = keep;
	e->stub = NULL;
	bytes_zero(bytes, sizeof(bytes));
	if (!first.host) {
		for (unsigned k = 0; k < min(have, 15u); k++)
			bytes[k] = (uint8_t)v->board->mmio_read(v->board->opaque, v->index, first.gpa + (linear & 0xfff) + k, 1);
	} else {
		bytes_copy(bytes, first.host + (linear & 0xfff), min(have, 15u));
	}
	if (!insn_decode(&e->i, v->mode, bytes, min(have, 15u), &more)) {
		const struct fetch_entry *second;

		if (!more) {
			bt_raise_error(v, e->i.too_long ? VECTOR_GP : VECTOR_UD, 0);
			v->fault.has_error = e->i.too_long;
			return NULL;
		}
		second = tlb_fetch(v, (linear & ~0xfffull) + BT_PAGE_SIZE);
		if (!second)
			return NULL;
		if (second->host)
			bytes_copy(bytes + have, second->host, 15 - have);
		if (!insn_decode(&e->i, v->mode, bytes, 15, &more)) {
			bt_raise_error(v, e->i.too_long ? VECTOR_GP : VECTOR_UD, 0);
			v->fault.has_error = e->i.too_long;
			return NULL;
		}
	}
	insn_classify(&e->i, v->mode);
	e->phys = phys;
	e->mode = mode;
	e->generation = generation;
	return e;
}

static bool needs_board(const struct bt_decoded *d)
{
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_IN:
	case ZYDIS_MNEMONIC_OUT:
	case ZYDIS_MNEMONIC_INSB:
	case ZYDIS_MNEMONIC_INSW:
	case ZYDIS_MNEMONIC_INSD:
	case ZYDIS_MNEMONIC_OUTSB:
	case ZYDIS_MNEMONIC_OUTSW:
	case ZYDIS_MNEMONIC_OUTSD:
	case ZYDIS_MNEMONIC_RDMSR:
	case ZYDIS_MNEMONIC_WRMSR:
		return true;
	case ZYDIS_MNEMONIC_MOV:
		return d->operands[0].reg.value == ZYDIS_REGISTER_CR8 || d->operands[1].reg.value == ZYDIS_REGISTER_CR8;
	default:
		return false;
	}
}

enum system_result slow_system(struct bt_vcpu *v, const struct bt_decoded *d)
{
	bool board = needs_board(d);
	enum system_result r;

	if (board)
		fpu_park(v);
	r = system_execute(v, d);
	if (board)
		v->irq_pending = 1; /* a priority may have been lowered */
	return r;
}

static enum system_result as_result(int fault)
{
	return fault ? SYSTEM_FAULT : SYSTEM_DONE;
}

/* Instructions whose C function leaves rip alone. */
static enum system_result and_next(struct bt_vcpu *v, const struct bt_decoded *d, int fault)
{
	if (fault)
		return SYSTEM_FAULT;
	v->rip = flow_cut_rip(v, v->rip + d->insn.length, NULL);
	return SYSTEM_DONE;
}

enum system_result slow_branch_fault(struct bt_vcpu *v)
{
	uint64_t target = v->rip, sp = v->gprs[ENGINE_RSP];
	const struct slow_entry *e;
	const struct bt_decoded *d;

	tlb_find_rip(v, v->resume - 1);
	e = v->rip == target ? NULL : fetch(v);
	if (!e)
		return SYSTEM_FAULT;
	d = &e->i.d;
	switch (e->i.kind) {
	case INSN_RET:
		v->gprs[ENGINE_RSP] = sp - 8 - (d->operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? d->operands[0].imm.value.u : 0);
		return slow_execute(v);
	case INSN_CALL:
		if (d->operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
			break;
		bt_write_linear(v, sp, &v->scratch[2], 8, is_user(v));
		v->gprs[ENGINE_RSP] = sp + 8;
		return slow_execute(v);
	case INSN_JUMP:
		return slow_execute(v);
	default:
		break;
	}
	v->rip = target;
	bt_raise_error(v, VECTOR_GP, 0);
	return SYSTEM_FAULT;
}

enum system_result slow_execute(struct bt_vcpu *v)
{
	struct slow_entry *e = fetch(v);
	const struct bt_decoded *d;
	enum system_result r;
	uint64_t value;

	if (!e)
		return SYSTEM_FAULT;
	d = &e->i.d;
	if (insn_is_floating(&d->insn)) {
		if (v->mode & BT_MODE_NO_FPU) {
			bool vector = e->i.d.insn.meta.isa_ext != ZYDIS_ISA_EXT_X87;

			bt_raise(v, vector && v->cr0 & CR0_EM ? VECTOR_UD : VECTOR_NM);
			return SYSTEM_FAULT;
		}
		if (v->mode & BT_MODE_NO_XSAVE && d->insn.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY &&
			d->insn.meta.isa_ext != ZYDIS_ISA_EXT_BMI1 && d->insn.meta.isa_ext != ZYDIS_ISA_EXT_BMI2) {
			bt_raise(v, VECTOR_UD);
			return SYSTEM_FAULT;
		}
	}
	if (insn_moves_state(d->insn.mnemonic))
		return and_next(v, d, xsave_execute(v, e));
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_CALL:
		if (d->insn.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR)
			return as_result(flow_call(v, d));
		break;
	case ZYDIS_MNEMONIC_RET:
		if (d->insn.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR)
			return as_result(flow_return(v, d));
		break;
	case ZYDIS_MNEMONIC_JMP:
		if (d->insn.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR) {
			if (d->operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
				return as_result(flow_jump(v, flow_target(v, d)));
			return as_result(
				flow_operand(v, d, &d->operands[0], &value) || flow_jump(v, flow_cut_rip(v, value, d)));
		}
		break;
	case ZYDIS_MNEMONIC_LOOP:
	case ZYDIS_MNEMONIC_LOOPE:
	case ZYDIS_MNEMONIC_LOOPNE:
	case ZYDIS_MNEMONIC_JCXZ:
	case ZYDIS_MNEMONIC_JECXZ:
	case ZYDIS_MNEMONIC_JRCXZ:
		return as_result(flow_loop(v, d));
	case ZYDIS_MNEMONIC_PUSH:
		if (e->i.kind == INSN_SYSTEM)
			break;
		if (flow_operand(v, d, &d->operands[0], &value))
			return SYSTEM_FAULT;
		return and_next(v, d, flow_push(v, value, flow_slot_size(v, d)));
	case ZYDIS_MNEMONIC_POP:
		if (e->i.kind == INSN_SYSTEM)
			break;
		return and_next(v, d, flow_pop(v, d));
	case ZYDIS_MNEMONIC_LEAVE: return and_next(v, d, flow_leave(v, d));
	case ZYDIS_MNEMONIC_ENTER: return and_next(v, d, flow_enter(v, d));
	case ZYDIS_MNEMONIC_PUSHA:
	case ZYDIS_MNEMONIC_PUSHAD: return and_next(v, d, flow_push_all(v, d));
	case ZYDIS_MNEMONIC_POPA:
	case ZYDIS_MNEMONIC_POPAD: return and_next(v, d, flow_pop_all(v, d));
	case ZYDIS_MNEMONIC_AAA:
	case ZYDIS_MNEMONIC_AAS:
	case ZYDIS_MNEMONIC_AAM:
	case ZYDIS_MNEMONIC_AAD:
	case ZYDIS_MNEMONIC_DAA:
	case ZYDIS_MNEMONIC_DAS: return and_next(v, d, flow_decimal(v, d));
	case ZYDIS_MNEMONIC_SALC:
		bt_register_write(v, ZYDIS_REGISTER_AL, bt_rflags(v) & FLAG_CF ? 0xff : 0);
		return and_next(v, d, 0);
	case ZYDIS_MNEMONIC_XLAT: {
		for (unsigned k = 0; k < d->insn.operand_count; k++) {
			const ZydisDecodedOperand *op = &d->operands[k];
			uint64_t offset, linear, mask = d->insn.address_width == 64 ? UINT64_MAX
				: d->insn.address_width == 32			    ? UINT32_MAX
										    : 0xffff;

			if (op->type != ZYDIS_OPERAND_TYPE_MEMORY)
				continue;
			offset = (v->gprs[ENGINE_RBX] + (uint8_t)v->gprs[ENGINE_RAX]) & mask;
			value = 0;
			if (address_linear(v, address_segment(op->mem.segment), offset, 1, BT_READ, &linear) ||
				bt_read_linear(v, linear, &value, 1, is_user(v)))
				return SYSTEM_FAULT;
			bt_register_write(v, ZYDIS_REGISTER_AL, value);
		}
		return and_next(v, d, 0);
	}
	case ZYDIS_MNEMONIC_CLD: v->dflag = 0; return and_next(v, d, 0);
	case ZYDIS_MNEMONIC_STD: v->dflag = 1; return and_next(v, d, 0);
	case ZYDIS_MNEMONIC_LEA:
		bt_register_write(v, d->operands[0].reg.value, address_offset(v, d, &d->operands[1]));
		return and_next(v, d, 0);
	case ZYDIS_MNEMONIC_BOUND: return and_next(v, d, flow_bound(v, d));
	case ZYDIS_MNEMONIC_ARPL: return and_next(v, d, flow_arpl(v, d));
	case ZYDIS_MNEMONIC_MOVDIR64B:
		return SYSTEM_UNKNOWN;
	default:
		break;
	}
	if (e->i.kind == INSN_JCC || d->insn.meta.category == ZYDIS_CATEGORY_COND_BR) {
		if (flow_condition(v, d->insn.opcode & 15))
			return as_result(flow_jump(v, flow_target(v, d)));
		return and_next(v, d, 0);
	}
	if (d->insn.meta.category == ZYDIS_CATEGORY_STRINGOP)
		return string_execute(v, d);
	if (e->i.kind == INSN_NOTHING)
		return and_next(v, d, 0);
	r = vector_execute(v, d);
	if (r != SYSTEM_UNKNOWN)
		return r;
	if (e->i.kind == INSN_SYSTEM || e->i.kind == INSN_CLI || e->i.kind == INSN_STI || e->i.kind == INSN_SWAPGS)
		return slow_system(v, d);
	r = run_as_is(v, e);
	if (r == SYSTEM_FAULT && v->fault.vector != VECTOR_MF && insn_waits_for_x87(d)) {
		fpu_park(v);
		if (v->private->fpu[2] & 0x80)
			bt_raise(v, VECTOR_MF);
	}
	if (r == SYSTEM_DONE)
		v->rip = flow_cut_rip(v, v->rip, NULL);
	return r;
}
