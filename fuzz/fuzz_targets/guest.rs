//! No guest makes the processor panic, hang, run past its deadline, or show how long its blocks are.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    hypernest_oracle::wild::run(data);
});
