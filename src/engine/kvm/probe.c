/* Does KVM here really run a stock kernel? A version number does not tell: some KVMs (a hypervisor without nested
 * virtualization below them) emulate every instruction of a guest's kernel, refuse several, and need microseconds for
 * each. So a ring-0 program of our own does what every kernel does, against a deadline: it notes each step in memory,
 * so that a failure can be named.
 */
#include "engine/kvm/kvm.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/loop.h"
#include "base/util.h"

#define PAGE 0x1000ull
#define NS_PER_MS 1000000ull
#define DEADLINE_MS 100 /* of running; making the VM before that is the host kernel's own work, some milliseconds */
/* The loop of the speed check: 400,000 instructions. 10 million a second are slower than every translator, and faster
 * than every emulator. Counted is this thread's CPU time, so that a busy host does not fail it. */
#define LOOP_TURNS 200000
#define LOOP_MS_MAX 40

/* Guest memory, mapped to itself; two sets of page tables, four pages each. */
enum {
	TABLES_A = 0x1000,
	TABLES_B = 0x5000,
	GDT = 0x9000,
	IDT = 0xa000,
	STACK = 0xd000, /* its top */
	XSAVE = 0xe000,
	NOTES = 0xf000,
	CODE = 0x10000,
	WINDOW = 0x1f000, /* where the tables differ: A shows the first of these pages there, B the second */
	WINDOW_A = 0x20000,
	WINDOW_B = 0x21000,
	MEMORY = 0x22000,
};

#define SELECTOR_CODE 8
#define SELECTOR_DATA 16
#define VECTOR_INT3 3
#define VECTOR_IPI 0x40
#define PORT_STEP 0xf4 /* a write says that a part is done */

/* What the program leaves at NOTES. */
struct notes {
	uint32_t step, breakpoints, interrupts, wrong;
};

static const char *const steps[] = {
	"entering 64-bit mode",
	"fxsave and fxrstor",
	"xsetbv",
	"xsave and xrstor",
	"cmpxchg16b",
	"int3 and its handler",
	"a switch of page tables",
	"an interrupt from the local APIC",
	"a loop of 400,000 instructions",
};

/* SDM volume 2 for the instructions, volume 3 section 11.12 for the x2APIC's MSRs. Addresses are absolute: the program
 * is linked anywhere, and runs at CODE. */
