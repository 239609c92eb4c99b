#include "fake.h"

#include <stdlib.h>

#include "engine/bt/bt.h"
#include "engine/tsc.h"

struct fake fake;
static struct bt_vm vm;

uint64_t engine_tsc_hz(void)
{
	return 2596120000;
}

void fpu_park(struct bt_vcpu *v)
{
	fake.parks++;
}

bool memory_write(struct guest_memory *memory, uint64_t gpa, const void *from, uint64_t len)
{
	if (gpa >= FAKE_MEMORY || len > FAKE_MEMORY - gpa)
		return false;
	memcpy(fake.memory + gpa, from, len);
	return true;
}

void *memory_for_write(struct guest_memory *memory, uint64_t gpa, uint64_t len)
{
	return gpa < FAKE_MEMORY && len <= FAKE_MEMORY - gpa ? fake.memory + gpa : NULL;
}

void memory_wrote(struct guest_memory *memory, uint64_t gpa, uint64_t len)
{
}

void fpu_unpark(struct bt_vcpu *v)
{
}

uint64_t bt_tsc(const struct bt_vcpu *v)
{
	return fake.tsc + v->tsc_offset;
}

uint64_t bt_rflags(const struct bt_vcpu *v)
{
	return v->eflags | (v->arith >> 8 & (FLAGS_ARITHMETIC & 0xff)) | (v->arith & 1 ? FLAG_OF : 0) |
	       (v->iflag ? FLAG_IF : 0) | (v->dflag ? FLAG_DF : 0) | (v->acflag ? FLAG_AC : 0) | 2;
}

void bt_set_rflags(struct bt_vcpu *v, uint64_t rflags)
{
	v->arith = (uint16_t)((rflags & (FLAGS_ARITHMETIC & 0xff)) << 8 | (rflags & FLAG_OF ? 1 : 0));
	v->iflag = !!(rflags & FLAG_IF);
	v->dflag = !!(rflags & FLAG_DF);
	v->acflag = !!(rflags & FLAG_AC);
	v->eflags = rflags & (FLAG_TF | FLAG_IOPL | FLAG_NT | FLAG_RF | FLAG_VM | FLAG_VIF | FLAG_VIP | FLAG_ID);
}

void bt_mode_update(struct bt_vcpu *v)
{
	uint16_t cs = v->segments[ENGINE_CS].attributes;

	fake.mode_updates++;
	v->mode = v->efer & EFER_LMA && cs & SEGMENT_L ? BT_MODE_CODE64
		  : cs & SEGMENT_DB		       ? BT_MODE_CODE32
						       : BT_MODE_CODE16;
}

void bt_tlb_flush(struct bt_vcpu *v, bool keep_global)
{
	fake.flushes++;
	fake.kept_global += keep_global;
}

void bt_tlb_flush_page(struct bt_vcpu *v, uint64_t linear)
{
	fake.flushed_pages++;
}

int bt_raise(struct bt_vcpu *v, int vector)
{
	v->fault = (struct bt_fault){.vector = vector};
	return BT_FAULT;
}

int bt_raise_error(struct bt_vcpu *v, int vector, uint32_t error)
{
	v->fault = (struct bt_fault){.vector = vector, .error = error, .has_error = true};
	return BT_FAULT;
}

static int check(struct bt_vcpu *v, uint64_t linear, unsigned size, bool write, bool user)
{
	for (uint64_t a = linear; a < linear + size; a++) {
		if (a < FAKE_MEMORY && (a & ~0xfffull) != fake.absent)
			continue;
		v->cr2 = a;
		return bt_raise_error(v, VECTOR_PF, (write ? 2 : 0) | (user ? 4 : 0));
	}
	return 0;
}

int bt_translate_address(struct bt_vcpu *v, uint64_t linear, enum bt_access access, bool user, uint64_t *gpa)
{
	*gpa = linear;
	return check(v, linear, 1, access == BT_WRITE, user);
}

int bt_read_linear(struct bt_vcpu *v, uint64_t linear, void *to, unsigned size, bool user)
{
	if (check(v, linear, size, false, user) < 0)
		return BT_FAULT;
	memcpy(to, fake.memory + linear, size);
	return 0;
}

int bt_write_linear(struct bt_vcpu *v, uint64_t linear, const void *from, unsigned size, bool user)
{
	if (check(v, linear, size, true, user) < 0)
		return BT_FAULT;
	memcpy(fake.memory + linear, from, size);
	return 0;
}

