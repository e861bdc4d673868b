//! Bochs, where it is installed: it boots from a CD image, so the boot loader's tools must be there too.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::measure::{Run, Usage, contains};
use crate::bochs;
use crate::guests::{Kernel, MARKER};
use crate::run::{Group, cache, capture};

/// A prepared boot.
pub struct Bochs {
    dir: PathBuf,
}

impl Bochs {
    /// Makes the CD; `None` where Bochs or grub-mkrescue is missing.
    pub fn prepare(kernel: &Kernel, append: &str) -> Result<Option<Self>> {
        if let Some(missing) = bochs::missing() {
            println!("not measured: {missing}");
            return Ok(None);
        }
        let dir = cache().join("bochs");
        let menu = format!("linux /boot/vmlinuz {append}\ninitrd /boot/initramfs");
        let files = [
            (&*kernel.image(), "vmlinuz"),
            (&*kernel.initramfs(), "initramfs"),
        ];
        bochs::make_cd(&dir, &menu, &files)?;
        for display in ["nogui", "rfb, options=\"timeout=0\""] {
            bochs::configure(&dir, display, "")?;
            let tried = capture(Duration::from_secs(3), &mut bochs::in_dir(&dir)?)?;
            if !(tried.stdout + &tried.stderr).contains("not available") {
                return Ok(Some(Self { dir }));
            }
        }
        println!("Bochs is there, but not built to run without a window");
        Ok(None)
    }

    /// One run from power-on to the marker, firmware and boot loader included.
    pub fn run(&self, limit: Duration) -> Result<Run> {
        let serial = self.dir.join("serial.txt");
        let _ = fs::remove_file(&serial);
        let start = Instant::now();
        let mut group = Group::spawn(
            bochs::in_dir(&self.dir)?
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        )?;
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
