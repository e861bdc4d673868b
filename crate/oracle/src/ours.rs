//! Our processor as an engine for cases: a small RAM with page tables for the regions of
//! [`crate::layout`], Linux' user segments, and an IDT whose handlers are told apart by address.

use hypernest_cpu::{
    Activity, Bus, InterruptMessage, Processor, ProcessorConfig, Ram, SegmentState, Stop,
    TableState, Tick, VcpuState,
};

use crate::case::{Case, Engine, Event, Outcome, RF, TF, UserState, initial_memory};
use crate::layout::{IMAGE, IMAGE_DATA, PAGE, REGIONS, Region, image_offset};

/// Kernel memory is all of RAM at this linear address.
const KERNEL: u64 = 0xffff_8000_0000_0000;
const IDT: u64 = 0x1000;
const GDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const STACK_TOP: u64 = 0x5000;
/// Handler of vector v at HANDLERS + 16 v: a jump to itself.
const HANDLERS: u64 = 0x5000;
const TABLES: u64 = 0x6000;
const IMAGE_BASE: u64 = 0x20000;
const RAM_SIZE: u64 = 0x40000;

const KERNEL_CODE: u16 = 0x10;
const TASK: u16 = 0x40;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const LARGE: u64 = 0x80;
const NO_EXECUTE: u64 = 1 << 63;

/// Nothing outside.
struct NoBoard;

impl Bus for NoBoard {
    fn port_read(&mut self, _: &mut Ram, _: Tick, _: u16, _: u8) -> u32 {
        u32::MAX
    }
    fn port_write(&mut self, _: &mut Ram, _: Tick, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, _: &mut Ram, _: Tick, _: u64, _: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&mut self, _: &mut Ram, _: Tick, _: u64, _: u8, _: u64) {}
    fn take_message(&mut self) -> Option<InterruptMessage> {
        None
    }
    fn end_of_interrupt(&mut self, _: Tick, _: u8) {}
    fn intr(&self) -> bool {
        false
    }
    fn acknowledge(&mut self, _: Tick) -> u8 {
        0xff
    }
    fn deadline(&self) -> Option<Tick> {
        None
    }
    fn advance(&mut self, _: &mut Ram, _: Tick) {}
    fn stop_requested(&self) -> bool {
        false
    }
}

/// Our processor in user mode.
pub struct Ours {
    processor: Processor,
    ram: Ram,
    template: VcpuState,
    code_at: usize,
    code_len: usize,
}

impl Ours {
    /// A processor with everything its model offers switched on.
    pub fn new() -> Ours {
        let config = ProcessorConfig::default();
        let processor = Processor::new(&config).expect("the default configuration is valid");
        let mut ram = Ram::new(RAM_SIZE).expect("a small RAM");
        build_tables(&mut ram);
        let template = supervisor_state(processor.read_state(0));
        Ours {
            processor,
            ram,
            template,
            code_at: 0,
            code_len: 0,
        }
    }

    /// Maps the data regions, or takes them away: then every access to data is a page fault.
    pub fn map_data(&mut self, present: bool) {
        let mut next = 0;
        for (region, physical) in mapped_regions() {
            for page in 0..region.pages {
                let mut entry = page_entry(region, physical + page * PAGE);
                if !present && !region.execute {
                    entry &= !PRESENT;
                }
                // The tables exist already: none is taken from `next`.
                map(
                    &mut self.ram,
                    &mut next,
                    region.start + page * PAGE,
                    entry,
                    1,
                );
            }
        }
        self.processor.flush(&mut self.ram);
    }

    fn place_code(&mut self, case: &Case) {
        let code = case.mapped_code();
        let at = image_offset(case.state.rip).unwrap_or(0);
        let end = (at + code.len() + 16).min(IMAGE_DATA);
        let mut bytes = vec![0x90; end - at];
        bytes[..code.len()].copy_from_slice(code);
        let old = vec![0x90; self.code_len];
        let mut put = |at: usize, bytes: &[u8]| {
            self.ram
                .write(IMAGE_BASE + at as u64, bytes)
                .expect("the image is RAM");
        };
        put(self.code_at, &old);
        put(at, &bytes);
        self.code_at = at;
        self.code_len = bytes.len();
    }

