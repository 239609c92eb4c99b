/* KVM's paravirtual clock (Linux, Documentation/virt/kvm/x86/msr.rst): two MSRs name guest memory into which go, once,
 * the rate of the TSC and the time at which it was 0. The guest's TSC runs at one rate for good, so nothing has to be
 * kept up to date but what the guest does to its TSC itself.
 */
#include "engine/bt/system_internal.h"

#include <time.h>

#include "engine/bt/bt.h"

#define MSR_WALL_CLOCK 0x4b564d00
#define MSR_SYSTEM_TIME 0x4b564d01
#define SYSTEM_TIME_ENABLE 1
#define NSEC_PER_SEC 1000000000ull
#define TSC_STABLE 1 /* flags: one clock for all vCPUs, no correction between them is needed */

struct pv_time {
	uint32_t version; /* odd while it is being written */
	uint32_t pad;
	uint64_t tsc_timestamp, system_time;
	uint32_t tsc_to_system_mul; /* nanoseconds = (ticks << tsc_shift) * mul >> 32 */
	int8_t tsc_shift;
	uint8_t flags, pad2[2];
};

struct pv_wall {
	uint32_t version, seconds, nanoseconds;
};

/* shift 0 for every TSC above 1 GHz: Linux computes the rate back from the product, with an error that doubles with
 * each step of a negative shift. */
static uint32_t tsc_scale(uint64_t hz, int8_t *shift)
{
	uint64_t mul;

	for (*shift = 0; (mul = (NSEC_PER_SEC << (32 - *shift)) / hz) > UINT32_MAX;)
		++*shift;
	return (uint32_t)mul;
}

/* The clock begins when the TSC that the VM's vCPUs have in common was 0; tsc_adjust is where that is on this vCPU's.
 * The caller has parked the vector state. */
static bool write_time(struct bt_vcpu *v)
{
	struct pv_time time = {.version = 2, .tsc_timestamp = v->tsc_adjust, .flags = TSC_STABLE};

	time.tsc_to_system_mul = tsc_scale(v->model->tsc_hz, &time.tsc_shift);
	return memory_write(v->vm->memory, v->pv_system_time & ~(uint64_t)SYSTEM_TIME_ENABLE, &time, sizeof(time));
}

static bool write_wall(struct bt_vcpu *v, uint64_t gpa)
{
	struct pv_wall wall = {.version = 2};
	int8_t shift;
	uint32_t mul = tsc_scale(v->model->tsc_hz, &shift);
	unsigned __int128 ticks = bt_tsc(v) - v->tsc_adjust;
	uint64_t now, since = (uint64_t)((ticks << shift) * mul >> 32);
	struct timespec real;

	clock_gettime(CLOCK_REALTIME, &real);
	now = (uint64_t)real.tv_sec * NSEC_PER_SEC + (uint64_t)real.tv_nsec - since;
	wall.seconds = (uint32_t)(now / NSEC_PER_SEC);
	wall.nanoseconds = (uint32_t)(now % NSEC_PER_SEC);
	return memory_write(v->vm->memory, gpa, &wall, sizeof(wall));
}

bool paravirt_read(struct bt_vcpu *v, uint32_t msr, uint64_t *value)
{
	if (msr != MSR_WALL_CLOCK && msr != MSR_SYSTEM_TIME)
		return false;
	*value = msr == MSR_WALL_CLOCK ? v->pv_wall_clock : v->pv_system_time;
	return true;
}

bool paravirt_write(struct bt_vcpu *v, uint32_t msr, uint64_t value, int *result)
{
	bool written = true;

	if (msr != MSR_WALL_CLOCK && msr != MSR_SYSTEM_TIME)
		return false;
	fpu_park(v);
	if (msr == MSR_WALL_CLOCK) {
		v->pv_wall_clock = value;
		written = write_wall(v, value);
	} else {
		v->pv_system_time = value;
		if (value & SYSTEM_TIME_ENABLE)
			written = write_time(v);
	}
	*result = written ? 0 : bt_raise_error(v, VECTOR_GP, 0);
	return true;
}

void paravirt_tsc_moved(struct bt_vcpu *v)
{
	if (!(v->pv_system_time & SYSTEM_TIME_ENABLE))
		return;
	fpu_park(v);
	write_time(v);
}
