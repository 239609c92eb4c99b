/* Entry of the hostile kernel: PVH (Xen's docs/misc/pvh.pandoc) for the first vCPU, a page below 1 MiB for the others; both
 * to 64-bit mode with the first 4 GiB and 4 GiB from 512 GiB on mapped as they are. */
	.section .note.pvh, "a", @note
	.balign 4
	.long 4, 4, 18			/* name, value, XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.long start

	.section .text.start, "ax"
	.code32
	.globl start
start:
	movl %ebx, start_info
	/* Tables of 2 MiB pages; the upper PML4 entry's map to 512 GiB. */
	movl $pd, %edi
	movl $0x87, %eax		/* present, writable, for user mode too, large */
	xorl %edx, %edx
	movl $(512 * 8), %ecx
1:	movl %eax, (%edi)
	movl %edx, 4(%edi)
	addl $8, %edi
	addl $0x200000, %eax
	jnc 2f
	movl $0x80, %edx		/* behind 4 GiB: from 512 GiB */
2:	decl %ecx
	jnz 1b
	movl $pdpt_low, %edi
	movl $(pd + 7), %eax
	movl $8, %ecx
1:	movl %eax, (%edi)
	addl $0x1000, %eax
	addl $8, %edi
	cmpl $(pdpt_low + 32), %edi
	jne 2f
	movl $pdpt_high, %edi
2:	decl %ecx
	jnz 1b
	movl $(pdpt_low + 7), pml4
	movl $(pdpt_high + 7), pml4 + 8
	xorl %esi, %esi			/* number of this vCPU */
	movl $stack_top, %esp
	jmp to_long_mode

to_long_mode:
	movl $pml4, %eax
	movl %eax, %cr3
	movl $0x6a0, %eax		/* PAE, PGE, SSE */
	movl %eax, %cr4
	movl $0xc0000080, %ecx
	rdmsr
	orl $0x101, %eax		/* LME, SCE */
	wrmsr
	movl $0x80000033, %eax
	movl %eax, %cr0
	lgdt gdt_pointer
	ljmp $8, $3f
	.code64
3:	movl $16, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl %esi, %edi
	call hostile
	/* Anything that comes back ends in a triple fault. */
	.globl give_up
give_up:
	lidt no_table(%rip)
	ud2

	.globl ap_start, ap_end
	.code16
ap_start:				/* copied to 0x8000, started there by a SIPI */
	cli
	xorw %ax, %ax
	movw %ax, %ds
	lgdtl 0x8000 + ap_gdt_pointer - ap_start
	movl $0x11, %eax
	movl %eax, %cr0
	ljmpl $24, $ap_protected
ap_gdt_pointer:
	.word 31
	.long gdt
ap_end:
	.code32
ap_protected:
	movl $16, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $1, %esi
	movl $ap_stack_top, %esp
	jmp to_long_mode

	.code64
	.altmacro
	.macro stub n
	.balign 16
	.if !(\n == 8 || (\n >= 10 && \n <= 14) || \n == 17 || \n == 21)
	pushq $0			/* where the processor pushes an error code */
	.endif
	pushq $\n
	jmp common
	.endm
	.globl stubs
	.balign 16
stubs:
	.set i, 0
	.rept 256
	stub %i
	.set i, i + 1
	.endr
common:
	pushq %rax
	pushq %rcx
	pushq %rdx
	pushq %rsi
	pushq %rdi
	pushq %r8
	pushq %r9
	pushq %r10
	pushq %r11
	cld
	movq %rsp, %rdi
	call exception
	popq %r11
	popq %r10
	popq %r9
	popq %r8
	popq %rdi
	popq %rsi
	popq %rdx
	popq %rcx
	popq %rax
	addq $16, %rsp
	iretq

	.section .data
	.balign 16
gdt:
	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
gdt_pointer:
	.word 31
	.quad gdt
no_table:
	.word 0
	.quad 0
	.globl start_info
start_info:
	.long 0

	.section .bss
	.balign 4096
	.globl pml4
pml4:	.skip 4096
pdpt_low: .skip 4096
pdpt_high: .skip 4096
pd:	.skip 8 * 4096
	.skip 65536
stack_top:
	.skip 65536
ap_stack_top:
	.section .note.GNU-stack, "", @progbits
