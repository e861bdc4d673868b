//! The source's half of a hello: what a machine needs.

use hypernest_cpu::{Feature, MsrSeen as Msr, VmxLayouts, VmxProfile, clock, hyperv_leaves};
use hypernest_machine::{
    Config, DeviceInfo, EngineError, Layout, LayoutRefused, Machine, Model, STATE_VERSION,
    VmxChoice, VmxError,
};
use hypernest_vmcs::Field;
use serde::{Deserialize, Serialize};

use super::{HelloError, MAX_TABLE, decode, encode, list, name};

/// What a running machine needs of the place it goes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Who writes this, for people.
    pub build: String,
    /// The formats in which the machine comes.
    pub formats: Vec<Format>,
    /// Bytes of RAM.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// What the real-time clock showed at tick 0, in seconds since 1970.
    pub epoch: u64,
    /// Rates of the TSC and of the APIC timer, in Hz.
    pub rates: [u64; 2],
    /// What CPUID and RDMSR told the guest.
    pub cpu: Cpu,
    /// The VMX it was built with.
    pub vmx: VmxChoice,
    /// What that showed the guest; `None` without VMX.
    pub vmx_seen: Option<VmxSeen>,
    /// Leaves of the Hyper-V interface; none without it.
    pub hyperv: Vec<(u32, [u32; 4])>,
    /// Its further devices.
    pub devices: Vec<DeviceInfo>,
}

/// A format, by name and version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Format {
    /// What it is of.
    pub name: String,
    /// Its version.
    pub version: u32,
}

impl Format {
    /// Those of this build.
    pub(super) fn all() -> Vec<Format> {
        let name = "machine state".to_owned();
        let version = STATE_VERSION;
        vec![Format { name, version }]
    }
}

/// A CPU model as a guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// What the command line calls it.
    pub model: String,
    /// CPUID leaf 0.
    pub vendor: String,
    /// Type, family, model and stepping: CPUID.1:EAX.
    pub signature: u32,
    /// Guest-physical address bits.
    pub physical_bits: u32,
    /// What it lists.
    pub features: Vec<FeatureSeen>,
    /// Its model-specific registers, but for those that other features bring as whole ranges.
    pub msrs: Vec<MsrSeen>,
}

/// A feature bit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureSeen {
    /// Its name.
    pub name: String,
    /// Leaf and subleaf of CPUID.
    pub leaf: [u32; 2],
    /// Register of the result (0 is EAX, then EBX, ECX and EDX) and bit.
    pub bit: [u8; 2],
}

/// A model-specific register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrSeen {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// What it reads, where that never changes.
    pub constant: Option<u64>,
}

/// VMX as a guest sees it, and the layouts of its VMCS regions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmxSeen {
    /// The capability MSRs, by number.
    pub msrs: Vec<(u32, u64)>,
    /// Encodings of the fields that VMREAD and VMWRITE know.
    pub fields: Vec<u32>,
    /// The layouts that VMPTRLD takes, the advertised one first: each that memory may hold a region of.
    pub accepted: Vec<LayoutSeen>,
    /// Which of them is written.
    pub written: u32,
    /// Which layouts were chosen when the machine was built.
    pub chosen: Chosen,
    /// Regions in memory, by layout.
    pub regions: Vec<RegionsSeen>,
}

/// [`VmxLayouts`] by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// The advertised one is not the profile's own.
    pub advertised: bool,
    /// The written one was named.
    pub written: bool,
}

/// A layout of VMCS regions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayoutSeen {
    /// What it is called.
    pub name: String,
    /// Its table, where it is not built in.
    pub table: Option<String>,
    /// CRC-32 of its table: equal names stand for equal layouts where this is equal too.
    pub digest: u32,
    /// Its revision identifier.
    pub revision: u32,
    /// Bytes of a region, and of those what it uses.
    pub size: [u32; 2],
    /// Whether a processor can keep VMCSs in it.
    pub for_machines: bool,
    /// Encodings of the fields that have a slot.
    pub fields: Vec<u32>,
}

/// Pages of memory that begin with a revision identifier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionsSeen {
    /// The identifier.
    pub revision: u32,
    /// How many.
    pub pages: u64,
}

