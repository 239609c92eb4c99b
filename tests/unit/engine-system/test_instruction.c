/* Instructions one by one: segments, far transfers, flags, control registers, MSRs, ports. */
#include <time.h>

#include "fake.h"

#include "engine/bt/bt.h"

static void test_segment_loads(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	v->gprs[ENGINE_RAX] = USER_DATA;
	assert_int_equal(EXECUTE(0x8e, 0xd8), SYSTEM_DONE); /* mov ds, eax */
	assert_int_equal(v->segments[ENGINE_DS].selector, USER_DATA);
	assert_int_equal(v->segments[ENGINE_DS].limit, UINT32_MAX);
	assert_int_equal(v->rip, CODE + 2);
	assert_int_equal(v->shadow, 0);

	fake_descriptor(USER_DATA, 0x5000, 0xffff, 0x0f2);  /* not yet accessed */
	assert_int_equal(EXECUTE(0x8e, 0xe0), SYSTEM_DONE); /* mov fs, eax */
	assert_int_equal(v->fs_base, 0x5000);
	assert_int_equal(peek(GDT + 0x28 + 5, 1), 0xf3);
	v->gprs[ENGINE_RAX] = 0;
	assert_int_equal(EXECUTE(0x8e, 0xe0), SYSTEM_DONE); /* a null selector clears the base */
	assert_int_equal(v->fs_base, 0);

	v->gprs[ENGINE_RAX] = KERNEL_DATA;
	assert_int_equal(EXECUTE(0x8e, 0xd0), SYSTEM_DONE); /* mov ss, eax */
	assert_int_equal(v->shadow, 1);
	v->gprs[ENGINE_RBX] = ~0ull;
	assert_int_equal(EXECUTE(0x8c, 0xd3), SYSTEM_DONE); /* mov ebx, ss */
	assert_int_equal(v->gprs[ENGINE_RBX], KERNEL_DATA);
}

static void test_segment_loads_refused(void **state)
{
	static const struct {
		unsigned cpl;
		bool ss;
		uint16_t selector;
		int vector, error;
	} cases[] = {
		{0, false, ABSENT_DATA, VECTOR_NP, ABSENT_DATA},
		{0, true, ABSENT_DATA, VECTOR_SS, ABSENT_DATA},
		{0, false, TASK, VECTOR_GP, TASK},
		{0, false, EXECUTE_ONLY, VECTOR_GP, EXECUTE_ONLY},
		{0, false, 0xf000, VECTOR_GP, 0xf000},
		{0, false, 0x0c, VECTOR_GP, 0x0c}, /* no LDT */
		{0, true, USER_DATA, VECTOR_GP, USER_DATA & ~3},
		{0, true, 3, VECTOR_GP, 0},
		{3, true, 0, VECTOR_GP, 0},
		{3, false, KERNEL_DATA, VECTOR_GP, KERNEL_DATA},
		{3, false, KERNEL_DATA | 3, VECTOR_GP, KERNEL_DATA},
		{0, false, KERNEL_DATA | 3, VECTOR_GP, KERNEL_DATA},
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct bt_vcpu *v = fake_long(cases[i].cpl);

		v->gprs[ENGINE_RAX] = cases[i].selector;
		assert_fault(cases[i].ss ? EXECUTE(0x8e, 0xd0) : EXECUTE(0x8e, 0xd8), cases[i].vector, cases[i].error);
		assert_int_equal(v->rip, CODE);
	}
}

/* The operand's size moves the stack pointer and, in a register, zero-extends. */
static void test_segment_stack(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	v->segments[ENGINE_FS].selector = USER_DATA;
	assert_int_equal(EXECUTE(0x0f, 0xa0), SYSTEM_DONE); /* push fs */
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 8);
	assert_int_equal(peek(STACK0 - 8, 8), USER_DATA);
	assert_int_equal(EXECUTE(0x0f, 0xa9), SYSTEM_DONE); /* pop gs */
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0);
	assert_int_equal(v->segments[ENGINE_GS].selector, USER_DATA);

	v = fake_protected(0);
	assert_int_equal(EXECUTE(0x1e), SYSTEM_DONE); /* push ds */
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 4);
	assert_int_equal(EXECUTE(0x66, 0x1e), SYSTEM_DONE);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 6);
	assert_int_equal(EXECUTE(0x66, 0x17), SYSTEM_DONE); /* pop ss, 16 bits */
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 4);
	assert_int_equal(v->shadow, 1);
	v->gprs[ENGINE_RAX] = 0x6000;
	poke(0x6000, 0x12345678, 4);
	poke(0x6004, USER_DATA, 2);
	assert_int_equal(EXECUTE(0xc4, 0x18), SYSTEM_DONE); /* les ebx, [eax] */
	assert_int_equal(v->gprs[ENGINE_RBX], 0x12345678);
	assert_int_equal(v->segments[ENGINE_ES].selector, USER_DATA);
	v->gprs[ENGINE_RSP] = STACK0;
	v->segments[ENGINE_SS].limit = STACK0 - 1;
	assert_int_equal(EXECUTE(0x06), SYSTEM_DONE);
	v->segments[ENGINE_SS].limit = STACK0 - 6;
	assert_fault(EXECUTE(0x06), VECTOR_SS, 0); /* push es, beyond the limit */
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 4);

	v = fake_real();
	v->gprs[ENGINE_RAX] = 0x1234;
	v->gprs[ENGINE_RSP] = 0x10000000;	      /* wraps in 16 bits, the rest of RSP stays */
	assert_int_equal(EXECUTE(0x16), SYSTEM_DONE); /* push ss */
	assert_int_equal(v->gprs[ENGINE_RSP], 0x1000fffe);
	assert_int_equal(peek(0x1fffe, 2), 0x1000);
	assert_int_equal(EXECUTE(0x8e, 0xd8), SYSTEM_DONE);
	assert_int_equal(v->segments[ENGINE_DS].base, 0x12340);
	assert_fault(EXECUTE(0x0f, 0x00, 0xc8), VECTOR_UD, -1); /* str ax */
}

