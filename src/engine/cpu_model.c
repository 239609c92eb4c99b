/* CPU models (cpu_model.h): one table says of every CPUID feature bit who supplies it and which model offers it.
 * Sources: SDM volume 2, CPUID; AMD APM volume 3, appendix E; x86-64 psABI, "micro-architecture levels"; for the
 * hypervisor leaves Linux, Documentation/virt/kvm/x86/cpuid.rst.
 *
 * cpu_model_cpuid runs while the guest's vector registers are live (bt/system.h): general registers only, no C library.
 */
#include "engine/cpu_model.h"

#include <cpuid.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "engine/tsc.h"

/* see above; said here as well, whatever this file is compiled with */
#pragma GCC target("general-regs-only")

/* Which named models have a feature. */
enum level { HOST_ONLY, V2 = 2, V3 = 3 };

/* Who supplies a feature to engine bt. Engine kvm offers every feature of this table that KVM_GET_SUPPORTED_CPUID has. */
enum source {
	NATIVE,	    /* the instruction runs as it is in translated code: offered when the host has it */
	OURS,	    /* system_execute and the rest of bt supply it, whatever the host has */
	TRANSLATED, /* as OURS, and true of translated code alone: kvm offers it for `host` only, if KVM has it */
	HARDWARE,   /* kvm alone: what a user process cannot do */
};

enum vendor_mask { ANY = 3, INTEL = 1 << CPU_INTEL, AMD = 1 << CPU_AMD };

#define HYPERVISOR_BASE 0x40000000u
#define HYPERVISOR_MAX 0x40000010u

#define XCR0_SSE 0x3 /* and x87 */
#define XCR0_AVX 0x7
#define XCR0_AVX512 0xe7

static const struct cpu_word_place words[CPU_WORDS] = {
	[CPU_1_ECX] = {1, 0, 2},
	[CPU_1_EDX] = {1, 0, 3},
	[CPU_7_EBX] = {7, 0, 1},
	[CPU_7_ECX] = {7, 0, 2},
	[CPU_7_EDX] = {7, 0, 3},
	[CPU_7_1_EAX] = {7, 1, 0},
	[CPU_D_1_EAX] = {0xd, 1, 0},
	[CPU_81_ECX] = {0x80000001, 0, 2},
	[CPU_81_EDX] = {0x80000001, 0, 3},
	[CPU_88_EBX] = {0x80000008, 0, 1},
	[CPU_821_EAX] = {0x80000021, 0, 0},
	[CPU_KVM_EAX] = {HYPERVISOR_BASE + 1, 0, 0},
};

