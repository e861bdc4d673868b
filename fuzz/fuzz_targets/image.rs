//! No file makes the loaders panic, hang or write outside RAM.

#![no_main]

use hypernest_cpu::{Model, Ram, VcpuState};
use hypernest_machine::boot::{Boot, Module, Symbols};
use libfuzzer_sys::fuzz_target;

// The first byte chooses what comes with the image.
fuzz_target!(|data: &[u8]| {
    let Some((&options, image)) = data.split_first() else {
        return;
    };
    let _ = Symbols::parse(image);
    let modules = [Module {
        text: "module",
        bytes: &[0x5a; 5000],
    }];
    let boot = Boot {
        image,
        raw: options & 8 != 0,
        name: "image",
        command_line: if options & 1 != 0 {
            "console=ttyS0"
        } else {
            ""
        },
        initrd: (options & 2 != 0).then_some(&[0xa5; 9000]),
        modules: if options & 4 != 0 { &modules } else { &[] },
        acpi: None,
    };
    let mut ram = Ram::new(32 << 20).expect("32 MiB");
    let reset = VcpuState::reset(0, &Model::all()[0]);
    if let Err(error) = boot.load(&mut ram, reset) {
        assert!(!error.to_string().contains('\n'));
    }
});
