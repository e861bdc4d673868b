use super::*;
use crate::bus::Tick;
use crate::clock::TSC_PER_TICK;
use crate::mem::Ctx;
use crate::ram::Ram;
use crate::testing::TestBus;
use crate::vcpu::Vcpu;

struct Bench {
    cpu: Vcpu,
    ram: Ram,
    board: TestBus,
    now: Tick,
}

const ENABLE: u32 = 0x1ff;
const X2APIC: u64 = 0xfee0_0c00;

impl Bench {
    /// vCPU `id`, its APIC enabled in xAPIC mode.
    fn new(id: u32) -> Bench {
        let mut bench = Bench {
            cpu: Vcpu::new(Default::default(), id, 4, None),
            ram: Ram::new(0x1000).unwrap(),
            board: TestBus::default(),
            now: 1000,
        };
        bench.store(0xf0, ENABLE);
        bench
    }

    fn x2apic(id: u32) -> Bench {
        let mut bench = Bench::new(id);
        bench.write(0x1b, X2APIC).unwrap();
        bench
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Ctx) -> T) -> T {
        f(&mut Ctx {
            cpu: &mut self.cpu,
            ram: &mut self.ram,
            bus: &mut self.board,
            now: self.now,
        })
    }

    fn load(&mut self, offset: u64) -> u32 {
        self.with(|x| load(x, offset, 4)) as u32
    }
    fn store(&mut self, offset: u64, value: u32) {
        self.with(|x| store(x, offset, 4, u64::from(value)));
    }
    fn read(&mut self, msr: u32) -> Option<u64> {
        self.with(|x| msr_read(x, msr)).ok()
    }
    fn write(&mut self, msr: u32, value: u64) -> Option<()> {
        self.with(|x| msr_write(x, msr, value)).ok()
    }
    fn apic(&mut self) -> &mut Apic {
        &mut self.cpu.apic
    }
    fn at(&mut self, now: Tick) -> &mut Bench {
        self.now = now;
        self.cpu.apic.advance(now, &mut self.cpu.msrs);
        self
    }
}

fn fixed(vector: u8) -> InterruptMessage {
    InterruptMessage {
        destination: 0,
        logical: false,
        delivery: DeliveryMode::Fixed,
        vector,
        level_triggered: false,
    }
}

#[test]
fn the_highest_request_above_the_priority_is_delivered() {
    let mut b = Bench::new(0);
    b.apic().accept(&fixed(0x31));
    b.apic().accept(&fixed(0x52));
    assert_eq!(b.apic().pending_vector(), Some(0x52));
    assert_eq!(b.apic().acknowledge(), 0x52);
    // 31h is of a lower class than what is in service.
    assert_eq!(b.apic().pending_vector(), None);
    assert_eq!(b.load(0xa0), 0x50);
    b.store(0xb0, 0);
    assert_eq!(b.apic().pending_vector(), Some(0x31));
    b.store(0x80, 0x30);
    assert_eq!(b.apic().pending_vector(), None);
    b.apic().set_cr8(2);
    assert_eq!(b.load(0x80), 0x20);
    assert_eq!(b.apic().pending_vector(), Some(0x31));
}

#[test]
fn the_end_of_a_level_triggered_interrupt_is_broadcast_unless_suppressed() {
    let mut b = Bench::new(0);
    let level = InterruptMessage {
        level_triggered: true,
        ..fixed(0x40)
    };
    for (message, svr, ended) in [
        (fixed(0x40), ENABLE, 0),
        (level, ENABLE, 1),
        (level, ENABLE | 1 << 12, 1),
    ] {
        b.store(0xf0, svr);
        b.apic().accept(&message);
        b.apic().acknowledge();
        b.store(0xb0, 0);
        assert_eq!(b.board.ended.len(), ended);
    }
    assert_eq!(b.board.ended, [0x40]);
}

#[test]
fn destinations_match_by_mode() {
    let to = |destination, logical| InterruptMessage {
        destination,
        logical,
        ..fixed(0x40)
    };
    let mut b = Bench::new(3);
    assert!(b.apic().matches(&to(3, false)) && b.apic().matches(&to(0xff, false)));
    assert!(!b.apic().matches(&to(2, false)));
    b.store(0xd0, 0x2400_0000);
    assert!(b.apic().matches(&to(0x04, true)) && !b.apic().matches(&to(0x18, true)));
    b.store(0xe0, 0);
    assert!(b.apic().matches(&to(0x2c, true)) && !b.apic().matches(&to(0x14, true)));
    assert!(b.apic().matches(&to(0xff, true)));
    b.store(0x20, 9 << 24);
    assert!(b.apic().matches(&to(9, false)));

    let mut b = Bench::x2apic(0x13);
    assert_eq!(b.read(0x80d), Some(0x0001_0008));
    assert!(b.apic().matches(&to(0x1_0009, true)) && !b.apic().matches(&to(0x0_0008, true)));
    assert!(b.apic().matches(&to(0x13, false)) && b.apic().matches(&to(!0, false)));
    b.write(0x80f, 0xff);
    assert!(!b.apic().matches(&to(0x13, false)));
    let nmi = InterruptMessage {
        delivery: DeliveryMode::Nmi,
        ..to(0x13, false)
    };
    assert!(b.apic().matches(&nmi));
}

