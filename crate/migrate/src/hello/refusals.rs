//! Every reason why a machine cannot go to a place.

use hypernest_machine::{DeviceInfo, Model};
use hypernest_vmcs::{Caps, Field, capabilities};

use super::host::{Host, VmxLimit};
use super::hyperv;
use super::offer::{Cpu, FeatureSeen, LayoutSeen, Offer, VmxSeen};
use super::reason::Reason;

/// Why a machine cannot go to a place: all reasons, and none where it can.
///
/// Both sides come to the same answer from the same values.
#[must_use]
pub fn refusals(offer: &Offer, host: &Host) -> Vec<Reason> {
    let mut reasons = Vec::new();
    sizes(offer, host, &mut reasons);
    processor(offer, host, &mut reasons);
    vmx(offer, host, &mut reasons);
    interface(offer, host, &mut reasons);
    devices(offer, host, &mut reasons);
    reasons
}

fn sizes(offer: &Offer, host: &Host, reasons: &mut Vec<Reason>) {
    for format in &offer.formats {
        if !host.formats.contains(format) {
            let same = host.formats.iter().filter(|one| one.name == format.name);
            let versions = same.map(|one| one.version.to_string());
            reasons.push(Reason::Format {
                name: format.name.clone(),
                version: format.version,
                reads: or_none(listed(versions)),
            });
        }
    }
    if offer.memory > host.memory {
        let (needs, most) = (offer.memory, host.memory);
        reasons.push(Reason::Memory { needs, most });
    }
    if offer.cpus > host.cpus {
        let (needs, most) = (offer.cpus, host.cpus);
        reasons.push(Reason::Cpus { needs, most });
    }
    let clocks = ["TSC", "APIC timer"];
    for (clock, (needs, here)) in clocks.iter().zip(offer.rates.into_iter().zip(host.rates)) {
        if needs != here {
            let clock = (*clock).to_owned();
            reasons.push(Reason::Rate { clock, needs, here });
        }
    }
}

/// What CPUID and RDMSR tell: the destination must know the model by name, and have all that it shows.
fn processor(offer: &Offer, host: &Host, reasons: &mut Vec<Reason>) {
    let seen = &offer.cpu;
    let known = host.models.iter().map(|one| &one.cpu);
    let same = known.clone().find(|cpu| cpu.model == seen.model);
    match same {
        Some(here) => identity(seen, here, reasons),
        None => reasons.push(Reason::Model {
            model: seen.model.clone(),
            known: or_none(listed(known.clone().map(|cpu| cpu.model.clone()))),
        }),
    }
    let Some(here) = host.limit.as_ref().or(same).or(known.clone().next()) else {
        return;
    };
    let place = |one: &FeatureSeen| (one.leaf, one.bit);
    for feature in &seen.features {
        if !here.features.iter().any(|one| place(one) == place(feature)) {
            reasons.push(Reason::Feature {
                name: feature.name.clone(),
                place: cpuid_bit(feature),
                model: here.model.clone(),
            });
        }
    }
    for msr in &seen.msrs {
        let (name, number) = (msr.name.clone(), msr.number);
        match here.msrs.iter().find(|one| one.number == msr.number) {
            None => reasons.push(Reason::Msr {
                name,
                number,
                model: here.model.clone(),
            }),
            Some(one) => {
                if let (Some(seen), Some(here)) = (msr.constant, one.constant)
                    && seen != here
                {
                    reasons.push(Reason::MsrValue {
                        name,
                        number,
                        seen,
                        here,
                    });
                }
            }
        }
    }
}

fn identity(seen: &Cpu, here: &Cpu, reasons: &mut Vec<Reason>) {
    let hex = |signature: u32| format!("{signature:#x}");
    for (what, seen_one, here_one) in [
        ("vendor", seen.vendor.clone(), here.vendor.clone()),
        ("signature", hex(seen.signature), hex(here.signature)),
        (
            "physical-address bits",
            seen.physical_bits.to_string(),
            here.physical_bits.to_string(),
        ),
    ] {
        if seen_one != here_one {
            reasons.push(Reason::Identity {
                model: seen.model.clone(),
                what: what.to_owned(),
                seen: seen_one,
                here: here_one,
            });
        }
    }
}

