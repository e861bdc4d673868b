# The conformance guest's way to 64-bit mode, its interrupt entries, and the instructions that C has no words for.
# A multiboot 1 program, loaded at 1 MiB.

	.section .note.GNU-stack, ""
	.section .head, "ax"
	.code32
	.align 4
	.long 0x1badb002
	.long 0
	.long -0x1badb002

	.text
	.global _start
_start:
	cli
	mov %ebx, %ebp				# the loader's information
	mov $stack_top, %esp
	mov $tables, %edi			# one to one, 4 GiB, for user code too
	lea 0x1007(%edi), %eax
	mov %eax, (%edi)
	xor %ecx, %ecx
1:	lea 0x2007(%edi), %eax
	mov %ecx, %edx
	shl $12, %edx
	add %edx, %eax
	mov %eax, 0x1000(%edi,%ecx,8)
	inc %ecx
	cmp $4, %ecx
	jb 1b
	xor %ecx, %ecx
2:	mov %ecx, %eax
	shl $21, %eax
	or $0x87, %eax
	mov %eax, 0x2000(%edi,%ecx,8)
	inc %ecx
	cmp $2048, %ecx
	jb 2b
	mov $0x20, %eax				# PAE
	mov %eax, %cr4
	mov %edi, %cr3
	mov $0xc0000080, %ecx			# EFER: LME, and NXE for guests that have it
	rdmsr
	or $0x100, %eax
	wrmsr
	mov $0x80010021, %eax			# PG, WP, NE, PE
	mov %eax, %cr0
	lgdt gdt_pointer
	ljmp $8, $long_mode

	.code64
long_mode:
	mov $16, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	xor %eax, %eax
	mov %eax, %fs
	mov %eax, %gs
	mov $stack_top, %esp
	mov $tss, %eax				# the base of the TSS goes into its descriptor
	mov %ax, gdt + 0x32
	shr $16, %eax
	mov %al, gdt + 0x34
	mov %ah, gdt + 0x37
	mov $0x30, %eax
	ltr %ax
	movq $tss_stack_top, tss + 4		# for exceptions of user code
	mov $idt, %edi
	mov $entries, %eax
	xor %ecx, %ecx
3:	mov %ax, (%rdi)
	movw $8, 2(%rdi)
	movw $0x8e00, 4(%rdi)
	mov %eax, %edx
	shr $16, %edx
	mov %dx, 6(%rdi)
	add $16, %edi
	add $16, %eax
	inc %ecx
	cmp $256, %ecx
	jb 3b
	lidt idt_pointer
	mov %ebp, %edi
	call conformance
4:	hlt
	jmp 4b

# ---- interrupts and exceptions ----

	.align 16
entries:
	vector = 0
	.rept 256
	.align 16
	.if vector != 8 && (vector < 10 || vector > 14) && vector != 17
	push $0
	.endif
	push $vector
	jmp taken
	vector = vector + 1
	.endr

# On the stack: vector, error code, and what the processor pushes.
taken:
	cmpq $2, (%rsp)
	je 2f
	cmpq $32, (%rsp)
	jae 1f
	popq fault_vector
	popq fault_error
	mov (%rsp), %rdi			# where it happened
	mov attempt_stack, %rax
	test %rax, %rax
	jz unexpected
	mov %rax, %rsp				# the code at hand has ended: go on behind `attempt`
	mov $1, %eax
	jmp attempted
1:	push %rax
	mov $0xfee000b0, %eax			# end of interrupt
	movl $0, (%rax)
	incl interrupts
	pop %rax
2:	add $16, %rsp
	iretq

# int attempt(void (*code)(void)): 0, or 1 when it raised an exception.
	.global attempt
attempt:
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	mov %rsp, attempt_stack
	call *%rdi
	xor %eax, %eax
attempted:
	movq $0, attempt_stack
restore:
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
	pop %rbx
	ret

