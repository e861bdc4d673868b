//! The Hyper-V interface of the processor (Hypervisor Top-Level Functional Specification, TLFS): what CPUID
//! tells of it, its model-specific registers, hypercalls, synthetic interrupts and timers.
//!
//! The enlightened VMCS is in `vmx/enlightened.rs`. What a register of the whole machine holds is kept in every
//! vCPU, and [`settle`] makes them equal before another one runs. Time is the tick.

mod hypercall;
mod msr;
mod state;
pub(crate) mod synic;
mod time;

use alloc::vec::Vec;

pub(crate) use hypercall::{enabled, hypercall, taken_from_guest, trap_after_flush};
pub(crate) use msr::{is_register, read, write};
pub use state::{HypervState, NestedGuestState, SyntheticTimerState};
pub(crate) use time::tsc_moved;

use crate::bus::Tick;
use crate::mem::Ctx;
use crate::model::Model;
use crate::ram::Ram;
use crate::vcpu::Vcpu;

/// The first CPUID leaf.
pub(crate) const FIRST_LEAF: u32 = 0x4000_0000;
/// Where there is no VMX, leaves end before those of nested virtualization.
const LAST_LEAF: u32 = 0x4000_0006;
const LAST_LEAF_NESTED: u32 = 0x4000_000a;

/// Leaf 40000003H, EAX: TIME_REF_COUNT (1), SynIC (2), synthetic timers (3), APIC registers and VP assist page
/// (4), hypercalls (5), VP index (6), reference TSC (9), frequencies (11), TSC invariant control (15).
const PRIVILEGES: u32 =
    1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15;
/// EDX: the frequency registers are there (8), synthetic timers can interrupt by a vector (19).
const FEATURES: u32 = 1 << 8 | 1 << 19;
/// Leaf 40000004H, EAX: remote flushes by hypercall (2), relaxed timing (5), no automatic EOI (9).
const HINTS: u32 = 1 << 2 | 1 << 5 | 1 << 9;
/// The enlightened VMCS is to be used.
const HINT_ENLIGHTENED_VMCS: u32 = 1 << 14;
/// Leaf 4000000AH, EAX: versions 1 to 1 of the enlightened VMCS, direct virtual flush (17), hypercalls that
/// flush guest-physical mappings (18), enlightened MSR bitmap (19: bitmaps are looked at when they are asked).
const NESTED: u32 = 0x0101 | 1 << 17 | 1 << 18 | 1 << 19;

/// What a vCPU has of it while it runs.
#[derive(Default)]
pub(crate) struct HyperV {
    pub state: HypervState,
    /// A register of the whole machine was written.
    shared: bool,
    /// Flushes that other vCPUs must do before they run again.
    flushes: Vec<Flush>,
}

/// Who must forget translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    /// vCPUs by the bits of a mask.
    Processors(u64),
    /// Those whose nested guest belongs to the virtual machine, by the bit of its virtual processor.
    Guests { vm_id: u64, processors: u64 },
    /// All: what was cached under this EPT pointer.
    Mappings { eptp: u64 },
}

impl HyperV {
    /// After power-up.
    pub fn new() -> HyperV {
        HyperV {
            state: HypervState::reset(),
            ..HyperV::default()
        }
    }

    /// Becomes `state`, between two instructions.
    pub fn load(&mut self, state: &HypervState) {
        *self = HyperV {
            state: *state,
            ..HyperV::default()
        };
    }
}

/// EAX, EBX, ECX and EDX of a leaf of the interface; `None` for one that it does not have.
pub(crate) fn cpuid(cpu: &Vcpu, leaf: u32) -> Option<[u32; 4]> {
    cpu.hyperv.as_ref()?;
    answer(cpu.model, cpu.vmx.profile.is_some(), leaf)
}

/// Every leaf of the interface, by number, with EAX, EBX, ECX and EDX: what a guest on this model sees of it, with
/// VMX (`nested`) or without.
pub fn hyperv_leaves(model: &Model, nested: bool) -> impl Iterator<Item = (u32, [u32; 4])> {
    (FIRST_LEAF..=LAST_LEAF_NESTED)
        .filter_map(move |leaf| Some((leaf, answer(model, nested, leaf)?)))
}

