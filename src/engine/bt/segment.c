/* Segment registers, descriptor tables and far transfers (SDM volume 3, chapters 3 and 5; volume 2 under each
 * instruction). Every check comes before the first change, so that a fault leaves the vCPU as it was.
 */
#include "engine/bt/system_internal.h"

int descriptor_read(struct bt_vcpu *v, uint16_t selector, int vector, uint64_t *raw)
{
	uint64_t base = v->gdt.base;
	uint32_t limit = v->gdt.limit;

	if (selector & 4) {
		const struct engine_segment *ldt = &v->segments[ENGINE_LDTR];

		if (!(ldt->attributes & SEGMENT_P))
			return bt_raise_error(v, vector, selector & 0xfffc);
		base = ldt->base;
		limit = ldt->limit;
	}
	if ((selector | 7u) > limit)
		return bt_raise_error(v, vector, selector & 0xfffc);
	return bt_read_linear(v, base + (selector & 0xfff8), raw, sizeof(*raw), false);
}

int descriptor_accessed(struct bt_vcpu *v, uint16_t selector, uint64_t *raw)
{
	uint64_t base = selector & 4 ? v->segments[ENGINE_LDTR].base : v->gdt.base;
	uint8_t type;

	if (*raw >> 40 & TYPE_ACCESSED)
		return 0;
	*raw |= (uint64_t)TYPE_ACCESSED << 40;
	type = (uint8_t)(*raw >> 40);
	return bt_write_linear(v, base + (selector & 0xfff8) + 5, &type, sizeof(type), false);
}

/* What depends on a segment register has to follow it. The mode does not look at data segments in 64-bit code. */
static void segment_changed(struct bt_vcpu *v, int s)
{
	if (s == ENGINE_FS)
		v->fs_base = v->segments[s].base;
	else if (s == ENGINE_GS)
		v->gs_base = v->segments[s].base;
	if (!in_code64(v))
		bt_mode_update(v);
}

void bt_segment_loaded(struct bt_vcpu *v, int s)
{
	v->fs_base = v->segments[ENGINE_FS].base;
	v->gs_base = v->segments[ENGINE_GS].base;
	if (s != ENGINE_CS && s != ENGINE_SS)
		return;
	if (in_real_mode(v))
		v->cpl = 0;
	else if (in_vm86(v))
		v->cpl = 3;
	else
		v->cpl = (uint8_t)attributes_dpl(v->segments[ENGINE_SS].attributes);
}

void segment_set_real(struct bt_vcpu *v, int s, uint16_t selector)
{
	v->segments[s].selector = selector;
	v->segments[s].base = (uint64_t)selector << 4;
	if (in_vm86(v)) {
		v->segments[s].limit = 0xffff;
		v->segments[s].attributes = 0xf3;
	}
	/* in real mode limit and attributes stay as they were: "unreal mode" works as on hardware */
}

int segment_load(struct bt_vcpu *v, int s, uint16_t selector)
{
	unsigned rpl = selector & 3, dpl;
	uint16_t attributes;
	uint64_t raw;

	if (in_real_mode(v) || in_vm86(v)) {
		segment_set_real(v, s, selector);
		segment_changed(v, s);
		return 0;
	}
	if (is_null(selector)) {
		if (s == ENGINE_SS && (!in_code64(v) || v->cpl == 3 || rpl != v->cpl))
			return bt_raise_error(v, VECTOR_GP, 0);
		segment_set_null(v, s, selector, s == ENGINE_SS ? v->cpl : 0);
		segment_changed(v, s);
		return 0;
	}
	if (descriptor_read(v, selector, VECTOR_GP, &raw) < 0)
		return BT_FAULT;
	attributes = descriptor_attributes(raw);
	dpl = attributes_dpl(attributes);
	if (s == ENGINE_SS) {
		if (rpl != v->cpl || dpl != v->cpl || !is_writable_data(attributes))
			return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
		if (!(attributes & SEGMENT_P))
			return bt_raise_error(v, VECTOR_SS, selector & 0xfffc);
	} else {
		bool code = is_code(attributes);

		if (!(attributes & SEGMENT_S) || (code && !(attributes & TYPE_READABLE)))
			return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
		if (!(code && attributes & TYPE_CONFORMING) && (rpl > dpl || v->cpl > dpl))
			return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
		if (!(attributes & SEGMENT_P))
			return bt_raise_error(v, VECTOR_NP, selector & 0xfffc);
	}
	if (descriptor_accessed(v, selector, &raw) < 0)
		return BT_FAULT;
	segment_set_raw(v, s, selector, raw);
	segment_changed(v, s);
	return 0;
}

