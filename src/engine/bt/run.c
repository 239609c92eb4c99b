/* The engine's table, and the loop of a vCPU: look at events, find the block, run it, see why it came back. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <asm/prctl.h>

#include "engine/bt/bt.h"
#include "engine/tsc.h"

struct engine_vm {
	struct bt_vm bt;
	uint64_t tsc_start;
};

struct engine_vcpu {
	struct bt_vcpu bt;
};

/* ---- flags, mode, exceptions ---- */

uint64_t bt_rflags(const struct bt_vcpu *v)
{
	return v->eflags | 2 | ((v->arith >> 8) & (FLAGS_ARITHMETIC & 0xff)) | (v->arith & 1 ? FLAG_OF : 0) |
		(v->iflag ? FLAG_IF : 0) | (v->dflag ? FLAG_DF : 0) | (v->acflag ? FLAG_AC : 0);
}

void bt_set_rflags(struct bt_vcpu *v, uint64_t f)
{
	uint64_t rest = FLAG_TF | FLAG_IOPL | FLAG_NT | FLAG_RF | FLAG_VM | FLAG_VIF | FLAG_VIP | FLAG_ID;
	bool mode_changes = ((f ^ v->eflags) & FLAG_VM) || !!(f & FLAG_AC) != v->acflag;

	v->eflags = f & rest;
	v->arith = (uint16_t)(((f & FLAGS_ARITHMETIC & 0xff) | 2) << 8 | (f & FLAG_OF ? 1 : 0));
	v->iflag = !!(f & FLAG_IF);
	v->dflag = !!(f & FLAG_DF);
	v->acflag = !!(f & FLAG_AC);
	if (mode_changes)
		bt_mode_update(v);
}

/* Writable data without a limit that could be met. */
static bool is_open(const struct engine_segment *s)
{
	return s->limit == 0xffffffff && (s->attributes & (SEGMENT_P | SEGMENT_S | 0xe)) == (SEGMENT_P | SEGMENT_S | 2);
}

static bool is_flat(const struct engine_segment *s)
{
	return s->base == 0 && s->limit == 0xffffffff && (s->attributes & SEGMENT_P);
}

void bt_mode_update(struct bt_vcpu *v)
{
	const struct engine_segment *cs = &v->segments[ENGINE_CS], *ss = &v->segments[ENGINE_SS];
	bool real = !(v->cr0 & CR0_PE) || (v->eflags & FLAG_VM);
	uint32_t mode;

	mode = v->cpl == 3 ? BT_SET_USER : v->acflag && (v->cr4 & CR4_SMAP) ? BT_SET_AC : BT_SET_SUPERVISOR;
	if ((v->efer & EFER_LMA) && (cs->attributes & SEGMENT_L)) {
		mode |= BT_MODE_CODE64 | BT_MODE_FLAT;
	} else {
		if (cs->attributes & SEGMENT_DB)
			mode |= BT_MODE_CODE32;
		if (ss->attributes & SEGMENT_DB)
			mode |= BT_MODE_STACK32;
		mode |= is_open(&v->segments[ENGINE_FS]) ? BT_MODE_OPEN_FS : 0;
		mode |= is_open(&v->segments[ENGINE_GS]) ? BT_MODE_OPEN_GS : 0;
		if (!real && is_flat(cs) && is_flat(ss) && is_flat(&v->segments[ENGINE_DS]) &&
			is_flat(&v->segments[ENGINE_ES]) && (mode & BT_MODE_STACK32))
			mode |= BT_MODE_FLAT;
	}
	if (v->cr0 & (CR0_TS | CR0_EM))
		mode |= BT_MODE_NO_FPU;
	if (!(v->cr4 & CR4_OSXSAVE))
		mode |= BT_MODE_NO_XSAVE;
	if (real)
		mode |= BT_MODE_REAL;
	if (v->model->vendor == CPU_AMD)
		mode |= BT_MODE_AMD;
	v->mode = mode;
}

