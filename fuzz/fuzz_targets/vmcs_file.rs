//! No file makes what `hypernest vmcs` asks of it panic: what it is, its layout, its fields, the checks of VM entry, a
//! translation, a comparison.

#![no_main]

use hypernest_cpu::{Model, VmxProfile};
use hypernest_vmcs::{File, Layout, Losses, NestedState, Translation, identify};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for candidate in identify(data, Layout::built_in().iter().copied()) {
        let read = candidate.layout.read(data);
        read.expect("a candidate can be read");
    }
    let file = match File::read(data.to_vec()) {
        Ok(file) => file,
        Err(error) => {
            assert!(!error.to_string().contains('\n'));
            return;
        }
    };
    let found = match file.vmcs(None) {
        Ok(found) => found,
        Err(error) => {
            assert!(!error.to_string().contains('\n'));
            return;
        }
    };
    let caps = VmxProfile::kvm(<&Model>::default()).caps;
    let lint = found.lint(&caps);
    assert!(lint.failed.len() + lint.not_judged.len() <= lint.checks);
    assert!(lint.failed.iter().all(|(_, says)| !says.contains('\n')));
    assert!(found.differences(&found).is_empty());

    let from = found.layout.as_ref().unwrap_or(Layout::hypernest());
    let to = Layout::built_in()[data.len() % Layout::built_in().len()];
    let map = Translation::new(from, to);
    let done = file.translate(&map, Losses::Allowed);
    // The second image of a nested state may be of another revision, or cut.
    let Ok(done) = done else {
        assert!(matches!(file, File::NestedState(_)));
        return;
    };
    let strict = file.translate(&map, Losses::Refused);
    if file.losses(&map).is_empty() && !found.vmcs.launched {
        let shadow = matches!(&file, File::NestedState(state) if state.shadow_image().is_some());
        assert!(strict.is_ok() || shadow);
    } else if !file.losses(&map).is_empty() {
        assert!(strict.is_err());
    }
    let again = if matches!(file, File::NestedState(_)) {
        let state = NestedState::read(&done.bytes).expect("what was written");
        to.read(state.image().expect("an image"))
    } else {
        to.read(&done.bytes)
    };
    let mut expected = found.vmcs;
    for field in hypernest_vmcs::Field::ALL {
        if !to.holds(field) {
            expected.set(field, 0);
        }
    }
    expected.launched &= to.launch_state().is_some();
    assert_eq!(again, Ok(expected));
});
