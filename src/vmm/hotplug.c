/* Disks and networks of a machine: see hotplug.h. */
#include "vmm/hotplug.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "disk/disk.h"
#include "vmm/terminal.h"
#include "vmm/vm.h"

/* ---- coming ---- */

int vm_open_disk(struct vm *vm, unsigned index, const struct vmm_disk *wanted, struct error *err)
{
	struct vm_disk *d = &vm->disk[index];
	struct virtio_blk_options options = {
		.queues = min(vm->cpus, (unsigned)VIRTIO_BLK_QUEUES_MAX), .serial = d->serial, .threads = &vm->threads};
	int result;

	d->path = strdup(wanted->path);
	if (!d->path)
		return error_errno(err, "disk %s", wanted->path);
	if (*wanted->serial)
		snprintf(d->serial, sizeof(d->serial), "%s", wanted->serial);
	else
		snprintf(d->serial, sizeof(d->serial), "hostel-disk-%u", index);
	d->limits = wanted->limits;
	result = disk_open(&d->disk, wanted->path, &wanted->options, err);
	if (result == 0) {
		result = virtio_blk_create(&d->device, vm->board, d->disk, &options, err);
		if (result < 0) {
			error_wrap(err, "--disk %s", wanted->path);
			disk_close(take_ptr(d->disk), NULL);
		}
	}
	if (result < 0) {
		free(take_ptr(d->path));
		return result;
	}
	virtio_blk_limit(d->device, &d->limits);
	return 0;
}

int vm_open_net(struct vm *vm, unsigned index, const struct vmm_net *wanted, struct error *err)
{
	struct vm_net *n = &vm->net[index];
	struct virtio_net_options options = {0}; /* a random MAC */
	int result;

	n->spec = strdup(wanted->spec);
	if (!n->spec)
		return error_errno(err, "network %s", wanted->spec);
	n->limits[0] = n->limits[1] = wanted->limits;
	if (wanted->has_mac)
		memcpy(options.mac, wanted->mac, sizeof(options.mac));
	result = net_open(&n->net, wanted->spec, vm->loop, err);
	if (result == 0)
		result = virtio_net_create(&n->device, vm->board, n->net, &options, err);
	if (result < 0) {
		error_wrap(err, "--net %s", wanted->spec);
		net_close(take_ptr(n->net));
		free(take_ptr(n->spec));
		return result;
	}
	virtio_net_limit(n->device, false, &wanted->limits);
	virtio_net_limit(n->device, true, &wanted->limits);
	return 0;
}

/* Opening a back end is what a jail is there to refuse. */
static int refuse_in_jail(const struct vm *vm, const char *what, struct error *err)
{
	if (!vm->config->jail)
		return 0;
	return error_set(err, EPERM, "%s: in a jail nothing can be opened any more; give it at the start", what);
}

int vm_add_disk(struct vm *vm, const struct vmm_disk *wanted, unsigned *index, struct error *err)
{
	unsigned i = 0;
	int result = refuse_in_jail(vm, wanted->path, err);

	if (result < 0)
		return result;
	while (i < VMM_DISKS_MAX && (vm->disk[i].device || vm->disk[i].disk))
		i++;
	if (i == VMM_DISKS_MAX)
		return error_set(
			err, ENOSPC, "disk %s: %d disks are the most; remove one first", wanted->path, VMM_DISKS_MAX);
	result = vm_open_disk(vm, i, wanted, err);
	if (result < 0)
		return result;
	*index = i;
	board_pci_added(vm->board, virtio_device_slot(vm->disk[i].device));
	return 0;
}

int vm_add_net(struct vm *vm, const struct vmm_net *wanted, unsigned *index, struct error *err)
{
	unsigned i = 0;
	int result = refuse_in_jail(vm, wanted->spec, err);

	if (result < 0)
		return result;
	while (i < VMM_NETS_MAX && vm->net[i].device)
		i++;
	if (i == VMM_NETS_MAX)
		return error_set(err, ENOSPC, "network %s: %d network devices are the most; remove one first",
			wanted->spec, VMM_NETS_MAX);
	result = vm_open_net(vm, i, wanted, err);
	if (result < 0)
		return result;
	*index = i;
	board_pci_added(vm->board, virtio_device_slot(vm->net[i].device));
	return 0;
}

/* ---- going ---- */

int vm_ask_removal(struct vm *vm, struct virtio_device *device, struct error *err)
{
	unsigned slot = virtio_device_slot(device);

	/* Asked again if it has not happened: the guest may have been too early in its life to hear. */
	vm->removals |= 1u << slot;
	board_pci_ask_removal(vm->board, slot);
	return 0;
}

uint32_t vm_removals_asked(const struct vm *vm)
{
	return vm->removals;
}

