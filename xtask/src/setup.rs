//! What the chores need on the host, and how it gets there.

use std::path::Path;

use anyhow::{Context, Result};

use crate::run::{cache, find, line, output, root, run, shown};

/// Programs that come from the distribution: what to look for, and Debian's package.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "gcc"),
    ("/usr/lib/x86_64-linux-gnu/libc.a", "libc6-dev"),
    ("xz", "xz-utils"),
    ("gzip", "gzip"),
    ("node", "nodejs"),
    ("npm", "npm"),
    ("chromium", "chromium"),
    ("chromedriver", "chromium-driver"),
];

/// A program that `cargo install` brings.
struct CargoTool {
    package: &'static str,
    program: &'static str,
    /// Options that print the version.
    version_args: &'static [&'static str],
    /// The one version that works; `None` where any does.
    version: Option<&'static str>,
    locked: bool,
}

const CARGO_TOOLS: &[CargoTool] = &[
    CargoTool {
        package: "wasm-pack",
        program: "wasm-pack",
        version_args: &["--version"],
        version: Some("0.15.0"),
        locked: true,
    },
    // The same version as the `wasm-bindgen` library; its lock file names a version that may be missing.
    CargoTool {
        package: "wasm-bindgen-cli",
        program: "wasm-bindgen",
        version_args: &["--version"],
        version: Some("0.2.130"),
        locked: false,
    },
    CargoTool {
        package: "cargo-nextest",
        program: "cargo-nextest",
        version_args: &["nextest", "--version"],
        version: None,
        locked: true,
    },
];

impl CargoTool {
    fn is_present(&self) -> bool {
        let Some(path) = find(self.program) else {
            return false;
        };
        let Some(wanted) = self.version else {
            return true;
        };
        let mut command = std::process::Command::new(path);
        output(command.args(self.version_args))
            .is_ok_and(|text| text.split_whitespace().any(|word| word == wanted))
    }

    fn install_line(&self) -> String {
        let mut text = format!("cargo install --quiet {}", self.package);
        if let Some(version) = self.version {
            text += &format!(" --version {version}");
        }
        if self.locked {
            text += " --locked";
        }
        text + " --root .cache/tools"
    }
}

/// What is missing on this host.
pub struct Missing {
    packages: Vec<&'static str>,
    wasm_target: bool,
    tools: Vec<&'static CargoTool>,
    npm: bool,
}

/// Looks at the host; changes nothing.
pub fn missing() -> Missing {
    Missing {
        packages: PACKAGES
            .iter()
            .filter(|(probe, _)| find(probe).is_none() && !Path::new(probe).exists())
            .map(|&(_, package)| package)
            .collect(),
        wasm_target: !has_wasm_target(),
        tools: CARGO_TOOLS
            .iter()
            .filter(|tool| !tool.is_present())
            .collect(),
        npm: !npm_is_current(),
    }
}

fn has_wasm_target() -> bool {
    output(&mut line(
        "rustc --print target-libdir --target wasm32-unknown-unknown",
    ))
    .is_ok_and(|dir| Path::new(dir.trim()).is_dir())
}

fn npm_is_current() -> bool {
    let Ok(wanted) = std::fs::metadata(root().join("package-lock.json")) else {
        return true;
    };
    let installed = std::fs::metadata(root().join("node_modules/.package-lock.json"));
    match (wanted.modified(), installed.and_then(|m| m.modified())) {
        (Ok(wanted), Ok(installed)) => installed >= wanted,
        _ => false,
    }
}

/// Says what will be installed and through what, then installs it. What could not be had comes back as
/// advice, one line each; the chores that need it say so again when they cannot run.
pub fn install() -> Result<Vec<String>> {
    let missing = missing();
    let mut plan = Vec::new();
    if !missing.packages.is_empty() {
        plan.push(format!(
            "Debian packages, by apt-get: {}",
            missing.packages.join(" ")
        ));
    }
    if missing.wasm_target {
        plan.push("Rust's wasm32-unknown-unknown target, by rustup".into());
    }
    for tool in &missing.tools {
        plan.push(format!("into .cache/tools, by {}", tool.install_line()));
    }
    if missing.npm {
        plan.push("the page's npm packages into node_modules, by npm ci".into());
    }
    if plan.is_empty() {
        println!("Everything needed is there; nothing to install.");
        return Ok(Vec::new());
    }
    println!("This will be installed:");
    for item in &plan {
        println!("  {item}");
    }

    let mut advice = Vec::new();
    if !missing.packages.is_empty() {
        let names = missing.packages.join(" ");
        if let Err(error) = install_packages(&names) {
            advice.push(format!(
                "install these yourself (Debian's names): {names} ({error:#})"
            ));
        }
    }
    if missing.wasm_target {
        let mut command = line("rustup target add wasm32-unknown-unknown");
        if let Err(error) = run(&mut command) {
            advice.push(format!("run `{}` ({error:#})", shown(&command)));
        }
    }
    for tool in &missing.tools {
        let mut command = line(&tool.install_line());
        // These run for seconds at most: their build time counts, not their speed.
        command
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("CARGO_TARGET_DIR", cache().join("tools-build"));
        if let Err(error) = run(&mut command) {
            advice.push(format!("run `{}` ({error:#})", shown(&command)));
        }
    }
    // Gigabytes that nothing needs once the programs stand in .cache/tools.
    let _ = std::fs::remove_dir_all(cache().join("tools-build"));
    if missing.npm
        && let Err(error) = npm_ci()
    {
        advice.push(format!("run `npm ci` ({error:#})"));
    }
    for item in &advice {
        println!("Could not be installed here: {item}");
    }
    Ok(advice)
}

/// The page's packages, exactly as `package-lock.json` names them.
pub fn npm_ci() -> Result<()> {
    if npm_is_current() {
        return Ok(());
    }
    run(&mut line("npm ci --no-audit --no-fund --ignore-scripts"))
}

fn install_packages(names: &str) -> Result<()> {
    find("apt-get").context("there is no apt-get here")?;
    let sudo = if is_root() { "" } else { "sudo -n " };
    refresh_package_lists()?;
    let mut command = line(&format!(
        "{sudo}apt-get install -y --no-install-recommends {names}"
    ));
    run(command.env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Once a run: package look-ups fail on lists that were never fetched.
pub fn refresh_package_lists() -> Result<()> {
    static DONE: std::sync::OnceLock<Result<(), String>> = std::sync::OnceLock::new();
    let sudo = if is_root() { "" } else { "sudo -n " };
    DONE.get_or_init(|| {
        run(&mut line(&format!("{sudo}apt-get update -qq"))).map_err(|e| format!("{e:#}"))
    })
    .clone()
    .map_err(anyhow::Error::msg)
}

fn is_root() -> bool {
    output(&mut line("id -u")).is_ok_and(|id| id.trim() == "0")
}
