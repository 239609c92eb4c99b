/* The PCI bus, driven as a kernel drives it. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
/* after the headers it wants */
#include <cmocka.h>

#include "base/util.h"
#include "fake-board.h"
#include "machine/pci_internal.h"

enum { REGISTERS, TABLE = 1, LARGE = 2, PORTS = 4 };

struct device {
	struct pci_device pci;
	uint64_t last_offset, last_value;
	unsigned resets, config_writes;
};

struct fixture {
	struct board board;
	struct pci_bus *bus;
	struct device device, other;
};

static uint64_t register_read(struct io_region *region, uint64_t offset, unsigned size)
{
	return 0x1000 + offset;
}

static void register_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	struct device *d = container_of(region, struct device, pci.bar[REGISTERS].region);

	d->last_offset = offset;
	d->last_value = value;
}

static const struct io_ops register_ops = {register_read, register_write};

static void device_config_written(struct pci_device *pci, unsigned offset, unsigned size)
{
	container_of(pci, struct device, pci)->config_writes++;
}

static bool device_config_read(struct pci_device *pci, unsigned offset, unsigned size, uint32_t *value)
{
	if (offset != 0xf0)
		return false;
	*value = 0xabcd;
	return true;
}

static void device_reset(struct pci_device *pci)
{
	container_of(pci, struct device, pci)->resets++;
}

static const struct pci_device_ops device_ops = {device_config_written, device_config_read, device_reset};

static void fill(struct device *d, const char *name)
{
	struct pci_device *p = &d->pci;

	p->name = name;
	p->ops = &device_ops;
	p->vendor = 0x1af4;
	p->device = 0x1042;
	p->subsystem_vendor = 0x1af4;
	p->subsystem = 0x1100;
	p->revision = 1;
	p->class_code = 0x010000;
	p->bar[REGISTERS] = (struct pci_bar){.size = 0x4000, .region = {.name = name, .ops = &register_ops}};
	p->bar[TABLE] = (struct pci_bar){.size = 0x1000};
	p->bar[LARGE] = (struct pci_bar){
		.size = 1ull << 33, .is_64bit = true, .region = {.name = "large", .ops = &register_ops}};
	p->bar[PORTS] =
		(struct pci_bar){.size = 0x20, .is_io = true, .region = {.name = "ports", .ops = &register_ops}};
}

static int set_up(void **state)
{
	static struct fixture f;
	struct error err = {0};

	f = (struct fixture){0};
	fake_board_create(&f.board, 0);
	assert_int_equal(pci_create(&f.bus, &f.board, &err), 0);
	fill(&f.device, "first");
	fill(&f.other, "second");
	assert_int_equal(pci_add_msix(&f.device.pci, 4, TABLE, &err), 0); /* before ... */
	assert_int_equal(pci_add(f.bus, &f.device.pci, -1, &err), 0);
	assert_int_equal(pci_add(f.bus, &f.other.pci, -1, &err), 0);
	assert_int_equal(pci_add_msix(&f.other.pci, 128, TABLE, &err), 0); /* ... or after */
	*state = &f;
	return 0;
}

static int tear_down(void **state)
{
	struct fixture *f = *state;

	pci_remove(&f->device.pci);
	pci_remove(&f->other.pci);
	pci_destroy(f->bus);
	fake_board_destroy(&f->board);
	return 0;
}

static uint64_t ecam(unsigned bus, unsigned slot, unsigned function, unsigned offset)
{
	return BOARD_ECAM_BASE + (bus << 20 | slot << 15 | function << 12 | offset);
}

static uint64_t mmio_read(struct fixture *f, uint64_t address, unsigned size)
{
	uint64_t value = ~0ull >> (64 - 8 * size);

	space_read(f->board.mmio, address, size, &value);
	return value;
}

static void mmio_write(struct fixture *f, uint64_t address, unsigned size, uint64_t value)
{
	space_write(f->board.mmio, address, size, value);
}

static uint32_t get(struct fixture *f, unsigned offset, unsigned size)
{
	return mmio_read(f, ecam(0, 1, 0, offset), size);
}

