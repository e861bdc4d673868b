//! The built-in guests, natively, in Node and in a browser: the same input at the same ticks ends in
//! the same state.
//!
//! The native test leaves its state hash in cargo's folder for tests; the WebAssembly tests are
//! compiled with it. So run natively first: `cargo test -p hypernest-wasm`, then
//! `wasm-pack test --mode no-install --node crate/wasm`.

use hypernest_wasm::guest::{Builtin, Guest, Options, SliceReport, Vmx};

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test;

/// A slice that is not long for a browser, in ticks.
const SLICE: u64 = 1_000_000;
/// Instructions that the greeting takes at most.
const GREETING: u64 = 20_000_000;

fn options() -> Options {
    Options {
        memory: 16 << 20,
        cpus: 1,
        model: None,
        cmdline: String::new(),
        vmx: Vmx::None,
        builtin: Builtin::Greeting,
    }
}

fn guest() -> Guest {
    Guest::new(&options(), None, None).expect("the built-in guest boots")
}

/// Runs slices of `ticks` until the guest has written `text`.
fn run_until(guest: &mut Guest, text: &str, ticks: u64) -> String {
    let mut output = Vec::new();
    for _ in 0..GREETING / ticks {
        let SliceReport { stop, .. } = guest.run_slice(ticks, ticks);
        output.extend(guest.take_serial());
        let shown = String::from_utf8_lossy(&output);
        assert!(stop.is_none(), "stopped: {stop:?} after {shown}");
        if shown.contains(text) {
            return shown.into_owned();
        }
    }
    panic!("no {text:?} in {}", String::from_utf8_lossy(&output));
}

/// The state after the hypervisor has ended, run in slices of `ticks`, and what it printed.
fn hypervisor(ticks: u64) -> (String, String) {
    let options = Options {
        vmx: Vmx::Max,
        builtin: Builtin::Hypervisor,
        ..options()
    };
    let mut guest = Guest::new(&options, None, None).expect("the hypervisor boots");
    let mut output = Vec::new();
    loop {
        let SliceReport {
            stop, ticks: now, ..
        } = guest.run_slice(ticks, ticks);
        output.extend(guest.take_serial());
        let shown = String::from_utf8_lossy(&output);
        if let Some(stop) = stop {
            assert_eq!(stop.kind, "power-off", "{shown}");
            let hash = guest.state_hash().expect("the software engine can be read");
            return (hash, shown.into_owned());
        }
        assert!(now < GREETING, "it does not end: {shown}");
    }
}