fn cpuid_bit(feature: &FeatureSeen) -> String {
    let [leaf, subleaf] = feature.leaf;
    let [register, bit] = feature.bit;
    hypernest_cpu::CpuidBit {
        leaf,
        subleaf,
        register,
        bit,
    }
    .to_string()
}

fn vmx(offer: &Offer, host: &Host, reasons: &mut Vec<Reason>) {
    let Some(seen) = &offer.vmx_seen else {
        return;
    };
    if host.vmx == VmxLimit::None {
        let last = seen.msrs.last().map_or("", |(number, _)| msr_name(*number));
        let last = last.to_owned();
        reasons.push(Reason::NoVmx { last });
    } else {
        capabilities_of(offer, host, seen, reasons);
    }
    layouts(seen, host, reasons);
}

/// Each control and each other capability that was offered must be there.
fn capabilities_of(offer: &Offer, host: &Host, seen: &VmxSeen, reasons: &mut Vec<Reason>) {
    let offered = Caps::from_msrs(&seen.msrs);
    let model = host
        .models
        .iter()
        .find(|one| one.cpu.model == offer.cpu.model);
    let largest = model.or(host.models.first()).map(|one| &one.vmx);
    let limit = match &host.vmx {
        VmxLimit::Msrs(msrs) => Some(msrs),
        VmxLimit::None | VmxLimit::All => None,
    };
    let mut missing: Vec<_> = [largest, limit]
        .into_iter()
        .flatten()
        .flat_map(|msrs| offered.missing(&Caps::from_msrs(msrs)))
        .collect();
    missing.sort_unstable();
    missing.dedup();
    let whats = missing.iter().map(ToString::to_string);
    reasons.extend(whats.map(|what| Reason::Capability { what }));
}

/// The layouts that the machine brings must be known, and those that the destination chose must be possible.
fn layouts(seen: &VmxSeen, host: &Host, reasons: &mut Vec<Reason>) {
    for layout in &seen.accepted {
        let known = host.known.iter().find(|one| one.name == layout.name);
        let (layout_name, revision) = (layout.name.clone(), layout.revision);
        let pages = seen.pages(revision);
        match known {
            // A table that comes along tells it.
            None if layout.table.is_some() => {}
            None => reasons.push(Reason::Unknown {
                layout: layout_name,
                revision,
                pages,
            }),
            Some(one) if !one.is(layout) => reasons.push(Reason::Differs {
                layout: layout_name,
                revision,
                pages,
            }),
            Some(_) => {}
        }
    }
    let Some(advertised) = seen.advertised() else {
        return;
    };
    if let Some(here) = &host.advertised
        && !here.is(advertised)
    {
        reasons.push(Reason::Advertised {
            seen: advertised.name.clone(),
            here: here.name.clone(),
        });
    }
    let written = host.written.iter().map(|one| ("--write-vmcs", one));
    let accepted = host.accepted.iter().map(|one| ("--accept-vmcs", one));
    let mut taken: Vec<&LayoutSeen> = seen.accepted.iter().collect();
    for (option, layout) in written.chain(accepted) {
        chosen(option, layout, seen, advertised, &taken, reasons);
        taken.push(layout);
    }
}

/// A layout that the destination chose: it must hold all that was offered, and be told apart from the others.
fn chosen(
    option: &str,
    layout: &LayoutSeen,
    seen: &VmxSeen,
    advertised: &LayoutSeen,
    taken: &[&LayoutSeen],
    reasons: &mut Vec<Reason>,
) {
    let name = || layout.name.clone();
    let option = option.to_owned();
    if !layout.for_machines {
        let layout = name();
        reasons.push(Reason::ForFiles { layout, option });
        return;
    }
    let lost = seen
        .fields
        .iter()
        .filter(|field| !layout.fields.contains(field));
    let lost = listed(lost.map(|&encoding| field_name(encoding)));
    if !lost.is_empty() {
        reasons.push(Reason::Narrows {
            layout: name(),
            option: option.clone(),
            fields: lost,
        });
    }
    let ([size, _], [_, used]) = (advertised.size, layout.size);
    if used > size {
        reasons.push(Reason::Outgrows {
            layout: name(),
            option: option.clone(),
            used,
            advertised: advertised.name.clone(),
            size,
        });
    }
    let same = |one: &&&LayoutSeen| one.revision == layout.revision && !one.is(layout);
    if let Some(other) = taken.iter().find(same) {
        reasons.push(Reason::Ambiguous {
            revision: layout.revision,
            first: other.name.clone(),
            pages: seen.pages(layout.revision),
            second: name(),
            option,
        });
    }
}

