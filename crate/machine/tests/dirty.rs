//! Which pages are written: every writer counts, and nothing in the guest changes by asking.

#[path = "../../../tests/guests/hypervisor.rs"]
mod hypervisor;
mod support;

use hypernest_machine::*;
use iced_x86::code_asm::*;
use support::long::*;

/// Stores to its data pages and to the page of its code again and again, and clears the accessed and dirty
/// flags of them all, of which the processor need not hear: what it has cached stays in use. RBX adds up the flags
/// it finds.
fn shifty() -> Machine {
    let clear = !(ACCESSED | DIRTY) as i32;
    long(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        for page in 0..4u64 {
            a.mov(qword_ptr(DATA + page * 0x1000 + 8), rcx)?;
            a.add(rbx, qword_ptr(TABLE + (DATA >> 12 << 3) + 8 * page))?;
            a.and(qword_ptr(TABLE + (DATA >> 12 << 3) + 8 * page), clear)?;
            a.inc(rcx)?;
        }
        a.mov(qword_ptr(CODE + 0x800), rcx)?;
        a.add(rbx, qword_ptr(TABLE + (CODE >> 12 << 3)))?;
        a.and(qword_ptr(TABLE + (CODE >> 12 << 3)), clear)?;
        a.jmp(again)
    })
}

const END: Tick = 30_000;

