//! Files and layouts that `hypernest vmcs` must refuse: a line that says where, status 2, nothing written.

mod common;

use std::fs;

use common::{Dir, hypernest};
use hypernest_vmcs::{Field, Layout, NestedState, Vmcs};

/// A VMCS that any layout holds.
fn region(layout: &str) -> Vec<u8> {
    let mut vmcs = Vmcs::new();
    for (field, value) in [
        (Field::GUEST_RIP, 0xFFFF_FFFF_8100_0000),
        (Field::PIN_BASED_VM_EXEC_CONTROL, 0x16),
        (Field::CPU_BASED_VM_EXEC_CONTROL, 0x0401_E172),
        (Field::VM_EXIT_CONTROLS, 0x3_6FFF),
        (Field::VM_ENTRY_CONTROLS, 0x13FF),
        (Field::VMCS_LINK_POINTER, u64::MAX),
    ] {
        vmcs.set(field, value);
    }
    let mut region = vec![0; 4096];
    Layout::named(layout)
        .unwrap()
        .write(&vmcs, &mut region)
        .unwrap();
    region
}

/// Nothing but a line with all of `words`, and no file `out`.
fn refused(dir: &Dir, args: &[&str], words: &[&str]) {
    let output = hypernest(&[&["vmcs"], args].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(output.stdout.is_empty(), "{args:?}");
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in: {stderr}");
    }
    assert!(fs::metadata(dir.path("out")).is_err(), "{args:?}");
    assert!(fs::metadata(dir.path("out.part")).is_err(), "{args:?}");
}

const HEAD: &str =
    "kind,name,offset,width_bytes,value\nlayout,mine,,4096,\nheader,revision_id,0,4,0x1234\n";

#[test]
fn a_layout_that_makes_no_sense_is_refused_with_its_line() {
    let dir = Dir::new("vmcs-bad-layouts");
    let file = dir.file("region", &region("kvm"));
    let out = dir.path("out");
    for (rows, words) in [
        // Overlapping.
        (
            "field,guest_rip,16,8,\nfield,guest_rsp,20,8,\n",
            &["line 5", "share the byte at offset 20"][..],
        ),
        (
            "header,launch_state,16,4,\nfield,guest_rip,12,8,\n",
            &["line 5", "share the byte at offset 16"],
        ),
        // In the header, outside, not whole.
        (
            "field,guest_rip,4,8,\n",
            &["line 4", "8 bytes at offset 4 are not in the region"],
        ),
        (
            "field,guest_rip,4092,8,\n",
            &["line 4", "8 bytes at offset 4092"],
        ),
        ("field,guest_rip,16.5,8,\n", &["line 4", "\"16.5\""]),
        ("field,guest_rip,16,0,\n", &["line 4", "is 0 bytes wide"]),
        ("field,guest_rip,16,9,\n", &["line 4", "is 9 bytes wide"]),
        // Twice.
        (
            "field,guest_rip,16,8,\nfield,guest_rsp,24,8,\nfield,guest_rip,32,8,\n",
            &["line 6", "two slots"],
        ),
        // Unknown.
        (
            "field,guest_rip,16,8,\nfield,guest_lunch,24,8,\n",
            &["line 5", "no VMCS field is called \"guest_lunch\""],
        ),
        (
            "slot,guest_rip,16,8,\n",
            &["line 4", "unknown kind \"slot\""],
        ),
        // Cut.
        ("field,guest_rip,16\n", &["line 4", "ends before column"]),
        ("field,guest_rip,,8,\n", &["line 4", "\"\" is not a number"]),
        (
            "header,revision_id,0,4,0x80000001\n",
            &["line 4", "0x80000001 has bit 31 set"],
        ),
        (
            "header,launch_state,8,4,1 2 3 4\n",
            &["line 4", "clear launched [mask]"],
        ),
    ] {
        let layout = dir.file("mine.csv", (HEAD.to_owned() + rows).as_bytes());
        let words = [&["mine.csv"], words].concat();
        for args in [
            &["translate", &file, "--to", &layout, "-o", &out][..],
            &[
                "translate",
                &file,
                "--from",
                &layout,
                "--to",
                "kvm",
                "-o",
                &out,
            ],
            &["show", &file, "--layout", &layout],
            &["identify", &file, "--layout", &layout],
            &["lint", &file, "--layout", &layout],
            &["layouts", &layout],
        ] {
            refused(&dir, args, &words);
        }
    }
    let noise = dir.file("noise.csv", &[0xFF; 100]);
    refused(&dir, &["layouts", &noise], &["noise.csv", "utf-8"]);
}

#[test]
fn a_table_cut_anywhere_is_a_layout_or_refused_with_its_line() {
    let dir = Dir::new("vmcs-cut-layouts");
    let table =
        format!("{HEAD}header,launch_state,8,4,0 1\nfield,guest_cs_ar_bytes,24,4,rotated\n");
    let mut taken = 0;
    for len in 0..table.len() {
        let cut = dir.file("cut.csv", &table.as_bytes()[..len]);
        let output = hypernest(&["vmcs", "layouts", &cut]);
        if output.status.code() == Some(0) {
            taken += 1;
            assert!(len > HEAD.find("layout").unwrap());
        } else {
            refused(&dir, &["layouts", &cut], &["cut.csv", "line "]);
        }
    }
    assert!(taken > 3 && taken < 80, "{taken}");
}

