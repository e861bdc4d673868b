# A multiboot 1 program that measures the machine: it prints one character at its first instructions, enters
# 64-bit mode, then runs a hot loop of 12 instructions, three of them memory accesses, and ends the run through
# the debug-exit port with value 0 (exit code 1). The number of rounds is given when it is assembled: -DROUNDS=N.
#
#   gcc -nostdlib -static -no-pie -m64 -Wl,--build-id=none,-Ttext=0x100000,-N -DROUNDS=N -o loop.elf loop.S
#   objcopy -O elf32-i386 loop.elf		# what multiboot 1 loads is a 32-bit ELF file

	.section .note.GNU-stack, ""
	.text
	.code32
	.align 4
header:
	.long 0x1badb002
	.long 0
	.long -0x1badb002

	.global _start
_start:
	mov $0x3f8, %dx
	mov $'S', %al
	out %al, %dx

	mov $pdpt + 3, %eax		# one page-map level 4 entry, one 1 GiB page
	mov %eax, pml4
	movl $0x83, pdpt
	mov $pml4, %eax
	mov %eax, %cr3
	mov %cr4, %eax
	or $0x20, %eax			# PAE
	mov %eax, %cr4
	mov $0xc0000080, %ecx		# EFER.LME
	rdmsr
	or $0x100, %eax
	wrmsr
	mov %cr0, %eax
	or $0x80000000, %eax
	mov %eax, %cr0
	lgdt gdt_pointer
	ljmp $8, $long_mode

	.code64
long_mode:
	mov $0x10, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov $ROUNDS, %rcx
	xor %eax, %eax
	mov $data, %esi
	mov $0x9e3779b9, %ebx
	.align 16
1:	mov (%rsi), %rax
	add %rbx, %rax
	mov %rax, %rdx
	shr $7, %rdx
	xor %rdx, %rax
	mov %rax, (%rsi)
	and $0x1ff, %edx
	add 8(%rsi,%rdx,8), %rbx
	lea 3(%rbx,%rax), %rbx
	inc %rdi
	dec %rcx
	jnz 1b

	mov $0xf4, %dx
	xor %eax, %eax
	out %eax, %dx
	cli
2:	hlt
	jmp 2b

	.align 16
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
	.word . - gdt - 1
	.long gdt

	.align 4096
pml4:	.fill 4096, 1, 0
pdpt:	.fill 4096, 1, 0
data:	.fill 8192, 1, 0
