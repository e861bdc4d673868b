//! Hypercalls (TLFS, "Hypercall Interface"): those that flush translations, of L1 and, where its hypervisor
//! lets it, of L2.

use super::{Flush, HyperV, assist_page};
use crate::mem::Ctx;
use crate::paging::Access;
use crate::trap::{Exec, Trap, UD};
use crate::vcpu::{Vcpu, reg};
use crate::vmx::ept::{self, Purpose};
use crate::vmx::pml::Marks;

mod call {
    pub const FLUSH_SPACE: u16 = 0x0002;
    pub const FLUSH_LIST: u16 = 0x0003;
    pub const FLUSH_SPACE_EX: u16 = 0x0013;
    pub const FLUSH_LIST_EX: u16 = 0x0014;
    pub const FLUSH_GUEST_PHYSICAL_SPACE: u16 = 0x00af;
    pub const FLUSH_GUEST_PHYSICAL_LIST: u16 = 0x00b0;
}

mod status {
    pub const SUCCESS: u16 = 0;
    pub const INVALID_CODE: u16 = 2;
    pub const INVALID_INPUT: u16 = 3;
    pub const INVALID_ALIGNMENT: u16 = 4;
    pub const INVALID_PARAMETER: u16 = 5;
}

/// Flags of the flushes: all processors, whatever the mask.
const ALL_PROCESSORS: u64 = 1;
/// Formats of a set of processors: sparse banks of 64, all.
const SPARSE: u64 = 0;
const EVERY: u64 = 1;
/// Most elements of a list, which is in one page with its header.
const MOST: u64 = 510;

/// In the VP assist page, the features of nested control: direct hypercalls (0).
const NESTED_FEATURES: u64 = 32;
/// In the partition assist page: a count that asks for an exit after each direct flush.
const LOCK_COUNT: u64 = 0;

/// The general register that the second half of a fast input is in.
const R8: usize = 8;

/// What a hypercall is given.
#[derive(Clone, Copy)]
struct Input {
    code: u16,
    fast: bool,
    repeats: u64,
    start: u64,
    /// Address of the input, or its first eight bytes.
    input: u64,
    /// Its second eight bytes, where it is fast.
    second: u64,
}

impl Input {
    fn new(cpu: &Vcpu) -> Input {
        let pair = |high: usize, low: usize| cpu.gpr[high] << 32 | cpu.gpr[low] & 0xffff_ffff;
        let (control, input, second) = if cpu.is_64() {
            (cpu.gpr[reg::RCX], cpu.gpr[reg::RDX], cpu.gpr[R8])
        } else {
            (
                pair(reg::RDX, reg::RAX),
                pair(reg::RBX, reg::RCX),
                pair(reg::RDI, reg::RSI),
            )
        };
        Input {
            code: control as u16,
            fast: control >> 16 & 1 != 0,
            repeats: control >> 32 & 0xfff,
            start: control >> 48 & 0xfff,
            input,
            second,
        }
    }

    fn is_flush(&self) -> bool {
        matches!(
            self.code,
            call::FLUSH_SPACE | call::FLUSH_LIST | call::FLUSH_SPACE_EX | call::FLUSH_LIST_EX
        )
    }
}

/// Whether VMCALL is a hypercall: there is the interface, and the guest has said who it is.
pub(crate) fn enabled(cpu: &Vcpu) -> bool {
    let hyperv = cpu.hyperv.as_ref();
    hyperv.is_some_and(|hyperv| hyperv.state.guest_os_id != 0)
}

/// Whether a VMCALL of L2 is a flush that L1 lets it do without an exit (TLFS, "Direct Virtual Flush").
pub(crate) fn taken_from_guest(x: &mut Ctx) -> bool {
    let guest = x.cpu.hyperv.as_ref().map(|hyperv| hyperv.state.nested);
    if x.cpu.vmx.enlightened.is_none()
        || !enabled(x.cpu)
        || !guest.is_some_and(|guest| guest.direct_flush)
        || !Input::new(x.cpu).is_flush()
    {
        return false;
    }
    let Some(page) = assist_page(x.cpu) else {
        return false;
    };
    let mut features = [0; 4];
    x.load_physical(page + NESTED_FEATURES, &mut features);
    features[0] & 1 != 0
}

/// VMCALL as a hypercall. #UD outside level 0 and protected mode.
pub(crate) fn hypercall(x: &mut Ctx) -> Exec {
    if x.cpu.cpl != 0 || x.cpu.uses_paragraphs() {
        return Err(UD);
    }
    let input = Input::new(x.cpu);
    let mut result = match perform(x, input) {
        Ok(repeats) => u64::from(status::SUCCESS) | repeats << 32,
        Err(status) => u64::from(status),
    };
    if x.cpu.vmx.non_root && result as u16 == status::SUCCESS {
        match lock_count(x) {
            Some(0) => {}
            Some(_) => {
                x.cpu.vmx.trap_after_flush = true;
                x.cpu.leave_block = true;
            }
            None => result = status::INVALID_INPUT.into(),
        }
    }
    if x.cpu.is_64() {
        x.cpu.gpr[reg::RAX] = result;
    } else {
        x.cpu.gpr[reg::RAX] = result & 0xffff_ffff;
        x.cpu.gpr[reg::RDX] = result >> 32;
    }
    x.cpu.touched_outside();
    Ok(())
}

