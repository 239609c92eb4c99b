/* The control socket's methods on the machine as a whole: its state, life, statistics. docs/control.md is their
 * manual. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "vmm/control_internal.h"
#include "vmm/hotplug.h"
#include "vmm/resize.h"

#define LOOK_PERIOD 1000000u /* ns between looks at what is waited for */

const char *control_state(const struct vm *vm)
{
	switch ((enum vm_phase)atomic_load(&vm->phase)) {
	case VM_RUNNING:
		return "running";
	case VM_STOPPING:
		return vm->paused ? "paused" : vm->pause_wanted ? "pausing" : "running"; /* a reset, or an eject */
	case VM_ENDING:
		break;
	}
	return "ending";
}

static void show_size(json_t *to, struct vm *vm)
{
	struct vm_size size;

	vm_size(vm, &size);
	json_object_set_new(to, "cpus", json_integer(size.cpus));
	json_object_set_new(to, "cpus-max", json_integer(size.cpus_max));
	json_object_set_new(to, "memory", json_integer((json_int_t)size.memory));
	json_object_set_new(to, "memory-max", json_integer((json_int_t)size.memory_max));
	if (size.memory_unit)
		json_object_set_new(to, "memory-unit", json_integer((json_int_t)size.memory_unit));
}

static int methods(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	json_t *list = json_object();

	for (const struct rpc_method *m = control_methods; m->name; m++)
		json_object_set_new(list, m->name, json_string(m->params));
	*result = json_pack("{s:i, s:o}", "version", CONTROL_VERSION, "methods", list);
	return 0;
}

static int status(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	struct control_client *client = call->context;
	struct vm *vm = client->control->vm;

	*result = json_pack("{s:i, s:s, s:s, s:s, s:i, s:I, s:f, s:o}", "version", CONTROL_VERSION, "program",
		HOSTEL_VERSION, "state", control_state(vm), "engine", vm->engine->name, "cpus", (int)vm->cpus, "memory",
		(json_int_t)vm->config->memory, "uptime", (double)(clock_now() - client->control->started) / 1e9,
		"devices", control_devices(vm, false));
	show_size(*result, vm);
	return 0;
}

/* ---- life ---- */

static json_t *state_now(struct vm *vm)
{
	return json_pack("{s:s}", "state", control_state(vm));
}

static int pause_guest(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	struct control_client *client = call->context;
	struct vm *vm = client->control->vm;

	vm_pause(vm);
	if (!vm->paused) {
		client->wait = WAIT_PAUSE;
		return RPC_LATER;
	}
	*result = state_now(vm);
	return 0;
}

static int resume_guest(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	vm_resume(control_vm(call));
	*result = json_pack("{s:s}", "state", "running");
	return 0;
}

static int power_button(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	board_power_button(control_vm(call)->board);
	return 0;
}

static int reset(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	vm_stop(control_vm(call), VM_CAUSE_RESET, NULL);
	return 0;
}

static int quit(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	vm_stop(control_vm(call), VM_CAUSE_LEAVE, NULL);
	return 0;
}

static int attach(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	struct control_client *client = call->context;

	if (!call->id)
		return 0; /* the client could not tell where the console begins */
	/* From here on the client's bytes are the console's; the answer goes out first, since nothing else can before
	 * the loop turns. */
	control_attach(client);
	return 0;
}

static int events(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	struct control_client *client = call->context;
	bool on = true;
	int ret = rpc_boolean(params, "on", &on, err);

	if (ret < 0)
		return ret;
	client->events = on;
	*result = state_now(client->control->vm);
	return 0;
}

/* What is added is there at once; what is taken away goes when the guest lets go of it: the event "removed" says so, or
 * "refused". The answer is what there is now. */
static int resize(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	struct vm *vm = control_vm(call);
	uint64_t cpus = 0, memory = 0;
	int ret = rpc_size(params, "cpus", &cpus, err);

	if (ret == 0)
		ret = rpc_size(params, "memory", &memory, err);
	if (ret == 0 && json_object_get(params, "cpus"))
		ret = vm_set_cpus(vm, cpus > VMM_CPUS_MAX ? VMM_CPUS_MAX + 1 : (unsigned)cpus, err);
	if (ret == 0 && json_object_get(params, "memory"))
		ret = vm_set_memory(vm, memory, err);
	if (ret < 0)
		return ret;
	*result = json_object();
	show_size(*result, vm);
	return 0;
}

/* ---- statistics ---- */

static uint64_t thread_time(const struct vcpu *v)
{
	struct timespec spent;
	clockid_t clock;

	if (!v->thread.runs || pthread_getcpuclockid(v->thread.id, &clock) || clock_gettime(clock, &spent) < 0)
		return 0;
	return (uint64_t)spent.tv_sec * 1000000000 + (uint64_t)spent.tv_nsec;
}

