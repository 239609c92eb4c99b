/* hostel-vmm's command line: what is understood, and what a wrong one is told. Engines and CPU models are stand-ins. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <stdio.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "base/util.h"
#include "engine/cpu_model.h"
#include "engine/engine.h"
#include "vmm/options.h"

static const struct engine first = {.name = "first"}, second = {.name = "second"};
const struct engine *const engines[] = {&first, &second, NULL};
static const struct cpu_model host = {.name = "host"}, v2 = {.name = "x86-64-v2"};

const struct cpu_model *cpu_model_find(const char *name, struct error *err)
{
	if (!strcmp(name, "host"))
		return &host;
	if (!strcmp(name, "x86-64-v2"))
		return &v2;
	error_set(err, strcmp(name, "x86-64-v3") ? EINVAL : ENOTSUP, "CPU model %s", name);
	return NULL;
}

#define WORDS_MOST 64

/* Splits a line at its blanks; '' stands for an empty word. */
static int parse(struct vmm_config *config, const char *line, struct error *err)
{
	static char text[4096];
	char *words[WORDS_MOST + 1] = {"hostel-vmm"}, *next = text;
	int count = 1;

	assert_true(strlen(line) < sizeof(text));
	strcpy(text, line);
	for (char *word; (word = strsep(&next, " "));) {
		assert_true(count < WORDS_MOST);
		if (*word)
			words[count++] = strcmp(word, "''") ? word : "";
	}
	*err = (struct error){0};
	return vmm_config_parse(config, count, words, err);
}

static void test_defaults(void **state)
{
	struct vmm_config c;
	struct error err;

	assert_int_equal(parse(&c, "--kernel k", &err), 0);
	assert_int_equal(c.action, VMM_RUN);
	assert_null(c.engine);
	assert_ptr_equal(c.cpu, &host);
	assert_int_equal(c.cpus, 1);
	assert_int_equal(c.cpus_max, 1);
	assert_false(c.cpus_change);
	assert_int_equal(c.memory, 512 << 20);
	assert_int_equal(c.memory_max, 512 << 20);
	assert_string_equal(c.kernel, "k");
	assert_null(c.initrd);
	assert_string_equal(c.cmdline, "console=ttyS0");
	assert_int_equal(c.disks, 0);
	assert_int_equal(c.nets, 0);
	assert_int_equal(c.serial, VMM_SERIAL_STDIO);
	assert_false(c.exit_on_reset);
	vmm_config_free(&c);
}

static void test_room_to_grow(void **state)
{
	struct vmm_config c;
	struct error err;

	assert_int_equal(parse(&c, "--kernel k --cpus 2,max=8 --memory 1G,max=4G", &err), 0);
	assert_int_equal(c.cpus, 2);
	assert_int_equal(c.cpus_max, 8);
	assert_true(c.cpus_change);
	assert_int_equal(c.memory, 1ull << 30);
	assert_int_equal(c.memory_max, 4ull << 30);
	vmm_config_free(&c);
	assert_int_equal(parse(&c, "--kernel k --cpus 3 --memory 1G", &err), 0);
	assert_int_equal(c.cpus_max, 3);
	assert_int_equal(c.memory_max, 1ull << 30);
	vmm_config_free(&c);
}

