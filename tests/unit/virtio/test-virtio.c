/* Virtio devices driven through PCI as a kernel drives them: transport, features, status, block I/O on real images,
 * reset and pause in the middle of it, entropy. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* after the headers it wants */
#include <cmocka.h>

#include "base/util.h"
#include "disk/disk.h"
#include "driver.h"
#include "machine/pci.h"
#include "machine/pci_internal.h"

#define MEMORY (32ull << 20)
#define IMAGE_SIZE (16ull << 20)
#define QUEUES 3

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { S_OK, S_IOERR, S_UNSUPP, S_NONE = 0xee };
enum { F_RO = 5, F_FLUSH = 9, F_CONFIG_WCE = 11, F_MQ = 12, F_DISCARD = 13, F_WRITE_ZEROES = 14 };

struct fixture {
	struct board board;
	struct driver d;
	struct disk *disk;
	struct virtio_device *device;
	char path[64];
	struct error err;
	uint64_t header, data, status; /* guest memory for requests */
};

static struct virtio_device *attach(struct fixture *f, enum disk_format format, bool read_only)
{
	struct disk_options options = {.format = format, .read_only = read_only};
	struct virtio_blk_options blk = {.queues = QUEUES, .serial = "hostel-disk-0"};

	if (disk_open(&f->disk, f->path, &options, &f->err) ||
		virtio_blk_create(&f->device, &f->board, f->disk, &blk, &f->err))
		fail_msg("%s", f->err.text);
	assert_true(driver_find(&f->d, &f->board, 1));
	f->header = driver_alloc(&f->d, 4096);
	f->status = driver_alloc(&f->d, 4096);
	f->data = driver_alloc(&f->d, 4 << 20);
	return f->device;
}

static void make_image(struct fixture *f, const char *format)
{
	char command[256];

	strcpy(f->path, "/tmp/hostel-virtio-XXXXXX");
	close(mkstemp(f->path));
	snprintf(command, sizeof(command), "qemu-img create -q -f %s %s %llu", format, f->path, IMAGE_SIZE);
	if (strcmp(format, "raw") == 0)
		assert_int_equal(truncate(f->path, IMAGE_SIZE), 0);
	else if (system(command) != 0)
		skip();
}

static struct fixture *fixture(const char *format)
{
	struct fixture *f = calloc(1, sizeof(*f));

	assert_int_equal(board_of_test_create(&f->board, MEMORY), 0);
	make_image(f, format);
	return f;
}

static int set_up_bare(void **state)
{
	*state = fixture("raw");
	return 0;
}

static int set_up_raw(void **state)
{
	struct fixture *f = *state = fixture("raw");

	attach(f, DISK_RAW, false);
	return 0;
}

static int set_up_qcow2(void **state)
{
	struct fixture *f = *state = fixture("qcow2");

	attach(f, DISK_QCOW2, false);
	return 0;
}

static int tear_down(void **state)
{
	struct fixture *f = *state;

	virtio_device_destroy(f->device);
	if (f->disk && disk_close(f->disk, &f->err))
		fail_msg("%s", f->err.text);
	board_of_test_destroy(&f->board);
	unlink(f->path);
	free(f);
	return 0;
}

/* ---- transport ---- */

static void start(struct fixture *f, uint64_t features)
{
	struct driver *d = &f->d;

	assert_true(driver_negotiate(d, features | VIRTIO_F_VERSION_1));
	driver_msix(d, 1 + QUEUES);
	for (unsigned i = 0; i < QUEUES; i++)
		driver_queue_up(d, i, 0, true);
	driver_ok(d);
	assert_int_equal(driver_status(d), 15);
}

static void test_identity(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;

	assert_int_equal(pci_config_read(f->board.pci, 1, 0, 2, 2), 0x1042);
	assert_int_equal(pci_config_read(f->board.pci, 1, 0, 8, 1), 1);
	assert_int_equal(driver_read(d, d->common + 0x12, 2), QUEUES);
	assert_int_equal(driver_read(d, d->device, 8), IMAGE_SIZE / 512);
	assert_int_equal(driver_read(d, d->device, 4), IMAGE_SIZE / 512);
	assert_int_equal(driver_read(d, d->device + 34, 2), QUEUES);
	assert_int_equal(driver_read(d, d->device + 60, 8), 0);
	assert_int_equal(driver_read(d, d->device + 58, 4), 0);
	driver_write(d, d->common + 0x16, 2, QUEUES);
	assert_int_equal(driver_read(d, d->common + 0x18, 2), 0); /* no such queue */
	driver_write(d, d->common + 0x18, 2, 8);
	driver_write(d, d->common + 0x16, 2, 1);
	assert_int_equal(driver_read(d, d->common + 0x18, 2), 256);
}

