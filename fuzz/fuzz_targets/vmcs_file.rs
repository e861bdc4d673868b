//! No bytes make a reader of VMCS files panic: layout tables, kernel logs, nested states, regions. What
//! is taken can be written again.

#![no_main]

use hypernest_vmcs::nested_state::Taker;
use hypernest_vmcs::{Dump, Layout, Losses, NestedState, Translation, identify};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let own = match Layout::from_table(&text) {
        Ok(layout) => {
            let again = Layout::from_table(&layout.to_table()).expect("a table of a layout");
            assert_eq!(
                (again.slots(), again.used()),
                (layout.slots(), layout.used())
            );
            Some(layout)
        }
        Err(error) => {
            assert!(!error.to_string().contains('\n'));
            None
        }
    };
    if let Err(error) = Dump::read(&text) {
        assert!(!error.to_string().contains('\n'));
    }
    let layouts = [Layout::kvm()];
    if let Ok(state) = NestedState::read(data) {
        assert!(data.starts_with(&state.to_bytes()));
        let _ = state.check(&Taker {
            vmx: true,
            enlightened: true,
            smm: false,
            physical_bits: 46,
            layouts: &layouts,
        });
        let _ = state.findings(Layout::kvm());
    }
    let candidates = Layout::built_in().iter().copied().chain(own.as_ref());
    for candidate in identify(data, candidates) {
        let vmcs = candidate
            .layout
            .read(data)
            .expect("a candidate can be read");
        for to in Layout::built_in() {
            let mut out = vec![0; to.size()];
            let map = Translation::new(candidate.layout, to);
            map.run(data, &mut out, Losses::Allowed)
                .expect("long enough");
            let mut truth = vec![0; to.size()];
            to.write(&vmcs, &mut truth).expect("long enough");
            assert!(out == truth);
        }
    }
});
