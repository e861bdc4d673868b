//! Which instruction forms are compared: iced-x86's list, cut down to what the processor has and
//! what a user-mode single step can judge.

use iced_x86::{Code, CpuidFeature, Mnemonic};

use crate::case::Mode;

/// CPUID features of the forms under test.
const FEATURES: &[CpuidFeature] = {
    use CpuidFeature::*;
    &[
        INTEL8086,
        INTEL186,
        INTEL286,
        INTEL386,
        INTEL486,
        X64,
        CMOV,
        CX8,
        CMPXCHG16B,
        FPU,
        FPU287,
        FPU387,
        MMX,
        FXSR,
        SSE,
        SSE2,
        SSE3,
        SSSE3,
        POPCNT,
        LZCNT,
        BMI1,
        BMI2,
        ADX,
        MOVBE,
        FSGSBASE,
        CLFSH,
        CLFLUSHOPT,
        MULTIBYTENOP,
        PAUSE,
        PREFETCHW,
        MSR,
        SMAP,
        INVPCID,
        XSAVE,
        XSAVEC,
        MONITOR,
        CET_IBT,
        INTEL8086_ONLY,
    ]
};

/// Instructions a user-mode single step on a host cannot judge, with the reason.
const EXCLUDED: &[(&str, &[Mnemonic])] = {
    use Mnemonic::*;
    &[
        (
            "enter the host's kernel",
            &[
                Int, Int1, Syscall, Sysenter, Sysret, Sysretq, Sysexit, Sysexitq,
            ],
        ),
        ("are in no manual", &[Fstpnce]),
        ("drop the single-step flag", &[Iret, Iretd, Iretq]),
        (
            "read the host's descriptor tables",
            &[Sgdt, Sidt, Sldt, Str, Smsw, Lar, Lsl, Verr, Verw],
        ),
        (
            "load segments from the host's descriptor tables",
            &[Lds, Les, Lss, Lfs, Lgs, Retf],
        ),
        (
            "depend on host registers the process cannot set",
            &[Xgetbv, Xsetbv],
        ),
        (
            "give the address of the host's interrupt tables away",
            &[Pconfig],
        ),
        // Their memory operand is not what they access.
        (
            "never execute in user mode and are #UD there",
            &[Monitor, Mwait, Clac, Stac, Rsm],
        ),
    ]
};

/// The forms to compare in a mode, in iced's order.
pub fn forms(mode: Mode) -> Vec<Code> {
    Code::values()
        .filter(|code| {
            let info = code.op_code();
            let available = match mode {
                Mode::Long => info.mode64() && info.long_mode() && info.intel_decoder64(),
                Mode::Compat => info.mode32() && info.compatibility_mode(),
            };
            available
                && info.is_instruction()
                && !info.fwait()
                && code.cpuid_features().iter().all(|f| FEATURES.contains(f))
                && !excluded(*code)
        })
        .collect()
}

fn excluded(code: Code) -> bool {
    let mnemonic = code.mnemonic();
    EXCLUDED.iter().any(|(_, list)| list.contains(&mnemonic))
        || code == Code::Ud0 // the old form without ModRM; Ud0_r32_rm32 and its like stay
        || is_far_branch(code)
        // Selectors come from registers and memory; only the forms that store them are judged.
        || matches!(
            code,
            Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16
        )
        || (mnemonic == Mnemonic::Pop
            && matches!(
                code,
                Code::Popw_ES | Code::Popw_SS | Code::Popw_DS | Code::Popw_CS
                    | Code::Popw_FS | Code::Popw_GS
                    | Code::Popd_ES | Code::Popd_SS | Code::Popd_DS
                    | Code::Popd_FS | Code::Popd_GS | Code::Popq_FS | Code::Popq_GS
            ))
}

fn is_far_branch(code: Code) -> bool {
    matches!(
        code,
        Code::Call_ptr1616
            | Code::Call_ptr1632
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
            | Code::Jmp_ptr1616
            | Code::Jmp_ptr1632
            | Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_holds_the_families_and_not_the_excluded() {
        let long = forms(Mode::Long);
        for code in [
            Code::Add_rm8_r8,
            Code::Cmpxchg16b_m128,
            Code::Fld_m80fp,
            Code::Pshufb_xmm_xmmm128,
            Code::VEX_Andn_r64_r64_rm64,
            Code::Fxsave_m512byte,
        ] {
            assert!(long.contains(&code), "{code:?}");
        }
        assert!(!long.contains(&Code::Syscall) && !long.contains(&Code::Daa));
        let compat = forms(Mode::Compat);
        assert!(compat.contains(&Code::Daa) && !compat.contains(&Code::Cmpxchg16b_m128));
        println!(
            "{} forms in 64-bit mode, {} in 32-bit",
            long.len(),
            compat.len()
        );
    }
}
