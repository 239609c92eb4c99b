/* The control socket from a client's side, with a machine that only notes what it is asked for (fake-vm.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "fake-vm.h"
#include "vmm/console_tap.h"
#include "vmm/control_internal.h"

static struct {
	char folder[40], path[60];
	struct control *control;
	pthread_t thread;
} stage;

static void *run_loop(void *opaque)
{
	loop_run(fake.vm->loop);
	return NULL;
}

static int set_up(void **state)
{
	struct error err = {0};

	fake_vm_create();
	strcpy(stage.folder, "/tmp/test-control-XXXXXX");
	assert_non_null(mkdtemp(stage.folder));
	snprintf(stage.path, sizeof(stage.path), "%s/s", stage.folder);
	if (control_create(&stage.control, stage.path, fake.vm, &err) < 0)
		fail_msg("%s", err.text);
	pthread_create(&stage.thread, NULL, run_loop, NULL);
	return 0;
}

static int tear_down(void **state)
{
	struct stat status;

	loop_stop(fake.vm->loop);
	pthread_join(stage.thread, NULL);
	control_destroy(stage.control);
	fake_vm_destroy();
	assert_int_equal(stat(stage.path, &status), -1);
	rmdir(stage.folder);
	return 0;
}

/* ---- a client ---- */

static int dial(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	strcpy(address.sun_path, stage.path);
	assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
	return fd;
}

static void say(int fd, const char *text, size_t n)
{
	while (n) {
		ssize_t sent = send(fd, text, n, MSG_NOSIGNAL);

		assert_true(sent > 0);
		text += sent;
		n -= (size_t)sent;
	}
}

/* The next line, without its end; NULL at the end of the connection or after two seconds. */
static const char *hear(int fd)
{
	static char line[CONTROL_OUTPUT_MAX];
	size_t n = 0;

	for (;;) {
		struct pollfd p = {.fd = fd, .events = POLLIN};

		if (poll(&p, 1, 2000) != 1 || recv(fd, line + n, 1, 0) != 1)
			return NULL;
		if (line[n] == '\n')
			break;
		n++;
		assert_true(n < sizeof(line));
	}
	line[n] = '\0';
	return line;
}

static json_t *hear_json(int fd)
{
	const char *line = hear(fd);
	json_error_t where;
	json_t *object;

	assert_non_null(line);
	object = json_loads(line, 0, &where);
	if (!object)
		fail_msg("not JSON: %s: %s", where.text, line);
	return object;
}

static json_t *ask_id(int fd, const char *request)
{
	say(fd, request, strlen(request));
	say(fd, "\n", 1);
	return hear_json(fd);
}

static json_t *ask(int fd, const char *method, const char *params)
{
	char request[1000];

	snprintf(request, sizeof(request), "{\"jsonrpc\":\"2.0\",\"id\":5,\"method\":\"%s\",\"params\":%s}", method,
		params);
	return ask_id(fd, request);
}

static void expect_result(int fd, const char *method, const char *params)
{
	json_t *answer = ask(fd, method, params);

	if (!json_object_get(answer, "result"))
		fail_msg("%s %s: %s", method, params, json_dumps(answer, 0));
	assert_int_equal(json_integer_value(json_object_get(answer, "id")), 5);
	json_decref(answer);
}

static void expect_error(int fd, const char *request, int code, const char *part)
{
	json_t *answer = ask_id(fd, request), *error = json_object_get(answer, "error");
	const char *text = json_string_value(json_object_get(error, "message"));

	if (json_integer_value(json_object_get(error, "code")) != code || !text || !strstr(text, part))
		fail_msg("%s: wanted %d with '%s', got %s", request, code, part, json_dumps(answer, 0));
	json_decref(answer);
}

/* ---- tests ---- */

