//! No text makes the reader of VMX profiles panic, and what it takes is refused or kept.

#![no_main]

use hypernest_cpu::{Model, VmxChoice, VmxProfile};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let choice = match VmxChoice::from_dump(&String::from_utf8_lossy(data)) {
        Ok(choice) => choice,
        Err(error) => {
            assert!(!error.to_string().contains('\n'));
            return;
        }
    };
    let model = <&Model>::default();
    match choice.profile(model) {
        Ok(profile) => {
            let profile = profile.expect("a dump means VMX");
            let max = VmxProfile::max(model).caps;
            assert!(profile.caps.missing(&max).is_empty());
            // What is advertised can be asked for again, and is the same then.
            let msrs = VmxChoice::Msrs(profile.caps.msrs().collect());
            assert_eq!(msrs.profile(model).as_ref().ok(), Some(&Some(profile)));
        }
        Err(refused) => {
            assert!(!refused.0.is_empty() && !refused.to_string().contains('\n'));
        }
    }
});
