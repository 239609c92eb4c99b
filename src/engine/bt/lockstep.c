/* Lockstep: a test of the translator on real guests. Before a block is run, its instructions are run one by one, as blocks
 * of one; what they changed is undone, the whole block is run, and registers, flags, vector state and memory must be the
 * same. Asked for by engine_config.lockstep, for VMs of one vCPU; the first difference is printed and ends the run.
 *
 * Both runs stop at the block's end, or where C would do something (a system instruction, a device, a page with code, a
 * fault), before it is done. Memory is undone page by page: with the TLB's tags gone, every page that is written is
 * walked to first (tlb.c), and then copied here. The block is translated anew without direct jumps out of it. */
#include <cpuid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/bt/bt.h"
#include "engine/bt/insn.h"

#define LOCKSTEP_PAGES 64

struct lockstep_page {
	uint8_t *host;
	uint8_t before[BT_PAGE_SIZE], after[BT_PAGE_SIZE]; /* after: what the single instructions made of it */
};

/* The registers: all of struct bt_vcpu in front of the caches. */
struct lockstep_state {
	uint8_t vcpu[offsetof(struct bt_vcpu, jump)] __attribute__((aligned(64)));
	uint8_t fpu[4096];
};

struct bt_lockstep {
	unsigned pages, due;
	bool watching, overflow;
	uint64_t compared, left_out;
	struct lockstep_state before, single, whole;
	struct lockstep_page page[LOCKSTEP_PAGES];
};

int lockstep_create(struct bt_vcpu *v)
{
	if (!v->vm->lockstep)
		return 0;
	v->private->lockstep = aligned_alloc(64, align_up(sizeof(struct bt_lockstep), 64));
	if (!v->private->lockstep)
		return -ENOMEM;
	memset(v->private->lockstep, 0, sizeof(struct bt_lockstep));
	return 0;
}

void lockstep_destroy(struct bt_vcpu *v)
{
	free(v->private->lockstep);
}

void lockstep_statistics(const struct bt_vcpu *v, uint64_t *compared, uint64_t *left_out)
{
	*compared = v->private->lockstep ? v->private->lockstep->compared : 0;
	*left_out = v->private->lockstep ? v->private->lockstep->left_out : 0;
}

void lockstep_page_written(struct bt_vcpu *v, uint64_t gpa)
{
	struct bt_lockstep *l = v->private->lockstep;
	uint64_t index;
	uint8_t *host;

	if (!l || !l->watching)
		return;
	host = memory_page(v->vm->memory, gpa, &index);
	if (!host)
		return;
	for (unsigned k = 0; k < l->pages; k++)
		if (l->page[k].host == host)
			return;
	if (l->pages == LOCKSTEP_PAGES) {
		l->overflow = true;
		return;
	}
	l->page[l->pages].host = host;
	bytes_copy(l->page[l->pages++].before, host, BT_PAGE_SIZE);
}

/* ---- states ---- */

static void keep(struct bt_vcpu *v, struct lockstep_state *s)
{
	fpu_park(v);
	memcpy(s->vcpu, v, sizeof(s->vcpu));
	memcpy(s->fpu, v->private->fpu, min(v->private->fpu_size, sizeof(s->fpu)));
}

/* What other threads set stays as it is. */
static void put_back(struct bt_vcpu *v, const struct lockstep_state *s)
{
	uint8_t kick = v->kick, irq_pending = v->irq_pending;

	fpu_park(v);
	memcpy(v, s->vcpu, sizeof(s->vcpu));
	memcpy(v->private->fpu, s->fpu, min(v->private->fpu_size, sizeof(s->fpu)));
	v->kick |= kick;
	v->irq_pending |= irq_pending;
}

static void forget_translations(struct bt_vcpu *v)
{
	for (int set = 0; set < BT_SETS; set++)
		for (unsigned n = 0; n < BT_TLB_ENTRIES; n++)
			v->tlb[set][n].read = v->tlb[set][n].write = tlb_invalid(n);
}

/* Translated code has come back: v->rip is where it stopped. */
static void settle_rip(struct bt_vcpu *v)
{
	bool by_site = v->exit_code == BT_EXIT_LINK || v->exit_code == BT_EXIT_SYSTEM ||
		(v->exit_code == BT_EXIT_SLOW && v->exit_argument);

	if (by_site)
		v->rip = v->page + (uint64_t)(int64_t)((const struct bt_site *)(uintptr_t)v->exit_argument)->offset;
	if (by_site && (v->mode & BT_MODE_CODE) != BT_MODE_CODE64)
		v->rip = (uint32_t)v->rip;
}

/* One way of running from v->rip; false: the code could not be found. */
static bool run_block(struct bt_vcpu *v, uint32_t how, unsigned *instructions)
{
	struct bt_block *block;
	bool slow;

	v->mode |= how;
	block = block_find(v, &slow);
	if (block) {
		*instructions = block->sides;
		v->page = v->rip & ~0xfffull;
		fpu_unpark(v);
		v->vm->enter(v, block->entry_mem);
		settle_rip(v);
	}
	v->mode &= ~how;
	return block != NULL;
}

