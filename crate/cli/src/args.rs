//! The command line, and the one-line form of its errors.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand};
use hypernest_machine::{ExitReason, Level, VmxChoice};

use crate::files;
use crate::migrate::Peer;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

const AFTER_HELP: &str = "\
Exit status:
  0      the guest powered off or reset, --stop-on or --stop-at was reached, the machine has moved
         away, or Ctrl-A x
  n*2+1  the guest wrote n to the debug-exit port F4H
  2      bad input: nothing was run
  4      the guest crashed (triple fault, VMX abort), needs what is not implemented, sleeps for ever,
         --break-on stopped it, or the moment of a --snapshot-on or --migrate-on did not come
  5      a migration was cut off and is undecided: hypernest migrate decide settles it
  124    --timeout ran out
  143    stopped by a signal

On a terminal, the guest's serial port is the terminal: Ctrl-A x quits, Ctrl-A h lists the other keys.";

const RECEIVE_HELP: &str = "\
Exit status: 1 when no machine came (nothing is here then), 5 when it is undecided whose it is, else as of hypernest run.";

const SNAPSHOT_HELP: &str = "\
Exit status: 0, 1 when snapshots differ, 2 for bad input.";

const REPLAY_HELP: &str = "\
With --interactive, a command a line on stdin:
  to T, to exit:N              go to tick T, or to just after the N-th VM exit
  back [N], forward [N]        by so many instructions; 1 unless given
  back exit, forward exit      to just after the VM exit before, or the next one
  end                          to the end of the recording
  show                         registers, page walks, VMCS
  quit

Exit status: 0, 1 when the run differs from the recording, 2 for bad input.";

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
    /// Go on from a snapshot
    #[command(after_help = AFTER_HELP)]
    Resume(Box<ResumeArgs>),
    /// Make a recorded run again, to its end or to any moment of it
    #[command(after_help = REPLAY_HELP)]
    Replay(Box<ReplayArgs>),
    /// Look at snapshots
    #[command(subcommand, after_help = SNAPSHOT_HELP)]
    Snapshot(crate::snapshot::SnapshotCommand),
    /// Wait for a machine that moves here, and go on with it
    #[command(after_help = RECEIVE_HELP)]
    Receive(Box<ReceiveArgs>),
    /// Settle migrations that were cut off
    #[command(subcommand)]
    Migrate(crate::migrate::MigrateCommand),
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

    /// The interface of the Hyper-V hypervisor, and with --vmx its enlightened VMCS: controls that this
    /// has no place for are not offered then
    #[arg(long, help_heading = "Machine")]
    pub hyperv: bool,

    /// Layout of VMCS regions whose revision IA32_VMX_BASIC advertises (hypernest vmcs layouts lists them);
    /// the VMX profile has its own
    #[arg(long, value_name = "LAYOUT", help_heading = "Machine")]
    pub vmcs: Option<String>,

    /// Layout in which the processor writes VMCS regions; the advertised one unless given
    #[arg(long, value_name = "LAYOUT", help_heading = "Machine")]
    pub write_vmcs: Option<String>,

    /// Further layouts of VMCS regions that VMPTRLD takes, with commas between them; each has a revision of its own
    #[arg(
        long,
        value_name = "LAYOUTS",
        value_delimiter = ',',
        help_heading = "Machine"
    )]
    pub accept_vmcs: Vec<String>,

    /// A file with the table of a further layout, which the options above then know by its name
    #[arg(long = "layout", value_name = "F", help_heading = "Machine")]
    pub layouts: Vec<PathBuf>,

    /// Raw disk image for a virtio disk; the guest's writes are kept in memory, never in the file
    #[arg(long = "disk", value_name = "F", help_heading = "Machine")]
    pub disks: Vec<PathBuf>,

    #[command(flatten)]
    pub session: SessionArgs,
}

/// What is the same for every machine, wherever it comes from: what it is connected to, when its run ends, and what is
/// looked at.
#[derive(Args, Debug)]
pub struct SessionArgs {
    /// A Unix socket on which programs look at the run and steer it, in lines of JSON: status, pause, resume, stop
    /// and more (docs/monitor.md)
    #[arg(long, value_name = "PATH", help_heading = "Machine")]
    pub monitor: Option<PathBuf>,

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