int bt_raise(struct bt_vcpu *v, int vector)
{
	v->fault.vector = vector;
	v->fault.error = 0;
	v->fault.has_error = false;
	v->fault.software = false;
	return BT_FAULT;
}

int bt_raise_error(struct bt_vcpu *v, int vector, uint32_t error)
{
	v->fault.vector = vector;
	v->fault.error = error;
	v->fault.has_error = true;
	v->fault.software = false;
	return BT_FAULT;
}

uint64_t bt_tsc(const struct bt_vcpu *v)
{
	return host_tsc() + v->tsc_offset;
}

/* ---- the loop ---- */

enum next { GO_ON, LEAVE };

static enum next leave(struct engine_exit *exit, enum engine_exit_reason reason)
{
	exit->reason = reason;
	return LEAVE;
}

/* Somebody set v->kick: another vCPU wants to be alone, a device wrote over code, an interrupt came, or we are to leave. */
static enum next on_kick(struct bt_vcpu *v, struct engine_exit *exit)
{
	struct bt_private *p = v->private;

	v->kick = 0;
	p->statistics[STAT_EXIT_KICK]++;
	if (v->vm->exclusive_wanted) {
		exclusive_leave_running(v);
		exclusive_enter_running(v);
	}
	if (v->vm->written_pending)
		cache_drop_pages(v);
	if (atomic_exchange(&p->flush_wanted, false))
		bt_tlb_flush(v, false);
	if (atomic_exchange(&p->leave, false))
		return leave(exit, ENGINE_EXIT_KICKED);
	return GO_ON;
}

static void take_interrupt(struct bt_vcpu *v)
{
	int vector;

	v->irq_pending = 0;
	fpu_park(v);
	paravirt_eoi_settle(v);
	vector = v->board->interrupt_ack(v->board->opaque, v->index);
	if (vector < 0)
		return;
	paravirt_eoi_offer(v);
	paravirt_tick(v);
	v->irq_pending = 1; /* there may be more */
	v->halted = false;
	v->private->statistics[STAT_INTERRUPTS]++;
	interrupt_deliver(v, (uint8_t)vector);
}

/* HOSTEL_BT_TRACE=1 prints exceptions, =2 every entry into translated code too: for finding where a guest goes wrong. */
static void trace(struct bt_vcpu *v, const char *what)
{
	fpu_park(v);
	fprintf(stderr, "bt: cpu%u %s rip %lx mode %x vector %d error %x cr2 %lx rflags %lx\n", v->index, what, v->rip, v->mode,
		v->fault.vector, v->fault.error, v->cr2, bt_rflags(v));
	for (int k = 0; k < 16; k++)
		fprintf(stderr, "%lx%c", v->gprs[k], k == 15 ? '\n' : ' ');
}

static enum next on_fault(struct bt_vcpu *v, struct engine_exit *exit)
{
	if (v->vm->trace)
		trace(v, "fault");
	v->private->statistics[STAT_EXCEPTIONS]++;
	if (v->vm->stop_on_exception) {
		if (v->fault.software)
			v->rip = v->fault.next_rip;
		exit->vector = v->fault.vector;
		exit->error_code = v->fault.has_error ? v->fault.error : 0;
		exit->address = v->cr2;
		return leave(exit, ENGINE_EXIT_EXCEPTION);
	}
	exception_deliver(v);
	return GO_ON;
}

static enum next on_result(struct bt_vcpu *v, enum system_result r, struct engine_exit *exit)
{
	switch (r) {
	case SYSTEM_DONE:
		return GO_ON;
	case SYSTEM_FAULT:
		return on_fault(v, exit);
	case SYSTEM_HALT:
		v->private->statistics[STAT_HALTS]++;
		if (atomic_exchange(&v->pv_unhalted, false)) {
			v->halted = false;
			return GO_ON;
		}
		v->halted = true;
		v->shadow = 0;
		return leave(exit, ENGINE_EXIT_HALTED);
	default:
		bt_raise(v, VECTOR_UD);
		return on_fault(v, exit);
	}
}

