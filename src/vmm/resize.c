/* vCPUs and memory added to and taken from a running machine: the board tells the guest by ACPI (machine/hotplug.h); what
 * it lets go of, in answer or by itself, comes back here.
 *
 * Every vCPU that there can be has its thread from the beginning (a jail need not allow new ones), which sleeps while the
 * vCPU is not plugged in; the engine's part is made when it is first needed, and kept.
 */
#include "vmm/resize.h"

#include <stdio.h>

#include "vmm/vm.h"

static bool is_there(struct vm *vm, enum board_hotplug kind, unsigned n)
{
	return board_hotplug_there(vm->board, kind) >> n & 1;
}

static unsigned count(struct vm *vm, enum board_hotplug kind)
{
	return (unsigned)__builtin_popcountll(board_hotplug_there(vm->board, kind));
}

void vm_size(struct vm *vm, struct vm_size *size)
{
	const struct guest_memory *m = &vm->memory;
	uint64_t unit = m->slots.count ? 1ull << m->slots.shift : 0;

	*size = (struct vm_size){.cpus = count(vm, BOARD_HOTPLUG_CPU),
		.cpus_max = vm->cpus,
		.memory = m->size + count(vm, BOARD_HOTPLUG_MEMORY) * unit,
		.memory_max = m->size + m->slots.count * unit,
		.memory_unit = unit};
}

/* ---- vCPUs ---- */

static int add_cpu(struct vm *vm, unsigned i, struct error *err)
{
	struct vcpu *v = &vm->vcpu[i];
	int result = 0;

	if (!v->engine)
		result = vm->engine->vcpu_create(vm->engine_vm, i, &v->engine, err);
	if (result < 0)
		return error_wrap(err, "vCPU %u", i);
	pthread_mutex_lock(&v->lock);
	v->awaits_startup = true;
	atomic_store(&v->plugged, true);
	vcpu_call(v, VCPU_CALL_POWER);
	pthread_mutex_unlock(&v->lock);
	board_hotplug_add(vm->board, BOARD_HOTPLUG_CPU, i);
	return 0;
}

int vm_set_cpus(struct vm *vm, unsigned wanted, struct error *err)
{
	unsigned now = count(vm, BOARD_HOTPLUG_CPU);
	int result = 0;

	if (!vm->config->cpus_change)
		return error_set(err, ENOTSUP, "the number of vCPUs is fixed; start it with --cpus %u,max=MOST", now);
	if (wanted < 1 || wanted > vm->cpus)
		return error_set(err, ERANGE, "%u vCPUs: give from 1 to %u (--cpus max=)", wanted, vm->cpus);
	for (unsigned i = 1; i < vm->cpus && now < wanted && result == 0; i++) {
		/* one that has just gone and whose thread is not told yet is not taken */
		if (is_there(vm, BOARD_HOTPLUG_CPU, i) || atomic_load(&vm->vcpu[i].plugged))
			continue;
		result = add_cpu(vm, i, err);
		now++;
	}
	for (unsigned i = vm->cpus - 1; i > 0 && now > wanted; i--) {
		if (!is_there(vm, BOARD_HOTPLUG_CPU, i))
			continue;
		board_hotplug_ask_removal(vm->board, BOARD_HOTPLUG_CPU, i);
		now--;
	}
	if (result == 0 && now != wanted)
		return error_set(err, EBUSY, "vCPUs are just going; try again");
	return result;
}

/* ---- memory ---- */

int vm_set_memory(struct vm *vm, uint64_t wanted, struct error *err)
{
	const struct memory_slots *slots = &vm->memory.slots;
	unsigned now = count(vm, BOARD_HOTPLUG_MEMORY), want;
	int result = 0;
	struct vm_size size;

	vm_size(vm, &size);
	if (!slots->count)
		return error_set(err, ENOTSUP, "the memory's size is fixed; start it with --memory %lluM,max=MOST",
			(unsigned long long)size.memory >> 20);
	if (wanted < vm->memory.size || wanted > size.memory_max || (wanted - vm->memory.size) % size.memory_unit)
		return error_set(err, ERANGE, "memory of %llu MiB: give from %llu to %llu MiB in steps of %llu MiB",
			(unsigned long long)wanted >> 20, (unsigned long long)vm->memory.size >> 20,
			(unsigned long long)size.memory_max >> 20, (unsigned long long)size.memory_unit >> 20);
	want = (unsigned)((wanted - vm->memory.size) >> slots->shift);
	for (unsigned i = 0; i < slots->count && now < want && result == 0; i++) {
		if (is_there(vm, BOARD_HOTPLUG_MEMORY, i) || atomic_load(&slots->plugged) >> i & 1)
			continue;
		result = memory_plug(&vm->memory, i, err);
		if (result == 0)
			board_hotplug_add(vm->board, BOARD_HOTPLUG_MEMORY, i);
		now++;
	}
	for (unsigned i = slots->count; i-- > 0 && now > want;) {
		if (!is_there(vm, BOARD_HOTPLUG_MEMORY, i))
			continue;
		board_hotplug_ask_removal(vm->board, BOARD_HOTPLUG_MEMORY, i);
		now--;
	}
	if (result == 0 && now != want)
		return error_set(err, EBUSY, "memory is just going; try again");
	return result;
}

/* ---- what the guest answers ---- */

static void tell(struct vm *vm, enum board_hotplug kind, unsigned n, enum vm_event event)
{
	char name[20];

	snprintf(name, sizeof(name), "%s%u", kind == BOARD_HOTPLUG_CPU ? "cpu" : "memory", n);
	vm_tell(vm, event, name, NULL);
}

static void take_out(struct vm *vm, enum board_hotplug kind, unsigned n)
{
	struct vcpu *v = &vm->vcpu[n];

	if (kind == BOARD_HOTPLUG_MEMORY) {
		memory_unplug(&vm->memory, n);
		return;
	}
	pthread_mutex_lock(&v->lock);
	atomic_store(&v->plugged, false);
	v->awaits_startup = true;
	vcpu_call(v, VCPU_CALL_POWER);
	pthread_mutex_unlock(&v->lock);
}

/* On the loop's thread. */
static void answered(void *opaque)
{
	struct vm *vm = opaque;

	for (unsigned kind = 0; kind < 2; kind++) {
		uint64_t refused = atomic_exchange(&vm->resize_refused[kind], 0);
		uint64_t gone = atomic_exchange(&vm->resize_gone[kind], 0);

		for (; gone; gone &= gone - 1) {
			take_out(vm, kind, (unsigned)__builtin_ctzll(gone));
			tell(vm, kind, (unsigned)__builtin_ctzll(gone), VM_EVENT_REMOVED);
		}
		for (; refused; refused &= refused - 1)
			tell(vm, kind, (unsigned)__builtin_ctzll(refused), VM_EVENT_REFUSED);
	}
}

void vm_resize_answered(void *opaque, enum board_hotplug kind, unsigned number, enum board_hotplug_event event)
{
	struct vm *vm = opaque;
	_Atomic uint64_t *set = event == BOARD_HOTPLUG_GONE ? &vm->resize_gone[kind] : &vm->resize_refused[kind];

	/* One call is under way for all that is noted: a guest cannot pile them up. */
	if (!atomic_fetch_or(set, 1ull << number))
		loop_post(vm->loop, answered, vm);
}
