/*
 * l2state - the nested state of a small hypervisor's guest, out of KVM and into it again.
 *
 * Build:  gcc -O2 -static -Wall -o l2state l2state.c
 * Run:    l2state VARIANT [FILE]
 *
 * A VM without irqchip holds a hypervisor (L2) of a few instructions, whose guest (L3) writes 0, 1, 2.. to port 0x10,
 * which reaches this program while the vCPU is in guest mode. At 4, KVM_GET_NESTED_STATE is taken and printed. A new VM
 * gets the same memory and registers, and as its nested state FILE or else what was printed, and goes on: L3 counts to
 * 9 and executes VMCALL, which its hypervisor reports on port 0x11 as the exit's reason.
 *
 *   plain   nothing else
 *   timer   the preemption timer runs
 *   shadow  VMCS shadowing: L3 then reads the guest RIP of the shadow VMCS, and writes it to port 0x13
 *
 * Prints:  STATE <variant> BLOB <bytes>, then lines of hexadecimal, then STATE <variant> END
 *          STATE <variant> ok=<0|1> before=<numbers> after=<numbers> shadow=<value> exit=<reason>
 *          or STATE <variant> FATAL <system call>: <errno> <words>
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define MEM_SIZE 0x200000ul
#define PML4 0x1000ul
#define PDPT 0x2000ul
#define PD 0x3000ul
#define GDT 0x8000ul
#define IDT 0x9000ul
#define CODE 0x10000ul
#define L3_CODE 0x11000ul
#define VMXON 0x20000ul
#define VMCS 0x21000ul
#define SHADOW 0x22000ul
#define READ_BITMAP 0x23000ul
#define WRITE_BITMAP 0x24000ul
#define TABLE 0x25000ul		/* encoding, value, .., -1 */
#define SHADOW_TABLE 0x26000ul
#define POINTERS 0x27000ul	/* of VMXON, VMCS, SHADOW */
#define TSS 0x28000ul
#define STACK_TOP 0x80000ul
#define L3_STACK_TOP 0x90000ul

#define SHADOW_RIP 0x12345678ul

/* ---- guest code ------------------------------------------------------------------------- */
asm(".pushsection .rodata\n"
    ".globl g_hypervisor, g_exit, g_hypervisor_end, g_l3, g_l3_end\n"
    "g_hypervisor:\n"			/* r15: with a shadow VMCS */
    "   movq %cr4, %rax\n"
    "   orq $0x2000, %rax\n"
    "   movq %rax, %cr4\n"
    "   vmxon 0x27000\n"
    "   jbe 8f\n"
    "   testq %r15, %r15\n"
    "   jz 1f\n"
    "   vmclear 0x27010\n"
    "   jbe 8f\n"
    "   vmptrld 0x27010\n"
    "   jbe 8f\n"
    "   movl $0x26000, %esi\n"
    "   call 5f\n"
    "   vmclear 0x27010\n"
    "   jbe 8f\n"
    "1: vmclear 0x27008\n"
    "   jbe 8f\n"
    "   vmptrld 0x27008\n"
    "   jbe 8f\n"
    "   movl $0x25000, %esi\n"
    "   call 5f\n"
    "   vmlaunch\n"
    "8: movl $0x4400, %edx\n"		/* VM-instruction error */
    "   movl $0xffff, %eax\n"
    "   vmread %rdx, %rax\n"
    "   outl %eax, $0x12\n"
    "   hlt\n"
    "5: movq (%rsi), %rdx\n"
    "   cmpq $-1, %rdx\n"
    "   je 6f\n"
    "   movq 8(%rsi), %rax\n"
    "   vmwrite %rax, %rdx\n"
    "   jbe 7f\n"
    "   addq $16, %rsi\n"
    "   jmp 5b\n"
    "6: ret\n"
    "7: movl %edx, %eax\n"		/* the field that cannot be written */
    "   outl %eax, $0x12\n"
    "   hlt\n"
    "g_exit:\n"
    "   movl $0x4402, %edx\n"		/* exit reason */
    "   vmread %rdx, %rax\n"
    "   outl %eax, $0x11\n"
    "   hlt\n"
    "g_hypervisor_end:\n"
    "g_l3:\n"
    "   xorl %eax, %eax\n"
    "1: outb %al, $0x10\n"
    "   incb %al\n"
    "   cmpb $10, %al\n"
    "   jne 1b\n"
    "   testq %r15, %r15\n"
    "   jz 2f\n"
    "   movl $0x681e, %edx\n"		/* guest RIP */
    "   vmread %rdx, %rax\n"
    "   outl %eax, $0x13\n"
    "2: vmcall\n"
    "   hlt\n"
    "g_l3_end:\n"
    ".popsection\n");
