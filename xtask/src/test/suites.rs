//! The suites, in the order they run: quick judgements first.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Outcome, Suite};
use crate::run::{command, find, line, root, run, run_within};
use crate::{
    build, conformance, guests, integration, kut, moves, nested, nested_state, setup, snapshots,
};

/// Every suite.
pub const SUITES: &[Suite] = &[
    Suite {
        name: "setup",
        about: "what the suites need is there, or gets installed",
        run: setup,
    },
    Suite {
        name: "fmt",
        about: "cargo fmt",
        run: || passed(&["cargo fmt --all --check"]),
    },
    Suite {
        name: "clippy",
        about: "no warning in any target",
        run: clippy,
    },
    Suite {
        name: "docs",
        about: "documentation without a warning",
        run: docs,
    },
    Suite {
        name: "deny",
        about: "licences and advisories",
        run: deny,
    },
    Suite {
        name: "native",
        about: "unit and integration tests",
        run: native,
    },
    Suite {
        name: "doctests",
        about: "examples in the documentation",
        run: || passed(&["cargo test --quiet --workspace --doc"]),
    },
    Suite {
        name: "examples",
        about: "programs in examples/",
        run: examples,
    },
    Suite {
        name: "portable",
        about: "portable crates check for wasm32",
        run: portable,
    },
    Suite {
        name: "wasm-node",
        about: "tests in WebAssembly, in Node",
        run: wasm_node,
    },
    Suite {
        name: "wasm-browser",
        about: "tests in WebAssembly, in headless Chromium",
        run: wasm_browser,
    },
    Suite {
        name: "wasm-size",
        about: "the .wasm stays under its limit",
        run: wasm_size,
    },
    Suite {
        name: "guests",
        about: "guest images are made",
        run: guest_images,
    },
    Suite {
        name: "boots",
        about: "stock kernels reach their init",
        run: integration::boots,
    },
    Suite {
        name: "nested",
        about: "stock kernels run guests with KVM",
        run: nested::quick,
    },
    Suite {
        name: "nested-state",
        about: "nested states that KVM wrote, read, written again and given back",
        run: nested_state::suite,
    },
    Suite {
        name: "conformance",
        about: "the rules of VM entry and the VM exits, one by one",
        run: conformance::suite,
    },
    Suite {
        name: "determinism",
        about: "equal runs end in equal states, natively and in WebAssembly",
        run: integration::determinism,
    },
    Suite {
        name: "snapshots",
        about: "a machine goes from process to process, native and WebAssembly, in snapshots",
        run: snapshots::hops,
    },
    Suite {
        name: "moves",
        about: "machines move from process to process while they run",
        run: moves::suite,
    },
    Suite {
        name: "page",
        about: "the page boots a guest in headless Chromium",
        run: page,
    },
    Suite {
        name: "fuzz",
        about: "a short run of each fuzz target",
        run: fuzz,
    },
    Suite {
        name: "kut",
        about: "kvm-unit-tests that must pass",
        run: unit_tests,
    },
];

/// Limit of the .wasm, compressed.
const WASM_LIMIT: usize = 1_500_000;

/// kvm-unit-tests that must pass.
pub const KUT_REQUIRED: &[&str] = &[
    "idt_test",
    "eventinj",
    "xsave",
    "smap",
    "umip",
    "syscall",
    "memory",
    "tsc",
    "tsc_adjust",
    "pcid",
    "sieve",
    "access",
    "apic",
    "ioapic",
    "setjmp",
    "rmap_chain",
    "smptest",
    "vmx",
];

fn passed(lines: &[&str]) -> Result<Outcome> {
    for words in lines {
        run(&mut line(words))?;
    }
    Ok(Outcome::Passed)
}

fn skipped(why: impl Into<String>) -> Result<Outcome> {
    Ok(Outcome::Skipped(why.into()))
}

fn setup() -> Result<Outcome> {
    let advice = setup::install()?;
    if advice.is_empty() {
        Ok(Outcome::Passed)
    } else {
        bail!("{}", advice.join("; "))
    }
}

fn clippy() -> Result<Outcome> {
    passed(&["cargo clippy --quiet --workspace --all-targets -- -D warnings"])
}

fn docs() -> Result<Outcome> {
    run(
        line("cargo doc --quiet --workspace --no-deps --document-private-items")
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    Ok(Outcome::Passed)
}

fn deny() -> Result<Outcome> {
    if find("cargo-deny").is_none() {
        return skipped("cargo-deny is not installed: `cargo install cargo-deny --locked`");
    }
    // Advisories come from a repository that is not everywhere to be had.
    passed(&["cargo deny --offline check licenses bans sources"])
}

fn native() -> Result<Outcome> {
    if find("cargo-nextest").is_none() {
        return skipped("cargo-nextest is missing: `cargo xtask test setup` installs it");
    }
    passed(&[
        "cargo nextest run --workspace --no-fail-fast --status-level slow --final-status-level fail",
    ])
}

fn examples() -> Result<Outcome> {
    let mut found = Vec::new();
    for member in members()? {
        for entry in fs::read_dir(member.join("examples")).into_iter().flatten() {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "rs") {
                found.push((member.clone(), path));
            }
        }
    }
    found.sort();
    if found.is_empty() {
        bail!("no crate has examples");
    }
    for (member, path) in &found {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let manifest = member.join("Cargo.toml");
        let mut example = line("cargo run --quiet --manifest-path");
        run_within(
            Duration::from_secs(300),
            example.arg(manifest).args(["--example", &name]),
        )?;
    }
    Ok(Outcome::Passed)
}