impl Cpu {
    /// A model, with VMX or without.
    pub fn of(model: &Model, vmx: bool) -> Cpu {
        let feature = |feature: Feature| {
            let place = feature.cpuid();
            FeatureSeen {
                name: format!("{feature:?}"),
                leaf: [place.leaf, place.subleaf],
                bit: [place.register, place.bit],
            }
        };
        let msr = |msr: Msr| MsrSeen {
            number: msr.number,
            name: msr.name.to_owned(),
            constant: msr.constant,
        };
        Cpu {
            model: model.name.to_owned(),
            vendor: model.vendor().to_owned(),
            signature: model.signature(),
            physical_bits: model.physical_bits(),
            features: Feature::all()
                .filter(|one| model.has(*one))
                .map(feature)
                .collect(),
            msrs: hypernest_cpu::msrs(model, vmx).map(msr).collect(),
        }
    }

    pub(super) fn check(&self) -> Result<(), HelloError> {
        name(&self.model)?;
        name(&self.vendor)?;
        list(&self.features, |feature| name(&feature.name))?;
        list(&self.msrs, |msr| name(&msr.name))
    }
}

/// Encodings of fields, ascending.
pub(super) fn encodings(fields: impl IntoIterator<Item = Field>) -> Vec<u32> {
    fields.into_iter().map(Field::encoding).collect()
}

impl LayoutSeen {
    /// A layout.
    pub fn of(layout: &Layout) -> LayoutSeen {
        let table = layout.to_table();
        let digest = crc32fast::hash(table.as_bytes());
        let built_in = Layout::named(layout.name()).is_some_and(|known| known == layout);
        LayoutSeen {
            name: layout.name().to_owned(),
            table: (!built_in).then_some(table),
            digest,
            revision: layout.revision(),
            size: [layout.size() as u32, layout.used() as u32],
            for_machines: layout.is_for_machines(),
            fields: encodings(layout.field_mask().iter()),
        }
    }

    /// Whether both are the same layout.
    pub(super) fn is(&self, other: &LayoutSeen) -> bool {
        self.name == other.name && self.digest == other.digest
    }

    /// The layout, where this build has it or the table tells it.
    pub(super) fn layout(&self) -> Option<Layout> {
        let layout = match &self.table {
            Some(table) => Layout::from_table(table).ok()?,
            None => Layout::named(&self.name)?.clone(),
        };
        (crc32fast::hash(layout.to_table().as_bytes()) == self.digest).then_some(layout)
    }

    pub(super) fn check(&self) -> Result<(), HelloError> {
        name(&self.name)?;
        if self
            .table
            .as_ref()
            .is_some_and(|table| table.len() > MAX_TABLE)
        {
            return Err(HelloError::Part("a layout"));
        }
        list(&self.fields, |_| Ok(()))
    }
}

impl VmxSeen {
    fn of(profile: &VmxProfile, chosen: &VmxLayouts) -> VmxSeen {
        let accepted: Vec<LayoutSeen> = profile.accepted().map(LayoutSeen::of).collect();
        let written = LayoutSeen::of(profile.written());
        let written = accepted.iter().position(|layout| layout.is(&written));
        VmxSeen {
            msrs: profile.caps.msrs().collect(),
            fields: encodings(profile.fields().iter()),
            written: written.unwrap_or(0) as u32,
            accepted,
            chosen: Chosen {
                advertised: chosen.advertised.is_some(),
                written: chosen.written.is_some(),
            },
            regions: Vec::new(),
        }
    }

    /// The layout whose revision is advertised.
    pub fn advertised(&self) -> Option<&LayoutSeen> {
        self.accepted.first()
    }

    /// The layout that is written.
    pub fn written(&self) -> Option<&LayoutSeen> {
        self.accepted.get(self.written as usize)
    }

    /// Pages of memory that begin with a revision.
    pub(super) fn pages(&self, revision: u32) -> u64 {
        let regions = self.regions.iter().find(|one| one.revision == revision);
        regions.map_or(0, |one| one.pages)
    }

