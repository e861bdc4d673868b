//! The functions on a VMCS in a file: natively what they say, and in Node what JavaScript gets of them.

#[path = "../../vmcs/tests/stream/mod.rs"]
mod stream;

use hypernest_vmcs::{Field, Layout, NestedState, Vmcs};
use hypernest_wasm::vmcs;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test;

/// A VMCS that any layout holds.
fn region(layout: &str, more: &[(Field, u64)]) -> Vec<u8> {
    let mut vmcs = Vmcs::new();
    let values = [
        (Field::GUEST_RIP, 0xFFFF_FFFF_8100_0000),
        (Field::GUEST_CR0, 0x8005_0033),
        (Field::GUEST_RFLAGS, 2),
        (Field::PIN_BASED_VM_EXEC_CONTROL, 0x16),
        (Field::CPU_BASED_VM_EXEC_CONTROL, 0x0401_E172),
        (Field::VM_EXIT_CONTROLS, 0x3_6FFF),
        (Field::VM_ENTRY_CONTROLS, 0x13FF),
        (Field::VMCS_LINK_POINTER, u64::MAX),
    ];
    for &(field, value) in values.iter().chain(more) {
        vmcs.set(field, value);
    }
    let mut region = vec![0; 4096];
    let layout = Layout::named(layout).expect("built in");
    layout.write(&vmcs, &mut region).expect("long enough");
    region
}

