/* CPUID as a vCPU sees it: the model's answer (cpu_model.h) and what depends on the vCPU's own state; and which bits of
 * CR4 and XCR0 the model allows, which follows from the same features.
 */
#include "engine/bt/system_internal.h"

#include "engine/bt/bt.h"

void cpuid_execute(struct bt_vcpu *v)
{
	uint32_t leaf = (uint32_t)v->gprs[ENGINE_RAX], subleaf = (uint32_t)v->gprs[ENGINE_RCX], out[4];
	uint64_t apic_base;

	cpu_model_cpuid(v->model, v->index, v->vm->cpus, leaf, subleaf, out);
	if (leaf == 1) {
		if (v->cr4 & CR4_OSXSAVE)
			out[2] |= 1u << CPU_OSXSAVE % 32;
		/* an APIC that was switched off is not reported (SDM volume 3, 11.4.3) */
		fpu_park(v);
		if (v->board->msr_read(v->board->opaque, v->index, 0x1b, &apic_base) && !(apic_base & 1 << 11))
			out[3] &= ~(1u << CPU_APIC % 32);
	} else if (leaf == 0xd && cpu_model_has(v->model, CPU_XSAVE)) {
		if (subleaf == 0)
			out[1] = cpu_model_xsave_size(v->model, v->xcr0, false);
		else if (subleaf == 1 && cpu_model_has(v->model, CPU_XSAVEC))
			out[1] = cpu_model_xsave_size(v->model, v->xcr0, true);
	}
	v->gprs[ENGINE_RAX] = out[0];
	v->gprs[ENGINE_RBX] = out[1];
	v->gprs[ENGINE_RCX] = out[2];
	v->gprs[ENGINE_RDX] = out[3];
}

uint64_t cpuid_cr4_mask(const struct bt_vcpu *v)
{
	uint64_t mask =
		CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR | CR4_OSXMMEXCPT;

	if (cpu_model_has(v->model, CPU_UMIP))
		mask |= CR4_UMIP;
	if (cpu_model_has(v->model, CPU_FSGSBASE))
		mask |= CR4_FSGSBASE;
	if (cpu_model_has(v->model, CPU_XSAVE))
		mask |= CR4_OSXSAVE;
	if (cpu_model_has(v->model, CPU_SMEP))
		mask |= CR4_SMEP;
	if (cpu_model_has(v->model, CPU_SMAP))
		mask |= CR4_SMAP;
	return mask;
}

/* SDM volume 1, 13.3: x87 always, AVX needs SSE, the three parts of AVX-512 come together and need AVX. */
bool cpuid_xcr0_valid(const struct bt_vcpu *v, uint64_t value)
{
	const uint64_t avx512 = 0xe0;

	if (!(value & 1) || value & ~v->model->xcr0)
		return false;
	if (value & 4 && !(value & 2))
		return false;
	return !(value & avx512) || ((value & avx512) == avx512 && value & 4);
}
