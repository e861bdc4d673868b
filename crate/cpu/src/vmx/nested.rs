//! The nested state of a vCPU: what KVM_GET_NESTED_STATE gives and KVM_SET_NESTED_STATE takes, byte for
//! byte.
//!
//! The rest of a vCPU travels as registers ([`Vcpu::load_registers`]). A guest that executes is in both:
//! registers hold it, and the blob has it in the guest-state area, as a VM exit here would save it. So
//! either may come first. Guest memory comes before both: what a blob points to is checked in it.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hypernest_vmcs::checks::EntryCheck;
use hypernest_vmcs::nested_state::{
    DEADLINE_VALID, Finding, NO_ADDRESS, Refused, Taker, state_flag,
};
use hypernest_vmcs::{Field, Layout, NestedState, RegionPage, Vmcs, entry, exit as exit_controls};
use hypernest_vmcs::{proc2, revision};

use super::entry::{compares_threshold, efer_of_mode, load_registers, pdptes_of, pending_debug};
use super::exit::{VALID, blocking, pending_debug_field, save_guest};
use super::memory::{Border, Current};
use super::{ActiveEnlightened, Controls, Vmx, abort, checks, enlightened};
use super::{preemption, virtual_interrupt};
use crate::bus::Tick;
use crate::ram::Ram;
use crate::save::StateError;
use crate::state::VcpuState;
use crate::vcpu::Vcpu;

/// What a nested state was like that a vCPU took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NestedReport {
    /// Name of the layout of its VMCS image; `None` where it has none.
    pub layout: Option<String>,
    /// The image was of another layout than the one that is written here.
    pub translated: bool,
    /// Fields that this machine does not have and that were not 0.
    pub dropped: Vec<(Field, u64)>,
    /// What is odd about it.
    pub findings: Vec<Finding>,
}

/// A nested state that a vCPU does not take. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NestedRefused {
    /// A check that KVM makes fails.
    #[error("{0}")]
    Check(Refused),
    /// The VMCS of the guest fails a check of VM entries.
    #[error("{refused}: {id}")]
    Entry {
        /// The number that KVM would fail with.
        refused: Refused,
        /// The row of the entry checks.
        id: &'static str,
    },
    /// The guest's registers are none that a processor of this model can have.
    #[error(transparent)]
    State(#[from] StateError),
}

impl From<Refused> for NestedRefused {
    fn from(refused: Refused) -> NestedRefused {
        NestedRefused::Check(refused)
    }
}

impl From<&'static EntryCheck> for NestedRefused {
    fn from(check: &'static EntryCheck) -> NestedRefused {
        NestedRefused::Entry {
            refused: Refused::entry(check),
            id: check.id,
        }
    }
}

/// What of the pending work of a vCPU the blob has flags for.
fn flags(vmx: &Vmx) -> u16 {
    let enlightened = match vmx.enlightened {
        Some(_) => state_flag::EVMCS,
        None => 0,
    };
    if !vmx.non_root {
        return enlightened;
    }
    let mut flags = state_flag::GUEST_MODE;
    if vmx.inject || vmx.threshold_due {
        flags |= state_flag::RUN_PENDING;
    }
    if vmx.mtf_pending {
        flags |= state_flag::MTF_PENDING;
    }
    flags | enlightened
}

/// Whether the VMCS uses VMCS shadowing; the region it names.
fn shadow_region(vmcs: &Vmcs) -> Option<u64> {
    let link = vmcs.get(Field::VMCS_LINK_POINTER);
    let shadowing = Controls::new(vmcs).proc2(proc2::VMCS_SHADOWING);
    (shadowing && link != NO_ADDRESS).then_some(link)
}

fn page(ram: &Ram, address: u64) -> RegionPage {
    let mut region = [0; 4096];
    // What is no memory has no content.
    let _ = ram.read(address, &mut region);
    region
}

/// An image as a page.
fn padded(image: &[u8]) -> RegionPage {
    let mut region = [0; 4096];
    let length = image.len().min(region.len());
    region[..length].copy_from_slice(&image[..length]);
    region
}