extern const char g_hypervisor[], g_exit[], g_hypervisor_end[], g_l3[], g_l3_end[];

/* ---- host side --------------------------------------------------------------------------- */
struct vm {
	int fd, vcpu;
	struct kvm_run *run;
	size_t run_size;
};

static struct { struct kvm_nested_state h; uint8_t rest[0x2000]; } state;

static const char *variant;
static int kvm;
static uint8_t *mem;

static void die(const char *what)
{
	printf("STATE %s FATAL %s: %d %s\n", variant, what, errno, strerror(errno));
	exit(2);
}

static long xioctl(int fd, unsigned long req, void *arg, const char *what)
{
	long r = ioctl(fd, req, arg);
	if (r < 0)
		die(what);
	return r;
}
#define XIOCTL(fd, req, arg) xioctl(fd, req, (void *)(arg), #req)

static uint64_t *at(uint64_t address)
{
	return (uint64_t *)(mem + address);
}

static uint64_t get_msr(struct vm *v, uint32_t index)
{
	struct { struct kvm_msrs h; struct kvm_msr_entry e; } m = { .h.nmsrs = 1, .e.index = index };

	if (XIOCTL(v->vcpu, KVM_GET_MSRS, &m) != 1)
		die("KVM_GET_MSRS");
	return m.e.data;
}

static void open_vm(struct vm *v)
{
	static struct { struct kvm_cpuid2 h; struct kvm_cpuid_entry2 e[256]; } cpuid;
	struct { struct kvm_msrs h; struct kvm_msr_entry e; } feature_control = {
		.h.nmsrs = 1, .e = { .index = 0x3a, .data = 5 } };
	struct kvm_userspace_memory_region r = {
		.memory_size = MEM_SIZE, .userspace_addr = (uint64_t)mem };

	v->fd = XIOCTL(kvm, KVM_CREATE_VM, 0);
	XIOCTL(v->fd, KVM_SET_TSS_ADDR, 0xfffbd000ul);
	XIOCTL(v->fd, KVM_SET_USER_MEMORY_REGION, &r);
	v->vcpu = XIOCTL(v->fd, KVM_CREATE_VCPU, 0);
	v->run_size = XIOCTL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	v->run = mmap(NULL, v->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->vcpu, 0);
	if (v->run == MAP_FAILED)
		die("mmap kvm_run");
	cpuid.h.nent = 256;
	XIOCTL(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid.h);
	XIOCTL(v->vcpu, KVM_SET_CPUID2, &cpuid.h);
	if (XIOCTL(v->vcpu, KVM_SET_MSRS, &feature_control) != 1)
		die("KVM_SET_MSRS");
}

static void close_vm(struct vm *v)
{
	munmap(v->run, v->run_size);
	close(v->vcpu);
	close(v->fd);
}

static uint64_t *field(uint64_t *to, uint32_t encoding, uint64_t value)
{
	to[0] = encoding;
	to[1] = value;
	to[2] = -1ul;
	return to + 2;
}

/* The controls that must be 1, and `more`. */
static uint64_t controls(struct vm *v, uint32_t msr, uint32_t more)
{
	uint64_t allowed = get_msr(v, msr);

	if (more & ~(allowed >> 32)) {
		printf("STATE %s FATAL MSR %#x does not offer %#x\n", variant, msr, more);
		exit(2);
	}
	return (uint32_t)allowed | more;
}

