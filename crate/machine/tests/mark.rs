//! Going back to a mark, again and again, and what was executed meanwhile.

#[path = "../../../tests/guests/hypervisor.rs"]
mod hypervisor;
mod support;

use hypernest_machine::*;
use hypervisor::{L2_BASE, L2_CODE, Options};
use iced_x86::code_asm::*;
use support::long::*;

/// A hypervisor with its guest, and a vCPU that waits.
fn nested() -> Machine {
    Machine::builder()
        .memory(8 << 20)
        .cpus(2)
        .vmx(VmxChoice::Max)
        .image(hypervisor::image(&Options::default()))
        .build()
        .unwrap()
}

#[test]
fn every_run_after_going_back_is_the_run_after_the_mark() {
    for at in [1, 40, 77, 150, 300] {
        let mut machine = nested();
        machine.run(&Until::tick(at)).unwrap();
        let mark = machine.mark().unwrap();
        let marked = machine.state_hash().unwrap();
        let finish = |machine: &mut Machine| {
            let stop = machine.run(&Until::end()).unwrap();
            assert_eq!(stop, Stop::PoweredOff);
            (machine.now(), machine.state_hash().unwrap())
        };
        let first = finish(&mut machine);
        for round in 0..5u64 {
            machine.go_back(&mark).unwrap();
            assert_eq!(machine.state_hash().unwrap(), marked);
            if round % 2 == 1 {
                // Another way, which leaves its own traces.
                machine
                    .poke_physical(L2_CODE + 0x20_0000, &[0x0f, 0x0b])
                    .unwrap();
                machine.run(&Until::tick(at + 10 * round)).unwrap();
                machine.go_back(&mark).unwrap();
            }
            assert_eq!(finish(&mut machine), first, "round {round} from {at}");
        }
        // A machine that was saved there does the same.
        let mut other = nested();
        other.run(&Until::tick(at)).unwrap();
        other.save().unwrap();
        assert_eq!(finish(&mut other), first, "from {at}");
    }
}

/// Writes its own code, and reads it back in other ways than it was written.
#[test]
fn code_that_was_changed_is_what_it_was() {
    let mut machine = long(|a| {
        let mut again = a.create_label();
        let mut patched = a.create_label();
        a.set_label(&mut again)?;
        a.lea(rdi, byte_ptr(patched))?;
        a.inc(byte_ptr(rdi + 2))?;
        a.set_label(&mut patched)?;
        // REX.W ADD RAX, imm8: the third byte after three is the number.
        a.db(&[0x83, 0xc0, 0x01])?;
        a.add(qword_ptr(DATA), rax)?;
        a.jmp(again)
    });
    machine.run(&Until::tick(1000)).unwrap();
    let mark = machine.mark().unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        machine.run(&Until::tick(5000)).unwrap();
        seen.push(machine.state_hash().unwrap());
        machine.go_back(&mark).unwrap();
        machine.run(&Until::tick(1300)).unwrap();
        machine.go_back(&mark).unwrap();
    }
    assert!(seen.windows(2).all(|two| two[0] == two[1]), "{seen:x?}");
}

/// A page of code and a page of data that share an entry of the TLB, and a guest that clears the accessed
/// flag of the former: what is decoded, and how, must not tell.
#[test]
fn how_code_is_executed_is_no_business_of_the_tlb() {
    let machine = || {
        let mut machine = Machine::builder().memory(32 << 20).build().unwrap();
        let mut asm = CodeAssembler::new(64).unwrap();
        let mut again = asm.create_label();
        let mut code = |a: &mut CodeAssembler| {
            a.set_label(&mut again)?;
            // Takes the entry of the page of the code.
            a.mov(rax, qword_ptr(rsi))?;
            a.and(qword_ptr(TABLE + (CODE >> 12 << 3)), !(ACCESSED as i32))?;
            a.inc(rcx)?;
            let mut over = a.create_label();
            a.test(rcx, 1)?;
            a.jz(over)?;
            a.add(qword_ptr(DATA), 1)?;
            a.set_label(&mut over)?;
            a.mov(rdx, qword_ptr(TABLE + (CODE >> 12 << 3)))?;
            a.add(rbx, rdx)?;
            a.jmp(again)
        };
        code(&mut asm).unwrap();
        machine
            .poke_physical(CODE, &asm.assemble(CODE).unwrap())
            .unwrap();
        set_up(&mut machine);
        let mut state = machine.read_vcpu(0).unwrap();
        state.gpr[6] = CODE + (4096 << 12);
        machine.write_vcpu(0, &state).unwrap();
        machine
    };
    let hash = |prepare: fn(&mut Machine)| {
        let mut machine = machine();
        prepare(&mut machine);
        machine.run(&Until::tick(10_000)).unwrap();
        machine.state_hash().unwrap()
    };
    let plain = hash(|_| {});
    assert_eq!(hash(|m| m.set_breakpoint(0x1234)), plain, "singly");
    let traced = hash(|m| m.set_tracer(Some(Box::new(|_| {}))).unwrap());
    assert_eq!(traced, plain, "traced");
    let covered = hash(|m| drop(m.set_coverage(Some(Coverage::new(8).unwrap())).unwrap()));
    assert_eq!(covered, plain, "with coverage");
    let mut cut = machine();
    for tick in (0..=10_000).step_by(3) {
        cut.run(&Until::tick(tick)).unwrap();
    }
    cut.run(&Until::tick(10_000)).unwrap();
    assert_eq!(cut.state_hash().unwrap(), plain, "in pieces");
}

