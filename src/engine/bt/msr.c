/* Model-specific registers (SDM volume 4; AMD APM volume 2, appendix A). Those that the board owns (APIC and TSC
 * deadline) go there; those that kernels probe without asking CPUID first answer as they do on a CPU that has nothing
 * behind them; all others raise #GP and are counted.
 */
#include "engine/bt/system_internal.h"

#include "engine/bt/bt.h"

#define MSR_X2APIC_FIRST 0x800
#define MSR_X2APIC_LAST 0x8ff

enum {
	MSR_TSC = 0x10,
	MSR_PLATFORM_ID = 0x17,
	MSR_APIC_BASE = 0x1b,
	MSR_EBL_CR_POWERON = 0x2a,
	MSR_FEATURE_CONTROL = 0x3a,
	MSR_TSC_ADJUST = 0x3b,
	MSR_UCODE_WRITE = 0x79,
	MSR_UCODE_REVISION = 0x8b,
	MSR_PERFCTR0 = 0xc1,
	MSR_PERFCTR1 = 0xc2,
	MSR_PLATFORM_INFO = 0xce,
	MSR_MTRR_CAP = 0xfe,
	MSR_ARCH_CAPABILITIES = 0x10a,
	MSR_MISC_FEATURES = 0x140,
	MSR_SYSENTER_CS = 0x174,
	MSR_SYSENTER_ESP = 0x175,
	MSR_SYSENTER_EIP = 0x176,
	MSR_MCG_CAP = 0x179,
	MSR_MCG_STATUS = 0x17a,
	MSR_EVNTSEL0 = 0x186,
	MSR_EVNTSEL1 = 0x187,
	MSR_PERF_STATUS = 0x198,
	MSR_MISC_ENABLE = 0x1a0,
	MSR_DEBUGCTL = 0x1d9,
	MSR_MTRR_BASE0 = 0x200,
	MSR_MTRR_64K = 0x250,
	MSR_MTRR_16K = 0x258,
	MSR_MTRR_4K = 0x268,
	MSR_PAT = 0x277,
	MSR_MTRR_DEF_TYPE = 0x2ff,
	MSR_MC0 = 0x400,
	MSR_TSC_DEADLINE = 0x6e0,
	MSR_XSS = 0xda0,
};
enum msr_extended {
	MSR_EFER = 0xc0000080u,
	MSR_STAR,
	MSR_LSTAR,
	MSR_CSTAR,
	MSR_SFMASK,
	MSR_FS_BASE = 0xc0000100u,
	MSR_GS_BASE,
	MSR_KERNEL_GS_BASE,
	MSR_TSC_AUX,
	MSR_AMD_EVNTSEL0 = 0xc0010000u,
	MSR_AMD_PERFCTR3 = 0xc0010007u,
	MSR_AMD_SYSCFG = 0xc0010010u,
	MSR_AMD_HWCR = 0xc0010015u,
	MSR_AMD_TOP_MEM = 0xc001001au,
	MSR_AMD_TOP_MEM2 = 0xc001001du,
	MSR_AMD_NB_CFG = 0xc001001fu,
	MSR_AMD_INT_PENDING = 0xc0010055u,
	MSR_AMD_VM_CR = 0xc0010114u,
	MSR_AMD_OSVW_LENGTH = 0xc0010140u,
	MSR_AMD_OSVW_STATUS = 0xc0010141u,
	MSR_AMD_DC_CFG = 0xc0011022u,
	MSR_AMD_BU_CFG = 0xc0011023u,
	MSR_AMD_DE_CFG = 0xc0011029u,
	MSR_AMD_BU_CFG2 = 0xc001102au,
};

#define MCE_BANKS 4
#define MTRR_VARIABLE 8
#define MTRR_CAP (MTRR_VARIABLE | 1 << 8 | 1 << 10) /* fixed ranges, write combining */
#define MISC_ENABLE_RESET 0x1801ull		    /* fast strings; no branch trace, no PEBS */
#define HWCR_TSC_FREQ_SEL (1ull << 24)		    /* "the TSC counts at P0's rate": Linux warns without it */
#define DE_CFG_LFENCE_SERIALIZE (1ull << 1)

static int msr_refuse(struct bt_vcpu *v)
{
	return bt_raise_error(v, VECTOR_GP, 0);
}

static int msr_unknown(struct bt_vcpu *v)
{
	v->unknown_msrs++;
	return msr_refuse(v);
}

static bool is_board_msr(uint32_t msr)
{
	return msr - MSR_X2APIC_FIRST <= MSR_X2APIC_LAST - MSR_X2APIC_FIRST || msr == MSR_TSC_DEADLINE ||
	       msr == MSR_APIC_BASE;
}

