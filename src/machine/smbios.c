/* SMBIOS: see smbios.h. Sections of the specification are those of version 3.0. */
#include "machine/smbios.h"

#include <stdio.h>
#include <string.h>

#include "base/util.h"

#define AREA 0xf0000ull /* entry points are searched for from here, at multiples of 16 (5.2) */
#define TABLE (AREA + 0x100)
#define TABLE_ROOM 0x2000u
#define NAME_LONGEST 255

enum { /* types (7) */
	TYPE_FIRMWARE = 0,
	TYPE_SYSTEM = 1,
	TYPE_CHASSIS = 3,
	TYPE_OEM_STRINGS = 11,
	TYPE_MEMORY_ARRAY = 16,
	TYPE_MEMORY_DEVICE = 17,
	TYPE_BOOT = 32,
	TYPE_END = 127,
};

struct entry_2 { /* 5.2.1 */
	char anchor[4];
	uint8_t checksum, length, major, minor;
	uint16_t largest_structure;
	uint8_t revision, formatted[5];
	char intermediate_anchor[5];
	uint8_t intermediate_checksum;
	uint16_t table_length;
	uint32_t table;
	uint16_t structures;
	uint8_t bcd_revision;
} __attribute__((packed));

struct entry_3 { /* 5.2.2 */
	char anchor[5];
	uint8_t checksum, length, major, minor, docrev, revision, reserved;
	uint32_t table_length_max;
	uint64_t table;
} __attribute__((packed));

_Static_assert(sizeof(struct entry_2) == 31 && sizeof(struct entry_3) == 24, "layout of the specification");

struct table {
	uint8_t bytes[TABLE_ROOM];
	size_t length, structure; /* where the one being built begins */
	unsigned structures, strings;
	size_t largest;
};

/* ---- structures: a formatted part, then its strings (6.1) ---- */

static void append(struct table *t, const void *bytes, size_t n)
{
	memcpy(t->bytes + t->length, bytes, n); /* all there is to write is bounded by NAME_LONGEST */
	t->length += n;
}

/* fields: what follows the header of four bytes. */
static void begin(struct table *t, uint8_t type, const void *fields, size_t n)
{
	uint16_t handle = t->structures++;
	const uint8_t header[4] = {type, 4 + n, handle, handle >> 8};

	t->structure = t->length;
	t->strings = 0;
	append(t, header, sizeof(header));
	append(t, fields, n);
}

static void string(struct table *t, const char *text)
{
	append(t, text, strlen(text) + 1);
	t->strings++;
}

static void end(struct table *t)
{
	/* Two zeroes at the end: the last string has brought one. */
	append(t, "\0", t->strings ? 1 : 2);
	t->largest = max(t->largest, t->length - t->structure);
}

/* 7.2.1: the first three fields are little-endian. */
static void encode_uuid(uint8_t to[16], const uint8_t uuid[16])
{
	static const uint8_t order[16] = {3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15};

	for (unsigned i = 0; i < 16; i++)
		to[i] = uuid[order[i]];
}

static void firmware(struct table *t)
{
	const struct {
		uint8_t vendor, version;
		uint16_t segment;
		uint8_t date, rom_size;
		uint64_t characteristics;
		uint8_t extension[2], major, minor, controller_major, controller_minor;
	} __attribute__((packed)) fields = {1, 2, 0xe800, 3, 0, 1 << 3 /* none are told */,
		{0, 1 << 4 /* a virtual machine */}, 0, 1, 0xff, 0xff};

	begin(t, TYPE_FIRMWARE, &fields, sizeof(fields));
	string(t, "Hostel");
	string(t, HOSTEL_VERSION);
	string(t, "01/01/2026");
	end(t);
}