static void test_features(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;

	assert_false(driver_negotiate(d, 0)); /* no VERSION_1 */
	assert_true(driver_negotiate(d, ~0ull));
	assert_true(d->offered & 1 << F_MQ);
	assert_false(d->offered & 1 << F_RO);
	/* what is settled stays */
	driver_write(d, d->common + 12, 4, 0);
	assert_int_equal(driver_read(d, d->common + 12, 4), d->accepted >> 32);
	/* beyond what is offered */
	driver_write(d, d->common + 0x14, 1, 0);
	driver_write(d, d->common + 8, 4, 1);
	driver_write(d, d->common + 12, 4, 0xffffffff);
	driver_write(d, d->common + 0x14, 1, 0x0b);
	assert_int_equal(driver_status(d), 3);
	/* DRIVER_OK without FEATURES_OK is nothing */
	driver_write(d, d->common + 0x14, 1, 7);
	assert_int_equal(driver_status(d), 3);
	/* words that do not exist */
	driver_write(d, d->common, 4, 2);
	assert_int_equal(driver_read(d, d->common + 4, 4), 0);
	driver_write(d, d->common + 8, 4, 77);
	driver_write(d, d->common + 12, 4, 1);
	assert_int_equal(driver_read(d, d->common + 12, 4), 0);
}

static void test_queue_registers(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;

	assert_true(driver_negotiate(d, VIRTIO_F_VERSION_1));
	driver_write(d, d->common + 0x16, 2, 2);
	driver_write(d, d->common + 0x20, 8, 0x123456789abcdef0); /* both halves at once are understood too */
	assert_int_equal(driver_read(d, d->common + 0x20, 4), 0x9abcdef0);
	assert_int_equal(driver_read(d, d->common + 0x24, 4), 0x12345678);
	assert_int_equal(driver_read(d, d->common + 0x20, 8), 0x123456789abcdef0);
	driver_write(d, d->common + 0x20, 2, 0); /* wrong width: ignored */
	assert_int_equal(driver_read(d, d->common + 0x20, 4), 0x9abcdef0);
	driver_write(d, d->common + 0x1a, 2, QUEUES);
	assert_int_equal(driver_read(d, d->common + 0x1a, 2), QUEUES);
	driver_write(d, d->common + 0x1a, 2, QUEUES + 1); /* no such vector */
	assert_int_equal(driver_read(d, d->common + 0x1a, 2), 0xffff);
	assert_int_equal(driver_read(d, d->common + 0x1e, 2), 2);
	driver_queue_up(d, 2, 16, false);
	assert_int_equal(driver_read(d, d->common + 0x1c, 2), 1);
	driver_write(d, d->common + 0x20, 4, 0); /* a queue in use does not move */
	assert_int_equal(driver_read(d, d->common + 0x20, 4), d->queue[2].desc);
	driver_write(d, d->common + 0x14, 1, 0);
	driver_write(d, d->common + 0x16, 2, 2);
	assert_int_equal(driver_read(d, d->common + 0x1c, 2), 0);
	assert_int_equal(driver_read(d, d->common + 0x20, 8), 0);
	assert_int_equal(driver_read(d, d->common + 0x18, 2), 256);
	/* accesses across everything */
	for (unsigned at = 0; at < 0x4000; at += 13)
		for (unsigned size = 1; size <= 8; size *= 2)
			driver_read(d, d->common + at, size);
}

static void window(struct driver *d, uint32_t offset, uint32_t length, uint8_t bar)
{
	pci_config_write(d->board->pci, d->slot, 0, d->window + 4, 1, bar);
	pci_config_write(d->board->pci, d->slot, 0, d->window + 8, 4, offset);
	pci_config_write(d->board->pci, d->slot, 0, d->window + 12, 4, length);
}

