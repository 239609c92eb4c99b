/* KVM's para-virtual interfaces (Linux, Documentation/virt/kvm/x86: msr.rst, cpuid.rst, hypercalls.rst): stock kernels find
 * them behind CPUID 4000_0001 (cpu_model.c) and take the short way where hardware has only a long one.
 *
 *   clock       two MSRs name guest memory into which go, once, the rate of the TSC and the time at which it was 0. The
 *               guest's TSC runs at one rate for good, so nothing has to be kept up to date but what the guest does to it
 *   steal time  what the host took from the vCPU's thread, and whether the vCPU is away
 *   TLB flush   a vCPU that is away (here: halted) need not be sent an IPI: a bit makes it flush when it comes back
 *   EOI         the guest ends an interrupt by clearing a bit in its memory instead of writing to the APIC
 *   unhalt      a vCPU waits for a contended lock by HLT with interrupts off, and is woken by a hypercall
 *   send IPI    one hypercall for up to 128 destinations
 *   yield       to a vCPU that is away and that somebody waits for
 *
 * Everything here runs on the vCPU's own thread; the caller has parked the vector state unless it is said otherwise.
 */
#include "engine/bt/system_internal.h"

#include <sched.h>
#include <time.h>

#include "engine/bt/bt.h"

#define MSR_WALL_CLOCK 0x4b564d00
#define MSR_SYSTEM_TIME 0x4b564d01
#define MSR_STEAL_TIME 0x4b564d03
#define MSR_EOI 0x4b564d04
#define ENABLE 1ull /* bit 0 of all but the first; the rest is the guest address */
#define STEAL_TIME_RESERVED 0x3eull
#define EOI_RESERVED 2ull
#define NSEC_PER_SEC 1000000000ull
#define TSC_STABLE 1 /* flags: one clock for all vCPUs, no correction between them is needed */
#define STEAL_INTERVAL 10000000ull /* ns between updates while the vCPU runs; the guest looks once per tick */

enum { HYPERCALL_VAPIC_POLL = 1, HYPERCALL_KICK = 5, HYPERCALL_SEND_IPI = 10, HYPERCALL_YIELD = 11 };
enum { HYPERCALL_PERM = -1, HYPERCALL_INVAL = -22, HYPERCALL_NOSYS = -1000 };

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

struct pv_steal {
	uint64_t steal; /* ns */
	uint32_t version, flags;
	uint8_t preempted, pad[47]; /* PREEMPTED is ours to set, FLUSH the guest's */
};
enum { PREEMPTED = 1, FLUSH = 2 };

/* ---- clock ---- */

/* shift 0 for every TSC above 1 GHz: Linux computes the rate back from the product, with an error that doubles with
 * each step of a negative shift. */
static uint32_t tsc_scale(uint64_t hz, int8_t *shift)
{
	uint64_t mul;

	for (*shift = 0; (mul = (NSEC_PER_SEC << (32 - *shift)) / hz) > UINT32_MAX;)
		++*shift;
	return (uint32_t)mul;
}

/* The clock begins when the TSC that the VM's vCPUs have in common was 0; tsc_adjust is where that is on this vCPU's. */
static bool write_time(struct bt_vcpu *v)
{
	struct pv_time time = {.version = 2, .tsc_timestamp = v->tsc_adjust, .flags = TSC_STABLE};

	time.tsc_to_system_mul = tsc_scale(v->model->tsc_hz, &time.tsc_shift);
	return memory_write(v->vm->memory, v->pv_system_time & ~ENABLE, &time, sizeof(time));
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

void paravirt_tsc_moved(struct bt_vcpu *v)
{
	if (!(v->pv_system_time & ENABLE))
		return;
	fpu_park(v);
	write_time(v);
}

/* ---- steal time ---- */

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * NSEC_PER_SEC + (uint64_t)t.tv_nsec;
}

/* The guest's structure, or NULL when there is none. It cannot straddle pages: it is 64 bytes and aligned. */
static struct pv_steal *steal_of(struct bt_vcpu *v)
{
	if (!(v->pv_steal & ENABLE))
		return NULL;
	return memory_for_write(v->vm->memory, v->pv_steal & ~63ull, sizeof(struct pv_steal));
}

static void steal_wrote(struct bt_vcpu *v)
{
	memory_wrote(v->vm->memory, v->pv_steal & ~63ull, sizeof(struct pv_steal));
}

