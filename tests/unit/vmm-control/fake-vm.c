/* A machine for tests: see fake-vm.h. */
#include "fake-vm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "disk/disk.h"
#include "engine/cpu_model.h"
#include "vmm/console.h"
#include "vmm/console_tap.h"
#include "vmm/control_internal.h"
#include "vmm/hotplug.h"
#include "vmm/resize.h"

struct fake_vm fake;

static const struct engine first = {.name = "first"};
const struct engine *const engines[] = {&first, NULL};
static struct vmm_config config = {.memory = 1 << 30};

/* What stands for devices and disks: only their addresses matter. */
static char things[8];

static struct virtio_device *device(unsigned i)
{
	return (struct virtio_device *)&things[i];
}

void fake_vm_create(void)
{
	memset(&fake, 0, sizeof(fake));
	fake.vm = calloc(1, sizeof(struct vm) + 2 * sizeof(struct vcpu));
	fake.vm->config = &config;
	fake.vm->engine = &first;
	fake.vm->cpus = 2;
	for (unsigned i = 0; i < 2; i++)
		pthread_mutex_init(&fake.vm->vcpu[i].snapshot_lock, NULL);
	if (loop_create(&fake.vm->loop, NULL) < 0)
		abort();
	fake.vm->disk[0] = (struct vm_disk){.disk = (struct disk *)&things[6], .device = device(0), .path = "a.img"};
	fake.vm->net[0] = (struct vm_net){.net = (struct net *)&things[7], .device = device(1), .spec = "user"};
	fake.vm->device[0] = device(2);
	fake.vm->device[1] = device(3);
	fake.vm->devices = 2;
}

void fake_vm_destroy(void)
{
	loop_destroy(fake.vm->loop);
	free(fake.vm);
}

/* ---- the machine ---- */

void vm_size(struct vm *vm, struct vm_size *size)
{
	*size = (struct vm_size){.cpus = vm->cpus,
		.cpus_max = 4,
		.memory = vm->config->memory,
		.memory_max = 2ull << 30,
		.memory_unit = 128 << 20};
}

int vm_set_cpus(struct vm *vm, unsigned wanted, struct error *err)
{
	if (wanted < 1 || wanted > 4)
		return error_set(err, ERANGE, "%u vCPUs: give from 1 to 4", wanted);
	vm->cpus = min(wanted, 2u); /* the others are not there in this fake */
	return 0;
}

int vm_set_memory(struct vm *vm, uint64_t wanted, struct error *err)
{
	return wanted % (128 << 20) ? error_set(err, ERANGE, "memory: give steps of 128 MiB") : 0;
}

void vm_pause(struct vm *vm)
{
	fake.pauses++;
	vm->pause_wanted = true;
	vm->paused = fake.pauses_at_once;
}

void vm_resume(struct vm *vm)
{
	fake.resumes++;
	vm->pause_wanted = vm->paused = false;
}

void vm_stop(struct vm *vm, enum vm_cause cause, const struct error *why)
{
	fake.stops++;
	fake.cause = cause;
}

void vcpu_call(struct vcpu *v, unsigned calls)
{
	fake.calls++;
}

char *vcpu_copy_snapshot(struct vcpu *v)
{
	return strdup("translations 7\nbad\nhalts 3\n");
}

void board_power_button(struct board *board)
{
	fake.buttons++;
}

int vm_add_disk(struct vm *vm, const struct vmm_disk *wanted, unsigned *index, struct error *err)
{
	fake.adds++;
	snprintf(fake.path, sizeof(fake.path), "%s", wanted->path);
	fake.limit = wanted->limits;
	*index = 0;
	return strcmp(wanted->path, "missing") ? 0 : error_set(err, ENOENT, "disk missing: it is not there");
}

int vm_add_net(struct vm *vm, const struct vmm_net *wanted, unsigned *index, struct error *err)
{
	fake.adds++;
	snprintf(fake.path, sizeof(fake.path), "%s", wanted->spec);
	*index = 0;
	return 0;
}

int vm_ask_removal(struct vm *vm, struct virtio_device *device, struct error *err)
{
	fake.removals++;
	return 0;
}

uint32_t vm_removals_asked(const struct vm *vm)
{
	return 2;
}

struct virtio_device *vm_find_device(struct vm *vm, const char *name)
{
	return !strcmp(name, "disk0") ? vm->disk[0].device : !strcmp(name, "net0") ? vm->net[0].device : NULL;
}

/* ---- devices ---- */

const char *virtio_device_type(const struct virtio_device *d)
{
	return d == device(0)	? "virtio-blk"
	       : d == device(1) ? "virtio-net"
	       : d == device(2) ? "virtio-rng"
				: "virtio-balloon";
}

unsigned virtio_device_slot(const struct virtio_device *d)
{
	return (unsigned)((const char *)d - things);
}

unsigned virtio_device_counters(const struct virtio_device *d, struct virtio_counter *counters)
{
	counters[0] = (struct virtio_counter){"reads", 5};
	return d == device(0);
}

void virtio_blk_limit(struct virtio_device *d, const struct rate_limits *limits)
{
	fake.limits++;
	fake.limit = *limits;
}

void virtio_net_limit(struct virtio_device *d, bool received, const struct rate_limits *limits)
{
	fake.limits++;
	fake.limit = *limits;
	fake.limit_received = received;
}

void virtio_balloon_set_target(struct virtio_device *d, uint64_t bytes)
{
	fake.targets++;
	fake.target = bytes;
}

void virtio_balloon_get(struct virtio_device *d, struct virtio_balloon_state *state)
{
	*state = (struct virtio_balloon_state){.target = fake.target, .actual = 4096, .told_at = 1};
}

uint64_t disk_size(const struct disk *disk)
{
	return 1 << 20;
}

bool disk_read_only(const struct disk *disk)
{
	return false;
}

const char *disk_format_name(const struct disk *disk)
{
	return "raw";
}

const struct cpu_model *cpu_model_find(const char *name, struct error *err)
{
	static const struct cpu_model host = {.name = "host"};

	if (!strcmp(name, "host"))
		return &host;
	error_set(err, EINVAL, "CPU model %s", name);
	return NULL;
}

/* ---- the console ---- */

void console_add_tap(struct console *console, struct console_tap *tap)
{
	fake.tap = tap;
}

void console_remove_tap(struct console *console, struct console_tap *tap)
{
	if (fake.tap == tap)
		fake.tap = NULL;
}

size_t console_type(struct console *console, const uint8_t *bytes, size_t n)
{
	n = min(n, sizeof(fake.typed) - fake.typed_length);
	memcpy(fake.typed + fake.typed_length, bytes, n);
	fake.typed_length += n;
	return n;
}
