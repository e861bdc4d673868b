//! Nested states are found in migration streams, and what is none is not.

mod stream;

use hypernest_vmcs::migration::{InStream, StreamProblem, nested_states};
use hypernest_vmcs::nested_state::{IMAGE, state_flag};
use hypernest_vmcs::{Field, Layout, NestedState, Vmcs};

use stream::{stream, subsection};

fn state(images: usize) -> NestedState {
    let mut vmcs = Vmcs::new();
    vmcs.set(Field::GUEST_RIP, 0x1234);
    let mut data = vec![0; images * IMAGE];
    for image in data.chunks_mut(IMAGE) {
        Layout::kvm().write(&vmcs, image).unwrap();
        vmcs.shadow = true;
    }
    NestedState {
        flags: if images == 0 {
            0
        } else {
            state_flag::GUEST_MODE
        },
        vmxon: 0x1000,
        vmcs: if images == 0 { u64::MAX } else { 0x2000 },
        data,
        ..NestedState::default()
    }
}

fn found(bytes: &[u8]) -> Vec<InStream> {
    nested_states(bytes).map(Result::unwrap).collect()
}

#[test]
fn each_processors_state_is_found_whole() {
    let states = [Some(state(1)), None, Some(state(0)), Some(state(2))];
    let bytes = stream(&states);
    let found = found(&bytes);
    let expected = [(0, state(1)), (2, state(0)), (3, state(2))];
    assert_eq!(found.len(), expected.len());
    for (found, (cpu, state)) in found.iter().zip(expected) {
        assert_eq!((found.cpu, &found.state), (Some(cpu), &state));
        assert!(bytes[found.offset..].starts_with(&subsection(&state)));
    }
    assert_eq!(nested_states(&stream(&[None, None])).count(), 0);
    assert_eq!(nested_states(b"").count(), 0);
}

#[test]
fn a_state_outside_of_a_processor_has_none() {
    let bare = found(&subsection(&state(1)));
    assert_eq!((bare[0].cpu, &bare[0].state), (None, &state(1)));
    // Behind the end of a section.
    let mut bytes = stream(&[None]);
    bytes.extend(subsection(&state(2)));
    assert_eq!(found(&bytes)[0].cpu, None);
    // In RAM, as of a machine that runs QEMU: the half of one hides no other, and one of another version is none.
    let mut half = subsection(&state(1));
    half.truncate(3000);
    half.extend(stream(&[Some(state(2))]));
    let all = found(&half);
    assert_eq!((all.len(), all[0].cpu), (2, None));
    assert_eq!((all[1].cpu, &all[1].state), (Some(0), &state(2)));
    half[21] = 9;
    assert_eq!(found(&half), all[1..]);
}

#[test]
fn a_stream_within_an_image_is_not_another_state() {
    let mut outer = state(1);
    let inner = subsection(&state(0));
    outer.data[2000..2000 + inner.len()].copy_from_slice(&inner);
    let found = found(&stream(&[Some(outer.clone())]));
    assert_eq!((found.len(), &found[0].state), (1, &outer));
}

#[test]
fn what_a_processor_cannot_have_is_an_error_with_its_place() {
    let problem = |state: &NestedState, change: &dyn Fn(&mut Vec<u8>)| {
        let mut part = subsection(state);
        change(&mut part);
        let mut bytes = stream(&[None]);
        let at = bytes.len() - 6;
        bytes.splice(at..at, part);
        let error = nested_states(&bytes).next().unwrap().unwrap_err();
        assert_eq!((error.offset, error.cpu), (at, 0));
        assert!(error.to_string().contains(&format!("at byte {at}: ")));
        error.problem
    };
    assert_eq!(
        problem(&state(1), &|part| part[21] = 2),
        StreamProblem::Version(2)
    );
    assert_eq!(
        problem(&state(1), &|part| part[25] = 1),
        StreamProblem::Format(1)
    );
    assert_eq!(
        problem(&state(1), &|part| part[29] = 0x81),
        StreamProblem::Size {
            said: 4225,
            there: 4224
        }
    );
    assert_eq!(
        problem(&state(1), &|part| part.truncate(30)),
        StreamProblem::NoVmx
    );
    assert!(matches!(
        problem(&state(1), &|part| part[23] = 0x10),
        StreamProblem::Refused(_)
    ));
}

#[test]
fn a_stream_that_is_cut_anywhere_has_the_states_before() {
    let bytes = stream(&[Some(state(0)), Some(state(2))]);
    let whole = found(&bytes);
    let ends = whole
        .iter()
        .map(|found| found.offset + subsection(&found.state).len());
    let ends: Vec<usize> = ends.collect();
    for len in 0..bytes.len() {
        let mut complete = 0;
        for found in nested_states(&bytes[..len]) {
            match found {
                Ok(state) => {
                    assert_eq!(state, whole[complete]);
                    complete += 1;
                }
                Err(error) => {
                    assert_eq!(error.problem, StreamProblem::Cut, "{len}");
                    assert!(error.offset < len && len < ends[complete]);
                }
            }
        }
        let expected = ends.iter().filter(|&&end| end <= len).count();
        assert_eq!(complete, expected, "{len}");
    }
}
