/* One instruction of the privileged architecture (system.h): who executes it, and the short ones themselves. SDM volume
 * 2 and, where AMD differs, APM volume 3 under each name.
 */
#include "engine/bt/system_internal.h"

#include "engine/bt/bt.h"

int operand_read(struct bt_vcpu *v, const struct bt_decoded *d, unsigned i, unsigned size, uint64_t *value)
{
	const ZydisDecodedOperand *op = &d->operands[i];
	uint64_t linear;

	*value = 0;
	switch (op->type) {
	case ZYDIS_OPERAND_TYPE_REGISTER:
		*value = bt_register_read(v, op->reg.value);
		return 0;
	case ZYDIS_OPERAND_TYPE_IMMEDIATE:
		*value = op->imm.value.u;
		return 0;
	default:
		if (bt_effective_address(v, d, op, size, BT_READ, &linear) < 0)
			return BT_FAULT;
		return bt_read_linear(v, linear, value, size, is_user(v));
	}
}

int operand_write(struct bt_vcpu *v, const struct bt_decoded *d, unsigned i, unsigned size, uint64_t value)
{
	const ZydisDecodedOperand *op = &d->operands[i];
	uint64_t linear;

	if (op->type == ZYDIS_OPERAND_TYPE_REGISTER) {
		bt_register_write(v, op->reg.value, value);
		return 0;
	}
	if (bt_effective_address(v, d, op, size, BT_WRITE, &linear) < 0)
		return BT_FAULT;
	return bt_write_linear(v, linear, &value, size, is_user(v));
}

static bool is_segment(const ZydisDecodedOperand *op)
{
	return op->type == ZYDIS_OPERAND_TYPE_REGISTER && op->reg.value >= ZYDIS_REGISTER_ES &&
	       op->reg.value <= ZYDIS_REGISTER_GS;
}

/* enum of engine.h and Zydis number the six alike: ES CS SS DS FS GS. */
static int segment_number(const ZydisDecodedOperand *op)
{
	return (int)op->reg.value - ZYDIS_REGISTER_ES;
}

static int raise_gp(struct bt_vcpu *v)
{
	return bt_raise_error(v, VECTOR_GP, 0);
}

static int require_cpl0(struct bt_vcpu *v)
{
	return v->cpl ? raise_gp(v) : 0;
}

static int write_flags(struct bt_vcpu *v, uint64_t flags)
{
	uint64_t changed = bt_rflags(v) ^ flags;

	bt_set_rflags(v, flags);
	if (changed & (FLAG_AC | FLAG_VM | FLAG_TF))
		bt_mode_update(v);
	return 0;
}

/* ---- segment registers ---- */

static int load_segment(struct bt_vcpu *v, int s, uint16_t selector)
{
	return s == ENGINE_CS ? bt_raise(v, VECTOR_UD) : segment_load(v, s, selector);
}

static int mov_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	const ZydisDecodedOperand *to = &d->operands[0], *from = &d->operands[1];
	uint64_t value;

	if (is_segment(from))
		return operand_write(v, d, 0, 2, v->segments[segment_number(from)].selector);
	if (!is_segment(to))
		return control_move(v, d);
	if (operand_read(v, d, 1, 2, &value) < 0 || load_segment(v, segment_number(to), (uint16_t)value) < 0)
		return BT_FAULT;
	v->shadow = segment_number(to) == ENGINE_SS;
	return 0;
}

static int push_segment(struct bt_vcpu *v, const struct bt_decoded *d)
{
	struct stack stack = stack_current(v);

	if (stack_push(v, &stack, v->segments[segment_number(&d->operands[0])].selector, d->insn.operand_width / 8) < 0)
		return BT_FAULT;
	stack_commit(v, &stack);
	return 0;
}

static int pop_segment(struct bt_vcpu *v, const struct bt_decoded *d)
{
	struct stack stack = stack_current(v);
	int s = segment_number(&d->operands[0]);
	uint64_t value;

	if (stack_pop(v, &stack, &value, d->insn.operand_width / 8) < 0 || load_segment(v, s, (uint16_t)value) < 0)
		return BT_FAULT;
	stack_commit(v, &stack);
	v->shadow = s == ENGINE_SS;
	return 0;
}

