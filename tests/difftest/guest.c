/* Runs a case in a guest of the engine under test: long mode, ring 3 or 0, page tables that map the arena's pages at
 * the arena's addresses and nothing else. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "difftest.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "engine/engine.h"
#include "machine/memory.h"

#define GUEST_MEMORY (4u << 20)
#define TABLES 0x10000u /* four levels, a page each */
#define PTE_P 1ull
#define PTE_W 2ull
#define PTE_U 4ull
#define PTE_NX (1ull << 63)

#define CR0_LONG 0x80050033u /* PG AM WP NE ET MP PE: as Linux sets it */
#define CR4_PAE 0x20u
#define CR4_OSFXSR 0x200u
#define CR4_OSXMMEXCPT 0x400u
#define CR4_FSGSBASE 0x10000u
#define CR4_OSXSAVE 0x40000u
#define EFER_SCE_LME_LMA_NXE 0xd01u

#define CODE64 (SEGMENT_P | SEGMENT_S | 0xb | SEGMENT_L | SEGMENT_G)
#define DATA (SEGMENT_P | SEGMENT_S | 0x3 | SEGMENT_DB | SEGMENT_G)

struct guest {
	const struct engine *engine;
	struct guest_memory memory;
	struct engine_vm *vm;
	struct engine_vcpu *vcpu;
	struct engine_state state;
	bool control_set;
};

/* The arena's pages are not neighbours in guest memory, so that an access across two of them needs two translations. */
static uint64_t page_gpa(unsigned page)
{
	return 0x100000 + (page * 5 % ARENA_PAGES) * 0x3000;
}

static void put_entry(struct guest *guest, uint64_t table, uint64_t index, uint64_t entry)
{
	memory_write(&guest->memory, table + index * 8, &entry, 8);
}

static void build_tables(struct guest *guest)
{
	for (unsigned level = 0; level < 3; level++)
		put_entry(guest, TABLES + level * PAGE_BYTES, ARENA_BASE >> (39 - 9 * level) & 511,
			(TABLES + (level + 1) * PAGE_BYTES) | PTE_P | PTE_W | PTE_U);
	for (unsigned i = 0; i < ARENA_PAGES; i++) {
		static const uint64_t bits[] = {[ARENA_DATA] = PTE_P | PTE_W | PTE_U | PTE_NX,
			[ARENA_READONLY] = PTE_P | PTE_U | PTE_NX,
			[ARENA_CODE] = PTE_P | PTE_U};

		if (arena_layout[i] != ARENA_NONE)
			put_entry(guest, TABLES + 3 * PAGE_BYTES, i, page_gpa(i) | bits[arena_layout[i]]);
	}
}

/* The board of this guest: no device at all. */
static uint64_t no_read(void *opaque, unsigned cpu, uint64_t gpa, unsigned size)
{
	return ~0ull;
}

static void no_write(void *opaque, unsigned cpu, uint64_t gpa, unsigned size, uint64_t value)
{
}

static uint64_t no_port_read(void *opaque, unsigned cpu, uint16_t port, unsigned size)
{
	return ~0ull;
}

static void no_port_write(void *opaque, unsigned cpu, uint16_t port, unsigned size, uint64_t value)
{
}

static bool no_msr_read(void *opaque, unsigned cpu, uint32_t msr, uint64_t *value)
{
	return false;
}

static bool no_msr_write(void *opaque, unsigned cpu, uint32_t msr, uint64_t value)
{
	return false;
}

static uint8_t no_cr8_read(void *opaque, unsigned cpu)
{
	return 0;
}

static void no_cr8_write(void *opaque, unsigned cpu, uint8_t value)
{
}

static int no_interrupt(void *opaque, unsigned cpu)
{
	return -1;
}

static bool no_pending(void *opaque, unsigned cpu)
{
	return false;
}

static const struct engine_board no_board = {
	.pio_read = no_port_read,
	.pio_write = no_port_write,
	.mmio_read = no_read,
	.mmio_write = no_write,
	.msr_read = no_msr_read,
	.msr_write = no_msr_write,
	.cr8_read = no_cr8_read,
	.cr8_write = no_cr8_write,
	.interrupt_ack = no_interrupt,
	.interrupt_pending = no_pending,
};

int guest_create(struct guest **result, const struct engine *engine, const struct cpu_model *model,
	bool one_instruction_blocks, bool exact_flags, struct error *err)
{
	scope_free struct guest *guest = aligned_alloc(64, align_up(sizeof(*guest), 64));
	struct engine_config config = {.cpus = 1,
		.model = model,
		.board = &no_board,
		.stop_on_exception = true,
		.one_instruction_blocks = one_instruction_blocks,
		.exact_flags = exact_flags};
	int ret;

	if (!guest)
		return error_set(err, ENOMEM, "no memory for a guest");
	memset(guest, 0, sizeof(*guest));
	guest->engine = engine;
	ret = engine->probe(err);
	if (ret)
		return ret;
	ret = memory_create(&guest->memory, GUEST_MEMORY, err);
	if (ret)
		return ret;
	build_tables(guest);
	config.memory = &guest->memory;
	ret = engine->vm_create(&guest->vm, &config, err);
	if (!ret)
		ret = engine->vcpu_create(guest->vm, 0, &guest->vcpu, err);
	if (ret) {
		memory_destroy(&guest->memory);
		return error_wrap(err, "engine %s", engine->name);
	}
	engine->vcpu_reset(guest->vcpu, false);
	engine->vcpu_get(guest->vcpu, ENGINE_STATE_ALL, &guest->state);
	*result = take_ptr(guest);
	return 0;
}