static void disk_removed(struct vm_disk *d)
{
	char name[16];

	if (d->close_error.code)
		terminal_say("hostel-vmm: %s\n", d->close_error.text);
	free(take_ptr(d->path));
	d->disk = NULL;
	snprintf(name, sizeof(name), "disk%u", (unsigned)(d - d->vm->disk));
	vm_tell(d->vm, VM_EVENT_REMOVED, name, d->close_error.code ? &d->close_error : NULL);
}

static void disk_closed(void *opaque)
{
	struct vm_disk *d = opaque;

	thread_join(&d->closer);
	disk_removed(d);
}

static void *closer_main(void *opaque)
{
	struct vm_disk *d = opaque;

	disk_close(d->disk, &d->close_error);
	loop_post(d->vm->loop, disk_closed, d);
	return NULL;
}

/* Writing back what is left may take its time, and the loop has others to serve. In a jail no thread can be made any
 * more; there it is done at once. */
static void remove_disk(struct vm *vm, struct vm_disk *d)
{
	virtio_device_destroy(take_ptr(d->device));
	d->vm = vm;
	d->close_error = (struct error){0};
	if (!vm->config->jail &&
		thread_start(&d->closer, &vm->threads, THREAD_WORKER, "disk closer", closer_main, d, NULL) == 0)
		return;
	disk_close(d->disk, &d->close_error);
	disk_removed(d);
}

static int close_disk(struct vm_disk *d, struct error *err)
{
	int result;

	if (d->closer.runs) { /* the loop has ended before it could hear */
		thread_join(&d->closer);
		d->disk = NULL;
		*err = d->close_error;
		free(take_ptr(d->path));
		return -err->code;
	}
	virtio_device_destroy(take_ptr(d->device));
	result = d->disk ? disk_close(take_ptr(d->disk), err) : 0;
	free(take_ptr(d->path));
	return result;
}

static void close_net(struct vm_net *n)
{
	virtio_device_destroy(take_ptr(n->device));
	net_close(take_ptr(n->net));
	free(take_ptr(n->spec));
}

void vm_remove_slots(struct vm *vm, uint32_t slots)
{
	char name[16];

	for (unsigned i = 0; i < VMM_DISKS_MAX; i++) {
		struct vm_disk *d = &vm->disk[i];

		if (!d->device || !(slots >> virtio_device_slot(d->device) & 1))
			continue;
		vm->removals &= ~(1u << virtio_device_slot(d->device));
		remove_disk(vm, d);
	}
	for (unsigned i = 0; i < VMM_NETS_MAX; i++) {
		struct vm_net *n = &vm->net[i];

		if (!n->device || !(slots >> virtio_device_slot(n->device) & 1))
			continue;
		vm->removals &= ~(1u << virtio_device_slot(n->device));
		close_net(n);
		snprintf(name, sizeof(name), "net%u", i);
		vm_tell(vm, VM_EVENT_REMOVED, name, NULL);
	}
}

int vm_close_all(struct vm *vm, struct error *err)
{
	int result = 0;

	for (unsigned i = 0; i < VMM_NETS_MAX; i++)
		close_net(&vm->net[i]);
	for (unsigned i = 0; i < VMM_DISKS_MAX; i++) {
		struct error why = {0};

		/* All are closed whatever one says; the first error is told. */
		if (close_disk(&vm->disk[i], &why) < 0 && result == 0) {
			if (err)
				*err = why;
			result = -why.code;
		}
	}
	return result;
}

/* ---- all of them ---- */

struct virtio_device *vm_find_device(struct vm *vm, const char *name)
{
	unsigned index;
	char rest;

	if (sscanf(name, "disk%u%c", &index, &rest) == 1 && index < VMM_DISKS_MAX)
		return vm->disk[index].device;
	if (sscanf(name, "net%u%c", &index, &rest) == 1 && index < VMM_NETS_MAX)
		return vm->net[index].device;
	return NULL;
}

static void each_device(struct vm *vm, void (*function)(struct virtio_device *device, void *opaque), void *opaque)
{
	for (unsigned i = 0; i < VMM_DISKS_MAX; i++)
		if (vm->disk[i].device)
			function(vm->disk[i].device, opaque);
	for (unsigned i = 0; i < VMM_NETS_MAX; i++)
		if (vm->net[i].device)
			function(vm->net[i].device, opaque);
	for (unsigned i = 0; i < vm->devices; i++)
		function(vm->device[i], opaque);
}

struct quiet {
	uint32_t slots;
	bool all;
};

static void quiesce_one(struct virtio_device *device, void *opaque)
{
	struct quiet *q = opaque;

	if ((q->slots >> virtio_device_slot(device) & 1) && !virtio_device_try_quiesce(device))
		q->all = false;
}

bool vm_devices_quiet(struct vm *vm, uint32_t slots)
{
	struct quiet q = {.slots = slots, .all = true};

	each_device(vm, quiesce_one, &q);
	return q.all;
}

static void resume_one(struct virtio_device *device, void *opaque)
{
	virtio_device_resume(device);
}

void vm_devices_resume(struct vm *vm)
{
	each_device(vm, resume_one, NULL);
}