/* A far pointer in memory: the offset (size bytes), then the selector. */
static int far_pointer(
	struct bt_vcpu *v, const struct bt_decoded *d, unsigned i, uint64_t *offset, uint16_t *selector, unsigned *size)
{
	uint64_t linear;

	*size = d->operands[i].size / 8 - 2;
	*offset = 0;
	if (bt_effective_address(v, d, &d->operands[i], *size + 2, BT_READ, &linear) < 0 ||
		bt_read_linear(v, linear, offset, *size, is_user(v)) < 0)
		return BT_FAULT;
	return bt_read_linear(v, linear + *size, selector, sizeof(*selector), is_user(v));
}

static int load_far_pointer(struct bt_vcpu *v, const struct bt_decoded *d, int s)
{
	uint16_t selector;
	uint64_t offset;
	unsigned size;

	if (d->operands[1].type != ZYDIS_OPERAND_TYPE_MEMORY)
		return bt_raise(v, VECTOR_UD);
	if (far_pointer(v, d, 1, &offset, &selector, &size) < 0 || load_segment(v, s, selector) < 0)
		return BT_FAULT;
	bt_register_write(v, d->operands[0].reg.value, offset);
	return 0;
}

static int far_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	const ZydisDecodedOperand *op = &d->operands[0];
	uint16_t selector;
	uint64_t offset;
	unsigned size;

	if (d->insn.mnemonic == ZYDIS_MNEMONIC_RET)
		return far_return(v, d->insn.operand_width / 8,
			op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? (unsigned)op->imm.value.u : 0);
	if (op->type == ZYDIS_OPERAND_TYPE_POINTER) {
		selector = op->ptr.segment;
		offset = op->ptr.offset;
		size = d->insn.operand_width / 8;
	} else if (far_pointer(v, d, 0, &offset, &selector, &size) < 0) {
		return BT_FAULT;
	}
	if (d->insn.mnemonic == ZYDIS_MNEMONIC_JMP)
		return far_jump(v, selector, offset, size);
	return far_call(v, selector, offset, size, next_rip(v, d));
}

/* ---- flags ---- */

static int cli_sti(struct bt_vcpu *v, bool on)
{
	if (v->cpl > iopl(v)) /* CPL is 0 in real mode and 3 in virtual-8086 mode; VME and PVI are not offered */
		return raise_gp(v);
	if (on && !v->iflag)
		v->shadow = 1;
	else
		v->shadow = 0;
	v->iflag = on;
	return 0;
}

static int pushf_execute(struct bt_vcpu *v, unsigned size)
{
	struct stack stack = stack_current(v);

	if (in_vm86(v) && iopl(v) < 3)
		return raise_gp(v);
	if (stack_push(v, &stack, bt_rflags(v) & ~(uint64_t)(FLAG_VM | FLAG_RF), size) < 0)
		return BT_FAULT;
	stack_commit(v, &stack);
	return 0;
}

static int popf_execute(struct bt_vcpu *v, unsigned size)
{
	struct stack stack = stack_current(v);
	uint64_t image, flags;

	if (in_vm86(v) && iopl(v) < 3)
		return raise_gp(v);
	if (stack_pop(v, &stack, &image, size) < 0)
		return BT_FAULT;
	flags = flags_merge(v, image, size);
	if (in_vm86(v)) /* IOPL is 3 then, but the privilege to change it is not */
		flags = (flags & ~(uint64_t)FLAG_IOPL) | (v->eflags & FLAG_IOPL);
	stack_commit(v, &stack);
	return write_flags(v, flags);
}

static int stac_clac(struct bt_vcpu *v, bool on)
{
	if (v->cpl || !cpu_model_has(v->model, CPU_SMAP))
		return bt_raise(v, VECTOR_UD);
	v->acflag = on;
	bt_mode_update(v);
	return 0;
}

