//! Guest images, made at test time from Debian's packages into `.cache/guests`:
//!
//! ```text
//! 6.1/vmlinuz  6.1/initramfs.cpio      a stock kernel, and the initramfs that prints `ANCHOR MARKER init`
//! 6.1/initramfs-l2.cpio                the same with the kernel again, as a guest of KVM, and its own initramfs
//! 6.1/initramfs-state.cpio             takes nested states out of KVM and puts them in again
//! 6.12/...                             the same for the newer kernel
//! prompt.cpio                          an initramfs that ends at a busybox shell
//! loop.elf                             a hot loop (tests/guests/loop.S)
//! manifest.json                        what the page offers
//! ```

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::cpio::Archive;
use crate::run::{cache, command, find, line, output, root, run};
use crate::setup::refresh_package_lists;

/// A stock kernel: its series, and the Debian package (or meta-package) that holds it.
pub struct Kernel {
    pub series: &'static str,
    package: &'static str,
}

/// Every kernel the tests boot.
pub const KERNELS: &[Kernel] = &[
    Kernel {
        series: "6.1",
        package: "linux-image-cloud-amd64",
    },
    Kernel {
        series: "6.12",
        package: "linux-image-6.12-cloud-amd64",
    },
];

/// What every Linux guest is told. The kernel's own tests of its crypto take two thirds of a boot; what
/// follows `reboot=` makes a reboot end the run.
pub const LINUX_ARGS: &str = "console=ttyS0 cryptomgr.notests reboot=t panic=-1";

/// What the initramfs prints when the kernel has handed over.
pub const MARKER: &str = "ANCHOR MARKER init";

/// Rounds of the hot loop, and instructions per round.
pub const LOOP_ROUNDS: u64 = 50_000_000;
pub const LOOP_INSTRUCTIONS: u64 = 12 * LOOP_ROUNDS;

/// The folder of the images.
pub fn dir() -> PathBuf {
    cache().join("guests")
}

impl Kernel {
    /// The bzImage.
    pub fn image(&self) -> PathBuf {
        dir().join(self.series).join("vmlinuz")
    }

    /// The initramfs that prints [`MARKER`].
    pub fn initramfs(&self) -> PathBuf {
        dir().join(self.series).join("initramfs.cpio")
    }

    /// The initramfs that holds, besides what [`Self::initramfs`] does, the kernel as a guest of KVM.
    pub fn nested_initramfs(&self) -> PathBuf {
        dir().join(self.series).join("initramfs-l2.cpio")
    }

    /// The initramfs that runs `tests/guests/l2state.c`.
    pub fn state_initramfs(&self) -> PathBuf {
        dir().join(self.series).join("initramfs-state.cpio")
    }

    fn is_made(&self) -> bool {
        [
            self.image(),
            self.initramfs(),
            self.nested_initramfs(),
            self.state_initramfs(),
        ]
        .iter()
        .all(|path| path.is_file())
    }
}

/// Makes every image; an error unless all could be made.
pub fn make_all() -> Result<()> {
    let missing = make_what_is_possible()?;
    if !missing.is_empty() {
        bail!("{}", missing.join("; "));
    }
    Ok(())
}

/// Makes every image, and tells which kernels cannot be had here and why. Does nothing when the images stand
/// and their sources have not changed since.
pub fn make_what_is_possible() -> Result<Vec<String>> {
    fs::create_dir_all(dir())?;
    let stamp = dir().join("stamp");
    let sources = sources_hash()?;
    let fresh = fs::read_to_string(&stamp).is_ok_and(|old| old == sources);
    if fresh && KERNELS.iter().all(Kernel::is_made) {
        println!("The guest images in {} are up to date.", dir().display());
        return Ok(Vec::new());
    }
    let debs = cache().join("deb");
    fs::create_dir_all(&debs)?;
    let busybox = unpack("busybox-static", &debs)?.join("bin/busybox");
    let busybox =
        fs::read(&busybox).with_context(|| format!("cannot read {}", busybox.display()))?;

    write("prompt.cpio", &prompt(&busybox)?)?;
    hot_loop()?;
    let programs = Programs {
        busybox,
        l2test: compile("l2test")?,
        l2linux: compile("l2linux")?,
        l2state: compile("l2state")?,
    };
    let mut missing = Vec::new();
    for kernel in KERNELS {
        if let Err(error) = linux(kernel, &debs, &programs) {
            missing.push(format!("no {} kernel: {error:#}", kernel.series));
        }
    }
    manifest()?;
    for text in &missing {
        println!("{text}");
    }
    fs::write(stamp, sources)?;
    Ok(missing)
}