static void test_tables(void **state)
{
	struct bt_vcpu *v = fake_long(0);
	struct engine_table gdt = v->gdt;

	v->gprs[ENGINE_RAX] = 0x6000;
	assert_int_equal(EXECUTE(0x0f, 0x01, 0x00), SYSTEM_DONE); /* sgdt [rax] */
	assert_int_equal(peek(0x6000, 2), gdt.limit);
	assert_int_equal(peek(0x6002, 8), gdt.base);
	poke(0x6002, 0xffff888000000000, 8);
	assert_int_equal(EXECUTE(0x0f, 0x01, 0x18), SYSTEM_DONE); /* lidt [rax] */
	assert_int_equal(v->idt.base, 0xffff888000000000);
	poke(0x6002, 0x888000000000, 8);
	assert_fault(EXECUTE(0x0f, 0x01, 0x18), VECTOR_GP, 0);

	v->gprs[ENGINE_RAX] = LOCAL;
	poke(GDT + LOCAL + 8, 0, 8);
	assert_int_equal(EXECUTE(0x0f, 0x00, 0xd0), SYSTEM_DONE); /* lldt ax */
	assert_int_equal(v->segments[ENGINE_LDTR].base, LDT);
	poke(LDT, 0x00cf93000000ffff, 8);
	v->gprs[ENGINE_RAX] = 4;
	assert_int_equal(EXECUTE(0x8e, 0xd8), SYSTEM_DONE);
	assert_int_equal(v->segments[ENGINE_DS].attributes, 0xc93);

	fake_descriptor(TASK, TSS, 0x67, 0x89);
	v->gprs[ENGINE_RAX] = TASK;
	assert_int_equal(EXECUTE(0x0f, 0x00, 0xd8), SYSTEM_DONE); /* ltr ax */
	assert_int_equal(peek(GDT + TASK + 5, 1), 0x8b);	  /* busy */
	assert_fault(EXECUTE(0x0f, 0x00, 0xd8), VECTOR_GP, TASK);

	v->gprs[ENGINE_RBX] = ~0ull;
	assert_int_equal(EXECUTE(0x0f, 0x01, 0xe3), SYSTEM_DONE); /* smsw ebx */
	assert_int_equal(v->gprs[ENGINE_RBX], v->cr0);
	v->gprs[ENGINE_RAX] = 0x6000;
	poke(0x6000, ~0ull, 8);
	assert_int_equal(
		EXECUTE(0x48, 0x0f, 0x00, 0x08), SYSTEM_DONE); /* str [rax]: 16 bits whatever the operand size */
	assert_int_equal(peek(0x6000, 8), 0xffffffffffff0000 | TASK);

	v = fake_long(3);
	assert_fault(EXECUTE(0x0f, 0x01, 0x10), VECTOR_GP, 0); /* lgdt */
	v->gprs[ENGINE_RAX] = 0x6000;
	assert_int_equal(EXECUTE(0x0f, 0x01, 0x08), SYSTEM_DONE); /* sidt */
	v->cr4 |= CR4_UMIP;
	assert_fault(EXECUTE(0x0f, 0x01, 0x08), VECTOR_GP, 0);
}

static void test_queries(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	v->gprs[ENGINE_RAX] = USER_DATA;
	assert_int_equal(EXECUTE(0x0f, 0x02, 0xd8), SYSTEM_DONE); /* lar ebx, eax */
	assert_true(bt_rflags(v) & FLAG_ZF);
	assert_int_equal(v->gprs[ENGINE_RBX], 0xc0f300 | 0x0f0000); /* with the limit's bits 16 to 19 */
	assert_int_equal(EXECUTE(0x0f, 0x03, 0xd8), SYSTEM_DONE);   /* lsl */
	assert_int_equal(v->gprs[ENGINE_RBX], UINT32_MAX);
	v->gprs[ENGINE_RAX] = EXECUTE_ONLY;
	assert_int_equal(EXECUTE(0x0f, 0x00, 0xe0), SYSTEM_DONE); /* verr */
	assert_false(bt_rflags(v) & FLAG_ZF);
	v->gprs[ENGINE_RAX] = KERNEL_DATA;
	assert_int_equal(EXECUTE(0x0f, 0x00, 0xe8), SYSTEM_DONE); /* verw */
	assert_true(bt_rflags(v) & FLAG_ZF);
	v->gprs[ENGINE_RAX] = 0xfff0;
	v->fault.vector = 77;
	assert_int_equal(EXECUTE(0x0f, 0x02, 0xd8), SYSTEM_DONE);
	assert_false(bt_rflags(v) & FLAG_ZF);
	assert_int_equal(v->fault.vector, 77);
}

static void far_memory(uint64_t offset, uint16_t selector)
{
	fake.v->gprs[ENGINE_RAX] = 0x6000;
	poke(0x6000, offset, 8);
	poke(0x6008, selector, 2);
}

