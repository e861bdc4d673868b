/* The machine's state, printing, and the way a case is run. */

#include "conformance.h"

u32 revision, physical_bits;
static const char *command_line = "";
#define ALIGNED __attribute__((aligned(4096)))
u8 ALIGNED vmxon_page[4096], vmcs_page[4096], other_page[4096], bitmap[3 * 4096], page[4096];
u8 ALIGNED msr_list[16 * 600];
/* One to one but for HOLE: four levels, the first GiB in pages of 2 MiB. */
u64 ALIGNED ept[5][512];
u64 ALIGNED pae_pointers[512];
static u64 ALIGNED pae_directory[512];

CODE(vmcall_code, "");

/* ---- printing ---- */

static void put(char c)
{
	while (!(inb(0x3fd) & 0x20))
		;
	outb(0x3f8, c);
}

void say(const char *text)
{
	while (*text)
		put(*text++);
}

void say_number(u64 n)
{
	if (n >= 10)
		say_number(n / 10);
	put('0' + n % 10);
}

static void digits(u64 n)
{
	if (n >= 16)
		digits(n >> 4);
	put("0123456789abcdef"[n & 15]);
}

void say_hex(u64 n)
{
	if (n >= 10)
		say("0x");
	digits(n);
}

/* Whether the command line has a word made of two parts. */
static int asked(const char *first, const char *id)
{
	for (const char *at = command_line; *at; at++) {
		const char *word = first, *rest = at;
		while (*word && *rest == *word)
			word++, rest++;
		if (*word)
			continue;
		const char *wanted = id;
		while (*wanted && *rest == *wanted)
			wanted++, rest++;
		if (!*wanted && (!*rest || *rest == ' '))
			return 1;
	}
	return 0;
}

/* A line is: id, what was done, a colon, what was observed. False when the line is to end here. */
int begin(const char *id, const char *what)
{
	say(id);
	put(' ');
	say(what);
	say(": ");
	/* What the machine does not survive can be left out. */
	if (!asked("skip=", id))
		return 1;
	say("skipped\n");
	return 0;
}

void absent(const char *what, int bit)
{
	say("absent ");
	say(what);
	if (bit >= 0) {
		put('.');
		say_number(bit);
	}
	put('\n');
}

/* VMfail and its error number; nothing else. */
static int failed(u64 flags)
{
	if (flags & 1)
		say("VMfailInvalid");
	else if (flags & 0x40) {
		say("VMfail ");
		say_number(vmread(VM_INSTRUCTION_ERROR));
	} else
		return 0;
	return 1;
}

void outcome_of_instruction(u64 flags)
{
	if (!failed(flags))
		say("succeeds");
	put('\n');
}

static void part(const char *name, u64 value)
{
	put(' ');
	say(name);
	put(' ');
	say_hex(value);
}

static void outcome(u64 flags, const struct check *check)
{
	if (failed(flags)) {
		put('\n');
		return;
	}
	u64 reason = vmread(VM_EXIT_REASON);
	if (reason == 18 && !check->guest) {
		say("enters\n");
		return;
	}
	say("exit ");
	say_number(reason & 0xffff);
	u64 qualification = vmread(EXIT_QUALIFICATION);
	if ((reason & 0xffff) == 48 && !(check->show & PAGE))
		qualification &= ~0xe00ull;
	part("qualification", qualification);
	if (check->show & LENGTH)
		part("length", vmread(VM_EXIT_INSTRUCTION_LEN));
	if (check->show & INFO)
		part("information", vmread(VMX_INSTRUCTION_INFO));
	if (check->show & RANDOM)
		part("information", vmread(VMX_INSTRUCTION_INFO) & 0x1878);
	if (check->show & EVENT) {
		u64 event = vmread(VM_EXIT_INTR_INFO);
		part("event", event);
		if (event & 0x800)
			part("error", vmread(VM_EXIT_INTR_ERROR_CODE));
	}
	if (check->show & VECTORING)
		part("vectoring", vmread(IDT_VECTORING_INFO_FIELD));
	if (check->show & PHYSICAL)
		part("physical", vmread(GUEST_PHYSICAL_ADDRESS));
	if (check->show & LINEAR)
		part("linear", vmread(GUEST_LINEAR_ADDRESS));
	if (check->show & RIP)
		part("rip", vmread(GUEST_RIP) - (u64)(check->guest ? check->guest : vmcall_code));
	if (check->show & RAX)
		part("rax", guest_rax);
	if (check->show & ACTIVITY)
		part("activity", vmread(GUEST_ACTIVITY_STATE));
	if (check->show & TIMER)
		part("timer", vmread(VMX_PREEMPTION_TIMER_VALUE));
	/* Bit 31 is for the three reasons that are failures of the entry. */
	u64 kind = reason & 0xffff;
	if ((kind == 33 || kind == 34 || kind == 41 ? 1ull << 31 : 0) != (reason & ~0xffffull))
		part("of reason", reason);
	put('\n');
}

