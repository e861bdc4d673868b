//! Extended page tables: guest-physical to physical (Vol. 3C, "Extended Page-Table Mechanism").

use hypernest_vmcs::{ExitReason, proc2};

use super::exit::Exit;
use super::pml::Marks;
use crate::paging::Access;
use crate::ram::Ram;
use crate::vcpu::Vcpu;

const READ: u64 = 1;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
/// With mode-based execute control: fetches of user-mode linear addresses.
const EXECUTE_USER: u64 = 1 << 10;
/// Suppress #VE.
const SUPPRESS_VE: u64 = 1 << 63;

/// EPTP: accessed and dirty flags.
const EPTP_AD: u64 = 1 << 6;

/// IA32_VMX_EPT_VPID_CAP.
const CAP_EXECUTE_ONLY: u64 = 1;
const CAP_2M: u64 = 1 << 16;
const CAP_1G: u64 = 1 << 17;
const CAP_AD: u64 = 1 << 21;
const CAP_ADVANCED: u64 = 1 << 22;

/// Exit qualification of EPT violations.
pub(crate) mod qualification {
    pub const LINEAR: u64 = 1 << 7;
    pub const TRANSLATED: u64 = 1 << 8;
    /// What the guest's own paging says of the linear address (advanced information).
    pub const USER_PAGE: u64 = 1 << 9;
    pub const WRITABLE_PAGE: u64 = 1 << 10;
    pub const NO_EXECUTE_PAGE: u64 = 1 << 11;
}

/// What an access to guest-physical memory is for.
#[derive(Clone, Copy)]
pub(crate) struct Purpose {
    pub access: Access,
    /// To an entry of the guest's own page tables.
    pub walk: bool,
    /// The linear address it is for; none for page-directory-pointer loads.
    pub linear: Option<u64>,
    /// Advanced information about the linear address, of `qualification`. Whether it is a user-mode one
    /// counts for mode-based execute control too.
    pub page: u64,
}

/// Where guest-physical memory lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    /// Physical address of the byte.
    pub physical: u64,
    pub readable: bool,
    /// Writable, with its dirty flag set where there are such flags.
    pub writable: bool,
    pub executable: bool,
}

/// Whether an EPT pointer is one that VM entry and INVEPT take.
pub(crate) fn pointer_is_valid(cpu: &Vcpu, eptp: u64) -> bool {
    let Some(caps) = cpu.vmx.caps().map(|caps| caps.ept_vpid) else {
        return false;
    };
    let kind = eptp & 7;
    let kind_ok = kind == 6 && caps & 1 << 14 != 0 || kind == 0 && caps & 1 << 8 != 0;
    let walk_ok = eptp >> 3 & 7 == 3 && caps & 1 << 6 != 0;
    let flags_ok = eptp & EPTP_AD == 0 || caps & CAP_AD != 0;
    kind_ok && walk_ok && flags_ok && eptp & 0xf80 == 0 && eptp & cpu.model.reserved_physical() == 0
}

