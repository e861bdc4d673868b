/* Checks on VM-execution, VM-exit and VM-entry controls (rows C). Where two rows give the same failure, a case may
 * break both. */

#include "conformance.h"

/* The lowest bit that a capability MSR does not allow, added to a control. */
static void forbid(u32 field, u32 msr)
{
	if (rdmsr(0x480) >> 55 & 1 && msr != 0x48b)
		msr += 0xc;
	u32 not_allowed = ~(u32)(rdmsr(msr) >> 32);
	vmwrite(field, vmread(field) | (not_allowed & -not_allowed));
}

static void forbid_pin(void)
{
	forbid(PIN_BASED_VM_EXEC_CONTROL, 0x481);
}

static void forbid_proc1(void)
{
	forbid(CPU_BASED_VM_EXEC_CONTROL, 0x482);
}

static void forbid_proc2(void)
{
	forbid(SECONDARY_VM_EXEC_CONTROL, 0x48b);
}

static void forbid_exit(void)
{
	forbid(VM_EXIT_CONTROLS, 0x483);
}

static void forbid_entry(void)
{
	forbid(VM_ENTRY_CONTROLS, 0x484);
}

static void no_vpid(void)
{
	vmwrite(VIRTUAL_PROCESSOR_ID, 0);
}

/* A list of two entries whose second begins where physical addresses end. */
static void list_at_end(u32 address, u32 count)
{
	vmwrite(address, (1ull << physical_bits) - 16);
	vmwrite(count, 2);
}

static void store_at_end(void)
{
	list_at_end(VM_EXIT_MSR_STORE_ADDR, VM_EXIT_MSR_STORE_COUNT);
}

static void load_at_end(void)
{
	list_at_end(VM_EXIT_MSR_LOAD_ADDR, VM_EXIT_MSR_LOAD_COUNT);
}

static void entry_at_end(void)
{
	list_at_end(VM_ENTRY_MSR_LOAD_ADDR, VM_ENTRY_MSR_LOAD_COUNT);
}

#define INJECT(value) {{VM_ENTRY_INTR_INFO_FIELD, value}}
#define SOFT(value, length) {{VM_ENTRY_INTR_INFO_FIELD, value}, {VM_ENTRY_INSTRUCTION_LEN, length}}

/* Both ways in which a page can lie wrong. */
#define PAGE_AT(id, name, field, ...)                                                                                      \
	{id, name " not page aligned", __VA_ARGS__, .set = {{field, SPARE + 8}}},                                          \
		{id, name " beyond the physical width", __VA_ARGS__, .set = {{field, BEYOND}}}

