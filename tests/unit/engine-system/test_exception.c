/* Delivery of exceptions and interrupts, and the ways back. */
#include "fake.h"

#define IRETQ 0x48, 0xcf
#define SYSCALL 0x0f, 0x05
#define SYSRETQ 0x48, 0x0f, 0x07

static void raise(int vector, int error)
{
	fake.v->fault = (struct bt_fault){
		.vector = vector, .error = (uint32_t)(error < 0 ? 0 : error), .has_error = error >= 0};
	exception_deliver(fake.v);
}

/* The frame that an exception in long mode leaves at rsp; error -1: none. */
static void assert_frame(
	uint64_t rsp, int error, uint64_t rip, uint16_t cs, uint64_t flags, uint64_t old_rsp, uint16_t ss)
{
	assert_int_equal(fake.v->gprs[ENGINE_RSP], rsp);
	if (error >= 0) {
		assert_int_equal(peek(rsp, 8), error);
		rsp += 8;
	}
	assert_int_equal(peek(rsp, 8), rip);
	assert_int_equal(peek(rsp + 8, 8), cs);
	assert_int_equal(peek(rsp + 16, 8), flags);
	assert_int_equal(peek(rsp + 24, 8), old_rsp);
	assert_int_equal(peek(rsp + 32, 8), ss);
}

static void test_long_same_privilege(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	v->gprs[ENGINE_RSP] = STACK0 - 4; /* is aligned down to 16 */
	raise(VECTOR_PF, 2);
	assert_frame(STACK0 - 16 - 48, 2, CODE, KERNEL64, FLAG_IF | FLAG_RF | 2, STACK0 - 4, KERNEL_DATA);
	assert_int_equal(v->rip, HANDLER + 16 * VECTOR_PF);
	assert_int_equal(v->iflag, 0);
	assert_int_equal(v->segments[ENGINE_SS].selector, KERNEL_DATA);
	assert_false(v->triple_fault);
}

static void test_long_from_user(void **state)
{
	struct bt_vcpu *v = fake_long(3);

	v->eflags |= FLAG_TF;
	v->shadow = 1;
	raise(VECTOR_DE, -1);
	assert_frame(STACK0 - 40, -1, CODE, USER64, FLAG_IF | FLAG_TF | FLAG_RF | 2, STACK3, USER_DATA);
	assert_int_equal(v->cpl, 0);
	assert_int_equal(v->segments[ENGINE_CS].selector, KERNEL64);
	assert_int_equal(v->segments[ENGINE_SS].selector, 0);
	assert_int_equal(v->eflags & FLAG_TF, 0);
	assert_int_equal(v->shadow, 0);
}

static void test_interrupt_and_ist(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	v->halted = true;
	fake_gate64(0x40, KERNEL64, HANDLER, 15, 0, 1); /* a trap gate leaves IF */
	interrupt_deliver(v, 0x40);
	assert_frame(STACK_IST - 40, -1, CODE, KERNEL64, FLAG_IF | 2, STACK0, KERNEL_DATA);
	assert_int_equal(v->iflag, 1);
	assert_false(v->halted);
}

static void test_int_n(void **state)
{
	struct bt_vcpu *v = fake_long(3);

	fake_gate64(0x80, KERNEL64, HANDLER, 14, 3, 0);
	assert_int_equal(EXECUTE(0xcd, 0x80), SYSTEM_FAULT);
	exception_deliver(v);
	assert_frame(STACK0 - 40, -1, CODE + 2, USER64, FLAG_IF | 2, STACK3, USER_DATA);

	/* a gate of DPL 0 cannot be called from user code: #GP with the gate's number, at the instruction */
	v = fake_long(3);
	assert_int_equal(EXECUTE(0xcd, 0x81), SYSTEM_FAULT);
	exception_deliver(v);
	assert_frame(STACK0 - 48, 0x81 * 8 + 2, CODE, USER64, FLAG_IF | FLAG_RF | 2, STACK3, USER_DATA);
	assert_int_equal(v->rip, HANDLER + 16 * VECTOR_GP);

	v = fake_long(3);
	fake_gate64(VECTOR_BP, KERNEL64, HANDLER, 14, 3, 0);
	assert_int_equal(EXECUTE(0xcc), SYSTEM_FAULT);
	exception_deliver(v);
	assert_frame(STACK0 - 40, -1, CODE + 1, USER64, FLAG_IF | 2, STACK3, USER_DATA);
}