#[test]
fn a_disabled_apic_keeps_nothing_and_masks_its_entries() {
    let mut b = Bench::new(0);
    b.store(0x350, 0x700);
    assert!(b.apic().extint_enabled());
    b.store(0xf0, 0xff);
    assert!(!b.apic().extint_enabled());
    b.store(0x350, 0x700);
    assert_eq!(b.load(0x350), 0x1_0700);
    b.apic().accept(&fixed(0x40));
    assert_eq!(b.apic().pending_vector(), None);
    b.write(0x1b, 0xfee0_0000).unwrap();
    assert!(b.apic().extint_enabled());
    assert_eq!(b.apic().xapic_page(), None);
}

#[test]
fn the_one_shot_timer_counts_down_once() {
    let mut b = Bench::new(0);
    b.store(0x320, 0x40);
    b.store(0x3e0, 3); // divide by 16
    b.store(0x380, 100);
    assert_eq!(b.apic().deadline(), Some(1000 + 1600));
    b.now = 1000 + 17;
    assert_eq!(b.load(0x390), 99);
    b.store(0x3e0, 0xb); // divide by 1
    assert_eq!(b.apic().deadline(), Some(1017 + 99));
    assert_eq!(b.at(1115).apic().pending_vector(), None);
    assert_eq!(b.at(1116).apic().pending_vector(), Some(0x40));
    assert_eq!(b.apic().deadline(), None);
    assert_eq!(b.load(0x390), 0);
}

#[test]
fn the_periodic_timer_keeps_its_phase() {
    let mut b = Bench::new(0);
    b.store(0x320, 0x2_0040);
    b.store(0x3e0, 0xb);
    b.store(0x380, 100);
    assert_eq!(b.at(1350).apic().pending_vector(), Some(0x40));
    assert_eq!(b.apic().deadline(), Some(1400));
    assert_eq!(b.load(0x390), 50);
    // Masked it goes on counting, and nothing is due.
    b.apic().acknowledge();
    b.store(0x320, 0x3_0040);
    assert_eq!(b.apic().deadline(), None);
    b.now = 1730;
    assert_eq!(b.load(0x390), 70);
    b.store(0xb0, 0);
    assert_eq!(b.apic().pending_vector(), None);
}

#[test]
fn a_tsc_deadline_fires_once_and_clears_its_msr() {
    let mut b = Bench::new(0);
    b.cpu.msrs.tsc_offset = 5000;
    // The first tick at which the TSC has reached it.
    let deadline = 5000 + 4000 * TSC_PER_TICK - 1;
    b.write(0x6e0, deadline).unwrap();
    assert_eq!(b.read(0x6e0), Some(0)); // not in that mode
    b.store(0x320, 0x4_0040);
    b.write(0x6e0, deadline).unwrap();
    assert_eq!(b.apic().deadline(), Some(4000));
    b.cpu.msrs.tsc_offset = 5000 + 1000 * TSC_PER_TICK;
    b.cpu.tsc_changed(1000);
    assert_eq!(b.at(2999).apic().pending_vector(), None);
    assert_eq!(b.read(0x6e0), Some(deadline));
    assert_eq!(b.at(3000).apic().pending_vector(), Some(0x40));
    assert_eq!(b.read(0x6e0), Some(0));
    b.apic().acknowledge();
    b.store(0xb0, 0);
    b.write(0x6e0, 1).unwrap(); // long past
    assert_eq!(b.apic().pending_vector(), Some(0x40));
    b.write(0x6e0, 99999).unwrap();
    b.store(0x320, 0x40);
    assert_eq!(b.apic().deadline(), None);
}