static void machine(struct table *t, const struct smbios_identity *identity)
{
	struct {
		uint8_t manufacturer, product, version, serial, uuid[16], wake_up, sku, family;
	} __attribute__((packed)) fields = {1, 2, 3, 4, {0}, 6 /* power switch */, 0, 5};
	const uint8_t *u = identity->uuid;
	char text[37];

	encode_uuid(fields.uuid, u);
	snprintf(text, sizeof(text), "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1],
		u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
	begin(t, TYPE_SYSTEM, &fields, sizeof(fields));
	string(t, "Hostel");
	string(t, "Hostel virtual machine");
	string(t, HOSTEL_VERSION);
	string(t, text);
	string(t, "Virtual machine");
	end(t);
}

static void chassis(struct table *t, const char *name)
{
	const struct {
		uint8_t manufacturer, type, version, serial, asset_tag, state[3], security;
		uint32_t oem;
		uint8_t height, cords, elements, element_length, sku;
	} __attribute__((packed)) fields = {1, 1 /* other */, 0, 0, name ? 2 : 0, {3, 3, 3} /* safe */, 2 /* unknown */};

	begin(t, TYPE_CHASSIS, &fields, sizeof(fields));
	string(t, "Hostel");
	if (name)
		string(t, name);
	end(t);
}

static void oem_strings(struct table *t, const char *name)
{
	char text[NAME_LONGEST + 20];

	if (!name)
		return;
	begin(t, TYPE_OEM_STRINGS, &(uint8_t){1}, 1);
	snprintf(text, sizeof(text), "hostel.name=%s", name);
	string(t, text);
	end(t);
}

static void memory_devices(struct table *t, uint64_t size)
{
	const uint64_t kib = size >> 10, mib = size >> 20;
	const struct {
		uint8_t location, use, correction;
		uint32_t capacity;
		uint16_t error_handle, devices;
		uint64_t extended_capacity;
	} __attribute__((packed)) array = {1 /* other */, 3 /* system memory */, 6 /* multi-bit ECC */,
		kib < 0x80000000 ? kib : 0x80000000, 0xfffe, 1, kib < 0x80000000 ? 0 : size};
	const struct {
		uint16_t array, error_handle, total_width, data_width, size;
		uint8_t form, set, locator, bank, type;
		uint16_t type_detail, speed;
		uint8_t manufacturer, serial, asset_tag, part, attributes;
		uint32_t extended_size;
		uint16_t configured_speed, voltage[3];
	} __attribute__((packed)) device = {t->structures, 0xfffe, 0xffff, 0xffff, mib < 0x7fff ? mib : 0x7fff,
		9 /* DIMM */, 0, 1, 0, 7 /* RAM */, 1 << 1 /* other */, 0, 2, 0, 0, 0, 0, mib < 0x7fff ? 0 : mib};

	begin(t, TYPE_MEMORY_ARRAY, &array, sizeof(array));
	end(t);
	begin(t, TYPE_MEMORY_DEVICE, &device, sizeof(device));
	string(t, "DIMM 0");
	string(t, "Hostel");
	end(t);
}

/* ---- entry points ---- */

static uint8_t checksum(const void *bytes, size_t n)
{
	uint8_t sum = 0;

	for (size_t i = 0; i < n; i++)
		sum += ((const uint8_t *)bytes)[i];
	return -sum;
}

static bool write_entries(struct guest_memory *memory, const struct table *t)
{
	struct entry_2 two = {.length = sizeof(two),
		.major = 2,
		.minor = 8,
		.largest_structure = t->largest,
		.table_length = t->length,
		.table = TABLE,
		.structures = t->structures,
		.bcd_revision = 0x28};
	struct entry_3 three = {
		.length = sizeof(three), .major = 3, .revision = 1, .table_length_max = t->length, .table = TABLE};

	memcpy(two.anchor, "_SM_", 4);
	memcpy(two.intermediate_anchor, "_DMI_", 5);
	two.intermediate_checksum = checksum(two.intermediate_anchor, 15);
	two.checksum = checksum(&two, sizeof(two));
	memcpy(three.anchor, "_SM3_", 5);
	three.checksum = checksum(&three, sizeof(three));
	return memory_write(memory, AREA, &three, sizeof(three)) && memory_write(memory, AREA + 0x20, &two, sizeof(two));
}

int smbios_write_tables(struct guest_memory *memory, const struct smbios_identity *identity, struct error *err)
{
	struct table t = {0};

	if (identity->name && strlen(identity->name) > NAME_LONGEST)
		return error_set(err, EINVAL, "SMBIOS: the name has %zu bytes; %d are the most", strlen(identity->name),
			NAME_LONGEST);
	firmware(&t);
	machine(&t, identity);
	chassis(&t, identity->name);
	oem_strings(&t, identity->name);
	memory_devices(&t, memory->size);
	begin(&t, TYPE_BOOT, (uint8_t[]){0, 0, 0, 0, 0, 0, 0 /* no errors */}, 7);
	end(&t);
	begin(&t, TYPE_END, "", 0);
	end(&t);
	if (!memory_write(memory, TABLE, t.bytes, t.length) || !write_entries(memory, &t))
		return error_set(err, ENOSPC, "SMBIOS: no guest memory at 0x%llx", AREA);
	return 0;
}