static void fill_memory(struct vm *v, const struct kvm_sregs *s, int timer, int shadow)
{
	uint64_t *to = at(TABLE);
	static const struct { uint32_t selector, access; uint64_t base; uint32_t limit; } segments[] = {
		{ 16, 0xc093, 0, ~0u },		/* ES */
		{ 8, 0xa09b, 0, ~0u },
		{ 16, 0xc093, 0, ~0u },
		{ 16, 0xc093, 0, ~0u },
		{ 16, 0xc093, 0, ~0u },
		{ 16, 0xc093, 0, ~0u },
		{ 0, 0x10000, 0, 0 },		/* LDTR */
		{ 24, 0x8b, TSS, 0x67 },
	};
	static const uint16_t host_selectors[] = { 16, 8, 16, 16, 16, 16, 24 };
	uint32_t revision = get_msr(v, 0x480);

	at(PML4)[0] = PDPT | 3;
	at(PDPT)[0] = PD | 3;
	for (uint64_t i = 0; i < 512; i++)
		at(PD)[i] = i << 21 | 0x83;
	at(GDT)[1] = 0x00af9b000000ffffull;
	at(GDT)[2] = 0x00cf93000000ffffull;
	at(GDT)[3] = 0x00008b0000000067ull | TSS << 16;
	memcpy(mem + CODE, g_hypervisor, g_hypervisor_end - g_hypervisor);
	memcpy(mem + L3_CODE, g_l3, g_l3_end - g_l3);
	at(VMXON)[0] = revision;
	at(VMCS)[0] = revision;
	at(SHADOW)[0] = revision | 1u << 31;
	at(POINTERS)[0] = VMXON;
	at(POINTERS)[1] = VMCS;
	at(POINTERS)[2] = SHADOW;

	to = field(to, 0x4000, controls(v, 0x481, timer ? 0x40 : 0));
	to = field(to, 0x4002, controls(v, 0x482, shadow ? 1u << 31 : 0));
	if (shadow) {
		to = field(to, 0x401e, controls(v, 0x48b, 1 << 14));
		to = field(to, 0x2026, READ_BITMAP);
		to = field(to, 0x2028, WRITE_BITMAP);
	}
	if (timer)
		to = field(to, 0x482e, 0xffffffff);
	to = field(to, 0x400c, controls(v, 0x483, 1 << 9));	/* 64-bit host */
	to = field(to, 0x4012, controls(v, 0x484, 1 << 9));	/* 64-bit guest */
	to = field(to, 0x2800, shadow ? SHADOW : -1ul);
	for (int i = 0; i < 8; i++) {
		to = field(to, 0x800 + 2 * i, segments[i].selector);
		to = field(to, 0x4800 + 2 * i, segments[i].limit);
		to = field(to, 0x4814 + 2 * i, segments[i].access);
		to = field(to, 0x6806 + 2 * i, segments[i].base);
	}
	for (int i = 0; i < 7; i++)
		to = field(to, 0xc00 + 2 * i, host_selectors[i]);
	to = field(to, 0x4810, 31);		/* GDTR, IDTR limits and bases */
	to = field(to, 0x4812, 4095);
	to = field(to, 0x6816, GDT);
	to = field(to, 0x6818, IDT);
	to = field(to, 0x6800, s->cr0);
	to = field(to, 0x6802, PML4);
	to = field(to, 0x6804, s->cr4 | 0x2000);
	to = field(to, 0x681a, 0x400);		/* DR7 */
	to = field(to, 0x681c, L3_STACK_TOP);
	to = field(to, 0x681e, L3_CODE);
	to = field(to, 0x6820, 2);
	to = field(to, 0x6c00, s->cr0);
	to = field(to, 0x6c02, PML4);
	to = field(to, 0x6c04, s->cr4 | 0x2000);
	to = field(to, 0x6c0a, TSS);		/* TR, GDTR, IDTR bases */
	to = field(to, 0x6c0c, GDT);
	to = field(to, 0x6c0e, IDT);
	to = field(to, 0x6c14, STACK_TOP);
	to = field(to, 0x6c16, CODE + (g_exit - g_hypervisor));

	field(at(SHADOW_TABLE), 0x681e, SHADOW_RIP);
}

static void start(struct vm *v, int timer, int shadow)
{
	struct kvm_segment code = { .limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1 };
	struct kvm_segment data = code, task = { .base = TSS, .limit = 0x67, .selector = 24, .type = 11, .present = 1 };
	struct kvm_regs regs = { .rip = CODE, .rflags = 2, .rsp = STACK_TOP, .r15 = shadow };
	struct kvm_sregs s;

	XIOCTL(v->vcpu, KVM_GET_SREGS, &s);
	data.type = 3;
	data.selector = 16;
	data.l = 0;
	data.db = 1;
	s.cs = code;
	s.ds = s.es = s.fs = s.gs = s.ss = data;
	s.tr = task;
	s.gdt.base = GDT;
	s.gdt.limit = 31;
	s.idt.base = IDT;
	s.idt.limit = 4095;
	s.cr3 = PML4;
	s.cr4 |= 0x20;			/* PAE */
	s.cr0 |= 0x80000021u;		/* PG NE PE */
	s.cr0 &= ~0x60000000ul;		/* not CD NW */
	s.efer |= 0x500;		/* LMA LME */
	XIOCTL(v->vcpu, KVM_SET_SREGS, &s);
	XIOCTL(v->vcpu, KVM_SET_REGS, &regs);
	fill_memory(v, &s, timer, shadow);
}

