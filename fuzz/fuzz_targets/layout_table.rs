//! No text makes the reader of layout tables panic. What it takes obeys the rules of layouts, can be written as a table
//! again, and keeps every value of a VMCS that it has a place for.

#![no_main]

use hypernest_vmcs::{Field, Layout, Vmcs};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let layout = match Layout::from_table(&text) {
        Ok(layout) => layout,
        Err(error) => {
            assert!(!error.to_string().contains('\n'));
            assert!(error.line >= 1 && error.line <= text.lines().count().max(1));
            return;
        }
    };
    let again = Layout::from_table(&layout.to_table()).expect("a table of a layout");
    assert_eq!(again, layout);
    let mut owners = vec![0u8; layout.size()];
    let launch = layout
        .launch_state()
        .map(|launch| (launch.offset, launch.width));
    let slots = layout.slots().iter().map(|slot| (slot.offset, slot.width));
    for (offset, width) in slots.chain(launch) {
        for byte in usize::from(offset)..usize::from(offset) + usize::from(width) {
            assert!(byte >= 8 && owners[byte] == 0, "{byte}");
            owners[byte] = 1;
        }
    }
    let mut vmcs = Vmcs::new();
    vmcs.launched = layout.launch_state().is_some();
    for field in Field::ALL {
        vmcs.set(
            field,
            u64::from(field.encoding()).wrapping_mul(0x0123_4567_89AB_CDEF),
        );
    }
    let mut region = vec![0xFF; layout.size()];
    layout.write(&vmcs, &mut region).expect("long enough");
    let read = layout.read(&region).expect("what was written");
    assert_eq!(read.launched, vmcs.launched);
    for slot in layout.slots() {
        let kept = vmcs.get(slot.field) & (u64::MAX >> (64 - 8 * u32::from(slot.width)));
        assert_eq!(read.get(slot.field), kept, "{:?}", slot.field);
    }
});
