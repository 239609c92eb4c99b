/* A vCPU's state: to and from struct engine_state, and back to power-on. */
#include "engine/kvm/kvm.h"

#include <string.h>
#include <sys/ioctl.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "engine/tsc.h"

#define MSRS_MAX 1024

/* SDM volume 4, table 2-2 */
#define MSR_TSC 0x10
#define MSR_SYSENTER_CS 0x174
#define MSR_SYSENTER_ESP 0x175
#define MSR_SYSENTER_EIP 0x176
#define MSR_PAT 0x277
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_CSTAR 0xc0000083
#define MSR_SFMASK 0xc0000084
#define MSR_KERNEL_GS_BASE 0xc0000102
#define MSR_TSC_AUX 0xc0000103

/* ---- MSRs by name ---- */

static const struct {
	uint32_t msr;
	size_t at; /* in struct engine_state */
} named_msrs[] = {
	{MSR_STAR, offsetof(struct engine_state, star)}, {MSR_LSTAR, offsetof(struct engine_state, lstar)},
	{MSR_CSTAR, offsetof(struct engine_state, cstar)}, {MSR_SFMASK, offsetof(struct engine_state, sfmask)},
	{MSR_KERNEL_GS_BASE, offsetof(struct engine_state, kernel_gs_base)},
	{MSR_SYSENTER_CS, offsetof(struct engine_state, sysenter_cs)},
	{MSR_SYSENTER_ESP, offsetof(struct engine_state, sysenter_esp)},
	{MSR_SYSENTER_EIP, offsetof(struct engine_state, sysenter_eip)}, {MSR_PAT, offsetof(struct engine_state, pat)},
	{MSR_TSC_AUX, offsetof(struct engine_state, tsc_aux)}, /* not on every CPU: the last of those that are set */
	{MSR_TSC, offsetof(struct engine_state, tsc)},	       /* read, never set */
};
#define NAMED_SET (ARRAY_SIZE(named_msrs) - 1)

/* One MSR. False: this KVM does not have it. */
static bool msr_access(struct engine_vcpu *v, unsigned long request, uint32_t msr, uint64_t *value)
{
	struct {
		struct kvm_msrs header;
		struct kvm_msr_entry entry;
	} list = {.header.nmsrs = 1, .entry = {.index = msr, .data = *value}};
	bool done = ioctl(v->fd, request, &list) == 1;

	*value = list.entry.data;
	return done;
}

static void get_named_msrs(struct engine_vcpu *v, struct engine_state *s)
{
	for (unsigned i = 0; i < ARRAY_SIZE(named_msrs); i++) {
		uint64_t value = 0;

		msr_access(v, KVM_GET_MSRS, named_msrs[i].msr, &value);
		memcpy((char *)s + named_msrs[i].at, &value, sizeof(value));
	}
}

static int set_named_msrs(struct engine_vcpu *v, const struct engine_state *s, struct error *err)
{
	for (unsigned i = 0; i < NAMED_SET; i++) {
		uint64_t value;

		memcpy(&value, (const char *)s + named_msrs[i].at, sizeof(value));
		if (!msr_access(v, KVM_SET_MSRS, named_msrs[i].msr, &value) && named_msrs[i].msr != MSR_TSC_AUX)
			return error_set(err, EINVAL, "vCPU %u: KVM refuses %#llx in MSR %#x", v->index,
				(unsigned long long)value, named_msrs[i].msr);
	}
	return 0;
}

/* ---- segments ---- */

static void segment_from_kvm(struct engine_segment *to, const struct kvm_segment *from)
{
	to->base = from->base;
	to->limit = from->limit;
	to->selector = from->selector;
	to->attributes = (uint16_t)(from->type | from->s << 4 | from->dpl << SEGMENT_DPL_SHIFT |
				    (from->present && !from->unusable) << 7 | from->avl << 8 | from->l << 9 |
				    from->db << 10 | from->g << 11);
}

static void segment_to_kvm(struct kvm_segment *to, const struct engine_segment *from)
{
	uint16_t a = from->attributes;

	*to = (struct kvm_segment){.base = from->base,
		.limit = from->limit,
		.selector = from->selector,
		.type = a & SEGMENT_TYPE,
		.s = !!(a & SEGMENT_S),
		.dpl = a >> SEGMENT_DPL_SHIFT & 3,
		.present = !!(a & SEGMENT_P),
		.unusable = !(a & SEGMENT_P),
		.avl = a >> 8 & 1,
		.l = !!(a & SEGMENT_L),
		.db = !!(a & SEGMENT_DB),
		.g = !!(a & SEGMENT_G)};
}

