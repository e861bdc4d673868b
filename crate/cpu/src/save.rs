//! From the running vCPU to its saved state and back; the state after reset.

use alloc::sync::Arc;

use crate::apic::Apic;
use crate::flags::{Flags, bit};
use crate::fpu::Fpu;
use crate::hyperv::HypervState;
use crate::mem::canonical;
use crate::model::{Feature, Model};
use crate::state::{
    Activity, ApicState, FpuState, MsrState, SegmentState, SegmentStates, TableState, VcpuState,
    VmxState,
};
use crate::tlb::Tlb;
use crate::vcpu::{CodeSize, Vcpu, cr, reg, rights};
use crate::vmx::{Vmx, VmxProfile};

/// A state that no processor of the model can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{register} = {value:#x}: {reason}")]
pub struct StateError {
    /// Which register is wrong.
    pub register: &'static str,
    /// What it was to become.
    pub value: u64,
    /// The rule it breaks.
    pub reason: &'static str,
}

/// IA32_PAT after reset: WB, WT, UC-, UC, twice.
pub(crate) const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// Bits of DR6 that are always one.
pub(crate) const DR6_FIXED: u64 = 0xffff_0ff0;
/// The bit of DR7 that is always one.
pub(crate) const DR7_FIXED: u64 = 0x400;
/// IA32_APIC_BASE: this is the boot processor.
const APIC_BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: enabled, at the usual address.
const APIC_BASE_RESET: u64 = 0xfee0_0000 | 1 << 11;
/// MONITOR and MWAIT are there.
const MISC_ENABLE_MONITOR: u64 = 1 << 18;
/// Fast strings on; branch trace storage and PEBS absent.
const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;

/// The base of a segment that is in use. That of an unusable one may be anything, as a VM entry loads it
/// (Vol. 3C, "Checks on Guest Segment Registers").
fn usable_base(segment: &SegmentState) -> u64 {
    if segment.rights & rights::UNUSABLE == 0 {
        segment.base
    } else {
        0
    }
}

fn data_segment() -> SegmentState {
    SegmentState {
        selector: 0,
        base: 0,
        limit: 0xffff,
        rights: 0x93,
    }
}

impl VcpuState {
    /// The state after power-up (Vol. 3A, "Processor State After Reset"): vCPU 0 at the reset
    /// vector, any other waiting for a start-up IPI.
    pub fn reset(index: u32, model: &Model) -> VcpuState {
        let data = data_segment();
        let cs = SegmentState {
            selector: 0xf000,
            base: 0xffff_0000,
            rights: 0x9b,
            ..data
        };
        let boot = index == 0;
        let mut gpr = [0; 16];
        gpr[reg::RDX] = u64::from(model.signature);
        let table = TableState {
            base: 0,
            limit: 0xffff,
        };
        VcpuState {
            gpr,
            rip: 0xfff0,
            rflags: bit::FIXED,
            segments: SegmentStates {
                es: data,
                cs,
                ss: data,
                ds: data,
                fs: data,
                gs: data,
                ldtr: SegmentState {
                    rights: 0x82,
                    ..data
                },
                tr: SegmentState {
                    rights: 0x8b,
                    ..data
                },
            },
            gdtr: table,
            idtr: table,
            cr0: cr::CR0_CD | cr::CR0_NW | cr::CR0_ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            pdpte: [0; 4],
            dr: [0; 4],
            dr6: DR6_FIXED,
            dr7: DR7_FIXED,
            msrs: MsrState {
                pat: PAT_RESET,
                apic_base: APIC_BASE_RESET | if boot { APIC_BASE_BSP } else { 0 },
                misc_enable: MISC_ENABLE_RESET
                    | if model.has(Feature::Monitor) {
                        MISC_ENABLE_MONITOR
                    } else {
                        0
                    },
                ..MsrState::default()
            },
            fpu: FpuState {
                control: 0x40,
                status: 0,
                tag: 0xff, // All registers hold +0.0.
                opcode: 0,
                instruction: 0,
                operand: 0,
                instruction_selector: 0,
                operand_selector: 0,
                st: [[0; 10]; 8],
                mxcsr: 0x1f80,
                xmm: [0; 16],
                xcr0: 1,
            },
            activity: if boot {
                Activity::Active
            } else {
                Activity::WaitForSipi
            },
            sti_shadow: false,
            mov_ss_shadow: false,
            nmi_blocked: false,
            pending_debug: 0,
            monitor: None,
            random_count: 0,
            apic: ApicState::reset(index),
            vmx: VmxState::default(),
            hyperv: HypervState::default(),
        }
    }

