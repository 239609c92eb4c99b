/* hostel-vmm's command line. Every option is one line of the table at the end, which also makes --help. */
#include "net/net.h"
#include "vmm/options.h"

#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/size.h"
#include "base/util.h"
#include "engine/cpu_model.h"
#include "engine/engine.h"
#include "vmm/config.h"
#include "vmm/options_internal.h"

#define MEMORY_DEFAULT (512ull << 20)
/* Ids that nobody hands out: above what systemd knows of (its UIDS-GIDS page), below 2^31, which old programs fear. */
#define JAIL_FIRST_ID 1900000000u
#define JAIL_LAST_ID 1900065535u
#define MEMORY_LEAST (16ull << 20)
#define MEMORY_MOST (256ull << 30) /* the board keeps 512 GiB and up for 64-bit PCI windows */

static int parse_engine(struct vmm_config *config, const char *value, struct error *err)
{
	char names[200] = "auto";

	config->engine = NULL;
	if (!strcmp(value, "auto"))
		return 0;
	for (const struct engine *const *engine = engines; *engine; engine++) {
		size_t used = strlen(names);

		if (!strcmp(value, (*engine)->name)) {
			config->engine = *engine;
			return 0;
		}
		snprintf(names + used, sizeof(names) - used, ", %s", (*engine)->name);
	}
	return error_set(err, EINVAL, "--engine %s: there is no such engine; give one of: %s", value, names);
}

static int parse_cpu(struct vmm_config *config, const char *value, struct error *err)
{
	config->cpu = cpu_model_find(value, err);
	if (!config->cpu)
		return error_wrap(err, "--cpu");
	return 0;
}

/* What stands behind the number, or NULL when there is none in range. */
static const char *parse_cpu_number(const char *value, unsigned *cpus)
{
	char *end;
	unsigned long number;

	errno = 0;
	number = strtoul(value, &end, 10);
	if (value[0] < '0' || value[0] > '9' || errno || number < 1 || number > VMM_CPUS_MAX)
		return NULL;
	*cpus = (unsigned)number;
	return end;
}

static int parse_cpus(struct vmm_config *config, const char *value, struct error *err)
{
	const char *rest = parse_cpu_number(value, &config->cpus);

	config->cpus_change = rest && !strncmp(rest, ",max=", 5);
	config->cpus_max = config->cpus;
	if (config->cpus_change)
		rest = parse_cpu_number(rest + 5, &config->cpus_max);
	if (!rest || *rest)
		return error_set(err, EINVAL,
			"--cpus %s: give a whole number from 1 to %d, and perhaps ,max= and another", value,
			VMM_CPUS_MAX);
	if (config->cpus_max < config->cpus)
		return error_set(err, EINVAL, "--cpus %s: max= is less than what is there from the beginning", value);
	return 0;
}

static int parse_memory(struct vmm_config *config, const char *value, struct error *err)
{
	const char *comma = strchr(value, ',');
	scope_free char *size = strndup(value, comma ? (size_t)(comma - value) : strlen(value));

	if (!size)
		return error_errno(err, "--memory %s", value);
	if (size_parse(size, &config->memory, err) < 0)
		return error_wrap(err, "--memory");
	config->memory_max = config->memory;
	if (comma && strncmp(comma, ",max=", 5))
		return error_set(err, EINVAL, "--memory %s: '%s' is unknown; give SIZE or SIZE,max=SIZE", value, comma + 1);
	if (comma && size_parse(comma + 5, &config->memory_max, err) < 0)
		return error_wrap(err, "--memory max=");
	if (config->memory_max < config->memory || config->memory_max > MEMORY_MOST)
		return error_set(err, EINVAL, "--memory %s: give a max= from the size to 256G", value);
	if (config->memory < MEMORY_LEAST || config->memory > MEMORY_MOST)
		return error_set(err, EINVAL, "--memory %s: give from 16M to 256G", value);
	if (config->memory % 4096)
		return error_set(err, EINVAL, "--memory %s: give a multiple of 4096 bytes, such as %lluM", value,
			(unsigned long long)align_up(config->memory, 1 << 20) >> 20);
	return 0;
}

static int parse_kernel(struct vmm_config *config, const char *value, struct error *err)
{
	config->kernel = value;
	return 0;
}

