/* Exceptions, interrupts and the instructions that change privilege: delivery through the IDT (SDM volume 3, chapter 6;
 * 20.1 for real mode, 20.3 for virtual-8086 mode), IRET, SYSCALL, SYSENTER and their returns (volume 2).
 */
#include "engine/bt/system_internal.h"

/* What is being delivered. */
struct event {
	int vector;
	uint32_t error;
	bool has_error, software, external;
	uint64_t rip; /* the return address */
};

static int gate_fault(struct bt_vcpu *v, int vector, const struct event *e)
{
	return bt_raise_error(v, vector, (uint32_t)e->vector * 8 + 2);
}

/* Fault-class exceptions push RF, so that an instruction breakpoint does not hit again on return (SDM volume
 * 3, 17.3.1.1). */
static uint64_t pushed_flags(const struct bt_vcpu *v, const struct event *e)
{
	const uint32_t not_faults = 1 << VECTOR_DB | 1 << VECTOR_NMI | 1 << VECTOR_BP | 1 << VECTOR_OF | 1 << VECTOR_DF;
	uint64_t flags = bt_rflags(v);

	if (!e->software && !e->external && e->vector < 32 && !(not_faults >> e->vector & 1))
		flags |= FLAG_RF;
	return flags;
}

static void enter_handler(struct bt_vcpu *v, uint64_t rip, bool interrupt_gate)
{
	v->eflags &= ~(uint64_t)(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM);
	if (interrupt_gate)
		v->iflag = 0;
	v->rip = rip;
	v->shadow = 0;
	v->halted = false;
	bt_mode_update(v);
}

/* Checks on the code segment that a gate names; *raw is its descriptor, *cpl the handler's privilege. */
static int handler_code(struct bt_vcpu *v, uint16_t selector, uint64_t *raw, unsigned *cpl)
{
	uint16_t attributes;

	if (is_null(selector))
		return bt_raise_error(v, VECTOR_GP, 0);
	if (descriptor_read(v, selector, VECTOR_GP, raw) < 0)
		return BT_FAULT;
	attributes = descriptor_attributes(*raw);
	*cpl = attributes_dpl(attributes);
	if (!is_code(attributes) || *cpl > v->cpl ||
		(in_long_mode(v) && (attributes & (SEGMENT_L | SEGMENT_DB)) != SEGMENT_L))
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	if (!(attributes & SEGMENT_P))
		return bt_raise_error(v, VECTOR_NP, selector & 0xfffc);
	if (attributes & TYPE_CONFORMING)
		*cpl = v->cpl;
	return descriptor_accessed(v, selector, raw);
}

/* SDM volume 3, 6.14. One read for the gate, one for the code segment, one for the stack, one write for the frame. */
static int deliver_long(struct bt_vcpu *v, const struct event *e)
{
	uint64_t gate[2], raw, rsp = v->gprs[ENGINE_RSP], frame[6], rip;
	unsigned type, ist, cpl, first = e->has_error ? 0 : 1;
	uint16_t selector;

	if ((unsigned)e->vector * 16 + 15 > v->idt.limit)
		return gate_fault(v, VECTOR_GP, e);
	if (bt_read_linear(v, v->idt.base + (unsigned)e->vector * 16, gate, sizeof(gate), false) < 0)
		return BT_FAULT;
	type = gate[0] >> 40 & 0x1f;
	if ((type != 14 && type != 15) || (e->software && (gate[0] >> 45 & 3) < v->cpl))
		return gate_fault(v, VECTOR_GP, e);
	if (!(gate[0] >> 47 & 1))
		return gate_fault(v, VECTOR_NP, e);
	selector = (uint16_t)(gate[0] >> 16);
	if (handler_code(v, selector, &raw, &cpl) < 0)
		return BT_FAULT;
	rip = (gate[0] & 0xffff) | (gate[0] >> 32 & 0xffff0000) | gate[1] << 32;
	if (!is_canonical(rip))
		return bt_raise_error(v, VECTOR_GP, 0);
	ist = gate[0] >> 32 & 7;
	if (ist) {
		if (task_read64(v, 0x24 + 8 * (ist - 1), &rsp) < 0)
			return BT_FAULT;
	} else if (cpl != v->cpl) {
		if (task_read64(v, 4 + 8 * cpl, &rsp) < 0)
			return BT_FAULT;
	}
	rsp = (rsp & ~15ull) - (6 - first) * 8;
	if (!is_canonical(rsp))
		return bt_raise_error(v, VECTOR_SS, 0);
	frame[0] = e->error;
	frame[1] = e->rip;
	frame[2] = v->segments[ENGINE_CS].selector;
	frame[3] = pushed_flags(v, e);
	frame[4] = v->gprs[ENGINE_RSP];
	frame[5] = v->segments[ENGINE_SS].selector;
	if (bt_write_linear(v, rsp, frame + first, (6 - first) * 8, cpl == 3) < 0)
		return BT_FAULT;
	if (cpl != v->cpl)
		segment_set_null(v, ENGINE_SS, (uint16_t)cpl, cpl);
	code_set(v, selector, raw, cpl);
	v->gprs[ENGINE_RSP] = rsp;
	enter_handler(v, rip, type == 14);
	return 0;
}

