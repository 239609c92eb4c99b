/* The ACPI tables (ACPI 6.4, chapter 5): what the board is, told to the guest. All of them lie in the BIOS area from
 * 0xe0000, where the root pointer is also searched for (section 5.2.5.1) and which the memory map keeps reserved.
 */
#include "machine/board.h"

#include <string.h>

#include "base/util.h"
#include "machine/acpi_tables.h"
#include "machine/aml.h"
#include "machine/hotplug.h"
#include "machine/hotplug_pci.h"
#include "machine/pci.h"
#include "machine/pvpanic.h"
#include "machine/vmgenid.h"

#define AREA_START 0xe0000ull
#define AREA_END BOARD_GENERATION /* behind it: SMBIOS */
#define FACS_ADDRESS (AREA_START + 0x40) /* wants 64 bytes of alignment (section 5.2.10) */
#define TABLES_START (AREA_START + 0x80)

#define CPUS_MAX 64 /* all of them have xAPIC identifiers below 255, so x2APIC entries are never needed */

#define PM1A_EVENT BOARD_PORT_PM_BASE
#define PM1A_CONTROL (BOARD_PORT_PM_BASE + 4)
#define PM_TIMER (BOARD_PORT_PM_BASE + 8)
#define SLEEP_TYPE_OFF 5 /* what pm.c takes for S5 */

/* FADT flags (table 5.10) and IA-PC boot architecture flags (table 5.11) */
enum {
	FADT_WBINVD = 1 << 0,
	FADT_C1_SUPPORTED = 1 << 2,
	FADT_NO_FIXED_SLEEP_BUTTON = 1 << 5,
	FADT_NO_FIXED_RTC_WAKE = 1 << 6,
	FADT_TIMER_32BIT = 1 << 8,
	FADT_RESET_REGISTER = 1 << 10,

	BOOT_LEGACY_DEVICES = 1 << 0,
	BOOT_NO_VGA = 1 << 2,
	BOOT_NO_ASPM = 1 << 4,

	PROFILE_ENTERPRISE_SERVER = 4,
	ADDRESS_SPACE_PORTS = 1,

	MADT_PCAT_COMPATIBLE = 1,
	MADT_LAPIC_ENABLED = 1,
	MADT_LAPIC_CAN_COME = 2, /* "online capable" */
	/* MPS INTI flags (table 5.26) */
	INTERRUPT_CONFORMS = 0,
	INTERRUPT_LEVEL_HIGH = 0x0d,
};

/* Where the next table goes in guest memory. */
struct area {
	struct guest_memory *memory;
	uint64_t next;
};

static uint8_t checksum(const void *bytes, size_t n)
{
	uint8_t sum = 0;

	for (size_t i = 0; i < n; i++)
		sum += ((const uint8_t *)bytes)[i];
	return -sum;
}

static void fill_header(struct acpi_header *header, const char *signature, uint8_t revision)
{
	memcpy(header->signature, signature, 4);
	header->revision = revision;
	memcpy(header->oem, "HOSTEL", 6);
	memcpy(header->oem_table, "HOSTELVM", 8);
	header->oem_revision = 1;
	memcpy(header->creator, "HSTL", 4);
	header->creator_revision = 1;
}

static int put(struct area *area, uint64_t gpa, const void *bytes, size_t n, struct error *err)
{
	if (gpa + n > AREA_END || !memory_write(area->memory, gpa, bytes, n))
		return error_set(err, ENOSPC, "ACPI tables: %zu bytes at 0x%llx do not fit below 0x%llx", n,
			(unsigned long long)gpa, (unsigned long long)AREA_END);
	return 0;
}

/* Completes the header of a table of n bytes and writes it; *gpa is where. */
static int put_table(struct area *area, void *table, size_t n, uint64_t *gpa, struct error *err)
{
	struct acpi_header *header = table;

	header->length = n;
	header->checksum = 0;
	header->checksum = checksum(table, n);
	*gpa = area->next;
	area->next = align_up(*gpa + n, 16);
	return put(area, *gpa, table, n, err);
}

/* ---- DSDT ---- */

static void describe_cpus(struct aml *aml, unsigned cpus, bool can_change)
{
	for (unsigned i = 0; i < cpus; i++) {
		char name[5];
		size_t device = aml_begin_device(aml, hotplug_cpu_name(name, i));

		aml_name_string(aml, "_HID", "ACPI0007");
		aml_name_integer(aml, "_UID", i);
		if (i && can_change)
			hotplug_describe_cpu(aml, i);
		aml_end(aml, device);
	}
}