/* Index into mtrr_fixed, or -1. */
static int mtrr_fixed_index(uint32_t msr)
{
	if (msr == MSR_MTRR_64K)
		return 0;
	if (msr == MSR_MTRR_16K || msr == MSR_MTRR_16K + 1)
		return 1 + (int)(msr - MSR_MTRR_16K);
	if (msr >= MSR_MTRR_4K && msr < MSR_MTRR_4K + 8)
		return 3 + (int)(msr - MSR_MTRR_4K);
	return -1;
}

static uint64_t physical_mask(const struct bt_vcpu *v)
{
	return (1ull << v->model->physical_bits) - 1;
}

/* Memory types in each byte: PAT also knows 7 (UC-), MTRRs do not (SDM volume 3, table 12-2). */
static bool are_memory_types(uint64_t value, bool pat)
{
	for (unsigned i = 0; i < 64; i += 8) {
		unsigned type = value >> i & 0xff;

		if (type > (pat ? 7 : 6) || type == 2 || type == 3)
			return false;
	}
	return true;
}

/* The ones that are the same on every maker's CPU and of no speed. True: known. */
static bool read_common(struct bt_vcpu *v, uint32_t msr, uint64_t *value)
{
	int fixed = mtrr_fixed_index(msr);

	*value = 0;
	if (fixed >= 0) {
		*value = v->mtrr_fixed[fixed];
		return true;
	}
	if (msr - MSR_MTRR_BASE0 < 2 * MTRR_VARIABLE) {
		unsigned i = (msr - MSR_MTRR_BASE0) / 2;

		*value = msr & 1 ? v->mtrr_mask[i] : v->mtrr_base[i];
		return true;
	}
	if (msr - MSR_MC0 < 4 * MCE_BANKS)
		return true; /* no bank ever has an error */
	switch (msr) {
	case MSR_MTRR_CAP:
		*value = MTRR_CAP;
		return true;
	case MSR_MTRR_DEF_TYPE:
		*value = v->mtrr_def_type;
		return true;
	case MSR_PAT:
		*value = v->pat;
		return true;
	case MSR_SYSENTER_CS:
		*value = v->sysenter_cs;
		return true;
	case MSR_SYSENTER_ESP:
		*value = v->sysenter_esp;
		return true;
	case MSR_SYSENTER_EIP:
		*value = v->sysenter_eip;
		return true;
	case MSR_MCG_CAP:
		*value = MCE_BANKS;
		return true;
	case MSR_UCODE_REVISION: /* what KVM says: recent enough for every check that kernels make */
		*value = is_amd(v) ? 0x01000065 : 1ull << 32;
		return true;
	case MSR_XSS:
		return cpu_model_has(v->model, CPU_XSAVES);
	case MSR_MCG_STATUS:
	case MSR_DEBUGCTL:
	case MSR_PERFCTR0:
	case MSR_PERFCTR1:
	case MSR_EVNTSEL0:
	case MSR_EVNTSEL1:
		return true;
	}
	return false;
}

static bool read_intel(struct bt_vcpu *v, uint32_t msr, uint64_t *value)
{
	*value = 0;
	switch (msr) {
	case MSR_ARCH_CAPABILITIES:
		*value = v->model->arch_capabilities;
		return cpu_model_has(v->model, CPU_ARCH_CAPABILITIES);
	case MSR_FEATURE_CONTROL:
		*value = 1; /* locked, with nothing enabled */
		return true;
	case MSR_MISC_ENABLE:
		*value = v->misc_enable;
		return true;
	case MSR_PLATFORM_ID:
	case MSR_EBL_CR_POWERON:
	case MSR_PLATFORM_INFO:
	case MSR_MISC_FEATURES:
	case MSR_PERF_STATUS:
		return true;
	}
	return false;
}

/* LS_CFG, TSEG_ADDR and the like must not answer: Linux takes an answer for the feature behind them. */
static bool read_amd(struct bt_vcpu *v, uint32_t msr, uint64_t *value)
{
	*value = 0;
	if (msr >= MSR_AMD_EVNTSEL0 && msr <= MSR_AMD_PERFCTR3)
		return true;
	switch (msr) {
	case MSR_AMD_HWCR:
		*value = HWCR_TSC_FREQ_SEL;
		return true;
	case MSR_AMD_DE_CFG:
		*value = DE_CFG_LFENCE_SERIALIZE;
		return true;
	case MSR_AMD_SYSCFG:
	case MSR_AMD_TOP_MEM:
	case MSR_AMD_TOP_MEM2:
	case MSR_AMD_NB_CFG:
	case MSR_AMD_INT_PENDING:
	case MSR_AMD_VM_CR:
	case MSR_AMD_OSVW_LENGTH:
	case MSR_AMD_OSVW_STATUS:
	case MSR_AMD_DC_CFG:
	case MSR_AMD_BU_CFG:
	case MSR_AMD_BU_CFG2:
		return true;
	}
	return false;
}

