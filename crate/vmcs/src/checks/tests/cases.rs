//! One mutation for each row, after which it is the first to fail.

use super::*;

pub struct Case {
    pub id: &'static str,
    base: Base,
    change: fn(&mut World) -> &mut World,
}

impl Case {
    pub fn world(&self) -> World {
        let mut w = (self.base)();
        (self.change)(&mut w);
        w
    }
}

const fn case(id: &'static str, base: Base, change: fn(&mut World) -> &mut World) -> Case {
    Case { id, base, change }
}

/// From the 64-bit world.
const fn c(id: &'static str, change: fn(&mut World) -> &mut World) -> Case {
    case(id, long_mode, change)
}

const NONCANONICAL: u64 = 0x0000_8000_0000_0000;
const BEYOND: u64 = 1 << 46;

pub const CASES: &[Case] = &[
    // VM-execution controls.
    c("C001", |w| w.off(PIN, 1u32 << 1)),
    c("C002", |w| w.off(PROC1, 1u32 << 1)),
    c("C003", |w| w.proc2(proc2::EPC_VIRTUALIZATION_EXTENSIONS)),
    c("C004", |w| w.proc3(1 << 63)),
    c("C005", |w| w.set(Field::CR3_TARGET_COUNT, 5)),
    c("C006", |w| {
        w.on(PROC1, proc1::USE_I_O_BITMAPS)
            .set(Field::IO_BITMAP_A, 0x1800)
    }),
    c("C007", |w| {
        w.on(PROC1, proc1::USE_I_O_BITMAPS)
            .set(Field::IO_BITMAP_B, BEYOND)
    }),
    c("C008", |w| {
        w.on(PROC1, proc1::USE_MSR_BITMAPS)
            .set(Field::MSR_BITMAP, 0x1001)
    }),
    c("C009", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .set(Field::VIRTUAL_APIC_PAGE_ADDR, 0x1001)
    }),
    c("C010", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .set(Field::TPR_THRESHOLD, 0x10)
    }),
    c("C011", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .set(Field::TPR_THRESHOLD, 6)
    }),
    c("C012", |w| w.proc2(proc2::APIC_REGISTER_VIRTUALIZATION)),
    c("C013", |w| w.proc3(proc3::IPI_VIRTUALIZATION)),
    c("C014", |w| {
        w.on(PIN, pin::VIRTUAL_NMIS).off(PIN, pin::NMI_EXITING)
    }),
    c("C015", |w| w.on(PROC1, proc1::NMI_WINDOW_EXITING)),
    c("C016", |w| {
        w.proc2(proc2::VIRTUALIZE_APIC_ACCESSES)
            .set(Field::APIC_ACCESS_ADDR, 0x123)
    }),
    c("C017", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .proc2(proc2::VIRTUALIZE_APIC_ACCESSES)
            .set(Field::APIC_ACCESS_ADDR, VIRTUAL_APIC)
    }),
    c("C018", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .proc2(proc2::VIRTUALIZE_APIC_ACCESSES | proc2::VIRTUALIZE_X2APIC_MODE)
    }),
    c("C019", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY)
            .off(PIN, pin::EXTERNAL_INTERRUPT_EXITING)
    }),
    c("C020", |w| {
        w.on(PIN, pin::PROCESS_POSTED_INTERRUPTS)
            .on(EXIT, exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    }),
    c("C021", |w| {
        posted_interrupts(w).off(EXIT, exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    }),
    c("C022", |w| {
        posted_interrupts(w).set(Field::POSTED_INTR_NV, 0x100)
    }),
    c("C023", |w| {
        posted_interrupts(w).set(Field::POSTED_INTR_DESC_ADDR, 0x1020)
    }),
    c("C024", |w| w.set(Field::VIRTUAL_PROCESSOR_ID, 0)),
    c("C025", |w| w.set(Field::EPT_POINTER, 3 << 3 | 5)),
    c("C026", |w| w.set(Field::EPT_POINTER, 2 << 3 | 6)),
    c("C027", |w| {
        w.caps.ept_vpid &= !(1 << 21);
        w.on(Field::EPT_POINTER, 1u64 << 6)
    }),
    c("C028", |w| {
        w.caps.ept_vpid &= !(1 << 23);
        w.on(Field::EPT_POINTER, 1u64 << 7)
    }),
    c("C029", |w| w.on(Field::EPT_POINTER, 1u64 << 11)),
    case("C030", no_ept, |w| w.proc2(proc2::UNRESTRICTED_GUEST)),
    case("C031", no_ept, |w| w.proc2(proc2::ENABLE_PML)),
    c("C032", |w| {
        w.proc2(proc2::ENABLE_PML).set(Field::PML_ADDRESS, BEYOND)
    }),
    case("C033", no_ept, |w| {
        w.proc2(proc2::MODE_BASED_EXECUTE_CONTROL_FOR_EPT)
    }),
    case("C034", no_ept, |w| {
        w.proc2(proc2::SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT)
    }),
    c("C035", |w| {
        w.proc2(proc2::SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT)
            .set(Field::SPP_TABLE_POINTER, 0x80)
    }),
    c("C036", |w| {
        w.proc2(proc2::ENABLE_VM_FUNCTIONS)
            .set(Field::VM_FUNCTION_CONTROL, 2)
    }),
    c("C037", |w| {
        w.proc2(proc2::ENABLE_VM_FUNCTIONS)
            .set(Field::VM_FUNCTION_CONTROL, 1)
            .set(Field::EPTP_LIST_ADDRESS, 8)
    }),
    c("C038", |w| {
        w.proc2(proc2::VMCS_SHADOWING).set(Field::VMREAD_BITMAP, 1)
    }),
    c("C039", |w| {
        w.proc2(proc2::VMCS_SHADOWING).set(Field::VMWRITE_BITMAP, 1)
    }),
    c("C040", |w| {
        w.proc2(proc2::EPT_VIOLATION_VE)
            .set(Field::VE_INFORMATION_ADDRESS, BEYOND)
    }),
    c("C041", |w| {
        w.proc2(proc2::INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES)
            .on(ENTRY, entry::LOAD_IA32_RTIT_CTL)
    }),
    c("C042", |w| {
        w.cpu.tracing = true;
        w.on(ENTRY, entry::LOAD_IA32_RTIT_CTL)
    }),
    c("C043", |w| w.proc2(proc2::USE_TSC_SCALING)),
    case("C044", no_ept, |w| w.proc3(proc3::EPT_PAGING_WRITE_CONTROL)),
    c("C045", |w| {
        w.proc3(proc3::ENABLE_HLAT).set(Field::HLAT_POINTER, 0x20)
    }),
    c("C046", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .proc3(proc3::IPI_VIRTUALIZATION)
            .set(Field::PID_POINTER_TABLE, BEYOND - 8)
            .set(Field::LAST_PID_POINTER_INDEX, 1)
    }),
    c("C047", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW | proc1::RDTSC_EXITING)
            .proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY)
            .proc3(proc3::APIC_TIMER_VIRTUALIZATION)
    }),
    c("C048", |w| {
        w.proc2(proc2::PASID_TRANSLATION)
            .set(Field::HIGH_PASID_DIRECTORY_ADDR, 1)
    }),
    c("C077", |w| {
        w.cpu.seam = true;
        w.set(Field::SHARED_EPT_POINTER, 6)
    }),
    // VM-exit controls.
    c("C049", |w| w.off(EXIT, 1u32)),
    c("C050", |w| w.exit2(1 << 63)),
    c("C051", |w| {
        w.on(EXIT, exit::SAVE_VMX_PREEMPTION_TIMER_VALUE)
    }),
    c("C052", |w| {
        w.set(Field::VM_EXIT_MSR_STORE_COUNT, 1)
            .set(Field::VM_EXIT_MSR_STORE_ADDR, 8)
    }),
    c("C053", |w| {
        w.set(Field::VM_EXIT_MSR_STORE_COUNT, 2)
            .set(Field::VM_EXIT_MSR_STORE_ADDR, BEYOND - 16)
    }),
    c("C054", |w| {
        w.set(Field::VM_EXIT_MSR_LOAD_COUNT, 1)
            .set(Field::VM_EXIT_MSR_LOAD_ADDR, BEYOND)
    }),
    c("C055", |w| {
        w.set(Field::VM_EXIT_MSR_LOAD_COUNT, 0xffff_ffff)
            .set(Field::VM_EXIT_MSR_LOAD_ADDR, BEYOND - 16)
    }),
    // VM-entry controls.
    c("C056", |w| w.off(ENTRY, 1u32)),
    c("C057", |w| w.inject(event::RESERVED, 0, 0)),
    c("C058", |w| w.inject(event::NMI, 3, 0)),
    c("C059", |w| w.inject(event::HARDWARE_EXCEPTION, 32, 0)),
    c("C060", |w| w.inject(event::OTHER, 1, 0)),
    c("C061", |w| {
        w.inject(event::EXTERNAL_INTERRUPT, 0x30, 1 << 11)
    }),
    case("C062", real_mode, |w| {
        w.inject(event::HARDWARE_EXCEPTION, 13, 1 << 11)
    }),
    c("C063", |w| {
        w.caps.basic &= !(1 << 56);
        w.inject(event::HARDWARE_EXCEPTION, 13, 0)
    }),
    c("C064", |w| {
        w.inject(event::EXTERNAL_INTERRUPT, 0x30, 1 << 12)
    }),
    c("C071", |w| {
        w.inject(event::EXTERNAL_INTERRUPT, 0x30, 1 << 13)
    }),
    c("C065", |w| {
        w.inject(event::HARDWARE_EXCEPTION, 13, 1 << 11)
            .set(Field::VM_ENTRY_EXCEPTION_ERROR_CODE, 0x1_0000)
    }),
    c("C066", |w| {
        w.inject(event::SOFTWARE_INTERRUPT, 0x80, 0)
            .set(Field::VM_ENTRY_INSTRUCTION_LEN, 16)
    }),
    c("C067", |w| {
        w.set(Field::VM_ENTRY_MSR_LOAD_COUNT, 1)
            .set(Field::VM_ENTRY_MSR_LOAD_ADDR, 1)
    }),
    c("C068", |w| {
        w.set(Field::VM_ENTRY_MSR_LOAD_COUNT, 2)
            .set(Field::VM_ENTRY_MSR_LOAD_ADDR, BEYOND - 16)
    }),
    c("C069", |w| w.on(ENTRY, entry::ENTRY_TO_SMM)),
    case("C070", enter_smm, |w| {
        w.on(ENTRY, entry::DEACTIVATE_DUAL_MONITOR_TREATMENT)
    }),
    case("C072", return_from_smm, |w| {
        w.memory.words.insert(EXECUTIVE_VMCS, 1);
        w
    }),
    case("C073", return_from_smm, |w| {
        w.memory.executive.as_mut().unwrap().launched = false;
        w
    }),
    case("C074", return_from_smm, |w| {
        w.on(ENTRY, entry::DEACTIVATE_DUAL_MONITOR_TREATMENT)
    }),
    case("C075", return_from_smm, |w| {
        let executive = w.memory.executive.as_mut().unwrap();
        executive.set(PIN, 0);
        w
    }),
    case("C076", return_to_root, |w| w.inject(event::NMI, 2, 0)),
    // Host control registers and MSRs.
    c("H001", |w| w.off(Field::HOST_CR0, CR0_PG)),
    c("H002", |w| w.off(Field::HOST_CR4, 0x2000u64)),
    c("H003", |w| w.set(Field::HOST_CR3, BEYOND)),
    c("H004", |w| {
        w.on(Field::HOST_CR4, CR4_CET).off(Field::HOST_CR0, CR0_WP)
    }),
    c("H005", |w| {
        w.set(Field::HOST_IA32_SYSENTER_ESP, NONCANONICAL)
    }),
    c("H006", |w| {
        w.set(Field::HOST_IA32_SYSENTER_EIP, NONCANONICAL)
    }),
    c("H007", |w| {
        w.on(EXIT, exit::LOAD_IA32_PERF_GLOBAL_CTRL)
            .set(Field::HOST_IA32_PERF_GLOBAL_CTRL, 1 << 63)
    }),
    c("H008", |w| w.set(Field::HOST_IA32_PAT, 2)),
    c("H009", |w| w.set(Field::HOST_IA32_EFER, EFER_LMA)),
    c("H010", |w| {
        w.on(EXIT, exit::LOAD_CET_STATE)
            .set(Field::HOST_S_CET, 0xc00)
    }),
    c("H033", |w| {
        w.on(EXIT, exit::LOAD_CET_STATE).set(Field::HOST_SSP, 2)
    }),
    c("H011", |w| {
        w.on(EXIT, exit::LOAD_PKRS)
            .set(Field::HOST_IA32_PKRS, 1 << 32)
    }),
    c("H012", |w| {
        w.exit2(exit2::LOAD_IA32_FRED_STATE)
            .set(Field::HOST_IA32_FRED_SSP3, 4)
    }),
    c("H013", |w| {
        w.exit2(exit2::LOAD_IA32_SPEC_CTRL)
            .set(Field::HOST_IA32_SPEC_CTRL, 1 << 63)
    }),
    // Host segments.
    c("H014", |w| w.on(Field::HOST_CS_SELECTOR, 1u32)),
    c("H015", |w| w.on(Field::HOST_SS_SELECTOR, 2u32)),
    c("H016", |w| w.on(Field::HOST_DS_SELECTOR, 4u32)),
    c("H017", |w| w.on(Field::HOST_ES_SELECTOR, 1u32)),
    c("H018", |w| w.on(Field::HOST_FS_SELECTOR, 2u32)),
    c("H019", |w| w.on(Field::HOST_GS_SELECTOR, 4u32)),
    c("H020", |w| w.on(Field::HOST_TR_SELECTOR, 1u32)),
    c("H021", |w| w.set(Field::HOST_CS_SELECTOR, 0)),
    c("H022", |w| w.set(Field::HOST_TR_SELECTOR, 0)),
    case("H023", host32, |w| w.set(Field::HOST_SS_SELECTOR, 0)),
    c("H024", |w| w.set(Field::HOST_FS_BASE, NONCANONICAL)),
    c("H025", |w| w.set(Field::HOST_GS_BASE, NONCANONICAL)),
    c("H026", |w| w.set(Field::HOST_GDTR_BASE, NONCANONICAL)),
    c("H027", |w| w.set(Field::HOST_IDTR_BASE, NONCANONICAL)),
    c("H028", |w| w.set(Field::HOST_TR_BASE, NONCANONICAL)),
    // Address-space size.
    case("H029", host32, |w| {
        w.cpu.long_mode = true;
        w
    }),
    case("H030", host32, |w| w.on(ENTRY, entry::IA_32E_MODE_GUEST)),
    case("H031", host32, |w| w.on(Field::HOST_CR4, CR4_PCIDE)),
    case("H034", host32, |w| w.on(Field::HOST_CR4, CR4_FRED)),
    case("H035", host32, |w| {
        w.on(EXIT, exit::LOAD_CET_STATE)
            .set(Field::HOST_SSP, 1 << 32)
    }),
    c("H032", |w| w.off(Field::HOST_CR4, CR4_PAE)),
    c("H036", |w| {
        w.on(EXIT, exit::LOAD_CET_STATE)
            .set(Field::HOST_SSP, NONCANONICAL)
    }),
    c("H037", |w| {
        w.on(EXIT, exit::LOAD_CET_STATE)
            .set(Field::HOST_SSP_TBL, NONCANONICAL)
    }),
    // Guest control registers, debug registers and MSRs.
    c("G001", |w| w.off(Field::GUEST_CR0, CR0_PE | CR0_PG)),
    case("G002", unrestricted, |w| w.off(Field::GUEST_CR0, CR0_PE)),
    c("G003", |w| w.off(Field::GUEST_CR4, 0x2000u64)),
    c("G004", |w| {
        w.on(Field::GUEST_CR4, CR4_CET)
            .off(Field::GUEST_CR0, CR0_WP)
    }),
    c("G005", |w| w.set(Field::GUEST_CR3, BEYOND)),
    c("G006", |w| w.off(Field::GUEST_CR4, CR4_PAE)),
    case("G007", protected_mode, |w| {
        w.on(Field::GUEST_CR4, CR4_PCIDE)
    }),
    c("G008", |w| w.set(Field::GUEST_IA32_DEBUGCTL, 4)),
    c("G009", |w| w.set(Field::GUEST_DR7, 1 << 32)),
    c("G010", |w| w.set(Field::GUEST_SYSENTER_ESP, NONCANONICAL)),
    c("G011", |w| w.set(Field::GUEST_SYSENTER_EIP, NONCANONICAL)),
    c("G012", |w| {
        w.on(ENTRY, entry::LOAD_IA32_PERF_GLOBAL_CTRL)
            .set(Field::GUEST_IA32_PERF_GLOBAL_CTRL, 1 << 63)
    }),
    c("G013", |w| w.set(Field::GUEST_IA32_PAT, 3 << 56)),
    c("G014", |w| w.off(Field::GUEST_IA32_EFER, EFER_LME)),
    c("G015", |w| {
        w.on(ENTRY, entry::LOAD_IA32_BNDCFGS)
            .set(Field::GUEST_BNDCFGS, 4)
    }),
    c("G016", |w| {
        w.on(ENTRY, entry::LOAD_IA32_RTIT_CTL)
            .set(Field::GUEST_IA32_RTIT_CTL, 1 << 40)
    }),
    c("G017", |w| {
        w.on(ENTRY, entry::LOAD_UINV).set(Field::GUEST_UINV, 256)
    }),
    c("G018", |w| {
        w.on(ENTRY, entry::LOAD_CET_STATE)
            .set(Field::GUEST_SSP_TBL, NONCANONICAL)
    }),
    c("G019", |w| {
        w.on(ENTRY, entry::LOAD_CET_STATE).set(Field::GUEST_SSP, 1)
    }),
    c("G129", |w| {
        w.on(ENTRY, entry::LOAD_CET_STATE)
            .set(Field::GUEST_SSP, 1 << 48)
    }),
    c("G020", |w| {
        w.on(ENTRY, entry::LOAD_GUEST_IA32_LBR_CTL)
            .set(Field::GUEST_IA32_LBR_CTL, 1 << 63)
    }),
    c("G021", |w| {
        w.on(ENTRY, entry::LOAD_PKRS)
            .set(Field::GUEST_IA32_PKRS, 1 << 32)
    }),
    c("G022", |w| {
        w.on(ENTRY, entry::LOAD_IA32_FRED_STATE)
            .set(Field::GUEST_IA32_FRED_CONFIG, 1 << 11)
    }),
    c("G023", |w| {
        w.on(ENTRY, entry::LOAD_GUEST_IA32_SPEC_CTRL)
            .set(Field::GUEST_IA32_SPEC_CTRL, 1 << 63)
    }),
    // Guest segments.
    c("G024", |w| w.on(Field::GUEST_TR_SELECTOR, 4u32)),
    c("G025", |w| ldtr(w).set(Field::GUEST_LDTR_SELECTOR, 0x54)),
    c("G026", |w| w.on(Field::GUEST_SS_SELECTOR, 3u32)),
    case("G027", v8086, |w| w.set(Field::GUEST_CS_BASE, 0)),
    case("G028", v8086, |w| w.set(Field::GUEST_SS_LIMIT, 0xf_ffff)),
    case("G029", v8086, |w| w.set(Field::GUEST_DS_AR_BYTES, 0x93)),
    case("G030", v8086, |w| w.set(Field::GUEST_ES_BASE, 0)),
    case("G031", v8086, |w| w.set(Field::GUEST_FS_LIMIT, 0xfffe)),
    case("G032", v8086, |w| w.set(Field::GUEST_GS_AR_BYTES, 0x1_00f3)),
    c("G033", |w| w.set(Field::GUEST_TR_BASE, NONCANONICAL)),
    c("G034", |w| w.set(Field::GUEST_FS_BASE, NONCANONICAL)),
    c("G035", |w| w.set(Field::GUEST_GS_BASE, NONCANONICAL)),
    c("G036", |w| {
        ldtr(w).set(Field::GUEST_LDTR_BASE, NONCANONICAL)
    }),
    c("G037", |w| w.set(Field::GUEST_CS_BASE, 1 << 32)),
    c("G038", |w| w.set(Field::GUEST_SS_BASE, 1 << 32)),
    c("G039", |w| w.set(Field::GUEST_DS_BASE, 1 << 32)),
    c("G040", |w| w.set(Field::GUEST_ES_BASE, 1 << 32)),
    c("G041", |w| w.set(Field::GUEST_CS_AR_BYTES, 0xa093)),
    c("G042", |w| w.set(Field::GUEST_SS_AR_BYTES, 0xc091)),
    c("G043", |w| w.set(Field::GUEST_DS_AR_BYTES, 0xc092)),
    c("G044", |w| w.set(Field::GUEST_ES_AR_BYTES, 0xc099)),
    c("G045", |w| w.set(Field::GUEST_FS_AR_BYTES, 0xc09a)),
    c("G046", |w| w.set(Field::GUEST_GS_AR_BYTES, 0xc09d)),
    c("G047", |w| w.off(Field::GUEST_CS_AR_BYTES, 0x10u32)),
    c("G048", |w| w.off(Field::GUEST_SS_AR_BYTES, 0x10u32)),
    c("G049", |w| w.off(Field::GUEST_DS_AR_BYTES, 0x10u32)),
    c("G050", |w| w.off(Field::GUEST_ES_AR_BYTES, 0x10u32)),
    c("G051", |w| w.off(Field::GUEST_FS_AR_BYTES, 0x10u32)),
    c("G052", |w| w.off(Field::GUEST_GS_AR_BYTES, 0x10u32)),
    case("G053", real_mode, |w| {
        w.on(Field::GUEST_CS_AR_BYTES, 0x60u32)
    }),
    c("G054", |w| w.on(Field::GUEST_CS_AR_BYTES, 0x60u32)),
    c("G055", |w| w.on(Field::GUEST_CS_AR_BYTES, 0x64u32)),
    c("G056", |w| {
        w.on(Field::GUEST_CS_AR_BYTES, 0x60u32)
            .on(Field::GUEST_SS_AR_BYTES, 0x60u32)
    }),
    case("G057", real_mode, |w| {
        w.on(Field::GUEST_SS_AR_BYTES, 0x60u32)
    }),
    c("G058", |w| w.on(Field::GUEST_DS_SELECTOR, 1u32)),
    c("G059", |w| w.on(Field::GUEST_ES_SELECTOR, 2u32)),
    c("G060", |w| w.on(Field::GUEST_FS_SELECTOR, 3u32)),
    c("G061", |w| w.on(Field::GUEST_GS_SELECTOR, 1u32)),
    c("G062", |w| w.off(Field::GUEST_CS_AR_BYTES, 0x80u32)),
    c("G063", |w| w.on(Field::GUEST_CS_AR_BYTES, 0x100u32)),
    c("G064", |w| w.set(Field::GUEST_CS_LIMIT, 0xffff_f000)),
    c("G065", |w| w.off(Field::GUEST_SS_AR_BYTES, 0x80u32)),
    c("G066", |w| w.on(Field::GUEST_SS_AR_BYTES, 0x200u32)),
    c("G067", |w| w.off(Field::GUEST_SS_AR_BYTES, 0x8000u32)),
    c("G068", |w| w.off(Field::GUEST_DS_AR_BYTES, 0x80u32)),
    c("G069", |w| w.on(Field::GUEST_DS_AR_BYTES, 0x400u32)),
    c("G070", |w| w.set(Field::GUEST_DS_LIMIT, 0xffff_0000)),
    c("G071", |w| w.off(Field::GUEST_ES_AR_BYTES, 0x80u32)),
    c("G072", |w| w.on(Field::GUEST_ES_AR_BYTES, 0x800u32)),
    c("G073", |w| w.off(Field::GUEST_ES_AR_BYTES, 0x8000u32)),
    c("G074", |w| w.off(Field::GUEST_FS_AR_BYTES, 0x80u32)),
    c("G075", |w| w.on(Field::GUEST_FS_AR_BYTES, 0x2_0000u32)),
    c("G076", |w| w.set(Field::GUEST_FS_LIMIT, 0)),
    c("G077", |w| w.off(Field::GUEST_GS_AR_BYTES, 0x80u32)),
    c("G078", |w| w.on(Field::GUEST_GS_AR_BYTES, 0x8000_0000u32)),
    c("G079", |w| w.off(Field::GUEST_GS_AR_BYTES, 0x8000u32)),
    c("G080", |w| w.on(Field::GUEST_CS_AR_BYTES, 0x4000u32)),
    c("G081", |w| w.on(Field::GUEST_TR_AR_BYTES, 0x1_0000u32)),
    c("G082", |w| w.set(Field::GUEST_TR_AR_BYTES, 0x83)),
    c("G083", |w| w.set(Field::GUEST_TR_AR_BYTES, 0x0b)),
    c("G084", |w| w.on(Field::GUEST_TR_AR_BYTES, 0x100u32)),
    c("G085", |w| w.set(Field::GUEST_TR_LIMIT, 0x10_0000)),
    c("G086", |w| ldtr(w).set(Field::GUEST_LDTR_AR_BYTES, 0x83)),
    c("G087", |w| ldtr(w).set(Field::GUEST_LDTR_AR_BYTES, 0x92)),
    c("G088", |w| ldtr(w).set(Field::GUEST_LDTR_AR_BYTES, 0x182)),
    c("G089", |w| ldtr(w).set(Field::GUEST_LDTR_AR_BYTES, 0x8082)),
    c("G090", |w| {
        w.on(Field::GUEST_CR4, CR4_FRED)
            .set(Field::GUEST_CS_AR_BYTES, 0xc09b)
            .set(Field::GUEST_RIP, 0)
    }),
    c("G091", |w| w.set(Field::GUEST_GDTR_BASE, NONCANONICAL)),
    c("G092", |w| w.set(Field::GUEST_IDTR_BASE, NONCANONICAL)),
    c("G093", |w| w.set(Field::GUEST_GDTR_LIMIT, 0x1_0000)),
    c("G094", |w| w.set(Field::GUEST_IDTR_LIMIT, 0x1_0000)),
    // RIP and RFLAGS.
    case("G095", protected_mode, |w| w.set(Field::GUEST_RIP, 1 << 32)),
    c("G096", |w| w.set(Field::GUEST_RIP, 1 << 48)),
    c("G097", |w| w.set(Field::GUEST_RFLAGS, 0x200)),
    case("G098", v8086_unrestricted, |w| {
        w.off(Field::GUEST_CR0, CR0_PE | CR0_PG)
    }),
    c("G099", |w| {
        w.inject(event::EXTERNAL_INTERRUPT, 0x30, 0)
            .off(Field::GUEST_RFLAGS, RFLAGS_IF)
    }),
    // Activity state.
    c("G100", |w| w.set(Field::GUEST_ACTIVITY_STATE, 4)),
    case("G101", unrestricted, |w| {
        ring_3(w).set(Field::GUEST_ACTIVITY_STATE, 1)
    }),
    c("G102", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 2)
            .set(Field::GUEST_INTERRUPTIBILITY_INFO, 2)
    }),
    c("G103", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 1)
            .inject(event::HARDWARE_EXCEPTION, 14, 1 << 11)
    }),
    c("G104", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 2)
            .inject(event::HARDWARE_EXCEPTION, 1, 0)
    }),
    c("G105", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 3)
            .inject(event::NMI, 2, 0)
    }),
    case("G106", enter_smm, |w| w.set(Field::GUEST_ACTIVITY_STATE, 3)),
    case("G131", return_to_root, |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 3)
    }),
    // Interruptibility state.
    c("G107", |w| w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 0x20)),
    c("G108", |w| w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 3)),
    c("G109", |w| {
        w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 1)
            .off(Field::GUEST_RFLAGS, RFLAGS_IF)
    }),
    c("G130", |w| {
        ring_3(w)
            .on(Field::GUEST_CS_SELECTOR, 3u32)
            .on(Field::GUEST_SS_SELECTOR, 3u32)
            .on(Field::GUEST_CR4, CR4_FRED)
            .set(Field::GUEST_INTERRUPTIBILITY_INFO, 1)
    }),
    c("G110", |w| {
        w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 2)
            .inject(event::EXTERNAL_INTERRUPT, 0x30, 0)
    }),
    c("G111", |w| {
        w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 2)
            .inject(event::NMI, 2, 0)
    }),
    c("G112", |w| {
        w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 1)
            .inject(event::NMI, 2, 0)
    }),
    c("G113", |w| w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 4)),
    case("G114", enter_smm, |w| {
        w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 0)
    }),
    c("G115", |w| {
        w.on(PIN, pin::VIRTUAL_NMIS)
            .set(Field::GUEST_INTERRUPTIBILITY_INFO, 8)
            .inject(event::NMI, 2, 0)
    }),
    c("G116", |w| w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 0x12)),
    // Pending debug exceptions.
    c("G117", |w| {
        w.set(Field::GUEST_PENDING_DBG_EXCEPTIONS, 1 << 4)
    }),
    c("G118", |w| {
        w.on(Field::GUEST_RFLAGS, RFLAGS_TF)
            .set(Field::GUEST_INTERRUPTIBILITY_INFO, 1)
    }),
    c("G119", |w| {
        w.set(Field::GUEST_PENDING_DBG_EXCEPTIONS, 1 << 16 | 1 << 12 | 1)
    }),
    // Link pointer.
    c("G120", |w| w.link(SHADOW + 4)),
    c("G121", |w| {
        w.memory.words.insert(ORDINARY, 1);
        w.link(ORDINARY)
    }),
    c("G122", |w| w.link(SHADOW)),
    c("G123", |w| w.link(CURRENT)),
    case("G124", return_from_smm, |w| w.link(EXECUTIVE_VMCS)),
    // PDPTEs.
    case("G125", pae, |w| w.on(Field::GUEST_PDPTR0, 2u32)),
    case("G126", pae, |w| w.set(Field::GUEST_PDPTR1, BEYOND | 1)),
    case("G127", pae_memory, |w| {
        w.memory.words.insert(PDPT + 16, 0x21);
        w
    }),
    case("G128", pae_memory, |w| {
        w.memory.words.remove(&(PDPT + 24));
        w
    }),
    // The other half of rows that read one of two places.
    case("G125", pae_memory, |w| {
        w.memory.words.insert(PDPT, 1 << 63 | 1);
        w
    }),
    case("G126", pae_memory, |w| {
        w.memory.words.insert(PDPT + 8, 0x101);
        w
    }),
    case("G127", pae, |w| w.set(Field::GUEST_PDPTR2, 1 << 63 | 1)),
    case("G128", pae, |w| w.set(Field::GUEST_PDPTR3, 0x41)),
    c("G122", |w| w.proc2(proc2::VMCS_SHADOWING).link(ORDINARY)),
    c("G121", |w| w.link(0x10_0000)),
    case("C037", no_ept, |w| {
        w.proc2(proc2::ENABLE_VM_FUNCTIONS)
            .set(Field::VM_FUNCTION_CONTROL, 1)
    }),
    c("C047", |w| w.proc3(proc3::APIC_TIMER_VIRTUALIZATION)),
    c("C047", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY)
            .proc3(proc3::APIC_TIMER_VIRTUALIZATION)
            .set(Field::VIRTUAL_TIMER_VECTOR, 0x100)
    }),
    c("C048", |w| {
        w.proc2(proc2::PASID_TRANSLATION)
            .set(Field::LOW_PASID_DIRECTORY_ADDR, BEYOND)
    }),
    c("C077", |w| {
        w.cpu.seam = true;
        w.off(PROC1, proc1::ACTIVATE_SECONDARY_CONTROLS)
            .set(Field::SHARED_EPT_POINTER, 0x1000)
    }),
    case("G123", enter_smm, |w| w.link(CURRENT)),
    case("C072", return_from_smm, |w| {
        w.set(Field::EXEC_VMCS_POINTER, 1)
    }),
    // The other clauses of rows that have several.
    c("H001", |w| w.off(Field::HOST_CR0, CR0_PE)),
    case("C076", return_to_root, |w| {
        w.on(Field::GUEST_CR4, CR4_FRED)
            .inject(event::OTHER, 1, 0)
            .set(Field::VM_ENTRY_INSTRUCTION_LEN, 2)
    }),
    c("C006", |w| {
        w.caps.basic |= 1 << 48;
        w.on(PROC1, proc1::USE_I_O_BITMAPS)
            .set(Field::IO_BITMAP_A, 1 << 32)
    }),
    c("C012", |w| w.proc2(proc2::VIRTUALIZE_X2APIC_MODE)),
    c("C012", |w| w.proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY)),
    c("C025", |w| {
        w.caps.ept_vpid &= !(1 << 8);
        w.set(Field::EPT_POINTER, 3 << 3)
    }),
    c("C026", |w| {
        w.caps.ept_vpid &= !(1 << 7);
        w.set(Field::EPT_POINTER, 4 << 3 | 6)
    }),
    c("C029", |w| w.on(Field::EPT_POINTER, BEYOND)),
    c("C041", |w| {
        w.proc2(proc2::INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES)
            .on(EXIT, exit::CLEAR_IA32_RTIT_CTL)
    }),
    case("C041", no_ept, |w| {
        w.proc2(proc2::INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES)
            .on(EXIT, exit::CLEAR_IA32_RTIT_CTL)
            .on(ENTRY, entry::LOAD_IA32_RTIT_CTL)
    }),
    case("C044", no_ept, |w| w.proc3(proc3::ENABLE_HLAT)),
    case("C044", no_ept, |w| {
        w.proc3(proc3::GUEST_PAGING_VERIFICATION)
    }),
    case("C044", no_ept, |w| {
        w.proc3(proc3::PEBS_USES_GUEST_PHYSICAL_ADDRESSES)
    }),
    c("C045", |w| {
        w.proc3(proc3::ENABLE_HLAT).set(Field::HLAT_POINTER, BEYOND)
    }),
    c("C046", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .proc3(proc3::IPI_VIRTUALIZATION)
            .set(Field::PID_POINTER_TABLE, 4)
    }),
    c("C055", |w| {
        w.set(Field::VM_EXIT_MSR_LOAD_COUNT, 2)
            .set(Field::VM_EXIT_MSR_LOAD_ADDR, BEYOND - 16)
    }),
    c("C057", |w| {
        w.caps.true_proc1 &= !(u64::from(proc1::MONITOR_TRAP_FLAG) << 32);
        w.cpu.fred = false;
        w.inject(event::OTHER, 0, 0)
    }),
    c("C060", |w| {
        w.caps.true_proc1 &= !(u64::from(proc1::MONITOR_TRAP_FLAG) << 32);
        w.inject(event::OTHER, 0, 0)
    }),
    c("C060", |w| {
        w.on(Field::GUEST_CR4, CR4_FRED).inject(event::OTHER, 3, 0)
    }),
    c("C061", |w| w.inject(event::NMI, 2, 1 << 11)),
    c("C063", |w| {
        w.caps.basic &= !(1 << 56);
        w.inject(event::HARDWARE_EXCEPTION, 6, 1 << 11)
    }),
    c("C064", |w| {
        w.inject(event::EXTERNAL_INTERRUPT, 0x30, 1 << 30)
    }),
    c("C071", |w| {
        w.caps.basic &= !(1 << 58);
        w.inject(event::HARDWARE_EXCEPTION, 6, 1 << 13)
    }),
    c("C066", |w| {
        w.caps.misc &= !(1 << 30);
        w.inject(event::SOFTWARE_EXCEPTION, 3, 0)
    }),
    c("C066", |w| {
        w.inject(event::PRIVILEGED_SOFTWARE_EXCEPTION, 1, 0)
            .set(Field::VM_ENTRY_INSTRUCTION_LEN, !0)
    }),
    c("C066", |w| {
        w.on(Field::GUEST_CR4, CR4_FRED)
            .inject(event::OTHER, 2, 0)
            .set(Field::VM_ENTRY_INSTRUCTION_LEN, 16)
    }),
    c("C069", |w| {
        w.on(ENTRY, entry::DEACTIVATE_DUAL_MONITOR_TREATMENT)
    }),
    case("C072", return_from_smm, |w| {
        w.set(Field::EXEC_VMCS_POINTER, SHADOW)
    }),
    c("H001", |w| w.on(Field::HOST_CR0, 1u64 << 32)),
    c("H002", |w| w.on(Field::HOST_CR4, 1u64 << 33)),
    c("H009", |w| w.on(Field::HOST_IA32_EFER, 2u32)),
    c("H009", |w| w.set(Field::HOST_IA32_EFER, EFER_LME)),
    c("H009", |w| w.set(Field::HOST_IA32_EFER, 0)),
    c("H010", |w| {
        w.on(EXIT, exit::LOAD_CET_STATE)
            .set(Field::HOST_S_CET, 0x40)
    }),
    c("H012", |w| {
        w.exit2(exit2::LOAD_IA32_FRED_STATE)
            .set(Field::HOST_IA32_FRED_RSP2, NONCANONICAL)
    }),
    case("H031", host32, |w| w.set(Field::HOST_RIP, 1 << 32)),
    case("H035", host32, |w| {
        w.on(EXIT, exit::LOAD_CET_STATE)
            .set(Field::HOST_S_CET, 1 << 32)
    }),
    c("H032", |w| w.set(Field::HOST_RIP, NONCANONICAL)),
    c("H036", |w| {
        w.on(EXIT, exit::LOAD_CET_STATE)
            .set(Field::HOST_S_CET, NONCANONICAL)
    }),
    c("G001", |w| w.on(Field::GUEST_CR0, 1u64 << 32)),
    case("G001", unrestricted, |w| w.off(Field::GUEST_CR0, 1u64 << 5)),
    c("G003", |w| w.on(Field::GUEST_CR4, 1u64 << 33)),
    case("G006", unrestricted, |w| w.off(Field::GUEST_CR0, CR0_PG)),
    case("G007", protected_mode, |w| w.on(Field::GUEST_CR4, CR4_FRED)),
    c("G014", |w| w.on(Field::GUEST_IA32_EFER, 2u32)),
    c("G014", |w| w.off(Field::GUEST_IA32_EFER, EFER_LMA)),
    case("G014", real_mode, |w| {
        w.on(Field::GUEST_IA32_EFER, EFER_LMA)
    }),
    c("G015", |w| {
        w.on(ENTRY, entry::LOAD_IA32_BNDCFGS)
            .set(Field::GUEST_BNDCFGS, NONCANONICAL)
    }),
    c("G018", |w| {
        w.on(ENTRY, entry::LOAD_CET_STATE)
            .set(Field::GUEST_S_CET, 0xc00)
    }),
    c("G018", |w| {
        w.on(ENTRY, entry::LOAD_CET_STATE)
            .set(Field::GUEST_S_CET, NONCANONICAL)
    }),
    c("G022", |w| {
        w.on(ENTRY, entry::LOAD_IA32_FRED_STATE)
            .set(Field::GUEST_IA32_FRED_RSP1, 0x20)
    }),
    case("G027", v8086, |w| w.set(Field::GUEST_CS_LIMIT, 0xffff_ffff)),
    case("G028", v8086_unrestricted, |w| {
        w.set(Field::GUEST_SS_AR_BYTES, 0x93)
    }),
    case("G042", real_mode, |w| w.set(Field::GUEST_SS_AR_BYTES, 0x9b)),
    case("G057", unrestricted, |w| {
        w.set(Field::GUEST_CS_AR_BYTES, 0xa093)
            .on(Field::GUEST_SS_AR_BYTES, 0x60u32)
    }),
    c("G064", |w| w.off(Field::GUEST_CS_AR_BYTES, 0x8000u32)),
    c("G082", |w| w.set(Field::GUEST_TR_AR_BYTES, 0x89)),
    c("G083", |w| w.on(Field::GUEST_TR_AR_BYTES, 0x10u32)),
    c("G085", |w| w.on(Field::GUEST_TR_AR_BYTES, 0x8000u32)),
    c("G087", |w| ldtr(w).set(Field::GUEST_LDTR_AR_BYTES, 0x02)),
    c("G090", |w| {
        // CPL 3 with IOPL 3.
        w.on(Field::GUEST_CR4, CR4_FRED)
            .on(Field::GUEST_CS_SELECTOR, 3u32)
            .on(Field::GUEST_SS_SELECTOR, 3u32)
            .on(Field::GUEST_RFLAGS, RFLAGS_IOPL);
        ring_3(w)
    }),
    c("G090", |w| {
        // CPL 1.
        w.on(Field::GUEST_CR4, CR4_FRED)
            .on(Field::GUEST_CS_SELECTOR, 1u32)
            .on(Field::GUEST_SS_SELECTOR, 1u32)
            .on(Field::GUEST_CS_AR_BYTES, 0x20u32)
            .on(Field::GUEST_SS_AR_BYTES, 0x20u32)
    }),
    c("G095", |w| {
        // Compatibility mode.
        w.set(Field::GUEST_CS_AR_BYTES, 0xc09b)
    }),
    c("G097", |w| w.on(Field::GUEST_RFLAGS, 1u64 << 15)),
    c("G097", |w| w.on(Field::GUEST_RFLAGS, 1u64 << 63)),
    case("G098", v8086, |w| {
        w.on(ENTRY, entry::IA_32E_MODE_GUEST)
            .set(Field::GUEST_IA32_EFER, 0x500)
            .on(Field::GUEST_CR4, CR4_PAE)
    }),
    c("G100", |w| {
        w.caps.misc &= !(1 << 6);
        w.set(Field::GUEST_ACTIVITY_STATE, 1)
    }),
    c("G100", |w| {
        w.caps.misc &= !(1 << 7);
        w.set(Field::GUEST_ACTIVITY_STATE, 2)
    }),
    c("G100", |w| {
        w.caps.misc &= !(1 << 8);
        w.set(Field::GUEST_ACTIVITY_STATE, 3)
    }),
    c("G102", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 1)
            .set(Field::GUEST_INTERRUPTIBILITY_INFO, 1)
    }),
    c("G103", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 1)
            .inject(event::SOFTWARE_INTERRUPT, 1, 0)
    }),
    c("G104", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 2)
            .inject(event::EXTERNAL_INTERRUPT, 18, 0)
    }),
    c("G107", |w| {
        w.cpu.sgx = false;
        w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 0x10)
    }),
    c("G110", |w| {
        w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 1)
            .inject(event::EXTERNAL_INTERRUPT, 0x30, 0)
    }),
    c("G117", |w| {
        w.cpu.bus_lock_debug = false;
        w.set(Field::GUEST_PENDING_DBG_EXCEPTIONS, 1 << 11)
    }),
    c("G117", |w| {
        w.cpu.rtm = false;
        w.set(Field::GUEST_PENDING_DBG_EXCEPTIONS, 1 << 16 | 1 << 12)
    }),
    c("G117", |w| {
        w.set(Field::GUEST_PENDING_DBG_EXCEPTIONS, 1 << 15)
    }),
    c("G118", |w| {
        // BTF holds the single step back.
        w.on(Field::GUEST_RFLAGS, RFLAGS_TF)
            .set(Field::GUEST_IA32_DEBUGCTL, 2)
            .set(Field::GUEST_PENDING_DBG_EXCEPTIONS, 1 << 14)
            .set(Field::GUEST_INTERRUPTIBILITY_INFO, 2)
    }),
    c("G118", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 1)
            .set(Field::GUEST_PENDING_DBG_EXCEPTIONS, 1 << 14)
    }),
    c("G119", |w| {
        w.set(Field::GUEST_PENDING_DBG_EXCEPTIONS, 1 << 16)
    }),
    c("G119", |w| {
        w.set(Field::GUEST_PENDING_DBG_EXCEPTIONS, 1 << 16 | 1 << 12)
            .set(Field::GUEST_INTERRUPTIBILITY_INFO, 2)
    }),
    c("G120", |w| w.link(BEYOND)),
];

