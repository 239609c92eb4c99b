/* JSON-RPC 2.0 (jsonrpc.org/specification): requests taken apart, handed to a table of methods, answered. Knows nothing
 * of sockets or machines. */
#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

/* Error codes; those below -32099 are the specification's. */
enum rpc_code {
	RPC_PARSE = -32700,
	RPC_REQUEST = -32600,
	RPC_METHOD = -32601,
	RPC_PARAMS = -32602,
	RPC_FAILED = -32000, /* the host could not do what was rightly asked for */
};

#define RPC_LATER 1 /* a handler's: the answer comes by rpc_result() */

struct rpc_call {
	void *context; /* as given to rpc_handle() */
	json_t *id;    /* NULL: a notification, which is not answered */
};

struct rpc_method {
	const char *name;
	const char *params; /* the members it takes, "device?,bandwidth"; those with ? may be missing; "" none */
	/* params: an object, never NULL, with no member but those. 0: *result, which is then the caller's, or NULL for
	 * {}; RPC_LATER; or -errno with err: EINVAL and ERANGE blame the parameters, all others the host. */
	int (*handle)(struct rpc_call *call, json_t *params, json_t **result, struct error *err);
};

/* Answers one line of text. methods end with a name of NULL. The answer, which is the caller's, or NULL: there is none,
 * or a handler said RPC_LATER: then *later is its id, which is the caller's (JSON null for a notification). */
json_t *rpc_handle(const struct rpc_method *methods, void *context, const char *text, size_t length, json_t **later);

json_t *rpc_result(json_t *id, json_t *result);		      /* takes result; not id */
json_t *rpc_error(json_t *id, int code, const char *message); /* id NULL: null */
json_t *rpc_notification(const char *method, json_t *params); /* takes params */

/* Members of params; absent ones leave *value as it is. -EINVAL with a message that names the member. */
int rpc_string(json_t *params, const char *name, const char **value, struct error *err);
int rpc_boolean(json_t *params, const char *name, bool *value, struct error *err);
/* A whole number, or a text such as "512M" (base/size.h). */
int rpc_size(json_t *params, const char *name, uint64_t *value, struct error *err);
