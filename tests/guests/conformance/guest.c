/* Checks on the guest-state area (rows G) and loading of MSRs (rows M). */

#include "conformance.h"

static void flip(u32 field, u64 bits)
{
	vmwrite(field, vmread(field) ^ bits);
}

#define FLIP(name, field, bits)                                                                                            \
	static void name(void)                                                                                             \
	{                                                                                                                  \
		flip(field, bits);                                                                                         \
	}

FLIP(no_ne, GUEST_CR0, 1 << 5)
FLIP(no_pe, GUEST_CR0, 1)
FLIP(no_pg, GUEST_CR0, 1ull << 31)
FLIP(cr0_bit_32, GUEST_CR0, 1ull << 32)
FLIP(no_vmxe, GUEST_CR4, 1 << 13)
FLIP(no_pae, GUEST_CR4, 1 << 5)
FLIP(cr4_bit_31, GUEST_CR4, 1ull << 31)
FLIP(cr3_beyond, GUEST_CR3, 1ull << physical_bits)
FLIP(efer_bit_1, GUEST_IA32_EFER, 1 << 1)
FLIP(lma, GUEST_IA32_EFER, 1 << 10)
FLIP(lme, GUEST_IA32_EFER, 1 << 8)

/* CR4.PCIDE, where the processor has it. */
static void pcide(void)
{
	flip(GUEST_CR4, rdmsr(0x489) & 1 << 17);
}

/* The page that the VMCS link pointer names. */
static void link(u32 first)
{
	*(u32 *)other_page = first;
	vmwrite(VMCS_LINK_POINTER, (u64)other_page);
}

static void link_good(void)
{
	link(revision);
}

static void link_revision(void)
{
	link(revision ^ 1);
}

static void link_shadow(void)
{
	link(revision | 1u << 31);
}

static void link_self(void)
{
	vmwrite(VMCS_LINK_POINTER, (u64)vmcs_page);
}

/* A PDPTE with a reserved bit, in memory. */
#define PDPTE(n)                                                                                                           \
	static void pdpte##n(void)                                                                                         \
	{                                                                                                                  \
		((u64 *)vmread(GUEST_CR3))[n] |= 3;                                                                        \
	}
PDPTE(0)
PDPTE(1)
PDPTE(2)
PDPTE(3)

/* prepare() makes only the first. */
static void clear_pdptes(void)
{
	for (int n = 1; n < 4; n++)
		((u64 *)vmread(GUEST_CR3))[n] = 0;
}

/* ---- lists of MSRs ---- */

static void entry(unsigned n, u64 index, u64 value)
{
	((u64 *)msr_list)[2 * n] = index;
	((u64 *)msr_list)[2 * n + 1] = value;
	vmwrite(VM_ENTRY_MSR_LOAD_COUNT, n + 1);
}

#define LIST(name, index, value)                                                                                           \
	static void name(void)                                                                                             \
	{                                                                                                                  \
		entry(0, 0x174, 8);                                                                                        \
		entry(1, index, value);                                                                                    \
	}

LIST(load_good, 0x175, 0x1000)
LIST(load_fs, 0xc0000100, 0)
LIST(load_gs, 0xc0000101, 0)
LIST(load_x2apic, 0x808, 0)
LIST(load_microcode, 0x79, 0)
LIST(load_signature, 0x8b, 0)
LIST(load_smm, 0x9b, 0)
LIST(load_header, 0x174 | 1ull << 32, 8)
LIST(load_pat, 0x277, 2)
LIST(load_noncanonical, 0x176, NONCANONICAL)

static void load_too_many(void)
{
	for (unsigned n = 0; n < 513; n++)
		entry(n, 0x174, 8);
}

/* The list for VM exits, which no processor gets through. */
static void store_x2apic(void)
{
	*(u64 *)msr_list = 0x808;
	vmwrite(VM_EXIT_MSR_STORE_COUNT, 1);
}

static void exit_load_x2apic(void)
{
	*(u64 *)msr_list = 0x808;
	vmwrite(VM_EXIT_MSR_LOAD_COUNT, 1);
}

/* ---- tables ---- */

#define INJECT(value) {VM_ENTRY_INTR_INFO_FIELD, value}
#define IF {GUEST_RFLAGS, 0x202}
#define AR(id, name, what, segment, value, ...) {id, name " " what, .set = {{GUEST_##segment##_AR_BYTES, value}}, ##__VA_ARGS__}