static struct kvm_segment *kvm_segment_of(struct kvm_sregs *s, unsigned which)
{
	struct kvm_segment *const all[ENGINE_SEGMENTS] = {[ENGINE_ES] = &s->es,
		[ENGINE_CS] = &s->cs,
		[ENGINE_SS] = &s->ss,
		[ENGINE_DS] = &s->ds,
		[ENGINE_FS] = &s->fs,
		[ENGINE_GS] = &s->gs,
		[ENGINE_LDTR] = &s->ldt,
		[ENGINE_TR] = &s->tr};

	return all[which];
}

/* ---- general registers, whose order in struct kvm_regs is another ---- */

static void gprs_from_kvm(struct engine_state *s, const struct kvm_regs *r)
{
	const uint64_t gprs[16] = {r->rax, r->rcx, r->rdx, r->rbx, r->rsp, r->rbp, r->rsi, r->rdi, r->r8, r->r9, r->r10,
		r->r11, r->r12, r->r13, r->r14, r->r15};

	memcpy(s->gprs, gprs, sizeof(gprs));
	s->rip = r->rip;
	s->rflags = r->rflags;
}

static struct kvm_regs gprs_to_kvm(const struct engine_state *s)
{
	const uint64_t *g = s->gprs;

	return (struct kvm_regs){.rax = g[ENGINE_RAX],
		.rcx = g[ENGINE_RCX],
		.rdx = g[ENGINE_RDX],
		.rbx = g[ENGINE_RBX],
		.rsp = g[ENGINE_RSP],
		.rbp = g[ENGINE_RBP],
		.rsi = g[ENGINE_RSI],
		.rdi = g[ENGINE_RDI],
		.r8 = g[8],
		.r9 = g[9],
		.r10 = g[10],
		.r11 = g[11],
		.r12 = g[12],
		.r13 = g[13],
		.r14 = g[14],
		.r15 = g[15],
		.rip = s->rip,
		.rflags = s->rflags};
}

/* ---- get and set ---- */

static void get_control(struct engine_vcpu *v, const struct kvm_sregs *sregs, struct engine_state *s)
{
	struct kvm_debugregs debug = {0};
	struct kvm_xcrs xcrs = {0};

	s->cr0 = sregs->cr0;
	s->cr2 = sregs->cr2;
	s->cr3 = sregs->cr3;
	s->cr4 = sregs->cr4;
	s->cr8 = sregs->cr8;
	s->efer = sregs->efer;
	ioctl(v->fd, KVM_GET_DEBUGREGS, &debug);
	memcpy(s->dr, debug.db, sizeof(debug.db));
	s->dr[6] = debug.dr6;
	s->dr[7] = debug.dr7;
	ioctl(v->fd, KVM_GET_XCRS, &xcrs);
	s->xcr0 = xcrs.nr_xcrs ? xcrs.xcrs[0].value : 0;
	get_named_msrs(v, s);
}

static int set_control(struct engine_vcpu *v, struct kvm_sregs *sregs, const struct engine_state *s, struct error *err)
{
	struct kvm_debugregs debug = {.dr6 = s->dr[6], .dr7 = s->dr[7]};
	struct kvm_xcrs xcrs = {.nr_xcrs = 1, .xcrs[0] = {.xcr = 0, .value = s->xcr0}};

	sregs->cr0 = s->cr0;
	sregs->cr2 = s->cr2;
	sregs->cr3 = s->cr3;
	sregs->cr4 = s->cr4;
	sregs->cr8 = s->cr8;
	sregs->efer = s->efer;
	memcpy(debug.db, s->dr, sizeof(debug.db));
	if (ioctl(v->fd, KVM_SET_DEBUGREGS, &debug) < 0)
		return error_errno(err, "vCPU %u: KVM_SET_DEBUGREGS", v->index);
	if (s->xcr0 && v->xcrs.nr_xcrs && ioctl(v->fd, KVM_SET_XCRS, &xcrs) < 0)
		return error_errno(err, "vCPU %u: KVM_SET_XCRS %#llx", v->index, (unsigned long long)s->xcr0);
	return set_named_msrs(v, s, err);
}

static void get_xsave(struct engine_vcpu *v, void *area)
{
	ioctl(v->fd, v->vm->xsave_size > sizeof(struct kvm_xsave) ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, area);
}

