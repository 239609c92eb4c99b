/* CPU models: what CPUID says and what the system registers must then offer. `host` is everything that the host's CPU
 * has and engine `bt` passes through or supplies itself; the named ones are the same on every maker's CPU, for
 * migration.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

/* The CPUID words that hold features. */
enum cpu_word {
	CPU_1_ECX,
	CPU_1_EDX,
	CPU_7_EBX,
	CPU_7_ECX,
	CPU_7_EDX,
	CPU_7_1_EAX,
	CPU_D_1_EAX,
	CPU_81_ECX,
	CPU_81_EDX,
	CPU_88_EBX,
	CPU_821_EAX,
	CPU_KVM_EAX, /* leaf 4000_0001: KVM's para-virtual interfaces */
	CPU_WORDS
};

/* The features that code asks for by name; the whole list is the table in cpu_model.c. */
enum cpu_feature {
	CPU_CX16 = CPU_1_ECX * 32 + 13,
	CPU_X2APIC = CPU_1_ECX * 32 + 21,
	CPU_TSC_DEADLINE = CPU_1_ECX * 32 + 24,
	CPU_XSAVE = CPU_1_ECX * 32 + 26,
	CPU_OSXSAVE = CPU_1_ECX * 32 + 27,
	CPU_HTT = CPU_1_EDX * 32 + 28,
	CPU_APIC = CPU_1_EDX * 32 + 9,
	CPU_FSGSBASE = CPU_7_EBX * 32 + 0,
	CPU_TSC_ADJUST = CPU_7_EBX * 32 + 1,
	CPU_SMEP = CPU_7_EBX * 32 + 7,
	CPU_INVPCID = CPU_7_EBX * 32 + 10,
	CPU_SMAP = CPU_7_EBX * 32 + 20,
	CPU_CLFLUSHOPT = CPU_7_EBX * 32 + 23,
	CPU_CLWB = CPU_7_EBX * 32 + 24,
	CPU_UMIP = CPU_7_ECX * 32 + 2,
	CPU_RDPID = CPU_7_ECX * 32 + 22,
	CPU_ARCH_CAPABILITIES = CPU_7_EDX * 32 + 29,
	CPU_XSAVEC = CPU_D_1_EAX * 32 + 1,
	CPU_XGETBV1 = CPU_D_1_EAX * 32 + 2,
	CPU_XSAVES = CPU_D_1_EAX * 32 + 3,
	CPU_CMP_LEGACY = CPU_81_ECX * 32 + 1,
	CPU_TOPOEXT = CPU_81_ECX * 32 + 22,
	CPU_NX = CPU_81_EDX * 32 + 20,
	CPU_RDTSCP = CPU_81_EDX * 32 + 27,
	CPU_WBNOINVD = CPU_88_EBX * 32 + 9,
	CPU_KVM_CLOCK = CPU_KVM_EAX * 32 + 3,
	CPU_KVM_STEAL_TIME = CPU_KVM_EAX * 32 + 5,
	CPU_KVM_EOI = CPU_KVM_EAX * 32 + 6,
	CPU_KVM_UNHALT = CPU_KVM_EAX * 32 + 7,
	CPU_KVM_TLB_FLUSH = CPU_KVM_EAX * 32 + 9,
	CPU_KVM_SEND_IPI = CPU_KVM_EAX * 32 + 11,
	CPU_KVM_SCHED_YIELD = CPU_KVM_EAX * 32 + 13,
};

enum cpu_vendor {
	CPU_INTEL, /* and all that follow Intel in SYSENTER, SYSRET and so on */
	CPU_AMD,
};

#define CPU_XSTATES 8 /* components 0 to 7: x87 to Hi16_ZMM */
#define CPU_CACHES 4

struct cpu_model {
	const char *name;
	enum cpu_vendor vendor;
	uint32_t vendor_id[3]; /* EBX, EDX, ECX of leaf 0 */
	uint32_t signature;    /* EAX of leaf 1: family, model, stepping */
	char brand[48];
	uint32_t words[CPU_WORDS];
	uint32_t absent[CPU_WORDS]; /* features that were left out on request */
	unsigned physical_bits, linear_bits;
	uint64_t xcr0; /* components offered */
	struct {
		uint32_t size, offset, flags;
	} xstate[CPU_XSTATES];
	uint64_t arch_capabilities;	  /* MSR 0x10a */
	uint32_t cache[CPU_CACHES][3];	  /* EAX, EBX, ECX of leaf 4 or 8000_001D, without sharing */
	uint32_t cache_flags[CPU_CACHES]; /* EDX of the same */
	uint32_t legacy_cache[8];	  /* leaves 8000_0005 and 8000_0006 */
	uint32_t descriptors[4];	  /* leaf 2 */
	uint32_t tlb_1g[2];		  /* EAX, EBX of leaf 8000_0019 */
	uint64_t tsc_hz;
	uint32_t tsc_ratio[2], tsc_khz;	  /* leaf 0x15: denominator and numerator to the 1 GHz APIC clock */
};

/* The model of that name: "host", "x86-64-v2" or "x86-64-v3", without the features that follow: "host,-kvm-eoi,-avx";
 * lives as long as the process. NULL and err: no such model (err lists them) or feature, or this host lacks something
 * that it needs. */
const struct cpu_model *cpu_model_find(const char *name, struct error *err);

/* Where CPUID has a word. */
struct cpu_word_place {
	uint32_t leaf, subleaf;
	uint8_t reg; /* EAX, EBX, ECX, EDX */
};
struct cpu_word_place cpu_word_place(enum cpu_word word);

/* The same model as hardware virtualization runs it, which has the features `supported` and the state components xcr0.
 * `host` becomes what of it there is, and gets what only hardware can do; a named model that misses something is an
 * error that says what. */
int cpu_model_for_hardware(struct cpu_model *made, const struct cpu_model *model, const uint32_t supported[CPU_WORDS],
	uint64_t xcr0, struct error *err);

/* What CPUID answers on vCPU `cpu` of `cpus` (1 to 64) but for what depends on the vCPU's state (bt/cpuid.c adds it):
 * EAX, EBX, ECX, EDX into out. Leaves that do not exist give zeros. */
void cpu_model_cpuid(
	const struct cpu_model *model, unsigned cpu, unsigned cpus, uint32_t leaf, uint32_t subleaf, uint32_t out[4]);

/* Bytes of an XSAVE area for these components; compacted or in the standard format. */
uint32_t cpu_model_xsave_size(const struct cpu_model *model, uint64_t components, bool compacted);

static inline bool cpu_model_has(const struct cpu_model *model, enum cpu_feature feature)
{
	return model->words[feature / 32] >> feature % 32 & 1;
}
