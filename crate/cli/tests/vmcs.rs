//! `hypernest vmcs`: files in, facts out; bad input is one line and status 2, and nothing is written.

mod common;

use std::fs;
use std::process::Output;

use common::{Dir, hypernest};
use hypernest_vmcs::{Field, Layout, NestedState, Vmcs};
use serde_json::Value;

/// A VMCS that any layout holds.
fn vmcs() -> Vmcs {
    let mut vmcs = Vmcs::new();
    for (field, value) in [
        (Field::GUEST_RIP, 0xFFFF_FFFF_8100_0000),
        (Field::GUEST_RFLAGS, 2),
        (Field::GUEST_CR0, 0x8005_0033),
        (Field::GUEST_CR4, 0x2020),
        (Field::GUEST_CS_AR_BYTES, 0xA09B),
        (Field::GUEST_TR_AR_BYTES, 0x8B),
        (Field::HOST_RIP, 0xFFFF_FFFF_8200_0000),
        (Field::HOST_CR0, 0x8005_0033),
        (Field::HOST_CR4, 0x2020),
        (Field::HOST_CS_SELECTOR, 0x10),
        (Field::HOST_TR_SELECTOR, 0x40),
        (Field::PIN_BASED_VM_EXEC_CONTROL, 0x16),
        (Field::CPU_BASED_VM_EXEC_CONTROL, 0x0401_E172),
        (Field::VM_EXIT_CONTROLS, 0x3_6FFF),
        (Field::VM_ENTRY_CONTROLS, 0x13FF),
        (Field::VMCS_LINK_POINTER, u64::MAX),
        (Field::VM_EXIT_REASON, 10),
    ] {
        vmcs.set(field, value);
    }
    vmcs
}

fn region(layout: &str, vmcs: &Vmcs) -> Vec<u8> {
    let mut region = vec![0; 4096];
    Layout::named(layout)
        .unwrap()
        .write(vmcs, &mut region)
        .unwrap();
    region
}

fn run(args: &[&str]) -> Output {
    hypernest(&[&["vmcs"], args].concat())
}

fn good(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&good(args)).unwrap()
}

fn refused(args: &[&str], words: &[&str]) {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(output.stdout.is_empty());
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in: {stderr}");
    }
}

#[test]
fn a_region_is_identified_with_the_evidence() {
    let dir = Dir::new("vmcs-identify");
    for layout in Layout::built_in() {
        let file = dir.file("region", &region(layout.name(), &vmcs()));
        let found = json(&["identify", &file, "--json"]);
        let best = &found["candidates"][0];
        // KVM's of 4.0 is today's without its newest fields, which are 0 here.
        if layout.name() != "kvm-4.0" {
            assert_eq!(best["layout"], layout.name());
        }
        assert_eq!(best["broken"], Value::Array(vec![]));
    }
    let file = dir.file("region", &region("kvm-3.10", &vmcs()));
    let text = good(&["identify", &file]);
    assert!(text.contains("=> kvm-3.10"), "{text}");
    assert!(text.contains("against it: "), "{text}");
    let text = good(&["identify", &file, "--layout", "kvm"]);
    assert!(text.contains("kvm, as asked"), "{text}");
}

#[test]
fn fields_are_shown_by_name() {
    let dir = Dir::new("vmcs-show");
    let file = dir.file("region", &region("bochs", &vmcs()));
    let text = good(&["show", &file]);
    for words in [
        "layout bochs, clear",
        "guest_rip",
        "0xffffffff81000000",
        "CPUID",
        "guest_cs_ar_bytes                            0xa09b",
    ] {
        assert!(text.contains(words), "{words} is not in: {text}");
    }
    assert!(!text.contains("guest_rsp"));
    assert!(good(&["show", &file, "--all"]).contains("guest_rsp"));
    let shown = json(&["show", &file, "--json"]);
    assert_eq!(shown["layout"], "bochs");
    assert_eq!(shown["fields"]["guest_rip"], "0xffffffff81000000");
    assert_eq!(shown["fields"]["guest_rsp"], "0x0");
}

