use super::ports::Port;
use super::*;
use crate::device::{Claim, Device, DeviceAccess, DeviceContext};
use crate::devices::virtio::{Block, Console};

struct Rig {
    board: Board,
    ram: Ram,
    now: Tick,
}

fn rig() -> Rig {
    Rig {
        board: Board::new(1 << 20, 1, 1_700_000_000),
        ram: Ram::new(1 << 20).unwrap(),
        now: 0,
    }
}

impl Rig {
    /// Asserted I/O APIC pins but for the timer's, which is high when idle.
    fn pins(&self) -> u32 {
        self.board.interrupts.io_apic.state.lines & !(1 << 2)
    }

    fn inp(&mut self, port: u16, width: u8) -> u32 {
        self.board.port_read(&mut self.ram, self.now, port, width)
    }

    fn out(&mut self, port: u16, width: u8, value: u32) {
        self.board
            .port_write(&mut self.ram, self.now, port, width, value);
    }

    fn load(&mut self, address: u64, width: u8) -> u64 {
        self.board
            .mmio_read(&mut self.ram, self.now, address, width)
    }

    fn store(&mut self, address: u64, width: u8, value: u64) {
        self.board
            .mmio_write(&mut self.ram, self.now, address, width, value);
    }
}

/// Counts writes, interrupts on GSI 20, copies a byte by DMA, ticks every 100.
#[derive(Default)]
struct Counter {
    writes: u64,
    next: Option<Tick>,
}

impl Device for Counter {
    fn name(&self) -> &str {
        "counter"
    }

    fn claims(&self) -> Vec<Claim> {
        vec![
            Claim::Ports(0x700..0x704),
            Claim::Memory(0xe000_0000..0xe000_1000),
        ]
    }

    fn read(&mut self, _: &mut DeviceContext<'_>, access: DeviceAccess) -> u64 {
        self.writes << 8 | access.claim as u64
    }

    fn write(&mut self, context: &mut DeviceContext<'_>, access: DeviceAccess, value: u64) {
        self.writes += 1;
        context.set_interrupt(20, value & 1 != 0);
        self.next = Some(context.now + 100);
        let _ = context.ram.write(access.offset, &[value as u8]);
    }

    fn deadline(&self) -> Option<Tick> {
        self.next
    }

    fn advance(&mut self, context: &mut DeviceContext<'_>) {
        context.set_interrupt(20, false);
        self.next = None;
    }

