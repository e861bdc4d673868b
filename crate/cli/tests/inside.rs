//! Looking inside a run with VMX: the report's exits, `--exits`, `--trace`, `--break-on`, `--walk`
//! and symbols of both levels, on a hypervisor of a few instructions.

mod common;
#[path = "../../../tests/guests/hypervisor.rs"]
mod hypervisor;
mod perfetto;

use std::fs;

use common::{Dir, hypernest};
use hypernest_vmcs::Field;
use hypervisor::{EXITS, L2_BASE, L2_CODE, L2_MISSING, Options};
use serde_json::Value;

/// The directory and the options that every run needs.
struct Guest {
    dir: Dir,
    image: String,
}

impl Guest {
    fn new(name: &str, options: &Options) -> Guest {
        let dir = Dir::new(name);
        let image = dir.file("l1", &hypervisor::image(options));
        Guest { dir, image }
    }

    /// Runs to the end with further options; exit status and stderr.
    fn run(&self, options: &[&str]) -> (i32, String) {
        let mut args = vec!["run", &self.image, "--memory", "8M", "--vmx", "max"];
        args.extend(options);
        let output = hypernest(&args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), stderr)
    }
}

fn has(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

fn bad_rflags() -> Options {
    Options {
        spoil: vec![(Field::GUEST_RFLAGS, 0)],
        ..Options::default()
    }
}

#[test]
fn the_report_has_exits_by_reason_with_what_l1_executed() {
    let guest = Guest::new("report", &Options::default());
    let json = guest.dir.path("report.json");
    let (status, text) = guest.run(&["--report", "--report-json", &json]);
    assert_eq!(status, 0, "{text}");
    has(
        &text,
        &["VM entries    8, and 0 that failed", "VM exits      8\n"],
    );
    let row = |name: &str| -> Vec<String> {
        let line = text.lines().find(|line| line.contains(name)).unwrap();
        line.split_whitespace().map(str::to_owned).collect()
    };
    assert_eq!(
        row("CPUID"),
        ["L2", "CPUID", "3", "37.5", "%", "16", "16", "16"]
    );
    assert_eq!(row("VMCALL")[5..], ["-", "-", "-"]);
    let json: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let vmx = &json["vmx"];
    assert_eq!((&vmx["entries"], &vmx["exits"]), (&8.into(), &8.into()));
    let cpuid = &vmx["by_reason"][0];
    assert_eq!(cpuid["name"], "CPUID");
    assert_eq!(cpuid["share"], 0.375);
    assert_eq!(cpuid["l1_instructions"]["median"], 16);
}

#[test]
fn a_run_without_vmx_has_no_exits_in_its_report() {
    let dir = Dir::new("none");
    let image = dir.file("k", &common::kernel(&common::SLEEP));
    let json = dir.path("report.json");
    let output = hypernest(&["run", &image, "--report", "--report-json", &json]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!text.contains("VM exits"), "{text}");
    let json: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(json.get("vmx"), None);
}

#[test]
fn exits_are_lines_of_json_in_order_with_names_of_l2() {
    let guest = Guest::new("exits", &Options::default());
    let file = guest.dir.path("exits.jsonl");
    let symbols = guest.dir.file("l2", &hypervisor::l2_symbols());
    let (status, text) = guest.run(&["--exits", &file, "--symbols-l2", &symbols]);
    assert_eq!((status, &text[..]), (0, ""));
    let lines = fs::read_to_string(&file).unwrap();
    let lines: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let names: Vec<&str> = lines
        .iter()
        .map(|line| line["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, EXITS.map(|reason| reason.ident()));
    let numbers = lines.iter().map(|line| line["number"].as_u64().unwrap());
    assert!(numbers.eq(1..=8));
    let first = &lines[0];
    assert_eq!(first["event"], "exit");
    assert_eq!(first["rip"], format!("{:#x}", L2_BASE + L2_CODE + 5));
    assert_eq!(first["symbol"], "guest+0x5");
    assert_eq!(first["instruction_length"], "0x2");
    assert_eq!(first["guest_instructions"], "2");
    assert_eq!(lines[4]["qualification"], "0x600048");
    let miss = &lines[6];
    assert_eq!(miss["guest_physical"], format!("{:#x}", L2_MISSING + 8));
    assert_eq!(
        miss["guest_linear"],
        format!("{:#x}", L2_BASE + L2_MISSING + 8)
    );
}

#[test]
fn an_entry_that_fails_is_named_in_exits_and_report() {
    let guest = Guest::new("failed", &bad_rflags());
    let file = guest.dir.path("exits.jsonl");
    let (status, text) = guest.run(&["--exits", &file, "--report"]);
    // The guest says so by the debug-exit port.
    assert_eq!(status, 7, "{text}");
    has(
        &text,
        &[
            "VM entries    0, and 1 that failed",
            "L1 ENTRY_FAILURE_GUEST_STATE",
            "failed entry  at tick ",
            "SDM Vol. 3C, \"Checks on Guest RIP, RFLAGS, and SSP\"",
            "GUEST_RFLAGS=0x0",
        ],
    );
    let line: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(line["event"], "entry-failed");
    assert!(line["check"].as_str().unwrap().starts_with('G'));
    assert_eq!(line["symbol"], "start+0x76", "the image's own symbols");
}

#[test]
fn a_run_breaks_at_a_failed_entry_and_says_which_check() {
    let guest = Guest::new("entryfail", &bad_rflags());
    let (status, text) = guest.run(&["--break-on", "entry-fail"]);
    assert_eq!(status, 4, "{text}");
    has(
        &text,
        &[
            "a VM entry failed on processor 0",
            "which executes L1",
            "the last VM entry that failed:\n  G",
            "GUEST_RFLAGS=0x0",
            "VMCS at 0x181000, clear:",
            "33 ENTRY_FAILURE_GUEST_STATE, the VM entry failed",
            "vmlaunch",
        ],
    );
    // One that does not fail does not break.
    let guest = Guest::new("entrygood", &Options::default());
    assert_eq!(guest.run(&["--break-on", "entry-fail"]).0, 0);
}

#[test]
fn a_run_breaks_at_an_exit_by_reason_or_number_and_shows_the_vmcs() {
    let guest = Guest::new("exit", &Options::default());
    let symbols = guest.dir.file("l2", &hypervisor::l2_symbols());
    let by_reason = guest.run(&["--break-on", "exit:ept-violation", "--symbols-l2", &symbols]);
    assert_eq!(by_reason.0, 4, "{}", by_reason.1);
    has(
        &by_reason.1,
        &[
            "VM exit 7, EPT_VIOLATION, on processor 0",
            "page walk of the next instruction, 0x101000 (handler):",
            "VMCS at 0x181000, launched:",
            "last exit  48 EPT_VIOLATION, qualification 0x582",
            "guest_physical_address 0x10008",
            "guest      RIP 0x40008",
            "(guest+0x",
            "secondary  0x00000022",
            "Enable EPT, Enable VPID",
            "page walk of the address that the last exit reports, 0x40010008 (interrupt+0x7008):",
            "EPT PTE   at 0x0000193080: 0x0000000000210030 not present\n",
            "page walk of L2's next instruction, 0x40008",
            "    EPT PML4E at 0x0000190000: 0x0000000000191007 R W X\n",
            "  guest-physical address 0x8",
            "last 64 instructions:",
        ],
    );
    // L2's instructions before the exit have L2's names, L1's have L1's.
    has(&by_reason.1, &["  guest", "  handler", "hlt"]);
    let by_number = guest.run(&["--break-on", "exit:7", "--symbols-l2", &symbols]);
    assert_eq!(by_number, by_reason);
    assert_eq!(guest.run(&["--break-on", "exit:9"]).0, 0);
    assert_eq!(guest.run(&["--break-on", "exit:MWAIT"]).0, 0);
}

#[test]
fn the_vmcs_is_dumped_at_exits_and_the_run_goes_on() {
    let guest = Guest::new("dump", &Options::default());
    let hash = |options: &[&str]| {
        let json = guest.dir.path("report.json");
        let (status, text) = guest.run(&[options, &["--report-json", &json]].concat());
        assert_eq!(status, 0, "{text}");
        let report: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
        (report["state_hash"].to_string(), text)
    };
    let (plain, _) = hash(&[]);
    let to = guest.dir.path("dumps");
    let at = [
        "--dump-vmcs-at",
        "exit:ept-violation",
        "--dump-vmcs-at",
        "3",
    ];
    let (dumped, text) = hash(&[&at[..], &["--dump-vmcs-at", "2", "--dump-vmcs-to", &to]].concat());
    assert_eq!(dumped, plain);
    // In the order of the exits, each once.
    let heads: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("VMCS at 0x181000 after VM exit "))
        .map(|rest| rest.split(" of processor 0 at tick").next().unwrap())
        .collect();
    assert_eq!(heads[0].split(',').next(), Some("2"));
    assert_eq!(heads[1].split(',').next(), Some("3"));
    assert_eq!(heads[2..], ["7, EPT_VIOLATION,"]);
    has(
        &text,
        &[
            "0x2400 guest_physical_address",
            "0x10008",
            "EPT violation",
            "Enable EPT, Enable VPID",
        ],
    );
    let file = format!("{to}/exit-7.vmcs");
    let shown = hypernest(&["vmcs", "show", &file, "--json"]);
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["layout"], "hypernest");
    assert_eq!(shown["launched"], true);
    assert_eq!(shown["fields"]["vm_exit_reason"], "0x30");
    assert_eq!(shown["fields"]["guest_rip"], "0x4000801f");
    let lint = hypernest(&["vmcs", "lint", &file]);
    assert_eq!(
        lint.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&lint.stdout)
    );
    let diff = hypernest(&["vmcs", "diff", &format!("{to}/exit-2.vmcs"), &file]);
    assert_eq!(diff.status.code(), Some(1));
    assert_eq!(fs::read_dir(&to).unwrap().count(), 3);
}