static void test_far_long(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	far_memory(0x1000, KERNEL32);
	assert_int_equal(EXECUTE(0x48, 0xff, 0x28), SYSTEM_DONE); /* jmp far [rax], m16:64 */
	assert_int_equal(v->rip, 0x1000);
	assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE32);
	assert_int_equal(EXECUTE(0xea, 0, 0x20, 0, 0, KERNEL64, 0), SYSTEM_DONE); /* and back by a direct one */
	assert_int_equal(v->rip, 0x2000);
	assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE64);

	far_memory(0x3000, KERNEL64);
	assert_int_equal(EXECUTE(0x48, 0xff, 0x18), SYSTEM_DONE); /* call far */
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 16);
	assert_int_equal(peek(STACK0 - 16, 8), 0x2003);
	assert_int_equal(peek(STACK0 - 8, 8), KERNEL64);
	assert_int_equal(EXECUTE(0x48, 0xcb), SYSTEM_DONE); /* retfq */
	assert_int_equal(v->rip, 0x2003);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0);

	/* outwards */
	v = fake_long(0);
	poke(STACK0 - 32, 0x400000, 8);
	poke(STACK0 - 24, USER64, 8);
	poke(STACK0 - 16, STACK3, 8);
	poke(STACK0 - 8, USER_DATA, 8);
	v->gprs[ENGINE_RSP] = STACK0 - 32;
	assert_int_equal(EXECUTE(0x48, 0xcb), SYSTEM_DONE);
	assert_int_equal(v->cpl, 3);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK3);

	/* a user program between its 64-bit and 32-bit segments, as 32-bit syscall code does */
	far_memory(0x5000, USER32);
	assert_int_equal(EXECUTE(0x48, 0xff, 0x28), SYSTEM_DONE);
	assert_int_equal(v->segments[ENGINE_CS].selector, USER32);
	assert_int_equal(EXECUTE(0xea, 0, 0x60, 0, 0, USER64, 0), SYSTEM_DONE);
	assert_int_equal(v->cpl, 3);

	/* conforming code keeps the caller's privilege */
	far_memory(0x7000, CONFORMING64);
	assert_int_equal(EXECUTE(0x48, 0xff, 0x28), SYSTEM_DONE);
	assert_int_equal(v->segments[ENGINE_CS].selector, CONFORMING64 | 3);
	far_memory(0x7000, KERNEL64);
	assert_fault(EXECUTE(0x48, 0xff, 0x28), VECTOR_GP, KERNEL64);
	far_memory(0x7000, 0);
	assert_fault(EXECUTE(0x48, 0xff, 0x28), VECTOR_GP, 0);
	far_memory(0x7000, USER_DATA);
	assert_fault(EXECUTE(0x48, 0xff, 0x28), VECTOR_GP, USER_DATA & ~3);
}

static void test_call_gates(void **state)
{
	struct bt_vcpu *v = fake_long(3);

	far_memory(0, GATE);
	assert_int_equal(EXECUTE(0x48, 0xff, 0x18), SYSTEM_DONE);
	assert_int_equal(v->cpl, 0);
	assert_int_equal(v->rip, 0xa000);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 32);
	assert_int_equal(peek(STACK0 - 32, 8), CODE + 3);
	assert_int_equal(peek(STACK0 - 24, 8), USER64);
	assert_int_equal(peek(STACK0 - 16, 8), STACK3);
	assert_int_equal(peek(STACK0 - 8, 8), USER_DATA);
	assert_int_equal(EXECUTE(0x48, 0xcb), SYSTEM_DONE);
	assert_int_equal(v->cpl, 3);
	assert_int_equal(v->rip, CODE + 3);

	v = fake_long(3); /* a jump through it cannot gain privilege */
	far_memory(0, GATE);
	assert_fault(EXECUTE(0x48, 0xff, 0x28), VECTOR_GP, KERNEL64);

	v = fake_protected(3);
	v->gprs[ENGINE_RSP] = STACK3 - 8;
	poke(STACK3 - 8, 0x11111111, 4);
	poke(STACK3 - 4, 0x22222222, 4);
	assert_int_equal(EXECUTE(0x9a, 0, 0, 0, 0, GATE, 0), SYSTEM_DONE);
	assert_int_equal(v->cpl, 0);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 24);
	assert_int_equal(peek(STACK0 - 24, 4), CODE + 7);
	assert_int_equal(peek(STACK0 - 16, 4), 0x11111111);
	assert_int_equal(peek(STACK0 - 12, 4), 0x22222222);
	assert_int_equal(peek(STACK0 - 8, 4), STACK3 - 8);
	assert_int_equal(EXECUTE(0xca, 8, 0), SYSTEM_DONE); /* retf 8 */
	assert_int_equal(v->cpl, 3);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK3);
}

