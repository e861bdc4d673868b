//! No text makes the reader of kernel logs panic. Values it does not name are 0, and what it reads does not depend on what
//! stands before its lines.

#![no_main]

use hypernest_vmcs::{Dump, Field};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let dump = match Dump::read(&text) {
        Ok(dump) => dump,
        Err(error) => {
            assert!(!error.to_string().contains('\n'));
            return;
        }
    };
    for field in Field::ALL {
        let value = dump.vmcs.get(field);
        assert!(value == 0 || dump.fields.contains(field), "{field:?}");
        assert_eq!(value & !field.mask(), 0);
    }
    // What follows a dump is no part of it, unless it is another one.
    let longer = format!("{text}\nother words\n");
    let longer = Dump::read(&longer).expect("a dump and words");
    assert_eq!((longer.vmcs, longer.fields), (dump.vmcs, dump.fields));
});
