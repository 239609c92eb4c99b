/* The x87 and vector state in memory: FXSAVE, FXRSTOR and the XSAVE family. */
#include "engine/bt/slow.h"

/* Where an area of these components ends (SDM volume 1, 13.4.2 and 13.4.3). */
static unsigned area_end(const struct bt_vcpu *v, uint64_t components, bool compacted)
{
	unsigned end = 576;

	for (unsigned k = 2; k < CPU_XSTATES; k++) {
		if (!(components >> k & 1))
			continue;
		if (!compacted)
			end = max(end, v->model->xstate[k].offset + v->model->xstate[k].size);
		else
			end = (v->model->xstate[k].flags & 2 ? (unsigned)align_up(end, 64) : end) + v->model->xstate[k].size;
	}
	return end;
}

/* What XRSTOR refuses in a header, before it looks at the rest (SDM volume 1, 13.8.1 and 13.8.2). */
static bool is_good_header(const uint64_t *header, uint64_t xcr0)
{
	uint64_t compacted = header[1] & ~(1ull << 63);

	if (!(header[1] >> 63))
		return !(header[0] & ~xcr0) && !header[1] && !header[2];
	for (unsigned k = 2; k < 8; k++)
		if (header[k])
			return false;
	return !(compacted & ~xcr0) && !(header[0] & ~compacted);
}

/* FXSAVE and the XSAVE family, over a copy: what the host's instruction makes of the host's registers, which are the
 * guest's. XSAVES and XRSTORS are XSAVEC and XRSTOR: no supervisor component is offered. XSAVEs go to
 * a place from which nothing is ever restored, or XSAVEOPT would leave out what it believes unchanged there. */
int xsave_execute(struct bt_vcpu *v, struct slow_entry *e)
{
	const struct bt_decoded *d = &e->i.d;
	ZydisMnemonic m = d->insn.mnemonic;
	bool fx = false, restore = false, privileged = false, compact = false, wide = false, optimize = false;
	uint64_t mask = (v->gprs[2] << 32 | (uint32_t)v->gprs[0]) & v->xcr0, linear, *header;
	uint8_t *area = v->private->wide_bounce;
	uint32_t lo = (uint32_t)mask;
	unsigned size;

	switch (m) {
	case ZYDIS_MNEMONIC_FXSAVE64: wide = true; /* fall through */
	case ZYDIS_MNEMONIC_FXSAVE: fx = true; break;
	case ZYDIS_MNEMONIC_FXRSTOR64:
	case ZYDIS_MNEMONIC_FXRSTOR: fx = restore = true; break;
	case ZYDIS_MNEMONIC_XSAVEC64: wide = true; /* fall through */
	case ZYDIS_MNEMONIC_XSAVEC: compact = true; break;
	case ZYDIS_MNEMONIC_XSAVES64: wide = true; /* fall through */
	case ZYDIS_MNEMONIC_XSAVES: compact = privileged = true; break;
	case ZYDIS_MNEMONIC_XRSTORS64:
	case ZYDIS_MNEMONIC_XRSTORS: restore = privileged = true; break;
	case ZYDIS_MNEMONIC_XRSTOR64:
	case ZYDIS_MNEMONIC_XRSTOR: restore = true; break;
	case ZYDIS_MNEMONIC_XSAVEOPT64: wide = true; /* fall through */
	case ZYDIS_MNEMONIC_XSAVEOPT: optimize = true; break;
	case ZYDIS_MNEMONIC_XSAVE64: wide = true; break;
	default: break;
	}
	if (!fx && !(v->cr4 & CR4_OSXSAVE))
		return bt_raise(v, VECTOR_UD);
	if (v->cr0 & CR0_TS || (fx && v->cr0 & CR0_EM))
		return bt_raise(v, VECTOR_NM);
	if (privileged && v->cpl)
		return bt_raise_error(v, VECTOR_GP, 0);
	linear = address_offset(v, d, e->i.memory) + address_base(v, address_segment(e->i.memory->mem.segment));
	if (!fx && linear & 63)
		return bt_raise_error(v, VECTOR_GP, 0);
	if (bt_effective_address(v, d, e->i.memory, 1, restore ? BT_READ : BT_WRITE, &linear))
		return BT_FAULT;
	if (fx && linear & 15)
		return bt_raise_error(v, VECTOR_GP, 0);
	if (!restore)
		area += sizeof(v->private->wide_bounce) / 2;
	size = fx ? 512 : area_end(v, mask, compact);
	header = (uint64_t *)(void *)(area + 512);
	if (restore && !fx) {
		if (bt_read_linear(v, linear, area, 576, is_user(v)))
			return BT_FAULT;
		if ((privileged && !(header[1] >> 63)) || !is_good_header(header, v->xcr0))
			return bt_raise_error(v, VECTOR_GP, 0);
		size = header[1] >> 63 ? area_end(v, header[1] & v->model->xcr0, true) : area_end(v, mask, false);
	}
	/* Counted by bytes done: the image may wrap around the end of the address space. */
	for (unsigned done = 0; !restore && done < size; done += BT_PAGE_SIZE - (unsigned)((linear + done) & 0xfff)) {
		uint64_t gpa;

		if (bt_translate_address(v, linear + done, BT_WRITE, is_user(v), &gpa))
			return BT_FAULT; /* writable throughout before anything is written */
	}
	if (bt_read_linear(v, linear, area, size, is_user(v)))
		return BT_FAULT;
	if (restore) {
		/* It may fault on what the guest put there: through a stub, whose faults are the guest's. */
		uint64_t rax = v->gprs[0], rdx = v->gprs[2];
		struct bt_decoded plain;
		uint8_t bytes[15];
		struct bt_block *stub;
		int fault;

		bytes_copy(bytes, e->i.bytes, sizeof(bytes));
		if (!e->stub || e->flushes != v->vm->flushes)
			bytes_copy(&plain, d, sizeof(plain));
		if (privileged) { /* 0f c7 /3 as 0f ae /5 */
			unsigned at = d->insn.raw.modrm.offset;

			bytes[at - 1] = 0xae;
			bytes[at] = (uint8_t)((bytes[at] & 0xc7) | 5 << 3);
			plain.insn.raw.modrm.reg = 5;
		}
		stub = slow_stub(v, e, &plain, bytes);
		if (!stub)
			return bt_raise(v, VECTOR_UD);
		if (!fx) {
			v->gprs[0] = lo;
			v->gprs[2] = 0;
		}
		fault = slow_run_stub(v, stub, area);
		v->gprs[0] = rax;
		v->gprs[2] = rdx;
		return fault;
	}
	fpu_unpark(v);
	if (fx) {
		if (wide)
			__asm__ volatile("fxsave64 (%0)" ::"r"(area) : "memory");
		else
			__asm__ volatile("fxsave (%0)" ::"r"(area) : "memory");
	} else if (compact) {
		if (wide)
			__asm__ volatile("xsavec64 (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
		else
			__asm__ volatile("xsavec (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
	} else if (optimize) {
		if (wide)
			__asm__ volatile("xsaveopt64 (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
		else
			__asm__ volatile("xsaveopt (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
	} else if (wide) {
		__asm__ volatile("xsave64 (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
	} else {
		__asm__ volatile("xsave (%0)" ::"r"(area), "a"(lo), "d"(0) : "memory");
	}
	if (fx || mask & 1)
		bytes_zero(area + 8, 16); /* where the last x87 instruction was: an address of ours */
	return bt_write_linear(v, linear, area, fx ? 464 : size, is_user(v));
}