impl Vcpu {
    /// The nested state now. Neither the vCPU nor memory changes.
    pub fn nested_state(&mut self, ram: &Ram, now: Tick) -> NestedState {
        let mut state = NestedState::default();
        let (Some(profile), Some(region)) = (self.vmx.profile.clone(), self.vmx.region) else {
            return state;
        };
        state.vmxon = region;
        state.flags = flags(&self.vmx);
        if let Some(deadline) = self.vmx.preemption_deadline.filter(|_| self.vmx.non_root) {
            state.vmx_flags = DEADLINE_VALID;
            state.deadline = preemption::to_count(self, deadline);
        }
        if !self.vmx.has_vmcs() {
            return state;
        }
        let mut vmcs = self.image(now);
        if let Some(current) = self.vmx.current {
            state.vmcs = current;
            if let Some(indicator) = page(ram, current)[abort::INDICATOR..].first_chunk() {
                vmcs.abort = u32::from_le_bytes(*indicator);
            }
        }
        if !self.vmx.non_root {
            enlightened::read_all(&self.vmx, ram, &mut vmcs);
        }
        let regions = profile.regions();
        let mut image = [0; 4096];
        regions.writer().write(&vmcs, &mut image);
        state.data.extend(image);
        if let Some(link) = shadow_region(&vmcs).filter(|_| self.vmx.non_root) {
            let bytes = page(ram, link);
            let map = revision(&bytes).and_then(|(id, _)| regions.map(id));
            let mut image = [0; 4096];
            match map {
                Some(map) if map.revision() != regions.writer().revision() => {
                    let mut shadow = Vmcs::new();
                    map.read(&bytes, &mut shadow);
                    regions.writer().write(&shadow, &mut image);
                }
                _ => image = bytes,
            }
            state.data.extend(image);
        }
        state
    }

    /// The current VMCS, with the state of a guest that executes.
    fn image(&mut self, now: Tick) -> Box<Vmcs> {
        let kept = self.vmx.vmcs.clone();
        if self.vmx.non_root {
            let pending = pending_debug_field(self);
            save_guest(self, now, pending);
        }
        core::mem::replace(&mut self.vmx.vmcs, kept)
    }

    /// Takes a nested state in the place of what is there. The current VMCS that was is not written to its
    /// region; the image of a shadow VMCS is.
    ///
    /// # Errors
    /// Where it is not one, or this vCPU cannot take it: as KVM, and with guest mode every check of VM
    /// entries. Nothing has changed then.
    pub fn set_nested_state(
        &mut self,
        ram: &mut Ram,
        now: Tick,
        bytes: &[u8],
    ) -> Result<NestedReport, NestedRefused> {
        let state = NestedState::read(bytes)?;
        let profile = self.vmx.profile.clone();
        let layouts: Vec<&Layout> = profile.iter().flat_map(|p| p.accepted()).collect();
        state.check(&Taker {
            vmx: profile.is_some(),
            enlightened: profile.is_some() && self.hyperv.is_some(),
            smm: false,
            physical_bits: self.model.physical_bits as u8,
            layouts: &layouts,
        })?;
        let address = |address| (address != NO_ADDRESS).then_some(address);
        let mut vmx = Vmx::new(profile.clone());
        vmx.region = address(state.vmxon);
        vmx.current = address(state.vmcs);
        // Where it is, the VP assist page tells, whose register may come later.
        let enlightened = state.has(state_flag::EVMCS) && vmx.current.is_none();
        vmx.enlightened =
            (enlightened && vmx.region.is_some()).then_some(ActiveEnlightened::ByAssistPage);
        let mut report = NestedReport::default();
        let image = state.image().filter(|_| vmx.has_vmcs()).map(padded);
        if let (Some(image), Some(profile)) = (image, profile.as_deref()) {
            let id = revision(&image).map_or(0, |(id, _)| id);
            let regions = profile.regions();
            if let Some(map) = regions.map(id) {
                map.read(&image, &mut vmx.vmcs);
            }
            report.translated = id != regions.writer().revision();
            if let Some(layout) = regions.accepted().find(|layout| layout.takes(id)) {
                report.layout = Some(layout.name().to_string());
                report.findings = state.findings(layout);
                let full = layout.read(&image).unwrap_or_default();
                let lost = layout.field_mask().without(profile.fields());
                let value = |field: Field| (field, full.get(field));
                report.dropped = lost.iter().map(value).filter(|one| one.1 != 0).collect();
            }
        }
        vmx.non_root = state.has(state_flag::GUEST_MODE);
        let pending = state.has(state_flag::RUN_PENDING);
        if vmx.non_root {
            check_entry(self, ram, &vmx, pending)?;
            // KVM notes that only at the first exit.
            vmx.vmcs.launched = true;
            vmx.mtf_pending = state.has(state_flag::MTF_PENDING);
            // What is under way inside an instruction's work travels with the registers.
            vmx.apic_write = self.vmx.apic_write;
            vmx.pause_loop = self.vmx.pause_loop;
            vmx.trap_after_flush = self.vmx.trap_after_flush;
        }
        let before = self.save();
        debug_assert_eq!(Border::SetNestedState.current(), Current::Forgotten);
        self.vmx = vmx;
        if self.vmx.non_root {
            let valid = state.vmx_flags & DEADLINE_VALID != 0;
            let deadline = valid.then_some(state.deadline);
            self.resume_guest(ram, now, pending, deadline);
            if let Err(error) = self.save().check(self.model) {
                self.set_state(&before);
                return Err(error.into());
            }
            let shadow = shadow_region(&self.vmx.vmcs).zip(state.shadow_image());
            if let Some((link, image)) = shadow {
                // Where there is no memory, the image is nowhere to be seen.
                let _ = ram.write(link, image);
            }
        }
        self.enter_world();
        Ok(report)
    }