uint64_t bt_register_read(const struct bt_vcpu *v, ZydisRegister reg)
{
	ZyanU8 id = (ZyanU8)ZydisRegisterGetId(reg);

	if (reg == ZYDIS_REGISTER_NONE)
		return 0;
	switch (ZydisRegisterGetClass(reg)) {
	case ZYDIS_REGCLASS_GPR64:
		return v->gprs[id];
	case ZYDIS_REGCLASS_GPR32:
		return (uint32_t)v->gprs[id];
	case ZYDIS_REGCLASS_GPR16:
		return (uint16_t)v->gprs[id];
	default:
		return (uint8_t)v->gprs[id]; /* low bytes only */
	}
}

void bt_register_write(struct bt_vcpu *v, ZydisRegister reg, uint64_t value)
{
	uint64_t *r = &v->gprs[ZydisRegisterGetId(reg)];

	switch (ZydisRegisterGetClass(reg)) {
	case ZYDIS_REGCLASS_GPR64:
		*r = value;
		break;
	case ZYDIS_REGCLASS_GPR32:
		*r = (uint32_t)value;
		break;
	case ZYDIS_REGCLASS_GPR16:
		*r = (*r & ~0xffffull) | (value & 0xffff);
		break;
	default:
		*r = (*r & ~0xffull) | (value & 0xff);
	}
}

int bt_effective_address(struct bt_vcpu *v, const struct bt_decoded *d, const ZydisDecodedOperand *op, unsigned size,
	enum bt_access access, uint64_t *linear)
{
	uint64_t offset = bt_register_read(v, op->mem.base) + bt_register_read(v, op->mem.index) * op->mem.scale +
			  (uint64_t)op->mem.disp.value;

	if (d->insn.address_width < 64)
		offset &= (1ull << d->insn.address_width) - 1;
	*linear = offset + ((v->mode & BT_MODE_CODE) == BT_MODE_CODE64
					   ? 0
					   : v->segments[op->mem.segment - ZYDIS_REGISTER_ES].base);
	return 0;
}

/* ---- the board ---- */

static uint64_t pio_read(void *opaque, unsigned cpu, uint16_t port, unsigned size)
{
	fake.port = port;
	fake.port_size = size;
	fake.ports++;
	return fake.port_value;
}

static void pio_write(void *opaque, unsigned cpu, uint16_t port, unsigned size, uint64_t value)
{
	fake.port = port;
	fake.port_size = size;
	fake.port_value = value;
	fake.ports++;
}

static bool board_msr(uint32_t msr, uint64_t **value)
{
	*value = msr == 0x1b ? &fake.apic_base : &fake.msr_value;
	return msr != 0x8ff;
}

static bool msr_read_board(void *opaque, unsigned cpu, uint32_t msr, uint64_t *value)
{
	uint64_t *from;

	if (!board_msr(msr, &from))
		return false;
	*value = *from;
	return true;
}

static bool msr_write_board(void *opaque, unsigned cpu, uint32_t msr, uint64_t value)
{
	uint64_t *to;

	if (!board_msr(msr, &to))
		return false;
	*to = value;
	return true;
}

static uint8_t cr8_read(void *opaque, unsigned cpu)
{
	return fake.cr8;
}

static void cr8_write(void *opaque, unsigned cpu, uint8_t value)
{
	fake.cr8 = value;
}

static bool eoi_offer(void *opaque, unsigned cpu)
{
	return !fake.eoi_refused;
}

static void eoi_settle(void *opaque, unsigned cpu, bool ended)
{
	fake.eoi_ended = ended;
}

static unsigned send_ipi(void *opaque, unsigned cpu, uint64_t cpus, uint32_t icr)
{
	fake.ipi_cpus = cpus;
	fake.ipi_icr = icr;
	return (unsigned)__builtin_popcountll(cpus);
}

static void wake(void *opaque, unsigned cpu)
{
	fake.woken++;
}

static const struct engine_board board = {.pio_read = pio_read,
	.pio_write = pio_write,
	.msr_read = msr_read_board,
	.msr_write = msr_write_board,
	.cr8_read = cr8_read,
	.cr8_write = cr8_write,
	.eoi_offer = eoi_offer,
	.eoi_settle = eoi_settle,
	.send_ipi = send_ipi,
	.wake = wake};

/* ---- set-up ---- */

void poke(uint64_t address, uint64_t value, unsigned size)
{
	memcpy(fake.memory + address, &value, size);
}