static bool goes_on(const struct bt_vcpu *v)
{
	return v->exit_code == BT_EXIT_LOOKUP || v->exit_code == BT_EXIT_LINK;
}

/* ---- comparing ---- */

static bool component_differs(const uint8_t *a, const uint8_t *b, unsigned n, unsigned offset, unsigned size)
{
	static const uint8_t zeros[4096];
	bool has_a = a[512] >> n & 1, has_b = b[512] >> n & 1;

	return (has_a || has_b) && memcmp(has_a ? a + offset : zeros, has_b ? b + offset : zeros, size) != 0;
}

static bool vectors_differ(const uint8_t *a, const uint8_t *b)
{
	/* x87: not the pointers to the last instruction, which are the translator's */
	if (a[512] & b[512] & 1 && (memcmp(a, b, 5) || memcmp(a + 32, b + 32, 128)))
		return true;
	if (memcmp(a + 24, b + 24, 4) || component_differs(a, b, 1, 160, 256))
		return true;
	for (unsigned n = 2; n < 8; n++) {
		uint32_t size, offset, c, d;

		if (__get_cpuid_count(0xd, n, &size, &offset, &c, &d) && size && offset + size <= 4096 &&
			component_differs(a, b, n, offset, size))
			return true;
	}
	return false;
}

/* Flags that must be right where the block ended: those that the code there reads, as the translator sees it. */
static uint32_t flags_that_count(struct bt_vcpu *v)
{
	const struct fetch_entry *f;
	struct bt_fault fault = v->fault;
	uint64_t cr2 = v->cr2;
	uint32_t live = FLAGS_ARITHMETIC;

	if (v->vm->exact_flags)
		return live;
	if (v->exit_code == BT_EXIT_FAULT || (v->exit_code == BT_EXIT_SLOW && !v->exit_argument))
		return 0;
	if (!goes_on(v) || (v->rip & ~0xfffull) != v->page)
		return live;
	f = tlb_fetch(v, v->rip);
	if (f && f->host)
		live = insn_flags_live(f->host, (unsigned)(v->rip & 0xfff), v->mode);
	v->fault = fault;
	v->cr2 = cr2;
	return live;
}

/* What is known of the block beyond its effects. */
struct block_facts {
	uint32_t undefined; /* flags left undefined: the translator may give up what was in them before */
	bool random;	    /* draws random numbers */
};

static struct block_facts facts_of(struct bt_vcpu *v, const struct lockstep_state *s, unsigned instructions)
{
	const struct bt_vcpu *at = (const void *)s->vcpu;
	unsigned offset = (unsigned)(at->rip & 0xfff);
	const struct fetch_entry *f = tlb_fetch(v, at->rip);
	struct block_facts facts = { 0 };
	struct insn i;
	bool more;

	for (unsigned k = 0; f && f->host && k < instructions && offset < BT_PAGE_SIZE; k++) {
		const ZydisAccessedFlags *a;

		if (!insn_decode(&i, at->mode, f->host + offset, BT_PAGE_SIZE - offset, &more))
			break;
		facts.random |= i.d.insn.mnemonic == ZYDIS_MNEMONIC_RDRAND || i.d.insn.mnemonic == ZYDIS_MNEMONIC_RDSEED;
		a = i.d.insn.cpu_flags;
		if (a) {
			insn_classify(&i, at->mode);
			facts.undefined &= ~(i.killed & (a->modified | a->set_0 | a->set_1));
			facts.undefined |= a->undefined;
		}
		offset += i.d.insn.length;
	}
	return facts;
}

static const char *difference(struct bt_vcpu *v, const struct bt_lockstep *l, const struct block_facts *facts)
{
	const struct bt_vcpu *a = (const void *)l->single.vcpu, *b = (const void *)l->whole.vcpu;
	bool faulted = a->exit_code == BT_EXIT_FAULT;
	uint64_t differing;

	if (a->exit_code != b->exit_code && !(goes_on(a) && goes_on(b)))
		return "how it ended";
	if (a->rip != b->rip)
		return "rip";
	if (memcmp(a->gprs, b->gprs, sizeof(a->gprs)))
		return "general registers";
	differing = (bt_rflags(a) ^ bt_rflags(b)) & (flags_that_count(v) | ~(uint64_t)FLAGS_ARITHMETIC);
	if (differing && !v->vm->exact_flags)
		differing &= ~(uint64_t)facts->undefined;
	if (differing)
		return "flags";
	if (a->fs_base != b->fs_base || a->gs_base != b->gs_base || a->kernel_gs_base != b->kernel_gs_base)
		return "segment bases";
	if (faulted && (a->fault.vector != b->fault.vector || a->fault.error != b->fault.error ||
			       a->fault.has_error != b->fault.has_error || (a->fault.vector == VECTOR_PF && a->cr2 != b->cr2)))
		return "exception";
	if (vectors_differ(l->single.fpu, l->whole.fpu))
		return "vector state";
	for (unsigned k = 0; k < l->pages; k++)
		if (memcmp(l->page[k].host, l->page[k].after, BT_PAGE_SIZE))
			return "memory";
	return NULL;
}