static void test_bad_requests(void **state)
{
	scope_fd int fd = dial();
	static const struct {
		const char *request;
		int code;
		const char *part;
	} bad[] = {
		{"x", -32700, "not a JSON object on one line"},
		{"{\"jsonrpc\":\"2.0\"", -32700, "not a JSON"},
		{"{\"a\":1,\"a\":2}", -32700, "duplicate"},
		{"\xff\xfe", -32700, "not a JSON"},
		{"3", -32700, "not a JSON"},
		{"[]", -32600, "batches"},
		{"{}", -32600, "jsonrpc"},
		{"{\"jsonrpc\":\"1.0\",\"method\":\"status\",\"id\":1}", -32600, "jsonrpc"},
		{"{\"jsonrpc\":\"2.0\",\"id\":1}", -32600, "method"},
		{"{\"jsonrpc\":\"2.0\",\"method\":7,\"id\":1}", -32600, "method"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"status\",\"id\":{}}", -32600, "id"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"status\",\"id\":1,\"params\":3}", -32600, "params"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"status\",\"id\":1,\"params\":[]}", -32602, "params"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"fly\",\"id\":1}", -32601, "'fly'"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"status\",\"id\":1,\"params\":{\"a\":1}}", -32602, "'a' is unknown"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"disk-add\",\"id\":1}", -32602, "'disk' is missing"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"disk-add\",\"id\":1,\"params\":{\"disk\":\"missing\"}}", -32000,
			"not there"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"disk-add\",\"id\":1,\"params\":{\"disk\":\"a,b=c\"}}", -32602,
			"'b=c'"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"disk-add\",\"id\":1,\"params\":{\"disk\":1.5}}", -32602, "disk"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"disk-add\",\"id\":1,\"params\":{\"disk\":[]}}", -32602, "give one"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"net-add\",\"id\":1,\"params\":{\"net\":{\"mac\":\"x\"}}}", -32602,
			"mac"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"limit\",\"id\":1,\"params\":{\"device\":\"disk9\"}}", -32602,
			"disk9"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"limit\",\"id\":1,\"params\":{\"device\":3}}", -32602, "device"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"limit\",\"id\":1,\"params\":{\"device\":\"disk0\",\"bandwidth\":-1}"
		 "}",
			-32602, "bandwidth"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"limit\",\"id\":1,\"params\":{\"device\":\"disk0\",\"direction\":"
		 "\"send\"}}",
			-32602, "direction"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"limit\",\"id\":1,\"params\":{\"device\":\"net0\",\"direction\":"
		 "\"up\"}}",
			-32602, "direction"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"events\",\"id\":1,\"params\":{\"on\":1}}", -32602, "on"},
		{"{\"jsonrpc\":\"2.0\",\"method\":\"balloon\",\"id\":1,\"params\":{\"target\":\"9T\"}}", -32602,
			"target"},
	};

	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
		expect_error(fd, bad[i].request, bad[i].code, bad[i].part);
	assert_int_equal(fake.stops + fake.limits + fake.targets, 0);
	expect_result(fd, "status", "{}"); /* the connection has survived them all */
}

static void test_methods(void **state)
{
	scope_fd int fd = dial();
	json_t *answer, *result;

	expect_result(fd, "methods", "{}");
	expect_result(fd, "power-button", "{}");
	assert_int_equal(fake.buttons, 1);
	expect_result(fd, "reset", "{}");
	assert_int_equal(fake.cause, VM_CAUSE_RESET);
	expect_result(fd, "quit", "{}");
	assert_int_equal(fake.cause, VM_CAUSE_LEAVE);
	expect_result(fd, "disk-add", "{\"disk\":{\"readonly\":true,\"path\":\"a,b.img\",\"bandwidth\":\"1M:2M\"}}");
	assert_string_equal(fake.path, "a,b.img");
	assert_int_equal(fake.limit.bandwidth.rate, 1 << 20);
	assert_int_equal(fake.limit.bandwidth.burst, 2 << 20);
	expect_result(
		fd, "net-add", "{\"net\":{\"forward\":[\"tcp:127.0.0.1:1-:2\",\"tcp:127.0.0.1:3-:4\"],\"user\":true}}");
	assert_string_equal(fake.path, "user,forward=tcp:127.0.0.1:1-:2,forward=tcp:127.0.0.1:3-:4");
	expect_result(fd, "device-remove", "{\"device\":\"net0\"}");
	assert_int_equal(fake.removals, 1);
	expect_result(fd, "limit", "{\"device\":\"disk0\",\"operations\":100,\"operations-burst\":\"1K\"}");
	assert_int_equal(fake.limit.operations.rate, 100);
	assert_int_equal(fake.limit.operations.burst, 1024);
	expect_result(fd, "limit", "{\"device\":\"disk0\",\"bandwidth\":7}"); /* what is not named stays */
	assert_int_equal(fake.limit.operations.rate, 100);
	assert_int_equal(fake.limit.bandwidth.rate, 7);
	expect_result(fd, "limit", "{\"device\":\"disk0\",\"operations\":0}");
	assert_int_equal(fake.limit.operations.rate, 0);
	expect_result(fd, "limit", "{\"device\":\"net0\",\"direction\":\"receive\",\"bandwidth\":9}");
	assert_true(fake.limit_received);
	assert_int_equal(fake.vm->net[0].limits[0].bandwidth.rate, 0);
	assert_int_equal(fake.vm->net[0].limits[1].bandwidth.rate, 9);
	expect_result(fd, "balloon", "{\"target\":\"64M\"}");
	assert_int_equal(fake.target, 64 << 20);

	answer = ask(fd, "status", "{}");
	result = json_object_get(answer, "result");
	assert_string_equal(json_string_value(json_object_get(result, "state")), "running");
	assert_non_null(json_object_get(json_object_get(result, "devices"), "disk0"));
	assert_true(
		json_is_true(json_object_get(json_object_get(json_object_get(result, "devices"), "net0"), "removing")));
	json_decref(answer);
}

