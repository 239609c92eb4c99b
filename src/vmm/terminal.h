/* The user's terminal: raw while the guest has it, as it was before whenever the guest has not, and the escape keys. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Makes sure that the terminal gets its settings back when the program ends by exit() or by a fault; SIGKILL cannot be
 * caught. Before any engine installs its own handlers, so that these stay the ones behind it. */
void terminal_guard(void);

/* true: fd is a terminal that this process, being in its foreground, has switched to raw. */
bool terminal_raw(int fd);
/* The settings found by terminal_raw() are back; nothing happens if there are none. Safe in a signal handler. */
void terminal_restore(void);

/* A message on standard error, as printf; its newlines return the carriage also while the terminal is raw. */
void terminal_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Escape keys: Ctrl-A, then x (leave), h (help), a or Ctrl-A (send one Ctrl-A). Anything else goes to the guest with
 * the Ctrl-A before it, as if there were no escape. */
#define TERMINAL_ESCAPE 0x01

enum terminal_key { TERMINAL_KEY_NONE, TERMINAL_KEY_LEAVE, TERMINAL_KEY_HELP };

struct terminal_filter {
	bool escaped; /* the last byte was an escape */
};

/* Takes bytes from `in` until an escape command is complete or none are left; *used says how many. What is for the
 * guest is put in `out`, which has room for 2 * n bytes; *produced says how much. */
enum terminal_key terminal_filter(
	struct terminal_filter *filter, const uint8_t *in, size_t n, size_t *used, uint8_t *out, size_t *produced);

extern const char terminal_help[];
