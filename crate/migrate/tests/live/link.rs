//! Two sides, the bytes between them, and time that passes as the test says.

use std::collections::VecDeque;

use hypernest_machine::{
    Config, Layout, Machine, MachineState, Until, VmxChoice, VmxError, VmxLayouts,
};
use hypernest_migrate::hello::Offer;
use hypernest_migrate::live::{
    Destination, DestinationNext, Failure, Identity, Settings, Source, SourceNext,
};

pub const IDENTITY: Identity = Identity {
    id: 0x1234,
    release: 77,
};
pub const RELEASE: u64 = 88;

/// The built-in hypervisor with its guest.
pub fn machine(layouts: VmxLayouts) -> Machine {
    Machine::builder()
        .memory(hypernest_guests::HYPERVISOR_MEMORY)
        .vmx(VmxChoice::Max)
        .vmcs_layouts(layouts)
        .image(hypernest_guests::HYPERVISOR)
        .build()
        .unwrap()
}

/// A machine like `other` that has not run, which writes VMCS regions its own way where it is given.
pub fn empty_like(other: &Machine, written: Option<&str>) -> Machine {
    let config = offered(other, written).unwrap();
    Machine::builder()
        .memory(config.memory)
        .cpus(config.cpus)
        .model(&config.model)
        .vmx(config.vmx)
        .hyperv(config.hyperv)
        .vmcs_layouts(config.layouts)
        .build()
        .unwrap()
}

/// What a machine is built from that takes up `other`.
pub fn offered(other: &Machine, written: Option<&str>) -> Result<Config, VmxError> {
    let written = written.map(|name| Layout::named(name).unwrap().clone());
    let layouts = VmxLayouts {
        written,
        ..VmxLayouts::default()
    };
    Offer::of(other).unwrap().config(&layouts)
}

/// What becomes of the bytes on their way.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Bytes to the destination, and to the source, after which it is gone.
    pub cut: (usize, usize),
    /// Bytes in each direction in a step.
    pub step: usize,
    /// Microseconds of a step.
    pub time: u64,
    /// Ticks that the guest runs when it may.
    pub ticks: u64,
    /// The disk of the source, and of the destination, is full.
    pub full: (bool, bool),
}

impl Default for Link {
    fn default() -> Link {
        Link {
            cut: (usize::MAX, usize::MAX),
            step: 1 << 20,
            time: 1000,
            ticks: 2000,
            full: (false, false),
        }
    }
}

/// What came of it.
pub struct Ended {
    pub source: SourceNext,
    pub destination: DestinationNext,
    pub source_side: Source,
    pub destination_side: Destination,
    /// Bytes that arrived at the destination, and at the source.
    pub arrived: (usize, usize),
    /// Whether the source, and the destination, was asked to store its machine.
    pub stored: (bool, bool),
}

/// One side's bytes on their way to the other.
struct Way {
    bytes: VecDeque<u8>,
    left: usize,
    arrived: usize,
}

impl Way {
    fn new(left: usize) -> Way {
        Way {
            bytes: VecDeque::new(),
            left,
            arrived: 0,
        }
    }

    /// Some of them arrive.
    fn step(&mut self, most: usize) -> Vec<u8> {
        let count = most.min(self.bytes.len()).min(self.left);
        self.left -= count;
        self.arrived += count;
        self.bytes.drain(..count).collect()
    }

    /// A message was lost: the link is known to be gone.
    fn is_cut(&self) -> bool {
        self.left == 0
    }
}

fn is_over_source(next: &SourceNext) -> bool {
    matches!(
        next,
        SourceNext::HandedOver | SourceNext::GoOn(_) | SourceNext::Undecided(_)
    )
}

fn is_over_destination(next: &DestinationNext) -> bool {
    matches!(
        next,
        DestinationNext::Own | DestinationNext::Failed(_) | DestinationNext::Undecided(_)
    )
}

fn outcome(full: bool) -> Result<(), String> {
    if full {
        Err("the disk is full".into())
    } else {
        Ok(())
    }
}

/// Migrates `machine` to one that `build` makes (or whose reasons against it are given), while it runs.
pub fn migrate(
    machine: &mut Machine,
    link: Link,
    settings: (Settings, Settings),
    build: impl Fn(&Machine) -> Result<Machine, Vec<String>>,
) -> Ended {
    let mut now = 5_000_000;
    let mut source = Source::new(machine, settings.0, IDENTITY, b"offer".to_vec(), now).unwrap();
    let mut destination = Destination::new(settings.1, RELEASE);
    let (mut there, mut back) = (Way::new(link.cut.0), Way::new(link.cut.1));
    let mut stored = (false, false);
    for _ in 0..1_000_000 {
        let source_next = source.poll(machine, now);
        match source_next {
            SourceNext::Run => {
                let end = machine.now() + link.ticks;
                machine.run(&Until::tick(end)).unwrap();
            }
            SourceNext::Store => {
                stored.0 = true;
                source.stored(outcome(link.full.0));
            }
            _ => {}
        }
        let out = source.output().to_vec();
        source.sent(out.len());
        there.bytes.extend(out);
        destination.receive(&there.step(link.step));
        if there.is_cut() || back.is_cut() {
            destination.closed();
        }
        let destination_next = destination.poll(now);
        match destination_next {
            DestinationNext::Judge => {
                assert_eq!(destination.offer(), Some(&b"offer"[..]));
                match build(machine) {
                    Ok(machine) => destination.accept(machine),
                    Err(reasons) => destination.refuse(reasons),
                }
            }
            DestinationNext::Store => {
                stored.1 = true;
                destination.stored(outcome(link.full.1));
            }
            DestinationNext::Own => destination.confirm(),
            _ => {}
        }
        let out = destination.output().to_vec();
        destination.sent(out.len());
        back.bytes.extend(out);
        source.receive(&back.step(link.step));
        if there.is_cut() || back.is_cut() {
            source.closed();
        }
        // Owning is told again and again in this loop; once is enough.
        if is_over_source(&source_next) && is_over_destination(&destination_next) {
            return Ended {
                source: source_next,
                destination: destination_next,
                source_side: source,
                destination_side: destination,
                arrived: (there.arrived, back.arrived),
                stored,
            };
        }
        now += link.time;
    }
    panic!("it does not end: {source:?} {destination:?}");
}

/// Migrates over a good link, with one layout.
pub fn handed_over(machine: &mut Machine, written: Option<&str>) -> (Machine, Source) {
    let settings = (Settings::default(), Settings::default());
    let link = Link {
        ticks: 20,
        ..Link::default()
    };
    let mut ended = migrate(machine, link, settings, |machine| {
        Ok(empty_like(machine, written))
    });
    assert_eq!(ended.source, SourceNext::HandedOver);
    assert_eq!(ended.destination, DestinationNext::Own);
    let machine = ended.destination_side.take_machine().unwrap();
    (machine, ended.source_side)
}

/// Runs to the end; everything it printed.
pub fn finish(machine: &mut Machine) -> Vec<u8> {
    let stop = machine.run(&Until::end()).unwrap();
    assert!(stop.is_end(), "{stop}");
    machine.take_serial_output()
}

/// The state without what may differ from layout to layout.
pub fn without_layouts(machine: &Machine) -> MachineState {
    let mut state = machine.state().unwrap();
    state.config.layouts = VmxLayouts::default();
    state
}

/// Whether a failure is the end of the link, seen here or told by the other side.
pub fn is_cut(failure: &Failure) -> bool {
    let there = Failure::Peer(Failure::Closed.to_string());
    *failure == Failure::Closed || *failure == there
}