/* INTA of each slot; no device uses the other pins (section 6.2.13). */
static void describe_routing(struct aml *aml)
{
	enum { FIRST = 1, LAST = 31 };

	aml_name(aml, "_PRT");
	size_t table = aml_begin_package(aml, LAST - FIRST + 1);
	for (unsigned slot = FIRST; slot <= LAST; slot++) {
		size_t entry = aml_begin_package(aml, 4);

		aml_integer(aml, slot << 16 | 0xffff);
		aml_integer(aml, 0);
		aml_integer(aml, 0);
		aml_integer(aml, pci_slot_gsi(slot));
		aml_end(aml, entry);
	}
	aml_end(aml, table);
}

/* A conventional PCI host bridge: as a PCI Express one it would owe the guest an _OSC method and express capabilities.
 */
static void describe_pci(struct aml *aml)
{
	size_t device = aml_begin_device(aml, "PCI0");

	aml_name_eisa(aml, "_HID", "PNP0A03");
	aml_name_integer(aml, "_UID", 0);
	aml_name_integer(aml, "_SEG", 0);
	aml_name_integer(aml, "_BBN", 0);
	size_t resources = aml_begin_resources(aml);
	aml_window_buses(aml, 0, 0xff);
	aml_port(aml, 0xcf8, 8);
	aml_window_ports(aml, 0, 0xcf7);
	aml_window_ports(aml, 0xd00, 0xffff);
	aml_window_memory(aml, BOARD_PCI_MMIO_BASE, BOARD_PCI_MMIO_BASE + BOARD_PCI_MMIO_SIZE - 1);
	aml_window_memory(aml, BOARD_PCI_MMIO64_BASE, BOARD_PCI_MMIO64_BASE + BOARD_PCI_MMIO64_SIZE - 1);
	aml_end_resources(aml, resources);
	describe_routing(aml);
	hotplug_pci_describe(aml);
	aml_end(aml, device);
}

static void describe_serial(struct aml *aml)
{
	size_t device = aml_begin_device(aml, "COM1");

	aml_name_eisa(aml, "_HID", "PNP0501");
	aml_name_integer(aml, "_UID", 1);
	size_t resources = aml_begin_resources(aml);
	aml_port(aml, BOARD_PORT_COM1, 8);
	aml_irq(aml, 4);
	aml_end_resources(aml, resources);
	aml_end(aml, device);
}

static void describe_clock(struct aml *aml)
{
	size_t device = aml_begin_device(aml, "RTC0");

	aml_name_eisa(aml, "_HID", "PNP0B00");
	size_t resources = aml_begin_resources(aml);
	aml_port(aml, 0x70, 2);
	aml_irq(aml, 8);
	aml_end_resources(aml, resources);
	aml_end(aml, device);
}

/* What no driver asks for but nobody else may use. A guest trusts ECAM only if it finds it reserved here. */
static void describe_motherboard(struct aml *aml)
{
	size_t device = aml_begin_device(aml, "MBRD");

	aml_name_eisa(aml, "_HID", "PNP0C02");
	aml_name_integer(aml, "_UID", 0);
	size_t resources = aml_begin_resources(aml);
	aml_memory_fixed(aml, BOARD_ECAM_BASE, BOARD_ECAM_SIZE);
	aml_port(aml, BOARD_PORT_PM_BASE, 12);
	aml_port(aml, BOARD_PORT_GPE, 4);
	aml_port(aml, BOARD_PORT_PCI_HOTPLUG, 12);
	aml_port(aml, BOARD_PORT_HOTPLUG, HOTPLUG_PORTS);
	aml_end_resources(aml, resources);
	aml_end(aml, device);
}

/* QEMU's docs/specs/pvpanic */
static void describe_panic(struct aml *aml)
{
	size_t device = aml_begin_device(aml, "PEVT");

	aml_name_string(aml, "_HID", "QEMU0001"); /* the name that drivers know */
	aml_name_integer(aml, "_STA", 0xf);
	size_t resources = aml_begin_resources(aml);
	aml_port(aml, BOARD_PORT_PVPANIC, 1);
	aml_end_resources(aml, resources);
	aml_end(aml, device);
}

/* Where the VM generation ID is (vmgenid.h). */
static void describe_generation(struct aml *aml)
{
	size_t device = aml_begin_device(aml, "VGEN");

	aml_name_string(aml, "_HID", "HSTL0001");
	aml_name_string(aml, "_CID", "VM_Gen_Counter");
	aml_name_string(aml, "_DDN", "VM_Gen_Counter");
	aml_name_integer(aml, "_STA", 0xf);
	aml_name(aml, "ADDR");
	size_t address = aml_begin_package(aml, 2);
	aml_integer(aml, (uint32_t)BOARD_GENERATION);
	aml_integer(aml, BOARD_GENERATION >> 32);
	aml_end(aml, address);
	aml_end(aml, device);
}