/* Base of a system descriptor: in long mode it has 16 bytes and the base's upper half is in the second eight. */
static int system_descriptor(struct bt_vcpu *v, uint16_t selector, uint64_t raw, uint64_t *base)
{
	uint64_t high;

	*base = descriptor_base(raw);
	if (!in_long_mode(v))
		return 0;
	if ((selector | 7u) + 8 > v->gdt.limit)
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	if (bt_read_linear(v, v->gdt.base + (selector & 0xfff8) + 8, &high, sizeof(high), false) < 0)
		return BT_FAULT;
	*base |= high << 32;
	if (!is_canonical(*base) || high >> 40 & 0x1f)
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	return 0;
}

int segment_load_ldt(struct bt_vcpu *v, uint16_t selector)
{
	uint64_t raw, base;

	if (is_null(selector)) {
		segment_set(v, ENGINE_LDTR, selector, 0, 0, 0x02);
		return 0;
	}
	if (selector & 4)
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	if (descriptor_read(v, selector, VECTOR_GP, &raw) < 0)
		return BT_FAULT;
	if ((raw >> 40 & 0x1f) != 2)
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	if (!(raw >> 47 & 1))
		return bt_raise_error(v, VECTOR_NP, selector & 0xfffc);
	if (system_descriptor(v, selector, raw, &base) < 0)
		return BT_FAULT;
	segment_set(v, ENGINE_LDTR, selector, base, descriptor_limit(raw), descriptor_attributes(raw));
	return 0;
}

int segment_load_task(struct bt_vcpu *v, uint16_t selector)
{
	uint64_t raw, base;
	unsigned type;
	uint8_t busy;

	if (is_null(selector))
		return bt_raise_error(v, VECTOR_GP, 0);
	if (selector & 4)
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	if (descriptor_read(v, selector, VECTOR_GP, &raw) < 0)
		return BT_FAULT;
	type = raw >> 40 & 0x1f;
	if (type != 9 && (type != 1 || in_long_mode(v)))
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	if (!(raw >> 47 & 1))
		return bt_raise_error(v, VECTOR_NP, selector & 0xfffc);
	if (system_descriptor(v, selector, raw, &base) < 0)
		return BT_FAULT;
	raw |= 2ull << 40;
	busy = (uint8_t)(raw >> 40);
	if (bt_write_linear(v, v->gdt.base + (selector & 0xfff8) + 5, &busy, sizeof(busy), false) < 0)
		return BT_FAULT;
	segment_set(v, ENGINE_TR, selector, base, descriptor_limit(raw), descriptor_attributes(raw));
	return 0;
}

void segments_drop_privileged(struct bt_vcpu *v)
{
	static const uint8_t data[] = {ENGINE_DS, ENGINE_ES, ENGINE_FS, ENGINE_GS};

	for (unsigned i = 0; i < ARRAY_SIZE(data); i++) {
		struct engine_segment *s = &v->segments[data[i]];

		if (is_null(s->selector) || attributes_dpl(s->attributes) >= v->cpl)
			continue;
		if (is_code(s->attributes) && s->attributes & TYPE_CONFORMING)
			continue;
		segment_set_null(v, data[i], 0, 0);
		if (data[i] == ENGINE_FS)
			v->fs_base = 0;
		else if (data[i] == ENGINE_GS)
			v->gs_base = 0;
	}
}

/* ---- the stack ---- */

struct stack stack_current(const struct bt_vcpu *v)
{
	const struct engine_segment *ss = &v->segments[ENGINE_SS];
	struct stack s = {.sp = v->gprs[ENGINE_RSP], .mask = UINT64_MAX, .user = is_user(v)};

