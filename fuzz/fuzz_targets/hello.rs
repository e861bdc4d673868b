//! No hello of a peer makes us panic or claim memory. What is taken as one is judged, and is the same as bytes again.

#![no_main]

use std::sync::LazyLock;

use hypernest_machine::{Machine, VmxChoice, VmxLayouts};
use hypernest_migrate::hello::{Choices, Host, Offer, refusals};
use libfuzzer_sys::fuzz_target;

static HERE: LazyLock<(Offer, Host)> = LazyLock::new(|| {
    let machine = Machine::builder()
        .memory(1 << 20)
        .vmx(VmxChoice::Max)
        .hyperv(true);
    let machine = machine.build().expect("a small machine");
    let choices = Choices {
        hyperv: true,
        ..Choices::default()
    };
    let offer = Offer::of(&machine).expect("the software engine does not fail");
    (offer, Host::of(&choices).expect("all that there is"))
});

fuzz_target!(|data: &[u8]| {
    let (offer, host) = &*HERE;
    if let Ok(theirs) = Offer::from_bytes(data) {
        for reason in refusals(&theirs, host)
            .into_iter()
            .chain(theirs.differences())
        {
            assert!(!reason.to_string().contains('\n'));
        }
        let _ = theirs.config(&VmxLayouts::default());
        assert_eq!(Offer::from_bytes(&theirs.to_bytes()), Ok(theirs));
    }
    if let Ok(theirs) = Host::from_bytes(data) {
        for reason in refusals(offer, &theirs) {
            assert!(!reason.to_string().contains('\n'));
        }
        assert_eq!(Host::from_bytes(&theirs.to_bytes()), Ok(theirs));
    }
});
