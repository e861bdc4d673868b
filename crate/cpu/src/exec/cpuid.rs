//! CPUID (Vol. 2A, CPUID).

use crate::clock;
use crate::mem::Ctx;
use crate::model::{FEATURES, Feature, Output, Vendor};
use crate::trap::Exec;
use crate::vcpu::{Vcpu, cr, reg};

const LAST_BASIC: u32 = 0x16;
const HYPERVISOR: u32 = 0x4000_0000;
const EXTENDED: u32 = 0x8000_0000;
const LAST_EXTENDED: u32 = 0x8000_0008;
/// Bytes of a legacy XSAVE area and its header.
const XSAVE_BYTES: u32 = 576;

/// CPUID.
pub(super) fn cpuid(x: &mut Ctx) -> Exec {
    let leaf = x.cpu.gpr[reg::RAX] as u32;
    let subleaf = x.cpu.gpr[reg::RCX] as u32;
    let [eax, ebx, ecx, edx] = query(x.cpu, leaf, subleaf).map(u64::from);
    x.cpu.gpr[reg::RAX] = eax;
    x.cpu.gpr[reg::RBX] = ebx;
    x.cpu.gpr[reg::RCX] = ecx;
    x.cpu.gpr[reg::RDX] = edx;
    Ok(())
}

/// EAX, EBX, ECX and EDX of a leaf.
pub(crate) fn query(cpu: &Vcpu, leaf: u32, subleaf: u32) -> [u32; 4] {
    if let Some(answer) = crate::hyperv::cpuid(cpu, leaf) {
        return answer;
    }
    let leaf = match leaf {
        0..=LAST_BASIC | EXTENDED..=LAST_EXTENDED => leaf,
        HYPERVISOR if cpu.model.has(Feature::Hypervisor) => leaf,
        // Others answer as the highest basic leaf does.
        _ => LAST_BASIC,
    };
    let [mut eax, mut ebx, mut ecx, mut edx] = numbers(cpu, leaf, subleaf);
    for row in FEATURES {
        if row.leaf == leaf
            && row.subleaf == subleaf_of(leaf, subleaf)
            && cpu.model.has(row.feature)
        {
            let register = match row.output {
                Output::Eax => &mut eax,
                Output::Ebx => &mut ebx,
                Output::Ecx => &mut ecx,
                Output::Edx => &mut edx,
            };
            *register |= 1 << row.bit;
        }
    }
    adjust(cpu, leaf, &mut ecx, &mut edx);
    [eax, ebx, ecx, edx]
}

/// The subleaf, for leaves that have any.
fn subleaf_of(leaf: u32, subleaf: u32) -> u32 {
    if matches!(leaf, 7 | 0xd) { subleaf } else { 0 }
}

/// Feature bits that follow the processor's state.
fn adjust(cpu: &Vcpu, leaf: u32, ecx: &mut u32, edx: &mut u32) {
    const APIC: u32 = 1 << 9;
    const VMX: u32 = 1 << 5;
    const OSXSAVE: u32 = 1 << 27;
    const SYSCALL: u32 = 1 << 11;
    match leaf {
        1 => {
            if !cpu.apic.present() {
                *edx &= !APIC;
            }
            if cpu.vmx.profile.is_some() {
                *ecx |= VMX;
            }
            if cpu.cr4 & cr::CR4_OSXSAVE != 0 {
                *ecx |= OSXSAVE;
            }
        }
        0x8000_0001 if !cpu.is_64() && cpu.model.vendor == Vendor::Intel => *edx &= !SYSCALL,
        _ => {}
    }
}