/* ---- identification, counters, extended state ---- */

static void set_edx_eax(struct bt_vcpu *v, uint64_t value)
{
	v->gprs[ENGINE_RAX] = (uint32_t)value;
	v->gprs[ENGINE_RDX] = value >> 32;
}

static uint64_t edx_eax(const struct bt_vcpu *v)
{
	return v->gprs[ENGINE_RDX] << 32 | (uint32_t)v->gprs[ENGINE_RAX];
}

static int rdmsr_execute(struct bt_vcpu *v)
{
	uint64_t value;

	if (require_cpl0(v) < 0 || msr_read(v, (uint32_t)v->gprs[ENGINE_RCX], &value) < 0)
		return BT_FAULT;
	set_edx_eax(v, value);
	return 0;
}

static int wrmsr_execute(struct bt_vcpu *v)
{
	if (require_cpl0(v) < 0)
		return BT_FAULT;
	return msr_write(v, (uint32_t)v->gprs[ENGINE_RCX], edx_eax(v));
}

static int rdtsc_execute(struct bt_vcpu *v, bool with_aux)
{
	if (with_aux && !cpu_model_has(v->model, CPU_RDTSCP))
		return bt_raise(v, VECTOR_UD);
	if (v->cpl && v->cr4 & CR4_TSD)
		return raise_gp(v);
	set_edx_eax(v, bt_tsc(v));
	if (with_aux)
		v->gprs[ENGINE_RCX] = v->tsc_aux;
	return 0;
}

static int rdpid_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	if (!cpu_model_has(v->model, CPU_RDPID))
		return bt_raise(v, VECTOR_UD);
	bt_register_write(v, d->operands[0].reg.value, v->tsc_aux);
	return 0;
}

/* Which state components are not in their initial configuration: the host's answer for the guest's own registers. */
static uint64_t xinuse(struct bt_vcpu *v)
{
	uint32_t low, high;

	fpu_unpark(v);
	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
	return ((uint64_t)high << 32 | low) & v->xcr0;
}

static int xgetbv_execute(struct bt_vcpu *v)
{
	uint32_t index = (uint32_t)v->gprs[ENGINE_RCX];

	if (!(v->cr4 & CR4_OSXSAVE))
		return bt_raise(v, VECTOR_UD);
	if (index == 0)
		set_edx_eax(v, v->xcr0);
	else if (index == 1 && cpu_model_has(v->model, CPU_XGETBV1))
		set_edx_eax(v, xinuse(v));
	else
		return raise_gp(v);
	return 0;
}

static int xsetbv_execute(struct bt_vcpu *v)
{
	if (!(v->cr4 & CR4_OSXSAVE))
		return bt_raise(v, VECTOR_UD);
	if (v->cpl || (uint32_t)v->gprs[ENGINE_RCX] || !cpuid_xcr0_valid(v, edx_eax(v)))
		return raise_gp(v);
	v->xcr0 = edx_eax(v);
	bt_mode_update(v);
	return 0;
}

static int fsgsbase_execute(struct bt_vcpu *v, const struct bt_decoded *d, int s, bool write)
{
	ZydisRegister reg = d->operands[0].reg.value;
	uint64_t value;

	if (!in_code64(v) || !(v->cr4 & CR4_FSGSBASE))
		return bt_raise(v, VECTOR_UD);
	if (!write) {
		bt_register_write(v, reg, v->segments[s].base);
		return 0;
	}
	value = bt_register_read(v, reg);
	if (!is_canonical(value))
		return raise_gp(v);
	v->segments[s].base = value;
	*(s == ENGINE_FS ? &v->fs_base : &v->gs_base) = value;
	return 0;
}

static int swapgs_execute(struct bt_vcpu *v)
{
	uint64_t base = v->gs_base;

	if (!in_code64(v))
		return bt_raise(v, VECTOR_UD);
	if (v->cpl)
		return raise_gp(v);
	v->gs_base = v->segments[ENGINE_GS].base = v->kernel_gs_base;
	v->kernel_gs_base = base;
	return 0;
}