static const struct feature {
	const char *name;
	uint8_t word, bit;
	uint8_t level; /* enum level: in this named model and those above */
	uint8_t source, vendors;
	uint8_t xcr0; /* needs these state components */
} features[] = {
	{"sse3", CPU_1_ECX, 0, V2, NATIVE, ANY},
	{"pclmulqdq", CPU_1_ECX, 1, HOST_ONLY, NATIVE, ANY},
	{"ssse3", CPU_1_ECX, 9, V2, NATIVE, ANY},
	{"fma", CPU_1_ECX, 12, V3, NATIVE, ANY, XCR0_AVX},
	{"cx16", CPU_1_ECX, 13, V2, NATIVE, ANY},
	{"sse4.1", CPU_1_ECX, 19, V2, NATIVE, ANY},
	{"sse4.2", CPU_1_ECX, 20, V2, NATIVE, ANY},
	{"x2apic", CPU_1_ECX, 21, V2, OURS, ANY},
	{"movbe", CPU_1_ECX, 22, V3, NATIVE, ANY},
	{"popcnt", CPU_1_ECX, 23, V2, NATIVE, ANY},
	{"tsc-deadline", CPU_1_ECX, 24, V2, OURS, ANY},
	{"aes", CPU_1_ECX, 25, HOST_ONLY, NATIVE, ANY},
	{"xsave", CPU_1_ECX, 26, V3, NATIVE, ANY, XCR0_SSE},
	{"avx", CPU_1_ECX, 28, V3, NATIVE, ANY, XCR0_AVX},
	{"f16c", CPU_1_ECX, 29, V3, NATIVE, ANY, XCR0_AVX},
	{"rdrand", CPU_1_ECX, 30, HOST_ONLY, NATIVE, ANY},
	{"hypervisor", CPU_1_ECX, 31, V2, OURS, ANY},

	{"fpu", CPU_1_EDX, 0, V2, NATIVE, ANY},
	{"de", CPU_1_EDX, 2, V2, OURS, ANY},
	{"pse", CPU_1_EDX, 3, V2, OURS, ANY},
	{"tsc", CPU_1_EDX, 4, V2, OURS, ANY},
	{"msr", CPU_1_EDX, 5, V2, OURS, ANY},
	{"pae", CPU_1_EDX, 6, V2, OURS, ANY},
	{"mce", CPU_1_EDX, 7, V2, OURS, ANY},
	{"cx8", CPU_1_EDX, 8, V2, NATIVE, ANY},
	{"apic", CPU_1_EDX, 9, V2, OURS, ANY},
	{"sep", CPU_1_EDX, 11, V2, OURS, ANY},
	{"mtrr", CPU_1_EDX, 12, V2, OURS, ANY},
	{"pge", CPU_1_EDX, 13, V2, OURS, ANY},
	{"mca", CPU_1_EDX, 14, V2, OURS, ANY},
	{"cmov", CPU_1_EDX, 15, V2, NATIVE, ANY},
	{"pat", CPU_1_EDX, 16, V2, OURS, ANY},
	{"pse36", CPU_1_EDX, 17, V2, OURS, ANY},
	{"clflush", CPU_1_EDX, 19, V2, OURS, ANY},
	{"mmx", CPU_1_EDX, 23, V2, NATIVE, ANY},
	{"fxsr", CPU_1_EDX, 24, V2, NATIVE, ANY},
	{"sse", CPU_1_EDX, 25, V2, NATIVE, ANY},
	{"sse2", CPU_1_EDX, 26, V2, NATIVE, ANY},

	{"fsgsbase", CPU_7_EBX, 0, V2, OURS, ANY},
	{"tsc-adjust", CPU_7_EBX, 1, V2, OURS, ANY},
	{"bmi1", CPU_7_EBX, 3, V3, NATIVE, ANY},
	{"avx2", CPU_7_EBX, 5, V3, NATIVE, ANY, XCR0_AVX},
	{"smep", CPU_7_EBX, 7, V2, OURS, ANY},
	{"bmi2", CPU_7_EBX, 8, V3, NATIVE, ANY},
	{"erms", CPU_7_EBX, 9, HOST_ONLY, NATIVE, ANY},
	{"invpcid", CPU_7_EBX, 10, V2, OURS, ANY},
	{"avx512f", CPU_7_EBX, 16, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"avx512dq", CPU_7_EBX, 17, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"rdseed", CPU_7_EBX, 18, HOST_ONLY, NATIVE, ANY},
	{"adx", CPU_7_EBX, 19, HOST_ONLY, NATIVE, ANY},
	{"smap", CPU_7_EBX, 20, V2, OURS, ANY},
	{"avx512ifma", CPU_7_EBX, 21, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"clflushopt", CPU_7_EBX, 23, HOST_ONLY, NATIVE, ANY},
	{"clwb", CPU_7_EBX, 24, HOST_ONLY, NATIVE, ANY},
	{"avx512cd", CPU_7_EBX, 28, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"sha", CPU_7_EBX, 29, HOST_ONLY, NATIVE, ANY},
	{"avx512bw", CPU_7_EBX, 30, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"avx512vl", CPU_7_EBX, 31, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},

	{"avx512vbmi", CPU_7_ECX, 1, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"umip", CPU_7_ECX, 2, V2, OURS, ANY},
	{"avx512vbmi2", CPU_7_ECX, 6, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"gfni", CPU_7_ECX, 8, HOST_ONLY, NATIVE, ANY},
	{"vaes", CPU_7_ECX, 9, HOST_ONLY, NATIVE, ANY, XCR0_AVX},
	{"vpclmulqdq", CPU_7_ECX, 10, HOST_ONLY, NATIVE, ANY, XCR0_AVX},
	{"avx512vnni", CPU_7_ECX, 11, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"avx512bitalg", CPU_7_ECX, 12, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"avx512vpopcntdq", CPU_7_ECX, 14, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"rdpid", CPU_7_ECX, 22, HOST_ONLY, OURS, ANY},

	{"fsrm", CPU_7_EDX, 4, HOST_ONLY, NATIVE, ANY},
	{"avx512vp2intersect", CPU_7_EDX, 8, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"avx512fp16", CPU_7_EDX, 23, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	/* MD_CLEAR (bit 10) is not offered: VERW is emulated here and clears no buffer. IBRS, STIBP, SSBD (26, 27, 31)
	 * are not either: a write to SPEC_CTRL could not reach the host's register from a user process. */
	{"arch-capabilities", CPU_7_EDX, 29, HOST_ONLY, OURS, INTEL},

	{"avx-vnni", CPU_7_1_EAX, 4, HOST_ONLY, NATIVE, ANY, XCR0_AVX},
	{"avx512bf16", CPU_7_1_EAX, 5, HOST_ONLY, NATIVE, ANY, XCR0_AVX512},
	{"fzrm", CPU_7_1_EAX, 10, HOST_ONLY, NATIVE, ANY},
	{"fsrs", CPU_7_1_EAX, 11, HOST_ONLY, NATIVE, ANY},
	{"fsrc", CPU_7_1_EAX, 12, HOST_ONLY, NATIVE, ANY},

	{"xsaveopt", CPU_D_1_EAX, 0, V3, NATIVE, ANY, XCR0_SSE},
	{"xsavec", CPU_D_1_EAX, 1, HOST_ONLY, NATIVE, ANY, XCR0_SSE},
	{"xgetbv1", CPU_D_1_EAX, 2, HOST_ONLY, NATIVE, ANY, XCR0_SSE},
	{"xsaves", CPU_D_1_EAX, 3, HOST_ONLY, NATIVE, ANY, XCR0_SSE}, /* done with XSAVEC: no supervisor component */

	{"lahf-lm", CPU_81_ECX, 0, V2, NATIVE, ANY},
	{"lzcnt", CPU_81_ECX, 5, V3, NATIVE, ANY},
	{"sse4a", CPU_81_ECX, 6, HOST_ONLY, NATIVE, AMD},
	{"misalignsse", CPU_81_ECX, 7, HOST_ONLY, NATIVE, AMD},
	{"3dnowprefetch", CPU_81_ECX, 8, HOST_ONLY, NATIVE, ANY},
	{"topoext", CPU_81_ECX, 22, HOST_ONLY, NATIVE, AMD},

	{"syscall", CPU_81_EDX, 11, V2, OURS, ANY},
	{"nx", CPU_81_EDX, 20, V2, OURS, ANY},
	{"mmxext", CPU_81_EDX, 22, HOST_ONLY, NATIVE, AMD},
	{"pdpe1gb", CPU_81_EDX, 26, V2, OURS, ANY},
	{"rdtscp", CPU_81_EDX, 27, V2, OURS, ANY},
	{"lm", CPU_81_EDX, 29, V2, OURS, ANY},

	{"xsaveerptr", CPU_88_EBX, 2, HOST_ONLY, NATIVE, AMD},
	{"wbnoinvd", CPU_88_EBX, 9, HOST_ONLY, OURS, ANY},
	/* Facts about the host's own speculation that hold in translated code too; IBPB, STIBP and the like are not
	 * offered, as there is no way to them from a user process. */
	{"ssb-no", CPU_88_EBX, 26, HOST_ONLY, NATIVE, AMD},
	{"btc-no", CPU_88_EBX, 29, HOST_ONLY, NATIVE, AMD},

	/* LFENCE waits for all before it on every host this runs on: Intel's always does, and Linux sets AMD's to. */
	{"lfence-serializing", CPU_821_EAX, 2, V2, OURS, AMD},
	{"null-selector-clears-base", CPU_821_EAX, 6, V2, OURS, AMD}, /* segment.c does so */
	/* A guest's RET becomes a look-up and an indirect jump: no return is predicted from the host's return stack, so
	 * training that stack (SRSO) leads nowhere, and "safe RET" would only cost. */
	{"srso-no", CPU_821_EAX, 29, V2, TRANSLATED, AMD},

	/* bt/paravirt.c */
	{"kvm-nop-io-delay", CPU_KVM_EAX, 1, V2, OURS, ANY},
	{"kvm-clock", CPU_KVM_EAX, 3, V2, OURS, ANY},
	{"kvm-steal-time", CPU_KVM_EAX, 5, V2, OURS, ANY},
	{"kvm-eoi", CPU_KVM_EAX, 6, V2, OURS, ANY},
	{"kvm-unhalt", CPU_KVM_EAX, 7, V2, OURS, ANY},
	{"kvm-tlb-flush", CPU_KVM_EAX, 9, V2, OURS, ANY},
	{"kvm-send-ipi", CPU_KVM_EAX, 11, V2, OURS, ANY},
	{"kvm-sched-yield", CPU_KVM_EAX, 13, V2, OURS, ANY},
	{"kvm-clock-stable", CPU_KVM_EAX, 24, V2, OURS, ANY},

	/* Address spaces in the TLB, and the means against leaks by speculation, which need the real registers. */
	{"pcid", CPU_1_ECX, 17, HOST_ONLY, HARDWARE, ANY},
	{"md-clear", CPU_7_EDX, 10, HOST_ONLY, HARDWARE, INTEL},
	{"spec-ctrl", CPU_7_EDX, 26, HOST_ONLY, HARDWARE, INTEL},
	{"stibp", CPU_7_EDX, 27, HOST_ONLY, HARDWARE, INTEL},
	{"flush-l1d", CPU_7_EDX, 28, HOST_ONLY, HARDWARE, INTEL},
	{"ssbd", CPU_7_EDX, 31, HOST_ONLY, HARDWARE, INTEL},
	{"ibpb", CPU_88_EBX, 12, HOST_ONLY, HARDWARE, AMD},
	{"amd-ibrs", CPU_88_EBX, 14, HOST_ONLY, HARDWARE, AMD},
	{"amd-stibp", CPU_88_EBX, 15, HOST_ONLY, HARDWARE, AMD},
	{"stibp-always", CPU_88_EBX, 17, HOST_ONLY, HARDWARE, AMD},
	{"amd-ssbd", CPU_88_EBX, 24, HOST_ONLY, HARDWARE, AMD},
	{"virt-ssbd", CPU_88_EBX, 25, HOST_ONLY, HARDWARE, AMD},
	{"auto-ibrs", CPU_821_EAX, 8, HOST_ONLY, HARDWARE, AMD},
	{"sbpb", CPU_821_EAX, 27, HOST_ONLY, HARDWARE, AMD},
	{"ibpb-brtype", CPU_821_EAX, 28, HOST_ONLY, HARDWARE, AMD},
};

/* Bits of leaf 1 EDX that AMD repeats in leaf 8000_0001 EDX. */
#define AMD_REPEATED 0x0183f3ffu

/* IA32_ARCH_CAPABILITIES for models of Intel's vendor. Always true in translated code: guest page tables are never the
 * host's, so what needs a hardware page walk through them cannot happen (Meltdown: RDCL_NO, L1TF is included in it;
 * page size change: PSCHANGE_MC_NO), there is no VMENTRY in the guest (SKIP_L1DFL_VMENTRY), and no real device register
 * is mapped (SBDR_SSDP_NO, FBSDP_NO, PSDP_NO). A guest that believes it saves page-table isolation, which is costly
 * here and protects nothing. Not claimed: IBRS_ALL, BHI_NO: branch predictors are shared between a guest's kernel and
 * programs. */
#define ARCH_CAPABILITIES_ALWAYS (1ull << 0 | 1ull << 3 | 1ull << 6 | 1ull << 13 | 1ull << 14 | 1ull << 15)
/* True when the host says so: these leak between whatever shares a core. */
static const struct {
	const char *file;
	unsigned bit;
} vulnerabilities[] = {
	{"spec_store_bypass", 4},	   /* SSB_NO */
	{"mds", 5},			   /* MDS_NO */
	{"tsx_async_abort", 8},		   /* TAA_NO */
	{"gather_data_sampling", 26},	   /* GDS_NO */
	{"reg_file_data_sampling", 27},	   /* RFDS_NO */
	{"indirect_target_selection", 62}, /* ITS_NO */
};

/* The hypervisor leaves, under KVM's signature. Linux uses x2APIC without an interrupt remapper only under a hypervisor
 * that it knows, and x2APIC costs one WRMSR where xAPIC costs a trapped store. From KVM's clock (bt/paravirt.c) it
 * takes the TSC's rate instead of measuring it, on AMD CPUs too; since the TSC is constant, non-stop and has
 * TSC_ADJUST, it then is the clock source, without a watchdog. */
#define APIC_BUS_KHZ 1000000u

/* A model without some of its features. */
struct custom_model {
	struct custom_model *next;
	struct cpu_model model;
};

struct cpu_models {
	struct cpu_model host, v2, v3;
	struct custom_model *custom;
	char v2_lacks[200], v3_lacks[200]; /* names of features; "" when the model can be had */
};

static struct cpu_models models; /* constant once built, but for custom: facts about the host, not about a VM */
static pthread_once_t models_once = PTHREAD_ONCE_INIT;

static void host_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
	uint32_t limit = __get_cpuid_max(leaf & 0x80000000u, NULL);

	if (limit < leaf) {
		out[0] = out[1] = out[2] = out[3] = 0;
		return;
	}
	__cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
}

