//! The running form of a vCPU.

use alloc::boxed::Box;

use crate::flags::{Flags, bit};
use crate::fpu::Fpu;
use crate::hyperv::HyperV;
use crate::model::Model;
use crate::state::{Activity, MsrState, SegmentState, TableState};
use crate::tlb::Tlb;
use crate::vmx::Vmx;
use crate::watch::Watch;

/// General registers by encoding.
pub(crate) mod reg {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    /// Always zero: the base or index of an address that has none.
    pub const ZERO: usize = 16;
    /// Copy of the FS base, for address computation.
    pub const FS_BASE: usize = 17;
    /// Copy of the GS base.
    pub const GS_BASE: usize = 18;
    /// As many as a byte can name, so that an index from an operation needs no bounds check.
    pub const COUNT: usize = 256;
}

/// Segment registers by encoding, then the two system segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Seg {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
    Ldtr,
    Tr,
}

/// Access-rights bits of [`SegmentState::rights`].
pub(crate) mod rights {
    pub const ACCESSED: u32 = 1;
    /// Data: writable. Code: readable.
    pub const WRITABLE: u32 = 2;
    /// Data: expand-down. Code: conforming.
    pub const DOWN: u32 = 4;
    pub const CODE: u32 = 8;
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const PRESENT: u32 = 1 << 7;
    pub const LONG: u32 = 1 << 13;
    pub const BIG: u32 = 1 << 14;
    pub const GRANULARITY: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;
}

/// Control-register and EFER bits.
pub(crate) mod cr {
    pub const CR0_PE: u64 = 1;
    pub const CR0_MP: u64 = 1 << 1;
    pub const CR0_EM: u64 = 1 << 2;
    pub const CR0_TS: u64 = 1 << 3;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_NE: u64 = 1 << 5;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_AM: u64 = 1 << 18;
    pub const CR0_NW: u64 = 1 << 29;
    pub const CR0_CD: u64 = 1 << 30;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_VME: u64 = 1;
    pub const CR4_PVI: u64 = 1 << 1;
    pub const CR4_TSD: u64 = 1 << 2;
    pub const CR4_DE: u64 = 1 << 3;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_MCE: u64 = 1 << 6;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_PCE: u64 = 1 << 8;
    pub const CR4_OSFXSR: u64 = 1 << 9;
    pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
    pub const CR4_UMIP: u64 = 1 << 11;
    pub const CR4_VMXE: u64 = 1 << 13;
    pub const CR4_FSGSBASE: u64 = 1 << 16;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;
    pub const EFER_SCE: u64 = 1;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
}

/// Default operand and address size of the code segment; 64 means 64-bit mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum CodeSize {
    Bits16,
    Bits32,
    Bits64,
}

impl CodeSize {
    pub fn bits(self) -> u32 {
        16 << self as u32
    }
}

/// A vCPU while it runs. [`crate::VcpuState`] is what is saved of it.
#[repr(C)]
pub(crate) struct Vcpu {
    /// General registers, then the slots of [`reg`]. 32-bit values are kept zero-extended.
    pub gpr: [u64; reg::COUNT],
    /// Next instruction, as an offset in CS. While an instruction executes this is already past it.
    pub rip: u64,
    pub flags: Flags,
    /// Low bits of every TLB tag that may match now: address space and kind of access.
    pub tlb_key: u64,
    pub tlb: Tlb,

    /// Segments by [`Seg`].
    pub segments: [SegmentState; 8],
    pub gdtr: TableState,
    pub idtr: TableState,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub pdpte: [u64; 4],
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub msrs: MsrState,
    pub fpu: Fpu,
    pub apic: crate::apic::Apic,

    /// Current privilege level (DPL of SS).
    pub cpl: u8,
    /// Size of the current code segment.
    pub code_size: CodeSize,
    /// Instructions must go one by one through the checked path: TF, armed debug registers,
    /// alignment checks.
    pub careful: bool,
    /// SSE instructions neither #UD nor #NM (CR0.EM, CR0.TS, CR4.OSFXSR).
    pub sse_ready: bool,

    pub activity: Activity,
    /// The instruction before was STI.
    pub sti_shadow: bool,
    /// The instruction before loaded SS.
    pub mov_ss_shadow: bool,
    /// The instruction at hand follows a load of SS.
    pub after_mov_ss: bool,
    pub nmi_blocked: bool,
    pub pending_debug: u64,
    pub monitor: Option<u64>,
    pub random_count: u64,

