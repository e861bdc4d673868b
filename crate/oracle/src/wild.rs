//! Wild guests: any bytes become code, page tables, descriptors and registers in any mode. The
//! processor may do with them what it likes but panic, hang, or let the length of its blocks show.

use std::sync::Arc;

use hypernest_cpu::{
    Activity, Bus, DeliveryMode, InterruptMessage, Model, Processor, ProcessorConfig, Ram,
    SegmentState, Stop, TableState, Tick, VcpuState, VmxProfile,
};

const RAM_SIZE: u64 = 0x4_0000;
pub(crate) const IDT: u64 = 0x1000;
pub(crate) const GDT: u64 = 0x2000;
pub(crate) const TSS: u64 = 0x3000;
const HANDLERS: u64 = 0x4000;
pub(crate) const CODE: u64 = 0x8000;
pub(crate) const DATA: u64 = 0x1_0000;
/// Page tables: 4-level, 32-bit, PAE.
pub(crate) const LONG_TABLES: u64 = 0x2_0000;
const SHORT_TABLES: u64 = 0x2_4000;
pub(crate) const PAE_TABLES: u64 = 0x2_6000;
const TABLES_END: u64 = 0x2_a000;
/// Ticks of a run.
const BUDGET: Tick = 2_000;

/// What `data` still has to give; zeros when it is used up.
pub(crate) struct Source<'a>(pub(crate) &'a [u8]);

impl Source<'_> {
    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    pub(crate) fn value(&mut self) -> u64 {
        (0..8).fold(0, |all, n| all | u64::from(self.byte()) << (8 * n))
    }

    /// A number that means something to a guest: an address in RAM, a boundary, or anything.
    pub(crate) fn number(&mut self) -> u64 {
        let kind = self.byte();
        let small = u64::from(self.byte());
        match kind & 7 {
            0 => small,
            1 => CODE + small * 16,
            2 => DATA + small * 64,
            3 => DATA + 0xf00 + small,
            4 => (1u64 << (small & 63)).wrapping_sub(small >> 7),
            5 => LONG_TABLES + small * 256,
            6 => small.wrapping_neg(),
            _ => self.value(),
        }
    }
}

/// Devices that answer with what they were told last, and interrupt now and then.
struct Noise {
    last: u64,
    interrupts: u8,
    messages: u8,
}

impl Bus for Noise {
    fn port_read(&mut self, _: &mut Ram, _: Tick, port: u16, _: u8) -> u32 {
        self.last as u32 ^ u32::from(port)
    }
    fn port_write(&mut self, _: &mut Ram, _: Tick, _: u16, _: u8, value: u32) {
        self.last = self.last.rotate_left(8) ^ u64::from(value);
    }
    fn mmio_read(&mut self, _: &mut Ram, _: Tick, address: u64, _: u8) -> u64 {
        self.last ^ address
    }
    fn mmio_write(&mut self, _: &mut Ram, _: Tick, _: u64, _: u8, value: u64) {
        self.last = self.last.rotate_left(8) ^ value;
    }
    fn take_message(&mut self) -> Option<InterruptMessage> {
        self.messages = self.messages.checked_sub(1)?;
        let delivery = match self.messages & 7 {
            0 => DeliveryMode::Nmi,
            1 => DeliveryMode::Init,
            2 => DeliveryMode::StartUp,
            3 => DeliveryMode::ExtInt,
            4 => DeliveryMode::Smi,
            5 => DeliveryMode::LowestPriority,
            _ => DeliveryMode::Fixed,
        };
        Some(InterruptMessage {
            destination: u32::from(self.messages & 3),
            logical: self.messages & 16 != 0,
            delivery,
            vector: self.messages.wrapping_mul(37),
            level_triggered: self.messages & 32 != 0,
        })
    }
    fn end_of_interrupt(&mut self, _: Tick, _: u8) {}
    fn intr(&self) -> bool {
        self.interrupts > 0
    }
    fn acknowledge(&mut self, _: Tick) -> u8 {
        self.interrupts = self.interrupts.saturating_sub(1);
        0x20 | self.interrupts
    }
    fn deadline(&self) -> Option<Tick> {
        None
    }
    fn advance(&mut self, _: &mut Ram, _: Tick) {}
    fn stop_requested(&self) -> bool {
        false
    }
}