static uint64_t host_xcr0(void)
{
	uint32_t out[4], low, high;

	host_cpuid(1, 0, out);
	if (!(out[2] >> 27 & 1))
		return 0;
	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	return ((uint64_t)high << 32 | low) & XCR0_AVX512;
}

static uint32_t host_word(unsigned word)
{
	uint32_t out[4];

	host_cpuid(words[word].leaf, words[word].subleaf, out);
	return out[words[word].reg];
}

/* The TSC as a fraction of the APIC clock with a numerator that keeps Linux's 32-bit product crystal_khz * numerator
 * exact: the last convergent of the continued fraction below 4294. It is within 1 ppm. */
static void tsc_ratio(struct cpu_model *m, uint64_t hz)
{
	uint64_t a = hz, b = APIC_BUS_KHZ * 1000ull, n0 = 1, n1 = a / b, d0 = 0, d1 = 1;

	for (uint64_t r = a % b; r; r = a % b) {
		uint64_t q, n, d;

		a = b;
		b = r;
		q = a / b;
		n = q * n1 + n0;
		d = q * d1 + d0;
		if (n > UINT32_MAX / APIC_BUS_KHZ)
			break;
		n0 = n1;
		d0 = d1;
		n1 = n;
		d1 = d;
	}
	if (!n1) { /* slower than the APIC clock by a lot: never on a CPU of today */
		n1 = 1;
		d1 = max(1ull, APIC_BUS_KHZ * 1000ull / max(hz, 1ull));
	}
	m->tsc_ratio[0] = (uint32_t)d1;
	m->tsc_ratio[1] = (uint32_t)n1;
	m->tsc_khz = (uint32_t)(hz / 1000);
	m->tsc_hz = hz;
}