static void test_to_protected_and_long(void **state)
{
	struct bt_vcpu *v = fake_real();
	uint64_t raw = 0x00cf9b000000ffff;

	/* what every boot loader does: PE, then a far jump */
	v->gdt = (struct engine_table){GDT, 0x2f};
	poke(GDT + KERNEL32, raw, 8);
	poke(GDT + KERNEL64, 0x00af9b000000ffff, 8);
	poke(GDT + KERNEL_DATA, 0x00cf93000000ffff, 8);
	v->gprs[ENGINE_RAX] = v->cr0 | CR0_PE;
	assert_int_equal(EXECUTE(0x0f, 0x22, 0xc0), SYSTEM_DONE); /* mov cr0, eax */
	assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE16);
	assert_int_equal(EXECUTE(0x66, 0xea, 0, 0x80, 0, 0, KERNEL32, 0), SYSTEM_DONE);
	assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE32);
	assert_int_equal(v->rip, 0x8000);
	v->gprs[ENGINE_RAX] = CR4_PAE;
	assert_int_equal(EXECUTE(0x0f, 0x22, 0xe0), SYSTEM_DONE); /* mov cr4, eax */
	v->gprs[ENGINE_RCX] = 0xc0000080;
	v->gprs[ENGINE_RAX] = EFER_LME;
	v->gprs[ENGINE_RDX] = 0;
	assert_int_equal(EXECUTE(0x0f, 0x30), SYSTEM_DONE);
	v->gprs[ENGINE_RAX] = v->cr0 | CR0_PG;
	assert_int_equal(EXECUTE(0x0f, 0x22, 0xc0), SYSTEM_DONE);
	assert_true(v->efer & EFER_LMA);
	assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE32);
	assert_int_equal(EXECUTE(0xea, 0, 0x90, 0, 0, KERNEL64, 0), SYSTEM_DONE);
	assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE64);
	/* paging cannot be left from 64-bit code, nor LME changed under it */
	v->gprs[ENGINE_RAX] = v->cr0 & ~(uint64_t)CR0_PG;
	assert_fault(EXECUTE(0x0f, 0x22, 0xc0), VECTOR_GP, 0);
	v->gprs[ENGINE_RAX] = 0;
	assert_fault(EXECUTE(0x0f, 0x30), VECTOR_GP, 0);
	v->gprs[ENGINE_RAX] = 0;
	assert_fault(EXECUTE(0x0f, 0x22, 0xe0), VECTOR_GP, 0); /* PAE off in long mode */
}

static void test_control(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	v->gprs[ENGINE_RAX] = 0x12345000;
	assert_int_equal(EXECUTE(0x0f, 0x22, 0xd8), SYSTEM_DONE); /* mov cr3, rax */
	assert_int_equal(fake.kept_global, 1);
	v->gprs[ENGINE_RAX] = 1ull << 63;
	assert_fault(EXECUTE(0x0f, 0x22, 0xd8), VECTOR_GP, 0);
	v->gprs[ENGINE_RAX] = v->cr4 | CR4_PCIDE;
	assert_fault(EXECUTE(0x0f, 0x22, 0xe0), VECTOR_GP, 0);
	v->gprs[ENGINE_RAX] = CR0_PG;
	assert_fault(EXECUTE(0x0f, 0x22, 0xc0), VECTOR_GP, 0);
	v->gprs[ENGINE_RAX] = 5;
	assert_int_equal(EXECUTE(0x44, 0x0f, 0x22, 0xc0), SYSTEM_DONE); /* mov cr8, rax */
	assert_int_equal(fake.cr8, 5);
	assert_int_equal(fake.parks, 1);
	assert_int_equal(EXECUTE(0x44, 0x0f, 0x20, 0xc3), SYSTEM_DONE); /* mov rbx, cr8 */
	assert_int_equal(v->gprs[ENGINE_RBX], 5);
	v->gprs[ENGINE_RAX] = 0x401;
	assert_int_equal(EXECUTE(0x0f, 0x23, 0xf8), SYSTEM_DONE); /* mov dr7, rax */
	assert_int_equal(EXECUTE(0x0f, 0x21, 0xfb), SYSTEM_DONE);
	assert_int_equal(v->gprs[ENGINE_RBX], 0x401);
	v->dr[7] |= 1 << 13;
	assert_fault(EXECUTE(0x0f, 0x21, 0xfb), VECTOR_DB, -1);
	assert_true(v->dr[6] & 1 << 13);

	v->cr0 |= CR0_TS;
	assert_int_equal(EXECUTE(0x0f, 0x06), SYSTEM_DONE); /* clts */
	assert_false(v->cr0 & CR0_TS);
	v->gprs[ENGINE_RAX] = 8; /* lmsw sets TS, cannot clear PE */
	assert_int_equal(EXECUTE(0x0f, 0x01, 0xf0), SYSTEM_DONE);
	assert_int_equal(v->cr0 & 0xf, CR0_TS | CR0_PE);

	v = fake_long(3);
	assert_fault(EXECUTE(0x0f, 0x20, 0xc0), VECTOR_GP, 0);
	assert_fault(EXECUTE(0xf4), VECTOR_GP, 0);		/* hlt */
	assert_fault(EXECUTE(0x0f, 0x06), VECTOR_GP, 0);	/* clts */
	assert_fault(EXECUTE(0x0f, 0x09), VECTOR_GP, 0);	/* wbinvd */
	assert_fault(EXECUTE(0x0f, 0x32), VECTOR_GP, 0);	/* rdmsr */
	assert_fault(EXECUTE(0x0f, 0x01, 0xf8), VECTOR_GP, 0);	/* swapgs */
	assert_fault(EXECUTE(0x0f, 0x01, 0xca), VECTOR_UD, -1); /* clac */
	assert_fault(EXECUTE(0x0f, 0x0b), VECTOR_UD, -1);
}

