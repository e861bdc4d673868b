//! Save a machine, continue it in another one, compare the two by hash and field by field.
//!
//! `cargo run -p hypernest-machine --example save_and_compare`

use std::error::Error;

use hypernest_machine::{Machine, MachineState, Until, diff};
use iced_x86::code_asm::*;

/// Counts at 600H for ever.
fn guest() -> Result<Vec<u8>, Box<dyn Error>> {
    let mut asm = CodeAssembler::new(16)?;
    let mut again = asm.create_label();
    asm.set_label(&mut again)?;
    asm.inc(word_ptr(0x600))?;
    asm.add(bx, 3)?;
    asm.jmp(again)?;
    Ok(asm.assemble(0x7c00)?)
}

/// Runs the example.
pub fn main() -> Result<(), Box<dyn Error>> {
    let code = guest()?;
    let mut first = Machine::builder()
        .memory(1 << 20)
        .image(code)
        .raw()
        .build()?;
    first.run(&Until::tick(10_000))?;

    // The state is a serde type; any format will do. RAM is apart.
    let json = serde_json::to_string(&first.save()?)?;
    let ram = first.ram().bytes().to_vec();
    println!("the saved state is {} bytes of JSON", json.len());

    // A machine of the same configuration, without the image.
    let saved: MachineState = serde_json::from_str(&json)?;
    let mut second = Machine::builder().memory(1 << 20).build()?;
    second.ram_mut().bytes_mut().copy_from_slice(&ram);
    second.restore(&saved)?;

    first.run(&Until::tick(20_000))?;
    second.run(&Until::tick(20_000))?;
    let (a, b) = (first.state_hash()?, second.state_hash()?);
    println!("hashes at tick 20000: {a:016x} and {b:016x}");
    assert_eq!(a, b);

    // What three more instructions change.
    second.run(&Until::tick(20_003))?;
    let changes = diff(&first.state()?, &second.state()?);
    for change in &changes {
        println!("  {change}");
    }
    assert!(changes.iter().any(|change| change.path == "vcpu[0].gpr[3]"));
    Ok(())
}
