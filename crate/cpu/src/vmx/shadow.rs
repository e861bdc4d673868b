//! VMCS shadowing (Vol. 3C, "VMCS Types: Ordinary and Shadow", "VMREAD", "VMWRITE"): fields that a
//! guest reads and writes in the VMCS that the link pointer names.

use hypernest_vmcs::{Field, Slot, proc2};
use iced_x86::{Instruction, Mnemonic};

use super::intercept::bitmap_byte;
use super::memory::{self, Border};
use crate::mem::Ctx;

/// Whether the guest's VMREAD or VMWRITE of the field with this encoding goes to its shadow VMCS.
pub(super) fn permits(x: &mut Ctx, i: &Instruction, encoding: u64) -> bool {
    if !x.cpu.vmx.controls.proc2(proc2::VMCS_SHADOWING) || encoding > 0x7fff {
        return false;
    }
    let bitmap = if i.mnemonic() == Mnemonic::Vmread {
        Field::VMREAD_BITMAP
    } else {
        Field::VMWRITE_BITMAP
    };
    let page = x.cpu.vmx.vmcs.get(bitmap);
    bitmap_byte(x, page, encoding / 8) >> (encoding & 7) & 1 == 0
}

/// The VMCS that the guest's VMREAD and VMWRITE reach. `None` where the link pointer names none.
pub(super) fn region(x: &Ctx) -> Option<u64> {
    let link = x.cpu.vmx.vmcs.get(Field::VMCS_LINK_POINTER);
    (link != !0).then_some(link)
}

/// The place of a field in the VMCS region at `region`, with its address: by the layout that the region
/// has now. `None` where the field or the layout is not known.
fn place(x: &mut Ctx, region: u64, field: Field) -> Option<(u64, Slot)> {
    memory::cross(x, Border::Shadow);
    let revision = memory::revision(x, region) & !memory::SHADOW;
    let profile = x.cpu.vmx.profile.as_ref()?;
    let slot = profile.regions().map(revision)?.place(field)?;
    Some((region.wrapping_add(u64::from(slot.offset)), slot))
}

/// A field of the VMCS at `region`.
pub(super) fn read(x: &mut Ctx, region: u64, field: Field) -> u64 {
    let mut bytes = [0; 8];
    let Some((at, slot)) = place(x, region, field) else {
        return 0;
    };
    x.load_physical(at, &mut bytes[..usize::from(slot.width)]);
    slot.value(u64::from_le_bytes(bytes))
}

/// Changes a field of the VMCS at `region`.
pub(super) fn write(x: &mut Ctx, region: u64, field: Field, value: u64) {
    if let Some((at, slot)) = place(x, region, field) {
        let bytes = slot.stored(value).to_le_bytes();
        x.store_physical(at, &bytes[..usize::from(slot.width)]);
    }
}