    fn save(&self) -> Vec<u8> {
        self.writes.to_le_bytes().to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> bool {
        state
            .try_into()
            .map(|bytes| self.writes = u64::from_le_bytes(bytes))
            .is_ok()
    }
}

#[test]
fn unmapped_reads_give_all_ones_of_their_width() {
    let mut rig = rig();
    for (width, ones) in [(1, 0xff), (2, 0xffff), (4, u32::MAX)] {
        assert_eq!(rig.inp(0x2e9, width), ones);
        assert_eq!(rig.load(0xe000_0000, width), u64::from(ones));
    }
    assert_eq!(rig.load(0xffff_fff8, 8), u64::MAX);
    rig.out(0x80, 1, 0);
    rig.store(u64::MAX, 8, 0);
}

#[test]
fn wide_accesses_to_byte_devices_go_byte_by_byte() {
    let mut rig = rig();
    rig.out(0x20, 2, 0xfb0a);
    assert_eq!(rig.inp(0x20, 2), 0xfb00);
    rig.out(0x3f8, 1, u32::from(b'h'));
    assert_eq!(rig.board.take_serial_output(), b"h");
    assert_eq!(rig.board.take_serial_output(), b"");
}

#[test]
fn the_exit_port_takes_any_width_and_the_first_end_counts() {
    for (width, value) in [(1, 0x31), (2, 0x1234), (4, 0x1234_5678)] {
        let mut rig = rig();
        rig.out(0xf4, width, value);
        rig.out(0x64, 1, 0xfe);
        assert!(rig.board.stop_requested());
        assert_eq!(rig.board.state().ended, Some(StopRequest::Exit(value)));
    }
}

#[test]
fn every_way_to_end_a_run_is_told_apart() {
    let ends: [(u16, u8, u32, StopRequest); 4] = [
        (0x64, 1, 0xfe, StopRequest::Reset),
        (0xcf9, 1, 0x06, StopRequest::Reset),
        (0x92, 1, 0x01, StopRequest::Reset),
        (0x604, 2, 0x2000 | 5 << 10, StopRequest::PowerOff),
    ];
    for (port, width, value, request) in ends {
        let mut rig = rig();
        rig.out(port, width, value);
        assert_eq!(rig.board.ended, Some(request));
    }
    let mut rig = rig();
    for byte in b"Shutdown" {
        rig.out(0x8900, 1, u32::from(*byte));
    }
    assert_eq!(rig.board.ended, Some(StopRequest::PowerOff));
}

#[test]
fn pci_and_reset_share_their_ports() {
    let mut rig = rig();
    rig.out(0xcf8, 4, 0x8000_0000);
    assert_eq!(rig.inp(0xcf8, 4), 0x8000_0000);
    assert_eq!(rig.inp(0xcfc, 4), 0x0d57_8086);
    assert_eq!(rig.inp(0xcfe, 2), 0x0d57);
    rig.out(0xcf9, 1, 0x02);
    assert_eq!(rig.inp(0xcf9, 1), 0x02);
    assert_eq!(rig.inp(0xcf8, 4), 0x8000_0000);
}

#[test]
fn the_test_device_latches_and_drives_interrupts() {
    let mut rig = rig();
    rig.out(0xe0, 4, 0x1234_5678);
    assert_eq!(rig.inp(0xe1, 2), 0x3456);
    rig.store(0xff00_0010, 4, 0xdead_beef);
    assert_eq!(rig.load(0xff00_0012, 2), 0xdead);
    rig.out(0x200e, 4, 1);
    assert_eq!(rig.pins(), 1 << 14);
    rig.out(0x200e, 1, 0);
    assert_eq!(rig.pins(), 0);
}

#[test]
fn the_timer_interrupts_through_the_8259_at_its_deadline() {
    let mut rig = rig();
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 4),
        (0x21, 1),
        (0x43, 0x34),
        (0x40, 0x9c),
        (0x40, 0x2e),
    ] {
        rig.out(port, 1, value);
    }
    for _ in 0..3 {
        let due = rig.board.deadline().unwrap();
        rig.board.advance(&mut rig.ram, due - 1);
        assert!(!rig.board.intr());
        rig.board.advance(&mut rig.ram, due);
        assert!(rig.board.intr());
        assert_eq!(rig.board.acknowledge(due), 0x30);
        rig.now = due;
        rig.out(0x20, 1, 0x20);
    }
}

#[test]
fn nothing_interrupts_before_anything_is_programmed() {
    let mut rig = rig();
    assert!(!rig.board.intr());
    assert_eq!(rig.board.deadline(), None);
    assert_eq!(rig.board.take_message(), None);
}

#[test]
fn serial_input_raises_interrupt_4() {
    let mut rig = rig();
    rig.out(0x3f9, 1, 1);
    rig.board.serial_input(b"a");
    assert_eq!(rig.pins(), 1 << 4);
    assert_eq!(rig.inp(0x3f8, 1), u32::from(b'a'));
    assert_eq!(rig.pins(), 0);
}

#[test]
fn a_watched_text_pauses_even_across_calls_and_only_once() {
    let mut rig = rig();
    rig.board.watch(&[b"never".to_vec(), b"login:".to_vec()]);
    for byte in b"debian log" {
        rig.out(0x3f8, 1, u32::from(*byte));
    }
    rig.board.take_serial_output();
    assert!(!rig.board.stop_requested());
    for byte in b"in:" {
        rig.out(0x3f8, 1, u32::from(*byte));
    }
    assert_eq!(rig.board.pause.take(), Some(Pause::Text(1)));
    rig.out(0x3f8, 1, u32::from(b' '));
    assert!(!rig.board.stop_requested());
}

#[test]
fn a_custom_device_is_reached_by_port_and_memory_and_has_time_interrupts_and_dma() {
    let mut rig = rig();
    rig.board.add_device(Box::new(Counter::default())).unwrap();
    rig.now = 1000;
    rig.out(0x702, 1, 0xa5);
    rig.store(0xe000_0fff, 1, 0x5b);
    assert_eq!(rig.inp(0x700, 2), 0x0200);
    assert_eq!(rig.load(0xe000_0000, 4), 0x0201);
    assert_eq!(rig.ram.load(2).unwrap(), [0xa5]);
    assert_eq!(rig.ram.load(0xfff).unwrap(), [0x5b]);
    assert_eq!(rig.pins(), 1 << 20);
    assert_eq!(rig.board.deadline(), Some(1100));
    rig.board.advance(&mut rig.ram, 1100);
    assert_eq!(rig.pins(), 0);
    assert_eq!(rig.board.deadline(), None);
}