fn interface(offer: &Offer, host: &Host, reasons: &mut Vec<Reason>) {
    let missing = hyperv::missing(&offer.hyperv, &host.hyperv);
    reasons.extend(missing.into_iter().map(|what| Reason::Hyperv { what }));
    if let Some(seen) = hyperv::enlightened_versions(&offer.hyperv) {
        let here = hyperv::enlightened_versions(&host.hyperv);
        let held = here.is_some_and(|(low, high)| low <= seen.0 && seen.1 <= high);
        if !held {
            let here = here.map_or("none".to_owned(), |(low, high)| format!("{low}-{high}"));
            reasons.push(Reason::EnlightenedVersions { seen, here });
        }
    }
}

/// What stands in one slot must stand there on the other side too.
fn devices(offer: &Offer, host: &Host, reasons: &mut Vec<Reason>) {
    for number in 1..=offer.devices.len().max(host.devices.len()) {
        let (needs, here) = (offer.devices.get(number - 1), host.devices.get(number - 1));
        match (needs, here) {
            (Some(needs), here) if here != Some(needs) => reasons.push(Reason::Device {
                number,
                needs: device(needs),
                here: here.map_or("none".to_owned(), device),
                remedy: match needs {
                    DeviceInfo::Disk { .. } => "--disk with the same image".to_owned(),
                    DeviceInfo::Console => "a console".to_owned(),
                    DeviceInfo::Custom(_) => "that device".to_owned(),
                },
            }),
            (None, Some(here)) => reasons.push(Reason::Surplus {
                number,
                here: device(here),
            }),
            _ => {}
        }
    }
}

fn device(device: &DeviceInfo) -> String {
    match device {
        DeviceInfo::Disk {
            size,
            read_only,
            head,
        } => {
            let how = if *read_only { "read-only disk" } else { "disk" };
            format!("a {how} of {size} bytes (content {head:016x})")
        }
        DeviceInfo::Console => "a console".to_owned(),
        DeviceInfo::Custom(name) => format!("the device {name}"),
    }
}

impl Offer {
    /// What of this offer the build that runs would show otherwise, were the machine built here: its profiles and
    /// models have the same names as the source's, but may mean something else.
    #[must_use]
    pub fn differences(&self) -> Vec<Reason> {
        let mut reasons = Vec::new();
        let (Some(seen), Some(model)) = (&self.vmx_seen, Model::by_name(&self.cpu.model)) else {
            return reasons;
        };
        // What cannot be built is found when it is.
        let layouts = self
            .config(&Default::default())
            .map(|config| config.layouts);
        let profile = layouts.and_then(|layouts| self.vmx.profile_with(model, &layouts));
        let Ok(Some(profile)) = profile else {
            return reasons;
        };
        let profile = match self.hyperv.is_empty() {
            true => profile,
            false => profile.enlightened().into(),
        };
        let here = &profile.caps;
        for &(number, value) in &seen.msrs {
            let here = here.get(number).unwrap_or(0);
            if value != here {
                reasons.push(Reason::CapabilityValue {
                    name: msr_name(number).to_owned(),
                    seen: value,
                    here,
                });
            }
        }
        reasons
    }
}

/// The name of a capability MSR.
fn msr_name(number: u32) -> &'static str {
    let row = capabilities().iter().find(|row| row.msr == number);
    row.map_or("an MSR without a name", |row| row.msr_name)
}

/// A field as the tables name it.
fn field_name(encoding: u32) -> String {
    match Field::from_encoding(encoding) {
        Some((field, _)) => format!("{field:?}"),
        None => format!("field {encoding:#x}"),
    }
}

fn listed(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(", ")
}

fn or_none(text: String) -> String {
    if text.is_empty() {
        "none".to_owned()
    } else {
        text
    }
}
