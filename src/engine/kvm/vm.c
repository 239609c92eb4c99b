/* Engine kvm: the host's KVM runs the guest's code. Here: /dev/kvm, the VM with its memory, and the engine's table.
 * Source: Linux, Documentation/virt/kvm/api.rst.
 */
#include "engine/kvm/kvm.h"

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "engine/tsc.h"

#define API_VERSION 12 /* for good (api.rst, section 4.1) */

/* On Intel CPUs KVM needs four pages of guest address space for itself (KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR):
 * below 4 GiB and where the board has nothing. */
#define IDENTITY_MAP 0xfffbc000ull
#define TSS 0xfffbd000ul

static void on_signal(int number)
{
}

int kvm_signal(void)
{
	return SIGRTMIN;
}

void kvm_install_signal(void)
{
	struct sigaction action = {.sa_handler = on_signal}; /* without SA_RESTART: KVM_RUN is to end */

	sigaction(kvm_signal(), &action, NULL);
}

static const struct {
	int capability;
	const char *name;
} needed[] = {
	{KVM_CAP_IRQCHIP, "interrupt chips in the kernel"},
	{KVM_CAP_PIT2, "an 8254 in the kernel"},
	{KVM_CAP_IRQ_ROUTING, "interrupt routing"},
	{KVM_CAP_SIGNAL_MSI, "message-signalled interrupts"},
	{KVM_CAP_USER_MEMORY, "memory of the program's own"},
	{KVM_CAP_IMMEDIATE_EXIT, "immediate exits"},
	{KVM_CAP_XSAVE, "XSAVE state"},
	{KVM_CAP_XCRS, "XCR0"},
	{KVM_CAP_DEBUGREGS, "debug registers"},
	{KVM_CAP_MP_STATE, "multiprocessor states"},
	{KVM_CAP_EXT_CPUID, "CPUID tables"},
	{KVM_CAP_VCPU_EVENTS, "pending events"},
};

int kvm_open(int *fd, struct error *err)
{
	scope_fd int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int version;

	if (kvm < 0) {
		switch (errno) {
		case ENOENT:
		case ENXIO:
		case ENODEV:
			return error_set(err, errno,
				"there is no /dev/kvm: the CPU or the hypervisor below offers no virtualization, or "
				"the "
				"kernel's module kvm-intel or kvm-amd is not loaded");
		case EACCES:
		case EPERM:
			return error_set(
				err, errno, "/dev/kvm may not be opened by this user: add the user to its group");
		}
		return error_errno(err, "opening /dev/kvm");
	}
	version = ioctl(kvm, KVM_GET_API_VERSION, 0);
	if (version < 0)
		return error_errno(err, "/dev/kvm is not KVM: KVM_GET_API_VERSION");
	if (version != API_VERSION)
		return error_set(err, ENOTSUP, "/dev/kvm has API version %d instead of %d", version, API_VERSION);
	for (unsigned i = 0; i < ARRAY_SIZE(needed); i++)
		if (ioctl(kvm, KVM_CHECK_EXTENSION, needed[i].capability) <= 0)
			return error_set(err, ENOTSUP, "/dev/kvm: this KVM lacks %s", needed[i].name);
	*fd = take_fd(&kvm);
	return 0;
}

/* ---- the VM ---- */

/* KVM's slots: the ranges of RAM that are always there, then those into which memory can be plugged. */
#define PLUGGABLE_FIRST ARRAY_SIZE(((struct guest_memory *)0)->range)
#define SLOTS (PLUGGABLE_FIRST + MEMORY_SLOTS_MAX)

/* What is in KVM's slot i; size 0: nothing. */
static struct memory_range memory_in(const struct guest_memory *m, unsigned i)
{
	if (i < m->ranges)
		return m->range[i];
	if (i < PLUGGABLE_FIRST || !(atomic_load(&m->slots.plugged) >> (i - PLUGGABLE_FIRST) & 1))
		return (struct memory_range){0};
	return memory_slot(m, i - PLUGGABLE_FIRST);
}