    /// What INIT does to a vCPU (Vol. 3A, Table "IA-32 and Intel 64 Processor States Following
    /// Power-up, Reset, or INIT"): as reset, but for the caches' bits of CR0, x87 and SSE, and
    /// the model-specific registers. The local APIC is reset but keeps its id; the boot
    /// processor starts at the reset vector again.
    pub(crate) fn after_init(&self, model: &Model) -> VcpuState {
        let index = self.apic.id;
        let mut state = VcpuState::reset(index, model);
        state.cr0 = self.cr0 & (cr::CR0_CD | cr::CR0_NW) | cr::CR0_ET;
        state.fpu = self.fpu;
        state.msrs = MsrState {
            efer: 0,
            tsc_deadline: 0,
            ..self.msrs
        };
        // A start-up IPI that waits came after the INIT.
        state.apic.sipi_pending = self.apic.sipi_pending;
        state.random_count = self.random_count;
        state.hyperv = self.hyperv;
        if self.msrs.apic_base & APIC_BASE_BSP != 0 {
            state.activity = Activity::Active;
        } else {
            state.activity = Activity::WaitForSipi;
        }
        state
    }

    /// Whether a processor of `model` can be in this state.
    ///
    /// # Errors
    /// The first register found that cannot have its value.
    pub fn check(&self, model: &Model) -> Result<(), StateError> {
        let ok = |fine: bool, register, value, reason| {
            if fine {
                Ok(())
            } else {
                Err(StateError {
                    register,
                    value,
                    reason,
                })
            }
        };
        let long = self.msrs.efer & cr::EFER_LMA != 0;
        let paging = self.cr0 & cr::CR0_PG != 0;
        let cr0_ok = self.cr0 & !crate::exec::control::CR0_BITS == 0
            && (!paging || self.cr0 & cr::CR0_PE != 0)
            && (self.cr0 & cr::CR0_NW == 0 || self.cr0 & cr::CR0_CD != 0);
        ok(
            cr0_ok,
            "cr0",
            self.cr0,
            "reserved bits, PG without PE, or NW without CD",
        )?;
        ok(
            self.cr4 & !(model.cr4_bits() | cr::CR4_VMXE) == 0,
            "cr4",
            self.cr4,
            "bits the CPU model lacks",
        )?;
        ok(
            self.cr4 & cr::CR4_PCIDE == 0 || long,
            "cr4",
            self.cr4,
            "PCIDE outside IA-32e mode",
        )?;
        ok(
            self.msrs.efer & !model.efer_bits() == 0,
            "efer",
            self.msrs.efer,
            "bits the CPU model lacks",
        )?;
        ok(
            long == (paging && self.msrs.efer & cr::EFER_LME != 0),
            "efer",
            self.msrs.efer,
            "LMA must be LME with CR0.PG",
        )?;
        ok(
            !long || self.cr4 & cr::CR4_PAE != 0,
            "cr4",
            self.cr4,
            "IA-32e mode without PAE",
        )?;
        ok(
            self.cr3 & model.reserved_physical() == 0,
            "cr3",
            self.cr3,
            "beyond the physical address width",
        )?;
        ok(
            self.rflags & !(bit::ALL | bit::FIXED) == 0,
            "rflags",
            self.rflags,
            "reserved bits",
        )?;
        ok(
            self.rflags & bit::VM == 0 || self.cr0 & cr::CR0_PE != 0 && !long,
            "rflags",
            self.rflags,
            "virtual-8086 mode outside 32-bit protected mode",
        )?;
        ok(
            self.dr6 >> 32 == 0,
            "dr6",
            self.dr6,
            "upper half must be zero",
        )?;
        ok(
            self.dr7 >> 32 == 0,
            "dr7",
            self.dr7,
            "upper half must be zero",
        )?;
        ok(canonical(self.rip), "rip", self.rip, "not canonical")?;
        for (name, base) in [
            ("gdtr.base", self.gdtr.base),
            ("idtr.base", self.idtr.base),
            ("fs.base", self.segments.fs.base),
            ("gs.base", self.segments.gs.base),
            ("ldtr.base", usable_base(&self.segments.ldtr)),
            ("tr.base", self.segments.tr.base),
            ("kernel_gs_base", self.msrs.kernel_gs_base),
            ("lstar", self.msrs.lstar),
            ("cstar", self.msrs.cstar),
            ("sysenter_esp", self.msrs.sysenter_esp),
            ("sysenter_eip", self.msrs.sysenter_eip),
        ] {
            ok(canonical(base), name, base, "not canonical")?;
        }
        for (name, segment) in [
            ("es", &self.segments.es),
            ("cs", &self.segments.cs),
            ("ss", &self.segments.ss),
            ("ds", &self.segments.ds),
        ] {
            let base = usable_base(segment);
            ok(base >> 32 == 0, name, base, "base beyond 32 bits")?;
        }
        ok(
            crate::exec::msr::pat_is_valid(self.msrs.pat),
            "pat",
            self.msrs.pat,
            "unknown memory type",
        )?;
        let xcr0 = self.fpu.xcr0;
        ok(
            xcr0 & 1 != 0 && xcr0 & !(model.xcr0_bits() | 1) == 0,
            "xcr0",
            xcr0,
            "bits the CPU model lacks, or no x87",
        )?;
        ok(
            self.fpu.mxcsr & !0xffff == 0,
            "mxcsr",
            u64::from(self.fpu.mxcsr),
            "reserved bits",
        )
    }
}