#[test]
fn an_icr_write_sends_one_message() {
    let mut b = Bench::new(0);
    b.store(0x310, 2 << 24);
    b.store(0x300, 0x4650);
    let (message, targets) = b.apic().take_ipi().unwrap();
    assert_eq!(message.delivery, DeliveryMode::StartUp);
    assert_eq!((message.destination, message.vector), (2, 0x50));
    assert_eq!(targets, Targets::Destination);
    assert!(b.apic().take_ipi().is_none());
    b.store(0x300, 0x000c_4540);
    assert_eq!(b.apic().take_ipi().unwrap().1, Targets::Others);
    b.store(0x300, 0x8500); // INIT de-assert
    assert!(b.apic().take_ipi().is_none());

    let mut b = Bench::x2apic(0);
    b.write(0x830, 0x1_0003_0000_0840).unwrap();
    let (message, _) = b.apic().take_ipi().unwrap();
    assert!(message.logical && message.destination == 0x1_0003);
    b.write(0x83f, 0x33).unwrap();
    assert_eq!(b.apic().pending_vector(), Some(0x33));
}

#[test]
fn illegal_vectors_set_the_error_status_and_interrupt() {
    let mut b = Bench::new(0);
    b.store(0x370, 0x60);
    b.store(0x300, 0x0004_000f);
    assert!(b.apic().take_ipi().is_none());
    assert_eq!(b.load(0x280), 0);
    b.store(0x280, 0);
    assert_eq!(b.load(0x280), 0x20);
    assert_eq!(b.apic().pending_vector(), Some(0x60));
    b.apic().accept(&fixed(3));
    b.load(0x40);
    b.store(0x280, 0);
    assert_eq!(b.load(0x280), 0xc0);
    b.store(0x280, 0);
    assert_eq!(b.load(0x280), 0);
}

#[test]
fn x2apic_mode_is_entered_and_left_by_the_allowed_ways_alone() {
    let mut b = Bench::new(5);
    b.store(0x80, 0x70);
    assert!(b.write(0x1b, 0xfee0_0400).is_none());
    assert!(b.write(0x1b, 0xfee0_0c01).is_none());
    assert!(b.write(0x1b, 1 << 52 | 0xfee0_0800).is_none());
    assert!(b.read(0x802).is_none());
    b.write(0x1b, X2APIC).unwrap();
    assert_eq!(b.read(0x1b), Some(X2APIC));
    assert_eq!((b.read(0x802), b.read(0x808)), (Some(5), Some(0x70)));
    assert!(b.write(0x1b, 0xfee0_0800).is_none());
    b.write(0x1b, 0xfee0_0000).unwrap();
    assert!(b.write(0x1b, X2APIC).is_none());
    b.write(0x1b, 0xfec0_0800).unwrap();
    assert_eq!(b.apic().xapic_page(), Some(0xfec0_0000));
    assert_eq!((b.load(0x80), b.load(0x20)), (0, 5 << 24));
}

#[test]
fn x2apic_registers_fault_on_reserved_bits_and_wrong_direction() {
    let mut b = Bench::x2apic(0);
    for (msr, value) in [
        (0x808, 0x100),
        (0x80b, 1),
        (0x80f, 1 << 32),
        (0x828, 1),
        (0x832, 1 << 19),
        (0x830, 1 << 13),
        (0x802, 0),
        (0x80a, 0),
        (0x80d, 0),
        (0x839, 0),
        (0x80e, 0),
        (0x831, 0),
        (0x8ff, 0),
    ] {
        assert!(b.write(msr, value).is_none(), "{msr:#x}");
    }
    for msr in [0x80b, 0x80e, 0x831, 0x83f, 0x809, 0x8ff] {
        assert!(b.read(msr).is_none(), "{msr:#x}");
    }
    b.write(0x830, 1 << 12 | 7 << 32).unwrap();
    assert_eq!(b.read(0x830), Some(7 << 32));
}

#[test]
fn narrow_and_unaligned_accesses_to_the_page_are_harmless() {
    let mut b = Bench::new(0);
    b.store(0x80, 0x55);
    b.with(|x| store(x, 0x80, 1, 0x66));
    b.with(|x| store(x, 0x84, 4, 0x66));
    assert_eq!(b.load(0x80), 0x55);
    assert_eq!(b.with(|x| load(x, 0x32, 1)), 6);
    assert_eq!(b.with(|x| load(x, 0x34, 4)), 0);
    assert_eq!(b.with(|x| load(x, 0x80, 8)), 0x55);
}

#[test]
fn a_start_up_after_an_init_survives_it() {
    let mut b = Bench::new(1);
    let start = |vector| InterruptMessage {
        delivery: DeliveryMode::StartUp,
        ..fixed(vector)
    };
    let init = InterruptMessage {
        delivery: DeliveryMode::Init,
        ..fixed(0)
    };
    b.apic().accept(&start(7));
    b.apic().accept(&init);
    assert!(!b.apic().sipi_waiting());
    b.apic().accept(&start(9));
    assert!(b.apic().take_init());
    b.cpu.init();
    assert_eq!(b.apic().take_sipi(), Some(9));
}
