/* Virtio over PCI, the modern transport (virtio 1.2, section 4.1): BAR 0 holds common configuration, interrupt status,
 * device configuration and notification addresses, a page each; BAR 1 belongs to MSI-X.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "device/virtio.h"
#include "machine/board.h"
#include "machine/pci.h"

#define PCI_VENDOR_VIRTIO 0x1af4 /* 4.1.2 */
#define PCI_DEVICE_VIRTIO 0x1040 /* plus the type */
#define PCI_CAP_VENDOR 0x09

#define BAR_REGISTERS 0
#define BAR_MSIX 1
#define PAGE 0x1000u

/* Pages of BAR 0, in the order of cfg_type (4.1.4): the first four structures */
enum { COMMON = 1, NOTIFY = 2, ISR = 3, DEVICE = 4, WINDOW = 5 };
#define REGISTERS_SIZE (4 * PAGE)
#define NOTIFY_MULTIPLIER 4 /* bytes between the notification addresses of two queues */

#define ISR_QUEUE 1 /* 4.1.4.5 */
#define ISR_CONFIG 2

/* struct virtio_pci_common_cfg (4.1.4.3) */
struct common_config {
	uint32_t device_feature_select;
	uint32_t device_feature;
	uint32_t driver_feature_select;
	uint32_t driver_feature;
	uint16_t config_msix_vector;
	uint16_t num_queues;
	uint8_t device_status;
	uint8_t config_generation;
	uint16_t queue_select;
	uint16_t queue_size;
	uint16_t queue_msix_vector;
	uint16_t queue_enable;
	uint16_t queue_notify_off;
	uint64_t queue_desc;
	uint64_t queue_driver;
	uint64_t queue_device;
	uint16_t queue_notify_data;
	uint16_t queue_reset;
	uint32_t end; /* to a multiple of 8 */
};
_Static_assert(offsetof(struct common_config, queue_desc) == 0x20, "layout of the specification");

struct vendor_capability { /* struct virtio_pci_cap (4.1.4) without its two header bytes, and what may follow it */
	uint8_t length;
	uint8_t type;
	uint8_t bar;
	uint8_t id;
	uint8_t padding[2];
	uint32_t offset_in_bar;
	uint32_t length_in_bar;
	uint32_t extra; /* notify: the multiplier; window: the data */
} __attribute__((packed));

#define CAP_BAR 4 /* offsets in the whole capability */
#define CAP_OFFSET 8
#define CAP_LENGTH 12
#define CAP_EXTRA 16
#define CAP_SIZE 16

struct virtio_pci {
	struct pci_device pci;
	struct virtio_device *device;
	unsigned window; /* offset in configuration space of the PCI access capability */

	_Atomic uint16_t config_vector;
	_Atomic uint16_t queue_select;
	_Atomic uint32_t device_feature_select, driver_feature_select;

	struct io_bell *bells; /* one per queue, in BAR 0; NULL: none */
	struct loop *loop;     /* that reads them; NULL: the device does */

	pthread_mutex_t isr_lock; /* ISR and the INTx line that shows it */
	uint8_t isr;
};

/* ---- interrupts ---- */

static void interrupt(struct virtio_device *device, struct virtio_queue *queue)
{
	struct virtio_pci *v = device->transport;
	uint16_t vector = queue ? queue->vector : v->config_vector;

	if (pci_msix_enabled(&v->pci)) {
		if (vector != VIRTIO_NO_VECTOR)
			pci_msix_send(&v->pci, vector);
		return;
	}
	scope_lock(&v->isr_lock);
	v->isr |= queue ? ISR_QUEUE : ISR_CONFIG;
	pci_intx(&v->pci, true);
}

static uint8_t take_isr(struct virtio_pci *v)
{
	scope_lock(&v->isr_lock);
	uint8_t isr = v->isr;

	v->isr = 0;
	pci_intx(&v->pci, false);
	return isr;
}

/* ---- common configuration ---- */

static struct virtio_queue *selected(struct virtio_pci *v)
{
	unsigned select = v->queue_select;

	return select < v->device->queue_count ? &v->device->queues[select] : NULL;
}

/* As the driver would see the whole structure now: any part of it can be read from that. */
static struct common_config common_now(struct virtio_pci *v)
{
	struct virtio_device *d = v->device;
	scope_lock(&d->lock);
	struct virtio_queue *q = selected(v);
	struct common_config c = {
		.device_feature_select = v->device_feature_select,
		.driver_feature_select = v->driver_feature_select,
		.config_msix_vector = v->config_vector,
		.num_queues = d->queue_count,
		.device_status = d->status,
		.config_generation = d->config_generation,
		.queue_select = v->queue_select,
	};