    /// Write a snapshot, from which hypernest resume goes on, when this text has appeared on the serial port, or at
    /// this tick (a number, or tick:N; text:N is a text of digits); the run goes on. With --stop-on or --stop-at the
    /// same text or tick it ends there. May be given several times
    #[arg(long, value_name = "TEXT|TICKS", value_parser = moment, requires = "output", help_heading = "Snapshots")]
    pub snapshot_on: Vec<Moment>,

    /// Where the snapshot goes; as often as --snapshot-on, in the same order
    #[arg(
        long,
        short,
        value_name = "F",
        requires = "snapshot_on",
        help_heading = "Snapshots"
    )]
    pub output: Vec<PathBuf>,

    #[command(flatten)]
    pub moves: MoveArgs,

    /// Record the run: its start, whatever comes to it and when. hypernest replay makes it again, also what there is
    /// of one that was killed
    #[arg(
        long,
        value_name = "F",
        conflicts_with = "gdb",
        help_heading = "Snapshots"
    )]
    pub record: Option<PathBuf>,

    /// Print instructions, speed, stops, the hash of the final state, and VM exits by reason
    #[arg(long, help_heading = "Looking inside")]
    pub report: bool,

    /// Write the report to a file, as JSON
    #[arg(long, value_name = "F", help_heading = "Looking inside")]
    pub report_json: Option<PathBuf>,

    /// Stop with a post-mortem at a VM entry that fails (entry-fail), after a VM exit for a reason
    /// (exit:REASON) or the N-th of all (exit:N), at a triple fault, even a deliberate one
    /// (triple-fault), or at what is not built (unimplemented)
    #[arg(long, value_name = "EVENT", value_parser = break_on, help_heading = "Looking inside")]
    pub break_on: Vec<BreakOn>,

    /// Print the fields of the current VMCS, as `hypernest vmcs show` does, after the N-th VM exit of all
    /// (N) or the first for a reason (exit:REASON), and go on
    #[arg(long, value_name = "EXIT", value_parser = exit_at, help_heading = "Looking inside")]
    pub dump_vmcs_at: Vec<ExitAt>,

    /// Write what --dump-vmcs-at prints also to files in this folder, which `hypernest vmcs` reads:
    /// exit-N.vmcs, of layout hypernest
    #[arg(
        long,
        value_name = "DIR",
        requires = "dump_vmcs_at",
        help_heading = "Looking inside"
    )]
    pub dump_vmcs_to: Option<PathBuf>,

    /// Write every VM exit, and every VM entry that fails, as a line of JSON
    #[arg(long, value_name = "F", help_heading = "Looking inside")]
    pub exits: Option<PathBuf>,

    /// Write a trace of L0, L1 and L2 that ui.perfetto.dev opens
    #[arg(long, value_name = "F", help_heading = "Looking inside")]
    pub trace: Option<PathBuf>,

    /// At the end of the run print how an address is translated, entry by entry: L1:ADDR or L2:ADDR,
    /// the latter through L2's tables and EPT
    #[arg(long, value_name = "LEVEL:ADDR", value_parser = walk_at, help_heading = "Looking inside")]
    pub walk: Vec<WalkAt>,

    /// Wait for gdb on this address of the loopback interface (a bare number is a port): registers and
    /// memory of the level that executes, breakpoints, single steps
    #[arg(long, value_name = "ADDR", value_parser = gdb, help_heading = "Looking inside")]
    pub gdb: Option<SocketAddr>,

    /// An ELF file whose symbols name addresses in post-mortem, exits, trace and instruction log
    #[arg(long, value_name = "VMLINUX", help_heading = "Looking inside")]
    pub symbols: Option<PathBuf>,

    /// The same for addresses of L2, the guest of a hypervisor in the machine
    #[arg(long, value_name = "VMLINUX", help_heading = "Looking inside")]
    pub symbols_l2: Option<PathBuf>,

    /// Write every instruction with the registers before it, in the form of QEMU's -d in_asm,cpu
    #[arg(long, value_name = "F", help_heading = "Looking inside")]
    pub log_instructions: Option<PathBuf>,

    /// Most instructions in a decoded block; the outcome is the same for any value
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), help_heading = "Looking inside")]
    pub block_length: Option<u32>,
}

/// Which VMCS regions a machine that was taken up writes and takes from there on.
#[derive(Args, Debug)]
pub struct RegionArgs {
    /// Layout in which the processor writes VMCS regions from here on, whatever it wrote before
    #[arg(long, value_name = "LAYOUT", help_heading = "Machine")]
    pub write_vmcs: Option<String>,

