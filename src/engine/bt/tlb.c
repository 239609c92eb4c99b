/* Virtual memory: page-table walks (SDM volume 3, chapter 4), the software TLB and jump caches, access for C code. */
#include "engine/bt/bt.h"

enum {
	PTE_P = 1 << 0, PTE_W = 1 << 1, PTE_U = 1 << 2, PTE_A = 1 << 5, PTE_D = 1 << 6, PTE_PS = 1 << 7, PTE_G = 1 << 8,
};
#define PTE_NX (1ull << 63)
#define PTE_ADDRESS 0x000ffffffffff000ull

enum { FAULT_P = 1, FAULT_W = 2, FAULT_U = 4, FAULT_RSVD = 8, FAULT_I = 16 };

struct walk {
	uint64_t gpa;	   /* of the address itself */
	bool writable;	   /* a write would pass and the dirty bit is set */
	bool global;
	uint64_t size;	   /* of the page */
};

static int page_fault(struct bt_vcpu *v, uint64_t linear, uint32_t error)
{
	v->cr2 = linear;
	return bt_raise_error(v, VECTOR_PF, error);
}

/* One page-table entry, 4 or 8 bytes; NULL when it is not in RAM. */
static void *entry_at(struct bt_vcpu *v, uint64_t gpa)
{
	uint64_t index;
	uint8_t *page = memory_page(v->vm->memory, gpa, &index);

	return page ? page + (gpa & 0xfff) : NULL;
}

