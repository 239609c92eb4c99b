/* Configuration as JSON: see config.h. */
#include "vmm/config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

/* A text that grows; NULL once memory has run out. */
struct text {
	char *bytes;
	size_t length;
	bool failed;
};

static void append(struct text *t, const char *from, bool double_commas)
{
	char *grown = t->failed ? NULL : realloc(t->bytes, t->length + 2 * strlen(from) + 1);

	if (!grown) {
		t->failed = true;
		return;
	}
	t->bytes = grown;
	for (; *from; from++) {
		t->bytes[t->length++] = *from;
		if (*from == ',' && double_commas)
			t->bytes[t->length++] = ',';
	}
	t->bytes[t->length] = '\0';
}

static int not_that(const char *option, struct error *err)
{
	return error_set(err, EINVAL,
		"\"%.50s\": give a text, a whole number, true, an object of such, or an array to repeat it", option);
}

/* A text or number as the command line has it. */
static int plain(const char *option, const json_t *value, char number[32], const char **text, struct error *err)
{
	*text = number;
	if (json_is_string(value))
		*text = json_string_value(value);
	else if (json_is_integer(value))
		snprintf(number, 32, "%lld", (long long)json_integer_value(value));
	else
		return not_that(option, err);
	return 0;
}

/* name=value, or the name or value alone. */
static int append_part(struct text *t, const char *option, const char *name, const json_t *value, struct error *err)
{
	bool positional = !strcmp(name, "path"), flag = json_is_true(value) && !positional;
	char number[32];
	const char *text = "";
	int result = 0;

	if (json_is_false(value))
		return 0;
	if (!flag)
		result = plain(option, value, number, &text, err);
	if (result < 0)
		return error_wrap(err, "\"%.50s\"", name);
	if (t->length)
		append(t, ",", false);
	if (!positional)
		append(t, name, true);
	if (!flag && !positional)
		append(t, "=", false);
	append(t, text, true);
	return 0;
}

/* What stands first on the command line may stand anywhere in an object. */
static bool comes_first(const char *name)
{
	return !strcmp(name, "path") || !strcmp(name, "user") || !strcmp(name, "tap");
}

static int joined(struct text *t, const char *option, json_t *object, struct error *err)
{
	for (int later = 0; later < 2; later++) {
		const char *name;
		json_t *value;

		json_object_foreach(object, name, value)
		{
			size_t n = json_is_array(value) ? json_array_size(value) : 1;
			int result = 0;

			if (comes_first(name) == later)
				continue;
			for (size_t i = 0; i < n && result == 0; i++)
				result = append_part(
					t, option, name, json_is_array(value) ? json_array_get(value, i) : value, err);
			if (result < 0)
				return result;
		}
	}
	return 0;
}

static int set_one(struct vmm_config *config, const char *option, const json_t *value, struct error *err)
{
	struct text t = {0};
	char number[32];
	const char *text = NULL;
	int result = 0;

	if (json_is_false(value))
		return 0;
	if (json_is_object(value)) {
		result = joined(&t, option, (json_t *)value, err);
	} else if (!json_is_true(value)) {
		result = plain(option, value, number, &text, err);
		if (result == 0)
			append(&t, text, false);
	}
	if (result == 0 && t.failed)
		result = error_set(err, ENOMEM, "\"%.50s\": no memory", option);
	if (result == 0)
		return vmm_config_apply(config, option, t.bytes, err); /* which keeps it */
	free(t.bytes);
	return result;
}

int vmm_config_set(struct vmm_config *config, const char *option, const json_t *value, struct error *err)
{
	int result = 0;

	if (!json_is_array(value))
		return set_one(config, option, value, err);
	for (size_t i = 0; i < json_array_size(value) && result == 0; i++)
		result = set_one(config, option, json_array_get(value, i), err);
	return result;
}

int vmm_config_load(struct vmm_config *config, const char *path, struct error *err)
{
	static const char *const not_here[] = {"config", "help", "version"};
	json_error_t where;
	json_t *object = json_load_file(path, JSON_REJECT_DUPLICATES, &where), *value;
	const char *name;
	int result = 0;

	if (!object)
		return json_error_code(&where) == json_error_cannot_open_file
			       ? error_set(err, errno ? errno : EIO, "--config %s: %s", path,
					 strerror(errno ? errno : EIO))
			       : error_set(err, EINVAL, "--config %s: line %d: %s", path, where.line, where.text);
	if (!json_is_object(object))
		result = error_set(
			err, EINVAL, "--config %s: give one JSON object, such as {\"kernel\": \"FILE\"}", path);
	json_object_foreach(object, name, value)
	{
		if (result < 0)
			break;
		for (unsigned i = 0; i < sizeof(not_here) / sizeof(not_here[0]); i++)
			if (!strcmp(name, not_here[i]))
				result = error_set(
					err, EINVAL, "--config %s: \"%s\" belongs on the command line", path, name);
		if (result == 0) {
			result = vmm_config_set(config, name, value, err);
			if (result < 0)
				error_wrap(err, "--config %s", path);
		}
	}
	json_decref(object);
	return result;
}