/* Puts the frame of a protected-mode gate on the stack s. */
static int push_frame(struct bt_vcpu *v, struct stack *s, const struct event *e, unsigned size, bool inner)
{
	static const uint8_t data[] = {ENGINE_GS, ENGINE_FS, ENGINE_DS, ENGINE_ES};

	for (unsigned i = 0; inner && in_vm86(v) && i < ARRAY_SIZE(data); i++)
		if (stack_push(v, s, v->segments[data[i]].selector, size) < 0)
			return BT_FAULT;
	if (inner && (stack_push(v, s, v->segments[ENGINE_SS].selector, size) < 0 ||
			     stack_push(v, s, v->gprs[ENGINE_RSP], size) < 0))
		return BT_FAULT;
	if (stack_push(v, s, pushed_flags(v, e), size) < 0 ||
		stack_push(v, s, v->segments[ENGINE_CS].selector, size) < 0 || stack_push(v, s, e->rip, size) < 0)
		return BT_FAULT;
	return e->has_error ? stack_push(v, s, e->error, size) : 0;
}

/* SDM volume 3, 6.12.1; volume 2, INT n. */
static int deliver_protected(struct bt_vcpu *v, const struct event *e)
{
	uint64_t gate, raw, ss_raw = 0, sp, rip;
	unsigned type, cpl, size;
	uint16_t selector, ss;
	struct stack stack;
	bool inner;

	if ((unsigned)e->vector * 8 + 7 > v->idt.limit)
		return gate_fault(v, VECTOR_GP, e);
	if (bt_read_linear(v, v->idt.base + (unsigned)e->vector * 8, &gate, sizeof(gate), false) < 0)
		return BT_FAULT;
	type = gate >> 40 & 0x1f; /* a task gate (5) is refused like a type that does not exist */
	if ((type & ~9u) != 6 || (e->software && (gate >> 45 & 3) < v->cpl))
		return gate_fault(v, VECTOR_GP, e);
	if (!(gate >> 47 & 1))
		return gate_fault(v, VECTOR_NP, e);
	selector = (uint16_t)(gate >> 16);
	if (handler_code(v, selector, &raw, &cpl) < 0)
		return BT_FAULT;
	if (in_vm86(v) && cpl != 0)
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	size = type & 8 ? 4 : 2;
	rip = gate & 0xffff;
	if (size == 4)
		rip |= gate >> 32 & 0xffff0000;
	if (rip > descriptor_limit(raw))
		return bt_raise_error(v, VECTOR_GP, 0);
	inner = cpl != v->cpl;
	if (inner) {
		if (stack_from_task(v, cpl, &ss, &ss_raw, &sp) < 0)
			return BT_FAULT;
		stack = stack_inner(ss, ss_raw, sp, cpl);
	} else {
		stack = stack_current(v);
	}
	if (push_frame(v, &stack, e, size, inner) < 0)
		return BT_FAULT;
	if (in_vm86(v)) {
		segment_set_null(v, ENGINE_ES, 0, 0);
		segment_set_null(v, ENGINE_DS, 0, 0);
		segment_set_null(v, ENGINE_FS, 0, 0);
		segment_set_null(v, ENGINE_GS, 0, 0);
		v->fs_base = v->gs_base = 0;
	}
	if (inner)
		segment_set_raw(v, ENGINE_SS, ss, ss_raw);
	code_set(v, selector, raw, cpl);
	stack_commit(v, &stack);
	enter_handler(v, rip, !(type & 1));
	return 0;
}

