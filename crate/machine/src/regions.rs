//! VMCS regions of a machine: their layouts, nested states, and how many regions there are of each layout.

use hypernest_cpu::{Layout, NestedReport, Ram, VcpuState, VmxProfile};

use crate::engine::EngineError;
use crate::machine::Machine;
use crate::state::{Config, RestoreError};
use hypernest_cpu::Model;

/// Pages of guest memory that look like VMCS regions of a layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionCount {
    /// Name of the layout.
    pub layout: String,
    /// Its revision identifier.
    pub revision: u32,
    /// Pages that begin with it; the regions of VMXON are not among them.
    pub pages: usize,
    /// The processor writes this layout.
    pub written: bool,
}

/// Bytes of a region at most; regions begin at multiples of it.
const REGION: usize = 4096;
/// The bit of a region's first word that is no part of its revision.
const SHADOW: u32 = 1 << 31;

impl Machine {
    /// What its VMX offers, and the layouts of its VMCS regions. `None` where there is no VMX.
    pub fn vmx_profile(&self) -> Option<&VmxProfile> {
        self.engine.vmx_profile()
    }

    /// VMX operation of a vCPU in the bytes of KVM's `struct kvm_nested_state`, with its VMCS in the written
    /// layout. Nothing changes. With [`Machine::read_vcpu`] and memory it is the whole of a vCPU.
    ///
    /// # Errors
    /// When there is no such vCPU, or the engine has no VMX.
    pub fn nested_state(&mut self, vcpu: usize) -> Result<Vec<u8>, EngineError> {
        self.engine.nested_state(vcpu, &self.ram)
    }

    /// Replaces VMX operation of a vCPU by that in the bytes of a `struct kvm_nested_state`, and loads the state
    /// of a guest that executes. Memory must be there before; registers ([`Machine::write_registers`]) may
    /// come before or after.
    ///
    /// # Errors
    /// When there is no such vCPU, or it cannot take the state; nothing has changed then.
    pub fn set_nested_state(
        &mut self,
        vcpu: usize,
        bytes: &[u8],
    ) -> Result<NestedReport, EngineError> {
        self.engine.set_nested_state(vcpu, &mut self.ram, bytes)
    }

    /// Replaces the registers of a vCPU, MSRs and local APIC among them, and leaves its VMX operation as it is.
    ///
    /// # Errors
    /// As [`Machine::write_vcpu`].
    pub fn write_registers(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), EngineError> {
        self.engine.write_registers(vcpu, state)
    }

    /// Which layouts the VMCS regions in memory have: for each that is accepted, the pages that begin with its
    /// revision. A page that was a region once, and is not overwritten, is counted too.
    ///
    /// # Errors
    /// Only when the host behind the engine fails.
    pub fn vmcs_regions(&self) -> Result<Vec<RegionCount>, EngineError> {
        let Some(profile) = self.engine.vmx_profile() else {
            return Ok(Vec::new());
        };
        let states = (0..self.engine.vcpus()).map(|vcpu| self.engine.read_state(vcpu));
        let roots: Vec<Option<u64>> = states
            .map(|state| Ok(state?.vmx.region))
            .collect::<Result<_, EngineError>>()?;
        let roots: Vec<usize> = roots
            .into_iter()
            .filter_map(|address| self.ram.offset(address?))
            .collect();
        Ok(count(profile, &self.ram, &roots))
    }
}

fn count(profile: &VmxProfile, ram: &Ram, roots: &[usize]) -> Vec<RegionCount> {
    let of = |layout: &Layout| RegionCount {
        layout: layout.name().to_owned(),
        revision: layout.revision(),
        pages: 0,
        written: layout == profile.written(),
    };
    let mut counts: Vec<RegionCount> = profile.accepted().map(of).collect();
    for (n, page) in ram.bytes().chunks_exact(REGION).enumerate() {
        let Some(word) = page.first_chunk() else {
            continue;
        };
        let revision = u32::from_le_bytes(*word) & !SHADOW;
        let found = counts.iter_mut().find(|count| count.revision == revision);
        if let Some(count) = found
            && !roots.contains(&(n * REGION))
        {
            count.pages += 1;
        }
    }
    counts
}

/// Whether a machine with this profile can go on from the state of another whose layouts are not the same: it
/// advertises the same revision, accepts each layout that may be in memory, and offers what was offered.
pub(crate) fn fit(saved: &Config, here: Option<&VmxProfile>) -> Result<(), RestoreError> {
    let theirs = Model::by_name(&saved.model)
        .map(|model| saved.vmx.profile_with(model, &saved.layouts))
        .transpose()
        .map_err(EngineError::from)?
        .flatten();
    let (Some(theirs), Some(here)) = (theirs, here) else {
        return Ok(());
    };
    let differ =
        |what, saved: String, here: String| Err(RestoreError::Config { what, saved, here });
    if theirs.layout != here.layout {
        let (saved, here) = (theirs.layout.name(), here.layout.name());
        return differ("advertised VMCS layout", saved.into(), here.into());
    }
    if !theirs
        .accepted()
        .all(|one| here.accepted().any(|layout| layout == one))
    {
        let names = |profile: &VmxProfile| -> String {
            let names: Vec<&str> = profile.accepted().map(Layout::name).collect();
            names.join(", ")
        };
        return differ("set of VMCS layouts", names(&theirs), names(here));
    }
    if theirs.caps != here.caps {
        let only = |one: &VmxProfile, other: &VmxProfile| {
            let fields = one.fields().without(other.fields());
            let names: Vec<&str> = fields.iter().map(|field| field.short_name()).collect();
            if names.is_empty() {
                "none".into()
            } else {
                names.join(", ")
            }
        };
        return differ(
            "set of VMCS fields",
            only(&theirs, here),
            only(here, &theirs),
        );
    }
    Ok(())
}
