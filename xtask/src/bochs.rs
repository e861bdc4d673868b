//! Bochs as a judge: a guest on a CD image, what it sent to its serial port.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::run::{Group, cache, command, find, run};

/// How a run ended, when nothing went wrong here.
pub enum Judged {
    /// The serial output up to the text that was waited for.
    Serial(String),
    /// There is no Bochs to ask; what is missing.
    Missing(&'static str),
}

/// Boots a multiboot program on a processor `model`, until it has sent `end`.
pub fn serial(
    program: &Path,
    command_line: &str,
    model: &str,
    end: &str,
    limit: Duration,
) -> Result<Judged> {
    if find("bochs").is_none() {
        return Ok(Judged::Missing(
            "bochs (packages bochs, bochsbios, vgabios)",
        ));
    }
    if find("grub-mkrescue").is_none() || find("xorriso").is_none() {
        return Ok(Judged::Missing(
            "what makes its CD (packages grub-pc-bin, grub-common, xorriso, mtools)",
        ));
    }
    let dir = cache().join("bochs-judge");
    let boot = dir.join("cd/boot");
    fs::create_dir_all(boot.join("grub"))?;
    fs::copy(program, boot.join("program"))?;
    let menu =
        format!("set timeout=0\nmenuentry p {{\n multiboot /boot/program {command_line}\n}}\n");
    fs::write(boot.join("grub/grub.cfg"), menu)?;
    run(command("grub-mkrescue")
        .args(["--quiet", "-o"])
        .arg(dir.join("cd.iso"))
        .arg(dir.join("cd")))?;
    fs::write(dir.join("bochsrc"), config(model))?;
    // A Bochs with its debugger waits for this word.
    fs::write(dir.join("continue"), "c\n")?;
    let file = dir.join("serial.txt");
    let _ = fs::remove_file(&file);
    let start = Instant::now();
    let mut bochs = Group::spawn(
        command("bochs")
            .args(["-q", "-f", "bochsrc"])
            .current_dir(&dir)
            .stdin(fs::File::open(dir.join("continue"))?)
            .stdout(Stdio::null())
            .stderr(Stdio::null()),
    )?;
    loop {
        let sent = fs::read(&file).unwrap_or_default();
        let text = String::from_utf8_lossy(&sent).replace('\r', "");
        if let Some(at) = text.find(end) {
            return Ok(Judged::Serial(text[..at].to_owned()));
        }
        let ended = bochs.0.try_wait()?;
        if ended.is_some() || start.elapsed() > limit {
            let last = text.lines().last().unwrap_or_default();
            let log = dir.join("bochs.log");
            bail!(
                "Bochs did not come to the end ({ended:?}; the last line is {last:?}); see {}",
                log.display()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Sound needs a dummy: without a sound card Debian's Bochs crashes.
fn config(model: &str) -> String {
    format!(
        "display_library: rfb, options=\"timeout=0\"
megs: 256
cpu: model={model}, count=1, ips=100000000, reset_on_triple_fault=0
clock: sync=none
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
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
