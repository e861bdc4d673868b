//! Damaged files: every reader answers with a value or an error, whatever the bytes.

mod random;

use hypernest_vmcs::nested_state::Taker;
use hypernest_vmcs::{Dump, Field, Layout, Losses, NestedState, Translation, Vmcs, identify};
use random::Random;

/// `bytes` with some of them changed, doubled or left out.
fn damage(random: &mut Random, bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..=random.below(6) {
        let at = random.below(out.len());
        match random.below(5) {
            0 => out.truncate(at),
            1 if !out.is_empty() => out[at] = random.next() as u8,
            2 if !out.is_empty() => out[at] ^= 1 << random.below(8),
            3 => {
                let end = at + random.below(40.min(out.len() - at) + 1);
                let piece = out[at..end].to_vec();
                let to = random.below(out.len());
                out.splice(to..to, piece);
            }
            _ => {
                let end = at + random.below(40.min(out.len() - at) + 1);
                out.drain(at..end);
            }
        }
    }
    out
}

fn vmcs(random: &mut Random) -> Vmcs {
    let mut vmcs = Vmcs::new();
    for field in Field::ALL {
        vmcs.set(field, random.next());
    }
    vmcs
}

#[test]
fn damaged_tables_are_layouts_or_errors() {
    let mut random = Random(1);
    let mut taken = 0;
    for layout in Layout::built_in() {
        let table = layout.to_table();
        for _ in 0..500 {
            let bytes = damage(&mut random, table.as_bytes());
            let text = String::from_utf8_lossy(&bytes);
            match Layout::from_table(&text) {
                Ok(layout) => {
                    taken += 1;
                    let mut region = vec![0; layout.size()];
                    layout.write(&vmcs(&mut random), &mut region).unwrap();
                    layout.read(&region).unwrap();
                }
                Err(error) => assert!(!error.to_string().contains('\n')),
            }
        }
    }
    assert!(taken > 100, "{taken}");
}

#[test]
fn damaged_logs_are_dumps_or_errors() {
    let log = "\
kvm_intel: *** Guest State ***
kvm_intel: CR0: actual=0x0000000080010031, shadow=0x0000000060000010, gh_mask=fffffffffffffff7
kvm_intel: RSP = 0xffff82d08030f8b0  RIP = 0x0000000000007c00
kvm_intel: Sysenter RSP=ffff830000000000 CS:RIP=e008:ffff82d080354420
kvm_intel: CS:   sel=0x0010, attr=0x0a09b, limit=0xffffffff, base=0x0000000000000000
kvm_intel: *** Host State ***
kvm_intel: CS=0010 SS=0018 DS=0000 ES=0000 FS=0000 GS=0000 TR=0040
kvm_intel: *** Control State ***
kvm_intel: VMEntry: intr_info=80000044 errcode=00000000 ilen=00000000
kvm_intel: SVI|RVI = 51|07 TPR Threshold = 0x0a
kvm_intel: PLE Gap=00000080 Window=00001000
";
    let mut random = Random(2);
    let mut taken = 0;
    for _ in 0..20_000 {
        let bytes = damage(&mut random, log.as_bytes());
        match Dump::read(&String::from_utf8_lossy(&bytes)) {
            Ok(_) => taken += 1,
            Err(error) => assert!(!error.to_string().contains('\n')),
        }
    }
    assert!(taken > 1000, "{taken}");
}

#[test]
fn damaged_nested_states_are_checked_or_refused() {
    let mut random = Random(3);
    let mut region = vec![0; 4096];
    Layout::kvm()
        .write(&vmcs(&mut random), &mut region)
        .unwrap();
    let state = NestedState {
        flags: 1,
        vmxon: 0x1000,
        vmcs: 0x2000,
        data: [region.clone(), region].concat(),
        ..NestedState::default()
    };
    let bytes = state.to_bytes();
    let layouts = [Layout::kvm()];
    let mut taken = 0;
    for _ in 0..20_000 {
        let mut bytes = damage(&mut random, &bytes);
        if random.below(2) == 0 && bytes.len() > 8 {
            let size = bytes.len() as u32;
            bytes[4..8].copy_from_slice(&size.to_le_bytes());
        }
        let Ok(state) = NestedState::read(&bytes) else {
            continue;
        };
        taken += 1;
        assert!(bytes.starts_with(&state.to_bytes()));
        let taker = Taker {
            vmx: true,
            enlightened: random.below(2) == 0,
            smm: random.below(4) == 0,
            physical_bits: 46,
            layouts: &layouts,
        };
        let _ = state.check(&taker);
        let _ = state.findings(Layout::kvm());
    }
    assert!(taken > 1000, "{taken}");
}

#[test]
fn damaged_regions_have_candidates_that_can_be_translated() {
    let mut random = Random(4);
    for layout in Layout::built_in() {
        let mut region = vec![0; 4096];
        layout.write(&vmcs(&mut random), &mut region).unwrap();
        for _ in 0..100 {
            let bytes = damage(&mut random, &region);
            for candidate in identify(&bytes, Layout::built_in().iter().copied()) {
                let vmcs = candidate.layout.read(&bytes).unwrap();
                let to = Layout::built_in()[random.below(Layout::built_in().len())];
                let (mut out, mut truth) = (vec![0; 4096], vec![0; 4096]);
                let map = Translation::new(candidate.layout, to);
                map.run(&bytes, &mut out, Losses::Allowed).unwrap();
                to.write(&vmcs, &mut truth).unwrap();
                assert!(out == truth);
            }
        }
    }
}
