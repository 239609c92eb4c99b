/* CPU models: every model with 1, 2, 4 and 64 vCPUs is consistent in itself. */
#include <cpuid.h>

#include "fake.h"

static const char *const names[] = {"host", "x86-64-v2", "x86-64-v3"};
static const unsigned counts[] = {1, 2, 4, 64};

static unsigned log2_up(unsigned n)
{
	unsigned bits = 0;

	while (1u << bits < n)
		bits++;
	return bits;
}

static void check_model(const struct cpu_model *m, unsigned cpus)
{
	for (unsigned cpu = 0; cpu < cpus; cpu++) {
		uint32_t leaf[4], high[4];
		bool amd;

		cpu_model_cpuid(m, cpu, cpus, 0, 0, leaf);
		amd = leaf[1] == signature_AMD_ebx;
		assert_true(leaf[0] >= 0xd);
		cpu_model_cpuid(m, cpu, cpus, 0x80000000, 0, leaf);
		assert_true(leaf[0] >= 0x80000008);

		cpu_model_cpuid(m, cpu, cpus, 1, 0, leaf);
		assert_int_equal(leaf[1] >> 24, cpu);
		assert_int_equal(leaf[1] >> 16 & 0xff, cpus);
		assert_int_equal(leaf[3] >> 28 & 1, cpus > 1);
		assert_true(leaf[2] >> 31);	 /* hypervisor */
		assert_false(leaf[2] >> 27 & 1); /* OSXSAVE follows CR4 */
		assert_false(leaf[2] >> 3 & 1);	 /* MONITOR */
		assert_false(leaf[2] >> 17 & 1); /* PCID */
		cpu_model_cpuid(m, cpu, cpus, 0x80000001, 0, high);
		assert_true((high[3] & (1u << 29 | 1u << 20 | 1u << 11)) == (1u << 29 | 1u << 20 | 1u << 11));
		if (amd) {
			assert_int_equal(high[0], leaf[0]);
			assert_int_equal(high[3] & 0x0183f3ff, leaf[3] & 0x0183f3ff);
			assert_int_equal(high[2] >> 1 & 1, cpus > 1);
			cpu_model_cpuid(m, cpu, cpus, 0x80000008, 0, leaf);
			assert_int_equal(leaf[2] & 0xff, cpus - 1);
			assert_int_equal(leaf[2] >> 12 & 0xf, log2_up(cpus));
		}
		cpu_model_cpuid(m, cpu, cpus, 0xb, 0, leaf);
		assert_int_equal(leaf[0], 0);
		assert_int_equal(leaf[1], 1);
		assert_int_equal(leaf[2], 0x100);
		assert_int_equal(leaf[3], cpu);
		cpu_model_cpuid(m, cpu, cpus, 0xb, 1, leaf);
		assert_int_equal(leaf[0], log2_up(cpus));
		assert_int_equal(leaf[1], cpus);
		assert_int_equal(leaf[2], 0x201);
		cpu_model_cpuid(m, cpu, cpus, 0xb, 2, leaf);
		assert_int_equal(leaf[1], 0);
		for (unsigned i = 0; i < CPU_CACHES; i++) {
			unsigned sharing;

			cpu_model_cpuid(m, cpu, cpus, amd ? 0x8000001d : 4, i, leaf);
			if (!(leaf[0] & 0x1f))
				break;
			sharing = (leaf[0] >> 14 & 0xfff) + 1;
			assert_int_equal(sharing, (leaf[0] >> 5 & 7) < 3 ? 1 : amd ? cpus : 1u << log2_up(cpus));
			if (!amd)
				assert_int_equal(leaf[0] >> 26, (1u << log2_up(cpus)) - 1);
		}
	}
}

static void test_topology(void **state)
{
	for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
		struct error err = {0};
		const struct cpu_model *m = cpu_model_find(names[i], &err);

		if (!m)
			fail_msg("%s", err.text);
		for (size_t n = 0; n < ARRAY_SIZE(counts); n++)
			check_model(m, counts[n]);
	}
	/* the other vendor's topology */
	struct cpu_model intel = *cpu_model_find("host", NULL);

	intel.vendor = CPU_INTEL;
	memcpy(intel.vendor_id, "GenuineIntel", 12); /* EBX, EDX, ECX order in the field */
	for (size_t n = 0; n < ARRAY_SIZE(counts); n++)
		check_model(&intel, counts[n]);
}

/* Nothing is offered natively that the host does not have. */
static void test_host_has_all(void **state)
{
	static const struct {
		uint32_t leaf, subleaf, reg, native;
	} words[] = {
		{1, 0, 2,
			1 << 0 | 1 << 1 | 1 << 9 | 1 << 12 | 1 << 13 | 3 << 19 | 3 << 22 | 1 << 25 | 1 << 26 | 7 << 28},
		{7, 0, 1, 0xf06f0328},
		{7, 0, 2, 0x5f42},
		{7, 0, 3, 0x800110},
		{7, 1, 0, 0x1c30},
		{0x80000001, 0, 2, 0x1e0},
	};

	for (size_t n = 0; n < ARRAY_SIZE(names); n++) {
		const struct cpu_model *m = cpu_model_find(names[n], NULL);

		for (size_t i = 0; i < ARRAY_SIZE(words); i++) {
			uint32_t ours[4], host[4];

			__cpuid_count(words[i].leaf, words[i].subleaf, host[0], host[1], host[2], host[3]);
			cpu_model_cpuid(m, 0, 1, words[i].leaf, words[i].subleaf, ours);
			assert_int_equal(ours[words[i].reg] & words[i].native & ~host[words[i].reg], 0);
		}
	}
}

