/* What the DSDT says of PCI hot plug: the slots, how each is ejected, and the method behind the event. */
#include <stdio.h>

#include "machine/board.h"
#include "machine/hotplug_pci.h"

enum { SLOT_FIRST = 1, SLOT_LAST = 31 };

/* Values of Notify (ACPI 6.4, table 5.119) */
enum { DEVICE_CHECK = 1, EJECT_REQUEST = 3 };

static const char *slot_name(char name[5], unsigned slot)
{
	snprintf(name, 5, "SL%02X", slot & 0xff);
	return name;
}

/* If (Local0 & 1 << slot) { Notify (slot, value) } */
static void describe_notify(struct aml *aml, unsigned slot, unsigned value)
{
	char name[5];
	size_t condition = aml_begin_if(aml);

	aml_operator(aml, AML_AND);
	aml_operator(aml, AML_LOCAL0);
	aml_integer(aml, 1u << slot);
	aml_operator(aml, AML_NOWHERE);
	aml_operator(aml, AML_NOTIFY);
	aml_path(aml, slot_name(name, slot));
	aml_integer(aml, value);
	aml_end(aml, condition);
}

static void describe_slot(struct aml *aml, unsigned slot)
{
	char name[5];
	size_t device = aml_begin_device(aml, slot_name(name, slot));

	aml_name_integer(aml, "_ADR", slot << 16);
	aml_name_integer(aml, "_SUN", slot);
	size_t eject = aml_begin_method(aml, "_EJ0", 1);
	aml_operator(aml, AML_STORE);
	aml_integer(aml, 1u << slot);
	aml_path(aml, "PCEJ");
	aml_end(aml, eject);
	aml_end(aml, device);
}

static void describe_register(struct aml *aml, const char *name, unsigned value)
{
	size_t any;

	aml_operator(aml, AML_STORE);
	aml_path(aml, name);
	aml_operator(aml, AML_LOCAL0);
	any = aml_begin_if(aml);
	aml_operator(aml, AML_LOCAL0);
	for (unsigned slot = SLOT_FIRST; slot <= SLOT_LAST; slot++)
		describe_notify(aml, slot, value);
	aml_end(aml, any);
}

void hotplug_pci_describe(struct aml *aml)
{
	size_t fields, method;

	aml_port_region(aml, "PCHP", BOARD_PORT_PCI_HOTPLUG, HOTPLUG_PCI_PORTS);
	fields = aml_begin_fields(aml, "PCHP", 4);
	aml_field(aml, "PCUP", 32);
	aml_field(aml, "PCDN", 32);
	aml_field(aml, "PCEJ", 32);
	aml_end(aml, fields);
	for (unsigned slot = SLOT_FIRST; slot <= SLOT_LAST; slot++)
		describe_slot(aml, slot);
	method = aml_begin_method(aml, "PCNT", 0);
	describe_register(aml, "PCUP", DEVICE_CHECK);
	describe_register(aml, "PCDN", EJECT_REQUEST);
	aml_end(aml, method);
}
