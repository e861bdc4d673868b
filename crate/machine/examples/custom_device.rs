//! A device of your own: ports, direct memory access, a timer and an interrupt.
//!
//! `cargo run -p hypernest-machine --example custom_device`

use std::error::Error;

use hypernest_machine::{Claim, Device, DeviceAccess, DeviceContext, Machine, Stop, Tick, Until};
use iced_x86::code_asm::*;

const PORT: u32 = 0x300;
const GSI: u8 = 5;

/// The guest writes an address to its port. A millisecond later the device puts a greeting there
/// and interrupts; a read of the port ends the interrupt.
#[derive(Default)]
struct Greeter {
    job: Option<(Tick, u64)>,
    greetings: u8,
}

impl Device for Greeter {
    fn name(&self) -> &str {
        "greeter"
    }

    fn claims(&self) -> Vec<Claim> {
        vec![Claim::Ports(PORT..PORT + 4)]
    }

    fn read(&mut self, context: &mut DeviceContext<'_>, _: DeviceAccess) -> u64 {
        context.set_interrupt(GSI, false);
        u64::from(self.greetings)
    }

    fn write(&mut self, context: &mut DeviceContext<'_>, _: DeviceAccess, value: u64) {
        self.job = Some((context.now + 1_000_000, value));
    }

    fn deadline(&self) -> Option<Tick> {
        self.job.map(|(due, _)| due)
    }

    fn advance(&mut self, context: &mut DeviceContext<'_>) {
        if let Some((_, address)) = self.job.take() {
            // A guest may give any address: one without RAM gets nothing.
            if context.ram.write(address, b"good morning\n").is_ok() {
                self.greetings += 1;
            }
            context.set_interrupt(GSI, true);
        }
    }

    fn save(&self) -> Vec<u8> {
        let (due, address) = self.job.unwrap_or((Tick::MAX, 0));
        let mut bytes = vec![self.greetings];
        bytes.extend(due.to_le_bytes());
        bytes.extend(address.to_le_bytes());
        bytes
    }

    fn restore(&mut self, state: &[u8]) -> bool {
        let Some((greetings, job)) = state.split_first() else {
            return false;
        };
        let Ok(job) = <[u8; 16]>::try_from(job) else {
            return false;
        };
        let job = u128::from_le_bytes(job);
        let (due, address) = (job as u64, (job >> 64) as u64);
        self.greetings = *greetings;
        self.job = (due != Tick::MAX).then_some((due, address));
        true
    }
}

/// 16-bit code: asks the device, halts until it interrupts, prints what it wrote.
fn guest() -> Result<Vec<u8>, Box<dyn Error>> {
    let mut a = CodeAssembler::new(16)?;
    let (mut print, mut done) = (a.create_label(), a.create_label());
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    // 8259: vectors from 20H, only input 5 open, automatic end of interrupt.
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 3),
        (0x21, 0xdf),
    ] {
        a.mov(al, value)?;
        a.out(port, al)?;
    }
    // The handler of vector 25H is a lone IRET at 600H.
    a.mov(byte_ptr(0x600), 0xcf)?;
    a.mov(word_ptr(0x25 * 4), 0x600)?;
    a.mov(word_ptr(0x25 * 4 + 2), 0)?;
    a.mov(dx, PORT)?;
    a.mov(eax, 0x9000)?;
    a.out(dx, eax)?;
    a.sti()?;
    a.hlt()?;
    a.in_(al, dx)?;
    a.mov(ah, al)?;
    a.mov(si, 0x9000)?;
    a.mov(dx, 0x3f8)?;
    a.set_label(&mut print)?;
    a.lodsb()?;
    a.test(al, al)?;
    a.jz(done)?;
    a.out(dx, al)?;
    a.jmp(print)?;
    a.set_label(&mut done)?;
    a.mov(al, ah)?;
    a.out(0xf4, al)?;
    Ok(a.assemble(0x7c00)?)
}

/// Runs the example.
pub fn main() -> Result<(), Box<dyn Error>> {
    let mut machine = Machine::builder()
        .memory(1 << 20)
        .image(guest()?)
        .raw()
        .device(Greeter::default())
        .build()?;
    let stop = machine.run(&Until::end())?;
    print!("{}", String::from_utf8_lossy(&machine.take_serial_output()));
    println!("{stop} at tick {}", machine.now());
    assert_eq!(stop, Stop::Exit { value: 1 });
    assert!(machine.now() > 1_000_000);
    Ok(())
}