/* Remembers where the code at v->rip is, for indirect jumps. */
static void fill_jump_cache(struct bt_vcpu *v, const struct bt_block *b)
{
	enum bt_set set = v->mode & BT_MODE_SET;
	struct bt_private *p = v->private;
	struct jump_entry *j = &v->jump[set][jump_index(v->rip)];
	uint64_t page = v->rip & ~0xfffull, hashed = (v->rip >> 12) & 4095;
	const struct fetch_entry *f = &p->fetch[set][(v->rip >> 12) & (BT_FETCH_ENTRIES - 1)];

	if (j->way[0].pc == jump_no_pc(jump_index(v->rip))) {
		if (p->jumps_count[set] < ARRAY_SIZE(p->jumps_filled[set]))
			p->jumps_filled[set][p->jumps_count[set]] = (uint16_t)jump_index(v->rip);
		if (p->jumps_count[set] <= ARRAY_SIZE(p->jumps_filled[set]))
			p->jumps_count[set]++;
	}
	j->way[1] = j->way[0];
	j->way[0].pc = v->rip;
	j->way[0].code = b->entry_mem;
	p->jump_pages[set][hashed >> 6] |= 1ull << (hashed & 63);
	if (b->second_page) {
		hashed = (hashed + 1) & 4095;
		p->jump_pages[set][hashed >> 6] |= 1ull << (hashed & 63);
	}
	if (f->page != (page | 1) || !f->global)
		p->jump_local[set] = true;
	if (b->second_page) {
		f = &p->fetch[set][((page >> 12) + 1) & (BT_FETCH_ENTRIES - 1)];
		if (f->page != ((page + BT_PAGE_SIZE) | 1) || !f->global)
			p->jump_local[set] = true;
	}
}

static uint64_t site_rip(const struct bt_vcpu *v, const struct bt_site *s)
{
	uint64_t rip = v->page + (uint64_t)(int64_t)s->offset;

	return (v->mode & BT_MODE_CODE) == BT_MODE_CODE64 ? rip : (uint32_t)rip;
}

/* Finds the block at v->rip and runs until something wants C's attention; then sees to that. */
static enum next run_once(struct bt_vcpu *v, struct bt_site **link, struct engine_exit *exit)
{
	struct bt_vm *vm = v->vm;
	uint64_t *statistics = v->private->statistics, flushes;
	struct bt_site *site = *link;
	struct bt_block *block;
	bool slow;

	*link = NULL;
	if (vm->lockstep && !(v->mode & BT_MODE_SINGLE)) {
		switch (lockstep_run(v)) {
		case LOCKSTEP_RAN: goto ran;
		case LOCKSTEP_DIFFERS:
			exit->reason = ENGINE_EXIT_ERROR;
			snprintf(exit->message, sizeof(exit->message), "bt: lockstep: a block did not do what its instructions do");
			return LEAVE;
		default: break;
		}
	}
	flushes = vm->flushes;
	block = block_find(v, &slow);
	if (!block) {
		if (!slow)
			return on_fault(v, exit);
		statistics[STAT_EXIT_SLOW]++;
		return on_result(v, slow_execute(v), exit);
	}
	if (!(v->mode & BT_MODE_SINGLE)) {
		if (site && vm->flushes == flushes)
			block->second_page ? translate_far_link(v, site) : cache_link(vm, site, block);
		else if (!site)
			fill_jump_cache(v, block);
	}
	v->page = v->rip & ~0xfffull;
	if (vm->trace > 1)
		trace(v, "enter");
	fpu_unpark(v);
	vm->enter(v, block->entry_mem);
ran:
	switch ((enum bt_exit)v->exit_code) {
	case BT_EXIT_LOOKUP:
		statistics[STAT_EXIT_LOOKUP]++;
		if ((v->mode & BT_MODE_CODE) == BT_MODE_CODE64 && (uint64_t)((int64_t)(v->rip << 16) >> 16) != v->rip)
			return on_result(v, slow_branch_fault(v), exit);
		return GO_ON;
	case BT_EXIT_LINK:
		statistics[STAT_EXIT_LINK]++;
		site = (struct bt_site *)(uintptr_t)v->exit_argument;
		v->rip = site_rip(v, site);
		if (site->linkable)
			*link = site;
		return GO_ON;
	case BT_EXIT_SYSTEM:
		statistics[STAT_EXIT_SYSTEM]++;
		site = (struct bt_site *)(uintptr_t)v->exit_argument;
		v->rip = site_rip(v, site);
		return on_result(v, slow_system(v, site->decoded), exit);
	case BT_EXIT_SLOW:
		statistics[STAT_EXIT_SLOW]++;
		if (v->exit_argument)
			v->rip = site_rip(v, (struct bt_site *)(uintptr_t)v->exit_argument);
		return on_result(v, slow_execute(v), exit);
	case BT_EXIT_FAULT:
		statistics[STAT_EXIT_FAULT]++;
		return on_fault(v, exit);
	default:
		exit->reason = ENGINE_EXIT_ERROR;
		snprintf(exit->message, sizeof(exit->message), "bt: translated code came back with code %u", v->exit_code);
		return LEAVE;
	}
}

