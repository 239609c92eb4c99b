#include "base/error.h"

#include <stdio.h>
#include <string.h>

static int error_fill(struct error *err, int code, const char *format, va_list args)
{
	if (err) {
		err->code = code;
		vsnprintf(err->text, sizeof(err->text), format, args);
	}
	return -code;
}

int error_set(struct error *err, int code, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	error_fill(err, code, format, args);
	va_end(args);
	return -code;
}

int error_errno(struct error *err, const char *format, ...)
{
	int code = errno ? errno : EIO;
	va_list args;

	va_start(args, format);
	error_fill(err, code, format, args);
	va_end(args);
	if (err) {
		size_t used = strlen(err->text);

		snprintf(err->text + used, sizeof(err->text) - used, ": %s", strerror(code));
	}
	return -code;
}

int error_wrap(struct error *err, const char *format, ...)
{
	char inner[sizeof(err->text)];
	va_list args;
	size_t used;

	if (!err)
		return -EIO;
	memcpy(inner, err->text, sizeof(inner));
	va_start(args, format);
	vsnprintf(err->text, sizeof(err->text), format, args);
	va_end(args);
	used = strlen(err->text);
	snprintf(err->text + used, sizeof(err->text) - used, ": %s", inner);
	return -err->code;
}