static int parse_initrd(struct vmm_config *config, const char *value, struct error *err)
{
	config->initrd = value;
	return 0;
}

static int parse_cmdline(struct vmm_config *config, const char *value, struct error *err)
{
	config->cmdline = value;
	return 0;
}

char *options_next_part(const char **text)
{
	const char *from = *text;
	char *part, *to;

	if (!from)
		return NULL;
	part = to = malloc(strlen(from) + 1);
	if (!part)
		abort(); /* some bytes at the start of the program: nothing sensible is left to do */
	for (;; from++) {
		if (from[0] == ',' && from[1] == ',')
			from++;
		else if (!*from || *from == ',')
			break;
		*to++ = *from;
	}
	*to = '\0';
	*text = *from ? from + 1 : NULL;
	return part;
}

/* bandwidth=RATE[:BURST] and operations=RATE[:BURST]; 0: the part is neither. */
static int parse_limit(struct rate_limits *limits, const char *option, const char *part, struct error *err)
{
	bool bandwidth = !strncmp(part, "bandwidth=", 10), operations = !strncmp(part, "operations=", 11);
	struct token_rate *rate = bandwidth ? &limits->bandwidth : &limits->operations;
	const char *text = strchr(part, '=') + 1, *colon;
	char number[40];

	if (!bandwidth && !operations)
		return 0;
	colon = strchr(text, ':');
	snprintf(number, sizeof(number), "%.*s", colon ? (int)min(colon - text, (long)sizeof(number)) : 39, text);
	rate->burst = 0;
	if (size_parse(number, &rate->rate, err) < 0 || (colon && size_parse(colon + 1, &rate->burst, err) < 0))
		return error_wrap(err, "%s %s: give a rate a second and perhaps a burst, such as %s", option, part,
			bandwidth ? "bandwidth=50M:100M" : "operations=1000:2000");
	return 1;
}

static int parse_disk(struct vmm_config *config, const char *value, struct error *err)
{
	const char *rest = value;
	struct vmm_disk *disk = &config->disk[config->disks];

	if (config->disks == VMM_DISKS_MAX)
		return error_set(
			err, EINVAL, "--disk %s: %d disks are the most; leave this one out", value, VMM_DISKS_MAX);
	config->disks++;
	disk->path = options_next_part(&rest);
	if (!*disk->path)
		return error_set(err, EINVAL, "--disk '%s': the file is missing; give --disk FILE", value);
	while (rest) {
		scope_free char *part = options_next_part(&rest);

		int limit = parse_limit(&disk->limits, "--disk", part, err);

		if (limit < 0)
			return limit;
		if (limit)
			continue;
		if (!strcmp(part, "readonly"))
			disk->options.read_only = true;
		else if (!strcmp(part, "format=raw"))
			disk->options.format = DISK_RAW;
		else if (!strcmp(part, "format=qcow2"))
			disk->options.format = DISK_QCOW2;
		else if (!strncmp(part, "serial=", 7)) {
			int result = options_parse_disk_serial(disk, part + 7, value, err);

			if (result < 0)
				return result;
		} else if (!strncmp(part, "format=", 7))
			return error_set(
				err, EINVAL, "--disk %s: format '%s' is unknown; give raw or qcow2", value, part + 7);
		else
			return error_set(err, EINVAL,
				"--disk %s: '%s' is unknown; give format=raw|qcow2, readonly or serial=TEXT, and two commas for one "
				"in a file's name",
				value, part);
	}
	return 0;
}

static int parse_mac(uint8_t mac[6], const char *text)
{
	for (unsigned i = 0; i < 6; i++) {
		unsigned byte = 0;

		for (unsigned digit = 0; digit < 2; digit++, text++) {
			static const char digits[] = "0123456789abcdef";
			const char *at = *text ? strchr(digits, *text | 0x20) : NULL;

			if (!at || (*text < '0'))
				return -EINVAL;
			byte = byte << 4 | (unsigned)(at - digits);
		}
		if (*text++ != (i < 5 ? ':' : '\0'))
			return -EINVAL;
		mac[i] = (uint8_t)byte;
	}
	return mac[0] & 1 ? -EINVAL : 0; /* a group address is nobody's own */
}

