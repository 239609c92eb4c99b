/* JSON-RPC 2.0: see control_rpc.h. What arrives here is parsed by jansson, with its limit of depth; members are looked
 * at by type before use. */
#include "vmm/control_rpc.h"

#include <stdio.h>
#include <string.h>

#include "base/size.h"

/* ---- answers ---- */

json_t *rpc_result(json_t *id, json_t *result)
{
	return json_pack("{s:s, s:o, s:O}", "jsonrpc", "2.0", "result", result ? result : json_object(), "id", id);
}

json_t *rpc_error(json_t *id, int code, const char *message)
{
	/* Our own messages may quote what was sent, cut in the middle of a character: jansson would refuse that. */
	json_t *text = json_string(message);

	if (!text)
		text = json_string("the error's text cannot be shown: it quotes what is no UTF-8");
	return json_pack("{s:s, s:{s:i, s:o}, s:o}", "jsonrpc", "2.0", "error", "code", code, "message", text, "id",
		id ? json_incref(id) : json_null());
}

json_t *rpc_notification(const char *method, json_t *params)
{
	return json_pack("{s:s, s:s, s:o}", "jsonrpc", "2.0", "method", method, "params", params);
}

/* ---- parameters ---- */

/* Whether `list` ("a,b?,c") has the name; *optional if so. */
static bool in_list(const char *list, const char *name, size_t length, bool *optional)
{
	while (*list) {
		size_t n = strcspn(list, ",?");
		const char *behind = list + n;

		*optional = *behind == '?';
		if (n == length && !memcmp(list, name, n))
			return true;
		list = behind + (*behind == '?');
		list += *list == ',';
	}
	return false;
}

static int check_params(const struct rpc_method *method, json_t *params, struct error *err)
{
	const char *name;
	json_t *value;
	bool optional;

	json_object_foreach(params, name, value)
	{
		if (!in_list(method->params, name, strlen(name), &optional))
			return error_set(err, EINVAL, "%s: the parameter '%.100s' is unknown; it takes: %s",
				method->name, name, *method->params ? method->params : "none");
	}
	for (const char *at = method->params; *at;) {
		size_t n = strcspn(at, ",");
		bool needed = at[n - 1] != '?';
		char wanted[50];

		snprintf(wanted, sizeof(wanted), "%.*s", (int)(needed ? n : n - 1), at);
		if (needed && !json_object_get(params, wanted))
			return error_set(err, EINVAL, "%s: the parameter '%s' is missing", method->name, wanted);
		at += n + (at[n] == ',');
	}
	return 0;
}

int rpc_string(json_t *params, const char *name, const char **value, struct error *err)
{
	json_t *member = json_object_get(params, name);

	if (!member)
		return 0;
	if (!json_is_string(member) || !*json_string_value(member))
		return error_set(err, EINVAL, "%s: give a text that is not empty", name);
	*value = json_string_value(member);
	return 0;
}

int rpc_boolean(json_t *params, const char *name, bool *value, struct error *err)
{
	json_t *member = json_object_get(params, name);

	if (!member)
		return 0;
	if (!json_is_boolean(member))
		return error_set(err, EINVAL, "%s: give true or false", name);
	*value = json_is_true(member);
	return 0;
}

int rpc_size(json_t *params, const char *name, uint64_t *value, struct error *err)
{
	json_t *member = json_object_get(params, name);

	if (!member)
		return 0;
	if (json_is_integer(member) && json_integer_value(member) >= 0) {
		*value = (uint64_t)json_integer_value(member);
		return 0;
	}
	if (json_is_string(member))
		return size_parse(json_string_value(member), value, err) < 0 ? error_wrap(err, "%s", name) : 0;
	return error_set(err, EINVAL, "%s: give a whole number or a size such as \"512M\"", name);
}

/* ---- requests ---- */

static const struct rpc_method *find_method(const struct rpc_method *methods, const char *name)
{
	for (; methods->name; methods++)
		if (!strcmp(methods->name, name))
			return methods;
	return NULL;
}

static json_t *call_method(const struct rpc_method *method, struct rpc_call *call, json_t *params, json_t **later)
{
	struct error err = {0};
	json_t *result = NULL;
	int ret = check_params(method, params, &err);

	if (ret == 0)
		ret = method->handle(call, params, &result, &err);
	if (ret == RPC_LATER) {
		*later = call->id ? json_incref(call->id) : json_null();
		return NULL;
	}
	if (!call->id) {
		json_decref(result);
		return NULL;
	}
	if (ret < 0)
		return rpc_error(
			call->id, err.code == EINVAL || err.code == ERANGE ? RPC_PARAMS : RPC_FAILED, err.text);
	return rpc_result(call->id, result);
}

static json_t *handle_object(const struct rpc_method *methods, void *context, json_t *request, json_t **later)
{
	json_t *id = json_object_get(request, "id"), *name = json_object_get(request, "method");
	json_t *params = json_object_get(request, "params"), *empty, *answer;
	const char *version = json_string_value(json_object_get(request, "jsonrpc"));
	struct rpc_call call = {.context = context, .id = id};
	const struct rpc_method *method;
	char text[200];

	if (id && !json_is_string(id) && !json_is_number(id) && !json_is_null(id))
		return rpc_error(NULL, RPC_REQUEST, "id: give a text or a number");
	if (!version || strcmp(version, "2.0"))
		return rpc_error(id, RPC_REQUEST, "jsonrpc: give \"2.0\"");
	if (!json_is_string(name))
		return rpc_error(id, RPC_REQUEST, "method: give its name as a text");
	if (params && !json_is_object(params))
		return rpc_error(id, json_is_array(params) ? RPC_PARAMS : RPC_REQUEST,
			"params: give an object with named parameters");
	method = find_method(methods, json_string_value(name));
	if (!method) {
		if (!id)
			return NULL;
		snprintf(text, sizeof(text), "there is no method '%.100s'; 'methods' lists them",
			json_string_value(name));
		return rpc_error(id, RPC_METHOD, text);
	}
	empty = params ? NULL : json_object();
	answer = call_method(method, &call, params ? params : empty, later);
	json_decref(empty);
	return answer;
}

json_t *rpc_handle(const struct rpc_method *methods, void *context, const char *text, size_t length, json_t **later)
{
	json_error_t where;
	json_t *request = json_loadb(text, length, JSON_REJECT_DUPLICATES, &where), *answer;
	char message[300];

	*later = NULL;
	if (!request) {
		snprintf(message, sizeof(message), "not a JSON object on one line: %s, at byte %d", where.text,
			where.position);
		return rpc_error(NULL, RPC_PARSE, message);
	}
	if (json_is_object(request))
		answer = handle_object(methods, context, request, later);
	else
		answer = rpc_error(NULL, RPC_REQUEST,
			json_is_array(request) ? "batches are not taken; give one request a line"
					       : "give a JSON object");
	json_decref(request);
	return answer;
}
