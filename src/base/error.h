/* One error, filled by the function that failed and given context on the way up; only main() prints it and ends. */
#pragma once

#include <errno.h>
#include <stdarg.h>

struct error {
	int code;	 /* positive errno value, 0 while nothing has failed */
	char text[1000]; /* one line for the user: what, the value found, the remedy */
};

/* Fills err (which may be NULL) and returns -code, so that a caller writes `return error_set(err, EINVAL, ...)`. */
int error_set(struct error *err, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* As error_set with the current errno, whose meaning is appended: "format: No such file or directory". */
int error_errno(struct error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Puts "format: " in front of what err already says; returns -err->code. */
int error_wrap(struct error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));