/* What has happened when a general-purpose event comes (edge-triggered: its status is cleared before). */
static void describe_events(struct aml *aml, bool cpus, bool memory)
{
	size_t scope = aml_begin_scope(aml, "\\_GPE"), method = aml_begin_method(aml, "_E01", 0);

	aml_path(aml, "\\\x2f\x03_SB_PCI0PCNT");
	aml_end(aml, method);
	if (cpus) {
		method = aml_begin_method(aml, "_E02", 0);
		aml_path(aml, "\\\x2e_SB_CSCN");
		aml_end(aml, method);
	}
	if (memory) {
		method = aml_begin_method(aml, "_E03", 0);
		aml_path(aml, "\\\x2e_SB_MSCN");
		aml_end(aml, method);
	}
	method = aml_begin_method(aml, "_E04", 0);
	aml_operator(aml, AML_NOTIFY);
	aml_path(aml, "\\\x2e_SB_VGEN");
	aml_integer(aml, 0x80); /* it has changed */
	aml_end(aml, method);
	aml_end(aml, scope);
}

static void build_dsdt(struct aml *aml, struct board *board, unsigned cpus)
{
	/* A machine whose size is fixed says nothing of hot plug: its kernel starts faster. */
	bool cpus_change = board_cpus_can_change(board), memory_changes = board_memory(board)->slots.count;
	struct acpi_header header = {0};

	fill_header(&header, "DSDT", 2); /* revision 2: integers of 64 bits */
	aml_append(aml, &header, sizeof(header));

	size_t scope = aml_begin_scope(aml, "\\_SB_");
	if (cpus_change || memory_changes)
		hotplug_describe_registers(aml);
	describe_cpus(aml, cpus, cpus_change);
	if (cpus_change)
		hotplug_describe_cpu_event(aml, cpus);
	if (memory_changes)
		hotplug_describe_memory(aml, board);
	describe_pci(aml);
	describe_serial(aml);
	describe_clock(aml);
	describe_motherboard(aml);
	describe_panic(aml);
	describe_generation(aml);
	aml_end(aml, scope);

	describe_events(aml, cpus_change, memory_changes);

	aml_name(aml, "_S5_");
	size_t sleep = aml_begin_package(aml, 4);
	aml_integer(aml, SLEEP_TYPE_OFF);
	aml_integer(aml, SLEEP_TYPE_OFF);
	aml_integer(aml, 0);
	aml_integer(aml, 0);
	aml_end(aml, sleep);
}

static int write_dsdt(struct area *area, struct board *board, unsigned cpus, uint64_t *gpa, struct error *err)
{
	__attribute__((cleanup(aml_free))) struct aml aml = {0};

	build_dsdt(&aml, board, cpus);
	if (aml.failed)
		return error_set(err, ENOMEM, "ACPI tables: no memory to build the DSDT");
	return put_table(area, aml.bytes, aml.length, gpa, err);
}

/* ---- the other tables ---- */

static struct acpi_address port_address(uint16_t port, uint8_t bits)
{
	/* access: 1 is a byte, 2 a word, 3 a dword; the event block is two words */
	return (struct acpi_address){
		.space = ADDRESS_SPACE_PORTS, .bits = bits, .access = bits == 8 ? 1 : 2, .address = port};
}

static int write_fadt(struct area *area, uint64_t dsdt, uint64_t *gpa, struct error *err)
{
	struct acpi_fadt fadt = {
		.facs = FACS_ADDRESS,
		.dsdt = dsdt,
		.profile = PROFILE_ENTERPRISE_SERVER,
		.sci_interrupt = BOARD_SCI_IRQ,
		/* no SMI command: the board is always in ACPI mode */
		.pm1a_event = PM1A_EVENT,
		.pm1a_control = PM1A_CONTROL,
		.pm_timer = PM_TIMER,
		.gpe0 = BOARD_PORT_GPE,
		.gpe0_length = 4,
		.pm1_event_length = 4,
		.pm1_control_length = 2,
		.pm_timer_length = 4,
		.c2_latency = 0xffff, /* above 100 and 1000 microseconds: not supported */
		.c3_latency = 0xffff,
		/* i8042: only its reset line is there, so no keyboard controller is announced */
		.boot_flags = BOOT_LEGACY_DEVICES | BOOT_NO_VGA | BOOT_NO_ASPM,
		.flags = FADT_WBINVD | FADT_C1_SUPPORTED | FADT_NO_FIXED_SLEEP_BUTTON | FADT_NO_FIXED_RTC_WAKE |
			 FADT_TIMER_32BIT | FADT_RESET_REGISTER,
		.reset = port_address(BOARD_PORT_RESET, 8),
		.reset_value = 6,
		.minor_revision = 4,
		.x_dsdt = dsdt,
		.x_pm1a_event = port_address(PM1A_EVENT, 32),
		.x_pm1a_control = port_address(PM1A_CONTROL, 16),
		.x_pm_timer = port_address(PM_TIMER, 32),
		.x_gpe0 = port_address(BOARD_PORT_GPE, 32),
	};

	fadt.x_pm_timer.access = 3;
	fill_header(&fadt.header, "FACP", 6);
	return put_table(area, &fadt, sizeof(fadt), gpa, err);
}

