//! Nested states that KVM's own code has written: out of KVM in a machine here, through our reader and writer, and into
//! KVM again; and what KVM refuses, we refuse.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use hypernest_vmcs::nested_state::{IMAGE, Taker, state_flag};
use hypernest_vmcs::{Field, Layout, Losses, NestedState, Translation, Vmcs};

use crate::build;
use crate::cpio::Archive;
use crate::guests::Kernel;
use crate::integration::{LinuxRun, kernels, no_images};
use crate::run::{Captured, cache, command};
use crate::test::Outcome;

/// As `tests/guests/l2state.c` has them.
const VARIANTS: [&str; 3] = ["plain", "timer", "shadow"];
const VMXON: u64 = 0x20000;
const VMCS: u64 = 0x21000;
const SHADOW: u64 = 0x22000;
const L3_CODE: std::ops::Range<u64> = 0x11000..0x12000;
const SHADOW_RIP: u64 = 0x1234_5678;
/// What another shadow VMCS holds in its place.
const OTHER_RIP: u64 = 0x5EED;

/// Both halves with every kernel.
pub fn suite() -> Result<Outcome> {
    let Some(there) = kernels() else {
        return Ok(no_images());
    };
    let cli = build::cli()?;
    for kernel in there {
        round_trip(&cli, kernel).with_context(|| format!("Linux {}", kernel.series))?;
    }
    Ok(Outcome::Passed)
}

fn round_trip(cli: &Path, kernel: &Kernel) -> Result<()> {
    let first = run(cli, kernel, &Archive::default())?;
    let mut files = Archive::default();
    let mut expected = Vec::new();
    for variant in VARIANTS {
        ensure!(
            went_on(&first.stdout, variant, shadow_of(variant)),
            "KVM does not go on with its own nested state, {variant}"
        );
        let blob = printed(&first.stdout, variant)?;
        let state =
            judge(cli, variant, &blob).with_context(|| format!("nested state {variant}"))?;
        let mut put = |name: &str, state: &NestedState, then: Then| {
            let name = format!("{variant}.{name}");
            files.file(&format!("state/{name}"), 0o644, state.to_bytes());
            expected.push((name, then));
        };
        put("kvm", &state, Then::GoesOn(shadow_of(variant)));
        let ours = ours(&state)?;
        put("ours", &ours, Then::GoesOn(shadow_of(variant)));
        if variant == "shadow" {
            let mut other = ours.clone();
            change(&mut other, 1, |vmcs| vmcs.set(Field::GUEST_RIP, OTHER_RIP))?;
            put("other", &other, Then::GoesOn(OTHER_RIP));
        }
        for (name, spoilt) in spoilt(&state)? {
            let then = match NestedState::read(&spoilt.to_bytes())
                .and_then(|state| state.check(&taker()))
            {
                Ok(()) if spoilt.flags & state_flag::GUEST_MODE != 0 => {
                    Then::GoesOn(shadow_of(variant))
                }
                Ok(()) => Then::Taken,
                Err(refused) => Then::Fails(refused.errno().number()),
            };
            put(name, &spoilt, then);
        }
    }
    let second = run(cli, kernel, &files)?;
    for (name, then) in &expected {
        let mark = format!("STATE FILE {name}\n");
        let text = second.stdout.replace('\r', "");
        let (_, text) = text.split_once(&mark).context("a file was not tried")?;
        let text = text.split("STATE FILE").next().unwrap_or_default();
        let variant = name.split('.').next().unwrap_or_default();
        let good = match then {
            Then::GoesOn(shadow) => went_on(text, variant, *shadow),
            Then::Taken => text.contains("after=5,") && !text.contains("FATAL KVM_SET"),
            Then::Fails(errno) => text.contains(&format!("FATAL KVM_SET_NESTED_STATE: {errno} ")),
        };
        ensure!(good, "{name}: not {then:?} but {text}");
    }
    println!(
        "nested states of KVM in Linux {}: {} printed, {} set again as foreseen",
        kernel.series,
        VARIANTS.len(),
        expected.len()
    );
    Ok(())
}

