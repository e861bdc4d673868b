//! No line makes the monitor's reader panic, and every answer is one line of JSON that names its request.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crate/cli/src/monitor/request.rs"]
mod request;

fuzz_target!(|line: &[u8]| {
    let (id, outcome) = match request::parse(line) {
        Ok(request) => (request.id, Ok(request::NAMES.into())),
        Err((id, refusal)) => (id, Err(refusal)),
    };
    let answer = request::answer(&id, outcome);
    assert_eq!(answer["id"], id);
    assert!(!answer.to_string().contains('\n'));
});
