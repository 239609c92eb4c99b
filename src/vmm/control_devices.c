/* The control socket's methods on devices: coming and going, limits, the balloon, and how they are shown. */
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "device/devices.h"
#include "vmm/config.h"
#include "vmm/control_internal.h"
#include "vmm/hotplug.h"

/* ---- how they are shown ---- */

static void show_rate(json_t *to, const char *name, const struct token_rate *rate)
{
	if (rate->rate)
		json_object_set_new(to, name,
			json_pack("{s:I, s:I}", "rate", (json_int_t)rate->rate, "burst",
				(json_int_t)(rate->burst ? rate->burst : rate->rate)));
}

static json_t *show_limits(const struct rate_limits *limits)
{
	json_t *o = json_object();

	show_rate(o, "bandwidth", &limits->bandwidth);
	show_rate(o, "operations", &limits->operations);
	return o;
}

static json_t *show_device(const struct virtio_device *device, bool counters)
{
	json_t *o =
		json_pack("{s:s, s:i}", "type", virtio_device_type(device), "slot", (int)virtio_device_slot(device));
	struct virtio_counter counter[VIRTIO_COUNTERS_MAX];
	unsigned n = counters ? virtio_device_counters(device, counter) : 0;
	json_t *values;

	if (!n)
		return o;
	values = json_object();
	for (unsigned i = 0; i < n; i++)
		json_object_set_new(values, counter[i].name, json_integer((json_int_t)counter[i].value));
	json_object_set_new(o, "counters", values);
	return o;
}

static void show_removal(json_t *o, const struct vm *vm, const struct virtio_device *device)
{
	if (vm_removals_asked(vm) >> virtio_device_slot(device) & 1)
		json_object_set_new(o, "removing", json_true());
}

/* A path is bytes; JSON takes only UTF-8. */
static void set_text(json_t *o, const char *name, const char *text)
{
	json_t *value = text ? json_string(text) : NULL;

	if (value)
		json_object_set_new(o, name, value);
}

json_t *control_devices(struct vm *vm, bool counters)
{
	json_t *all = json_object();
	char name[48];

	for (unsigned i = 0; i < VMM_DISKS_MAX; i++) {
		struct vm_disk *d = &vm->disk[i];
		json_t *o;

		if (!d->device)
			continue;
		o = show_device(d->device, counters);
		set_text(o, "path", d->path);
		set_text(o, "format", disk_format_name(d->disk));
		json_object_set_new(o, "size", json_integer((json_int_t)disk_size(d->disk)));
		json_object_set_new(o, "readonly", json_boolean(disk_read_only(d->disk)));
		json_object_set_new(o, "serial", json_string(d->serial));
		json_object_set_new(o, "limits", show_limits(&d->limits));
		show_removal(o, vm, d->device);
		snprintf(name, sizeof(name), "disk%u", i);
		json_object_set_new(all, name, o);
	}
	for (unsigned i = 0; i < VMM_NETS_MAX; i++) {
		struct vm_net *n = &vm->net[i];
		json_t *o;

		if (!n->device)
			continue;
		o = show_device(n->device, counters);
		set_text(o, "net", n->spec);
		json_object_set_new(o, "limits",
			json_pack("{s:o, s:o}", "send", show_limits(&n->limits[0]), "receive",
				show_limits(&n->limits[1])));
		show_removal(o, vm, n->device);
		snprintf(name, sizeof(name), "net%u", i);
		json_object_set_new(all, name, o);
	}
	for (unsigned i = 0; i < vm->devices; i++) {
		const char *type = virtio_device_type(vm->device[i]);

		/* There is one of each kind. */
		json_object_set_new(
			all, !strncmp(type, "virtio-", 7) ? type + 7 : type, show_device(vm->device[i], counters));
	}
	return all;
}

/* ---- coming and going ---- */

static json_t *added(const char *kind, unsigned index, const struct virtio_device *device)
{
	char name[16];

	snprintf(name, sizeof(name), "%s%u", kind, index);
	return json_pack("{s:s, s:i}", "device", name, "slot", (int)virtio_device_slot(device));
}

int control_disk_add(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	struct vm *vm = control_vm(call);
	__attribute__((cleanup(vmm_config_free))) struct vmm_config wanted = {0};
	unsigned index;
	int ret = vmm_config_set(&wanted, "disk", json_object_get(params, "disk"), err);

	if (ret < 0)
		return ret;
	if (wanted.disks != 1)
		return error_set(err, EINVAL, "disk: give one");
	ret = vm_add_disk(vm, &wanted.disk[0], &index, err);
	if (ret == 0)
		*result = added("disk", index, vm->disk[index].device);
	return ret;
}

int control_net_add(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	struct vm *vm = control_vm(call);
	__attribute__((cleanup(vmm_config_free))) struct vmm_config wanted = {0};
	unsigned index;
	int ret = vmm_config_set(&wanted, "net", json_object_get(params, "net"), err);

	if (ret < 0)
		return ret;
	if (wanted.nets != 1)
		return error_set(err, EINVAL, "net: give one");
	ret = vm_add_net(vm, &wanted.net[0], &index, err);
	if (ret == 0)
		*result = added("net", index, vm->net[index].device);
	return ret;
}

