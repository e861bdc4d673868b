//! Build a machine, run a guest in it, see what it printed and how it ended.
//!
//! `cargo run -p hypernest-machine --example hello`

use std::error::Error;

use hypernest_machine::{Machine, Stop, Until};
use iced_x86::code_asm::*;

/// A guest in 16-bit code, loaded at 7C00H as a boot sector is.
fn guest() -> Result<Vec<u8>, Box<dyn Error>> {
    let mut asm = CodeAssembler::new(16)?;
    asm.mov(dx, 0x3f8)?; // the first serial port
    for byte in b"hello, world\n" {
        asm.mov(al, u32::from(*byte))?;
        asm.out(dx, al)?;
    }
    asm.mov(al, 0)?;
    asm.out(0xf4, al)?; // the exit port
    Ok(asm.assemble(0x7c00)?)
}

/// Runs the example.
pub fn main() -> Result<(), Box<dyn Error>> {
    let mut machine = Machine::builder()
        .memory(1 << 20)
        .cpus(1)
        .image(guest()?)
        .raw()
        .build()?;

    // At most one second of guest time, or to the comma, or to the end.
    let until = Until::tick(1_000_000_000).text("hello,");
    let stop = machine.run(&until)?;
    println!("first: {stop}, at tick {}", machine.now());
    assert_eq!(stop, Stop::Text { index: 0 });

    let stop = machine.run(&Until::end())?;
    println!("then: {stop}, at tick {}", machine.now());
    assert_eq!(stop, Stop::Exit { value: 0 });

    let printed = machine.take_serial_output();
    println!("it printed {:?}", String::from_utf8_lossy(&printed));
    assert_eq!(printed, b"hello, world\n");
    Ok(())
}
