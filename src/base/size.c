#include "base/size.h"

#include <ctype.h>
#include <string.h>
#include <strings.h>

int size_parse(const char *text, uint64_t *bytes, struct error *err)
{
	static const char units[] = "KMGT";
	const char *p = text;
	uint64_t value = 0;
	unsigned shift = 0;

	for (; isdigit((unsigned char)*p); p++) {
		if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, *p - '0', &value))
			return error_set(err, ERANGE, "size \"%s\" is too large; at most 16777215T", text);
	}
	if (p != text && *p) {
		const char *unit = strchr(units, toupper((unsigned char)*p));

		if (unit) {
			shift = (unit - units + 1) * 10;
			p++;
		}
		if (strcasecmp(p, "b") == 0 || (shift && strcasecmp(p, "ib") == 0))
			p += strlen(p);
	}
	if (p == text || *p)
		return error_set(err, EINVAL,
			"\"%s\" is not a size; write a whole number of bytes, or with a unit: 512M, 2G", text);
	if (value > UINT64_MAX >> shift)
		return error_set(err, ERANGE, "size \"%s\" is too large; at most 16777215T", text);
	*bytes = value << shift;
	return 0;
}
