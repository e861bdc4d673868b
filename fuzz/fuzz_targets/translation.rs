//! No layouts, written by whomever, and no region make a translation panic, differ from reading and writing field by
//! field, or lose a value without a word.

#![no_main]

use hypernest_vmcs::{Fate, Field, Layout, Losses, TranslateError, Translation};
use libfuzzer_sys::fuzz_target;

// Two bytes choose built-in layouts; a third whose upper half says that a table of one's own comes first, up to a byte 0.
fuzz_target!(|data: &[u8]| {
    let [one, two, own, rest @ ..] = data else {
        return;
    };
    let pick = |byte: u8| Layout::built_in()[usize::from(byte) % Layout::built_in().len()];
    let (mut from, mut to) = (pick(*one).clone(), pick(*two).clone());
    let mut region = rest;
    if own & 0xF0 != 0
        && let Some(end) = rest.iter().position(|&byte| byte == 0)
    {
        let table = String::from_utf8_lossy(&rest[..end]);
        if let Ok(layout) = Layout::from_table(&table) {
            if own & 1 != 0 {
                from = layout;
            } else {
                to = layout;
            }
        }
        region = &rest[end + 1..];
    }
    // Padded, so that most regions are long enough, and of the layout's revision, so that most are taken.
    let mut region = region.to_vec();
    if own & 2 == 0 {
        region.resize(4096, 0);
        let shadow = region[3] & 0x80;
        region[..4].copy_from_slice(&from.revision().to_le_bytes());
        region[3] |= shadow;
    }

    let map = Translation::new(&from, &to);
    let mut out = vec![0xA5; to.size()];
    let strict = map.run(&region, &mut out, Losses::Refused);
    let Ok(vmcs) = from.read(&region) else {
        assert!(matches!(strict, Err(TranslateError::Layout(_))));
        assert!(map.report(&region).is_err() && out.iter().all(|&byte| byte == 0xA5));
        return;
    };
    let lost = |field: &Field| vmcs.get(*field) != 0 && !to.holds(*field);
    let losses: Vec<(Field, u64)> = Field::ALL
        .into_iter()
        .filter(lost)
        .map(|field| (field, vmcs.get(field)))
        .collect();
    assert!(map.losses(&region).eq(losses.iter().copied()));
    let report = map.report(&region).expect("it could be read");
    let told = report
        .iter()
        .filter(|(_, fate)| matches!(fate, Fate::Lost(_)));
    assert_eq!(told.count(), losses.len());
    let unlaunched = vmcs.launched && to.launch_state().is_none();
    assert_eq!(strict.is_ok(), losses.is_empty() && !unlaunched);
    if strict.is_err() {
        assert!(out.iter().all(|&byte| byte == 0xA5));
        map.run(&region, &mut out, Losses::Allowed)
            .expect("long enough");
    }
    let mut truth = vec![0xA5; to.size()];
    to.write(&vmcs, &mut truth).expect("long enough");
    assert!(out == truth);
});