/// The modes a guest can start in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    Real,
    Protected16,
    Protected32,
    Paging32,
    Pae,
    Compat,
    Long,
    Virtual86,
}

/// A guest, ready to run any number of times.
pub(crate) struct Guest {
    pub ram: Vec<u8>,
    pub state: VcpuState,
    pub cpus: u32,
    pub model: &'static Model,
    pub vmx: Option<Arc<VmxProfile>>,
    pub interrupts: u8,
    pub messages: u8,
    /// Ticks of a run.
    pub budget: Tick,
}

pub(crate) fn put(ram: &mut [u8], address: u64, value: u64) {
    let at = address as usize;
    if let Some(place) = ram.get_mut(at..at + 8) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

/// Rights of a present segment of level `dpl`: `kind` is the type, `size` the L, D/B and G bits.
fn segment(selector: u16, kind: u32, dpl: u32, size: u32) -> SegmentState {
    SegmentState {
        selector,
        base: 0,
        limit: if size & 0x8000 == 0 { 0xffff } else { u32::MAX },
        rights: kind | 0x90 | dpl << 5 | size,
    }
}

/// The descriptor of a segment.
fn descriptor(s: &SegmentState) -> u64 {
    let limit = u64::from(if s.rights & 0x8000 == 0 {
        s.limit
    } else {
        s.limit >> 12
    });
    limit & 0xffff
        | (s.base & 0xff_ffff) << 16
        | u64::from(s.rights & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | u64::from(s.rights >> 12 & 0xf) << 52
        | (s.base >> 24 & 0xff) << 56
}

impl Guest {
    fn new(data: &[u8]) -> Guest {
        let mut source = Source(data);
        let start = match source.byte() % 8 {
            0 => Start::Real,
            1 => Start::Protected16,
            2 => Start::Protected32,
            3 => Start::Paging32,
            4 => Start::Pae,
            5 => Start::Compat,
            6 => Start::Virtual86,
            _ => Start::Long,
        };
        let options = source.byte();
        let models = Model::all();
        let mut guest = Guest {
            ram: vec![0; RAM_SIZE as usize],
            state: VcpuState::reset(0, &models[0]),
            cpus: 1 + u32::from(options >> 7),
            model: &models[usize::from(source.byte()) % models.len()],
            vmx: None,
            interrupts: source.byte() & 7,
            messages: source.byte() & 63,
            budget: BUDGET,
        };
        guest.state = VcpuState::reset(0, guest.model);
        guest.tables(start);
        guest.registers(start, options, &mut source);
        for _ in 0..source.byte() & 15 {
            // Spoil page tables, descriptors and gates.
            let at = match source.byte() & 3 {
                0 => GDT + u64::from(source.byte()) * 8,
                1 => IDT + u64::from(source.byte()) * 8,
                _ => {
                    let span = (TABLES_END - LONG_TABLES) / 8;
                    let page = u64::from(source.byte()) * 512 % span;
                    LONG_TABLES + (page + u64::from(source.byte() & 0x3f)) * 8
                }
            };
            let value = source.value();
            put(&mut guest.ram, at, value);
        }
        let code = source.0;
        if !code.is_empty() {
            for (n, byte) in guest.ram[CODE as usize..DATA as usize]
                .iter_mut()
                .enumerate()
            {
                *byte = code[n % code.len()];
            }
        }
        guest
    }

    /// Everything valid to begin with: descriptors, gates, identity page tables.
    pub(crate) fn tables(&mut self, start: Start) {
        let ram = &mut self.ram;
        for (n, s) in flat_segments().iter().enumerate() {
            put(ram, GDT + 8 * (n as u64 + 1), descriptor(s));
        }
        let mut tss = segment(0x60, 9, 0, 0);
        tss.rights = 0x89;
        tss.base = TSS;
        put(ram, GDT + 0x60, descriptor(&tss));
        for word in 0..26 {
            put(ram, TSS + 4 * word, (DATA + 0xf00) | (DATA + 0xf00) << 32);
        }
        let long = matches!(start, Start::Long | Start::Compat);
        if !long {
            put(ram, TSS + 4, (DATA + 0xf00) | 0x10 << 32);
        }
        if start == Start::Virtual86 {
            // INT n of one half of the vectors is the program's own.
            put(ram, TSS + 0x66, 0x100);
            for word in 0..4 {
                put(ram, TSS + 0xe0 + 8 * word, 0xaaaa_aaaa_aaaa_aaaa);
            }
        }
        for vector in 0..256u64 {
            let handler = HANDLERS + vector * 16;
            // Return three bytes further, so that a fault does not repeat for ever.
            let has_code = matches!(vector, 8 | 10..=14 | 17);
            let iret: &[u8] = match (start, long, has_code) {
                // push bp; mov bp, sp; add word [bp + 2], 3; pop bp; iret
                (Start::Real, ..) => &[0x55, 0x8b, 0xec, 0x83, 0x46, 2, 3, 0x5d, 0xcf],
                // add rsp, 8; add qword [rsp], 3; iretq
                (_, true, true) => &[0x48, 0x83, 0xc4, 8, 0x48, 0x83, 4, 0x24, 3, 0x48, 0xcf],
                (_, true, false) => &[0x48, 0x83, 4, 0x24, 3, 0x48, 0xcf],
                // add esp, 4; add dword [esp], 3; iretd
                (_, false, true) => &[0x83, 0xc4, 4, 0x83, 4, 0x24, 3, 0xcf],
                (_, false, false) => &[0x83, 4, 0x24, 3, 0xcf],
            };
            let at = handler as usize;
            ram[at..at + iret.len()].copy_from_slice(iret);
            match start {
                Start::Real => {
                    let at = vector as usize * 4;
                    ram[at..at + 4].copy_from_slice(&(handler as u32).to_le_bytes());
                }
                _ => {
                    let code = if long { 0x18 } else { 0x08 };
                    let gate = handler | code << 16 | 0xee00 << 32;
                    let size = if long { 16 } else { 8 };
                    put(ram, IDT + vector * size, gate);
                }
            }
        }
        const ALL: u64 = 7;
        put(ram, LONG_TABLES, (LONG_TABLES + 0x1000) | ALL);
        put(ram, LONG_TABLES + 0x1000, (LONG_TABLES + 0x2000) | ALL);
        put(ram, LONG_TABLES + 0x2000, (LONG_TABLES + 0x3000) | ALL);
        put(ram, LONG_TABLES + 0x2008, 0x20_0087); // a large page
        put(ram, PAE_TABLES, (PAE_TABLES + 0x1000) | 1);
        put(ram, PAE_TABLES + 0x1000, (PAE_TABLES + 0x2000) | ALL);
        for page in 0..512 {
            put(ram, LONG_TABLES + 0x3000 + 8 * page, page << 12 | ALL);
            put(ram, PAE_TABLES + 0x2000 + 8 * page, page << 12 | ALL);
            let pair = (2 * page) << 12 | ALL | ((2 * page + 1) << 12 | ALL) << 32;
            put(ram, SHORT_TABLES + 0x1000 + 8 * page, pair);
        }
        let first = (SHORT_TABLES + 0x1000) | ALL | 0x40_0087 << 32;
        put(ram, SHORT_TABLES, first);
    }

    pub(crate) fn registers(&mut self, start: Start, options: u8, source: &mut Source) {
        let state = &mut self.state;
        state.activity = Activity::Active;
        for gpr in &mut state.gpr {
            *gpr = source.number();
        }
        state.gpr[4] = DATA + 0x800 + u64::from(source.byte()) * 8;
        state.rip = CODE + u64::from(source.byte());
        state.rflags = 2 | source.value() & 0x003d_7fd5;
        if start == Start::Virtual86 {
            state.rflags |= 1 << 17;
        }
        let chosen = source.value();
        // Any of the bits that do not decide the mode.
        let cr0 = 0x10 | chosen & 0x6005_002e;
        let cr4 = (chosen >> 32) & 0x0037_0e8f;
        state.gdtr = TableState {
            base: GDT,
            limit: 0x7ff,
        };
        state.idtr = TableState {
            base: if start == Start::Real { 0 } else { IDT },
            limit: 0xfff,
        };
        state.segments.tr = SegmentState {
            selector: 0x60,
            base: TSS,
            limit: 0xffff,
            rights: 0x8b,
        };
        state.msrs.sysenter_cs = u64::from(source.byte() & 0x38);
        state.msrs.star = source.value();
        state.msrs.lstar = CODE + u64::from(source.byte());
        state.msrs.fmask = u64::from(source.byte()) << 8;
        let user = options & 3 == 3 && start != Start::Real;
        let all = flat_segments();
        let level = if user { 5 } else { 0 };
        let (code, data) = match start {
            Start::Real => {
                let real = SegmentState {
                    selector: 0,
                    base: 0,
                    limit: 0xffff,
                    rights: 0x93,
                };
                (real, real)
            }
            Start::Virtual86 => {
                let paragraph = SegmentState {
                    selector: 0,
                    base: 0,
                    limit: 0xffff,
                    rights: 0xf3,
                };
                (paragraph, paragraph)
            }
            Start::Protected16 => (all[level + 3], all[level + 4]),
            Start::Protected32 | Start::Paging32 | Start::Pae | Start::Compat => {
                (all[level], all[level + 1])
            }
            Start::Long => (all[level + 2], all[level + 1]),
        };
        let s = &mut state.segments;
        (s.cs, s.ss, s.ds, s.es, s.fs, s.gs) = (code, data, data, data, data, data);
        let paged = cr0 | 0x8000_0001;
        (state.cr0, state.cr3, state.cr4) = match start {
            Start::Real => (cr0 & !0x8000_0001, 0, cr4 & !(1 << 17)),
            Start::Protected16 | Start::Protected32 | Start::Virtual86 => {
                (cr0 | 1, 0, cr4 & !(1 << 17))
            }
            Start::Paging32 => (paged, SHORT_TABLES, cr4 & !(1 << 17) & !0x20 | 0x10),
            Start::Pae => (paged, PAE_TABLES, cr4 & !(1 << 17) | 0x20),
            Start::Compat | Start::Long => (paged, LONG_TABLES, cr4 | 0x20),
        };
        if state.cr0 & 1 << 29 != 0 {
            state.cr0 |= 1 << 30; // NW without CD does not exist
        }
        state.msrs.efer = u64::from(options >> 2 & 1) | u64::from(options >> 3 & 1) << 11;
        if matches!(start, Start::Compat | Start::Long) {
            state.msrs.efer |= 0x500;
        }
        if start == Start::Pae {
            state.pdpte = [(PAE_TABLES + 0x1000) | 1, 0, 0, 0];
        }
        if options & 0x10 != 0 {
            state.dr = [CODE + u64::from(source.byte()), DATA, DATA + 8, CODE];
            state.dr7 = 0x400 | source.value() & 0xffff_23ff;
        }
        if options & 0x20 != 0 {
            for st in &mut state.fpu.st {
                let value = source.value().to_le_bytes();
                st[..8].copy_from_slice(&value);
                st[8..].copy_from_slice(&value[3..5]);
            }
            state.fpu.control = source.value() as u16 & 0x1f3f | 0x40;
            state.fpu.tag = source.byte();
            state.fpu.mxcsr = source.value() as u32 & 0xffff;
            for xmm in &mut state.fpu.xmm {
                *xmm = u128::from(source.value()) << 64 | u128::from(source.number());
            }
        }
        state.apic.nmi_pending = options & 0x40 != 0;
    }

    /// Runs with blocks of one length. `None` where the processor refuses the state.
    fn run(&self, block_length: u32) -> Option<(Vec<VcpuState>, Vec<u8>, Tick, Stop)> {
        let (processor, ram, stop) = self.run_in_slices(block_length, 4, &mut |_, _| ())?;
        let states = (0..self.cpus as usize)
            .map(|n| processor.read_state(n))
            .collect();
        Some((states, ram.bytes().to_vec(), processor.now(), stop))
    }

    /// Runs in slices of equal length, with something to do after each but the last.
    pub(crate) fn run_in_slices(
        &self,
        block_length: u32,
        slices: u64,
        between: &mut dyn FnMut(&mut Processor, &mut Ram),
    ) -> Option<(Processor, Ram, Stop)> {
        let mut processor = Processor::new(&ProcessorConfig {
            cpus: self.cpus,
            model: self.model,
            block_length,
            vmx: self.vmx.clone(),
            hyperv: false,
        })
        .ok()?;
        let mut state = self.state.clone();
        // A model may lack some of the bits: then those that all have.
        if processor.write_state(0, &state).is_err() {
            state.cr4 &= 0x6b3; // OSXMMEXCPT, OSFXSR, PGE, PAE, PSE, PVI, VME
            processor.write_state(0, &state).ok()?;
        }
        let mut ram = Ram::new(self.ram.len() as u64).ok()?;
        ram.bytes_mut().copy_from_slice(&self.ram);
        let mut bus = Noise {
            last: 0,
            interrupts: self.interrupts,
            messages: self.messages,
        };
        let mut stop = Stop::Deadline;
        for slice in 1..=slices {
            if slice > 1 {
                between(&mut processor, &mut ram);
            }
            let until = self.budget / slices * slice;
            stop = processor.run(&mut ram, &mut bus, until);
            assert!(processor.now() <= until, "ran past the deadline");
            if stop != Stop::Deadline {
                break;
            }
            assert_eq!(processor.now(), until, "stopped before the deadline");
        }
        Some((processor, ram, stop))
    }
}

/// Flat segments: code 32, data 32, code 64, code 16, data 16, for level 0 and then for level 3.
fn flat_segments() -> [SegmentState; 10] {
    let mut all = [SegmentState::default(); 10];
    for level in [0, 1] {
        let dpl = level as u32 * 3;
        let kinds = [
            (0xb, 0xc000),
            (0x3, 0xc000),
            (0xb, 0xa000),
            (0xb, 0),
            (0x3, 0),
        ];
        for (n, (kind, size)) in kinds.into_iter().enumerate() {
            let at = level * 5 + n;
            let selector = ((at as u16 + 1) * 8) | dpl as u16;
            all[at] = segment(selector, kind, dpl, size);
        }
    }
    all
}

/// What came of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Tick at which it ended.
    pub now: Tick,
    /// Why.
    pub stop: Stop,
}

/// Runs the guest that `data` describes with blocks of one instruction and of many. Panics where
/// the processor does, and where the two differ. `None` where no processor can be in such a state.
pub fn run(data: &[u8]) -> Option<Ending> {
    run_twice(&Guest::new(data)).map(|(ending, ..)| ending)
}

/// Runs a guest as [`run`] does: also the first vCPU and memory at the end.
pub(crate) fn run_twice(guest: &Guest) -> Option<(Ending, VcpuState, Vec<u8>)> {
    let single = guest.run(1)?;
    let many = guest.run(64).expect("the same state");
    assert_eq!(single.3, many.3, "blocks change the reason to stop");
    assert_eq!(single.2, many.2, "blocks change the time");
    for (a, b) in single.0.iter().zip(&many.0) {
        assert_eq!(a, b, "blocks change the state");
    }
    assert!(single.1 == many.1, "blocks change memory");
    let ending = Ending {
        now: single.2,
        stop: single.3,
    };
    Some((ending, single.0.into_iter().next()?, single.1))
}