/* ---- controls ---- */

/* What may be 1, and what must be, of a capability MSR. */
static u32 allowed1(u32 msr)
{
	return rdmsr(msr) >> 32;
}

static u32 allowed0(u32 msr)
{
	return rdmsr(msr);
}

/* The MSR that tells all where the processor has it. */
static u32 true_msr(u32 msr)
{
	return rdmsr(0x480) >> 55 & 1 ? msr + 0xc : msr;
}

static int has_proc2(void)
{
	return allowed1(true_msr(0x482)) >> 31;
}

/* Prints that a control is absent when `wanted` has a bit that may not be 1. */
static int lacks(const char *name, u32 wanted, u32 may)
{
	u32 missing = wanted & ~may;
	if (!missing)
		return 0;
	absent(name, __builtin_ctz(missing));
	return 1;
}

static int controls_missing(const struct controls *on)
{
	u32 proc1 = allowed1(true_msr(0x482)), exit = allowed1(true_msr(0x483));
	return lacks("pin", on->pin, allowed1(true_msr(0x481))) || lacks("proc1", on->proc1, proc1) ||
	       lacks("proc2", on->proc2, has_proc2() ? allowed1(0x48b) : 0) ||
	       lacks("proc3", on->proc3, proc1 & TERTIARY ? rdmsr(0x492) : 0) || lacks("exit", on->exit, exit) ||
	       lacks("exit2", on->exit2, exit & X_SECONDARY ? rdmsr(0x493) : 0) ||
	       lacks("entry", on->entry, allowed1(true_msr(0x484)));
}

/* ---- a good VMCS ---- */

static void fields(const struct set *sets, unsigned count)
{
	for (unsigned n = 0; n < count; n++)
		vmwrite(sets[n].field, sets[n].value);
}

static u64 cr(int n)
{
	u64 value;
	switch (n) {
	case 0: __asm__("mov %%cr0, %0" : "=r"(value)); break;
	case 3: __asm__("mov %%cr3, %0" : "=r"(value)); break;
	default: __asm__("mov %%cr4, %0" : "=r"(value)); break;
	}
	return value;
}

static void clear(void *at, unsigned size)
{
	for (u8 *byte = at; size--; byte++)
		*byte = 0;
}

static void extended_page_tables(void)
{
	clear(ept, sizeof ept);
	ept[0][0] = (u64)ept[1] | 7;
	ept[1][0] = (u64)ept[2] | 7;
	ept[1][1] = (u64)ept[3] | 7; /* HOLE, and what cases put there */
	ept[1][3] = 3ull << 30 | 7 | 1 << 7; /* the local APIC, uncached */
	ept[3][0] = (u64)ept[4] | 7;
	for (u64 n = 0; n < 512; n++)
		ept[2][n] = n << 21 | 7 | 6 << 3 | 1 << 7;
}

static void control_fields(enum mode mode, const struct controls *on, const struct controls *off)
{
	u32 proc1 = on->proc1, proc2 = on->proc2, exit = on->exit | X_HOST64, entry = on->entry;
	if (mode == REAL)
		proc2 |= EPT | UNRESTRICTED;
	if (proc2)
		proc1 |= SECONDARY;
	if (on->proc3)
		proc1 |= TERTIARY;
	if (on->exit2)
		exit |= X_SECONDARY;
	if (mode == LONG64)
		entry |= E_LONG;
	const struct set sets[] = {
		{PIN_BASED_VM_EXEC_CONTROL, (on->pin | allowed0(true_msr(0x481))) & ~off->pin},
		{CPU_BASED_VM_EXEC_CONTROL, (proc1 | allowed0(true_msr(0x482))) & ~off->proc1},
		{SECONDARY_VM_EXEC_CONTROL, proc2 & ~off->proc2},
		{TERTIARY_VM_EXEC_CONTROL, on->proc3},
		{VM_EXIT_CONTROLS, (exit | allowed0(true_msr(0x483))) & ~off->exit},
		{SECONDARY_VM_EXIT_CONTROLS, on->exit2},
		{VM_ENTRY_CONTROLS, (entry | allowed0(true_msr(0x484))) & ~off->entry},
		{IO_BITMAP_A, (u64)bitmap},
		{IO_BITMAP_B, (u64)bitmap + 4096},
		{MSR_BITMAP, (u64)bitmap + 8192},
		{EPT_POINTER, (u64)ept | 3 << 3 | 6},
		{VIRTUAL_PROCESSOR_ID, 1},
		{VIRTUAL_APIC_PAGE_ADDR, (u64)page},
		{APIC_ACCESS_ADDR, SPARE},
		{POSTED_INTR_DESC_ADDR, SPARE + 0x1000},
		{PML_ADDRESS, SPARE + 0x2000},
		{EPTP_LIST_ADDRESS, SPARE + 0x3000},
		{VMREAD_BITMAP, SPARE + 0x4000},
		{VMWRITE_BITMAP, SPARE + 0x5000},
		{VE_INFORMATION_ADDRESS, SPARE + 0x6000},
		{TSC_MULTIPLIER, 1ull << 48},
		{XSS_EXIT_BITMAP, ~0ull},
		{VMCS_LINK_POINTER, ~0ull},
		{VM_ENTRY_MSR_LOAD_ADDR, (u64)msr_list},
		{VM_EXIT_MSR_LOAD_ADDR, (u64)msr_list},
		{VM_EXIT_MSR_STORE_ADDR, (u64)msr_list},
	};
	fields(sets, COUNT(sets));
}