/* Takes mac= out; what else there is belongs to net_open(). */
static int parse_net(struct vmm_config *config, const char *value, struct error *err)
{
	const char *rest = value;
	struct vmm_net *net = &config->net[config->nets];
	size_t used = 0;

	if (config->nets == VMM_NETS_MAX)
		return error_set(err, EINVAL, "--net %s: %d network devices are the most; leave this one out", value,
			VMM_NETS_MAX);
	config->nets++;
	net->spec = calloc(1, strlen(value) + 1);
	if (!net->spec)
		return error_errno(err, "--net %s", value);
	while (rest) {
		scope_free char *part = options_next_part(&rest);

		int limit = parse_limit(&net->limits, "--net", part, err);

		if (limit < 0)
			return limit;
		if (limit)
			continue;
		if (!strncmp(part, "mac=", 4)) {
			if (parse_mac(net->mac, part + 4) < 0)
				return error_set(err, EINVAL,
					"--net %s: '%s' is not a device's MAC address; give six bytes such as "
					"mac=52:54:00:12:34:56, the first one even",
					value, part + 4);
			net->has_mac = true;
			continue;
		}
		used += (size_t)sprintf(net->spec + used, "%s%s", used ? "," : "", part);
	}
	if (strcmp(net->spec, "user") && strncmp(net->spec, "user,", 5) && strncmp(net->spec, "tap=", 4))
		return error_set(err, EINVAL,
			"--net %s: give user[,forward=tcp:ADDR:PORT-:PORT]... or tap=NAME, and "
			"mac=MAC behind it",
			value);
	return net_check(net->spec, err) < 0 ? error_wrap(err, "--net %s", value) : 0;
}

static int parse_serial(struct vmm_config *config, const char *value, struct error *err)
{
	config->has_serial = true;
	config->serial_path = NULL;
	if (!strcmp(value, "stdio")) {
		config->serial = VMM_SERIAL_STDIO;
	} else if (!strcmp(value, "none")) {
		config->serial = VMM_SERIAL_NONE;
	} else if (!strncmp(value, "file=", 5) && value[5]) {
		config->serial = VMM_SERIAL_FILE;
		config->serial_path = value + 5;
	} else if (!strncmp(value, "socket=", 7) && value[7]) {
		config->serial = VMM_SERIAL_SOCKET;
		config->serial_path = value + 7;
	} else {
		return error_set(err, EINVAL, "--serial %s: give stdio, none, file=PATH or socket=PATH", value);
	}
	return 0;
}

static int parse_on_reset(struct vmm_config *config, const char *value, struct error *err)
{
	if (strcmp(value, "reboot") && strcmp(value, "exit"))
		return error_set(err, EINVAL, "--on-reset %s: give reboot or exit", value);
	config->exit_on_reset = !strcmp(value, "exit");
	return 0;
}

static int parse_jail(struct vmm_config *config, const char *value, struct error *err)
{
	config->jail = true;
	return 0;
}

static int parse_id(uint32_t *id, const char **text)
{
	char *end;
	unsigned long long value;

	errno = 0;
	value = strtoull(*text, &end, 10);
	/* 0 is root, and the last one is no id: chown(2) and setresuid(2) take it for "as it is". */
	if (**text < '0' || **text > '9' || errno || value < 1 || value > 0xfffffffe)
		return -EINVAL;
	*text = end;
	*id = (uint32_t)value;
	return 0;
}

static int parse_jail_ids(struct vmm_config *config, const char *value, struct error *err)
{
	const char *at = value;
	int result = parse_id(&config->jail_first, &at);

	config->jail_last = config->jail_first;
	if (result == 0 && *at == '-') {
		at++;
		result = parse_id(&config->jail_last, &at);
	}
	if (result < 0 || *at || config->jail_last < config->jail_first)
		return error_set(err, EINVAL,
			"--jail-ids %s: give a user id above 0 or a range of them, such as %u-%u", value, JAIL_FIRST_ID,
			JAIL_LAST_ID);
	return 0;
}

static int parse_control(struct vmm_config *config, const char *value, struct error *err)
{
	config->control = value;
	return 0;
}

static int parse_config(struct vmm_config *config, const char *value, struct error *err)
{
	return vmm_config_load(config, value, err);
}

static int parse_help(struct vmm_config *config, const char *value, struct error *err)
{
	config->action = VMM_HELP;
	return 0;
}

