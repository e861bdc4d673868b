//! What a change of the current VMCS takes, in the written layout and from another one, through the guest's own
//! instructions; and what the translation of a nested state takes. `cargo xtask bench vmcs` runs it.

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use hypernest_machine::{Layout, Machine, Until, VmxChoice, VmxLayouts};
use hypernest_vmcs::nested_state::{HEADER, IMAGE};
use hypernest_vmcs::{Field, Losses, NestedState, Translation, Vmcs};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const CODE: u64 = 0x10_0000;
const REGIONS: [u64; 2] = [0x8000, 0x9000];
const POINTERS: u64 = 0xa000;
/// Rounds of a measured loop.
const ROUNDS: u32 = 300_000;
/// Measurements, of which the least counts: others on the host only add.
const REPEATS: usize = 5;
const BLOBS: usize = 1_000_000;

type Result<T> = std::result::Result<T, Box<dyn Error>>;
type Emit<'a> = &'a dyn Fn(&mut CodeAssembler) -> std::result::Result<(), IcedError>;

fn named(name: &str) -> Result<Layout> {
    Ok(Layout::named(name).ok_or("no such layout")?.clone())
}

/// A machine in 64-bit mode and VMX operation that does `round` again and again.
fn machine(round: Emit) -> Result<Machine> {
    let mut asm = CodeAssembler::new(64)?;
    let mut again = asm.create_label();
    asm.vmxon(qword_ptr(POINTERS))?;
    asm.set_label(&mut again)?;
    round(&mut asm)?;
    asm.dec(ebx)?;
    asm.jnz(again)?;
    asm.hlt()?;
    let layouts = VmxLayouts {
        advertised: Some(named("kvm-3.10")?),
        written: Some(named("hypernest-evmcs")?),
        accepted: Vec::new(),
    };
    let mut machine = Machine::builder()
        .memory(4 << 20)
        .vmx(VmxChoice::Max)
        .vmcs_layouts(layouts)
        .build()?;
    machine.poke_physical(CODE, &asm.assemble(CODE)?)?;
    for (address, entry) in [(0x1000, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x83)] {
        machine.poke_physical(address, &entry.to_le_bytes())?;
    }
    // The VMXON region, then the others.
    for (n, at) in [0xb000].into_iter().chain(REGIONS).enumerate() {
        machine.poke_physical(at, &named("kvm-3.10")?.revision().to_le_bytes())?;
        machine.poke_physical(POINTERS + 8 * n as u64, &at.to_le_bytes())?;
    }
    let mut state = machine.read_vcpu(0)?;
    state.segments.cs.base = 0;
    state.segments.cs.rights = 0xa09b;
    state.segments.ss.rights = 0xc093;
    state.cr0 = 0x8000_0031;
    state.cr3 = 0x1000;
    state.cr4 = 0x2020;
    state.msrs.efer = 0x500;
    state.msrs.feature_control = 5;
    state.rip = CODE;
    state.gpr[3] = ROUNDS.into();
    machine.write_vcpu(0, &state)?;
    Ok(machine)
}

/// Nanoseconds of a round; so many regions have the written layout after it.
fn measure(regions: usize, round: Emit) -> Result<f64> {
    let mut least = f64::MAX;
    for _ in 0..REPEATS {
        let mut machine = machine(round)?;
        let start = Instant::now();
        machine.run(&Until::end())?;
        let seconds = start.elapsed().as_secs_f64();
        let state = machine.read_vcpu(0)?;
        if state.gpr[3] != 0 || state.vmx.region.is_none() {
            return Err(format!("the loop went wrong: {state:#x?}").into());
        }
        let counts = machine.vmcs_regions()?;
        if counts.last().map(|count| count.pages) != Some(regions) {
            return Err(format!("not {regions} regions are written: {counts:?}").into());
        }
        least = least.min(seconds);
    }
    Ok(least * 1e9 / f64::from(ROUNDS))
}

/// Nested states with everything that both layouts hold.
fn blobs(from: &Layout, to: &Layout) -> Result<Vec<Vec<u8>>> {
    let mut seed = 1u64;
    let mut blobs = Vec::new();
    for _ in 0..64 {
        let mut vmcs = Vmcs::new();
        for field in Field::ALL.into_iter().filter(|&field| to.holds(field)) {
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            vmcs.set(field, seed);
        }
        let mut state = NestedState {
            vmxon: 0x1000,
            vmcs: 0x2000,
            data: vec![0; IMAGE],
            ..NestedState::default()
        };
        from.write(&vmcs, &mut state.data)?;
        blobs.push(state.to_bytes());
    }
    Ok(blobs)
}

/// Seconds for all blobs.
fn translate(from: &str, to: &str) -> Result<f64> {
    let (from, to) = (named(from)?, named(to)?);
    let map = Translation::new(&from, &to);
    let blobs = blobs(&from, &to)?;
    let mut out = vec![0; HEADER + IMAGE];
    let start = Instant::now();
    for blob in blobs.iter().cycle().take(BLOBS) {
        out[..HEADER].copy_from_slice(&blob[..HEADER]);
        map.run(&blob[HEADER..], &mut out[HEADER..], Losses::Refused)?;
        black_box(&mut out);
    }
    Ok(start.elapsed().as_secs_f64())
}

fn verdict(value: f64, goal: f64) -> &'static str {
    if value < goal { "met" } else { "NOT MET" }
}

fn main() -> Result<()> {
    let [first, other] = [1, 2].map(|n| qword_ptr(POINTERS + 8 * n));
    let nothing = measure(0, &|asm| asm.nop())?;
    let pair = measure(1, &|asm| {
        asm.vmptrld(first)?;
        asm.vmclear(first)
    })? - nothing;
    println!(
        "VMPTRLD and VMCLEAR of the written layout: {pair:.0} ns together; goal under 1000 ns each: {}",
        verdict(pair, 2000.0)
    );
    let change = measure(2, &|asm| {
        asm.vmptrld(first)?;
        asm.vmptrld(other)
    })? / 2.0;
    println!("VMPTRLD of another, which writes the current one: {change:.0} ns");
    let foreign = named("kvm-3.10")?.revision();
    let stamped = measure(1, &|asm| {
        asm.mov(dword_ptr(REGIONS[0]), foreign)?;
        asm.vmptrld(first)?;
        asm.vmclear(first)
    })? - nothing;
    println!(
        "VMPTRLD of a foreign layout and VMCLEAR into the written one: {stamped:.0} ns together; goal under 3000 ns each: {}",
        verdict(stamped, 6000.0)
    );
    for (from, to) in [
        ("kvm-3.10", "hypernest-evmcs"),
        ("hypernest-evmcs", "kvm"),
        ("kvm", "hypernest"),
    ] {
        let seconds = translate(from, to)?;
        println!(
            "{BLOBS} nested states from {from} to {to}: {seconds:.2} s; goal under 3 s: {}",
            verdict(seconds, 3.0)
        );
    }
    Ok(())
}