void kvm_vcpu_get(struct engine_vcpu *v, unsigned mask, struct engine_state *s)
{
	struct kvm_regs regs = {0};
	struct kvm_sregs sregs = {0};

	if (mask & ENGINE_STATE_GPRS) {
		ioctl(v->fd, KVM_GET_REGS, &regs);
		gprs_from_kvm(s, &regs);
	}
	if (mask & (ENGINE_STATE_SEGMENTS | ENGINE_STATE_CONTROL))
		ioctl(v->fd, KVM_GET_SREGS, &sregs);
	if (mask & ENGINE_STATE_SEGMENTS) {
		for (unsigned i = 0; i < ENGINE_SEGMENTS; i++)
			segment_from_kvm(&s->segments[i], kvm_segment_of(&sregs, i));
		s->gdt = (struct engine_table){.base = sregs.gdt.base, .limit = sregs.gdt.limit};
		s->idt = (struct engine_table){.base = sregs.idt.base, .limit = sregs.idt.limit};
	}
	if (mask & ENGINE_STATE_CONTROL)
		get_control(v, &sregs, s);
	if (mask & ENGINE_STATE_FPU) {
		scope_free void *area = calloc(1, v->vm->xsave_size);

		s->xsave_size = 0;
		if (!area)
			return;
		get_xsave(v, area);
		s->xsave_size = min(v->vm->xsave_size, sizeof(s->xsave));
		memcpy(s->xsave, area, s->xsave_size);
	}
}

int kvm_vcpu_set(struct engine_vcpu *v, unsigned mask, const struct engine_state *s, struct error *err)
{
	struct kvm_sregs sregs;
	int result = 0;

	v->changed = true;
	if (mask & (ENGINE_STATE_SEGMENTS | ENGINE_STATE_CONTROL)) {
		if (ioctl(v->fd, KVM_GET_SREGS, &sregs) < 0)
			return error_errno(err, "vCPU %u: KVM_GET_SREGS", v->index);
		memset(sregs.interrupt_bitmap, 0, sizeof(sregs.interrupt_bitmap));
		if (mask & ENGINE_STATE_SEGMENTS) {
			for (unsigned i = 0; i < ENGINE_SEGMENTS; i++)
				segment_to_kvm(kvm_segment_of(&sregs, i), &s->segments[i]);
			sregs.gdt = (struct kvm_dtable){.base = s->gdt.base, .limit = s->gdt.limit};
			sregs.idt = (struct kvm_dtable){.base = s->idt.base, .limit = s->idt.limit};
		}
		if (mask & ENGINE_STATE_CONTROL)
			result = set_control(v, &sregs, s, err);
		if (result == 0 && ioctl(v->fd, KVM_SET_SREGS, &sregs) < 0)
			return error_errno(err, "vCPU %u: KVM_SET_SREGS", v->index);
	}
	if (result == 0 && mask & ENGINE_STATE_GPRS) {
		struct kvm_regs regs = gprs_to_kvm(s);

		if (ioctl(v->fd, KVM_SET_REGS, &regs) < 0)
			return error_errno(err, "vCPU %u: KVM_SET_REGS", v->index);
	}
	if (result == 0 && mask & ENGINE_STATE_FPU) {
		scope_free void *area = calloc(1, v->vm->xsave_size);

		if (!area || s->xsave_size > v->vm->xsave_size)
			return error_set(err, EINVAL, "vCPU %u: %zu bytes of XSAVE area, KVM takes %zu", v->index,
				s->xsave_size, v->vm->xsave_size);
		memcpy(area, s->xsave, s->xsave_size);
		if (ioctl(v->fd, KVM_SET_XSAVE, area) < 0)
			return error_errno(err, "vCPU %u: KVM_SET_XSAVE", v->index);
	}
	return result;
}

/* ---- power-on ---- */

/* All MSRs that KVM keeps for this vCPU, as it made them. KVM_GET_MSRS stops at the first that it does not know here:
 * that one is dropped, and the rest is read on. */