static uint64_t milliseconds(void)
{
	return clock_now() / 1000000;
}

/* A guest that does not come to a stop, vCPUs that do not answer: the client hears within 100 ms all the same. */
static void test_answers_in_time(void **state)
{
	scope_fd int fd = dial();
	uint64_t began = milliseconds();
	json_t *answer = ask(fd, "pause", "{}"), *vcpu;

	assert_in_range(milliseconds() - began, 50, 100);
	assert_string_equal(json_string_value(json_object_get(json_object_get(answer, "result"), "state")), "running");
	json_decref(answer);

	began = milliseconds();
	answer = ask(fd, "statistics", "{}");
	assert_in_range(milliseconds() - began, 50, 100);
	assert_int_equal(fake.calls, 2);
	vcpu = json_array_get(json_object_get(json_object_get(answer, "result"), "vcpus"), 1);
	assert_true(json_is_false(json_object_get(vcpu, "fresh")));
	assert_int_equal(json_integer_value(json_object_get(json_object_get(vcpu, "engine"), "halts")), 3);
	json_decref(answer);

	expect_result(fd, "resume", "{}");
	fake.pauses_at_once = true;
	began = milliseconds();
	expect_result(fd, "pause", "{}");
	expect_result(fd, "statistics", "{}");
	assert_in_range(milliseconds() - began, 0, 40);
}

/* What a client sends behind a request that waits is answered after it. */
static void test_order(void **state)
{
	static const char text[] =
		"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"pause\"}\n"
		"{\"jsonrpc\":\"2.0\",\"method\":\"power-button\"}\r\n\n"
		"{\"jsonrpc\":\"2.0\",\"id\":\"x\",\"method\":\"resume\"}"; /* its end is the connection's */
	scope_fd int fd = dial();
	json_t *answer;

	for (size_t i = 0; i < sizeof(text) - 1; i++)
		say(fd, text + i, 1);
	shutdown(fd, SHUT_WR);
	answer = hear_json(fd);
	assert_int_equal(json_integer_value(json_object_get(answer, "id")), 1);
	json_decref(answer);
	answer = hear_json(fd);
	assert_string_equal(json_string_value(json_object_get(answer, "id")), "x");
	json_decref(answer);
	assert_null(hear(fd));
	assert_int_equal(fake.buttons, 1);
}

static void test_long_line(void **state)
{
	scope_fd int fd = dial();
	scope_free char *text = malloc(CONTROL_LINE_MAX + 10);
	json_t *answer;

	/* As long as may be: answered. */
	memset(text, ' ', CONTROL_LINE_MAX);
	memcpy(text + CONTROL_LINE_MAX - 50, "{\"jsonrpc\":\"2.0\",\"id\":5,\"method\":\"methods\"}", 43);
	text[CONTROL_LINE_MAX - 1] = '\n';
	say(fd, text, CONTROL_LINE_MAX);
	answer = hear_json(fd);
	assert_non_null(json_object_get(answer, "result"));
	json_decref(answer);
	/* Longer: refused, and the connection ends. */
	memset(text, ' ', CONTROL_LINE_MAX + 10);
	say(fd, text, CONTROL_LINE_MAX + 10);
	answer = hear_json(fd);
	assert_non_null(json_object_get(answer, "error"));
	json_decref(answer);
	assert_null(hear(fd));
}