static int set_slot(struct engine_vm *vm, unsigned i, const struct memory_range *r, bool log, struct error *err)
{
	struct kvm_userspace_memory_region region = {.slot = i,
		.flags = log ? KVM_MEM_LOG_DIRTY_PAGES : 0,
		.guest_phys_addr = r->gpa,
		.memory_size = r->size,
		.userspace_addr = (uintptr_t)r->host};

	if (ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		return error_errno(err, "KVM_SET_USER_MEMORY_REGION, %llu MiB at %#llx",
			(unsigned long long)(r->size >> 20), (unsigned long long)r->gpa);
	return 0;
}

/* One slot per range of RAM; again with other flags to begin or end the logging of writes. */
static int set_memory(struct engine_vm *vm, bool log, struct error *err)
{
	for (unsigned i = 0; i < SLOTS; i++) {
		struct memory_range r = memory_in(vm->memory, i);
		int result = r.size ? set_slot(vm, i, &r, log, err) : 0;

		if (result < 0)
			return result;
	}
	vm->logs_writes = log;
	return 0;
}

static int memory_changes(void *opaque, const struct memory_range *slot, bool comes, struct error *err)
{
	struct engine_vm *vm = opaque;
	const struct memory_slots *s = &vm->memory->slots;
	struct memory_range r = *slot;

	if (!comes)
		r.size = 0;
	return set_slot(vm, PLUGGABLE_FIRST + ((slot->gpa - s->all.gpa) >> s->shift), &r, comes && vm->logs_writes, err);
}

static int check_cpus(struct engine_vm *vm, struct error *err)
{
	int most = ioctl(vm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_MAX_VCPUS);

	if (vm->cpus > KVM_CPUS_MAX || (most > 0 && vm->cpus > (unsigned)most))
		return error_set(err, EINVAL, "%u vCPUs are too many, this KVM has %d at most; give fewer --cpus",
			vm->cpus, most > 0 ? min(most, KVM_CPUS_MAX) : KVM_CPUS_MAX);
	return 0;
}

static int vm_setup(struct engine_vm *vm, const struct engine_config *config, struct error *err)
{
	uint64_t identity = IDENTITY_MAP;
	int result = kvm_open(&vm->kvm, err), size;

	if (result == 0)
		result = check_cpus(vm, err);
	if (result < 0)
		return result;
	size = ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (size < (int)sizeof(struct kvm_run))
		return error_set(err, EIO, "KVM_GET_VCPU_MMAP_SIZE gives %d", size);
	vm->run_size = (size_t)size;
	do
		vm->fd = ioctl(vm->kvm, KVM_CREATE_VM, 0);
	while (vm->fd < 0 && errno == EINTR);
	if (vm->fd < 0)
		return error_errno(err, "KVM_CREATE_VM");
	/* AMD's KVM may not have these two, and needs neither. */
	ioctl(vm->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity);
	ioctl(vm->fd, KVM_SET_TSS_ADDR, TSS);
	size = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
	vm->xsave_size = max((size_t)(size > 0 ? size : 0), sizeof(struct kvm_xsave));
	result = set_memory(vm, false, err);
	if (result == 0)
		result = kvm_chips_init(vm, err);
	if (result == 0)
		result = kvm_model_init(vm, config->model, err);
	return result;
}

static void vm_destroy(struct engine_vm *vm)
{
	if (!vm)
		return;
	if (vm->memory && vm->memory->slot_changes == memory_changes)
		vm->memory->slot_changes = NULL;
	if (vm->fd >= 0)
		close(vm->fd);
	if (vm->kvm >= 0)
		close(vm->kvm);
	free(vm);
}

static int vm_create(struct engine_vm **made, const struct engine_config *config, struct error *err)
{
	struct engine_vm *vm = calloc(1, sizeof(*vm));
	int result;

	if (!vm)
		return error_set(err, ENOMEM, "no memory for a VM");
	vm->kvm = vm->fd = -1;
	vm->board = config->board;
	vm->memory = config->memory;
	vm->cpus = config->cpus;
	kvm_install_signal();
	result = vm_setup(vm, config, err);
	if (result < 0) {
		vm_destroy(vm);
		return result;
	}
	config->memory->opaque = vm;
	config->memory->slot_changes = memory_changes;
	*made = vm;
	return 0;
}

static const struct board_chips *vm_chips(struct engine_vm *vm)
{
	return &vm->chips;
}

/* ---- logging of writes ---- */

static int vm_log_writes(struct engine_vm *vm, bool on, struct error *err)
{
	return on == vm->logs_writes ? 0 : set_memory(vm, on, err);
}

/* KVM's bitmap of a slot begins at the slot; ours at the memory's first page, and ranges are whole multiples of 64
 * pages only where one more follows (3 GiB): the last one's words are just appended. */
static int vm_written(struct engine_vm *vm, uint64_t *bitmap, struct error *err)
{
	for (unsigned i = 0; i < SLOTS; i++) {
		struct memory_range r = memory_in(vm->memory, i);
		size_t words = align_up(r.size >> 12, 64) / 64;
		scope_free uint64_t *slot = words ? calloc(words, sizeof(*slot)) : NULL;
		struct kvm_dirty_log log = {.slot = i, .dirty_bitmap = slot};

		if (!words)
			continue;
		if (!slot)
			return error_set(err, ENOMEM, "no memory for the bitmap of written pages");
		if (ioctl(vm->fd, KVM_GET_DIRTY_LOG, &log) < 0)
			return error_errno(err, "KVM_GET_DIRTY_LOG");
		for (size_t w = 0; w < words; w++)
			bitmap[(r.offset >> 12) / 64 + w] |= slot[w];
	}
	return 0;
}

/* ---- a vCPU ---- */

static void vcpu_destroy(struct engine_vcpu *v)
{
	if (!v)
		return;
	v->vm->vcpu[v->index] = NULL;
	kvm_state_free(v);
	if (v->run)
		munmap(v->run, v->vm->run_size);
	if (v->fd >= 0)
		close(v->fd);
	free(v);
}

static int vcpu_setup(struct engine_vcpu *v, struct error *err)
{
	int result;

	v->fd = ioctl(v->vm->fd, KVM_CREATE_VCPU, v->index);
	if (v->fd < 0)
		return error_errno(err, "KVM_CREATE_VCPU %u", v->index);
	v->run = mmap(NULL, v->vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	if (v->run == MAP_FAILED) {
		v->run = NULL;
		return error_errno(err, "vCPU %u: mapping its shared page", v->index);
	}
	result = kvm_set_cpuid(v, err);
	return result < 0 ? result : kvm_state_init(v, err);
}

static int vcpu_create(struct engine_vm *vm, unsigned cpu, struct engine_vcpu **made, struct error *err)
{
	struct engine_vcpu *v = calloc(1, sizeof(*v));
	int result;

	if (!v)
		return error_set(err, ENOMEM, "no memory for a vCPU");
	v->vm = vm;
	v->index = cpu;
	v->fd = -1;
	result = vcpu_setup(v, err);
	if (result < 0) {
		vcpu_destroy(v);
		return result;
	}
	vm->vcpu[cpu] = v;
	*made = v;
	return 0;
}

/* INIT never comes here: the local APICs are KVM's. After a reset of the board all vCPUs are as new already. */
static void vcpu_reset(struct engine_vcpu *v, bool init)
{
	if (v->changed)
		kvm_state_reset(v);
}

static void vcpu_step(struct engine_vcpu *v, unsigned n, struct engine_exit *exit)
{
	*exit = (struct engine_exit){.reason = ENGINE_EXIT_ERROR, .message = "engine kvm does not step"};
}

static uint64_t vcpu_tsc(struct engine_vcpu *v)
{
	return host_tsc() + v->tsc_offset;
}

const struct engine engine_kvm = {
	.name = "kvm",
	.probe = kvm_probe,
	.vm_create = vm_create,
	.vm_destroy = vm_destroy,
	.vm_chips = vm_chips,
	.vm_log_writes = vm_log_writes,
	.vm_written = vm_written,
	.vcpu_create = vcpu_create,
	.vcpu_destroy = vcpu_destroy,
	.vcpu_reset = vcpu_reset,
	.vcpu_get = kvm_vcpu_get,
	.vcpu_set = kvm_vcpu_set,
	.vcpu_run = kvm_vcpu_run,
	.vcpu_step = vcpu_step,
	.vcpu_kick = kvm_vcpu_kick,
	.vcpu_tsc = vcpu_tsc,
	.vcpu_statistics = kvm_vcpu_statistics,
};
