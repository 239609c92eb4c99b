/* What the DSDT says of hot plug of vCPUs and memory (hotplug.h): devices that come and go, and the methods behind the
 * events. Everything is written out for each number: the guest has nothing to compute, and no name is used twice at once. */
#include <stdio.h>

#include "machine/acpi_tables.h"
#include "machine/board.h"
#include "machine/hotplug.h"
#include "machine/memory.h"

/* Values of Notify (ACPI 6.4, table 5.119) */
enum { DEVICE_CHECK = 1, EJECT_REQUEST = 3 };

/* Names of registers: the kind's letter, the register's, and which of a pair. */
struct kind {
	char letter;
	const char *(*name)(char name[5], unsigned n);
	const char *method;
};

const char *hotplug_cpu_name(char name[5], unsigned cpu)
{
	snprintf(name, 5, "CP%02X", cpu & 0xff);
	return name;
}

static const char *memory_name(char name[5], unsigned slot)
{
	snprintf(name, 5, "MM%02X", slot & 0xff);
	return name;
}

static const struct kind cpus = {'C', hotplug_cpu_name, "CSCN"}, memory = {'M', memory_name, "MSCN"};

static const char *register_name(char name[5], const struct kind *kind, const char *which, unsigned half)
{
	snprintf(name, 5, "%cH%s%u", kind->letter, which, half & 1);
	return name;
}

static void describe_kind(struct aml *aml, const struct kind *kind, const char *region, uint16_t base)
{
	static const char *const pairs[] = {"T", "A", "L"}; /* there, added, leaving */
	char name[5];
	size_t fields;

	aml_port_region(aml, region, base, HOTPLUG_KIND_PORTS);
	fields = aml_begin_fields(aml, region, 4);
	for (unsigned i = 0; i < 6; i++)
		aml_field(aml, register_name(name, kind, pairs[i / 2], i), 32);
	aml_field(aml, register_name(name, kind, "E", 0), 32);
	aml_field(aml, register_name(name, kind, "S", 0), 32);
	aml_end(aml, fields);
}

void hotplug_describe_registers(struct aml *aml)
{
	describe_kind(aml, &cpus, "CHPR", BOARD_PORT_HOTPLUG);
	describe_kind(aml, &memory, "MHPR", BOARD_PORT_HOTPLUG + HOTPLUG_KIND_PORTS);
}

/* operand & 1 << n, as a predicate */
static void append_bit(struct aml *aml, unsigned n)
{
	aml_integer(aml, 1u << (n & 31));
	aml_operator(aml, AML_NOWHERE);
}

/* _STA: 15 (present, enabled, shown, working) while it is there (section 6.3.7), _EJ0, _OST. */
static void describe_presence(struct aml *aml, const struct kind *kind, unsigned n)
{
	char name[5];
	size_t method = aml_begin_method(aml, "_STA", 0), condition = aml_begin_if(aml);

	aml_operator(aml, AML_AND);
	aml_path(aml, register_name(name, kind, "T", n >> 5));
	append_bit(aml, n);
	aml_operator(aml, AML_RETURN);
	aml_integer(aml, 15);
	aml_end(aml, condition);
	aml_operator(aml, AML_RETURN);
	aml_integer(aml, 0);
	aml_end(aml, method);

	method = aml_begin_method(aml, "_EJ0", 1);
	aml_operator(aml, AML_STORE);
	aml_integer(aml, n);
	aml_path(aml, register_name(name, kind, "E", 0));
	aml_end(aml, method);

	/* Store (Arg0 << 16 | (Arg1 & 255) << 8 | n, status) */
	method = aml_begin_method(aml, "_OST", 3);
	aml_operator(aml, AML_SHIFT_LEFT);
	aml_operator(aml, AML_ARG0);
	aml_integer(aml, 16);
	aml_operator(aml, AML_LOCAL0);
	aml_operator(aml, AML_AND);
	aml_operator(aml, AML_ARG1);
	aml_integer(aml, 255);
	aml_operator(aml, AML_LOCAL1);
	aml_operator(aml, AML_SHIFT_LEFT);
	aml_operator(aml, AML_LOCAL1);
	aml_integer(aml, 8);
	aml_operator(aml, AML_LOCAL1);
	aml_operator(aml, AML_OR);
	aml_operator(aml, AML_LOCAL0);
	aml_operator(aml, AML_LOCAL1);
	aml_operator(aml, AML_LOCAL0);
	aml_operator(aml, AML_OR);
	aml_operator(aml, AML_LOCAL0);
	aml_integer(aml, n);
	aml_path(aml, register_name(name, kind, "S", 0));
	aml_end(aml, method);
}

/* Reads and clears one register, then notifies the devices of its bits. */
static void describe_events(
	struct aml *aml, const struct kind *kind, const char *which, unsigned half, unsigned count, unsigned value)
{
	char name[5];

	aml_operator(aml, AML_STORE);
	aml_path(aml, register_name(name, kind, which, half));
	aml_operator(aml, AML_LOCAL0);
	aml_operator(aml, AML_STORE);
	aml_operator(aml, AML_LOCAL0);
	aml_path(aml, register_name(name, kind, which, half));
	for (unsigned n = 32 * half; n < 32 * half + 32 && n < count; n++) {
		if (kind == &cpus && n == 0)
			continue;
		size_t condition = aml_begin_if(aml);

		aml_operator(aml, AML_AND);
		aml_operator(aml, AML_LOCAL0);
		append_bit(aml, n);
		aml_operator(aml, AML_NOTIFY);
		aml_path(aml, kind->name(name, n));
		aml_integer(aml, value);
		aml_end(aml, condition);
	}
}

static void describe_method(struct aml *aml, const struct kind *kind, unsigned count)
{
	size_t method = aml_begin_method(aml, kind->method, 0);

	for (unsigned half = 0; 32 * half < count; half++) {
		describe_events(aml, kind, "A", half, count, DEVICE_CHECK);
		describe_events(aml, kind, "L", half, count, EJECT_REQUEST);
	}
	aml_end(aml, method);
}

void hotplug_describe_cpu(struct aml *aml, unsigned cpu)
{
	const struct acpi_madt_lapic lapic = {.length = sizeof(lapic), .uid = cpu, .id = cpu, .flags = 1 /* enabled */};

	aml_name_buffer(aml, "_MAT", &lapic, sizeof(lapic));
	describe_presence(aml, &cpus, cpu);
}

void hotplug_describe_cpu_event(struct aml *aml, unsigned count)
{
	describe_method(aml, &cpus, count);
}

void hotplug_describe_memory(struct aml *aml, struct board *board)
{
	const struct guest_memory *m = board_memory(board);
	char name[5];

	for (unsigned slot = 0; slot < m->slots.count; slot++) {
		struct memory_range range = memory_slot(m, slot);
		size_t device = aml_begin_device(aml, memory_name(name, slot));

		aml_name_eisa(aml, "_HID", "PNP0C80"); /* a memory device (section 9.11) */
		aml_name_integer(aml, "_UID", slot);
		size_t resources = aml_begin_resources(aml);
		aml_ram(aml, range.gpa, range.gpa + range.size - 1);
		aml_end_resources(aml, resources);
		describe_presence(aml, &memory, slot);
		aml_end(aml, device);
	}
	describe_method(aml, &memory, m->slots.count);
}
