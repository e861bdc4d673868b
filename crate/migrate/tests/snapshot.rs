//! Snapshots: machines go on from them exactly.

use hypernest_guests::{GREETING, HYPERVISOR, HYPERVISOR_MEMORY};
use hypernest_machine::devices::virtio::BackendState;
use hypernest_machine::{
    DiskImage, Layout, Machine, MachineBuilder, Stop, Until, VmxChoice, VmxLayouts,
};
use hypernest_migrate::Snapshot;
use hypernest_migrate::snapshot::{self, About, Options, SnapshotError};
use hypernest_migrate::{state_from_bytes, state_to_bytes};

const MOST: u64 = 64 << 20;

fn hypervisor() -> MachineBuilder<'static> {
    Machine::builder()
        .memory(HYPERVISOR_MEMORY)
        .image(HYPERVISOR)
        .vmx(VmxChoice::Max)
}

fn save(machine: &mut Machine) -> Vec<u8> {
    let mut bytes = Vec::new();
    snapshot::write(machine, &mut bytes, &Options::default()).unwrap();
    bytes
}

fn resume(bytes: &[u8], disks: Vec<Box<dyn DiskImage>>) -> Machine {
    let opened = Snapshot::open(bytes).unwrap();
    opened.build(MOST, disks, |builder| builder).unwrap()
}

/// Runs both by `ticks`; they must end the same way, print the same, and be the same.
fn assert_same_future(a: &mut Machine, b: &mut Machine, ticks: u64) -> Stop {
    a.take_serial_output();
    let until = Until::tick(a.now() + ticks);
    let stops = (a.run(&until).unwrap(), b.run(&until).unwrap());
    assert_eq!(stops.0, stops.1);
    assert_eq!(a.take_serial_output(), b.take_serial_output());
    assert_eq!(a.state().unwrap(), b.state().unwrap());
    assert_eq!(a.state_hash().unwrap(), b.state_hash().unwrap());
    stops.0
}

#[test]
fn a_hypervisor_goes_on_from_wherever_it_was_saved() {
    let mut machine = hypervisor().build().unwrap();
    let mut saved = [0, 0];
    for step in 0.. {
        let stop = machine.run(&Until::tick(machine.now() + 7)).unwrap();
        if stop != Stop::Tick {
            break;
        }
        // Its guest executes far less than it does.
        let in_guest = machine.read_vcpu(0).unwrap().vmx.non_root;
        if !in_guest && step % 512 != 0 {
            continue;
        }
        let mut resumed = resume(&save(&mut machine), Vec::new());
        assert_eq!(machine.state_hash().unwrap(), resumed.state_hash().unwrap());
        assert_same_future(&mut machine, &mut resumed, 5);
        // Not only the next moment: to the end of the run.
        if saved[usize::from(in_guest)] % 8 == 0 {
            let mut other = resume(&save(&mut resumed), Vec::new());
            let stop = assert_same_future(&mut resumed, &mut other, 100_000_000);
            assert_eq!(stop, Stop::PoweredOff);
        }
        saved[usize::from(in_guest)] += 1;
    }
    assert!(saved[0] > 20 && saved[1] > 20, "{saved:?}");
}

#[test]
fn the_machine_that_was_saved_and_the_one_resumed_end_alike() {
    let mut machine = hypervisor().build().unwrap();
    machine.run(&Until::end().text("L2 says")).unwrap();
    let bytes = save(&mut machine);
    let mut resumed = resume(&bytes, Vec::new());
    let stop = assert_same_future(&mut machine, &mut resumed, 100_000_000);
    assert_eq!(stop, Stop::PoweredOff);
    // So it stays: the end of a run is part of the state.
    let mut ended = resume(&save(&mut resumed), Vec::new());
    assert_eq!(ended.run(&Until::end()).unwrap(), Stop::PoweredOff);
}

#[test]
fn input_that_the_guest_has_not_read_is_not_lost() {
    let mut machine = Machine::builder()
        .memory(16 << 20)
        .image(GREETING)
        .build()
        .unwrap();
    machine.run(&Until::tick(20_000_000)).unwrap();
    let text = "a line that does not fit the port's memory by far";
    machine.serial_input(text.as_bytes());
    let mut resumed = resume(&save(&mut machine), Vec::new());
    resumed.run(&Until::tick(40_000_000)).unwrap();
    let printed = String::from_utf8(resumed.take_serial_output()).unwrap();
    assert_eq!(printed, text.to_uppercase());
}