int msr_read(struct bt_vcpu *v, uint32_t msr, uint64_t *value)
{
	if (is_board_msr(msr)) {
		fpu_park(v);
		paravirt_eoi_settle(v);
		return v->board->msr_read(v->board->opaque, v->index, msr, value) ? 0 : msr_refuse(v);
	}
	switch (msr) {
	case MSR_FS_BASE:
		*value = v->fs_base;
		return 0;
	case MSR_GS_BASE:
		*value = v->gs_base;
		return 0;
	case MSR_KERNEL_GS_BASE:
		*value = v->kernel_gs_base;
		return 0;
	case MSR_TSC:
		*value = bt_tsc(v);
		return 0;
	case MSR_TSC_ADJUST:
		*value = v->tsc_adjust;
		return 0;
	case MSR_TSC_AUX:
		*value = v->tsc_aux;
		return 0;
	case MSR_EFER:
		*value = v->efer;
		return 0;
	case MSR_STAR:
		*value = v->star;
		return 0;
	case MSR_LSTAR:
		*value = v->lstar;
		return 0;
	case MSR_CSTAR:
		*value = v->cstar;
		return 0;
	case MSR_SFMASK:
		*value = v->sfmask;
		return 0;
	}
	if (read_common(v, msr, value) || paravirt_read(v, msr, value) ||
		(is_amd(v) ? read_amd(v, msr, value) : read_intel(v, msr, value)))
		return 0;
	return msr_unknown(v);
}

static int write_address(struct bt_vcpu *v, uint64_t *field, uint64_t value)
{
	if (!is_canonical(value))
		return msr_refuse(v);
	*field = value;
	return 0;
}

static int write_efer(struct bt_vcpu *v, uint64_t value)
{
	const uint64_t writable = EFER_SCE | EFER_LME | EFER_NXE;
	uint64_t old = v->efer;

	if (value & ~(writable | EFER_LMA) || ((value ^ old) & EFER_LME && v->cr0 & CR0_PG))
		return msr_refuse(v);
	v->efer = (value & writable) | (old & EFER_LMA);
	if ((value ^ old) & EFER_NXE)
		bt_tlb_flush(v, false);
	bt_mode_update(v);
	return 0;
}

/* Returns 1 when the register is none of these. */
static int write_mtrr(struct bt_vcpu *v, uint32_t msr, uint64_t value)
{
	int fixed = mtrr_fixed_index(msr);

	if (fixed >= 0) {
		if (!are_memory_types(value, false))
			return msr_refuse(v);
		v->mtrr_fixed[fixed] = value;
		return 0;
	}
	if (msr - MSR_MTRR_BASE0 < 2 * MTRR_VARIABLE) {
		unsigned i = (msr - MSR_MTRR_BASE0) / 2;

		if (value & ~physical_mask(v) ||
			(msr & 1 ? value & 0x7ff : value & 0xf00 || !are_memory_types(value & 0xff, false)))
			return msr_refuse(v);
		if (msr & 1)
			v->mtrr_mask[i] = value;
		else
			v->mtrr_base[i] = value;
		return 0;
	}
	if (msr == MSR_MTRR_DEF_TYPE) {
		if (value & ~0xcffull || !are_memory_types(value & 0xff, false))
			return msr_refuse(v);
		v->mtrr_def_type = value;
		return 0;
	}
	if (msr == MSR_PAT) {
		if (!are_memory_types(value, true))
			return msr_refuse(v);
		v->pat = value;
		return 0;
	}
	return 1;
}

/* True: known, and the value is one that it takes. */
static bool write_common(struct bt_vcpu *v, uint32_t msr, uint64_t value)
{
	if (msr - MSR_MC0 < 4 * MCE_BANKS) /* control: any; status, address, misc: may only be cleared */
		return msr % 4 == 0 || value == 0;
	switch (msr) {
	case MSR_SYSENTER_CS:
		v->sysenter_cs = (uint32_t)value;
		return true;
	case MSR_XSS: /* no supervisor component is offered */
		return value == 0 && cpu_model_has(v->model, CPU_XSAVES);
	case MSR_DEBUGCTL: /* LBR and BTF are accepted and do nothing, as under KVM */
		return !(value & ~3ull);
	case MSR_UCODE_REVISION:
	case MSR_UCODE_WRITE:
	case MSR_MCG_STATUS:
	case MSR_PERFCTR0:
	case MSR_PERFCTR1:
	case MSR_EVNTSEL0:
	case MSR_EVNTSEL1:
		return true;
	}
	return false;
}