/* XCR0 and the standard format's offsets; those of the architecture are the same on every CPU that has a component. */
static void take_xstate(struct cpu_model *m, uint64_t wanted)
{
	m->xcr0 = host_xcr0() & wanted;
	if ((m->xcr0 & XCR0_AVX) != XCR0_AVX)
		m->xcr0 &= XCR0_SSE;
	if ((m->xcr0 & XCR0_AVX512) != XCR0_AVX512)
		m->xcr0 &= XCR0_AVX;
	for (unsigned i = 2; i < CPU_XSTATES; i++) {
		uint32_t out[4];

		if (!(m->xcr0 >> i & 1))
			continue;
		host_cpuid(0xd, i, out);
		m->xstate[i].size = out[0];
		m->xstate[i].offset = out[1];
		m->xstate[i].flags = out[2] & 2; /* aligned to 64 bytes when compacted; never a supervisor component */
	}
}

/* The features of a level (HOST_ONLY: all) that the host or bt supplies; what a named model misses goes into lacks. */
static void take_features(struct cpu_model *m, unsigned level, char *lacks, size_t size)
{
	for (size_t i = 0; i < ARRAY_SIZE(features); i++) {
		const struct feature *f = &features[i];
		bool there = f->source != NATIVE || host_word(f->word) >> f->bit & 1;

		if (f->source == HARDWARE)
			continue;
		if (!(f->vendors >> m->vendor & 1) || (level && (!f->level || f->level > level)))
			continue;
		if (f->xcr0 && (m->xcr0 & f->xcr0) != f->xcr0)
			there = false;
		if (there)
			m->words[f->word] |= 1u << f->bit;
		else if (level)
			snprintf(lacks + strlen(lacks), size - strlen(lacks), "%s%s", *lacks ? ", " : "", f->name);
	}
	if (m->vendor == CPU_AMD)
		m->words[CPU_81_EDX] |= m->words[CPU_1_EDX] & AMD_REPEATED;
	if (!cpu_model_has(m, CPU_XSAVE)) {
		m->words[CPU_D_1_EAX] = 0;
		m->xcr0 = 0;
	}
}

