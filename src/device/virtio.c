/* The device model of virtio 1.2 (section 2), between a transport and a device type.
 *
 * Locks: device->lock serialises what the driver does to features, status and queue set-up; a queue's lock is held by
 * the thread that works on the ring. Reset and pause take the first, then each queue's in turn: `running` is cleared
 * before that, so that a worker with a long queue lets go after the request it is at.
 */
#include "device/virtio.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/loop.h"
#include "base/util.h"
#include "machine/board.h"

#define COMPLAINTS_MAX 10		 /* lines per device ... */
#define COMPLAINTS_PERIOD 60000000000ull /* ... and minute */

int virtio_init(struct virtio_device *device, const struct virtio_model *model, struct guest_memory *memory,
	unsigned queues, uint16_t queue_size, struct error *err)
{
	device->model = model;
	device->memory = memory;
	snprintf(device->name, sizeof(device->name), "%s", model->name);
	device->queues = calloc(queues, sizeof(*device->queues));
	if (!device->queues)
		return error_set(err, ENOMEM, "%s: no memory for %u queues", model->name, queues);
	device->queue_count = queues;
	device->offered |= VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX;
	pthread_mutex_init(&device->lock, NULL);
	for (unsigned i = 0; i < queues; i++) {
		struct virtio_queue *q = &device->queues[i];

		pthread_mutex_init(&q->lock, NULL);
		q->device = device;
		q->index = i;
		q->size_max = q->ring.size = queue_size;
		q->ring.memory = memory;
		q->vector = VIRTIO_NO_VECTOR;
		q->bell = -1;
	}
	return 0;
}

int virtio_make_bells(struct virtio_device *device, struct board *board, struct error *err)
{
	if (!board_has_bells(board))
		return 0;
	for (unsigned i = 0; i < device->queue_count; i++) {
		struct virtio_queue *q = &device->queues[i];

		if (q->bell < 0)
			q->bell = eventfd(0, EFD_CLOEXEC | (device->model->reads_bells ? 0 : EFD_NONBLOCK));
		if (q->bell < 0)
			return error_errno(err, "%s: eventfd of queue %u", device->name, i);
	}
	return 0;
}

void virtio_release(struct virtio_device *device)
{
	if (!device->queues)
		return;
	for (unsigned i = 0; i < device->queue_count; i++) {
		pthread_mutex_destroy(&device->queues[i].lock);
		if (device->queues[i].bell >= 0)
			close(device->queues[i].bell);
	}
	pthread_mutex_destroy(&device->lock);
	free(take_ptr(device->queues));
}

void virtio_log(struct virtio_device *device, const char *format, ...)
{
	uint64_t now = clock_now();
	char text[400];
	va_list args;
	unsigned nth;

	/* Threads may race for the counter: the worst is a line more or less. */
	if (now - __atomic_load_n(&device->complaints_since, __ATOMIC_RELAXED) > COMPLAINTS_PERIOD) {
		__atomic_store_n(&device->complaints_since, now, __ATOMIC_RELAXED);
		__atomic_store_n(&device->complaints, 0, __ATOMIC_RELAXED);
	}
	nth = __atomic_add_fetch(&device->complaints, 1, __ATOMIC_RELAXED);
	if (nth > COMPLAINTS_MAX)
		return;
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	fprintf(stderr, "hostel-vmm: %s: %s%s\n", device->name, text,
		nth == COMPLAINTS_MAX ? " (no more lines for a minute)" : "");
}

/* ---- queues, for the device type ---- */

void virtio_broken(struct virtio_device *device, const struct virtio_queue *queue, const char *why)
{
	uint8_t before = atomic_fetch_or(&device->status, VIRTIO_STATUS_NEEDS_RESET);

	for (unsigned i = 0; i < device->queue_count; i++)
		device->queues[i].running = false;
	if (before & VIRTIO_STATUS_NEEDS_RESET)
		return;
	if (queue)
		virtio_log(device, "queue %u: %s; stopped until the guest resets the device", queue->index, why);
	else
		virtio_log(device, "%s; stopped until the guest resets the device", why);
	/* 2.1.2: told only to a driver that has come as far as DRIVER_OK */
	if (before & VIRTIO_STATUS_DRIVER_OK)
		device->interrupt(device, NULL);
}