static void test_double_and_triple_fault(void **state)
{
	struct bt_vcpu *v = fake_long(3);

	fake_gate64(VECTOR_DF, KERNEL64, HANDLER, 14, 0, 1);
	fake.absent = (STACK0 - 1) & ~0xfffull; /* the kernel's stack is not there: #PF on #PF */
	raise(VECTOR_PF, 4);
	assert_frame(STACK_IST - 48, 0, CODE, USER64, FLAG_IF | 2, STACK3, USER_DATA);
	assert_int_equal(v->rip, HANDLER);
	assert_false(v->triple_fault);

	v = fake_long(3);
	fake.absent = (STACK0 - 1) & ~0xfffull;
	raise(VECTOR_PF, 4);
	assert_true(v->triple_fault);

	/* #DE and a gate that is not present: contributory on contributory */
	v = fake_long(0);
	poke(IDT + 5, 0x0e, 1);
	raise(VECTOR_DE, -1);
	assert_int_equal(v->rip, HANDLER + 16 * VECTOR_DF);

	/* #UD is benign: what comes up is delivered instead, with EXT set */
	v = fake_long(0);
	poke(IDT + 16 * VECTOR_UD + 5, 0x0e, 1);
	raise(VECTOR_UD, -1);
	assert_int_equal(v->rip, HANDLER + 16 * VECTOR_NP);
	assert_int_equal(peek(v->gprs[ENGINE_RSP], 8), VECTOR_UD * 8 + 3);

	/* an interrupt is too */
	v = fake_long(0);
	poke(IDT + 16 * 0x50 + 5, 0x0e, 1);
	interrupt_deliver(v, 0x50);
	assert_int_equal(v->rip, HANDLER + 16 * VECTOR_NP);

	v = fake_long(0);
	v->idt.limit = 0;
	raise(VECTOR_UD, -1);
	assert_true(v->triple_fault);
}

static void iret_frame(uint64_t at, uint64_t rip, uint64_t cs, uint64_t flags, uint64_t rsp, uint64_t ss)
{
	const uint64_t frame[5] = {rip, cs, flags, rsp, ss};

	memcpy(fake.memory + at, frame, sizeof(frame));
}

static void test_iretq(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	v->gprs[ENGINE_RSP] = STACK0 - 40;
	v->fs_base = v->segments[ENGINE_FS].base = 0x1234;
	fake_descriptor(KERNEL_DATA, 0, UINT32_MAX, 0xc93);
	v->segments[ENGINE_DS] = v->segments[ENGINE_SS]; /* the kernel's own: not for user code */
	iret_frame(STACK0 - 40, 0x400000, USER64, FLAG_IF | FLAG_CF | FLAG_TF | 3 << 12, 0x7fff0000, USER_DATA);
	assert_int_equal(EXECUTE(IRETQ), SYSTEM_DONE);
	assert_int_equal(v->rip, 0x400000);
	assert_int_equal(v->cpl, 3);
	assert_int_equal(v->gprs[ENGINE_RSP], 0x7fff0000);
	assert_int_equal(bt_rflags(v), FLAG_IF | FLAG_CF | FLAG_TF | 3 << 12 | 2);
	assert_int_equal(v->segments[ENGINE_SS].selector, USER_DATA);
	assert_int_equal(v->segments[ENGINE_DS].selector, 0);
	assert_int_equal(v->fs_base, 0x1234); /* its selector was null: Linux relies on the base */

	/* to a 32-bit program */
	v = fake_long(0);
	v->gprs[ENGINE_RSP] = STACK0 - 40;
	iret_frame(STACK0 - 40, 0x8048000, USER32, FLAG_IF, 0xffffd000, USER_DATA);
	assert_int_equal(EXECUTE(IRETQ), SYSTEM_DONE);
	assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE32);
	assert_int_equal(v->gprs[ENGINE_RSP], 0xffffd000);

	/* same privilege, null SS, as after an exception */
	v = fake_long(0);
	v->gprs[ENGINE_RSP] = STACK0 - 40;
	iret_frame(STACK0 - 40, CODE + 8, KERNEL64, FLAG_IF, STACK0 - 4, 0);
	assert_int_equal(EXECUTE(IRETQ), SYSTEM_DONE);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 4);
	assert_int_equal(v->cpl, 0);
}

