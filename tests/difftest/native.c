/* The oracle: runs a case on this CPU. The arena is a memfd mapped twice, once at its fixed addresses with the
 * protections the case sees, once writable for the tester. A case ends with a signal; the kernel's signal frame holds
 * the whole state, trap number, error code and CR2 included (Linux, arch/x86/kernel/signal.c). */
#include <cpuid.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include "difftest.h"
#include "base/util.h"

#define HWCAP2_FSGSBASE 2u
#define WATCHDOG_MICROSECONDS 20000

const enum arena_kind arena_layout[ARENA_PAGES] = ARENA_LAYOUT;

/* Shared with native_entry.S. Global because a signal handler has no other way to it. */
struct native_context {
	uint64_t gpr[16], rflags, rip, fs_base, gs_base, host_rsp, host_fs;
	uint32_t active, pad;
	uint64_t reserved, host_gs;
	struct outcome *outcome; /* not the assembler's business */
};
extern struct native_context native_context;
void native_enter(const void *xsave);
void native_signal(int signal, siginfo_t *info, void *context);
void native_signal_outside(int signal, siginfo_t *info, void *context);
void native_capture(int signal, siginfo_t *info, void *context);

static uint8_t *arena_alias;

const struct xsave_layout *xsave_layout(void)
{
	static struct xsave_layout layout;
	unsigned a, b, c, d;

	if (layout.size)
		return &layout;
	__asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
	layout.xcr0 = a & 0xe7; /* x87, SSE, AVX, AVX-512; PKRU stays the process's own */
	__cpuid_count(0xd, 2, a, b, c, d);
	layout.avx = b;
	if ((layout.xcr0 & 0xe0) == 0xe0) {
		__cpuid_count(0xd, 5, a, b, c, d);
		layout.opmask = b;
		__cpuid_count(0xd, 6, a, b, c, d);
		layout.zmm_high = b;
		__cpuid_count(0xd, 7, a, b, c, d);
		layout.zmm_16 = b;
	}
	__cpuid_count(0xd, 0, a, b, c, d);
	layout.size = min(b, (unsigned)XSAVE_BYTES);
	return &layout;
}

/* A signal while no case runs: the watchdog's is nothing, any other is a defect of the tester; die by it. */
void native_signal_outside(int signal, siginfo_t *info, void *context)
{
	struct sigaction standard = {.sa_handler = SIG_DFL};

	if (signal != SIGALRM)
		sigaction(signal, &standard, NULL);
}

static int map_arena(struct error *err)
{
	int fd = memfd_create("difftest-arena", MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, ARENA_PAGES * PAGE_BYTES))
		return error_errno(err, "creating the arena");
	arena_alias = mmap(NULL, ARENA_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (arena_alias == MAP_FAILED)
		return error_errno(err, "mapping the arena");
	for (unsigned i = 0; i < ARENA_PAGES; i++) {
		static const int protection[] = {[ARENA_DATA] = PROT_READ | PROT_WRITE,
			[ARENA_READONLY] = PROT_READ,
			[ARENA_CODE] = PROT_READ | PROT_EXEC};
		void *at = (void *)(ARENA_BASE + i * PAGE_BYTES);

		if (arena_layout[i] == ARENA_NONE)
			continue;
		if (mmap(at, PAGE_BYTES, protection[arena_layout[i]], MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_POPULATE,
			    fd, i * PAGE_BYTES) != at)
			return error_errno(err, "mapping the arena at %p (is the address in use?)", at);
	}
	memset(native_page(ARENA_CODE_FIRST), 0xcc, ARENA_CODE_PAGES * PAGE_BYTES);
	close(fd);
	return 0;
}

int native_init(struct error *err)
{
	static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGALRM};
	size_t stack_size = align_up(getauxval(AT_MINSIGSTKSZ) + 65536, PAGE_BYTES);
	struct itimerval tick = {{0, WATCHDOG_MICROSECONDS}, {0, WATCHDOG_MICROSECONDS}};
	stack_t stack = {.ss_size = stack_size};
	int ret;

	if (!(getauxval(AT_HWCAP2) & HWCAP2_FSGSBASE))
		return error_set(err, ENOTSUP,
			"this kernel does not let user code set FS and GS bases (FSGSBASE): "
			"run the tester on Linux 5.9 or later");
	if (!arena_alias) { /* a child of a process that had it has it too */
		ret = map_arena(err);
		if (ret)
			return ret;
	}
	stack.ss_sp = mmap(NULL, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (stack.ss_sp == MAP_FAILED || sigaltstack(&stack, NULL))
		return error_errno(err, "the signal stack");
	for (unsigned i = 0; i < ARRAY_SIZE(signals); i++) {
		/* NODEFER: the handler does not return through the kernel, so nobody would unblock the signal */
		struct sigaction action = {
			.sa_sigaction = native_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};

		if (sigaction(signals[i], &action, NULL))
			return error_errno(err, "signal handlers");
	}
	if (setitimer(ITIMER_REAL, &tick, NULL))
		return error_errno(err, "the watchdog timer");
	return 0;
}

uint8_t *native_page(unsigned page)
{
	return arena_alias + page * PAGE_BYTES;
}

/* Called by native_signal on the alternate stack. */
void native_capture(int signal, siginfo_t *info, void *ucontext)
{
	static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8,
		REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
	const ucontext_t *context = ucontext;
	const greg_t *regs = context->uc_mcontext.gregs;
	struct outcome *out = native_context.outcome;

	if (signal == SIGALRM) {
		out->vector = OUTCOME_TIMEOUT;
		return;
	}
	for (unsigned i = 0; i < 16; i++)
		out->state.gpr[i] = regs[order[i]];
	out->state.rip = regs[REG_RIP];
	out->state.rflags = regs[REG_EFL];
	memcpy(out->state.xsave, context->uc_mcontext.fpregs, xsave_layout()->size);
	out->vector = regs[REG_TRAPNO];
	out->error_code = regs[REG_ERR];
	out->cr2 = out->vector == 14 ? (uint64_t)regs[REG_CR2] : 0;
}

/* OUTCOME_TIMEOUT: the case loops, or the watchdog's tick fell into it by chance; the caller puts the memory back and
 * tries again. */
void native_execute(const struct cpu_state *state, struct outcome *out)
{
	memcpy(native_context.gpr, state->gpr, sizeof(state->gpr));
	native_context.rflags = state->rflags;
	native_context.rip = state->rip;
	native_context.fs_base = state->fs_base;
	native_context.gs_base = state->gs_base;
	native_context.outcome = out;
	native_enter(state->xsave);
	out->state.fs_base = state->fs_base;
	out->state.gs_base = state->gs_base;
}
