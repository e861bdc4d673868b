//! Tests of the layouts.

use super::*;
use crate::testing::Random;
use alloc::string::{String, ToString};
use alloc::vec;

const KVM_CSV: &str = include_str!("../../data/layout_kvm_11e57ed0.csv");

/// `vmcs` without the fields that `layout` has no slot for.
fn held(layout: &Layout, vmcs: &Vmcs) -> Vmcs {
    let mut held = vmcs.clone();
    for field in Field::ALL.into_iter().filter(|&field| !layout.holds(field)) {
        held.set(field, 0);
    }
    held
}

#[test]
fn what_is_written_is_read() {
    let mut random = Random::new(1);
    for layout in Layout::built_in() {
        for _ in 0..200 {
            let vmcs = random.vmcs();
            let mut region = vec![random.next() as u8; layout.used()];
            layout.write(&vmcs, &mut region).unwrap();
            let mut expected = held(layout, &vmcs);
            expected.launched &= layout.launch_state().is_some();
            assert!(
                layout.read(&region).unwrap() == expected,
                "{}",
                layout.name()
            );
        }
    }
}

#[test]
fn bytes_without_a_slot_are_left_alone() {
    let layout = Layout::kvm();
    let mut region = vec![0x5A; 4096];
    layout.write(&Vmcs::new(), &mut region).unwrap();
    // The former CR3-target values, the rows of newer kernels, the rest of the region.
    assert!(region[376..408].iter().all(|&byte| byte == 0x5A));
    assert!(region[680..744].iter().all(|&byte| byte == 0x5A));
    assert!(region[998..].iter().all(|&byte| byte == 0x5A));
    assert_eq!(region[..8], [0xD0, 0x7E, 0xE5, 0x11, 0, 0, 0, 0]);
}

#[test]
fn short_regions_are_errors_and_stay_as_they_are() {
    for layout in Layout::built_in() {
        for len in 0..layout.used() {
            let mut region = vec![0x5A; len];
            let short = LayoutError::Short {
                found: len,
                needed: layout.used(),
            };
            assert_eq!(layout.read(&region), Err(short));
            assert_eq!(layout.write(&Vmcs::new(), &mut region), Err(short));
            assert_eq!(layout.set_launched(&mut region, true), Err(short));
            assert_eq!(layout.is_launched(&region), Err(short));
            assert!(region.iter().all(|&byte| byte == 0x5A));
        }
    }
}

#[test]
fn built_in_layouts_obey_the_rules_for_new_ones() {
    for layout in Layout::built_in() {
        let slots = layout.slots().to_vec();
        let again = Layout::new(
            String::from(layout.name()),
            layout.revisions(),
            4096,
            layout.launch_state(),
            slots,
        )
        .unwrap();
        assert_eq!(again.slots(), layout.slots());
        assert_eq!(
            (again.used(), again.field_mask()),
            (layout.used(), layout.field_mask())
        );
        for slot in layout.slots() {
            assert!(slot.width >= slot.field.width().bytes(), "{:?}", slot.field);
            assert_eq!(slot.offset % 2, 0, "{:?}", slot.field);
        }
    }
}

#[test]
fn kvm_is_what_its_table_says() {
    let layout = Layout::kvm();
    assert_eq!((layout.revision(), layout.used()), (0x11E5_7ED0, 998));
    let mut rows = 0;
    for line in KVM_CSV.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        let Some(hex) = cells[2].strip_prefix("0x") else {
            continue;
        };
        let encoding = u32::from_str_radix(hex, 16).unwrap();
        let (field, _) = Field::from_encoding(encoding).unwrap();
        let here = cells[0] == "field" && cells[5] == "6.1 and 6.12";
        let slot = layout.slots().iter().find(|slot| slot.field == field);
        assert_eq!(slot.is_some(), here, "{line}");
        assert_eq!(layout.holds(field), here, "{line}");
        if let Some(slot) = slot {
            assert_eq!(slot.offset.to_string(), cells[3], "{line}");
            assert_eq!(slot.width.to_string(), cells[4], "{line}");
            rows += 1;
        }
    }
    assert_eq!((rows, layout.slots().len()), (141, 141));
}

