/* VMX instructions outside a guest: the checks before VM entry (rows P), and the errors of the others (E). */

#include "conformance.h"

static const struct controls none;

static void launch(void)
{
	__asm__ volatile("vmlaunch" ::: "cc");
}

static void exception(const char *id, const char *what, void (*code)(void))
{
	begin(id, what);
	if (!attempt(code)) {
		say("no exception\n");
		return;
	}
	if (fault_vector == 6)
		say("#UD\n");
	else if (fault_vector == 13) {
		say("#GP(");
		say_number(fault_error);
		say(")\n");
	} else {
		say("exception ");
		say_number(fault_vector);
		say("\n");
	}
}

static void try_vmxon(void)
{
	vmxon((u64)vmxon_page);
}

static void vmxon_allowed(void)
{
	u64 cr4;
	__asm__("mov %%cr4, %0" : "=r"(cr4));
	__asm__ volatile("mov %0, %%cr4" ::"r"(cr4 | 1 << 13));
	vmxon((u64)vmxon_page);
}

static void launch_as_user(void)
{
	in_user_mode(launch);
}

/* Before VMXON, with CR4.VMXE clear and IA32_FEATURE_CONTROL as it was found. */
void operation_before(void)
{
	exception("P001", "VMLAUNCH outside VMX operation", launch);
	exception("VMXON", "with CR4.VMXE = 0", try_vmxon);
	if (rdmsr(0x3a) & 1) {
		begin("VMXON", "with IA32_FEATURE_CONTROL unlocked");
		absent("an unlocked IA32_FEATURE_CONTROL", -1);
	} else
		exception("VMXON", "with IA32_FEATURE_CONTROL unlocked", vmxon_allowed);
}

#define OUTCOME(id, what, flags)                                                                                           \
	do {                                                                                                               \
		begin(id, what);                                                                                           \
		outcome_of_instruction(flags);                                                                             \
	} while (0)

static u64 invept(u64 type, u64 eptp, u64 reserved)
{
	u64 descriptor[2] = {eptp, reserved};
	return FLAGS("invept %1, %2", "m"(descriptor), "r"(type));
}

static u64 invvpid(u64 type, u64 vpid, u64 address)
{
	u64 descriptor[2] = {vpid, address};
	return FLAGS("invvpid %1, %2", "m"(descriptor), "r"(type));
}

static u64 vmread_flags(u32 field)
{
	u64 value, flags;
	__asm__ volatile("vmread %2, %0\n\tpushfq\n\tpopq %1" : "=&r"(value), "=&r"(flags) : "r"((u64)field) : "cc");
	return flags & 0x41;
}

/* Turns VMX operation off and on again between two VMXONs that must fail. */
static void vmxon_operands(void)
{
	__asm__ volatile("vmxoff" ::: "cc");
	OUTCOME("VMXON", "at an address that is not page aligned", vmxon((u64)vmxon_page + 8));
	OUTCOME("VMXON", "beyond the physical width", vmxon(1ull << physical_bits));
	*(u32 *)vmxon_page = revision ^ 1;
	OUTCOME("VMXON", "of a region with another revision", vmxon((u64)vmxon_page));
	*(u32 *)vmxon_page = revision | 1u << 31;
	OUTCOME("VMXON", "of a region with bit 31 set", vmxon((u64)vmxon_page));
	*(u32 *)vmxon_page = revision;
	OUTCOME("VMXON", "of a good region", vmxon((u64)vmxon_page));
	OUTCOME("E15", "VMXON in VMX root operation, without a current VMCS", vmxon((u64)vmxon_page));
}