static void test_window(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;
	struct pci_bus *pci = f->board.pci;

	window(d, 0x14, 1, 0);
	pci_config_write(pci, d->slot, 0, d->window + 16, 1, 3);
	assert_int_equal(driver_status(d), 3);
	assert_int_equal(pci_config_read(pci, d->slot, 0, d->window + 16, 1), 3);
	window(d, d->device - d->common, 4, 0);
	assert_int_equal(pci_config_read(pci, d->slot, 0, d->window + 16, 4), IMAGE_SIZE / 512);
	/* nonsense does nothing */
	window(d, 0x14, 1, 1);
	pci_config_write(pci, d->slot, 0, d->window + 16, 1, 0);
	window(d, 0x14, 3, 0);
	pci_config_write(pci, d->slot, 0, d->window + 16, 4, 0);
	window(d, 0xfffffffc, 4, 0);
	pci_config_write(pci, d->slot, 0, d->window + 16, 4, 0);
	pci_config_read(pci, d->slot, 0, d->window + 16, 4);
	window(d, 0x4000, 4, 0);
	pci_config_write(pci, d->slot, 0, d->window + 16, 4, 0);
	assert_int_equal(driver_status(d), 3);
}

static bool needs_reset(struct fixture *f)
{
	for (unsigned i = 0; i < 1000; i++) {
		if (driver_status(&f->d) & VIRTIO_STATUS_NEEDS_RESET)
			return true;
		usleep(1000);
	}
	return false;
}

/* ---- block requests ---- */

/* Offers a request of one data buffer on a queue and returns its status, or S_NONE. */
static unsigned request_on(struct fixture *f, unsigned queue, uint32_t type, uint64_t sector, uint32_t length,
	bool to_guest, uint32_t *used_length)
{
	struct driver *d = &f->d;
	struct driver_queue *q = &d->queue[queue];
	uint8_t *status = driver_memory(d, f->status, 1);
	struct buffer buffers[3] = {{f->header, 16, false}};
	unsigned n = 1;

	*status = S_NONE;
	memset(driver_memory(d, f->header, 16), 0, 16);
	memcpy(driver_memory(d, f->header, 4), &type, 4);
	memcpy(driver_memory(d, f->header + 8, 8), &sector, 8);
	if (length)
		buffers[n++] = (struct buffer){f->data, length, to_guest};
	buffers[n++] = (struct buffer){f->status, 1, true};
	driver_add(d, q, buffers, n);
	driver_notify(d, q);
	if (!driver_used(d, q, NULL, used_length))
		return S_NONE;
	return *status;
}

static unsigned request(struct fixture *f, uint32_t type, uint64_t sector, uint32_t length)
{
	return request_on(f, 0, type, sector, length, type == T_IN || type == T_GET_ID, NULL);
}

static void pattern(uint8_t *bytes, size_t length, unsigned seed)
{
	for (size_t i = 0; i < length; i++)
		bytes[i] = (i * 7 + (i >> 9) * 13 + seed) & 0xff;
}

static void write_pattern(struct fixture *f, uint64_t sector, uint32_t length, unsigned seed)
{
	pattern(driver_memory(&f->d, f->data, length), length, seed);
	assert_int_equal(request(f, T_OUT, sector, length), S_OK);
}

static void check_pattern(struct fixture *f, uint64_t sector, uint32_t length, unsigned seed)
{
	uint8_t *expected = malloc(length);

	pattern(expected, length, seed);
	memset(driver_memory(&f->d, f->data, length), 0xcc, length);
	assert_int_equal(request(f, T_IN, sector, length), S_OK);
	assert_memory_equal(driver_memory(&f->d, f->data, length), expected, length);
	free(expected);
}

static void test_read_write(void **state)
{
	struct fixture *f = *state;
	uint32_t length;

	start(f, ~0ull);
	write_pattern(f, 0, 512, 1);
	write_pattern(f, 100, 1 << 20, 2);
	write_pattern(f, IMAGE_SIZE / 512 - 8, 4096, 3);
	check_pattern(f, 0, 512, 1);
	check_pattern(f, 100, 1 << 20, 2);
	check_pattern(f, IMAGE_SIZE / 512 - 8, 4096, 3);
	assert_int_equal(request(f, T_FLUSH, 0, 0), S_OK);
	for (unsigned q = 0; q < QUEUES; q++) {
		assert_int_equal(request_on(f, q, T_IN, 100, 4096, true, &length), S_OK);
		assert_int_equal(length, 4097);
		assert_true(f->board.messages[DRIVER_MSI_BASE + 1 + q] > 0);
	}
	assert_int_equal(f->board.messages[DRIVER_MSI_BASE], 0);
}

