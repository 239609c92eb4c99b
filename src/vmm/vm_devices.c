/* The devices of a VM beside disks, networks and entropy: balloon, vsock, virtio console; and what the guest is told of
 * its identity. */
#include "vmm/vm.h"

#include <string.h>
#include <sys/random.h>

#include "vmm/terminal.h"

static int add_balloon(struct vm *vm, struct error *err)
{
	struct virtio_balloon_options options = {.target = vm->config->balloon};
	int result;

	if (vm->config->balloon >= vm->config->memory)
		return error_set(err, EINVAL,
			"--balloon: %llu MiB are to be given up of %llu MiB; give less, 0 to begin with none",
			(unsigned long long)vm->config->balloon >> 20, (unsigned long long)vm->config->memory >> 20);
	result = virtio_balloon_create(&vm->device[vm->devices], vm->board, &options, err);
	if (result == 0)
		vm->balloon = vm->device[vm->devices++];
	return result;
}

static int add_vsock(struct vm *vm, struct error *err)
{
	struct virtio_vsock_options options = {.cid = vm->config->vsock_cid, .path = vm->config->vsock_path};
	int result = console_listen(&vm->vsock, "--vsock ", vm->config->vsock_path, err);

	if (result < 0)
		return result;
	options.listener = vm->vsock.fd;
	result = virtio_vsock_create(&vm->device[vm->devices], vm->board, &options, err);
	if (result < 0)
		return error_wrap(err, "--vsock %s", vm->config->vsock_path);
	vm->devices++;
	return 0;
}

static int add_hvc(struct vm *vm, struct error *err)
{
	int result = virtio_console_create(&vm->device[vm->devices], vm->board, err);

	if (result == 0)
		vm->hvc_device = vm->device[vm->devices++];
	return result;
}

int vm_add_small_devices(struct vm *vm, struct error *err)
{
	int result = 0;

	if (vm->config->has_balloon)
		result = add_balloon(vm, err);
	if (result == 0 && vm->config->vsock_path)
		result = add_vsock(vm, err);
	if (result == 0 && vm->config->has_hvc)
		result = add_hvc(vm, err);
	return result;
}

/* ---- virtio console ---- */

static void hvc_set_output(void *port, size_t (*output)(void *opaque, const uint8_t *bytes, size_t n),
	void (*wait)(void *opaque), void *opaque)
{
	virtio_console_set_output(port, output, opaque);
}

static void hvc_set_room(void *port, void (*room)(void *opaque), void *opaque)
{
	virtio_console_set_room(port, room, opaque);
}

static size_t hvc_input(void *port, const uint8_t *bytes, size_t n)
{
	return virtio_console_input(port, bytes, n);
}

static void hvc_flush(void *port)
{
	virtio_console_flush(port);
}

struct console_port vm_hvc_port(struct vm *vm)
{
	return (struct console_port){.port = vm->hvc_device,
		.option = "--virtio-console",
		.set_output = hvc_set_output,
		.set_room = hvc_set_room,
		.input = hvc_input,
		.flush = hvc_flush};
}

/* ---- identity ---- */

int vm_make_identity(struct vm *vm, struct error *err)
{
	struct smbios_identity *i = &vm->identity;

	i->name = vm->config->name;
	memcpy(i->uuid, vm->config->uuid, sizeof(i->uuid));
	if (vm->config->has_uuid)
		return 0;
	if (getrandom(i->uuid, sizeof(i->uuid), 0) != sizeof(i->uuid))
		return error_errno(err, "--uuid: no random numbers for one");
	/* RFC 4122, section 4.4: version 4, variant 1 */
	i->uuid[6] = (i->uuid[6] & 0x0f) | 0x40;
	i->uuid[8] = (i->uuid[8] & 0x3f) | 0x80;
	return 0;
}

/* ---- what a guest's kernel says about itself ---- */

void vm_debug_exit(void *opaque, uint32_t value)
{
	struct vm *vm = opaque;
	int none = -1;

	/* The first word counts. As QEMU's device does: never 0, which would be a guest that powered off. */
	atomic_compare_exchange_strong(&vm->debug_exit, &none, (int)((value << 1 | 1) & 0xff));
	vm_stop(vm, VM_CAUSE_DEBUG_EXIT, NULL);
}

static void tell_panic(void *opaque)
{
	if (vm_may_say(opaque))
		terminal_say("hostel-vmm: the guest's kernel panicked\n");
	vm_tell(opaque, VM_EVENT_PANIC, NULL, NULL);
}

void vm_panicked(struct vm *vm)
{
	/* Once a start: a guest can say it as often as it likes. */
	if (!atomic_exchange(&vm->panicked, true))
		loop_post(vm->loop, tell_panic, vm);
}