/// Physical address of guest-physical `address`, or the VM exit that finding it is.
pub(crate) fn translate(
    cpu: &Vcpu,
    ram: &mut Ram,
    address: u64,
    purpose: Purpose,
    marks: &mut Marks,
) -> Result<Mapping, Exit> {
    let Some(eptp) = cpu.vmx.controls.eptp.filter(|_| cpu.vmx.non_root) else {
        return Ok(Mapping {
            physical: address,
            readable: true,
            writable: true,
            executable: true,
        });
    };
    let caps = cpu.vmx.caps().map_or(0, |caps| caps.ept_vpid);
    let mode_based = cpu
        .vmx
        .controls
        .proc2(proc2::MODE_BASED_EXECUTE_CONTROL_FOR_EPT);
    let flags = eptp & EPTP_AD != 0;
    let wanted = match purpose.access {
        // With accessed and dirty flags, using a guest's page tables counts as writing them.
        Access::Read if purpose.walk && flags => READ | WRITE,
        Access::Read => READ,
        Access::Write if purpose.walk => READ | WRITE,
        Access::Write => WRITE,
        Access::Execute => EXECUTE,
    };
    let present_bits = READ | WRITE | EXECUTE | if mode_based { EXECUTE_USER } else { 0 };
    let misconfigured = || Exit {
        guest_physical: Some(address),
        ..Exit::new(ExitReason::EPT_MISCONFIGURATION)
    };
    // `deciding`: the entry that is not present, or the leaf, which may suppress #VE.
    let violation = |allowed: u64, deciding: u64| {
        let mut qualification = wanted | (allowed & 7) << 3;
        if mode_based && allowed & EXECUTE_USER != 0 {
            qualification |= 1 << 6;
        }
        if purpose.linear.is_some() {
            qualification |= qualification::LINEAR;
            if !purpose.walk {
                qualification |= qualification::TRANSLATED;
                if caps & CAP_ADVANCED != 0 {
                    qualification |= purpose.page;
                }
            }
        }
        Exit {
            qualification,
            guest_physical: Some(address),
            linear: purpose.linear,
            convertible: deciding & SUPPRESS_VE == 0,
            ..Exit::new(ExitReason::EPT_VIOLATION)
        }
    };
    if address >> 48 != 0 {
        return Err(violation(0, SUPPRESS_VE));
    }
    let frame_mask = !(!0u64 << cpu.model.physical_bits) & !0xfff;
    let reserved_high = !0u64 << cpu.model.physical_bits & !(0xfff << 52);
    let mut table = eptp & frame_mask;
    let mut shift = 39;
    let mut allowed = present_bits;
    let mut steps = [(0u64, 0u64); 4];
    let mut used = 0;
    let leaf_span = loop {
        let at = table | (address >> shift & 0x1ff) << 3;
        // What is not RAM reads as ones, which no entry may be.
        let value = ram.load::<8>(at).map_or(u64::MAX, u64::from_le_bytes);
        if value & present_bits == 0 {
            return Err(violation(0, value));
        }
        let large = shift != 12 && value & LARGE != 0;
        let leaf = large || shift == 12;
        let mut reserved = reserved_high;
        if leaf {
            if large {
                let offered = match shift {
                    21 => caps & CAP_2M != 0,
                    30 => caps & CAP_1G != 0,
                    _ => false,
                };
                if !offered {
                    reserved |= LARGE;
                }
                reserved |= ((1u64 << shift) - 1) & !0xfff;
            }
        } else {
            reserved |= 0x78;
        }
        let write_only = value & (READ | WRITE) == WRITE;
        let execute_bits = EXECUTE | if mode_based { EXECUTE_USER } else { 0 };
        let execute_only = value & READ == 0 && value & execute_bits != 0;
        let bad_type = leaf && matches!(value >> 3 & 7, 2 | 3 | 7);
        if value & reserved != 0
            || write_only
            || execute_only && caps & CAP_EXECUTE_ONLY == 0
            || bad_type
        {
            return Err(misconfigured());
        }
        allowed &= value;
        steps[used] = (at, value);
        used += 1;
        if leaf {
            break !0u64 << shift;
        }
        table = value & frame_mask;
        shift -= 9;
    };
    let executable = if mode_based && purpose.page & qualification::USER_PAGE != 0 {
        allowed & EXECUTE_USER != 0
    } else {
        allowed & EXECUTE != 0
    };
    let granted = match purpose.access {
        Access::Execute => executable,
        _ => allowed & wanted == wanted,
    };
    let (leaf_at, leaf) = steps[used - 1];
    if !granted {
        return Err(violation(allowed, leaf));
    }
    let writes = wanted & WRITE != 0;
    if flags && marks.flags {
        for &(at, value) in &steps[..used] {
            let bits = ACCESSED | if writes && at == leaf_at { DIRTY } else { 0 };
            let changed = bits & !value;
            if changed != 0 {
                // The first change asks for all: the index moves with the last.
                marks.make_room()?;
                // Read from RAM before, so that this cannot fail.
                let _ = ram.write(at, &(value | bits).to_le_bytes());
            }
            if changed & DIRTY != 0 {
                marks.dirtied(ram, address);
            }
        }
    }
    Ok(Mapping {
        physical: leaf & frame_mask & leaf_span | address & !leaf_span,
        readable: allowed & READ != 0,
        writable: allowed & WRITE != 0 && (!flags || writes || leaf & DIRTY != 0),
        executable,
    })
}
