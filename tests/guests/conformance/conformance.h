/* The conformance guest: a hypervisor that provokes each rule of VM entry and each VM exit, and prints what it saw.
 * fields.h is made from the tables: a constant for each field of the VMCS. */

#include "fields.h"

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

/* Bits of the controls. */
enum { P_EXTINT = 1 << 0, P_NMI = 1 << 3, P_VNMI = 1 << 5, P_TIMER = 1 << 6, P_POSTED = 1 << 7 };
enum {
	INTWIN = 1 << 2, TSCOFFSET = 1 << 3, HLTX = 1 << 7, INVLPGX = 1 << 9, MWAITX = 1 << 10, RDPMCX = 1 << 11,
	RDTSCX = 1 << 12, CR3LOAD = 1 << 15, CR3STORE = 1 << 16, TERTIARY = 1 << 17, CR8LOAD = 1 << 19,
	CR8STORE = 1 << 20, TPRSHADOW = 1 << 21, NMIWIN = 1 << 22, MOVDRX = 1 << 23, IOX = 1 << 24, IOBITMAPS = 1 << 25,
	MTF = 1 << 27, MSRBITMAPS = 1 << 28, MONITORX = 1 << 29, PAUSEX = 1 << 30,
};
#define SECONDARY (1u << 31)
enum {
	APICACCESS = 1 << 0, EPT = 1 << 1, DTX = 1 << 2, RDTSCP = 1 << 3, X2APIC = 1 << 4, VPID = 1 << 5, WBINVDX = 1 << 6,
	UNRESTRICTED = 1 << 7, APICREGS = 1 << 8, VID = 1 << 9, PLE = 1 << 10, RDRANDX = 1 << 11, INVPCID = 1 << 12,
	VMFUNC = 1 << 13, SHADOWING = 1 << 14, RDSEEDX = 1 << 16, PML = 1 << 17, VE = 1 << 18, XSAVES = 1 << 20,
	MBEC = 1 << 22, SPP = 1 << 23, TSCSCALING = 1 << 25,
};
enum {
	X_DEBUG = 1 << 2, X_HOST64 = 1 << 9, X_ACK = 1 << 15, X_SAVEPAT = 1 << 18, X_PAT = 1 << 19, X_SAVEEFER = 1 << 20,
	X_EFER = 1 << 21, X_SAVETIMER = 1 << 22, X_PKRS = 1 << 29,
};
#define X_SECONDARY (1u << 31)
enum {
	E_DEBUG = 1 << 2, E_LONG = 1 << 9, E_PAT = 1 << 14, E_EFER = 1 << 15, E_BNDCFGS = 1 << 16, E_PKRS = 1 << 22,
	E_SPEC = 1 << 24,
};

/* An address that no processor has, and a linear address that is not canonical. */
#define BEYOND (1ull << 51)
#define NONCANONICAL (1ull << 47)
/* Memory that nobody else uses, one to one; the extended page tables have no page at HOLE. */
#define SPARE 0x3000000ull
#define HOLE 0x40000000ull

/* What the guest is when nothing else is said. */
enum mode {
	LONG64, /* 64-bit code on L1's page tables */
	PAE32,	/* 32-bit code with PAE paging */
	V86,	/* virtual-8086 mode */
	REAL,	/* real mode, with extended page tables */
};

/* What is printed of an exit beside its reason and qualification. */
enum show {
	LENGTH = 1, /* of the instruction */
	INFO = 2,   /* about the instruction */
	EVENT = 4,  /* interruption information, and its error code */
	VECTORING = 8,
	PHYSICAL = 16, /* guest-physical address */
	LINEAR = 32,
	RIP = 64, /* from where the guest began */
	TIMER = 128,
	ACTIVITY = 512,
	RAX = 1024, /* of the guest */
	PAGE = 2048, /* bits 11:9 of an EPT violation's qualification, which not every processor has */
	RANDOM = 256, /* what is defined about RDRAND and RDSEED */
};

struct controls {
	u32 pin, proc1, proc2, proc3, exit, exit2, entry;
};

struct set {
	u32 field;
	u64 value;
};

/* One case: a good VMCS, what of it is changed, and what the guest executes. */
struct check {
	const char *id, *what;
	enum mode mode;
	struct controls on, off;
	struct set set[10]; /* up to field 0, the VPID */
	void (*more)(void);  /* when the VMCS is there */
	const char *guest;   /* its code; VMCALL where there is none */
	enum show show;
	void (*after)(void); /* when the line is printed */
};

/* The code of a guest, which ends with VMCALL. */
#define CODE(name, text)                                                                                                   \
	__asm__(".pushsection .text\n.globl " #name "\n" #name ":\n\t" text "\n\tvmcall\n.popsection");                                      \
	extern const char name[]

#define COUNT(array) (sizeof(array) / sizeof *(array))
void run_checks(const struct check *checks, unsigned count);
#define RUN(checks) run_checks(checks, COUNT(checks))

extern const struct check control_checks[], host_checks[], guest_checks[], exit_checks[], abort_checks[];
extern const unsigned control_count, host_count, guest_count, exit_count, abort_count;

/* Printing. */
void say(const char *text);
void say_number(u64 n);
void say_hex(u64 n);
int begin(const char *id, const char *what);
void outcome_of_instruction(u64 flags);
void absent(const char *what, int bit);

/* VMX. */
extern const char exited[], gdt[];
extern u8 idt[], tss[];
extern volatile u64 fault_vector, fault_error;
extern volatile u64 guest_rax;
extern volatile u32 interrupts;
int attempt(void (*code)(void));
void unexpected(u64 rip);
void conformance(const u32 *information);
void in_user_mode(void (*code)(void));
void in_compatibility_mode(void);
u64 outside_long_mode(void);
u64 enter(u64 how);
void prepare(enum mode mode, const struct controls *on, const struct controls *off);
extern u32 revision, physical_bits;
extern u8 vmxon_page[4096], vmcs_page[4096], other_page[4096], msr_list[16 * 600], bitmap[3 * 4096], page[4096];
extern u64 ept[5][512], pae_pointers[512];
extern const char vmcall_code[];

void operation_before(void);
void operation(void);

/* Instructions. */
static inline u64 rdmsr(u32 n)
{
	u32 low, high;
	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(n));
	return low | (u64)high << 32;
}

static inline void wrmsr(u32 n, u64 value)
{
	__asm__ volatile("wrmsr" ::"c"(n), "a"((u32)value), "d"((u32)(value >> 32)));
}

static inline void outb(unsigned short port, u8 value)
{
	__asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}

static inline u8 inb(unsigned short port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

/* CF and ZF after an instruction. */
#define FLAGS(text, ...)                                                                                                   \
	({                                                                                                                 \
		u64 flags;                                                                                                 \
		__asm__ volatile(text "\n\tpushfq\n\tpopq %0" : "=r"(flags) : __VA_ARGS__ : "memory", "cc");               \
		flags & 0x41;                                                                                              \
	})

static inline u64 vmwrite(u32 field, u64 value)
{
	return FLAGS("vmwrite %2, %1", "r"((u64)field), "rm"(value));
}

static inline u64 vmread(u32 field)
{
	u64 value = 0;
	__asm__ volatile("vmread %1, %0" : "=r"(value) : "r"((u64)field) : "cc");
	return value;
}

static inline u64 vmclear(u64 address)
{
	return FLAGS("vmclear %1", "m"(address));
}

static inline u64 vmptrld(u64 address)
{
	return FLAGS("vmptrld %1", "m"(address));
}

static inline u64 vmxon(u64 address)
{
	return FLAGS("vmxon %1", "m"(address));
}