	if (c.device_feature_select < 2)
		c.device_feature = d->offered >> (32 * c.device_feature_select);
	if (c.driver_feature_select < 2)
		c.driver_feature = d->accepted >> (32 * c.driver_feature_select);
	/* A queue that is not there has size 0 (4.1.5.1.3) */
	if (q) {
		c.queue_size = q->ring.size;
		c.queue_msix_vector = q->vector;
		c.queue_enable = q->enabled;
		c.queue_notify_off = q->index;
		c.queue_desc = q->ring.desc_gpa;
		c.queue_driver = q->ring.avail_gpa;
		c.queue_device = q->ring.used_gpa;
	}
	return c;
}

/* A vector the table does not have is refused by reading back NO_VECTOR (4.1.5.1.2.2). */
static uint16_t valid_vector(struct virtio_pci *v, uint64_t value)
{
	return value <= v->device->queue_count ? value : VIRTIO_NO_VECTOR;
}

static void set_half(uint64_t *address, bool high, uint32_t value)
{
	*address = high ? (uint32_t)*address | (uint64_t)value << 32 : (*address & ~0xffffffffull) | value;
}

#define FIELD(name) offsetof(struct common_config, name)

static void queue_write(struct virtio_pci *v, uint64_t offset, uint64_t value)
{
	struct virtio_queue *q = selected(v);

	if (!q)
		return;
	if (offset == FIELD(queue_enable)) {
		if (value == 1)
			virtio_queue_enable(q);
		return;
	}
	scope_lock(&v->device->lock);
	if (offset == FIELD(queue_msix_vector)) {
		q->vector = valid_vector(v, value);
		return;
	}
	/* The ring of a queue in use does not move (4.1.4.3.2). */
	if (q->enabled)
		return;
	switch (offset) {
	case FIELD(queue_size):
		q->ring.size = value;
		break;
	case FIELD(queue_desc):
	case FIELD(queue_desc) + 4:
		set_half(&q->ring.desc_gpa, offset & 4, value);
		break;
	case FIELD(queue_driver):
	case FIELD(queue_driver) + 4:
		set_half(&q->ring.avail_gpa, offset & 4, value);
		break;
	case FIELD(queue_device):
	case FIELD(queue_device) + 4:
		set_half(&q->ring.used_gpa, offset & 4, value);
		break;
	}
}

/* The width a driver must use for the field at `offset` (4.1.3.1: that of the field, and 32-bit halves for 64-bit
 * ones); 0: read-only or no field. */
static unsigned writable_width(uint64_t offset)
{
	switch (offset) {
	case FIELD(device_feature_select):
	case FIELD(driver_feature_select):
	case FIELD(driver_feature):
	case FIELD(queue_desc):
	case FIELD(queue_desc) + 4:
	case FIELD(queue_driver):
	case FIELD(queue_driver) + 4:
	case FIELD(queue_device):
	case FIELD(queue_device) + 4:
		return 4;
	case FIELD(config_msix_vector):
	case FIELD(queue_select):
	case FIELD(queue_size):
	case FIELD(queue_msix_vector):
	case FIELD(queue_enable):
		return 2;
	case FIELD(device_status):
		return 1;
	}
	return 0;
}

static void reset(struct virtio_pci *v);

static void common_write(struct virtio_pci *v, uint64_t offset, unsigned size, uint64_t value)
{
	if (size == 8 && offset >= FIELD(queue_desc)) {
		common_write(v, offset, 4, (uint32_t)value);
		common_write(v, offset + 4, 4, value >> 32);
		return;
	}
	if (size != writable_width(offset))
		return;
	switch (offset) {
	case FIELD(device_feature_select):
		v->device_feature_select = value;
		break;
	case FIELD(driver_feature_select):
		v->driver_feature_select = value;
		break;
	case FIELD(driver_feature):
		virtio_set_features(v->device, v->driver_feature_select, value);
		break;
	case FIELD(config_msix_vector):
		v->config_vector = valid_vector(v, value);
		break;
	case FIELD(device_status):
		if (value)
			virtio_set_status(v->device, value);
		else
			reset(v);
		break;
	case FIELD(queue_select):
		v->queue_select = value;
		break;
	default:
		queue_write(v, offset, value);
	}
}

static void reset(struct virtio_pci *v)
{
	virtio_reset(v->device);
	v->config_vector = VIRTIO_NO_VECTOR;
	v->queue_select = 0;
	v->device_feature_select = v->driver_feature_select = 0;
	take_isr(v);
}

/* ---- BAR 0 ---- */

