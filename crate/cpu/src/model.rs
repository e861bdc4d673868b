//! CPU models: what CPUID lists and what follows from it.

use core::fmt;

use iced_x86::{CpuidFeature, DecoderOptions, Instruction, Mnemonic};

use crate::vcpu::cr;

/// Register of a CPUID result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One feature bit of CPUID (Vol. 2A, "CPUID-CPU Identification").
#[derive(Debug)]
pub(crate) struct FeatureRow {
    pub feature: Feature,
    pub leaf: u32,
    pub subleaf: u32,
    pub output: Output,
    pub bit: u32,
    /// Bits of CR4 that exist only with the feature.
    pub cr4: u64,
}

macro_rules! features {
    ($($name:ident $leaf:literal / $subleaf:literal $output:ident $bit:literal $(, $cr4:expr)?;)*) => {
        /// What a model may list.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        #[expect(missing_docs, reason = "the manual's own names")]
        pub enum Feature { $($name),* }

        /// Every feature with its place in CPUID.
        pub(crate) const FEATURES: &[FeatureRow] = &[$(FeatureRow {
            feature: Feature::$name,
            leaf: $leaf,
            subleaf: $subleaf,
            output: Output::$output,
            bit: $bit,
            cr4: 0 $(| $cr4)?,
        }),*];
    };
}

features! {
    Fpu 1/0 Edx 0;
    Vme 1/0 Edx 1, cr::CR4_VME | cr::CR4_PVI;
    De 1/0 Edx 2, cr::CR4_DE;
    Pse 1/0 Edx 3, cr::CR4_PSE;
    Tsc 1/0 Edx 4, cr::CR4_TSD;
    Msr 1/0 Edx 5;
    Pae 1/0 Edx 6, cr::CR4_PAE;
    Mce 1/0 Edx 7, cr::CR4_MCE;
    Cx8 1/0 Edx 8;
    Apic 1/0 Edx 9;
    Sep 1/0 Edx 11;
    Mtrr 1/0 Edx 12;
    Pge 1/0 Edx 13, cr::CR4_PGE;
    Mca 1/0 Edx 14;
    Cmov 1/0 Edx 15;
    Pat 1/0 Edx 16;
    Pse36 1/0 Edx 17;
    Clfsh 1/0 Edx 19;
    Mmx 1/0 Edx 23;
    Fxsr 1/0 Edx 24, cr::CR4_OSFXSR;
    Sse 1/0 Edx 25, cr::CR4_OSXMMEXCPT;
    Sse2 1/0 Edx 26;
    SelfSnoop 1/0 Edx 27;
    Sse3 1/0 Ecx 0;
    Monitor 1/0 Ecx 3;
    Ssse3 1/0 Ecx 9;
    Cx16 1/0 Ecx 13;
    Pcid 1/0 Ecx 17, cr::CR4_PCIDE;
    X2apic 1/0 Ecx 21;
    Movbe 1/0 Ecx 22;
    Popcnt 1/0 Ecx 23;
    TscDeadline 1/0 Ecx 24;
    Xsave 1/0 Ecx 26, cr::CR4_OSXSAVE;
    Rdrand 1/0 Ecx 30;
    Hypervisor 1/0 Ecx 31;
    Arat 6/0 Eax 2;
    Fsgsbase 7/0 Ebx 0, cr::CR4_FSGSBASE;
    TscAdjust 7/0 Ebx 1;
    Bmi1 7/0 Ebx 3;
    Smep 7/0 Ebx 7, cr::CR4_SMEP;
    Bmi2 7/0 Ebx 8;
    Erms 7/0 Ebx 9;
    Invpcid 7/0 Ebx 10;
    FcsFdsDeprecated 7/0 Ebx 13;
    Rdseed 7/0 Ebx 18;
    Adx 7/0 Ebx 19;
    Smap 7/0 Ebx 20, cr::CR4_SMAP;
    Clflushopt 7/0 Ebx 23;
    Umip 7/0 Ecx 2, cr::CR4_UMIP;
    Rdpid 7/0 Ecx 22;
    ArchCapabilities 7/0 Edx 29;
    Xsaveopt 0xd/1 Eax 0;
    Xsavec 0xd/1 Eax 1;
    Xsaves 0xd/1 Eax 3;
    LahfLm 0x8000_0001/0 Ecx 0;
    Lzcnt 0x8000_0001/0 Ecx 5;
    Prefetchw 0x8000_0001/0 Ecx 8;
    Syscall 0x8000_0001/0 Edx 11;
    Nx 0x8000_0001/0 Edx 20;
    GigabytePages 0x8000_0001/0 Edx 26;
    Rdtscp 0x8000_0001/0 Edx 27;
    Lm 0x8000_0001/0 Edx 29;
    InvariantTsc 0x8000_0007/0 Edx 8;
}

