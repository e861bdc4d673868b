//! Wild hypervisors never panic the processor and never see its blocks. The fuzz target `vmx` looks for more of
//! them.

use hypernest_cpu::Stop;
use hypernest_oracle::{Rng, nest};

/// Hypervisors in a normal run.
const HYPERVISORS: u64 = 3_000;

/// Hypervisors that are taken apart on their way.
const CARRIED: u64 = 200;

#[test]
fn random_hypervisors_run_to_their_deadline() {
    let (mut entered, mut often, mut far, mut unbuilt) = (0, 0, 0, 0);
    for seed in 0..HYPERVISORS {
        let mut rng = Rng::new(seed);
        let data: [u8; 1024] = rng.bytes();
        match std::panic::catch_unwind(|| nest::run(&data)) {
            Ok(None) => (),
            Ok(Some(end)) => {
                entered += u64::from(end.entered);
                often += u64::from(end.answered >= 3);
                far += u64::from(end.ending.stop == Stop::Deadline);
                unbuilt += u64::from(matches!(end.ending.stop, Stop::Unimplemented { .. }));
            }
            Err(_) => panic!("hypervisor of seed {seed}"),
        }
    }
    println!(
        "of {HYPERVISORS}, {entered} entered a guest, {often} answered three exits or more, {far} reached the deadline, {unbuilt} needed what is not built"
    );
    assert!(entered > HYPERVISORS / 3 && often > HYPERVISORS / 3);
}

#[test]
fn a_nested_state_taken_out_and_put_back_changes_nothing() {
    let (mut taken, mut in_guest, mut refused) = (0, 0, 0);
    for seed in 0..CARRIED {
        let mut rng = Rng::new(seed);
        let data: [u8; 1024] = rng.bytes();
        match std::panic::catch_unwind(|| nest::carry(&data)) {
            Ok(None) => (),
            Ok(Some(carried)) => {
                taken += carried.taken;
                in_guest += carried.in_guest;
                refused += carried.refused;
            }
            Err(_) => panic!("hypervisor of seed {seed}"),
        }
    }
    println!(
        "{taken} nested states taken, {in_guest} of them of guests that execute; {refused} refused"
    );
    assert!(u64::from(in_guest) > CARRIED && refused < in_guest / 10);
}