const struct check control_checks[] = {
	{"base", "a 64-bit guest"},
	{"base", "a 32-bit guest with PAE paging", PAE32},
	{"base", "a guest in real mode", REAL},
	{"base", "a guest in virtual-8086 mode", V86},
	{"C001", "pin bit 1 is 0", .off.pin = 1 << 1},
	{"C001", "pin has a bit that may not be 1", .more = forbid_pin},
	{"C002", "proc1 bit 1 is 0", .off.proc1 = 1 << 1},
	{"C002", "proc1 has a bit that may not be 1", .more = forbid_proc1},
	{"C003", "proc2 has a bit that may not be 1", .on.proc1 = SECONDARY, .more = forbid_proc2},
	{"C003", "proc2 likewise, but not active", .off.proc1 = SECONDARY, .more = forbid_proc2},
	{"C004", "proc3 has a bit that may not be 1", .on.proc1 = TERTIARY, .set = {{TERTIARY_VM_EXEC_CONTROL, 1ull << 63}}},
	{"C005", "four CR3 targets", .set = {{CR3_TARGET_COUNT, 4}}},
	{"C005", "five CR3 targets", .set = {{CR3_TARGET_COUNT, 5}}},
	PAGE_AT("C006", "I/O bitmap A", IO_BITMAP_A, .on.proc1 = IOBITMAPS),
	{"C006", "I/O bitmap A beyond the physical width, not used", .set = {{IO_BITMAP_A, BEYOND}}},
	PAGE_AT("C007", "I/O bitmap B", IO_BITMAP_B, .on.proc1 = IOBITMAPS),
	PAGE_AT("C008", "MSR bitmaps", MSR_BITMAP, .on.proc1 = MSRBITMAPS),
	PAGE_AT("C009", "virtual-APIC page", VIRTUAL_APIC_PAGE_ADDR, .on.proc1 = TPRSHADOW),
	{"C010", "TPR threshold 10H", .on.proc1 = TPRSHADOW, .set = {{TPR_THRESHOLD, 0x10}}},
	{"C011", "TPR threshold above the virtual TPR", .on.proc1 = TPRSHADOW, .set = {{TPR_THRESHOLD, 1}}},
	{"C012", "x2APIC mode without TPR shadow", .on.proc2 = X2APIC, .off.proc1 = TPRSHADOW},
	{"C012", "APIC registers without TPR shadow", .on.proc2 = APICREGS, .off.proc1 = TPRSHADOW},
	{"C012", "interrupt delivery without TPR shadow", .on = {.pin = P_EXTINT, .proc2 = VID}, .off.proc1 = TPRSHADOW},
	{"C013", "IPI virtualization without TPR shadow", .on.proc3 = 1 << 4, .off.proc1 = TPRSHADOW},
	{"C014", "virtual NMIs without NMI exiting", .on.pin = P_VNMI, .off.pin = P_NMI},
	{"C015", "NMI-window exiting without virtual NMIs", .on = {.pin = P_NMI, .proc1 = NMIWIN}, .off.pin = P_VNMI},
	PAGE_AT("C016", "APIC-access page", APIC_ACCESS_ADDR, .on = {.proc1 = TPRSHADOW, .proc2 = APICACCESS}),
	{"C018", "APIC accesses in x2APIC mode", .on = {.proc1 = TPRSHADOW, .proc2 = APICACCESS | X2APIC}},
	{"C019", "interrupt delivery without external-interrupt exiting", .on = {.proc1 = TPRSHADOW, .proc2 = VID}, .off.pin = P_EXTINT},
	{"C020", "posted interrupts without interrupt delivery", .on = {.pin = P_POSTED | P_EXTINT, .proc1 = TPRSHADOW, .exit = X_ACK}},
	{"C021", "posted interrupts without acknowledgement", .on = {.pin = P_POSTED | P_EXTINT, .proc1 = TPRSHADOW, .proc2 = VID}, .off.exit = X_ACK},
	{"C022", "notification vector 100H", .on = {.pin = P_POSTED | P_EXTINT, .proc1 = TPRSHADOW, .proc2 = VID, .exit = X_ACK}, .set = {{POSTED_INTR_NV, 0x100}}},
	{"C023", "posted-interrupt descriptor not aligned", .on = {.pin = P_POSTED | P_EXTINT, .proc1 = TPRSHADOW, .proc2 = VID, .exit = X_ACK}, .set = {{POSTED_INTR_DESC_ADDR, SPARE + 32}}},
	{"C023", "posted-interrupt descriptor beyond the physical width", .on = {.pin = P_POSTED | P_EXTINT, .proc1 = TPRSHADOW, .proc2 = VID, .exit = X_ACK}, .set = {{POSTED_INTR_DESC_ADDR, BEYOND}}},
	{"C024", "VPID 0", .on.proc2 = VPID, .more = no_vpid},
	{"C025", "EPT of memory type 1", .on.proc2 = EPT, .set = {{EPT_POINTER, SPARE | 3 << 3 | 1}}},
	{"C026", "EPT of three levels", .on.proc2 = EPT, .set = {{EPT_POINTER, SPARE | 2 << 3 | 6}}},
	{"C028", "EPT pointer bit 7", .on.proc2 = EPT, .set = {{EPT_POINTER, SPARE | 1 << 7 | 3 << 3 | 6}}},
	{"C029", "EPT pointer bit 8", .on.proc2 = EPT, .set = {{EPT_POINTER, SPARE | 1 << 8 | 3 << 3 | 6}}},
	{"C029", "EPT beyond the physical width", .on.proc2 = EPT, .set = {{EPT_POINTER, BEYOND | 3 << 3 | 6}}},
	{"C029", "EPT beyond the physical width, not used", .set = {{EPT_POINTER, BEYOND}}},
	{"C030", "unrestricted guest without EPT", .on.proc2 = UNRESTRICTED},
	{"C031", "page-modification log without EPT", .on.proc2 = PML},
	PAGE_AT("C032", "page-modification log", PML_ADDRESS, .on.proc2 = PML | EPT),
	{"C033", "mode-based execute control without EPT", .on.proc2 = MBEC},
	{"C034", "sub-page permissions without EPT", .on.proc2 = SPP},
	PAGE_AT("C035", "sub-page-permission table", SPP_TABLE_POINTER, .on.proc2 = SPP | EPT),
	{"C036", "VM function 63", .on.proc2 = VMFUNC | EPT, .set = {{VM_FUNCTION_CONTROL, 1ull << 63}}},
	{"C037", "EPTP switching without EPT", .on.proc2 = VMFUNC, .set = {{VM_FUNCTION_CONTROL, 1}}},
	{"C037", "EPTP list not page aligned", .on.proc2 = VMFUNC | EPT, .set = {{VM_FUNCTION_CONTROL, 1}, {EPTP_LIST_ADDRESS, SPARE + 8}}},
	PAGE_AT("C038", "VMREAD bitmap", VMREAD_BITMAP, .on.proc2 = SHADOWING),
	PAGE_AT("C039", "VMWRITE bitmap", VMWRITE_BITMAP, .on.proc2 = SHADOWING),
	PAGE_AT("C040", "virtualization-exception information", VE_INFORMATION_ADDRESS, .on.proc2 = VE | EPT),
	{"C043", "TSC multiplier 0", .on = {.proc1 = TSCOFFSET, .proc2 = TSCSCALING}, .set = {{TSC_MULTIPLIER, 0}}},
	{"C046", "PID-pointer table not aligned", .on = {.proc1 = TPRSHADOW, .proc3 = 1 << 4}, .set = {{PID_POINTER_TABLE, SPARE + 4}}},
	{"C047", "APIC-timer virtualization without interrupt delivery", .on.proc3 = 1 << 8},

	{"C049", "exit bit 0 is 0", .off.exit = 1 << 0},
	{"C049", "exit has a bit that may not be 1", .more = forbid_exit},
	{"C050", "exit2 has a bit that may not be 1", .on.exit = X_SECONDARY, .set = {{SECONDARY_VM_EXIT_CONTROLS, 1ull << 63}}},
	{"C051", "timer saved but not active", .on.exit = X_SAVETIMER, .off.pin = P_TIMER},
	{"C051", "timer saved and active", .on = {.pin = P_TIMER, .exit = X_SAVETIMER}, .set = {{VMX_PREEMPTION_TIMER_VALUE, 1 << 30}}},
	{"C052", "exit store list not aligned", .set = {{VM_EXIT_MSR_STORE_ADDR, SPARE + 8}, {VM_EXIT_MSR_STORE_COUNT, 1}}},
	{"C052", "exit store list beyond the physical width", .set = {{VM_EXIT_MSR_STORE_ADDR, BEYOND}, {VM_EXIT_MSR_STORE_COUNT, 1}}},
	{"C052", "exit store list beyond the physical width, empty", .set = {{VM_EXIT_MSR_STORE_ADDR, BEYOND}}},
	{"C053", "exit store list ends beyond the physical width", .more = store_at_end},
	{"C054", "exit load list not aligned", .set = {{VM_EXIT_MSR_LOAD_ADDR, SPARE + 8}, {VM_EXIT_MSR_LOAD_COUNT, 1}}},
	{"C054", "exit load list beyond the physical width", .set = {{VM_EXIT_MSR_LOAD_ADDR, BEYOND}, {VM_EXIT_MSR_LOAD_COUNT, 1}}},
	{"C055", "exit load list ends beyond the physical width", .more = load_at_end},
	{"C056", "entry bit 0 is 0", .off.entry = 1 << 0},
	{"C056", "entry has a bit that may not be 1", .more = forbid_entry},
	{"C057", "inject type 1", .set = INJECT(0x80000120)},
	{"C057", "inject type 1, not valid", .set = INJECT(0x120)},
	{"C058", "inject an NMI with vector 3", .set = INJECT(0x80000203)},
	{"C059", "inject exception 32", .set = INJECT(0x80000320)},
	{"C060", "inject other event 3", .set = SOFT(0x80000703, 1)},
	{"C061", "inject an interrupt with an error code", .set = {{VM_ENTRY_INTR_INFO_FIELD, 0x80000820}, {GUEST_RFLAGS, 0x202}}},
	{"C062", "inject an error code into real mode", REAL, .set = INJECT(0x80000b0d)},
	{"C063", "inject #GP without an error code", .set = INJECT(0x8000030d)},
	{"C063", "inject #UD with an error code", .set = INJECT(0x80000b06)},
	{"C064", "inject with bit 12", .set = INJECT(0x80001306)},
	{"C064", "inject with bit 30", .set = INJECT(0xc0000306)},
	{"C071", "inject a nested exception", .set = INJECT(0x80002306)},
	{"C065", "inject error code 10000H", .set = {{VM_ENTRY_INTR_INFO_FIELD, 0x80000b0d}, {VM_ENTRY_EXCEPTION_ERROR_CODE, 0x10000}}},
	{"C066", "inject INT n of 16 bytes", .set = SOFT(0x80000480, 16)},
	{"C066", "inject INT1 of 16 bytes", .set = SOFT(0x80000501, 16)},
	{"C066", "inject INT3 of 16 bytes", .set = SOFT(0x80000603, 16)},
	{"C067", "entry load list not aligned", .set = {{VM_ENTRY_MSR_LOAD_ADDR, SPARE + 8}, {VM_ENTRY_MSR_LOAD_COUNT, 1}}},
	{"C067", "entry load list beyond the physical width", .set = {{VM_ENTRY_MSR_LOAD_ADDR, BEYOND}, {VM_ENTRY_MSR_LOAD_COUNT, 1}}},
	{"C068", "entry load list ends beyond the physical width", .more = entry_at_end},
};
const unsigned control_count = COUNT(control_checks);