/// Where a feature is in CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CpuidBit {
    /// The leaf.
    pub leaf: u32,
    /// The subleaf; 0 where the leaf has none.
    pub subleaf: u32,
    /// The register of the result: 0 is EAX, then EBX, ECX and EDX.
    pub register: u8,
    /// The bit.
    pub bit: u8,
}

/// As the manual writes it: `CPUID.7:EBX bit 3`, with the subleaf where it is not 0.
impl fmt::Display for CpuidBit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];
        let register = REGISTERS.get(usize::from(self.register)).unwrap_or(&"?");
        write!(f, "CPUID.{:X}", self.leaf)?;
        if self.subleaf != 0 {
            write!(f, ".{}", self.subleaf)?;
        }
        write!(f, ":{register} bit {}", self.bit)
    }
}

impl Feature {
    /// Every feature that a model may list.
    pub fn all() -> impl Iterator<Item = Feature> {
        FEATURES.iter().map(|row| row.feature)
    }

    /// Its place in CPUID.
    pub fn cpuid(self) -> CpuidBit {
        let row = &FEATURES[self as usize];
        CpuidBit {
            leaf: row.leaf,
            subleaf: row.subleaf,
            register: row.output as u8,
            bit: row.bit as u8,
        }
    }
}

const fn set(features: &[Feature]) -> u128 {
    let mut bits = 0;
    let mut n = 0;
    while n < features.len() {
        bits |= 1 << features[n] as u8;
        n += 1;
    }
    bits
}

/// Whose rules a model follows where they differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vendor {
    Intel,
    /// SYSCALL and SYSRET exist outside 64-bit mode, SYSENTER and SYSEXIT only outside IA-32e mode.
    Amd,
}

/// A CPU model.
#[derive(Debug)]
pub struct Model {
    /// What the command line calls it.
    pub name: &'static str,
    /// One sentence for a list of models.
    pub about: &'static str,
    pub(crate) vendor: Vendor,
    /// Guest-physical address bits (MAXPHYADDR).
    pub(crate) physical_bits: u32,
    /// Type, family, model and stepping: CPUID.1:EAX, and EDX after reset.
    pub(crate) signature: u32,
    /// Brand string, at most 48 bytes.
    pub(crate) brand: &'static str,
    features: u128,
}

/// What 64-bit Linux cannot do without, and little else.
const BASELINE: u128 = {
    use Feature::*;
    set(&[
        Fpu,
        FcsFdsDeprecated,
        Vme,
        De,
        Pse,
        Tsc,
        Msr,
        Pae,
        Mce,
        Cx8,
        Apic,
        Sep,
        Mtrr,
        Pge,
        Mca,
        Cmov,
        Pat,
        Pse36,
        Clfsh,
        Mmx,
        Fxsr,
        Sse,
        Sse2,
        Arat,
        Hypervisor,
        Syscall,
        Nx,
        Lm,
        LahfLm,
        InvariantTsc,
    ])
};

const HYPERNEST: u128 = BASELINE | {
    use Feature::*;
    set(&[
        SelfSnoop,
        Sse3,
        Monitor,
        Ssse3,
        Cx16,
        Pcid,
        X2apic,
        Movbe,
        Popcnt,
        TscDeadline,
        Xsave,
        Rdrand,
        Fsgsbase,
        TscAdjust,
        Bmi1,
        Smep,
        Bmi2,
        Erms,
        Invpcid,
        Rdseed,
        Adx,
        Smap,
        Clflushopt,
        Umip,
        Rdpid,
        ArchCapabilities,
        Xsaveopt,
        Xsavec,
        Xsaves,
        Lzcnt,
        Prefetchw,
        GigabytePages,
        Rdtscp,
    ])
};

/// Family 6, model 36H: an in-order core, as this one is. Systems that know it by name take it
/// for what it is, a processor that does not speculate.
const SIGNATURE: u32 = 0x0003_0661;