/// What becomes of a nested state that KVM is given.
#[derive(Debug)]
enum Then {
    /// The guest goes on and reads this out of its shadow VMCS.
    GoesOn(u64),
    /// The system call succeeds; but what goes on is not the guest.
    Taken,
    /// The system call fails with this.
    Fails(i32),
}

fn shadow_of(variant: &str) -> u64 {
    if variant == "shadow" { SHADOW_RIP } else { 0 }
}

fn went_on(text: &str, variant: &str, shadow: u64) -> bool {
    let shadow = if shadow == 0 {
        "0".into()
    } else {
        format!("{shadow:#x}")
    };
    text.contains(&format!(
        "STATE {variant} ok=1 before=0,1,2,3,4, after=5,6,7,8,9, shadow={shadow} exit=18"
    ))
}

/// Boots the kernel with `files` beside its initramfs: archives may follow each other.
fn run(cli: &Path, kernel: &Kernel, files: &Archive) -> Result<Captured> {
    let path = cache().join(format!("state-{}.cpio", kernel.series));
    let mut bytes = fs::read(kernel.state_initramfs())?;
    bytes.extend(files.bytes());
    fs::write(&path, bytes)?;
    let result = LinuxRun {
        initramfs: path,
        options: vec!["--vmx".into(), "max".into()],
        ..LinuxRun::new(kernel, "")
    }
    .capture(cli)?;
    let ended = result.status.is_some_and(|status| status.success());
    ensure!(
        ended && result.stdout.contains("STATE DONE"),
        "the run did not end well: {}",
        result.stderr
    );
    Ok(result)
}

/// The bytes between `BLOB` and `END`.
fn printed(text: &str, variant: &str) -> Result<Vec<u8>> {
    let (_, text) = text
        .split_once(&format!("STATE {variant} BLOB "))
        .context("no nested state was printed")?;
    let (text, _) = text
        .split_once(&format!("STATE {variant} END"))
        .context("a nested state does not end")?;
    let mut lines = text.lines();
    let length: usize = lines.next().unwrap_or_default().trim().parse()?;
    let digits: String = lines.map(str::trim).collect();
    let bytes = (0..digits.len() / 2)
        .map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16))
        .collect::<Result<Vec<u8>, _>>()?;
    ensure!(bytes.len() == length, "{} of {length} bytes", bytes.len());
    Ok(bytes)
}

/// KVM in the machine: nobody has switched on the enlightened VMCS.
fn taker() -> Taker<'static> {
    static KVM: std::sync::LazyLock<[&Layout; 1]> = std::sync::LazyLock::new(|| [Layout::kvm()]);
    Taker {
        vmx: true,
        enlightened: false,
        smm: false,
        physical_bits: 46,
        layouts: &*KVM,
    }
}

/// Reads a blob that KVM has written: it is what `l2state.c` has set up, nothing fails and nothing is odd, and written
/// again, by header and by field, it is the same bytes.
fn judge(cli: &Path, variant: &str, blob: &[u8]) -> Result<NestedState> {
    let state = NestedState::read(blob)?;
    ensure!(state.to_bytes() == blob, "other bytes when written again");
    state.check(&taker())?;
    let findings = state.findings(Layout::kvm());
    ensure!(findings.is_empty(), "{findings:?}");
    ensure!((state.vmxon, state.vmcs) == (VMXON, VMCS));
    ensure!(state.flags == state_flag::GUEST_MODE);
    ensure!((state.deadline != 0) == (variant == "timer"));
    ensure!(state.shadow_image().is_some() == (variant == "shadow"));

    let kvm = Layout::kvm();
    let mut written = Vec::new();
    for (number, image) in state.data.chunks(IMAGE).enumerate() {
        let vmcs = kvm.read(image)?;
        let mut again = vec![0; IMAGE];
        kvm.write(&vmcs, &mut again)?;
        ensure!(again == image, "image {number} differs, by field");
        written.push(vmcs);
    }
    // KVM notes that a VMCS was launched when its guest exits.
    ensure!(!written[0].launched && L3_CODE.contains(&written[0].get(Field::GUEST_RIP)));
    let link = written[0].get(Field::VMCS_LINK_POINTER);
    if let Some(shadow) = written.get(1) {
        ensure!(link == SHADOW && shadow.shadow);
        ensure!(shadow.get(Field::GUEST_RIP) == SHADOW_RIP);
    } else {
        ensure!(link == u64::MAX);
    }

    let path = cache().join(format!("state-{variant}.blob"));
    fs::write(&path, blob)?;
    let lint = command(&cli.to_string_lossy())
        .args(["vmcs", "lint", "--profile", "kvm"])
        .arg(&path)
        .output()?;
    if !lint.status.success() {
        bail!("lint: {}", String::from_utf8_lossy(&lint.stdout));
    }
    Ok(state)
}

