//! C001..C048 and C077: VM-execution control fields.

use super::*;

const fn exec(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::ExecControls, id, fields, check)
}

pub(super) const ROWS: &[EntryCheck] = &[
    // The control words themselves.
    exec("C001", &[PIN], |e| e.obeys(Control::Pin).into()),
    exec("C002", &[PROC1], |e| e.obeys(Control::Proc1).into()),
    exec("C003", &[PROC1, PROC2], |e| {
        when(
            e.proc1(proc1::ACTIVATE_SECONDARY_CONTROLS),
            e.obeys(Control::Proc2),
        )
    }),
    exec("C004", &[PROC1, PROC3], |e| {
        when(
            e.proc1(proc1::ACTIVATE_TERTIARY_CONTROLS),
            e.obeys(Control::Proc3),
        )
    }),
    exec("C005", &[Field::CR3_TARGET_COUNT], |e| {
        let supported = e.caps.cr3_targets().min(4);
        (e.get32(Field::CR3_TARGET_COUNT) <= supported).into()
    }),
    // Bitmaps.
    exec("C006", &[PROC1, Field::IO_BITMAP_A], |e| {
        when(e.proc1(proc1::USE_I_O_BITMAPS), e.page(Field::IO_BITMAP_A))
    }),
    exec("C007", &[PROC1, Field::IO_BITMAP_B], |e| {
        when(e.proc1(proc1::USE_I_O_BITMAPS), e.page(Field::IO_BITMAP_B))
    }),
    exec("C008", &[PROC1, Field::MSR_BITMAP], |e| {
        when(e.proc1(proc1::USE_MSR_BITMAPS), e.page(Field::MSR_BITMAP))
    }),
    // Local APIC.
    exec("C009", &[PROC1, Field::VIRTUAL_APIC_PAGE_ADDR], |e| {
        when(
            e.proc1(proc1::USE_TPR_SHADOW),
            e.page(Field::VIRTUAL_APIC_PAGE_ADDR),
        )
    }),
    exec("C010", &[PROC1, PROC2, Field::TPR_THRESHOLD], |e| {
        when(
            e.proc1(proc1::USE_TPR_SHADOW) && !e.proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY),
            e.get(Field::TPR_THRESHOLD) >> 4 == 0,
        )
    }),
    exec(
        "C011",
        &[
            PROC1,
            PROC2,
            Field::TPR_THRESHOLD,
            Field::VIRTUAL_APIC_PAGE_ADDR,
        ],
        tpr_threshold,
    )
    .each_time(),
    exec("C012", &[PROC1, PROC2], |e| {
        when(
            !e.proc1(proc1::USE_TPR_SHADOW),
            !e.proc2(
                proc2::VIRTUALIZE_X2APIC_MODE
                    | proc2::APIC_REGISTER_VIRTUALIZATION
                    | proc2::VIRTUAL_INTERRUPT_DELIVERY,
            ),
        )
    }),
    exec("C013", &[PROC1, PROC3], |e| {
        when(
            !e.proc1(proc1::USE_TPR_SHADOW),
            !e.proc3(proc3::IPI_VIRTUALIZATION),
        )
    }),
    exec("C014", &[PIN], |e| {
        when(e.pin(pin::VIRTUAL_NMIS), e.pin(pin::NMI_EXITING))
    }),
    exec("C015", &[PIN, PROC1], |e| {
        when(e.proc1(proc1::NMI_WINDOW_EXITING), e.pin(pin::VIRTUAL_NMIS))
    }),
    exec("C016", &[PROC1, PROC2, Field::APIC_ACCESS_ADDR], |e| {
        when(
            e.proc2(proc2::VIRTUALIZE_APIC_ACCESSES),
            e.page(Field::APIC_ACCESS_ADDR),
        )
    }),
    exec(
        "C017",
        &[
            PROC1,
            PROC2,
            Field::APIC_ACCESS_ADDR,
            Field::VIRTUAL_APIC_PAGE_ADDR,
        ],
        |e| {
            when(
                e.proc1(proc1::USE_TPR_SHADOW) && e.proc2(proc2::VIRTUALIZE_APIC_ACCESSES),
                e.get(Field::APIC_ACCESS_ADDR) != e.get(Field::VIRTUAL_APIC_PAGE_ADDR),
            )
        },
    )
    .or(Failure::Unchecked),
    exec("C018", &[PROC1, PROC2], |e| {
        when(
            e.proc2(proc2::VIRTUALIZE_X2APIC_MODE),
            !e.proc2(proc2::VIRTUALIZE_APIC_ACCESSES),
        )
    }),
    exec("C019", &[PIN, PROC1, PROC2], |e| {
        when(
            e.proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY),
            e.pin(pin::EXTERNAL_INTERRUPT_EXITING),
        )
    }),
    // Posted interrupts.
    exec("C020", &[PIN, PROC1, PROC2], |e| {
        when(
            e.pin(pin::PROCESS_POSTED_INTERRUPTS),
            e.proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY),
        )
    }),
    exec("C021", &[PIN, EXIT], |e| {
        when(
            e.pin(pin::PROCESS_POSTED_INTERRUPTS),
            e.exit(exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT),
        )
    }),
    exec("C022", &[PIN, Field::POSTED_INTR_NV], |e| {
        when(
            e.pin(pin::PROCESS_POSTED_INTERRUPTS),
            e.get(Field::POSTED_INTR_NV) <= 255,
        )
    }),
    exec("C023", &[PIN, Field::POSTED_INTR_DESC_ADDR], |e| {
        when(
            e.pin(pin::PROCESS_POSTED_INTERRUPTS),
            e.aligned(e.get(Field::POSTED_INTR_DESC_ADDR), 64),
        )
    }),
    exec("C024", &[PROC1, PROC2, Field::VIRTUAL_PROCESSOR_ID], |e| {
        when(
            e.proc2(proc2::ENABLE_VPID),
            e.get(Field::VIRTUAL_PROCESSOR_ID) != 0,
        )
    }),
    // EPT pointer.
    exec("C025", EPTP, |e| {
        when(
            e.ept(),
            match e.get(Field::EPT_POINTER) & 7 {
                0 => e.ept_cap(8),
                6 => e.ept_cap(14),
                _ => false,
            },
        )
    }),
    exec("C026", EPTP, |e| {
        when(
            e.ept(),
            match e.get(Field::EPT_POINTER) >> 3 & 7 {
                3 => e.ept_cap(6),
                4 => e.ept_cap(7),
                _ => false,
            },
        )
    }),
    exec("C027", EPTP, |e| {
        when(
            e.ept(),
            e.get(Field::EPT_POINTER) & 1 << 6 == 0 || e.ept_cap(21),
        )
    }),
    exec("C028", EPTP, |e| {
        when(
            e.ept(),
            e.get(Field::EPT_POINTER) & 1 << 7 == 0 || e.ept_cap(23),
        )
    }),
    exec("C029", EPTP, |e| {
        let eptp = e.get(Field::EPT_POINTER);
        when(e.ept(), eptp & 0xf00 == 0 && e.physical(eptp))
    }),
    // What needs EPT.
    exec("C030", &[PROC1, PROC2], |e| when(e.unrestricted(), e.ept())),
    exec("C031", &[PROC1, PROC2], |e| {
        when(e.proc2(proc2::ENABLE_PML), e.ept())
    }),
    exec("C032", &[PROC1, PROC2, Field::PML_ADDRESS], |e| {
        when(e.proc2(proc2::ENABLE_PML), e.page(Field::PML_ADDRESS))
    }),
    exec("C033", &[PROC1, PROC2], |e| {
        when(e.proc2(proc2::MODE_BASED_EXECUTE_CONTROL_FOR_EPT), e.ept())
    }),
    exec("C034", &[PROC1, PROC2], |e| {
        when(e.proc2(proc2::SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT), e.ept())
    }),
    exec("C035", &[PROC1, PROC2, Field::SPP_TABLE_POINTER], |e| {
        when(
            e.proc2(proc2::SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT),
            e.page(Field::SPP_TABLE_POINTER),
        )
    }),
    // VM functions.
    exec("C036", &[PROC1, PROC2, Field::VM_FUNCTION_CONTROL], |e| {
        when(
            e.proc2(proc2::ENABLE_VM_FUNCTIONS),
            e.obeys(Control::VmFunc),
        )
    }),
    exec(
        "C037",
        &[
            PROC1,
            PROC2,
            Field::VM_FUNCTION_CONTROL,
            Field::EPTP_LIST_ADDRESS,
        ],
        |e| {
            when(
                e.proc2(proc2::ENABLE_VM_FUNCTIONS) && e.get(Field::VM_FUNCTION_CONTROL) & 1 != 0,
                e.ept() && e.page(Field::EPTP_LIST_ADDRESS),
            )
        },
    ),
    // Shadowing and #VE.
    exec("C038", &[PROC1, PROC2, Field::VMREAD_BITMAP], |e| {
        when(e.proc2(proc2::VMCS_SHADOWING), e.page(Field::VMREAD_BITMAP))
    }),
    exec("C039", &[PROC1, PROC2, Field::VMWRITE_BITMAP], |e| {
        when(
            e.proc2(proc2::VMCS_SHADOWING),
            e.page(Field::VMWRITE_BITMAP),
        )
    }),
    exec(
        "C040",
        &[PROC1, PROC2, Field::VE_INFORMATION_ADDRESS],
        |e| {
            when(
                e.proc2(proc2::EPT_VIOLATION_VE),
                e.page(Field::VE_INFORMATION_ADDRESS),
            )
        },
    ),
    // Processor trace.
    exec("C041", &[PROC1, PROC2, EXIT, ENTRY], |e| {
        when(
            e.proc2(proc2::INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES),
            e.ept() && e.entry(entry::LOAD_IA32_RTIT_CTL) && e.exit(exit::CLEAR_IA32_RTIT_CTL),
        )
    }),
    exec("C042", &[ENTRY], |e| {
        when(e.entry(entry::LOAD_IA32_RTIT_CTL), !e.cpu.tracing)
    })
    .each_time(),
    exec("C043", &[PROC1, PROC2, Field::TSC_MULTIPLIER], |e| {
        when(
            e.proc2(proc2::USE_TSC_SCALING),
            e.get(Field::TSC_MULTIPLIER) != 0,
        )
    }),
    // Tertiary controls.
    exec("C044", &[PROC1, PROC2, PROC3], |e| {
        when(
            e.proc3(
                proc3::ENABLE_HLAT
                    | proc3::EPT_PAGING_WRITE_CONTROL
                    | proc3::GUEST_PAGING_VERIFICATION
                    | proc3::PEBS_USES_GUEST_PHYSICAL_ADDRESSES,
            ),
            e.ept(),
        )
    }),
    exec("C045", &[PROC1, PROC3, Field::HLAT_POINTER], |e| {
        let hlatp = e.get(Field::HLAT_POINTER);
        when(
            e.proc3(proc3::ENABLE_HLAT),
            hlatp & 0xfe7 == 0 && e.physical(hlatp),
        )
    }),
    exec(
        "C046",
        &[
            PROC1,
            PROC3,
            Field::PID_POINTER_TABLE,
            Field::LAST_PID_POINTER_INDEX,
        ],
        |e| {
            let table = e.get(Field::PID_POINTER_TABLE);
            let last = table.checked_add(8 * e.get(Field::LAST_PID_POINTER_INDEX));
            when(
                e.proc3(proc3::IPI_VIRTUALIZATION),
                e.aligned(table, 8) && last.is_some_and(|last| e.physical(last)),
            )
        },
    ),
    exec(
        "C047",
        &[PROC1, PROC2, PROC3, Field::VIRTUAL_TIMER_VECTOR],
        |e| {
            when(
                e.proc3(proc3::APIC_TIMER_VIRTUALIZATION),
                e.proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY)
                    && !e.proc1(proc1::RDTSC_EXITING)
                    && e.get(Field::VIRTUAL_TIMER_VECTOR) <= 255,
            )
        },
    ),
    exec(
        "C048",
        &[
            PROC1,
            PROC2,
            Field::LOW_PASID_DIRECTORY_ADDR,
            Field::HIGH_PASID_DIRECTORY_ADDR,
        ],
        |e| {
            when(
                e.proc2(proc2::PASID_TRANSLATION),
                e.page(Field::LOW_PASID_DIRECTORY_ADDR) && e.page(Field::HIGH_PASID_DIRECTORY_ADDR),
            )
        },
    ),
    exec("C077", &[PROC1, PROC2, Field::SHARED_EPT_POINTER], |e| {
        when(e.cpu.seam, e.ept() && e.page(Field::SHARED_EPT_POINTER))
    })
    .each_time(),
];

const EPTP: &[Field] = &[PROC1, PROC2, Field::EPT_POINTER];

/// C011. The page is there to read: C009 has held.
fn tpr_threshold(e: &EntryCtx) -> Verdict {
    if !e.proc1(proc1::USE_TPR_SHADOW)
        || e.proc2(proc2::VIRTUALIZE_APIC_ACCESSES | proc2::VIRTUAL_INTERRUPT_DELIVERY)
    {
        return Verdict::NotReached;
    }
    const VTPR: u64 = 0x80;
    let page = e.get(Field::VIRTUAL_APIC_PAGE_ADDR);
    let vtpr = e.memory.read_u32(page.wrapping_add(VTPR)).unwrap_or(!0);
    (e.get32(Field::TPR_THRESHOLD) & 0xf <= vtpr >> 4 & 0xf).into()
}

impl EntryCtx<'_> {
    fn ept_cap(&self, bit: u32) -> bool {
        self.caps.ept_vpid >> bit & 1 != 0
    }
}