static void test_iretq_refused(void **state)
{
	static const struct {
		uint64_t rip, cs, ss;
		int vector, error;
	} cases[] = {
		{0x800000000000, USER64, USER_DATA, VECTOR_GP, 0}, /* not canonical */
		{0x1000, 0, USER_DATA, VECTOR_GP, 0},
		{0x1000, KERNEL_DATA, USER_DATA, VECTOR_GP, KERNEL_DATA},
		{0x1000, USER64 & ~3, USER_DATA, VECTOR_GP, USER64 & ~3}, /* RPL is not DPL */
		{0x1000, 0xfff8, USER_DATA, VECTOR_GP, 0xfff8},
		{0x1000, USER64, 0, VECTOR_GP, 0}, /* null SS for user code */
		{0x1000, USER64, KERNEL_DATA | 3, VECTOR_GP, KERNEL_DATA},
		{0x1000, KERNEL64, ABSENT_DATA, VECTOR_SS, ABSENT_DATA},
	};
	struct bt_vcpu *v;

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		v = fake_long(0);
		v->gprs[ENGINE_RSP] = STACK0 - 40;
		iret_frame(STACK0 - 40, cases[i].rip, cases[i].cs, FLAG_IF, STACK3, cases[i].ss);
		assert_fault(EXECUTE(IRETQ), cases[i].vector, cases[i].error);
		assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 40);
		assert_int_equal(v->cpl, 0);
		assert_int_equal(v->rip, CODE);
	}
	v = fake_long(0);
	v->eflags |= FLAG_NT;
	assert_fault(EXECUTE(IRETQ), VECTOR_GP, 0);
	v = fake_long(3); /* user code cannot go inwards */
	v->gprs[ENGINE_RSP] = STACK3 - 40;
	iret_frame(STACK3 - 40, CODE, KERNEL64, 0, STACK0, KERNEL_DATA);
	assert_fault(EXECUTE(IRETQ), VECTOR_GP, KERNEL64);
}

static void test_iretq_user_flags(void **state)
{
	struct bt_vcpu *v = fake_long(3);

	v->gprs[ENGINE_RSP] = STACK3 - 40;
	iret_frame(STACK3 - 40, 0x1000, USER64, 3 << 12 | FLAG_ZF, STACK3, USER_DATA);
	assert_int_equal(EXECUTE(IRETQ), SYSTEM_DONE);
	assert_int_equal(bt_rflags(v), FLAG_IF | FLAG_ZF | 2); /* neither IOPL nor IF change */
}

static void test_syscall(void **state)
{
	struct bt_vcpu *v = fake_long(3);

	bt_set_rflags(v, FLAG_IF | FLAG_CF | FLAG_DF | 2);
	assert_int_equal(EXECUTE(SYSCALL), SYSTEM_DONE);
	assert_int_equal(v->rip, 0xb000);
	assert_int_equal(v->gprs[ENGINE_RCX], CODE + 2);
	assert_int_equal(v->gprs[11], FLAG_IF | FLAG_CF | FLAG_DF | 2);
	assert_int_equal(bt_rflags(v), FLAG_CF | 2);
	assert_int_equal(v->cpl, 0);
	assert_int_equal(v->segments[ENGINE_CS].selector, KERNEL64);
	assert_int_equal(v->segments[ENGINE_SS].selector, KERNEL_DATA);

	v->gprs[11] |= FLAG_VM | FLAG_RF; /* ignored */
	assert_int_equal(EXECUTE(SYSRETQ), SYSTEM_DONE);
	assert_int_equal(v->rip, CODE + 2);
	assert_int_equal(v->cpl, 3);
	assert_int_equal(v->segments[ENGINE_CS].selector, USER64);
	assert_int_equal(v->segments[ENGINE_SS].selector, USER_DATA);
	assert_int_equal(bt_rflags(v), FLAG_IF | FLAG_CF | FLAG_DF | 2);

	v->efer &= ~(uint64_t)EFER_SCE;
	assert_fault(EXECUTE(SYSCALL), VECTOR_UD, -1);
	v = fake_long(3);
	assert_fault(EXECUTE(SYSRETQ), VECTOR_GP, 0);
}