void guest_destroy(struct guest *guest)
{
	guest->engine->vcpu_destroy(guest->vcpu);
	guest->engine->vm_destroy(guest->vm);
	memory_destroy(&guest->memory);
	free(guest);
}

static void set_segments(struct guest *guest, const struct test_case *t)
{
	struct engine_segment *s = guest->state.segments;
	unsigned dpl = t->ring0 ? 0 : 3;

	/* selectors as in a 64-bit Linux process */
	s[ENGINE_CS] =
		(struct engine_segment){0, 0xffffffff, t->ring0 ? 0x10 : 0x33, CODE64 | dpl << SEGMENT_DPL_SHIFT};
	s[ENGINE_SS] = (struct engine_segment){0, 0xffffffff, t->ring0 ? 0x18 : 0x2b, DATA | dpl << SEGMENT_DPL_SHIFT};
	for (unsigned i = 0; i < 2; i++)
		s[i ? ENGINE_ES : ENGINE_DS] = (struct engine_segment){0, 0xffffffff, 0, DATA | 3 << SEGMENT_DPL_SHIFT};
	s[ENGINE_TR] = (struct engine_segment){.limit = 0x66, .attributes = 0x8b}; /* no room for a port bitmap */
	s[ENGINE_FS] = (struct engine_segment){t->state.fs_base, 0xffffffff, 0, DATA | 3 << SEGMENT_DPL_SHIFT};
	s[ENGINE_GS] = (struct engine_segment){t->state.gs_base, 0xffffffff, 0, DATA | 3 << SEGMENT_DPL_SHIFT};
}

static void set_control(struct engine_state *s)
{
	s->cr0 = CR0_LONG;
	s->cr3 = TABLES;
	s->cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_FSGSBASE | CR4_OSXSAVE;
	s->efer = EFER_SCE_LME_LMA_NXE;
	s->xcr0 = xsave_layout()->xcr0;
}

/* Only what changed is written: writing code pages makes the engine throw its translations away. */
static void put_pages(struct guest *guest, uint8_t pages[ARENA_PAGES][PAGE_BYTES])
{
	for (unsigned i = 0; i < ARENA_PAGES; i++) {
		const void *now = memory_for_read(&guest->memory, page_gpa(i), PAGE_BYTES);

		if (arena_layout[i] != ARENA_NONE && memcmp(now, pages[i], PAGE_BYTES))
			memory_write(&guest->memory, page_gpa(i), pages[i], PAGE_BYTES);
	}
}

void guest_execute(
	struct guest *guest, const struct test_case *t, uint8_t pages[ARENA_PAGES][PAGE_BYTES], struct outcome *out)
{
	struct engine_state *s = &guest->state;
	struct engine_exit exit = {0};
	struct error err = {0};
	unsigned mask = ENGINE_STATE_GPRS | ENGINE_STATE_SEGMENTS | ENGINE_STATE_FPU;

	put_pages(guest, pages);
	memcpy(s->gprs, t->state.gpr, sizeof(s->gprs));
	s->rip = t->state.rip;
	s->rflags = t->state.rflags;
	set_segments(guest, t);
	memcpy(s->xsave, t->state.xsave, sizeof(s->xsave));
	s->xsave_size = xsave_layout()->size;
	if (!guest->control_set) {
		set_control(s);
		mask |= ENGINE_STATE_CONTROL;
		guest->control_set = true;
	}
	out->vector = OUTCOME_ENGINE_EXIT;
	if (guest->engine->vcpu_set(guest->vcpu, mask, s, &err)) {
		snprintf(out->message, sizeof(out->message), "vcpu_set: %.200s", err.text);
		return;
	}
	guest->engine->vcpu_run(guest->vcpu, &exit);
	guest->engine->vcpu_get(guest->vcpu, mask, s);
	memcpy(out->state.gpr, s->gprs, sizeof(s->gprs));
	out->state.rip = s->rip;
	out->state.rflags = s->rflags;
	out->state.fs_base = s->segments[ENGINE_FS].base;
	out->state.gs_base = s->segments[ENGINE_GS].base;
	memcpy(out->state.xsave, s->xsave, sizeof(s->xsave));
	for (unsigned i = 0; i < ARENA_PAGES; i++)
		if (arena_layout[i] != ARENA_NONE)
			memory_read(&guest->memory, page_gpa(i), out->pages[i], PAGE_BYTES);
	if (exit.reason == ENGINE_EXIT_EXCEPTION) {
		out->vector = exit.vector;
		out->error_code = exit.error_code;
		out->cr2 = exit.vector == 14 ? exit.address : 0;
	} else {
		snprintf(out->message, sizeof(out->message), "exit %d: %.200s", exit.reason, exit.message);
	}
}