#[test]
fn ours_holds_every_field() {
    let layout = Layout::hypernest();
    assert_eq!(*layout.field_mask(), FieldSet::ALL);
    assert_eq!(&layout.revision().to_le_bytes(), b"HYPN");
    assert_eq!(layout.revision() >> 31, 0);
    assert_ne!(layout.revision(), Layout::kvm().revision());
    assert_eq!(layout.slots()[0], Slot::new(Field::IO_BITMAP_A, 16, 8));
    assert!(layout.used() <= layout.size());
}

#[test]
fn another_revision_is_an_error_and_the_shadow_indicator_is_not_part_of_it() {
    let mut region = vec![0; 4096];
    let mut vmcs = Vmcs::new();
    vmcs.shadow = true;
    Layout::kvm().write(&vmcs, &mut region).unwrap();
    assert_eq!(revision(&region), Some((0x11E5_7ED0, true)));
    assert!(Layout::kvm().read(&region).unwrap().shadow);
    assert!(matches!(
        Layout::hypernest().read(&region),
        Err(LayoutError::Revision { .. })
    ));
    assert_eq!(revision(&region[..3]), None);
}

#[test]
fn the_launch_state_can_be_set_alone() {
    let mut region = vec![0xFF; 4096];
    let layout = Layout::kvm();
    assert_eq!(layout.is_launched(&region), Ok(true));
    layout.set_launched(&mut region, false).unwrap();
    assert_eq!(layout.is_launched(&region), Ok(false));
    assert_eq!(region.iter().filter(|&&byte| byte != 0xFF).count(), 4);
}

#[test]
fn layouts_that_make_no_sense_are_refused() {
    let new = |revision, size, launch, slots| {
        Layout::new("x", &[revision], size, Some(LaunchState::at(launch)), slots).unwrap_err()
    };
    let slot = |offset, width| vec![Slot::new(Field::GUEST_RIP, offset, width)];
    assert_eq!(
        new(1 << 31, 4096, 8, vec![]),
        LayoutError::WideRevision(1 << 31)
    );
    assert_eq!(new(1, 4097, 8, vec![]), LayoutError::Size(4097));
    assert_eq!(new(1, 7, 8, vec![]), LayoutError::Size(7));
    assert_eq!(new(1, 8, 8, vec![]), LayoutError::Outside(4, 8));
    assert_eq!(new(1, 4096, 4, vec![]), LayoutError::Outside(4, 4));
    assert_eq!(
        new(1, 4096, 8, slot(4090, 8)),
        LayoutError::Outside(8, 4090)
    );
    assert_eq!(
        new(1, 4096, 8, slot(u16::MAX, 8)),
        LayoutError::Outside(8, u16::MAX)
    );
    assert_eq!(new(1, 4096, 8, slot(11, 8)), LayoutError::Overlap(11));
    assert_eq!(
        new(1, 4096, 8, slot(12, 0)),
        LayoutError::SlotWidth(Field::GUEST_RIP, 0)
    );
    assert_eq!(
        new(1, 4096, 8, slot(12, 9)),
        LayoutError::SlotWidth(Field::GUEST_RIP, 9)
    );
    let twice = [slot(12, 8), slot(20, 8)].concat();
    assert_eq!(new(1, 4096, 8, twice), LayoutError::Twice(Field::GUEST_RIP));
}

