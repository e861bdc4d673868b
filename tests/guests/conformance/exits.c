/* What leaves a guest. The ids are the numbers of the exit reasons. */

#include "conformance.h"

/* ---- exceptions, interrupts, and what else arrives ---- */
CODE(ud2, "ud2");
CODE(bad_segment, "mov $0xf8, %eax; mov %eax, %ds");
CODE(read_absent, "mov $0x100000000, %rax; mov (%rax), %al");
CODE(write_absent, "mov $0x100000123, %rax; mov %al, (%rax)");
CODE(int3, "int3");
CODE(int1, ".byte 0xf1");
CODE(nops, "nop; nop; nop");
CODE(nmi_to_self, "mov $0xfee00300, %eax; movl $0, 0x10(%rax); movl $0x4400, (%rax); nop; nop");
CODE(interrupt_to_self, "mov $0xfee00300, %eax; movl $0x44040, (%rax); nop; nop");
CODE(init_to_self, "mov $0xfee00300, %eax; movl $0, 0x10(%rax); movl $0x4500, (%rax); nop; nop");
CODE(int_n, "int $0x30");
/* Each has a handler at its third byte. */
CODE(handled, "jmp 1f; vmcall; 1: hlt");
CODE(touch_hole, "jmp 1f; vmcall; 1: mov $0x40000008, %eax; mov (%rax), %al; hlt");
CODE(wait_for_interrupt, "jmp 1f; vmcall; 1: nop; nop; hlt");
CODE(jump_to_task, ".code32; ljmp $0x40, $0; .code64");
CODE(call_task, ".code32; lcall $0x40, $0; .code64");
CODE(spin, "1: jmp 1b");

/* ---- instructions ---- */
CODE(cpuid, "cpuid");
CODE(hlt, "hlt");
CODE(invd, "invd");
CODE(wbinvd, "wbinvd");
CODE(invlpg, "mov $0x12345678, %eax; invlpg 8(%rax)");
CODE(rdpmc, "xor %ecx, %ecx; rdpmc");
CODE(rdtsc, "rdtsc");
CODE(rdtscp, "rdtscp");
CODE(vmcall, "");
CODE(vmclear_code, "vmclear 8(%rax)");
CODE(vmlaunch_code, "vmlaunch");
CODE(vmresume_code, "vmresume");
CODE(vmptrld_code, "vmptrld 16(%rax,%rcx,2)");
CODE(vmptrst_code, "vmptrst (%rsp)");
CODE(vmread_code, "vmread %rcx, (%rax)");
CODE(vmwrite_code, "vmwrite (%rax), %rcx");
CODE(vmxoff_code, "vmxoff");
CODE(vmxon_code, "vmxon (%rbx)");
CODE(invept_code, "invept 16(%rax), %rcx");
CODE(invvpid_code, "invvpid (%rax), %rdx");
CODE(invpcid, "invpcid (%rax), %rcx");
CODE(monitor, "monitor");
CODE(mwait, "mwait");
CODE(pause, "pause");
CODE(xsetbv, "xor %ecx, %ecx; xor %edx, %edx; mov $3, %eax; xsetbv");
CODE(rdrand, "rdrand %ecx");
CODE(rdseed, "rdseed %r9");
CODE(vmfunc, "mov $5, %eax; vmfunc");

CODE(to_cr0, "mov %cr0, %rax; xor $8, %eax; mov %rax, %cr0");
CODE(clts, "clts");
CODE(lmsw, "mov $0xb, %ecx; lmsw %cx");
CODE(lmsw_memory, "movw $0xb, -8(%rsp); lmsw -8(%rsp)");
CODE(to_cr3, "mov %rax, %cr3");
CODE(to_cr3_itself, "mov %cr3, %rdx; mov %rdx, %cr3");
CODE(from_cr3, "mov %cr3, %r9");
CODE(to_cr4, "mov %cr4, %rcx; xor $4, %ecx; mov %rcx, %cr4");
CODE(to_cr8, "mov %rdx, %cr8");
CODE(from_cr8, "mov %cr8, %rbx");
CODE(to_dr7, "mov $0x400, %eax; mov %rax, %dr7");
CODE(from_dr0, "mov %dr0, %r8");

