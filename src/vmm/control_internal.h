/* Between the socket (control.c) and the methods (control_vm.c, control_devices.c). */
#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/loop.h"
#include "vmm/console_open.h"
#include "vmm/console_tap.h"
#include "vmm/control.h"
#include "vmm/control_rpc.h"

#define CONTROL_VERSION 1 /* of the methods and what they mean; grows when something is changed or taken away */
#define CONTROL_CLIENTS_MAX 16
#define CONTROL_LINE_MAX 65536	    /* bytes of a request */
#define CONTROL_OUTPUT_SLOW 65536   /* with more unread output no further request is taken from the client */
#define CONTROL_OUTPUT_MAX 1048576  /* with more the client is dropped: it listens to events but does not read */
#define CONTROL_ANSWER_NS 80000000u /* what is not done then is answered as under way: within 100 ms */

/* What a client waits for. */
enum control_wait { WAIT_NOTHING, WAIT_PAUSE, WAIT_STATISTICS };

struct control_client {
	struct control *control;
	int fd; /* -1: the place is free */
	char *input;
	size_t input_used, input_room;
	char *output;
	size_t output_at, output_end, output_room;
	bool ended;  /* has sent all it wants */
	bool broken; /* to be closed as soon as its output is written */
	bool events; /* wants to hear of them */
	bool serving;

	/* One request at a time is under way: later lines wait. */
	enum control_wait wait;
	json_t *wait_id; /* JSON null for a notification */
	struct loop_timer wait_timer;
	uint64_t wait_until;
	unsigned *wait_snapshots; /* of each vCPU, when statistics were asked for */

	bool attached; /* to the console: bytes both ways, no requests any more */
	struct console_tap tap;
};

struct control {
	struct vm *vm;
	struct console_socket socket;
	uint64_t started; /* clock_now() */
	struct control_client client[CONTROL_CLIENTS_MAX];
};

extern const struct rpc_method control_methods[];

/* Sends an object; takes it. NULL is nothing. */
void control_send(struct control_client *client, json_t *object);
/* Completes the request that the client waits for; result is taken. */
void control_complete(struct control_client *client, json_t *result);
/* To all that want events. params is taken. */
void control_announce(struct control *control, const char *event, json_t *params);
/* After the answer the connection carries the console. */
void control_attach(struct control_client *client);

/* control_vm.c: looks whether the client's wait is over, or its time is; sets wait_timer to look again. */
void control_look(struct control_client *client);
const char *control_state(const struct vm *vm);

/* control_devices.c */
int control_disk_add(struct rpc_call *call, json_t *params, json_t **result, struct error *err);
int control_net_add(struct rpc_call *call, json_t *params, json_t **result, struct error *err);
int control_remove(struct rpc_call *call, json_t *params, json_t **result, struct error *err);
int control_limit(struct rpc_call *call, json_t *params, json_t **result, struct error *err);
int control_balloon(struct rpc_call *call, json_t *params, json_t **result, struct error *err);
json_t *control_devices(struct vm *vm, bool counters);

/* The vm of a call whose context is a struct control_client. */
static inline struct vm *control_vm(const struct rpc_call *call)
{
	return ((struct control_client *)call->context)->control->vm;
}