#[test]
fn a_mark_that_is_gone_is_refused_and_changes_nothing() {
    let (mut machine, mut other) = (nested(), nested());
    let first = machine.mark().unwrap();
    let second = machine.mark().unwrap();
    other.mark().unwrap();
    machine.run(&Until::tick(50)).unwrap();
    let before = machine.state_hash().unwrap();
    assert_eq!(machine.go_back(&first), Err(MarkError::Gone));
    assert_eq!(other.go_back(&second), Err(MarkError::Gone));
    assert_eq!(machine.state_hash().unwrap(), before);
    machine.go_back(&second).unwrap();
    machine.forget_mark();
    assert_eq!(machine.go_back(&second), Err(MarkError::Gone));
    assert!(!machine.ram().tracks_dirty());
}

#[test]
fn pages_put_back_count_as_written_for_who_tracks_them() {
    let mut machine = long(|a| {
        a.mov(qword_ptr(DATA), rcx)?;
        a.hlt()
    });
    machine.track_dirty(true).unwrap();
    machine.poke_physical(0x5000, &[1]).unwrap();
    let mark = machine.mark().unwrap();
    machine.run(&Until::tick(10)).unwrap();
    assert!(machine.take_dirty().contains(&5));
    machine.poke_physical(0x6000, &[1]).unwrap();
    machine.go_back(&mark).unwrap();
    let back = machine.take_dirty();
    assert!(
        back.contains(&6) && back.contains(&0x20) && !back.contains(&5),
        "{back:x?}"
    );
    assert_eq!(machine.ram().bytes()[0x6000], 0);
    assert_eq!(machine.ram().bytes()[0x5000], 1);
}

#[test]
fn coverage_has_the_blocks_of_both_levels_and_changes_nothing() {
    let mut plain = nested();
    plain.run(&Until::end()).unwrap();
    let mut machine = nested();
    let coverage = Coverage::new(12).unwrap().with_blocks();
    assert!(machine.set_coverage(Some(coverage)).unwrap().is_none());
    machine.run(&Until::end()).unwrap();
    assert_eq!(machine.state_hash().unwrap(), plain.state_hash().unwrap());
    let coverage = machine.set_coverage(None).unwrap().unwrap();
    let starts = |guest: bool, rip: u64| {
        coverage
            .blocks()
            .any(|block| (block.guest, block.rip) == (guest, rip))
    };
    assert!(starts(false, hypervisor::START) && starts(false, hypervisor::HANDLER));
    assert!(starts(true, L2_BASE + L2_CODE) && !starts(false, L2_BASE + L2_CODE));
    let counted = coverage
        .counters()
        .iter()
        .filter(|&&count| count != 0)
        .count();
    assert!(counted > 10 && counted < 200, "{counted}");
    assert!(Coverage::new(7).is_err() && Coverage::new(29).is_err());
}

#[test]
fn another_way_through_the_code_gives_other_counters_and_the_same_way_the_same() {
    let mut machine = long(|a| {
        let mut other = a.create_label();
        let mut end = a.create_label();
        a.cmp(byte_ptr(DATA), 7)?;
        a.je(other)?;
        a.inc(rax)?;
        a.jmp(end)?;
        a.set_label(&mut other)?;
        a.dec(rax)?;
        a.set_label(&mut end)?;
        a.out(0xf4, al)
    });
    machine
        .set_coverage(Some(Coverage::new(16).unwrap()))
        .unwrap();
    let mark = machine.mark().unwrap();
    let mut run = |byte: u8| {
        machine.go_back(&mark).unwrap();
        machine.poke_physical(DATA, &[byte]).unwrap();
        machine.coverage().unwrap().clear();
        assert!(machine.run(&Until::end()).unwrap().is_end());
        machine.coverage().unwrap().counters().to_vec()
    };
    let (a, b, c, d) = (run(1), run(7), run(2), run(7));
    assert!(a == c && b == d && a != b);
}