static void test_id_and_ranges(void **state)
{
	struct fixture *f = *state;
	struct {
		uint64_t sector;
		uint32_t sectors, flags;
	} *range = driver_memory(&f->d, f->data, 4096);
	uint8_t zero[4096] = {0};

	start(f, ~0ull);
	assert_int_equal(request(f, T_GET_ID, 0, 20), S_OK);
	assert_string_equal(driver_memory(&f->d, f->data, 20), "hostel-disk-0");
	write_pattern(f, 0, 65536, 5);
	range[0].sector = 8;
	range[0].sectors = 8;
	range[0].flags = 1;
	range[1].sector = 32;
	range[1].sectors = 8;
	range[1].flags = 0;
	assert_int_equal(request(f, T_WRITE_ZEROES, 0, 32), S_OK);
	assert_int_equal(request(f, T_IN, 8, 4096), S_OK);
	assert_memory_equal(driver_memory(&f->d, f->data, 4096), zero, 4096);
	assert_int_equal(request(f, T_IN, 32, 4096), S_OK);
	assert_memory_equal(driver_memory(&f->d, f->data, 4096), zero, 4096);
	assert_int_equal(request(f, T_IN, 16, 4096), S_OK);
	assert_memory_not_equal(driver_memory(&f->d, f->data, 4096), zero, 4096);

	memset(range, 0, 32);
	range[0].sectors = 128;
	assert_int_equal(request(f, T_DISCARD, 0, 16), S_OK);
	range[0].flags = 1;
	assert_int_equal(request(f, T_DISCARD, 0, 16), S_UNSUPP);
	range[0].flags = 2;
	assert_int_equal(request(f, T_WRITE_ZEROES, 0, 16), S_UNSUPP);
	range[0].flags = 0;
	range[0].sector = IMAGE_SIZE / 512 - 1;
	range[0].sectors = 2;
	assert_int_equal(request(f, T_DISCARD, 0, 16), S_IOERR);
	range[0].sector = UINT64_MAX;
	assert_int_equal(request(f, T_WRITE_ZEROES, 0, 16), S_IOERR);
	assert_int_equal(request(f, T_DISCARD, 0, 15), S_IOERR);
	assert_int_equal(request(f, T_DISCARD, 0, 16 * 17), S_IOERR);
	assert_int_equal(request(f, T_DISCARD, 0, 0), S_IOERR);
}

static void test_bad_requests(void **state)
{
	struct fixture *f = *state;
	uint64_t end = IMAGE_SIZE / 512;
	uint32_t length;

	start(f, ~0ull);
	assert_int_equal(request(f, T_IN, end, 512), S_IOERR);
	assert_int_equal(request(f, T_IN, end - 1, 1024), S_IOERR);
	assert_int_equal(request(f, T_OUT, end, 512), S_IOERR);
	assert_int_equal(request(f, T_OUT, UINT64_MAX, 512), S_IOERR);
	assert_int_equal(request(f, T_OUT, UINT64_MAX / 512 + 1, 512), S_IOERR);
	assert_int_equal(request(f, T_IN, 0, 511), S_IOERR);
	assert_int_equal(request(f, T_IN, 0, 0), S_OK);
	assert_int_equal(request(f, 77, 0, 512), S_UNSUPP);
	assert_int_equal(request(f, 2, 0, 512), S_UNSUPP);
	/* a read into a buffer that is not writable: its data part is empty */
	assert_int_equal(request_on(f, 0, T_IN, 0, 512, false, &length), S_OK);
	assert_int_equal(length, 1);
	assert_int_equal(request(f, T_IN, 0, 512), S_OK);
	assert_false(needs_reset(f));
}

