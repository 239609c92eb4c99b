/* The control socket's parser and every method behind it: each line of the input is a request, as a client would send
 * it; behind a first byte of 'c' the input is a configuration file's text instead. The machine is one that does nothing
 * (tests/unit/vmm-control/fake-vm.h). */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../tests/unit/vmm-control/fake-vm.h"
#include "vmm/config.h"
#include "vmm/control_internal.h"

static void request(struct control_client *client, const char *line, size_t length)
{
	json_t *later, *answer = rpc_handle(control_methods, client, line, length, &later);
	char *text = answer ? json_dumps(answer, JSON_COMPACT) : NULL;

	/* An answer is one line of JSON, whatever was asked. */
	if (answer && (!text || strchr(text, '\n')))
		abort();
	free(text);
	json_decref(answer);
	json_decref(later);
	free(client->wait_snapshots);
	client->wait_snapshots = NULL;
	if (client->attached) {
		console_remove_tap(NULL, &client->tap);
		console_tap_release(&client->tap);
		client->attached = false;
	}
}

static void configuration(const uint8_t *data, size_t size)
{
	json_t *object = json_loadb((const char *)data, size, JSON_REJECT_DUPLICATES, NULL), *value;
	struct vmm_config config = {0};
	struct error err = {0};
	const char *name;

	json_object_foreach(object, name, value)
	{
		/* Files are not this fuzzer's business. */
		if (strcmp(name, "config") && vmm_config_set(&config, name, value, &err) < 0)
			break;
	}
	vmm_config_free(&config);
	json_decref(object);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct control control;
	static struct control_client client;

	if (!control.vm) {
		fake_vm_create();
		control.vm = fake.vm;
		client.control = &control;
		client.fd = -1;
	}
	fake.typed_length = 0;
	if (size && data[0] == 'c') {
		configuration(data + 1, size - 1);
		return 0;
	}
	while (size) {
		const uint8_t *end = memchr(data, '\n', size);
		size_t length = end ? (size_t)(end - data) : size;

		request(&client, (const char *)data, length);
		data += length + (end != NULL);
		size -= length + (end != NULL);
	}
	return 0;
}