static int write_facs(struct area *area, struct error *err)
{
	struct acpi_facs facs = {.signature = "FACS", .length = sizeof(facs), .version = 2};

	return put(area, FACS_ADDRESS, &facs, sizeof(facs), err);
}

static int write_madt(struct area *area, unsigned cpus, uint64_t there, uint64_t *gpa, struct error *err)
{
	struct {
		struct acpi_madt madt;
		struct acpi_madt_ioapic ioapic;
		struct acpi_madt_override timer, sci;
		struct acpi_madt_nmi nmi;
		struct acpi_madt_lapic lapic[CPUS_MAX];
	} ACPI_PACKED table = {
		.madt = {.lapic_address = BOARD_LAPIC_BASE, .flags = MADT_PCAT_COMPATIBLE},
		.ioapic = {.type = 1, .length = sizeof(table.ioapic), .address = BOARD_IOAPIC_BASE},
		.timer = {.type = 2, .length = sizeof(table.timer), .source = 0, .gsi = 2, .flags = INTERRUPT_CONFORMS},
		.sci = {.type = 2,
			.length = sizeof(table.sci),
			.source = BOARD_SCI_IRQ,
			.gsi = BOARD_SCI_IRQ,
			.flags = INTERRUPT_LEVEL_HIGH},
		.nmi = {.type = 4, .length = sizeof(table.nmi), .uid = 0xff /* every CPU */, .lint = 1},
	};

	for (unsigned i = 0; i < cpus; i++)
		table.lapic[i] = (struct acpi_madt_lapic){
			.length = sizeof(table.lapic[i]), .uid = i, .id = i,
			.flags = there >> i & 1 ? MADT_LAPIC_ENABLED : MADT_LAPIC_CAN_COME};
	fill_header(&table.madt.header, "APIC", 5);
	return put_table(area, &table, sizeof(table) - (CPUS_MAX - cpus) * sizeof(table.lapic[0]), gpa, err);
}

static int write_mcfg(struct area *area, uint64_t *gpa, struct error *err)
{
	struct acpi_mcfg mcfg = {.base = BOARD_ECAM_BASE, .last_bus = 0xff};

	fill_header(&mcfg.header, "MCFG", 1);
	return put_table(area, &mcfg, sizeof(mcfg), gpa, err);
}

static int write_roots(struct area *area, const uint64_t tables[3], struct error *err)
{
	struct {
		struct acpi_header header;
		uint64_t tables[3];
	} ACPI_PACKED xsdt = {0};
	struct acpi_rsdp rsdp = {.revision = 2, .length = sizeof(rsdp)};
	int ret;

	fill_header(&xsdt.header, "XSDT", 1);
	memcpy(xsdt.tables, tables, sizeof(xsdt.tables));
	uint64_t xsdt_gpa;
	ret = put_table(area, &xsdt, sizeof(xsdt), &xsdt_gpa, err);
	if (ret)
		return ret;

	memcpy(rsdp.signature, "RSD PTR ", 8);
	memcpy(rsdp.oem, "HOSTEL", 6);
	rsdp.xsdt = xsdt_gpa;
	rsdp.checksum = checksum(&rsdp, 20);
	rsdp.extended_checksum = checksum(&rsdp, sizeof(rsdp));
	return put(area, AREA_START, &rsdp, sizeof(rsdp), err);
}

int acpi_write_tables(struct board *board, unsigned cpus, uint64_t *rsdp, struct error *err)
{
	struct area area = {.memory = board_memory(board), .next = TABLES_START};
	uint64_t dsdt, tables[3];
	int ret;

	if (!cpus || cpus > CPUS_MAX)
		return error_set(err, EINVAL, "ACPI tables: %u CPUs; 1 to %d are possible", cpus, CPUS_MAX);
	ret = write_facs(&area, err);
	if (!ret)
		ret = write_dsdt(&area, board, cpus, &dsdt, err);
	if (!ret)
		ret = write_fadt(&area, dsdt, &tables[0], err);
	if (!ret)
		ret = write_madt(&area, cpus, board_hotplug_there(board, BOARD_HOTPLUG_CPU), &tables[1], err);
	if (!ret)
		ret = write_mcfg(&area, &tables[2], err);
	if (!ret)
		ret = write_roots(&area, tables, err);
	if (ret)
		return ret;
	*rsdp = AREA_START;
	return 0;
}