static void set(struct fixture *f, unsigned offset, unsigned size, uint32_t value)
{
	mmio_write(f, ecam(0, 1, 0, offset), size, value);
}

static bool answers(struct fixture *f, uint64_t address)
{
	return mmio_read(f, address, 4) == 0x1000;
}

static void test_discovery(void **state)
{
	struct fixture *f = *state;
	uint64_t value;

	assert_int_equal(mmio_read(f, ecam(0, 0, 0, 0), 4), 0x00081b36);
	assert_int_equal(mmio_read(f, ecam(0, 0, 0, 8), 4), 0x06000000);
	assert_int_equal(get(f, 0, 4), 0x10421af4);
	assert_int_equal(get(f, 8, 4), 0x01000001);
	assert_int_equal(get(f, 0x2c, 4), 0x11001af4);
	assert_int_equal(get(f, 0x0e, 1), 0); /* one function, plain device */
	assert_int_equal(get(f, 0x3d, 1), 1);
	assert_int_equal(get(f, 0x100, 4), 0); /* no extended capabilities */
	assert_int_equal(get(f, 0xf0, 2), 0xabcd);
	assert_int_equal(mmio_read(f, ecam(0, 1, 1, 0), 4), 0xffffffff);
	assert_int_equal(mmio_read(f, ecam(0, 3, 0, 0), 2), 0xffff);
	assert_int_equal(mmio_read(f, ecam(1, 1, 0, 0), 4), 0xffffffff);
	assert_int_equal(mmio_read(f, ecam(0, 1, 0, 0), 8), 0x0010000310421af4);

	/* Ids are read-only, and so is the header of a host bridge. */
	set(f, 0, 4, 0);
	mmio_write(f, ecam(0, 0, 0, 4), 2, 0xffff);
	assert_int_equal(get(f, 0, 4), 0x10421af4);
	assert_int_equal(mmio_read(f, ecam(0, 0, 0, 4), 2), 0);

	/* What a kernel does to find the ports' mechanism */
	space_write(f->board.pio, 0xcfb, 1, 1);
	space_write(f->board.pio, 0xcf8, 4, 0x80000000);
	assert_true(space_read(f->board.pio, 0xcf8, 4, &value));
	assert_int_equal(value, 0x80000000);
	space_write(f->board.pio, 0xcf8, 4, 0x80000000 | 1 << 11 | 0x08);
	space_read(f->board.pio, 0xcff, 1, &value);
	assert_int_equal(value, 0x01);
	space_read(f->board.pio, 0xcfc, 4, &value);
	assert_int_equal(value, 0x01000001);
	space_write(f->board.pio, 0xcf8, 4, 1 << 11);
	space_read(f->board.pio, 0xcfc, 4, &value);
	assert_int_equal(value, 0xffffffff);

	/* The reset register in the middle of them */
	space_write(f->board.pio, BOARD_PORT_RESET, 1, 6);
	assert_int_equal(f->board.reset_port, 6);
}

static void test_sizing(void **state)
{
	struct fixture *f = *state;
	uint32_t was = get(f, 0x10, 4);

	assert_true(was >= BOARD_PCI_MMIO_BASE && was < BOARD_PCI_MMIO_BASE + BOARD_PCI_MMIO_SIZE);
	assert_true(answers(f, was));
	set(f, 0x10, 4, 0xffffffff); /* with decoding on: it answers nowhere for the while */
	assert_int_equal(get(f, 0x10, 4), 0xffffc000);
	assert_false(answers(f, was));
	assert_false(answers(f, 0xffffc000));
	set(f, 0x10, 4, was);
	assert_true(answers(f, was));

	uint64_t large = get(f, 0x18, 4) | (uint64_t)get(f, 0x1c, 4) << 32;
	assert_int_equal(large & 15, 4);
	assert_true(large >= BOARD_PCI_MMIO64_BASE);
	assert_true(answers(f, large & ~15ull));
	set(f, 0x18, 4, 0xffffffff);
	set(f, 0x1c, 4, 0xffffffff);
	assert_int_equal(get(f, 0x18, 4), 4);
	assert_int_equal(get(f, 0x1c, 4), 0xfffffffe);
	set(f, 0x18, 4, large);
	set(f, 0x1c, 4, large >> 32);
	assert_true(answers(f, large & ~15ull));

	set(f, 0x20, 4, 0xffffffff);
	assert_int_equal(get(f, 0x20, 4), 0xffe1);
	set(f, 0x24, 4, 0xffffffff); /* absent */
	assert_int_equal(get(f, 0x24, 4), 0);
	set(f, 0x30, 4, 0xffffffff); /* no ROM */
	assert_int_equal(get(f, 0x30, 4), 0);
}

