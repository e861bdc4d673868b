//! Put code, page tables and registers into a machine by hand; stop at a breakpoint; look at
//! registers and at memory through the guest's own page tables, and change both.
//!
//! `cargo run -p hypernest-machine --example registers_and_memory`

use std::error::Error;

use hypernest_machine::{Machine, Stop, Until};
use iced_x86::code_asm::*;

const RAX: usize = 0;
const CODE: u64 = 0x10_0000;
/// Where the guest sees its data, and where that is.
const DATA_VIRTUAL: u64 = 0x20_0000;
const DATA_PHYSICAL: u64 = 0x8000;

/// Runs the example.
pub fn main() -> Result<(), Box<dyn Error>> {
    // 64-bit code: loads a number, doubles it, stores it, exits with its low byte.
    let mut asm = CodeAssembler::new(64)?;
    asm.mov(ebx, DATA_VIRTUAL as u32)?; // 5 bytes
    asm.mov(rax, qword_ptr(rbx))?; // 3 bytes
    asm.add(rax, rax)?;
    asm.mov(qword_ptr(rbx + 8), rax)?;
    asm.out(0xf4, al)?;
    let code = asm.assemble(CODE)?;

    let mut machine = Machine::builder().memory(4 << 20).build()?;
    machine.poke_physical(CODE, &code)?;
    machine.poke_physical(DATA_PHYSICAL, &21u64.to_le_bytes())?;

    // Page tables: 1 MiB - 2 MiB as it is (within a large page), one page of data.
    for (address, entry) in [
        (0x1000, 0x2003),            // PML4E -> PDPT
        (0x2000, 0x3003),            // PDPTE -> page directory
        (0x3000, 0x0083),            // PDE: the first 2 MiB, one page
        (0x3008, 0x4003),            // PDE -> page table of the next 2 MiB
        (0x4000, DATA_PHYSICAL | 3), // PTE
    ] {
        machine.poke_physical(address, &u64::to_le_bytes(entry))?;
    }

    // From the reset state straight to 64-bit mode.
    let mut state = machine.read_vcpu(0)?;
    state.cr0 = 0x8000_0011; // PG, ET, PE
    state.cr3 = 0x1000;
    state.cr4 = 0x20; // PAE
    state.msrs.efer = 0x500; // LMA, LME
    state.segments.cs.base = 0;
    state.segments.cs.limit = u32::MAX;
    state.segments.cs.rights = 0xa09b; // 64-bit code
    state.rip = CODE;
    machine.write_vcpu(0, &state)?;

    // Stop before the ADD.
    let add = CODE + 8;
    let stop = machine.run(&Until::end().breakpoint(add))?;
    assert_eq!(stop, Stop::Breakpoint { vcpu: 0, rip: add });
    let mut state = machine.read_vcpu(0)?;
    println!("stopped at {:#x}, RAX = {}", state.rip, state.gpr[RAX]);
    assert_eq!(state.gpr[RAX], 21);

    for step in machine.walk(0, DATA_VIRTUAL)?.steps {
        println!(
            "  {:5} at {:#06x}: {:#x}",
            step.level, step.address, step.entry
        );
    }
    assert_eq!(machine.walk(0, DATA_VIRTUAL)?.physical, Some(DATA_PHYSICAL));

    // Change a register, go on, and read the result where the guest put it.
    state.gpr[RAX] = 50;
    machine.write_vcpu(0, &state)?;
    let stop = machine.run(&Until::end())?;
    assert_eq!(stop, Stop::Exit { value: 100 });
    let mut result = [0; 8];
    machine.peek_virtual(0, DATA_VIRTUAL + 8, &mut result)?;
    println!("the guest stored {}", u64::from_le_bytes(result));
    assert_eq!(u64::from_le_bytes(result), 100);
    Ok(())
}