/* Header and data in pieces, as the specification allows (2.7.4). */
static void test_any_layout(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;
	struct driver_queue *q;
	uint8_t *bytes = driver_memory(d, f->data, 4096);
	uint64_t sector = 3;
	uint32_t type = T_OUT;

	start(f, ~0ull);
	q = &d->queue[0];
	memset(driver_memory(d, f->header, 16), 0, 16);
	memcpy(driver_memory(d, f->header, 4), &type, 4);
	memcpy(driver_memory(d, f->header + 8, 8), &sector, 8);
	/* header of 10 bytes, then 6 with 100 bytes of data behind, then the other 412 */
	memcpy(bytes, driver_memory(d, f->header + 10, 6), 6);
	pattern(bytes + 6, 512, 9);
	*(uint8_t *)driver_memory(d, f->status, 1) = S_NONE;
	driver_add(d, q, (struct buffer[]){{f->header, 10}, {f->data, 106}, {f->data + 106, 412}, {f->status, 1, true}},
		4);
	driver_notify(d, q);
	assert_true(driver_used(d, q, NULL, NULL));
	assert_int_equal(*(uint8_t *)driver_memory(d, f->status, 1), S_OK);
	check_pattern(f, 3, 512, 9);
	/* data and status in one buffer */
	type = T_IN;
	memcpy(driver_memory(d, f->header, 4), &type, 4);
	memset(bytes, 0xcc, 600);
	memcpy(driver_memory(d, f->header + 8, 8), &sector, 8);
	driver_add(d, q, (struct buffer[]){{f->header, 16}, {f->data, 513, true}}, 2);
	driver_notify(d, q);
	assert_true(driver_used(d, q, NULL, NULL));
	assert_int_equal(bytes[512], S_OK);
	assert_int_equal(bytes[513], 0xcc);
}

static void test_lies_stop_the_device(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;
	struct buffer bad[][2] = {
		{{f->header, 15, false}, {f->status, 1, true}},	  /* header too short */
		{{f->header, 16, false}, {f->header, 16, false}}, /* no status */
		{{MEMORY, 16, false}, {f->status, 1, true}},
		{{f->header, 0, false}, {f->status, 1, true}},
	};

	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		unsigned before = f->board.messages[DRIVER_MSI_BASE];

		start(f, ~0ull);
		driver_add(d, &d->queue[1], bad[i], 2);
		driver_notify(d, &d->queue[1]);
		assert_true(needs_reset(f));
		for (unsigned n = 0; n < 1000 && f->board.messages[DRIVER_MSI_BASE] == before; n++)
			usleep(1000);
		assert_int_equal(f->board.messages[DRIVER_MSI_BASE], before + 1); /* configuration interrupt */
		/* dead until it is reset */
		driver_add(d, &d->queue[0], (struct buffer[]){{f->header, 16}, {f->status, 1, true}}, 2);
		driver_notify(d, &d->queue[0]);
		usleep(10000);
		assert_false(driver_used_now(d, &d->queue[0], NULL, NULL));
		driver_write(d, d->common + 0x14, 1, 0);
		assert_int_equal(driver_status(d), 0);
	}
	/* a ring outside memory is found when it is enabled */
	assert_true(driver_negotiate(d, VIRTIO_F_VERSION_1));
	driver_write(d, d->common + 0x16, 2, 0);
	driver_write(d, d->common + 0x20, 8, MEMORY - 16);
	driver_write(d, d->common + 0x1c, 2, 1);
	assert_true(driver_status(d) & VIRTIO_STATUS_NEEDS_RESET);
	/* and then all is well again */
	start(f, ~0ull);
	write_pattern(f, 0, 4096, 1);
	check_pattern(f, 0, 4096, 1);
}

static void test_intx(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;
	unsigned gsi = pci_slot_gsi(1);

	assert_true(driver_negotiate(d, VIRTIO_F_VERSION_1));
	driver_queue_up(d, 0, 0, false);
	driver_ok(d);
	assert_int_equal(request(f, T_FLUSH, 0, 0), S_OK);
	for (unsigned i = 0; i < 1000 && !f->board.level[gsi]; i++)
		usleep(1000);
	assert_true(f->board.level[gsi]);
	assert_int_equal(driver_read(d, d->isr, 1), 1);
	assert_false(f->board.level[gsi]);
	assert_int_equal(driver_read(d, d->isr, 1), 0);
}

static void test_write_cache(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;

	start(f, ~0ull);
	assert_int_equal(driver_read(d, d->device + 32, 1), 1);
	driver_write(d, d->device + 32, 1, 0);
	assert_int_equal(driver_read(d, d->device + 32, 1), 0);
	write_pattern(f, 0, 4096, 4); /* flushed each */
	driver_write(d, d->device + 32, 1, 7);
	driver_write(d, d->device, 4, 7);
	assert_int_equal(driver_read(d, d->device + 32, 1), 0);
	assert_int_equal(driver_read(d, d->device, 8), IMAGE_SIZE / 512);
	driver_write(d, d->device + 32, 1, 1);
	check_pattern(f, 0, 4096, 4);
}