/* The rules that DS, ES, FS and GS share. */
#define DATA(SEG, type, s, rpl, p, rsv, g)                                                                                 \
	AR(type, #SEG, "not accessed", SEG, 0xc092), AR(type, #SEG, "code that cannot be read", SEG, 0xc099),              \
		AR(s, #SEG, "of a system type", SEG, 0xc083),                                                              \
		{rpl, #SEG " RPL above its DPL", .set = {{GUEST_##SEG##_SELECTOR, 0x13}}},                                 \
		AR(p, #SEG, "not present", SEG, 0xc013), AR(rsv, #SEG, "with bit 8", SEG, 0xc193),                         \
		AR(rsv, #SEG, "with bit 17", SEG, 0x2c093),                                                                \
		AR(g, #SEG, "limit above 1 MiB in bytes", SEG, 0x4093),                                                    \
		{g, #SEG " limit in pages that does not end one", .set = {{GUEST_##SEG##_LIMIT, 0xffffeffe}}},             \
		{p, #SEG " unusable and otherwise wrong", .set = {{GUEST_##SEG##_AR_BYTES, 0x10000}, {GUEST_##SEG##_SELECTOR, 0x13}}}

/* A segment in virtual-8086 mode. */
#define V86_SEG(id, SEG)                                                                                                   \
	{id, #SEG " base in virtual-8086 mode", V86, .set = {{GUEST_##SEG##_BASE, 0x10}}},                                 \
		{id, #SEG " limit in virtual-8086 mode", V86, .set = {{GUEST_##SEG##_LIMIT, 0xfffff}}},                    \
		{id, #SEG " access rights in virtual-8086 mode", V86, .set = {{GUEST_##SEG##_AR_BYTES, 0x93}}}

/* CPL 3. */
#define USER                                                                                                               \
	{GUEST_CS_SELECTOR, 0x2b}, {GUEST_CS_AR_BYTES, 0xa0fb}, {GUEST_SS_SELECTOR, 0x23}, {GUEST_SS_AR_BYTES, 0xc0f3}

const struct check guest_checks[] = {
	{"G001", "CR0.NE is 0", .more = no_ne},
	{"G001", "CR0.PE is 0", .more = no_pe},
	{"G001", "CR0.PG is 0", PAE32, .more = no_pg},
	{"G001", "CR0 bit 32", .more = cr0_bit_32},
	{"G002", "CR0.PG without PE", REAL, .more = no_pg},
	{"G003", "CR4.VMXE is 0", .more = no_vmxe},
	{"G003", "CR4 bit 31", .more = cr4_bit_31},
	{"G005", "CR3 beyond the physical width", .more = cr3_beyond},
	{"G006", "a 64-bit guest without PAE", .more = no_pae},
	{"G007", "CR4.PCIDE outside IA-32e mode", PAE32, .more = pcide},
	{"G008", "DEBUGCTL bit 3", .on.entry = E_DEBUG, .set = {{GUEST_IA32_DEBUGCTL, 1 << 3}}},
	{"G009", "DR7 bit 32", .on.entry = E_DEBUG, .set = {{GUEST_DR7, 1ull << 32 | 0x400}}},
	{"G010", "SYSENTER_ESP not canonical", .set = {{GUEST_SYSENTER_ESP, NONCANONICAL}}},
	{"G011", "SYSENTER_EIP not canonical", .set = {{GUEST_SYSENTER_EIP, NONCANONICAL}}},
	{"G013", "PAT with type 2", .on.entry = E_PAT, .set = {{GUEST_IA32_PAT, 2}}},
	{"G013", "PAT with type 2, not loaded", .set = {{GUEST_IA32_PAT, 2}}},
	{"G014", "EFER bit 1", .on.entry = E_EFER, .more = efer_bit_1},
	{"G014", "EFER.LMA is 0", .on.entry = E_EFER, .more = lma},
	{"G014", "EFER.LME is 0", .on.entry = E_EFER, .more = lme},
	{"G014", "EFER.LMA for a 32-bit guest", PAE32, .on.entry = E_EFER, .more = lma},
	{"G014", "EFER of a 32-bit guest", PAE32, .on.entry = E_EFER},
	{"G015", "BNDCFGS bit 2", .on.entry = E_BNDCFGS, .set = {{GUEST_BNDCFGS, 1 << 2}}},
	{"G021", "PKRS bit 32", .on.entry = E_PKRS, .set = {{GUEST_IA32_PKRS, 1ull << 32}}},
	{"G023", "SPEC_CTRL bit 63", .on.entry = E_SPEC, .set = {{GUEST_IA32_SPEC_CTRL, 1ull << 63}}},
	{"G024", "TR selector with TI", .set = {{GUEST_TR_SELECTOR, 0x34}}},
	{"G025", "LDTR selector with TI", .set = {{GUEST_LDTR_AR_BYTES, 0x82}, {GUEST_LDTR_SELECTOR, 4}}},
	{"G025", "LDTR selector with TI, unusable", .set = {{GUEST_LDTR_SELECTOR, 4}}},
	{"G026", "SS RPL 1", .set = {{GUEST_SS_SELECTOR, 0x11}}},
	V86_SEG("G027", CS),
	V86_SEG("G028", SS),
	V86_SEG("G029", DS),
	V86_SEG("G030", ES),
	V86_SEG("G031", FS),
	V86_SEG("G032", GS),
	{"G033", "TR base not canonical", .set = {{GUEST_TR_BASE, NONCANONICAL}}},
	{"G034", "FS base not canonical", .set = {{GUEST_FS_BASE, NONCANONICAL}}},
	{"G035", "GS base not canonical", .set = {{GUEST_GS_BASE, NONCANONICAL}}},
	{"G036", "LDTR base not canonical", .set = {{GUEST_LDTR_AR_BYTES, 0x82}, {GUEST_LDTR_BASE, NONCANONICAL}}},
	{"G037", "CS base above 4 GiB", .set = {{GUEST_CS_BASE, 1ull << 32}}},
	{"G038", "SS base above 4 GiB", .set = {{GUEST_SS_BASE, 1ull << 32}}},
	{"G039", "DS base above 4 GiB", .set = {{GUEST_DS_BASE, 1ull << 32}}},
	{"G040", "ES base above 4 GiB", .set = {{GUEST_ES_BASE, 1ull << 32}}},
	AR("G041", "CS", "not accessed", CS, 0xa09a),
	AR("G041", "CS", "data without unrestricted guest", CS, 0xc093),
	AR("G042", "SS", "that cannot be written", SS, 0xc091),
	AR("G047", "CS", "of a system type", CS, 0xa08b),
	AR("G048", "SS", "of a system type", SS, 0xc083),
	{"G053", "CS data with DPL 3", REAL, .set = {{GUEST_CS_AR_BYTES, 0xf3}}},
	{"G053", "CS data with DPL 0", REAL, .set = {{GUEST_CS_AR_BYTES, 0x93}}},
	AR("G054", "CS", "not conforming, with another DPL than SS", CS, 0xa0fb),
	AR("G055", "CS", "conforming, with a DPL above that of SS", CS, 0xa0ff),
	{"G056", "SS DPL not its RPL", .set = {{GUEST_SS_AR_BYTES, 0xc0f3}, {GUEST_CS_AR_BYTES, 0xa09f}}},
	{"G057", "SS DPL 3 in real mode", REAL, .set = {{GUEST_SS_AR_BYTES, 0xf3}, {GUEST_CS_AR_BYTES, 0x93}}},
	DATA(DS, "G043", "G049", "G058", "G068", "G069", "G070"),
	DATA(ES, "G044", "G050", "G059", "G071", "G072", "G073"),
	DATA(FS, "G045", "G051", "G060", "G074", "G075", "G076"),
	DATA(GS, "G046", "G052", "G061", "G077", "G078", "G079"),
	AR("G062", "CS", "not present", CS, 0xa01b),
	AR("G063", "CS", "with bit 8", CS, 0xa19b),
	AR("G063", "CS", "with bit 17", CS, 0x2a09b),
	AR("G064", "CS", "limit above 1 MiB in bytes", CS, 0x209b),
	{"G064", "CS limit in pages that does not end one", .set = {{GUEST_CS_LIMIT, 0xffffeffe}}},
	AR("G065", "SS", "not present", SS, 0xc013),
	AR("G066", "SS", "with bit 8", SS, 0xc193),
	AR("G067", "SS", "limit above 1 MiB in bytes", SS, 0x4093),
	{"G067", "SS limit in pages that does not end one", .set = {{GUEST_SS_LIMIT, 0xffffeffe}}},
	AR("G080", "CS", "with D and L", CS, 0xe09b),
	AR("G081", "TR", "unusable", TR, 0x1008b),
	AR("G082", "TR", "not busy", TR, 0x89),
	AR("G082", "TR", "of 16 bits in IA-32e mode", TR, 0x83),
	{"G082", "TR of 16 bits outside IA-32e mode", PAE32, .set = {{GUEST_TR_AR_BYTES, 0x83}}},
	AR("G083", "TR", "not of a system type", TR, 0x9b),
	AR("G083", "TR", "not present", TR, 0x0b),
	AR("G084", "TR", "with bit 8", TR, 0x18b),
	{"G085", "TR limit above 1 MiB in bytes", .set = {{GUEST_TR_LIMIT, 0x100000}}},
	AR("G085", "TR", "limit in pages that does not end one", TR, 0x808b),
	AR("G086", "LDTR", "of type 3", LDTR, 0x83),
	AR("G087", "LDTR", "not of a system type", LDTR, 0x92),
	AR("G087", "LDTR", "not present", LDTR, 0x02),
	AR("G088", "LDTR", "with bit 8", LDTR, 0x182),
	{"G089", "LDTR limit above 1 MiB in bytes", .set = {{GUEST_LDTR_AR_BYTES, 0x82}, {GUEST_LDTR_LIMIT, 0x100000}}},
	{"G086", "LDTR of type 2", .set = {{GUEST_LDTR_AR_BYTES, 0x82}}},
	{"G091", "GDTR base not canonical", .set = {{GUEST_GDTR_BASE, NONCANONICAL}}},
	{"G092", "IDTR base not canonical", .set = {{GUEST_IDTR_BASE, NONCANONICAL}}},
	{"G093", "GDTR limit above 64 KiB", .set = {{GUEST_GDTR_LIMIT, 0x10000}}},
	{"G094", "IDTR limit above 64 KiB", .set = {{GUEST_IDTR_LIMIT, 0x10000}}},
	{"G095", "RIP above 4 GiB of a 32-bit guest", PAE32, .set = {{GUEST_RIP, 1ull << 32}}},
	{"G096", "RIP bit 63", .set = {{GUEST_RIP, 1ull << 63}}},
	{"G097", "RFLAGS bit 1 is 0", .set = {{GUEST_RFLAGS, 0}}},
	{"G097", "RFLAGS bit 3", .set = {{GUEST_RFLAGS, 0xa}}},
	{"G097", "RFLAGS bit 22", .set = {{GUEST_RFLAGS, 0x400002}}},
	{"G097", "RFLAGS bit 63", .set = {{GUEST_RFLAGS, 1ull << 63 | 2}}},
	{"G098", "virtual-8086 mode in IA-32e mode", V86, .on.entry = E_LONG},
	{"G099", "inject an interrupt with IF 0", .set = {INJECT(0x80000020)}},
	{"G100", "activity state 4", .set = {{GUEST_ACTIVITY_STATE, 4}}},
	{"G101", "HLT with CPL 3", .set = {USER, {GUEST_ACTIVITY_STATE, 1}}},
	{"G102", "HLT with blocking by STI", .set = {{GUEST_ACTIVITY_STATE, 1}, {GUEST_INTERRUPTIBILITY_INFO, 1}, IF}},
	{"G102", "HLT with blocking by MOV SS", .set = {{GUEST_ACTIVITY_STATE, 1}, {GUEST_INTERRUPTIBILITY_INFO, 2}}},
	{"G103", "inject INT n into HLT", .set = {{GUEST_ACTIVITY_STATE, 1}, INJECT(0x80000480), {VM_ENTRY_INSTRUCTION_LEN, 2}}},
	{"G103", "inject #UD into HLT", .set = {{GUEST_ACTIVITY_STATE, 1}, INJECT(0x80000306)}},
	{"G104", "inject an interrupt into shutdown", .set = {{GUEST_ACTIVITY_STATE, 2}, INJECT(0x80000020), IF}},
	{"G105", "inject an NMI into wait-for-SIPI", .set = {{GUEST_ACTIVITY_STATE, 3}, INJECT(0x80000202)}},
	{"G107", "interruptibility bit 5", .set = {{GUEST_INTERRUPTIBILITY_INFO, 1 << 5}}},
	{"G107", "interruptibility bit 31", .set = {{GUEST_INTERRUPTIBILITY_INFO, 1u << 31}}},
	{"G108", "blocking by STI and by MOV SS", .set = {{GUEST_INTERRUPTIBILITY_INFO, 3}, IF}},
	{"G109", "blocking by STI with IF 0", .set = {{GUEST_INTERRUPTIBILITY_INFO, 1}}},
	{"G109", "blocking by STI with IF 1", .set = {{GUEST_INTERRUPTIBILITY_INFO, 1}, IF}},
	{"G110", "inject an interrupt behind STI", .set = {{GUEST_INTERRUPTIBILITY_INFO, 1}, INJECT(0x80000020), IF}},
	{"G110", "inject an interrupt behind MOV SS", .set = {{GUEST_INTERRUPTIBILITY_INFO, 2}, INJECT(0x80000020), IF}},
	{"G111", "inject an NMI behind MOV SS", .set = {{GUEST_INTERRUPTIBILITY_INFO, 2}, INJECT(0x80000202)}},
	{"G112", "inject an NMI behind STI", .set = {{GUEST_INTERRUPTIBILITY_INFO, 1}, INJECT(0x80000202), IF}},
	{"G113", "blocking by SMI", .set = {{GUEST_INTERRUPTIBILITY_INFO, 4}}},
	{"G115", "inject an NMI while virtual NMIs are blocked", .on.pin = P_NMI | P_VNMI, .set = {{GUEST_INTERRUPTIBILITY_INFO, 8}, INJECT(0x80000202)}},
	{"G117", "pending debug exceptions bit 4", .set = {{GUEST_PENDING_DBG_EXCEPTIONS, 1 << 4}}},
	{"G117", "pending debug exceptions bit 63", .set = {{GUEST_PENDING_DBG_EXCEPTIONS, 1ull << 63}}},
	{"G118", "no pending single step behind STI with TF", .set = {{GUEST_INTERRUPTIBILITY_INFO, 1}, {GUEST_RFLAGS, 0x302}}},
	{"G118", "a pending single step behind STI without TF", .set = {{GUEST_INTERRUPTIBILITY_INFO, 1}, IF, {GUEST_PENDING_DBG_EXCEPTIONS, 1 << 14}}},
	{"G120", "link pointer not page aligned", .set = {{VMCS_LINK_POINTER, SPARE + 8}}},
	{"G120", "link pointer beyond the physical width", .set = {{VMCS_LINK_POINTER, BEYOND}}},
	{"G121", "link to another revision", .more = link_revision},
	{"G121", "link to a good VMCS", .more = link_good},
	{"G122", "link to a shadow VMCS without VMCS shadowing", .more = link_shadow},
	{"G122", "link to an ordinary VMCS with VMCS shadowing", .on.proc2 = SHADOWING, .more = link_good},
	{"G123", "link to the current VMCS", .more = link_self},
	{"G125", "PDPTE 0 in memory", PAE32, .more = pdpte0},
	{"G126", "PDPTE 1 in memory", PAE32, .more = pdpte1, .after = clear_pdptes},
	{"G127", "PDPTE 2 in memory", PAE32, .more = pdpte2, .after = clear_pdptes},
	{"G128", "PDPTE 3 in memory", PAE32, .more = pdpte3, .after = clear_pdptes},
	{"G125", "PDPTE 0 in the VMCS", PAE32, .on.proc2 = EPT, .set = {{GUEST_PDPTR0, 3}}},
	{"G126", "PDPTE 1 in the VMCS", PAE32, .on.proc2 = EPT, .set = {{GUEST_PDPTR1, 1 | BEYOND}}},
	{"G127", "PDPTE 2 in the VMCS", PAE32, .on.proc2 = EPT, .set = {{GUEST_PDPTR2, 1 | 1 << 5}}},
	{"G128", "PDPTE 3 in the VMCS", PAE32, .on.proc2 = EPT, .set = {{GUEST_PDPTR3, 1 | 1 << 8}}},
	{"G128", "PDPTE 3 in the VMCS, not present", PAE32, .on.proc2 = EPT, .set = {{GUEST_PDPTR3, 1 << 8}}},

	{"M001", "a list of two good MSRs", .more = load_good},
	{"M001", "FS_BASE as the second", .more = load_fs},
	{"M001", "GS_BASE as the second", .more = load_gs},
	{"M002", "an x2APIC register as the second", .more = load_x2apic},
	{"M003", "the microcode update as the second", .more = load_microcode},
	{"M003", "the microcode signature as the second", .more = load_signature},
	{"M003", "SMM_MONITOR_CTL as the second", .more = load_smm},
	{"M004", "reserved bits in the header of the second", .more = load_header},
	{"M005", "a PAT with type 2 as the second", .more = load_pat},
	{"M005", "a SYSENTER_EIP that is not canonical as the second", .more = load_noncanonical},
	{"M006", "513 entries", .more = load_too_many},
};
const unsigned guest_count = COUNT(guest_checks);

/* Only on request: each ends the machine. */
const struct check abort_checks[] = {
	{"M007", "an exit stores an x2APIC register", .more = store_x2apic},
	{"M008", "an exit loads an x2APIC register", .more = exit_load_x2apic},
};
const unsigned abort_count = COUNT(abort_checks);