/* budget: instructions, 0 for no limit */
static void run(struct bt_vcpu *v, unsigned budget, struct engine_exit *exit)
{
	struct bt_private *p = v->private;
	struct bt_site *link = NULL;
	unsigned done = 0;

	signals_thread(v);
	syscall(SYS_arch_prctl, ARCH_SET_GS, v);
	memset(exit, 0, sizeof(*exit));
	exclusive_enter_running(v);
	paravirt_enter(v);
	v->irq_pending = 1; /* whatever came meanwhile is seen at the first look */
	for (;;) {
		uint32_t jump_mode;
		bool single, stepping, user;
		uint64_t traps;

		if (v->kick) {
			link = NULL;
			if (on_kick(v, exit) == LEAVE)
				break;
		}
		if (v->irq_pending && v->iflag && !v->shadow) {
			uint64_t rip = v->rip;

			take_interrupt(v);
			if (v->rip != rip)
				link = NULL;
		}
		if (v->triple_fault) {
			exit->reason = ENGINE_EXIT_TRIPLE_FAULT;
			exit->address = v->rip;
			break;
		}
		if (v->halted) {
			exit->reason = ENGINE_EXIT_HALTED;
			break;
		}
		if (budget && done == budget) {
			exit->reason = ENGINE_EXIT_STEPPED;
			break;
		}
		stepping = v->eflags & FLAG_TF;
		user = v->cpl == 3;
		traps = p->statistics[STAT_EXCEPTIONS];
		single = stepping || v->shadow || budget || v->vm->single;
		v->shadow = 0;
		if (single) {
			v->mode |= BT_MODE_SINGLE;
			link = NULL;
		} else {
			v->mode &= ~(uint32_t)BT_MODE_SINGLE;
		}
		jump_mode = v->mode & ~(uint32_t)BT_MODE_SINGLE;
		if (p->jump_mode[jump_mode & BT_MODE_SET] != jump_mode) {
			/* Jump cache entries are of one mode: forget those of another. */
			p->jump_mode[jump_mode & BT_MODE_SET] = jump_mode;
			tlb_clear_jumps(v);
		}
		if (run_once(v, &link, exit) == LEAVE)
			break;
		done++;
		/* The trap comes after the instruction that began with TF set, unless that went into the kernel. */
		if (stepping && traps == p->statistics[STAT_EXCEPTIONS] && user == (v->cpl == 3)) {
			v->dr[6] |= 1 << 14;
			bt_raise(v, VECTOR_DB);
			if (on_fault(v, exit) == LEAVE)
				break;
		}
	}
	v->mode &= ~(uint32_t)BT_MODE_SINGLE;
	fpu_park(v);
	paravirt_eoi_settle(v);
	paravirt_leave(v);
	exclusive_leave_running(v);
}

