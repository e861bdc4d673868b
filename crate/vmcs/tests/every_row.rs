//! Every row of every table of `data/`, looked up in what the build has made of it.

mod tables;

use std::collections::BTreeSet;

use hypernest_vmcs::checks::{CHECK_ROWS, Stage};
use hypernest_vmcs::nested_state::{DEADLINE_VALID, HEADER, IMAGE, smm_flag, state_flag};
use hypernest_vmcs::{
    Control, ControlId, ExitReason, Field, InstructionError, Kind, Layout, NestedState, Validity,
    capabilities,
};
use tables::{Row, number};

#[test]
fn fields() {
    let rows = table!("fields");
    assert_eq!(rows.len(), Field::COUNT);
    for (row, field) in rows.iter().zip(Field::ALL) {
        let encoding = number(&row["encoding"]);
        assert_eq!(Field::from_encoding(encoding), Some((field, false)));
        assert_eq!(field.encoding(), encoding);
        assert_eq!(field.name(), row["sdm_name"]);
        assert_eq!(field.short_name(), row["short_name"]);
        let kind = match row["type"].as_str() {
            "control" => Kind::Control,
            "exit_info" => Kind::ExitInfo,
            "guest_state" => Kind::GuestState,
            "host_state" => Kind::HostState,
            other => panic!("{other}"),
        };
        assert_eq!(field.kind(), kind, "{field:?}");
        assert_eq!(encoding >> 1 & 0x1FF, number(&row["index"]), "{field:?}");
        let bits = match row["width"].as_str() {
            "natural" => 64,
            bits => number(bits),
        };
        assert_eq!(field.mask().count_ones(), bits, "{field:?}");
        let high = (!row["high_encoding"].is_empty()).then(|| number(&row["high_encoding"]));
        assert_eq!(high.is_some(), row["width"] == "64", "{field:?}");
        if let Some(high) = high {
            assert_eq!(Field::from_encoding(high), Some((field, true)));
        }
    }
}

fn control(text: &str) -> Control {
    let found = Control::ALL
        .into_iter()
        .find(|control| control.to_string() == text);
    found.unwrap_or_else(|| panic!("no control {text}"))
}

#[test]
fn control_bits() {
    for row in table!("control_bits") {
        let control = control(&row["control"]);
        assert_eq!(control.field().encoding(), number(&row["encoding"]));
        let bit = number(&row["bit"]) as u8;
        let info = ControlId::new(control, bit).info().unwrap();
        assert_eq!(info.name, row["sdm_name"]);
        assert_eq!(info.default1, row["default1"] == "yes", "{}", info.name);
        assert_eq!(control.default1() >> bit & 1 != 0, info.default1);
        assert_eq!(info.dependency, row["dependency"]);
        for required in info.requires {
            let words = format!("{}.{}", required.control, required.bit);
            assert!(row["dependency"].contains(&words), "{}", info.name);
        }
    }
}

#[test]
fn exit_reasons() {
    let rows = table!("exit_reasons");
    assert_eq!(rows.len(), ExitReason::all().len());
    for row in rows {
        let reason = ExitReason(number(&row["number"]) as u16);
        let info = reason.info().unwrap();
        assert_eq!(reason.ident(), row["ident"]);
        assert_eq!(ExitReason::from_ident(&row["ident"]), Some(reason));
        assert_eq!(reason.name(), row["sdm_name"]);
        assert_eq!(reason.description(), row["description"]);
        assert_eq!(info.caused_by, row["caused_by"]);
        assert_eq!(info.entry_failure, row["entry_failure_bit31"] == "yes");
        assert_eq!(
            info.qualification.is_some(),
            row["has_exit_qualification"] == "yes"
        );
        if let Some(words) = info.qualification {
            assert_eq!(words, row["exit_qualification"]);
        }
        for (validity, column) in [
            (info.instruction_length, "instruction_length_valid"),
            (info.instruction_information, "instruction_info_valid"),
        ] {
            let expected = match row[column].as_str() {
                "yes" => Validity::Yes,
                "no" => Validity::No,
                "event" => Validity::Event,
                "some" => Validity::Sometimes,
                "unlisted" => Validity::Unlisted,
                other => panic!("{other}"),
            };
            assert_eq!(validity, expected, "{}: {}", row["ident"], row[column]);
        }
    }
}