	if (in_code64(v))
		return s;
	s.base = ss->base;
	s.limit = ss->limit;
	s.checked = true;
	s.big = ss->attributes & SEGMENT_DB;
	s.expand_down = (ss->attributes & (TYPE_CODE | TYPE_EXPAND_DOWN)) == TYPE_EXPAND_DOWN;
	s.mask = s.big ? UINT32_MAX : 0xffff;
	return s;
}

struct stack stack_inner(uint16_t selector, uint64_t raw, uint64_t sp, unsigned cpl)
{
	uint16_t attributes = descriptor_attributes(raw);
	struct stack s = {.base = descriptor_base(raw),
		.sp = sp,
		.limit = descriptor_limit(raw),
		.checked = true,
		.big = attributes & SEGMENT_DB,
		.expand_down = attributes & TYPE_EXPAND_DOWN,
		.user = cpl == 3,
		.fault_selector = selector & 0xfffc};

	s.mask = s.big ? UINT32_MAX : 0xffff;
	return s;
}

/* The linear address of size bytes at offset sp, or #SS. */
static int stack_address(struct bt_vcpu *v, const struct stack *s, uint64_t sp, unsigned size, uint64_t *linear)
{
	uint64_t offset = sp & s->mask, last = offset + size - 1;

	*linear = s->base + offset;
	if (!s->checked) {
		if (!is_canonical(*linear) || !is_canonical(*linear + size - 1))
			return bt_raise_error(v, VECTOR_SS, 0);
		return 0;
	}
	if (s->expand_down ? offset <= s->limit || last > (s->big ? UINT32_MAX : 0xffff) : last > s->limit)
		return bt_raise_error(v, VECTOR_SS, (uint32_t)s->fault_selector);
	*linear = (uint32_t)*linear;
	return 0;
}

int stack_push(struct bt_vcpu *v, struct stack *s, uint64_t value, unsigned size)
{
	uint64_t linear;

	if (stack_address(v, s, s->sp - size, size, &linear) < 0)
		return BT_FAULT;
	s->sp -= size;
	return bt_write_linear(v, linear, &value, size, s->user);
}

int stack_pop(struct bt_vcpu *v, struct stack *s, uint64_t *value, unsigned size)
{
	uint64_t linear;

	*value = 0;
	if (stack_address(v, s, s->sp, size, &linear) < 0)
		return BT_FAULT;
	s->sp += size;
	return bt_read_linear(v, linear, value, size, s->user);
}

void stack_commit(struct bt_vcpu *v, const struct stack *s)
{
	uint64_t *rsp = &v->gprs[ENGINE_RSP];

	if (s->mask == 0xffff)
		*rsp = (*rsp & ~0xffffull) | (s->sp & 0xffff);
	else
		*rsp = s->sp & s->mask;
}

int task_read64(struct bt_vcpu *v, unsigned offset, uint64_t *value)
{
	const struct engine_segment *tr = &v->segments[ENGINE_TR];

	if (offset + 7 > tr->limit)
		return bt_raise_error(v, VECTOR_TS, tr->selector & 0xfffc);
	return bt_read_linear(v, tr->base + offset, value, sizeof(*value), false);
}

int stack_from_task(struct bt_vcpu *v, unsigned cpl, uint16_t *selector, uint64_t *raw, uint64_t *sp)
{
	const struct engine_segment *tr = &v->segments[ENGINE_TR];
	bool wide = tr->attributes & 8; /* 32-bit TSS */
	unsigned width = wide ? 4 : 2, offset = wide ? 4 + 8 * cpl : 2 + 4 * cpl;
	uint16_t attributes;

	if (offset + width + 1 > tr->limit)
		return bt_raise_error(v, VECTOR_TS, tr->selector & 0xfffc);
	*sp = 0;
	if (bt_read_linear(v, tr->base + offset, sp, width, false) < 0 ||
		bt_read_linear(v, tr->base + offset + width, selector, sizeof(*selector), false) < 0)
		return BT_FAULT;
	if (is_null(*selector))
		return bt_raise_error(v, VECTOR_TS, 0);
	if (descriptor_read(v, *selector, VECTOR_TS, raw) < 0)
		return BT_FAULT;
	attributes = descriptor_attributes(*raw);
	if ((*selector & 3u) != cpl || attributes_dpl(attributes) != cpl || !is_writable_data(attributes))
		return bt_raise_error(v, VECTOR_TS, *selector & 0xfffc);
	if (!(attributes & SEGMENT_P))
		return bt_raise_error(v, VECTOR_SS, *selector & 0xfffc);
	return descriptor_accessed(v, *selector, raw);
}

