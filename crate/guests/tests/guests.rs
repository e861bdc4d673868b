//! The guests, on a machine.

use hypernest_machine::{Machine, Stop, Until, VmxChoice};

/// Runs the hypervisor; why the machine stopped, and what it printed.
fn hypervisor(vmx: VmxChoice) -> (Stop, String) {
    let mut machine = Machine::builder()
        .memory(hypernest_guests::HYPERVISOR_MEMORY)
        .image(hypernest_guests::HYPERVISOR)
        .vmx(vmx)
        .build()
        .unwrap();
    let stop = machine.run(&Until::tick(100_000_000)).unwrap();
    let text = String::from_utf8(machine.take_serial_output()).unwrap();
    (stop, text)
}

/// Number, reason and qualification (hexadecimal) of each exit that was printed.
fn exits(text: &str) -> Vec<(u32, u32, &str)> {
    let columns = |line| {
        let line: &str = line;
        let mut words = line.split_whitespace();
        let (number, reason) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        // The name may have spaces in it.
        Some((number, reason, line.get(23..)?.split_whitespace().next()?))
    };
    text.lines().filter_map(columns).collect()
}

#[test]
fn the_hypervisor_sees_every_exit_that_its_guest_provokes() {
    let (stop, text) = hypervisor(VmxChoice::Max);
    assert_eq!(stop, Stop::PoweredOff, "{text}");
    let exits = exits(&text);
    let numbers = exits.iter().map(|(number, ..)| *number);
    assert!(numbers.eq(1..=exits.len() as u32), "{text}");
    let seen: Vec<(u32, &str)> = exits.iter().map(|(_, r, q)| (*r, *q)).collect();
    let expected = [
        (10, "0"),      // CPUID
        (18, "0"),      // VMCALL
        (10, "0"),      // CPUID
        (31, "0"),      // RDMSR
        (32, "0"),      // WRMSR
        (16, "0"),      // RDTSC
        (28, "13"),     // MOV from CR3 to RAX
        (28, "3"),      // MOV to CR3 from RAX
        (29, "0"),      // MOV to DR0 from RAX
        (55, "0"),      // XSETBV
        (30, "800040"), // OUT of a byte to an immediate port
        (30, "800048"), // IN
        (48, "582"),    // a write, the linear address valid, of the final translation
        (14, "203000"), // INVLPG
        (0, "0"),       // #UD
        (18, "0"),      // VMCALL
        (52, "0"),      // preemption timer
        (12, "0"),      // HLT
        (18, "0"),      // VMCALL
        (2, "0"),       // triple fault
    ];
    assert_eq!(seen, expected, "{text}");
    for words in [
        "L2 says: I run under NestEgg (L1)",
        "loads L2's CR3: 2000",
        "maps a page at 203000",
        "L2 says: all came back right",
        "20 exits: 2 CPUID, 1 RDMSR, 1 WRMSR,",
        "1 triple fault.",
    ] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
    assert!(text.lines().all(|line| line.len() < 80), "{text}");
}

#[test]
fn the_hypervisor_says_when_there_is_no_vmx() {
    let (stop, text) = hypervisor(VmxChoice::None);
    assert_eq!(stop, Stop::PoweredOff);
    assert!(text.contains("has no VMX"), "{text}");
}

#[test]
fn the_greeting_answers_in_capitals() {
    let mut machine = Machine::builder()
        .memory(16 << 20)
        .image(hypernest_guests::GREETING)
        .build()
        .unwrap();
    machine.run(&Until::tick(20_000_000)).unwrap();
    machine.serial_input(b"hi");
    machine.run(&Until::tick(30_000_000)).unwrap();
    let text = String::from_utf8(machine.take_serial_output()).unwrap();
    assert!(text.ends_with("> HI"), "{text}");
}