/* From here on, time that passes without the thread's CPU clock is stolen. */
static void steal_begin(struct bt_vcpu *v)
{
	v->pv_since = clock_ns(CLOCK_MONOTONIC);
	v->pv_cpu_since = clock_ns(CLOCK_THREAD_CPUTIME_ID);
}

/* Time in which the thread wanted to run and did not: it waited for a processor, for a page of guest memory that the host
 * had put away, or for another vCPU's exclusive section. */
static void steal_count(struct bt_vcpu *v, struct pv_steal *s)
{
	uint64_t wall = v->pv_since, cpu = v->pv_cpu_since;
	uint32_t version;

	steal_begin(v);
	wall = v->pv_since - wall;
	cpu = v->pv_cpu_since - cpu;
	if (wall > cpu)
		v->pv_stolen += wall - cpu;
	version = s->version | 1;
	__atomic_store_n(&s->version, version, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	__atomic_store_n(&s->steal, v->pv_stolen, __ATOMIC_RELAXED);
	__atomic_store_n(&s->version, version + 1, __ATOMIC_RELEASE);
	steal_wrote(v);
}

void paravirt_tick(struct bt_vcpu *v)
{
	struct pv_steal *s;

	if (!(v->pv_steal & ENABLE) || clock_ns(CLOCK_MONOTONIC) - v->pv_since < STEAL_INTERVAL)
		return;
	s = steal_of(v);
	if (s)
		steal_count(v, s);
}

void paravirt_enter(struct bt_vcpu *v)
{
	struct pv_steal *s = steal_of(v);

	if (!s)
		return;
	steal_begin(v);
	if (!s->preempted)
		return;
	if (__atomic_exchange_n(&s->preempted, 0, __ATOMIC_SEQ_CST) & FLUSH)
		bt_tlb_flush(v, false);
	steal_wrote(v);
}

void paravirt_leave(struct bt_vcpu *v)
{
	struct pv_steal *s = steal_of(v);

	if (!s)
		return;
	steal_count(v, s);
	/* Only a vCPU that halts is away for long. One that was asked to leave, or that its host has put aside, is not
	 * announced: the latter cannot be known from user space. */
	if (v->halted)
		__atomic_store_n(&s->preempted, PREEMPTED, __ATOMIC_SEQ_CST);
}

/* ---- end of interrupt ---- */

static uint8_t *eoi_byte(struct bt_vcpu *v)
{
	return v->pv_eoi & ENABLE ? memory_for_write(v->vm->memory, v->pv_eoi & ~3ull, 4) : NULL;
}

void paravirt_eoi_offer(struct bt_vcpu *v)
{
	uint8_t *byte = eoi_byte(v);

	if (!byte || !v->board->eoi_offer || !v->board->eoi_offer(v->board->opaque, v->index))
		return;
	__atomic_store_n(byte, 1, __ATOMIC_SEQ_CST);
	memory_wrote(v->vm->memory, v->pv_eoi & ~3ull, 1);
	v->pv_eoi_offered = true;
}

void paravirt_eoi_settle(struct bt_vcpu *v)
{
	uint8_t *byte;

	if (!v->pv_eoi_offered)
		return;
	fpu_park(v);
	v->pv_eoi_offered = false;
	byte = eoi_byte(v);
	/* A byte that is still set was not used yet: the guest is to write to the APIC after all. */
	v->board->eoi_settle(
		v->board->opaque, v->index, byte && !(__atomic_exchange_n(byte, 0, __ATOMIC_SEQ_CST) & 1));
}

/* ---- hypercalls ---- */

static int64_t kick(struct bt_vcpu *v, uint64_t cpu)
{
	if (!cpu_model_has(v->model, CPU_KVM_UNHALT) || !v->board->wake)
		return HYPERCALL_NOSYS;
	if (cpu < v->vm->cpus && v->vm->vcpu[cpu]) {
		v->vm->vcpu[cpu]->pv_unhalted = true;
		v->board->wake(v->board->opaque, (unsigned)cpu);
	}
	return 0;
}

/* The bit maps begin at vCPU `first`; as many bits each as a register has. */
static int64_t send_ipi(struct bt_vcpu *v, uint64_t low, uint64_t high, uint64_t first, uint64_t icr)
{
	unsigned width = in_code64(v) ? 64 : 32;
	uint64_t cpus = 0;

	if (!cpu_model_has(v->model, CPU_KVM_SEND_IPI) || !v->board->send_ipi)
		return HYPERCALL_NOSYS;
	if (icr & 1 << 11) /* the destination is no logical one */
		return HYPERCALL_INVAL;
	if (first < 64) {
		cpus = low << first;
		if (first + width < 64)
			cpus |= high << (first + width);
	}
	return v->board->send_ipi(v->board->opaque, v->index, cpus, (uint32_t)icr);
}

static int64_t hypercall(struct bt_vcpu *v, uint64_t number, const uint64_t a[4])
{
	if (v->cpl != 0)
		return HYPERCALL_PERM;
	switch (number) {
	case HYPERCALL_VAPIC_POLL:
		return 0;
	case HYPERCALL_KICK: /* a[0]: flags, of which there are none */
		return kick(v, a[1]);
	case HYPERCALL_SEND_IPI:
		return send_ipi(v, a[0], a[1], a[2], a[3]);
	case HYPERCALL_YIELD:
		if (!cpu_model_has(v->model, CPU_KVM_SCHED_YIELD))
			return HYPERCALL_NOSYS;
		sched_yield();
		return 0;
	}
	return HYPERCALL_NOSYS;
}

void paravirt_hypercall(struct bt_vcpu *v)
{
	uint64_t mask = in_code64(v) ? ~0ull : 0xffffffff, *g = v->gprs;
	const uint64_t arguments[] = {
		g[ENGINE_RBX] & mask, g[ENGINE_RCX] & mask, g[ENGINE_RDX] & mask, g[ENGINE_RSI] & mask};

	fpu_park(v);
	g[ENGINE_RAX] = (uint64_t)hypercall(v, g[ENGINE_RAX] & mask, arguments) & mask;
}

/* ---- the MSRs ---- */

/* Where the value of msr is kept; NULL: none of ours, or not offered. */
static uint64_t *msr_value(struct bt_vcpu *v, uint32_t msr)
{
	switch (msr) {
	case MSR_WALL_CLOCK:
		return cpu_model_has(v->model, CPU_KVM_CLOCK) ? &v->pv_wall_clock : NULL;
	case MSR_SYSTEM_TIME:
		return cpu_model_has(v->model, CPU_KVM_CLOCK) ? &v->pv_system_time : NULL;
	case MSR_STEAL_TIME:
		return cpu_model_has(v->model, CPU_KVM_STEAL_TIME) ? &v->pv_steal : NULL;
	case MSR_EOI:
		return cpu_model_has(v->model, CPU_KVM_EOI) ? &v->pv_eoi : NULL;
	}
	return NULL;
}

bool paravirt_read(struct bt_vcpu *v, uint32_t msr, uint64_t *value)
{
	const uint64_t *kept = msr_value(v, msr);

	if (kept)
		*value = *kept;
	return kept;
}

/* False: the guest must not write that. */
static bool write_msr(struct bt_vcpu *v, uint32_t msr, uint64_t value, uint64_t *kept)
{
	bool enabled = value & ENABLE;

	switch (msr) {
	case MSR_WALL_CLOCK:
		*kept = value;
		return write_wall(v, value);
	case MSR_SYSTEM_TIME:
		*kept = value;
		return !enabled || write_time(v);
	case MSR_STEAL_TIME:
		if (value & STEAL_TIME_RESERVED)
			return false;
		if (enabled && !memory_for_write(v->vm->memory, value & ~63ull, sizeof(struct pv_steal)))
			return false;
		*kept = value;
		if (enabled)
			steal_begin(v);
		return true;
	case MSR_EOI:
		if (value & EOI_RESERVED || (enabled && !memory_for_write(v->vm->memory, value & ~3ull, 4)))
			return false;
		paravirt_eoi_settle(v);
		*kept = value;
		return true;
	}
	return false;
}

bool paravirt_write(struct bt_vcpu *v, uint32_t msr, uint64_t value, int *result)
{
	uint64_t *kept = msr_value(v, msr);

	if (!kept)
		return false;
	fpu_park(v);
	*result = write_msr(v, msr, value, kept) ? 0 : bt_raise_error(v, VECTOR_GP, 0);
	return true;
}

/* An INIT leaves the clock and steal time as they are; the APIC is reset with both, so nothing is offered any more. */
void paravirt_reset(struct bt_vcpu *v, bool init)
{
	v->pv_eoi = 0;
	v->pv_eoi_offered = false;
	v->pv_unhalted = false;
	if (!init) {
		v->pv_system_time = v->pv_wall_clock = v->pv_steal = 0;
		v->pv_stolen = 0;
	}
}