#[test]
fn fields_that_share_bytes_are_pointed_out() {
    let dir = Dir::new("vmcs-aliases");
    let file = dir.file("region", &region("acrn", &vmcs()));
    let note = "note: vmx_preemption_timer_value has no bytes of its own in layout acrn: they are read as \
                host_ia32_sysenter_cs\n";
    assert!(good(&["show", &file]).contains(note));
    assert!(good(&["identify", &file]).contains(note));
    let shown = json(&["show", &file, "--json"]);
    assert_eq!(
        shown["aliases"],
        serde_json::json!({"vmx_preemption_timer_value": "host_ia32_sysenter_cs"})
    );
    assert!(shown["fields"].get("vmx_preemption_timer_value").is_none());
    let file = dir.file("region", &region("xen", &vmcs()));
    let text = good(&["show", &file, "--layout", "xen"]);
    assert_eq!(text.matches("note: ").count(), 7, "{text}");
    let file = dir.file("region", &region("kvm", &vmcs()));
    assert!(!good(&["show", &file]).contains("note: "));
    let mut timer = vmcs();
    timer.set(Field::VMX_PREEMPTION_TIMER_VALUE, 0x99);
    let file = dir.file("region", &region("kvm", &timer));
    refused(
        &["translate", &file, "--to", "acrn", "-o", &dir.path("out")],
        &["acrn has no place for vmx_preemption_timer_value 0x99"],
    );
}

#[test]
fn nested_states_and_logs_are_read_too() {
    let dir = Dir::new("vmcs-kinds");
    let state = NestedState {
        vmxon: 0x1000,
        vmcs: 0x2000,
        data: region("kvm", &vmcs()),
        ..NestedState::default()
    };
    let file = dir.file("state", &state.to_bytes());
    assert_eq!(json(&["identify", &file, "--json"])["kind"], "nested state");
    assert_eq!(json(&["show", &file, "--json"])["layout"], "kvm");
    let log = "kvm_intel: *** Guest State ***\nkvm_intel: RSP = 0x0000000000000001  RIP = 0xffffffff81000000\n\
               kvm_intel: *** Host State ***\nkvm_intel: *** Control State ***\n";
    let log = dir.file("log", log.as_bytes());
    let shown = json(&["show", &log, "--json"]);
    assert_eq!(shown["fields"]["guest_rip"], "0xffffffff81000000");
    assert_eq!(shown["layout"], Value::Null);
    let out = dir.path("out");
    good(&["translate", &log, "--to", "kvm", "-o", &out]);
    let shown = json(&["show", &out, "--layout", "kvm", "--json"]);
    assert_eq!(shown["fields"]["guest_rsp"], "0x1");
    good(&["translate", &file, "--to", "hypernest", "-o", &out]);
    let new = NestedState::read(&fs::read(&out).unwrap()).unwrap();
    assert_eq!(new.image().unwrap(), region("hypernest", &vmcs()));
    assert_eq!(new.vmcs, 0x2000);
}