uint64_t peek(uint64_t address, unsigned size)
{
	uint64_t value = 0;

	memcpy(&value, fake.memory + address, size);
	return value;
}

static uint64_t raw_descriptor(uint64_t base, uint32_t limit, uint16_t attributes)
{
	if (attributes & SEGMENT_G)
		limit >>= 12;
	return (limit & 0xffff) | (base & 0xffffff) << 16 | (uint64_t)(attributes & 0xff) << 40 |
	       (uint64_t)(limit >> 16 & 0xf) << 48 | (uint64_t)(attributes >> 8) << 52 | (base >> 24 & 0xff) << 56;
}

void fake_descriptor(uint16_t selector, uint64_t base, uint32_t limit, uint16_t attributes)
{
	poke(GDT + (selector & 0xfff8), raw_descriptor(base, limit, attributes), 8);
}

void fake_gate64(unsigned vector, uint16_t selector, uint64_t offset, unsigned type, unsigned dpl, unsigned ist)
{
	poke(IDT + vector * 16,
		(offset & 0xffff) | (uint64_t)selector << 16 | (uint64_t)ist << 32 |
			(uint64_t)(0x80 | dpl << 5 | type) << 40 | (offset >> 16 & 0xffff) << 48,
		8);
	poke(IDT + vector * 16 + 8, offset >> 32, 8);
}

void fake_gate32(unsigned vector, uint16_t selector, uint32_t offset, unsigned type, unsigned dpl)
{
	poke(IDT + vector * 8,
		(offset & 0xffff) | (uint64_t)selector << 16 | (uint64_t)(0x80 | dpl << 5 | type) << 40 |
			(uint64_t)(offset >> 16) << 48,
		8);
}

void fake_use_model(const char *name)
{
	struct error err = {0};

	vm.model = fake.v->model = cpu_model_find(name, &err);
	if (!fake.v->model)
		fail_msg("%s", err.text);
}

static struct bt_vcpu *start(void)
{
	struct bt_vcpu *v = fake.v;

	memset(&fake, 0, sizeof(fake));
	memset(v, 0, sizeof(*v));
	fake.v = v;
	fake.absent = UINT64_MAX;
	fake.apic_base = 0xfee00900;
	vm.cpus = 1;
	v->vm = &vm;
	v->board = &board;
	fake_use_model("host");
	system_reset(v, false);
	return v;
}

static void segment_from_gdt(int s, uint16_t selector)
{
	struct engine_segment *to = &fake.v->segments[s];
	uint64_t raw = peek(GDT + (selector & 0xfff8), 8);

	to->selector = selector;
	to->base = (raw >> 16 & 0xffffff) | (raw >> 32 & 0xff000000);
	to->limit = (uint32_t)((raw & 0xffff) | (raw >> 32 & 0xf0000));
	to->attributes = (uint16_t)((raw >> 40 & 0xff) | (raw >> 44 & 0xf00));
	if (to->attributes & SEGMENT_G)
		to->limit = to->limit << 12 | 0xfff;
}

static void tables(void)
{
	struct bt_vcpu *v = fake.v;

	fake_descriptor(KERNEL32, 0, UINT32_MAX, 0xc9b);
	fake_descriptor(KERNEL64, 0, UINT32_MAX, 0xa9b);
	fake_descriptor(KERNEL_DATA, 0, UINT32_MAX, 0xc93);
	fake_descriptor(USER32, 0, UINT32_MAX, 0xcfb);
	fake_descriptor(USER_DATA, 0, UINT32_MAX, 0xcf3);
	fake_descriptor(USER64, 0, UINT32_MAX, 0xafb);
	fake_descriptor(ABSENT_DATA, 0, UINT32_MAX, 0xc13);
	fake_descriptor(CONFORMING64, 0, UINT32_MAX, 0xa9f);
	fake_descriptor(EXECUTE_ONLY, 0, UINT32_MAX, 0xc99);
	fake_descriptor(LOCAL, LDT, 0xf, 0x82);
	fake_descriptor(USER_STACK16, 0, 0xffff, 0x0f3);
	v->gdt = (struct engine_table){GDT, 0x8f};
	v->idt = (struct engine_table){IDT, 0xfff};
}

struct bt_vcpu *fake_long(unsigned cpl)
{
	struct bt_vcpu *v = start();