static void host_fields(void)
{
	const struct set sets[] = {
		{HOST_CS_SELECTOR, 8},	       {HOST_SS_SELECTOR, 16},	  {HOST_DS_SELECTOR, 16},
		{HOST_ES_SELECTOR, 16},	       {HOST_TR_SELECTOR, 0x30},  {HOST_CR0, cr(0)},
		{HOST_CR3, cr(3)},	       {HOST_CR4, cr(4)},	  {HOST_GDTR_BASE, (u64)gdt},
		{HOST_IDTR_BASE, (u64)idt},    {HOST_TR_BASE, (u64)tss},  {HOST_RIP, (u64)exited},
		{HOST_IA32_PAT, rdmsr(0x277)}, {HOST_IA32_EFER, rdmsr(0xc0000080)},
	};
	fields(sets, COUNT(sets));
}

static void guest_fields(enum mode mode)
{
	static const u32 ar[] = {GUEST_ES_AR_BYTES, GUEST_SS_AR_BYTES, GUEST_DS_AR_BYTES, GUEST_FS_AR_BYTES, GUEST_GS_AR_BYTES};
	static const u32 limit[] = {GUEST_ES_LIMIT, GUEST_SS_LIMIT, GUEST_DS_LIMIT, GUEST_FS_LIMIT, GUEST_GS_LIMIT};
	static const u32 selector[] = {GUEST_ES_SELECTOR, GUEST_SS_SELECTOR, GUEST_DS_SELECTOR, GUEST_FS_SELECTOR, GUEST_GS_SELECTOR};
	int small = mode == V86 || mode == REAL;
	u64 efer = rdmsr(0xc0000080);
	for (int n = 0; n < 5; n++) {
		vmwrite(ar[n], mode == V86 ? 0xf3 : mode == REAL ? 0x93 : 0xc093);
		vmwrite(limit[n], small ? 0xffff : 0xffffffff);
		vmwrite(selector[n], small ? 0 : 16);
	}
	const struct set sets[] = {
		{GUEST_CR0, mode == REAL ? cr(0) & ~0x80000001ull : cr(0)},
		{GUEST_CR3, mode == PAE32 || mode == V86 ? (u64)pae_pointers : cr(3)},
		{GUEST_CR4, cr(4)},
		{GUEST_IA32_EFER, mode == LONG64 ? efer : efer & ~0x500ull},
		{GUEST_IA32_PAT, rdmsr(0x277)},
		{GUEST_CS_SELECTOR, small ? 0 : 8},
		{GUEST_CS_AR_BYTES, mode == LONG64 ? 0xa09b : mode == PAE32 ? 0xc09b : mode == V86 ? 0xf3 : 0x9b},
		{GUEST_CS_LIMIT, small ? 0xffff : 0xffffffff},
		{GUEST_TR_SELECTOR, 0x30},
		{GUEST_TR_AR_BYTES, 0x8b},
		{GUEST_TR_BASE, (u64)tss},
		{GUEST_TR_LIMIT, 0x67},
		{GUEST_LDTR_AR_BYTES, 1 << 16},
		{GUEST_GDTR_BASE, (u64)gdt},
		{GUEST_GDTR_LIMIT, 0x47},
		{GUEST_IDTR_BASE, (u64)idt},
		{GUEST_IDTR_LIMIT, 0}, /* so an exception that does not exit ends the guest */
		{GUEST_DR7, 0x400},
		{GUEST_RFLAGS, mode == V86 ? 0x20002 : 2},
		{GUEST_RSP, SPARE - 0x100},
		{GUEST_PDPTR0, (u64)pae_directory | 1},
		{GUEST_RIP, small ? 0x7c00 : (u64)vmcall_code},
	};
	fields(sets, COUNT(sets));
}

