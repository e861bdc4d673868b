//! Building what is shipped: the command, the WebAssembly package, the page.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::run::{command, find, line, output, root, run};
use crate::setup::npm_ci;

/// Builds the `hypernest` command as it is shipped; its path. `HYPERNEST` names one that is there already.
pub fn cli() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("HYPERNEST") {
        return Ok(path.into());
    }
    run(&mut line("cargo build --release --quiet -p hypernest-cli"))?;
    Ok(target_dir()?.join("release/hypernest"))
}

/// Builds the command without events and counters of VMX, to measure what they cost; its path.
pub fn cli_without_events() -> Result<PathBuf> {
    let dir = target_dir()?.join("no-events");
    let mut build = line("cargo build --release --quiet -p hypernest-cli --features no-events");
    run(build.arg("--target-dir").arg(&dir))?;
    Ok(dir.join("release/hypernest"))
}

/// Where cargo puts what it builds.
pub fn target_dir() -> Result<PathBuf> {
    let metadata = output(&mut line("cargo metadata --format-version 1 --no-deps"))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    Ok(metadata["target_directory"]
        .as_str()
        .context("cargo metadata names no target_directory")?
        .into())
}

/// Builds `crate/wasm` into `pkg/`, unless what stands there is newer than what cargo has built.
pub fn wasm() -> Result<()> {
    for (program, package) in [
        ("wasm-pack", "wasm-pack"),
        ("wasm-bindgen", "wasm-bindgen-cli"),
    ] {
        find(program).with_context(|| {
            format!("{program} is missing: `cargo xtask test setup` installs {package}")
        })?;
    }
    npm_ci()?; // binaryen's wasm-opt; Debian's would spoil the package
    let target = "wasm32-unknown-unknown";
    run(&mut line(&format!(
        "cargo build --quiet --release --lib --target {target} -p hypernest-wasm"
    )))?;
    let modified = |path: PathBuf| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    let built = modified(
        target_dir()?
            .join(target)
            .join("release/hypernest_wasm.wasm"),
    );
    let packed = modified(root().join("pkg/hypernest_wasm_bg.wasm"));
    if built
        .zip(packed)
        .is_some_and(|(built, packed)| packed > built)
    {
        return Ok(());
    }
    let mut build = line(
        "wasm-pack build crate/wasm --mode no-install --release --target web --out-dir ../../pkg",
    );
    if !root().join("node_modules/.bin/wasm-opt").exists() {
        build.arg("--no-opt");
    }
    run(&mut build)
}

/// Builds the page into `web/dist`, from the package that [`wasm`] made.
pub fn page() -> Result<()> {
    if !root().join("package.json").exists() {
        bail!("there is no page yet");
    }
    npm_ci()?;
    run(command("npm").args(["run", "--silent", "build"]))
}

/// The page as it is served.
pub fn page_dir() -> PathBuf {
    root().join("web/dist")
}
