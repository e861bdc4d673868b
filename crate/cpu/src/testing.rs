//! A vCPU, RAM and a bus with nothing on it, for unit tests.

use alloc::boxed::Box;
use alloc::vec::Vec;

use iced_x86::Decoder;

use crate::bus::{Bus, InterruptMessage, Tick};
use crate::flags::bit;
use crate::mem::Ctx;
use crate::model::Model;
use crate::ram::Ram;
use crate::state::SegmentState;
use crate::trap::Exec;
use crate::vcpu::{Seg, Vcpu, cr};

/// A bus that remembers port writes and ends of interrupts, and answers port reads with the
/// port's number.
#[derive(Default)]
pub(crate) struct TestBus {
    /// Port, width and value of every write.
    pub written: Vec<(u16, u8, u32)>,
    /// Vector of every broadcast end of interrupt.
    pub ended: Vec<u8>,
}

impl Bus for TestBus {
    fn port_read(&mut self, _ram: &mut Ram, _now: Tick, port: u16, _width: u8) -> u32 {
        u32::from(port) * 0x1_0001
    }
    fn port_write(&mut self, _ram: &mut Ram, _now: Tick, port: u16, width: u8, value: u32) {
        self.written.push((port, width, value));
    }
    fn mmio_read(&mut self, _ram: &mut Ram, _now: Tick, _address: u64, _width: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&mut self, _: &mut Ram, _: Tick, _: u64, _: u8, _: u64) {}
    fn take_message(&mut self) -> Option<InterruptMessage> {
        None
    }
    fn end_of_interrupt(&mut self, _now: Tick, vector: u8) {
        self.ended.push(vector);
    }
    fn intr(&self) -> bool {
        false
    }
    fn acknowledge(&mut self, _now: Tick) -> u8 {
        0
    }
    fn deadline(&self) -> Option<Tick> {
        None
    }
    fn advance(&mut self, _ram: &mut Ram, _now: Tick) {}
    fn stop_requested(&self) -> bool {
        false
    }
}

/// One vCPU in a small machine.
pub(crate) struct Fixture {
    pub cpu: Box<Vcpu>,
    pub ram: Ram,
    pub bus: TestBus,
}

pub(crate) const GDT: u64 = 0x1000;
pub(crate) const IDT: u64 = 0x2000;
pub(crate) const TSS: u64 = 0x3000;
pub(crate) const CODE: u64 = 0x8000;
pub(crate) const STACK: u64 = 0x1_0000;
/// Where `protected` and `long` put inner stacks.
pub(crate) const STACK0: u64 = 0x1_8000;
pub(crate) const IST1: u64 = 0x1_c008;

/// Selectors of the table that `protected` and `long` build.
pub(crate) mod sel {
    pub const CODE0: u16 = 0x08;
    pub const DATA0: u16 = 0x10;
    pub const CODE3: u16 = 0x18 | 3;
    pub const DATA3: u16 = 0x20 | 3;
    /// 32-bit code in `long`, 16-bit code in `protected`.
    pub const OTHER0: u16 = 0x28;
    pub const CONFORMING: u16 = 0x30;
    pub const TSS: u16 = 0x40;
    pub const ABSENT: u16 = 0x50;
    /// Free for a test, 16 bytes.
    pub const FREE: u16 = 0x58;
    /// 32-bit code for level 3.
    pub const CODE3_32: u16 = 0x68 | 3;
}

impl Fixture {
    /// Real mode at 0:CODE, with the stack at STACK - 2.
    pub fn real() -> Fixture {
        let mut cpu = Box::new(Vcpu::new(<&Model>::default(), 0, 1, None));
        cpu.set_real_segment(Seg::Cs, 0);
        cpu.rip = CODE;
        cpu.gpr[4] = 0xfffe;
        cpu.refresh();
        Fixture {
            cpu,
            ram: Ram::new(2 << 20).unwrap(),
            bus: TestBus::default(),
        }
    }

    /// 32-bit protected mode without paging, at level 0.
    pub fn protected() -> Fixture {
        let mut f = Fixture::real();
        f.table(
            0x00cf_9b00_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x008f_9b00_0000_ffff,
        );
        f.tss(TSS + 4, STACK0 | u64::from(sel::DATA0) << 32);
        f.cpu.cr0 = cr::CR0_PE | cr::CR0_ET | cr::CR0_NE;
        f.enter(0);
        f
    }

