//! The saved state of a vCPU: its own type, lossless, equal field by field.

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::hyperv::HypervState;
use crate::vmx::ActiveEnlightened;
use crate::watch::Level;

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentState {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Access rights in the form of a VMCS (Vol. 3C, "Guest Register State"): type 3:0, S 4,
    /// DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
    pub rights: u32,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableState {
    /// Linear base address.
    pub base: u64,
    /// Last valid byte offset.
    pub limit: u16,
}

/// The segment registers in the order of their encoding, then LDTR and TR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentStates {
    /// ES.
    pub es: SegmentState,
    /// CS.
    pub cs: SegmentState,
    /// SS.
    pub ss: SegmentState,
    /// DS.
    pub ds: SegmentState,
    /// FS.
    pub fs: SegmentState,
    /// GS.
    pub gs: SegmentState,
    /// Local descriptor table.
    pub ldtr: SegmentState,
    /// Task register.
    pub tr: SegmentState,
}

/// Model-specific registers that are plain storage for the processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrState {
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// What to add to the tick to get the TSC.
    pub tsc_offset: u64,
    /// IA32_TSC_DEADLINE; 0 is disarmed.
    pub tsc_deadline: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_FEATURE_CONTROL.
    pub feature_control: u64,
    /// IA32_DEBUGCTL.
    pub debugctl: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_def_type: u64,
    /// IA32_MTRR_FIX*, in the order of their numbers (64K, 16K x2, 4K x8).
    pub mtrr_fixed: [u64; 11],
    /// IA32_MTRR_PHYSBASE/PHYSMASK pairs 0-7.
    pub mtrr_variable: [[u64; 2]; 8],
    /// IA32_BIOS_SIGN_ID.
    pub bios_sign_id: u64,
}

/// x87 and SSE state. `st` is in stack order (ST(0) first), each register as its 80 raw bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FpuState {
    /// Control word.
    pub control: u16,
    /// Status word, TOP included.
    pub status: u16,
    /// Tag per physical register, bit set = in use (the FXSAVE form).
    pub tag: u8,
    /// Opcode of the last non-control instruction, 11 bits.
    pub opcode: u16,
    /// Address of the last non-control instruction.
    pub instruction: u64,
    /// Address of the last memory operand.
    pub operand: u64,
    /// Selector of `instruction` (legacy forms).
    pub instruction_selector: u16,
    /// Selector of `operand` (legacy forms).
    pub operand_selector: u16,
    /// ST(0) to ST(7): 64-bit significand, then sign and exponent.
    pub st: [[u8; 10]; 8],
    /// MXCSR.
    pub mxcsr: u32,
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
    /// XCR0.
    pub xcr0: u64,
}

/// What the vCPU is doing (Vol. 3C, "Guest Non-Register State", activity state).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Active,
    /// In HLT or MWAIT until an event.
    Halted,
    /// After a triple fault.
    Shutdown,
    /// After INIT, waiting for a start-up IPI.
    WaitForSipi,
    /// After a VMX abort: nothing but a reset ends it (Vol. 3C, "VMX Aborts").
    VmxAbort,
}

/// Local APIC registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApicState {
    /// Initial APIC id, also the x2APIC id.
    pub id: u32,
    /// The xAPIC id register (writable), bits 31:24 of the register as a byte.
    pub xapic_id: u8,
    /// Task priority.
    pub tpr: u8,
    /// Logical destination register.
    pub ldr: u32,
    /// Destination format register.
    pub dfr: u32,
    /// Spurious interrupt vector register.
    pub svr: u32,
    /// In service, 256 bits.
    pub isr: [u32; 8],
    /// Trigger mode, 256 bits.
    pub tmr: [u32; 8],
    /// Requested, 256 bits.
    pub irr: [u32; 8],
    /// Error status, as last latched by a write.
    pub esr: u32,
    /// Errors gathered since then.
    pub esr_pending: u32,
    /// Interrupt command, low half.
    pub icr_low: u32,
    /// Interrupt command, high half.
    pub icr_high: u32,
    /// CMCI, timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 7],
    /// Timer: initial count.
    pub timer_initial: u32,
    /// Timer: divide configuration.
    pub timer_divide: u32,
    /// Timer: tick at which the running count reaches zero; `None` when stopped.
    pub timer_deadline: Option<u64>,
    /// An NMI is waiting.
    pub nmi_pending: bool,
    /// An INIT is waiting.
    pub init_pending: bool,
    /// A start-up IPI is waiting, with its vector.
    pub sipi_pending: Option<u8>,
    /// An ExtINT message is waiting.
    pub extint_pending: bool,
}

