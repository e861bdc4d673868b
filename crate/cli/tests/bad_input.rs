//! Bad input: one clear line, exit status 2, nothing run.

mod common;

use common::{Dir, SLEEP, hypernest};

fn kernel() -> Vec<u8> {
    common::kernel(&SLEEP)
}

/// Runs, and asserts one line on stderr that holds all of `words`, nothing on stdout, status 2.
fn refused(args: &[&str], words: &[&str]) {
    let output = hypernest(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    assert!(stderr.starts_with("hypernest: "), "{stderr}");
    assert!(output.stdout.is_empty());
    for word in words {
        assert!(
            stderr.contains(word),
            "{args:?}: {word:?} is not in: {stderr}"
        );
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let dir = Dir::new("files");
    let good = dir.file("kernel", &kernel());
    let missing = dir.path("nowhere");
    refused(&["run", &missing], &["image", &missing, "No such file"]);
    refused(&["run", &dir.path("")], &["image", "is a directory"]);
    refused(&["run", &good, "--initrd", &missing], &["initrd", &missing]);
    refused(
        &["run", &good, "--module", &dir.path("")],
        &["module", "is a directory"],
    );
    refused(&["run", &good, "--disk", &missing], &["disk", &missing]);
    refused(
        &["run", &good, "--disk", &dir.file("empty", b"")],
        &["disk", "empty"],
    );
    refused(
        &["run", &good, "--symbols", &missing],
        &["symbol", &missing],
    );
    refused(
        &["run", &good, "--symbols", &dir.file("text", b"text")],
        &["symbol", "ELF"],
    );
    refused(
        &["run", &good, "--symbols-l2", &missing],
        &["symbol", &missing],
    );
}

#[test]
fn files_that_are_no_kernel_are_named_for_what_they_are() {
    let dir = Dir::new("kinds");
    let of = |bytes: &[u8]| dir.file("image", bytes);
    refused(&["run", &of(b"")], &["an empty file"]);
    refused(&["run", &of(b"hello\n")], &["of no known kind"]);
    refused(&["run", &of(b"\x1f\x8b\x08\0\0\0\0\0\0\0")], &["gzip"]);
    refused(&["run", &of(b"\x7fELF")], &["ELF"]);
    let own = env!("CARGO_BIN_EXE_hypernest");
    refused(&["run", own], &["a program for an operating system"]);
    let mut linux = vec![0; 0x400];
    linux[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    linux[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    linux[0x211] = 1;
    refused(&["run", &of(&linux)], &["Linux", "cut short"]);
}

#[test]
fn every_truncation_of_a_kernel_is_refused_in_one_line() {
    let dir = Dir::new("truncated");
    let whole = kernel();
    for end in (0..whole.len()).step_by(7) {
        refused(&["run", &dir.file("image", &whole[..end])], &[]);
    }
}

#[test]
fn initrd_larger_than_memory_is_refused() {
    let dir = Dir::new("initrd");
    let kernel = dir.file("kernel", &kernel());
    let initrd = dir.file("initrd", &vec![0; 3 << 20]);
    refused(
        &["run", &kernel, "--memory", "2M", "--initrd", &initrd],
        &["initrd", "3145728 bytes", "more memory"],
    );
}

#[test]
fn absurd_sizes_and_unknown_names_say_what_is_possible() {
    let dir = Dir::new("sizes");
    let kernel = dir.file("kernel", &kernel());
    for memory in ["0", "0M", "1K", "100G", "9999999999999G", "-5", "big"] {
        let option = format!("--memory={memory}");
        refused(&["run", &kernel, &option], &["--memory", "give"]);
    }
    refused(&["run", &kernel, "--cpus", "0"], &["vCPUs", "1 to"]);
    refused(&["run", &kernel, "--cpus", "100000"], &["vCPUs", "1 to"]);
    refused(
        &["run", &kernel, "--cpu", "i386"],
        &["\"i386\"", "choose one of"],
    );
    refused(
        &["run", &kernel, "--vmx", "svm"],
        &["--vmx", "none, kvm, max or a file", "svm", "No such file"],
    );
    refused(
        &["run", &kernel, "--serial", "tcp"],
        &["--serial", "stdio, file:F or none"],
    );
    refused(&["run", &kernel, "--timeout", "0"], &["--timeout"]);
    refused(
        &["run", &kernel, "--block-length", "0"],
        &["--block-length"],
    );
    refused(
        &["run", &kernel, "--frobnicate"],
        &["--frobnicate", "--help"],
    );
    let list = ["--break-on", "CPUID", "EPT_VIOLATION", "XRSTORS"];
    refused(&["run", &kernel, "--break-on", "exit:LUNCH"], &list);
    refused(
        &["run", &kernel, "--break-on", "exit:0"],
        &["--break-on", "from 1"],
    );
    refused(
        &["run", &kernel, "--dump-vmcs-at", "exit:LUNCH"],
        &["--dump-vmcs-at", "CPUID", "XRSTORS"],
    );
    refused(
        &["run", &kernel, "--dump-vmcs-to", "folder"],
        &["--dump-vmcs-at"],
    );
    refused(
        &[
            "run",
            &kernel,
            "--dump-vmcs-at",
            "1",
            "--dump-vmcs-to",
            &kernel,
        ],
        &["cannot write VMCS dumps", "give a folder"],
    );
    refused(
        &["run", &kernel, "--break-on", "breakfast"],
        &["entry-fail, exit:REASON, exit:N, triple-fault"],
    );
    refused(
        &["run", &kernel, "--walk", "L3:0x1000"],
        &["--walk", "L1:ADDR or L2:ADDR"],
    );
    for address in ["0.0.0.0:1234", "192.0.2.1:1234", "[::]:1234"] {
        refused(
            &["run", &kernel, "--gdb", address],
            &["--gdb", address, "loopback"],
        );
    }
    refused(&["run", &kernel, "--gdb", "nowhere"], &["--gdb", "port"]);
    refused(&["run"], &["IMAGE"]);
    refused(&["walk"], &["walk"]);
}

#[test]
fn vmx_profiles_that_cannot_be_are_refused_with_what_is_wrong() {
    let dir = Dir::new("vmx");
    let kernel = dir.file("kernel", &kernel());
    let refused = |profile: &[u8], words: &[&str]| {
        let file = dir.file("profile", profile);
        refused(
            &["run", &kernel, "--vmx", &file],
            &[&[file.as_str()], words].concat(),
        );
    };
    refused(b"", &["IA32_VMX_BASIC (0x480) is not in the dump"]);
    refused(b"\xff\xfe\0\0", &["line 1"]);
    let good = common::vmx_profile();
    refused(
        good.replace("IA32_VMX_MISC ", "IA32_MISC ").as_bytes(),
        &["IA32_MISC is no VMX capability MSR"],
    );
    refused(
        good.replace("0x0000003f00000016", "-1").as_bytes(),
        &["-1 is no hexadecimal number"],
    );
    // Intel PT in guests, and the dual-monitor treatment of SMM.
    let greedy = good
        .replace("0x0011186e", "0x0111186e")
        .replace("0x00d80400", "0x00da0400");
    refused(
        greedy.as_bytes(),
        &["not implemented", "proc2.24", "IA32_VMX_BASIC bit 49"],
    );
}

#[test]
fn outputs_that_cannot_be_written_are_refused_before_anything_runs() {
    let dir = Dir::new("outputs");
    let kernel = dir.file("kernel", &kernel());
    let nowhere = dir.path("no/such/dir");
    refused(
        &["run", &kernel, "--report-json", &nowhere],
        &["report", &nowhere],
    );
    refused(
        &["run", &kernel, "--log-instructions", &nowhere],
        &["log", &nowhere],
    );
    refused(
        &["run", &kernel, "--exits", &nowhere],
        &["exits", &nowhere, "No such file"],
    );
    refused(
        &["run", &kernel, "--trace", &dir.path("")],
        &["trace", "directory"],
    );
    let serial = format!("file:{nowhere}");
    refused(
        &["run", &kernel, "--serial", &serial],
        &["serial", &nowhere],
    );
}

#[test]
fn linux_takes_no_modules_and_a_bounded_command_line() {
    let dir = Dir::new("linux");
    let mut linux = vec![0; 0x800];
    linux[0x1f1] = 1;
    linux[0x1fe..0x202].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x6a]);
    linux[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    linux[0x211] = 1;
    linux[0x236] = 1;
    linux[0x238] = 100;
    let image = dir.file("image", &linux);
    let module = dir.file("module", b"x");
    refused(&["run", &image, "--module", &module], &["no modules"]);
    let long = "x".repeat(101);
    refused(
        &["run", &image, "--append", &long],
        &["command line", "at most 100"],
    );
}

#[test]
fn help_and_version_are_no_errors() {
    for (args, words) in [
        (
            &["--help"][..],
            &["Boot an image", "built-in hypervisor"][..],
        ),
        (
            &["run", "--help"],
            &["--initrd", "--stop-on", "Exit status:", "Ctrl-A x"],
        ),
        (&["--version"], &["hypernest "]),
    ] {
        let output = hypernest(args);
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        for word in words {
            assert!(stdout.contains(word), "{word:?} is not in: {stdout}");
        }
    }
}

#[test]
fn vmcs_layouts_that_a_machine_cannot_have_are_named() {
    let dir = Dir::new("layouts");
    let image = dir.file("kernel", &kernel());
    let max = ["run", &image, "--vmx", "max"];
    let with = |more: &[&'static str]| [&max[..], more].concat();
    refused(
        &with(&["--vmcs", "lunch"]),
        &["--vmcs", "no layout \"lunch\""],
    );
    refused(&with(&["--write-vmcs", ""]), &["--write-vmcs", "no layout"]);
    refused(&with(&["--vmcs", "acrn"]), &["layout acrn is for files"]);
    refused(
        &with(&["--vmcs", "kvm", "--accept-vmcs", "kvm-4.0"]),
        &["kvm and kvm-4.0", "0x11e57ed0"],
    );
    refused(
        &with(&["--accept-vmcs", "virtualbox,,kvm"]),
        &["--accept-vmcs", "no layout"],
    );
    refused(&["run", &image, "--vmcs", "kvm"], &["without VMX"]);
    let missing = dir.path("nowhere");
    refused(
        &["run", &image, "--layout", &missing],
        &["layout", &missing],
    );
    let table = dir.file("table.csv", b"kind,name,offset,width_bytes\nlayout,kvm,,\n");
    refused(
        &["run", &image, "--layout", &table],
        &[&table, "a layout kvm already"],
    );
    let cut = dir.file(
        "cut.csv",
        b"kind,name,offset,width_bytes\nlayout,own,,\nfield,x,8,8\n",
    );
    refused(
        &["run", &image, "--layout", &cut],
        &[&cut, "line 3", "\"x\""],
    );
}
