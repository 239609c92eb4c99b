/* AML and resource descriptors: see aml.h. */
#include "machine/aml.h"

#include <stdlib.h>
#include <string.h>

#include "base/util.h"

/* Opcodes (ACPI 6.4, table 20.2) */
enum {
	OP_NAME = 0x08,
	OP_BYTE = 0x0a,
	OP_WORD = 0x0b,
	OP_DWORD = 0x0c,
	OP_STRING = 0x0d,
	OP_QWORD = 0x0e,
	OP_SCOPE = 0x10,
	OP_BUFFER = 0x11,
	OP_PACKAGE = 0x12,
	OP_METHOD = 0x14,
	OP_EXTENDED = 0x5b,
	OP_IF = 0xa0,
	OP_EXTENDED_REGION = 0x80,
	OP_EXTENDED_FIELD = 0x81,
	OP_EXTENDED_DEVICE = 0x82,
};

/* Resource descriptors (ACPI 6.4, sections 6.4.2 and 6.4.3) */
enum {
	RESOURCE_IRQ = 0x22,
	RESOURCE_PORT = 0x47,
	RESOURCE_END = 0x79,
	RESOURCE_MEMORY32_FIXED = 0x86,
	RESOURCE_DWORD = 0x87,
	RESOURCE_WORD = 0x88,
	RESOURCE_QWORD = 0x8a,

	WINDOW_MEMORY = 0,
	WINDOW_PORTS = 1,
	WINDOW_BUSES = 2,
	WINDOW_FIXED = 0x0c, /* neither end moves; produced, positively decoded */
};

void aml_free(struct aml *aml)
{
	free(aml->bytes);
	*aml = (struct aml){0};
}

void aml_append(struct aml *aml, const void *bytes, size_t n)
{
	if (aml->length + n > aml->room && !aml->failed) {
		size_t room = max(2 * aml->room, aml->length + n + 1024);
		uint8_t *grown = realloc(aml->bytes, room);

		if (grown) {
			aml->bytes = grown;
			aml->room = room;
		} else {
			aml->failed = true;
		}
	}
	if (aml->failed)
		return;
	memcpy(aml->bytes + aml->length, bytes, n);
	aml->length += n;
}

/* The low n bytes, little-endian, which is also how the host keeps them. */
static void append_number(struct aml *aml, uint64_t value, size_t n)
{
	aml_append(aml, &value, n);
}

static void append_byte(struct aml *aml, uint8_t byte)
{
	aml_append(aml, &byte, 1);
}

/* Puts n bytes, at most 8, in front of what was appended from `position` on. */
static void insert(struct aml *aml, size_t position, const uint8_t *bytes, size_t n)
{
	size_t after = aml->length - position;

	aml_append(aml, bytes, n); /* makes the room */
	if (aml->failed)
		return;
	memmove(aml->bytes + position + n, aml->bytes + position, after);
	memcpy(aml->bytes + position, bytes, n);
}

/* Numbers of up to 28 bits as package lengths are encoded (section 20.2.4): six bits in one byte, or four and up to
 * three bytes more. Returns how many bytes there are. */
static size_t encode_length(uint8_t encoded[4], size_t value)
{
	size_t bytes = 1;

	if (value < 64) {
		encoded[0] = value;
		return 1;
	}
	for (bytes = 2; value >= 16ull << 8 * (bytes - 1);)
		bytes++;
	encoded[0] = (bytes - 1) << 6 | (value & 15);
	for (size_t i = 1; i < bytes; i++)
		encoded[i] = value >> (4 + 8 * (i - 1));
	return bytes;
}

void aml_end(struct aml *aml, size_t begin)
{
	size_t body = aml->length - begin, bytes = 1;
	uint8_t encoded[4];

	/* It counts itself. */
	while (encode_length(encoded, body + bytes) != bytes)
		bytes++;
	insert(aml, begin, encoded, bytes);
}