static void test_everything(void **state)
{
	static const uint8_t mac[6] = {0x52, 0x54, 0, 0xaB, 0xcd, 0xef};
	struct vmm_config c;
	struct error err;

	assert_int_equal(
		parse(&c,
			"--engine second --cpus=64 --memory 3G --kernel=a=b --initrd i --cmdline x=y,z "
			"--disk a --disk b,format=raw,readonly --disk c,,d,format=qcow2 --disk e,readonly "
			"--net user --net user,forward=tcp:127.0.0.1:2222-:22,mac=52:54:00:aB:Cd:ef,forward=tcp::1-:2 "
			"--net tap=t0 --serial socket=/s --cpu x86-64-v2 --on-reset exit",
			&err),
		0);
	assert_ptr_equal(c.engine, &second);
	assert_int_equal(c.cpus, 64);
	assert_int_equal(c.memory, 3ull << 30);
	assert_string_equal(c.kernel, "a=b");
	assert_string_equal(c.initrd, "i");
	assert_string_equal(c.cmdline, "x=y,z");
	assert_int_equal(c.disks, 4);
	assert_string_equal(c.disk[0].path, "a");
	assert_int_equal(c.disk[0].options.format, DISK_AUTO);
	assert_false(c.disk[0].options.read_only);
	assert_string_equal(c.disk[1].path, "b");
	assert_int_equal(c.disk[1].options.format, DISK_RAW);
	assert_true(c.disk[1].options.read_only);
	assert_string_equal(c.disk[2].path, "c,d");
	assert_int_equal(c.disk[2].options.format, DISK_QCOW2);
	assert_true(c.disk[3].options.read_only);
	assert_int_equal(c.nets, 3);
	assert_string_equal(c.net[0].spec, "user");
	assert_false(c.net[0].has_mac);
	assert_string_equal(c.net[1].spec, "user,forward=tcp:127.0.0.1:2222-:22,forward=tcp::1-:2");
	assert_true(c.net[1].has_mac);
	assert_memory_equal(c.net[1].mac, mac, 6);
	assert_string_equal(c.net[2].spec, "tap=t0");
	assert_int_equal(c.serial, VMM_SERIAL_SOCKET);
	assert_string_equal(c.serial_path, "/s");
	assert_ptr_equal(c.cpu, &v2);
	assert_true(c.exit_on_reset);
	vmm_config_free(&c);
}

static void test_devices(void **state)
{
	static const uint8_t uuid[16] = {
		0x12, 0x3e, 0x45, 0x67, 0xe8, 0x9b, 0x42, 0xd3, 0xa4, 0x56, 0x42, 0x66, 0x14, 0x17, 0x40, 0x00};
	struct vmm_config c;
	struct error err;

	assert_int_equal(
		parse(&c,
			"--kernel k --balloon 64M --vsock /v,,w,cid=99 --virtio-console stdio --name web-1 --uuid "
			"123e4567-E89B-42d3-a456-426614174000 --debug-exit --module m,,n,a=1,b --module o "
			"--disk d,serial=SN1 --net tap=t,queues=4,mac=52:54:00:00:00:01",
			&err),
		0);
	assert_true(c.has_balloon && c.balloon == 64 << 20);
	assert_string_equal(c.vsock_path, "/v,w");
	assert_int_equal(c.vsock_cid, 99);
	assert_true(c.has_hvc && c.hvc == VMM_SERIAL_STDIO);
	assert_int_equal(c.serial, VMM_SERIAL_NONE); /* which is taken */
	assert_string_equal(c.cmdline, "console=hvc0");
	assert_string_equal(c.name, "web-1");
	assert_true(c.has_uuid);
	assert_memory_equal(c.uuid, uuid, 16);
	assert_true(c.debug_exit);
	assert_int_equal(c.modules, 2);
	assert_string_equal(c.module[0].path, "m,n");
	assert_string_equal(c.module[0].cmdline, "a=1,b");
	assert_string_equal(c.module[1].path, "o");
	assert_string_equal(c.module[1].cmdline, "");
	assert_string_equal(c.disk[0].serial, "SN1");
	assert_string_equal(c.net[0].spec, "tap=t,queues=4");
	vmm_config_free(&c);
	assert_int_equal(parse(&c, "--kernel k --virtio-console file=/f --vsock /v", &err), 0);
	assert_int_equal(c.serial, VMM_SERIAL_STDIO);
	assert_int_equal(c.vsock_cid, 3);
	assert_string_equal(c.cmdline, "console=ttyS0");
	vmm_config_free(&c);
}