static void test_flags(void **state)
{
	struct bt_vcpu *v = fake_long(3);
	const uint64_t all = 0x3fffd7;

	v->gprs[ENGINE_RSP] = STACK3 - 8;
	poke(STACK3 - 8, all & ~(uint64_t)FLAG_IF, 8);
	assert_int_equal(EXECUTE(0x9d), SYSTEM_DONE); /* popfq at CPL 3: no IF, no IOPL, no VM */
	assert_int_equal(
		bt_rflags(v), FLAGS_ARITHMETIC | FLAG_TF | FLAG_IF | FLAG_DF | FLAG_NT | FLAG_AC | FLAG_ID | 2);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK3);
	assert_int_equal(EXECUTE(0x9c), SYSTEM_DONE); /* pushfq */
	assert_int_equal(peek(STACK3 - 8, 8), bt_rflags(v));

	v = fake_long(0);
	v->gprs[ENGINE_RSP] = STACK0 - 8;
	poke(STACK0 - 8, all & ~(uint64_t)FLAG_IF, 8);
	assert_int_equal(EXECUTE(0x9d), SYSTEM_DONE);
	assert_int_equal(bt_rflags(v) & (FLAG_IF | FLAG_IOPL | FLAG_VM), FLAG_IOPL);
	v->gprs[ENGINE_RSP] = STACK0 - 8;
	poke(STACK0 - 8, 0, 8);
	assert_int_equal(EXECUTE(0x66, 0x9d), SYSTEM_DONE); /* popfw keeps the upper half */
	assert_int_equal(bt_rflags(v), FLAG_AC | FLAG_ID | 2);
	assert_int_equal(v->gprs[ENGINE_RSP], STACK0 - 6);

	assert_int_equal(EXECUTE(0xfb), SYSTEM_DONE); /* sti */
	assert_int_equal(v->shadow, 1);
	v->shadow = 0;
	assert_int_equal(EXECUTE(0xfb), SYSTEM_DONE); /* IF was set: no shadow */
	assert_int_equal(v->shadow, 0);
	assert_int_equal(EXECUTE(0xfa), SYSTEM_DONE);
	assert_int_equal(v->iflag, 0);
	assert_int_equal(EXECUTE(0x0f, 0x01, 0xcb), SYSTEM_DONE); /* stac */
	assert_int_equal(v->acflag, 1);
	assert_int_equal(EXECUTE(0xf4), SYSTEM_HALT);
	assert_true(v->halted);

	v = fake_long(3);
	assert_fault(EXECUTE(0xfa), VECTOR_GP, 0);
	v->eflags |= FLAG_IOPL;
	assert_int_equal(EXECUTE(0xfa), SYSTEM_DONE);
}

static enum system_result wrmsr(uint32_t msr, uint64_t value)
{
	fake.v->gprs[ENGINE_RCX] = msr;
	fake.v->gprs[ENGINE_RAX] = 0xdead00000000 | (uint32_t)value;
	fake.v->gprs[ENGINE_RDX] = 0xbeef00000000 | value >> 32;
	return EXECUTE(0x0f, 0x30);
}

static uint64_t rdmsr(uint32_t msr)
{
	fake.v->gprs[ENGINE_RCX] = msr;
	if (EXECUTE(0x0f, 0x32) != SYSTEM_DONE)
		fail_msg("rdmsr of 0x%x faults", msr);
	return fake.v->gprs[ENGINE_RDX] << 32 | fake.v->gprs[ENGINE_RAX];
}

static void test_msr_round_trips(void **state)
{
	static const struct {
		uint32_t msr;
		uint64_t value;
	} good[] =
		{
			{0xc0000081, 0x23001000000000},
			{0xc0000082, 0xffffffff81000000},
			{0xc0000083, 0xffffffff81000040},
			{0xc0000084, 0x47700},
			{0xc0000100, 0x7f0000001000},
			{0xc0000101, 0xffff888000000000},
			{0xc0000102, 0x7f0000002000},
			{0xc0000103, 0x3005},
			{0x174, 0x10},
			{0x175, 0xfffffe0000001000},
			{0x176, 0xffffffff81000080},
			{0x277, 0x0407050600070106},
			{0x200, 0x80000006},
			{0x201, 0xf80000800},
			{0x250, 0x0606060606060606},
			{0x26f, 0x0505050505050505},
			{0x2ff, 0xc00},
			{0x3b, 1000},
			{0x830, 0xc00000},
			{0x6e0, 123456789},
			{0x1b, 0xfee00d00},
		},
	  bad[] = {
		  {0xc0000082, 0x800000000000},
		  {0xc0000100, 1ull << 62},
		  {0xc0000103, 1ull << 32},
		  {0x277, 0x02},
		  {0x250, 7},
		  {0x2ff, 0x1000},
		  {0x201, 1ull << 60},
		  {0xc0000080, 1 << 12},
		  {0x8ff, 0},
		  {0xfe, 0},
		  {0x12345, 0},
		  {0xda0, 1},
		  {0x48, 1},
		  {0xc0011020, 0},
	  };
	struct bt_vcpu *v = fake_long(0);

	for (size_t i = 0; i < ARRAY_SIZE(good); i++) {
		assert_int_equal(wrmsr(good[i].msr, good[i].value), SYSTEM_DONE);
		assert_int_equal(rdmsr(good[i].msr), good[i].value);
	}
	assert_int_equal(v->segments[ENGINE_FS].base, 0x7f0000001000);
	assert_int_equal(v->gs_base, 0xffff888000000000);
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
		assert_fault(wrmsr(bad[i].msr, bad[i].value), VECTOR_GP, 0);
	assert_true(v->unknown_msrs > 0);
	assert_int_equal(rdmsr(0xfe), 0x508);

	/* TSC and its adjustment move together */
	v = fake_long(0);
	fake.tsc = 5000;
	assert_int_equal(wrmsr(0x10, 1000), SYSTEM_DONE);
	assert_int_equal(rdmsr(0x10), 1000);
	assert_int_equal(rdmsr(0x3b), (uint64_t)-4000);
	assert_int_equal(wrmsr(0x3b, 0), SYSTEM_DONE);
	assert_int_equal(rdmsr(0x10), 5000);

	/* what Linux reads on AMD without asking CPUID */
	fake_use_model("x86-64-v2");
	static const uint32_t amd[] = {0xc0010015, 0xc0010010, 0xc001001f, 0xc0010055, 0xc0011029, 0xc0011023, 0x179,
		0x8b, 0x400, 0x1d9, 0xc0010000, 0xc0010004, 0xc001001a, 0xc001001d};
	for (size_t i = 0; i < ARRAY_SIZE(amd); i++)
		rdmsr(amd[i]);
	assert_true(rdmsr(0xc0010015) >> 24 & 1);
	assert_true(rdmsr(0xc0011029) >> 1 & 1);
	assert_fault(wrmsr(0x1a0, 1), VECTOR_GP, 0);
}