#[test]
fn what_fails_an_entry_is_named() {
    let dir = Dir::new("vmcs-lint");
    let mut bad = vmcs();
    bad.set(Field::GUEST_RFLAGS, 0);
    bad.set(Field::HOST_CS_SELECTOR, 3);
    let file = dir.file("region", &region("kvm", &bad));
    for profile in ["kvm", "max"] {
        let output = run(&["lint", &file, "--profile", profile]);
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("GUEST_RFLAGS=0x0"), "{text}");
        assert!(text.contains("HOST_CS_SELECTOR=0x3"), "{text}");
        assert!(text.contains("checks against profile"), "{text}");
    }
    let output = run(&["lint", &file, "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["failed"].as_array().unwrap().len() >= 2);
    refused(
        &["lint", &file, "--profile", "nothing"],
        &["no profile nothing"],
    );
}

#[test]
fn a_translation_refuses_to_lose_anything() {
    let dir = Dir::new("vmcs-translate");
    let mut full = vmcs();
    full.set(Field::PML_ADDRESS, 0x7000);
    let file = dir.file("region", &region("hypernest", &full));
    let out = dir.path("out");
    let args = ["translate", &file, "--to", "kvm-3.10", "-o", &out];
    refused(&args, &["kvm-3.10", "pml_address 0x7000", "--allow-loss"]);
    assert!(fs::metadata(&out).is_err());
    let text = good(&[&args[..], &["--allow-loss"]].concat());
    assert!(text.contains("lost: pml_address 0x7000"), "{text}");
    assert_eq!(fs::read(&out).unwrap(), region("kvm-3.10", &vmcs()));
    let report = json(&[&args[..], &["--allow-loss", "--json"]].concat());
    assert_eq!(report["fields"]["pml_address"]["lost"], "0x7000");
    assert_eq!(report["fields"]["guest_rip"], "copied");
    refused(
        &[
            "translate",
            &file,
            "--to",
            "kvm",
            "-o",
            &dir.path("no/where"),
        ],
        &["cannot write"],
    );
}

#[test]
fn files_are_compared_by_field() {
    let dir = Dir::new("vmcs-diff");
    let mut other = vmcs();
    other.set(Field::GUEST_RIP, 5);
    let one = dir.file("one", &region("kvm", &vmcs()));
    let same = dir.file("same", &region("bochs", &vmcs()));
    let two = dir.file("two", &region("hypernest-evmcs", &other));
    assert_eq!(good(&["diff", &one, &same]), "");
    let output = run(&["diff", &one, &two]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("guest_rip") && text.contains("0x5"));
    let output = run(&["diff", &one, &two, "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["fields"]["guest_rip"][1], "0x5");
}

#[test]
fn a_layout_of_ones_own_is_a_file() {
    let dir = Dir::new("vmcs-layouts");
    let list = good(&["layouts"]);
    for layout in Layout::built_in() {
        assert!(list.contains(layout.name()), "{list}");
    }
    let table = good(&["layouts", "kvm"]).replace("layout,kvm,", "layout,mine,");
    let table = dir.file("mine.csv", table.replace("0x11e57ed0", "0x1234").as_bytes());
    let file = dir.file("region", &region("kvm", &vmcs()));
    let out = dir.path("out");
    good(&["translate", &file, "--to", &table, "-o", &out]);
    assert_eq!(fs::read(&out).unwrap()[..4], [0x34, 0x12, 0, 0]);
    assert_eq!(
        json(&["show", &out, "--layout", &table, "--json"])["layout"],
        "mine"
    );
    let broken = dir.file("broken.csv", b"kind,name,offset,width_bytes\nfield,x,8,8\n");
    refused(
        &["show", &file, "--layout", &broken],
        &["broken.csv", "line 2", "no VMCS field is called"],
    );
    refused(
        &["show", &file, "--layout", "nowhere"],
        &["no layout nowhere", "kvm-3.10"],
    );
}

#[test]
fn bad_files_are_refused_in_a_line() {
    let dir = Dir::new("vmcs-bad");
    refused(&["show", &dir.path("nowhere")], &["nowhere"]);
    refused(&["show", &dir.path("")], &["directory"]);
    refused(&["show", &dir.file("empty", b"")], &["it is empty"]);
    refused(
        &["show", &dir.file("short", &[0xD0, 0x7E, 0xE5, 0x11])],
        &["4 bytes"],
    );
    refused(
        &["show", &dir.file("long", &[7; 5000])],
        &["5000 bytes", "neither"],
    );
    refused(
        &["identify", &dir.file("text", b"hello, world\n")],
        &["of no known layout"],
    );
    refused(
        &["show", &dir.file("cut", b"*** Guest State ***\nRIP = 0x12")],
        &["line 2", "16 hexadecimal digits"],
    );
    // Random bytes of the right length fit no layout well.
    let mut seed = 1u32;
    let noise: Vec<u8> = (0..4096)
        .map(|_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        })
        .collect();
    let noise = dir.file("noise", &noise);
    refused(&["show", &noise], &["name one with --layout"]);
    refused(&["diff", &noise, &noise], &["name one with --layout"]);
}