static uint64_t host_not_affected(void)
{
	uint64_t bits = 0;

	for (size_t i = 0; i < ARRAY_SIZE(vulnerabilities); i++) {
		char path[100], text[32] = "";

		snprintf(path, sizeof(path), "/sys/devices/system/cpu/vulnerabilities/%s", vulnerabilities[i].file);
		scope_fd int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd >= 0 && read(fd, text, sizeof(text) - 1) > 0 && !strncmp(text, "Not affected", 12))
			bits |= 1ull << vulnerabilities[i].bit;
	}
	return bits;
}

/* Caches as the host describes them, without who shares them. */
static void take_host_caches(struct cpu_model *m)
{
	uint32_t out[4];

	for (unsigned i = 0; i < CPU_CACHES; i++) {
		host_cpuid(m->vendor == CPU_AMD ? 0x8000001d : 4, i, out);
		if (!(out[0] & 0x1f))
			break;
		m->cache[i][0] = out[0] & 0x3fff;
		m->cache[i][1] = out[1];
		m->cache[i][2] = out[2];
		m->cache_flags[i] = out[3];
	}
	host_cpuid(0x80000005, 0, m->legacy_cache);
	host_cpuid(0x80000006, 0, m->legacy_cache + 4);
	host_cpuid(0x80000019, 0, out);
	m->tlb_1g[0] = out[0];
	m->tlb_1g[1] = out[1];
	host_cpuid(2, 0, m->descriptors);
}

static void build_host(struct cpu_model *m)
{
	uint32_t out[4];

	m->name = "host";
	host_cpuid(0, 0, out);
	m->vendor_id[0] = out[1];
	m->vendor_id[1] = out[3];
	m->vendor_id[2] = out[2];
	/* Hygon's CPUs are AMD's Zen */
	m->vendor = !memcmp(m->vendor_id, "AuthenticAMD", 12) || !memcmp(m->vendor_id, "HygonGenuine", 12) ? CPU_AMD
													   : CPU_INTEL;
	host_cpuid(1, 0, out);
	m->signature = out[0];
	for (unsigned i = 0; i < 3; i++) {
		host_cpuid(0x80000002 + i, 0, out);
		memcpy(m->brand + 16 * i, out, sizeof(out));
	}
	host_cpuid(0x80000008, 0, out);
	m->physical_bits = out[0] & 0xff ? out[0] & 0xff : 36;
	m->linear_bits = 48; /* without LA57 */
	take_xstate(m, XCR0_AVX512);
	take_features(m, HOST_ONLY, NULL, 0);
	take_host_caches(m);
	if (m->vendor == CPU_INTEL)
		m->arch_capabilities = ARCH_CAPABILITIES_ALWAYS | host_not_affected();
}

/* Named models are an AMD CPU of family 0x11: of all identities for which Linux and glibc have few special cases, the
 * one with the fewest mitigations that translated code makes void (no page-table isolation, no buffer clearing, no
 * return thunks), while no false claim about the host is made. SYSCALL therefore exists in compatibility mode. */
