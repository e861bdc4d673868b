//! The same guest on the same board, executed by our processor and by the host's kernel.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use hypernest_kvm::KvmEngine;
use hypernest_machine::{
    Claim, Device, DeviceAccess, DeviceContext, Machine, MachineBuilder, Stop, Until,
};
use iced_x86::code_asm::*;

/// A register of 32 bits in memory that gives back what was written, inverted.
#[derive(Default)]
struct Inverter(u32);

/// Above the memory.
const INVERTER: u64 = 0xd_0000;

impl Device for Inverter {
    fn name(&self) -> &str {
        "inverter"
    }

    fn claims(&self) -> Vec<Claim> {
        vec![Claim::Memory(INVERTER..INVERTER + 0x1000)]
    }

    fn read(&mut self, _: &mut DeviceContext<'_>, _: DeviceAccess) -> u64 {
        u64::from(!self.0)
    }

    fn write(&mut self, _: &mut DeviceContext<'_>, _: DeviceAccess, value: u64) {
        self.0 = value as u32;
    }

    fn save(&self) -> Vec<u8> {
        self.0.to_le_bytes().to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> bool {
        let bytes = state.try_into().map(u32::from_le_bytes);
        bytes.inspect(|value| self.0 = *value).is_ok()
    }
}

/// 16-bit code: prints, asks the inverter, prints its answer, and halts or exits.
fn guest(end: fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let assemble = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(16)?;
        a.mov(dx, 0x3f8)?;
        for byte in b"answer: " {
            a.mov(al, u32::from(*byte))?;
            a.out(dx, al)?;
        }
        a.mov(bx, (INVERTER >> 4) as u32)?;
        a.mov(ds, bx)?;
        // Inverted, these are the letters "yes\n".
        a.mov(eax, !u32::from_le_bytes(*b"yes\n"))?;
        a.mov(dword_ptr(0x10), eax)?;
        a.mov(ecx, dword_ptr(0x10))?;
        for _ in 0..4 {
            a.mov(al, cl)?;
            a.out(dx, al)?;
            a.shr(ecx, 8)?;
        }
        end(&mut a)?;
        a.assemble(0x7c00)
    };
    assemble().expect("the guest assembles")
}

fn builder<'a>(image: Vec<u8>) -> MachineBuilder<'a> {
    Machine::builder()
        .memory(0xa_0000)
        .cpus(1)
        .image(image)
        .raw()
        .device(Inverter::default())
}

/// The guest on KVM, or a message why not.
fn on_kvm(image: Vec<u8>) -> Option<Machine> {
    let built = builder(image)
        .engine(|config| Ok(Box::new(KvmEngine::new(config)?)))
        .build();
    built
        .inspect_err(|error| println!("skipped: no KVM here: {error}"))
        .ok()
}

#[test]
fn a_guest_prints_the_same_on_both_engines_and_exits() {
    let image = guest(|a| {
        a.mov(al, 3)?;
        a.out(0xf4, al)
    });
    let Some(mut kvm) = on_kvm(image.clone()) else {
        return;
    };
    let mut software = builder(image).build().expect("the software engine");
    let mut printed = Vec::new();
    for machine in [&mut software, &mut kvm] {
        let stop = machine.run(&Until::end()).expect("a run");
        assert_eq!(stop, Stop::Exit { value: 3 }, "{}", machine.engine_name());
        printed.push(machine.take_serial_output());
    }
    assert_eq!(printed[0], b"answer: yes\n");
    assert_eq!(printed[0], printed[1]);
}

#[test]
fn a_halted_guest_has_the_same_registers_on_both_engines() {
    let image = guest(|a| a.hlt());
    let Some(mut kvm) = on_kvm(image.clone()) else {
        return;
    };
    let mut software = builder(image).build().expect("the software engine");
    let states = [&mut software, &mut kvm].map(|machine| {
        let stop = machine.run(&Until::end()).expect("a run");
        assert_eq!(stop, Stop::Idle, "{}", machine.engine_name());
        machine.read_vcpu(0).expect("vCPU 0")
    });
    assert_eq!(states[0].gpr, states[1].gpr);
    assert_eq!(states[0].rip, states[1].rip);
    // SHR leaves AF undefined.
    const AF: u64 = 1 << 4;
    assert_eq!(states[0].rflags | AF, states[1].rflags | AF);
    assert_eq!(states[0].activity, states[1].activity);
    assert_eq!(states[0].segments.ds, states[1].segments.ds);
    assert_eq!(states[0].fpu.control, states[1].fpu.control);
}

#[test]
fn a_machine_begun_on_one_engine_ends_on_the_other() {
    let image = guest(|a| {
        a.mov(al, 3)?;
        a.out(0xf4, al)
    });
    let Some(mut kvm) = on_kvm(image.clone()) else {
        return;
    };
    let mut software = builder(image).build().expect("the software engine");
    let stop = software.run(&Until::end().text("answer: ")).expect("a run");
    assert_eq!(stop, Stop::Text { index: 0 });
    let state = software.read_vcpu(0).expect("vCPU 0");
    kvm.write_vcpu(0, &state).expect("KVM takes our state");
    let stop = kvm.run(&Until::end()).expect("a run");
    assert_eq!(stop, Stop::Exit { value: 3 });
    assert_eq!(kvm.take_serial_output(), b"yes\n");
}
