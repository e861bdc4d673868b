//! Stock kernels as hypervisors: KVM's own module runs the guests of `tests/guests/l2test.c`, and a stock kernel
//! whose KVM runs them once more.

use anyhow::{Result, bail};

use crate::guests::{KERNELS, Kernel};
use crate::integration::{LinuxRun, kernels, no_images, told};
use crate::run::Captured;
use crate::test::Outcome;
use crate::{build, enlightened};

/// The guests that must report.
const TESTS: [&str; 10] = [
    "real_out",
    "cpuid",
    "vmcall",
    "long_out",
    "mmio",
    "touch_cold",
    "touch_warm",
    "touch_populated",
    "spin",
    "timer",
];

/// One way to load KVM's module.
struct Variant {
    profile: &'static str,
    /// Options of the command for the layouts of VMCS regions.
    layouts: &'static [&'static str],
    /// Its options, joined by commas.
    options: &'static str,
    /// Of its parameters, how some must read once it is loaded.
    reads: &'static [&'static str],
    /// The machine has the Hyper-V interface.
    hyperv: bool,
}

impl Variant {
    /// Options of `hypernest run`.
    fn machine(&self) -> Vec<String> {
        let hyperv = self.hyperv.then_some(&"--hyperv");
        ["--vmx", self.profile]
            .iter()
            .chain(self.layouts)
            .chain(hyperv)
            .map(|&word| word.into())
            .collect()
    }
}

const VARIANTS: &[Variant] = &[
    Variant {
        profile: "max",
        layouts: &[],
        options: "",
        reads: &[
            "enable_apicv:Y",
            "enable_shadow_vmcs:Y",
            "ept:Y",
            "eptad:Y",
            "flexpriority:Y",
            "nested:Y",
            "ple_gap:128",
            "pml:Y",
            "unrestricted_guest:Y",
            "vnmi:Y",
            "vpid:Y",
        ],
        hyperv: false,
    },
    Variant {
        profile: "kvm",
        layouts: &[],
        options: "",
        reads: &[
            "enable_shadow_vmcs:Y",
            "ept:Y",
            "nested:Y",
            "pml:Y",
            "preemption_timer:Y",
            "unrestricted_guest:Y",
            "vpid:Y",
        ],
        hyperv: false,
    },
    Variant {
        profile: "max",
        layouts: &[],
        options: "vpid=0",
        reads: &["ept:Y", "vpid:N"],
        hyperv: false,
    },
    Variant {
        profile: "max",
        layouts: &[],
        options: "enable_apicv=0",
        reads: &["ept:Y", "enable_apicv:N"],
        hyperv: false,
    },
    // A guest in real mode runs in virtual-8086 mode.
    Variant {
        profile: "max",
        layouts: &[],
        options: "unrestricted_guest=0",
        reads: &["ept:Y", "unrestricted_guest:N"],
        hyperv: false,
    },
    Variant {
        profile: "max",
        layouts: &[],
        options: "ept=0",
        reads: &["ept:N", "unrestricted_guest:N", "vpid:Y"],
        hyperv: false,
    },
    // What the enlightened VMCS has no place for is not there.
    Variant {
        profile: "max",
        layouts: &[],
        options: "",
        reads: &[
            "enable_apicv:N",
            "enable_shadow_vmcs:N",
            "enlightened_vmcs:Y",
            "ept:Y",
            "pml:N",
            "unrestricted_guest:Y",
            "vpid:Y",
        ],
        hyperv: true,
    },
    // Regions of an old layout become ones of a new layout; what the old one has no place for is not offered.
    Variant {
        profile: "max",
        layouts: &["--vmcs", "kvm-3.10", "--write-vmcs", "hypernest-evmcs"],
        options: "",
        reads: &[
            "enable_apicv:N",
            "enable_shadow_vmcs:N",
            "ept:Y",
            "pml:N",
            "unrestricted_guest:Y",
            "vpid:Y",
        ],
        hyperv: false,
    },
];

/// Every kernel runs l2test in each variant; the first one runs a stock kernel.
pub fn quick() -> Result<Outcome> {
    run(&KERNELS[..1])
}

/// As [`quick`], but every kernel runs itself.
pub fn all() -> Result<Outcome> {
    run(KERNELS)
}