#[test]
fn a_revision_that_nobody_knows_needs_a_hint() {
    let dir = Dir::new("vmcs-revisions");
    let out = dir.path("out");
    // Values that fit nothing well.
    let mut strange: Vec<u8> = (0..4096u32).map(|at| ((at * 37) >> 3) as u8).collect();
    strange[..4].copy_from_slice(&0x0BAD_CAFE_u32.to_le_bytes());
    let file = dir.file("strange", &strange);
    let words = ["strange", "0x0badcafe", "--layout"];
    for args in [
        &["show", &file][..],
        &["lint", &file],
        &["translate", &file, "--to", "kvm", "-o", &out],
        &[
            "translate",
            &file,
            "--to",
            "kvm",
            "--allow-loss",
            "-o",
            &out,
        ],
        &["diff", &file, &file],
    ] {
        refused(&dir, args, &words);
    }
    // A hint that does not fit.
    let words = ["not of layout kvm", "revision 0x0badcafe", "0x11e57ed0"];
    refused(&dir, &["show", &file, "--layout", "kvm"], &words);
    let words = ["strange: kvm to bochs", "revision 0x0badcafe", "0x11e57ed0"];
    refused(
        &dir,
        &[
            "translate",
            &file,
            "--from",
            "kvm",
            "--to",
            "bochs",
            "-o",
            &out,
        ],
        &words,
    );
    // In a nested state.
    let state = NestedState {
        vmxon: 0x1000,
        vmcs: 0x2000,
        data: strange,
        ..NestedState::default()
    };
    let file = dir.file("state", &state.to_bytes());
    refused(&dir, &["show", &file], &["0x0badcafe", "--layout"]);
}

#[test]
fn a_region_or_state_that_is_cut_is_refused() {
    let dir = Dir::new("vmcs-cut");
    let out = dir.path("out");
    let region = region("kvm");
    for len in [1, 3, 4, 8, 11, 100, 997] {
        let file = dir.file("region", &region[..len]);
        let words = [&format!("a region of {len} bytes"), "needs 998"];
        refused(&dir, &["show", &file, "--layout", "kvm"], &words);
        refused(
            &dir,
            &[
                "translate",
                &file,
                "--from",
                "kvm",
                "--to",
                "hypernest",
                "-o",
                &out,
            ],
            &["region"],
        );
    }
    let state = NestedState {
        vmxon: 0x1000,
        vmcs: 0x2000,
        data: region,
        ..NestedState::default()
    };
    let bytes = state.to_bytes();
    // Its size says that there is more.
    for len in [7, 127, 128, 129, 1000, 4223] {
        let file = dir.file("state", &bytes[..len]);
        refused(
            &dir,
            &["translate", &file, "--to", "hypernest", "-o", &out],
            &["state"],
        );
    }
    // A header alone, and an image that is too short.
    let mut short = state.clone();
    short.data.truncate(500);
    let file = dir.file("state", &short.to_bytes());
    refused(
        &dir,
        &[
            "translate",
            &file,
            "--from",
            "kvm",
            "--to",
            "bochs",
            "-o",
            &out,
        ],
        &["500 bytes", "998"],
    );
    short.data.clear();
    let file = dir.file("state", &short.to_bytes());
    refused(&dir, &["show", &file], &["without a VMCS image"]);
}

const LOG: &str = "\
[ 1.5] kvm_intel: VMCS 000000004, last attempted VM-entry on CPU 3
[ 1.5] kvm_intel: *** Guest State ***
[ 1.5] kvm_intel: CR0: actual=0x0000000080010031, shadow=0x0000000060000010, gh_mask=fffffffffffffff7
[ 1.5] kvm_intel: RSP = 0xffff82d08030f8b0  RIP = 0x0000000000007c00
[ 1.5] kvm_intel: *** Host State ***
[ 1.5] kvm_intel: CS=0010 SS=0018 DS=0000 ES=0000 FS=0000 GS=0000 TR=0040
[ 1.5] kvm_intel: *** Control State ***
[ 1.5] kvm_intel: VMEntry: intr_info=80000044 errcode=00000000 ilen=00000000
";

#[test]
fn a_log_cut_anywhere_is_a_dump_or_refused_with_its_line() {
    let dir = Dir::new("vmcs-cut-logs");
    let out = dir.path("out");
    let mut taken = 0;
    for len in (LOG.find("*** Guest").unwrap()..LOG.len()).step_by(3) {
        let cut = &LOG[..len];
        let file = dir.file("log", cut.as_bytes());
        let args = ["translate", &file, "--to", "hypernest", "-o", &out];
        let output = hypernest(&[&["vmcs"], &args[..]].concat());
        if output.status.code() == Some(0) {
            taken += 1;
            assert!(cut.contains("*** Control State ***"), "{cut}");
            fs::remove_file(&out).unwrap();
        } else if cut.contains("*** Guest State ***") {
            let line = format!("line {}", cut.lines().count());
            refused(&dir, &args, &["log", &line]);
        } else {
            refused(&dir, &args, &["log"]);
        }
    }
    assert!(taken > 0, "{taken}");
    let long = LOG.replace("RIP = 0x0000000000007c00", "RIP = 0x00000000000007c00");
    let file = dir.file("log", long.as_bytes());
    refused(
        &dir,
        &["show", &file],
        &["line 4", "RIP", "16 hexadecimal digits"],
    );
}
