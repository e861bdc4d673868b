//! Registers as text, in the form of QEMU's `-d cpu`, so that logs can be compared line by line.

use std::fmt::Write;

use hypernest_cpu::{Activity, SegmentState, TableState, VcpuState};

const CR0_PE: u64 = 1;
const EFER_LMA: u64 = 1 << 10;
const RIGHTS_LONG: u32 = 1 << 13;
const RIGHTS_BIG: u32 = 1 << 14;
const RIGHTS_GRANULARITY: u32 = 1 << 15;

/// Bits 16, 32 or 64 of the code that the vCPU executes.
pub fn code_bits(state: &VcpuState) -> u32 {
    let rights = state.segments.cs.rights;
    if rights & RIGHTS_LONG != 0 && state.msrs.efer & EFER_LMA != 0 {
        64
    } else if rights & RIGHTS_BIG != 0 {
        32
    } else {
        16
    }
}

/// Linear address of the next instruction.
pub fn code_address(state: &VcpuState) -> u64 {
    let linear = state.segments.cs.base.wrapping_add(state.rip);
    if code_bits(state) == 64 {
        state.rip
    } else {
        linear & 0xffff_ffff
    }
}

/// All registers but x87 and SSE, ending in a newline.
pub fn registers(state: &VcpuState) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_registers(&mut text, state);
    text
}

