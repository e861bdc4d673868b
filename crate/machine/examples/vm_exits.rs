//! VM exits of a hypervisor's guest: events, counters, a stop at an exit, and the way of the guest's
//! address through its own page tables and EPT.

#[path = "../../../tests/guests/hypervisor.rs"]
mod hypervisor;

use hypernest_machine::{
    EventKinds, EventRequest, ExitReason, Happening, Level, Machine, Stop, Until, VmxChoice,
    WhenFull,
};
use hypervisor::{L2_BASE, L2_MISSING};

/// Runs a hypervisor of some fifty instructions.
pub fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut machine = Machine::builder()
        .memory(8 << 20)
        .vmx(VmxChoice::Max)
        .image(hypervisor::image(&hypervisor::Options::default()))
        .build()?;
    machine.request_events(&EventRequest {
        kinds: EventKinds::VM_EXIT,
        capacity: 100,
        when_full: WhenFull::Overwrite,
    })?;

    // As far as the page that EPT lacks.
    let stop = machine.run(&Until::end().vm_exit(ExitReason::EPT_VIOLATION))?;
    println!("{stop}");
    let way = machine.walk_at(0, Level::L2, L2_BASE + L2_MISSING)?;
    let way = way.ok_or("there is a VMCS")?;
    for step in &way.steps {
        let ept = if step.ept { "EPT " } else { "" };
        println!(
            "  {ept}{} at {:#x}: {:#x}",
            step.level, step.address, step.entry
        );
    }
    assert_eq!(way.guest_physical, Some(L2_MISSING));
    assert_eq!(way.physical, None);

    assert_eq!(machine.run(&Until::end())?, Stop::PoweredOff);
    for event in machine.take_events() {
        if let Happening::VmExit(exit) = event.what {
            println!("{:6} {:#x} {}", event.tick, event.rip, exit.reason);
        }
    }
    let statistics = machine.exit_statistics().ok_or("it counts")?;
    for row in statistics.rows() {
        println!("{:3} times {}", row.count, row.reason.ident());
    }
    assert_eq!(statistics.count(Level::L2, ExitReason::CPUID), 3);
    Ok(())
}