/// The folders of the crates.
fn members() -> Result<Vec<PathBuf>> {
    let mut members: Vec<PathBuf> = fs::read_dir(root().join("crate"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("Cargo.toml").is_file())
        .collect();
    members.sort();
    Ok(members)
}

/// Crates that only exist on the host.
const NATIVE_ONLY: &[&str] = &["kvm", "cli", "oracle"];

fn portable() -> Result<Outcome> {
    for member in members()? {
        let name = member
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if !NATIVE_ONLY.contains(&name.as_str()) {
            let words =
                format!("cargo check --quiet --target wasm32-unknown-unknown -p hypernest-{name}");
            run(&mut line(&words))?;
        }
    }
    Ok(Outcome::Passed)
}

/// Crates with tests that run as WebAssembly.
fn wasm_tested() -> Result<Vec<PathBuf>> {
    let uses = |member: &Path| {
        fs::read_to_string(member.join("Cargo.toml"))
            .is_ok_and(|text| text.contains("wasm-bindgen-test"))
    };
    Ok(members()?
        .into_iter()
        .filter(|member| uses(member))
        .collect())
}

fn wasm_pack_test(options: &[&str]) -> Result<Outcome> {
    for program in ["wasm-pack", "wasm-bindgen-test-runner"] {
        if find(program).is_none() {
            return skipped(format!(
                "{program} is missing: `cargo xtask test setup` installs it"
            ));
        }
    }
    let crates = wasm_tested()?;
    if crates.is_empty() {
        bail!("no crate has tests for WebAssembly");
    }
    for member in crates {
        let mut test = line("wasm-pack test --mode no-install");
        run_within(Duration::from_secs(900), test.args(options).arg(member))?;
    }
    Ok(Outcome::Passed)
}

fn wasm_node() -> Result<Outcome> {
    if find("node").is_none() {
        return skipped("node is missing (package nodejs)");
    }
    wasm_pack_test(&["--node"])
}

fn wasm_browser() -> Result<Outcome> {
    let Some(driver) = find("chromedriver") else {
        return skipped("chromedriver is missing (package chromium-driver)");
    };
    if find("chromium").is_none() {
        return skipped("chromium is missing (package chromium)");
    }
    wasm_pack_test(&[
        "--headless",
        "--chrome",
        "--chromedriver",
        &driver.to_string_lossy(),
    ])
}

fn guest_images() -> Result<Outcome> {
    for tool in ["apt-get", "dpkg-deb"] {
        if find(tool).is_none() {
            return skipped(format!(
                "guest images are made from Debian's packages, and there is no {tool} here"
            ));
        }
    }
    guests::make_all()?;
    Ok(Outcome::Passed)
}

fn wasm_size() -> Result<Outcome> {
    build::wasm()?;
    let mut total = 0;
    for entry in fs::read_dir(root().join("pkg"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "wasm") {
            let plain = fs::read(&path)?;
            let packed = gzip(&plain)?;
            println!(
                "{}: {} bytes, {packed} compressed",
                path.display(),
                plain.len()
            );
            total += packed;
        }
    }
    if total == 0 {
        bail!("pkg/ holds no .wasm");
    }
    if total > WASM_LIMIT {
        bail!("{total} bytes compressed; the limit is {WASM_LIMIT}");
    }
    println!("{total} of {WASM_LIMIT} bytes");
    Ok(Outcome::Passed)
}

/// The size of `data` after `gzip -9`.
fn gzip(data: &[u8]) -> Result<usize> {
    let mut gzip = line("gzip -9 -c")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("gzip is missing")?;
    let mut input = gzip.stdin.take().context("gzip has an input")?;
    let data = data.to_vec();
    let feeder = std::thread::spawn(move || input.write_all(&data));
    let packed = gzip.wait_with_output()?.stdout;
    feeder.join().expect("feeding does not panic")?;
    Ok(packed.len())
}

fn page() -> Result<Outcome> {
    for (program, package) in [("chromium", "chromium"), ("node", "nodejs"), ("npm", "npm")] {
        if find(program).is_none() {
            return skipped(format!("{program} is missing (package {package})"));
        }
    }
    if !guests::KERNELS[0].image().exists() {
        return skipped("there is no guest image: see suite guests");
    }
    build::wasm()?;
    build::page()?;
    run_within(
        Duration::from_secs(1200),
        command("npm").args(["run", "--silent", "test"]),
    )?;
    Ok(Outcome::Passed)
}

fn fuzz() -> Result<Outcome> {
    integration::fuzz(Duration::from_secs(10))
}

fn unit_tests() -> Result<Outcome> {
    let Some(dir) = std::env::var_os("KVM_UNIT_TESTS") else {
        return skipped("KVM_UNIT_TESTS names no built kvm-unit-tests tree");
    };
    let dir = dir.to_string_lossy();
    let args: Vec<&str> = std::iter::once(dir.as_ref())
        .chain(KUT_REQUIRED.iter().copied())
        .collect();
    if !kut::main(&args)? {
        bail!("not all tests passed");
    }
    Ok(Outcome::Passed)
}
