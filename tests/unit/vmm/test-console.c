/* The serial console's back ends and the escape keys, with a serial port that the test plays. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <pty.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>
#include <utmp.h>

#include "base/loop.h"
#include "base/util.h"
#include "vmm/console.h"
#include "vmm/terminal.h"

/* ---- a serial port ---- */
struct serial {
	size_t (*output)(void *opaque, const uint8_t *bytes, size_t n);
	void (*wait)(void *opaque);
	void *output_opaque;
	void (*room)(void *opaque);
	void *room_opaque;
	atomic_uint flushes;
	pthread_mutex_t lock;
	uint8_t got[1 << 20];
	size_t got_count, limit; /* takes no more than up to the limit */
};

void serial_set_output(struct serial *s, size_t (*output)(void *opaque, const uint8_t *bytes, size_t n),
	void (*wait)(void *opaque), void *opaque)
{
	s->output = output;
	s->wait = wait;
	s->output_opaque = opaque;
}

void serial_flush(struct serial *s)
{
	s->flushes++;
}

void serial_set_room(struct serial *s, void (*room)(void *opaque), void *opaque)
{
	s->room = room;
	s->room_opaque = opaque;
}

size_t serial_input(struct serial *s, const uint8_t *bytes, size_t n)
{
	pthread_mutex_lock(&s->lock);
	n = min(n, s->limit - s->got_count);
	memcpy(s->got + s->got_count, bytes, n);
	s->got_count += n;
	pthread_mutex_unlock(&s->lock);
	return n;
}

/* ---- the fixture: a loop on a thread of its own ---- */
struct fixture {
	struct serial serial;
	struct loop *loop;
	pthread_t thread;
	struct console *console;
	atomic_int left;
	char folder[64], path[200];
};

static void *run(void *opaque)
{
	loop_run(opaque);
	return NULL;
}

static void leave(void *opaque)
{
	struct fixture *f = opaque;

	f->left++;
}

static int create(struct fixture *f, enum vmm_serial kind, struct error *err)
{
	return console_create(&f->console, kind, f->path, &f->serial, f->loop, NULL, leave, f, err);
}

static void start(struct fixture *f)
{
	pthread_create(&f->thread, NULL, run, f->loop);
}

static void finish(struct fixture *f)
{
	loop_stop(f->loop);
	pthread_join(f->thread, NULL);
	console_destroy(f->console);
	f->console = NULL;
}

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	pthread_mutex_init(&f->serial.lock, NULL);
	f->serial.limit = sizeof(f->serial.got);
	strcpy(f->folder, "/tmp/test-console-XXXXXX");
	if (!mkdtemp(f->folder) || loop_create(&f->loop, NULL) < 0)
		return -1;
	snprintf(f->path, sizeof(f->path), "%s/it", f->folder);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	loop_destroy(f->loop);
	unlink(f->path);
	rmdir(f->folder);
	free(f);
	return 0;
}

static void print(struct fixture *f, const void *bytes, size_t n)
{
	while (n) {
		size_t taken = f->serial.output(f->serial.output_opaque, bytes, n);

		if (!taken)
			f->serial.wait(f->serial.output_opaque);
		bytes = (const char *)bytes + taken;
		n -= taken;
	}
}

static void wait_for_input(struct fixture *f, const void *bytes, size_t n)
{
	for (int tries = 0; tries < 2000; tries++) {
		pthread_mutex_lock(&f->serial.lock);
		if (f->serial.got_count >= n) {
			assert_int_equal(f->serial.got_count, n);
			assert_memory_equal(f->serial.got, bytes, n);
			pthread_mutex_unlock(&f->serial.lock);
			return;
		}
		pthread_mutex_unlock(&f->serial.lock);
		usleep(1000);
	}
	fail_msg("%zu bytes of input came, not %zu", f->serial.got_count, n);
}

static void expect(int fd, const void *bytes, size_t n)
{
	uint8_t *got = malloc(n);

	for (size_t at = 0; at < n;) {
		struct pollfd wait = {.fd = fd, .events = POLLIN};
		ssize_t count;

		assert_int_equal(poll(&wait, 1, 5000), 1);
		count = read(fd, got + at, n - at);
		assert_true(count > 0);
		at += (size_t)count;
	}
	assert_memory_equal(got, bytes, n);
	free(got);
}

static int attach(struct fixture *f)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	strcpy(address.sun_path, f->path);
	assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
	return fd;
}

/* ---- tests ---- */