/* Nanoseconds as a guest computes them from the page at 0x6000. */
static uint64_t kvm_clock(void)
{
	uint64_t ticks = bt_tsc(fake.v) - peek(0x6008, 8);

	assert_int_equal(peek(0x6000, 4) & 1, 0);
	return peek(0x6010, 8) + (uint64_t)((unsigned __int128)(ticks << peek(0x601c, 1)) * peek(0x6018, 4) >> 32);
}

static void test_kvm_clock(void **state)
{
	struct bt_vcpu *v = fake_long(0);
	uint64_t before;

	fake.tsc = 2596120000ull * 100; /* fake.c's TSC: 100 s */
	assert_int_equal(wrmsr(0x4b564d01, 0x6001), SYSTEM_DONE);
	assert_int_equal(rdmsr(0x4b564d01), 0x6001);
	before = kvm_clock();
	assert_in_range(before, 100000000000 - 100, 100000000000);
	/* the rate as Linux takes it */
	assert_int_equal((1000000ull << 32) / peek(0x6018, 4) >> peek(0x601c, 1), 2596120);
	assert_int_equal(wrmsr(0x10, 5), SYSTEM_DONE); /* setting the TSC does not move the clock */
	assert_int_equal(kvm_clock(), before);
	assert_int_equal(wrmsr(0x4b564d00, 0x7000), SYSTEM_DONE);
	assert_in_range(peek(0x7004, 4) + 100, time(NULL) - 2, time(NULL) + 2);
	assert_fault(wrmsr(0x4b564d01, FAKE_MEMORY | 1), VECTOR_GP, 0);
	assert_int_equal(wrmsr(0x4b564d01, 0), SYSTEM_DONE);
	system_reset(v, false);
	assert_int_equal(v->pv_system_time, 0);
}

static int64_t hypercall(uint64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
	uint64_t *g = fake.v->gprs;

	g[ENGINE_RAX] = number;
	g[ENGINE_RBX] = a;
	g[ENGINE_RCX] = b;
	g[ENGINE_RDX] = c;
	g[ENGINE_RSI] = d;
	assert_int_equal(EXECUTE(0x0f, 0x01, number & 1 ? 0xc1 : 0xd9), SYSTEM_DONE); /* vmcall, vmmcall */
	return (int64_t)g[ENGINE_RAX];
}

static void test_hypercalls(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	assert_int_equal(hypercall(99, 0, 0, 0, 0), -1000);
	assert_int_equal(hypercall(11, 0, 0, 0, 0), 0);
	assert_int_equal(hypercall(10, 5, 0, 1, 0xfd), 2);
	assert_int_equal(fake.ipi_cpus, 10);
	assert_int_equal(fake.ipi_icr, 0xfd);
	assert_int_equal(hypercall(10, 1ull << 63, 1, 0, 0xfd), 1);
	assert_int_equal(hypercall(10, ~0ull, ~0ull, 64, 0xfd), 0);
	assert_int_equal(hypercall(10, 1, 0, ~0ull, 0xfd), 0);
	assert_int_equal(hypercall(10, 1, 0, 0, 0x8fd), -22);
	assert_int_equal(hypercall(5, 0, 0, 0, 0), 0);
	assert_int_equal(fake.woken, v->vm->vcpu[0] ? 1 : 0);
	assert_int_equal(hypercall(5, 0, 64, 0, 0), 0);
	assert_int_equal(hypercall(5, 0, ~0ull, 0, 0), 0);
	fake_use_model("host,-kvm-send-ipi,-kvm-unhalt,-kvm-sched-yield,-kvm-eoi,-kvm-steal-time,-kvm-clock");
	for (unsigned n = 5; n < 12; n++)
		assert_int_equal(hypercall(n, 0, 0, 0, 0), -1000);
	for (uint32_t msr = 0x4b564d00; msr < 0x4b564d08; msr++)
		assert_fault(wrmsr(msr, 0), VECTOR_GP, 0);
	fake_use_model("host");
	v = fake_long(3);
	assert_int_equal(hypercall(11, 0, 0, 0, 0), -1);
}