/* The VMCS at vmcs_page, cleared, current, and such that its entry succeeds. */
void prepare(enum mode mode, const struct controls *on, const struct controls *off)
{
	clear(vmcs_page, 4096);
	clear(other_page, 4096);
	clear(bitmap, sizeof bitmap);
	clear(page, sizeof page);
	clear(msr_list, sizeof msr_list);
	clear((void *)SPARE, 0x8000);
	*(u32 *)vmcs_page = revision;
	extended_page_tables();
	for (u64 n = 0; n < 512; n++)
		pae_directory[n] = n << 21 | 0x87;
	pae_pointers[0] = (u64)pae_directory | 1;
	/* VMCALL, where real mode begins. */
	*(u32 *)0x7c00 = 0xc1010f;
	vmclear((u64)vmcs_page);
	vmptrld((u64)vmcs_page);
	/* A processor may have kept the fields: all of them begin as 0. */
	for (u32 kind = 0; kind < 16; kind++)
		for (u32 index = 0; index < 64; index++)
			if ((kind & 3) != 1)
				vmwrite(kind >> 2 << 13 | (kind & 3) << 10 | index << 1, 0);
	control_fields(mode, on, off);
	host_fields();
	guest_fields(mode);
}

void run_checks(const struct check *checks, unsigned count)
{
	for (const struct check *check = checks; check < checks + count; check++) {
		if (!begin(check->id, check->what))
			continue;
		struct controls on = check->on;
		if (check->mode == REAL)
			on.proc2 |= EPT | UNRESTRICTED;
		if (controls_missing(&on))
			continue;
		if (check->show & PAGE && !(rdmsr(0x48c) >> 22 & 1)) {
			absent("advanced information about EPT violations", -1);
			continue;
		}
		prepare(check->mode, &on, &check->off);
		if (check->guest)
			vmwrite(GUEST_RIP, (u64)check->guest);
		u64 missing = 0;
		for (unsigned n = 0; n < COUNT(check->set) && check->set[n].field; n++)
			if (vmwrite(check->set[n].field, check->set[n].value))
				missing = check->set[n].field;
		if (missing) {
			say("absent field ");
			say_hex(missing);
			put('\n');
			continue;
		}
		if (check->more)
			check->more();
		outcome(enter(0), check);
		if (check->after)
			check->after();
	}
}

/* ---- the whole ---- */

static void power_off(void)
{
	while (!(inb(0x3fd) & 0x40)) /* until all is sent */
		;
	outb(0xf4, 0); /* a debug-exit device */
	/* Bochs */
	for (const char *c = "Shutdown"; *c; c++)
		outb(0x8900, *c);
}

/* An exception that nobody waits for. */
void unexpected(u64 rip)
{
	say("unexpected exception ");
	say_number(fault_vector);
	part("error", fault_error);
	part("at", rip);
	put('\n');
	power_off();
	for (;;)
		__asm__ volatile("hlt");
}

void conformance(const u32 *information)
{
	u32 a, b, c, d;
	if (information[0] & 4) /* multiboot: there is a command line */
		command_line = (const char *)(u64)information[4];
	outb(0x3fb, 3);	  /* eight bits, no parity */
	outb(0x21, 0xff); /* no interrupts from the 8259 pair */
	outb(0xa1, 0xff);
	__asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(1), "c"(0));
	if (!(c >> 5 & 1)) {
		say("this processor has no VMX\n");
		power_off();
		return;
	}
	int xsave = c >> 26 & 1;
	__asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(0x80000008), "c"(0));
	physical_bits = a & 0xff;
	revision = rdmsr(0x480) & 0x7fffffff;
	*(u32 *)vmxon_page = revision;
	u64 cr4 = cr(4) | (xsave ? 1 << 18 : 0);
	__asm__ volatile("mov %0, %%cr4" ::"r"(cr4));
	operation_before();
	__asm__ volatile("mov %0, %%cr4" ::"r"(cr4 | 1 << 13));
	if (!(rdmsr(0x3a) & 1))
		wrmsr(0x3a, 5);
	if (vmxon((u64)vmxon_page)) {
		say("VMXON failed\n");
		power_off();
		return;
	}
	for (unsigned n = 0; n < abort_count; n++)
		if (asked("abort=", abort_checks[n].id))
			run_checks(abort_checks + n, 1);
	operation();
	run_checks(control_checks, control_count);
	run_checks(host_checks, host_count);
	run_checks(guest_checks, guest_count);
	run_checks(exit_checks, exit_count);
	say("end\n");
	power_off();
}