/// The rows of a table, by column name.
fn rows(csv: &'static str) -> impl Iterator<Item = impl Fn(&str) -> &'static str> {
    let mut lines = csv.lines();
    let head: Vec<&str> = lines.next().unwrap().split(',').collect();
    lines.map(move |line| {
        let cells: Vec<&str> = line.split(',').collect();
        let head = head.clone();
        move |column: &str| cells[head.iter().position(|name| *name == column).unwrap()]
    })
}

#[test]
fn every_row_of_every_table_is_a_slot() {
    let tables = [
        (
            "kvm-3.10",
            include_str!("../../data/layout_kvm_history.csv"),
            "offset",
            "a_v3.10",
        ),
        (
            "kvm-4.14",
            include_str!("../../data/layout_kvm_history.csv"),
            "offset",
            "b_v4.14",
        ),
        (
            "kvm-4.0",
            include_str!("../../data/layout_kvm_history.csv"),
            "offset",
            "c_v4.0_derived",
        ),
        (
            "virtualbox",
            include_str!("../../data/layout_virtualbox.csv"),
            "offset",
            "",
        ),
        (
            "bochs",
            include_str!("../../data/layout_bochs.csv"),
            "offset",
            "",
        ),
        (
            "acrn",
            include_str!("../../data/layout_acrn.csv"),
            "effective_offset",
            "",
        ),
        (
            "xen",
            include_str!("../../data/layout_xen_vvmcs.csv"),
            "offset",
            "",
        ),
        (
            "xmhf",
            include_str!("../../data/layout_xmhf_amd64.csv"),
            "offset",
            "",
        ),
        (
            "evmcs-v1",
            include_str!("../../data/layout_evmcs_v1.csv"),
            "offset",
            "",
        ),
    ];
    for (name, csv, offset, variant) in tables {
        let layout = Layout::named(name).unwrap();
        let mut found = 0;
        for row in rows(csv) {
            if row("kind") != "field" || !variant.is_empty() && row("variant") != variant {
                continue;
            }
            let encoding = u32::from_str_radix(&row("encoding")[2..], 16).unwrap();
            let (field, _) = Field::from_encoding(encoding).unwrap();
            let slot = layout.slots().iter().find(|slot| slot.field == field);
            let yields = layout.yields().iter().find(|pair| pair.0 == field);
            let place = match (slot, yields) {
                (Some(slot), None) => slot,
                (None, Some((_, winner))) => layout
                    .slots()
                    .iter()
                    .find(|slot| slot.field == *winner)
                    .unwrap(),
                _ => panic!("{name}: {field:?}"),
            };
            assert_eq!(place.offset.to_string(), row(offset), "{name}: {field:?}");
            found += 1;
        }
        assert_eq!(
            found,
            layout.slots().len() + layout.yields().len(),
            "{name}"
        );
    }
}

fn region_of(layout: &Layout, field: Field, value: u64) -> Vec<u8> {
    let mut vmcs = Vmcs::new();
    vmcs.set(field, value);
    let mut region = vec![0; 4096];
    layout.write(&vmcs, &mut region).unwrap();
    region
}

#[test]
fn bochs_rotates_access_rights() {
    let bochs = Layout::named("bochs").unwrap();
    let region = region_of(bochs, Field::GUEST_CS_AR_BYTES, 0xA09B);
    assert_eq!(region[2344..2348], [0x00, 0x9B, 0xA0, 0x00]);
    let region = region_of(bochs, Field::GUEST_CS_AR_BYTES, 0x0001_0000);
    assert_eq!(region[2344..2348], [0x00, 0x00, 0x00, 0x01]);
    assert_eq!(bochs.revisions(), [0x2B, 4]);
    let mut newer = region_of(&bochs.with_revision(4).unwrap(), Field::GUEST_RIP, 1);
    assert_eq!(bochs.read(&newer).unwrap().get(Field::GUEST_RIP), 1);
    newer[0] = 5;
    assert!(bochs.read(&newer).is_err());
    assert_eq!(
        bochs.with_revision(1 << 31),
        Err(LayoutError::WideRevision(1 << 31))
    );
}

#[test]
fn virtualbox_has_launch_states_of_its_own() {
    let layout = Layout::named("virtualbox").unwrap();
    let mut region = region_of(layout, Field::GUEST_RIP, 1);
    // Clear as version 6.1 writes it, which version 7 takes too; version 7 writes 0.
    assert_eq!(region[8], 1);
    for (state, launched) in [
        (0, false),
        (1, false),
        (2, false),
        (4, false),
        (8, true),
        (12, true),
    ] {
        region[8] = state;
        assert_eq!(layout.is_launched(&region), Ok(launched), "{state}");
    }
    layout.set_launched(&mut region, true).unwrap();
    assert_eq!(region[8..12], [8, 0, 0, 0]);
}

#[test]
fn fields_that_share_bytes_have_a_winner() {
    let acrn = Layout::named("acrn").unwrap();
    let timer = Field::VMX_PREEMPTION_TIMER_VALUE;
    assert_eq!(acrn.yields(), [(timer, Field::HOST_IA32_SYSENTER_CS)]);
    assert!(!acrn.holds(timer));
    let region = region_of(acrn, Field::HOST_IA32_SYSENTER_CS, 0x10);
    assert_eq!(region[580], 0x10);
    assert_eq!(acrn.read(&region).unwrap().get(timer), 0);
    let xen = Layout::named("xen").unwrap();
    assert_eq!(xen.yields().len(), 7);
    for (loser, winner) in xen.yields() {
        assert!(!xen.holds(*loser) && xen.holds(*winner));
        assert_eq!(loser.encoding() - winner.encoding(), 64, "{loser:?}");
    }
}

#[test]
fn xen_has_a_slot_of_8_bytes_for_each_index() {
    let xen = Layout::named("xen").unwrap();
    for slot in xen.slots() {
        let encoding = slot.field.encoding();
        let (index, kind, width) = (encoding >> 1 & 31, encoding >> 10 & 3, encoding >> 13 & 3);
        // VPID, whose slot would be the header.
        let number = if encoding == 0 {
            0x3F
        } else {
            index + 32 * kind + 128 * width
        };
        assert_eq!((u32::from(slot.offset), slot.width), (8 * number, 8));
    }
    assert!(xen.takes(0x1234) && xen.launch_state().is_none() && xen.revision() == 0);
}

#[test]
fn former_kernels_kept_cr3_targets() {
    for (name, holds) in [
        ("kvm-3.10", true),
        ("kvm-4.14", true),
        ("kvm-4.0", true),
        ("kvm", false),
    ] {
        let layout = Layout::named(name).unwrap();
        assert_eq!(layout.holds(Field::CR3_TARGET_VALUE0), holds, "{name}");
        assert_eq!(layout.revision(), 0x11E5_7ED0);
    }
}

#[test]
fn ours_with_the_enlightened_offsets_holds_every_field() {
    let (ours, theirs) = (
        Layout::named("hypernest-evmcs").unwrap(),
        Layout::named("evmcs-v1").unwrap(),
    );
    assert_eq!(*ours.field_mask(), FieldSet::ALL);
    assert_eq!(&ours.slots()[..theirs.slots().len()], theirs.slots());
    assert_eq!(ours.launch_state(), Some(LaunchState::at(1024)));
    assert!(
        ours.slots()[theirs.slots().len()..]
            .iter()
            .all(|slot| slot.offset >= 1028)
    );
}

#[test]
fn what_a_machine_can_keep_is_known() {
    let mut machines: Vec<&str> = Layout::built_in()
        .iter()
        .filter(|layout| layout.is_for_machines())
        .map(|layout| layout.name())
        .collect();
    machines.sort_unstable();
    assert_eq!(
        machines,
        [
            "hypernest",
            "hypernest-evmcs",
            "kvm",
            "kvm-3.10",
            "kvm-4.0",
            "kvm-4.14",
            "virtualbox"
        ]
    );
    assert!(
        Layout::named("bochs")
            .unwrap()
            .with_revision(4)
            .unwrap()
            .is_for_machines()
    );
    assert!(Layout::named("nothing").is_none());
}
