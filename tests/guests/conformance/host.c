/* Checks on the host-state area (rows H). */

#include "conformance.h"

static void flip(u32 field, u64 bits)
{
	vmwrite(field, vmread(field) ^ bits);
}

static void no_pe(void)
{
	flip(HOST_CR0, 1);
}

static void no_pg(void)
{
	flip(HOST_CR0, 1ull << 31);
}

static void cr0_bit_32(void)
{
	flip(HOST_CR0, 1ull << 32);
}

static void no_vmxe(void)
{
	flip(HOST_CR4, 1 << 13);
}

static void cr4_bit_31(void)
{
	flip(HOST_CR4, 1ull << 31);
}

static void no_pae(void)
{
	flip(HOST_CR4, 1 << 5);
}

static void cr3_beyond(void)
{
	flip(HOST_CR3, 1ull << physical_bits);
}

static void efer_bit_1(void)
{
	flip(HOST_IA32_EFER, 1 << 1);
}

static void no_lma(void)
{
	flip(HOST_IA32_EFER, 1 << 10);
}

static void no_lme(void)
{
	flip(HOST_IA32_EFER, 1 << 8);
}

#define SELECTOR(id, name, field, good)                                                                                    \
	{id, name " selector with TI", .set = {{field, good | 4}}}, {id, name " selector with RPL 1", .set = {{field, good | 1}}}

const struct check host_checks[] = {
	{"H001", "CR0.PE is 0", .more = no_pe},
	{"H001", "CR0.PG is 0", .more = no_pg},
	{"H001", "CR0 bit 32", .more = cr0_bit_32},
	{"H002", "CR4.VMXE is 0", .more = no_vmxe},
	{"H002", "CR4 bit 31", .more = cr4_bit_31},
	{"H003", "CR3 beyond the physical width", .more = cr3_beyond},
	{"H005", "SYSENTER_ESP not canonical", .set = {{HOST_IA32_SYSENTER_ESP, NONCANONICAL}}},
	{"H006", "SYSENTER_EIP not canonical", .set = {{HOST_IA32_SYSENTER_EIP, NONCANONICAL}}},
	{"H008", "PAT with type 2", .on.exit = X_PAT, .set = {{HOST_IA32_PAT, 2}}},
	{"H008", "PAT with type 2 in byte 7", .on.exit = X_PAT, .set = {{HOST_IA32_PAT, 2ull << 56}}},
	{"H008", "PAT with type 2, not loaded", .set = {{HOST_IA32_PAT, 2}}},
	{"H009", "EFER bit 1", .on.exit = X_EFER, .more = efer_bit_1},
	{"H009", "EFER.LMA is 0", .on.exit = X_EFER, .more = no_lma},
	{"H009", "EFER.LME is 0", .on.exit = X_EFER, .more = no_lme},
	{"H009", "EFER bit 1, not loaded", .more = efer_bit_1},
	{"H011", "PKRS bit 32", .on.exit = X_PKRS, .set = {{HOST_IA32_PKRS, 1ull << 32}}},
	{"H013", "SPEC_CTRL bit 63", .on.exit2 = 1 << 2, .set = {{HOST_IA32_SPEC_CTRL, 1ull << 63}}},
	SELECTOR("H014", "CS", HOST_CS_SELECTOR, 8),
	SELECTOR("H015", "SS", HOST_SS_SELECTOR, 16),
	SELECTOR("H016", "DS", HOST_DS_SELECTOR, 16),
	SELECTOR("H017", "ES", HOST_ES_SELECTOR, 16),
	SELECTOR("H018", "FS", HOST_FS_SELECTOR, 16),
	SELECTOR("H019", "GS", HOST_GS_SELECTOR, 16),
	SELECTOR("H020", "TR", HOST_TR_SELECTOR, 0x30),
	{"H021", "CS null", .set = {{HOST_CS_SELECTOR, 0}}},
	{"H022", "TR null", .set = {{HOST_TR_SELECTOR, 0}}},
	{"H023", "SS null for a 32-bit host", .off = {.exit = X_HOST64, .entry = E_LONG}, .set = {{HOST_SS_SELECTOR, 0}}},
	{"H024", "FS base not canonical", .set = {{HOST_FS_BASE, NONCANONICAL}}},
	{"H025", "GS base not canonical", .set = {{HOST_GS_BASE, NONCANONICAL}}},
	{"H026", "GDTR base not canonical", .set = {{HOST_GDTR_BASE, NONCANONICAL}}},
	{"H027", "IDTR base not canonical", .set = {{HOST_IDTR_BASE, NONCANONICAL}}},
	{"H028", "TR base not canonical", .set = {{HOST_TR_BASE, NONCANONICAL}}},
	{"H029", "a 32-bit host from 64-bit mode", PAE32, .off.exit = X_HOST64},
	{"H031", "a 32-bit host of a 64-bit guest", .off.exit = X_HOST64},
	{"H031", "a 32-bit host with RIP above 4 GiB", PAE32, .off.exit = X_HOST64, .set = {{HOST_RIP, 1ull << 32}}},
	{"H032", "CR4.PAE is 0", .more = no_pae},
	{"H032", "RIP not canonical", .set = {{HOST_RIP, NONCANONICAL}}},
};
const unsigned host_count = COUNT(host_checks);