impl ApicState {
    /// A local APIC after power-up (Vol. 3A, "Local APIC State After Power-Up or Reset").
    pub(crate) fn reset(id: u32) -> ApicState {
        const MASKED: u32 = 1 << 16;
        ApicState {
            id,
            xapic_id: id as u8,
            dfr: !0,
            svr: 0xff,
            lvt: [MASKED; 7],
            ..ApicState::default()
        }
    }
}

impl Vcpu {
    /// vCPU `index` of `cpus` after power-up.
    pub fn new(model: &'static Model, index: u32, cpus: u32, vmx: Option<Arc<VmxProfile>>) -> Vcpu {
        let state = VcpuState::reset(index, model);
        let mut cpu = Vcpu {
            gpr: [0; reg::COUNT],
            rip: 0,
            flags: Flags::new(bit::FIXED),
            tlb_key: 0,
            tlb: Tlb::new(),
            segments: [SegmentState::default(); 8],
            gdtr: state.gdtr,
            idtr: state.idtr,
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            pdpte: [0; 4],
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            msrs: state.msrs,
            fpu: Fpu::load(&state.fpu),
            apic: Apic::load(&state.apic, &state.msrs),
            cpl: 0,
            code_size: CodeSize::Bits16,
            careful: false,
            sse_ready: false,
            activity: state.activity,
            sti_shadow: false,
            mov_ss_shadow: false,
            nmi_blocked: false,
            pending_debug: 0,
            monitor: None,
            random_count: 0,
            leave_block: true,
            look_outside: false,
            others_run: false,
            turn_over: false,
            model,
            cpus,
            after_mov_ss: false,
            vmx: Vmx::new(vmx),
            hyperv: None,
            watch: None,
        };
        cpu.set_state(&state);
        cpu
    }