static void build_named(struct cpu_model *m, const char *name, unsigned level, char *lacks, size_t size)
{
	m->name = name;
	m->vendor = CPU_AMD;
	memcpy(m->vendor_id, "AuthenticAMD", 12);
	m->signature = 2u << 20 | 0xfu << 8 | 3u << 4 | 1; /* family 0xf + 2, model 3, stepping 1 */
	snprintf(m->brand, sizeof(m->brand), "Hostel virtual CPU %s", name);
	m->physical_bits = 40; /* the board's 64-bit PCI window ends at 1 TiB */
	m->linear_bits = 48;
	take_xstate(m, level >= V3 ? XCR0_AVX : 0);
	take_features(m, level, lacks, size);
	/* 32 KiB of 8 ways each for data and code, 512 KiB of 8 ways, 16 MiB of 16 ways; 64-byte lines */
	const uint32_t caches[8] = {
		0xff40ff40, 0xff40ff40, 0x20080140, 0x20080140, 0x42004200, 0x42004200, 0x02006140, 0x00808140};
	memcpy(m->legacy_cache, caches, sizeof(caches));
}

static void build_models(void)
{
	uint64_t hz = engine_tsc_hz();

	build_host(&models.host);
	build_named(&models.v2, "x86-64-v2", V2, models.v2_lacks, sizeof(models.v2_lacks));
	build_named(&models.v3, "x86-64-v3", V3, models.v3_lacks, sizeof(models.v3_lacks));
	tsc_ratio(&models.host, hz);
	tsc_ratio(&models.v2, hz);
	tsc_ratio(&models.v3, hz);
}

static const struct cpu_model *find_model(const char *name, size_t length, struct error *err)
{
	pthread_once(&models_once, build_models);
	const struct {
		const struct cpu_model *model;
		const char *lacks;
	} all[] = {{&models.host, ""}, {&models.v2, models.v2_lacks}, {&models.v3, models.v3_lacks}};

	for (size_t i = 0; i < ARRAY_SIZE(all); i++) {
		if (strlen(all[i].model->name) != length || memcmp(all[i].model->name, name, length))
			continue;
		if (!*all[i].lacks)
			return all[i].model;
		error_set(err, ENOTSUP, "CPU model %s: this host's CPU lacks %s; choose a lower model or host",
			all[i].model->name, all[i].lacks);
		return NULL;
	}
	error_set(err, EINVAL, "CPU model \"%.*s\" does not exist; choose host, x86-64-v2 or x86-64-v3",
		(int)min(length, (size_t)100), name);
	return NULL;
}

/* Takes one feature away, and those that need the state components that go with it. Translated code runs a NATIVE one
 * all the same: a guest that respects CPUID does not use it. */
static bool take_away(struct cpu_model *m, const char *name, size_t length)
{
	bool found = false;

	for (size_t i = 0; i < ARRAY_SIZE(features); i++) {
		const struct feature *f = &features[i];

		if (strlen(f->name) == length && !memcmp(f->name, name, length)) {
			m->words[f->word] &= ~(1u << f->bit);
			m->absent[f->word] |= 1u << f->bit;
			found = true;
		}
	}
	if (!cpu_model_has(m, CPU_XSAVE)) {
		m->xcr0 = 0;
		for (size_t i = 0; i < ARRAY_SIZE(features); i++) {
			if (features[i].xcr0)
				m->words[features[i].word] &= ~(1u << features[i].bit);
		}
	}
	if (m->vendor == CPU_AMD)
		m->words[CPU_81_EDX] &= m->words[CPU_1_EDX] | ~AMD_REPEATED;
	return found;
}

const struct cpu_model *cpu_model_find(const char *name, struct error *err)
{
	size_t length = strcspn(name, ",");
	const struct cpu_model *model = find_model(name, length, err);
	scope_free struct custom_model *custom = NULL;

	if (!model || !name[length])
		return model;
	custom = malloc(sizeof(*custom));
	if (!custom) {
		error_errno(err, "CPU model %s", name);
		return NULL;
	}
	custom->model = *model;
	for (const char *at = name + length; *at; at += length) {
		at++; /* the comma */
		length = strcspn(at, ",");
		if (*at != '-' || !take_away(&custom->model, at + 1, length - 1)) {
			error_set(err, EINVAL,
				"CPU model %s: \"%.*s\" is not a feature to leave out; write -NAME, such as -avx2 or "
				"-kvm-eoi",
				model->name, (int)min(length, (size_t)100), at);
			return NULL;
		}
	}
	custom->next = models.custom;
	models.custom = custom;
	return &take_ptr(custom)->model;
}

struct cpu_word_place cpu_word_place(enum cpu_word word)
{
	return words[word];
}

static unsigned level_of(const struct cpu_model *model)
{
	/* by name: it may be a model without some features */
	return model->name == models.v2.name ? V2 : model->name == models.v3.name ? V3 : HOST_ONLY;
}

static bool hardware_offers(const struct cpu_model *m, const struct feature *f, unsigned level)
{
	if (!(f->vendors >> m->vendor & 1))
		return false;
	return !level || (f->level && f->level <= level && f->source != TRANSLATED);
}

