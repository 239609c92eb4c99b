/* A stand-in engine: the oracle behind engine/engine.h. It reads the arena through the guest's page tables, so
 * comparing it with the oracle proves everything of the tester but the engine: determinism, page tables, state
 * transfer. */
#include <stdlib.h>
#include <string.h>

#include "difftest.h"
#include "base/util.h"
#include "engine/engine.h"
#include "machine/memory.h"

#define PTE_P 1ull
#define PTE_W 2ull
#define PTE_U 4ull
#define PTE_NX (1ull << 63)

struct engine_vm {
	struct guest_memory *memory;
};

struct engine_vcpu {
	struct engine_vm *vm;
	struct engine_state state;
};

static int native_probe(struct error *err)
{
	return 0;
}

static int native_vm_create(struct engine_vm **vm, const struct engine_config *config, struct error *err)
{
	*vm = calloc(1, sizeof(**vm));
	if (!*vm)
		return error_set(err, ENOMEM, "no memory for the stand-in engine");
	(*vm)->memory = config->memory;
	return native_init(err);
}

static void native_vm_destroy(struct engine_vm *vm)
{
	free(vm);
}

static int native_vcpu_create(struct engine_vm *vm, unsigned cpu, struct engine_vcpu **vcpu, struct error *err)
{
	*vcpu = aligned_alloc(64, align_up(sizeof(**vcpu), 64));
	if (!*vcpu)
		return error_set(err, ENOMEM, "no memory for the stand-in engine's vCPU");
	memset(*vcpu, 0, sizeof(**vcpu));
	(*vcpu)->vm = vm;
	return 0;
}

static void native_vcpu_destroy(struct engine_vcpu *vcpu)
{
	free(vcpu);
}

static void native_vcpu_reset(struct engine_vcpu *vcpu, bool init)
{
}

static void native_vcpu_get(struct engine_vcpu *vcpu, unsigned mask, struct engine_state *state)
{
	*state = vcpu->state;
}

static int native_vcpu_set(struct engine_vcpu *vcpu, unsigned mask, const struct engine_state *state, struct error *err)
{
	struct engine_state *s = &vcpu->state;

	if (mask & ENGINE_STATE_GPRS) {
		memcpy(s->gprs, state->gprs, sizeof(s->gprs));
		s->rip = state->rip;
		s->rflags = state->rflags;
	}
	if (mask & ENGINE_STATE_SEGMENTS)
		memcpy(s->segments, state->segments, sizeof(s->segments));
	if (mask & ENGINE_STATE_CONTROL)
		s->cr3 = state->cr3;
	if (mask & ENGINE_STATE_FPU)
		memcpy(s->xsave, state->xsave, sizeof(s->xsave));
	return 0;
}

/* The guest page that a virtual address maps to, or NULL; *pte gets its entry. */
static uint8_t *walk(struct engine_vcpu *vcpu, uint64_t address, uint64_t *pte)
{
	uint64_t table = vcpu->state.cr3;

	for (int shift = 39; shift >= 12; shift -= 9) {
		uint64_t at = (table & 0xffffffffff000ull) + (address >> shift & 511) * 8;

		if (!memory_read(vcpu->vm->memory, at, &table, 8) || !(table & PTE_P))
			return NULL;
	}
	*pte = table;
	return memory_for_write(vcpu->vm->memory, table & 0xffffffffff000ull, PAGE_BYTES);
}

static bool check_protection(enum arena_kind kind, uint64_t pte)
{
	bool write = pte & PTE_W, execute = !(pte & PTE_NX);

	return pte & PTE_U && write == (kind == ARENA_DATA) && execute == (kind == ARENA_CODE);
}

static void native_vcpu_run(struct engine_vcpu *vcpu, struct engine_exit *exit)
{
	struct engine_state *s = &vcpu->state;
	static struct outcome out;
	static struct cpu_state in;

	*exit = (struct engine_exit){.reason = ENGINE_EXIT_ERROR};
	memcpy(in.gpr, s->gprs, sizeof(in.gpr));
	in.rip = s->rip;
	in.rflags = s->rflags;
	in.fs_base = s->segments[ENGINE_FS].base;
	in.gs_base = s->segments[ENGINE_GS].base;
	memcpy(in.xsave, s->xsave, sizeof(in.xsave));
	for (unsigned attempt = 0; attempt < 3; attempt++) {
		for (unsigned i = 0; i < ARENA_PAGES; i++) {
			uint64_t pte = 0;
			uint8_t *page = walk(vcpu, ARENA_BASE + i * PAGE_BYTES, &pte);

			if (!page != (arena_layout[i] == ARENA_NONE) ||
				(page && !check_protection(arena_layout[i], pte))) {
				strcpy(exit->message, "the guest's page tables are not the arena's");
				return;
			}
			if (page && memcmp(native_page(i), page, PAGE_BYTES))
				memcpy(native_page(i), page, PAGE_BYTES);
		}
		native_execute(&in, &out);
		if (out.vector != OUTCOME_TIMEOUT)
			break;
	}
	if (out.vector < 0) {
		strcpy(exit->message, "endless");
		return;
	}
	for (unsigned i = 0; i < ARENA_PAGES; i++) {
		uint64_t pte;
		uint8_t *page = walk(vcpu, ARENA_BASE + i * PAGE_BYTES, &pte);

		if (page && arena_layout[i] == ARENA_DATA)
			memcpy(page, native_page(i), PAGE_BYTES);
	}
	memcpy(s->gprs, out.state.gpr, sizeof(s->gprs));
	s->rip = out.state.rip;
	s->rflags = out.state.rflags;
	memcpy(s->xsave, out.state.xsave, sizeof(s->xsave));
	exit->reason = ENGINE_EXIT_EXCEPTION;
	exit->vector = out.vector;
	exit->error_code = out.error_code;
	if (out.vector == 14 && !(s->segments[ENGINE_CS].selector & 3))
		exit->error_code &= ~4u; /* ring 0 is ring 3 here; its page faults are told apart */
	exit->address = out.cr2;
}

const struct engine engine_native = {
	.name = "native",
	.probe = native_probe,
	.vm_create = native_vm_create,
	.vm_destroy = native_vm_destroy,
	.vcpu_create = native_vcpu_create,
	.vcpu_destroy = native_vcpu_destroy,
	.vcpu_reset = native_vcpu_reset,
	.vcpu_get = native_vcpu_get,
	.vcpu_set = native_vcpu_set,
	.vcpu_run = native_vcpu_run,
};