void operation(void)
{
	u64 misc = rdmsr(0x485), secondary = rdmsr(0x482) >> 63 ? rdmsr(0x48b) >> 32 : 0;

	vmxon_operands();
	OUTCOME("P004", "VMLAUNCH without a current VMCS", enter(0));
	OUTCOME("P004", "VMRESUME without a current VMCS", enter(1));
	OUTCOME("VMREAD", "without a current VMCS", vmread_flags(GUEST_RIP));
	exception("P003", "VMLAUNCH with CPL 3", launch_as_user);
	exception("P001", "VMLAUNCH in compatibility mode", in_compatibility_mode);

	prepare(LONG64, &none, &none);
	OUTCOME("P008", "VMRESUME of a clear VMCS", enter(1));
	OUTCOME("P006", "VMLAUNCH behind MOV SS", enter(2));
	begin("P007", "VMLAUNCH of a launched VMCS");
	enter(0);
	outcome_of_instruction(enter(0));

	/* The VMCS lies in memory from VMCLEAR on, with its error number too. */
	prepare(LONG64, &none, &(struct controls){.exit = X_HOST64});
	vmclear((u64)vmcs_page);
	__asm__ volatile("vmxoff" ::: "cc");
	u64 flags = outside_long_mode();
	vmxon((u64)vmxon_page);
	vmptrld((u64)vmcs_page);
	OUTCOME("H030", "a 64-bit guest from outside IA-32e mode", flags);

	*(u32 *)other_page = revision | 1u << 31;
	begin("P005", "VMLAUNCH of a shadow VMCS");
	if (secondary & SHADOWING) {
		vmclear((u64)other_page);
		vmptrld((u64)other_page);
		outcome_of_instruction(enter(0));
	} else
		absent("proc2", 14);
	prepare(LONG64, &none, &none);

	if (begin("E01", "VMCALL in VMX root operation"))
		outcome_of_instruction(FLAGS("vmcall", "r"(0)));
	OUTCOME("E02", "VMCLEAR of an address that is not page aligned", vmclear((u64)other_page + 1));
	OUTCOME("E02", "VMCLEAR beyond the physical width", vmclear(1ull << physical_bits));
	OUTCOME("E03", "VMCLEAR of the VMXON region", vmclear((u64)vmxon_page));
	OUTCOME("E09", "VMPTRLD of an address that is not page aligned", vmptrld((u64)other_page + 1));
	OUTCOME("E09", "VMPTRLD beyond the physical width", vmptrld(1ull << physical_bits));
	OUTCOME("E10", "VMPTRLD of the VMXON region", vmptrld((u64)vmxon_page));
	*(u32 *)other_page = revision ^ 1;
	OUTCOME("E11", "VMPTRLD of a region with another revision", vmptrld((u64)other_page));
	*(u32 *)other_page = revision | 1u << 31;
	begin("E11", "VMPTRLD of a shadow VMCS without VMCS shadowing");
	if (secondary & SHADOWING)
		absent("a processor without proc2", 14);
	else
		outcome_of_instruction(vmptrld((u64)other_page));
	OUTCOME("E12", "VMREAD of a field that there is not", vmread_flags(0x1ffe));
	OUTCOME("E12", "VMREAD of a wrong encoding", vmread_flags(GUEST_RIP | 0x8000));
	OUTCOME("E12", "VMWRITE of a field that there is not", vmwrite(0x1ffe, 0));
	begin("E13", "VMWRITE of exit information");
	if (misc >> 29 & 1)
		absent("a field that VMWRITE cannot write", -1);
	else
		outcome_of_instruction(vmwrite(VM_EXIT_REASON, 0));
	OUTCOME("E15", "VMXON in VMX root operation", vmxon((u64)vmxon_page));
	if (secondary & EPT) {
		OUTCOME("E28", "INVEPT of an unknown type", invept(9, 0, 0));
		OUTCOME("E28", "INVEPT with a reserved bit", invept(1, (u64)ept | 3 << 3 | 6, 1));
		OUTCOME("E28", "INVEPT with a bad EPT pointer", invept(1, (u64)ept | 3 << 3 | 7, 0));
		OUTCOME("INVEPT", "of one context", invept(1, (u64)ept | 3 << 3 | 6, 0));
		OUTCOME("INVEPT", "of all contexts", invept(2, 0, 0));
	}
	if (secondary & VPID) {
		OUTCOME("E28", "INVVPID of an unknown type", invvpid(9, 1, 0));
		OUTCOME("E28", "INVVPID with a reserved bit", invvpid(1, 1 | 1 << 16, 0));
		OUTCOME("E28", "INVVPID with VPID 0", invvpid(1, 0, 0));
		OUTCOME("E28", "INVVPID of an address that is not canonical", invvpid(0, 1, NONCANONICAL));
		OUTCOME("INVVPID", "of one address", invvpid(0, 1, 0x1000));
		OUTCOME("INVVPID", "of one context", invvpid(1, 1, 0));
		OUTCOME("INVVPID", "of all contexts", invvpid(2, 0, 0));
	}
}
