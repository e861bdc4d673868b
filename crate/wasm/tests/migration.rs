//! Machines that move between two pages, natively and in Node: both sides in one thread, over a link of their own.

use hypernest_wasm::guest::{Builtin, Guest, Options, Vmx};
use hypernest_wasm::migration::{self, Arrival, Next, Source};

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test;

/// Ticks between two looks at the link.
const SLICE: u64 = 50_000;

fn guest() -> Guest {
    let options = Options {
        memory: 16 << 20,
        cpus: 1,
        model: None,
        cmdline: String::new(),
        vmx: Vmx::Max,
        builtin: Builtin::Greeting,
    };
    Guest::new(&options, None, None).expect("the built-in guest boots")
}

fn options(token: &str) -> migration::Options {
    migration::Options {
        token: token.into(),
        bandwidth: None,
    }
}

/// Runs until the guest has written `text`.
fn run_until(guest: &mut Guest, text: &str, output: &mut Vec<u8>) {
    for _ in 0..20_000 {
        let report = guest.run_slice(SLICE, SLICE);
        assert!(report.stop.is_none(), "{report:?}");
        output.extend(guest.take_serial());
        if String::from_utf8_lossy(output).contains(text) {
            return;
        }
    }
    panic!("no {text:?} in {}", String::from_utf8_lossy(output));
}

/// What became of both sides, and what was printed on each.
struct Moved {
    source: Next,
    arrival: Next,
    guest: Option<Guest>,
    printed: [Vec<u8>; 2],
}

/// Moves `from`, which runs on meanwhile, over a link that ends after `bytes` of the source.
fn moves(from: &mut Guest, ours: &str, theirs: &str, mut bytes: usize) -> Moved {
    let mut now = 0;
    let mut source = Source::new(from, &options(ours), 7, 8, now).expect("there is memory");
    let mut arrival = Arrival::new(&options(theirs), 9);
    let mut printed = [Vec::new(), Vec::new()];
    let (mut ended, mut came) = (None, None);
    for _ in 0..20_000 {
        now += 300;
        let out = source.take_output(bytes.min(1 << 16));
        bytes -= out.len();
        arrival.receive(&out);
        if bytes == 0 {
            source.closed();
            arrival.closed();
        }
        if ended.is_none() {
            match source.poll(from, now) {
                Next::Run => {
                    assert!(from.run_slice(SLICE, SLICE).stop.is_none());
                    printed[0].extend(from.take_serial());
                }
                Next::Wait { .. } => {}
                other => ended = Some(other),
            }
        }
        if came.is_none() {
            match arrival.poll(now) {
                Next::Wait { .. } => {}
                other => {
                    came = Some((other, arrival.take()));
                    printed[1].extend(arrival.take_serial());
                }
            }
        }
        source.receive(&arrival.take_output(1 << 16));
        if let (Some(_), Some(_)) = (&ended, &came) {
            break;
        }
    }
    if ended != Some(Next::HandedOver) {
        printed[0].extend(source.take_serial());
    }
    let (arrival, guest) = came.expect("the destination ends");
    Moved {
        source: ended.expect("the source ends"),
        arrival,
        guest,
        printed,
    }
}

/// What a guest prints that never moved.
fn unmoved() -> Vec<u8> {
    let mut output = Vec::new();
    let mut guest = guest();
    run_until(&mut guest, "2262 primes", &mut output);
    run_until(&mut guest, "> ", &mut output);
    output
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn a_machine_moves_while_it_prints_and_no_byte_is_lost_or_doubled() {
    let expected = unmoved();
    let mut output = Vec::new();
    let mut first = guest();
    run_until(&mut first, "GenuineIntel", &mut output);
    let moved = moves(&mut first, "", "", usize::MAX);
    assert_eq!((moved.source, moved.arrival), (Next::HandedOver, Next::Own));
    let mut guest = moved.guest.expect("it came");
    assert_eq!(guest.summary().memory, 16 << 20);
    assert_eq!(guest.summary().vmx, "max");
    output.extend(moved.printed.concat());
    run_until(&mut guest, "2262 primes", &mut output);
    run_until(&mut guest, "> ", &mut output);
    assert_eq!(
        String::from_utf8_lossy(&output),
        String::from_utf8_lossy(&expected)
    );
    guest.send_serial(b"moved");
    run_until(&mut guest, "MOVED", &mut Vec::new());
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn a_link_that_ends_leaves_the_machine_where_it_was() {
    for bytes in [1, 500, 3000] {
        let expected = unmoved();
        let mut output = Vec::new();
        let mut first = guest();
        run_until(&mut first, "GenuineIntel", &mut output);
        let moved = moves(&mut first, "", "", bytes);
        assert!(matches!(moved.source, Next::Failed { .. }), "{bytes}");
        assert!(matches!(moved.arrival, Next::Failed { .. }), "{bytes}");
        assert!(moved.guest.is_none());
        output.extend(&moved.printed[0]);
        run_until(&mut first, "2262 primes", &mut output);
        run_until(&mut first, "> ", &mut output);
        assert_eq!(output, expected);
    }
}

#[test]
#[cfg_attr(target_arch = "wasm32", wasm_bindgen_test)]
fn a_wrong_token_is_refused_before_anything_stops() {
    let mut first = guest();
    run_until(&mut first, "> ", &mut Vec::new());
    let moved = moves(&mut first, "open", "sesame", usize::MAX);
    let Next::Failed { reasons } = moved.source else {
        panic!("{:?}", moved.source)
    };
    assert!(reasons[0].contains("token"), "{reasons:?}");
    assert!(moved.guest.is_none());
    let moved = moves(&mut first, "sesame", "sesame", usize::MAX);
    assert_eq!(moved.source, Next::HandedOver);
}