/// The same fields, out of our own layout.
fn ours(state: &NestedState) -> Result<NestedState> {
    let (kvm, hypernest) = (Layout::kvm(), Layout::hypernest());
    let there = Translation::new(kvm, hypernest);
    let back = Translation::new(hypernest, kvm);
    let mut ours = state.clone();
    for image in ours.data.chunks_mut(IMAGE) {
        let mut middle = vec![0; hypernest.size()];
        there.run(image, &mut middle, Losses::Refused)?;
        image.fill(0);
        back.run(&middle, image, Losses::Refused)?;
    }
    Ok(ours)
}

/// Changes the VMCS of an image.
fn change(state: &mut NestedState, image: usize, to: impl Fn(&mut Vmcs)) -> Result<()> {
    let image = state
        .data
        .chunks_mut(IMAGE)
        .nth(image)
        .context("no image")?;
    let mut vmcs = Layout::kvm().read(image)?;
    to(&mut vmcs);
    Ok(Layout::kvm().write(&vmcs, image)?)
}

/// A way to spoil a nested state.
type Spoil = fn(&mut NestedState);

const SPOILS: &[(&str, Spoil)] = &[
    ("flags", |state| state.flags |= 1 << 4),
    ("pending", |state| state.flags = state_flag::RUN_PENDING),
    ("run", |state| state.flags |= state_flag::RUN_PENDING),
    ("mtf", |state| state.flags = state_flag::MTF_PENDING),
    ("gif", |state| state.flags |= state_flag::GIF_SET),
    ("format", |state| state.format = 1),
    ("novmx", |state| state.vmxon = u64::MAX),
    ("vmxon", |state| state.vmxon |= 8),
    ("far", |state| state.vmxon |= 1 << 60),
    ("current", |state| state.vmcs = state.vmxon),
    ("page", |state| state.vmcs |= 0x800),
    ("none", |state| state.vmcs = u64::MAX),
    ("smm", |state| state.smm_flags = 2),
    ("smmbits", |state| state.smm_flags = 4),
    ("header", |state| state.vmx_flags |= 2),
    ("evmcs", |state| state.flags |= state_flag::EVMCS),
    ("empty", |state| state.data.clear()),
    ("half", |state| state.data.truncate(500)),
    ("padding", |state| state.padding.1[80] = 1),
    ("revision", |state| state.data[0] ^= 1),
    ("tail", |state| state.data[4000] = 1),
];

/// Of a nested state with a shadow VMCS.
const SHADOW_SPOILS: &[(&str, Spoil)] = &[
    ("gone", |state| state.data.truncate(IMAGE)),
    ("part", |state| state.data.truncate(IMAGE + 100)),
    ("revision", |state| state.data[IMAGE] ^= 1),
    ("indicator", |state| state.data[IMAGE + 3] ^= 0x80),
];

fn spoilt(state: &NestedState) -> Result<Vec<(&'static str, NestedState)>> {
    let mut all = Vec::new();
    let tries: &[(&str, Spoil)] = match (state.shadow_image(), state.deadline) {
        (Some(_), _) => SHADOW_SPOILS,
        (None, 0) => SPOILS,
        _ => &[],
    };
    for (name, spoil) in tries {
        let mut spoilt = state.clone();
        spoil(&mut spoilt);
        ensure!(spoilt != *state, "{name} spoils nothing");
        all.push((*name, spoilt));
    }
    Ok(all)
}