CODE(in_immediate, "in $0x60, %al");
CODE(in_word, "mov $0x1234, %edx; in %dx, %ax");
CODE(out_long, "mov $0x1234, %edx; out %eax, %dx");
CODE(outs, "mov $0x1234, %edx; mov $0x3000000, %esi; outsb");
CODE(rep_ins, "mov $0x1234, %edx; mov $0x3000000, %edi; mov $3, %ecx; rep insw");
CODE(read_msr, "mov $0x277, %ecx; rdmsr");
CODE(write_msr, "mov $0x174, %ecx; mov $8, %eax; xor %edx, %edx; wrmsr");
CODE(read_high_msr, "mov $0xc0000080, %ecx; rdmsr");
CODE(read_other_msr, "mov $0x40000000, %ecx; rdmsr");

CODE(sgdt, "sgdt -16(%rsp)");
CODE(lidt, "lidt -16(%rsp)");
CODE(sldt, "sldt %eax");
CODE(str, "str -16(%rsp)");
CODE(lldt, "xor %eax, %eax; lldt %ax");
CODE(ltr, "mov $0x30, %eax; ltr %ax");

/* ---- memory ---- */
CODE(read_hole, "mov $0x40000008, %eax; mov (%rax), %al");
CODE(write_hole, "mov $0x40000008, %eax; mov %al, (%rax)");
CODE(call_hole, "mov $0x40000008, %eax; jmp *%rax");
CODE(read_apic, "mov $0x3000030, %eax; mov (%rax), %ecx");
CODE(write_apic, "mov $0x30000f0, %eax; movl $0x1ff, (%rax)");
CODE(write_eoi, "mov $0x30000b0, %eax; movl $0, (%rax)");
CODE(read_apic_id, "mov $0x3000020, %eax; mov (%rax), %eax");
CODE(read_apic_tpr, "mov $0x3000080, %eax; mov (%rax), %eax");
CODE(read_x2apic_tpr, "mov $0x808, %ecx; rdmsr");
CODE(read_cr8, "mov %cr8, %rax");
CODE(read_cr0, "mov %cr0, %rax");
CODE(read_cr4, "mov %cr4, %rax");
CODE(switch_ept, "xor %eax, %eax; mov $1, %ecx; vmfunc; mov $0x40000008, %eax; mov (%rax), %eax");
CODE(switch_ept_beyond, "xor %eax, %eax; mov $512, %ecx; vmfunc");
CODE(shadow_fields, "mov $0x681e, %ecx; mov $0x1234, %eax; vmwrite %rax, %rcx; xor %eax, %eax; vmread %rcx, %rax");
CODE(pauses, "1: pause; jmp 1b");
CODE(lower_cr8, "mov $2, %eax; mov %rax, %cr8");

static void hole(u64 entry)
{
	ept[4][0] = entry;
}

#define HOLE_IS(name, entry)                                                                                               \
	static void name(void)                                                                                             \
	{                                                                                                                  \
		hole(entry);                                                                                               \
	}
HOLE_IS(read_only, SPARE | 1)
HOLE_IS(execute_only, SPARE | 4)
HOLE_IS(no_execute, SPARE | 3)
HOLE_IS(write_only, SPARE | 2)
HOLE_IS(bad_type, SPARE | 7 | 2 << 3)
HOLE_IS(beyond, BEYOND | 7 | 6 << 3)
HOLE_IS(good_page, SPARE | 7 | 6 << 3)

/* All of L1's pages are user pages, whose execution bit 10 allows at every level. */
static void supervisor_execute(void)
{
	for (int n = 0; n < 512; n++)
		for (int table = 0; table < 4; table++)
			if (ept[table][n])
				ept[table][n] |= 1 << 10;
	hole(SPARE | 7 | 6 << 3);
}

/* A directory entry of a page of 2 MiB whose address is not aligned so. */
static void bad_large_page(void)
{
	ept[3][0] = 0x1000 | 7 | 6 << 3 | 1 << 7;
}

/* Guest paging whose root lies in HOLE. */
static void root_in_hole(void)
{
	vmwrite(GUEST_CR3, HOLE);
}