static void append_path(struct aml *aml, const char *name)
{
	aml_append(aml, name, strlen(name));
}

size_t aml_begin_scope(struct aml *aml, const char *name)
{
	append_byte(aml, OP_SCOPE);
	size_t begin = aml->length;

	append_path(aml, name);
	return begin;
}

size_t aml_begin_device(struct aml *aml, const char *name)
{
	append_byte(aml, OP_EXTENDED);
	append_byte(aml, OP_EXTENDED_DEVICE);
	size_t begin = aml->length;

	append_path(aml, name);
	return begin;
}

size_t aml_begin_method(struct aml *aml, const char *name, unsigned arguments)
{
	append_byte(aml, OP_METHOD);
	size_t begin = aml->length;

	append_path(aml, name);
	append_byte(aml, arguments); /* not serialized, synchronization level 0 */
	return begin;
}

size_t aml_begin_if(struct aml *aml)
{
	append_byte(aml, OP_IF);
	return aml->length;
}

void aml_operator(struct aml *aml, enum aml_operator op)
{
	append_byte(aml, op);
}

void aml_path(struct aml *aml, const char *name)
{
	append_path(aml, name);
}

void aml_port_region(struct aml *aml, const char *name, uint16_t base, uint8_t size)
{
	append_byte(aml, OP_EXTENDED);
	append_byte(aml, OP_EXTENDED_REGION);
	append_path(aml, name);
	append_byte(aml, 1); /* SystemIO */
	aml_integer(aml, base);
	aml_integer(aml, size);
}

size_t aml_begin_fields(struct aml *aml, const char *region, unsigned access_bytes)
{
	append_byte(aml, OP_EXTENDED);
	append_byte(aml, OP_EXTENDED_FIELD);
	size_t begin = aml->length;

	append_path(aml, region);
	append_byte(aml, access_bytes == 1 ? 1 : access_bytes == 2 ? 2 : 3); /* no lock; other bits are preserved */
	return begin;
}

void aml_field(struct aml *aml, const char *name, unsigned bits)
{
	uint8_t encoded[4];

	append_path(aml, name);
	aml_append(aml, encoded, encode_length(encoded, bits));
}

size_t aml_begin_package(struct aml *aml, uint8_t elements)
{
	append_byte(aml, OP_PACKAGE);
	size_t begin = aml->length;

	append_byte(aml, elements);
	return begin;
}

void aml_integer(struct aml *aml, uint64_t value)
{
	static const struct {
		uint64_t most;
		uint8_t op, bytes;
	} forms[] = {{0xff, OP_BYTE, 1}, {0xffff, OP_WORD, 2}, {0xffffffff, OP_DWORD, 4}, {~0ull, OP_QWORD, 8}};
	unsigned i = 0;

	if (value <= 1) { /* ZeroOp, OneOp */
		append_byte(aml, value);
		return;
	}
	while (value > forms[i].most)
		i++;
	append_byte(aml, forms[i].op);
	append_number(aml, value, forms[i].bytes);
}

void aml_name(struct aml *aml, const char *name)
{
	append_byte(aml, OP_NAME);
	append_path(aml, name);
}

void aml_name_integer(struct aml *aml, const char *name, uint64_t value)
{
	aml_name(aml, name);
	aml_integer(aml, value);
}

void aml_name_string(struct aml *aml, const char *name, const char *value)
{
	aml_name(aml, name);
	append_byte(aml, OP_STRING);
	aml_append(aml, value, strlen(value) + 1);
}

static unsigned hex_digit(char c)
{
	return c <= '9' ? c - '0' : c - 'A' + 10;
}