    /// Layouts of VMCS regions that VMPTRLD takes besides those it took before, with commas between them
    #[arg(
        long,
        value_name = "LAYOUTS",
        value_delimiter = ',',
        help_heading = "Machine"
    )]
    pub accept_vmcs: Vec<String>,

    /// A file with the table of a further layout, which the options above then know by its name
    #[arg(long = "layout", value_name = "F", help_heading = "Machine")]
    pub layouts: Vec<PathBuf>,
}

#[derive(Args, Debug)]
pub struct ResumeArgs {
    /// A snapshot that --snapshot-on wrote
    pub snapshot: PathBuf,

    /// The raw image of a disk that the machine has, as it was at its start; once for each, in their order
    #[arg(long = "disk", value_name = "F", help_heading = "Machine")]
    pub disks: Vec<PathBuf>,

    /// Most memory that the machine may have
    #[arg(long, value_name = "SIZE", default_value = "64G", value_parser = memory, help_heading = "Machine")]
    pub memory_limit: u64,

    #[command(flatten)]
    pub regions: RegionArgs,

    #[command(flatten)]
    pub session: SessionArgs,
}

impl SessionArgs {
    /// Whether what is to be written can be, as far as that can be told before.
    ///
    /// # Errors
    /// Something cannot.
    pub fn check_writable(&self) -> anyhow::Result<()> {
        let serial = match &self.serial {
            SerialTo::File(path) => Some(path),
            _ => None,
        };
        let files = [
            ("serial output", serial),
            ("report", self.report_json.as_ref()),
            ("exits", self.exits.as_ref()),
            ("trace", self.trace.as_ref()),
            ("instruction log", self.log_instructions.as_ref()),
        ];
        for (what, path) in files {
            path.map_or(Ok(()), |path| files::check_writable(what, path))?;
        }
        Ok(())
    }
}

/// Where and how a machine moves.
#[derive(Args, Debug)]
pub struct MoveArgs {
    /// Move the machine away, while it runs, when this text has appeared on the serial port, or at this tick (a number, or
    /// tick:N; text:N is a text of digits)
    #[arg(long, value_name = "TEXT|TICKS", value_parser = moment, requires = "to", help_heading = "Moving")]
    pub migrate_on: Option<Moment>,

    /// Where to: an address on which hypernest receive waits (a bare number is a port on this host), a file, - for a
    /// pipe, or ws://HOST:PORT, an address to which a page connects
    #[arg(long, value_name = "ADDR|F|-", value_parser = crate::migrate::peer, requires = "migrate_on", help_heading = "Moving")]
    pub to: Option<Peer>,

    /// Send at most so many bytes a second: a number, with K, M or G
    #[arg(long, value_name = "N", value_parser = bandwidth, requires = "migrate_on", help_heading = "Moving")]
    pub bandwidth: Option<u64>,

    /// Stop the machine for the last part when that is expected to take less than this
    #[arg(long, value_name = "MS", default_value_t = 20, help_heading = "Moving")]
    pub downtime: u64,

    /// Let pages of this origin connect, such as http://localhost:5173; may be given several times
    #[arg(long = "origin", value_name = "URL", help_heading = "Moving")]
    pub origins: Vec<String>,

    /// Keep the machine in this file too before it changes hands, so that it is not lost when either side is killed
    #[arg(long, value_name = "F", help_heading = "Moving")]
    pub durable: Option<PathBuf>,

    /// A file with a secret that both sides must have
    #[arg(long, value_name = "F", help_heading = "Moving")]
    pub token_file: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct ReceiveArgs {
    /// Where it comes from: an address to listen on (a bare number is a port on the loopback interface, ws://HOST:PORT is
    /// for a page), a file, or - for stdin
    #[arg(value_name = "ADDR|F|-", value_parser = crate::migrate::peer)]
    pub from: Peer,

    /// The raw image of a disk that the machine has, as it was at its start; once for each, in their order
    #[arg(long = "disk", value_name = "F", help_heading = "Machine")]
    pub disks: Vec<PathBuf>,

    /// Most memory that the machine may have
    #[arg(long, value_name = "SIZE", default_value = "64G", value_parser = memory, help_heading = "Machine")]
    pub memory_limit: u64,

    /// Take machines with the interface of the Hyper-V hypervisor too
    #[arg(long, help_heading = "Machine")]
    pub hyperv: bool,

    #[command(flatten)]
    pub regions: RegionArgs,

    #[command(flatten)]
    pub session: SessionArgs,
}

#[derive(Args, Debug)]
pub struct ReplayArgs {
    /// A recording that --record wrote
    pub recording: PathBuf,