static void root_in_hole_flags(void)
{
	root_in_hole();
	vmwrite(EPT_POINTER, vmread(EPT_POINTER) | 1 << 6);
}

/* The log is full when its index is negative. */
static void full_log(void)
{
	good_page();
	vmwrite(EPT_POINTER, vmread(EPT_POINTER) | 1 << 6);
	vmwrite(GUEST_PML_INDEX, 0xffff);
}

static void one_port(void)
{
	bitmap[0x60 / 8] = 1 << (0x60 % 8);
}

static void one_msr(void)
{
	bitmap[8192 + 1024 + 0x80 / 8] = 1; /* reads of C0000080H */
}

static void cr3_target(void)
{
	vmwrite(CR3_TARGET_COUNT, 1);
	vmwrite(CR3_TARGET_VALUE0, vmread(GUEST_CR3));
}

/* Virtual interrupt 40H is in service. */
static void in_service(void)
{
	*(u32 *)(page + 0x120) = 1;
	vmwrite(GUEST_INTR_STATUS, 0x4000);
	vmwrite(EOI_EXIT_BITMAP1, 1);
}

static void high_priority(void)
{
	*(u32 *)(page + 0x80) = 0x40;
}

/* A handler at the third byte of the guest's code. */
static void handler(u32 vector)
{
	u64 at = vmread(GUEST_RIP) + 2, *gate = (u64 *)(SPARE + 0x7000) + 2 * vector;
	gate[0] = (at & 0xffff) | 8 << 16 | 0x8eull << 40 | (at & 0xffff0000) << 32;
	gate[1] = at >> 32;
	vmwrite(GUEST_IDTR_BASE, SPARE + 0x7000);
	vmwrite(GUEST_IDTR_LIMIT, 0xfff);
}

static void handler_of_ud(void)
{
	handler(6);
}

static void handler_of_ve(void)
{
	handler(20);
}

/* A task gate for INT 30H. */
static void task_gate(void)
{
	((u64 *)(SPARE + 0x7000))[0x30] = 0x40 << 16 | 0x85ull << 40;
	vmwrite(GUEST_IDTR_BASE, SPARE + 0x7000);
	vmwrite(GUEST_IDTR_LIMIT, 0x7ff);
}

/* Virtual interrupt 40H is requested. */
static void requested(void)
{
	handler(0x40);
	*(u32 *)(page + 0x220) = 1;
	vmwrite(GUEST_INTR_STATUS, 0x40);
}

/* The fields of another VMCS, which the guest may use. */
static void shadow(void)
{
	*(u32 *)other_page = revision | 1u << 31;
	vmclear((u64)other_page);
	vmwrite(VMCS_LINK_POINTER, (u64)other_page);
}

static void shadow_but_rip(void)
{
	shadow();
	((u8 *)SPARE)[0x4000 + (GUEST_RIP & 0x7fff) / 8] = 1 << GUEST_RIP % 8;
}

/* The second EPT of the list has a page in HOLE. */
static void two_epts(void)
{
	static u64 __attribute__((aligned(4096))) second[3][512];
	second[0][0] = (u64)second[1] | 7;
	second[1][0] = (u64)ept[2] | 7;
	second[1][1] = (u64)second[2] | 7;
	second[2][0] = SPARE | 7 | 6 << 3 | 1 << 7;
	u64 *list = (u64 *)(SPARE + 0x3000);
	list[0] = (u64)ept | 3 << 3 | 6;
	list[1] = (u64)second | 3 << 3 | 6;
}

static void virtual_registers(void)
{
	*(u32 *)(page + 0x20) = 0x07000000;
	*(u32 *)(page + 0x80) = 0x50;
}

/* What arrived and was not acknowledged is still waiting. */
static void take_interrupt(void)
{
	__asm__ volatile("sti; nop; nop; cli" ::: "memory");
}

/* What was acknowledged is in service. */
static void end_of_interrupt(void)
{
	*(volatile u32 *)0xfee000b0 = 0;
	take_interrupt();
}

