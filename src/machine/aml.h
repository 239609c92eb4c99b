/* A small writer of ACPI machine language (ACPI 6.4, chapter 20) and of resource descriptors (section 6.4): as much as
 * the board's DSDT needs. Names are given as four characters each ("_SB_"), with a leading backslash for the root. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct aml {
	uint8_t *bytes;
	size_t length, room;
	bool failed; /* memory ran out; all that follows does nothing */
};

void aml_free(struct aml *aml);
void aml_append(struct aml *aml, const void *bytes, size_t n);

/* A begin gives the position that its end wants back; they nest. */
size_t aml_begin_scope(struct aml *aml, const char *name);
size_t aml_begin_device(struct aml *aml, const char *name);
size_t aml_begin_package(struct aml *aml, uint8_t elements);
void aml_end(struct aml *aml, size_t begin);

void aml_integer(struct aml *aml, uint64_t value);
/* Name (name, what is appended next) */
void aml_name(struct aml *aml, const char *name);
void aml_name_integer(struct aml *aml, const char *name, uint64_t value);
void aml_name_string(struct aml *aml, const char *name, const char *value);
/* id: three capitals and four hexadecimal digits, "PNP0A03" */
void aml_name_eisa(struct aml *aml, const char *name, const char *id);

/* Name (_CRS, ResourceTemplate () { ... }) */
size_t aml_begin_resources(struct aml *aml);
void aml_end_resources(struct aml *aml, size_t begin);
void aml_port(struct aml *aml, uint16_t base, uint8_t length);
void aml_irq(struct aml *aml, unsigned irq);
void aml_memory_fixed(struct aml *aml, uint32_t base, uint32_t size);
/* Windows that a bridge hands down */
void aml_window_buses(struct aml *aml, uint8_t first, uint8_t last);
void aml_window_ports(struct aml *aml, uint16_t first, uint16_t last);
void aml_window_memory(struct aml *aml, uint64_t first, uint64_t last);