static void cpuid(uint32_t leaf, uint32_t subleaf)
{
	fake.v->gprs[ENGINE_RAX] = leaf;
	fake.v->gprs[ENGINE_RCX] = subleaf;
	assert_int_equal(EXECUTE(0x0f, 0xa2), SYSTEM_DONE);
}

static void test_xstate(void **state)
{
	struct bt_vcpu *v = fake_long(0);
	uint32_t host[4];

	if (!cpu_model_has(v->model, CPU_XSAVE))
		skip();
	cpuid(1, 0);
	assert_false(v->gprs[ENGINE_RCX] >> 27 & 1);
	v->gprs[ENGINE_RCX] = 0;
	assert_fault(EXECUTE(0x0f, 0x01, 0xd0), VECTOR_UD, -1); /* xgetbv */
	v->cr4 |= CR4_OSXSAVE;
	cpuid(1, 0);
	assert_true(v->gprs[ENGINE_RCX] >> 27 & 1);

	/* every state that XSETBV takes has the size that the last component gives */
	for (uint64_t xcr0 = 0; xcr0 < 512; xcr0++) {
		bool valid = xcr0 & 1 && !(xcr0 & ~v->model->xcr0) && (!(xcr0 & 4) || xcr0 & 2) &&
			     (!(xcr0 & 0xe0) || ((xcr0 & 0xe4) == 0xe4));
		uint32_t size = 576, compacted = 576;

		v->gprs[ENGINE_RCX] = v->gprs[ENGINE_RDX] = 0;
		v->gprs[ENGINE_RAX] = xcr0;
		if (!valid) {
			assert_fault(EXECUTE(0x0f, 0x01, 0xd1), VECTOR_GP, 0);
			continue;
		}
		assert_int_equal(EXECUTE(0x0f, 0x01, 0xd1), SYSTEM_DONE);
		for (unsigned i = 2; i < 8; i++) {
			if (!(xcr0 >> i & 1))
				continue;
			cpuid(0xd, i);
			size = max(size, (uint32_t)(v->gprs[ENGINE_RAX] + v->gprs[ENGINE_RBX]));
			if (v->gprs[ENGINE_RCX] & 2)
				compacted = (compacted + 63) & ~63u;
			compacted += (uint32_t)v->gprs[ENGINE_RAX];
		}
		cpuid(0xd, 0);
		assert_int_equal(v->gprs[ENGINE_RBX], size);
		assert_int_equal(v->gprs[ENGINE_RAX], v->model->xcr0);
		cpuid(0xd, 1);
		if (cpu_model_has(v->model, CPU_XSAVEC))
			assert_int_equal(v->gprs[ENGINE_RBX], compacted);
	}
	/* the last state was all that is offered: the host agrees on its size when it has no more */
	__cpuid_count(0xd, 0, host[0], host[1], host[2], host[3]);
	if (host[0] == v->model->xcr0) {
		cpuid(0xd, 0);
		assert_int_equal(v->gprs[ENGINE_RBX], host[1]);
	}
	v->gprs[ENGINE_RCX] = 0;
	assert_int_equal(EXECUTE(0x0f, 0x01, 0xd0), SYSTEM_DONE);
	assert_int_equal(v->gprs[ENGINE_RAX], v->xcr0);
}

static void test_levels(void **state)
{
	const struct cpu_model *v2 = cpu_model_find("x86-64-v2", NULL), *v3 = cpu_model_find("x86-64-v3", NULL);
	uint32_t out[4];

	assert_non_null(v2);
	assert_non_null(v3);
	assert_false(cpu_model_has(v2, CPU_XSAVE));
	assert_int_equal(v2->xcr0, 0);
	assert_int_equal(v3->xcr0, 7);
	cpu_model_cpuid(v2, 0, 1, 7, 0, out);
	assert_int_equal(out[1], 1 << 0 | 1 << 1 | 1 << 7 | 1 << 10 | 1 << 20);
	cpu_model_cpuid(v3, 0, 1, 7, 0, out);
	assert_int_equal(out[1], 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 20);
	cpu_model_cpuid(v3, 0, 1, 0x80000001, 0, out);
	assert_int_equal(out[2], 1 << 0 | 1 << 5);
}

static void test_names(void **state)
{
	struct error err = {0};

	assert_null(cpu_model_find("pentium", &err));
	assert_non_null(strstr(err.text, "pentium"));
	assert_non_null(strstr(err.text, "x86-64-v3"));
	assert_int_equal(err.code, EINVAL);
}

static void test_tsc_ratio(void **state)
{
	struct cpu_model m = *cpu_model_find("host", NULL);
	uint32_t out[4];
	double khz;

	m.vendor = CPU_INTEL;
	cpu_model_cpuid(&m, 0, 1, 0x15, 0, out);
	assert_int_equal(out[2], 1000000000);
	assert_true((uint64_t)out[1] * 1000000 <= UINT32_MAX); /* Linux multiplies in 32 bits */
	khz = 1e6 * out[1] / out[0];
	assert_true(khz > 2596120 * (1 - 1e-6) && khz < 2596120 * (1 + 1e-6));
	cpu_model_cpuid(&m, 0, 1, 0x40000010, 0, out);
	assert_int_equal(out[0], 2596120);
}

const struct CMUnitTest model_tests[] = {
	cmocka_unit_test(test_topology),
	cmocka_unit_test(test_host_has_all),
	cmocka_unit_test(test_xstate),
	cmocka_unit_test(test_levels),
	cmocka_unit_test(test_names),
	cmocka_unit_test(test_tsc_ratio),
};
const unsigned model_count = ARRAY_SIZE(model_tests);
