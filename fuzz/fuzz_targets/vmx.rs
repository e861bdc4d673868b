//! No VMCS, extended page table, MSR list or bitmap makes the processor panic, hang, run past its deadline, or show how
//! long its blocks are.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    hypernest_oracle::nest::run(data);
});