static void test_filter(void **state)
{
	static const struct {
		const char *in, *out;
		enum terminal_key key;
		size_t used;
	} cases[] = {
		{"hello", "hello", TERMINAL_KEY_NONE, 5},
		{"a\001xb", "a", TERMINAL_KEY_LEAVE, 3},
		{"\001h", "", TERMINAL_KEY_HELP, 2},
		{"a\001\001b", "a\001b", TERMINAL_KEY_NONE, 4},
		{"a\001ab", "a\001b", TERMINAL_KEY_NONE, 4},
		{"\001l", "\001l", TERMINAL_KEY_NONE, 2},
		{"\001\001x", "\001x", TERMINAL_KEY_NONE, 3},
		{"x\001", "x", TERMINAL_KEY_NONE, 2},
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct terminal_filter whole = {0}, pieces = {0};
		enum terminal_key key = TERMINAL_KEY_NONE;
		uint8_t out[32];
		size_t used, produced, total = 0, n = strlen(cases[i].in);

		assert_int_equal(
			terminal_filter(&whole, (const uint8_t *)cases[i].in, n, &used, out, &produced), cases[i].key);
		assert_int_equal(used, cases[i].used);
		assert_int_equal(produced, strlen(cases[i].out));
		assert_memory_equal(out, cases[i].out, produced);

		/* The same byte by byte: the state is kept between calls. */
		for (size_t at = 0; at < n && key == TERMINAL_KEY_NONE; at++) {
			key = terminal_filter(
				&pieces, (const uint8_t *)cases[i].in + at, 1, &used, out + total, &produced);
			total += produced;
		}
		assert_int_equal(key, cases[i].key);
		assert_int_equal(total, strlen(cases[i].out));
		assert_memory_equal(out, cases[i].out, total);
	}
}

static void test_file(void **state)
{
	struct fixture *f = *state;
	char text[] = "one\r\ntwo\r\n", got[64];
	int fd;

	for (int round = 0; round < 2; round++) { /* the second appends */
		assert_int_equal(create(f, VMM_SERIAL_FILE, NULL), 0);
		start(f);
		print(f, text, strlen(text));
		finish(f);
	}
	fd = open(f->path, O_RDONLY);
	assert_int_equal(read(fd, got, sizeof(got)), 2 * strlen(text));
	assert_memory_equal(got, text, strlen(text));
	close(fd);
}

static void test_file_refused(void **state)
{
	struct fixture *f = *state;
	struct error err = {0};

	snprintf(f->path, sizeof(f->path), "%s/no/such", f->folder);
	assert_int_equal(create(f, VMM_SERIAL_FILE, &err), -ENOENT);
	assert_non_null(strstr(err.text, f->path));
}

static void test_socket(void **state)
{
	struct fixture *f = *state;
	char backlog[] = "before anybody came\r\n", byte;
	struct stat status;
	int fd, other;

	assert_int_equal(create(f, VMM_SERIAL_SOCKET, NULL), 0);
	assert_int_equal(stat(f->path, &status), 0);
	assert_int_equal(status.st_mode & 0777, 0600);
	start(f);
	print(f, backlog, strlen(backlog));
	fd = attach(f);
	expect(fd, backlog, strlen(backlog));
	assert_int_equal(write(fd, "ls\001x\n", 5), 5); /* escapes are a terminal's */
	wait_for_input(f, "ls\001x\n", 5);

	other = attach(f); /* one at a time */
	while (read(other, &byte, 1) == 1)
		;
	close(other);
	print(f, "still here", 10);
	expect(fd, "still here", 10);

	close(fd); /* and again */
	fd = attach(f);
	for (int tries = 0; tries < 200; tries++) { /* the loop may not have seen the first one go */
		struct pollfd wait = {.fd = fd, .events = POLLIN};

		print(f, "x", 1);
		if (poll(&wait, 1, 10) == 1 && read(fd, &byte, 1) == 1 && byte == 'x')
			break;
		close(fd);
		fd = attach(f);
	}
	assert_int_equal(byte, 'x');
	close(fd);
	finish(f);
	assert_int_equal(stat(f->path, &status), -1);
}

