//! The hot loop and the checked path must do the same to every bit of state.

mod support;

use hypernest_cpu::{Processor, Ram, Stop, VcpuState};
use iced_x86::{Decoder, DecoderOptions, Instruction};
use support::{CODE, DATA, Nothing, machine};

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.next() % from.len() as u64) as usize]
    }
}

/// One instruction that begins with an opcode of the hot forms.
fn instruction(random: &mut Random) -> Vec<u8> {
    loop {
        let mut bytes = Vec::new();
        if random.next().is_multiple_of(6) {
            bytes.push(random.pick(&[0x66, 0x64, 0x65, 0xf0, 0xf2, 0xf3]));
        }
        if !random.next().is_multiple_of(3) {
            bytes.push(0x40 | (random.next() & 0xf) as u8);
        }
        if random.next().is_multiple_of(3) {
            bytes.push(0x0f);
            bytes.push(random.pick(&[
                0x10, 0x11, 0x28, 0x29, 0x57, 0x6f, 0x7f, 0xef, 0xa3, 0xaf, 0xb6, 0xb7, 0xba, 0xbe,
                0xbf, 0x40, 0x42, 0x44, 0x46, 0x48, 0x4a, 0x4c, 0x4e, 0x90, 0x92, 0x94, 0x96, 0x98,
                0x9a, 0x9c, 0x9e, 0xc8, 0xcb, 0x80, 0x82, 0x84, 0x86, 0x88, 0x8a, 0x8c, 0x8f, 0x1f,
                0xb1, 0xc1,
            ]));
        } else {
            bytes.push(match random.next() % 4 {
                0 => (random.next() % 8 * 8 + random.next() % 6) as u8,
                1 => random.pick(&[
                    0x80, 0x81, 0x83, 0x84, 0x85, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8d,
                ]),
                2 => random.pick(&[
                    0x50, 0x53, 0x58, 0x5b, 0x63, 0x68, 0x69, 0x6a, 0x6b, 0x70, 0x73, 0x75, 0x78,
                    0x7f, 0x90, 0x91, 0x98, 0x99, 0x9c, 0xfa, 0xa8, 0xa9, 0xb0, 0xb8, 0xc1, 0xd1,
                    0xd3, 0xc0, 0xd0, 0xd2,
                ]),
                _ => random.pick(&[
                    0xc3, 0xc6, 0xc7, 0xc9, 0xe8, 0xe9, 0xeb, 0xf6, 0xf7, 0xfe, 0xff,
                ]),
            });
        }
        bytes.extend(random.next().to_le_bytes());
        if random.next() & 1 == 0 {
            // A small displacement or immediate keeps the address near its base.
            let len = bytes.len();
            bytes[len - 6..].fill(0);
        }
        let mut decoder = Decoder::with_ip(64, &bytes, CODE, DecoderOptions::NONE);
        let i: Instruction = decoder.decode();
        if !i.is_invalid() && !i.is_privileged() {
            bytes.truncate(i.len());
            return bytes;
        }
    }
}

/// One instruction of those that compute flags, read them, or may fault between the two.
fn flag_instruction(random: &mut Random) -> Vec<u8> {
    let wide = random.pick(&[0x40, 0x48]);
    let registers = 0xc0 | (random.next() & 0x3f) as u8;
    match random.next() % 10 {
        // A copy and an operation on the copy, with a register (perhaps itself) or an immediate
        8 => {
            let (copy, of) = (random.next() as u8 & 3, random.next() as u8 & 3);
            let other = random.next() as u8 & 3;
            let mut bytes = vec![
                wide,
                0x89,
                0xc0 | of << 3 | copy,
                random.pick(&[0x40, 0x48]),
            ];
            if random.next().is_multiple_of(2) {
                bytes.extend([
                    random.pick(&[0x01, 0x09, 0x21, 0x29, 0x31]),
                    0xc0 | other << 3 | copy,
                ]);
            } else {
                let kind = random.pick(&[0, 1, 4, 5, 6]);
                bytes.extend([0x83, 0xc0 | kind << 3 | copy, random.next() as u8]);
            }
            bytes
        }
        9 => vec![wide, 0x39, registers],
        0..4 => {
            let opcode = random.pick(&[0x01, 0x09, 0x21, 0x29, 0x31, 0x11, 0x19, 0x39, 0x85]);
            vec![wide, opcode, registers]
        }
        4 => vec![wide, 0xc1, registers, (random.next() & 0x3f) as u8],
        // INC, DEC
        5 => vec![wide, 0xff, registers & !0x30],
        // MOV r, [r]: no SIB byte, no RIP
        6 => vec![
            wide,
            0x8b,
            registers & 0x3f & !7 | random.pick(&[0, 1, 2, 3, 6, 7]),
        ],
        // CMOVB, SETB
        _ => vec![wide, 0x0f, random.pick(&[0x42, 0x92]), registers],
    }
}