static void test_read_only(void **state)
{
	struct fixture *f = *state;

	attach(f, DISK_RAW, true);
	start(f, ~0ull);
	assert_true(f->d.offered & 1 << F_RO);
	assert_false(f->d.offered & 1 << F_DISCARD);
	assert_int_equal(request(f, T_OUT, 0, 512), S_IOERR);
	assert_int_equal(request(f, T_DISCARD, 0, 16), S_IOERR);
	assert_int_equal(request(f, T_IN, 0, 512), S_OK);
	assert_int_equal(request(f, T_FLUSH, 0, 0), S_OK);
}

/* ---- reset and pause in the middle of I/O ---- */

/* Fills queue `i` with writes of 64 KiB, each a distinct byte to a distinct place, status bytes side by side. */
static unsigned storm(struct fixture *f, unsigned i, unsigned count)
{
	struct driver *d = &f->d;

	memset(driver_memory(d, f->status, 4096), S_NONE, 4096);
	for (unsigned n = 0; n < count; n++) {
		uint64_t header = f->header + 16 * n, data = f->data + 65536 * n, sector = 128 * n;
		uint32_t type = T_OUT;

		memset(driver_memory(d, header, 16), 0, 16);
		memcpy(driver_memory(d, header, 4), &type, 4);
		memcpy(driver_memory(d, header + 8, 8), &sector, 8);
		memset(driver_memory(d, data, 65536), n + 1, 65536);
		driver_add(
			d, &d->queue[i], (struct buffer[]){{header, 16}, {data, 65536}, {f->status + n, 1, true}}, 3);
	}
	driver_notify(d, &d->queue[i]);
	return count;
}

static void test_reset_in_flight(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;

	for (unsigned round = 0; round < 50; round++) {
		unsigned done = 0, later = 0;
		uint8_t *status = driver_memory(d, f->status, 64);
		uint16_t used;

		d->next_free = f->data + (4 << 20);
		start(f, ~0ull);
		storm(f, round % QUEUES, 60);
		usleep(round * 20);
		driver_write(d, d->common + 0x14, 1, 0);
		assert_int_equal(driver_status(d), 0);
		/* After the reset nothing more is written to memory. */
		memcpy(&used, driver_memory(d, d->queue[round % QUEUES].used + 2, 2), 2);
		for (unsigned n = 0; n < 60; n++)
			done += status[n] == S_OK;
		assert_int_equal(done, used);
		usleep(500);
		for (unsigned n = 0; n < 60; n++)
			later += status[n] == S_OK;
		assert_int_equal(later, done);
	}
	start(f, ~0ull);
	write_pattern(f, 0, 4096, 1);
	check_pattern(f, 0, 4096, 1);
}

static void test_pause_in_flight(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;
	uint8_t *status = driver_memory(d, f->status, 64);

	start(f, ~0ull);
	for (unsigned round = 0; round < 20; round++) {
		unsigned done = 0, later = 0, count = storm(f, 0, 60);

		usleep(round * 50);
		virtio_device_quiesce(f->device);
		for (unsigned n = 0; n < count; n++)
			done += status[n] == S_OK;
		driver_notify(d, &d->queue[0]); /* the last notification falls into the pause */
		usleep(500);
		for (unsigned n = 0; n < count; n++)
			later += status[n] == S_OK;
		assert_int_equal(done, later);
		virtio_device_resume(f->device);
		for (unsigned n = 0; n < count; n++)
			assert_true(driver_used(d, &d->queue[0], NULL, NULL));
		for (unsigned n = 0; n < count; n++)
			assert_int_equal(status[n], S_OK);
	}
	for (unsigned n = 0; n < 60; n++) {
		assert_int_equal(request(f, T_IN, 128 * n, 512), S_OK);
		assert_int_equal(*(uint8_t *)driver_memory(d, f->data, 1), n + 1);
	}
}

static void test_board_reset(void **state)
{
	struct fixture *f = *state;

	start(f, ~0ull);
	storm(f, 0, 60);
	pci_reset(f->board.pci);
	assert_true(driver_find(&f->d, &f->board, 1));
	assert_int_equal(driver_status(&f->d), 0);
	f->d.next_free = f->data + (4 << 20);
	start(f, ~0ull);
	write_pattern(f, 0, 4096, 1);
	check_pattern(f, 0, 4096, 1);
}