/* Runs to the next port I/O; the port, or -1. */
static int run(struct vm *v)
{
	while (ioctl(v->vcpu, KVM_RUN, 0) < 0)
		if (errno != EINTR)
			die("KVM_RUN");
	if (v->run->exit_reason == KVM_EXIT_IO)
		return v->run->io.port;
	printf("STATE %s FATAL exit_reason=%u %u %#llx\n", variant, v->run->exit_reason, v->run->internal.suberror,
	       (unsigned long long)v->run->hw.hardware_exit_reason);
	return -1;
}

static uint32_t io_value(struct vm *v)
{
	uint32_t value = 0;

	memcpy(&value, (uint8_t *)v->run + v->run->io.data_offset, v->run->io.size);
	return value;
}

/* An I/O exit is complete only when the vCPU is run again. */
static void complete_io(struct vm *v)
{
	v->run->immediate_exit = 1;
	if (ioctl(v->vcpu, KVM_RUN, 0) >= 0 || errno != EINTR)
		die("KVM_RUN to complete");
	v->run->immediate_exit = 0;
}

static void print_state(void)
{
	const uint8_t *byte = (const uint8_t *)&state;

	printf("STATE %s BLOB %u\n", variant, state.h.size);
	for (uint32_t i = 0; i < state.h.size; i++)
		printf("%02x%s", byte[i], i % 64 == 63 || i + 1 == state.h.size ? "\n" : "");
	printf("STATE %s END\n", variant);
}

int main(int argc, char **argv)
{
	char before[64] = "", after[64] = "";
	struct kvm_vcpu_events events;
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	uint32_t shadow_value = 0, reason = 0;
	int port, timer, shadow;
	struct vm v;

	setvbuf(stdout, NULL, _IOLBF, 0);
	variant = argc > 1 ? argv[1] : "";
	timer = !strcmp(variant, "timer");
	shadow = !strcmp(variant, "shadow");
	kvm = open("/dev/kvm", O_RDWR);
	if (kvm < 0)
		die("/dev/kvm");
	mem = mmap(NULL, MEM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED)
		die("mmap");

	open_vm(&v);
	start(&v, timer, shadow);
	do {
		port = run(&v);
		if (port != 0x10) {
			printf("STATE %s FATAL port %#x value %#x\n", variant, port, port < 0 ? 0 : io_value(&v));
			return 1;
		}
		sprintf(before + strlen(before), "%u,", io_value(&v));
	} while (io_value(&v) != 4);
	complete_io(&v);

	state.h.size = sizeof(state);
	XIOCTL(v.vcpu, KVM_GET_NESTED_STATE, &state);
	XIOCTL(v.vcpu, KVM_GET_REGS, &regs);
	XIOCTL(v.vcpu, KVM_GET_SREGS, &sregs);
	XIOCTL(v.vcpu, KVM_GET_VCPU_EVENTS, &events);
	close_vm(&v);
	if (argc == 2) {
		print_state();
	} else {
		int file = open(argv[2], O_RDONLY);

		memset(&state, 0, sizeof(state));
		if (file < 0 || read(file, &state, sizeof(state)) < 8)
			die(argv[2]);
		close(file);
	}
	open_vm(&v);
	XIOCTL(v.vcpu, KVM_SET_SREGS, &sregs);
	XIOCTL(v.vcpu, KVM_SET_VCPU_EVENTS, &events);
	XIOCTL(v.vcpu, KVM_SET_REGS, &regs);
	XIOCTL(v.vcpu, KVM_SET_NESTED_STATE, &state);
	for (;;) {
		port = run(&v);
		if (port == 0x10)
			sprintf(after + strlen(after), "%u,", io_value(&v));
		else if (port == 0x13)
			shadow_value = io_value(&v);
		else
			break;
	}
	if (port > 0)
		reason = io_value(&v);
	close_vm(&v);
	printf("STATE %s ok=%d before=%s after=%s shadow=%#x exit=%u\n", variant,
	       port == 0x11 && reason == 18 && !strcmp(before, "0,1,2,3,4,") && !strcmp(after, "5,6,7,8,9,"),
	       before, after, shadow_value, reason);
	return 0;
}
