/* What the guest's CPUID says under KVM: the wanted model, as far as KVM can do it (KVM_GET_SUPPORTED_CPUID). */
#include "engine/kvm/kvm.h"

#include <string.h>
#include <sys/ioctl.h>

#include "base/cleanup.h"
#include "base/util.h"

#define ENTRIES_MAX 256 /* KVM_MAX_CPUID_ENTRIES; older kernels have 80 */
#define LEAF_EXTENDED 0x80000000u

#define CPU_1_ECX_TSC_DEADLINE (1u << 24)
#define CPU_1_ECX_HYPERVISOR (1u << 31)

int kvm_supported_cpuid(int kvm, struct kvm_cpuid2 **cpuid, struct error *err)
{
	struct kvm_cpuid2 *table = calloc(1, sizeof(*table) + ENTRIES_MAX * sizeof(table->entries[0]));

	if (!table)
		return error_set(err, ENOMEM, "no memory for the table of CPUID");
	table->nent = ENTRIES_MAX;
	if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, table) < 0) {
		error_errno(err, "KVM_GET_SUPPORTED_CPUID");
		free(table);
		return -err->code;
	}
	*cpuid = table;
	return 0;
}

static const struct kvm_cpuid_entry2 *find(const struct kvm_cpuid2 *table, uint32_t leaf, uint32_t subleaf)
{
	static const struct kvm_cpuid_entry2 none;

	for (uint32_t i = 0; i < table->nent; i++) {
		const struct kvm_cpuid_entry2 *e = &table->entries[i];

		if (e->function == leaf && (e->index == subleaf || !(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX)))
			return e;
	}
	return &none;
}

static uint32_t supported_word(const struct kvm_cpuid2 *table, enum cpu_word word)
{
	struct cpu_word_place at = cpu_word_place(word);
	const struct kvm_cpuid_entry2 *e = find(table, at.leaf, at.subleaf);
	const uint32_t registers[4] = {e->eax, e->ebx, e->ecx, e->edx};

	return registers[at.reg];
}

int kvm_model_init(struct engine_vm *vm, const struct cpu_model *model, struct error *err)
{
	scope_free struct kvm_cpuid2 *table = NULL;
	uint32_t words[CPU_WORDS], bits;
	uint64_t xcr0;
	const struct kvm_cpuid_entry2 *e;
	int result = kvm_supported_cpuid(vm->kvm, &table, err);

	if (result < 0)
		return result;
	for (unsigned i = 0; i < CPU_WORDS; i++)
		words[i] = supported_word(table, i);
	/* Two that KVM has for every guest, though its table is about the CPU (api.rst, KVM_GET_SUPPORTED_CPUID). */
	words[CPU_1_ECX] |= CPU_1_ECX_HYPERVISOR;
	if (ioctl(vm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER) > 0)
		words[CPU_1_ECX] |= CPU_1_ECX_TSC_DEADLINE;
	e = find(table, 0xd, 0);
	xcr0 = (uint64_t)e->edx << 32 | e->eax;
	result = cpu_model_for_hardware(&vm->model, model, words, xcr0, err);
	if (result < 0)
		return result;
	bits = find(table, 0x80000008, 0)->eax & 0xff;
	if (bits)
		vm->model.physical_bits = min(vm->model.physical_bits, bits);
	return 0;
}

/* ---- a vCPU's table ---- */

struct list {
	struct kvm_cpuid2 *table;
	const struct engine_vcpu *vcpu;
};

static void add(struct list *list, uint32_t leaf, uint32_t subleaf, bool indexed)
{
	struct kvm_cpuid2 *table = list->table;
	uint32_t out[4];

	cpu_model_cpuid(&list->vcpu->vm->model, list->vcpu->index, list->vcpu->vm->cpus, leaf, subleaf, out);
	/* What is not in the table reads as zeros. */
	if (!(out[0] | out[1] | out[2] | out[3]) || table->nent == ENTRIES_MAX)
		return;
	table->entries[table->nent++] = (struct kvm_cpuid_entry2){.function = leaf,
		.index = subleaf,
		.flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0,
		.eax = out[0],
		.ebx = out[1],
		.ecx = out[2],
		.edx = out[3]};
}

static unsigned subleaves(uint32_t leaf)
{
	switch (leaf) {
	case 4:
	case 0x8000001d:
		return CPU_CACHES;
	case 7:
	case 0xb:
		return 2;
	case 0xd:
		return CPU_XSTATES;
	}
	return 0;
}

static void add_range(struct list *list, uint32_t first)
{
	uint32_t out[4];

	cpu_model_cpuid(&list->vcpu->vm->model, list->vcpu->index, list->vcpu->vm->cpus, first, 0, out);
	for (uint32_t leaf = first; leaf <= out[0] && leaf - first < 64; leaf++) {
		unsigned count = subleaves(leaf);

		for (unsigned i = 0; i < max(count, 1u); i++)
			add(list, leaf, i, count > 0);
	}
}

int kvm_set_cpuid(struct engine_vcpu *v, struct error *err)
{
	scope_free struct kvm_cpuid2 *table = calloc(1, sizeof(*table) + ENTRIES_MAX * sizeof(table->entries[0]));
	struct list list = {.table = table, .vcpu = v};

	if (!table)
		return error_set(err, ENOMEM, "no memory for the table of CPUID");
	add_range(&list, 0);
	add_range(&list, 0x40000000);
	add_range(&list, LEAF_EXTENDED);
	return ioctl(v->fd, KVM_SET_CPUID2, table) < 0 ? error_errno(err, "KVM_SET_CPUID2, %u entries", table->nent)
						       : 0;
}