fn lock_count(x: &mut Ctx) -> Option<u32> {
    let guest = x.cpu.hyperv.as_ref()?.state.nested;
    let count = x.ram.load::<4>(guest.partition_assist + LOCK_COUNT).ok()?;
    Some(u32::from_le_bytes(count))
}

/// The VM exit that L1 asks for after a direct flush, where one is due.
pub(crate) fn trap_after_flush(cpu: &mut Vcpu) -> Option<Trap> {
    core::mem::take(&mut cpu.vmx.trap_after_flush).then(|| crate::vmx::enlightened::flushed(cpu))
}

/// How many elements were done, or why it failed.
fn perform(x: &mut Ctx, input: Input) -> Result<u64, u16> {
    let guest = x.cpu.vmx.non_root;
    let flush = match input.code {
        call::FLUSH_SPACE | call::FLUSH_LIST => processors(x, input, false)?,
        call::FLUSH_SPACE_EX | call::FLUSH_LIST_EX => processors(x, input, true)?,
        call::FLUSH_GUEST_PHYSICAL_SPACE | call::FLUSH_GUEST_PHYSICAL_LIST if !guest => {
            let [eptp, flags] = words(x, input, 0)?;
            if flags != 0 {
                return Err(status::INVALID_PARAMETER);
            }
            Flush::Mappings { eptp }
        }
        _ => return Err(status::INVALID_CODE),
    };
    let repeats = match input.code {
        call::FLUSH_LIST | call::FLUSH_LIST_EX | call::FLUSH_GUEST_PHYSICAL_LIST => {
            if input.fast
                || input.repeats == 0
                || input.repeats > MOST
                || input.start >= input.repeats
            {
                return Err(status::INVALID_INPUT);
            }
            input.repeats
        }
        _ if input.repeats != 0 || input.start != 0 => return Err(status::INVALID_INPUT),
        _ => 0,
    };
    if let Some(hyperv) = &mut x.cpu.hyperv {
        hyperv.order(flush);
    }
    Ok(repeats)
}

impl HyperV {
    /// All vCPUs do it before one of them runs again; the list of ranges that may come with it only narrows it.
    fn order(&mut self, flush: Flush) {
        if self.flushes.last() != Some(&flush) {
            self.flushes.push(flush);
        }
    }
}

/// Whose translations a flush is about.
fn processors(x: &mut Ctx, input: Input, ex: bool) -> Result<Flush, u16> {
    let [_space, flags] = words(x, input, 0)?;
    let mask = if ex {
        if input.fast {
            return Err(status::INVALID_INPUT);
        }
        let [format, banks] = words(x, input, 16)?;
        match format {
            EVERY => !0,
            // There is no processor beyond the first bank.
            SPARSE if banks & 1 != 0 => words(x, input, 32)?[0],
            SPARSE => 0,
            _ => return Err(status::INVALID_PARAMETER),
        }
    } else if flags & ALL_PROCESSORS != 0 {
        !0
    } else if input.fast {
        // Its third word would be in an XMM register, which is not offered.
        return Err(status::INVALID_INPUT);
    } else {
        words(x, input, 16)?[0]
    };
    let mask = if flags & ALL_PROCESSORS != 0 {
        !0
    } else {
        mask
    };
    let guest = x.cpu.hyperv.as_ref().map(|hyperv| hyperv.state.nested);
    Ok(match guest.filter(|_| x.cpu.vmx.non_root) {
        Some(guest) => Flush::Guests {
            vm_id: guest.vm_id,
            processors: mask,
        },
        None => Flush::Processors(mask),
    })
}

/// Two words of the input, `at` bytes in.
fn words(x: &mut Ctx, input: Input, at: u64) -> Result<[u64; 2], u16> {
    if input.fast {
        return Ok([input.input, input.second]);
    }
    if input.input & 7 != 0 {
        return Err(status::INVALID_ALIGNMENT);
    }
    let mut words = [0; 2];
    for (n, word) in (0u64..).zip(&mut words) {
        let address = input.input.wrapping_add(at + 8 * n);
        let physical = physical(x, address).ok_or(status::INVALID_INPUT)?;
        let bytes = x.ram.load::<8>(physical);
        *word = u64::from_le_bytes(bytes.map_err(|_| status::INVALID_INPUT)?);
    }
    Ok(words)
}

/// The physical address of one that the caller gave: L2's go through its EPT.
fn physical(x: &mut Ctx, address: u64) -> Option<u64> {
    if !x.cpu.vmx.non_root {
        return Some(address);
    }
    let purpose = Purpose {
        access: Access::Read,
        walk: false,
        linear: None,
        page: 0,
    };
    let mapping = ept::translate(x.cpu, x.ram, address, purpose, &mut Marks::none()).ok()?;
    Some(mapping.physical)
}