static bool write_intel(struct bt_vcpu *v, uint32_t msr, uint64_t value)
{
	switch (msr) {
	case MSR_MISC_ENABLE:
		v->misc_enable = value;
		return true;
	case MSR_MISC_FEATURES:
		return value == 0;
	case MSR_EBL_CR_POWERON:
		return true;
	}
	return false;
}

static bool write_amd(uint32_t msr, uint64_t value)
{
	if (msr >= MSR_AMD_EVNTSEL0 && msr <= MSR_AMD_PERFCTR3)
		return true;
	switch (msr) {
	case MSR_AMD_HWCR:
	case MSR_AMD_SYSCFG:
	case MSR_AMD_NB_CFG:
	case MSR_AMD_INT_PENDING:
	case MSR_AMD_DC_CFG:
	case MSR_AMD_BU_CFG:
	case MSR_AMD_BU_CFG2:
	case MSR_AMD_DE_CFG:
		return true; /* work-arounds for errata that are not here */
	}
	return false;
}

int msr_write(struct bt_vcpu *v, uint32_t msr, uint64_t value)
{
	int result;

	if (is_board_msr(msr)) {
		fpu_park(v);
		paravirt_eoi_settle(v);
		return v->board->msr_write(v->board->opaque, v->index, msr, value) ? 0 : msr_refuse(v);
	}
	switch (msr) {
	case MSR_FS_BASE:
		if (write_address(v, &v->fs_base, value) < 0)
			return BT_FAULT;
		v->segments[ENGINE_FS].base = value;
		return 0;
	case MSR_GS_BASE:
		if (write_address(v, &v->gs_base, value) < 0)
			return BT_FAULT;
		v->segments[ENGINE_GS].base = value;
		return 0;
	case MSR_KERNEL_GS_BASE:
		return write_address(v, &v->kernel_gs_base, value);
	case MSR_TSC: /* SDM volume 3, 18.17.3: the adjustment moves with the counter */
		value -= bt_tsc(v);
		v->tsc_offset += value;
		v->tsc_adjust += value;
		paravirt_tsc_moved(v);
		return 0;
	case MSR_TSC_ADJUST:
		v->tsc_offset += value - v->tsc_adjust;
		v->tsc_adjust = value;
		paravirt_tsc_moved(v);
		return 0;
	case MSR_TSC_AUX:
		if (value >> 32)
			return msr_refuse(v);
		v->tsc_aux = value;
		return 0;
	case MSR_EFER:
		return write_efer(v, value);
	case MSR_STAR:
		v->star = value;
		return 0;
	case MSR_LSTAR:
		return write_address(v, &v->lstar, value);
	case MSR_CSTAR:
		return write_address(v, &v->cstar, value);
	case MSR_SFMASK:
		v->sfmask = (uint32_t)value;
		return 0;
	case MSR_SYSENTER_ESP:
		return write_address(v, &v->sysenter_esp, value);
	case MSR_SYSENTER_EIP:
		return write_address(v, &v->sysenter_eip, value);
	}
	result = write_mtrr(v, msr, value);
	if (result <= 0 || paravirt_write(v, msr, value, &result))
		return result;
	if (write_common(v, msr, value) || (is_amd(v) ? write_amd(msr, value) : write_intel(v, msr, value)))
		return 0;
	return msr_unknown(v);
}

/* Power-on values. The MTRRs are as firmware leaves them, since a kernel may be started without any: all memory is
 * write-back but for the VGA window and the devices from 3 to 4 GiB. A kernel that finds them disabled turns PAT off.
 */
void msr_reset(struct bt_vcpu *v)
{
	const uint64_t write_back = 0x0606060606060606ull;

	v->star = v->lstar = v->cstar = v->sfmask = v->kernel_gs_base = 0;
	v->sysenter_cs = v->sysenter_esp = v->sysenter_eip = 0;
	v->pat = 0x0007040600070406ull;
	v->tsc_aux = v->spec_ctrl = 0;
	v->misc_enable = MISC_ENABLE_RESET;
	/* The offset that all vCPUs of a VM have in common comes back: a TSC that each set to 0 at its own reset would
	 * differ between them. */
	v->tsc_offset -= v->tsc_adjust;
	v->tsc_adjust = 0;
	for (unsigned i = 0; i < ARRAY_SIZE(v->mtrr_fixed); i++)
		v->mtrr_fixed[i] = i == 2 ? 0 : write_back;
	for (unsigned i = 0; i < MTRR_VARIABLE; i++)
		v->mtrr_base[i] = v->mtrr_mask[i] = 0;
	v->mtrr_base[0] = MEMORY_HOLE;
	v->mtrr_mask[0] = (physical_mask(v) & ~(MEMORY_HIGH - MEMORY_HOLE - 1)) | 1 << 11;
	v->mtrr_def_type = 0xc06;
}