extern const char probe_begin[], probe_int3[], probe_interrupt[], probe_end[];
__asm__(".pushsection .rodata\n"
	".set NOTES, 0xf000\n.set STEP, NOTES\n.set BREAKPOINTS, NOTES + 4\n.set INTERRUPTS, NOTES + 8\n"
	".set WRONG, NOTES + 12\n.set SAVED, 0xe000\n.set WINDOW, 0x1f000\n"
	"probe_begin:\n"
	"	movl $1, STEP\n"
	"	fninit\n"
	"	fxsave64 SAVED\n"
	"	fxrstor64 SAVED\n"
	"	movl $2, STEP\n"
	"	xorl %ecx, %ecx\n"
	"	xorl %edx, %edx\n"
	"	movl $3, %eax\n"
	"	xsetbv\n"
	"	movl $3, STEP\n"
	"	xsave64 SAVED\n"
	"	xrstor64 SAVED\n"
	"	movl $4, STEP\n"
	"	leaq -64(%rsp), %rsi\n"
	"	movq $5, (%rsi)\n"
	"	movq $6, 8(%rsi)\n"
	"	movl $5, %eax\n"
	"	movl $6, %edx\n"
	"	movl $7, %ebx\n"
	"	movl $8, %ecx\n"
	"	lock cmpxchg16b (%rsi)\n"
	"	jnz 9f\n"
	"	cmpq $8, 8(%rsi)\n"
	"	jne 9f\n"
	"	movl $5, STEP\n"
	"	int3\n"
	"	cmpl $1, BREAKPOINTS\n"
	"	jne 9f\n"
	"	movl $6, STEP\n"
	"	movq WINDOW, %rbx\n"
	"	movq %cr3, %rax\n"
	"	movl $0x5000, %ecx\n"
	"	movq %rcx, %cr3\n"
	"	movq WINDOW, %rcx\n"
	"	movq %rax, %cr3\n"
	"	cmpq $0xa, %rbx\n"
	"	jne 9f\n"
	"	cmpq $0xb, %rcx\n"
	"	jne 9f\n"
	"	movl $7, STEP\n"
	"	movl $0x1b, %ecx\n" /* IA32_APIC_BASE: enabled, x2APIC */
	"	rdmsr\n"
	"	orl $0xc00, %eax\n"
	"	wrmsr\n"
	"	xorl %edx, %edx\n"
	"	movl $0x80f, %ecx\n" /* SVR: enabled */
	"	movl $0x1ff, %eax\n"
	"	wrmsr\n"
	"	movl $0x83f, %ecx\n" /* self IPI */
	"	movl $0x40, %eax\n"
	"	wrmsr\n"
	"	sti\n"
	"	hlt\n"
	"	cli\n"
	"	cmpl $1, INTERRUPTS\n"
	"	jne 9f\n"
	"	movl $8, STEP\n"
	"	outb %al, $0xf4\n"
	"	movl $200000, %ecx\n"
	"1:	decl %ecx\n"
	"	jnz 1b\n"
	"	outb %al, $0xf4\n"
	"9:	movl $1, WRONG\n"
	"	outb %al, $0xf4\n"
	"	hlt\n"
	"probe_int3:\n"
	"	incl BREAKPOINTS\n"
	"	iretq\n"
	"probe_interrupt:\n"
	"	incl INTERRUPTS\n"
	"	pushq %rax\n"
	"	pushq %rcx\n"
	"	pushq %rdx\n"
	"	movl $0x80b, %ecx\n" /* EOI */
	"	xorl %eax, %eax\n"
	"	xorl %edx, %edx\n"
	"	wrmsr\n"
	"	popq %rdx\n"
	"	popq %rcx\n"
	"	popq %rax\n"
	"	iretq\n"
	"probe_end:\n"
	".popsection\n");

struct probe {
	int kvm, vm, vcpu;
	uint8_t *memory;
	struct kvm_run *run;
	size_t run_size;
	uint64_t deadline; /* clock_now() */
	timer_t timer;
	bool has_timer;
};

static void cleanup_probe(struct probe *p)
{
	if (p->has_timer)
		timer_delete(p->timer);
	if (p->run)
		munmap(p->run, p->run_size);
	if (p->vcpu >= 0)
		close(p->vcpu);
	if (p->vm >= 0)
		close(p->vm);
	if (p->memory)
		munmap(p->memory, MEMORY);
	if (p->kvm >= 0)
		close(p->kvm);
}

static void build_tables(uint8_t *memory, uint64_t at, uint64_t window)
{
	const uint64_t present = 3; /* and writable */

	for (unsigned level = 0; level < 3; level++)
		*(uint64_t *)(memory + at + level * PAGE) = (at + (level + 1) * PAGE) | present;
	for (uint64_t page = 0; page < MEMORY; page += PAGE)
		((uint64_t *)(memory + at + 3 * PAGE))[page / PAGE] = (page == WINDOW ? window : page) | present;
}

/* A 64-bit interrupt gate (SDM volume 3, section 6.14.1). */
static void build_gate(uint8_t *memory, unsigned vector, uint64_t handler)
{
	uint64_t *gate = (uint64_t *)(memory + IDT + 16 * vector);

	gate[0] = (handler & 0xffff) | SELECTOR_CODE << 16 | 0x8e00ull << 32 | (handler >> 16 & 0xffff) << 48;
	gate[1] = handler >> 32;
}