    /// Everything this vCPU is.
    pub fn save(&self) -> VcpuState {
        let [es, cs, ss, ds, fs, gs, ldtr, tr] = self.segments;
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.gpr[..16]);
        VcpuState {
            gpr,
            rip: self.rip,
            rflags: self.flags.get(),
            segments: SegmentStates {
                es,
                cs,
                ss,
                ds,
                fs,
                gs,
                ldtr,
                tr,
            },
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            pdpte: self.pdpte,
            dr: self.dr,
            dr6: self.dr6,
            dr7: self.dr7,
            msrs: self.msrs,
            fpu: self.fpu.save(),
            activity: self.activity,
            sti_shadow: self.sti_shadow,
            mov_ss_shadow: self.mov_ss_shadow,
            nmi_blocked: self.nmi_blocked,
            pending_debug: self.pending_debug,
            monitor: self.monitor,
            random_count: self.random_count,
            apic: self.apic.save(),
            vmx: self.vmx.save(),
            hyperv: self
                .hyperv
                .as_ref()
                .map_or_else(HypervState::default, |h| h.state),
        }
    }

    /// Becomes `state`. The TLB is emptied. On an error nothing has changed.
    pub fn load(&mut self, state: &VcpuState) -> Result<(), StateError> {
        state.check(self.model)?;
        self.check_vmx(state)?;
        self.set_state(state);
        Ok(())
    }

    /// What of a state needs VMX, where there is none.
    fn check_vmx(&self, state: &VcpuState) -> Result<(), StateError> {
        let wrong = |register, value, reason| {
            Err(StateError {
                register,
                value,
                reason,
            })
        };
        if self.vmx.profile.is_none()
            && (state.cr4 & cr::CR4_VMXE != 0 || state.vmx != VmxState::default())
        {
            return wrong("cr4", state.cr4, "VMX, which the machine lacks");
        }
        if self.hyperv.is_none()
            && (state.hyperv != HypervState::default() || state.vmx.enlightened.is_some())
        {
            let value = state.hyperv.guest_os_id;
            return wrong(
                "hyperv",
                value,
                "the Hyper-V interface, which the machine lacks",
            );
        }
        let vmcs = state.vmx.current.is_some() || state.vmx.enlightened.is_some();
        if state.vmx.non_root && (!vmcs || state.vmx.region.is_none()) {
            return wrong("vmx.current", 0, "VMX non-root operation without a VMCS");
        }
        Ok(())
    }

    pub(crate) fn set_state(&mut self, state: &VcpuState) {
        let s = &state.segments;
        self.gpr[..16].copy_from_slice(&state.gpr);
        self.rip = state.rip;
        self.flags = Flags::new(state.rflags);
        self.segments = [s.es, s.cs, s.ss, s.ds, s.fs, s.gs, s.ldtr, s.tr];
        self.gdtr = state.gdtr;
        self.idtr = state.idtr;
        self.cr0 = state.cr0;
        self.cr2 = state.cr2;
        self.cr3 = state.cr3;
        self.cr4 = state.cr4;
        self.pdpte = state.pdpte;
        self.dr = state.dr;
        self.dr6 = state.dr6;
        self.dr7 = state.dr7;
        self.msrs = state.msrs;
        self.fpu = Fpu::load(&state.fpu);
        self.apic = Apic::load(&state.apic, &state.msrs);
        self.activity = state.activity;
        self.sti_shadow = state.sti_shadow;
        self.mov_ss_shadow = state.mov_ss_shadow;
        self.nmi_blocked = state.nmi_blocked;
        self.pending_debug = state.pending_debug;
        self.monitor = state.monitor;
        self.random_count = state.random_count;
        self.vmx.load(&state.vmx);
        if let Some(hyperv) = &mut self.hyperv {
            hyperv.load(&state.hyperv);
        }
        self.enter_world();
    }

    /// Caches nothing of the world before: that of the root, or of a guest, begins.
    pub(crate) fn enter_world(&mut self) {
        let pcid = self.current_pcid();
        if self.vmx.non_root {
            let controls = self.vmx.controls;
            self.tlb.enter_guest(&controls, pcid);
        } else {
            self.tlb.enter_host(pcid, false);
        }
        self.flush_tlb();
    }

    /// INIT, from the local APIC.
    pub fn init(&mut self) {
        let state = self.save().after_init(self.model);
        self.set_state(&state);
    }

    /// A start-up IPI while waiting for one: real mode at page `vector`.
    pub fn start_up(&mut self, vector: u8) {
        if self.activity != Activity::WaitForSipi {
            return;
        }
        let cs = &mut self.segments[crate::vcpu::Seg::Cs as usize];
        cs.selector = u16::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        self.rip = 0;
        self.activity = Activity::Active;
        self.refresh();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> &'static Model {
        <&Model>::default()
    }

    #[test]
    fn reset_starts_the_first_cpu_at_the_reset_vector_and_parks_the_others() {
        let first = Vcpu::new(model(), 0, 2, None);
        assert_eq!(first.segments[1].base + first.rip, 0xffff_fff0);
        assert_eq!(first.activity, Activity::Active);
        assert_eq!(first.cpl, 0);
        let second = Vcpu::new(model(), 1, 2, None).save();
        assert_eq!(second.activity, Activity::WaitForSipi);
        assert_eq!(second.msrs.apic_base & APIC_BASE_BSP, 0);
        assert_eq!(second.apic.id, 1);
    }

    #[test]
    fn a_state_survives_load_and_save() {
        let mut cpu = Vcpu::new(model(), 0, 1, None);
        let mut state = cpu.save();
        assert_eq!(state, VcpuState::reset(0, model()));
        for (n, register) in state.gpr.iter_mut().enumerate() {
            *register = 0x1111_1111_1111_1111 * n as u64;
        }
        state.rflags = bit::ALL & !bit::VM | bit::FIXED;
        state.cr0 |= cr::CR0_PE;
        state.fpu.status = 3 << 11;
        state.fpu.st[0] = [7; 10];
        state.fpu.st[5] = [9; 10];
        state.fpu.xmm[15] = u128::MAX / 3;
        state.pending_debug = 1;
        state.monitor = Some(64);
        cpu.load(&state).unwrap();
        assert_eq!(cpu.save(), state);
    }

    #[test]
    fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
        let mut cpu = Vcpu::new(model(), 0, 1, None);
        let before = cpu.save();
        let mut state = before.clone();
        state.rip = 0x8000_0000_0000;
        assert_eq!(cpu.load(&state).unwrap_err().register, "rip");
        state = before.clone();
        state.cr0 |= cr::CR0_PG;
        assert_eq!(cpu.load(&state).unwrap_err().register, "cr0");
        state = before.clone();
        state.msrs.efer = cr::EFER_LMA;
        assert_eq!(cpu.load(&state).unwrap_err().register, "efer");
        assert_eq!(cpu.save(), before);
    }

    #[test]
    fn the_base_of_an_unusable_segment_may_be_anything() {
        let mut cpu = Vcpu::new(model(), 0, 1, None);
        let mut state = cpu.save();
        state.segments.ldtr.base = 1 << 60;
        state.segments.ds.base = 1 << 40;
        assert!(state.check(model()).is_err());
        state.segments.ldtr.rights |= rights::UNUSABLE;
        assert_eq!(state.check(model()).unwrap_err().register, "ds");
        state.segments.ds.rights |= rights::UNUSABLE;
        cpu.load(&state).unwrap();
        assert_eq!(cpu.save(), state);
    }

    #[test]
    fn a_start_up_ipi_starts_at_its_page() {
        let mut cpu = Vcpu::new(model(), 1, 2, None);
        cpu.start_up(0x9f);
        assert_eq!(cpu.activity, Activity::Active);
        assert_eq!(cpu.segments[1].base, 0x9f000);
        assert_eq!(cpu.segments[1].selector, 0x9f00);
        cpu.start_up(0x10);
        assert_eq!(cpu.segments[1].base, 0x9f000);
    }

    #[test]
    fn init_keeps_sse_and_leaves_long_mode() {
        let mut cpu = Vcpu::new(model(), 1, 2, None);
        cpu.start_up(8);
        let mut state = cpu.save();
        state.cr0 = cr::CR0_PE | cr::CR0_PG | cr::CR0_ET;
        state.cr4 = cr::CR4_PAE;
        state.msrs.efer = cr::EFER_LMA | cr::EFER_LME;
        state.msrs.tsc_aux = 7;
        state.fpu.xmm[3] = 5;
        cpu.load(&state).unwrap();
        cpu.init();
        let after = cpu.save();
        assert_eq!(after.msrs.efer, 0);
        assert_eq!(after.cr0, cr::CR0_ET);
        assert_eq!((after.fpu.xmm[3], after.msrs.tsc_aux), (5, 7));
        assert_eq!(after.activity, Activity::WaitForSipi);
        assert_eq!(after.gpr[reg::RDX], u64::from(model().signature));
    }
}
