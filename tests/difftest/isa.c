/* Which of Zydis's instruction sets a CPUID offers (SDM volume 2, CPUID; AMD APM volume 3, appendix E). What
 * an engine passes through is decided by CPUID alone, so a processor that executes more than it says is not asked to.
 */
#include <cpuid.h>

#include "difftest.h"
#include "base/util.h"

enum { EAX, EBX, ECX, EDX };

struct isa_bit {
	ZydisISASet set;
	uint32_t leaf, subleaf;
	uint8_t reg, bit;
};

#define SET(name, leaf, subleaf, reg, bit)                                                                             \
	{                                                                                                              \
		ZYDIS_ISA_SET_##name, leaf, subleaf, reg, bit                                                          \
	}
#define SETS3(name, leaf, subleaf, reg, bit)                                                                           \
	SET(name##_128, leaf, subleaf, reg, bit), SET(name##_256, leaf, subleaf, reg, bit),                            \
		SET(name##_512, leaf, subleaf, reg, bit)
#define ALWAYS(name)                                                                                                   \
	{                                                                                                              \
		ZYDIS_ISA_SET_##name, 0, 0, 0, 255                                                                     \
	}

static const struct isa_bit isa_bits[] = {
	ALWAYS(I86),
	ALWAYS(I186),
	ALWAYS(I286PROTECTED),
	ALWAYS(I286REAL),
	ALWAYS(I386),
	ALWAYS(I486),
	ALWAYS(I486REAL),
	ALWAYS(PENTIUMREAL),
	ALWAYS(LONGMODE),
	ALWAYS(FAT_NOP),
	ALWAYS(PPRO),
	ALWAYS(PAUSE),
	ALWAYS(PREFETCH_NOP),
	SET(X87, 1, 0, EDX, 0),
	SET(CMOV, 1, 0, EDX, 15),
	SET(FCMOV, 1, 0, EDX, 15),
	SET(CLFSH, 1, 0, EDX, 19),
	SET(PENTIUMMMX, 1, 0, EDX, 23),
	SET(FXSAVE, 1, 0, EDX, 24),
	SET(FXSAVE64, 1, 0, EDX, 24),
	SET(SSE, 1, 0, EDX, 25),
	SET(SSEMXCSR, 1, 0, EDX, 25),
	SET(SSE_PREFETCH, 1, 0, EDX, 25),
	SET(SSE2, 1, 0, EDX, 26),
	SET(SSE2MMX, 1, 0, EDX, 26),
	SET(SSE3, 1, 0, ECX, 0),
	SET(SSE3X87, 1, 0, ECX, 0),
	SET(PCLMULQDQ, 1, 0, ECX, 1),
	SET(MONITOR, 1, 0, ECX, 3),
	SET(SSSE3, 1, 0, ECX, 9),
	SET(SSSE3MMX, 1, 0, ECX, 9),
	SET(FMA, 1, 0, ECX, 12),
	SET(CMPXCHG16B, 1, 0, ECX, 13),
	SET(SSE4, 1, 0, ECX, 19),
	SET(SSE42, 1, 0, ECX, 20),
	SET(MOVBE, 1, 0, ECX, 22),
	SET(POPCNT, 1, 0, ECX, 23),
	SET(AES, 1, 0, ECX, 25),
	SET(XSAVE, 1, 0, ECX, 26),
	SET(AVX, 1, 0, ECX, 28),
	SET(AVXAES, 1, 0, ECX, 25),
	SET(F16C, 1, 0, ECX, 29),
	SET(RDRAND, 1, 0, ECX, 30),
	SET(RDWRFSGS, 7, 0, EBX, 0),
	SET(SGX, 7, 0, EBX, 2),
	SET(BMI1, 7, 0, EBX, 3),
	SET(AVX2, 7, 0, EBX, 5),
	SET(AVX2GATHER, 7, 0, EBX, 5),
	SET(BMI2, 7, 0, EBX, 8),
	SET(INVPCID, 7, 0, EBX, 10),
	SET(RTM, 7, 0, EBX, 11),
	SET(MPX, 7, 0, EBX, 14),
	SET(RDSEED, 7, 0, EBX, 18),
	SET(ADOX_ADCX, 7, 0, EBX, 19),
	SET(SMAP, 7, 0, EBX, 20),
	SET(CLFLUSHOPT, 7, 0, EBX, 23),
	SET(CLWB, 7, 0, EBX, 24),
	SET(PT, 7, 0, EBX, 25),
	SET(SHA, 7, 0, EBX, 29),
	SET(PREFETCHWT1, 7, 0, ECX, 0),
	SET(PKU, 7, 0, ECX, 4),
	SET(WAITPKG, 7, 0, ECX, 5),
	SET(CET, 7, 0, ECX, 7),
	SET(GFNI, 7, 0, ECX, 8),
	SET(AVX_GFNI, 7, 0, ECX, 8),
	SET(VAES, 7, 0, ECX, 9),
	SET(VPCLMULQDQ, 7, 0, ECX, 10),
	SET(RDPID, 7, 0, ECX, 22),
	SET(KEYLOCKER, 7, 0, ECX, 23),
	SET(KEYLOCKER_WIDE, 7, 0, ECX, 23),
	SET(CLDEMOTE, 7, 0, ECX, 25),
	SET(MOVDIR, 7, 0, ECX, 27),
	SET(ENQCMD, 7, 0, ECX, 29),
	SET(UINTR, 7, 0, EDX, 5),
	SET(SERIALIZE, 7, 0, EDX, 14),
	SET(TSX_LDTRK, 7, 0, EDX, 16),
	SET(PCONFIG, 7, 0, EDX, 18),
	SET(AMX_BF16, 7, 0, EDX, 22),
	SET(AMX_TILE, 7, 0, EDX, 24),
	SET(AMX_INT8, 7, 0, EDX, 25),
	SET(AVX_VNNI, 7, 1, EAX, 4),
	SET(HRESET, 7, 1, EAX, 22),
	SETS3(AVX512F, 7, 0, EBX, 16),
	SET(AVX512F_128N, 7, 0, EBX, 16),
	SET(AVX512F_SCALAR, 7, 0, EBX, 16),
	SET(AVX512F_KOP, 7, 0, EBX, 16),
	SETS3(AVX512DQ, 7, 0, EBX, 17),
	SET(AVX512DQ_128N, 7, 0, EBX, 17),
	SET(AVX512DQ_SCALAR, 7, 0, EBX, 17),
	SET(AVX512DQ_KOP, 7, 0, EBX, 17),
	SETS3(AVX512_IFMA, 7, 0, EBX, 21),
	SET(AVX512PF_512, 7, 0, EBX, 26),
	SET(AVX512ER_512, 7, 0, EBX, 27),
	SET(AVX512ER_SCALAR, 7, 0, EBX, 27),
	SETS3(AVX512CD, 7, 0, EBX, 28),
	SETS3(AVX512BW, 7, 0, EBX, 30),
	SET(AVX512BW_128N, 7, 0, EBX, 30),
	SET(AVX512BW_KOP, 7, 0, EBX, 30),
	SETS3(AVX512_VBMI, 7, 0, ECX, 1),
	SETS3(AVX512_VBMI2, 7, 0, ECX, 6),
	SETS3(AVX512_GFNI, 7, 0, ECX, 8),
	SETS3(AVX512_VAES, 7, 0, ECX, 9),
	SETS3(AVX512_VPCLMULQDQ, 7, 0, ECX, 10),
	SETS3(AVX512_VNNI, 7, 0, ECX, 11),
	SETS3(AVX512_BITALG, 7, 0, ECX, 12),
	SETS3(AVX512_VPOPCNTDQ, 7, 0, ECX, 14),
	SET(AVX512_4VNNIW_512, 7, 0, EDX, 2),
	SET(AVX512_4FMAPS_512, 7, 0, EDX, 3),
	SET(AVX512_4FMAPS_SCALAR, 7, 0, EDX, 3),
	SETS3(AVX512_VP2INTERSECT, 7, 0, EDX, 8),
	SETS3(AVX512_FP16, 7, 0, EDX, 23),
	SET(AVX512_FP16_128N, 7, 0, EDX, 23),
	SET(AVX512_FP16_SCALAR, 7, 0, EDX, 23),
	SETS3(AVX512_BF16, 7, 1, EAX, 5),
	SET(XSAVEOPT, 0xd, 1, EAX, 0),
	SET(XSAVEC, 0xd, 1, EAX, 1),
	SET(XSAVES, 0xd, 1, EAX, 3),
	SET(LAHF, 0x80000001, 0, ECX, 0),
	SET(SVM, 0x80000001, 0, ECX, 2),
	SET(LZCNT, 0x80000001, 0, ECX, 5),
	SET(SSE4A, 0x80000001, 0, ECX, 6),
	SET(AMD, 0x80000001, 0, ECX, 8),
	SET(XOP, 0x80000001, 0, ECX, 11),
	SET(LWP, 0x80000001, 0, ECX, 15),
	SET(FMA4, 0x80000001, 0, ECX, 16),
	SET(TBM, 0x80000001, 0, ECX, 21),
	SET(MONITORX, 0x80000001, 0, ECX, 29),
	SET(RDTSCP, 0x80000001, 0, EDX, 27),
	SET(AMD3DNOW, 0x80000001, 0, EDX, 31),
	SET(CLZERO, 0x80000008, 0, EBX, 0),
	SET(RDPRU, 0x80000008, 0, EBX, 4),
	SET(MCOMMIT, 0x80000008, 0, EBX, 8),
};

void isa_host_cpuid(const void *model, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
	if (!__get_cpuid_count(leaf, subleaf, &out[EAX], &out[EBX], &out[ECX], &out[EDX]))
		out[EAX] = out[EBX] = out[ECX] = out[EDX] = 0;
}

int isa_offered(const struct isa_source *source, ZydisISASet set)
{
	for (unsigned i = 0; i < ARRAY_SIZE(isa_bits); i++) {
		const struct isa_bit *b = &isa_bits[i];
		uint32_t regs[4];

		if (b->set != set)
			continue;
		if (b->bit == 255)
			return 1;
		source->cpuid(source->model, b->leaf, b->subleaf, regs);
		return regs[b->reg] >> b->bit & 1;
	}
	return -1;
}