static void test_socket_file(void **state)
{
	struct fixture *f = *state;
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int listener = socket(AF_UNIX, SOCK_STREAM, 0), fd;
	struct error err = {0};

	strcpy(address.sun_path, f->path);
	assert_int_equal(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
	listen(listener, 1);
	assert_int_equal(create(f, VMM_SERIAL_SOCKET, &err), -EADDRINUSE);
	close(listener); /* stale now */
	assert_int_equal(create(f, VMM_SERIAL_SOCKET, &err), 0);
	console_destroy(f->console);

	fd = open(f->path, O_CREAT | O_WRONLY, 0600);
	close(fd);
	assert_int_equal(create(f, VMM_SERIAL_SOCKET, &err), -EEXIST);
	assert_int_equal(access(f->path, F_OK), 0);

	memset(f->path, 'x', sizeof(f->path) - 1);
	f->path[0] = '/';
	address.sun_path[0] = '\0';
	assert_true(create(f, VMM_SERIAL_SOCKET, &err) < 0);
	snprintf(f->path, sizeof(f->path), "%s/it", f->folder);
}

/* A client that reads nothing does not hold the guest up for ever: it is hung up on. */
static void test_socket_stalled(void **state)
{
	struct fixture *f = *state;
	static uint8_t much[2 << 20];
	int fd;

	assert_int_equal(create(f, VMM_SERIAL_SOCKET, NULL), 0);
	start(f);
	fd = attach(f);
	print(f, "x", 1);
	expect(fd, "x", 1);
	print(f, much, sizeof(much));
	close(fd);
	finish(f);
}

/* Standard input and output replaced for the time of a test. */
static void swap_stdio(int saved[2], int in, int out)
{
	fflush(stdout);
	saved[0] = dup(0);
	saved[1] = dup(1);
	dup2(in, 0);
	dup2(out, 1);
}

static void restore_stdio(int saved[2])
{
	dup2(saved[0], 0);
	dup2(saved[1], 1);
	close(saved[0]);
	close(saved[1]);
}

static uint8_t data[300000]; /* more than the console and a pipe hold */

static void *print_much(void *opaque)
{
	print(opaque, data, sizeof(data));
	return NULL;
}

/* Through pipes: slow reader, slow guest, nothing lost; the end of input is no end. */
static void test_pipes(void **state)
{
	struct fixture *f = *state;
	int in[2], out[2], saved[2];
	pthread_t reader;
	struct error err = {0};

	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 2654435761u >> 13);
	assert_int_equal(pipe(in) | pipe(out), 0);
	f->serial.limit = 0;
	swap_stdio(saved, in[0], out[1]);
	if (create(f, VMM_SERIAL_STDIO, &err) < 0) {
		restore_stdio(saved);
		fail_msg("%s", err.text);
	}
	start(f);

	pthread_create(&reader, NULL, print_much, f);
	usleep(20000); /* so that it must wait */
	expect(out[0], data, sizeof(data));
	pthread_join(reader, NULL);
	assert_true(f->serial.flushes > 0); /* refused bytes were asked for again */

	assert_int_equal(write(in[1], data, 50000), 50000);
	close(in[1]);
	for (size_t limit = 0; limit < 50000; limit += 5000) {
		pthread_mutex_lock(&f->serial.lock);
		f->serial.limit = limit + 5000;
		pthread_mutex_unlock(&f->serial.lock);
		f->serial.room(f->serial.room_opaque);
		usleep(2000);
	}
	wait_for_input(f, data, 50000);
	print(f, "alive", 5);
	expect(out[0], "alive", 5);
	assert_int_equal(f->left, 0);
	finish(f);
	restore_stdio(saved);
	close(in[0]);
	close(out[0]);
	close(out[1]);
}

/* A reader that never reads: the vCPU waits, and is let go when the VM ends. */
static void test_release(void **state)
{
	struct fixture *f = *state;
	int in = open("/dev/null", O_RDONLY), out[2], saved[2];
	pthread_t thread;

	assert_int_equal(pipe(out), 0);
	swap_stdio(saved, in, out[1]);
	assert_int_equal(create(f, VMM_SERIAL_STDIO, NULL), 0);
	start(f);
	pthread_create(&thread, NULL, print_much, f);
	usleep(50000);
	assert_int_equal(pthread_tryjoin_np(thread, NULL), EBUSY);
	console_release(f->console);
	pthread_join(thread, NULL);
	finish(f); /* within its two seconds */
	restore_stdio(saved);
	close(in);
	close(out[0]);
	close(out[1]);
}

