//! Bytes of a random instance of an instruction form.

use iced_x86::{Code, Decoder, DecoderOptions, EncodingKind, Instruction};
use iced_x86::{MandatoryPrefix, OpCodeInfo, OpCodeOperandKind, OpCodeTableKind};

use crate::case::Mode;
use crate::rng::Rng;

/// A random instance of `code` at address `ip`, with the decoded instruction. `None` after too
/// many attempts that were something else.
pub fn instance(rng: &mut Rng, code: Code, mode: Mode, ip: u64) -> Option<(Vec<u8>, Instruction)> {
    for _ in 0..300 {
        let mut bytes = emit(rng, code.op_code(), mode);
        let mut decoder = Decoder::with_ip(mode.bits(), &bytes, ip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.code() == code && !instruction.is_invalid() {
            bytes.truncate(instruction.len());
            return Some((bytes, instruction));
        }
    }
    None
}

fn emit(rng: &mut Rng, info: &OpCodeInfo, mode: Mode) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32);
    match info.encoding() {
        EncodingKind::Legacy => legacy_prefixes(rng, info, mode, &mut bytes),
        _ => {
            segment_and_address(rng, info, mode, &mut bytes);
            vex_prefix(rng, info, mode, &mut bytes);
        }
    }
    opcode(rng, info, &mut bytes);
    tail(rng, info, &mut bytes);
    bytes
}

fn segment_and_address(rng: &mut Rng, info: &OpCodeInfo, mode: Mode, bytes: &mut Vec<u8>) {
    let fixed = info.address_size();
    let override_address = if fixed == 0 {
        mode == Mode::Long && rng.one_in(10)
    } else {
        fixed != mode.bits()
    };
    if override_address {
        bytes.push(0x67);
    }
    if rng.one_in(6) {
        bytes.push(rng.pick(&[0x64, 0x65, 0x64, 0x65, 0x26, 0x2e, 0x36, 0x3e]));
    }
}

fn legacy_prefixes(rng: &mut Rng, info: &OpCodeInfo, mode: Mode, bytes: &mut Vec<u8>) {
    segment_and_address(rng, info, mode, bytes);
    if info.operand_size() == 16 {
        bytes.push(0x66);
    }
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => bytes.push(0x66),
        MandatoryPrefix::PF3 => bytes.push(0xf3),
        MandatoryPrefix::PF2 => bytes.push(0xf2),
        MandatoryPrefix::None if rng.one_in(40) => {
            // AMD takes 66 before near branches in 64-bit mode for an operand size, Intel ignores
            // it (Vol. 2, "JMP": "In 64-bit mode, the instruction's operation size is fixed").
            let no_66 = mode == Mode::Long && info.intel_force_op_size64();
            bytes.push(rng.pick(&[0xf2, 0xf3, if no_66 { 0xf2 } else { 0x66 }]));
        }
        _ => (),
    }
    if rng.one_in(if info.can_use_lock_prefix() { 3 } else { 250 }) {
        bytes.push(0xf0);
    }
    if info.can_use_rep_prefix() && rng.one_in(2) {
        bytes.push(0xf3);
    }
    if info.can_use_repne_prefix() && rng.one_in(3) {
        bytes.push(0xf2);
    }
    for i in (1..bytes.len()).rev() {
        bytes.swap(i, rng.below(i as u64 + 1) as usize);
    }
    if mode == Mode::Long {
        rex_prefix(rng, info, bytes);
    }
}

fn rex_prefix(rng: &mut Rng, info: &OpCodeInfo, bytes: &mut Vec<u8>) {
    let mut rex = 0;
    for bit in [1, 2, 4] {
        if rng.one_in(3) {
            rex |= bit;
        }
    }
    let wide = match info.operand_size() {
        64 => !(info.default_op_size64() || info.force_op_size64()) || rng.one_in(4),
        0 => rng.one_in(6),
        _ => false,
    };
    if wide {
        rex |= 8;
    }
    if rex != 0 || rng.one_in(8) {
        bytes.push(0x40 | rex);
        if rng.one_in(150) && !wide {
            // A prefix after REX makes it meaningless.
            let last = bytes.len() - 1;
            bytes.swap(0, last);
        }
    }
}