static void test_vendor(void **state)
{
	struct cpu_model intel = {.vendor = CPU_INTEL};
	struct bt_vcpu *v = fake_long(0);

	/* SYSRET to an address that is not canonical: Intel faults in the kernel, AMD at CPL 3 */
	fake_use_model("x86-64-v2");
	v->gprs[ENGINE_RCX] = 0x800000000000;
	assert_fault(EXECUTE(SYSRETQ), VECTOR_GP, 0);
	assert_int_equal(v->cpl, 3);
	v = fake_long(0);
	v->model = &intel;
	v->gprs[ENGINE_RCX] = 0x800000000000;
	assert_fault(EXECUTE(SYSRETQ), VECTOR_GP, 0);
	assert_int_equal(v->cpl, 0);
	assert_int_equal(v->rip, CODE);

	/* compatibility mode: SYSCALL is AMD's, SYSENTER is Intel's */
	for (int amd = 0; amd < 2; amd++) {
		v = fake_long(3);
		if (amd)
			fake_use_model("x86-64-v2");
		else
			v->model = &intel;
		v->segments[ENGINE_CS].selector = USER32;
		v->segments[ENGINE_CS].attributes = 0xcfb;
		v->sysenter_cs = KERNEL64;
		v->sysenter_eip = 0xc000;
		v->sysenter_esp = STACK0;
		bt_mode_update(v);
		if (amd) {
			assert_fault(EXECUTE(0x0f, 0x34), VECTOR_UD, -1);
			assert_int_equal(EXECUTE(SYSCALL), SYSTEM_DONE);
			assert_int_equal(v->rip, 0xb800);
			assert_int_equal(v->gprs[ENGINE_RCX], CODE + 2);
			assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE64);
			assert_int_equal(EXECUTE(0x0f, 0x07), SYSTEM_DONE); /* sysretl */
			assert_int_equal(v->segments[ENGINE_CS].selector, USER32);
			assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE32);
		} else {
			assert_fault(EXECUTE(SYSCALL), VECTOR_UD, -1);
			assert_int_equal(EXECUTE(0x0f, 0x34), SYSTEM_DONE);
			assert_int_equal(v->rip, 0xc000);
			assert_int_equal(v->gprs[ENGINE_RSP], STACK0);
			assert_int_equal(v->iflag, 0);
			assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE64);
			v->gprs[ENGINE_RDX] = 0x1000;
			v->gprs[ENGINE_RCX] = 0x2000;
			assert_int_equal(EXECUTE(0x0f, 0x35), SYSTEM_DONE);
			assert_int_equal(v->segments[ENGINE_CS].selector, KERNEL64 + 16 + 3);
			assert_int_equal(v->rip, 0x1000);
		}
	}
}

static void test_protected(void **state)
{
	struct bt_vcpu *v = fake_protected(3);

	raise(VECTOR_GP, 0x18);
	assert_int_equal(v->cpl, 0);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 24);
	assert_int_equal(peek(STACK0 - 24, 4), 0x18);
	assert_int_equal(peek(STACK0 - 20, 4), CODE);
	assert_int_equal(peek(STACK0 - 16, 4), USER32);
	assert_int_equal(peek(STACK0 - 12, 4), FLAG_IF | FLAG_RF | 2);
	assert_int_equal(peek(STACK0 - 8, 4), STACK3);
	assert_int_equal(peek(STACK0 - 4, 4), USER_DATA);
	assert_int_equal(v->segments[ENGINE_SS].selector, KERNEL_DATA);
	v->gprs[ENGINE_RSP] += 4;
	assert_int_equal(EXECUTE(0xcf), SYSTEM_DONE);
	assert_int_equal(v->cpl, 3);
	assert_int_equal(v->rip, CODE);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK3);

	v = fake_protected(0); /* a 16-bit trap gate, same privilege */
	fake_gate32(0x21, KERNEL32, 0x7000, 7, 0);
	interrupt_deliver(v, 0x21);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 6);
	assert_int_equal(v->iflag, 1);
	assert_int_equal(v->rip, 0x7000);

	v = fake_protected(
		3); /* the TSS's stack segment is unusable: #TS, in which it is unusable too: #DF, shut down */
	poke(TSS + 8, USER_DATA, 2);
	raise(VECTOR_UD, -1);
	assert_true(v->triple_fault);
}