/* One that asks and asks but never reads is held back, and others go on. */
static void test_slow_client(void **state)
{
	static const char request[] = "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"methods\"}\n";
	scope_fd int slow = dial();
	scope_fd int other = dial();
	unsigned sent = 0;

	while (send(slow, request, sizeof(request) - 1, MSG_DONTWAIT | MSG_NOSIGNAL) == sizeof(request) - 1 &&
		sent < 100000)
		sent++;
	expect_result(other, "status", "{}");
	for (unsigned i = 0; i < sent && i < 1000; i++)
		assert_non_null(hear(slow));
	expect_result(other, "status", "{}");
}

static void test_many_clients(void **state)
{
	int fds[CONTROL_CLIENTS_MAX];
	json_t *answer;
	int more;

	for (unsigned i = 0; i < ARRAY_SIZE(fds); i++) {
		fds[i] = dial();
		expect_result(fds[i], "status", "{}");
	}
	more = dial();
	answer = hear_json(more);
	assert_non_null(json_object_get(answer, "error"));
	json_decref(answer);
	close(more);
	for (unsigned i = 0; i < ARRAY_SIZE(fds); i++)
		close(fds[i]);
	for (unsigned i = 0; i < 100; i++) { /* places are free again, also of those that left in the middle */
		scope_fd int fd = dial();
		static const char half[] = "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"pause\"}\n{\"jso";

		/* Refused while those before still have the places of what they asked for. */
		(void)!send(fd, half, sizeof(half) - 1, MSG_NOSIGNAL);
	}
	usleep(150000);
	more = dial();
	expect_result(more, "status", "{}");
	close(more);
}

static void tell(void *event)
{
	fake.vm->observer(fake.vm->observer_opaque, *(enum vm_event *)event,
		*(enum vm_event *)event == VM_EVENT_REMOVED ? "disk3" : NULL, NULL);
}

static void test_events(void **state)
{
	static enum vm_event paused = VM_EVENT_PAUSED, removed = VM_EVENT_REMOVED, off = VM_EVENT_POWER_OFF;
	scope_fd int fd = dial();
	scope_fd int other = dial();
	json_t *event;

	expect_result(fd, "events", "{}");
	expect_result(other, "status", "{}");
	loop_post(fake.vm->loop, tell, &paused);
	loop_post(fake.vm->loop, tell, &removed);
	event = hear_json(fd);
	assert_string_equal(json_string_value(json_object_get(event, "method")), "paused");
	assert_null(json_object_get(event, "id"));
	json_decref(event);
	event = hear_json(fd);
	assert_string_equal(json_string_value(json_object_get(json_object_get(event, "params"), "device")), "disk3");
	json_decref(event);
	expect_result(fd, "events", "{\"on\":false}");
	loop_post(fake.vm->loop, tell, &off);
	expect_result(fd, "status", "{}");
	expect_result(other, "status", "{}");
}

static void print(void *text)
{
	console_tap_put(fake.tap, text, strlen(text));
}

static void test_console(void **state)
{
	scope_fd int fd = dial();

	expect_result(fd, "console-attach", "{}");
	loop_post(fake.vm->loop, print, "login:\n");
	assert_string_equal(hear(fd), "login:");
	say(fd, "root\n", 5);
	for (unsigned i = 0; i < 100 && fake.typed_length < 5; i++)
		usleep(10000);
	assert_memory_equal(fake.typed, "root\n", 5);
	shutdown(fd, SHUT_RDWR);
	for (unsigned i = 0; i < 100 && fake.tap; i++)
		usleep(10000);
	assert_null(fake.tap);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {TEST(test_bad_requests), TEST(test_methods), TEST(test_answers_in_time),
		TEST(test_order), TEST(test_long_line), TEST(test_slow_client), TEST(test_many_clients),
		TEST(test_events), TEST(test_console)};

	alarm(100);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
