//! The command line, and the one-line form of its errors.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand, ValueEnum};
use hypernest_machine::VmxChoice;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

const AFTER_HELP: &str = "\
Exit status:
  0      the guest powered off or reset, --stop-on or --stop-at was reached, or Ctrl-A x
  n*2+1  the guest wrote n to the debug-exit port F4H
  2      bad input: nothing was run
  4      the guest crashed (triple fault, VMX abort), needs what is not implemented, or sleeps for ever
  124    --timeout ran out
  143    stopped by a signal

On a terminal, the guest's serial port is the terminal: Ctrl-A x quits, Ctrl-A h lists the other keys.";

const VMCS_HELP: &str = "\
Exit status: 0, 1 when a check fails or files differ, 2 for bad input.";

/// A deterministic x86-64 machine.
///
/// Boots Linux, multiboot and ELF images on a processor in software: no virtualization, no
/// privileges. Without a command it runs a small built-in hypervisor, which shows each exit of its
/// guest.
#[derive(Debug, Parser)]
#[command(name = "hypernest", version, styles = STYLES, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot an image
    #[command(after_help = AFTER_HELP)]
    Run(Box<RunArgs>),
    /// Look at, check and translate a VMCS in a file
    #[command(subcommand, after_help = VMCS_HELP)]
    Vmcs(crate::vmcs::VmcsCommand),
}

#[derive(Args, Debug)]
pub struct RunArgs {
    /// Linux bzImage, vmlinux, multiboot 1 kernel or plain ELF; the kind is detected
    pub image: PathBuf,

    /// Initial RAM disk (for multiboot the first module)
    #[arg(long, value_name = "F", help_heading = "Guest")]
    pub initrd: Option<PathBuf>,

    /// Module for a multiboot or PVH image; may be given several times
    #[arg(long = "module", value_name = "F", help_heading = "Guest")]
    pub modules: Vec<PathBuf>,

    /// Command line for the guest
    #[arg(
        long,
        value_name = "STR",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true,
        help_heading = "Guest"
    )]
    pub append: String,

    /// Guest memory: a number with K, M or G; a bare number is MiB
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = memory, help_heading = "Machine")]
    pub memory: u64,

    /// Number of processors
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Machine")]
    pub cpus: u32,

    /// Processor model; an unknown one lists those there are
    #[arg(long, value_name = "MODEL", help_heading = "Machine")]
    pub cpu: Option<String>,

    /// Virtual-machine extensions: none, kvm (what KVM offers its guests), max, or a file with the
    /// IA32_VMX_* registers of a processor
    #[arg(long, value_name = "PROFILE", default_value = "none", hide_default_value = true, value_parser = vmx, help_heading = "Machine")]
    pub vmx: Vmx,

    /// Raw disk image for a virtio disk; the guest's writes are kept in memory, never in the file
    #[arg(long = "disk", value_name = "F", help_heading = "Machine")]
    pub disks: Vec<PathBuf>,

    /// Where the serial port goes: stdio, file:F or none
    #[arg(long, value_name = "TO", default_value = "stdio", value_parser = serial, help_heading = "Machine")]
    pub serial: SerialTo,

    /// Stop when this text has appeared on the serial port
    #[arg(long, value_name = "TEXT", help_heading = "Ends")]
    pub stop_on: Option<String>,

    /// Stop at this tick (a tick is an instruction, or a nanosecond of idle time)
    #[arg(long, value_name = "TICKS", value_parser = ticks, help_heading = "Ends")]
    pub stop_at: Option<u64>,

    /// Stop after this many seconds of real time
    #[arg(long, value_name = "S", value_parser = seconds, help_heading = "Ends")]
    pub timeout: Option<Duration>,

    /// Print instructions, speed, stops and the hash of the final state
    #[arg(long, help_heading = "Looking inside")]
    pub report: bool,

    /// Write the report to a file, as JSON
    #[arg(long, value_name = "F", help_heading = "Looking inside")]
    pub report_json: Option<PathBuf>,

    /// Treat even a deliberate triple fault (reboot=t) as a crash, with a post-mortem; keep the
    /// last instructions for it
    #[arg(long, value_name = "EVENT", help_heading = "Looking inside")]
    pub break_on: Vec<BreakOn>,

    /// An ELF file whose symbols name addresses in the post-mortem and the instruction log
    #[arg(long, value_name = "VMLINUX", help_heading = "Looking inside")]
    pub symbols: Option<PathBuf>,

    /// Write every instruction with the registers before it, in the form of QEMU's -d in_asm,cpu
    #[arg(long, value_name = "F", help_heading = "Looking inside")]
    pub log_instructions: Option<PathBuf>,

    /// Most instructions in a decoded block; the outcome is the same for any value
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), help_heading = "Looking inside")]
    pub block_length: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BreakOn {
    TripleFault,
    Unimplemented,
}