fn write_registers(out: &mut String, state: &VcpuState) -> std::fmt::Result {
    let wide = code_bits(state) == 64;
    if wide {
        const NAMES: [(&str, usize); 16] = [
            ("RAX", 0),
            ("RBX", 3),
            ("RCX", 1),
            ("RDX", 2),
            ("RSI", 6),
            ("RDI", 7),
            ("RBP", 5),
            ("RSP", 4),
            ("R8 ", 8),
            ("R9 ", 9),
            ("R10", 10),
            ("R11", 11),
            ("R12", 12),
            ("R13", 13),
            ("R14", 14),
            ("R15", 15),
        ];
        for line in NAMES.chunks(4) {
            let fields: Vec<String> = line
                .iter()
                .map(|(name, at)| format!("{name}={:016x}", state.gpr[*at]))
                .collect();
            writeln!(out, "{}", fields.join(" "))?;
        }
    } else {
        let [ax, cx, dx, bx, sp, bp, si, di] =
            [0, 1, 2, 3, 4, 5, 6, 7].map(|at: usize| state.gpr[at] as u32);
        writeln!(out, "EAX={ax:08x} EBX={bx:08x} ECX={cx:08x} EDX={dx:08x}")?;
        writeln!(out, "ESI={si:08x} EDI={di:08x} EBP={bp:08x} ESP={sp:08x}")?;
    }
    let (rip, flags) = (state.rip, state.rflags);
    if wide {
        write!(out, "RIP={rip:016x} RFL={flags:08x}")?;
    } else {
        write!(out, "EIP={:08x} EFL={flags:08x}", rip as u32)?;
    }
    let letters: String = [
        (10, 'D'),
        (11, 'O'),
        (7, 'S'),
        (6, 'Z'),
        (4, 'A'),
        (2, 'P'),
        (0, 'C'),
    ]
    .map(|(bit, letter)| if flags >> bit & 1 != 0 { letter } else { '-' })
    .into_iter()
    .collect();
    writeln!(
        out,
        " [{letters}] CPL={} II={} A20=1 SMM=0 HLT={}",
        state.segments.ss.rights >> 5 & 3,
        u8::from(state.sti_shadow || state.mov_ss_shadow),
        u8::from(state.activity == Activity::Halted),
    )?;
    let s = &state.segments;
    for (name, segment) in [
        ("ES ", s.es),
        ("CS ", s.cs),
        ("SS ", s.ss),
        ("DS ", s.ds),
        ("FS ", s.fs),
        ("GS ", s.gs),
        ("LDT", s.ldtr),
        ("TR ", s.tr),
    ] {
        write_segment(out, state, wide, name, &segment)?;
    }
    for (name, table) in [("GDT", state.gdtr), ("IDT", state.idtr)] {
        let TableState { base, limit } = table;
        if wide {
            writeln!(out, "{name}=     {base:016x} {limit:08x}")?;
        } else {
            writeln!(out, "{name}=     {:08x} {limit:08x}", base as u32)?;
        }
    }
    let (cr0, cr2, cr3, cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
    if wide {
        writeln!(
            out,
            "CR0={cr0:08x} CR2={cr2:016x} CR3={cr3:016x} CR4={cr4:08x}"
        )?;
    } else {
        writeln!(
            out,
            "CR0={cr0:08x} CR2={:08x} CR3={:08x} CR4={cr4:08x}",
            cr2 as u32, cr3 as u32
        )?;
    }
    let [dr0, dr1, dr2, dr3] = state.dr;
    writeln!(
        out,
        "DR0={dr0:016x} DR1={dr1:016x} DR2={dr2:016x} DR3={dr3:016x} "
    )?;
    writeln!(out, "DR6={:016x} DR7={:016x}", state.dr6, state.dr7)?;
    writeln!(out, "EFER={:016x}", state.msrs.efer)
}

fn write_segment(
    out: &mut String,
    state: &VcpuState,
    wide: bool,
    name: &str,
    segment: &SegmentState,
) -> std::fmt::Result {
    let rights = segment.rights;
    let SegmentState {
        selector,
        base,
        limit,
        ..
    } = *segment;
    let limit_high = if rights & RIGHTS_GRANULARITY != 0 {
        limit >> 28
    } else {
        limit >> 16 & 0xf
    };
    let flags = (rights & 0xff) << 8 | (rights & 0xf000) << 8 | limit_high << 16;
    if wide {
        write!(
            out,
            "{name}={selector:04x} {base:016x} {limit:08x} {flags:08x}"
        )?;
    } else {
        write!(
            out,
            "{name}={selector:04x} {:08x} {limit:08x} {flags:08x}",
            base as u32
        )?;
    }
    if state.cr0 & CR0_PE == 0 || rights & 0x80 == 0 {
        return writeln!(out);
    }
    write!(out, " DPL={} ", rights >> 5 & 3)?;
    let long_mode = state.msrs.efer & EFER_LMA != 0;
    let letter = |bit: u32, letter: char| if rights >> bit & 1 != 0 { letter } else { '-' };
    if rights & 0x10 == 0 {
        return writeln!(out, "{}", system_type(rights & 0xf, long_mode));
    }
    if rights & 8 != 0 {
        let size = if rights & RIGHTS_LONG != 0 {
            "CS64"
        } else if rights & RIGHTS_BIG != 0 {
            "CS32"
        } else {
            "CS16"
        };
        writeln!(
            out,
            "{size} [{}{}{}]",
            letter(2, 'C'),
            letter(1, 'R'),
            letter(0, 'A')
        )
    } else {
        let size = if rights & RIGHTS_BIG != 0 || long_mode {
            "DS  "
        } else {
            "DS16"
        };
        writeln!(
            out,
            "{size} [{}{}{}]",
            letter(2, 'E'),
            letter(1, 'W'),
            letter(0, 'A')
        )
    }
}

fn system_type(kind: u32, long_mode: bool) -> &'static str {
    match (kind, long_mode) {
        (2, _) => "LDT",
        (9, true) => "TSS64-avl",
        (11, true) => "TSS64-busy",
        (9, false) => "TSS32-avl",
        (11, false) => "TSS32-busy",
        (1, false) => "TSS16-avl",
        (3, false) => "TSS16-busy",
        _ => "Reserved",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reset() -> VcpuState {
        let model = &hypernest_cpu::Model::all()[0];
        VcpuState::reset(0, model)
    }

    #[test]
    fn reset_state_is_shown_in_the_32_bit_form() {
        let text = registers(&reset());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[2],
            "EIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0"
        );
        assert_eq!(lines[4], "CS =f000 ffff0000 0000ffff 00009b00");
        assert!(text.contains("CR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000\n"));
    }

    #[test]
    fn long_mode_is_shown_in_the_64_bit_form() {
        let mut state = reset();
        state.cr0 = 0x8000_0011;
        state.msrs.efer = 0x500;
        state.segments.cs = SegmentState {
            selector: 0x10,
            base: 0,
            limit: u32::MAX,
            rights: 0xa09b,
        };
        state.rip = 0xffff_ffff_8100_0000;
        state.rflags = 0x246;
        let text = registers(&state);
        assert!(text.contains("CS =0010 0000000000000000 ffffffff 00af9b00 DPL=0 CS64 [-RA]\n"));
        assert!(text.contains("RIP=ffffffff81000000 RFL=00000246 [---Z-P-] CPL=0 II=0"));
        assert_eq!(code_address(&state), 0xffff_ffff_8100_0000);
    }

    #[test]
    fn a_code_address_wraps_outside_64_bit_mode() {
        let mut state = reset();
        assert_eq!((code_bits(&state), code_address(&state)), (16, 0xffff_fff0));
        state.rip = 0x1_0000;
        assert_eq!(code_address(&state), 0);
    }
}
