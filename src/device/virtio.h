/* A virtio 1.2 device: features, status, queues and configuration space, whatever its type and transport. A device type
 * (blk.c, net.c, rng.c) embeds struct virtio_device; the transport (virtio_pci.c) drives it by the functions below.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "device/devices.h"
#include "device/virtq.h"

/* Device status (section 2.1) */
#define VIRTIO_STATUS_ACKNOWLEDGE 0x01
#define VIRTIO_STATUS_DRIVER 0x02
#define VIRTIO_STATUS_DRIVER_OK 0x04
#define VIRTIO_STATUS_FEATURES_OK 0x08
#define VIRTIO_STATUS_NEEDS_RESET 0x40
#define VIRTIO_STATUS_FAILED 0x80

/* Features of every device (section 6) */
#define VIRTIO_F_INDIRECT_DESC (1ull << 28)
#define VIRTIO_F_EVENT_IDX (1ull << 29)
#define VIRTIO_F_VERSION_1 (1ull << 32)

#define VIRTIO_NO_VECTOR 0xffff
#define VIRTIO_CONFIG_MAX 64

/* A queue and what surrounds it. `lock` is held by whoever uses `ring`; while `running` is false nobody may. */
struct virtio_queue {
	struct virtq ring;
	pthread_mutex_t lock;
	atomic_bool running; /* the guest has started it, nothing pauses it, and it has not lied */
	struct virtio_device *device;
	unsigned index;
	uint16_t size_max;
	int bell; /* eventfd that the guest's notification rings where the engine can; -1: none, virtio_notify() is called */
	/* set by the driver, under the device's lock */
	bool enabled;
	_Atomic uint16_t vector;
};

struct board;

/* A type of device. */
struct virtio_model {
	const char *name;
	uint16_t id; /* section 5 */
	uint32_t pci_class;
	/* The guest has put something into the queue. On the vCPU's thread or, with bells, the loop's; no lock held:
	 * short, or handed on. */
	void (*notify)(struct virtio_device *device, struct virtio_queue *queue);
	/* The type's own threads wait for the bells of their queues, where there are any; else the loop does. */
	bool reads_bells;
	/* The driver writes `size` bytes at `offset` of the configuration: changes what it may in device->config, whose
	 * lock is held. NULL: nothing is writable. */
	void (*config_write)(struct virtio_device *device, unsigned offset, unsigned size, uint32_t value);
	/* The driver is ready (DRIVER_OK), features are settled; the device's lock is held and no queue runs yet. May
	 * be NULL. */
	void (*started)(struct virtio_device *device);
	/* The driver has reset the device: what the type keeps of its chains is void. The device's lock is held and no
	 * queue runs. May be NULL. */
	void (*reset)(struct virtio_device *device);
	/* Names of device->counter[], ended by NULL; or NULL. */
	const char *const *counters;
	/* Frees what the type added, and itself. Nothing runs any more. */
	void (*destroy)(struct virtio_device *device);
};

struct virtio_device {
	const struct virtio_model *model;
	char name[32]; /* for messages: "virtio-blk at PCI slot 3" */
	struct guest_memory *memory;
	uint64_t offered;

	pthread_mutex_t
		lock; /* the driver's side: features, status, queue set-up, config; outside every queue's lock */
	uint64_t accepted;
	_Atomic uint8_t status;
	_Atomic uint8_t config_generation;
	bool paused;
	uint8_t config[VIRTIO_CONFIG_MAX];
	unsigned config_size;
	struct virtio_queue *queues;
	unsigned queue_count;

	/* The transport's: interrupts the guest for a queue, or for the configuration when queue is NULL. Any thread.
	 */
	void (*interrupt)(struct virtio_device *device, struct virtio_queue *queue);
	void *transport;

	_Atomic uint64_t counter[VIRTIO_COUNTERS_MAX]; /* virtio_count() */

	uint64_t complaints_since; /* limits the log: clock_now() of the first of `complaints` */
	unsigned complaints;
};

/* ---- for a device type ---- */

/* Fills in what is common. device->config and offered (without the common features) may be set before or after. */
int virtio_init(struct virtio_device *device, const struct virtio_model *model, struct guest_memory *memory,
	unsigned queues, uint16_t queue_size, struct error *err);
/* Gives each queue a bell if guests of this board can ring; virtio_pci_attach does so for a type that has not. */
int virtio_make_bells(struct virtio_device *device, struct board *board, struct error *err);
/* Undoes both; the transport is gone. */
void virtio_release(struct virtio_device *device);

static inline bool virtio_has(const struct virtio_device *device, unsigned feature)
{
	return device->accepted >> feature & 1;
}

/* Adds to the counter of that index in model->counters; any thread. */
static inline void virtio_count(struct virtio_device *device, unsigned counter, uint64_t n)
{
	atomic_fetch_add_explicit(&device->counter[counter], n, memory_order_relaxed);
}

/* Use a queue, whose lock is held. All of them do nothing and give false when it does not run.
 * virtio_take: the next chain. A guest that lies ends the device until it resets it: NEEDS_RESET and a line in the log.
 */
bool virtio_take(struct virtio_queue *queue, struct virtq_chain *chain);
/* Completes a chain; the guest is interrupted if it wants to be. */
void virtio_complete(struct virtio_queue *queue, const struct virtq_chain *chain, uint32_t written);
/* Publishes what was put by virtq_put and interrupts. */
void virtio_publish(struct virtio_queue *queue);
/* Notifications are wanted again; true: look once more first. */
bool virtio_await(struct virtio_queue *queue);

/* Copies what the device itself changes in its configuration (2.5) and tells the driver. Takes the device's lock. */
void virtio_config_change(struct virtio_device *device, unsigned offset, const void *bytes, unsigned size);

/* The guest broke the rules: says so and stops the queues until the guest resets the device. A queue's lock may be
 * held. */
void virtio_broken(struct virtio_device *device, const struct virtio_queue *queue, const char *why);
/* A line to the log, with the device's name, unless there were many lately. */
void virtio_log(struct virtio_device *device, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- for a transport ---- */

void virtio_set_features(struct virtio_device *device, unsigned word, uint32_t value);
void virtio_set_status(struct virtio_device *device, uint8_t value);
/* Section 2.1.2 and 4.1.4.3.1: back to the state after power-on. What is in flight is completed first. */
void virtio_reset(struct virtio_device *device);
/* The driver enables a queue that it has set up in queue->ring. */
void virtio_queue_enable(struct virtio_queue *queue);
void virtio_notify(struct virtio_device *device, unsigned queue);
uint64_t virtio_config_read(struct virtio_device *device, uint64_t offset, unsigned size);
void virtio_config_write(struct virtio_device *device, uint64_t offset, unsigned size, uint64_t value);

/* Puts the device on the board's PCI bus; undone by virtio_pci_detach. */
struct board;
int virtio_pci_attach(struct virtio_device *device, struct board *board, struct error *err);
void virtio_pci_detach(struct virtio_device *device);