static int deliver_real(struct bt_vcpu *v, const struct event *e)
{
	struct stack stack = stack_current(v);
	uint16_t entry[2];

	if ((unsigned)e->vector * 4 + 3 > v->idt.limit)
		return gate_fault(v, VECTOR_GP, e);
	if (bt_read_linear(v, v->idt.base + (unsigned)e->vector * 4, entry, sizeof(entry), false) < 0)
		return BT_FAULT;
	if (stack_push(v, &stack, bt_rflags(v), 2) < 0 ||
		stack_push(v, &stack, v->segments[ENGINE_CS].selector, 2) < 0 || stack_push(v, &stack, e->rip, 2) < 0)
		return BT_FAULT;
	stack_commit(v, &stack);
	segment_set_real(v, ENGINE_CS, entry[1]);
	v->acflag = 0;
	enter_handler(v, entry[0], true);
	return 0;
}

static int deliver_once(struct bt_vcpu *v, const struct event *e)
{
	if (in_long_mode(v))
		return deliver_long(v, e);
	if (in_real_mode(v))
		return deliver_real(v, e);
	return deliver_protected(v, e);
}

static bool is_contributory(int vector)
{
	return vector == VECTOR_DE || (vector >= VECTOR_TS && vector <= VECTOR_GP);
}

/* The exception to deliver after `second` came up while e was delivered (SDM volume 3, table 6-5). False: shut down. */
static bool combine(struct event *e, const struct bt_fault *second, uint64_t rip)
{
	bool benign = e->software || e->external;
	bool page = second->vector == VECTOR_PF, contributory = is_contributory(second->vector);

	if (!benign && e->vector == VECTOR_DF)
		return false;
	if (!benign &&
		((is_contributory(e->vector) && contributory) || (e->vector == VECTOR_PF && (page || contributory)))) {
		*e = (struct event){.vector = VECTOR_DF, .has_error = true, .rip = rip};
		return true;
	}
	/* EXT: the faulting access was not made by an instruction of the guest. */
	uint32_t ext = !e->software && !page && second->has_error;

	*e = (struct event){
		.vector = second->vector, .error = second->error | ext, .has_error = second->has_error, .rip = rip};
	return true;
}

static void deliver(struct bt_vcpu *v, struct event e)
{
	while (deliver_once(v, &e) < 0) {
		if (!combine(&e, &v->fault, v->rip)) {
			v->triple_fault = true;
			return;
		}
	}
}

void exception_deliver(struct bt_vcpu *v)
{
	const struct bt_fault *f = &v->fault;

	deliver(v, (struct event){.vector = f->vector,
			   .error = f->error,
			   .has_error = f->has_error,
			   .software = f->software,
			   .rip = f->software ? f->next_rip : v->rip});
}

void interrupt_deliver(struct bt_vcpu *v, uint8_t vector)
{
	deliver(v, (struct event){.vector = vector, .external = true, .rip = v->rip});
}

/* ---- returns ---- */

uint64_t flags_merge(const struct bt_vcpu *v, uint64_t image, unsigned size)
{
	uint64_t may = FLAGS_ARITHMETIC | FLAG_TF | FLAG_DF | FLAG_NT | FLAG_AC | FLAG_ID, old = bt_rflags(v);

	if (v->cpl <= iopl(v))
		may |= FLAG_IF;
	if (v->cpl == 0)
		may |= FLAG_IOPL;
	if (size == 2)
		may &= 0xffff;
	/* RF is set for the one instruction that follows and shows nowhere, as there are no instruction breakpoints */
	return (old & ~may & ~(uint64_t)FLAG_RF) | (image & may);
}