    fn check(&self) -> Result<(), HelloError> {
        list(&self.msrs, |_| Ok(()))?;
        list(&self.fields, |_| Ok(()))?;
        list(&self.accepted, LayoutSeen::check)?;
        list(&self.regions, |_| Ok(()))?;
        match self.written() {
            Some(_) => Ok(()),
            None => Err(HelloError::Part("a written layout")),
        }
    }
}

impl Offer {
    /// What `machine` needs. Reads the first bytes of each page of its memory.
    ///
    /// # Errors
    /// Only when the host behind its engine fails.
    pub fn of(machine: &Machine) -> Result<Offer, EngineError> {
        let config = machine.config();
        let profile = machine.vmx_profile();
        let model = Model::by_name(&config.model).unwrap_or_default();
        let mut vmx_seen = profile.map(|profile| VmxSeen::of(profile, &config.layouts));
        if let Some(seen) = &mut vmx_seen {
            let counts = machine.vmcs_regions()?.into_iter();
            seen.regions = counts
                .map(|count| RegionsSeen {
                    revision: count.revision,
                    pages: count.pages as u64,
                })
                .collect();
        }
        let hyperv = match config.hyperv {
            true => hyperv_leaves(model, profile.is_some()).collect(),
            false => Vec::new(),
        };
        Ok(Offer {
            build: concat!("hypernest ", env!("CARGO_PKG_VERSION")).to_owned(),
            formats: Format::all(),
            memory: config.memory,
            cpus: config.cpus,
            epoch: config.epoch,
            rates: [clock::TSC_HZ, clock::APIC_HZ],
            cpu: Cpu::of(model, profile.is_some()),
            vmx: config.vmx.clone(),
            vmx_seen,
            hyperv,
            devices: machine.devices(),
        })
    }

    /// What the machine at the destination is built from, where nothing refuses the offer: as here, but that it
    /// also accepts the layouts in `theirs`, and writes the one that they name.
    ///
    /// # Errors
    /// When this build cannot make such a machine.
    pub fn config(&self, theirs: &VmxLayouts) -> Result<Config, VmxError> {
        let mut layouts = VmxLayouts::default();
        if let Some(seen) = &self.vmx_seen {
            let known = |one: &LayoutSeen| {
                let name = || LayoutRefused::ForFiles(one.name.clone());
                one.layout().ok_or_else(name)
            };
            if seen.chosen.advertised {
                layouts.advertised = seen.advertised().map(known).transpose()?;
            }
            if seen.chosen.written {
                layouts.written = seen.written().map(known).transpose()?;
            }
            for (n, one) in seen.accepted.iter().enumerate().skip(1) {
                // The written one is accepted because it is written, unless another is from now on.
                if n != seen.written as usize || theirs.written.is_some() {
                    layouts.accepted.push(known(one)?);
                }
            }
            let more = theirs.accepted.iter().filter(|one| {
                let there = seen.accepted.iter().any(|seen| seen.name == one.name());
                !there
            });
            layouts.accepted.extend(more.cloned());
            if theirs.written.is_some() {
                layouts.written = theirs.written.clone();
            }
        }
        Ok(Config {
            memory: self.memory,
            cpus: self.cpus,
            model: self.cpu.model.clone(),
            epoch: self.epoch,
            vmx: self.vmx.clone(),
            hyperv: !self.hyperv.is_empty(),
            layouts,
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
    pub fn from_bytes(bytes: &[u8]) -> Result<Offer, HelloError> {
        let offer: Offer = decode(bytes)?;
        offer.check()?;
        Ok(offer)
    }

    fn check(&self) -> Result<(), HelloError> {
        name(&self.build)?;
        list(&self.formats, |format| name(&format.name))?;
        self.cpu.check()?;
        if let VmxChoice::Msrs(msrs) = &self.vmx {
            list(msrs, |_| Ok(()))?;
        }
        if let Some(seen) = &self.vmx_seen {
            seen.check()?;
        }
        list(&self.hyperv, |_| Ok(()))?;
        list(&self.devices, device)
    }
}

pub(super) fn device(device: &DeviceInfo) -> Result<(), HelloError> {
    match device {
        DeviceInfo::Custom(text) => name(text),
        DeviceInfo::Disk { .. } | DeviceInfo::Console => Ok(()),
    }
}
