/* The qcow2 header: raw bytes in, a checked struct qcow2_header out ("Header", "Header extensions", "Feature name
 * table"). */
#include "disk/qcow2.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/cleanup.h"

enum {
	HEADER_V2_BYTES = 72,
	HEADER_V3_BYTES = 104,
	EXTENSION_END = 0,
	EXTENSION_BACKING_FORMAT = 0xe2792aca,
	EXTENSION_FEATURE_NAMES = 0x6803f857,
};

/* Everything that is wrong with a header ends like this: the field, the value, what to do. */
#define damaged(path, format, ...)                                                                                     \
	error_set(err, EINVAL, "disk %s: damaged qcow2 header: " format "; restore the image from a copy", path,       \
		##__VA_ARGS__)

struct raw_header {
	const char *path;
	uint8_t *bytes; /* the first cluster, as far as the file has it; the rest zero */
	uint32_t length;
	uint64_t file_length;
};

/* A table of the header: aligned, behind the header, and inside the file. */
static int check_table(
	const struct raw_header *raw, const char *name, uint64_t offset, uint64_t bytes, struct error *err)
{
	if (offset % raw->length)
		return damaged(raw->path, "%s_offset is 0x%llx, no multiple of the cluster size %u", name,
			(unsigned long long)offset, raw->length);
	if (offset < raw->length)
		return damaged(
			raw->path, "%s_offset is 0x%llx, which overlaps the header", name, (unsigned long long)offset);
	if (offset >= raw->file_length || bytes > raw->file_length - offset)
		return damaged(raw->path, "%s_offset is 0x%llx and it has %llu bytes, but the file ends at 0x%llx",
			name, (unsigned long long)offset, (unsigned long long)bytes,
			(unsigned long long)raw->file_length);
	return 0;
}

/* The name of feature `bit`, from the image's own table if it has one. */
static void feature_name(const uint8_t *names, uint32_t length, unsigned bit, char name[47])
{
	snprintf(name, 47, "bit %u", bit);
	for (uint32_t at = 0; at + 48 <= length; at += 48) {
		if (names[at] != 0 || names[at + 1] != bit || !names[at + 2])
			continue;
		memcpy(name, names + at + 2, 46);
		name[46] = 0;
		for (char *p = name; *p; p++) {
			if (*p < ' ' || *p > '~')
				*p = '?';
		}
	}
}

static int check_features(const struct raw_header *raw, const struct qcow2_header *h, bool read_only,
	const uint8_t *names, uint32_t names_length, struct error *err)
{
	const char *path = raw->path;
	uint64_t unknown =
		h->incompatible & ~(uint64_t)(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT | INCOMPATIBLE_DATA_FILE |
					      INCOMPATIBLE_COMPRESSION | INCOMPATIBLE_EXTENDED_L2);

	if (unknown) {
		char name[47];

		feature_name(names, names_length, __builtin_ctzll(unknown), name);
		return error_set(err, ENOTSUP,
			"disk %s uses the unknown qcow2 feature \"%s\"; convert it with the program that made it", path,
			name);
	}
	if (h->incompatible & INCOMPATIBLE_DATA_FILE)
		return error_set(err, ENOTSUP,
			"disk %s keeps its data in an external file, which is not supported; convert it: qemu-img "
			"convert -O qcow2",
			path);
	if (h->incompatible & INCOMPATIBLE_EXTENDED_L2)
		return error_set(err, ENOTSUP,
			"disk %s has extended L2 entries, which are not supported; convert it: qemu-img convert -O "
			"qcow2",
			path);
	if ((h->incompatible & INCOMPATIBLE_CORRUPT) && !read_only)
		return error_set(err, EINVAL,
			"disk %s is marked as corrupt; repair it (qemu-img check -r all), or open it readonly", path);
	return 0;
}

/* Walks the extensions between the header and the end of its cluster or the backing file's name. */
static int read_extensions(const struct raw_header *raw, uint32_t from, uint32_t to, struct qcow2_header *h,
	const uint8_t **names, uint32_t *names_length, struct error *err)
{
	while (to - from >= 8) {
		uint32_t type = load_be32(raw->bytes + from), length = load_be32(raw->bytes + from + 4);
		const uint8_t *data = raw->bytes + from + 8;

		if (type == EXTENSION_END)
			return 0;
		if (length > to - from - 8)
			return damaged(raw->path, "extension 0x%08x has a length of %u bytes, only %u are left", type,
				length, to - from - 8);
		if (type == EXTENSION_BACKING_FORMAT) {
			if (length >= sizeof(h->backing_format))
				return damaged(raw->path, "the backing format's name has %u bytes", length);
			memcpy(h->backing_format, data, length);
		} else if (type == EXTENSION_FEATURE_NAMES) {
			*names = data;
			*names_length = length;
		} else {
			h->all_known = false;
		}
		/* Cannot pass `to`: padding is at most 7 bytes, and a loop with less than 8 left ends. */
		from += min(8 + (uint32_t)align_up(length, 8), to - from);
	}
	return 0;
}

static int parse(const struct raw_header *raw, bool read_only, struct qcow2_header *h, struct error *err)
{
	const uint8_t *b = raw->bytes;
	const char *path = raw->path;
	uint64_t name_offset = load_be64(b + 8);
	uint32_t name_length = load_be32(b + 16), header_length = HEADER_V2_BYTES, names_length = 0;
	uint64_t compatible = 0;
	const uint8_t *names = NULL;
	int result;

	h->size = load_be64(b + 24);
	h->l1_count = load_be32(b + 36);
	h->l1_offset = load_be64(b + 40);
	h->refcount_table_offset = load_be64(b + 48);
	h->refcount_table_clusters = load_be32(b + 56);
	h->snapshot_count = load_be32(b + 60);
	h->snapshot_offset = load_be64(b + 64);
	h->refcount_order = 4;
	if (h->version == 3) {
		h->incompatible = load_be64(b + HEADER_INCOMPATIBLE);
		compatible = load_be64(b + 80);
		h->autoclear = load_be64(b + HEADER_AUTOCLEAR);
		h->refcount_order = load_be32(b + 96);
		header_length = load_be32(b + 100);
		if (header_length < HEADER_V3_BYTES || header_length > raw->length || header_length % 8)
			return damaged(path, "header_length is %u; %d to %u is possible, in steps of 8", header_length,
				HEADER_V3_BYTES, raw->length);
		if (h->refcount_order > 6)
			return damaged(path, "refcount_order is %u; 0 to 6 is possible", h->refcount_order);
	}
	h->all_known = !(compatible & ~1ull) && !h->autoclear; /* bit 0: lazy refcounts */

	if (name_offset && (name_offset < header_length || name_offset > raw->length || !name_length ||
				   name_length > 1023 || name_length > raw->length - name_offset))
		return damaged(path,
			"backing_file_offset is 0x%llx and backing_file_size %u; it must lie in the first cluster",
			(unsigned long long)name_offset, name_length);
	result = read_extensions(
		raw, header_length, name_offset ? name_offset : raw->length, h, &names, &names_length, err);
	if (result == 0)
		result = check_features(raw, h, read_only, names, names_length, err);
	if (result < 0)
		return result;
	if (load_be32(b + 32))
		return error_set(err, ENOTSUP,
			"disk %s is encrypted (crypt_method %u), which is not supported; "
			"convert it: qemu-img convert -O qcow2",
			path, load_be32(b + 32));
	if (h->incompatible & INCOMPATIBLE_COMPRESSION) {
		unsigned type = header_length > 104 ? b[104] : 0;

		return error_set(err, ENOTSUP,
			"disk %s is compressed with %s, which is not supported; "
			"convert it: qemu-img convert -O qcow2 -o compression_type=zlib",
			path, type == 1 ? "zstd" : "an unknown method");
	}
	if (name_offset) {
		memcpy(h->backing_name, b + name_offset, name_length);
		if (strlen(h->backing_name) != name_length)
			return damaged(path, "the backing file's name contains a zero byte");
	}

	/* Sizes before offsets: a product of what follows must not overflow. */
	if (!h->size || h->size > (uint64_t)INT64_MAX - raw->length)
		return damaged(path, "size is %llu bytes", (unsigned long long)h->size);
	if (h->l1_count > L1_BYTES_MAX / 8)
		return damaged(path, "l1_size is %u entries; at most %u are possible", h->l1_count, L1_BYTES_MAX / 8);

	uint64_t covered = (uint64_t)raw->length * (raw->length / 8); /* by one L1 entry */

	if (h->l1_count < (h->size + covered - 1) / covered)
		return damaged(path, "l1_size is %u entries, but a disk of %llu bytes needs %llu", h->l1_count,
			(unsigned long long)h->size, (unsigned long long)((h->size + covered - 1) / covered));
	if (!h->refcount_table_clusters ||
		(uint64_t)h->refcount_table_clusters * raw->length > max(REFCOUNT_TABLE_BYTES_MAX, raw->length))
		return damaged(path, "refcount_table_clusters is %u", h->refcount_table_clusters);
	result = check_table(raw, "l1_table", h->l1_offset, h->l1_count * 8ull, err);
	if (result == 0)
		result = check_table(raw, "refcount_table", h->refcount_table_offset,
			(uint64_t)h->refcount_table_clusters * raw->length, err);
	if (h->snapshot_count > 65536)
		return damaged(path, "nb_snapshots is %u; at most 65536 are possible", h->snapshot_count);
	if (result == 0 && h->snapshot_count)
		result = check_table(raw, "snapshots", h->snapshot_offset, 40ull * h->snapshot_count, err);
	return result;
}

int qcow2_read_header(struct image_file *file, uint64_t file_length, struct qcow2_header *header, struct error *err)
{
	uint8_t start[24];
	struct raw_header raw = {.path = file->path, .file_length = file_length};
	int result;

	memset(header, 0, sizeof(*header));
	if (file_length < HEADER_V2_BYTES)
		return error_set(err, EINVAL,
			"disk %s is no qcow2 image or truncated: it has %llu bytes, a header has %d; "
			"restore it from a copy",
			file->path, (unsigned long long)file_length, HEADER_V2_BYTES);
	result = image_file_read(file, 0, start, sizeof(start));
	if (result < 0)
		return error_set(err, -result, "disk %s: its header cannot be read", file->path);
	if (load_be32(start) != QCOW2_MAGIC)
		return error_set(err, EINVAL, "disk %s is no qcow2 image: it begins with 0x%08x; try format=raw",
			file->path, load_be32(start));
	header->version = load_be32(start + 4);
	if (header->version != 2 && header->version != 3)
		return error_set(err, ENOTSUP,
			"disk %s is qcow version %u; only 2 and 3 are supported; "
			"convert it: qemu-img convert -O qcow2",
			file->path, header->version);
	header->cluster_bits = load_be32(start + 20);
	if (header->cluster_bits < 9 || header->cluster_bits > 21)
		return damaged(file->path, "cluster_bits is %u; 9 to 21 is possible", header->cluster_bits);

	raw.length = 1u << header->cluster_bits;
	scope_free uint8_t *bytes = calloc(1, raw.length);

	if (!bytes)
		return error_set(err, ENOMEM, "disk %s: no memory for its header", file->path);
	raw.bytes = bytes;
	result = image_file_read(file, 0, bytes, raw.length);
	if (result < 0)
		return error_set(err, -result, "disk %s: its header cannot be read", file->path);
	return parse(&raw, file->read_only, header, err);
}