fn state() -> NestedState {
    NestedState {
        flags: 1,
        vmxon: 0x1000,
        vmcs: 0x2000,
        data: region("kvm", &[]),
        ..NestedState::default()
    }
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn a_file_is_identified_and_shown() {
    assert_eq!(vmcs::layouts().len(), Layout::built_in().len());
    let file = region("bochs", &[]);
    let found = vmcs::identify(&file).expect("a region");
    assert_eq!((found.kind, found.shadow), ("region", false));
    assert_eq!(found.candidates[0].layout, "bochs");
    assert_eq!(found.revision.as_deref(), Some("0x0000002b"));
    let found = vmcs::identify(&state().to_bytes()).expect("a state");
    assert_eq!(found.kind, "nested state");
    let shown = vmcs::show(&file, None).expect("a VMCS");
    assert_eq!(shown.layout.as_deref(), Some("bochs"));
    assert_eq!(shown.fields["guest_rip"], "0xffffffff81000000");
    let shown = vmcs::show(&region("acrn", &[]), Some("acrn")).expect("a VMCS");
    assert_eq!(
        shown.aliases["vmx_preemption_timer_value"],
        "host_ia32_sysenter_cs"
    );
    for (bytes, layout, words) in [
        (&b""[..], None, "empty"),
        (&[7; 5000], None, "neither"),
        (&file, Some("nothing"), "no layout nothing"),
        (&file, Some("kvm"), "not of layout kvm"),
        (&file, Some("kind,name\n"), "line 1"),
    ] {
        let error = vmcs::show(bytes, layout).expect_err(words);
        assert!(error.contains(words), "{error}");
    }
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn checks_that_fail_are_named() {
    let bad = region("kvm", &[(Field::GUEST_RFLAGS, 0)]);
    for profile in ["kvm", "max"] {
        let lint = vmcs::lint(&bad, profile, None).expect("a VMCS");
        assert!(lint.checks > 200);
        let says = |row: &vmcs::Failed| row.says.contains("GUEST_RFLAGS=0x0");
        assert!(lint.failed.iter().any(says), "{lint:?}");
    }
    assert!(vmcs::lint(&bad, "other", None).is_err());
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn a_translation_reports_and_refuses_losses() {
    let full = region("hypernest", &[(Field::PML_ADDRESS, 0x7000)]);
    let error = vmcs::translate(&full, None, "kvm-3.10", false).expect_err("a loss");
    assert_eq!(error, "kvm-3.10 has no place for pml_address 0x7000");
    let done = vmcs::translate(&full, None, "kvm-3.10", true).expect("allowed");
    assert_eq!(done.bytes, region("kvm-3.10", &[]));
    assert_eq!(done.fields["guest_rip"], "copied");
    assert_eq!(done.lost["pml_address"], "0x7000");
    // A layout of one's own, and a nested state.
    let table = vmcs::layout_table("kvm").expect("built in");
    let table = table
        .replace("layout,kvm,", "layout,mine,")
        .replace("0x11e57ed0", "0x77");
    let done = vmcs::translate(&state().to_bytes(), None, &table, false).expect("all held");
    assert_eq!((done.to.as_str(), done.bytes.len()), ("mine", 4224));
    assert_eq!(done.bytes[128..132], [0x77, 0, 0, 0]);
    let differ = vmcs::diff(&full, &region("kvm", &[]), None, None).expect("both");
    let expected = [Some("0x7000".to_owned()), Some("0x0".to_owned())];
    assert_eq!(differ.fields["pml_address"], expected);
    assert_eq!(differ.fields.len(), 1);
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn nested_states_are_extracted() {
    let bytes = stream::stream(&[None, Some(state())]);
    let found = vmcs::extract(&bytes).expect("whole");
    assert_eq!((found.len(), found[0].cpu), (1, Some(1)));
    assert_eq!(found[0].bytes, state().to_bytes());
    let error = vmcs::extract(&bytes[..bytes.len() - 100]).expect_err("cut");
    assert!(error.contains("the stream ends"), "{error}");
}

#[cfg(target_arch = "wasm32")]
#[wasm_bindgen_test]
fn javascript_gets_objects_and_bytes() {
    use hypernest_wasm::{
        vmcs_diff, vmcs_extract, vmcs_identify, vmcs_layouts, vmcs_lint, vmcs_show, vmcs_translate,
    };
    use js_sys::{Array, Reflect, Uint8Array};
    use wasm_bindgen::{JsCast, JsValue};

    let get = |object: &JsValue, path: &str| {
        path.split('.').fold(object.clone(), |object, key| {
            Reflect::get(&object, &key.into()).expect("an object")
        })
    };
    let full = region("hypernest", &[(Field::PML_ADDRESS, 0x7000)]);
    let layouts: JsValue = vmcs_layouts().expect("layouts").into();
    assert_eq!(
        layouts.unchecked_ref::<Array>().length() as usize,
        Layout::built_in().len()
    );
    let found = vmcs_identify(&full).expect("a region").into();
    assert_eq!(get(&found, "candidates.0.layout"), "hypernest");
    let shown = vmcs_show(&full, None).expect("a VMCS").into();
    assert_eq!(get(&shown, "fields.pml_address"), "0x7000");
    assert_eq!(get(&shown, "launched"), false);
    let log = b"*** Guest State ***\nRIP = 0x0000000000000012\n*** Host State ***\n*** Control State ***\n";
    let shown = vmcs_show(log, None).expect("a log").into();
    assert!(get(&shown, "layout").is_null());
    assert_eq!(get(&shown, "fields.guest_rip"), "0x12");
    let lint = vmcs_lint(&full, "max", None).expect("a VMCS").into();
    assert!(get(&lint, "checks").as_f64() > Some(200.0));
    let error = vmcs_translate(&full, None, "kvm-3.10", false).err();
    assert_eq!(
        error.as_deref(),
        Some("kvm-3.10 has no place for pml_address 0x7000")
    );
    let done = vmcs_translate(&full, None, "kvm-3.10", true)
        .expect("allowed")
        .into();
    let bytes: Uint8Array = get(&done, "bytes").dyn_into().expect("bytes");
    assert_eq!(bytes.to_vec(), region("kvm-3.10", &[]));
    assert_eq!(get(&done, "lost.pml_address"), "0x7000");
    let differ = vmcs_diff(&full, log, None, None).expect("both").into();
    assert!(get(&differ, "fields.pml_address.1").is_null());
    let found = vmcs_extract(&stream::stream(&[Some(state())]))
        .expect("whole")
        .into();
    assert_eq!(get(&found, "0.cpu"), 0);
    let bytes: Uint8Array = get(&found, "0.bytes").dyn_into().expect("bytes");
    assert_eq!(bytes.to_vec(), state().to_bytes());
}