static void test_good(void **state)
{
	static const struct {
		const char *line;
		enum vmm_action action;
	} good[] = {
		{"--help", VMM_HELP},
		{"--version", VMM_VERSION},
		{"--probe", VMM_PROBE},
		{"--probe=json", VMM_PROBE},
		{"--kernel k --help --nonsense", VMM_HELP},
		{"--kernel k --engine auto", VMM_RUN},
		{"--kernel k --cmdline ''", VMM_RUN},
		{"--kernel k --cmdline=", VMM_RUN},
		{"--kernel k --memory 16M", VMM_RUN},
		{"--kernel k --memory 256G", VMM_RUN},
		{"--kernel k --memory 268435456", VMM_RUN},
		{"--kernel k --cpus 1 --cpus 2", VMM_RUN},
		{"--kernel k --serial none", VMM_RUN},
		{"--kernel k --serial file=/f --on-reset reboot", VMM_RUN},
	};

	for (size_t i = 0; i < ARRAY_SIZE(good); i++) {
		struct vmm_config c;
		struct error err;

		if (parse(&c, good[i].line, &err) < 0)
			fail_msg("%s: %s", good[i].line, err.text);
		assert_int_equal(c.action, good[i].action);
		vmm_config_free(&c);
	}
}

/* Each is refused in one line that names the option or the value, and what to do. */
static void test_bad(void **state)
{
	static const struct {
		const char *line, *named, *remedy;
	} bad[] = {
		{"", "kernel", "--kernel FILE"},
		{"kernel", "'kernel'", "--help"},
		{"-k", "'-k'", "--help"},
		{"--", "'--'", "--help"},
		{"--kernels k", "--kernels", "--help"},
		{"--kern k", "--kern", "--help"},
		{"--kernel", "--kernel", "--kernel FILE"},
		{"--kernel=", "--kernel", "--kernel FILE"},
		{"--kernel ''", "--kernel", "--kernel FILE"},
		{"--help=yes", "'yes'", "leave it out"},
		{"--probe=xml", "xml", "--probe=json"},
		{"--kernel k --cpus 0", "--cpus 0", "1 to 64"},
		{"--kernel k --cpus 65", "--cpus 65", "1 to 64"},
		{"--kernel k --cpus 4,max=2", "--cpus 4,max=2", "less than"},
		{"--kernel k --cpus 4,max=65", "max=65", "1 to 64"},
		{"--kernel k --cpus 4,most=8", "most=8", "1 to 64"},
		{"--kernel k --memory 2G,max=1G", "max=1G", "256G"},
		{"--kernel k --memory 2G,max=300G", "max=300G", "256G"},
		{"--kernel k --memory 2G,most=3G", "most=3G", "SIZE,max=SIZE"},
		{"--kernel k --memory 2G,max=x", "max=", "x"},
		{"--kernel k --cpus -1", "--cpus -1", "1 to 64"},
		{"--kernel k --cpus 2x", "--cpus 2x", "1 to 64"},
		{"--kernel k --cpus 99999999999999999999999", "--cpus 999", "1 to 64"},
		{"--kernel k --memory lots", "\"lots\"", "512M"},
		{"--kernel k --memory 1", "--memory 1", "16M"},
		{"--kernel k --memory 257G", "--memory 257G", "256G"},
		{"--kernel k --memory 99999999999999999999G", "99999999999999999999G", "at most"},
		{"--kernel k --memory 16777217", "--memory 16777217", "17M"},
		{"--kernel k --engine kvm", "--engine kvm", "auto, first, second"},
		{"--kernel k --cpu z80", "--cpu", "z80"},
		{"--kernel k --on-reset panic", "--on-reset panic", "reboot or exit"},
		{"--kernel k --serial tty", "--serial tty", "stdio"},
		{"--kernel k --serial file=", "--serial file=", "file=PATH"},
		{"--kernel k --serial socket=", "--serial socket=", "socket=PATH"},
		{"--kernel k --disk", "--disk", "FILE"},
		{"--kernel k --disk ,readonly", "',readonly'", "--disk FILE"},
		{"--kernel k --disk d,format=vmdk", "'vmdk'", "raw or qcow2"},
		{"--kernel k --disk d,fast", "'fast'", "readonly"},
		{"--kernel k --disk d,", "--disk d,", "readonly"},
		{"--kernel k --net bridge", "--net bridge", "tap=NAME"},
		{"--kernel k --net mac=52:54:00:00:00:01", "--net mac=", "user"},
		{"--kernel k --net user,mac=", "''", "mac=52:54"},
		{"--kernel k --net user,mac=52:54:00:00:00", "'52:54:00:00:00'", "mac=52:54"},
		{"--kernel k --net user,mac=52:54:00:00:00:01:", "'52:54:00:00:00:01:'", "mac=52:54"},
		{"--kernel k --net user,mac=52:54:00:00:00:0g", ":0g'", "mac=52:54"},
		{"--kernel k --net user,mac=53:54:00:00:00:01", "'53:54", "even"},
		{"--kernel k --disk 1 --disk 2 --disk 3 --disk 4 --disk 5 --disk 6 --disk 7 --disk 8 --disk 9 --disk "
		 "10 "
		 "--disk 11 --disk 12 --disk 13 --disk 14 --disk 15 --disk 16 --disk 17",
			"--disk 17", "leave this one out"},
		{"--kernel k --net user --net user --net user --net user --net user --net user --net user --net user "
		 "--net tap=x",
			"--net tap=x", "leave this one out"},
		{"--kernel k --balloon much", "much", "512M"},
		{"--kernel k --vsock ,cid=3", "--vsock", "PATH"},
		{"--kernel k --vsock v,cid=2", "cid=2", "from 3 to"},
		{"--kernel k --vsock v,cid=4294967295", "cid=4294967295", "from 3 to"},
		{"--kernel k --virtio-console tty", "tty", "stdio, none"},
		{"--kernel k --serial stdio --virtio-console stdio", "--virtio-console stdio", "give the other"},
		{"--kernel k --uuid 123e4567-e89b-42d3-a456-42661417400", "123e4567", "give one such as"},
		{"--kernel k --uuid 123e4567-e89b-42d3-a456-42661417400g", "400g", "give one such as"},
		{"--kernel k --uuid 123e4567ee89b-42d3-a456-426614174000", "123e4567e", "give one such as"},
		{"--kernel k --module ,x", "--module", "give --module FILE"},
		{"--kernel k --disk d,serial=", "serial number ''", "1 to 20"},
		{"--kernel k --disk d,serial=123456789012345678901", "123456789012345678901", "1 to 20"},
	};

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct vmm_config c;
		struct error err;

		if (parse(&c, bad[i].line, &err) == 0)
			fail_msg("accepted: %s", bad[i].line);
		vmm_config_free(&c);
		assert_true(err.code == EINVAL || err.code == ERANGE);
		if (!strstr(err.text, bad[i].named) || !strstr(err.text, bad[i].remedy) || strchr(err.text, '\n'))
			fail_msg("%s: told \"%s\", wanted %s and %s", bad[i].line, err.text, bad[i].named,
				bad[i].remedy);
	}
}

