//! Instructions as text: the log of `--log-instructions`, and the last ones before a crash.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypernest_machine::boot::Symbols;
use hypernest_machine::{Level, Tick, Traced, Tracer};
use iced_x86::{Formatter, GasFormatter, Instruction};

use crate::dump;

/// How many instructions a post-mortem shows.
pub const LAST: usize = 64;
/// Bytes of an instruction on one line of a QEMU listing.
const BYTES_PER_LINE: usize = 8;

thread_local! {
    /// The formatter cannot be given to another thread, and making one takes longer than using it.
    static FORMATTER: RefCell<GasFormatter> = RefCell::new(formatter());
}

fn formatter() -> GasFormatter {
    let mut formatter = GasFormatter::new();
    let options = formatter.options_mut();
    options.set_uppercase_hex(false);
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_small_hex_numbers_in_decimal(true);
    options.set_gas_space_after_memory_operand_comma(true);
    options.set_space_after_operand_separator(true);
    options.set_first_operand_char_index(9);
    options.set_gas_show_mnemonic_size_suffix(true);
    options.set_branch_leading_zeros(false);
    formatter
}

/// The text of an instruction, in AT&T syntax as QEMU's.
pub fn instruction_text(instruction: &Instruction) -> String {
    let mut text = String::new();
    FORMATTER.with_borrow_mut(|formatter| formatter.format(instruction, &mut text));
    text
}

/// Names addresses.
#[derive(Clone, Default)]
pub struct Names {
    l1: Option<Arc<Symbols>>,
    l2: Option<Arc<Symbols>>,
}

impl Names {
    /// Names by the symbols of L1 and of L2, where there are any.
    pub fn new(l1: Option<Arc<Symbols>>, l2: Option<Arc<Symbols>>) -> Names {
        Names { l1, l2 }
    }

    fn lookup(&self, level: Level, address: u64) -> Option<(&str, u64)> {
        let symbols = match level {
            Level::L1 => &self.l1,
            Level::L2 => &self.l2,
        };
        symbols.as_ref()?.lookup(address)
    }

    /// `function+0x12`, or nothing.
    pub fn symbol(&self, level: Level, address: u64) -> Option<String> {
        let (name, offset) = self.lookup(level, address)?;
        Some(match offset {
            0 => name.into(),
            offset => format!("{name}+{offset:#x}"),
        })
    }

    /// `function`, or nothing.
    pub fn function(&self, level: Level, address: u64) -> Option<String> {
        self.lookup(level, address).map(|(name, _)| name.into())
    }

    /// The address, with its symbol where there is one.
    pub fn address(&self, level: Level, address: u64) -> String {
        match self.symbol(level, address) {
            Some(symbol) => format!("{address:#x} ({symbol})"),
            None => format!("{address:#x}"),
        }
    }
}

/// Where traced instructions go. Shared with the tracer inside the machine.
#[derive(Clone)]
pub struct Trace(Arc<Mutex<Inner>>);

struct Inner {
    last: VecDeque<Last>,
    keep_last: bool,
    log: Option<Log>,
}

/// One of the last instructions.
#[derive(Clone, Copy, Debug)]
pub struct Last {
    /// Which vCPU.
    pub vcpu: usize,
    /// Tick before it.
    pub now: Tick,
    /// Who executes it.
    pub level: Level,
    /// Its linear address.
    pub address: u64,
    /// Itself.
    pub instruction: Instruction,
}

struct Log {
    file: BufWriter<File>,
    names: Names,
    error: Option<std::io::Error>,
    vcpus: usize,
}

impl Trace {
    /// Keeps the last instructions for a post-mortem.
    pub fn last() -> Trace {
        Trace(Arc::new(Mutex::new(Inner {
            last: VecDeque::with_capacity(LAST),
            keep_last: true,
            log: None,
        })))
    }

    /// Keeps the last instructions, and writes all to a file.
    pub fn log(file: File, names: Names, vcpus: usize) -> Trace {
        let trace = Trace::last();
        trace.lock().log = Some(Log {
            file: BufWriter::with_capacity(1 << 20, file),
            names,
            error: None,
            vcpus,
        });
        trace
    }

    /// What the machine calls before each instruction.
    pub fn tracer(&self) -> Tracer {
        let trace = self.clone();
        Box::new(move |traced| trace.lock().take(traced))
    }

    /// The last instructions, oldest first.
    pub fn take_last(&self) -> Vec<Last> {
        self.lock().last.drain(..).collect()
    }

    /// Writes out what is buffered.
    ///
    /// # Errors
    /// The first error of any write.
    pub fn finish(&self) -> std::io::Result<()> {
        match &mut self.lock().log {
            None => Ok(()),
            Some(log) => match log.error.take() {
                Some(error) => Err(error),
                None => log.file.flush(),
            },
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn take(&mut self, traced: &Traced) {
        let address = dump::code_address(&traced.state);
        if self.keep_last {
            if self.last.len() == LAST {
                self.last.pop_front();
            }
            self.last.push_back(Last {
                vcpu: traced.vcpu,
                now: traced.now,
                level: traced.state.level(),
                address,
                instruction: *traced.instruction,
            });
        }
        if let Some(log) = &mut self.log
            && log.error.is_none()
        {
            log.error = log.write(traced, address).err();
        }
    }
}

impl Log {
    /// The listing of the instruction, then the registers before it.
    fn write(&mut self, traced: &Traced, address: u64) -> std::io::Result<()> {
        let out = &mut self.file;
        writeln!(out, "----------------")?;
        writeln!(
            out,
            "IN: {}",
            self.names
                .symbol(traced.state.level(), address)
                .unwrap_or_default()
        )?;
        let text = instruction_text(traced.instruction);
        out.write_all(listing_line(address, traced.bytes, &text).as_bytes())?;
        writeln!(out)?;
        if self.vcpus > 1 {
            writeln!(out, "CPU#{}", traced.vcpu)?;
        }
        out.write_all(dump::registers(&traced.state).as_bytes())
    }
}

/// Address, bytes and text; bytes past the eighth go to a second line.
fn listing_line(address: u64, bytes: &[u8], text: &str) -> String {
    let hex =
        |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!(" {byte:02x}")).collect() };
    let (first, rest) = bytes.split_at(bytes.len().min(BYTES_PER_LINE));
    let mut line = format!("{address:#010x}: {:24}  {text}\n", hex(first));
    if !rest.is_empty() {
        let address = address.wrapping_add(first.len() as u64);
        line += &format!("{address:#010x}: {}\n", hex(rest));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    /// The lines are those that QEMU 7.2 writes for the same bytes.
    #[test]
    fn listing_lines_are_as_qemu_writes_them() {
        let line = |bytes: &[u8], address| {
            let instruction = Decoder::with_ip(32, bytes, address, DecoderOptions::NONE).decode();
            listing_line(address, bytes, &instruction_text(&instruction))
        };
        assert_eq!(
            line(&[0xb8, 5, 0, 0, 0], 0x10_0010),
            "0x00100010:  b8 05 00 00 00           movl     $5, %eax\n"
        );
        assert_eq!(
            line(&[0xeb, 0x0e], 0x10_0000),
            "0x00100000:  eb 0e                    jmp      0x100010\n"
        );
        let store = [0xc7, 0x84, 0x88, 0, 0x10, 0x10, 0, 0x78, 0x56, 0x34, 0x12];
        assert_eq!(
            line(&store, 0x10_0027),
            "0x00100027:  c7 84 88 00 10 10 00 78  movl     $0x12345678, 0x101000(%eax, %ecx, 4)\n\
             0x0010002f:  56 34 12\n"
        );
    }
}
