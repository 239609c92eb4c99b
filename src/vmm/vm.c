/* Puts a virtual machine together from its configuration, and takes it apart. */
#include "vmm/vm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "disk/disk.h"
#include "engine/tsc.h"
#include "vmm/control.h"
#include "vmm/hotplug.h"
#include "vmm/resize.h"
#include "vmm/probe.h"
#include "vmm/terminal.h"

/* ---- what the board asks for ---- */

static void board_event(void *opaque, enum board_event event)
{
	struct vm *vm = opaque;

	switch (event) {
	case BOARD_EVENT_POWER_OFF:
		vm_stop(vm, VM_CAUSE_POWER_OFF, NULL);
		break;
	case BOARD_EVENT_RESET:
		vm_stop(vm, VM_CAUSE_RESET, NULL);
		break;
	case BOARD_EVENT_PANIC:
	case BOARD_EVENT_CRASH_KERNEL:
		vm_panicked(vm);
		break;
	}
}

static uint64_t tsc_now(void *opaque, unsigned cpu)
{
	struct vm *vm = opaque;
	struct vcpu *v = &vm->vcpu[cpu];

	return v->engine ? vm->engine->vcpu_tsc(v->engine) : 0;
}

static void user_leaves(void *opaque)
{
	vm_stop(opaque, VM_CAUSE_LEAVE, NULL);
}

/* ---- the parts ---- */

static int choose_engine(struct vm *vm, struct error *err)
{
	/* One that was asked for by name is taken at its word: probing costs time, and its own start says what is missing. */
	vm->engine = vm->config->engine ? vm->config->engine
					: vmm_choose_engine(vm->engine_note, sizeof(vm->engine_note), err);
	return vm->engine ? 0 : -err->code;
}

static int create_memory(struct vm *vm, struct error *err)
{
	uint64_t size = vm->config->memory, total;
	struct sysinfo host;
	int result;

	/* The kernel promises memory that it does not have and kills later; what can never be given is refused now. */
	if (sysinfo(&host) == 0) {
		total = ((uint64_t)host.totalram + host.totalswap) * host.mem_unit;
		if (size > total)
			return error_set(err, ENOMEM,
				"--memory: %llu MiB wanted, the host has %llu MiB with its swap; "
				"give less",
				(unsigned long long)(size >> 20), (unsigned long long)(total >> 20));
	}
	result = memory_create_with_slots(&vm->memory, size, vm->config->memory_max, err);
	if (result < 0)
		return error_wrap(err, "--memory: %llu MiB for the guest", (unsigned long long)(size >> 20));
	vm->has_memory = true;
	return 0;
}

static int create_board(struct vm *vm, struct error *err)
{
	struct board_config config = {.cpus = vm->cpus,
		.cpus_there = vm->config->cpus,
		.cpus_change = vm->config->cpus_change,
		.memory = &vm->memory,
		.loop = vm->loop,
		.host = &vm->host,
		.tsc_hz = engine_tsc_hz(),
		.tsc_now = tsc_now};

	vm->host = (struct board_host){.opaque = vm,
		.event = board_event,
		.interrupt_ready = vcpu_interrupt_ready,
		.init = vcpu_init,
		.startup = vcpu_startup,
		.pci_ejected = vm_pci_ejected,
		.hotplug = vm_resize_answered,
		.wake = vcpu_wake_up};
	if (vm->config->debug_exit)
		vm->host.debug_exit = vm_debug_exit;
	return board_create(&vm->board, &config, err);
}

static int add_devices(struct vm *vm, struct error *err)
{
	int result = 0;

	for (unsigned i = 0; i < vm->config->disks && result == 0; i++)
		result = vm_open_disk(vm, i, &vm->config->disk[i], err);
	for (unsigned i = 0; i < vm->config->nets && result == 0; i++)
		result = vm_open_net(vm, i, &vm->config->net[i], err);
	if (result == 0)
		result = virtio_rng_create(&vm->device[vm->devices], vm->board, err);
	if (result < 0)
		return result;
	vm->devices++;
	return vm_add_small_devices(vm, err);
}