/* Three letters of five bits and four digits of four, most significant first (section 19.3.4). */
void aml_name_eisa(struct aml *aml, const char *name, const char *id)
{
	uint32_t value = (id[0] - '@') << 26 | (id[1] - '@') << 21 | (id[2] - '@') << 16;

	for (unsigned i = 0; i < 4; i++)
		value |= hex_digit(id[3 + i]) << (12 - 4 * i);
	aml_name(aml, name);
	append_byte(aml, OP_DWORD);
	append_number(aml, __builtin_bswap32(value), 4);
}

void aml_name_buffer(struct aml *aml, const char *name, const void *bytes, uint8_t n)
{
	aml_name(aml, name);
	append_byte(aml, OP_BUFFER);
	size_t begin = aml->length;

	aml_integer(aml, n);
	aml_append(aml, bytes, n);
	aml_end(aml, begin);
}

/* ---- resources ---- */

size_t aml_begin_resources(struct aml *aml)
{
	aml_name(aml, "_CRS");
	append_byte(aml, OP_BUFFER);
	return aml->length;
}

void aml_end_resources(struct aml *aml, size_t begin)
{
	append_byte(aml, RESOURCE_END);
	append_byte(aml, 0); /* checksum: zero means not checked */

	/* The buffer's size stands in front of its bytes, as an integer: no template here is longer than a word tells.
	 */
	size_t size = aml->length - begin;
	if (size <= 0xff)
		insert(aml, begin, (uint8_t[]){OP_BYTE, size}, 2);
	else
		insert(aml, begin, (uint8_t[]){OP_WORD, size, size >> 8}, 3);
	aml_end(aml, begin);
}

void aml_port(struct aml *aml, uint16_t base, uint8_t length)
{
	append_byte(aml, RESOURCE_PORT);
	append_byte(aml, 1); /* all 16 address bits are decoded */
	append_number(aml, base, 2);
	append_number(aml, base, 2);
	append_byte(aml, 1);
	append_byte(aml, length);
}

void aml_irq(struct aml *aml, unsigned irq)
{
	append_byte(aml, RESOURCE_IRQ);
	append_number(aml, 1u << irq, 2);
}

void aml_memory_fixed(struct aml *aml, uint32_t base, uint32_t size)
{
	append_byte(aml, RESOURCE_MEMORY32_FIXED);
	append_number(aml, 9, 2);
	append_byte(aml, 1); /* writable */
	append_number(aml, base, 4);
	append_number(aml, size, 4);
}

/* bytes: the width of each of the five numbers */
static void window(struct aml *aml, uint8_t descriptor, size_t bytes, uint8_t type, uint8_t type_flags, uint64_t first,
	uint64_t last)
{
	append_byte(aml, descriptor);
	append_number(aml, 3 + 5 * bytes, 2);
	append_byte(aml, type);
	append_byte(aml, WINDOW_FIXED);
	append_byte(aml, type_flags);
	append_number(aml, 0, bytes); /* granularity */
	append_number(aml, first, bytes);
	append_number(aml, last, bytes);
	append_number(aml, 0, bytes); /* translation */
	append_number(aml, last - first + 1, bytes);
}

void aml_window_buses(struct aml *aml, uint8_t first, uint8_t last)
{
	window(aml, RESOURCE_WORD, 2, WINDOW_BUSES, 0, first, last);
}

void aml_window_ports(struct aml *aml, uint16_t first, uint16_t last)
{
	window(aml, RESOURCE_WORD, 2, WINDOW_PORTS, 3 /* ISA and other ports */, first, last);
}

void aml_window_memory(struct aml *aml, uint64_t first, uint64_t last)
{
	if (last >> 32)
		window(aml, RESOURCE_QWORD, 8, WINDOW_MEMORY, 1 /* writable, not cacheable */, first, last);
	else
		window(aml, RESOURCE_DWORD, 4, WINDOW_MEMORY, 1, first, last);
}

void aml_ram(struct aml *aml, uint64_t first, uint64_t last)
{
	window(aml, RESOURCE_QWORD, 8, WINDOW_MEMORY, 3 /* writable, cacheable */, first, last);
}