static int save_msrs(struct engine_vcpu *v, struct error *err)
{
	scope_free struct kvm_msr_list *list = calloc(1, sizeof(*list) + MSRS_MAX * sizeof(list->indices[0]));
	scope_free struct kvm_msrs *some = calloc(1, sizeof(*some) + MSRS_MAX * sizeof(some->entries[0]));
	scope_free struct kvm_msrs *saved = calloc(1, sizeof(*saved) + MSRS_MAX * sizeof(saved->entries[0]));

	if (!list || !some || !saved)
		return error_set(err, ENOMEM, "no memory for a vCPU's MSRs");
	list->nmsrs = MSRS_MAX;
	if (ioctl(v->vm->kvm, KVM_GET_MSR_INDEX_LIST, list) < 0)
		return error_errno(err, "KVM_GET_MSR_INDEX_LIST");
	for (uint32_t at = 0; at < list->nmsrs;) {
		int done;

		some->nmsrs = min(list->nmsrs - at, 200u); /* KVM takes 255 at once */
		for (uint32_t i = 0; i < some->nmsrs; i++)
			some->entries[i] = (struct kvm_msr_entry){.index = list->indices[at + i]};
		done = ioctl(v->fd, KVM_GET_MSRS, some);
		if (done < 0)
			done = 0;
		for (int i = 0; i < done; i++)
			if (some->entries[i].index != MSR_TSC) /* goes on, as the other vCPUs' do */
				saved->entries[saved->nmsrs++] = some->entries[i];
		at += (uint32_t)done + ((uint32_t)done < some->nmsrs);
	}
	v->msrs = take_ptr(saved);
	return 0;
}

/* As save_msrs(): one that cannot be set (it is read-only) is passed over. */
static void restore_msrs(struct engine_vcpu *v)
{
	scope_free struct kvm_msrs *some = calloc(1, sizeof(*some) + MSRS_MAX * sizeof(some->entries[0]));

	for (uint32_t at = 0; some && at < v->msrs->nmsrs;) {
		int done;

		some->nmsrs = min(v->msrs->nmsrs - at, 200u);
		memcpy(some->entries, v->msrs->entries + at, some->nmsrs * sizeof(some->entries[0]));
		done = ioctl(v->fd, KVM_SET_MSRS, some);
		if (done < 0)
			done = 0;
		at += (uint32_t)done + ((uint32_t)done < some->nmsrs);
	}
}

int kvm_state_init(struct engine_vcpu *v, struct error *err)
{
	uint64_t tsc = 0;
	int result;

	v->xsave = calloc(1, v->vm->xsave_size);
	if (!v->xsave)
		return error_set(err, ENOMEM, "no memory for a vCPU's state");
	get_xsave(v, v->xsave);
	if (ioctl(v->fd, KVM_GET_REGS, &v->regs) < 0 || ioctl(v->fd, KVM_GET_SREGS, &v->sregs) < 0 ||
		ioctl(v->fd, KVM_GET_DEBUGREGS, &v->debug) < 0 || ioctl(v->fd, KVM_GET_LAPIC, &v->lapic) < 0 ||
		ioctl(v->fd, KVM_GET_VCPU_EVENTS, &v->events) < 0)
		return error_errno(err, "vCPU %u: reading its power-on state", v->index);
	if (ioctl(v->fd, KVM_GET_XCRS, &v->xcrs) < 0)
		v->xcrs.nr_xcrs = 0; /* a model without XSAVE */
	result = save_msrs(v, err);
	if (result < 0)
		return result;
	msr_access(v, KVM_GET_MSRS, MSR_TSC, &tsc);
	v->tsc_offset = tsc - host_tsc();
	return 0;
}

void kvm_state_free(struct engine_vcpu *v)
{
	free(v->xsave);
	free(v->msrs);
}

/* Special registers come before the local APIC, whose base and mode are among them; MSRs after it, since the one for
 * the TSC deadline needs the APIC's timer mode. KVM gave us all of this: it takes it back. */
void kvm_state_reset(struct engine_vcpu *v)
{
	struct kvm_mp_state mp = {.mp_state = v->index ? KVM_MP_STATE_UNINITIALIZED : KVM_MP_STATE_RUNNABLE};
	struct kvm_vcpu_events events = v->events;

	events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
	ioctl(v->fd, KVM_SET_MP_STATE, &mp);
	ioctl(v->fd, KVM_SET_SREGS, &v->sregs);
	ioctl(v->fd, KVM_SET_REGS, &v->regs);
	ioctl(v->fd, KVM_SET_VCPU_EVENTS, &events);
	ioctl(v->fd, KVM_SET_DEBUGREGS, &v->debug);
	ioctl(v->fd, KVM_SET_XSAVE, v->xsave);
	if (v->xcrs.nr_xcrs)
		ioctl(v->fd, KVM_SET_XCRS, &v->xcrs);
	ioctl(v->fd, KVM_SET_LAPIC, &v->lapic);
	restore_msrs(v);
	v->changed = false;
}