/// Changes when anything an image is made of (but the packages) does.
fn sources_hash() -> Result<String> {
    let mut hash = DefaultHasher::new();
    include_str!("guests.rs").hash(&mut hash);
    include_str!("cpio.rs").hash(&mut hash);
    let entries = fs::read_dir(root().join("tests/guests"))?;
    let mut sources: Vec<_> = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    sources.retain(|path| path.is_file());
    sources.sort();
    for source in sources {
        fs::read(source)?.hash(&mut hash);
    }
    Ok(format!("{:016x}\n", hash.finish()))
}

fn source(name: &str) -> Result<Vec<u8>> {
    let path = root().join("tests/guests").join(name);
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn write(name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir().join(name);
    fs::create_dir_all(path.parent().expect("an image lies in a folder"))?;
    println!("{} ({} KiB)", path.display(), bytes.len() / 1024);
    // Whole or not at all: a server may be reading the old one.
    let part = path.with_extension("part");
    fs::write(&part, bytes)?;
    Ok(fs::rename(part, path)?)
}

/// Downloads a package, without installing it, and unpacks it below `debs`.
fn unpack(package: &str, debs: &Path) -> Result<PathBuf> {
    let into = debs.join(package);
    if into.join("done").exists() {
        return Ok(into);
    }
    for tool in ["apt-get", "dpkg-deb"] {
        find(tool).with_context(|| {
            format!("guest images are made from Debian's packages, and there is no {tool} here")
        })?;
    }
    refresh_package_lists()?;
    let _ = fs::remove_dir_all(&into);
    fs::create_dir_all(&into)?;
    run(command("apt-get")
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(&into))
    .with_context(|| format!("package {package} cannot be had"))?;
    let deb = fs::read_dir(&into)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .with_context(|| format!("apt-get left no package in {}", into.display()))?;
    run(command("dpkg-deb").arg("-x").arg(&deb).arg(&into))?;
    fs::write(into.join("done"), "")?;
    Ok(into)
}

/// The package that holds the image a meta-package stands for.
fn image_package(package: &str) -> Result<String> {
    refresh_package_lists()?;
    let depends = output(&mut line(&format!(
        "apt-cache depends --no-recommends --no-suggests {package}"
    )))?;
    Ok(depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .unwrap_or(package)
        .into())
}

/// What runs in the guests.
struct Programs {
    busybox: Vec<u8>,
    /// `tests/guests/l2test.c`, compiled.
    l2test: Vec<u8>,
    /// `tests/guests/l2linux.c`, compiled.
    l2linux: Vec<u8>,
    /// `tests/guests/l2state.c`, compiled.
    l2state: Vec<u8>,
}

fn linux(kernel: &Kernel, debs: &Path, programs: &Programs) -> Result<()> {
    let package = unpack(&image_package(kernel.package)?, debs)?;
    let image = fs::read_dir(package.join("boot"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-"))
        })
        .with_context(|| format!("{} holds no vmlinuz", package.display()))?;
    let image = fs::read(image)?;
    let series = kernel.series;
    write(&format!("{series}/vmlinuz"), &image)?;

    let hypervisor = |init, program: &str, code: &[u8]| -> Result<Archive> {
        let mut archive = skeleton(&programs.busybox);
        archive
            .file("init", 0o755, source(init)?)
            .file(&format!("bin/{program}"), 0o755, code);
        for name in ["irqbypass", "kvm", "kvm-intel"] {
            archive.file(
                &format!("lib/modules/{name}.ko"),
                0o644,
                module(&package, name)?,
            );
        }
        Ok(archive)
    };
    let state = hypervisor("state-init", "l2state", &programs.l2state)?;
    write(&format!("{series}/initramfs-state.cpio"), &state.bytes())?;
    let mut archive = hypervisor("l1-init", "l2test", &programs.l2test)?;
    write(&format!("{series}/initramfs.cpio"), &archive.bytes())?;
    archive
        .file("bin/l2linux", 0o755, programs.l2linux.as_slice())
        .file("l2/bzImage", 0o644, image)
        .file(
            "l2/initrd",
            0o644,
            hypervisor("l2-init", "l2test", &programs.l2test)?.bytes(),
        );
    write(&format!("{series}/initramfs-l2.cpio"), &archive.bytes())
}

/// A kernel module, uncompressed.
fn module(package: &Path, name: &str) -> Result<Vec<u8>> {
    let found = output(
        command("find")
            .arg(package)
            .args(["-name", &format!("{name}.ko*")]),
    )?;
    let path = found
        .lines()
        .next()
        .with_context(|| format!("{} holds no {name}.ko", package.display()))?;
    if !path.ends_with(".xz") {
        return Ok(fs::read(path)?);
    }
    let out = command("xz")
        .args(["-dc", path])
        .output()
        .context("xz (package xz-utils) is needed")?;
    if !out.status.success() {
        bail!("xz cannot unpack {path}");
    }
    Ok(out.stdout)
}

fn skeleton(busybox: &[u8]) -> Archive {
    let mut archive = Archive::default();
    archive
        .dir("proc")
        .dir("sys")
        .char_device("dev/console", 5, 1)
        .char_device("dev/null", 1, 3)
        .file("bin/busybox", 0o755, busybox);
    archive
}

fn prompt(busybox: &[u8]) -> Result<Vec<u8>> {
    Ok(skeleton(busybox)
        .file("init", 0o755, source("prompt-init")?)
        .bytes())
}

/// Compiles `tests/guests/NAME.c` so that it needs nothing but a kernel.
fn compile(name: &str) -> Result<Vec<u8>> {
    let out = dir().join(name);
    let mut gcc = line(&format!(
        "gcc -O2 -static -Wall -s tests/guests/{name}.c -o"
    ));
    run(gcc.arg(&out)).context("packages gcc and libc6-dev are needed")?;
    Ok(fs::read(out)?)
}

fn hot_loop() -> Result<()> {
    let out = dir().join("loop.elf");
    let mut gcc = line(
        "gcc -nostdlib -static -no-pie -m64 -Wl,--build-id=none,--no-warn-rwx-segments,-Ttext=0x100000,-N tests/guests/loop.S",
    );
    run(gcc
        .arg(format!("-DROUNDS={LOOP_ROUNDS}"))
        .arg("-o")
        .arg(&out))?;
    run(line("objcopy -O elf32-i386").arg(&out))
}

/// What the page offers, the first one at once.
fn manifest() -> Result<()> {
    let guest = |kernel: &Kernel, name: String, initrd: String, cmdline: String, vmx: &str| {
        json!({
            "name": name,
            "kernel": format!("{}/vmlinuz", kernel.series),
            "initrd": initrd,
            "cmdline": cmdline,
            "memory": 256 << 20,
            "cpus": 1,
            "vmx": vmx,
        })
    };
    let made = || KERNELS.iter().filter(|kernel| kernel.is_made());
    let prompts = made().map(|kernel| {
        let name = format!("Linux {}", kernel.series);
        guest(
            kernel,
            name,
            "prompt.cpio".into(),
            LINUX_ARGS.into(),
            "none",
        )
    });
    let hypervisors = made().map(|kernel| {
        let name = format!("Guests of KVM in Linux {}", kernel.series);
        let initrd = format!("{}/initramfs.cpio", kernel.series);
        let cmdline = format!("{LINUX_ARGS} anchor.n=2000 anchor.mem=8");
        guest(kernel, name, initrd, cmdline, "max")
    });
    let guests: Vec<_> = prompts.chain(hypervisors).collect();
    let text = serde_json::to_string_pretty(&json!({ "guests": guests }))?;
    write("manifest.json", text.as_bytes())
}