/// Where the VMX profile comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vmx {
    Named(VmxChoice),
    File(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialTo {
    Stdio,
    /// Only what the guest sends, to stdout; for the built-in hypervisor.
    Output,
    File(PathBuf),
    None,
}

const MEMORY_LEAST: u64 = 1 << 20;
const MEMORY_MOST: u64 = 64 << 30;

fn memory(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 20),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "give a number with K, M or G, such as 512M")?;
    let bytes = number.checked_mul(1 << shift);
    match bytes.filter(|bytes| (MEMORY_LEAST..=MEMORY_MOST).contains(bytes)) {
        Some(bytes) if bytes.is_multiple_of(4096) => Ok(bytes),
        Some(_) => Err("give a multiple of 4K".into()),
        None => Err("give 1M to 64G".into()),
    }
}

fn serial(text: &str) -> Result<SerialTo, String> {
    match text {
        "stdio" => Ok(SerialTo::Stdio),
        "none" => Ok(SerialTo::None),
        _ => match text.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Ok(SerialTo::File(path.into())),
            _ => Err("give stdio, file:F or none".into()),
        },
    }
}

fn ticks(text: &str) -> Result<u64, String> {
    let digits = text.replace('_', "");
    digits.parse().map_err(|_| "give a number of ticks".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "give a number of seconds")?;
    if seconds <= 0.0 {
        return Err("give more than 0 seconds".into());
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| "give a number of seconds".into())
}

/// Parses the command line. Help and version are printed and end the program with 0.
///
/// # Errors
/// One line on what is wrong.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, String> {
    Cli::try_parse_from(args).or_else(|error| {
        if error.use_stderr() {
            Err(one_line(&error.to_string()))
        } else {
            error.exit()
        }
    })
}

/// clap's message without its usage and tips, on one line.
fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let until_blank = text.lines().take_while(|line| !line.trim().is_empty());
    let parts: Vec<&str> = until_blank.map(str::trim).collect();
    let joined = parts.join(" ");
    let joined = joined.trim_end_matches('.');
    if joined.contains("give ") {
        joined.into()
    } else {
        format!("{joined}; see hypernest run --help")
    }
}

fn vmx(text: &str) -> Result<Vmx, String> {
    Ok(match text {
        "none" => Vmx::Named(VmxChoice::None),
        "kvm" => Vmx::Named(VmxChoice::Kvm),
        "max" => Vmx::Named(VmxChoice::Max),
        "" => return Err("give none, kvm, max or a file".into()),
        _ => Vmx::File(text.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<Box<RunArgs>, String> {
        let words = ["hypernest", "run"].iter().chain(args);
        match parse(words.map(OsString::from))?.command {
            Some(Command::Run(run)) => Ok(run),
            _ => Err("another command".into()),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn memory_takes_suffixes_and_a_bare_number_is_mebibytes() {
        let of = |text: &str| run(&["k", "--memory", text]).map(|args| args.memory);
        assert_eq!(of("512M"), Ok(512 << 20));
        assert_eq!(of("3g"), Ok(3 << 30));
        assert_eq!(of("2048K"), Ok(2 << 20));
        assert_eq!(of("128"), Ok(128 << 20));
        for wrong in [
            "0",
            "-1",
            "",
            "M",
            "1K",
            "1e3",
            "99999999999999G",
            "65G",
            "1025K",
            "½M",
        ] {
            let error = run(&["k", &format!("--memory={wrong}")]).unwrap_err();
            assert!(
                !error.contains('\n') && error.contains("--memory"),
                "{error}"
            );
        }
    }

    #[test]
    fn serial_goes_to_stdio_a_file_or_nowhere() {
        let of = |text: &str| run(&["k", "--serial", text]).map(|args| args.serial);
        assert_eq!(of("stdio"), Ok(SerialTo::Stdio));
        assert_eq!(of("none"), Ok(SerialTo::None));
        assert_eq!(of("file:a b"), Ok(SerialTo::File("a b".into())));
        assert!(of("file:").is_err() && of("tcp").is_err());
    }

    #[test]
    fn times_are_checked() {
        let of = |text: &str| run(&["k", "--timeout", text]).map(|args| args.timeout);
        assert_eq!(of("1.5"), Ok(Some(Duration::from_millis(1500))));
        assert!(of("0").is_err() && of("nan").is_err() && of("1e300").is_err());
        let stop = run(&["k", "--stop-at", "1_000"]).unwrap().stop_at;
        assert_eq!(stop, Some(1000));
    }

    #[test]
    fn errors_take_one_line() {
        for wrong in [
            &[][..],
            &["k", "--cpus", "x"],
            &["k", "--nonsense"],
            &["k", "--break-on", "x"],
        ] {
            let error = run(wrong).unwrap_err();
            assert!(!error.contains('\n'), "{error:?}");
        }
    }
}
