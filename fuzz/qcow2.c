/* qcow2 images that nobody trusts: open, and if the image passes the check, use it in every way. Whatever was accepted
 * and written to must be accepted again: a guest's writes never turn an image into a damaged one. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "disk/disk.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define PIECE (96 * 1024)

/* Small offsets, those around the boundaries of clusters and tables, and the end of the disk. */
static uint64_t place(uint64_t size, unsigned i, uint64_t length)
{
	static const uint64_t around[] = {0, 512, 4096, 32768, 65536, 262144, 1 << 20, 2 << 20, 512 << 20};
	uint64_t offset = i < ARRAY_SIZE(around) ? around[i] : size / 512 / (i - ARRAY_SIZE(around) + 1) * 512;

	return min(offset, size - length);
}

static void use(struct disk *disk)
{
	static uint8_t buffer[PIECE], back[PIECE];
	uint64_t size = disk_size(disk), length = min(size, (uint64_t)PIECE);
	struct iovec iov = {buffer, length}, read_back = {back, length};

	for (unsigned i = 0; i < 14; i++) {
		uint64_t offset = place(size, i, length);

		disk_readv(disk, offset, &iov, 1);
		memset(buffer, i + 1, length);
		switch (i % 5) {
		case 0:
		case 1:
			if (disk_writev(disk, offset, &iov, 1) < 0 || disk_readv(disk, offset, &read_back, 1) < 0)
				break;
			if (memcmp(buffer, back, length) != 0) {
				fprintf(stderr, "what was written at 0x%llx is not what is read\n",
					(unsigned long long)offset);
				abort();
			}
			break;
		case 2:
			disk_discard(disk, offset, length);
			break;
		case 3:
			disk_write_zeroes(disk, offset, length, i & 1);
			break;
		case 4:
			disk_flush(disk);
			break;
		}
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	scope_fd int fd = memfd_create("fuzz", MFD_CLOEXEC);
	struct disk_options options = {.format = DISK_QCOW2};
	struct error err = {0};
	struct disk *disk;
	char path[64];

	if (fd < 0 || write(fd, data, size) != (ssize_t)size)
		return 0;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	options.read_only = true;
	if (disk_open(&disk, path, &options, &err) == 0)
		disk_close(disk, NULL);
	options.read_only = false;
	if (disk_open(&disk, path, &options, &err) < 0) {
		if (!err.text[0] || strchr(err.text, '\n'))
			abort();
		return 0;
	}
	use(disk);
	if (disk_close(disk, &err) < 0)
		return 0;
	if (disk_open(&disk, path, &options, &err) < 0) {
		fprintf(stderr, "damaged by use: %s\n", err.text);
		abort();
	}
	disk_close(disk, NULL);
	return 0;
}