/* ---- the table ---- */

static int bt_probe(struct error *err)
{
	uint32_t a, b, c, d;

	__asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(1), "c"(0));
	if (!(c & 1u << 27))
		return error_set(err, ENOTSUP, "engine bt: the host CPU has no XSAVE; use a CPU of 2011 or later");
	return 0;
}

static void bt_vm_destroy(struct engine_vm *vm)
{
	if (!vm)
		return;
	if (vm->bt.memory && vm->bt.memory->written == cache_device_wrote) {
		vm->bt.memory->written = NULL;
		vm->bt.memory->slot_changes = NULL;
	}
	translate_destroy(&vm->bt);
	cache_destroy(&vm->bt);
	free(vm);
}

static int bt_vm_create(struct engine_vm **made, const struct engine_config *config, struct error *err)
{
	struct engine_vm *vm;
	int r = bt_probe(err);

	if (r < 0)
		return r;
	vm = calloc(1, sizeof(*vm));
	if (!vm)
		return error_set(err, ENOMEM, "no memory for a VM");
	vm->bt.model = config->model;
	vm->bt.board = config->board;
	vm->bt.memory = config->memory;
	vm->bt.cpus = config->cpus;
	vm->bt.stop_on_exception = config->stop_on_exception;
	vm->bt.exact_flags = config->exact_flags;
	vm->bt.lockstep = config->cpus == 1 ? config->lockstep : 0;
	vm->bt.single = config->one_instruction_blocks;
	vm->tsc_start = host_tsc();
	if (getenv("HOSTEL_BT_TRACE"))
		vm->bt.trace = atoi(getenv("HOSTEL_BT_TRACE"));
	r = cache_create(&vm->bt, err);
	if (r == 0)
		r = translate_create(&vm->bt, err);
	if (r < 0) {
		free(vm);
		return r;
	}
	config->memory->opaque = &vm->bt;
	config->memory->written = cache_device_wrote;
	config->memory->slot_changes = cache_memory_changes;
	signals_install();
	*made = vm;
	return 0;
}

static void bt_vcpu_statistics(struct engine_vcpu *vcpu, char *text, size_t size);

static void bt_vcpu_destroy(struct engine_vcpu *vcpu)
{
	char text[2048];

	struct bt_private *p;

	if (!vcpu)
		return;
	p = vcpu->bt.private;
	if (getenv("HOSTEL_BT_STATISTICS")) {
		bt_vcpu_statistics(vcpu, text, sizeof(text));
		fprintf(stderr, "vCPU %u\n%s", vcpu->bt.index, text);
	}
	if (vcpu->bt.vm)
		vcpu->bt.vm->vcpu[vcpu->bt.index] = NULL;
	slow_destroy(&vcpu->bt);
	lockstep_destroy(&vcpu->bt);
	fpu_destroy(&vcpu->bt);
	free(p);
	free(vcpu);
}

static void bt_vcpu_reset(struct engine_vcpu *vcpu, bool init)
{
	struct bt_vcpu *v = &vcpu->bt;

	v->halted = v->triple_fault = false;
	v->shadow = 0;
	system_reset(v, init);
	if (!init)
		fpu_reset(v);
	tlb_reset(v);
	bt_mode_update(v);
}