/* ---- caches and translations ---- */

static int invlpg_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	uint64_t linear;

	if (require_cpl0(v) < 0 || bt_effective_address(v, d, &d->operands[0], 1, BT_READ, &linear) < 0)
		return BT_FAULT;
	bt_tlb_flush_page(v, linear);
	return 0;
}

/* PCIDs are not offered, so the only one is 0. */
static int invpcid_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	uint64_t type = bt_register_read(v, d->operands[0].reg.value), linear, descriptor[2];

	if (!cpu_model_has(v->model, CPU_INVPCID))
		return bt_raise(v, VECTOR_UD);
	if (require_cpl0(v) < 0 || bt_effective_address(v, d, &d->operands[1], 16, BT_READ, &linear) < 0 ||
		bt_read_linear(v, linear, descriptor, sizeof(descriptor), false) < 0)
		return BT_FAULT;
	if (type > 3 || descriptor[0] >> 12 || (type <= 1 && descriptor[0]) ||
		(type == 0 && !is_canonical(descriptor[1])))
		return raise_gp(v);
	if (type == 0)
		bt_tlb_flush_page(v, descriptor[1]);
	else
		bt_tlb_flush(v, type != 2); /* 2: global translations too */
	return 0;
}

/* Caches are coherent here; the address is checked as for a read. */
static int clflush_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	uint64_t linear, gpa;

	if (d->insn.mnemonic == ZYDIS_MNEMONIC_CLFLUSHOPT && !cpu_model_has(v->model, CPU_CLFLUSHOPT))
		return bt_raise(v, VECTOR_UD);
	if (d->insn.mnemonic == ZYDIS_MNEMONIC_CLWB && !cpu_model_has(v->model, CPU_CLWB))
		return bt_raise(v, VECTOR_UD);
	if (bt_effective_address(v, d, &d->operands[0], 1, BT_READ, &linear) < 0)
		return BT_FAULT;
	return bt_translate_address(v, linear, BT_READ, is_user(v), &gpa);
}

/* ---- INT and its like: exceptions of the software's own ---- */

static int software_interrupt(struct bt_vcpu *v, const struct bt_decoded *d, int vector)
{
	/* INT3 and INTO do not ask for IOPL */
	if (d->insn.mnemonic == ZYDIS_MNEMONIC_INT && in_vm86(v) && iopl(v) < 3)
		return raise_gp(v);
	v->fault.vector = vector;
	v->fault.error = 0;
	v->fault.has_error = false;
	v->fault.software = true;
	v->fault.next_rip = next_rip(v, d);
	return BT_FAULT;
}

/* Instructions after which v->rip is what they set it to: 0 or BT_FAULT; 1: none of these. */
static int execute_transfer(struct bt_vcpu *v, const struct bt_decoded *d)
{
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_SYSCALL:
		return syscall_execute(v, next_rip(v, d));
	case ZYDIS_MNEMONIC_SYSRET:
		return sysret_execute(v, d->insn.operand_width / 8);
	case ZYDIS_MNEMONIC_SYSENTER:
		return sysenter_execute(v);
	case ZYDIS_MNEMONIC_SYSEXIT:
		return sysexit_execute(v, d->insn.operand_width / 8);
	case ZYDIS_MNEMONIC_IRET:
		return iret_execute(v, 2);
	case ZYDIS_MNEMONIC_IRETD:
		return iret_execute(v, 4);
	case ZYDIS_MNEMONIC_IRETQ:
		return iret_execute(v, 8);
	case ZYDIS_MNEMONIC_JMP:
	case ZYDIS_MNEMONIC_CALL:
	case ZYDIS_MNEMONIC_RET:
		return far_execute(v, d);
	case ZYDIS_MNEMONIC_INT:
		return software_interrupt(v, d, (uint8_t)d->operands[0].imm.value.u);
	case ZYDIS_MNEMONIC_INT3:
		return software_interrupt(v, d, VECTOR_BP);
	case ZYDIS_MNEMONIC_INT1: /* a trap: the return address is behind it, the gate's privilege does not matter */
		v->rip = next_rip(v, d);
		return bt_raise(v, VECTOR_DB);
	case ZYDIS_MNEMONIC_INTO:
		if (bt_rflags(v) & FLAG_OF)
			return software_interrupt(v, d, VECTOR_OF);
		v->rip = next_rip(v, d);
		return 0;
	default:
		return 1;
	}
}

