//! The fields of the guest's segment registers.

use crate::field::Field;

/// The four fields of a segment register of the guest. Vol. 3C, "Guest Register State".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestSegment {
    /// The selector, 16 bits.
    pub selector: Field,
    /// The base address.
    pub base: Field,
    /// The limit in bytes, 32 bits.
    pub limit: Field,
    /// The access rights, 32 bits.
    pub rights: Field,
}

macro_rules! segments {
    ($($name:ident: $selector:ident, $base:ident, $limit:ident, $rights:ident;)*) => {
        impl GuestSegment {
            $(
                #[doc = concat!("The fields of ", stringify!($name), ".")]
                pub const $name: Self = Self {
                    selector: Field::$selector,
                    base: Field::$base,
                    limit: Field::$limit,
                    rights: Field::$rights,
                };
            )*
        }
    };
}

segments! {
    ES: GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_AR_BYTES;
    CS: GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_AR_BYTES;
    SS: GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_AR_BYTES;
    DS: GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_AR_BYTES;
    FS: GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_AR_BYTES;
    GS: GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_AR_BYTES;
    LDTR: GUEST_LDTR_SELECTOR, GUEST_LDTR_BASE, GUEST_LDTR_LIMIT, GUEST_LDTR_AR_BYTES;
    TR: GUEST_TR_SELECTOR, GUEST_TR_BASE, GUEST_TR_LIMIT, GUEST_TR_AR_BYTES;
}

impl GuestSegment {
    /// Those that hold data segments: all but CS, LDTR and TR.
    pub const DATA: [Self; 5] = [Self::ES, Self::SS, Self::DS, Self::FS, Self::GS];
}