    /// Go to this tick, or to just after the N-th VM exit (exit:N), and print what the processors are doing
    #[arg(long, value_name = "TICK|exit:N", value_parser = replay_to)]
    pub to: Option<ReplayTo>,

    /// Go forwards and backwards as stdin says
    #[arg(long, short)]
    pub interactive: bool,

    /// Memory for keyframes, from which every moment is reached quickly; beside it, each page of guest memory that
    /// changes is kept once
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = budget)]
    pub keyframe_memory: usize,

    /// The raw image of a disk that the machine has, as it was at its start; once for each, in their order
    #[arg(long = "disk", value_name = "F")]
    pub disks: Vec<PathBuf>,

    /// Most memory that the machine may have
    #[arg(long, value_name = "SIZE", default_value = "64G", value_parser = memory)]
    pub memory_limit: u64,

    /// An ELF file whose symbols name addresses
    #[arg(long, value_name = "VMLINUX")]
    pub symbols: Option<PathBuf>,

    /// The same for addresses of L2, the guest of a hypervisor in the machine
    #[arg(long, value_name = "VMLINUX")]
    pub symbols_l2: Option<PathBuf>,
}

/// A moment of a recorded run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayTo {
    /// This tick.
    Tick(u64),
    /// Just after the VM exit of this number.
    Exit(u64),
}

/// A moment of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moment {
    /// When this has appeared on the serial port.
    Text(String),
    /// At this tick.
    Tick(u64),
}

impl std::fmt::Display for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Moment::Text(text) => write!(f, "the text {text:?} did not appear"),
            Moment::Tick(tick) => write!(f, "tick {tick} was not reached"),
        }
    }
}

/// A linear address of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkAt {
    /// Whose address.
    pub level: Level,
    /// The address.
    pub address: u64,
}

/// What stops a run with a post-mortem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakOn {
    /// A VM entry that fails.
    EntryFail,
    /// A VM exit for this reason.
    ExitReason(ExitReason),
    /// The VM exit of this number.
    ExitNumber(u64),
    /// Even a deliberate triple fault.
    TripleFault,
    /// What is not built. It always stops a run; naming it keeps the last instructions.
    Unimplemented,
}

/// A VM exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitAt {
    /// The first for this reason.
    Reason(ExitReason),
    /// The one of this number, counted from 1.
    Number(u64),
}

impl ExitAt {
    /// Whether an exit is meant.
    pub fn is(self, reason: ExitReason, number: u64) -> bool {
        match self {
            ExitAt::Reason(wanted) => wanted == reason,
            ExitAt::Number(wanted) => wanted == number,
        }
    }
}

impl std::fmt::Display for ExitAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExitAt::Reason(reason) => write!(f, "for {}", reason.ident()),
            ExitAt::Number(number) => write!(f, "{number}"),
        }
    }
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

/// Memory of any size: a number with K, M or G; a bare number is MiB.
fn budget(text: &str) -> Result<usize, String> {
    let wrong = || "give a number with K, M or G, such as 512M".to_owned();
    let text = text.trim();
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 20),
    };
    let number: usize = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// A tick, or the number of a VM exit.