static uint64_t registers_read(struct virtio_pci *v, uint64_t offset, unsigned size)
{
	uint64_t in_page = offset % PAGE, value = 0;
	struct common_config c;

	switch (1 + offset / PAGE) {
	case COMMON:
		if (in_page > sizeof(c) - size)
			return 0;
		c = common_now(v);
		memcpy(&value, (uint8_t *)&c + in_page, size);
		return value;
	case ISR:
		return in_page == 0 ? take_isr(v) : 0;
	case DEVICE:
		return virtio_config_read(v->device, in_page, size);
	}
	return 0;
}

static void registers_write(struct virtio_pci *v, uint64_t offset, unsigned size, uint64_t value)
{
	uint64_t in_page = offset % PAGE;

	switch (1 + offset / PAGE) {
	case COMMON:
		common_write(v, in_page, size, value);
		break;
	case NOTIFY:
		/* The address says which queue; the value repeats it (4.1.5.2), and is not needed. */
		virtio_notify(v->device, in_page / NOTIFY_MULTIPLIER);
		break;
	case DEVICE:
		virtio_config_write(v->device, in_page, size, value);
		break;
	}
}

static struct virtio_pci *region_device(struct io_region *region)
{
	return container_of(container_of(region, struct pci_bar, region), struct virtio_pci, pci.bar[BAR_REGISTERS]);
}

static uint64_t bar_read(struct io_region *region, uint64_t offset, unsigned size)
{
	return registers_read(region_device(region), offset, size);
}

static void bar_write(struct io_region *region, uint64_t offset, unsigned size, uint64_t value)
{
	registers_write(region_device(region), offset, size, value);
}

static const struct io_ops bar_ops = {bar_read, bar_write};

/* ---- the window into BAR 0 by configuration accesses (4.1.4.9), for firmware that maps no BAR ---- */

static bool window_target(struct virtio_pci *v, uint32_t *offset, uint32_t *length)
{
	const uint8_t *cap = v->pci.config + v->window;
	uint8_t bar;

	scope_lock(&v->pci.lock);
	bar = cap[CAP_BAR];
	memcpy(offset, cap + CAP_OFFSET, 4);
	memcpy(length, cap + CAP_LENGTH, 4);
	return bar == BAR_REGISTERS && (*length == 1 || *length == 2 || *length == 4) && *offset % *length == 0 &&
	       *offset <= REGISTERS_SIZE - *length;
}

static bool config_read(struct pci_device *pci, unsigned offset, unsigned size, uint32_t *value)
{
	struct virtio_pci *v = container_of(pci, struct virtio_pci, pci);
	uint32_t target, length;

	if (!v->window || offset != v->window + CAP_EXTRA || !window_target(v, &target, &length) || size < length)
		return false;
	*value = registers_read(v, target, length);
	return true;
}

static void config_written(struct pci_device *pci, unsigned offset, unsigned size)
{
	struct virtio_pci *v = container_of(pci, struct virtio_pci, pci);
	uint32_t target, length, value = 0;

	if (!v->window || offset != v->window + CAP_EXTRA || !window_target(v, &target, &length) || size < length)
		return;
	{
		scope_lock(&v->pci.lock);
		memcpy(&value, v->pci.config + offset, length);
	}
	registers_write(v, target, length, value);
}

static void pci_was_reset(struct pci_device *pci)
{
	reset(container_of(pci, struct virtio_pci, pci));
}

static const struct pci_device_ops pci_ops = {
	.config_written = config_written,
	.config_read = config_read,
	.reset = pci_was_reset,
};

/* ---- on and off the bus ---- */

static int add_capability(
	struct virtio_pci *v, unsigned type, uint32_t length_in_bar, uint32_t extra, struct error *err)
{
	bool has_extra = type == NOTIFY || type == WINDOW;
	struct vendor_capability c = {
		.length = CAP_SIZE + (has_extra ? 4 : 0),
		.type = type,
		.bar = BAR_REGISTERS,
		.offset_in_bar = type == WINDOW ? 0 : (type - 1) * PAGE,
		.length_in_bar = length_in_bar,
		.extra = extra,
	};

	return pci_add_capability(&v->pci, PCI_CAP_VENDOR, &c, c.length, err);
}