/// What must not fail although it comes close: the row is the one that would be wrong.
pub const ALLOWED: &[Case] = &[
    c("H036", |w| {
        w.set(Field::HOST_S_CET, NONCANONICAL)
            .set(Field::HOST_SSP, NONCANONICAL)
            .set(Field::HOST_SSP_TBL, NONCANONICAL)
    }),
    c("C047", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY)
            .proc3(proc3::APIC_TIMER_VIRTUALIZATION)
            .set(Field::VIRTUAL_TIMER_VECTOR, 255)
    }),
    c("G017", |w| {
        w.on(ENTRY, entry::LOAD_UINV).set(Field::GUEST_UINV, 255)
    }),
    c("C005", |w| w.set(Field::CR3_TARGET_COUNT, 4)),
    c("C006", |w| w.set(Field::IO_BITMAP_A, 1)),
    c("C009", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .set(Field::VIRTUAL_APIC_PAGE_ADDR, BEYOND - 0x1000)
    }),
    c("C010", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY)
            .set(Field::TPR_THRESHOLD, !0)
    }),
    c("C011", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .set(Field::TPR_THRESHOLD, 5)
    }),
    c("C011", |w| {
        w.on(PROC1, proc1::USE_TPR_SHADOW)
            .proc2(proc2::VIRTUALIZE_APIC_ACCESSES)
            .set(Field::TPR_THRESHOLD, 15)
    }),
    c("C021", |w| posted_interrupts(w)),
    c("C025", |w| w.set(Field::EPT_POINTER, 0x3000 | 3 << 3)),
    c("C026", |w| w.set(Field::EPT_POINTER, 0x3000 | 4 << 3 | 6)),
    c("C027", |w| w.on(Field::EPT_POINTER, 1u64 << 6)),
    c("C030", |w| {
        // Secondary controls that are not activated count as 0.
        w.off(PROC1, proc1::ACTIVATE_SECONDARY_CONTROLS)
            .set(PROC2, !0)
    }),
    c("C044", |w| {
        // Tertiary controls that are not activated count as 0.
        w.set(PROC3, !0).off(PROC2, proc2::ENABLE_EPT)
    }),
    c("H013", |w| {
        // Secondary VM-exit controls that are not activated count as 0.
        w.set(EXIT2, !0).set(Field::HOST_IA32_SPEC_CTRL, !0)
    }),
    c("C045", |w| {
        w.proc3(proc3::ENABLE_HLAT).set(Field::HLAT_POINTER, 0x18)
    }),
    c("C051", |w| {
        w.on(PIN, pin::ACTIVATE_VMX_PREEMPTION_TIMER)
            .on(EXIT, exit::SAVE_VMX_PREEMPTION_TIMER_VALUE)
    }),
    c("C052", |w| w.set(Field::VM_EXIT_MSR_STORE_ADDR, 1)),
    c("C068", |w| {
        w.set(Field::VM_ENTRY_MSR_LOAD_COUNT, 2)
            .set(Field::VM_ENTRY_MSR_LOAD_ADDR, BEYOND - 32)
    }),
    c("C060", |w| w.inject(event::OTHER, 0, 0)),
    c("C060", |w| {
        w.on(Field::GUEST_CR4, CR4_FRED)
            .inject(event::OTHER, 1, 0)
            .set(Field::VM_ENTRY_INSTRUCTION_LEN, 2)
    }),
    c("C062", |w| w.inject(event::HARDWARE_EXCEPTION, 13, 1 << 11)),
    c("C063", |w| w.inject(event::HARDWARE_EXCEPTION, 13, 0)),
    c("C064", |w| w.set(INJECTION, 0x7fff_ffff)),
    c("C071", |w| w.inject(event::HARDWARE_EXCEPTION, 6, 1 << 13)),
    c("C066", |w| w.inject(event::SOFTWARE_INTERRUPT, 0x80, 0)),
    case("C075", return_from_smm, |w| {
        // Controls of the current VMCS are not looked at.
        w.set(Field::CR3_TARGET_COUNT, 9)
    }),
    case("C076", return_to_root, |w| w.inject(event::OTHER, 0, 0)),
    c("H001", |w| w.on(Field::HOST_CR0, CR0_NW | CR0_CD)),
    c("H001", |w| {
        w.caps.cr0_fixed1 &= !(CR0_NW | CR0_CD);
        w.on(Field::HOST_CR0, CR0_NW | CR0_CD)
            .on(Field::GUEST_CR0, CR0_NW | CR0_CD)
    }),
    c("H003", |w| {
        w.cpu.lam = true;
        w.on(Field::HOST_CR3, 3u64 << 61)
            .on(Field::GUEST_CR3, 3u64 << 61)
    }),
    c("H008", |w| {
        w.set(Field::HOST_IA32_PAT, 0x0706_0504_0100_0000)
    }),
    c("H032", |w| w.on(Field::HOST_CR4, CR4_PCIDE)),
    c("H023", |w| w.set(Field::HOST_SS_SELECTOR, 0)),
    case("G014", real_mode, |w| {
        // LME without paging.
        w.on(Field::GUEST_IA32_EFER, EFER_LME)
    }),
    c("G025", |w| {
        w.set(Field::GUEST_LDTR_SELECTOR, 0xffff)
            .set(Field::GUEST_LDTR_BASE, NONCANONICAL)
    }),
    case("G026", unrestricted, |w| {
        w.set(Field::GUEST_SS_SELECTOR, 3)
            .set(Field::GUEST_DS_SELECTOR, 3)
    }),
    c("G043", |w| {
        w.set(Field::GUEST_DS_AR_BYTES, 0x1_0000)
            .set(Field::GUEST_DS_BASE, !0)
            .set(Field::GUEST_DS_LIMIT, 0x1234_5678)
    }),
    c("G042", |w| {
        w.set(Field::GUEST_SS_AR_BYTES, 0x1_0000)
            .set(Field::GUEST_SS_SELECTOR, 0)
    }),
    case("G053", v8086_unrestricted, |w| w),
    c("G041", |w| w.set(Field::GUEST_CS_AR_BYTES, 0xa099)),
    c("G055", |w| w.set(Field::GUEST_CS_AR_BYTES, 0xa09d)),
    c("G055", |w| w.set(Field::GUEST_CS_AR_BYTES, 0xa09f)),
    c("G061", |w| {
        // Conforming code.
        w.set(Field::GUEST_GS_AR_BYTES, 0xc09f)
            .set(Field::GUEST_GS_SELECTOR, 3)
    }),
    case("G082", protected_mode, |w| {
        w.set(Field::GUEST_TR_AR_BYTES, 0x83)
    }),
    c("G090", |w| w.on(Field::GUEST_CR4, CR4_FRED)),
    c("G096", |w| w.set(Field::GUEST_RIP, 1 << 47)),
    c("G101", |w| w.set(Field::GUEST_ACTIVITY_STATE, 1)),
    c("G103", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 1)
            .inject(event::HARDWARE_EXCEPTION, 1, 0)
    }),
    c("G103", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 1)
            .inject(event::EXTERNAL_INTERRUPT, 0xff, 0)
    }),
    c("G103", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 1)
            .inject(event::OTHER, 0, 0)
    }),
    c("G104", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 2)
            .inject(event::HARDWARE_EXCEPTION, 18, 0)
    }),
    c("G104", |w| {
        w.set(Field::GUEST_ACTIVITY_STATE, 2)
            .inject(event::NMI, 2, 0)
    }),
    c("G107", |w| w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 0x18)),
    c("G115", |w| {
        // Without virtual NMIs, blocking by NMI does not keep one from being injected.
        w.set(Field::GUEST_INTERRUPTIBILITY_INFO, 8)
            .inject(event::NMI, 2, 0)
    }),
    c("G118", |w| {
        w.on(Field::GUEST_RFLAGS, RFLAGS_TF)
            .set(Field::GUEST_PENDING_DBG_EXCEPTIONS, 1 << 14)
            .set(Field::GUEST_INTERRUPTIBILITY_INFO, 1)
    }),
    c("G118", |w| w.on(Field::GUEST_RFLAGS, RFLAGS_TF)),
    c("G122", |w| w.link(ORDINARY)),
    c("G122", |w| w.proc2(proc2::VMCS_SHADOWING).link(SHADOW)),
    case("G123", return_from_smm, |w| w.link(CURRENT)),
    case("G124", enter_smm, |w| {
        w.set(Field::EXEC_VMCS_POINTER, ORDINARY).link(ORDINARY)
    }),
    case("G125", pae, |w| w.set(Field::GUEST_PDPTR0, 0xbe01)),
    case("G125", pae, |w| w.set(Field::GUEST_PDPTR1, !1)),
    case("G125", protected_mode, |w| w.set(Field::GUEST_PDPTR0, !0)),
    case("G125", pae_memory, |w| w.set(Field::GUEST_CR3, PDPT | 0x1f)),
];

fn posted_interrupts(w: &mut World) -> &mut World {
    w.on(PIN, pin::PROCESS_POSTED_INTERRUPTS)
        .on(PROC1, proc1::USE_TPR_SHADOW)
        .proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY)
        .on(EXIT, exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT)
}

/// A usable LDTR.
fn ldtr(w: &mut World) -> &mut World {
    w.set(Field::GUEST_LDTR_SELECTOR, 0x50)
        .set(Field::GUEST_LDTR_LIMIT, 0xfff0)
        .set(Field::GUEST_LDTR_AR_BYTES, 0x82)
}

/// Code and stack of privilege level 3.
fn ring_3(w: &mut World) -> &mut World {
    w.on(Field::GUEST_CS_AR_BYTES, 0x60u32)
        .on(Field::GUEST_SS_AR_BYTES, 0x60u32)
}