static int parse_version(struct vmm_config *config, const char *value, struct error *err)
{
	config->action = VMM_VERSION;
	return 0;
}

static int parse_probe(struct vmm_config *config, const char *value, struct error *err)
{
	if (value && strcmp(value, "json"))
		return error_set(err, EINVAL, "--probe=%s: give --probe or --probe=json", value);
	config->action = VMM_PROBE;
	config->probe_json = value;
	return 0;
}

static const struct option_spec {
	const char *name, *argument; /* argument NULL: takes none; one that begins with '[' can be left out */
	int (*parse)(struct vmm_config *config, const char *value, struct error *err);
	const char *help;
} options[] = {
	{"kernel", "FILE", parse_kernel, "bzImage or ELF vmlinux to boot; the one option that must be given"},
	{"initrd", "FILE", parse_initrd, "initial RAM disk"},
	{"cmdline", "STRING", parse_cmdline, "kernel command line [console=ttyS0]"},
	{"cpus", "N[,max=N]", parse_cpus, "virtual CPUs, 1 to 64, and how many there can be while it runs [1]"},
	{"memory", "SIZE[,max=SIZE]", parse_memory,
		"guest memory, such as 512M or 2G, and how much there can be while it runs [512M]"},
	{"disk",
		"FILE[,format=raw|qcow2][,readonly][,serial=TEXT][,bandwidth=RATE[:BURST]][,operations=RATE[:BURST]]",
		parse_disk, "a disk; repeat for more"},
	{"net", "user[,forward=tcp:ADDR:PORT-:PORT]...|tap=NAME[,queues=N][,mac=MAC][,bandwidth=...][,operations=...]", parse_net,
		"a network device; repeat for more"},
	{"serial", "stdio|none|file=PATH|socket=PATH", parse_serial, "where the guest's serial port goes [stdio]"},
	{"virtio-console", "stdio|none|file=PATH|socket=PATH", options_parse_virtio_console,
		"a virtio console, /dev/hvc0, and where it goes; on stdio the serial port has none"},
	{"vsock", "PATH[,cid=N]", options_parse_vsock, "sockets between host and guest, by a Unix socket at PATH [cid=3]"},
	{"balloon", "SIZE", options_parse_balloon, "a balloon that gives back free memory, and SIZE from the start"},
	{"name", "TEXT", options_parse_name, "the machine's name, told to the guest by SMBIOS"},
	{"uuid", "UUID", options_parse_uuid, "the machine's identity [a random one at each start]"},
	{"module", "FILE[,STRING]", options_parse_module, "module of a Multiboot kernel, and its command line; repeat for more"},
	{"debug-exit", NULL, options_parse_debug_exit, "a write of N to port 0xf4 ends the program with status 2N+1"},
	{"cpu", "host|x86-64-v2|x86-64-v3[,-FEATURE]...", parse_cpu,
		"CPU model that the guest sees, without these features [host]"},
	{"engine", "auto|kvm|bt", parse_engine, "what runs the guest's code; auto: kvm if it really can [auto]"},
	{"on-reset", "reboot|exit", parse_on_reset, "what a guest's reset does [reboot]"},
	{"jail", NULL, parse_jail, "confine the process once everything is open; needs root"},
	{"jail-ids", "ID[-ID]", parse_jail_ids, "user and group id in the jail, or a range to choose a free one from"},
	{"probe", "[=json]", parse_probe, "say which engine auto takes here, and why not the others"},
	{"control", "PATH", parse_control, "Unix socket on which the machine is controlled (JSON-RPC 2.0)"},
	{"config", "FILE", parse_config, "options from a JSON file; those behind it on the command line rule"},
	{"help", NULL, parse_help, "show this text"},
	{"version", NULL, parse_version, "show the version"},
};

static const struct option_spec *find_option(const char *name, size_t length)
{
	for (size_t i = 0; i < ARRAY_SIZE(options); i++)
		if (strlen(options[i].name) == length && !memcmp(options[i].name, name, length))
			return &options[i];
	return NULL;
}

static bool wants_value(const struct option_spec *option)
{
	return option->argument && *option->argument != '[';
}