/* ---- far transfers ---- */

void code_set(struct bt_vcpu *v, uint16_t selector, uint64_t raw, unsigned cpl)
{
	segment_set_raw(v, ENGINE_CS, (uint16_t)((selector & 0xfffc) | cpl), raw);
	v->cpl = (uint8_t)cpl;
}

int code_check_target(struct bt_vcpu *v, uint64_t raw, uint64_t *rip)
{
	if (in_long_mode(v) && descriptor_attributes(raw) & SEGMENT_L) {
		if (!is_canonical(*rip))
			return bt_raise_error(v, VECTOR_GP, 0);
		return 0;
	}
	*rip = (uint32_t)*rip;
	if (*rip > descriptor_limit(raw))
		return bt_raise_error(v, VECTOR_GP, 0);
	return 0;
}

/* L and D together are reserved in long mode. */
static bool is_reserved_code(const struct bt_vcpu *v, uint16_t attributes)
{
	return in_long_mode(v) && (attributes & (SEGMENT_L | SEGMENT_DB)) == (SEGMENT_L | SEGMENT_DB);
}

/* A code segment reached by a far JMP or CALL without a gate: the privilege stays. */
static int direct_check(struct bt_vcpu *v, uint16_t selector, uint64_t raw)
{
	uint16_t attributes = descriptor_attributes(raw);
	unsigned rpl = selector & 3, dpl = attributes_dpl(attributes);
	bool allowed = attributes & TYPE_CONFORMING ? dpl <= v->cpl : rpl <= v->cpl && dpl == v->cpl;

	if (!allowed || is_reserved_code(v, attributes))
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	if (!(attributes & SEGMENT_P))
		return bt_raise_error(v, VECTOR_NP, selector & 0xfffc);
	return 0;
}

struct call_gate {
	uint16_t selector;
	uint64_t offset, raw; /* raw: the code segment's descriptor */
	unsigned size, parameters;
};

/* The call gate `gate` behind selector, and the code segment that it names. */
static int gate_read(struct bt_vcpu *v, uint16_t selector, uint64_t gate, struct call_gate *out)
{
	unsigned type = gate >> 40 & 0x1f, dpl = gate >> 45 & 3, rpl = selector & 3;
	uint16_t attributes;

	/* Task gates and TSSs would switch tasks, which neither long mode nor this engine does. */
	if ((type != 12 && (type != 4 || in_long_mode(v))) || dpl < v->cpl || dpl < rpl)
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	if (!(gate >> 47 & 1))
		return bt_raise_error(v, VECTOR_NP, selector & 0xfffc);
	out->selector = (uint16_t)(gate >> 16);
	out->offset = (gate & 0xffff) | (gate >> 32 & 0xffff0000);
	out->size = type == 4 ? 2 : 4;
	out->parameters = gate >> 32 & 0x1f;
	if (type == 4)
		out->offset &= 0xffff;
	if (in_long_mode(v)) {
		uint64_t table = selector & 4 ? v->segments[ENGINE_LDTR].base : v->gdt.base, high;
		uint32_t limit = selector & 4 ? v->segments[ENGINE_LDTR].limit : v->gdt.limit;

		if ((selector | 7u) + 8 > limit)
			return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
		if (bt_read_linear(v, table + (selector & 0xfff8) + 8, &high, sizeof(high), false) < 0)
			return BT_FAULT;
		if (high >> 40 & 0x1f)
			return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
		out->offset |= high << 32;
		out->size = 8;
		out->parameters = 0;
	}
	if (is_null(out->selector))
		return bt_raise_error(v, VECTOR_GP, 0);
	if (descriptor_read(v, out->selector, VECTOR_GP, &out->raw) < 0)
		return BT_FAULT;
	attributes = descriptor_attributes(out->raw);
	if (!is_code(attributes) || attributes_dpl(attributes) > v->cpl)
		return bt_raise_error(v, VECTOR_GP, out->selector & 0xfffc);
	if (in_long_mode(v) && (attributes & (SEGMENT_L | SEGMENT_DB)) != SEGMENT_L)
		return bt_raise_error(v, VECTOR_GP, out->selector & 0xfffc);
	if (!(attributes & SEGMENT_P))
		return bt_raise_error(v, VECTOR_NP, out->selector & 0xfffc);
	return code_check_target(v, out->raw, &out->offset);
}