/// The loop that the last PAUSE of a guest was in (PAUSE-loop exiting).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseLoop {
    /// Tick of its first PAUSE.
    pub first: u64,
    /// Tick of its last one.
    pub last: u64,
}

/// VMX operation (Vol. 3C). All zero and `None` where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmxState {
    /// VMXON pointer: in VMX operation.
    pub region: Option<u64>,
    /// In VMX non-root operation.
    pub non_root: bool,
    /// Current-VMCS pointer.
    pub current: Option<u64>,
    /// The current VMCS: encodings and values of the fields that are not zero, by encoding.
    pub fields: Vec<(u32, u64)>,
    /// Its launch state is "launched".
    pub launched: bool,
    /// It is a shadow VMCS.
    pub shadow: bool,
    /// The VM entry just made has an event to inject.
    pub inject: bool,
    /// An MTF VM exit is pending.
    pub mtf_pending: bool,
    /// Virtual NMIs are blocked.
    pub virtual_nmi_blocking: bool,
    /// Where the VMX-preemption timer reaches zero: a count of a TSC that was never written.
    pub preemption_deadline: Option<u64>,
    /// Offset in the virtual-APIC page of a write whose emulation is due.
    pub apic_write: Option<u16>,
    /// The VM entry just made compares the virtual task priority with its threshold.
    pub threshold_due: bool,
    /// A pending virtual interrupt is recognized.
    pub virtual_interrupt: bool,
    /// The guest has executed PAUSE at level 0 under PAUSE-loop exiting.
    pub pause_loop: Option<PauseLoop>,
    /// The enlightened VMCS that is active in place of a current one; `fields` are its.
    pub enlightened: Option<ActiveEnlightened>,
    /// A VM exit is due after a direct flush.
    pub trap_after_flush: bool,
}

impl VmxState {
    /// Address of the VMCS that `fields` are of, the current or the active enlightened one, where it is known.
    #[must_use]
    pub fn pointer(&self) -> Option<u64> {
        match self.enlightened {
            Some(ActiveEnlightened::At(address)) => Some(address),
            Some(ActiveEnlightened::ByAssistPage) => None,
            None => self.current,
        }
    }
}

impl VcpuState {
    /// Who executes.
    pub fn level(&self) -> Level {
        if self.vmx.non_root {
            Level::L2
        } else {
            Level::L1
        }
    }
}

/// Everything a vCPU is, between two instructions. Nothing hidden is left out, so a machine
/// continues from it on any engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Segment registers.
    pub segments: SegmentStates,
    /// GDTR.
    pub gdtr: TableState,
    /// IDTR.
    pub idtr: TableState,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// PDPTEs loaded by the last MOV to CR3 under PAE paging.
    pub pdpte: [u64; 4],
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// Model-specific registers.
    pub msrs: MsrState,
    /// x87 and SSE.
    pub fpu: FpuState,
    /// What it is doing.
    pub activity: Activity,
    /// The instruction before was STI: one boundary without interrupts.
    pub sti_shadow: bool,
    /// The instruction before loaded SS: one boundary without interrupts and debug traps.
    pub mov_ss_shadow: bool,
    /// An NMI is being handled; further ones wait for IRET.
    pub nmi_blocked: bool,
    /// Debug conditions met and not yet delivered, as DR6 bits.
    pub pending_debug: u64,
    /// Address range that MONITOR armed.
    pub monitor: Option<u64>,
    /// Numbers RDRAND and RDSEED have given out.
    pub random_count: u64,
    /// Local APIC.
    pub apic: ApicState,
    /// Virtual-machine extensions.
    pub vmx: VmxState,
    /// The Hyper-V interface.
    pub hyperv: HypervState,
}