static int bt_vcpu_create(struct engine_vm *vm, unsigned cpu, struct engine_vcpu **made, struct error *err)
{
	struct engine_vcpu *vcpu = aligned_alloc(64, align_up(sizeof(*vcpu), 64));
	struct bt_vcpu *v;

	if (!vcpu)
		return error_set(err, ENOMEM, "no memory for a vCPU");
	memset(vcpu, 0, sizeof(*vcpu));
	v = &vcpu->bt;
	v->private = aligned_alloc(64, align_up(sizeof(*v->private), 64));
	if (v->private)
		memset(v->private, 0, sizeof(*v->private));
	v->self = v;
	v->index = cpu;
	v->vm = &vm->bt;
	v->model = vm->bt.model;
	v->board = vm->bt.board;
	v->tsc_offset = -vm->tsc_start;
	if (!v->private || fpu_create(v) || slow_create(v) || lockstep_create(v)) {
		bt_vcpu_destroy(vcpu);
		return error_set(err, ENOMEM, "no memory for a vCPU");
	}
	bt_vcpu_reset(vcpu, false);
	vm->bt.vcpu[cpu] = v;
	*made = vcpu;
	return 0;
}

static void bt_vcpu_get(struct engine_vcpu *vcpu, unsigned mask, struct engine_state *s)
{
	struct bt_vcpu *v = &vcpu->bt;

	if (mask & ENGINE_STATE_GPRS) {
		memcpy(s->gprs, v->gprs, sizeof(s->gprs));
		s->rip = v->rip;
		s->rflags = bt_rflags(v);
	}
	if (mask & ENGINE_STATE_SEGMENTS) {
		v->segments[ENGINE_FS].base = v->fs_base;
		v->segments[ENGINE_GS].base = v->gs_base;
		memcpy(s->segments, v->segments, sizeof(s->segments));
		s->gdt = v->gdt;
		s->idt = v->idt;
	}
	if (mask & ENGINE_STATE_CONTROL) {
		s->cr0 = v->cr0;
		s->cr2 = v->cr2;
		s->cr3 = v->cr3;
		s->cr4 = v->cr4;
		s->cr8 = v->board && v->board->cr8_read ? v->board->cr8_read(v->board->opaque, v->index) : 0;
		s->efer = v->efer;
		s->xcr0 = v->xcr0;
		memcpy(s->dr, v->dr, sizeof(s->dr));
		s->star = v->star;
		s->lstar = v->lstar;
		s->cstar = v->cstar;
		s->sfmask = v->sfmask;
		s->kernel_gs_base = v->kernel_gs_base;
		s->sysenter_cs = v->sysenter_cs;
		s->sysenter_esp = v->sysenter_esp;
		s->sysenter_eip = v->sysenter_eip;
		s->pat = v->pat;
		s->tsc_aux = v->tsc_aux;
		s->tsc = bt_tsc(v);
	}
	if (mask & ENGINE_STATE_FPU) {
		s->xsave_size = min(v->private->fpu_size, sizeof(s->xsave));
		memcpy(s->xsave, v->private->fpu, s->xsave_size);
	}
}

static int bt_vcpu_set(struct engine_vcpu *vcpu, unsigned mask, const struct engine_state *s, struct error *err)
{
	struct bt_vcpu *v = &vcpu->bt;

	if (mask & ENGINE_STATE_FPU && s->xsave_size > v->private->fpu_size)
		return error_set(err, EINVAL, "vCPU state: %zu bytes of XSAVE area, at most %zu can be taken", s->xsave_size,
			v->private->fpu_size);
	if (mask & ENGINE_STATE_CONTROL) {
		v->cr0 = s->cr0;
		v->cr2 = s->cr2;
		v->cr3 = s->cr3;
		v->cr4 = s->cr4;
		if (v->board && v->board->cr8_write)
			v->board->cr8_write(v->board->opaque, v->index, (uint8_t)s->cr8);
		v->efer = s->efer;
		v->xcr0 = s->xcr0;
		memcpy(v->dr, s->dr, sizeof(v->dr));
		v->star = s->star;
		v->lstar = s->lstar;
		v->cstar = s->cstar;
		v->sfmask = s->sfmask;
		v->kernel_gs_base = s->kernel_gs_base;
		v->sysenter_cs = s->sysenter_cs;
		v->sysenter_esp = s->sysenter_esp;
		v->sysenter_eip = s->sysenter_eip;
		v->pat = s->pat;
		v->tsc_aux = s->tsc_aux;
	}
	if (mask & ENGINE_STATE_SEGMENTS) {
		memcpy(v->segments, s->segments, sizeof(v->segments));
		v->gdt = s->gdt;
		v->idt = s->idt;
		for (int k = 0; k < ENGINE_SEGMENTS; k++)
			bt_segment_loaded(v, k);
	}
	if (mask & ENGINE_STATE_GPRS) {
		memcpy(v->gprs, s->gprs, sizeof(v->gprs));
		v->rip = s->rip;
		bt_set_rflags(v, s->rflags);
	}
	if (mask & ENGINE_STATE_FPU) {
		v->private->fpu_parked = true;
		memcpy(v->private->fpu, s->xsave, s->xsave_size);
	}
	bt_mode_update(v);
	if (mask & (ENGINE_STATE_CONTROL | ENGINE_STATE_SEGMENTS))
		tlb_reset(v);
	return 0;
}

