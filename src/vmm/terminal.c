/* The user's terminal; see terminal.h. */
#include "vmm/terminal.h"

#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "base/util.h"

/* Of the process and not of a VM, since a fault handler must find it: the one terminal, and its settings before. */
static struct {
	atomic_bool raw; /* the rest is set before it is */
	int fd;
	struct termios before;
} saved;

const char terminal_help[] = "\r\nhostel-vmm: Ctrl-A x  leave: stop the virtual machine\r\n"
			     "            Ctrl-A a  send Ctrl-A to the guest (Ctrl-A Ctrl-A does too)\r\n"
			     "            Ctrl-A h  this help\r\n";

void terminal_restore(void)
{
	if (atomic_exchange(&saved.raw, false))
		tcsetattr(saved.fd, TCSANOW, &saved.before);
}

bool terminal_raw(int fd)
{
	struct termios raw;

	/* In the background the settings are those of whoever has the terminal now, and not ours to change. */
	if (!isatty(fd) || tcgetpgrp(fd) != getpgrp())
		return false;
	if (!atomic_load(&saved.raw) && tcgetattr(fd, &saved.before) < 0)
		return false;
	raw = saved.before;
	cfmakeraw(&raw);
	saved.fd = fd;
	atomic_store(&saved.raw, true);
	if (tcsetattr(fd, TCSANOW, &raw) < 0) {
		atomic_store(&saved.raw, false);
		return false;
	}
	return true;
}

void terminal_say(const char *format, ...)
{
	char text[5000], *rest = text, *line;
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	flockfile(stderr); /* several vCPUs may have something to say */
	while ((line = strsep(&rest, "\n"))) {
		fputs(line, stderr);
		if (rest)
			fputs(atomic_load(&saved.raw) ? "\r\n" : "\n", stderr);
	}
	funlockfile(stderr);
}

static void fault_handler(int signal_number)
{
	terminal_restore();
	/* SA_RESETHAND has put the default back: returning repeats the fault, raising covers the sent ones. */
	raise(signal_number);
}

void terminal_guard(void)
{
	static const int faults[] = {
		SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT, SIGQUIT, SIGXCPU, SIGXFSZ};
	struct sigaction action = {.sa_handler = fault_handler, .sa_flags = SA_RESETHAND | SA_ONSTACK};

	sigemptyset(&action.sa_mask);
	for (size_t i = 0; i < ARRAY_SIZE(faults); i++)
		sigaction(faults[i], &action, NULL);
	atexit(terminal_restore);
}

enum terminal_key terminal_filter(
	struct terminal_filter *filter, const uint8_t *in, size_t n, size_t *used, uint8_t *out, size_t *produced)
{
	*produced = 0;
	for (*used = 0; *used < n;) {
		uint8_t byte = in[(*used)++];

		if (!filter->escaped) {
			if (byte == TERMINAL_ESCAPE)
				filter->escaped = true;
			else
				out[(*produced)++] = byte;
			continue;
		}
		filter->escaped = false;
		switch (byte) {
		case 'x':
			return TERMINAL_KEY_LEAVE;
		case 'h':
			return TERMINAL_KEY_HELP;
		case 'a':
		case TERMINAL_ESCAPE:
			out[(*produced)++] = TERMINAL_ESCAPE;
			break;
		default:
			out[(*produced)++] = TERMINAL_ESCAPE;
			out[(*produced)++] = byte;
		}
	}
	return TERMINAL_KEY_NONE;
}