int cpu_model_for_hardware(struct cpu_model *m, const struct cpu_model *model, const uint32_t supported[CPU_WORDS],
	uint64_t xcr0, struct error *err)
{
	unsigned level = level_of(model);
	char lacks[200] = "";

	*m = *model;
	m->xcr0 &= xcr0;
	memset(m->words, 0, sizeof(m->words));
	for (size_t i = 0; i < ARRAY_SIZE(features); i++) {
		const struct feature *f = &features[i];

		if (!hardware_offers(m, f, level) || m->absent[f->word] >> f->bit & 1)
			continue;
		if ((supported[f->word] >> f->bit & 1) && (m->xcr0 & f->xcr0) == f->xcr0)
			m->words[f->word] |= 1u << f->bit;
		else if (level && f->word != CPU_KVM_EAX) /* kernels do without, and may come to a KVM that has them */
			snprintf(lacks + strlen(lacks), sizeof(lacks) - strlen(lacks), "%s%s", *lacks ? ", " : "",
				f->name);
	}
	if (*lacks)
		return error_set(err, ENOTSUP,
			"CPU model %s: KVM on this host lacks %s; choose --cpu host, or --engine bt", model->name,
			lacks);
	if (m->vendor == CPU_AMD)
		m->words[CPU_81_EDX] |= m->words[CPU_1_EDX] & AMD_REPEATED;
	if (!cpu_model_has(m, CPU_XSAVE)) {
		m->words[CPU_D_1_EAX] = 0;
		m->xcr0 = 0;
	}
	return 0;
}

uint32_t cpu_model_xsave_size(const struct cpu_model *model, uint64_t components, bool compacted)
{
	uint32_t size = 512 + 64;

	for (unsigned i = 2; i < CPU_XSTATES; i++) {
		if (!(components & model->xcr0 & 1u << i))
			continue;
		if (!compacted) {
			size = max(size, model->xstate[i].offset + model->xstate[i].size);
			continue;
		}
		if (model->xstate[i].flags & 2)
			size = (uint32_t)align_up(size, 64);
		size += model->xstate[i].size;
	}
	return size;
}

/* Bits that hold a number below n. */
static unsigned id_bits(unsigned n)
{
	return n > 1 ? 32 - (unsigned)__builtin_clz(n - 1) : 0;
}

static void cpuid_xstate(const struct cpu_model *m, uint32_t subleaf, uint32_t out[4])
{
	if (!cpu_model_has(m, CPU_XSAVE))
		return;
	if (subleaf == 0) {
		out[0] = (uint32_t)m->xcr0;
		out[1] = out[2] = cpu_model_xsave_size(m, m->xcr0, false);
	} else if (subleaf == 1) {
		out[0] = m->words[CPU_D_1_EAX];
		out[1] = cpu_model_has(m, CPU_XSAVEC) ? cpu_model_xsave_size(m, m->xcr0, true) : 0;
	} else if (subleaf < CPU_XSTATES && m->xcr0 >> subleaf & 1) {
		out[0] = m->xstate[subleaf].size;
		out[1] = m->xstate[subleaf].offset;
		out[2] = m->xstate[subleaf].flags;
	}
}

/* One socket, one thread per core: levels 1 and 2 are each vCPU's own, level 3 is everyone's. The field counts IDs;
 * Intel wants a power of two there, which Linux rounds AMD's to as well. */
static void cpuid_cache(const struct cpu_model *m, unsigned cpus, uint32_t subleaf, uint32_t out[4])
{
	uint32_t ids = 1u << id_bits(cpus);

	if (subleaf >= CPU_CACHES || !(m->cache[subleaf][0] & 0x1f))
		return;
	out[0] = m->cache[subleaf][0];
	out[1] = m->cache[subleaf][1];
	out[2] = m->cache[subleaf][2];
	out[3] = m->cache_flags[subleaf];
	if ((out[0] >> 5 & 7) == 3)
		out[0] |= (m->vendor == CPU_AMD ? cpus - 1 : ids - 1) << 14;
	if (m->vendor == CPU_INTEL)
		out[0] |= (ids - 1) << 26; /* cores in the package */
}

static void cpuid_topology(unsigned cpu, unsigned cpus, uint32_t subleaf, uint32_t out[4])
{
	out[2] = subleaf & 0xff;
	out[3] = cpu;
	if (subleaf == 0) {
		out[1] = 1;
		out[2] |= 1 << 8; /* threads: one per core */
	} else if (subleaf == 1) {
		out[0] = id_bits(cpus);
		out[1] = cpus;
		out[2] |= 2 << 8; /* cores */
	}
}