static void test_moving(void **state)
{
	struct fixture *f = *state;
	uint32_t first = get(f, 0x10, 4), second = mmio_read(f, ecam(0, 2, 0, 0x10), 4), elsewhere = 0xd0000000;
	uint64_t value;

	assert_int_not_equal(first, second);
	set(f, 0x10, 4, elsewhere);
	assert_false(answers(f, first));
	assert_true(answers(f, elsewhere));
	mmio_write(f, elsewhere + 8, 4, 77);
	assert_int_equal(f->device.last_offset, 8);
	assert_int_equal(f->device.last_value, 77);

	/* Memory off, and on again at a third place; a byte of the BAR at a time is allowed. */
	set(f, 4, 2, 0);
	assert_false(answers(f, elsewhere));
	set(f, 0x13, 1, 0xd1);
	assert_false(answers(f, 0xd1000000));
	set(f, 4, 2, PCI_COMMAND_MEMORY);
	assert_true(answers(f, 0xd1000000));

	/* Two devices change places while both decode: the one that comes second waits for the room, and gets it. */
	set(f, 0x10, 4, second);
	assert_false(answers(f, 0xd1000000));
	mmio_write(f, second, 4, 5);
	assert_int_equal(f->other.last_value, 5);
	mmio_write(f, ecam(0, 2, 0, 0x10), 4, first);
	mmio_write(f, second, 4, 6);
	mmio_write(f, first, 4, 7);
	assert_int_equal(f->device.last_value, 6);
	assert_int_equal(f->other.last_value, 7);

	/* Never over the board's own registers, nor outside the windows */
	set(f, 0x10, 4, BOARD_LAPIC_BASE & ~0x3fffu);
	assert_false(answers(f, BOARD_LAPIC_BASE & ~0x3fffu));
	set(f, 0x10, 4, BOARD_ECAM_BASE);
	assert_int_equal(mmio_read(f, BOARD_ECAM_BASE, 4), 0x00081b36);
	set(f, 0x10, 4, 0);
	assert_false(answers(f, 0));

	/* Ports */
	set(f, 4, 2, PCI_COMMAND_IO);
	uint32_t ports = get(f, 0x20, 4);
	assert_true(space_read(f->board.pio, ports & ~3u, 4, &value));
	set(f, 0x20, 4, 0x3f8);
	assert_false(space_read(f->board.pio, 0x3f8, 1, &value));
	assert_false(space_read(f->board.pio, ports & ~3u, 4, &value));
}

static void test_reset(void **state)
{
	struct fixture *f = *state;
	uint32_t was = get(f, 0x10, 4);

	set(f, 0x10, 4, 0xd0000000);
	set(f, 4, 2, PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE);
	set(f, 0x40 + 2, 2, 0xc000);
	assert_true(pci_msix_enabled(&f->device.pci));
	pci_intx(&f->other.pci, true);
	pci_reset(f->bus);
	assert_int_equal(f->device.resets, 1);
	assert_int_equal(get(f, 0x10, 4), was);
	assert_int_equal(get(f, 4, 2), PCI_COMMAND_IO | PCI_COMMAND_MEMORY);
	assert_true(answers(f, was));
	assert_false(pci_msix_enabled(&f->device.pci));
	assert_int_equal(get(f, 0x34, 1), 0x40);
	assert_int_equal(get(f, 6, 2), PCI_STATUS_CAPABILITIES);
	assert_false(f->board.level[pci_slot_gsi(2)]);
}