/* The engine's text, one "name value" a line, as an object. */
static json_t *engine_counters(struct vcpu *v)
{
	scope_free char *text = vcpu_copy_snapshot(v);
	json_t *counters = json_object();
	char *rest = text, *line;

	while (text && (line = strsep(&rest, "\n"))) {
		char *space = strchr(line, ' ');

		if (!space)
			continue;
		*space = '\0';
		json_object_set_new(counters, line, json_integer(strtoll(space + 1, NULL, 10)));
	}
	return counters;
}

static json_t *vcpu_statistics(struct vcpu *v, bool fresh)
{
	static const char *const names[ENGINE_EXIT_REASONS] = {[ENGINE_EXIT_KICKED] = "kicked",
		[ENGINE_EXIT_HALTED] = "halted",
		[ENGINE_EXIT_TRIPLE_FAULT] = "triple_fault",
		[ENGINE_EXIT_STEPPED] = "stepped",
		[ENGINE_EXIT_EXCEPTION] = "exception",
		[ENGINE_EXIT_ERROR] = "error"};
	json_t *exits = json_object();

	for (unsigned i = 0; i < ENGINE_EXIT_REASONS; i++) {
		uint64_t n = atomic_load_explicit(&v->exits[i], memory_order_relaxed);

		if (n || i == ENGINE_EXIT_KICKED || i == ENGINE_EXIT_HALTED)
			json_object_set_new(exits, names[i], json_integer((json_int_t)n));
	}
	return json_pack("{s:I, s:o, s:o, s:b}", "time_ns", (json_int_t)thread_time(v), "exits", exits, "engine",
		engine_counters(v), "fresh", fresh);
}

static bool has_answered(const struct control_client *client, unsigned i)
{
	return atomic_load(&client->control->vm->vcpu[i].snapshots) != client->wait_snapshots[i];
}

static json_t *all_statistics(struct control_client *client)
{
	struct vm *vm = client->control->vm;
	json_t *vcpus = json_array();

	for (unsigned i = 0; i < vm->cpus; i++)
		json_array_append_new(vcpus, vcpu_statistics(&vm->vcpu[i], vm->paused || has_answered(client, i)));
	return json_pack("{s:s, s:f, s:o, s:o}", "state", control_state(vm), "uptime",
		(double)(clock_now() - client->control->started) / 1e9, "vcpus", vcpus, "devices",
		control_devices(vm, true));
}

/* The engine's counters are the vCPU thread's own: each is asked to copy them, and the answer waits a moment for that.
 * A paused one has done so before it stopped. */
static int statistics(struct rpc_call *call, json_t *params, json_t **result, struct error *err)
{
	struct control_client *client = call->context;
	struct vm *vm = client->control->vm;

	client->wait_snapshots = calloc(vm->cpus, sizeof(*client->wait_snapshots));
	if (!client->wait_snapshots)
		return error_set(err, ENOMEM, "statistics: no memory");
	for (unsigned i = 0; i < vm->cpus; i++) {
		client->wait_snapshots[i] = atomic_load(&vm->vcpu[i].snapshots);
		vcpu_call(&vm->vcpu[i], VCPU_CALL_SNAPSHOT);
	}
	client->wait = WAIT_STATISTICS;
	return RPC_LATER;
}

/* ---- what is waited for ---- */

static bool is_over(struct control_client *client)
{
	struct vm *vm = client->control->vm;

	if (clock_now() >= client->wait_until)
		return true;
	if (client->wait == WAIT_PAUSE)
		return vm->paused || !vm->pause_wanted;
	for (unsigned i = 0; i < vm->cpus && !vm->paused; i++)
		if (!has_answered(client, i))
			return false;
	return true;
}

void control_look(struct control_client *client)
{
	struct vm *vm = client->control->vm;

	if (!is_over(client))
		loop_timer_set(vm->loop, &client->wait_timer,
			client->wait == WAIT_PAUSE ? client->wait_until : clock_now() + LOOK_PERIOD);
	else
		control_complete(client, client->wait == WAIT_PAUSE ? state_now(vm) : all_statistics(client));
}

const struct rpc_method control_methods[] = {
	{"methods", "", methods},
	{"status", "", status},
	{"pause", "", pause_guest},
	{"resume", "", resume_guest},
	{"power-button", "", power_button},
	{"reset", "", reset},
	{"quit", "", quit},
	{"console-attach", "", attach},
	{"events", "on?", events},
	{"statistics", "", statistics},
	{"disk-add", "disk", control_disk_add},
	{"net-add", "net", control_net_add},
	{"device-remove", "device", control_remove},
	{"limit", "device,direction?,bandwidth?,bandwidth-burst?,operations?,operations-burst?", control_limit},
	{"balloon", "target?", control_balloon},
	{"resize", "cpus?,memory?", resize},
	{0},
};