/* All queues at once, each with its own places. */
static void test_queues_in_parallel(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;

	start(f, ~0ull);
	for (unsigned round = 0; round < 200; round++) {
		for (unsigned i = 0; i < QUEUES; i++) {
			uint64_t header = f->header + 16 * i, sector = 8 * i + 24 * (round % 50);
			uint32_t type = T_OUT;

			memset(driver_memory(d, header, 16), 0, 16);
			memcpy(driver_memory(d, header, 4), &type, 4);
			memcpy(driver_memory(d, header + 8, 8), &sector, 8);
			memset(driver_memory(d, f->data + 4096 * i, 4096), round + i, 4096);
			driver_add(d, &d->queue[i],
				(struct buffer[]){{header, 16}, {f->data + 4096 * i, 4096}, {f->status + i, 1, true}},
				3);
			driver_notify(d, &d->queue[i]);
		}
		for (unsigned i = 0; i < QUEUES; i++) {
			assert_true(driver_used(d, &d->queue[i], NULL, NULL));
			assert_int_equal(*(uint8_t *)driver_memory(d, f->status + i, 1), S_OK);
		}
	}
	for (unsigned n = 0; n < 50; n++)
		for (unsigned i = 0; i < QUEUES; i++) {
			assert_int_equal(request(f, T_IN, 8 * i + 24 * n, 4096), S_OK);
			assert_int_equal(*(uint8_t *)driver_memory(d, f->data, 1), 150 + n + i);
		}
}

/* ---- entropy ---- */

static void test_rng(void **state)
{
	struct fixture *f = *state;
	struct driver *d = &f->d;
	struct driver_queue *q;
	uint8_t *bytes;
	uint64_t data;
	uint32_t length;
	unsigned zeroes = 0;

	if (virtio_rng_create(&f->device, &f->board, &f->err))
		fail_msg("%s", f->err.text);
	assert_true(driver_find(d, &f->board, 1));
	assert_int_equal(d->device, 0); /* no configuration */
	assert_int_equal(pci_config_read(f->board.pci, 1, 0, 2, 2), 0x1044);
	assert_true(driver_negotiate(d, ~0ull));
	driver_msix(d, 2);
	q = driver_queue_up(d, 0, 0, true);
	driver_ok(d);
	data = driver_alloc(d, 65536);
	bytes = driver_memory(d, data, 65536);
	driver_add(d, q, (struct buffer[]){{data, 1000, true}}, 1);
	driver_notify(d, q);
	assert_true(driver_used_now(d, q, NULL, &length)); /* on our own thread */
	assert_int_equal(length, 1000);
	assert_int_equal(bytes[1000], 0);
	for (unsigned i = 0; i < 1000; i++)
		zeroes += bytes[i] == 0;
	assert_true(zeroes < 50);
	assert_true(f->board.messages[DRIVER_MSI_BASE + 1] > 0);
	driver_add(d, q, (struct buffer[]){{data, 65536, true}}, 1);
	driver_notify(d, q);
	assert_true(driver_used_now(d, q, NULL, &length));
	assert_int_equal(length, 4096);
	driver_add(d, q, (struct buffer[]){{data, 100, false}}, 1); /* nothing to write to: returned empty */
	driver_notify(d, q);
	assert_true(driver_used_now(d, q, NULL, &length));
	assert_int_equal(length, 0);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
#define RAW(name) cmocka_unit_test_setup_teardown(name, set_up_raw, tear_down)
#define QCOW2(name) cmocka_unit_test_setup_teardown(name, set_up_qcow2, tear_down)
#define BARE(name) cmocka_unit_test_setup_teardown(name, set_up_bare, tear_down)
		RAW(test_identity),
		RAW(test_features),
		RAW(test_queue_registers),
		RAW(test_window),
		RAW(test_read_write),
		QCOW2(test_read_write),
		RAW(test_id_and_ranges),
		QCOW2(test_id_and_ranges),
		RAW(test_bad_requests),
		RAW(test_any_layout),
		RAW(test_lies_stop_the_device),
		RAW(test_intx),
		RAW(test_write_cache),
		BARE(test_read_only),
		RAW(test_reset_in_flight),
		QCOW2(test_reset_in_flight),
		RAW(test_pause_in_flight),
		QCOW2(test_pause_in_flight),
		RAW(test_board_reset),
		RAW(test_queues_in_parallel),
		QCOW2(test_queues_in_parallel),
		BARE(test_rng),
	};

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
