//! Moments between two instructions at which more is going on than registers tell: each moves with the machine.

use hypernest_cpu::{Activity, VcpuState};
use hypernest_machine::{Machine, Until, VmxLayouts};
use hypernest_migrate::live::{DestinationNext, Settings};
use hypernest_vmcs::Field;

use crate::link::{Link, empty_like, machine, migrate};

/// What is brought about in a guest of the built-in hypervisor.
type Instant = (&'static str, fn(&mut VcpuState));

fn set(state: &mut VcpuState, field: Field, value: u64) {
    let encoding = field.encoding();
    let fields = &mut state.vmx.fields;
    fields.retain(|(other, _)| *other != encoding);
    if value != 0 {
        fields.push((encoding, value));
        fields.sort_unstable();
    }
}

/// Valid, an external interrupt, vector 32.
const INTERRUPT: u64 = 1 << 31 | 0x20;

const INSTANTS: &[Instant] = &[
    ("nothing more", |_| {}),
    ("an entry that is yet to inject its event", |state| {
        set(state, Field::VM_ENTRY_INTR_INFO_FIELD, INTERRUPT);
        state.vmx.inject = true;
    }),
    ("an MTF exit pending", |state| state.vmx.mtf_pending = true),
    ("a preemption deadline under a TSC offset", |state| {
        set(state, Field::TSC_OFFSET, 0x1234_5678);
        state.vmx.preemption_deadline = Some(1 << 40);
    }),
    ("a guest that waits in HLT", |state| {
        state.activity = Activity::Halted;
    }),
    ("a guest that waits for a start-up IPI", |state| {
        state.activity = Activity::WaitForSipi;
    }),
    ("valid IDT-vectoring information", |state| {
        set(state, Field::IDT_VECTORING_INFO_FIELD, INTERRUPT);
    }),
    ("a virtual interrupt pending", |state| {
        set(state, Field::GUEST_INTR_STATUS, 0x31);
        state.vmx.virtual_interrupt = true;
    }),
    ("a page-modification log that is half full", |state| {
        set(state, Field::GUEST_PML_INDEX, 255);
    }),
    ("a write to the virtual APIC yet to be emulated", |state| {
        state.vmx.apic_write = Some(0xb0);
    }),
    ("virtual NMIs blocked", |state| {
        state.vmx.virtual_nmi_blocking = true;
    }),
    ("an interrupt shadow", |state| state.sti_shadow = true),
    ("a debug trap pending", |state| state.pending_debug = 1),
];

/// In the guest, at the instant.
fn at(instant: &Instant) -> Machine {
    let mut machine = machine(VmxLayouts::default());
    let mut printed = 0;
    loop {
        let tick = machine.now() + 7;
        let stop = machine.run(&Until::tick(tick)).unwrap();
        assert!(!stop.is_end(), "{stop}: the guest never ran");
        let mut state = machine.read_vcpu(0).unwrap();
        // Some exits into its run.
        printed += machine.take_serial_output().len();
        if state.vmx.non_root && printed > 200 {
            (instant.1)(&mut state);
            machine.write_vcpu(0, &state).unwrap();
            return machine;
        }
    }
}

#[test]
fn each_instant_moves_with_the_machine() {
    for instant in INSTANTS {
        let about = instant.0;
        let (mut source, mut saved) = (at(instant), at(instant));
        // It does not run on before it is stopped.
        let link = Link {
            ticks: 0,
            ..Link::default()
        };
        let settings = (Settings::default(), Settings::default());
        let mut ended = migrate(&mut source, link, settings, |machine| {
            Ok(empty_like(machine, None))
        });
        assert_eq!(ended.destination, DestinationNext::Own, "{about}");
        let mut moved = ended.destination_side.take_machine().unwrap();
        saved.save().unwrap();
        assert_eq!(moved.state().unwrap(), saved.state().unwrap(), "{about}");
        // It goes on as the one that stayed, whatever comes of it.
        let end = moved.now() + 20_000;
        let stops = [&mut moved, &mut saved].map(|m| m.run(&Until::tick(end)).unwrap());
        assert_eq!(stops[0].to_string(), stops[1].to_string(), "{about}");
        assert_eq!(moved.state_hash(), saved.state_hash(), "{about}");
    }
}
