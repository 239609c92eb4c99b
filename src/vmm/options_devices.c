/* Options of the smaller devices and of what the guest is told about itself. */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/size.h"
#include "base/util.h"
#include "vmm/options_internal.h"

#define CID_DEFAULT 3
#define NAME_LONGEST 64

int options_parse_balloon(struct vmm_config *config, const char *value, struct error *err)
{
	config->has_balloon = true;
	if (size_parse(value, &config->balloon, err) < 0)
		return error_wrap(err, "--balloon");
	return 0;
}

/* A whole number; what else stands there makes it -EINVAL. */
static int parse_cid(uint32_t *cid, const char *text)
{
	char *end;
	unsigned long long number;

	errno = 0;
	number = strtoull(text, &end, 10);
	if (*text < '0' || *text > '9' || *end || errno || number < 3 || number > 0xfffffffe)
		return -EINVAL;
	*cid = (uint32_t)number;
	return 0;
}

int options_parse_vsock(struct vmm_config *config, const char *value, struct error *err)
{
	const char *rest = value;

	free(config->vsock_path);
	config->vsock_path = options_next_part(&rest);
	config->vsock_cid = CID_DEFAULT;
	if (!*config->vsock_path)
		return error_set(err, EINVAL, "--vsock '%s': the path is missing; give --vsock PATH", value);
	while (rest) {
		scope_free char *part = options_next_part(&rest);

		if (strncmp(part, "cid=", 4) || parse_cid(&config->vsock_cid, part + 4) < 0)
			return error_set(err, EINVAL,
				"--vsock %s: '%s' is unknown; give cid=N, a number from 3 to 4294967294", value, part);
	}
	return 0;
}

int options_parse_virtio_console(struct vmm_config *config, const char *value, struct error *err)
{
	config->hvc_path = NULL;
	if (!strcmp(value, "stdio")) {
		config->hvc = VMM_SERIAL_STDIO;
	} else if (!strcmp(value, "none")) {
		config->hvc = VMM_SERIAL_NONE;
	} else if (!strncmp(value, "file=", 5) && value[5]) {
		config->hvc = VMM_SERIAL_FILE;
		config->hvc_path = value + 5;
	} else if (!strncmp(value, "socket=", 7) && value[7]) {
		config->hvc = VMM_SERIAL_SOCKET;
		config->hvc_path = value + 7;
	} else {
		return error_set(
			err, EINVAL, "--virtio-console %s: give stdio, none, file=PATH or socket=PATH", value);
	}
	config->has_hvc = true;
	return 0;
}

int options_parse_name(struct vmm_config *config, const char *value, struct error *err)
{
	size_t length = strlen(value);

	for (size_t i = 0; i < length; i++)
		if (value[i] < ' ' || value[i] > '~')
			return error_set(err, EINVAL, "--name %s: byte %zu is not a printable ASCII character", value, i + 1);
	if (length > NAME_LONGEST)
		return error_set(err, EINVAL, "--name %s: %zu characters; %d are the most", value, length, NAME_LONGEST);
	config->name = value;
	return 0;
}

int options_parse_uuid(struct vmm_config *config, const char *value, struct error *err)
{
	static const char digits[] = "0123456789abcdef", shape[] = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";
	unsigned nibbles = 0;
	uint8_t uuid[16] = {0};
	bool good = strlen(value) == sizeof(shape) - 1;

	for (size_t i = 0; good && i < sizeof(shape) - 1; i++) {
		const char *digit = strchr(digits, value[i] | 0x20);

		if (shape[i] == '-') {
			good = value[i] == '-';
			continue;
		}
		good = digit && *digit && value[i] >= '0';
		if (good)
			uuid[nibbles / 2] |= (digit - digits) << (nibbles % 2 ? 0 : 4);
		nibbles++;
	}
	if (!good)
		return error_set(err, EINVAL, "--uuid %s: give one such as 123e4567-e89b-42d3-a456-426614174000", value);
	memcpy(config->uuid, uuid, sizeof(uuid));
	config->has_uuid = true;
	return 0;
}

int options_parse_debug_exit(struct vmm_config *config, const char *value, struct error *err)
{
	config->debug_exit = true;
	return 0;
}

int options_parse_module(struct vmm_config *config, const char *value, struct error *err)
{
	const char *rest = value;
	struct boot_module *module = &config->module[config->modules];

	if (config->modules == BOOT_MODULES_MAX)
		return error_set(err, EINVAL, "--module %s: %d modules are the most; leave this one out", value,
			BOOT_MODULES_MAX);
	config->modules++;
	module->path = options_next_part(&rest);
	module->cmdline = rest ? rest : "";
	if (!*module->path)
		return error_set(err, EINVAL, "--module '%s': the file is missing; give --module FILE", value);
	return 0;
}

int options_parse_disk_serial(struct vmm_disk *disk, const char *text, const char *value, struct error *err)
{
	size_t length = strlen(text);

	for (size_t i = 0; i < length; i++)
		if (text[i] < ' ' || text[i] > '~')
			length = sizeof(disk->serial); /* refused like one that is too long */
	if (!length || length >= sizeof(disk->serial))
		return error_set(err, EINVAL,
			"--disk %s: serial number '%s'; give 1 to %zu printable ASCII characters", value, text,
			sizeof(disk->serial) - 1);
	strcpy(disk->serial, text);
	return 0;
}
