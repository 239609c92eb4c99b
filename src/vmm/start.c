/* The state in which vCPUs start: the first at the kernel's entry, as boot protocols ask; the others as a SIPI does. */
#include "vmm/vm.h"

#define CR0_PE (1ull << 0)
#define CR0_ET (1ull << 4)
#define CR0_PG (1ull << 31)
#define CR4_PAE (1ull << 5)
#define EFER_LME (1ull << 8)
#define EFER_LMA (1ull << 10)
#define RFLAGS_RESERVED 2 /* bit 1 is always set */

/* Types of segments (SDM volume 3, sections 3.4.5.1 and 3.5) */
#define TYPE_CODE 0xb /* execute, read, accessed */
#define TYPE_DATA 0x3 /* read, write, accessed */
#define TYPE_BUSY_TSS 0xb

#define SELECTOR_CODE 0x10
#define SELECTOR_DATA 0x18

static struct engine_segment flat(uint16_t selector, uint16_t attributes)
{
	return (struct engine_segment){.base = 0,
		.limit = 0xffffffff,
		.selector = selector,
		.attributes = (uint16_t)(attributes | SEGMENT_P | SEGMENT_S | SEGMENT_G)};
}

static void set_flat_segments(struct engine_state *s, bool long_mode)
{
	static const int data[] = {ENGINE_ES, ENGINE_SS, ENGINE_DS, ENGINE_FS, ENGINE_GS};

	s->segments[ENGINE_CS] = flat(SELECTOR_CODE, TYPE_CODE | (long_mode ? SEGMENT_L : SEGMENT_DB));
	for (unsigned i = 0; i < sizeof(data) / sizeof(data[0]); i++)
		s->segments[data[i]] = flat(SELECTOR_DATA, TYPE_DATA | SEGMENT_DB);
	s->segments[ENGINE_TR] = (struct engine_segment){.limit = 0x67, .attributes = TYPE_BUSY_TSS | SEGMENT_P};
	s->idt = (struct engine_table){0};
}

/* Linux's 64-bit boot protocol (Documentation/x86/boot.rst, "64-bit boot protocol"): paging on with the range of
 * kernel, boot_params and command line mapped to itself, flat segments 0x10 and 0x18, interrupts off, rsi =
 * boot_params. PVH (Xen's docs/misc/pvh.pandoc) and Multiboot (section 3.2): 32-bit protected mode without paging, flat segments, ebx =
 * hvm_start_info. */
int vcpu_set_boot_state(struct vcpu *v, const struct boot_entry *entry, struct error *err)
{
	const struct engine *engine = v->vm->engine;
	const unsigned mask = ENGINE_STATE_GPRS | ENGINE_STATE_SEGMENTS | ENGINE_STATE_CONTROL;
	struct engine_state s = {0};

	engine->vcpu_get(v->engine, mask, &s);
	for (unsigned i = 0; i < 16; i++)
		s.gprs[i] = 0;
	s.rip = entry->rip;
	s.rflags = RFLAGS_RESERVED;
	set_flat_segments(&s, entry->long_mode);
	s.gdt = (struct engine_table){.base = entry->gdt, .limit = entry->gdt_limit};
	if (entry->long_mode) {
		s.cr0 = CR0_PE | CR0_ET | CR0_PG;
		s.cr3 = entry->cr3;
		s.cr4 = CR4_PAE;
		s.efer = EFER_LME | EFER_LMA;
		s.gprs[ENGINE_RSI] = entry->rsi;
	} else {
		s.cr0 = CR0_PE | CR0_ET;
		s.cr4 = 0;
		s.efer = 0;
		s.gprs[ENGINE_RAX] = entry->rax;
		s.gprs[ENGINE_RBX] = entry->rbx;
	}
	return engine->vcpu_set(v->engine, mask, &s, err);
}

/* SDM volume 3, section 9.4.4.2: after INIT, real mode at the page of that number. */
int vcpu_set_startup_state(struct vcpu *v, uint8_t vector, struct error *err)
{
	const struct engine *engine = v->vm->engine;
	const unsigned mask = ENGINE_STATE_GPRS | ENGINE_STATE_SEGMENTS;
	struct engine_state s = {0};

	engine->vcpu_get(v->engine, mask, &s);
	s.rip = 0;
	s.segments[ENGINE_CS] = (struct engine_segment){.selector = (uint16_t)(vector << 8),
		.base = (uint64_t)vector << 12,
		.limit = 0xffff,
		.attributes = TYPE_CODE | SEGMENT_P | SEGMENT_S};
	return engine->vcpu_set(v->engine, mask, &s, err);
}