static void test_kvm_eoi(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	assert_fault(wrmsr(0x4b564d04, 0x6003), VECTOR_GP, 0);
	assert_fault(wrmsr(0x4b564d04, FAKE_MEMORY | 1), VECTOR_GP, 0);
	paravirt_eoi_offer(v); /* not enabled */
	assert_false(v->pv_eoi_offered);
	assert_int_equal(wrmsr(0x4b564d04, 0x6005), SYSTEM_DONE);
	paravirt_eoi_offer(v);
	assert_int_equal(peek(0x6004, 4), 1);
	paravirt_eoi_settle(v); /* the guest did nothing: it has to write to the APIC */
	assert_int_equal(peek(0x6004, 4), 0);
	assert_false(fake.eoi_ended);
	paravirt_eoi_offer(v);
	poke(0x6004, 0, 4);
	paravirt_eoi_settle(v);
	assert_true(fake.eoi_ended);
	fake.eoi_refused = true;
	paravirt_eoi_offer(v);
	assert_int_equal(peek(0x6004, 4), 0);
	system_reset(v, true);
	assert_int_equal(v->pv_eoi, 0);
}

static void test_steal_time(void **state)
{
	struct bt_vcpu *v = fake_long(0);
	struct timespec pause = {.tv_nsec = 20000000};

	assert_fault(wrmsr(0x4b564d03, 0x6003), VECTOR_GP, 0);
	assert_fault(wrmsr(0x4b564d03, (FAKE_MEMORY - 32) | 1), VECTOR_GP, 0);
	assert_int_equal(wrmsr(0x4b564d03, 0x6041), SYSTEM_DONE);
	paravirt_enter(v);
	nanosleep(&pause, NULL); /* the thread sleeps in the middle: as if the host had taken the processor away */
	paravirt_tick(v);
	assert_in_range(peek(0x6040, 8), 15000000, 10000000000);
	assert_int_equal(peek(0x6048, 4) & 1, 0);
	v->halted = true;
	paravirt_leave(v);
	assert_int_equal(peek(0x6050, 1), 1);
	poke(0x6050, 3, 1); /* another vCPU wants the TLB flushed */
	fake.flushes = 0;
	nanosleep(&pause, NULL); /* sleep in HLT is nobody's fault */
	uint64_t stolen = peek(0x6040, 8);
	paravirt_enter(v);
	assert_int_equal(peek(0x6050, 1), 0);
	assert_int_equal(fake.flushes, 1);
	v->halted = false;
	paravirt_leave(v);
	assert_int_equal(peek(0x6050, 1), 0);
	assert_in_range(peek(0x6040, 8), stolen, stolen + 15000000);
}

static void test_bases(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	v->gs_base = v->segments[ENGINE_GS].base = 0x1000;
	v->kernel_gs_base = 0x2000;
	assert_int_equal(EXECUTE(0x0f, 0x01, 0xf8), SYSTEM_DONE); /* swapgs */
	assert_int_equal(v->gs_base, 0x2000);
	assert_int_equal(v->segments[ENGINE_GS].base, 0x2000);
	assert_int_equal(v->kernel_gs_base, 0x1000);
	v = fake_long(3);
	v->gprs[ENGINE_RAX] = 0x7f1234567890;
	assert_int_equal(EXECUTE(0xf3, 0x48, 0x0f, 0xae, 0xd0), SYSTEM_DONE); /* wrfsbase rax */
	assert_int_equal(v->fs_base, 0x7f1234567890);
	assert_int_equal(EXECUTE(0xf3, 0x0f, 0xae, 0xc3), SYSTEM_DONE); /* rdfsbase ebx */
	assert_int_equal(v->gprs[ENGINE_RBX], 0x34567890);
	v->gprs[ENGINE_RAX] = 1ull << 50;
	assert_fault(EXECUTE(0xf3, 0x48, 0x0f, 0xae, 0xd8), VECTOR_GP, 0); /* wrgsbase */
	v->cr4 &= ~(uint64_t)CR4_FSGSBASE;
	assert_fault(EXECUTE(0xf3, 0x48, 0x0f, 0xae, 0xd0), VECTOR_UD, -1);
}

static void test_ports(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	fake.port_value = 0x5a;
	v->gprs[ENGINE_RAX] = 0xffffffffffffff00;
	assert_int_equal(EXECUTE(0xe4, 0x71), SYSTEM_DONE); /* in al, 0x71 */
	assert_int_equal(v->gprs[ENGINE_RAX], 0xffffffffffffff5a);
	assert_int_equal(fake.port, 0x71);
	v->gprs[ENGINE_RDX] = 0x3f8;
	assert_int_equal(EXECUTE(0xef), SYSTEM_DONE); /* out dx, eax */
	assert_int_equal(fake.port_size, 4);
	assert_int_equal(fake.port_value, 0xffffff5a);

	v->gprs[ENGINE_RCX] = 3;
	v->gprs[ENGINE_RDI] = 0x6000;
	fake.port_value = 0x1234;
	fake.ports = 0;
	assert_int_equal(EXECUTE(0xf3, 0x66, 0x6d), SYSTEM_DONE); /* rep insw */
	assert_int_equal(fake.ports, 3);
	assert_int_equal(peek(0x6000, 8), 0x123412341234);
	assert_int_equal(v->gprs[ENGINE_RDI], 0x6006);
	assert_int_equal(v->gprs[ENGINE_RCX], 0);

	v->gprs[ENGINE_RCX] = 2000; /* in parts */
	v->gprs[ENGINE_RSI] = 0x6000;
	v->rip = CODE;
	assert_int_equal(EXECUTE(0xf3, 0x6e), SYSTEM_DONE); /* rep outsb */
	assert_int_equal(v->gprs[ENGINE_RCX], 2000 - 1024);
	assert_int_equal(v->rip, CODE);
	assert_int_equal(EXECUTE(0xf3, 0x6e), SYSTEM_DONE);
	assert_int_equal(v->rip, CODE + 2);

	/* a fault in the middle: what was done stays done, the port is not read for nothing */
	v->gprs[ENGINE_RCX] = 8;
	v->gprs[ENGINE_RDI] = 0x6ffc;
	fake.absent = 0x7000;
	fake.ports = 0;
	assert_fault(EXECUTE(0xf3, 0x6c), VECTOR_PF, 2);
	assert_int_equal(fake.ports, 4);
	assert_int_equal(v->gprs[ENGINE_RCX], 4);

	v = fake_long(3);
	v->gprs[ENGINE_RDX] = 0x3f8;
	poke(TSS + 0x66, 0x68, 2);
	poke(TSS + 0x68 + 0x3f8 / 8, 0x02, 1); /* 0x3f9 is forbidden */
	assert_int_equal(EXECUTE(0xec), SYSTEM_DONE);
	assert_fault(EXECUTE(0x66, 0xed), VECTOR_GP, 0);
	v->segments[ENGINE_TR].limit = 0x68;
	assert_fault(EXECUTE(0xec), VECTOR_GP, 0);
	v->eflags |= FLAG_IOPL;
	assert_int_equal(EXECUTE(0xec), SYSTEM_DONE);
}