/* A model that exists but not for this host is no wrong usage. */
static void test_cpu_beyond_host(void **state)
{
	struct vmm_config c;
	struct error err;

	assert_true(parse(&c, "--kernel k --cpu x86-64-v3", &err) < 0);
	assert_int_equal(err.code, ENOTSUP);
	vmm_config_free(&c);
}

static void test_help_names_all(void **state)
{
	static const char *const names[] = {"--engine", "--cpus", "--memory", "--kernel", "--initrd", "--cmdline",
		"--disk", "--net", "--serial", "--cpu ", "--on-reset", "--help", "--version"};
	char text[8192] = "";
	FILE *to = fmemopen(text, sizeof(text) - 1, "w");

	vmm_help(to);
	fclose(to);
	for (size_t i = 0; i < ARRAY_SIZE(names); i++)
		assert_non_null(strstr(text, names[i]));
}

static void test_limits(void **state)
{
	struct vmm_config c;
	struct error err;

	assert_int_equal(parse(&c, "--kernel k --disk d,bandwidth=1M,operations=100:200 --net user,bandwidth=2K:3K,mtu=1500", &err), 0);
	assert_int_equal(c.disk[0].limits.bandwidth.rate, 1 << 20);
	assert_int_equal(c.disk[0].limits.bandwidth.burst, 0);
	assert_int_equal(c.disk[0].limits.operations.rate, 100);
	assert_int_equal(c.disk[0].limits.operations.burst, 200);
	assert_int_equal(c.net[0].limits.bandwidth.burst, 3 << 10);
	assert_string_equal(c.net[0].spec, "user,mtu=1500");
	vmm_config_free(&c);
	assert_int_equal(parse(&c, "--kernel k --disk d,bandwidth=fast", &err), -EINVAL);
	assert_non_null(strstr(err.text, "bandwidth=50M"));
	vmm_config_free(&c);
	assert_int_equal(parse(&c, "--kernel k --net user,operations=1:x", &err), -EINVAL);
	assert_non_null(strstr(err.text, "operations=1000"));
	vmm_config_free(&c);
}