/* To virtual-8086 mode, from 32-bit code at CPL 0; the stack has ESP, SS, ES, DS, FS, GS left. */
static int iret_vm86(struct bt_vcpu *v, struct stack *stack, uint64_t rip, uint64_t cs, uint64_t flags)
{
	static const uint8_t order[] = {ENGINE_ES, ENGINE_DS, ENGINE_FS, ENGINE_GS};
	uint64_t sp, ss, data[4];

	if (stack_pop(v, stack, &sp, 4) < 0 || stack_pop(v, stack, &ss, 4) < 0)
		return BT_FAULT;
	for (unsigned i = 0; i < ARRAY_SIZE(order); i++)
		if (stack_pop(v, stack, &data[i], 4) < 0)
			return BT_FAULT;
	if (rip > 0xffff)
		return bt_raise_error(v, VECTOR_GP, 0);
	bt_set_rflags(v, flags_merge(v, flags, 4) | FLAG_VM | (flags & (FLAG_VIF | FLAG_VIP)));
	v->cpl = 3;
	segment_set_real(v, ENGINE_CS, (uint16_t)cs);
	segment_set_real(v, ENGINE_SS, (uint16_t)ss);
	for (unsigned i = 0; i < ARRAY_SIZE(order); i++)
		segment_set_real(v, order[i], (uint16_t)data[i]);
	v->fs_base = v->segments[ENGINE_FS].base;
	v->gs_base = v->segments[ENGINE_GS].base;
	v->gprs[ENGINE_RSP] = sp;
	v->rip = rip;
	bt_mode_update(v);
	return 0;
}

static int iret_real(struct bt_vcpu *v, struct stack *stack, unsigned size)
{
	uint64_t rip, cs, flags, merged;

	if (in_vm86(v) && iopl(v) < 3)
		return bt_raise_error(v, VECTOR_GP, 0);
	if (stack_pop(v, stack, &rip, size) < 0 || stack_pop(v, stack, &cs, size) < 0 ||
		stack_pop(v, stack, &flags, size) < 0)
		return BT_FAULT;
	if (rip > v->segments[ENGINE_CS].limit)
		return bt_raise_error(v, VECTOR_GP, 0);
	merged = flags_merge(v, flags, size);
	stack_commit(v, stack);
	bt_set_rflags(v, merged);
	segment_set_real(v, ENGINE_CS, (uint16_t)cs);
	v->rip = rip;
	bt_mode_update(v);
	return 0;
}

/* The part of IRET after all was popped and checked; ss_raw 0: SS becomes null. */
static void iret_commit(struct bt_vcpu *v, uint16_t cs, uint64_t raw, uint64_t rip, uint64_t flags)
{
	bool outer = (cs & 3u) != v->cpl;

	bt_set_rflags(v, flags);
	code_set(v, cs, raw, cs & 3u);
	if (outer)
		segments_drop_privileged(v);
	v->rip = rip;
	bt_mode_update(v);
}

/* From 64-bit code SS:RSP are always popped: one read takes the whole frame of the common operand size. */
static int iret_code64(struct bt_vcpu *v, unsigned size)
{
	uint64_t frame[5], raw, ss_raw, rip;
	uint16_t cs, ss;

	if (size == 8) {
		uint64_t rsp = v->gprs[ENGINE_RSP];

		if (!is_canonical(rsp) || !is_canonical(rsp + sizeof(frame) - 1))
			return bt_raise_error(v, VECTOR_SS, 0);
		if (bt_read_linear(v, rsp, frame, sizeof(frame), is_user(v)) < 0)
			return BT_FAULT;
	} else {
		struct stack stack = stack_current(v);

		for (unsigned i = 0; i < ARRAY_SIZE(frame); i++)
			if (stack_pop(v, &stack, &frame[i], size) < 0)
				return BT_FAULT;
	}
	rip = frame[0];
	cs = (uint16_t)frame[1];
	ss = (uint16_t)frame[4];
	if (return_check_code(v, cs, &raw) < 0 || return_check_stack(v, ss, cs & 3, raw >> 53 & 1, &ss_raw) < 0 ||
		code_check_target(v, raw, &rip) < 0)
		return BT_FAULT;
	frame[2] = flags_merge(v, frame[2], size);
	if (ss_raw)
		segment_set_raw(v, ENGINE_SS, ss, ss_raw);
	else
		segment_set_null(v, ENGINE_SS, ss, cs & 3);
	/* A 16-bit stack segment takes only SP, the upper bits leak from the kernel's RSP: as on hardware. */
	if (raw >> 53 & 1 || !ss_raw)
		v->gprs[ENGINE_RSP] = frame[3];
	else if (ss_raw >> 54 & 1)
		v->gprs[ENGINE_RSP] = (uint32_t)frame[3];
	else
		v->gprs[ENGINE_RSP] = (v->gprs[ENGINE_RSP] & ~0xffffull) | (frame[3] & 0xffff);
	iret_commit(v, cs, raw, rip, frame[2]);
	return 0;
}