#[test]
fn several_vcpus_the_hyperv_interface_and_layouts_are_kept() {
    let mut machine = hypervisor()
        .cpus(3)
        .hyperv(true)
        .vmcs_layouts(VmxLayouts {
            advertised: Some(Layout::named("hypernest-evmcs").unwrap().clone()),
            written: None,
            accepted: vec![Layout::named("kvm").unwrap().clone()],
        })
        .epoch(1_000_000_000)
        .build()
        .unwrap();
    machine.run(&Until::end().text("L2 says")).unwrap();
    let mut resumed = resume(&save(&mut machine), Vec::new());
    assert_eq!(machine.config(), resumed.config());
    assert_same_future(&mut machine, &mut resumed, 100_000_000);
}

#[test]
fn what_was_written_to_disks_is_kept_and_their_images_are_demanded() {
    let image: Vec<u8> = (0..3 << 20).map(|i: u32| (i >> 9) as u8).collect();
    let disks = |first: &[u8]| -> Vec<Box<dyn DiskImage>> {
        vec![Box::new(first.to_vec()), Box::new(vec![9u8; 5000])]
    };
    let builder = hypervisor().disk(image.clone()).console();
    let mut machine = builder.read_only_disk(vec![9; 5000]).build().unwrap();
    machine.run(&Until::tick(100_000)).unwrap();
    // The driver is this test.
    let mut state = machine.save().unwrap();
    let overlay = match &mut state.board.virtio[0].backend {
        BackendState::Block(block) => &mut block.overlay,
        console @ BackendState::Console(_) => panic!("{console:?}"),
    };
    for piece in [0, 1, 2, 700, 767] {
        overlay.insert(piece, vec![(piece / 2) as u8; 4096]);
    }
    machine.restore(&state).unwrap();

    let bytes = save(&mut machine);
    let opened = Snapshot::open(&bytes[..]).unwrap();
    let parts = opened.disks().iter();
    let parts: Vec<_> = parts.map(|d| (d.slot, d.size, d.read_only)).collect();
    assert_eq!(parts, [(0, 3 << 20, false), (2, 5000, true)]);
    let mut resumed = resume(&bytes, disks(&image));
    assert_eq!(resumed.state().unwrap(), state);
    assert_same_future(&mut machine, &mut resumed, 1_000_000);
    let alone = state_to_bytes(&state).unwrap();
    assert_eq!(state_from_bytes(&alone, &machine.disks()).unwrap(), state);
    let error = state_from_bytes(&alone, &[]).unwrap_err().to_string();
    assert!(error.contains("there is no disk 0"), "{error}");

    let refused = |disks| {
        let opened = Snapshot::open(&bytes[..]).unwrap();
        let outcome = opened.build(MOST, disks, |builder| builder);
        outcome.err().unwrap().to_string()
    };
    let error = refused(Vec::new());
    assert!(error.contains("has 2 disks, and 0 were given"), "{error}");
    let error = refused(disks(&image[1..]));
    assert!(
        error.contains("disk 1") && error.contains("3145727 bytes"),
        "{error}"
    );
    let mut other = image.clone();
    other[3 << 19] ^= 1;
    let error = refused(disks(&other));
    assert!(error.contains("disk 1 is not the one"), "{error}");
}

#[test]
fn it_says_what_it_is() {
    let mut machine = hypervisor().build().unwrap();
    let options = Options {
        about: About {
            boot: "of a test".into(),
            ..About::default()
        },
        ..Options::default()
    };
    let mut bytes = Vec::new();
    let counts = snapshot::write(&mut machine, &mut bytes, &options).unwrap();
    let pages = counts.zero + counts.shared + counts.stored;
    assert_eq!(pages, HYPERVISOR_MEMORY / 4096);
    let opened = Snapshot::open(&bytes[..]).unwrap();
    assert_eq!(opened.about().boot, "of a test");
    assert_eq!(opened.about().writer, env!("CARGO_PKG_VERSION"));
    assert_eq!(*opened.state(), machine.state().unwrap());
    let contents = opened.contents(MOST).unwrap();
    let hash = contents.state.hash(contents.ram.bytes());
    assert_eq!(hash, machine.state_hash().unwrap());
    let pages = contents.pages;
    assert_eq!((pages.shared, pages.stored), (counts.shared, counts.stored));
    assert_eq!(contents.sections["vcpu"].count, 1);
}

#[test]
fn a_machine_too_large_for_the_caller_is_refused() {
    let mut machine = hypervisor().build().unwrap();
    let bytes = save(&mut machine);
    let opened = Snapshot::open(&bytes[..]).unwrap();
    let outcome = opened.build(HYPERVISOR_MEMORY - 1, Vec::new(), |builder| builder);
    let error = outcome.err().unwrap();
    assert!(matches!(error, SnapshotError::Memory { .. }), "{error}");
}