	tables();
	for (unsigned i = 0; i < 256; i++)
		fake_gate64(i, KERNEL64, HANDLER + 16 * i, 14, 0, 0);
	poke(GDT + (GATE & 0xf8), 0xa000 | KERNEL64 << 16 | 0xecull << 40, 8);
	poke(TSS + 4, STACK0, 8);
	poke(TSS + 0x24, STACK_IST, 8);
	fake_descriptor(TASK, TSS, 0xfff, 0x8b);
	segment_from_gdt(ENGINE_TR, TASK);
	v->cr0 = CR0_PE | CR0_PG | CR0_ET | CR0_NE | CR0_WP;
	v->cr4 = CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_FSGSBASE;
	v->efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
	v->star = (uint64_t)KERNEL64 << 32 | (uint64_t)USER32 << 48;
	v->lstar = 0xb000;
	v->cstar = 0xb800;
	v->sfmask = FLAG_IF | FLAG_DF | FLAG_TF | FLAG_AC;
	segment_from_gdt(ENGINE_CS, cpl ? USER64 : KERNEL64);
	segment_from_gdt(ENGINE_SS, cpl ? USER_DATA : KERNEL_DATA);
	v->cpl = (uint8_t)cpl;
	v->rip = CODE;
	v->gprs[ENGINE_RSP] = cpl ? STACK3 : STACK0;
	bt_set_rflags(v, FLAG_IF | 2);
	bt_mode_update(v);
	return v;
}

struct bt_vcpu *fake_protected(unsigned cpl)
{
	struct bt_vcpu *v = start();

	tables();
	for (unsigned i = 0; i < 256; i++)
		fake_gate32(i, KERNEL32, HANDLER + 16 * i, 14, 0);
	poke(GDT + (GATE & 0xf8), 0xa000 | KERNEL32 << 16 | 0xec02ull << 32, 8); /* two parameters */
	poke(TSS + 4, STACK0, 4);
	poke(TSS + 8, KERNEL_DATA, 2);
	fake_descriptor(TASK, TSS, 0xfff, 0x8b);
	segment_from_gdt(ENGINE_TR, TASK);
	v->cr0 = CR0_PE | CR0_ET;
	segment_from_gdt(ENGINE_CS, cpl ? USER32 : KERNEL32);
	segment_from_gdt(ENGINE_SS, cpl ? USER_DATA : KERNEL_DATA);
	segment_from_gdt(ENGINE_DS, cpl ? USER_DATA : KERNEL_DATA);
	segment_from_gdt(ENGINE_ES, cpl ? USER_DATA : KERNEL_DATA);
	v->cpl = (uint8_t)cpl;
	v->rip = CODE;
	v->gprs[ENGINE_RSP] = cpl ? STACK3 : STACK0;
	bt_set_rflags(v, FLAG_IF | 2);
	bt_mode_update(v);
	return v;
}

struct bt_vcpu *fake_real(void)
{
	struct bt_vcpu *v = start();

	v->idt = (struct engine_table){0, 0x3ff};
	for (unsigned i = 0; i < 256; i++)
		poke(i * 4, 0x0900ull << 16 | 16 * i, 4);
	v->segments[ENGINE_CS].selector = 0x800;
	v->segments[ENGINE_CS].base = 0x8000;
	v->segments[ENGINE_SS].selector = 0x1000;
	v->segments[ENGINE_SS].base = 0x10000;
	v->gprs[ENGINE_RSP] = 0x1000;
	v->rip = 0x100;
	bt_set_rflags(v, FLAG_IF | 2);
	bt_mode_update(v);
	return v;
}

enum system_result execute(const void *bytes, size_t size)
{
	unsigned mode = fake.v->mode & BT_MODE_CODE;
	struct bt_decoded d;
	ZydisDecoder decoder;

	if (mode == BT_MODE_CODE64)
		ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	else if (mode == BT_MODE_CODE32)
		ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32);
	else
		ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16);
	if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, bytes, size, &d.insn, d.operands)))
		fail_msg("the test's instruction does not decode");
	assert_int_equal(d.insn.length, size);
	return system_execute(fake.v, &d);
}

void assert_fault(enum system_result result, int vector, int error)
{
	assert_int_equal(result, SYSTEM_FAULT);
	assert_int_equal(fake.v->fault.vector, vector);
	assert_int_equal(fake.v->fault.has_error, error >= 0);
	if (error >= 0)
		assert_int_equal(fake.v->fault.error, error);
}

int fake_setup(void **state)
{
	fake.v = aligned_alloc(64, align_up(sizeof(*fake.v), 64));
	return fake.v ? 0 : -1;
}

int fake_teardown(void **state)
{
	free(fake.v);
	return 0;
}
