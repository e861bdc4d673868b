//! Linear to guest-physical: the page walk (Vol. 3A, "Paging").

use crate::flags::bit;
use crate::ram::Ram;
use crate::trap::Fault;
use crate::vcpu::{Vcpu, cr};
use crate::vmx::apic;
use crate::vmx::ept::{self, Purpose, qualification};
use crate::vmx::exit::{Exit, uses_ept};
use crate::vmx::pml::Marks;

/// What an access wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// An access at CPL 3.
    User,
    /// An explicit access at CPL 0-2.
    Supervisor,
    /// An access to a descriptor table or TSS, whatever the CPL.
    Implicit,
}

/// A translation that may be cached.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    pub physical: u64,
    /// Linear-address bits that name the page: !0 << 12, 21, 22 or 30.
    pub span: u64,
    /// Writes are allowed to this privilege and D is set already.
    pub writable: bool,
    /// Reads (always, once a walk succeeds for data) and fetches.
    pub readable: bool,
    pub executable: bool,
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Miss {
    /// The guest's own page tables refuse it.
    Fault(Fault),
    /// Those of its hypervisor do.
    Exit(Exit),
}

impl From<Fault> for Miss {
    fn from(fault: Fault) -> Miss {
        Miss::Fault(fault)
    }
}

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;

/// Page-fault error code bits.
mod code {
    pub const PRESENT: u16 = 1;
    pub const WRITE: u16 = 1 << 1;
    pub const USER: u16 = 1 << 2;
    pub const RESERVED: u16 = 1 << 3;
    pub const FETCH: u16 = 1 << 4;
}

/// An entry in RAM; what is not RAM reads as all ones, which no paging mode accepts.
fn entry(ram: &Ram, address: u64, wide: bool) -> u64 {
    if wide {
        ram.load::<8>(address).map_or(u64::MAX, u64::from_le_bytes)
    } else {
        ram.load::<4>(address)
            .map_or(u64::MAX, |bytes| u64::from(u32::from_le_bytes(bytes)))
    }
}

/// Guest tables that a walk for `linear` reads, through EPT where it is on.
struct Tables<'a> {
    cpu: &'a Vcpu,
    linear: Option<u64>,
    marks: &'a mut Marks,
}

impl Tables<'_> {
    fn physical(&mut self, ram: &mut Ram, address: u64, access: Access) -> Result<u64, Miss> {
        if !uses_ept(self.cpu) {
            return Ok(address);
        }
        let purpose = Purpose {
            access,
            walk: true,
            linear: self.linear,
            page: 0,
        };
        let mapping =
            ept::translate(self.cpu, ram, address, purpose, self.marks).map_err(Miss::Exit)?;
        if apic::is_access_page(self.cpu, mapping.physical) {
            return Err(Miss::Exit(apic::guest_physical_exit(self.cpu)));
        }
        Ok(mapping.physical)
    }

    fn entry(&mut self, ram: &mut Ram, address: u64, wide: bool) -> Result<u64, Miss> {
        let physical = self.physical(ram, address, Access::Read)?;
        Ok(entry(ram, physical, wide))
    }

    fn set_bits(&mut self, ram: &mut Ram, address: u64, old: u64, bits: u64) -> Result<(), Miss> {
        if old & bits != bits {
            let physical = self.physical(ram, address, Access::Write)?;
            // Both bits are in the low byte. The entry was read from RAM, so this cannot fail.
            let _ = ram.write(physical, &[(old | bits) as u8]);
        }
        Ok(())
    }
}

/// Levels walked, for the A bits: at most four addresses and their entries.
struct Trail {
    steps: [(u64, u64); 4],
    len: usize,
}

impl Trail {
    fn push(&mut self, address: u64, entry: u64) {
        self.steps[self.len] = (address, entry);
        self.len += 1;
    }
}