/* A file says what the flags say; those behind it rule. */
static int parse_file(struct vmm_config *config, const char *json, const char *more, struct error *err)
{
	char path[] = "/tmp/test-config-XXXXXX", line[200];
	int fd = mkstemp(path), result;

	assert_true(fd >= 0);
	assert_int_equal(write(fd, json, strlen(json)), (ssize_t)strlen(json));
	close(fd);
	snprintf(line, sizeof(line), "--config %s %s", path, more);
	result = parse(config, line, err);
	unlink(path);
	return result;
}

static void test_config_file(void **state)
{
	static const struct {
		const char *json, *part;
	} bad[] = {
		{"", "line 1"},
		{"[1]", "one JSON object"},
		{"{\"kernel\": null}", "kernel"},
		{"{\"kernel\": true}", "--kernel needs a value"},
		{"{\"debug-exit\": \"x\"}", "takes no value"},
		{"{\"cpus\": 1.5}", "cpus"},
		{"{\"cpus\": 99}", "--cpus 99"},
		{"{\"colour\": 1}", "colour"},
		{"{\"config\": \"x\"}", "command line"},
		{"{\"disk\": [[\"a\"]]}", "disk"},
		{"{\"disk\": {\"path\": {}}}", "path"},
		{"{\"disk\": {}}", "--disk"},
		{"{\"kernel\": \"a\", \"kernel\": \"b\"}", "duplicate"},
	};
	struct vmm_config c;
	struct error err;

	assert_int_equal(parse_file(&c,
				 "{\"kernel\": \"a, b\", \"cpus\": 3, \"memory\": \"1G\", \"debug-exit\": true, "
				 "\"on-reset\": \"exit\", \"cmdline\": \"\", \"jail\": false, "
				 "\"disk\": [\"x,,y,readonly\", {\"format\": \"raw\", \"readonly\": false, \"path\": \"p,q\", "
				 "\"operations\": 7}], \"net\": {\"forward\": [\"tcp:127.0.0.1:1-:2\", \"tcp:127.0.0.1:3-:4\"], \"user\": true}}",
				 "--cpus 2 --disk z", &err),
		0);
	assert_string_equal(c.kernel, "a, b");
	assert_int_equal(c.cpus, 2);
	assert_int_equal(c.memory, 1 << 30);
	assert_true(c.exit_on_reset);
	assert_false(c.jail);
	assert_string_equal(c.cmdline, "");
	assert_int_equal(c.disks, 3);
	assert_string_equal(c.disk[0].path, "x,y");
	assert_true(c.disk[0].options.read_only);
	assert_string_equal(c.disk[1].path, "p,q");
	assert_false(c.disk[1].options.read_only);
	assert_int_equal(c.disk[1].options.format, DISK_RAW);
	assert_int_equal(c.disk[1].limits.operations.rate, 7);
	assert_string_equal(c.disk[2].path, "z");
	assert_string_equal(c.net[0].spec, "user,forward=tcp:127.0.0.1:1-:2,forward=tcp:127.0.0.1:3-:4");
	vmm_config_free(&c);

	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		assert_int_equal(parse_file(&c, bad[i].json, "--kernel k", &err), -EINVAL);
		if (!strstr(err.text, bad[i].part) || !strstr(err.text, "--config /tmp/"))
			fail_msg("%s: %s", bad[i].json, err.text);
		vmm_config_free(&c);
	}
	assert_int_equal(parse(&c, "--config /nowhere", &err), -ENOENT);
	vmm_config_free(&c);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_defaults),
		cmocka_unit_test(test_room_to_grow),
		cmocka_unit_test(test_everything),
		cmocka_unit_test(test_devices),
		cmocka_unit_test(test_good),
		cmocka_unit_test(test_bad),
		cmocka_unit_test(test_cpu_beyond_host),
		cmocka_unit_test(test_help_names_all),
		cmocka_unit_test(test_limits),
		cmocka_unit_test(test_config_file),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
