//! What going back to a mark takes after a run that touched so many pages. `cargo bench -p hypernest-machine --bench
//! mark` runs it.

use std::error::Error;
use std::time::{Duration, Instant};

use hypernest_machine::{Machine, Until, VmxChoice};
use iced_x86::code_asm::*;

/// Rounds, of which the middle one counts.
const ROUNDS: usize = 2000;

/// A machine that touches `pages` pages above 1 MiB for each value of EBX, then exits.
fn machine(memory: u64, cpus: u32, pages: u32) -> Result<Machine, Box<dyn Error>> {
    let mut asm = CodeAssembler::new(32)?;
    let mut again = asm.create_label();
    asm.mov(ecx, pages)?;
    asm.mov(edi, 0x10_0000)?;
    asm.set_label(&mut again)?;
    asm.inc(dword_ptr(edi))?;
    asm.add(edi, 0x1000)?;
    asm.dec(ecx)?;
    asm.jnz(again)?;
    asm.out(0xf4, al)?;
    let mut machine = Machine::builder()
        .memory(memory)
        .cpus(cpus)
        .vmx(VmxChoice::Max)
        .build()?;
    machine.poke_physical(0x1000, &asm.assemble(0x1000)?)?;
    let mut state = machine.read_vcpu(0)?;
    for segment in [
        &mut state.segments.cs,
        &mut state.segments.ds,
        &mut state.segments.es,
    ] {
        segment.base = 0;
        segment.limit = 0xffff_ffff;
        segment.rights = 0xc093;
    }
    state.segments.cs.rights = 0xc09b;
    state.cr0 = 0x31;
    state.rip = 0x1000;
    machine.write_vcpu(0, &state)?;
    Ok(machine)
}

fn middle(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("memory  vCPUs  pages  run us  go back us");
    for (memory, cpus, pages) in [
        (64, 1, 1),
        (64, 1, 100),
        (512, 1, 100),
        (512, 4, 100),
        (512, 1, 1000),
    ] {
        let mut machine = machine(memory << 20, cpus, pages)?;
        let mark = machine.mark()?;
        let hash = machine.state_hash()?;
        let (mut runs, mut backs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let start = Instant::now();
            let stop = machine.run(&Until::end())?;
            let ran = start.elapsed();
            if !stop.is_end() {
                return Err(format!("it stopped otherwise: {stop}").into());
            }
            let start = Instant::now();
            machine.go_back(&mark)?;
            backs.push(start.elapsed());
            runs.push(ran);
        }
        if machine.state_hash()? != hash {
            return Err("it is not back".into());
        }
        println!(
            "{memory:>6}  {cpus:>5}  {pages:>5}  {:>6.1}  {:>10.1}",
            middle(runs),
            middle(backs)
        );
    }
    Ok(())
}
