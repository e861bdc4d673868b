//! QEMU's migration streams, assembled from what is known of them.

use hypernest_vmcs::NestedState;

fn name(out: &mut Vec<u8>, name: &str) {
    out.push(5);
    out.push(name.len() as u8);
    out.extend(name.as_bytes());
    out.extend(1u32.to_be_bytes());
}

/// The subsection of a nested state.
pub fn subsection(state: &NestedState) -> Vec<u8> {
    let mut out = Vec::new();
    name(&mut out, "cpu/nested_state");
    out.extend(state.flags.to_be_bytes());
    out.extend(state.format.to_be_bytes());
    out.extend((state.to_bytes().len() as u32).to_be_bytes());
    name(&mut out, "cpu/kvm_nested_state/vmx");
    out.extend(state.vmxon.to_be_bytes());
    out.extend(state.vmcs.to_be_bytes());
    out.extend(state.smm_flags.to_be_bytes());
    if let Some(image) = state.image() {
        name(&mut out, "cpu/kvm_nested_state/vmx/vmcs12");
        out.extend(image);
    }
    if let Some(image) = state.shadow_image() {
        name(&mut out, "cpu/kvm_nested_state/vmx/shadow_vmcs12");
        out.extend(image);
    }
    out
}

/// A stream with a page of RAM and a processor for each of `states`.
pub fn stream(states: &[Option<NestedState>]) -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03".to_vec();
    out.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    out.extend([0xA5; 4096]);
    out.extend(b"\x7E\0\0\0\x02");
    for (cpu, state) in (0u32..).zip(states) {
        let section = cpu + 6;
        out.push(4);
        out.extend(section.to_be_bytes());
        out.extend(b"\x03cpu");
        out.extend(cpu.to_be_bytes());
        out.extend(12u32.to_be_bytes());
        // Registers, as far as anybody looks.
        out.extend([0x5A; 1800]);
        name(&mut out, "cpu/poll_control_msr");
        out.extend([0; 8]);
        out.extend(state.as_ref().map(subsection).unwrap_or_default());
        out.push(0x7E);
        out.extend(section.to_be_bytes());
    }
    out.push(0);
    out
}