/* A plain file as standard input cannot be waited for, and is given to the guest all the same. */
static void test_plain_file_input(void **state)
{
	struct fixture *f = *state;
	const size_t size = 20000;
	int saved[2], fd = open(f->path, O_CREAT | O_RDWR, 0600), null = open("/dev/null", O_WRONLY);

	memset(data, 'z', size);
	assert_int_equal(pwrite(fd, data, size, 0), size);
	swap_stdio(saved, fd, null);
	assert_int_equal(create(f, VMM_SERIAL_STDIO, NULL), 0);
	start(f);
	wait_for_input(f, data, size);
	finish(f);
	restore_stdio(saved);
	close(fd);
	close(null);
}

/* Field by field: the structure has padding. */
static bool same_settings(const struct termios *a, const struct termios *b)
{
	return a->c_iflag == b->c_iflag && a->c_oflag == b->c_oflag && a->c_cflag == b->c_cflag &&
	       a->c_lflag == b->c_lflag && !memcmp(a->c_cc, b->c_cc, sizeof(a->c_cc));
}

/* On a terminal: raw while it runs, escapes work though the guest takes nothing, and settings come back. The child gets
 * the terminal as its own, which the test's process has not. */
static void test_terminal(void **state)
{
	struct fixture *f = *state;
	struct termios before, during, after;
	int master, status;
	pid_t child = forkpty(&master, NULL, NULL, NULL);
	char text[4096] = "";
	size_t got = 0;

	if (child == 0) {
		tcgetattr(0, &before);
		f->serial.limit = 3;
		if (create(f, VMM_SERIAL_STDIO, NULL) < 0)
			_exit(10);
		tcgetattr(0, &during);
		if (during.c_lflag & (ICANON | ECHO | ISIG) || during.c_oflag & OPOST)
			_exit(11);
		start(f);
		print(f, "ready", 5);
		while (!f->left)
			usleep(1000);
		finish(f);
		if (f->serial.got_count != 3 || memcmp(f->serial.got, "abc", 3))
			_exit(12);
		tcgetattr(0, &after);
		_exit(same_settings(&before, &after) ? 0 : 13);
	}
	assert_true(child > 0);
	while (!strstr(text, "ready") && got < sizeof(text) - 1) {
		ssize_t n = read(master, text + got, sizeof(text) - 1 - got);

		assert_true(n > 0);
		got += (size_t)n;
		text[got] = '\0';
	}
	assert_non_null(strstr(text, "Ctrl-A x leaves"));
	assert_int_equal(write(master, "abc", 3), 3);
	for (int i = 0; i < 100; i++) /* more than the input buffer holds */
		assert_int_equal(
			write(master, "0123456789012345678901234567890123456789012345678901234567890123456789", 70),
			70);
	assert_int_equal(write(master, "\001h", 2), 2);
	while (!strstr(text, "this help") && got < sizeof(text) - 1) {
		ssize_t n = read(master, text + got, sizeof(text) - 1 - got);

		assert_true(n > 0);
		got += (size_t)n;
		text[got] = '\0';
	}
	assert_int_equal(write(master, "\001x", 2), 2);
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
	close(master);
}

/* A process that dies of a fault gives the terminal back. */
static void test_terminal_fault(void **state)
{
	struct termios before, after;
	int master, slave, status;
	pid_t child;
	char byte;

	assert_int_equal(openpty(&master, &slave, NULL, NULL, NULL), 0);
	tcgetattr(slave, &before);
	child = fork();
	if (child == 0) {
		login_tty(dup(slave));
		terminal_guard();
		if (!terminal_raw(0))
			_exit(10);
		(void)!write(1, "x", 1);
		abort();
	}
	assert_int_equal(read(master, &byte, 1), 1);
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFSIGNALED(status));
	assert_int_equal(WTERMSIG(status), SIGABRT);
	tcgetattr(slave, &after);
	assert_true(same_settings(&before, &after));
	close(master);
	close(slave);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_filter),
		cmocka_unit_test_setup_teardown(test_file, setup, teardown),
		cmocka_unit_test_setup_teardown(test_file_refused, setup, teardown),
		cmocka_unit_test_setup_teardown(test_socket, setup, teardown),
		cmocka_unit_test_setup_teardown(test_socket_file, setup, teardown),
		cmocka_unit_test_setup_teardown(test_socket_stalled, setup, teardown),
		cmocka_unit_test_setup_teardown(test_pipes, setup, teardown),
		cmocka_unit_test_setup_teardown(test_release, setup, teardown),
		cmocka_unit_test_setup_teardown(test_plain_file_input, setup, teardown),
		cmocka_unit_test_setup_teardown(test_terminal, setup, teardown),
		cmocka_unit_test(test_terminal_fault),
	};

	signal(SIGPIPE, SIG_IGN);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
