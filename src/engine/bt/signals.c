/* Host faults in translated code are the guest's: #DE, #UD, #GP of unaligned vectors, #MF, #XM. The handler finds the guest
 * instruction, leaves the fault in the vCPU, and lets the thread go on at the common exit, with all registers in place. */
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "engine/bt/bt.h"

#define SIGNAL_STACK (128u << 10)
#ifndef SS_AUTODISARM
#define SS_AUTODISARM (1u << 31)
#endif

static __thread struct bt_vcpu *current;

static const int gpr_of[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9,
	REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };

static struct sigaction before[64];

static void not_ours(int number, const siginfo_t *info)
{
	/* A fault comes again when the handler returns, and is then whatever it would have been without us; a signal that
	 * somebody sent does not, so it is sent once more. */
	sigaction(number, &before[number], NULL);
	if (info->si_code <= 0)
		raise(number);
}

static void handle(int number, siginfo_t *info, void *context)
{
	greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
	struct bt_vcpu *v = current;
	const uint8_t *pc = (const uint8_t *)(uintptr_t)r[REG_RIP];
	int vector = (int)r[REG_TRAPNO];
	struct bt_block *b;
	unsigned offset, k;

	if (!v || pc < v->vm->code_run || pc >= v->vm->code_run + v->vm->code_size) {
		not_ours(number, info);
		return;
	}
	b = cache_by_host(v->vm, pc);
	if (!b || (vector != VECTOR_DE && vector != VECTOR_UD && vector != VECTOR_GP && vector != VECTOR_MF &&
			  vector != VECTOR_XM && vector != VECTOR_NM && vector != VECTOR_SS)) {
		not_ours(number, info); /* the engine's own fault */
		return;
	}
	offset = (unsigned)(pc - b->entry_mem);
	for (k = b->sides - 1u; k > 0 && b->side[k].host > offset; k--)
		;
	if (!b->stub)
		v->rip = v->page + b->side[k].guest;
	if (b->side[k].flags_in_host & 0x80)
		r[gpr_of[b->side[k].flags_in_host & 15]] = (greg_t)v->scratch[0];
	else if (b->side[k].flags_in_host)
		v->arith = (uint16_t)(((r[REG_EFL] & 0xd5) | 2) << 8 | ((r[REG_EFL] >> 11) & 1));
	v->fault.vector = vector;
	v->fault.error = 0;
	v->fault.has_error = vector == VECTOR_GP || vector == VECTOR_SS;
	v->fault.software = false;
	v->exit_code = BT_EXIT_FAULT;
	r[REG_RIP] = (greg_t)(uintptr_t)v->vm->exit_mem;
}

static void install(void)
{
	static const int numbers[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP };
	struct sigaction action = { .sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };

	for (unsigned k = 0; k < ARRAY_SIZE(numbers); k++)
		sigaction(numbers[k], &action, &before[numbers[k]]);
}

void signals_install(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, install);
}

/* The guest's rsp may point anywhere, into the alternate stack too: SS_AUTODISARM keeps the kernel from believing that the
 * thread is already on it. */
void signals_thread(struct bt_vcpu *v)
{
	stack_t stack = { .ss_size = SIGNAL_STACK, .ss_flags = (int)SS_AUTODISARM };

	if (current == v)
		return;
	current = v;
	if (!v->private->signal_stack)
		v->private->signal_stack = mmap(NULL, SIGNAL_STACK, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	stack.ss_sp = v->private->signal_stack;
	sigaltstack(&stack, NULL);
}
