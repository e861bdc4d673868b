//! Bochs, where it is installed: it boots from a CD image, so the boot loader's tools must be there too.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::measure::{Run, Usage, contains};
use crate::guests::{Kernel, MARKER};
use crate::run::{Group, cache, capture, command, find, run};

/// A prepared boot.
pub struct Bochs {
    dir: PathBuf,
}

impl Bochs {
    /// Makes the CD; `None` where Bochs or grub-mkrescue is missing.
    pub fn prepare(kernel: &Kernel, append: &str) -> Result<Option<Self>> {
        if find("bochs").is_none() {
            return Ok(None);
        }
        if find("grub-mkrescue").is_none() || find("xorriso").is_none() {
            println!(
                "Bochs is there, but not what makes its CD (packages grub-pc-bin, grub-common, xorriso, mtools)"
            );
            return Ok(None);
        }
        let dir = cache().join("bochs");
        let boot = dir.join("cd/boot");
        fs::create_dir_all(boot.join("grub"))?;
        fs::copy(kernel.image(), boot.join("vmlinuz"))?;
        fs::copy(kernel.initramfs(), boot.join("initramfs"))?;
        let menu = format!(
            "set timeout=0\nmenuentry linux {{\n linux /boot/vmlinuz {append}\n initrd /boot/initramfs\n}}\n"
        );
        fs::write(boot.join("grub/grub.cfg"), menu)?;
        run(command("grub-mkrescue")
            .args(["--quiet", "-o"])
            .arg(dir.join("cd.iso"))
            .arg(dir.join("cd")))?;
        let prepared = Self { dir };
        for display in ["nogui", "rfb, options=\"timeout=0\""] {
            fs::write(prepared.dir.join("bochsrc"), config(display))?;
            let tried = capture(Duration::from_secs(3), &mut prepared.command())?;
            if !(tried.stdout + &tried.stderr).contains("not available") {
                return Ok(Some(prepared));
            }
        }
        println!("Bochs is there, but not built to run without a window");
        Ok(None)
    }

    fn command(&self) -> std::process::Command {
        let mut bochs = command("bochs");
        bochs.args(["-q", "-f", "bochsrc"]).current_dir(&self.dir);
        bochs
    }

    /// One run from power-on to the marker, firmware and boot loader included.
    pub fn run(&self, limit: Duration) -> Result<Run> {
        let serial = self.dir.join("serial.txt");
        let _ = fs::remove_file(&serial);
        let start = Instant::now();
        let mut group = Group::spawn(self.command().stdout(Stdio::null()).stderr(Stdio::null()))?;
        let mut last = Usage::default();
        loop {
            std::thread::sleep(Duration::from_millis(20));
            last = Usage::of(group.0.id()).unwrap_or(last);
            if contains(&fs::read(&serial).unwrap_or_default(), MARKER.as_bytes()) {
                return Ok(Run::new(start.elapsed(), last));
            }
            if let Some(status) = group.0.try_wait()? {
                bail!(
                    "Bochs ended with {status}; see {}",
                    self.dir.join("bochs.log").display()
                );
            }
            if start.elapsed() > limit {
                bail!(
                    "Bochs took longer than {} s; see {}",
                    limit.as_secs(),
                    self.dir.join("bochs.log").display()
                );
            }
        }
    }
}

fn config(display: &str) -> String {
    format!(
        "display_library: {display}
megs: 256
cpu: count=1, ips=100000000, reset_on_triple_fault=0
clock: sync=none
ata0-master: type=cdrom, path=cd.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.txt
log: bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
"
    )
}