static int far_jump_real(struct bt_vcpu *v, uint16_t selector, uint64_t offset)
{
	if (offset > v->segments[ENGINE_CS].limit)
		return bt_raise_error(v, VECTOR_GP, 0);
	segment_set_real(v, ENGINE_CS, selector);
	v->rip = offset;
	bt_mode_update(v);
	return 0;
}

int far_jump(struct bt_vcpu *v, uint16_t selector, uint64_t offset, unsigned size)
{
	struct call_gate gate;
	uint64_t raw;

	if (size == 2)
		offset &= 0xffff;
	if (in_real_mode(v) || in_vm86(v))
		return far_jump_real(v, selector, offset);
	if (is_null(selector))
		return bt_raise_error(v, VECTOR_GP, 0);
	if (descriptor_read(v, selector, VECTOR_GP, &raw) < 0)
		return BT_FAULT;
	if (!(raw >> 40 & SEGMENT_S)) {
		if (gate_read(v, selector, raw, &gate) < 0)
			return BT_FAULT;
		/* a jump cannot change the privilege */
		if (!(gate.raw >> 40 & TYPE_CONFORMING) && attributes_dpl(descriptor_attributes(gate.raw)) != v->cpl)
			return bt_raise_error(v, VECTOR_GP, gate.selector & 0xfffc);
		selector = gate.selector;
		offset = gate.offset;
		raw = gate.raw;
	} else {
		if (!is_code(descriptor_attributes(raw)))
			return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
		if (direct_check(v, selector, raw) < 0 || code_check_target(v, raw, &offset) < 0)
			return BT_FAULT;
	}
	if (descriptor_accessed(v, selector, &raw) < 0)
		return BT_FAULT;
	code_set(v, selector, raw, v->cpl);
	v->rip = offset;
	bt_mode_update(v);
	return 0;
}

/* Through a gate to an inner privilege: the TSS gives the stack, on which the old one and the parameters are put. */
static int call_inner(struct bt_vcpu *v, struct call_gate *gate, uint64_t next)
{
	unsigned cpl = attributes_dpl(descriptor_attributes(gate->raw));
	struct stack old = stack_current(v), new;
	uint64_t ss_raw = 0, sp, parameter;
	uint16_t ss = (uint16_t)cpl;

	if (in_long_mode(v)) {
		if (task_read64(v, 4 + 8 * cpl, &sp) < 0)
			return BT_FAULT;
		new = (struct stack){.sp = sp, .mask = UINT64_MAX, .user = cpl == 3};
	} else {
		if (stack_from_task(v, cpl, &ss, &ss_raw, &sp) < 0)
			return BT_FAULT;
		new = stack_inner(ss, ss_raw, sp, cpl);
	}
	if (stack_push(v, &new, v->segments[ENGINE_SS].selector, gate->size) < 0 ||
		stack_push(v, &new, v->gprs[ENGINE_RSP], gate->size) < 0)
		return BT_FAULT;
	for (unsigned i = gate->parameters; i-- > 0;) {
		struct stack from = old;

		from.sp += (uint64_t)i * gate->size;
		if (stack_pop(v, &from, &parameter, gate->size) < 0 || stack_push(v, &new, parameter, gate->size) < 0)
			return BT_FAULT;
	}
	if (stack_push(v, &new, v->segments[ENGINE_CS].selector, gate->size) < 0 ||
		stack_push(v, &new, next, gate->size) < 0 || descriptor_accessed(v, gate->selector, &gate->raw) < 0)
		return BT_FAULT;
	if (in_long_mode(v))
		segment_set_null(v, ENGINE_SS, ss, cpl);
	else
		segment_set_raw(v, ENGINE_SS, ss, ss_raw);
	code_set(v, gate->selector, gate->raw, cpl);
	stack_commit(v, &new);
	v->rip = gate->offset;
	bt_mode_update(v);
	return 0;
}