#define NOT_OURS 2

/* Instructions after which the next one follows: 0, BT_FAULT, REPEAT or NOT_OURS. */
static int execute_plain(struct bt_vcpu *v, const struct bt_decoded *d)
{
	switch (d->insn.mnemonic) {
	case ZYDIS_MNEMONIC_RDMSR:
		return rdmsr_execute(v);
	case ZYDIS_MNEMONIC_WRMSR:
		return wrmsr_execute(v);
	case ZYDIS_MNEMONIC_SWAPGS:
		return swapgs_execute(v);
	case ZYDIS_MNEMONIC_MOV:
		return mov_execute(v, d);
	case ZYDIS_MNEMONIC_CLI:
		return cli_sti(v, false);
	case ZYDIS_MNEMONIC_STI:
		return cli_sti(v, true);
	case ZYDIS_MNEMONIC_STAC:
		return stac_clac(v, true);
	case ZYDIS_MNEMONIC_CLAC:
		return stac_clac(v, false);
	case ZYDIS_MNEMONIC_PUSHF:
		return pushf_execute(v, 2);
	case ZYDIS_MNEMONIC_PUSHFD:
		return pushf_execute(v, 4);
	case ZYDIS_MNEMONIC_PUSHFQ:
		return pushf_execute(v, 8);
	case ZYDIS_MNEMONIC_POPF:
		return popf_execute(v, 2);
	case ZYDIS_MNEMONIC_POPFD:
		return popf_execute(v, 4);
	case ZYDIS_MNEMONIC_POPFQ:
		return popf_execute(v, 8);
	case ZYDIS_MNEMONIC_IN:
	case ZYDIS_MNEMONIC_OUT:
		return port_execute(v, d);
	case ZYDIS_MNEMONIC_INSB:
	case ZYDIS_MNEMONIC_INSW:
	case ZYDIS_MNEMONIC_INSD:
	case ZYDIS_MNEMONIC_OUTSB:
	case ZYDIS_MNEMONIC_OUTSW:
	case ZYDIS_MNEMONIC_OUTSD:
		return port_string_execute(v, d);
	case ZYDIS_MNEMONIC_CPUID:
		cpuid_execute(v);
		return 0;
	case ZYDIS_MNEMONIC_RDTSC:
		return rdtsc_execute(v, false);
	case ZYDIS_MNEMONIC_RDTSCP:
		return rdtsc_execute(v, true);
	case ZYDIS_MNEMONIC_RDPID:
		return rdpid_execute(v, d);
	case ZYDIS_MNEMONIC_RDPMC: /* no counter exists, so every number is a wrong one */
		return raise_gp(v);
	case ZYDIS_MNEMONIC_CLTS:
		return require_cpl0(v) < 0 ? BT_FAULT : cr0_write(v, v->cr0 & ~(uint64_t)CR0_TS);
	case ZYDIS_MNEMONIC_SGDT:
	case ZYDIS_MNEMONIC_SIDT:
	case ZYDIS_MNEMONIC_LGDT:
	case ZYDIS_MNEMONIC_LIDT:
	case ZYDIS_MNEMONIC_SLDT:
	case ZYDIS_MNEMONIC_STR:
	case ZYDIS_MNEMONIC_SMSW:
	case ZYDIS_MNEMONIC_LMSW:
	case ZYDIS_MNEMONIC_LLDT:
	case ZYDIS_MNEMONIC_LTR:
	case ZYDIS_MNEMONIC_LAR:
	case ZYDIS_MNEMONIC_LSL:
	case ZYDIS_MNEMONIC_VERR:
	case ZYDIS_MNEMONIC_VERW:
		return table_execute(v, d);
	case ZYDIS_MNEMONIC_INVLPG:
		return invlpg_execute(v, d);
	case ZYDIS_MNEMONIC_INVPCID:
		return invpcid_execute(v, d);
	case ZYDIS_MNEMONIC_WBINVD:
	case ZYDIS_MNEMONIC_INVD: /* Zydis 4.0 decodes WBNOINVD as WBINVD */
		return require_cpl0(v);
	case ZYDIS_MNEMONIC_CLFLUSH:
	case ZYDIS_MNEMONIC_CLFLUSHOPT:
	case ZYDIS_MNEMONIC_CLWB:
		return clflush_execute(v, d);
	case ZYDIS_MNEMONIC_PUSH:
		return is_segment(&d->operands[0]) ? push_segment(v, d) : NOT_OURS;
	case ZYDIS_MNEMONIC_POP:
		return is_segment(&d->operands[0]) ? pop_segment(v, d) : NOT_OURS;
	case ZYDIS_MNEMONIC_LDS:
		return load_far_pointer(v, d, ENGINE_DS);
	case ZYDIS_MNEMONIC_LES:
		return load_far_pointer(v, d, ENGINE_ES);
	case ZYDIS_MNEMONIC_LFS:
		return load_far_pointer(v, d, ENGINE_FS);
	case ZYDIS_MNEMONIC_LGS:
		return load_far_pointer(v, d, ENGINE_GS);
	case ZYDIS_MNEMONIC_LSS:
		return load_far_pointer(v, d, ENGINE_SS);
	case ZYDIS_MNEMONIC_RDFSBASE:
		return fsgsbase_execute(v, d, ENGINE_FS, false);
	case ZYDIS_MNEMONIC_RDGSBASE:
		return fsgsbase_execute(v, d, ENGINE_GS, false);
	case ZYDIS_MNEMONIC_WRFSBASE:
		return fsgsbase_execute(v, d, ENGINE_FS, true);
	case ZYDIS_MNEMONIC_WRGSBASE:
		return fsgsbase_execute(v, d, ENGINE_GS, true);
	case ZYDIS_MNEMONIC_XGETBV:
		return xgetbv_execute(v);
	case ZYDIS_MNEMONIC_XSETBV:
		return xsetbv_execute(v);
	case ZYDIS_MNEMONIC_VMCALL: /* each maker's, on both: a guest that has moved between them still works */
	case ZYDIS_MNEMONIC_VMMCALL:
		paravirt_hypercall(v);
		return 0;
	case ZYDIS_MNEMONIC_UD0:
	case ZYDIS_MNEMONIC_UD1:
	case ZYDIS_MNEMONIC_UD2:
	/* features that no model offers */
	case ZYDIS_MNEMONIC_MONITOR:
	case ZYDIS_MNEMONIC_MWAIT:
	case ZYDIS_MNEMONIC_MONITORX:
	case ZYDIS_MNEMONIC_MWAITX:
	case ZYDIS_MNEMONIC_UMONITOR:
	case ZYDIS_MNEMONIC_UMWAIT:
	case ZYDIS_MNEMONIC_TPAUSE:
	case ZYDIS_MNEMONIC_RSM:
	case ZYDIS_MNEMONIC_GETSEC:
	case ZYDIS_MNEMONIC_PCONFIG:
	case ZYDIS_MNEMONIC_RDPRU:
	case ZYDIS_MNEMONIC_RDPKRU:
	case ZYDIS_MNEMONIC_WRPKRU:
	case ZYDIS_MNEMONIC_ENCLS:
	case ZYDIS_MNEMONIC_ENCLU:
	case ZYDIS_MNEMONIC_ENCLV:
	case ZYDIS_MNEMONIC_INVEPT:
	case ZYDIS_MNEMONIC_INVVPID:
	case ZYDIS_MNEMONIC_VMCLEAR:
	case ZYDIS_MNEMONIC_VMFUNC:
	case ZYDIS_MNEMONIC_VMLAUNCH:
	case ZYDIS_MNEMONIC_VMPTRLD:
	case ZYDIS_MNEMONIC_VMPTRST:
	case ZYDIS_MNEMONIC_VMREAD:
	case ZYDIS_MNEMONIC_VMRESUME:
	case ZYDIS_MNEMONIC_VMWRITE:
	case ZYDIS_MNEMONIC_VMXOFF:
	case ZYDIS_MNEMONIC_VMXON:
	case ZYDIS_MNEMONIC_VMRUN:
	case ZYDIS_MNEMONIC_VMLOAD:
	case ZYDIS_MNEMONIC_VMSAVE:
	case ZYDIS_MNEMONIC_STGI:
	case ZYDIS_MNEMONIC_CLGI:
	case ZYDIS_MNEMONIC_SKINIT:
	case ZYDIS_MNEMONIC_INVLPGA:
		return bt_raise(v, VECTOR_UD);
	default:
		return NOT_OURS;
	}
}

