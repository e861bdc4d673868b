//! Names of what the Hyper-V interface shows in CPUID (Hypervisor Top-Level Functional Specification, "Feature and
//! Interface Discovery").

/// A bit of a leaf: register of the result (0 is EAX, then EBX, ECX and EDX), bit, name.
type Bit = (u32, u8, u8, &'static str);

/// The leaf about nested virtualization.
pub(super) const NESTED_LEAF: u32 = 0x4000_000a;

/// Every bit that this processor may show.
const BITS: &[Bit] = &[
    (0x4000_0003, 0, 1, "partition reference counter"),
    (0x4000_0003, 0, 2, "synthetic interrupt controller"),
    (0x4000_0003, 0, 3, "synthetic timers"),
    (0x4000_0003, 0, 4, "APIC registers and VP assist page"),
    (0x4000_0003, 0, 5, "hypercall registers"),
    (0x4000_0003, 0, 6, "virtual processor index"),
    (0x4000_0003, 0, 9, "reference TSC page"),
    (0x4000_0003, 0, 11, "frequency registers"),
    (0x4000_0003, 0, 15, "control of the TSC's invariance"),
    (0x4000_0003, 3, 8, "TSC and APIC frequencies"),
    (0x4000_0003, 3, 19, "synthetic timers in direct mode"),
    (0x4000_0004, 0, 2, "remote TLB flush by hypercall"),
    (0x4000_0004, 0, 5, "relaxed timing"),
    (0x4000_0004, 0, 9, "no automatic end of interrupt"),
    (0x4000_0004, 0, 14, "nested: use of the enlightened VMCS"),
    (NESTED_LEAF, 0, 17, "nested: direct virtual flush"),
    (
        NESTED_LEAF,
        0,
        18,
        "nested: flush of guest-physical mappings by hypercall",
    ),
    (NESTED_LEAF, 0, 19, "nested: enlightened MSR bitmap"),
];

/// Where CPUID has bits of features.
const FEATURE_WORDS: [(u32, u8); 4] = [
    (0x4000_0003, 0),
    (0x4000_0003, 3),
    (0x4000_0004, 0),
    (NESTED_LEAF, 0),
];

/// Lowest and highest version of the enlightened VMCS, in the leaf about nested virtualization.
const VERSIONS: u32 = 0xffff;

/// A register of a leaf; 0 where the leaf is not there.
fn word(leaves: &[(u32, [u32; 4])], leaf: u32, register: u8) -> u32 {
    let found = leaves.iter().find(|(number, _)| *number == leaf);
    found.map_or(0, |(_, answer)| answer[usize::from(register) & 3])
}

/// The features that `offered` shows and `here` does not, in words.
pub(super) fn missing(offered: &[(u32, [u32; 4])], here: &[(u32, [u32; 4])]) -> Vec<String> {
    let mut missing = Vec::new();
    for (leaf, register) in FEATURE_WORDS {
        let mut bits = word(offered, leaf, register) & !word(here, leaf, register);
        if leaf == NESTED_LEAF {
            bits &= !VERSIONS;
        }
        for bit in (0..32).filter(|bit| bits >> bit & 1 != 0) {
            let is = |row: &&Bit| (row.0, row.1, row.2) == (leaf, register, bit);
            let name = BITS.iter().find(is).map_or("without a name", |row| row.3);
            let register = ["EAX", "EBX", "ECX", "EDX"][usize::from(register) & 3];
            missing.push(format!("{name} (CPUID.{leaf:X}H:{register} bit {bit})"));
        }
    }
    missing
}

/// Lowest and highest version of the enlightened VMCS.
pub(super) fn enlightened_versions(leaves: &[(u32, [u32; 4])]) -> Option<(u8, u8)> {
    let [low, high, ..] = word(leaves, NESTED_LEAF, 0).to_le_bytes();
    (high != 0).then_some((low, high))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypernest_cpu::hyperv_leaves;

    #[test]
    fn every_bit_that_is_shown_has_a_name_and_no_other() {
        let shown: Vec<_> = hyperv_leaves(Default::default(), true).collect();
        let missing = missing(&shown, &[]);
        assert_eq!(missing.len(), BITS.len(), "{missing:#?}");
        assert!(missing.iter().all(|name| !name.contains("without")));
        assert_eq!(enlightened_versions(&shown), Some((1, 1)));
        let plain: Vec<_> = hyperv_leaves(Default::default(), false).collect();
        assert_eq!(enlightened_versions(&plain), None);
    }
}