    /// 64-bit mode at level 0, the first 2 MiB mapped to themselves for everyone.
    pub fn long() -> Fixture {
        let mut f = Fixture::real();
        f.table(
            0x00af_9b00_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x00cf_9b00_0000_ffff,
        );
        f.tss(TSS + 4, STACK0);
        f.tss(TSS + 0x24, IST1);
        f.poke(0x4000, 0x5007);
        f.poke(0x5000, 0x6007);
        f.poke(0x6000, 0x0087 | 0x60);
        f.cpu.cr3 = 0x4000;
        f.cpu.cr4 = cr::CR4_PAE;
        f.cpu.cr0 = cr::CR0_PE | cr::CR0_PG | cr::CR0_WP | cr::CR0_ET | cr::CR0_NE;
        f.cpu.msrs.efer = cr::EFER_LMA | cr::EFER_LME | cr::EFER_SCE | cr::EFER_NXE;
        f.enter(0);
        f
    }

    fn table(&mut self, code0: u64, code3: u64, other: u64) {
        for (selector, value) in [
            (sel::CODE0, code0),
            (sel::DATA0, 0x00cf_9300_0000_ffff),
            (sel::CODE3, code3),
            (sel::DATA3, 0x00cf_f300_0000_ffff),
            (sel::OTHER0, other),
            (sel::CONFORMING, code0 | 4 << 40),
            (sel::TSS, 0x0000_8b00_3000_0067),
            (sel::ABSENT, 0x00cf_1300_0000_ffff),
            (sel::CODE3_32, 0x00cf_fb00_0000_ffff),
        ] {
            self.descriptor(selector, value);
        }
        self.cpu.gdtr.base = GDT;
        self.cpu.gdtr.limit = 0x6f;
        self.cpu.idtr.base = IDT;
        self.cpu.idtr.limit = 0xfff;
        *self.cpu.seg_mut(Seg::Tr) = SegmentState {
            selector: sel::TSS,
            base: TSS,
            limit: 0x67,
            rights: 0x8b,
        };
    }

    fn tss(&mut self, at: u64, value: u64) {
        self.poke(at, value);
    }

    /// Level `cpl`, with its own segments, at CODE and STACK.
    pub fn enter(&mut self, cpl: u8) {
        let (code, data) = if cpl == 0 {
            (sel::CODE0, sel::DATA0)
        } else {
            (sel::CODE3, sel::DATA3)
        };
        for seg in [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
            let selector = if seg == Seg::Cs { code } else { data };
            let at = GDT + u64::from(selector & !7);
            let descriptor = crate::descriptor::Descriptor(self.peek(at));
            *self.cpu.seg_mut(seg) = descriptor.segment(selector);
        }
        self.cpu.rip = CODE;
        self.cpu.gpr[4] = STACK;
        self.cpu.set_rflags(bit::FIXED);
    }

    pub fn descriptor(&mut self, selector: u16, value: u64) {
        self.poke(GDT + u64::from(selector & !7), value);
    }

    /// A gate to `selector:offset`; `rights` is its byte 5, `extra` its byte 4.
    pub fn gate(&mut self, vector: u8, selector: u16, offset: u64, rights: u8, extra: u8) {
        let low = offset & 0xffff
            | u64::from(selector) << 16
            | u64::from(extra) << 32
            | u64::from(rights) << 40
            | (offset >> 16 & 0xffff) << 48;
        if self.cpu.long_mode() {
            self.poke(IDT + 16 * u64::from(vector), low);
            self.poke(IDT + 16 * u64::from(vector) + 8, offset >> 32);
        } else {
            self.poke(IDT + 8 * u64::from(vector), low);
        }
    }

    pub fn poke(&mut self, address: u64, value: u64) {
        self.ram.write(address, &value.to_le_bytes()).unwrap();
    }

    pub fn peek(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.ram.load(address).unwrap())
    }

    pub fn peek32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.ram.load(address).unwrap())
    }

    pub fn peek16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.ram.load(address).unwrap())
    }

    /// Runs `f` on the processor.
    pub fn with<T>(&mut self, f: impl FnOnce(&mut Ctx) -> T) -> T {
        f(&mut Ctx {
            cpu: &mut self.cpu,
            ram: &mut self.ram,
            bus: &mut self.bus,
            now: 1000,
        })
    }

    /// Executes one instruction, given as its bytes. RIP is restored on a fault.
    pub fn execute(&mut self, code: &[u8]) -> Exec {
        let bits = self.cpu.code_size.bits();
        let rip = self.cpu.rip;
        let options = self.cpu.model.decoder_options();
        let i = Decoder::with_ip(bits, code, rip, options).decode();
        assert_eq!(i.len(), code.len(), "{code:x?}");
        assert!(self.cpu.model.allows(&i), "{code:x?}");
        self.cpu.rip = i.next_ip();
        let done = self.with(|x| crate::exec::execute(x, &i));
        if done.is_err() {
            self.cpu.rip = rip;
        }
        done
    }
}