fn entry(machine: &Machine, page: u64) -> u64 {
    let mut bytes = [0; 8];
    machine.peek_physical(TABLE + 8 * page, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn asking_what_was_written_changes_no_run() {
    let mut plain = shifty();
    plain.run(&Until::tick(END)).unwrap();
    let hash = plain.state_hash().unwrap();
    for step in [1, 7, 1000, END] {
        let mut machine = shifty();
        machine.track_dirty(true).unwrap();
        while machine.now() < END {
            let next = (machine.now() + step).min(END);
            machine.run(&Until::tick(next)).unwrap();
            machine.take_dirty();
        }
        assert_eq!(machine.state_hash().unwrap(), hash, "every {step} ticks");
    }
    // The guest would have seen a walk: the flags that it cleared last are clear.
    let clear = |page: u64| entry(&plain, page) & (ACCESSED | DIRTY) == 0;
    assert!(clear(CODE >> 12) && clear(DATA >> 12));
}

#[test]
fn a_store_to_a_page_with_code_walks_no_more_than_another() {
    let mut by_blocks = shifty();
    by_blocks.run(&Until::tick(END)).unwrap();
    let mut singly = shifty();
    // Nothing is decoded as a block while there is a breakpoint.
    singly.set_breakpoint(0x1234);
    singly.run(&Until::tick(END)).unwrap();
    assert_eq!(
        singly.state_hash().unwrap(),
        by_blocks.state_hash().unwrap()
    );
}

#[test]
fn stores_flags_of_tables_and_the_debugger_count_once_each() {
    let mut machine = long(|a| {
        let mut first = a.create_label();
        let mut second = a.create_label();
        a.set_label(&mut first)?;
        a.mov(qword_ptr(DATA), rcx)?;
        a.inc(rcx)?;
        a.cmp(rcx, 500)?;
        a.jb(first)?;
        a.set_label(&mut second)?;
        a.mov(rdi, DATA + 0x2ff8)?;
        a.mov(ecx, 0x10)?;
        a.rep().stosb()?;
        a.push(rax)?;
        a.mov(rcx, qword_ptr(DATA))?;
        a.hlt()
    });
    assert!(machine.take_dirty().is_empty());
    machine.track_dirty(true).unwrap();
    // Code and data, and with them all tables.
    machine.run(&Until::tick(100)).unwrap();
    assert_eq!(machine.take_dirty(), [1, 2, 3, 4, 0x20]);
    machine.run(&Until::tick(200)).unwrap();
    assert_eq!(machine.take_dirty(), [0x20]);
    machine.run(&Until::tick(3000)).unwrap();
    assert_eq!(machine.take_dirty(), [4, 8, 0x20, 0x22, 0x23]);
    machine.run(&Until::tick(10_000)).unwrap();
    assert!(machine.take_dirty().is_empty());
    machine.poke_physical(0x1_0fff, &[1, 2]).unwrap();
    machine.poke_virtual(0, DATA, &[1]).unwrap();
    assert_eq!(machine.take_dirty(), [0x10, 0x11, 0x20]);
    machine.ram_mut().bytes_mut();
    assert_eq!(machine.take_dirty().len(), 512);
    machine.track_dirty(false).unwrap();
    machine.poke_physical(0, &[1]).unwrap();
    assert!(machine.take_dirty().is_empty());
}

/// Everything that changed is told, for a hypervisor and its guest: VMCS regions, EPT, injected events.
#[test]
fn no_change_escapes_under_vmx() {
    let mut machine = Machine::builder()
        .memory(8 << 20)
        .vmx(VmxChoice::Max)
        .image(hypervisor::image(&hypervisor::Options::default()))
        .build()
        .unwrap();
    machine.track_dirty(true).unwrap();
    let mut mirror = machine.ram().bytes().to_vec();
    let mut rounds = 0;
    loop {
        let stop = machine.run(&Until::tick(machine.now() + 13)).unwrap();
        for page in machine.take_dirty() {
            let at = page as usize * 4096..(page as usize + 1) * 4096;
            mirror[at.clone()].copy_from_slice(&machine.ram().bytes()[at]);
        }
        assert!(mirror == machine.ram().bytes(), "at {}", machine.now());
        rounds += 1;
        if stop != Stop::Tick {
            assert_eq!(stop, Stop::PoweredOff);
            break;
        }
    }
    assert!(rounds > 10);
}

#[test]
fn a_hash_that_is_kept_is_that_of_the_state() {
    let mut machine = shifty();
    machine.keep_hashes(true).unwrap();
    let mark = machine.mark().unwrap();
    for round in 1..20 {
        machine.run(&Until::tick(round * 777)).unwrap();
        let hash = machine.state_hash().unwrap();
        assert_eq!(machine.kept_hash().unwrap(), hash, "round {round}");
    }
    machine.poke_physical(0x5000, &[1]).unwrap();
    machine.kept_hash().unwrap();
    machine.go_back(&mark).unwrap();
    assert_eq!(machine.kept_hash().unwrap(), machine.state_hash().unwrap());
    machine.forget_mark();
    machine.keep_hashes(false).unwrap();
    assert!(!machine.ram().tracks_dirty());
    assert_eq!(machine.kept_hash().unwrap(), machine.state_hash().unwrap());
}

/// Writes by DMA where it is told.
struct Writer;

impl Device for Writer {
    fn name(&self) -> &str {
        "writer"
    }

    fn claims(&self) -> Vec<Claim> {
        vec![Claim::Ports(0x700..0x704)]
    }

    fn read(&mut self, _: &mut DeviceContext<'_>, _: DeviceAccess) -> u64 {
        0
    }

    fn write(&mut self, context: &mut DeviceContext<'_>, _: DeviceAccess, value: u64) {
        context.ram.write(value, &[1]).unwrap();
    }
}

#[test]
fn devices_write_too() {
    let mut asm = CodeAssembler::new(16).unwrap();
    asm.mov(dx, 0x700).unwrap();
    asm.mov(eax, 0x5_4321).unwrap();
    asm.out(dx, eax).unwrap();
    asm.out(0xf4, al).unwrap();
    let code = asm.assemble(0x7c00).unwrap();
    let builder = Machine::builder().memory(1 << 20).image(code).raw();
    let mut machine = builder.device(Writer).build().unwrap();
    machine.track_dirty(true).unwrap();
    assert!(machine.run(&Until::end()).unwrap().is_end());
    assert_eq!(machine.take_dirty(), [0x54]);
}
