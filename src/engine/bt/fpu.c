/* The guest's x87, SSE, AVX and AVX-512 state lives in the host's registers while its code runs and while the engine's own
 * C (compiled without them) does small things in between. Before anything else may run on the thread it is parked here. */
#include <cpuid.h>
#include <stdlib.h>
#include <string.h>

#include "engine/bt/bt.h"

/* x87, SSE, AVX and the three AVX-512 components: what guests can be offered */
#define FPU_COMPONENTS 0xe7ull

static uint64_t host_components(void)
{
	uint32_t lo, hi;

	__asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
	return ((uint64_t)hi << 32 | lo) & FPU_COMPONENTS;
}

void fpu_park(struct bt_vcpu *v)
{
	struct bt_private *p = v->private;
	uint32_t clean = 0x1f80;

	if (p->fpu_parked)
		return;
	__asm__ volatile("xsave64 (%0)" ::"r"(p->fpu), "a"((uint32_t)FPU_COMPONENTS), "d"(0) : "memory");
	__asm__ volatile("fninit; ldmxcsr %0" ::"m"(clean));
	p->fpu_parked = true;
}

void fpu_unpark(struct bt_vcpu *v)
{
	struct bt_private *p = v->private;

	if (!p->fpu_parked)
		return;
	__asm__ volatile("xrstor64 (%0)" ::"r"(p->fpu), "a"((uint32_t)FPU_COMPONENTS), "d"(0) : "memory");
	p->fpu_parked = false;
}

/* SDM volume 1, 13.4: legacy region and header, then each component where CPUID leaf 0xd puts it. */
static size_t area_size(void)
{
	uint64_t components = host_components();
	size_t size = 576;

	for (unsigned k = 2; k < 8; k++) {
		uint32_t a, b, c, d;

		if (components & 1ull << k && __get_cpuid_count(0xd, k, &a, &b, &c, &d))
			size = max(size, (size_t)(a + b));
	}
	return align_up(size, 64);
}

int fpu_create(struct bt_vcpu *v)
{
	v->private->fpu_size = area_size();
	v->private->fpu = aligned_alloc(64, v->private->fpu_size);
	if (!v->private->fpu)
		return -ENOMEM;
	memset(v->private->fpu, 0, v->private->fpu_size);
	v->private->fpu_parked = true;
	return 0;
}

void fpu_destroy(struct bt_vcpu *v)
{
	free(v->private->fpu);
}

/* State after power-on or FNINIT (SDM volume 1, 8.1.10; volume 3, table 10-1). Parked. */
void fpu_reset(struct bt_vcpu *v)
{
	uint8_t *area = v->private->fpu;

	v->private->fpu_parked = true;
	memset(area, 0, v->private->fpu_size);
	area[0] = 0x7f;
	area[1] = 0x03;
	area[24] = 0x80;
	area[25] = 0x1f;
	area[512] = 3;
}