static int create_engine_vm(struct vm *vm, struct error *err)
{
	struct engine_config config = {
		.cpus = vm->cpus, .model = vm->config->cpu, .board = &vm->engine_board, .memory = &vm->memory};
	int result;

	vm->engine_board = (struct engine_board){.opaque = vm->board,
		.pio_read = board_pio_read,
		.pio_write = board_pio_write,
		.mmio_read = board_mmio_read,
		.mmio_write = board_mmio_write,
		.msr_read = board_msr_read,
		.msr_write = board_msr_write,
		.cr8_read = board_cr8_read,
		.cr8_write = board_cr8_write,
		.interrupt_ack = board_interrupt_ack,
		.interrupt_pending = board_interrupt_pending,
		.eoi_offer = board_eoi_offer,
		.eoi_settle = board_eoi_settle,
		.send_ipi = board_send_ipi,
		.wake = board_wake_cpu};
	result = vm->engine->vm_create(&vm->engine_vm, &config, err);
	if (result < 0)
		return error_wrap(err, "engine %s", vm->engine->name);
	if (vm->engine->vm_chips) {
		vm->own_chips = true;
		board_use_chips(vm->board, vm->engine->vm_chips(vm->engine_vm));
	}
	return 0;
}

static int create_vcpus(struct vm *vm, struct error *err)
{
	int result = 0;

	for (unsigned i = 0; i < vm->config->cpus && result == 0; i++)
		result = vm->engine->vcpu_create(vm->engine_vm, i, &vm->vcpu[i].engine, err);
	return result < 0 ? error_wrap(err, "engine %s", vm->engine->name) : 0;
}

static struct boot_config boot_config(const struct vm *vm)
{
	return (struct boot_config){.kernel = vm->config->kernel,
		.initrd = vm->config->initrd,
		.cmdline = vm->config->cmdline,
		.modules = vm->config->modules,
		.module = vm->config->module,
		.files = vm->config->jail ? &vm->boot_files : NULL};
}

/* In a jail no file can be opened any more when the guest resets. */
static int open_boot_files(struct vm *vm, struct error *err)
{
	struct boot_config boot = boot_config(vm);

	return vm->config->jail ? boot_open(&vm->boot_files, &vm->memory, &boot, err) : 0;
}

int vm_load(struct vm *vm, struct error *err)
{
	struct boot_config boot = boot_config(vm);
	int result = acpi_write_tables(vm->board, vm->cpus, &boot.rsdp, err);

	vm->panicked = false;
	if (result == 0)
		result = board_write_generation(vm->board, err);
	if (result == 0)
		result = smbios_write_tables(&vm->memory, &vm->identity, err);
	return result < 0 ? result : boot_load(&vm->entry, &vm->memory, &boot, err);
}

/* ---- the jail ---- */

/* When all is open and before the first thread is there, since namespaces and ids are a thread's own. */
static int enter_jail(struct vm *vm, struct error *err)
{
	unsigned threads = vm->cpus + 1; /* vCPUs and console */
	int result;

	if (!vm->config->jail)
		return 0;
	for (unsigned i = 0; i < vm->config->disks; i++)
		threads += min(vm->cpus, (unsigned)VIRTIO_BLK_QUEUES_MAX);
	result = jail_enter(&vm->jail, vm->config, threads, vm->boot_files.kernel_size, err);
	vm->threads.begin = jail_thread_begin;
	vm->threads.opaque = vm->jail;
	return result;
}

/* ---- together, and apart ---- */