static int find(struct rpc_call *call, json_t *params, struct virtio_device **device, struct error *err)
{
	const char *name = "";
	int ret = rpc_string(params, "device", &name, err);

	if (ret < 0)
		return ret;
	*device = vm_find_device(control_vm(call), name);
	if (!*device)
		return error_set(err, EINVAL,
			"device: there is no '%.50s'; 'status' lists them, such as \"disk0\", \"net0\"", name);
	return 0;
}

int control_remove(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	struct virtio_device *device;
	int ret = find(call, params, &device, err);

	return ret < 0 ? ret : vm_ask_removal(control_vm(call), device, err);
}

/* ---- limits ---- */

static int change_rate(json_t *params, const char *name, struct token_rate *rate, struct error *err)
{
	char burst[40];
	int ret = rpc_size(params, name, &rate->rate, err);

	snprintf(burst, sizeof(burst), "%s-burst", name);
	if (ret < 0)
		return ret;
	if (json_object_get(params, name))
		rate->burst = 0;
	return rpc_size(params, burst, &rate->burst, err);
}

static int change_limits(json_t *params, struct rate_limits *limits, struct error *err)
{
	int ret = change_rate(params, "bandwidth", &limits->bandwidth, err);

	return ret < 0 ? ret : change_rate(params, "operations", &limits->operations, err);
}

static int change_net(struct vm_net *n, json_t *params, json_t **result, struct error *err)
{
	const char *direction = NULL;
	int ret = rpc_string(params, "direction", &direction, err);

	if (ret == 0 && direction && strcmp(direction, "send") && strcmp(direction, "receive"))
		return error_set(err, EINVAL, "direction: give \"send\" (what the guest sends) or \"receive\"");
	for (unsigned i = 0; i < 2 && ret == 0; i++) {
		struct rate_limits limits = n->limits[i];

		if (direction && strcmp(direction, i ? "receive" : "send"))
			continue;
		ret = change_limits(params, &limits, err);
		if (ret < 0)
			break;
		n->limits[i] = limits;
		virtio_net_limit(n->device, i, &limits);
	}
	if (ret == 0)
		*result = json_pack(
			"{s:o, s:o}", "send", show_limits(&n->limits[0]), "receive", show_limits(&n->limits[1]));
	return ret;
}

static int change_disk(struct vm_disk *d, json_t *params, json_t **result, struct error *err)
{
	struct rate_limits limits = d->limits;
	int ret = change_limits(params, &limits, err);

	if (ret == 0 && json_object_get(params, "direction"))
		return error_set(err, EINVAL, "direction: only networks have one");
	if (ret < 0)
		return ret;
	d->limits = limits;
	virtio_blk_limit(d->device, &limits);
	*result = show_limits(&limits);
	return 0;
}

int control_limit(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	struct vm *vm = control_vm(call);
	struct virtio_device *device;
	int ret = find(call, params, &device, err);

	if (ret < 0)
		return ret;
	for (unsigned i = 0; i < VMM_DISKS_MAX; i++)
		if (vm->disk[i].device == device)
			return change_disk(&vm->disk[i], params, result, err);
	for (unsigned i = 0; i < VMM_NETS_MAX; i++)
		if (vm->net[i].device == device)
			return change_net(&vm->net[i], params, result, err);
	return error_set(err, EINVAL, "device: only disks and networks have limits");
}

/* ---- balloon ---- */

static struct virtio_device *find_type(struct vm *vm, const char *type)
{
	for (unsigned i = 0; i < vm->devices; i++)
		if (!strcmp(virtio_device_type(vm->device[i]), type))
			return vm->device[i];
	return NULL;
}

int control_balloon(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	static const char *const names[BALLOON_STATISTICS] = {[BALLOON_SWAP_IN] = "swap_in",
		[BALLOON_SWAP_OUT] = "swap_out",
		[BALLOON_MAJOR_FAULTS] = "major_faults",
		[BALLOON_MINOR_FAULTS] = "minor_faults",
		[BALLOON_FREE] = "free",
		[BALLOON_TOTAL] = "total",
		[BALLOON_AVAILABLE] = "available",
		[BALLOON_CACHES] = "caches",
		[BALLOON_HUGETLB_ALLOCATIONS] = "hugetlb_allocations",
		[BALLOON_HUGETLB_FAILURES] = "hugetlb_failures"};
	struct vm *vm = control_vm(call);
	struct virtio_device *balloon = find_type(vm, "virtio-balloon");
	struct virtio_balloon_state state;
	uint64_t target = 0;
	json_t *guest = json_object();
	int ret = rpc_size(params, "target", &target, err);

	if (ret == 0 && !balloon)
		ret = error_set(err, ENODEV, "balloon: this machine has none; start it with --balloon");
	if (ret == 0 && target > vm->config->memory)
		ret = error_set(err, EINVAL, "target: %llu bytes; the guest has %llu", (unsigned long long)target,
			(unsigned long long)vm->config->memory);
	if (ret < 0) {
		json_decref(guest);
		return ret;
	}
	if (json_object_get(params, "target"))
		virtio_balloon_set_target(balloon, target);
	virtio_balloon_get(balloon, &state);
	for (unsigned i = 0; i < BALLOON_STATISTICS && state.told_at; i++)
		if (state.statistics[i] != BALLOON_UNKNOWN && names[i])
			json_object_set_new(guest, names[i], json_integer((json_int_t)state.statistics[i]));
	*result = json_pack("{s:I, s:I, s:I, s:o}", "target", (json_int_t)state.target, "actual",
		(json_int_t)state.actual, "reported", (json_int_t)state.reported, "guest", guest);
	return 0;
}