int far_call(struct bt_vcpu *v, uint16_t selector, uint64_t offset, unsigned size, uint64_t next)
{
	struct stack stack = stack_current(v);
	uint64_t raw = 0;

	if (size == 2)
		offset &= 0xffff;
	if (in_real_mode(v) || in_vm86(v)) {
		if (stack_push(v, &stack, v->segments[ENGINE_CS].selector, size) < 0 ||
			stack_push(v, &stack, next, size) < 0 || far_jump_real(v, selector, offset) < 0)
			return BT_FAULT;
		stack_commit(v, &stack);
		return 0;
	}
	if (is_null(selector))
		return bt_raise_error(v, VECTOR_GP, 0);
	if (descriptor_read(v, selector, VECTOR_GP, &raw) < 0)
		return BT_FAULT;
	if (!(raw >> 40 & SEGMENT_S)) {
		struct call_gate gate;
		uint16_t attributes;

		if (gate_read(v, selector, raw, &gate) < 0)
			return BT_FAULT;
		attributes = descriptor_attributes(gate.raw);
		if (!(attributes & TYPE_CONFORMING) && attributes_dpl(attributes) < v->cpl)
			return call_inner(v, &gate, next);
		selector = gate.selector;
		offset = gate.offset;
		raw = gate.raw;
		size = gate.size;
		if (in_long_mode(v)) /* the frame is 64-bit code's, also when compatibility mode calls */
			stack = (struct stack){.sp = v->gprs[ENGINE_RSP], .mask = UINT64_MAX, .user = is_user(v)};
	} else {
		if (!is_code(descriptor_attributes(raw)))
			return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
		if (direct_check(v, selector, raw) < 0 || code_check_target(v, raw, &offset) < 0)
			return BT_FAULT;
	}
	if (stack_push(v, &stack, v->segments[ENGINE_CS].selector, size) < 0 || stack_push(v, &stack, next, size) < 0 ||
		descriptor_accessed(v, selector, &raw) < 0)
		return BT_FAULT;
	stack_commit(v, &stack);
	code_set(v, selector, raw, v->cpl);
	v->rip = offset;
	bt_mode_update(v);
	return 0;
}

int return_check_code(struct bt_vcpu *v, uint16_t selector, uint64_t *raw)
{
	unsigned rpl = selector & 3, dpl;
	uint16_t attributes;

	if (is_null(selector))
		return bt_raise_error(v, VECTOR_GP, 0);
	if (descriptor_read(v, selector, VECTOR_GP, raw) < 0)
		return BT_FAULT;
	attributes = descriptor_attributes(*raw);
	dpl = attributes_dpl(attributes);
	if (rpl < v->cpl || !is_code(attributes) || is_reserved_code(v, attributes) ||
		(attributes & TYPE_CONFORMING ? dpl > rpl : dpl != rpl))
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	if (!(attributes & SEGMENT_P))
		return bt_raise_error(v, VECTOR_NP, selector & 0xfffc);
	return descriptor_accessed(v, selector, raw);
}