#[test]
fn instruction_errors() {
    let mut named = 0;
    for row in table!("vmx_instruction_errors") {
        let error = InstructionError(number(&row["number"]));
        assert_eq!(error.meaning(), row["meaning"]);
        let assigned = InstructionError::all().any(|other| other == error);
        assert_eq!(assigned, !row["ident"].is_empty(), "{error}");
        named += usize::from(assigned);
    }
    assert_eq!(named, InstructionError::all().count());
}

#[test]
fn capability_msrs() {
    let rows = table!("vmx_capability_msrs");
    assert_eq!(rows.len(), capabilities().len());
    for (row, capability) in rows.iter().zip(capabilities()) {
        assert_eq!(capability.msr, number(&row["msr"]));
        assert_eq!(capability.msr_name, row["name"]);
        assert_eq!(capability.meaning, row["meaning"]);
        let (high, low) = row["bits"]
            .split_once(':')
            .unwrap_or((&row["bits"], &row["bits"]));
        assert_eq!(u32::from(capability.high), number(high));
        assert_eq!(u32::from(capability.low), number(low));
    }
}

#[test]
fn checks() {
    let rows = table!("vmx_checks");
    assert_eq!(rows.len(), CHECK_ROWS.len());
    for (row, check) in rows.iter().zip(CHECK_ROWS) {
        let stage = match row["stage"].as_str() {
            "precheck" => Stage::Precheck,
            "controls" => Stage::Controls,
            "host" => Stage::Host,
            "guest" => Stage::Guest,
            "msr-load" => Stage::MsrLoad,
            other => panic!("{other}"),
        };
        assert_eq!(check.stage, stage, "{}", check.id);
        let texts = [
            (check.id, "id"),
            (check.group, "group"),
            (check.condition, "condition"),
            (check.applies_when, "applies_when"),
            (check.failure, "failure"),
            (check.note, "note"),
            (check.reach, "reach"),
        ];
        for (text, column) in texts {
            assert_eq!(text, row[column], "{}", check.id);
        }
    }
}

#[test]
fn layouts() {
    let rows = table!("layouts");
    // Two of our own have no row.
    assert_eq!(rows.len() + 2, Layout::built_in().len());
    for row in rows {
        let layout = Layout::named(&row["name"]).unwrap();
        assert_eq!(layout.title(), row["title"]);
        let revisions: Vec<u32> = row["revisions"].split_whitespace().map(number).collect();
        assert_eq!(layout.revisions(), revisions);
        let launch: Vec<u32> = row["launch_state"].split_whitespace().map(number).collect();
        match (layout.launch_state(), &launch[..]) {
            (None, []) => {}
            (Some(state), [offset, width, clear, launched, mask @ ..]) => {
                assert_eq!(u32::from(state.offset), *offset);
                assert_eq!(u32::from(state.width), *width);
                assert_eq!((state.clear, state.launched), (*clear, *launched));
                assert_eq!(state.mask, mask.first().copied().unwrap_or(u32::MAX));
            }
            other => panic!("{}: {other:?}", layout.name()),
        }
        let rotated = layout.slots().iter().filter(|slot| slot.rotated).count();
        let expected = if row["rotated"].is_empty() { 0 } else { 8 };
        assert_eq!(rotated, expected, "{}", layout.name());
        let yields: BTreeSet<&str> = row["yields"].split_whitespace().collect();
        let losers = layout.yields().iter().map(|pair| pair.0.short_name());
        assert_eq!(losers.collect::<BTreeSet<_>>(), yields);
    }
}

