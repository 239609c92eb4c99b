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

#include "engine/bt/translation.h"

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

void translate_far_link(struct bt_vcpu *v, struct bt_site *site)
{
	struct bt_vm *vm = v->vm;
	struct bt_translation *t = vm->translation;
	uint8_t *start;

	fpu_park(v);
	scope_lock(&vm->translate_lock);
	if (site->target || site->far_linked || site->block->dead || !begin_block(vm, t, site->block->mode))
		return;
	t->block->stub = true;
	start = t->e.p;
	t->block->entry_mem = t->block->entry_host = emit_here(&t->e);
	t->state = site->wants_mem ? FLAGS_MEM : FLAGS_HOST;
	emit_far_goto(t, site->offset);
	emit_lates(t);
	t->block->sides = 1;
	t->block->side = cache_alloc(vm, sizeof(*t->block->side));
	if (t->e.overflow || !t->block->side)
		return;
	memset(t->block->side, 0, sizeof(*t->block->side));
	t->block->host_size = (uint32_t)(t->e.p - start);
	vm->code_used = (size_t)(t->e.p - vm->code_write);
	cache_add(vm, t->block, UINT64_MAX, UINT64_MAX);
	cache_patch(vm, site, t->block->entry_mem);
	site->far_linked = true;
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