enum system_result system_execute(struct bt_vcpu *v, const struct bt_decoded *d)
{
	uint64_t next = next_rip(v, d);
	int result = execute_transfer(v, d);

	if (result <= 0)
		return result < 0 ? SYSTEM_FAULT : SYSTEM_DONE;
	if (d->insn.mnemonic == ZYDIS_MNEMONIC_HLT) {
		if (require_cpl0(v) < 0)
			return SYSTEM_FAULT;
		v->rip = next;
		v->halted = true;
		return SYSTEM_HALT;
	}
	result = execute_plain(v, d);
	if (result < 0)
		return SYSTEM_FAULT;
	if (result == NOT_OURS)
		return SYSTEM_UNKNOWN;
	if (result != REPEAT)
		v->rip = next;
	return SYSTEM_DONE;
}

void system_reset(struct bt_vcpu *v, bool init)
{
	const uint64_t keep = CR0_CD | CR0_NW; /* an INIT leaves the caches as they are (SDM volume 3, table 10-1) */

	for (unsigned i = 0; i < 16; i++)
		v->gprs[i] = 0;
	v->gprs[ENGINE_RDX] = v->model->signature;
	v->cr0 = (init ? v->cr0 & keep : keep) | CR0_ET;
	v->cr2 = v->cr3 = v->cr4 = v->efer = 0;
	for (int s = 0; s < ENGINE_SEGMENTS; s++)
		segment_set(v, s, 0, 0, 0xffff, SEGMENT_P | SEGMENT_S | TYPE_WRITABLE | TYPE_ACCESSED);
	segment_set(v, ENGINE_CS, 0xf000, 0xffff0000, 0xffff,
		SEGMENT_P | SEGMENT_S | TYPE_CODE | TYPE_READABLE | TYPE_ACCESSED);
	segment_set(v, ENGINE_LDTR, 0, 0, 0xffff, SEGMENT_P | 2);
	segment_set(v, ENGINE_TR, 0, 0, 0xffff, SEGMENT_P | 0xb);
	v->fs_base = v->gs_base = 0;
	v->cpl = 0;
	v->gdt.base = v->idt.base = 0;
	v->gdt.limit = v->idt.limit = 0xffff;
	for (unsigned i = 0; i < 6; i++)
		v->dr[i] = 0;
	v->dr[6] = 0xffff0ff0;
	v->dr[7] = 0x400;
	v->rip = 0xfff0;
	v->shadow = 0;
	v->halted = v->triple_fault = false;
	v->fault.vector = 0;
	v->fault.software = v->fault.has_error = false;
	paravirt_reset(v, init);
	if (!init) {
		v->xcr0 = 1;
		msr_reset(v);
	}
	bt_set_rflags(v, 2);
	bt_mode_update(v);
	bt_tlb_flush(v, false);
}
