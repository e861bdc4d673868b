//! Each layout's quirk, byte by byte and through a translation.

use hypernest_vmcs::{Fate, Field, Layout, Losses, TranslateError, Translation, Vmcs};

fn layout(name: &str) -> &'static Layout {
    Layout::named(name).unwrap()
}

/// A region of this layout with these values.
fn region(name: &str, values: &[(Field, u64)]) -> Vec<u8> {
    let mut vmcs = Vmcs::new();
    for &(field, value) in values {
        vmcs.set(field, value);
    }
    let mut region = vec![0; 4096];
    layout(name).write(&vmcs, &mut region).unwrap();
    region
}

fn translate(
    from: &str,
    to: &str,
    region: &[u8],
    losses: Losses,
) -> Result<Vec<u8>, TranslateError> {
    let mut out = vec![0; 4096];
    Translation::new(layout(from), layout(to)).run(region, &mut out, losses)?;
    Ok(out)
}

fn fate(from: &str, to: &str, region: &[u8], field: Field) -> Option<Fate> {
    let report = Translation::new(layout(from), layout(to)).report(region);
    let row = report.unwrap().into_iter().find(|row| row.0 == field);
    row.map(|row| row.1)
}

const TIMER: Field = Field::VMX_PREEMPTION_TIMER_VALUE;
const SYSENTER: Field = Field::HOST_IA32_SYSENTER_CS;

#[test]
fn acrns_preemption_timer_yields_its_bytes_to_the_hosts_sysenter_cs() {
    assert_eq!(layout("acrn").yields(), [(TIMER, SYSENTER)]);
    // What is in the bytes is the winner's, in both directions.
    let acrn = region("acrn", &[(SYSENTER, 0x10)]);
    let out = translate("acrn", "hypernest", &acrn, Losses::Refused).unwrap();
    let read = layout("hypernest").read(&out).unwrap();
    assert_eq!((read.get(SYSENTER), read.get(TIMER)), (0x10, 0));
    assert_eq!(
        fate("acrn", "hypernest", &acrn, TIMER),
        Some(Fate::Defaulted)
    );
    let full = region("hypernest", &[(SYSENTER, 0x10), (TIMER, 77)]);
    let refused = translate("hypernest", "acrn", &full, Losses::Refused);
    let lost = TranslateError::Lost {
        first: TIMER,
        value: 77,
        fields: 1,
    };
    assert_eq!(refused, Err(lost));
    assert_eq!(
        fate("hypernest", "acrn", &full, TIMER),
        Some(Fate::Lost(77))
    );
    let out = translate("hypernest", "acrn", &full, Losses::Allowed);
    assert_eq!(out, Ok(acrn));
}

#[test]
fn xens_slots_of_eight_bytes_come_round_after_32_indexes() {
    let xen = layout("xen");
    assert_eq!(xen.yields().len(), 7);
    for &(loser, winner) in xen.yields() {
        let value = winner.mask() & 0x1234_5678_9ABC_DEF0;
        let slot = region("xen", &[(winner, value)]);
        let read = xen.read(&slot).unwrap();
        assert_eq!((read.get(winner), read.get(loser)), (value, 0), "{loser:?}");
        let full = region("hypernest", &[(winner, value), (loser, 1)]);
        assert_eq!(
            translate("hypernest", "xen", &full, Losses::Refused),
            Err(TranslateError::Lost {
                first: loser,
                value: 1,
                fields: 1
            })
        );
        assert_eq!(
            translate("hypernest", "xen", &full, Losses::Allowed),
            Ok(slot)
        );
    }
    // The upper bytes of a slot are no part of a narrower field.
    let mut wide = region("xen", &[(Field::GUEST_CS_SELECTOR, 8)]);
    let cs = xen
        .slots()
        .iter()
        .find(|slot| slot.field == Field::GUEST_CS_SELECTOR);
    wide[usize::from(cs.unwrap().offset) + 2..][..6].fill(0xFF);
    let out = translate("xen", "kvm", &wide, Losses::Refused).unwrap();
    assert_eq!(out, region("kvm", &[(Field::GUEST_CS_SELECTOR, 8)]));
}

#[test]
fn bochs_rotates_the_access_rights_of_the_guest_and_nothing_else() {
    let rights: Vec<Field> = Field::ALL
        .into_iter()
        .filter(|field| (0x4814..=0x4822).contains(&field.encoding()))
        .collect();
    assert_eq!(rights.len(), 8);
    for slot in layout("bochs").slots() {
        assert_eq!(
            slot.rotated,
            rights.contains(&slot.field),
            "{:?}",
            slot.field
        );
    }
    for field in rights {
        let value = 0x0001_C09B;
        let bochs = region("bochs", &[(field, value)]);
        let slot = layout("bochs")
            .slots()
            .iter()
            .find(|slot| slot.field == field);
        let at = usize::from(slot.unwrap().offset);
        assert_eq!(bochs[at..at + 4], [0x00, 0x9B, 0xC0, 0x01], "{field:?}");
        let kvm = translate("bochs", "kvm", &bochs, Losses::Refused).unwrap();
        assert_eq!(kvm, region("kvm", &[(field, value)]));
        assert_eq!(fate("bochs", "kvm", &bochs, field), Some(Fate::Converted));
        assert_eq!(translate("kvm", "bochs", &kvm, Losses::Refused), Ok(bochs));
    }
}

#[test]
fn virtualboxes_launch_state_is_a_bit_of_a_byte() {
    let mut vbox = region("virtualbox", &[]);
    // Clear, active, current and launched of version 6.1, and clear of version 7.
    for (state, launched) in [(1, 0), (2, 0), (4, 0), (6, 0), (8, 1), (14, 1), (0, 0)] {
        vbox[8] = state;
        // The bytes behind it are not its.
        vbox[9..12].fill(0xFF);
        let kvm = translate("virtualbox", "kvm", &vbox, Losses::Refused).unwrap();
        assert_eq!(kvm[8..12], [launched, 0, 0, 0], "{state}");
        let back = translate("kvm", "virtualbox", &kvm, Losses::Refused).unwrap();
        assert_eq!(back[8..12], [if launched == 1 { 8 } else { 1 }, 0, 0, 0]);
        // The enlightened VMCS has none.
        let evmcs = translate("virtualbox", "evmcs-v1", &vbox, Losses::Refused);
        assert_eq!(
            evmcs.err(),
            (launched == 1).then_some(TranslateError::LaunchState)
        );
    }
}

#[test]
fn kvms_retired_cr3_targets_are_lost_by_name_and_their_bytes_are_nobodys() {
    let targets = [
        Field::CR3_TARGET_VALUE0,
        Field::CR3_TARGET_VALUE1,
        Field::CR3_TARGET_VALUE2,
        Field::CR3_TARGET_VALUE3,
    ];
    for old in ["kvm-3.10", "kvm-4.0", "kvm-4.14"] {
        for target in targets {
            let region = region(old, &[(target, 0x5000)]);
            let refused = translate(old, "kvm", &region, Losses::Refused);
            let lost = TranslateError::Lost {
                first: target,
                value: 0x5000,
                fields: 1,
            };
            assert_eq!(refused, Err(lost), "{old}");
        }
    }
    // Today's kernels do not look at what an older one left there.
    let mut kvm = region("kvm", &[(Field::GUEST_RIP, 1)]);
    kvm[376..408].fill(0xAA);
    let out = translate("kvm", "hypernest", &kvm, Losses::Refused);
    assert_eq!(out, Ok(region("hypernest", &[(Field::GUEST_RIP, 1)])));
    assert!(targets.iter().all(|&target| !layout("kvm").holds(target)));
}