#define BITMAP(vector) {EXCEPTION_BITMAP, 1u << vector}
#define IF {GUEST_RFLAGS, 0x202}
#define INJECT(value) {VM_ENTRY_INTR_INFO_FIELD, value}
#define IDT_LIMIT {GUEST_IDTR_LIMIT, 0xfff}

const struct check exit_checks[] = {
	{"P002", "VMLAUNCH in a guest", .guest = vmlaunch_code},
	{"P002", "VMRESUME in a guest", .guest = vmresume_code},
	{"0", "#UD", .guest = ud2, .set = {BITMAP(6)}, .show = EVENT | RIP},
	{"0", "#GP with an error code", .guest = bad_segment, .set = {BITMAP(13)}, .show = EVENT | RIP},
	{"0", "#PF of a read", .guest = read_absent, .set = {BITMAP(14)}, .show = EVENT | RIP},
	{"0", "#PF of a write", .guest = write_absent, .set = {BITMAP(14)}, .show = EVENT | RIP},
	{"0", "#PF of a write, by its error code", .guest = write_absent, .set = {BITMAP(14), {PAGE_FAULT_ERROR_CODE_MASK, 2}, {PAGE_FAULT_ERROR_CODE_MATCH, 2}}, .show = EVENT},
	{"0", "#PF of a read, not selected by its error code", .guest = read_absent, .set = {BITMAP(14), {PAGE_FAULT_ERROR_CODE_MASK, 2}, {PAGE_FAULT_ERROR_CODE_MATCH, 2}}},
	{"0", "INT3", .guest = int3, .set = {BITMAP(3)}, .show = EVENT | LENGTH | RIP},
	{"0", "INT1", .guest = int1, .set = {BITMAP(1)}, .show = EVENT | LENGTH | RIP},
	{"0", "single step", .guest = nops, .set = {BITMAP(1), {GUEST_RFLAGS, 0x102}}, .show = EVENT | RIP},
	{"0", "#DF", .guest = ud2, .set = {BITMAP(8)}, .show = EVENT},
	{"0", "#PF in the delivery of an injected #UD", .guest = nops, .set = {BITMAP(14), INJECT(0x80000306), {GUEST_IDTR_BASE, 1ull << 32}, IDT_LIMIT}, .show = EVENT | VECTORING | RIP},
	{"0", "#GP in the delivery of INT n", .guest = int_n, .set = {BITMAP(13)}, .show = EVENT | VECTORING | LENGTH | RIP},
	{"0", "#GP in the delivery of an injected interrupt", .guest = nops, .set = {BITMAP(13), INJECT(0x80000020), IF}, .show = EVENT | VECTORING | RIP},
	{"0", "NMI", .guest = nmi_to_self, .on.pin = P_NMI, .show = EVENT},
	{"1", "external interrupt, not acknowledged", .guest = interrupt_to_self, .on.pin = P_EXTINT, .off.exit = X_ACK, .show = EVENT, .after = take_interrupt},
	{"1", "external interrupt, acknowledged", .guest = interrupt_to_self, .on = {.pin = P_EXTINT, .exit = X_ACK}, .show = EVENT, .after = end_of_interrupt},
	{"2", "triple fault", .guest = ud2, .show = VECTORING | RIP},
	{"7", "interrupt window", .guest = nops, .on.proc1 = INTWIN, .set = {IF}, .show = RIP},
	{"7", "interrupt window behind STI", .guest = nops, .on.proc1 = INTWIN, .set = {IF, {GUEST_INTERRUPTIBILITY_INFO, 1}}, .show = RIP},
	{"7", "no interrupt window with IF 0", .guest = nops, .on.proc1 = INTWIN, .show = RIP},
	{"8", "NMI window", .guest = nops, .on = {.pin = P_NMI | P_VNMI, .proc1 = NMIWIN}, .show = RIP},
	{"8", "no NMI window while NMIs are blocked", .guest = nops, .on = {.pin = P_NMI | P_VNMI, .proc1 = NMIWIN}, .set = {{GUEST_INTERRUPTIBILITY_INFO, 8}}, .show = RIP},
	{"9", "JMP to a task", PAE32, .guest = jump_to_task, .show = LENGTH | RIP},
	{"9", "CALL of a task", PAE32, .guest = call_task, .show = LENGTH | RIP},
	{"9", "INT n through a task gate", PAE32, .guest = int_n, .more = task_gate, .show = LENGTH | VECTORING | RIP},
	{"10", "CPUID", .guest = cpuid, .show = LENGTH},
	{"12", "HLT", .guest = hlt, .on.proc1 = HLTX, .show = LENGTH},
	{"13", "INVD", .guest = invd, .show = LENGTH},
	{"14", "INVLPG", .guest = invlpg, .on.proc1 = INVLPGX, .show = LENGTH},
	{"14", "INVLPG, not asked for", .guest = invlpg, .off.proc1 = INVLPGX},
	{"15", "RDPMC", .guest = rdpmc, .on.proc1 = RDPMCX, .show = LENGTH},
	{"16", "RDTSC", .guest = rdtsc, .on.proc1 = RDTSCX, .show = LENGTH},
	{"16", "RDTSC, not asked for", .guest = rdtsc},
	{"18", "VMCALL", .guest = vmcall, .show = LENGTH},
	{"18", "an injected #UD reaches its handler, though it is in the bitmap", .guest = handled, .on.proc1 = HLTX, .set = {BITMAP(6), INJECT(0x80000306)}, .more = handler_of_ud, .show = RIP},
	{"18", "CR0 with a read shadow", .guest = read_cr0, .set = {{CR0_GUEST_HOST_MASK, 0x2c}, {CR0_READ_SHADOW, 0xc}}, .show = RAX},
	{"18", "CR4 with a read shadow", .guest = read_cr4, .set = {{CR4_GUEST_HOST_MASK, 0x42000}, {CR4_READ_SHADOW, 0x800}}, .show = RAX},
	{"18", "CR8 with a TPR shadow", .guest = read_cr8, .on.proc1 = TPRSHADOW, .off.proc1 = CR8STORE, .more = virtual_registers, .show = RAX},
	{"18", "the virtual TPR in the APIC page", .guest = read_apic_tpr, .on = {.proc1 = TPRSHADOW, .proc2 = APICACCESS}, .more = virtual_registers, .show = RAX},
	{"18", "the virtual TPR in x2APIC mode", .guest = read_x2apic_tpr, .on = {.proc1 = TPRSHADOW | MSRBITMAPS, .proc2 = X2APIC}, .more = virtual_registers, .show = RAX},
	{"18", "a virtual APIC register", .guest = read_apic_id, .on = {.proc1 = TPRSHADOW, .proc2 = APICACCESS | APICREGS}, .more = virtual_registers, .show = RAX},
	{"18", "a virtual interrupt at the entry", .guest = wait_for_interrupt, .on = {.pin = P_EXTINT, .proc1 = TPRSHADOW | HLTX, .proc2 = VID}, .set = {IF}, .more = requested, .show = RIP},
	{"18", "no virtual interrupt with IF 0", .guest = wait_for_interrupt, .on = {.pin = P_EXTINT, .proc1 = TPRSHADOW | HLTX, .proc2 = VID}, .more = requested, .show = RIP},
	{"18", "VMWRITE and VMREAD of a shadow VMCS", .guest = shadow_fields, .on.proc2 = SHADOWING, .more = shadow, .show = RAX},
	{"18", "VMFUNC to an EPT with a page", .guest = switch_ept, .on.proc2 = EPT | VMFUNC, .set = {{VM_FUNCTION_CONTROL, 1}}, .more = two_epts},
	{"19", "VMCLEAR", .guest = vmclear_code, .show = LENGTH | INFO},
	{"20", "VMLAUNCH", .guest = vmlaunch_code, .show = LENGTH},
	{"21", "VMPTRLD", .guest = vmptrld_code, .show = LENGTH | INFO},
	{"22", "VMPTRST", .guest = vmptrst_code, .show = LENGTH | INFO},
	{"23", "VMREAD", .guest = vmread_code, .show = LENGTH | INFO},
	{"23", "VMREAD with shadowing, by the bitmap", .guest = shadow_fields, .on.proc2 = SHADOWING, .more = shadow_but_rip, .show = LENGTH},
	{"24", "VMRESUME", .guest = vmresume_code, .show = LENGTH},
	{"25", "VMWRITE", .guest = vmwrite_code, .show = LENGTH | INFO},
	{"26", "VMXOFF", .guest = vmxoff_code, .show = LENGTH},
	{"27", "VMXON", .guest = vmxon_code, .show = LENGTH | INFO},
	{"28", "MOV to CR0", .guest = to_cr0, .set = {{CR0_GUEST_HOST_MASK, 8}}, .show = LENGTH},
	{"28", "MOV to CR0 that changes no masked bit", .guest = to_cr0, .set = {{CR0_GUEST_HOST_MASK, 4}}},
	{"28", "CLTS", .guest = clts, .set = {{CR0_GUEST_HOST_MASK, 8}, {CR0_READ_SHADOW, 8}}, .show = LENGTH},
	{"28", "LMSW from a register", .guest = lmsw, .set = {{CR0_GUEST_HOST_MASK, 8}}, .show = LENGTH},
	{"28", "LMSW from memory", .guest = lmsw_memory, .set = {{CR0_GUEST_HOST_MASK, 8}}, .show = LENGTH | LINEAR},
	{"28", "MOV to CR3", .guest = to_cr3, .on.proc1 = CR3LOAD, .show = LENGTH},
	{"28", "MOV to CR3 of a target", .guest = to_cr3_itself, .on.proc1 = CR3LOAD, .off.proc1 = CR3STORE, .more = cr3_target},
	{"28", "MOV from CR3", .guest = from_cr3, .on.proc1 = CR3STORE, .show = LENGTH},
	{"28", "MOV to CR4", .guest = to_cr4, .set = {{CR4_GUEST_HOST_MASK, 4}}, .show = LENGTH},
	{"28", "MOV to CR8", .guest = to_cr8, .on.proc1 = CR8LOAD, .show = LENGTH},
	{"28", "MOV from CR8", .guest = from_cr8, .on.proc1 = CR8STORE, .show = LENGTH},
	{"29", "MOV to DR7", .guest = to_dr7, .on.proc1 = MOVDRX, .show = LENGTH},
	{"29", "MOV from DR0", .guest = from_dr0, .on.proc1 = MOVDRX, .show = LENGTH},
	{"30", "IN of a byte", .guest = in_immediate, .on.proc1 = IOX, .show = LENGTH},
	{"30", "IN of a word", .guest = in_word, .on.proc1 = IOX, .show = LENGTH},
	{"30", "OUT of a doubleword", .guest = out_long, .on.proc1 = IOX, .show = LENGTH},
	{"30", "OUTS", .guest = outs, .on.proc1 = IOX, .show = LENGTH | INFO | LINEAR},
	{"30", "REP INS", .guest = rep_ins, .on.proc1 = IOX, .show = LENGTH | LINEAR},
	{"30", "IN, by the bitmap", .guest = in_immediate, .on.proc1 = IOBITMAPS, .more = one_port},
	{"30", "IN, not in the bitmap", .guest = in_immediate, .on.proc1 = IOBITMAPS},
	{"31", "RDMSR", .guest = read_msr, .show = LENGTH},
	{"31", "RDMSR, by the bitmap", .guest = read_high_msr, .on.proc1 = MSRBITMAPS, .more = one_msr},
	{"31", "RDMSR, not in the bitmap", .guest = read_high_msr, .on.proc1 = MSRBITMAPS},
	{"31", "RDMSR of an MSR that has no place in the bitmap", .guest = read_other_msr, .on.proc1 = MSRBITMAPS},
	{"32", "WRMSR", .guest = write_msr, .show = LENGTH},
	{"36", "MWAIT", .guest = mwait, .on.proc1 = MWAITX, .show = LENGTH},
	{"37", "monitor trap flag", .guest = nops, .on.proc1 = MTF, .show = RIP},
	{"37", "monitor trap flag, injected", .guest = nops, .set = {{VM_ENTRY_INTR_INFO_FIELD, 0x80000700}}, .on.proc1 = MTF, .show = RIP},
	{"39", "MONITOR", .guest = monitor, .on.proc1 = MONITORX, .show = LENGTH},
	{"40", "PAUSE", .guest = pause, .on.proc1 = PAUSEX, .show = LENGTH},
	{"40", "PAUSE in a loop", .guest = pauses, .on = {.proc2 = PLE}, .off.proc1 = PAUSEX, .set = {{PLE_GAP, 0x10000}, {PLE_WINDOW, 0x100}}, .show = LENGTH},
	{"43", "TPR below its threshold", .guest = lower_cr8, .on.proc1 = TPRSHADOW, .off.proc1 = CR8LOAD, .set = {{TPR_THRESHOLD, 3}}, .more = high_priority},
	{"44", "read of the APIC page", .guest = read_apic, .on = {.proc1 = TPRSHADOW, .proc2 = APICACCESS}},
	{"44", "write to the APIC page", .guest = write_apic, .on = {.proc1 = TPRSHADOW, .proc2 = APICACCESS}},
	{"45", "virtualized EOI", .guest = write_eoi, .on = {.pin = P_EXTINT, .proc1 = TPRSHADOW, .proc2 = APICACCESS | VID}, .more = in_service},
	{"46", "SGDT", .guest = sgdt, .on.proc2 = DTX, .show = LENGTH},
	{"46", "LIDT", .guest = lidt, .on.proc2 = DTX, .show = LENGTH},
	{"47", "SLDT", .guest = sldt, .on.proc2 = DTX, .show = LENGTH},
	{"47", "STR", .guest = str, .on.proc2 = DTX, .show = LENGTH},
	{"47", "LLDT", .guest = lldt, .on.proc2 = DTX, .show = LENGTH},
	{"47", "LTR", .guest = ltr, .on.proc2 = DTX, .show = LENGTH},
	{"48", "read of no page", .guest = read_hole, .on.proc2 = EPT, .show = PHYSICAL | LINEAR},
	{"48", "write to no page", .guest = write_hole, .on.proc2 = EPT, .show = PHYSICAL | LINEAR},
	{"48", "fetch from no page", .guest = call_hole, .on.proc2 = EPT, .show = PHYSICAL | LINEAR},
	{"48", "read of no page, and what guest paging says of it", .guest = read_hole, .on.proc2 = EPT, .show = PAGE},
	{"48", "write to a read-only page", .guest = write_hole, .on.proc2 = EPT, .more = read_only, .show = PHYSICAL},
	{"48", "read of an execute-only page", .guest = read_hole, .on.proc2 = EPT, .more = execute_only, .show = PHYSICAL},
	{"48", "fetch from a page without execution", .guest = call_hole, .on.proc2 = EPT, .more = no_execute, .show = PHYSICAL},
	{"48", "write to a good page", .guest = write_hole, .on.proc2 = EPT, .more = good_page},
	{"48", "page walk through no page", .guest = vmcall, .on.proc2 = EPT, .more = root_in_hole, .show = PHYSICAL},
	{"48", "page walk through no page, with accessed and dirty flags", .guest = vmcall, .on.proc2 = EPT, .more = root_in_hole_flags, .show = PHYSICAL},
	{"48", "fetch from a user page that only the supervisor may execute", .guest = call_hole, .on.proc2 = EPT | MBEC, .more = supervisor_execute, .show = PHYSICAL},
	{"48", "read of no page, as a virtualization exception", .guest = touch_hole, .on = {.proc1 = HLTX, .proc2 = EPT | VE}, .more = handler_of_ve, .show = RIP},
	{"48", "delivery of an injected #UD through no page", .guest = nops, .on.proc2 = EPT, .set = {INJECT(0x80000306), {GUEST_IDTR_BASE, HOLE}, IDT_LIMIT}, .show = PHYSICAL | VECTORING | RIP},
	{"48", "delivery of an injected interrupt through no page", .guest = nops, .on.proc2 = EPT, .set = {INJECT(0x80000020), IF, {GUEST_IDTR_BASE, HOLE}, IDT_LIMIT}, .show = PHYSICAL | VECTORING | RIP},
	{"48", "delivery of an injected NMI through no page", .guest = nops, .on.proc2 = EPT, .set = {INJECT(0x80000202), {GUEST_IDTR_BASE, HOLE}, IDT_LIMIT}, .show = PHYSICAL | VECTORING | RIP},
	{"48", "delivery of INT n through no page", .guest = int_n, .on.proc2 = EPT, .set = {{GUEST_IDTR_BASE, HOLE}, IDT_LIMIT}, .show = PHYSICAL | VECTORING | LENGTH | RIP},
	{"48", "delivery of INT3 through no page", .guest = int3, .on.proc2 = EPT, .set = {{GUEST_IDTR_BASE, HOLE}, IDT_LIMIT}, .show = PHYSICAL | VECTORING | LENGTH | RIP},
	{"49", "a page that can only be written", .guest = read_hole, .on.proc2 = EPT, .more = write_only, .show = PHYSICAL},
	{"49", "a page of memory type 2", .guest = read_hole, .on.proc2 = EPT, .more = bad_type, .show = PHYSICAL},
	{"49", "a page beyond the physical width", .guest = read_hole, .on.proc2 = EPT, .more = beyond, .show = PHYSICAL},
	{"49", "a page of 2 MiB that is not aligned", .guest = read_hole, .on.proc2 = EPT, .more = bad_large_page, .show = PHYSICAL},
	{"50", "INVEPT", .guest = invept_code, .on.proc2 = EPT, .show = LENGTH | INFO},
	{"51", "RDTSCP", .guest = rdtscp, .on = {.proc1 = RDTSCX, .proc2 = RDTSCP}, .show = LENGTH},
	{"52", "preemption timer", .guest = spin, .on.pin = P_TIMER, .set = {{VMX_PREEMPTION_TIMER_VALUE, 10}}, .show = RIP},
	{"52", "preemption timer of 0", .guest = nops, .on.pin = P_TIMER, .show = RIP},
	{"52", "preemption timer, saved", .guest = spin, .on = {.pin = P_TIMER, .exit = X_SAVETIMER}, .set = {{VMX_PREEMPTION_TIMER_VALUE, 10}}, .show = TIMER},
	{"52", "preemption timer in HLT", .guest = nops, .on.pin = P_TIMER, .set = {{VMX_PREEMPTION_TIMER_VALUE, 10}, {GUEST_ACTIVITY_STATE, 1}}, .show = RIP | ACTIVITY},
	{"52", "preemption timer in shutdown", .guest = nops, .on.pin = P_TIMER, .set = {{VMX_PREEMPTION_TIMER_VALUE, 10}, {GUEST_ACTIVITY_STATE, 2}}, .show = RIP | ACTIVITY},
	{"53", "INVVPID", .guest = invvpid_code, .on.proc2 = VPID, .show = LENGTH | INFO},
	{"54", "WBINVD", .guest = wbinvd, .on.proc2 = WBINVDX, .show = LENGTH},
	{"55", "XSETBV", .guest = xsetbv, .show = LENGTH},
	{"56", "APIC write", .guest = write_apic, .on = {.proc1 = TPRSHADOW, .proc2 = APICACCESS | APICREGS}},
	{"57", "RDRAND", .guest = rdrand, .on.proc2 = RDRANDX, .show = LENGTH | RANDOM},
	{"58", "INVPCID", .guest = invpcid, .on = {.proc1 = INVLPGX, .proc2 = INVPCID}, .show = LENGTH | INFO},
	{"59", "VMFUNC", .guest = vmfunc, .on.proc2 = VMFUNC, .show = LENGTH},
	{"59", "VMFUNC beyond the list", .guest = switch_ept_beyond, .on.proc2 = EPT | VMFUNC, .set = {{VM_FUNCTION_CONTROL, 1}}, .more = two_epts, .show = LENGTH},
	{"61", "RDSEED", .guest = rdseed, .on.proc2 = RDSEEDX, .show = LENGTH | RANDOM},
	{"62", "full page-modification log", .guest = write_hole, .on.proc2 = EPT | PML, .more = full_log},
	/* Last: a processor that does not obey starts again. */
	{"3", "INIT", .guest = init_to_self},
};
const unsigned exit_count = COUNT(exit_checks);