static MODELS: [Model; 3] = [
    Model {
        name: "hypernest",
        about: "everything this processor has",
        vendor: Vendor::Intel,
        physical_bits: 40,
        signature: SIGNATURE,
        brand: "Hypernest x86-64 processor",
        features: HYPERNEST,
    },
    Model {
        name: "baseline",
        about: "what any 64-bit processor has: SSE2 and no later extension",
        vendor: Vendor::Intel,
        physical_bits: 40,
        signature: SIGNATURE,
        brand: "Hypernest x86-64 processor (baseline)",
        features: BASELINE,
    },
    Model {
        name: "baseline-amd",
        about: "as baseline, from the other vendor: SYSCALL works in 32-bit code",
        vendor: Vendor::Amd,
        physical_bits: 40,
        signature: 0x0000_0f51, // Family 15, model 5.
        brand: "Hypernest x86-64 processor (baseline, AMD)",
        features: BASELINE,
    },
];

impl Default for &'static Model {
    fn default() -> Self {
        &MODELS[0]
    }
}

impl Model {
    /// Every model there is; the first is the default.
    pub fn all() -> &'static [Model] {
        &MODELS
    }

    /// The model of that name.
    pub fn by_name(name: &str) -> Option<&'static Model> {
        MODELS.iter().find(|model| model.name == name)
    }

    /// Whether the model lists `feature`.
    pub fn has(&self, feature: Feature) -> bool {
        self.features >> feature as u8 & 1 != 0
    }

    /// Whose processor it says it is, as CPUID leaf 0 does.
    pub fn vendor(&self) -> &'static str {
        match self.vendor {
            Vendor::Intel => "GenuineIntel",
            Vendor::Amd => "AuthenticAMD",
        }
    }

    /// Type, family, model and stepping: CPUID.1:EAX.
    pub fn signature(&self) -> u32 {
        self.signature
    }

    /// Guest-physical address bits (MAXPHYADDR).
    pub fn physical_bits(&self) -> u32 {
        self.physical_bits
    }

    /// 1 GiB pages.
    pub(crate) fn has_gigabyte_pages(&self) -> bool {
        self.has(Feature::GigabytePages)
    }

    /// Bits of CR4 that may be set.
    pub(crate) fn cr4_bits(&self) -> u64 {
        FEATURES
            .iter()
            .filter(|row| self.has(row.feature))
            .fold(cr::CR4_PCE, |bits, row| bits | row.cr4)
    }

    /// Bits of EFER that may be set.
    pub(crate) fn efer_bits(&self) -> u64 {
        let mut bits = 0;
        if self.has(Feature::Syscall) {
            bits |= cr::EFER_SCE;
        }
        if self.has(Feature::Lm) {
            bits |= cr::EFER_LME | cr::EFER_LMA;
        }
        if self.has(Feature::Nx) {
            bits |= cr::EFER_NXE;
        }
        bits
    }

    /// Bits of XCR0 that may be set.
    pub(crate) fn xcr0_bits(&self) -> u64 {
        if self.has(Feature::Xsave) { 3 } else { 0 }
    }

    /// Guest-physical address bits that do not exist.
    pub(crate) fn reserved_physical(&self) -> u64 {
        !0 << self.physical_bits
    }

    /// Options for the decoder: prefixes that mean something only with a feature.
    pub(crate) fn decoder_options(&self) -> u32 {
        let mut options = DecoderOptions::NO_WBNOINVD;
        if !self.has(Feature::Bmi1) {
            options |= DecoderOptions::NO_MPFX_0FBC;
        }
        if !self.has(Feature::Lzcnt) {
            options |= DecoderOptions::NO_MPFX_0FBD;
        }
        if !self.has(Feature::LahfLm) {
            options |= DecoderOptions::NO_LAHF_SAHF_64;
        }
        options
    }

    /// Whether the model has the instruction. If not, it raises #UD.
    pub(crate) fn allows(&self, instruction: &Instruction) -> bool {
        // Without shadow stacks RDSSP is a NOP; the rest of CET_SS does not exist.
        matches!(instruction.mnemonic(), Mnemonic::Rdsspd | Mnemonic::Rdsspq)
            || instruction
                .code()
                .cpuid_features()
                .iter()
                .all(|feature| self.supports(*feature))
    }

    /// Whether instructions of a decoder's feature exist.
    pub(crate) fn supports(&self, feature: CpuidFeature) -> bool {
        use CpuidFeature as C;
        let wanted = match feature {
            C::INTEL8086 | C::INTEL186 | C::INTEL286 | C::INTEL386 | C::INTEL486 => return true,
            C::CPUID | C::MULTIBYTENOP | C::PAUSE | C::RDPMC => return true,
            // Encodings that are NOPs where they are not listed.
            C::CET_IBT | C::CLDEMOTE | C::PREFETCHWT1 | C::PREFETCHITI => return true,
            // Without VMX they raise #UD by themselves.
            C::VMX | C::INVEPT | C::INVVPID => return true,
            C::FPU | C::FPU287 | C::FPU387 => Feature::Fpu,
            C::X64 => Feature::Lm,
            C::ADX => Feature::Adx,
            C::BMI1 => Feature::Bmi1,
            C::BMI2 => Feature::Bmi2,
            C::CLFLUSHOPT => Feature::Clflushopt,
            C::CLFSH => Feature::Clfsh,
            C::CMOV => Feature::Cmov,
            C::CMPXCHG16B => Feature::Cx16,
            C::CX8 => Feature::Cx8,
            C::FSGSBASE => Feature::Fsgsbase,
            C::FXSR => Feature::Fxsr,
            C::INVPCID => Feature::Invpcid,
            C::LZCNT => Feature::Lzcnt,
            C::MMX => Feature::Mmx,
            C::MONITOR => Feature::Monitor,
            C::MOVBE => Feature::Movbe,
            C::MSR => Feature::Msr,
            C::POPCNT => Feature::Popcnt,
            C::PREFETCHW => Feature::Prefetchw,
            C::RDPID => Feature::Rdpid,
            C::RDRAND => Feature::Rdrand,
            C::RDSEED => Feature::Rdseed,
            C::RDTSCP => Feature::Rdtscp,
            C::SEP => Feature::Sep,
            C::SMAP => Feature::Smap,
            C::SSE => Feature::Sse,
            C::SSE2 => Feature::Sse2,
            C::SSE3 => Feature::Sse3,
            C::SSSE3 => Feature::Ssse3,
            C::SYSCALL => Feature::Syscall,
            C::TSC => Feature::Tsc,
            C::XSAVE => Feature::Xsave,
            C::XSAVEC => Feature::Xsavec,
            C::XSAVEOPT => Feature::Xsaveopt,
            C::XSAVES => Feature::Xsaves,
            _ => return false,
        };
        self.has(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use iced_x86::Decoder;

    fn allowed(model: &str, code: &[u8]) -> bool {
        let model = Model::by_name(model).unwrap();
        let i = Decoder::new(64, code, model.decoder_options()).decode();
        assert!(!i.is_invalid());
        model.allows(&i)
    }

    #[test]
    fn features_follow_the_order_of_their_table() {
        for (n, row) in FEATURES.iter().enumerate() {
            assert_eq!(row.feature as usize, n);
        }
        assert!(FEATURES.len() <= 128);
        assert_eq!(Feature::Bmi1.cpuid().to_string(), "CPUID.7:EBX bit 3");
        assert_eq!(Feature::Xsaves.cpuid().to_string(), "CPUID.D.1:EAX bit 3");
    }

    #[test]
    fn what_a_model_does_not_list_is_refused() {
        let andn = [0xc4, 0xe2, 0x70, 0xf2, 0xc2];
        let aesenc = [0x66, 0x0f, 0x38, 0xdc, 0xc1];
        assert!(allowed("hypernest", &andn));
        assert!(!allowed("baseline", &andn));
        assert!(!allowed("hypernest", &aesenc));
        // These know by themselves whether there is VMX.
        assert!(allowed("hypernest", &[0x0f, 0xc7, 0x33])); // VMPTRLD
    }

    #[test]
    fn hints_run_everywhere() {
        for code in [
            &[0xf3, 0x0f, 0x1e, 0xfa][..],   // ENDBR64
            &[0x0f, 0x1c, 0x00],             // CLDEMOTE
            &[0xf3, 0x90],                   // PAUSE
            &[0x0f, 0x1f, 0x44, 0x00, 0x00], // NOP
            &[0xf3, 0x0f, 0xbc, 0xc1],       // TZCNT, or BSF where there is none
            &[0xf3, 0x48, 0x0f, 0x1e, 0xc8], // RDSSPQ, a NOP without shadow stacks
        ] {
            assert!(allowed("baseline", code), "{code:x?}");
        }
    }
}