    fn word(&self, address: u64) -> u64 {
        let bytes = self.ram.load(address.wrapping_sub(KERNEL));
        bytes.map_or(0, u64::from_le_bytes)
    }

    fn outcome(&self, stop: Stop) -> Outcome {
        let vcpu = self.processor.read_state(0);
        let s = &vcpu.segments;
        let mut state = UserState {
            gpr: vcpu.gpr,
            rip: vcpu.rip,
            rflags: vcpu.rflags,
            selectors: [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].map(|s| s.selector),
            fs_base: s.fs.base,
            gs_base: s.gs.base,
            fpu: vcpu.fpu,
        };
        state.fpu.instruction_selector = 0;
        state.fpu.operand_selector = 0;
        state.fpu.xcr0 = 0;
        let mut event = Event::Done;
        if let Stop::Unimplemented { what, .. } = stop {
            event = Event::Unimplemented(what);
        } else if s.cs.selector == KERNEL_CODE {
            let vector = (vcpu.rip.wrapping_sub(KERNEL + HANDLERS) / 16) as u8;
            let has_error_code = matches!(vector, 8 | 10..=14 | 17);
            let frame = vcpu.gpr[4].wrapping_add(if has_error_code { 8 } else { 0 });
            let [rip, cs, rflags, rsp, ss] = [0, 8, 16, 24, 32].map(|at| self.word(frame + at));
            state.rip = rip;
            state.rflags = rflags;
            state.gpr[4] = rsp;
            state.selectors[1] = cs as u16;
            state.selectors[2] = ss as u16;
            let address = (vector == 14).then_some(vcpu.cr2);
            event = Event::Fault { vector, address };
        }
        state.rflags &= !(TF | RF);
        Outcome { event, state }
    }
}

impl Default for Ours {
    fn default() -> Ours {
        Ours::new()
    }
}

impl Engine for Ours {
    fn name(&self) -> &'static str {
        "ours"
    }

    /// Panics when the case's state is one that no processor can be in.
    fn run(&mut self, case: &Case) -> Outcome {
        let from = IMAGE_BASE as usize + IMAGE_DATA;
        let to = IMAGE_BASE as usize + IMAGE;
        initial_memory(case, &mut self.ram.bytes_mut()[from..to]);
        self.place_code(case);
        let state = vcpu_state(&self.template, case);
        if let Err(error) = self.processor.write_state(0, &state) {
            panic!("{error} (case {})", crate::text::print(case, None, &[]));
        }
        let until = self.processor.now() + 1;
        let stop = self.processor.run(&mut self.ram, &mut NoBoard, until);
        self.outcome(stop)
    }

    fn memory(&self) -> &[u8] {
        &self.ram.bytes()[IMAGE_BASE as usize + IMAGE_DATA..IMAGE_BASE as usize + IMAGE]
    }
}

fn put(ram: &mut Ram, address: u64, value: u64) {
    ram.write(address, &value.to_le_bytes())
        .expect("tables are RAM");
}

/// The regions with their places in RAM.
fn mapped_regions() -> impl Iterator<Item = (Region, u64)> {
    REGIONS.into_iter().scan(IMAGE_BASE, |next, region| {
        let physical = *next;
        *next += region.len();
        Some((region, physical))
    })
}

fn page_entry(region: Region, physical: u64) -> u64 {
    let mut entry = physical | PRESENT | USER;
    if region.write {
        entry |= WRITE;
    }
    if !region.execute {
        entry |= NO_EXECUTE;
    }
    entry
}