fn vex_prefix(rng: &mut Rng, info: &OpCodeInfo, mode: Mode, bytes: &mut Vec<u8>) {
    let map = match info.table() {
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        _ => 3,
    };
    // R, X, B are stored inverted; outside 64-bit mode they are ones.
    let rxb = if mode == Mode::Long {
        (rng.bits() as u8) & 0xe0
    } else {
        0xe0
    };
    let pp = match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    };
    let vvvv = (rng.bits() as u8) & 0x78;
    let w = (info.w() as u8) << 7;
    bytes.extend_from_slice(&[0xc4, rxb | map, w | vvvv | (info.l() as u8) << 2 | pp]);
}

fn opcode(rng: &mut Rng, info: &OpCodeInfo, bytes: &mut Vec<u8>) {
    if info.encoding() == EncodingKind::Legacy {
        match info.table() {
            OpCodeTableKind::T0F => bytes.push(0x0f),
            OpCodeTableKind::T0F38 => bytes.extend_from_slice(&[0x0f, 0x38]),
            OpCodeTableKind::T0F3A => bytes.extend_from_slice(&[0x0f, 0x3a]),
            _ => (),
        }
    }
    let mut opcode = info.op_code();
    let in_opcode = info.op_kinds().iter().any(|kind| {
        use OpCodeOperandKind::{r8_opcode, r16_opcode, r32_opcode, r64_opcode, sti_opcode};
        matches!(
            *kind,
            r8_opcode | r16_opcode | r32_opcode | r64_opcode | sti_opcode
        )
    });
    if in_opcode {
        opcode |= rng.below(8) as u32;
    }
    if info.op_code_len() == 2 {
        bytes.push((opcode >> 8) as u8);
    }
    bytes.push(opcode as u8);
}

/// ModRM, SIB, displacement and immediate: random bytes of which the decoder takes what it needs.
fn tail(rng: &mut Rng, info: &OpCodeInfo, bytes: &mut Vec<u8>) {
    let memory = info.op_kinds().iter().any(|kind| {
        use OpCodeOperandKind::{mem, mem_mib, mem_offs};
        matches!(*kind, mem | mem_mib | mem_offs)
    });
    let mut modrm = rng.bits() as u8;
    if memory {
        if modrm >= 0xc0 {
            modrm &= 0x3f;
        }
    } else if rng.one_in(3) {
        modrm |= 0xc0;
    }
    let has_reg_field = info.group_index() >= 0 || info.rm_group_index() >= 0;
    if info.group_index() >= 0 {
        modrm = modrm & 0xc7 | (info.group_index() as u8) << 3;
    }
    if info.rm_group_index() >= 0 {
        modrm = modrm & 0xf8 | info.rm_group_index() as u8;
    }
    let pattern = rng.below(8);
    let byte = |rng: &mut Rng| match pattern {
        0 => 0,
        1 => 0xff,
        2 => rng.pick(&[0, 1, 0x7f, 0x80, 0xff]),
        _ => rng.bits() as u8,
    };
    // An immediate directly after the opcode deserves the same boundary values.
    let first = if has_reg_field || memory || pattern > 2 || has_modrm(info) {
        modrm
    } else {
        byte(rng)
    };
    bytes.push(first);
    for _ in 0..14 {
        bytes.push(byte(rng));
    }
}

fn has_modrm(info: &OpCodeInfo) -> bool {
    info.op_kinds().iter().any(|kind| {
        let name = format!("{kind:?}");
        name.ends_with("_reg") || name.ends_with("_or_mem") || name.ends_with("_rm")
    })
}