static void bt_vcpu_run(struct engine_vcpu *vcpu, struct engine_exit *exit)
{
	struct bt_vcpu *v = &vcpu->bt;

	if (v->halted && (atomic_exchange(&v->pv_unhalted, false) ||
		(v->iflag && v->board->interrupt_pending(v->board->opaque, v->index))))
		v->halted = false;
	run(v, 0, exit);
}

static void bt_vcpu_step(struct engine_vcpu *vcpu, unsigned n, struct engine_exit *exit)
{
	run(&vcpu->bt, n, exit);
}

static void bt_vcpu_kick(struct engine_vcpu *vcpu, bool leave_too)
{
	struct bt_vcpu *v = &vcpu->bt;

	v->irq_pending = 1;
	if (leave_too)
		v->private->leave = true;
	v->kick = 1;
}

static uint64_t bt_vcpu_tsc(struct engine_vcpu *vcpu)
{
	return bt_tsc(&vcpu->bt);
}

static void bt_vcpu_statistics(struct engine_vcpu *vcpu, char *text, size_t size)
{
	static const char *const names[STAT_COUNT] = { "exit_lookup", "exit_system", "exit_fault", "exit_slow", "exit_kick",
		"exit_link", "translations", "translated_instructions", "tlb_fills", "tlb_flushes", "page_flushes", "exceptions",
		"interrupts", "code_writes", "invalidated_blocks", "cache_flushes", "halts", "string_instructions",
		"exclusive_sections" };
	size_t used = 0;

	if (size)
		text[0] = 0;
	for (int k = 0; k < STAT_COUNT && used < size; k++)
		used += (size_t)snprintf(text + used, size - used, "%s %lu\n", names[k], vcpu->bt.private->statistics[k]);
	if (used < size)
		used += (size_t)snprintf(text + used, size - used, "code_bytes %zu\nmetadata_bytes %zu\n", vcpu->bt.vm->code_used, vcpu->bt.vm->arena_used);
	if (used < size && vcpu->bt.vm->lockstep) {
		uint64_t compared, left_out;

		lockstep_statistics(&vcpu->bt, &compared, &left_out);
		snprintf(text + used, size - used, "lockstep_blocks %lu\nlockstep_left_out %lu\n", compared, left_out);
	}
}

const struct engine engine_bt = {
	.name = "bt",
	.probe = bt_probe,
	.vm_create = bt_vm_create,
	.vm_destroy = bt_vm_destroy,
	.vcpu_create = bt_vcpu_create,
	.vcpu_destroy = bt_vcpu_destroy,
	.vcpu_reset = bt_vcpu_reset,
	.vcpu_get = bt_vcpu_get,
	.vcpu_set = bt_vcpu_set,
	.vcpu_run = bt_vcpu_run,
	.vcpu_step = bt_vcpu_step,
	.vcpu_kick = bt_vcpu_kick,
	.vcpu_tsc = bt_vcpu_tsc,
	.vcpu_statistics = bt_vcpu_statistics,
};
