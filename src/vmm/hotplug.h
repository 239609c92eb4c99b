/* Disks and networks of a running machine: coming, going, limits; and all devices stopped and set going together. On
 * the loop's thread, or before it runs. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "base/token_bucket.h"

struct vm;
struct vmm_disk;
struct vmm_net;
struct virtio_device;

/* Opens the back end and puts its device on the board in slot `index` of vm->disk or vm->net, which is free. What
 * `wanted` points to need not stay. */
int vm_open_disk(struct vm *vm, unsigned index, const struct vmm_disk *wanted, struct error *err);
int vm_open_net(struct vm *vm, unsigned index, const struct vmm_net *wanted, struct error *err);

/* While the guest runs: *index is the one chosen; the guest is told. */
int vm_add_disk(struct vm *vm, const struct vmm_disk *wanted, unsigned *index, struct error *err);
int vm_add_net(struct vm *vm, const struct vmm_net *wanted, unsigned *index, struct error *err);
/* Asks the guest to let go of the device; it is removed when the guest does (VM_EVENT_REMOVED), or at a reset. */
int vm_ask_removal(struct vm *vm, struct virtio_device *device, struct error *err);

/* "disk0" or "net0", as the control socket names them; NULL if there is none of that name. */
struct virtio_device *vm_find_device(struct vm *vm, const char *name);

/* No device has anything in flight any more, nor begins (slots: bit n is PCI slot n; or VM_ALL_DEVICES). false: not
 * yet, ask again. */
#define VM_ALL_DEVICES UINT32_MAX
bool vm_devices_quiet(struct vm *vm, uint32_t slots);
void vm_devices_resume(struct vm *vm);
/* The guest has let go of these PCI slots; the devices are quiet and the vCPUs stopped. Other devices than disks and
 * networks stay. */
void vm_remove_slots(struct vm *vm, uint32_t slots);
/* Slots whose removal was asked for and has not happened. */
uint32_t vm_removals_asked(const struct vm *vm);

/* Takes all disks and networks off and closes them; the first error of a disk that could not be written back. */
int vm_close_all(struct vm *vm, struct error *err);