pub fn replay_to(text: &str) -> Result<ReplayTo, String> {
    let wrong = || "give a tick, or exit:N with the number of a VM exit, from 1".to_owned();
    match text.strip_prefix("exit:") {
        Some(number) => match number.parse() {
            Ok(number) if number > 0 => Ok(ReplayTo::Exit(number)),
            _ => Err(wrong()),
        },
        None => ticks(text).map(ReplayTo::Tick).map_err(|_| wrong()),
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

fn break_on(text: &str) -> Result<BreakOn, String> {
    match text {
        "entry-fail" => return Ok(BreakOn::EntryFail),
        "triple-fault" => return Ok(BreakOn::TripleFault),
        "unimplemented" => return Ok(BreakOn::Unimplemented),
        _ => {}
    }
    let Some(exit) = text.strip_prefix("exit:") else {
        return Err("give entry-fail, exit:REASON, exit:N, triple-fault or unimplemented".into());
    };
    Ok(match exit_at(exit)? {
        ExitAt::Reason(reason) => BreakOn::ExitReason(reason),
        ExitAt::Number(number) => BreakOn::ExitNumber(number),
    })
}

/// A number or a reason, with or without `exit:` before it.
fn exit_at(text: &str) -> Result<ExitAt, String> {
    let exit = text.strip_prefix("exit:").unwrap_or(text);
    if exit.bytes().all(|byte| byte.is_ascii_digit()) {
        let number = exit.parse().ok().filter(|number| *number > 0);
        let number = number.ok_or("give the number of an exit, from 1")?;
        return Ok(ExitAt::Number(number));
    }
    ExitReason::from_ident(exit)
        .map(ExitAt::Reason)
        .ok_or_else(|| {
            let known: Vec<&str> = ExitReason::all().iter().map(|row| row.ident).collect();
            format!("give a number or one of {}", known.join(", "))
        })
}

fn walk_at(text: &str) -> Result<WalkAt, String> {
    let wrong = || "give L1:ADDR or L2:ADDR, such as L2:0xffffffff81000000".to_owned();
    let (level, address) = text.split_once(':').ok_or_else(wrong)?;
    let level = match level {
        "L1" | "l1" => Level::L1,
        "L2" | "l2" => Level::L2,
        _ => return Err(wrong()),
    };
    let digits = address.replace('_', "");
    let parsed = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    let address = parsed.map_err(|_| wrong())?;
    Ok(WalkAt { level, address })
}

fn gdb(text: &str) -> Result<SocketAddr, String> {
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    let port: u16 = port
        .parse()
        .map_err(|_| "give a port, such as 1234 or 127.0.0.1:1234")?;
    let host = match host.trim_start_matches('[').trim_end_matches(']') {
        "" | "localhost" => IpAddr::from(Ipv4Addr::LOCALHOST),
        host => host
            .parse()
            .map_err(|_| "give an address in numbers, such as 127.0.0.1:1234")?,
    };
    if !host.is_loopback() {
        // Whoever connects can read all of the guest.
        return Err("give a loopback address, such as 127.0.0.1:1234".into());
    }
    Ok(SocketAddr::new(host, port))
}

fn ticks(text: &str) -> Result<u64, String> {
    let digits = text.replace('_', "");
    digits.parse().map_err(|_| "give a number of ticks".into())
}

/// A tick where it is a number, else a text.
pub fn moment(text: &str) -> Result<Moment, String> {
    if let Some(text) = text.strip_prefix("text:") {
        return non_empty(text);
    }
    if let Some(tick) = text.strip_prefix("tick:") {
        return ticks(tick).map(Moment::Tick);
    }
    let is_number = text
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'_');
    if is_number && !text.is_empty() {
        return ticks(text).map(Moment::Tick);
    }
    non_empty(text)
}

fn non_empty(text: &str) -> Result<Moment, String> {
    if text.is_empty() {
        return Err("give a text, or a number of ticks".into());
    }
    Ok(Moment::Text(text.into()))
}

fn bandwidth(text: &str) -> Result<u64, String> {
    let wrong = || "give bytes per second: a number, with K, M or G".to_owned();
    let (digits, factor) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1_000),
        Some((at, 'm' | 'M')) => (&text[..at], 1_000_000),
        Some((at, 'g' | 'G')) => (&text[..at], 1_000_000_000),
        _ => (text, 1),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let bytes = number.checked_mul(factor);
    bytes.filter(|bytes| *bytes >= 1000).ok_or_else(wrong)
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
        let of = |text: &str| run(&["k", "--serial", text]).map(|args| args.session.serial);
        assert_eq!(of("stdio"), Ok(SerialTo::Stdio));
        assert_eq!(of("none"), Ok(SerialTo::None));
        assert_eq!(of("file:a b"), Ok(SerialTo::File("a b".into())));
        assert!(of("file:").is_err() && of("tcp").is_err());
    }

    #[test]
    fn times_are_checked() {
        let of = |text: &str| run(&["k", "--timeout", text]).map(|args| args.session.timeout);
        assert_eq!(of("1.5"), Ok(Some(Duration::from_millis(1500))));
        assert!(of("0").is_err() && of("nan").is_err() && of("1e300").is_err());
        let stop = run(&["k", "--stop-at", "1_000"]).unwrap().session.stop_at;
        assert_eq!(stop, Some(1000));
    }

    #[test]
    fn breaks_are_at_exits_by_reason_or_number_and_at_failures() {
        let of = |text: &str| run(&["k", "--break-on", text]).map(|args| args.session.break_on[0]);
        assert_eq!(of("entry-fail"), Ok(BreakOn::EntryFail));
        assert_eq!(of("triple-fault"), Ok(BreakOn::TripleFault));
        let cpuid = BreakOn::ExitReason(ExitReason::CPUID);
        assert_eq!(of("exit:CPUID"), Ok(cpuid));
        let violation = BreakOn::ExitReason(ExitReason::EPT_VIOLATION);
        assert_eq!(of("exit:ept-violation"), Ok(violation));
        assert_eq!(of("exit:12"), Ok(BreakOn::ExitNumber(12)));
        for wrong in ["exit:", "exit:0", "exit:99999999999999999999", "exit:-1"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
        let error = of("exit:LUNCH").unwrap_err();
        assert!(error.contains("CPUID, ") && error.contains("EPT_VIOLATION"));
    }

    #[test]
    fn dumps_are_at_exits_by_reason_or_number() {
        let of = |text: &str| {
            run(&["k", "--dump-vmcs-at", text]).map(|args| args.session.dump_vmcs_at[0])
        };
        assert_eq!(of("12"), Ok(ExitAt::Number(12)));
        assert_eq!(of("exit:12"), Ok(ExitAt::Number(12)));
        assert_eq!(of("exit:hlt"), Ok(ExitAt::Reason(ExitReason::HLT)));
        for wrong in ["", "0", "exit:0", "-1", "exit:LUNCH", "entry-fail"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
        assert!(run(&["k", "--dump-vmcs-to", "d"]).is_err());
    }

    #[test]
    fn snapshots_are_at_texts_or_ticks() {
        let of = |text: &str| {
            let args = run(&["k", "--snapshot-on", text, "-o", "f"]);
            args.map(|args| args.session.snapshot_on[0].clone())
        };
        let text = |text: &str| Ok(Moment::Text(text.into()));
        assert_eq!(of("login: "), text("login: "));
        assert_eq!(of("12 o'clock"), text("12 o'clock"));
        assert_eq!(of("text:12"), text("12"));
        assert_eq!(of("1_000"), Ok(Moment::Tick(1000)));
        assert_eq!(of("tick:12"), Ok(Moment::Tick(12)));
        for wrong in ["", "text:", "tick:x", "99999999999999999999"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
        assert!(run(&["k", "--snapshot-on", "x"]).is_err());
        assert!(run(&["k", "-o", "x"]).is_err());
    }

    #[test]
    fn replays_go_to_ticks_and_exits() {
        assert_eq!(replay_to("1_000"), Ok(ReplayTo::Tick(1000)));
        assert_eq!(replay_to("exit:12"), Ok(ReplayTo::Exit(12)));
        for wrong in ["", "exit:", "exit:0", "exit:CPUID", "x", "-1"] {
            assert!(replay_to(wrong).is_err(), "{wrong}");
        }
        assert_eq!(budget("0"), Ok(0));
        assert_eq!(budget("2G"), Ok(2 << 30));
        assert!(budget("x").is_err() && budget("99999999999999G").is_err());
        assert!(run(&["k", "--record", "f", "--gdb", "1234"]).is_err());
    }

    #[test]
    fn walks_have_a_level_and_an_address() {
        let of = |text: &str| run(&["k", "--walk", text]).map(|args| args.session.walk[0]);
        let at = |level, address| Ok(WalkAt { level, address });
        assert_eq!(of("L1:4096"), at(Level::L1, 4096));
        assert_eq!(of("l2:0xffff_8000"), at(Level::L2, 0xffff_8000));
        for wrong in [
            "L0:1",
            "L1",
            "L1:",
            "L2:0x",
            "L2:-1",
            "L2:1ffffffffffffffff0",
            "0x1000",
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn gdb_is_served_on_loopback_alone() {
        let of = |text: &str| {
            run(&["k", "--gdb", text]).map(|args| args.session.gdb.unwrap().to_string())
        };
        for text in ["1234", ":1234", "localhost:1234", "127.0.0.1:1234"] {
            assert_eq!(of(text).as_deref(), Ok("127.0.0.1:1234"));
        }
        assert_eq!(of("[::1]:1").as_deref(), Ok("[::1]:1"));
        for wrong in [
            "0.0.0.0:1234",
            "192.168.0.1:1234",
            "[::]:1",
            "example.org:1",
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "70000", "127.0.0.1", "127.0.0.1:"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
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