#[test]
fn an_exit_that_does_not_come_is_named_and_one_may_also_break() {
    let guest = Guest::new("nodump", &Options::default());
    let (status, text) = guest.run(&["--dump-vmcs-at", "exit:MWAIT", "--dump-vmcs-at", "9"]);
    assert_eq!(status, 0);
    has(&text, &["no VM exit for MWAIT", "no VM exit 9"]);
    let (status, text) = guest.run(&["--dump-vmcs-at", "3", "--break-on", "exit:3"]);
    assert_eq!(status, 4);
    has(&text, &["after VM exit 3", "VM exit 3, "]);
    let (status, text) = guest.run(&["--dump-vmcs-at", "5", "--break-on", "exit:3"]);
    assert_eq!(status, 4);
    has(&text, &["no VM exit 5"]);
    let (status, text) = guest.run(&["--break-on", "exit:7", "--break-on", "exit:3"]);
    assert_eq!(status, 4);
    has(&text, &["VM exit 3, "]);
}

#[test]
fn a_walk_is_printed_at_the_end_at_either_level() {
    let guest = Guest::new("walk", &Options::default());
    let l2 = format!("L2:{:#x}", L2_BASE + L2_MISSING);
    let (status, text) = guest.run(&["--walk", &l2, "--walk", "L1:0x123456"]);
    assert_eq!(status, 0, "{text}");
    has(
        &text,
        &[
            "page walk of L2 0x40010000 on processor 0:\n    EPT PML4E at ",
            "  PTE   at 0x0000004080: 0x0000000000010063",
            "  guest-physical address 0x10000\n  physical address 0x210000\n",
            "page walk of L1 0x123456 (handler+0x22456) on processor 0:\n  PML4E at ",
            "  physical address 0x123456\n",
        ],
    );
    let dir = Dir::new("nowalk");
    let image = dir.file("k", &common::kernel(&common::SLEEP));
    let output = hypernest(&["run", &image, "--walk", "L2:0"]);
    has(
        &String::from_utf8(output.stderr).unwrap(),
        &["there is no current VMCS"],
    );
}