static int iret_protected(struct bt_vcpu *v, struct stack *stack, unsigned size)
{
	uint64_t rip, cs, flags, sp = 0, ss = 0, raw, ss_raw = 0;
	bool outer;

	if (stack_pop(v, stack, &rip, size) < 0 || stack_pop(v, stack, &cs, size) < 0 ||
		stack_pop(v, stack, &flags, size) < 0)
		return BT_FAULT;
	if (size == 4 && flags & FLAG_VM && v->cpl == 0 && !in_long_mode(v))
		return iret_vm86(v, stack, rip, cs, flags);
	if (return_check_code(v, (uint16_t)cs, &raw) < 0)
		return BT_FAULT;
	outer = (cs & 3) != v->cpl;
	if (outer) {
		if (stack_pop(v, stack, &sp, size) < 0 || stack_pop(v, stack, &ss, size) < 0 ||
			return_check_stack(v, (uint16_t)ss, cs & 3, in_long_mode(v) && raw >> 53 & 1, &ss_raw) < 0)
			return BT_FAULT;
	}
	if (code_check_target(v, raw, &rip) < 0)
		return BT_FAULT;
	flags = flags_merge(v, flags, size);
	if (outer) {
		if (ss_raw)
			segment_set_raw(v, ENGINE_SS, (uint16_t)ss, ss_raw);
		else
			segment_set_null(v, ENGINE_SS, (uint16_t)ss, cs & 3);
		stack->mask = ss_raw >> 54 & 1 ? UINT32_MAX : 0xffff;
		stack->sp = sp;
	}
	stack_commit(v, stack);
	iret_commit(v, (uint16_t)cs, raw, rip, flags);
	return 0;
}

int iret_execute(struct bt_vcpu *v, unsigned size)
{
	struct stack stack;

	if (in_code64(v))
		return v->eflags & FLAG_NT ? bt_raise_error(v, VECTOR_GP, 0) : iret_code64(v, size);
	stack = stack_current(v);
	if (in_real_mode(v) || in_vm86(v))
		return iret_real(v, &stack, size);
	/* a nested task would be returned to by a task switch: there are none in long mode, nor in this engine */
	if (v->eflags & FLAG_NT)
		return bt_raise_error(v, VECTOR_GP, 0);
	return iret_protected(v, &stack, size);
}

/* ---- SYSCALL and SYSENTER ---- */

static void set_flat(struct bt_vcpu *v, uint16_t code, uint16_t stack, uint16_t code_attributes, unsigned cpl)
{
	uint16_t dpl = (uint16_t)(cpl << SEGMENT_DPL_SHIFT);

	segment_set(v, ENGINE_CS, (uint16_t)((code & 0xfffc) | cpl), 0, UINT32_MAX, code_attributes | dpl);
	segment_set(v, ENGINE_SS, (uint16_t)((stack & 0xfffc) | cpl), 0, UINT32_MAX, FLAT_DATA | dpl);
	v->cpl = (uint8_t)cpl;
}

