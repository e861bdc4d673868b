//! No bytes make the readers of nested states and of migration streams panic; what is read is written again as it was.

#![no_main]

use hypernest_vmcs::migration::nested_states;
use hypernest_vmcs::nested_state::Taker;
use hypernest_vmcs::{Layout, NestedState};
use libfuzzer_sys::fuzz_target;

// The first byte says what the vCPU is like.
fuzz_target!(|data: &[u8]| {
    let Some((&options, data)) = data.split_first() else {
        return;
    };
    let all: Vec<&Layout> = Layout::built_in().to_vec();
    let machines = [Layout::kvm(), Layout::hypernest()];
    let taker = Taker {
        vmx: options & 1 == 0,
        enlightened: options & 2 != 0,
        smm: options & 4 != 0,
        physical_bits: options >> 3 << 1,
        layouts: if options & 8 != 0 { &all } else { &machines },
    };
    if let Ok(state) = NestedState::read(data) {
        assert!(data.starts_with(&state.to_bytes()));
        judge(&state, &taker);
    }
    let mut last = None;
    for found in nested_states(data) {
        let offset = match found {
            Ok(found) => {
                let bytes = found.state.to_bytes();
                assert_eq!(NestedState::read(&bytes).as_ref(), Ok(&found.state));
                judge(&found.state, &taker);
                found.offset
            }
            Err(error) => {
                assert!(!error.to_string().contains('\n'));
                error.offset
            }
        };
        assert!(offset < data.len() && last < Some(offset));
        last = Some(offset);
    }
});

fn judge(state: &NestedState, taker: &Taker) {
    if let Err(refused) = state.check(taker) {
        assert!(refused.errno().number() != 0 && !refused.to_string().is_empty());
    }
    for layout in Layout::built_in() {
        for finding in state.findings(layout) {
            assert!(!finding.words().is_empty());
        }
    }
}