bool virtio_take(struct virtio_queue *queue, struct virtq_chain *chain)
{
	struct error err;
	int ret;

	if (!queue->running)
		return false;
	ret = virtq_next(&queue->ring, chain, &err);
	if (ret < 0)
		virtio_broken(queue->device, queue, err.text);
	return ret > 0;
}

void virtio_complete(struct virtio_queue *queue, const struct virtq_chain *chain, uint32_t written)
{
	/* Not a matter of `running`: what was taken before a pause is completed. The ring is there while the lock is
	 * held. */
	virtq_put(&queue->ring, chain->head, written);
	virtio_publish(queue);
}

void virtio_publish(struct virtio_queue *queue)
{
	if (virtq_publish(&queue->ring))
		queue->device->interrupt(queue->device, queue);
}

bool virtio_await(struct virtio_queue *queue)
{
	return queue->running && virtq_notify_on(&queue->ring);
}

void virtio_config_change(struct virtio_device *device, unsigned offset, const void *bytes, unsigned size)
{
	bool tell;

	{
		scope_lock(&device->lock);
		memcpy(device->config + offset, bytes, size);
		/* 2.5.1: a driver that reads several fields sees by it that they may not belong together. */
		device->config_generation++;
		tell = device->status & VIRTIO_STATUS_DRIVER_OK;
	}
	if (tell)
		device->interrupt(device, NULL);
}

/* ---- the driver's side, for the transport ---- */

/* Lets no handler be at work on a queue when it returns, nor begin. The device's lock is held. */
static void stop_queues(struct virtio_device *device)
{
	for (unsigned i = 0; i < device->queue_count; i++)
		device->queues[i].running = false;
	for (unsigned i = 0; i < device->queue_count; i++) {
		pthread_mutex_lock(&device->queues[i].lock);
		pthread_mutex_unlock(&device->queues[i].lock);
	}
}

static bool may_run(const struct virtio_device *device, const struct virtio_queue *queue)
{
	return queue->enabled && !device->paused && (device->status & VIRTIO_STATUS_DRIVER_OK) &&
	       !(device->status & VIRTIO_STATUS_NEEDS_RESET);
}

/* Sets the queues going that may. The device's lock is held. */
static void run_queues(struct virtio_device *device)
{
	for (unsigned i = 0; i < device->queue_count; i++)
		device->queues[i].running = may_run(device, &device->queues[i]);
	/* A lie found meanwhile in one queue must not be undone by the line above. */
	if (device->status & VIRTIO_STATUS_NEEDS_RESET)
		for (unsigned i = 0; i < device->queue_count; i++)
			device->queues[i].running = false;
}

static void notify_all(struct virtio_device *device)
{
	for (unsigned i = 0; i < device->queue_count; i++)
		virtio_notify(device, i);
}

static void reset_locked(struct virtio_device *device)
{
	stop_queues(device);
	for (unsigned i = 0; i < device->queue_count; i++) {
		struct virtio_queue *q = &device->queues[i];

		/* A handler that saw `running` just before may still take the lock: it finds the flag again under it.
		 */
		scope_lock(&q->lock);
		virtq_stop(&q->ring);
		q->ring.size = q->size_max;
		q->ring.desc_gpa = q->ring.avail_gpa = q->ring.used_gpa = 0;
		q->ring.event_idx = q->ring.indirect = false;
		q->enabled = false;
		q->vector = VIRTIO_NO_VECTOR;
	}
	device->accepted = 0;
	device->status = 0;
	if (device->model->reset)
		device->model->reset(device);
}

void virtio_reset(struct virtio_device *device)
{
	scope_lock(&device->lock);
	reset_locked(device);
}

void virtio_set_features(struct virtio_device *device, unsigned word, uint32_t value)
{
	scope_lock(&device->lock);
	/* 3.1.1: settled by FEATURES_OK */
	if (word > 1 || (device->status & VIRTIO_STATUS_FEATURES_OK))
		return;
	device->accepted &= ~(0xffffffffull << (32 * word));
	device->accepted |= (uint64_t)value << (32 * word);
}