/// The state at a fixed tick, after input at fixed ticks, run in slices of `ticks`.
fn final_hash(ticks: u64) -> String {
    let mut guest = guest();
    let mut output = Vec::new();
    for (end, input) in [
        (12_000_000, "hello"),
        (12_500_000, "\r"),
        (13_000_000, "x"),
        (14_000_000, ""),
    ] {
        let mut report = guest.run_slice(0, 0);
        while report.ticks < end {
            report = guest.run_slice(ticks.min(end - report.ticks), ticks);
            assert_eq!(report.stop, None);
        }
        assert_eq!(report.ticks, end);
        guest.send_serial(input.as_bytes());
        output.extend(guest.take_serial());
    }
    let output = String::from_utf8(output).expect("the guest writes ASCII");
    assert!(output.ends_with("> HELLO\r\n> X"), "{output}");
    guest.state_hash().expect("the software engine can be read")
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn the_greeting_counts_primes_and_echoes_in_capitals() {
    let mut guest = guest();
    let text = run_until(&mut guest, "\r\n> ", SLICE);
    assert!(
        text.contains("It has counted 2262 primes below 20000."),
        "{text}"
    );
    guest.send_serial(b"hi");
    run_until(&mut guest, "HI", SLICE);
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn the_hypervisor_ends_alike_in_slices_of_any_length() {
    let (hash, text) = hypervisor(SLICE);
    assert!(text.contains("20 exits: 2 CPUID"), "{text}");
    assert_eq!((hash, text), hypervisor(7_777));
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn an_idle_guest_skips_time_and_retires_nothing() {
    let mut guest = guest();
    run_until(&mut guest, "\r\n> ", SLICE);
    guest.run_slice(SLICE, SLICE);
    let before = guest.run_slice(0, 0);
    assert!(guest.idle_ticks() > 0);
    let after = guest.run_slice(SLICE, SLICE);
    assert_eq!(after.ticks, before.ticks + SLICE);
    assert_eq!(after.instructions, before.instructions);
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn the_state_does_not_depend_on_the_length_of_slices() {
    assert_eq!(final_hash(SLICE), final_hash(77_777));
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn a_reset_by_the_guest_stops_it() {
    let mut guest = guest();
    run_until(&mut guest, "\r\n> ", SLICE);
    guest.send_serial(b"\x04");
    let stop = guest.run_slice(SLICE, SLICE).stop.expect("it stops");
    assert_eq!(stop.kind, "reset");
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn options_that_cannot_be_are_refused_with_a_reason() {
    let refused = |change: fn(&mut Options), word: &str| {
        let mut options = options();
        change(&mut options);
        let error = options.check().expect_err(word);
        assert!(error.contains(word), "{error}");
        assert!(Guest::new(&options, None, None).is_err());
    };
    refused(|o| o.memory = 0, "4096");
    refused(|o| o.memory = 12_345, "4096");
    refused(|o| o.memory = (3 << 30) + 4096, "3 GiB");
    refused(|o| o.memory = !4095, "3 GiB");
    refused(|o| o.cpus = 0, "CPU");
    refused(|o| o.cpus = 1000, "CPU");
    refused(|o| o.model = Some("z80".into()), "z80");
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn files_that_are_no_kernel_are_refused_by_name() {
    let error = |bytes: &[u8]| hypernest_wasm::guest::check_kernel(bytes).expect_err("refused");
    assert!(error(b"").contains("empty"));
    assert!(error(b"070701").contains("cpio"));
    assert!(error(&[0xff; 4096]).contains("not a bootable image"));
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn archives_are_initial_ram_disks_and_kernels_are_not() {
    use hypernest_wasm::guest::is_initrd;
    for head in [
        &b"070701"[..],
        b"\x1f\x8b\x08",
        b"\xfd7zXZ\0",
        b"\x28\xb5\x2f\xfd",
        b"\x02\x21\x4c\x18",
    ] {
        assert!(is_initrd(head), "{head:?}");
    }
    for head in [&b""[..], b"\x7fELF", b"MZ", b"07"] {
        assert!(!is_initrd(head), "{head:?}");
    }
}

/// A snapshot of the hypervisor some way into its run.
fn snapshot() -> Vec<u8> {
    let options = Options {
        vmx: Vmx::Max,
        builtin: Builtin::Hypervisor,
        ..options()
    };
    let mut guest = Guest::new(&options, None, None).expect("the hypervisor boots");
    guest.run_slice(290_000, GREETING);
    let mut bytes = Vec::new();
    hypernest_wasm::snapshot::write(&mut guest, &mut bytes).expect("it is written");
    bytes
}

/// The state at the end of the run of a snapshot.
fn end_of(snapshot: &[u8]) -> String {
    let mut guest = hypernest_wasm::snapshot::read(snapshot).expect("it is read");
    let report = guest.run_slice(GREETING, GREETING);
    let stop = report.stop.expect("the hypervisor ends");
    assert_eq!(stop.kind, "power-off");
    guest.state_hash().expect("the software engine can be read")
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn a_snapshot_ends_as_the_run_it_was_taken_from() {
    assert_eq!(end_of(&snapshot()), hypervisor(SLICE).0);
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn snapshots_that_cannot_be_taken_are_refused_in_a_line() {
    use hypernest_machine::Machine;
    use hypernest_migrate::snapshot::{Options, write};
    let refused = |bytes: &[u8]| {
        hypernest_wasm::snapshot::read(bytes)
            .err()
            .expect("refused")
    };
    let good = snapshot();
    assert!(refused(b"").contains("no file of Hypernest's"));
    assert!(refused(&good[..good.len() - 1]).contains("it was cut"));
    let builder = Machine::builder().memory(1 << 20).disk(vec![1; 512]);
    let mut bytes = Vec::new();
    let mut machine = builder.build().expect("a machine with a disk");
    write(&mut machine, &mut bytes, &Options::default()).expect("it is written");
    assert!(refused(&bytes).contains("disks"));
}

#[cfg(not(target_arch = "wasm32"))]
#[test]
fn the_native_state_hash_is_left_for_webassembly() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::write(folder.join("greeting.hash"), final_hash(SLICE)).expect("written");
    std::fs::write(folder.join("hypervisor.hash"), hypervisor(SLICE).0).expect("written");
    std::fs::write(folder.join("hypervisor.snapshot"), snapshot()).expect("written");
}

#[cfg(target_arch = "wasm32")]
#[wasm_bindgen_test]
fn webassembly_ends_in_the_native_state() {
    let native = include_str!(concat!(
        env!("CARGO_TARGET_TMPDIR"),
        "/../../tmp/greeting.hash"
    ));
    assert_eq!(
        final_hash(SLICE),
        native,
        "if the machine has changed, run the native test again"
    );
    let native = include_str!(concat!(
        env!("CARGO_TARGET_TMPDIR"),
        "/../../tmp/hypervisor.hash"
    ));
    assert_eq!(hypervisor(SLICE).0, native);
    // What it saved it goes on from here.
    let file = include_bytes!(concat!(
        env!("CARGO_TARGET_TMPDIR"),
        "/../../tmp/hypervisor.snapshot"
    ));
    assert_eq!(end_of(file), native);
}
