//! CPU models: what CPUID lists and what follows from it.

/// A CPU model.
#[derive(Debug)]
pub(crate) struct Model {
    /// Guest-physical address bits (MAXPHYADDR).
    pub physical_bits: u32,
}

impl Model {
    /// 1 GiB pages.
    pub fn has_gigabyte_pages(&self) -> bool {
        true
    }
}