fn answer(model: &Model, nested: bool, leaf: u32) -> Option<[u32; 4]> {
    let last = if nested { LAST_LEAF_NESTED } else { LAST_LEAF };
    let text = |text: [u8; 4]| u32::from_le_bytes(text);
    Some(match leaf {
        FIRST_LEAF => [last, text(*b"Micr"), text(*b"osof"), text(*b"t Hv")],
        0x4000_0001 => [text(*b"Hv#1"), 0, 0, 0],
        // Version 10.0, in the form of the major and minor number.
        0x4000_0002 => [1, 10 << 16, 0, 0],
        0x4000_0003 => [PRIVILEGES, 0, 0, FEATURES],
        0x4000_0004 => {
            let enlightened = if nested { HINT_ENLIGHTENED_VMCS } else { 0 };
            // Spinning is never told.
            [HINTS | enlightened, !0, model.physical_bits, 0]
        }
        0x4000_0005 => [crate::MAX_CPUS, crate::MAX_CPUS, 0, 0],
        0x4000_000a if nested => [NESTED, 0, 0, 0],
        _ if (FIRST_LEAF..=last).contains(&leaf) => [0; 4],
        _ => return None,
    })
}

/// Lets synthetic timers expire that are due at or before `now`.
pub(crate) fn advance(cpu: &mut Vcpu, ram: &mut Ram, now: Tick) {
    if synic::deadline(cpu).is_some_and(|due| due <= now) {
        synic::expire(cpu, ram, now);
    }
}

/// After the turn of vCPU `from`: what it wrote to registers of the machine, and the flushes it asked for.
pub(crate) fn settle(vcpus: &mut [Vcpu], from: usize) {
    let Some(hyperv) = vcpus.get_mut(from).and_then(|cpu| cpu.hyperv.as_mut()) else {
        return;
    };
    let flushes = core::mem::take(&mut hyperv.flushes);
    let shared = core::mem::take(&mut hyperv.shared).then_some(hyperv.state);
    for (n, cpu) in vcpus.iter_mut().enumerate() {
        if let (Some(of), Some(hyperv)) = (&shared, &mut cpu.hyperv) {
            hyperv.state = HypervState {
                guest_os_id: of.guest_os_id,
                hypercall: of.hypercall,
                reference_tsc: of.reference_tsc,
                tsc_invariant: of.tsc_invariant,
                ..hyperv.state
            };
        }
        for flush in &flushes {
            flush.perform(cpu, n);
        }
    }
}

impl Flush {
    fn perform(self, cpu: &mut Vcpu, n: usize) {
        let has = |mask: u64, bit: usize| bit < 64 && mask >> bit & 1 != 0;
        match self {
            Flush::Processors(mask) if has(mask, n) => cpu.flush_tlb(),
            Flush::Guests { vm_id, processors } => {
                let guest = cpu.hyperv.as_ref().map(|hyperv| hyperv.state.nested);
                if guest.is_some_and(|g| g.vm_id == vm_id && has(processors, g.vp_id as usize)) {
                    cpu.flush_tlb();
                }
            }
            Flush::Mappings { eptp } => {
                cpu.tlb.forget_eptp(eptp);
                cpu.refresh();
            }
            Flush::Processors(_) => {}
        }
    }
}

/// The state, where there is the interface.
pub(crate) fn state<'a>(x: &'a mut Ctx) -> Option<&'a mut HypervState> {
    x.cpu.hyperv.as_mut().map(|hyperv| &mut hyperv.state)
}

/// Notes that a register of the whole machine was written.
fn share(x: &mut Ctx) {
    if let Some(hyperv) = &mut x.cpu.hyperv {
        hyperv.shared = true;
    }
    x.cpu.touched_outside();
}

/// The enabled page of a register in the form of most: bit 0 enables, bits 63:12 are the address.
fn page(register: u64) -> Option<u64> {
    (register & 1 != 0).then_some(register & !0xfff)
}

/// Address of the VP assist page, where it is enabled.
pub(crate) fn assist_page(cpu: &Vcpu) -> Option<u64> {
    cpu.hyperv
        .as_ref()
        .and_then(|hyperv| page(hyperv.state.assist_page))
}
