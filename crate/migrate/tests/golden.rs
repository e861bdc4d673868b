//! Snapshots of earlier versions stay readable: files that were written once and are never written again.
//!
//! When a new version of the format comes, its file is added:
//! `WRITE_GOLDEN=NAME cargo test -p hypernest-migrate --test golden` writes one.

use hypernest_guests::{HYPERVISOR, HYPERVISOR_MEMORY};
use hypernest_machine::{Machine, Stop, Until, VmxChoice};
use hypernest_migrate::Snapshot;
use hypernest_migrate::snapshot::{Options, write};

struct Golden {
    name: &'static str,
    file: &'static [u8],
    /// Where it was saved.
    tick: u64,
    /// Its end: the tick, and the hash of the state. The hash is of the state as this build has it; a field that is
    /// added to the state changes it, and the file remains as it is.
    end: (u64, u64),
    /// What it prints at its end.
    prints: &'static str,
}

const ALL: &[Golden] = &[Golden {
    name: "hypervisor-1",
    file: include_bytes!("golden/hypervisor-1.snapshot"),
    tick: 298_741,
    end: (310_755, 1_337_925_174_247_689_769),
    prints: "1 triple fault.",
}];

/// The built-in hypervisor, while its guest executes.
fn machine() -> Machine {
    let mut machine = Machine::builder()
        .memory(HYPERVISOR_MEMORY)
        .image(HYPERVISOR)
        .vmx(VmxChoice::Max)
        .build()
        .unwrap();
    machine.run(&Until::end().text("INVLPG")).unwrap();
    while !machine.read_vcpu(0).unwrap().vmx.non_root {
        machine.run(&Until::tick(machine.now() + 1)).unwrap();
    }
    machine
}

#[test]
fn files_of_earlier_versions_are_read_and_their_machines_go_on() {
    if let Ok(name) = std::env::var("WRITE_GOLDEN") {
        let path = format!(
            "{}/tests/golden/{name}.snapshot",
            env!("CARGO_MANIFEST_DIR")
        );
        let mut bytes = Vec::new();
        write(&mut machine(), &mut bytes, &Options::default()).unwrap();
        std::fs::write(path, bytes).unwrap();
        return;
    }
    for golden in ALL {
        let name = golden.name;
        let snapshot = Snapshot::open(golden.file).unwrap();
        let mut machine = snapshot.build(64 << 20, Vec::new(), |b| b).unwrap();
        assert_eq!(machine.now(), golden.tick, "{name}");
        assert!(machine.read_vcpu(0).unwrap().vmx.non_root, "{name}");
        let stop = machine.run(&Until::tick(golden.tick + 1_000_000)).unwrap();
        assert_eq!(stop, Stop::PoweredOff, "{name}");
        let printed = String::from_utf8(machine.take_serial_output()).unwrap();
        assert!(
            printed.trim_end().ends_with(golden.prints),
            "{name}: {printed}"
        );
        let end = (machine.now(), machine.state_hash().unwrap());
        assert_eq!(end, golden.end, "{name}");
    }
}