void virtio_set_status(struct virtio_device *device, uint8_t value)
{
	bool start = false;

	{
		scope_lock(&device->lock);
		uint8_t added = value & ~device->status;

		if (value == 0) {
			reset_locked(device);
			return;
		}
		/* 2.2.2: a driver that takes what is not offered, or leaves VERSION_1, finds FEATURES_OK still clear.
		 */
		if ((added & VIRTIO_STATUS_FEATURES_OK) &&
			((device->accepted & ~device->offered) || !(device->accepted & VIRTIO_F_VERSION_1)))
			added &= ~VIRTIO_STATUS_FEATURES_OK;
		if (!((device->status | added) & VIRTIO_STATUS_FEATURES_OK))
			added &= ~VIRTIO_STATUS_DRIVER_OK;
		/* NEEDS_RESET is the device's own; a bit once set goes away only by a reset (2.1.1). */
		added &= ~VIRTIO_STATUS_NEEDS_RESET;
		if (added & VIRTIO_STATUS_DRIVER_OK) {
			if (device->model->started)
				device->model->started(device);
			start = true;
		}
		atomic_fetch_or(&device->status, added);
		if (start)
			run_queues(device);
	}
	/* Buffers put in before DRIVER_OK may have been announced to a device that did not listen yet. */
	if (start)
		notify_all(device);
}

void virtio_queue_enable(struct virtio_queue *queue)
{
	struct virtio_device *device = queue->device;
	struct error err;

	scope_lock(&device->lock);
	if (queue->enabled)
		return;
	scope_lock(&queue->lock);
	queue->ring.event_idx = device->accepted & VIRTIO_F_EVENT_IDX;
	queue->ring.indirect = device->accepted & VIRTIO_F_INDIRECT_DESC;
	if (!(device->status & VIRTIO_STATUS_FEATURES_OK)) {
		virtio_broken(device, queue, "enabled before the features were settled");
		return;
	}
	if (queue->ring.size > queue->size_max) {
		virtio_broken(device, queue, "enabled with more entries than the device offers");
		return;
	}
	if (virtq_start(&queue->ring, &err) < 0) {
		virtio_broken(device, queue, err.text);
		return;
	}
	queue->enabled = true;
	queue->running = may_run(device, queue);
}

void virtio_notify(struct virtio_device *device, unsigned queue)
{
	if (queue < device->queue_count && device->queues[queue].running)
		device->model->notify(device, &device->queues[queue]);
}

uint64_t virtio_config_read(struct virtio_device *device, uint64_t offset, unsigned size)
{
	uint64_t value = 0;

	scope_lock(&device->lock);
	/* What lies behind the configuration reads as zero. */
	if (offset < device->config_size)
		memcpy(&value, device->config + offset, min((uint64_t)size, device->config_size - offset));
	return value;
}

void virtio_config_write(struct virtio_device *device, uint64_t offset, unsigned size, uint64_t value)
{
	scope_lock(&device->lock);
	if (device->model->config_write && offset < device->config_size && size <= 4)
		device->model->config_write(device, offset, size, value);
}

/* ---- for src/vmm ---- */

void virtio_device_quiesce(struct virtio_device *device)
{
	scope_lock(&device->lock);
	device->paused = true;
	stop_queues(device);
}

bool virtio_device_try_quiesce(struct virtio_device *device)
{
	bool quiet = true;

	if (pthread_mutex_trylock(&device->lock))
		return false;
	device->paused = true;
	for (unsigned i = 0; i < device->queue_count; i++)
		device->queues[i].running = false;
	for (unsigned i = 0; i < device->queue_count; i++) {
		if (pthread_mutex_trylock(&device->queues[i].lock))
			quiet = false;
		else
			pthread_mutex_unlock(&device->queues[i].lock);
	}
	pthread_mutex_unlock(&device->lock);
	return quiet;
}

const char *virtio_device_type(const struct virtio_device *device)
{
	return device->model->name;
}

unsigned virtio_device_counters(const struct virtio_device *device, struct virtio_counter *counters)
{
	const char *const *names = device->model->counters;
	unsigned n = 0;

	for (; names && names[n] && n < VIRTIO_COUNTERS_MAX; n++)
		counters[n] = (struct virtio_counter){
			names[n], atomic_load_explicit(&device->counter[n], memory_order_relaxed)};
	return n;
}

void virtio_device_resume(struct virtio_device *device)
{
	{
		scope_lock(&device->lock);
		device->paused = false;
		run_queues(device);
	}
	notify_all(device);
}

void virtio_device_destroy(struct virtio_device *device)
{
	if (!device)
		return;
	virtio_device_quiesce(device);
	virtio_pci_detach(device);
	device->model->destroy(device);
}