# void in_user_mode(void (*code)(void)): code that ends in an exception.
	.global in_user_mode
in_user_mode:
	pushq $0x23
	pushq $user_stack_top
	pushq $2
	pushq $0x2b
	push %rdi
	iretq

# void in_compatibility_mode(void): VMLAUNCH where it does not exist.
	.global in_compatibility_mode
in_compatibility_mode:
	pushq $0x18
	pushq $5f
	lretq
	.code32
5:	vmlaunch
	ljmp $8, $6f
	.code64
6:	ret

# u64 outside_long_mode(void): from VMXON to VMLAUNCH of vmcs_page in 32-bit mode with PAE paging. CF and ZF of the
# launch. Neither before nor after it is there VMX operation.
	.global outside_long_mode
outside_long_mode:
	push %rbx
	pushq $0x18
	pushq $1f
	lretq
	.code32
1:	call paging_off
	rdmsr
	and $~0x100, %eax
	wrmsr
	mov $pae_pointers, %eax
	call paging_on
	vmxon vmxon_pointer
	vmptrld vmcs_pointer
	vmlaunch
	pushf
	pop %ebx
	and $0x41, %ebx
	vmclear vmcs_pointer
	vmxoff
	call paging_off
	rdmsr
	or $0x100, %eax
	wrmsr
	mov $tables, %eax
	call paging_on
	ljmp $8, $2f
	.code64
2:	mov %ebx, %eax
	pop %rbx
	ret

	.code32
# Leaves ECX at EFER.
paging_off:
	mov %cr0, %eax
	and $0x7fffffff, %eax
	mov %eax, %cr0
	mov $0xc0000080, %ecx
	ret

# On the tables at EAX.
paging_on:
	mov %eax, %cr3
	mov %cr0, %eax
	or $0x80000000, %eax
	mov %eax, %cr0
	ret
	.code64

# ---- VM entry ----

# u64 enter(u64 how): 0 to launch, 1 to resume, 2 to launch behind MOV SS. What is returned: CF and ZF when the
# entry failed, bit 7 when there was a VM exit.
	.global enter
enter:
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	mov $0x6c14, %eax			# HOST_RSP
	vmwrite %rsp, %rax
	mov %ss, %ecx
	cmp $1, %edi
	je 7f
	ja 8f
	vmlaunch
	jmp 9f
7:	vmresume
	jmp 9f
8:	mov %ecx, %ss
	vmlaunch
9:	pushfq
	pop %rax
	and $0x41, %eax
	jmp restore
	.global exited
exited:
	mov %rax, guest_rax
	mov $0x80, %eax
	jmp restore

	.data
	.align 16
	.global gdt
gdt:
	.quad 0
	.quad 0x00af9b000000ffff		# 08: 64-bit code
	.quad 0x00cf93000000ffff		# 10: data
	.quad 0x00cf9b000000ffff		# 18: 32-bit code
	.quad 0x00cff3000000ffff		# 20: data for user code
	.quad 0x00affb000000ffff		# 28: 64-bit user code
	.quad 0x0000890000000067, 0		# 30: TSS
	.quad 0x0000890000000067		# 40: a TSS for 32-bit guests to switch to
vmxon_pointer:
	.quad vmxon_page
vmcs_pointer:
	.quad vmcs_page
gdt_pointer:
	.word 0x47
	.quad gdt
idt_pointer:
	.word 0xfff
	.quad idt

	.bss
	.align 4096
tables:
	.skip 0x6000
	.global idt
idt:
	.skip 0x1000
	.global tss
tss:
	.skip 0x1000
	.skip 0x4000
stack_top:
	.skip 0x1000
tss_stack_top:
	.skip 0x1000
user_stack_top:
	.global fault_vector, fault_error, interrupts, guest_rax
guest_rax:
	.skip 8
fault_vector:
	.skip 8
fault_error:
	.skip 8
attempt_stack:
	.skip 8
interrupts:
	.skip 8
