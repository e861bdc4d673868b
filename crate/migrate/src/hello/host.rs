//! The destination's half of a hello: what a build can take, and what it was told to take no more than.

use hypernest_cpu::{MAX_CPUS, VmxLayouts, clock, hyperv_leaves};
use hypernest_machine::{DeviceInfo, Layout, MAX_MEMORY, Model, VmxChoice, VmxError, VmxProfile};
use serde::{Deserialize, Serialize};

use super::offer::{Cpu, Format, LayoutSeen, device};
use super::{HelloError, decode, encode, list, name};

/// What somebody chose for a destination.
#[derive(Clone, Debug)]
pub struct Choices {
    /// Most bytes of RAM.
    pub memory: u64,
    /// Machines with no more features than this model has; any where it is `None`.
    pub model: Option<&'static Model>,
    /// Machines with no more VMX than this; any where it is `None`.
    pub vmx: Option<VmxChoice>,
    /// Machines with the Hyper-V interface too.
    pub hyperv: bool,
    /// Which layouts of VMCS regions a machine has from now on, beside those that it brings.
    pub layouts: VmxLayouts,
    /// The devices that there are for it.
    pub devices: Vec<DeviceInfo>,
}

impl Default for Choices {
    /// All that this build can take, but for the Hyper-V interface, and no devices.
    fn default() -> Choices {
        Choices {
            memory: MAX_MEMORY,
            model: None,
            vmx: None,
            hyperv: false,
            layouts: VmxLayouts::default(),
            devices: Vec::new(),
        }
    }
}

/// What a destination can take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Who writes this, for people.
    pub build: String,
    /// The formats that it reads.
    pub formats: Vec<Format>,
    /// Most bytes of RAM.
    pub memory: u64,
    /// Most vCPUs.
    pub cpus: u32,
    /// Rates of the TSC and of the APIC timer, in Hz.
    pub rates: [u64; 2],
    /// The CPU models that it knows; at least one.
    pub models: Vec<HostCpu>,
    /// The one whose features a machine must not exceed.
    pub limit: Option<Cpu>,
    /// Which VMX a machine must not exceed.
    pub vmx: VmxLimit,
    /// The layouts for machines that it knows by name.
    pub known: Vec<LayoutSeen>,
    /// The layout that a machine must advertise, where one was chosen.
    pub advertised: Option<LayoutSeen>,
    /// The layout that will be written; the machine's own where this is `None`.
    pub written: Option<LayoutSeen>,
    /// Layouts that will be accepted beside those of the machine.
    pub accepted: Vec<LayoutSeen>,
    /// Leaves of the Hyper-V interface, as they are with VMX; none where it is not offered.
    pub hyperv: Vec<(u32, [u32; 4])>,
    /// The devices that there are.
    pub devices: Vec<DeviceInfo>,
}

/// A CPU model at the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCpu {
    /// What a guest sees of it.
    pub cpu: Cpu,
    /// The most that VMX can be on it: capability MSRs by number.
    pub vmx: Vec<(u32, u64)>,
}

/// What of VMX a machine may have at most.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmxLimit {
    /// Nothing.
    None,
    /// All that its CPU model can have.
    All,
    /// What these capability MSRs promise.
    Msrs(Vec<(u32, u64)>),
}

impl Host {
    /// What this build can take under these choices.
    ///
    /// # Errors
    /// When the VMX that is chosen cannot be.
    pub fn of(choices: &Choices) -> Result<Host, VmxError> {
        let known = |model: &'static Model| HostCpu {
            cpu: Cpu::of(model, true),
            vmx: VmxProfile::max(model).caps.msrs().collect(),
        };
        let model = choices.model.unwrap_or_default();
        let vmx = match &choices.vmx {
            None => VmxLimit::All,
            Some(choice) => match choice.profile(model).map_err(VmxError::from)? {
                None => VmxLimit::None,
                Some(profile) => VmxLimit::Msrs(profile.caps.msrs().collect()),
            },
        };
        let layouts = &choices.layouts;
        let for_machines = Layout::built_in()
            .iter()
            .filter(|one| one.is_for_machines());
        Ok(Host {
            build: concat!("hypernest ", env!("CARGO_PKG_VERSION")).to_owned(),
            formats: Format::all(),
            memory: choices.memory,
            cpus: MAX_CPUS,
            rates: [clock::TSC_HZ, clock::APIC_HZ],
            models: Model::all().iter().map(known).collect(),
            limit: choices.model.map(|model| Cpu::of(model, true)),
            vmx,
            known: for_machines.map(|one| LayoutSeen::of(one)).collect(),
            advertised: layouts.advertised.as_ref().map(LayoutSeen::of),
            written: layouts.written.as_ref().map(LayoutSeen::of),
            accepted: layouts.accepted.iter().map(LayoutSeen::of).collect(),
            hyperv: match choices.hyperv {
                true => hyperv_leaves(model, true).collect(),
                false => Vec::new(),
            },
            devices: choices.devices.clone(),
        })
    }

    /// As bytes, for the other side.
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(self)
    }

    /// From the other side's bytes.
    ///
    /// # Errors
    /// When they are not, or more than one can be.
    pub fn from_bytes(bytes: &[u8]) -> Result<Host, HelloError> {
        let host: Host = decode(bytes)?;
        host.check()?;
        Ok(host)
    }

    fn check(&self) -> Result<(), HelloError> {
        name(&self.build)?;
        list(&self.formats, |format| name(&format.name))?;
        list(&self.models, |one| {
            one.cpu.check()?;
            list(&one.vmx, |_| Ok(()))
        })?;
        self.limit.as_ref().map_or(Ok(()), Cpu::check)?;
        if let VmxLimit::Msrs(msrs) = &self.vmx {
            list(msrs, |_| Ok(()))?;
        }
        let chosen = [&self.advertised, &self.written];
        list(&self.known, LayoutSeen::check)?;
        list(&self.accepted, LayoutSeen::check)?;
        chosen
            .into_iter()
            .flatten()
            .try_for_each(LayoutSeen::check)?;
        list(&self.hyperv, |_| Ok(()))?;
        list(&self.devices, device)
    }
}