#[test]
fn the_trace_has_a_track_for_each_level_with_what_happened() {
    let options = Options {
        inject: true,
        ..Options::default()
    };
    let guest = Guest::new("trace", &options);
    let file = guest.dir.path("trace.pftrace");
    let symbols = guest.dir.file("l2", &hypervisor::l2_symbols());
    let (status, text) = guest.run(&["--trace", &file, "--symbols-l2", &symbols]);
    assert_eq!(status, 0, "{text}");
    let trace = perfetto::read(&fs::read(&file).unwrap());
    let names: Vec<&str> = trace.tracks.iter().map(|track| &track.name[..]).collect();
    assert_eq!(names, ["vCPU 0", "L0", "L1", "L2"]);
    let l1: Vec<&str> = trace.slices("L1").map(|slice| &slice.name[..]).collect();
    let mut expected = vec!["before the first VM entry"];
    expected.extend(EXITS.map(|reason| reason.ident()));
    assert_eq!(l1, expected);
    let l2: Vec<_> = trace.slices("L2").collect();
    assert_eq!(l2.len(), 8);
    assert!(l2.iter().all(|slice| slice.name == "guest"));
    assert_eq!(l2[0].detail("exit"), "CPUID");
    assert_eq!(l2[0].detail("left_at"), "0x40008005 (guest+0x5)");
    // One level executes at a time.
    let mut times: Vec<(u64, u64)> = trace
        .slices("L1")
        .chain(trace.slices("L2"))
        .map(|slice| (slice.from, slice.to))
        .collect();
    times.sort_unstable();
    assert!(
        times.windows(2).all(|two| two[0].1 <= two[1].0),
        "{times:?}"
    );
    let l0 = trace.instants("L0");
    for name in ["VM entry", "VM exit HLT", "EPT violation", "event injected"] {
        assert!(l0.contains(&name), "{name} is not in {l0:?}");
    }
}

#[test]
fn looking_changes_nothing() {
    let guest = Guest::new("same", &Options::default());
    let json = guest.dir.path("report.json");
    let hash = |options: &[&str]| {
        let mut all = vec!["--report-json", &json];
        all.extend(options);
        let (status, text) = guest.run(&all);
        assert_eq!(status, 0, "{text}");
        let json: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
        json["state_hash"].as_str().unwrap().to_owned()
    };
    let (exits, trace) = (guest.dir.path("e"), guest.dir.path("t"));
    let looked = hash(&["--exits", &exits, "--trace", &trace, "--walk", "L2:0"]);
    assert_eq!(hash(&[]), looked);
}