static int apply(struct vmm_config *config, const struct option_spec *option, const char *value, struct error *err)
{
	if (wants_value(option) && (!value || (!*value && option->parse != parse_cmdline)))
		return error_set(
			err, EINVAL, "--%s needs a value: --%s %s", option->name, option->name, option->argument);
	if (!option->argument && value)
		return error_set(
			err, EINVAL, "--%s takes no value, '%s' was given; leave it out", option->name, value);
	return option->parse(config, value, err);
}

int vmm_config_apply(struct vmm_config *config, const char *name, char *value, struct error *err)
{
	const struct option_spec *option = find_option(name, strlen(name));
	char **kept;

	if (!option) {
		free(value);
		return error_set(err, EINVAL, "option \"%.100s\" is unknown; 'hostel-vmm --help' lists them", name);
	}
	if (value) {
		kept = realloc(config->kept, (config->kept_count + 1) * sizeof(*kept));
		if (!kept) {
			free(value);
			return error_errno(err, "\"%s\"", name);
		}
		config->kept = kept;
		config->kept[config->kept_count++] = value;
	}
	return apply(config, option, value, err);
}

int vmm_config_parse(struct vmm_config *config, int argc, char *const argv[], struct error *err)
{
	int result;

	*config = (struct vmm_config){
		.cpus = 1, .cpus_max = 1, .memory = MEMORY_DEFAULT, .memory_max = MEMORY_DEFAULT, .jail_first = JAIL_FIRST_ID, .jail_last = JAIL_LAST_ID};
	for (int i = 1; i < argc; i++) {
		const char *name = argv[i] + 2, *equals, *value = NULL;
		const struct option_spec *option;
		size_t length;

		if (strncmp(argv[i], "--", 2))
			return error_set(err, EINVAL, "'%s' is not an option; 'hostel-vmm --help' lists them", argv[i]);
		equals = strchr(name, '=');
		length = equals ? (size_t)(equals - name) : strlen(name);
		option = find_option(name, length);
		if (!option)
			return error_set(err, EINVAL, "option '--%.*s' is unknown; 'hostel-vmm --help' lists them",
				(int)min(length, (size_t)100), name);
		if (equals)
			value = equals + 1;
		else if (wants_value(option))
			value = argv[++i]; /* NULL at the end */
		result = apply(config, option, value, err);
		if (result < 0)
			return result;
		if (config->action != VMM_RUN)
			return 0;
	}
	if (!config->kernel)
		return error_set(err, EINVAL, "no kernel was given; give --kernel FILE (a bzImage or an ELF vmlinux)");
	if (config->hvc == VMM_SERIAL_STDIO && config->has_hvc && config->serial == VMM_SERIAL_STDIO) {
		if (config->has_serial)
			return error_set(err, EINVAL,
				"--serial stdio and --virtio-console stdio: one of them can have it; give the other "
				"file=PATH, socket=PATH or none");
		config->serial = VMM_SERIAL_NONE;
	}
	if (!config->cmdline)
		config->cmdline = config->serial == VMM_SERIAL_NONE && config->has_hvc ? "console=hvc0" : "console=ttyS0";
	return config->cpu ? 0 : parse_cpu(config, "host", err);
}

void vmm_config_free(struct vmm_config *config)
{
	for (unsigned i = 0; i < config->disks; i++)
		free(config->disk[i].path);
	for (unsigned i = 0; i < config->nets; i++)
		free(config->net[i].spec);
	for (unsigned i = 0; i < config->modules; i++)
		free(config->module[i].path);
	config->modules = 0;
	free(take_ptr(config->vsock_path));
	config->disks = config->nets = 0;
	while (config->kept_count)
		free(config->kept[--config->kept_count]);
	free(config->kept);
	config->kept = NULL;
}

void vmm_help(FILE *to)
{
	fputs("Usage: hostel-vmm --kernel FILE [OPTION]...\nRuns one virtual machine until its guest powers off.\n\n",
		to);
	for (size_t i = 0; i < ARRAY_SIZE(options); i++)
		fprintf(to, "  --%s%s%s\n        %s\n", options[i].name,
			options[i].argument && *options[i].argument != '[' ? " " : "",
			options[i].argument ? options[i].argument : "", options[i].help);
	fputs("\nOn a terminal Ctrl-A x leaves and Ctrl-A h lists the other keys. Manual: hostel-vmm(1).\n", to);
}