fn differences(a: &VcpuState, b: &VcpuState) -> String {
    let (a, b) = (format!("{a:#x?}"), format!("{b:#x?}"));
    a.lines()
        .zip(b.lines())
        .filter(|(a, b)| a != b)
        .map(|(a, b)| format!("{a} | {b}\n"))
        .collect()
}

fn start(random: &mut Random, state: &mut VcpuState) {
    for gpr in &mut state.gpr {
        *gpr = match random.next() % 4 {
            0 => random.next(),
            1 => random.next() % 64,
            _ => DATA + random.next() % 0x4000,
        };
    }
    state.gpr[4] = DATA + 0x8000 + random.next() % 0x100 * 8;
    state.rflags = 2 | random.next() & 0x8d5;
    for xmm in &mut state.fpu.xmm {
        *xmm = u128::from(random.next()) << 64 | u128::from(random.next());
    }
    state.segments.fs.base = DATA + 0x1000;
    state.segments.gs.base = DATA + 0x2000;
}

#[test]
fn hot_operations_do_what_the_checked_path_does() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let (mut hot, mut hot_ram) = machine(64, &[]);
    let (mut checked, mut checked_ram) = machine(1, &[]);
    // A tracer sends every instruction through the checked path.
    checked.set_tracer(Some(Box::new(|_| ())));
    let (tables, fresh) = support::long_mode(&hot);
    let tables = tables.bytes()[0x1000..0xb000].to_vec();
    let mut completed = 0;
    for _ in 0..60_000 {
        // Several, so that some compute flags that the next ones replace.
        let mut code = Vec::new();
        for _ in 0..1 + random.next() % 6 {
            let of_flags = random.next().is_multiple_of(2);
            code.extend(match of_flags {
                true => flag_instruction(&mut random),
                false => instruction(&mut random),
            });
        }
        let back = |code: &[u8]| (-2 - code.len() as i64) as u8;
        let branch = [0x70 | (random.next() & 15) as u8, back(&code)];
        code.extend(branch);
        code.extend([0xeb, back(&code)]);
        let mut state = fresh.clone();
        start(&mut random, &mut state);
        let ticks = 8 + random.next() % 16;
        let run = |processor: &mut Processor, ram: &mut Ram| {
            // Stores went anywhere: page tables, IDT and handlers as they were.
            ram.write(0x1000, &tables).unwrap();
            ram.write(CODE, &code).unwrap();
            processor.write_state(0, &state).unwrap();
            // Round and round: the first time fills the TLB, so that later ones stay in the hot
            // loop, where the branch may be fused with what is before it.
            let now = processor.now();
            let stop = processor.run(ram, &mut Nothing, now + ticks);
            (stop, processor.read_state(0))
        };
        let (stop, a) = run(&mut hot, &mut hot_ram);
        let (checked_stop, b) = run(&mut checked, &mut checked_ram);
        let mut decoder = Decoder::with_ip(64, &code, CODE, DecoderOptions::NONE);
        let i = decoder.decode();
        assert!(
            a == b,
            "{:?} {code:02x?}\nhot | checked\n{}",
            i.code(),
            differences(&a, &b)
        );
        assert_eq!(stop, checked_stop, "{code:02x?}");
        completed += usize::from(
            stop == Stop::Deadline
                && !(support::HANDLERS..support::HANDLERS + 0x1000).contains(&a.rip),
        );
    }
    assert!(hot_ram.bytes() == checked_ram.bytes(), "memory differs");
    assert!(
        completed > 15_000,
        "only {completed} instructions completed without a fault"
    );
}