static int assemble(struct vm *vm, struct error *err)
{
	int result = choose_engine(vm, err);

	if (result == 0)
		result = vm_make_identity(vm, err);
	if (result == 0)
		result = create_memory(vm, err);
	if (result == 0)
		result = loop_create(&vm->loop, err);
	if (result == 0)
		result = create_board(vm, err);
	if (result == 0)
		result = create_engine_vm(vm, err); /* before the devices, which may get bells from it */
	if (result == 0)
		result = add_devices(vm, err);
	if (result == 0)
		result = create_vcpus(vm, err);
	if (result == 0)
		result = open_boot_files(vm, err);
	/* A kernel file is parsed in the jail if there is one. */
	if (result == 0 && !vm->config->jail)
		result = vm_load(vm, err);
	if (result == 0)
		result = vm_watch_signals(vm, err);
	if (result == 0 && vm->hvc_device)
		result = console_create_on(&vm->hvc, vm->config->hvc, vm->config->hvc_path, vm_hvc_port(vm), vm->loop,
			&vm->threads, user_leaves, vm, err);
	/* Last, so that the terminal is left alone as long as something can be wrong. */
	if (result == 0)
		result = console_create(&vm->console, vm->config->serial, vm->config->serial_path,
			board_serial(vm->board), vm->loop, &vm->threads, user_leaves, vm, err);
	if (result == 0 && vm->config->control)
		result = control_create(&vm->control, vm->config->control, vm, err);
	if (result == 0)
		result = enter_jail(vm, err);
	if (result == 0 && vm->config->jail)
		result = vm_load(vm, err);
	if (result == 0)
		result = threads_release(&vm->threads, err);
	return result;
}

int vm_create(struct vm **created, const struct vmm_config *config, struct error *err)
{
	struct vm *vm = calloc(1, sizeof(*vm) + config->cpus_max * sizeof(vm->vcpu[0]));
	int result;

	if (!vm)
		return error_errno(err, "virtual machine");
	vm->config = config;
	vm->cpus = config->cpus_max;
	vm->threads.held = config->jail;
	vm->signal_fd = -1;
	vm->boot_files = (struct boot_files){.kernel = -1, .initrd = -1};
	vm->vsock.fd = -1;
	vm->debug_exit = -1;
	pthread_mutex_init(&vm->lock, NULL);
	pthread_cond_init(&vm->resumed, NULL);
	for (unsigned i = 0; i < vm->cpus; i++) {
		vm->vcpu[i].vm = vm;
		vm->vcpu[i].index = i;
		vm->vcpu[i].awaits_startup = i > 0;
		vm->vcpu[i].plugged = i < config->cpus;
		pthread_mutex_init(&vm->vcpu[i].lock, NULL);
		pthread_mutex_init(&vm->vcpu[i].snapshot_lock, NULL);
	}
	result = assemble(vm, err);
	if (result < 0) {
		vm_destroy(vm, NULL);
		return result;
	}
	/* Said only now: an error before would be one line of two. */
	if (vm->engine_note[0])
		terminal_say("hostel-vmm: %s\n", vm->engine_note);
	*created = vm;
	return 0;
}

/* The vCPU threads have ended and the loop does not run: what remains are the devices' own threads. Devices go before
 * what they use: back ends, vCPUs (which they interrupt), board. */
int vm_destroy(struct vm *vm, struct error *err)
{
	int result;

	control_destroy(vm->control); /* says no more of what is taken apart */
	while (vm->devices)
		virtio_device_destroy(vm->device[--vm->devices]);
	result = vm_close_all(vm, err);
	for (unsigned i = 0; i < vm->cpus; i++) {
		if (vm->vcpu[i].engine)
			vm->engine->vcpu_destroy(vm->vcpu[i].engine);
		pthread_mutex_destroy(&vm->vcpu[i].lock);
		pthread_mutex_destroy(&vm->vcpu[i].snapshot_lock);
		free(vm->vcpu[i].snapshot);
	}
	if (vm->board)
		board_use_chips(vm->board, NULL);
	if (vm->engine_vm)
		vm->engine->vm_destroy(vm->engine_vm);
	if (vm->board)
		board_destroy(vm->board);
	console_unlisten(&vm->vsock);
	console_destroy(vm->hvc);
	console_destroy(vm->console); /* after the serial port, which gives out what it still holds */
	boot_close(&vm->boot_files);
	if (vm->has_memory)
		memory_destroy(&vm->memory);
	if (vm->signal_fd >= 0)
		close(vm->signal_fd);
	if (vm->loop)
		loop_destroy(vm->loop);
	jail_forget(vm->jail);
	pthread_cond_destroy(&vm->resumed);
	pthread_mutex_destroy(&vm->lock);
	free(vm);
	return result;
}