    /// Becomes the guest of the VMCS just taken over.
    fn resume_guest(&mut self, ram: &Ram, now: Tick, pending: bool, deadline: Option<u64>) {
        let controls = Controls::new(&self.vmx.vmcs);
        let word = |field| self.vmx.vmcs.get(field);
        let long = word(Field::VM_ENTRY_CONTROLS) & u64::from(entry::IA_32E_MODE_GUEST) != 0;
        let interruptibility = word(Field::GUEST_INTERRUPTIBILITY_INFO);
        let debug = pending_debug(word(Field::GUEST_PENDING_DBG_EXCEPTIONS));
        let timer = word(Field::VMX_PREEMPTION_TIMER_VALUE);
        let inject = word(Field::VM_ENTRY_INTR_INFO_FIELD) as u32 & VALID != 0;
        self.cr0 = word(Field::GUEST_CR0);
        self.msrs.efer = efer_of_mode(self.msrs.efer, self.cr0, long);
        load_registers(self);
        self.sti_shadow = interruptibility & blocking::STI != 0;
        self.mov_ss_shadow = interruptibility & blocking::MOV_SS != 0;
        let nmi = interruptibility & blocking::NMI != 0;
        match controls.virtual_nmis() {
            true => self.vmx.virtual_nmi_blocking = nmi,
            false => self.nmi_blocked = nmi,
        }
        const HELD: u64 = 0xf | crate::interrupt::DR6_BS;
        self.pending_debug = self.pending_debug & !HELD | debug;
        if controls.eptp.is_some() && self.uses_pdptes() {
            self.pdpte = pdptes_of(&self.vmx.vmcs);
        }
        let deadline = match deadline {
            Some(count) => preemption::from_count(self, count),
            None => preemption::deadline(self, now, timer),
        };
        let timed = controls.pin(hypernest_vmcs::pin::ACTIVATE_VMX_PREEMPTION_TIMER);
        self.vmx.preemption_deadline = timed.then_some(deadline);
        self.vmx.inject = pending && inject;
        self.vmx.threshold_due = pending && compares_threshold(self, &controls);
        self.vmx.controls = controls;
        self.vmx.virtual_interrupt = virtual_interrupt::is_recognized(self, ram);
    }

    /// Takes over all of `state` but VMX operation, whatever is in its `vmx`; of that only what is under way
    /// at an instruction boundary and no nested state has a place for: a write to a virtual APIC that is
    /// not emulated yet, and a PAUSE loop. A VMX-preemption timer that runs keeps its place on the TSC.
    ///
    /// # Errors
    /// As [`Vcpu::load`]; nothing has changed then.
    pub fn load_registers(&mut self, state: &VcpuState) -> Result<(), StateError> {
        let mut merged = state.clone();
        merged.vmx = self.vmx.save();
        merged.vmx.apic_write = state.vmx.apic_write;
        merged.vmx.pause_loop = state.vmx.pause_loop;
        merged.vmx.trap_after_flush = state.vmx.trap_after_flush;
        let moved = self.msrs.tsc_offset.wrapping_sub(state.msrs.tsc_offset);
        let deadline = self.vmx.preemption_deadline;
        merged.vmx.preemption_deadline = deadline.map(|tsc| tsc.wrapping_add(moved));
        self.load(&merged)
    }
}

/// The checks of VM entries that the VMCS of a guest must pass.
fn check_entry(cpu: &Vcpu, ram: &Ram, vmx: &Vmx, pending: bool) -> Result<(), &'static EntryCheck> {
    let mut vmcs = vmx.vmcs.clone();
    if !pending {
        // The event has been injected: it says nothing of the guest's state now.
        let info = vmcs.get(Field::VM_ENTRY_INTR_INFO_FIELD);
        vmcs.set(Field::VM_ENTRY_INTR_INFO_FIELD, info & !u64::from(VALID));
    }
    let controls = vmcs.get(Field::VM_EXIT_CONTROLS) as u32;
    let mut facts = checks::facts(cpu);
    // Nothing says in which mode the vCPU is before it has its registers: it was in that of the host.
    facts.long_mode = controls & exit_controls::HOST_ADDRESS_SPACE_SIZE != 0;
    facts.current_vmcs = vmx.current.unwrap_or(NO_ADDRESS);
    facts.vmxon = vmx.region.unwrap_or(NO_ADDRESS);
    checks::failing_in(cpu, ram, &vmcs, facts)
}