/// Walks the page tables for `linear`. Sets A and D bits as an access would, where `marks` has flags.
pub(crate) fn walk(
    cpu: &Vcpu,
    ram: &mut Ram,
    linear: u64,
    access: Access,
    privilege: Privilege,
    marks: &mut Marks,
) -> Result<Mapping, Miss> {
    let guest = walk_guest(cpu, ram, linear, access, privilege, marks)?;
    if !uses_ept(cpu) {
        return Ok(guest.mapping);
    }
    let purpose = Purpose {
        access,
        walk: false,
        linear: Some(linear),
        page: guest.page,
    };
    let at = guest.mapping.physical | linear & 0xfff;
    let host = ept::translate(cpu, ram, at, purpose, marks).map_err(Miss::Exit)?;
    Ok(Mapping {
        physical: host.physical & !0xfff,
        span: guest.mapping.span,
        writable: guest.mapping.writable && host.writable,
        readable: guest.mapping.readable && host.readable,
        executable: guest.mapping.executable && host.executable,
    })
}

/// What the guest's own tables say.
struct Walked {
    mapping: Mapping,
    /// All levels together, as `qualification` has it.
    page: u64,
}

fn walk_guest(
    cpu: &Vcpu,
    ram: &mut Ram,
    linear: u64,
    access: Access,
    privilege: Privilege,
    marks: &mut Marks,
) -> Result<Walked, Miss> {
    if cpu.cr0 & cr::CR0_PG == 0 {
        let mapping = Mapping {
            physical: linear & 0xffff_f000,
            span: !0 << 12,
            writable: true,
            readable: true,
            executable: true,
        };
        return Ok(Walked {
            mapping,
            page: qualification::USER_PAGE | qualification::WRITABLE_PAGE,
        });
    }
    let mut tables = Tables {
        cpu,
        linear: Some(linear),
        marks,
    };
    let nxe = cpu.msrs.efer & cr::EFER_NXE != 0;
    let smep = cpu.cr4 & cr::CR4_SMEP != 0;
    let pae = cpu.cr4 & cr::CR4_PAE != 0;
    let fault = |extra: u16| {
        let mut error = extra;
        if access == Access::Write {
            error |= code::WRITE;
        }
        if privilege == Privilege::User {
            error |= code::USER;
        }
        if access == Access::Execute && (smep || nxe && pae) {
            error |= code::FETCH;
        }
        Fault::Page {
            address: linear,
            code: error,
        }
    };
    let reserved_high = !0u64 << cpu.model.physical_bits & !(0xfff << 52);
    let reserved_entry = |entry: u64, level_reserved: u64| {
        let mut reserved = level_reserved;
        if pae {
            reserved |= reserved_high;
            if !nxe {
                reserved |= NX;
            }
        }
        entry & reserved != 0
    };

    let mut trail = Trail {
        steps: [(0, 0); 4],
        len: 0,
    };
    // Permissions of all levels together: W and U of every one, NX of any.
    let mut allowed = W | U;
    let mut no_execute = false;
    let (frame, span, leaf) = if !pae {
        // 32-bit paging: two levels of 4-byte entries.
        let pde_at = cpu.cr3 & 0xffff_f000 | (linear >> 22 & 0x3ff) << 2;
        let pde = tables.entry(ram, pde_at, false)?;
        if pde & P == 0 {
            return Err(fault(0).into());
        }
        trail.push(pde_at, pde);
        allowed &= pde;
        if pde & PS != 0 && cpu.cr4 & cr::CR4_PSE != 0 {
            // PSE-36: bits 20:13 are address bits 39:32, as far as the model has them.
            let extra_bits = (cpu.model.physical_bits - 32).min(8);
            let reserved = (0x1fe000 << extra_bits | 1 << 21) & 0x3f_e000;
            if pde & reserved != 0 || pde == u64::MAX {
                return Err(fault(code::PRESENT | code::RESERVED).into());
            }
            let high = (pde >> 13 & 0xff) << 32;
            (
                pde & 0xffc0_0000 | high | linear & 0x3f_f000,
                !0u64 << 22,
                pde,
            )
        } else {
            let pte_at = pde & 0xffff_f000 | (linear >> 12 & 0x3ff) << 2;
            let pte = tables.entry(ram, pte_at, false)?;
            if pte & P == 0 {
                return Err(fault(0).into());
            }
            if pte == u64::MAX {
                return Err(fault(code::PRESENT | code::RESERVED).into());
            }
            trail.push(pte_at, pte);
            allowed &= pte;
            (pte & 0xffff_f000, !0u64 << 12, pte)
        }
    } else {
        let address_mask = !(!0u64 << cpu.model.physical_bits) & !0xfff;
        let (mut table, mut shift) = if cpu.long_mode() {
            (cpu.cr3 & address_mask, 39)
        } else {
            // PDPTEs were loaded and checked with CR3; they hold no permissions.
            let pdpte = cpu.pdpte[(linear >> 30 & 3) as usize];
            if pdpte & P == 0 {
                return Err(fault(0).into());
            }
            (pdpte & address_mask, 21)
        };
        loop {
            let at = table | (linear >> shift & 0x1ff) << 3;
            let value = tables.entry(ram, at, true)?;
            if value & P == 0 {
                return Err(fault(0).into());
            }
            let large = shift != 12 && value & PS != 0;
            let mut reserved = 0;
            if !cpu.long_mode() {
                // Bits 62:52 are reserved under PAE paging.
                reserved |= 0x7ff << 52;
            }
            if large {
                if shift == 39 || shift == 30 && !cpu.model.has_gigabyte_pages() {
                    reserved |= PS;
                } else {
                    reserved |= ((1u64 << shift) - 1) & !0x1fff;
                }
            }
            if reserved_entry(value, reserved) {
                return Err(fault(code::PRESENT | code::RESERVED).into());
            }
            trail.push(at, value);
            allowed &= value;
            no_execute |= value & NX != 0;
            if large || shift == 12 {
                let span = !0u64 << shift;
                let offset = linear & !span & !0xfff;
                break (value & address_mask & span | offset, span, value);
            }
            table = value & address_mask;
            shift -= 9;
        }
    };

    let user_page = allowed & U != 0;
    let smap = cpu.cr4 & cr::CR4_SMAP != 0;
    let wp = cpu.cr0 & cr::CR0_WP != 0;
    let data_ok = match privilege {
        Privilege::User => user_page,
        Privilege::Supervisor => !(smap && user_page && cpu.flags.rest & bit::AC == 0),
        Privilege::Implicit => !(smap && user_page),
    };
    let write_ok = data_ok && (allowed & W != 0 || privilege != Privilege::User && !wp);
    let execute_ok = !(no_execute && nxe)
        && if privilege == Privilege::User {
            user_page
        } else {
            !(smep && user_page)
        };
    let ok = match access {
        Access::Read => data_ok,
        Access::Write => write_ok,
        Access::Execute => execute_ok,
    };
    if !ok {
        return Err(fault(code::PRESENT).into());
    }
    let last = trail.len - 1;
    if tables.marks.flags {
        for (level, &(at, value)) in trail.steps[..trail.len].iter().enumerate() {
            let bits = if level == last && access == Access::Write {
                A | D
            } else {
                A
            };
            tables.set_bits(ram, at, value, bits)?;
        }
    }
    let mapping = Mapping {
        physical: frame,
        span,
        writable: write_ok && (access == Access::Write || leaf & D != 0),
        readable: data_ok,
        executable: execute_ok,
    };
    let mut page = 0;
    if user_page {
        page |= qualification::USER_PAGE;
    }
    if allowed & W != 0 {
        page |= qualification::WRITABLE_PAGE;
    }
    if no_execute && nxe {
        page |= qualification::NO_EXECUTE_PAGE;
    }
    Ok(Walked { mapping, page })
}

/// Loads the PDPTEs of PAE paging from CR3.
///
/// # Errors
/// #GP(0) when a present one has reserved bits set.
pub(crate) fn load_pdptes(
    cpu: &Vcpu,
    ram: &mut Ram,
    cr3: u64,
    marks: &mut Marks,
) -> Result<[u64; 4], Miss> {
    let mut tables = Tables {
        cpu,
        linear: None,
        marks,
    };
    let reserved = !0u64 << cpu.model.physical_bits | 0x1e6;
    let mut pdpte = [0; 4];
    for (n, slot) in pdpte.iter_mut().enumerate() {
        *slot = tables.entry(ram, (cr3 & 0xffff_ffe0) + 8 * n as u64, true)?;
        if *slot & P != 0 && *slot & reserved != 0 {
            return Err(Fault::GeneralProtection(0).into());
        }
    }
    Ok(pdpte)
}