static void set_bits(void *entry, bool wide, uint64_t old, uint64_t bits)
{
	/* Only if the entry is still what was read: another vCPU may have changed it (then the guest flushes anyway). */
	if (wide) {
		__atomic_compare_exchange_n((uint64_t *)entry, &old, old | bits, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	} else {
		uint32_t old32 = (uint32_t)old;

		__atomic_compare_exchange_n((uint32_t *)entry, &old32, old32 | (uint32_t)bits, false, __ATOMIC_SEQ_CST,
			__ATOMIC_SEQ_CST);
	}
}

static bool canonical(uint64_t linear)
{
	return (uint64_t)((int64_t)(linear << 16) >> 16) == linear;
}

/* The set says whose rules apply. */
static int walk_tables(struct bt_vcpu *v, uint64_t linear, enum bt_access access, enum bt_set set, struct walk *w)
{
	bool user = set == BT_SET_USER, wide = v->cr4 & CR4_PAE, nx_on = wide && (v->efer & EFER_NXE);
	bool lma = v->efer & EFER_LMA;
	uint32_t error = (access == BT_WRITE ? FAULT_W : 0) | (user ? FAULT_U : 0) |
		(access == BT_FETCH && (nx_on || (v->cr4 & CR4_SMEP)) ? FAULT_I : 0);
	uint64_t rights = PTE_W | PTE_U, entry = 0, table, nx = 0;
	int level = lma ? 4 : wide ? 3 : 2;
	void *at = NULL;
	uint64_t dirty = 0;

	if (!lma)
		linear &= 0xffffffff;
	if (!(v->cr0 & CR0_PG)) {
		w->gpa = linear;
		w->writable = w->global = true;
		w->size = BT_PAGE_SIZE;
		return 0;
	}
	if (lma && !canonical(linear))
		return bt_raise_error(v, VECTOR_GP, 0);
	table = lma ? v->cr3 & PTE_ADDRESS : wide ? v->cr3 & 0xffffffe0 : v->cr3 & 0xfffff000;
	for (;; level--) {
		unsigned shift = wide ? 12 + 9 * (level - 1) : 12 + 10 * (level - 1);
		unsigned n = (unsigned)(linear >> shift) & (wide ? 511 : 1023);
		bool pdpte = !lma && wide && level == 3;

		if (pdpte)
			n &= 3;
		at = entry_at(v, table + n * (wide ? 8 : 4));
		if (!at)
			return page_fault(v, linear, error); /* tables outside RAM read as not present */
		entry = wide ? __atomic_load_n((uint64_t *)at, __ATOMIC_RELAXED) : __atomic_load_n((uint32_t *)at, __ATOMIC_RELAXED);
		if (!(entry & PTE_P))
			return page_fault(v, linear, error);
		if (wide && ((entry & PTE_NX && !nx_on) || (entry & 0x000f000000000000ull)))
			return page_fault(v, linear, error | FAULT_P | FAULT_RSVD); /* 48 physical address bits */
		if (!pdpte) {
			rights &= entry;
			nx |= entry & PTE_NX;
		}
		if (level == 1 || (entry & PTE_PS && ((level == 2 && (wide || v->cr4 & CR4_PSE)) || (lma && level == 3)))) {
			w->size = 1ull << shift;
			break;
		}
		if (lma && level == 4 && (entry & PTE_PS))
			return page_fault(v, linear, error | FAULT_P | FAULT_RSVD);
		if (!(entry & PTE_A) && !pdpte)
			set_bits(at, wide, entry, PTE_A);
		table = wide ? entry & PTE_ADDRESS : entry & 0xfffff000;
	}
	if (wide && level > 1 && (entry & (w->size - 1) & ~0x1fffull))
		return page_fault(v, linear, error | FAULT_P | FAULT_RSVD);

	error |= FAULT_P;
	if (user) {
		if (!(rights & PTE_U) || (access == BT_WRITE && !(rights & PTE_W)) || (access == BT_FETCH && nx))
			return page_fault(v, linear, error);
		w->writable = rights & PTE_W;
	} else {
		if (access == BT_FETCH && (nx || ((v->cr4 & CR4_SMEP) && (rights & PTE_U))))
			return page_fault(v, linear, error);
		if (access != BT_FETCH && (v->cr4 & CR4_SMAP) && set == BT_SET_SUPERVISOR && (rights & PTE_U))
			return page_fault(v, linear, error);
		w->writable = (rights & PTE_W) || !(v->cr0 & CR0_WP);
		if (access == BT_WRITE && !w->writable)
			return page_fault(v, linear, error);
	}
	if (access == BT_WRITE)
		dirty = PTE_D;
	if ((entry & (PTE_A | dirty)) != (PTE_A | dirty)) {
		set_bits(at, wide, entry, PTE_A | dirty);
		entry |= PTE_A | dirty;
	}
	w->writable = w->writable && (entry & PTE_D);
	w->global = (entry & PTE_G) && (v->cr4 & CR4_PGE);
	if (!wide && level == 2)
		w->gpa = (entry & 0xffc00000) | (entry & 0x1fe000) << 19 | (linear & 0x3fffff);
	else
		w->gpa = (wide ? entry & PTE_ADDRESS & ~(w->size - 1) : entry & 0xfffff000) | (linear & (w->size - 1));
	return 0;
}

static int walk(struct bt_vcpu *v, uint64_t linear, enum bt_access access, enum bt_set set, struct walk *w)
{
	int fault = walk_tables(v, linear, access, set, w);

	if (!fault && access == BT_WRITE && v->vm->lockstep)
		lockstep_page_written(v, w->gpa);
	return fault;
}

static enum bt_set set_for(const struct bt_vcpu *v, bool user)
{
	return user ? BT_SET_USER : (v->mode & BT_MODE_SET) == BT_SET_AC ? BT_SET_AC : BT_SET_SUPERVISOR;
}

int bt_translate_address(struct bt_vcpu *v, uint64_t linear, enum bt_access access, bool user, uint64_t *gpa)
{
	struct walk w;
	int fault = walk(v, linear, access, set_for(v, user), &w);

	if (!fault)
		*gpa = w.gpa;
	return fault;
}

static void note_large(struct bt_private *p, enum bt_set set, uint64_t linear, uint64_t size)
{
	if (size == BT_PAGE_SIZE)
		return;
	if (!p->large_mask[set]) {
		p->large_base[set] = linear & ~(size - 1);
		p->large_mask[set] = ~(size - 1);
	} else {
		p->large_mask[set] &= ~(size - 1);
		while ((p->large_base[set] ^ linear) & p->large_mask[set])
			p->large_mask[set] <<= 1;
		p->large_base[set] &= p->large_mask[set];
	}
}

uint8_t *tlb_fill(struct bt_vcpu *v, enum bt_set set, uint64_t linear, bool write, bool *fault)
{
	struct bt_private *p = v->private;
	uint64_t page = linear & ~0xfffull, index;
	unsigned n = (unsigned)(linear >> 12) & (BT_TLB_ENTRIES - 1);
	struct tlb_entry *e = &v->tlb[set][n];
	struct walk w;
	uint8_t *host;
	bool code;

	*fault = walk(v, linear, write ? BT_WRITE : BT_READ, set, &w) != 0;
	if (*fault)
		return NULL;
	host = memory_page(v->vm->memory, w.gpa, &index);
	if (!host)
		return NULL;
	if (!(v->mode & BT_MODE_CODE64) && !(v->efer & EFER_LMA))
		page &= 0xffffffff;
	p->statistics[STAT_TLB_FILLS]++;
	code = __atomic_load_n(&v->vm->memory->page_flags[index], __ATOMIC_SEQ_CST) & MEMORY_PAGE_CODE;
	note_large(p, set, linear, w.size);
	if (!w.global) {
		if (p->filled_count[set] < ARRAY_SIZE(p->filled[set]))
			p->filled[set][p->filled_count[set]] = (uint16_t)n;
		if (p->filled_count[set] <= ARRAY_SIZE(p->filled[set]))
			p->filled_count[set]++;
	}
	e->read = page;
	/* In lockstep the first write to a page must come here. */
	e->write = w.writable && !code && (write || !v->vm->lockstep) ? page : tlb_invalid(n);
	e->addend = (uint64_t)(uintptr_t)host;
	e->flags = w.global ? TLB_GLOBAL : 0;
	return write && code ? NULL : host;
}

uint8_t *tlb_host_page(struct bt_vcpu *v, uint64_t linear, bool write, bool user, uint64_t *index, bool *fault)
{
	struct walk w;

	*fault = walk(v, linear, write ? BT_WRITE : BT_READ, set_for(v, user), &w) != 0;
	return *fault ? NULL : memory_page(v->vm->memory, w.gpa, index);
}

const struct fetch_entry *tlb_fetch(struct bt_vcpu *v, uint64_t linear)
{
	struct bt_private *p = v->private;
	enum bt_set set = v->mode & BT_MODE_SET;
	uint64_t page = linear & ~0xfffull;
	struct fetch_entry *f = &p->fetch[set][(linear >> 12) & (BT_FETCH_ENTRIES - 1)];
	struct walk w;

	if (f->page == (page | 1))
		return f;
	if (walk(v, linear, BT_FETCH, set, &w))
		return NULL;
	note_large(p, set, linear, w.size);
	f->page = page | 1;
	f->gpa = w.gpa & ~0xfffull;
	f->index = 0;
	f->host = memory_page(v->vm->memory, w.gpa, &f->index);
	f->global = w.global;
	if (!w.global)
		p->fetch_local[set] = true;
	return f;
}

/* ---- flushing ---- */

static void invalidate(struct bt_vcpu *v, enum bt_set set, unsigned n)
{
	v->tlb[set][n].read = v->tlb[set][n].write = tlb_invalid(n);
}

static void forget_jump(struct jump_entry *j, unsigned n)
{
	j[n].way[0].pc = j[n].way[1].pc = jump_no_pc(n);
}

static void clear_jumps(struct bt_vcpu *v, enum bt_set set)
{
	struct jump_entry *j = v->jump[set];

	if (v->private->jumps_count[set] <= ARRAY_SIZE(v->private->jumps_filled[set])) {
		for (unsigned k = 0; k < v->private->jumps_count[set]; k++)
			forget_jump(j, v->private->jumps_filled[set][k]);
	} else {
		for (unsigned k = 0; k < BT_JUMP_ENTRIES; k++)
			forget_jump(j, k);
	}
	v->private->jumps_count[set] = 0;
	for (unsigned k = 0; k < ARRAY_SIZE(v->private->jump_pages[set]); k++)
		v->private->jump_pages[set][k] = 0;
	v->private->jump_local[set] = false;
}

void tlb_clear_jumps(struct bt_vcpu *v)
{
	for (int set = 0; set < BT_SETS; set++)
		clear_jumps(v, set);
}

static void flush_set(struct bt_vcpu *v, enum bt_set set, bool keep_global)
{
	struct bt_private *p = v->private;

	if (keep_global && p->filled_count[set] <= ARRAY_SIZE(p->filled[set])) {
		for (unsigned k = 0; k < p->filled_count[set]; k++)
			if (!(v->tlb[set][p->filled[set][k]].flags & TLB_GLOBAL))
				invalidate(v, set, p->filled[set][k]);
	} else {
		for (unsigned n = 0; n < BT_TLB_ENTRIES; n++)
			if (!keep_global || !(v->tlb[set][n].flags & TLB_GLOBAL))
				invalidate(v, set, n);
	}
	p->filled_count[set] = 0;
	if (!keep_global)
		p->large_mask[set] = p->large_base[set] = 0;
	if (!keep_global || p->fetch_local[set]) {
		for (unsigned n = 0; n < BT_FETCH_ENTRIES; n++)
			if (!keep_global || !p->fetch[set][n].global)
				p->fetch[set][n].page = 0;
		p->fetch_local[set] = false;
	}
	if (!keep_global || p->jump_local[set])
		clear_jumps(v, set);
}

void bt_tlb_flush(struct bt_vcpu *v, bool keep_global)
{
	v->private->statistics[STAT_TLB_FLUSHES]++;
	for (int set = 0; set < BT_SETS; set++)
		flush_set(v, set, keep_global);
}

void tlb_reset(struct bt_vcpu *v)
{
	for (int set = 0; set < BT_SETS; set++) {
		v->private->jump_local[set] = true;
		v->private->jumps_count[set] = UINT32_MAX;
	}
	bt_tlb_flush(v, false);
}

void bt_tlb_flush_page(struct bt_vcpu *v, uint64_t linear)
{
	struct bt_private *p = v->private;
	unsigned n = (unsigned)(linear >> 12) & (BT_TLB_ENTRIES - 1);
	uint64_t page = linear & ~0xfffull, hashed = (linear >> 12) & 4095;

	p->statistics[STAT_PAGE_FLUSHES]++;
	for (int set = 0; set < BT_SETS; set++) {
		struct fetch_entry *f = &p->fetch[set][(linear >> 12) & (BT_FETCH_ENTRIES - 1)];

		if (p->large_mask[set] && !((linear ^ p->large_base[set]) & p->large_mask[set])) {
			flush_set(v, set, false);
			continue;
		}
		if (v->tlb[set][n].read == page || v->tlb[set][n].write == page)
			invalidate(v, set, n);
		if (f->page == (page | 1))
			f->page = 0;
		if (p->jump_pages[set][hashed >> 6] & 1ull << (hashed & 63))
			clear_jumps(v, set);
	}
}

void tlb_drop_host_page(struct bt_vcpu *v, const uint8_t *host)
{
	for (int set = 0; set < BT_SETS; set++)
		for (unsigned n = 0; n < BT_TLB_ENTRIES; n++)
			if (v->tlb[set][n].addend == (uint64_t)(uintptr_t)host)
				v->tlb[set][n].write = tlb_invalid(n);
}

/* ---- access for C code ---- */

static void device_access(struct bt_vcpu *v, uint64_t gpa, uint8_t *bytes, unsigned size, bool write)
{
	fpu_park(v);
	paravirt_eoi_settle(v); /* the device may be the APIC */
	while (size) {
		unsigned n = size >= 8 && !(gpa & 7) ? 8 : size >= 4 && !(gpa & 3) ? 4 : size >= 2 && !(gpa & 1) ? 2 : 1;
		uint64_t value = 0;

		if (write) {
			bytes_copy(&value, bytes, n);
			v->board->mmio_write(v->board->opaque, v->index, gpa, n, value);
		} else {
			value = v->board->mmio_read(v->board->opaque, v->index, gpa, n);
			bytes_copy(bytes, &value, n);
		}
		gpa += n;
		bytes += n;
		size -= n;
	}
}

struct piece {
	uint8_t *host;
	uint64_t gpa, index;
	unsigned size;
};

static int find_pieces(struct bt_vcpu *v, uint64_t linear, unsigned size, bool write, bool user, struct piece *pieces)
{
	int n = 0;

	while (size) {
		unsigned part = min(size, BT_PAGE_SIZE - (unsigned)(linear & 0xfff));
		struct piece *p = &pieces[n++];
		struct walk w;
		uint8_t *page;

		if (walk(v, linear, write ? BT_WRITE : BT_READ, set_for(v, user), &w))
			return BT_FAULT;
		page = memory_page(v->vm->memory, w.gpa, &p->index);
		p->host = page ? page + (w.gpa & 0xfff) : NULL;
		p->gpa = w.gpa;
		p->size = part;
		linear += part;
		size -= part;
	}
	return n;
}

int bt_read_linear(struct bt_vcpu *v, uint64_t linear, void *to, unsigned size, bool user)
{
	struct tlb_entry *e = &v->tlb[set_for(v, user)][(linear >> 12) & (BT_TLB_ENTRIES - 1)];
	struct piece pieces[4];
	uint8_t *bytes = to;
	bool fault;
	int n;

	if (linear - e->read <= BT_PAGE_SIZE - size) {
		bytes_copy(to, (const uint8_t *)(uintptr_t)e->addend + (linear - e->read), size);
		return 0;
	}
	if ((linear & 0xfff) + size <= BT_PAGE_SIZE) {
		uint8_t *host = tlb_fill(v, set_for(v, user), linear, false, &fault);

		if (fault)
			return BT_FAULT;
		if (host) {
			bytes_copy(to, host + (linear & 0xfff), size);
			return 0;
		}
	}
	n = find_pieces(v, linear, size, false, user, pieces);
	if (n < 0)
		return BT_FAULT;
	for (int k = 0; k < n; k++) {
		if (pieces[k].host)
			bytes_copy(bytes, pieces[k].host, pieces[k].size);
		else
			device_access(v, pieces[k].gpa, bytes, pieces[k].size, false);
		bytes += pieces[k].size;
	}
	return 0;
}

int bt_write_linear(struct bt_vcpu *v, uint64_t linear, const void *from, unsigned size, bool user)
{
	struct tlb_entry *e = &v->tlb[set_for(v, user)][(linear >> 12) & (BT_TLB_ENTRIES - 1)];
	struct piece pieces[4];
	uint8_t *bytes = (uint8_t *)(uintptr_t)from;
	bool fault;
	int n;

	if (linear - e->write <= BT_PAGE_SIZE - size) {
		bytes_copy((uint8_t *)(uintptr_t)e->addend + (linear - e->write), from, size);
		return 0;
	}
	if ((linear & 0xfff) + size <= BT_PAGE_SIZE) {
		uint8_t *host = tlb_fill(v, set_for(v, user), linear, true, &fault);

		if (fault)
			return BT_FAULT;
		if (host) {
			bytes_copy(host + (linear & 0xfff), from, size);
			return 0;
		}
	}
	n = find_pieces(v, linear, size, true, user, pieces);
	if (n < 0)
		return BT_FAULT;
	for (int k = 0; k < n; k++) {
		if (pieces[k].host) {
			bytes_copy(pieces[k].host, bytes, pieces[k].size);
			cache_page_written(v, pieces[k].index, (unsigned)(pieces[k].gpa & 0xfff), pieces[k].size);
		} else {
			device_access(v, pieces[k].gpa, bytes, pieces[k].size, true);
		}
		bytes += pieces[k].size;
	}
	return 0;
}

/* ---- from translated code: a miss; returns the host address, or 0 with v->exit_code set and v->rip right ---- */

void tlb_find_rip(struct bt_vcpu *v, uint64_t host_pc)
{
	struct bt_block *b = cache_by_host(v->vm, (const uint8_t *)(uintptr_t)host_pc);
	unsigned offset, k;

	if (!b || b->stub)
		return;
	offset = (unsigned)(host_pc - (uint64_t)(uintptr_t)b->entry_mem);
	for (k = b->sides - 1u; k > 0 && b->side[k].host > offset; k--)
		;
	v->rip = v->page + b->side[k].guest;
}

uint64_t bt_slow_access(struct bt_vcpu *v, uint64_t linear)
{
	unsigned size = v->access & 0xffff;
	bool write = v->access & 1u << 16, masked = v->access & 1u << 17, fault = false;
	enum bt_set set = v->access >> 18;

	if ((linear & 0xfff) + size <= BT_PAGE_SIZE && (!(v->efer & EFER_LMA) || canonical(linear))) {
		uint8_t *host = tlb_fill(v, set, linear, write, &fault);

		if (host)
			return (uint64_t)(uintptr_t)host + (linear & 0xfff);
	}
	tlb_find_rip(v, v->resume - 1);
	/* A misaligned operand may raise #GP, which comes before #PF: slow_execute knows. */
	if (size >= 16 && linear & (size - 1))
		masked = true;
	v->exit_code = fault && !masked ? BT_EXIT_FAULT : BT_EXIT_SLOW;
	v->exit_argument = 0;
	return 0;
}