/// The rows of a layout's table, with its column of widths.
fn layout_tables() -> Vec<(&'static str, Vec<Row>, &'static str)> {
    let version = |rows: Vec<Row>, column: &str, wanted: &str| -> Vec<Row> {
        let is = |row: &Row| row[column].contains(wanted);
        rows.into_iter().filter(is).collect()
    };
    let history = |variant| version(table!("layout_kvm_history"), "variant", variant);
    vec![
        (
            "kvm",
            version(table!("layout_kvm_11e57ed0"), "kernel", ""),
            "width_bytes",
        ),
        ("kvm-3.10", history("a_"), "width_bytes"),
        ("kvm-4.14", history("b_"), "width_bytes"),
        ("kvm-4.0", history("c_"), "width_bytes"),
        ("virtualbox", table!("layout_virtualbox"), "width_bytes"),
        ("bochs", table!("layout_bochs"), "width_bytes"),
        ("acrn", table!("layout_acrn"), "width_bytes"),
        ("xen", table!("layout_xen_vvmcs"), "slot_bytes"),
        ("xmhf", table!("layout_xmhf_amd64"), "width_bytes"),
        ("evmcs-v1", table!("layout_evmcs_v1"), "width_bytes"),
    ]
}

#[test]
fn rows_of_layouts_that_are_no_slots() {
    let mut rest = 0;
    for (name, rows, width) in layout_tables() {
        let layout = Layout::named(name).unwrap();
        let offset = if name == "acrn" {
            "effective_offset"
        } else {
            "offset"
        };
        let taken: BTreeSet<usize> = layout
            .slots()
            .iter()
            .flat_map(|slot| {
                let start = usize::from(slot.offset);
                start..start + usize::from(slot.width)
            })
            .collect();
        let launch = layout.launch_state();
        for row in rows.iter().filter(|row| row["kind"] != "field") {
            rest += 1;
            let at = row[offset].as_str();
            // Some rows of ACRN's have the declared place alone.
            let at = number(if at.is_empty() {
                &row["declared_offset"]
            } else {
                at
            }) as usize;
            let bytes = number(&row[width]) as usize;
            match (row["kind"].as_str(), row["name"].as_str()) {
                ("header", "revision_id" | "version_number") => assert_eq!((at, bytes), (0, 4)),
                ("header", "abort" | "abort_indicator") => assert_eq!((at, bytes), (4, 4)),
                ("header", "launch_state") => {
                    let launch = launch.unwrap();
                    assert_eq!(at, usize::from(launch.offset), "{name}");
                    assert_eq!(bytes, usize::from(launch.width), "{name}");
                }
                ("padding" | "retired" | "internal" | "synthetic", what) => {
                    let free = (at..at + bytes).all(|byte| !taken.contains(&byte));
                    assert!(free && bytes > 0, "{name}: {what}");
                }
                ("tail", what) => {
                    assert!(at + bytes <= layout.size(), "{name}: {what}");
                    let last = layout.used();
                    // Nothing of the layout lies behind; padding may lie before.
                    assert!(last <= at, "{name}: {what} at {at}, used {last}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
        let has_header = rows
            .iter()
            .any(|row| (&*row["kind"], &*row["name"]) == ("header", "launch_state"));
        // Ours puts it behind the enlightened VMCS, which has none.
        assert_eq!(has_header, launch.is_some(), "{name}");
    }
    assert!(rest > 70, "{rest}");
}

#[test]
fn nested_state() {
    let mut steps = BTreeSet::new();
    for row in table!("nested_state_abi") {
        let (kind, name) = (row["kind"].as_str(), row["name"].as_str());
        let place = |column: &str| number(&row[column]) as usize;
        match kind {
            "struct" => struct_member(name, place("offset"), place("width_bytes")),
            "data" => {
                let mut state = NestedState {
                    data: vec![0; 2 * IMAGE],
                    ..NestedState::default()
                };
                state.data[place("offset") - HEADER] = 0x5A;
                assert_eq!(place("width_bytes"), IMAGE);
                let image = match name {
                    "vmcs12" => state.image(),
                    _ => state.shadow_image(),
                };
                assert_eq!(image.unwrap()[0], 0x5A, "{name}");
                assert_eq!(image.unwrap().len(), IMAGE);
            }
            "total" => {
                let images = match name {
                    "state_size_empty" => 0,
                    "state_size_vmcs12" => 1,
                    _ => 2,
                };
                let state = NestedState {
                    data: vec![0; images * IMAGE],
                    ..NestedState::default()
                };
                assert_eq!(state.to_bytes().len(), place("value"), "{name}");
            }
            "flag" | "smm_flag" | "vmx_flag" | "constant" => {
                let value = match name {
                    "KVM_STATE_NESTED_GUEST_MODE" => state_flag::GUEST_MODE.into(),
                    "KVM_STATE_NESTED_RUN_PENDING" => state_flag::RUN_PENDING.into(),
                    "KVM_STATE_NESTED_EVMCS" => state_flag::EVMCS.into(),
                    "KVM_STATE_NESTED_MTF_PENDING" => state_flag::MTF_PENDING.into(),
                    "KVM_STATE_NESTED_GIF_SET" => state_flag::GIF_SET.into(),
                    "KVM_STATE_NESTED_SMM_GUEST_MODE" => smm_flag::GUEST_MODE.into(),
                    "KVM_STATE_NESTED_SMM_VMXON" => smm_flag::VMXON.into(),
                    "KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE" => DEADLINE_VALID,
                    "KVM_STATE_NESTED_FORMAT_VMX" => NestedState::default().format.into(),
                    "KVM_STATE_NESTED_FORMAT_SVM" => {
                        // Known, and refused.
                        let mut bytes = NestedState::default().to_bytes();
                        bytes[2] = 1;
                        assert_eq!(NestedState::read(&bytes).unwrap_err().number(), 5);
                        1
                    }
                    "KVM_STATE_NESTED_VMX_VMCS_SIZE" => IMAGE as u32,
                    other => panic!("{other}"),
                };
                assert_eq!(value, number(&row["value"]), "{name}");
            }
            "check_ioctl" | "check_set" | "check_run" | "check_get" | "action" => {
                let step = name.strip_prefix("step_").unwrap().parse::<u32>().unwrap();
                assert!(steps.insert(step), "{name} twice");
                assert!(!row["description"].is_empty());
            }
            other => panic!("{other}"),
        }
    }
    // In order and without a gap; a test in the library fails each that can fail.
    assert!(steps.into_iter().eq(1..=44));
}

/// A member is where its row says: alone it changes nothing else.
fn struct_member(name: &str, offset: usize, width: usize) {
    let set = |value: u8| {
        let mut bytes = NestedState {
            vmxon: 0,
            vmcs: 0,
            data: vec![0; 2 * IMAGE],
            ..NestedState::default()
        }
        .to_bytes();
        bytes[offset] = value;
        NestedState::read(&bytes)
    };
    let last = NestedState {
        padding: ([0; 2], [0; 88]),
        ..NestedState::default()
    };
    assert_eq!(last.to_bytes().len(), HEADER);
    let (read, expected) = match name {
        "flags" => (u64::from(set(1).unwrap().flags), 2),
        "format" => {
            assert_eq!(set(1).unwrap_err().number(), 5);
            (1, 2)
        }
        // A size of one byte more than there is.
        "size" => {
            assert_eq!(set(0x81).unwrap_err().number(), 1);
            (1, 4)
        }
        "hdr.vmx.vmxon_pa" => (set(1).unwrap().vmxon, 8),
        "hdr.vmx.vmcs12_pa" => (set(1).unwrap().vmcs, 8),
        "hdr.vmx.smm.flags" => (set(1).unwrap().smm_flags.into(), 2),
        "hdr.vmx.pad" => (set(1).unwrap().padding.0[0].into(), 2),
        "hdr.vmx.flags" => (set(1).unwrap().vmx_flags.into(), 4),
        "hdr.vmx.preemption_timer_deadline" => (set(1).unwrap().deadline, 8),
        "hdr.pad_to_128" => (set(1).unwrap().padding.1[0].into(), 88),
        other => panic!("{other}"),
    };
    assert_eq!((read, width), (1, expected), "{name}");
}
