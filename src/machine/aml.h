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
size_t aml_begin_method(struct aml *aml, const char *name, unsigned arguments);
size_t aml_begin_if(struct aml *aml); /* the predicate is appended next, then what is done */
void aml_end(struct aml *aml, size_t begin);

/* Code: an operator is followed by its operands, each appended in turn (section 20.2.5). */
enum aml_operator {
	AML_LOCAL0 = 0x60,
	AML_LOCAL1 = 0x61,
	AML_LOCAL2 = 0x62,
	AML_LOCAL3 = 0x63,
	AML_ARG0 = 0x68,
	AML_ARG1 = 0x69,
	AML_ARG2 = 0x6a,
	AML_STORE = 0x70,	/* source, target */
	AML_ADD = 0x72,		/* operand, operand, target */
	AML_SHIFT_LEFT = 0x79,	/* operand, count, target */
	AML_SHIFT_RIGHT = 0x7a, /* operand, count, target */
	AML_AND = 0x7b,		/* operand, operand, target */
	AML_OR = 0x7d,		/* operand, operand, target */
	AML_NOTIFY = 0x86,	/* object, value */
	AML_EQUAL = 0x93,	/* operand, operand */
	AML_RETURN = 0xa4,	/* value */
	AML_NOWHERE = 0x00,	/* as a target: the result is the operator's value only */
};
void aml_operator(struct aml *aml, enum aml_operator op);
/* A name as an operand, target or call (its arguments are appended next), in its encoded form (section 20.2.2): "PCUP",
 * "\\\x2e_SB_PCI0" for \_SB.PCI0. */
void aml_path(struct aml *aml, const char *name);

/* Registers in ports: OperationRegion (name, SystemIO, base, size), then Field () with fields in their order. */
void aml_port_region(struct aml *aml, const char *name, uint16_t base, uint8_t size);
size_t aml_begin_fields(struct aml *aml, const char *region, unsigned access_bytes); /* 1, 2 or 4 */
void aml_field(struct aml *aml, const char *name, unsigned bits);

void aml_integer(struct aml *aml, uint64_t value);
/* Name (name, what is appended next) */
void aml_name(struct aml *aml, const char *name);
void aml_name_integer(struct aml *aml, const char *name, uint64_t value);
void aml_name_string(struct aml *aml, const char *name, const char *value);
void aml_name_buffer(struct aml *aml, const char *name, const void *bytes, uint8_t n); /* n below 64 */
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
/* Memory that a device is */
void aml_ram(struct aml *aml, uint64_t first, uint64_t last);