static void test_invalidation(void **state)
{
	struct bt_vcpu *v = fake_long(0);

	v->gprs[ENGINE_RAX] = 0x6000;
	assert_int_equal(EXECUTE(0x0f, 0x01, 0x38), SYSTEM_DONE); /* invlpg [rax] */
	assert_int_equal(fake.flushed_pages, 1);
	poke(0x6000, 0, 8);
	poke(0x6008, 0x1000, 8);
	fake.flushes = 0;
	v->gprs[ENGINE_RBX] = 0;
	assert_int_equal(EXECUTE(0x66, 0x0f, 0x38, 0x82, 0x18), SYSTEM_DONE); /* invpcid rbx, [rax] */
	assert_int_equal(fake.flushed_pages, 2);
	v->gprs[ENGINE_RBX] = 2;
	assert_int_equal(EXECUTE(0x66, 0x0f, 0x38, 0x82, 0x18), SYSTEM_DONE);
	assert_int_equal(fake.flushes, 1);
	assert_int_equal(fake.kept_global, 0);
	v->gprs[ENGINE_RBX] = 4;
	assert_fault(EXECUTE(0x66, 0x0f, 0x38, 0x82, 0x18), VECTOR_GP, 0);
	assert_int_equal(EXECUTE(0x0f, 0xae, 0x38), SYSTEM_DONE); /* clflush [rax] */
	v->gprs[ENGINE_RAX] = FAKE_MEMORY;
	assert_fault(EXECUTE(0x0f, 0xae, 0x38), VECTOR_PF, 0);
	/* what is no business of these files */
	assert_int_equal(EXECUTE(0x50), SYSTEM_UNKNOWN);
	assert_int_equal(EXECUTE(0x01, 0xc0), SYSTEM_UNKNOWN);
}

static void test_reset(void **state)
{
	struct bt_vcpu *v = fake_long(3);

	assert_int_equal(wrmsr(0xc0000082, 0x1000), SYSTEM_FAULT);
	v->lstar = 0x1000;
	v->pat = 0x0606060606060606;
	system_reset(v, true);
	assert_int_equal(v->segments[ENGINE_CS].base + v->rip, 0xfffffff0);
	assert_int_equal(v->cr0 & (CR0_PE | CR0_PG), 0);
	assert_int_equal(v->cpl, 0);
	assert_int_equal(v->lstar, 0x1000);
	assert_int_equal(v->pat, 0x0606060606060606);
	assert_int_equal(bt_rflags(v), 2);
	fake.tsc = 777;
	v->tsc_adjust = 23;
	v->tsc_offset = 23 + 100; /* 100: the VM's */
	system_reset(v, false);
	assert_int_equal(v->lstar, 0);
	assert_int_equal(v->pat, 0x0007040600070406);
	assert_int_equal(bt_tsc(v), 877);
	assert_int_equal(v->xcr0, 1);
	assert_int_equal(v->mode & BT_MODE_CODE, BT_MODE_CODE16);
}

const struct CMUnitTest instruction_tests[] = {
	cmocka_unit_test(test_segment_loads),
	cmocka_unit_test(test_segment_loads_refused),
	cmocka_unit_test(test_segment_stack),
	cmocka_unit_test(test_tables),
	cmocka_unit_test(test_queries),
	cmocka_unit_test(test_far_long),
	cmocka_unit_test(test_call_gates),
	cmocka_unit_test(test_to_protected_and_long),
	cmocka_unit_test(test_control),
	cmocka_unit_test(test_flags),
	cmocka_unit_test(test_msr_round_trips),
	cmocka_unit_test(test_kvm_clock),
	cmocka_unit_test(test_hypercalls),
	cmocka_unit_test(test_kvm_eoi),
	cmocka_unit_test(test_steal_time),
	cmocka_unit_test(test_bases),
	cmocka_unit_test(test_ports),
	cmocka_unit_test(test_invalidation),
	cmocka_unit_test(test_reset),
};
const unsigned instruction_count = ARRAY_SIZE(instruction_tests);
