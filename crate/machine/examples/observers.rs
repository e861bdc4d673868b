//! Observers: count what a guest does with its ports, and lie to it.
//!
//! `cargo run -p hypernest-machine --example observers`

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Mutex};

use hypernest_machine::{
    Access, AccessKind, AtBreakpoint, Flow, Machine, Observer, Ram, Stop, Until,
};
use iced_x86::code_asm::*;

/// Counts accesses per port, and makes the clock's seconds read 33 whatever they are.
#[derive(Default)]
struct Spy {
    counts: Arc<Mutex<BTreeMap<u64, u32>>>,
}

impl Observer for Spy {
    fn access(&mut self, access: &mut Access, _ram: &mut Ram) -> Flow {
        let mut counts = self.counts.lock().expect("nobody panics with the lock");
        *counts.entry(access.address).or_default() += 1;
        if access.kind == AccessKind::PortRead && access.address == 0x71 {
            access.value = 0x33;
        }
        Flow::Continue
    }

    fn breakpoint(&mut self, at: &mut AtBreakpoint<'_>) -> Option<Flow> {
        println!("tick {}: vCPU {} at {:#x}", at.now, at.vcpu, at.state.rip);
        Some(Flow::Continue)
    }
}

/// Runs the example.
pub fn main() -> Result<(), Box<dyn Error>> {
    // Reads the seconds of the real-time clock and exits with them.
    let mut asm = CodeAssembler::new(16)?;
    asm.mov(al, 0)?;
    asm.out(0x70, al)?;
    asm.in_(al, 0x71)?;
    asm.out(0xf4, al)?;

    let spy = Spy::default();
    let counts = spy.counts.clone();
    let mut machine = Machine::builder()
        .memory(1 << 20)
        .image(asm.assemble(0x7c00)?)
        .raw()
        .observer(spy)
        .build()?;
    machine.set_breakpoint(0x7c04);
    let stop = machine.run(&Until::end())?;
    assert_eq!(stop, Stop::Exit { value: 0x33 });
    let counts = counts.lock().expect("nobody panics with the lock");
    for (port, count) in counts.iter() {
        println!("port {port:#x}: {count}");
    }
    assert_eq!(counts.get(&0x71), Some(&1));
    Ok(())
}