int return_check_stack(struct bt_vcpu *v, uint16_t selector, unsigned cpl, bool to_code64, uint64_t *raw)
{
	uint16_t attributes;

	*raw = 0;
	if (is_null(selector)) {
		if (!to_code64 || cpl == 3 || (selector & 3u) != cpl)
			return bt_raise_error(v, VECTOR_GP, 0);
		return 0;
	}
	if (descriptor_read(v, selector, VECTOR_GP, raw) < 0)
		return BT_FAULT;
	attributes = descriptor_attributes(*raw);
	if ((selector & 3u) != cpl || attributes_dpl(attributes) != cpl || !is_writable_data(attributes))
		return bt_raise_error(v, VECTOR_GP, selector & 0xfffc);
	if (!(attributes & SEGMENT_P))
		return bt_raise_error(v, VECTOR_SS, selector & 0xfffc);
	return descriptor_accessed(v, selector, raw);
}

int far_return(struct bt_vcpu *v, unsigned size, unsigned release)
{
	struct stack stack = stack_current(v);
	uint64_t rip, cs, sp, ss, raw, ss_raw;
	unsigned cpl;

	if (stack_pop(v, &stack, &rip, size) < 0 || stack_pop(v, &stack, &cs, size) < 0)
		return BT_FAULT;
	stack.sp += release;
	if (in_real_mode(v) || in_vm86(v)) {
		if (far_jump_real(v, (uint16_t)cs, rip) < 0)
			return BT_FAULT;
		stack_commit(v, &stack);
		return 0;
	}
	if (return_check_code(v, (uint16_t)cs, &raw) < 0)
		return BT_FAULT;
	cpl = cs & 3;
	if (cpl == v->cpl) {
		if (code_check_target(v, raw, &rip) < 0)
			return BT_FAULT;
		stack_commit(v, &stack);
		code_set(v, (uint16_t)cs, raw, cpl);
		v->rip = rip;
		bt_mode_update(v);
		return 0;
	}
	if (stack_pop(v, &stack, &sp, size) < 0 || stack_pop(v, &stack, &ss, size) < 0)
		return BT_FAULT;
	if (return_check_stack(v, (uint16_t)ss, cpl, in_long_mode(v) && raw >> 53 & 1, &ss_raw) < 0 ||
		code_check_target(v, raw, &rip) < 0)
		return BT_FAULT;
	code_set(v, (uint16_t)cs, raw, cpl);
	if (ss_raw)
		segment_set_raw(v, ENGINE_SS, (uint16_t)ss, ss_raw);
	else
		segment_set_null(v, ENGINE_SS, (uint16_t)ss, cpl);
	stack = stack_current(v);
	stack.sp = sp + release;
	stack_commit(v, &stack);
	segments_drop_privileged(v);
	v->rip = rip;
	bt_mode_update(v);
	return 0;
}

int segment_query(struct bt_vcpu *v, enum segment_query query, uint16_t selector, uint32_t *value)
{
	/* system descriptor types that LAR and LSL accept: legacy and long mode */
	static const uint16_t types[2][2] = {{0x1a3e, 0x0a0e}, {0x1a04, 0x0a04}};
	unsigned rpl = selector & 3, dpl, type;
	struct bt_fault saved = v->fault;
	uint16_t attributes;
	uint64_t raw;

	if (is_null(selector))
		return 0;
	if (descriptor_read(v, selector, VECTOR_GP, &raw) < 0) {
		if (v->fault.vector == VECTOR_PF)
			return BT_FAULT;
		v->fault = saved; /* beyond its table: only ZF tells */
		return 0;
	}
	attributes = descriptor_attributes(raw);
	dpl = attributes_dpl(attributes);
	type = attributes & SEGMENT_TYPE;
	if (!(attributes & SEGMENT_S)) {
		if (query > QUERY_LSL || !(types[in_long_mode(v)][query] >> type & 1))
			return 0;
	}
	if (!(is_code(attributes) && attributes & TYPE_CONFORMING) && (v->cpl > dpl || rpl > dpl))
		return 0;
	switch (query) {
	case QUERY_LAR:
		*value = (uint32_t)(raw >> 32) & 0x00ffff00;
		return 1;
	case QUERY_LSL:
		*value = descriptor_limit(raw);
		return 1;
	case QUERY_VERR:
		return !(attributes & TYPE_CODE) || attributes & TYPE_READABLE;
	case QUERY_VERW:
		return is_writable_data(attributes);
	}
	return 0;
}