static void test_intx(void **state)
{
	struct fixture *f = *state;
	struct device third = {0};
	struct error err = {0};
	unsigned gsi = pci_slot_gsi(1);

	fill(&third, "third");
	assert_int_equal(pci_add(f->bus, &third.pci, 9, &err), 0);
	assert_int_equal(pci_slot_gsi(9), gsi);

	pci_intx(&f->device.pci, true);
	assert_true(f->board.level[gsi]);
	assert_int_equal(get(f, 6, 2) & PCI_STATUS_INTERRUPT, PCI_STATUS_INTERRUPT);
	pci_intx(&third.pci, true);
	pci_intx(&f->device.pci, false);
	assert_true(f->board.level[gsi]); /* the other one holds the line */
	assert_int_equal(f->board.level_changes, 1);
	pci_intx(&third.pci, false);
	assert_false(f->board.level[gsi]);

	pci_intx(&f->device.pci, true);
	set(f, 4, 2, PCI_COMMAND_INTX_DISABLE);
	assert_false(f->board.level[gsi]);
	assert_int_equal(get(f, 6, 2) & PCI_STATUS_INTERRUPT, PCI_STATUS_INTERRUPT);
	set(f, 4, 2, PCI_COMMAND_MEMORY);
	assert_true(f->board.level[gsi]);
	set(f, 0x42, 2, 0x8000); /* MSI-X replaces it */
	assert_false(f->board.level[gsi]);
	set(f, 0x42, 2, 0);
	assert_true(f->board.level[gsi]);

	pci_intx(&third.pci, true);
	pci_intx(&f->device.pci, false);
	pci_remove(&third.pci); /* an unplugged device lets go */
	assert_false(f->board.level[gsi]);
}

