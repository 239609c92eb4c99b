/* Sizes as people write them: "512M", "1G", "65536". */
#pragma once

#include <stdint.h>

#include "base/error.h"

/* Bytes from a whole number with an optional unit K, M, G or T (powers of 1024, either case, "iB" or "B" may follow).
 * -EINVAL with a message that names the text if it is anything else, -ERANGE if it does not fit. */
int size_parse(const char *text, uint64_t *bytes, struct error *err);
