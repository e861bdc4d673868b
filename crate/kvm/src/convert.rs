//! Between [`VcpuState`] and KVM's structures (Linux, Documentation/virt/kvm/api.rst).

use hypernest_cpu::{FpuState, SegmentState, TableState, VcpuState};
use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

/// MSRs carried over, with the field each belongs to.
pub type MsrField = fn(&mut VcpuState) -> &mut u64;

/// Every MSR that KVM keeps as plain storage.
pub const MSRS: &[(u32, MsrField)] = &[
    (0xc000_0081, |s| &mut s.msrs.star),
    (0xc000_0082, |s| &mut s.msrs.lstar),
    (0xc000_0083, |s| &mut s.msrs.cstar),
    (0xc000_0084, |s| &mut s.msrs.fmask),
    (0xc000_0102, |s| &mut s.msrs.kernel_gs_base),
    (0x174, |s| &mut s.msrs.sysenter_cs),
    (0x175, |s| &mut s.msrs.sysenter_esp),
    (0x176, |s| &mut s.msrs.sysenter_eip),
    (0x277, |s| &mut s.msrs.pat),
];

pub fn to_regs(state: &VcpuState) -> kvm_regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = state.gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags,
    }
}

pub fn from_regs(state: &mut VcpuState, r: &kvm_regs) {
    state.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    state.rip = r.rip;
    state.rflags = r.rflags;
}

fn to_segment(segment: &SegmentState) -> kvm_segment {
    let bits = |low: u32, count: u32| (segment.rights >> low & ((1 << count) - 1)) as u8;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: bits(0, 4),
        s: bits(4, 1),
        dpl: bits(5, 2),
        present: bits(7, 1),
        avl: bits(12, 1),
        l: bits(13, 1),
        db: bits(14, 1),
        g: bits(15, 1),
        unusable: bits(16, 1),
        padding: 0,
    }
}

fn from_segment(segment: &kvm_segment) -> SegmentState {
    let parts = [
        (segment.type_, 0),
        (segment.s, 4),
        (segment.dpl, 5),
        (segment.present, 7),
        (segment.avl, 12),
        (segment.l, 13),
        (segment.db, 14),
        (segment.g, 15),
        (segment.unusable, 16),
    ];
    SegmentState {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        rights: parts
            .iter()
            .fold(0, |all, (value, low)| all | u32::from(*value) << low),
    }
}

fn to_table(table: TableState) -> kvm_dtable {
    kvm_dtable {
        base: table.base,
        limit: table.limit,
        padding: [0; 3],
    }
}

/// `before` supplies what [`VcpuState`] keeps elsewhere (CR8, interrupts in delivery).
pub fn to_sregs(state: &VcpuState, before: kvm_sregs) -> kvm_sregs {
    let s = &state.segments;
    kvm_sregs {
        cs: to_segment(&s.cs),
        ds: to_segment(&s.ds),
        es: to_segment(&s.es),
        fs: to_segment(&s.fs),
        gs: to_segment(&s.gs),
        ss: to_segment(&s.ss),
        tr: to_segment(&s.tr),
        ldt: to_segment(&s.ldtr),
        gdt: to_table(state.gdtr),
        idt: to_table(state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: state.msrs.efer,
        apic_base: state.msrs.apic_base,
        ..before
    }
}

pub fn from_sregs(state: &mut VcpuState, s: &kvm_sregs) {
    let segments = &mut state.segments;
    segments.cs = from_segment(&s.cs);
    segments.ds = from_segment(&s.ds);
    segments.es = from_segment(&s.es);
    segments.fs = from_segment(&s.fs);
    segments.gs = from_segment(&s.gs);
    segments.ss = from_segment(&s.ss);
    segments.tr = from_segment(&s.tr);
    segments.ldtr = from_segment(&s.ldt);
    let table = |t: &kvm_dtable| TableState {
        base: t.base,
        limit: t.limit,
    };
    state.gdtr = table(&s.gdt);
    state.idtr = table(&s.idt);
    state.cr0 = s.cr0;
    state.cr2 = s.cr2;
    state.cr3 = s.cr3;
    state.cr4 = s.cr4;
    state.msrs.efer = s.efer;
    state.msrs.apic_base = s.apic_base;
}

pub fn to_fpu(fpu: &FpuState) -> kvm_fpu {
    let mut fpr = [[0; 16]; 8];
    for (to, from) in fpr.iter_mut().zip(&fpu.st) {
        to[..10].copy_from_slice(from);
    }
    kvm_fpu {
        fpr,
        fcw: fpu.control,
        fsw: fpu.status,
        ftwx: fpu.tag,
        last_opcode: fpu.opcode,
        last_ip: fpu.instruction,
        last_dp: fpu.operand,
        xmm: fpu.xmm.map(u128::to_le_bytes),
        mxcsr: fpu.mxcsr,
        ..kvm_fpu::default()
    }
}

pub fn from_fpu(state: &mut VcpuState, f: &kvm_fpu) {
    let fpu = &mut state.fpu;
    for (to, from) in fpu.st.iter_mut().zip(&f.fpr) {
        to.copy_from_slice(&from[..10]);
    }
    fpu.control = f.fcw;
    fpu.status = f.fsw;
    fpu.tag = f.ftwx;
    fpu.opcode = f.last_opcode;
    fpu.instruction = f.last_ip;
    fpu.operand = f.last_dp;
    fpu.xmm = f.xmm.map(u128::from_le_bytes);
    fpu.mxcsr = f.mxcsr;
}
