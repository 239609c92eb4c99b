/* Entering and leaving a natively run case. Everything the processor has is loaded from native_context and the XSAVE
 * image; the only way back is a signal, whose handler reads the signal frame, leaves it behind and returns to
 * native_enter's caller (no sigreturn: one system-call round trip less). */
	.section .note.GNU-stack, "", @progbits

	.bss
	.balign 64
	.globl native_context
native_context:
	.zero 256
	.set CTX_GPR, 0
	.set CTX_RFLAGS, 128
	.set CTX_RIP, 136
	.set CTX_FS, 144
	.set CTX_GS, 152
	.set CTX_HOST_RSP, 160
	.set CTX_HOST_FS, 168
	.set CTX_ACTIVE, 176
	.set CTX_HOST_GS, 192

	.text
/* void native_enter(const void *xsave): returns after native_capture(signal, info, ucontext) has read the signal that
 * ended the case */
	.globl native_enter
	.type native_enter, @function
native_enter:
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	sub $8, %rsp
	mov %rsp, native_context+CTX_HOST_RSP(%rip)
	rdfsbase %rax
	mov %rax, native_context+CTX_HOST_FS(%rip)
	rdgsbase %rax
	mov %rax, native_context+CTX_HOST_GS(%rip)
	mov $-1, %eax
	mov $-1, %edx
	xrstor64 (%rdi)
	movl $1, native_context+CTX_ACTIVE(%rip)
	mov native_context+CTX_FS(%rip), %rax
	wrfsbase %rax
	mov native_context+CTX_GS(%rip), %rax
	wrgsbase %rax
	lea native_context+CTX_RFLAGS(%rip), %rsp
	popfq
	mov native_context+CTX_GPR+0(%rip), %rax
	mov native_context+CTX_GPR+8(%rip), %rcx
	mov native_context+CTX_GPR+16(%rip), %rdx
	mov native_context+CTX_GPR+24(%rip), %rbx
	mov native_context+CTX_GPR+40(%rip), %rbp
	mov native_context+CTX_GPR+48(%rip), %rsi
	mov native_context+CTX_GPR+56(%rip), %rdi
	mov native_context+CTX_GPR+64(%rip), %r8
	mov native_context+CTX_GPR+72(%rip), %r9
	mov native_context+CTX_GPR+80(%rip), %r10
	mov native_context+CTX_GPR+88(%rip), %r11
	mov native_context+CTX_GPR+96(%rip), %r12
	mov native_context+CTX_GPR+104(%rip), %r13
	mov native_context+CTX_GPR+112(%rip), %r14
	mov native_context+CTX_GPR+120(%rip), %r15
	mov native_context+CTX_GPR+32(%rip), %rsp
	jmp *native_context+CTX_RIP(%rip)
	.size native_enter, . - native_enter

/* The handler of every signal here: (rdi signal, rsi siginfo, rdx ucontext) on the alternate stack. While no case runs it
 * is an ordinary handler and calls C. */
	.globl native_signal
	.type native_signal, @function
native_signal:
	cmpl $0, native_context+CTX_ACTIVE(%rip)
	je native_signal_outside
	movl $0, native_context+CTX_ACTIVE(%rip)
	mov native_context+CTX_HOST_FS(%rip), %rax
	wrfsbase %rax
	mov native_context+CTX_HOST_GS(%rip), %rax
	wrgsbase %rax
	/* the kernel keeps the case's AC and NT for the handler */
	pushq $2
	popfq
	/* Still on the alternate stack: a watchdog's signal now must not be written over the frame being read. */
	and $-16, %rsp
	call native_capture
	mov native_context+CTX_HOST_RSP(%rip), %rsp
	add $8, %rsp
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
	pop %rbx
	ret
	.size native_signal, . - native_signal