fn run(nesting: &[Kernel]) -> Result<Outcome> {
    let Some(there) = kernels() else {
        return Ok(no_images());
    };
    let cli = build::cli()?;
    let mut failures = Vec::new();
    let mut judge = |name: &str, run: &LinuxRun, failure: &dyn Fn(&Captured) -> Option<String>| {
        let result = run.capture(&cli)?;
        let why = ended_badly(&result).or_else(|| failure(&result));
        failures.extend(told(name, "all well", &result, why));
        anyhow::Ok(())
    };
    for kernel in there {
        for variant in VARIANTS {
            let name = format!(
                "KVM of Linux {} under {} {}",
                kernel.series,
                variant.machine().join(" "),
                variant.options
            );
            let words = format!("anchor.n=500 anchor.kvm_intel={}", variant.options);
            let run = LinuxRun {
                options: variant.machine(),
                ..LinuxRun::new(kernel, &words)
            };
            judge(&name, &run, &|result| small_guests_failure(result, variant))?;
        }
        if nesting.iter().any(|other| other.series == kernel.series) {
            let name = format!("Linux {0} in KVM of Linux {0}", kernel.series);
            let words = nested_words(&["cryptomgr.notests", "l3.tests=abvomcxt"]);
            judge(&name, &nested_linux(kernel, &words), &nested_linux_failure)?;
            let name = format!("{name}, by the enlightened VMCS");
            let mut run = nested_linux(kernel, &words);
            run.options.push("--hyperv".into());
            judge(&name, &run, &|result| {
                says_enlightened(result).or_else(|| nested_linux_failure(result))
            })?;
        }
    }
    for kernel in kernels().unwrap_or_default() {
        let with = enlightened::counted(&cli, kernel, true)?;
        let without = enlightened::counted(&cli, kernel, false)?;
        let why = ended_badly(&with.result).or_else(|| ended_badly(&without.result));
        let why = match why {
            Some(why) => Some(why),
            None => enlightened::failure(&with, &without)?,
        };
        let name = format!("VMX instructions of KVM of Linux {}", kernel.series);
        failures.extend(told(&name, "all well", &with.result, why));
    }
    if !failures.is_empty() {
        bail!("{}", failures.join("; "));
    }
    Ok(Outcome::Passed)
}

/// Words for the init of [`nested_linux`]: no l2test beside it, and `words` for the kernel inside.
pub fn nested_words(words: &[&str]) -> String {
    format!("anchor.tests=- anchor.l2opt={}", words.join(","))
}

/// A run whose KVM boots the kernel that it is part of.
pub fn nested_linux<'a>(kernel: &'a Kernel, words: &'a str) -> LinuxRun<'a> {
    LinuxRun {
        memory: "512M",
        initramfs: kernel.nested_initramfs(),
        options: vec!["--vmx".into(), "max".into()],
        ..LinuxRun::new(kernel, words)
    }
}

/// What the VMM prints before it enters the kernel inside.
pub const INSIDE_START: &str = "L2LINUX START";
/// What the init of the kernel inside prints.
pub const INSIDE_MARKER: &str = "L2LINUX MARKER init";

fn ended_badly(result: &Captured) -> Option<String> {
    match result.status.map(|status| status.code()) {
        None | Some(Some(124)) => Some("did not end in time".into()),
        Some(Some(0)) => None,
        Some(code) => Some(format!("ended with exit code {code:?}")),
    }
}

fn says_enlightened(result: &Captured) -> Option<String> {
    let says = result.stdout.contains(enlightened::SAYS);
    (!says).then(|| "KVM does not say that it uses the enlightened VMCS".into())
}

fn small_guests_failure(result: &Captured, variant: &Variant) -> Option<String> {
    if variant.hyperv
        && let Some(why) = says_enlightened(result)
    {
        return Some(why);
    }
    let parameters = result
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("kvm_intel: "))
        .unwrap_or_default();
    let parameters: Vec<_> = parameters.split_whitespace().collect();
    if let Some(other) = variant.reads.iter().find(|read| !parameters.contains(read)) {
        return Some(format!("kvm_intel does not have {other}"));
    }
    no_good_result(&result.stdout, "L2").or_else(|| {
        (!result.stdout.contains("ANCHOR L2 rc=0")).then(|| "l2test reports a failure".into())
    })
}

fn nested_linux_failure(result: &Captured) -> Option<String> {
    let Some((_, inside)) = result.stdout.split_once(INSIDE_START) else {
        return Some("no kernel was started inside".into());
    };
    if !inside.contains(INSIDE_MARKER) {
        return Some("the kernel inside did not reach its init".into());
    }
    no_good_result(inside, "L3").or_else(|| {
        let ended =
            inside.contains("L3 DONE failures=0") && inside.contains("L2LINUX END triple fault");
        (!ended).then(|| "the kernel inside did not end well".into())
    })
}

/// The tests of which `text` holds no good result.
fn no_good_result(text: &str, level: &str) -> Option<String> {
    let missing: Vec<_> = TESTS
        .into_iter()
        .filter(|test| !text.contains(&format!("{level} {test} ok=1")))
        .collect();
    (!missing.is_empty()).then(|| format!("no good result of {}", missing.join(", ")))
}