static void cpuid_basic(
	const struct cpu_model *m, unsigned cpu, unsigned cpus, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
	switch (leaf) {
	case 0:
		out[0] = m->vendor == CPU_INTEL ? 0x16 : 0xd;
		out[1] = m->vendor_id[0];
		out[2] = m->vendor_id[2];
		out[3] = m->vendor_id[1];
		break;
	case 1:
		out[0] = m->signature;
		out[1] = cpu << 24 | cpus << 16 | 64 / 8 << 8;
		out[2] = m->words[CPU_1_ECX];
		out[3] = m->words[CPU_1_EDX] | (cpus > 1 ? 1u << CPU_HTT % 32 : 0);
		break;
	case 2:
		for (unsigned i = 0; i < 4; i++)
			out[i] = m->descriptors[i];
		break;
	case 4:
		if (m->vendor == CPU_INTEL)
			cpuid_cache(m, cpus, subleaf, out);
		break;
	case 6:
		out[0] = 1 << 2; /* ARAT: the APIC timer runs in every sleep state */
		break;
	case 7:
		if (subleaf == 0) {
			out[0] = 1;
			out[1] = m->words[CPU_7_EBX];
			out[2] = m->words[CPU_7_ECX];
			out[3] = m->words[CPU_7_EDX];
		} else if (subleaf == 1) {
			out[0] = m->words[CPU_7_1_EAX];
		}
		break;
	case 0xb:
		cpuid_topology(cpu, cpus, subleaf, out);
		break;
	case 0xd:
		cpuid_xstate(m, subleaf, out);
		break;
	case 0x15: /* the crystal is the APIC's clock, as Linux takes it to be */
		if (m->vendor == CPU_INTEL) {
			out[0] = m->tsc_ratio[0];
			out[1] = m->tsc_ratio[1];
			out[2] = APIC_BUS_KHZ * 1000;
		}
		break;
	case 0x16:
		if (m->vendor == CPU_INTEL) {
			out[0] = out[1] = m->tsc_khz / 1000;
			out[2] = 100;
		}
		break;
	}
}

static void cpuid_extended(
	const struct cpu_model *m, unsigned cpu, unsigned cpus, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
	switch (leaf) {
	case 0x80000000:
		out[0] = m->vendor == CPU_AMD ? 0x80000021 : 0x80000008;
		if (m->vendor == CPU_AMD) {
			out[1] = m->vendor_id[0];
			out[2] = m->vendor_id[2];
			out[3] = m->vendor_id[1];
		}
		break;
	case 0x80000001:
		out[0] = m->vendor == CPU_AMD ? m->signature : 0;
		out[2] = m->words[CPU_81_ECX];
		if (m->vendor == CPU_AMD && cpus > 1)
			out[2] |= 1u << CPU_CMP_LEGACY % 32; /* HTT means cores */
		out[3] = m->words[CPU_81_EDX];
		break;
	case 0x80000002:
	case 0x80000003:
	case 0x80000004:
		for (unsigned i = 0; i < 4; i++)
			out[i] = ((const uint32_t *)m->brand)[(leaf - 0x80000002) * 4 + i];
		break;
	case 0x80000005:
	case 0x80000006:
		for (unsigned i = 0; i < 4; i++)
			out[i] = m->legacy_cache[(leaf - 0x80000005) * 4 + i];
		break;
	case 0x80000007:
		out[3] = 1 << 8; /* the TSC's rate is constant in every power state */
		break;
	case 0x80000008:
		out[0] = m->linear_bits << 8 | m->physical_bits;
		out[1] = m->words[CPU_88_EBX];
		if (m->vendor == CPU_AMD)
			out[2] = id_bits(cpus) << 12 | (cpus - 1);
		break;
	case 0x80000019:
		out[0] = m->tlb_1g[0];
		out[1] = m->tlb_1g[1];
		break;
	case 0x8000001d:
		if (cpu_model_has(m, CPU_TOPOEXT))
			cpuid_cache(m, cpus, subleaf, out);
		break;
	case 0x8000001e:
		if (cpu_model_has(m, CPU_TOPOEXT)) {
			out[0] = cpu;
			out[1] = cpu; /* core; one thread in it */
		}
		break;
	case 0x80000021:
		out[0] = m->words[CPU_821_EAX];
		break;
	}
}

void cpu_model_cpuid(
	const struct cpu_model *model, unsigned cpu, unsigned cpus, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
	out[0] = out[1] = out[2] = out[3] = 0;
	if (leaf < HYPERVISOR_BASE) {
		cpuid_basic(model, cpu, cpus, leaf, subleaf, out);
	} else if (leaf >= 0x80000000) {
		if (model->vendor == CPU_AMD || leaf <= 0x80000008)
			cpuid_extended(model, cpu, cpus, leaf, subleaf, out);
	} else if (leaf == HYPERVISOR_BASE) {
		out[0] = HYPERVISOR_MAX;
		out[1] = 0x4b4d564b; /* "KVMKVMKVM" */
		out[2] = 0x564b4d56;
		out[3] = 0x4d;
	} else if (leaf == HYPERVISOR_BASE + 1) {
		out[0] = model->words[CPU_KVM_EAX];
	} else if (leaf == HYPERVISOR_MAX) {
		out[0] = model->tsc_khz;
		out[1] = APIC_BUS_KHZ;
	}
}