    /// Set by whatever makes the rest of the current block stale or must be looked at before the
    /// next instruction: mode or mapping changes, STI, written code.
    pub leave_block: bool,
    /// Set with `leave_block` when the board or an APIC was touched, so that messages to other
    /// vCPUs and deadlines may be new.
    pub look_outside: bool,
    /// Another vCPU has something to execute.
    pub others_run: bool,
    /// PAUSE: the others may be what this one waits for, so that its turn ends.
    pub turn_over: bool,

    pub model: &'static Model,
    /// vCPUs of the machine, for CPUID.
    pub cpus: u32,
    pub vmx: Vmx,
    /// `None` where the machine has no Hyper-V interface.
    pub hyperv: Option<Box<HyperV>>,
    /// Here while it is this vCPU's turn.
    pub watch: Option<Box<Watch>>,
}

impl Vcpu {
    /// The PCID in CR3; 0 where there are none.
    pub fn current_pcid(&self) -> u16 {
        if self.cr4 & cr::CR4_PCIDE != 0 {
            self.cr3 as u16 & 0xfff
        } else {
            0
        }
    }

    /// PAE paging: page-directory-pointer registers are in use.
    pub fn uses_pdptes(&self) -> bool {
        crate::exec::control::uses_pdptes(self.cr0, self.cr4, self.msrs.efer)
    }

    /// Bits of CR4 that may be set.
    pub fn cr4_bits(&self) -> u64 {
        let vmx = if self.vmx.profile.is_some() {
            cr::CR4_VMXE
        } else {
            0
        };
        self.model.cr4_bits() | vmx
    }

    pub fn seg(&self, seg: Seg) -> &SegmentState {
        &self.segments[seg as usize]
    }

    pub fn seg_mut(&mut self, seg: Seg) -> &mut SegmentState {
        &mut self.segments[seg as usize]
    }

    pub fn protected(&self) -> bool {
        self.cr0 & cr::CR0_PE != 0
    }

    /// IA-32e mode (64-bit or compatibility).
    pub fn long_mode(&self) -> bool {
        self.msrs.efer & cr::EFER_LMA != 0
    }

    pub fn is_64(&self) -> bool {
        self.code_size == CodeSize::Bits64
    }

    /// Notes that the board or an APIC was touched.
    pub fn touched_outside(&mut self) {
        self.leave_block = true;
        self.look_outside = true;
    }

    /// Replaces RFLAGS and recomputes what hangs on TF, AC and IF.
    pub fn set_rflags(&mut self, rflags: u64) {
        self.flags.set(rflags);
        self.refresh();
        self.leave_block = true;
    }

    /// Recomputes everything derived from control registers, segments, CPL and flags. To be
    /// called after any change of them. (Not of the TLB: see [`Vcpu::flush_tlb`].)
    pub fn refresh(&mut self) {
        self.gpr[reg::FS_BASE] = self.seg(Seg::Fs).base;
        self.gpr[reg::GS_BASE] = self.seg(Seg::Gs).base;
        self.cpl = if !self.protected() {
            0
        } else if self.v86() {
            3
        } else {
            (self.seg(Seg::Ss).rights >> rights::DPL_SHIFT & 3) as u8
        };
        let cs = self.seg(Seg::Cs).rights;
        self.code_size = if self.long_mode() && cs & rights::LONG != 0 {
            CodeSize::Bits64
        } else if cs & rights::BIG != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        let alignment_checks =
            self.cpl == 3 && self.cr0 & cr::CR0_AM != 0 && self.flags.rest & bit::AC != 0;
        self.careful = alignment_checks
            || self.flags.rest & (bit::TF | bit::RF) != 0
            || self.dr7 & 0xff != 0
            || self.vmx.traps_each_instruction();
        self.sse_ready =
            self.cr0 & (cr::CR0_EM | cr::CR0_TS) == 0 && self.cr4 & cr::CR4_OSFXSR != 0;
        self.tlb_key = self.tlb.key(self.access_kind());
        self.leave_block = true;
    }

    /// Which set of TLB entries ordinary data accesses use.
    pub fn access_kind(&self) -> crate::tlb::Kind {
        use crate::tlb::Kind;
        if self.cpl == 3 {
            Kind::User
        } else if self.cr4 & cr::CR4_SMAP != 0 && self.flags.rest & bit::AC != 0 {
            Kind::SupervisorAc
        } else {
            Kind::Supervisor
        }
    }

    /// Forgets every cached translation.
    pub fn flush_tlb(&mut self) {
        self.tlb.flush_all();
        self.refresh();
    }

    /// MOV CR3 and friends: makes `pcid` the current address space, keeping what is cached for it
    /// only where `keep`.
    pub fn switch_address_space(&mut self, pcid: u16, keep: bool) {
        self.tlb.switch(pcid, keep);
        self.refresh();
    }
}