#[test]
fn claims_that_meet_other_devices_are_refused() {
    struct Claims(Vec<Claim>);
    impl Device for Claims {
        fn name(&self) -> &str {
            "claims"
        }
        fn claims(&self) -> Vec<Claim> {
            self.0.clone()
        }
        fn read(&mut self, _: &mut DeviceContext<'_>, _: DeviceAccess) -> u64 {
            0
        }
        fn write(&mut self, _: &mut DeviceContext<'_>, _: DeviceAccess, _: u64) {}
    }
    let mut rig = rig();
    rig.board.add_device(Box::new(Counter::default())).unwrap();
    let bad = [
        vec![Claim::Ports(0x3f0..0x3f9)],
        vec![Claim::Ports(0x703..0x705)],
        vec![Claim::Memory(0xe000_0800..0xe000_0801)],
        vec![Claim::Memory(0..u64::MAX)],
        vec![Claim::Ports(5..5)],
        vec![Claim::Ports(0xffff..0x1_0001)],
        vec![Claim::Ports(0x710..0x712), Claim::Ports(0x711..0x712)],
    ];
    for claims in bad {
        assert!(
            rig.board
                .add_device(Box::new(Claims(claims.clone())))
                .is_err(),
            "{claims:x?}"
        );
    }
    assert_eq!(
        rig.board.add_device(Box::new(Counter::default())),
        Err(DeviceError::Name("counter".into()))
    );
    assert!(
        rig.board
            .add_device(Box::new(Claims(vec![Claim::Ports(0xffff..0x1_0000)])))
            .is_ok()
    );
}

#[test]
fn observers_see_and_change_accesses_and_can_stop() {
    struct Spy;
    impl Observer for Spy {
        fn access(&mut self, access: &mut Access, _: &mut Ram) -> Flow {
            match (access.kind, access.address) {
                (AccessKind::PortRead, 0x71) => access.value = 0x1ff,
                (AccessKind::PortWrite, 0x3f8) => access.value += 1,
                (AccessKind::PortWrite, 0x80) => return Flow::Stop,
                _ => {}
            }
            Flow::Continue
        }
    }
    let mut rig = rig();
    rig.board.observers.push(Box::new(Spy));
    assert_eq!(rig.inp(0x71, 1), 0xff);
    rig.out(0x3f8, 1, u32::from(b'a'));
    assert_eq!(rig.board.take_serial_output(), b"b");
    assert!(!rig.board.stop_requested());
    rig.out(0x80, 1, 0);
    assert_eq!(rig.board.pause, Some(Pause::Observer));
}

#[test]
fn a_saved_board_goes_on_like_the_original() {
    let build = || {
        let mut rig = rig();
        let image = Block::new(Box::new(vec![7u8; 4096]), false);
        rig.board.add_virtio(Backend::Block(image)).unwrap();
        rig.board
            .add_virtio(Backend::Console(Console::default()))
            .unwrap();
        rig.board.add_device(Box::new(Counter::default())).unwrap();
        rig
    };
    let work = |rig: &mut Rig, seed: u64| {
        let mut random = seed;
        let mut trace = Vec::new();
        for _ in 0..3000 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
            let value = (random >> 33) as u32;
            const PORTS: [u16; 20] = [
                0x20, 0x21, 0xa0, 0xa1, 0x40, 0x42, 0x43, 0x61, 0x64, 0x70, 0x71, 0x3f8, 0x3f9,
                0x3fa, 0x3fc, 0x510, 0x511, 0x602, 0x700, 0x4d0,
            ];
            let port = PORTS[value as usize % PORTS.len()];
            if value & 0x100 != 0 {
                trace.push(u64::from(rig.inp(port, 1)));
            } else if value >> 9 & 0xff != 0xfe {
                rig.out(port, 1, value >> 9 & 0xff);
            }
            rig.now += u64::from(value & 0xffff);
            rig.board.advance(&mut rig.ram, rig.now);
            trace.push(u64::from(rig.board.intr()));
            trace.push(rig.board.deadline().unwrap_or(0));
        }
        trace
    };
    let mut first = build();
    work(&mut first, 1);
    let saved = first.board.state();
    let mut second = build();
    second.board.restore(&saved).unwrap();
    second.now = first.now;
    assert_eq!(second.board.state(), saved);
    assert_eq!(work(&mut first, 2), work(&mut second, 2));
    assert_eq!(first.board.state(), second.board.state());
    assert!(matches!(
        rig().board.restore(&saved),
        Err(BoardRestoreError::Virtio)
    ));
}