static void print_state(const char *name, const struct lockstep_state *s)
{
	const struct bt_vcpu *v = (const void *)s->vcpu;

	fprintf(stderr, "%s: exit %u, rip %lx, rflags %lx, cr2 %lx, vector %d\n ", name, v->exit_code, v->rip, bt_rflags(v), v->cr2,
		v->fault.vector);
	for (int k = 0; k < 16; k++)
		fprintf(stderr, " %lx%s", v->gprs[k], k == 7 ? "\n " : k == 15 ? "\n" : "");
}

static void print_code(struct bt_vcpu *v, const struct lockstep_state *s, unsigned instructions)
{
	const struct bt_vcpu *at = (const void *)s->vcpu;
	unsigned offset = (unsigned)(at->rip & 0xfff);
	const struct fetch_entry *f = tlb_fetch(v, at->rip);
	ZydisFormatter formatter;

	if (!f || !f->host)
		return;
	ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
	for (unsigned k = 0; k < instructions; k++) {
		uint64_t rip = (at->rip & ~0xfffull) + offset;
		char text[128];
		struct insn i;
		bool more;

		if (offset >= BT_PAGE_SIZE || !insn_decode(&i, at->mode, f->host + offset, BT_PAGE_SIZE - offset, &more))
			break;
		ZydisFormatterFormatInstruction(&formatter, &i.d.insn, i.d.operands, i.d.insn.operand_count_visible, text,
			sizeof(text), rip, NULL);
		fprintf(stderr, "  %lx  %s\n", rip, text);
		offset += i.d.insn.length;
	}
}

static void print_difference(struct bt_vcpu *v, const struct bt_lockstep *l, const char *what, unsigned instructions)
{
	fprintf(stderr, "bt: lockstep: after %lu blocks, %s differs between single instructions and the block\n", l->compared, what);
	print_state("before", &l->before);
	print_state("single", &l->single);
	print_state("block", &l->whole);
	for (unsigned k = 0; k < l->pages; k++)
		for (unsigned n = 0; n < BT_PAGE_SIZE; n++)
			if (l->page[k].host[n] != l->page[k].after[n])
				fprintf(stderr, "  page %u, byte %x: before %02x, single %02x, block %02x\n", k, n,
					l->page[k].before[n], l->page[k].after[n], l->page[k].host[n]);
	print_code(v, &l->before, instructions);
}

/* ---- both runs ---- */

static void undo(struct bt_vcpu *v, struct bt_lockstep *l)
{
	for (unsigned k = 0; k < l->pages; k++)
		memcpy(l->page[k].host, l->page[k].before, BT_PAGE_SIZE);
	put_back(v, &l->before);
	forget_translations(v);
}

enum lockstep_result lockstep_run(struct bt_vcpu *v)
{
	struct bt_lockstep *l = v->private->lockstep;
	unsigned instructions = 0, one, flushes;
	struct block_facts facts;
	const char *what;
	bool slow;

	if (++l->due < v->vm->lockstep)
		return LOCKSTEP_NOT;
	l->due = 0;
	keep(v, &l->before);
	/* Translate first: how many instructions there are. */
	v->mode |= BT_MODE_ALONE;
	{
		struct bt_block *block = block_find(v, &slow);

		instructions = block ? block->sides : 0;
	}
	put_back(v, &l->before);
	if (!instructions)
		return LOCKSTEP_NOT;
	flushes = (unsigned)v->vm->flushes;
	l->pages = 0;
	l->overflow = false;
	forget_translations(v);
	l->watching = true;
	for (unsigned k = 0; k < instructions; k++) {
		if (!run_block(v, BT_MODE_SINGLE, &one)) {
			l->overflow = true;
			break;
		}
		if (!goes_on(v))
			break;
	}
	keep(v, &l->single);
	for (unsigned k = 0; k < l->pages; k++)
		memcpy(l->page[k].after, l->page[k].host, BT_PAGE_SIZE);
	undo(v, l);
	/* A kick may end a string instruction early, once and not the other time. */
	if (l->overflow || v->kick || flushes != v->vm->flushes || !run_block(v, BT_MODE_ALONE, &one)) {
		l->watching = false;
		l->left_out++;
		put_back(v, &l->before);
		return LOCKSTEP_NOT;
	}
	l->watching = false;
	if (v->kick || flushes != v->vm->flushes) {
		l->left_out++;
		return LOCKSTEP_RAN;
	}
	keep(v, &l->whole);
	facts = facts_of(v, &l->before, instructions);
	if (facts.random) {
		l->left_out++;
		return LOCKSTEP_RAN;
	}
	what = difference(v, l, &facts);
	if (what) {
		print_difference(v, l, what, instructions);
		return LOCKSTEP_DIFFERS;
	}
	l->compared++;
	return LOCKSTEP_RAN;
}
