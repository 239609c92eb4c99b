/* Where the guest's serial port, or its virtio console, goes: standard input and output, a file, a Unix socket, or nowhere.
 *
 * Output: the serial port puts its bytes in a buffer of 64 KiB, a thread of the console writes them out. When the
 * buffer is full a vCPU that prints waits for room, the loop never does: nothing is lost because a pipe is slow.
 * Without a reader (a socket that nobody is connected to) the buffer keeps the newest 64 KiB. Input: read on the loop
 * as fast as the guest takes it; only a terminal is read on regardless, so that the escape keys work while the guest
 * does not listen.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/loop.h"
#include "base/threads.h"
#include "machine/serial.h"
#include "vmm/options.h"

struct console;

/* What a console is connected to: the functions are those of a serial port (machine/serial.h). */
struct console_port {
	void *port;
	const char *option; /* for messages: "--serial" */
	void (*set_output)(void *port, size_t (*output)(void *opaque, const uint8_t *bytes, size_t n),
		void (*wait)(void *opaque), void *opaque);
	void (*set_room)(void *port, void (*room)(void *opaque), void *opaque);
	size_t (*input)(void *port, const uint8_t *bytes, size_t n);
	void (*flush)(void *port);
};

/* Opens the back end and connects it to the port, while the loop does not run; leave(opaque) runs on the loop when the
 * user asks to leave. */
int console_create_on(struct console **console, enum vmm_serial kind, const char *path, struct console_port port,
	struct loop *loop, struct threads *threads, void (*leave)(void *opaque), void *opaque, struct error *err);
/* The same on the serial port. */
int console_create(struct console **console, enum vmm_serial kind, const char *path, struct serial *serial,
	struct loop *loop, struct threads *threads, void (*leave)(void *opaque), void *opaque, struct error *err);
/* From any thread: vCPUs no longer wait for room, what does not fit is lost. For the end, so that it cannot be held up.
 */
void console_release(struct console *console);
/* A listener beside the back end, from now on until it is removed; it stays the caller's. On the loop's thread, or while
 * the loop does not run. */
struct console_tap;
void console_add_tap(struct console *console, struct console_tap *tap);
void console_remove_tap(struct console *console, struct console_tap *tap);
/* Types bytes; returns how many were taken. The taps are told when there is room again. On the loop's thread. */
size_t console_type(struct console *console, const uint8_t *bytes, size_t n);
/* The terminal back to its user before the process is suspended, and to the guest again after. */
void console_suspend(struct console *console);
void console_resume(struct console *console);
/* Writes out what it holds, for two seconds at most, and closes. The port is not used any more. */
void console_destroy(struct console *console);
