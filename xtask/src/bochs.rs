//! Bochs as a judge: a guest on a CD image, what it sent to its serial port.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
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
    if let Some(missing) = missing() {
        return Ok(Judged::Missing(missing));
    }
    let dir = cache().join("bochs-judge");
    let menu = format!("multiboot /boot/program {command_line}");
    make_cd(&dir, &menu, &[(program, "program")])?;
    configure(
        &dir,
        "rfb, options=\"timeout=0\"",
        &format!("model={model}, "),
    )?;
    let file = dir.join("serial.txt");
    let _ = fs::remove_file(&file);
    let start = Instant::now();
    let mut bochs = Group::spawn(in_dir(&dir)?.stdout(Stdio::null()).stderr(Stdio::null()))?;
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

/// What of Bochs, or of what makes its CD, is not there.
pub fn missing() -> Option<&'static str> {
    if find("bochs").is_none() {
        Some("bochs (packages bochs, bochsbios, vgabios)")
    } else if find("grub-mkrescue").is_none() || find("xorriso").is_none() {
        Some("what makes Bochs' CD (packages grub-pc-bin, grub-common, xorriso, mtools)")
    } else {
        None
    }
}

/// Makes the CD of `dir` with these files in `/boot`, booted by the boot loader's `commands`.
pub fn make_cd(dir: &Path, commands: &str, files: &[(&Path, &str)]) -> Result<()> {
    let boot = dir.join("cd/boot");
    fs::create_dir_all(boot.join("grub"))?;
    for (from, name) in files {
        fs::copy(from, boot.join(name))?;
    }
    let menu = format!("set timeout=0\nmenuentry guest {{\n{commands}\n}}\n");
    fs::write(boot.join("grub/grub.cfg"), menu)?;
    run(command("grub-mkrescue")
        .args(["--quiet", "-o"])
        .arg(dir.join("cd.iso"))
        .arg(dir.join("cd")))
}

/// Bochs in `dir`, which [`configure`] and [`make_cd`] prepared.
pub fn in_dir(dir: &Path) -> Result<Command> {
    let mut bochs = command("bochs");
    bochs
        .args(["-q", "-f", "bochsrc"])
        .current_dir(dir)
        .stdin(fs::File::open(dir.join("continue"))?);
    Ok(bochs)
}

/// Writes Bochs' configuration; `cpu` is what its line for the processor begins with.
pub fn configure(dir: &Path, display: &str, cpu: &str) -> Result<()> {
    // A Bochs with its debugger waits for this word.
    fs::write(dir.join("continue"), "c\n")?;
    // Sound needs a dummy: without a sound card Debian's Bochs crashes.
    let text = format!(
        "display_library: {display}
megs: 256
cpu: {cpu}count=1, ips=100000000, reset_on_triple_fault=0
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
    );
    fs::write(dir.join("bochsrc"), text)?;
    Ok(())
}