/// Four bytes of text as a register holds them.
fn word(text: &str, at: usize) -> u32 {
    let byte = |n| text.as_bytes().get(at + n).copied().unwrap_or(0);
    u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

/// One cache of leaf 4: level, kind (1 data, 2 instructions, 3 both), sharing, ways, sets.
fn cache(level: u32, kind: u32, shared: u32, cores: u32, ways: u32, sets: u32) -> [u32; 4] {
    const LINE: u32 = 64;
    const SELF_INITIALIZING: u32 = 1 << 8;
    [
        kind | level << 5 | SELF_INITIALIZING | (shared - 1) << 14 | (cores - 1) << 26,
        (LINE - 1) | (ways - 1) << 22,
        sets - 1,
        0,
    ]
}

/// What a leaf says apart from feature bits.
fn numbers(cpu: &Vcpu, leaf: u32, subleaf: u32) -> [u32; 4] {
    let model = cpu.model;
    let id = cpu.apic.id();
    let cores = cpu.cpus.next_power_of_two();
    match leaf {
        0 => {
            let name = model.vendor();
            [LAST_BASIC, word(name, 0), word(name, 8), word(name, 4)]
        }
        1 => {
            let htt = if cpu.cpus > 1 { 1 << 28 } else { 0 };
            let clflush = 8 << 8;
            let ebx = clflush | cores.min(255) << 16 | (id & 0xff) << 24;
            [model.signature, ebx, 0, htt]
        }
        // Caches are described by leaf 4.
        2 => [0x0000_ff01, 0, 0, 0],
        4 => {
            let few = cores.min(64);
            match subleaf {
                0 => cache(1, 1, 1, few, 8, 64),
                1 => cache(1, 2, 1, few, 8, 64),
                2 => cache(2, 3, 1, few, 8, 1024),
                3 => cache(3, 3, cores, few, 16, 8192),
                _ => [0; 4],
            }
        }
        // MONITOR: lines of 64 bytes; MWAIT's extensions, and no C-state, so that systems idle by HLT.
        5 if model.has(Feature::Monitor) => [64, 64, 3, 0],
        0xb => {
            let bits = cores.trailing_zeros();
            match subleaf {
                0 => [0, 1, 1 << 8, id],
                1 => [bits, cpu.cpus, 2 << 8 | 1, id],
                _ => [0, 0, subleaf & 0xff, id],
            }
        }
        0xd if model.has(Feature::Xsave) => match subleaf {
            0 => [model.xcr0_bits() as u32, XSAVE_BYTES, XSAVE_BYTES, 0],
            1 if model.has(Feature::Xsaves) => [0, XSAVE_BYTES, 0, 0],
            _ => [0; 4],
        },
        // TSC ticks per crystal tick, and the crystal, which also drives the local APIC's timer.
        0x15 => [
            1,
            (clock::TSC_HZ / clock::APIC_HZ) as u32,
            clock::APIC_HZ as u32,
            0,
        ],
        0x16 => {
            let mhz = (clock::TSC_HZ / 1_000_000) as u32;
            [mhz, mhz, 100, 0]
        }
        HYPERVISOR => [
            HYPERVISOR,
            word("Hypernest", 0),
            word("Hypernest", 4),
            word("Hypernest", 8),
        ],
        EXTENDED => [LAST_EXTENDED, 0, 0, 0],
        0x8000_0002..=0x8000_0004 => {
            let at = (leaf - 0x8000_0002) as usize * 16;
            [0, 4, 8, 12].map(|n| word(model.brand, at + n))
        }
        // Second-level cache: 512 KiB, 8 ways, lines of 64 bytes.
        0x8000_0006 => [0, 0, 512 << 16 | 6 << 12 | 64, 0],
        0x8000_0008 => [48 << 8 | model.physical_bits, 0, 0, 0],
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;
    use crate::testing::Fixture;

    #[test]
    fn the_vendor_and_brand_can_be_read() {
        let f = Fixture::long();
        let [_, ebx, ecx, edx] = query(&f.cpu, 0, 0);
        let name: alloc::vec::Vec<u8> = [ebx, edx, ecx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        assert_eq!(name, b"GenuineIntel");
        assert_eq!(query(&f.cpu, 0x8000_0002, 0)[0].to_le_bytes(), *b"Hype");
    }

    #[test]
    fn every_feature_of_the_model_is_listed_and_no_other() {
        let mut f = Fixture::long();
        for model in Model::all() {
            f.cpu.model = model;
            for row in FEATURES {
                let outputs = query(&f.cpu, row.leaf, row.subleaf);
                let register = outputs[row.output as usize];
                assert_eq!(
                    register >> row.bit & 1 != 0,
                    model.has(row.feature),
                    "{:?} of {}",
                    row.feature,
                    model.name
                );
            }
        }
    }

    #[test]
    fn osxsave_and_syscall_follow_the_state() {
        let mut f = Fixture::long();
        assert_eq!(query(&f.cpu, 1, 0)[2] >> 27 & 1, 0);
        f.cpu.cr4 |= cr::CR4_OSXSAVE;
        assert_eq!(query(&f.cpu, 1, 0)[2] >> 27 & 1, 1);
        assert_eq!(query(&f.cpu, 0x8000_0001, 0)[3] >> 11 & 1, 1);
        let f = Fixture::protected();
        assert_eq!(query(&f.cpu, 0x8000_0001, 0)[3] >> 11 & 1, 0);
    }

    #[test]
    fn the_tsc_frequency_is_stated() {
        let f = Fixture::long();
        let [denominator, numerator, crystal, _] = query(&f.cpu, 0x15, 0).map(u64::from);
        assert_eq!(crystal * numerator / denominator, clock::TSC_HZ);
    }

    #[test]
    fn topology_counts_cores() {
        let mut f = Fixture::long();
        f.cpu.cpus = 3;
        assert_eq!(query(&f.cpu, 0xb, 0), [0, 1, 0x100, 0]);
        assert_eq!(query(&f.cpu, 0xb, 1), [2, 3, 0x201, 0]);
        assert_eq!(query(&f.cpu, 1, 0)[1] >> 16 & 0xff, 4);
    }
}