#[test]
fn too_many_virtio_devices_are_refused() {
    let mut rig = rig();
    for _ in 0..layout::VIRTIO_SLOTS {
        rig.board
            .add_virtio(Backend::Console(Console::default()))
            .unwrap();
    }
    assert!(
        rig.board
            .add_virtio(Backend::Console(Console::default()))
            .is_err()
    );
}

#[test]
fn any_accesses_at_any_time_neither_panic_nor_stall() {
    let mut rig = rig();
    let image = Block::new(Box::new(vec![7u8; 70_000]), false);
    rig.board.add_virtio(Backend::Block(image)).unwrap();
    rig.board
        .add_virtio(Backend::Console(Console::default()))
        .unwrap();
    rig.board.add_device(Box::new(Counter::default())).unwrap();
    let ports: Vec<u16> = (0..=u16::MAX)
        .filter(|&port| Port::at(port).is_some() || port % 0x700 == 0)
        .collect();
    let bases = [
        layout::VIRTIO_BASE,
        layout::VIRTIO_BASE + layout::VIRTIO_STRIDE,
        layout::IO_APIC,
        layout::TEST_RAM + layout::TEST_RAM_SIZE - 0x100,
        0xe000_0f80,
        u64::MAX - 0x200,
    ];
    let mut seed = 3u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
        seed >> 31
    };
    for _ in 0..300_000 {
        let (choice, value) = (random(), random());
        let width = 1 << (choice & 3);
        let port = ports[choice as usize / 16 % ports.len()];
        let address = bases[choice as usize / 16 % bases.len()] + (random() & 0x1ff);
        match choice >> 2 & 3 {
            0 => _ = rig.inp(port, width.min(4)),
            1 => rig.out(port, width.min(4), value as u32),
            2 => _ = rig.load(address, width),
            _ => rig.store(address, width, value & 0xffff),
        }
        rig.now = rig.now.saturating_add(match choice >> 20 & 0xfff {
            0 => 1 << 45,
            step => step,
        });
        rig.board.advance(&mut rig.ram, rig.now);
        assert!(rig.board.deadline().is_none_or(|due| due > rig.now));
        while rig.board.take_message().is_some() {}
        if rig.board.intr() {
            rig.board.acknowledge(rig.now);
        }
        rig.board.end_of_interrupt(rig.now, value as u8);
        rig.board.serial_input(&[value as u8]);
        rig.board.take_debug_output();
    }
    let state = rig.board.state();
    rig.board.restore(&state).unwrap();
    assert_eq!(rig.board.state(), state);
}

#[test]
fn states_that_no_machine_comes_to_are_refused_by_name() {
    let mut board = rig().board;
    let before = board.state();
    let mut refused = |spoil: fn(&mut BoardState), what: &'static str| {
        let mut state = before.clone();
        spoil(&mut state);
        assert_eq!(
            board.restore(&state),
            Err(BoardRestoreError::Impossible(what))
        );
        assert_eq!(board.state(), before);
    };
    refused(|state| state.rtc.memory.truncate(11), "real-time clock");
    refused(|state| state.rtc.index = 128, "real-time clock");
    refused(|state| state.pit.channels[0].mode = 6, "interval timer");
    refused(|state| state.pit.channels[1].access = 0, "interval timer");
    refused(
        |state| state.pit.channels[2].count = 65537,
        "interval timer",
    );
    refused(
        |state| state.pit.channels[0].next_count = Some((1, 0)),
        "interval timer",
    );
    refused(
        |state| state.pit.channels[0].paused = Some(u64::MAX),
        "interval timer",
    );
    refused(|state| state.interrupts.pic.chips[1].top = 8, "8259 pair");
    assert_eq!(board.restore(&before), Ok(()));
}