static void build_guest(uint8_t *memory)
{
	const uint64_t gdt[] = {0, 0x00af9b000000ffffull, 0x00cf93000000ffffull};

	build_tables(memory, TABLES_A, WINDOW_A);
	build_tables(memory, TABLES_B, WINDOW_B);
	memcpy(memory + GDT, gdt, sizeof(gdt));
	build_gate(memory, VECTOR_INT3, CODE + (probe_int3 - probe_begin));
	build_gate(memory, VECTOR_IPI, CODE + (probe_interrupt - probe_begin));
	memory[WINDOW_A] = 0xa;
	memory[WINDOW_B] = 0xb;
	memcpy(memory + CODE, probe_begin, (size_t)(probe_end - probe_begin));
}

static int set_registers(struct probe *p, struct error *err)
{
	const struct kvm_segment code = {
		.limit = 0xffffffff, .selector = SELECTOR_CODE, .type = 0xb, .present = 1, .s = 1, .l = 1, .g = 1};
	const struct kvm_segment data = {
		.limit = 0xffffffff, .selector = SELECTOR_DATA, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
	struct kvm_regs regs = {.rip = CODE, .rsp = STACK, .rflags = 2};
	struct kvm_sregs sregs;

	if (ioctl(p->vcpu, KVM_GET_SREGS, &sregs) < 0)
		return error_errno(err, "reading the probe's registers");
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = data;
	sregs.tr = (struct kvm_segment){.limit = 0x67, .type = 0xb, .present = 1};
	sregs.gdt = (struct kvm_dtable){.base = GDT, .limit = 23};
	sregs.idt = (struct kvm_dtable){.base = IDT, .limit = 0xfff};
	sregs.cr0 = 0x80000033; /* PG, NE, ET, MP, PE */
	sregs.cr3 = TABLES_A;
	sregs.cr4 = 0x40620; /* OSXSAVE, OSXMMEXCPT, OSFXSR, PAE */
	sregs.efer = 0x500;  /* LMA, LME */
	if (ioctl(p->vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(p->vcpu, KVM_SET_REGS, &regs) < 0)
		return error_errno(err, "setting the probe's registers");
	return 0;
}

static int create(struct probe *p, struct error *err)
{
	struct kvm_userspace_memory_region region = {.memory_size = MEMORY};
	struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};
	struct kvm_cpuid2 *cpuid;
	int size, result;

	p->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (p->memory == MAP_FAILED) {
		p->memory = NULL;
		return error_errno(err, "memory for the probe");
	}
	build_guest(p->memory);
	p->vm = ioctl(p->kvm, KVM_CREATE_VM, 0);
	if (p->vm < 0)
		return error_errno(err, "KVM_CREATE_VM");
	region.userspace_addr = (uintptr_t)p->memory;
	/* Local APICs alone: making and ending the rest costs more than all else here. */
	if (ioctl(p->vm, KVM_ENABLE_CAP, &split) < 0)
		return error_errno(err, "KVM_CAP_SPLIT_IRQCHIP");
	if (ioctl(p->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		return error_errno(err, "KVM_SET_USER_MEMORY_REGION");
	p->vcpu = ioctl(p->vm, KVM_CREATE_VCPU, 0);
	if (p->vcpu < 0)
		return error_errno(err, "KVM_CREATE_VCPU");
	size = ioctl(p->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (size < (int)sizeof(*p->run))
		return error_set(err, EIO, "KVM_GET_VCPU_MMAP_SIZE gives %d", size);
	p->run_size = (size_t)size;
	p->run = mmap(NULL, p->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, p->vcpu, 0);
	if (p->run == MAP_FAILED) {
		p->run = NULL;
		return error_errno(err, "mapping the vCPU's shared page");
	}
	result = kvm_supported_cpuid(p->kvm, &cpuid, err);
	if (result < 0)
		return result;
	result = ioctl(p->vcpu, KVM_SET_CPUID2, cpuid);
	free(cpuid);
	return result < 0 ? error_errno(err, "KVM_SET_CPUID2") : set_registers(p, err);
}

/* From the deadline on the signal comes again and again, so that one that comes between two KVM_RUNs is not lost. */
static int set_deadline(struct probe *p, struct error *err)
{
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = kvm_signal()};
	struct itimerspec when = {.it_interval.tv_nsec = NS_PER_MS};

	event._sigev_un._tid = (int)syscall(SYS_gettid);
	when.it_value.tv_sec = (time_t)(p->deadline / 1000000000);
	when.it_value.tv_nsec = (long)(p->deadline % 1000000000);
	if (timer_create(CLOCK_MONOTONIC, &event, &p->timer) < 0)
		return error_errno(err, "a timer for the probe");
	p->has_timer = true;
	return timer_settime(p->timer, TIMER_ABSTIME, &when, NULL) < 0 ? error_errno(err, "a timer for the probe") : 0;
}

static uint64_t thread_time(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static const char *step_name(const struct notes *notes)
{
	uint32_t step = *(const volatile uint32_t *)&notes->step;

	return steps[min(step, (uint32_t)ARRAY_SIZE(steps) - 1)];
}

/* Runs to the program's next mark. */
static int run_part(struct probe *p, const struct notes *notes, struct error *err)
{
	char text[200];

	for (;;) {
		if (clock_now() >= p->deadline)
			return error_set(err, ETIME,
				"/dev/kvm runs guest kernels too slowly: the probe was at %s after %d ms, so it seems "
				"to emulate "
				"every instruction",
				step_name(notes), DEADLINE_MS);
		if (ioctl(p->vcpu, KVM_RUN, 0) < 0) {
			if (errno == EINTR || errno == EAGAIN)
				continue;
			return error_errno(err, "KVM_RUN, at %s", step_name(notes));
		}
		if (p->run->exit_reason == KVM_EXIT_INTR)
			continue;
		if (p->run->exit_reason == KVM_EXIT_IO && p->run->io.port == PORT_STEP)
			break;
		kvm_describe_exit(p->run, text, sizeof(text));
		return error_set(
			err, ENOTSUP, "/dev/kvm cannot run a kernel: %s ended with %s", step_name(notes), text);
	}
	if (notes->wrong)
		return error_set(
			err, ENOTSUP, "/dev/kvm cannot run a kernel: %s gave a wrong result", step_name(notes));
	return 0;
}

static int run(struct probe *p, struct error *err)
{
	struct notes *notes = (struct notes *)(p->memory + NOTES);
	uint64_t began, took;
	int result = run_part(p, notes, err);

	if (result < 0)
		return result;
	began = thread_time();
	result = run_part(p, notes, err);
	took = thread_time() - began;
	if (result < 0)
		return result;
	if (took > LOOP_MS_MAX * NS_PER_MS)
		return error_set(err, ETIME,
			"/dev/kvm runs guest kernels too slowly: %s took %llu ms instead of less than %d; it seems to "
			"emulate "
			"every instruction",
			steps[ARRAY_SIZE(steps) - 1], (unsigned long long)(took / NS_PER_MS), LOOP_MS_MAX);
	return 0;
}

int kvm_probe(struct error *err)
{
	__attribute__((cleanup(cleanup_probe))) struct probe p = {.kvm = -1, .vm = -1, .vcpu = -1};
	sigset_t signal_set, before;
	int result;

	result = kvm_open(&p.kvm, err);
	if (result < 0)
		return result;
	kvm_install_signal();
	sigemptyset(&signal_set);
	sigaddset(&signal_set, kvm_signal());
	pthread_sigmask(SIG_UNBLOCK, &signal_set, &before);
	result = create(&p, err);
	p.deadline = clock_now() + DEADLINE_MS * NS_PER_MS;
	if (result == 0)
		result = set_deadline(&p, err);
	if (result == 0)
		result = run(&p, err);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return result;
}