/* Intel has SYSCALL in 64-bit code only; AMD also in compatibility and protected mode (APM volume 3, SYSCALL). */
int syscall_execute(struct bt_vcpu *v, uint64_t next)
{
	uint16_t selector = (uint16_t)(v->star >> 32) & 0xfffc;
	bool code64 = in_code64(v);
	uint64_t flags;

	if (!(v->efer & EFER_SCE) || in_real_mode(v) || in_vm86(v) || (!code64 && !is_amd(v)))
		return bt_raise(v, VECTOR_UD);
	v->gprs[ENGINE_RCX] = next;
	flags = bt_rflags(v) & ~(uint64_t)FLAG_RF;
	if (in_long_mode(v)) {
		v->gprs[11] = flags;
		flags &= ~v->sfmask;
		v->rip = code64 ? v->lstar : v->cstar;
		set_flat(v, selector, selector + 8, FLAT_CODE64, 0);
	} else {
		flags &= ~(uint64_t)FLAG_IF;
		v->rip = (uint32_t)v->star;
		set_flat(v, selector, selector + 8, FLAT_CODE32, 0);
	}
	bt_set_rflags(v, flags);
	bt_mode_update(v);
	return 0;
}

int sysret_execute(struct bt_vcpu *v, unsigned size)
{
	uint16_t selector = (uint16_t)(v->star >> 48);
	uint64_t rip = size == 8 ? v->gprs[ENGINE_RCX] : (uint32_t)v->gprs[ENGINE_RCX];
	/* what R11 gives: all but RF and VM; bit 1 is always set */
	const uint64_t from_r11 = 0x3c7fd7;

	if (!(v->efer & EFER_SCE) || in_real_mode(v) || in_vm86(v) || (!in_code64(v) && !is_amd(v)))
		return bt_raise(v, VECTOR_UD);
	if (v->cpl != 0)
		return bt_raise_error(v, VECTOR_GP, 0);
	if (size == 8 && !is_canonical(rip) && !is_amd(v))
		return bt_raise_error(v, VECTOR_GP, 0);
	if (in_long_mode(v))
		bt_set_rflags(v, (v->gprs[11] & from_r11) | 2);
	else
		bt_set_rflags(v, bt_rflags(v) | FLAG_IF);
	set_flat(v, size == 8 ? selector + 16 : selector, selector + 8, size == 8 ? FLAT_CODE64 : FLAT_CODE32, 3);
	v->rip = rip;
	bt_mode_update(v);
	/* AMD notices a bad address only once it is at CPL 3. */
	return is_canonical(rip) ? 0 : bt_raise_error(v, VECTOR_GP, 0);
}

/* AMD has SYSENTER only outside long mode. */
int sysenter_execute(struct bt_vcpu *v)
{
	bool long_mode = in_long_mode(v);

	if (long_mode && is_amd(v))
		return bt_raise(v, VECTOR_UD);
	if (in_real_mode(v) || is_null((uint16_t)v->sysenter_cs))
		return bt_raise_error(v, VECTOR_GP, 0);
	v->eflags &= ~(uint64_t)(FLAG_VM | FLAG_RF);
	v->iflag = 0;
	set_flat(v, (uint16_t)v->sysenter_cs, (uint16_t)((v->sysenter_cs & 0xfffc) + 8),
		long_mode ? FLAT_CODE64 : FLAT_CODE32, 0);
	v->gprs[ENGINE_RSP] = long_mode ? v->sysenter_esp : (uint32_t)v->sysenter_esp;
	v->rip = long_mode ? v->sysenter_eip : (uint32_t)v->sysenter_eip;
	bt_mode_update(v);
	return 0;
}

int sysexit_execute(struct bt_vcpu *v, unsigned size)
{
	uint16_t selector = (uint16_t)v->sysenter_cs & 0xfffc;
	uint64_t rip = v->gprs[ENGINE_RDX], rsp = v->gprs[ENGINE_RCX];

	if (in_long_mode(v) && is_amd(v))
		return bt_raise(v, VECTOR_UD);
	if (in_real_mode(v) || v->cpl != 0 || is_null(selector))
		return bt_raise_error(v, VECTOR_GP, 0);
	if (size == 8) {
		if (!is_canonical(rip) || !is_canonical(rsp))
			return bt_raise_error(v, VECTOR_GP, 0);
		set_flat(v, selector + 32, selector + 40, FLAT_CODE64, 3);
	} else {
		set_flat(v, selector + 16, selector + 24, FLAT_CODE32, 3);
		rip = (uint32_t)rip;
		rsp = (uint32_t)rsp;
	}
	v->gprs[ENGINE_RSP] = rsp;
	v->rip = rip;
	bt_mode_update(v);
	return 0;
}
