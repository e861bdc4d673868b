//! Serial output as it comes, and input to a guest that waits for it.
//!
//! `cargo run -p hypernest-machine --example serial_terminal`

use std::error::Error;
use std::sync::{Arc, Mutex};

use hypernest_machine::{Machine, Stop, Until};
use iced_x86::code_asm::*;

/// 16-bit code: prints a prompt, then gives every byte back one higher; `q` ends it.
fn guest() -> Result<Vec<u8>, Box<dyn Error>> {
    let mut asm = CodeAssembler::new(16)?;
    let (mut wait, mut quit) = (asm.create_label(), asm.create_label());
    asm.mov(dx, 0x3f8)?;
    for byte in b"> " {
        asm.mov(al, u32::from(*byte))?;
        asm.out(dx, al)?;
    }
    asm.set_label(&mut wait)?;
    asm.mov(dx, 0x3fd)?; // line status
    asm.in_(al, dx)?;
    asm.test(al, 1)?;
    asm.jz(wait)?;
    asm.mov(dx, 0x3f8)?;
    asm.in_(al, dx)?;
    asm.cmp(al, i32::from(b'q'))?;
    asm.je(quit)?;
    asm.inc(al)?;
    asm.out(dx, al)?;
    asm.jmp(wait)?;
    asm.set_label(&mut quit)?;
    asm.out(0xf4, al)?;
    Ok(asm.assemble(0x7c00)?)
}

/// Runs the example.
pub fn main() -> Result<(), Box<dyn Error>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    let mut machine = Machine::builder()
        .memory(1 << 20)
        .image(guest()?)
        .raw()
        .serial_sink(move |bytes| {
            print!("{}", String::from_utf8_lossy(bytes));
            sink.lock()
                .expect("nobody panics with the lock")
                .extend_from_slice(bytes);
        })
        .build()?;

    machine.run(&Until::end().text("> "))?;
    machine.serial_input(b"HAL");
    machine.run(&Until::end().text("IBM"))?;
    machine.serial_input(b"q");
    let stop = machine.run(&Until::end())?;
    println!();
    assert_eq!(
        stop,
        Stop::Exit {
            value: u32::from(b'q')
        }
    );
    assert_eq!(*seen.lock().expect("nobody panics with the lock"), b"> IBM");
    Ok(())
}