static void test_msix(void **state)
{
	struct fixture *f = *state;
	struct pci_device *d = &f->device.pci;
	uint64_t table = get(f, 0x14, 4), pending = table + 0x800;

	assert_int_equal(get(f, 0x40, 4), 0x00030011);
	assert_int_equal(get(f, 0x44, 4), TABLE);
	assert_int_equal(get(f, 0x48, 4), 0x800 | TABLE);
	assert_int_equal(mmio_read(f, table + 0x1c, 4), 1); /* masked at power-on */

	pci_msix_send(d, 1); /* not enabled */
	assert_int_equal(f->board.messages_sent, 0);
	assert_int_equal(mmio_read(f, pending, 8), 0);

	set(f, 4, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
	set(f, 0x42, 2, 0xffff);
	assert_int_equal(get(f, 0x42, 2), 0xc003); /* table size is read-only */
	mmio_write(f, table + 0x10, 8, 0xfee01000 | 0x5ull << 32);
	mmio_write(f, table + 0x18, 4, 0x41);
	mmio_write(f, table + 0x1c, 4, 0xfffffffe);
	assert_int_equal(mmio_read(f, table + 0x18, 8), 0x41);
	pci_msix_send(d, 1); /* function mask */
	assert_int_equal(f->board.messages_sent, 0);
	assert_int_equal(mmio_read(f, pending, 8), 2);
	set(f, 0x42, 2, 0x8000);
	assert_int_equal(f->board.messages_sent, 1);
	assert_int_equal(mmio_read(f, pending, 4), 0);
	assert_int_equal(f->board.messages[0].address, 0x5fee01000);
	assert_int_equal(f->board.messages[0].data, 0x41);

	mmio_write(f, table + 0x1c, 4, 1); /* vector mask */
	pci_msix_send(d, 1);
	pci_msix_send(d, 1);
	assert_int_equal(f->board.messages_sent, 1);
	mmio_write(f, table + 0x18, 4, 0x42);
	mmio_write(f, table + 0x1c, 4, 0);
	assert_int_equal(f->board.messages_sent, 2); /* twice pending is once sent, with the new data */
	assert_int_equal(f->board.messages[1].data, 0x42);

	set(f, 4, 2, PCI_COMMAND_MEMORY); /* no bus master: it waits */
	pci_msix_send(d, 1);
	assert_int_equal(f->board.messages_sent, 2);
	set(f, 4, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
	assert_int_equal(f->board.messages_sent, 3);

	pci_msix_send(d, 4); /* there are four */
	assert_int_equal(f->board.messages_sent, 3);
	mmio_write(f, pending, 8, ~0ull);      /* read-only */
	mmio_write(f, table + 0x40, 8, ~0ull); /* behind the table */
	mmio_write(f, table + 0x11, 4, ~0ull); /* not aligned */
	mmio_write(f, table + 0x10, 2, 0);
	assert_int_equal(mmio_read(f, pending, 8), 0);
	assert_int_equal(mmio_read(f, table + 0x40, 8), 0);
	assert_int_equal(mmio_read(f, table + 0x10, 4), 0xfee01000);
	assert_int_equal(mmio_read(f, table + 0xff8, 8), 0);
}

static void test_capabilities(void **state)
{
	struct fixture *f = *state;
	struct error err = {0};
	uint8_t body[14] = {16, 1, 2, 3};
	int offset = pci_add_capability(&f->device.pci, 9, body, 16, &err);

	assert_int_equal(offset, 0x4c);
	assert_int_equal(get(f, 0x34, 1), 0x40);
	assert_int_equal(get(f, 0x41, 1), 0x4c);
	assert_int_equal(get(f, 0x4c, 4), 0x01100009);
	set(f, 0x4c, 4, 0);
	assert_int_equal(get(f, 0x4c, 4), 0x01100009);
	assert_int_equal(f->device.config_writes, 1);
	assert_int_equal(pci_add_capability(&f->device.pci, 9, body, 250, &err), -ENOSPC);
}

static void test_refusals(void **state)
{
	struct fixture *f = *state;
	struct error err = {0};
	struct device bad = {0};

	fill(&bad, "bad");
	bad.pci.bar[0].size = 0x3000;
	assert_int_equal(pci_add(f->bus, &bad.pci, -1, &err), -EINVAL);
	bad = (struct device){0};
	fill(&bad, "bad");
	assert_int_equal(pci_add(f->bus, &bad.pci, 2, &err), -EEXIST);
	assert_string_equal(err.text, "PCI device bad: slot 2 already holds second; choose another");
	assert_int_equal(pci_add_msix(&bad.pci, 129, TABLE, &err), -EINVAL);
	bad.pci.bar[LARGE].size = 1ull << 42;
	assert_int_equal(pci_add(f->bus, &bad.pci, -1, &err), -ENOSPC);
	assert_int_equal(mmio_read(f, ecam(0, 3, 0, 0), 4), 0xffffffff);
}

/* Configuration from several vCPUs while interrupts are sent: nothing hangs, and the end state is whole. */
static void *hammer(void *opaque)
{
	struct fixture *f = opaque;
	static _Atomic unsigned threads;
	unsigned me = threads++;

	for (unsigned i = 0; i < 3000; i++) {
		set(f, 0x10, 4, 0xd0000000 + 0x4000 * (me * 16 + i % 16));
		set(f, 4, 2, i % 3 ? 7 : 0);
		mmio_read(f, 0xd0000000 + 0x4000 * (i % 64), 4);
		pci_msix_send(&f->device.pci, i % 4);
		pci_intx(&f->device.pci, i & 1);
		mmio_write(f, mmio_read(f, ecam(0, 2, 0, 0x14), 4) + 0x0c, 4, i & 1);
	}
	return NULL;
}

static void test_several_cpus(void **state)
{
	struct fixture *f = *state;
	pthread_t threads[3];

	for (unsigned i = 0; i < ARRAY_SIZE(threads); i++)
		assert_int_equal(pthread_create(&threads[i], NULL, hammer, f), 0);
	for (unsigned i = 0; i < ARRAY_SIZE(threads); i++)
		pthread_join(threads[i], NULL);
	set(f, 4, 2, 7);
	assert_true(answers(f, get(f, 0x10, 4)));
	pci_intx(&f->device.pci, false);
	assert_false(f->board.level[pci_slot_gsi(1)]);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {TEST(test_discovery), TEST(test_sizing), TEST(test_moving), TEST(test_reset),
		TEST(test_intx), TEST(test_msix), TEST(test_capabilities), TEST(test_refusals),
		TEST(test_several_cpus)};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