fn build_tables(ram: &mut Ram) {
    let mut next = TABLES + PAGE;
    map(ram, &mut next, KERNEL, PRESENT | WRITE | LARGE, 2);
    for (region, physical) in mapped_regions() {
        for page in 0..region.pages {
            let entry = page_entry(region, physical + page * PAGE);
            map(ram, &mut next, region.start + page * PAGE, entry, 1);
        }
    }
    for vector in 0..256 {
        let handler = KERNEL + HANDLERS + 16 * vector;
        // JMP to itself; vectors from 32 on share what lies there, and never occur.
        if vector < 32 {
            ram.write(HANDLERS + 16 * vector, &[0xeb, 0xfe])
                .expect("handlers are RAM");
        }
        // Breakpoint and overflow are open to user mode (Vol. 3A, "64-Bit Mode IDT").
        let dpl: u64 = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let low = handler & 0xffff
            | u64::from(KERNEL_CODE) << 16
            | (0x8e00 | dpl << 13) << 32
            | (handler >> 16 & 0xffff) << 48;
        put(ram, IDT + 16 * vector, low);
        put(ram, IDT + 16 * vector + 8, handler >> 32);
    }
    let descriptors = [
        (KERNEL_CODE, 0x00af_9b00_0000_ffff),
        (0x18, 0x00cf_9300_0000_ffff),
        (0x20, 0x00cf_fb00_0000_ffff),
        (0x28, 0x00cf_f300_0000_ffff),
        (0x30, 0x00af_fb00_0000_ffff),
    ];
    for (selector, descriptor) in descriptors {
        put(ram, GDT + u64::from(selector), descriptor);
    }
    // RSP0, and no I/O permission map.
    put(ram, TSS + 4, KERNEL + STACK_TOP);
    put(ram, TSS + 100, 0x0068_0000);
}

/// Enters a translation at `level` (1: 4 KiB page, 2: 2 MiB page), making tables on the way.
fn map(ram: &mut Ram, next: &mut u64, linear: u64, entry: u64, level: u32) {
    let mut table = TABLES;
    for at in (level..=4).rev() {
        let slot = table + (linear >> (3 + 9 * at) & 0x1ff) * 8;
        if at == level {
            put(ram, slot, entry);
            return;
        }
        let mut value = ram.load(slot).map_or(0, u64::from_le_bytes);
        if value == 0 {
            value = *next | PRESENT | WRITE | USER;
            *next += PAGE;
            put(ram, slot, value);
        }
        table = value & 0x000f_ffff_ffff_f000;
    }
}

/// What all cases share: long mode, paging, tables.
fn supervisor_state(mut state: VcpuState) -> VcpuState {
    state.activity = Activity::Active;
    state.cr0 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
    state.cr3 = TABLES;
    // PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE
    state.cr4 = 0x0005_0620;
    state.msrs.efer = 0xd01; // NXE, LMA, LME, SCE
    state.fpu.xcr0 = 3;
    state.gdtr = TableState {
        base: KERNEL + GDT,
        limit: 0x7f,
    };
    state.idtr = TableState {
        base: KERNEL + IDT,
        limit: 0xfff,
    };
    state.segments.tr = SegmentState {
        selector: TASK,
        base: KERNEL + TSS,
        limit: 0x67,
        rights: 0x8b,
    };
    state.segments.ldtr = unusable();
    state
}

fn unusable() -> SegmentState {
    SegmentState {
        rights: 0x1_0000,
        ..SegmentState::default()
    }
}

/// The hidden part that loading a selector of Linux' user segments gives.
fn segment(selector: u16) -> SegmentState {
    let rights = match selector {
        0x33 => 0xa0fb,
        0x23 => 0xc0fb,
        0x2b => 0xc0f3,
        _ => return unusable(),
    };
    SegmentState {
        selector,
        base: 0,
        limit: u32::MAX,
        rights,
    }
}

fn vcpu_state(template: &VcpuState, case: &Case) -> VcpuState {
    let user = &case.state;
    let mut state = template.clone();
    state.gpr = user.gpr;
    state.rip = user.rip;
    state.rflags = user.rflags | 2;
    let [es, cs, ss, ds, fs, gs] = user.selectors.map(segment);
    let s = &mut state.segments;
    (s.es, s.cs, s.ss, s.ds, s.fs, s.gs) = (es, cs, ss, ds, fs, gs);
    s.fs.base = user.fs_base;
    s.gs.base = user.gs_base;
    let xcr0 = state.fpu.xcr0;
    state.fpu = user.fpu;
    state.fpu.xcr0 = xcr0;
    state
}