static void test_virtual_8086(void **state)
{
	struct bt_vcpu *v = fake_protected(0);
	const uint32_t frame[9] = {0x100, 0x800, FLAG_VM | FLAG_IF | 2, 0x2000, 0x1000, 0x1111, 0x2222, 0x3333, 0x4444};

	v->gprs[ENGINE_RSP] = STACK0 - sizeof(frame);
	memcpy(fake.memory + STACK0 - sizeof(frame), frame, sizeof(frame));
	assert_int_equal(EXECUTE(0xcf), SYSTEM_DONE);
	assert_int_equal(v->cpl, 3);
	assert_int_equal(v->segments[ENGINE_CS].base, 0x8000);
	assert_int_equal(v->segments[ENGINE_GS].base, 0x44440);
	assert_int_equal(v->gs_base, 0x44440);
	assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE16);
	assert_int_equal(v->gprs[ENGINE_RSP], 0x2000);
	assert_fault(EXECUTE(0xfa), VECTOR_GP, 0);	 /* cli: IOPL is 0 */
	assert_fault(EXECUTE(0xcd, 0x10), VECTOR_GP, 0); /* int too */
	exception_deliver(v);
	assert_int_equal(v->cpl, 0);
	assert_int_equal(v->eflags & FLAG_VM, 0);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 40);
	for (unsigned i = 0; i < 9; i++)
		assert_int_equal(peek(STACK0 - 36 + 4 * i, 4), frame[i] | (i == 2 ? FLAG_RF : 0));
	assert_int_equal(v->segments[ENGINE_DS].selector, 0);
	v->gprs[ENGINE_RSP] += 4;
	assert_int_equal(EXECUTE(0xcf), SYSTEM_DONE);
	assert_int_equal(v->segments[ENGINE_FS].selector, 0x3333);
}

static void test_real_mode(void **state)
{
	struct bt_vcpu *v = fake_real();

	assert_int_equal(EXECUTE(0xcd, 0x10), SYSTEM_FAULT);
	exception_deliver(v);
	assert_int_equal(v->rip, 0x100);
	assert_int_equal(v->segments[ENGINE_CS].base, 0x9000);
	assert_int_equal(v->gprs[ENGINE_RSP], 0xffa);
	assert_int_equal(peek(0x10ffa, 2), 0x102);
	assert_int_equal(peek(0x10ffc, 2), 0x800);
	assert_int_equal(v->iflag, 0);
	assert_int_equal(EXECUTE(0xcf), SYSTEM_DONE);
	assert_int_equal(v->rip, 0x102);
	assert_int_equal(v->segments[ENGINE_CS].selector, 0x800);
	assert_int_equal(v->iflag, 1);
	assert_int_equal(v->gprs[ENGINE_RSP], 0x1000);
	raise(VECTOR_GP, 0); /* pushes no error code */
	assert_int_equal(v->gprs[ENGINE_RSP], 0xffa);
}

const struct CMUnitTest exception_tests[] = {
	cmocka_unit_test(test_long_same_privilege),
	cmocka_unit_test(test_long_from_user),
	cmocka_unit_test(test_interrupt_and_ist),
	cmocka_unit_test(test_int_n),
	cmocka_unit_test(test_double_and_triple_fault),
	cmocka_unit_test(test_iretq),
	cmocka_unit_test(test_iretq_refused),
	cmocka_unit_test(test_iretq_user_flags),
	cmocka_unit_test(test_syscall),
	cmocka_unit_test(test_vendor),
	cmocka_unit_test(test_protected),
	cmocka_unit_test(test_virtual_8086),
	cmocka_unit_test(test_real_mode),
};
const unsigned exception_count = ARRAY_SIZE(exception_tests);