static int add_capabilities(struct virtio_pci *v, struct error *err)
{
	struct virtio_device *d = v->device;
	int window;

	if (add_capability(v, COMMON, offsetof(struct common_config, queue_notify_data), 0, err) < 0 ||
		add_capability(v, NOTIFY, d->queue_count * NOTIFY_MULTIPLIER, NOTIFY_MULTIPLIER, err) < 0 ||
		add_capability(v, ISR, 1, 0, err) < 0 ||
		(d->config_size && add_capability(v, DEVICE, d->config_size, 0, err) < 0) ||
		(window = add_capability(v, WINDOW, 0, 0, err)) < 0)
		return -err->code;
	v->pci.writable[window + CAP_BAR] = 0xff;
	memset(v->pci.writable + window + CAP_OFFSET, 0xff, CAP_EXTRA + 4 - CAP_OFFSET);
	v->window = window;
	/* one vector for the configuration, one for each queue */
	return pci_add_msix(&v->pci, 1 + d->queue_count, BAR_MSIX, err);
}

/* ---- bells: queues that the guest notifies without leaving guest mode for long ---- */

static void bell_rung(void *opaque, int fd, uint32_t events)
{
	struct virtio_queue *q = opaque;
	eventfd_t count;

	if (eventfd_read(fd, &count) == 0)
		virtio_notify(q->device, q->index);
}

static int hang_bells(struct virtio_pci *v, struct board *board, struct error *err)
{
	struct virtio_device *d = v->device;
	struct io_region *region = &v->pci.bar[BAR_REGISTERS].region;
	int ret = virtio_make_bells(d, board, err);

	if (ret < 0 || d->queues[0].bell < 0)
		return ret;
	v->bells = calloc(d->queue_count, sizeof(*v->bells));
	if (!v->bells)
		return error_set(err, ENOMEM, "%s: no memory for %u bells", d->name, d->queue_count);
	v->loop = d->model->reads_bells ? NULL : board_loop(board);
	for (unsigned i = 0; i < d->queue_count; i++) {
		struct virtio_queue *q = &d->queues[i];

		v->bells[i] = (struct io_bell){.offset = (NOTIFY - 1) * PAGE + i * NOTIFY_MULTIPLIER, .fd = q->bell};
		ret = v->loop ? loop_add_fd(v->loop, q->bell, EPOLLIN, bell_rung, q, err) : 0;
		if (ret < 0)
			return ret;
		region->bell_count++;
	}
	region->bells = v->bells;
	return 0;
}

static void take_bells_down(struct virtio_pci *v)
{
	const struct io_region *region = &v->pci.bar[BAR_REGISTERS].region;

	for (unsigned i = 0; v->loop && i < region->bell_count; i++)
		loop_remove_fd(v->loop, v->bells[i].fd);
	free(v->bells);
}

int virtio_pci_attach(struct virtio_device *device, struct board *board, struct error *err)
{
	struct error mine;
	struct virtio_pci *v = calloc(1, sizeof(*v));
	int ret;

	if (!err)
		err = &mine;
	if (!v)
		return error_set(err, ENOMEM, "%s: no memory", device->name);
	v->device = device;
	v->config_vector = VIRTIO_NO_VECTOR;
	pthread_mutex_init(&v->isr_lock, NULL);
	v->pci.name = device->model->name;
	v->pci.ops = &pci_ops;
	v->pci.vendor = v->pci.subsystem_vendor = PCI_VENDOR_VIRTIO;
	v->pci.device = PCI_DEVICE_VIRTIO + device->model->id;
	v->pci.subsystem = 0x40; /* 4.1.2.1: at least this for a device that is not transitional */
	v->pci.revision = 1;
	v->pci.class_code = device->model->pci_class;
	v->pci.bar[BAR_REGISTERS].size = REGISTERS_SIZE;
	v->pci.bar[BAR_REGISTERS].region = (struct io_region){.name = device->model->name, .ops = &bar_ops};
	v->pci.bar[BAR_MSIX].size = PAGE;
	device->transport = v;
	device->interrupt = interrupt;
	/* On the bus last and complete: the guest may be looking. */
	ret = add_capabilities(v, err);
	if (ret >= 0)
		ret = hang_bells(v, board, err);
	if (ret >= 0)
		ret = pci_add(board_pci(board), &v->pci, -1, err);
	if (ret < 0) {
		virtio_pci_detach(device);
		return ret;
	}
	snprintf(device->name, sizeof(device->name), "%s at PCI slot %u", device->model->name, v->pci.slot);
	return 0;
}

void virtio_pci_detach(struct virtio_device *device)
{
	struct virtio_pci *v = device->transport;

	if (!v)
		return;
	pci_remove(&v->pci);
	take_bells_down(v);
	pthread_mutex_destroy(&v->isr_lock);
	device->transport = NULL;
	free(v);
}

unsigned virtio_device_slot(const struct virtio_device *device)
{
	const struct virtio_pci *v = device->transport;

	return v->pci.slot;
}
