//! Runs cases on two engines and tells whether the results agree where they have to.

use std::collections::BTreeMap;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

use crate::case::{Case, Engine, Event, Mode, Outcome, Patch, UserState};
use crate::layout::{IMAGE_DATA, PAGE, image_offset};
use crate::masks::{Context, Masked, ROWS};
use crate::text;

/// What came of comparing one case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Equal where defined. Indices of the rows of [`ROWS`] without which it would not be.
    Same(Vec<usize>),
    /// Our engine has no such instruction yet.
    Unimplemented(&'static str),
    /// Different.
    Different,
}

/// Two engines side by side.
pub struct Judge<'a> {
    /// Who is right.
    pub host: &'a mut dyn Engine,
    /// Who is judged.
    pub ours: &'a mut dyn Engine,
    /// Cases in which the host gave two answers.
    pub unstable: u64,
}

impl Judge<'_> {
    /// Compares one case.
    pub fn check(&mut self, case: &Case) -> Verdict {
        let ours = self.ours.run(case);
        if let Event::Unimplemented(what) = ours.event {
            return Verdict::Unimplemented(what);
        }
        let instruction = decode(case);
        let mut verdict = Verdict::Different;
        // A host takes one of several possible faults as it pleases, a few times in a million.
        for attempt in 0..3 {
            let host = self.host.run(case);
            verdict = self.compare(case, &instruction, &host, &ours);
            if verdict != Verdict::Different {
                self.unstable += u64::from(attempt > 0);
                break;
            }
        }
        verdict
    }

    fn compare(
        &self,
        case: &Case,
        instruction: &Instruction,
        host: &Outcome,
        ours: &Outcome,
    ) -> Verdict {
        let memory = self.host.memory();
        if host == ours && memory == self.ours.memory() {
            return Verdict::Same(Vec::new());
        }
        let context = Context {
            case,
            instruction,
            host,
            ours,
        };
        let mut masked = Masked::default();
        let mut rows = Vec::new();
        for (n, row) in ROWS.iter().enumerate() {
            let before = masked.clone();
            (row.mask)(&context, &mut masked);
            if masked != before {
                rows.push(n);
            }
        }
        if masked.whole || self.equal(&masked, host, ours) {
            Verdict::Same(rows)
        } else {
            Verdict::Different
        }
    }

    fn equal(&self, masked: &Masked, host: &Outcome, ours: &Outcome) -> bool {
        let mut host = host.clone();
        let (h, o) = (&mut host.state, &ours.state);
        h.rflags = h.rflags & !masked.flags | o.rflags & masked.flags;
        for n in 0..16 {
            if masked.gpr >> n & 1 != 0 {
                h.gpr[n] = o.gpr[n];
            }
            if masked.xmm >> n & 1 != 0 {
                h.fpu.xmm[n] = o.fpu.xmm[n];
            }
        }
        h.fpu.status = h.fpu.status & !masked.status | o.fpu.status & masked.status;
        if masked.x87 {
            (h.fpu.status, h.fpu.tag, h.fpu.st) = (o.fpu.status, o.fpu.tag, o.fpu.st);
        }
        if masked.pointers {
            h.fpu.opcode = o.fpu.opcode;
            h.fpu.instruction = o.fpu.instruction;
            h.fpu.operand = o.fpu.operand;
        }
        if masked.address
            && let (
                Event::Fault {
                    vector: 14,
                    address,
                },
                Event::Fault {
                    vector: 14,
                    address: ours,
                },
            ) = (&mut host.event, ours.event)
        {
            *address = ours;
        }
        host == *ours && equal_memory(self.host.memory(), self.ours.memory(), &masked.memory)
    }

    /// The smallest case that still differs, found by taking inputs away.
    pub fn shrink(&mut self, case: &Case) -> Case {
        let mut best = case.clone();
        let plain = UserState::new(case.mode);
        let mut attempt = |judge: &mut Self, change: &dyn Fn(&mut Case)| {
            let mut smaller = best.clone();
            change(&mut smaller);
            if smaller != best && judge.check(&smaller) == Verdict::Different {
                best = smaller;
            }
        };
        attempt(self, &|c| c.state.fpu = plain.fpu);
        attempt(self, &|c| c.state.fpu.xmm = plain.fpu.xmm);
        attempt(self, &|c| {
            let (xmm, mxcsr) = (c.state.fpu.xmm, c.state.fpu.mxcsr);
            c.state.fpu = plain.fpu;
            c.state.fpu.xmm = xmm;
            c.state.fpu.mxcsr = mxcsr;
        });
        attempt(self, &|c| c.state.fpu.mxcsr = 0x1f80);
        attempt(self, &|c| c.state.fpu.mxcsr &= !0x3f);
        attempt(self, &|c| c.state.fpu.control = 0x37f);
        attempt(self, &|c| c.state.fpu.status = 0);
        attempt(self, &|c| c.state.fpu.tag = 0xff);
        attempt(self, &|c| {
            c.state.fpu.opcode = 0;
            c.state.fpu.instruction = 0;
            c.state.fpu.operand = 0;
        });
        for n in 0..16 {
            attempt(self, &|c| c.state.gpr[n] = plain.gpr[n]);
            attempt(self, &|c| c.state.fpu.xmm[n] = 0);
            if n < 8 {
                attempt(self, &|c| c.state.fpu.st[n] = [0; 10]);
            }
        }
        attempt(self, &|c| c.state.rflags = plain.rflags);
        for (_, bit) in crate::case::FLAGS {
            attempt(self, &|c| c.state.rflags &= !(1 << bit) | 0x202);
        }
        attempt(self, &|c| c.state.fs_base = 0);
        attempt(self, &|c| c.state.gs_base = 0);
        attempt(self, &|c| c.memory.clear());
        for n in (0..case.memory.len()).rev() {
            attempt(self, &|c| {
                if n < c.memory.len() {
                    c.memory.remove(n);
                }
            });
            attempt(self, &|c| {
                if let Some(Patch { bytes, .. }) = c.memory.get_mut(n) {
                    bytes.truncate(16);
                }
            });
        }
        best
    }

    /// A difference as two lines: the case with the host's result, and ours.
    pub fn report(&mut self, case: &Case) -> String {
        let ours = self.ours.run(case);
        let host = self.host.run(case);
        format!(
            "{}\n    ours:{}",
            text::print(case, Some(&host), self.host.memory()),
            text::print_outcome(case, &ours, self.ours.memory()),
        )
    }
}

fn equal_memory(host: &[u8], ours: &[u8], masked: &[(u64, u64)]) -> bool {
    if masked.is_empty() {
        return host == ours;
    }
    let mut host = host.to_vec();
    for (address, len) in masked {
        for address in *address..address.saturating_add(*len) {
            let offset = image_offset(address).and_then(|o| o.checked_sub(IMAGE_DATA));
            if let Some(offset) = offset {
                host[offset] = ours[offset];
            }
        }
    }
    host == ours
}

/// The instruction of a case.
pub fn decode(case: &Case) -> Instruction {
    let (bits, ip) = (case.mode.bits(), case.state.rip);
    Decoder::with_ip(bits, &case.code, ip, DecoderOptions::NONE).decode()
}

/// What happened over many cases.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Cases compared.
    pub cases: u64,
    /// Per form: cases, and those equal only because of a mask.
    pub forms: BTreeMap<(Mode, u32), (u64, u64)>,
    /// Per row of the mask table: cases that needed it.
    pub rows: BTreeMap<usize, u64>,
    /// Per form without implementation: cases and what is missing.
    pub unimplemented: BTreeMap<(Mode, u32), (u64, &'static str)>,
    /// Differences per form.
    pub different: BTreeMap<(Mode, u32), u64>,
    /// Differences, ready to print, at most [`Tally::MAX_REPORTS`] per form.
    pub reports: Vec<String>,
    /// Cases in which the host gave two answers.
    pub unstable: u64,
}

impl Tally {
    /// Reports kept per form.
    pub const MAX_REPORTS: u64 = 2;

    /// Runs one case and counts it.
    pub fn run(&mut self, judge: &mut Judge, code: Code, case: &Case) {
        let form = (case.mode, code as u32);
        self.cases += 1;
        let counts = self.forms.entry(form).or_default();
        counts.0 += 1;
        match judge.check(case) {
            Verdict::Same(rows) => {
                counts.1 += u64::from(!rows.is_empty());
                for row in rows {
                    *self.rows.entry(row).or_default() += 1;
                }
            }
            Verdict::Unimplemented(what) => {
                self.unimplemented.entry(form).or_insert((0, what)).0 += 1;
            }
            Verdict::Different => {
                let count = self.different.entry(form).or_default();
                *count += 1;
                if *count <= Self::MAX_REPORTS {
                    let small = judge.shrink(case);
                    self.reports
                        .push(format!("{code:?}: {}", judge.report(&small)));
                }
            }
        }
        self.unstable = judge.unstable;
    }

    /// Adds another tally.
    pub fn merge(&mut self, other: Tally) {
        self.cases += other.cases;
        for (form, (cases, masked)) in other.forms {
            let mine = self.forms.entry(form).or_default();
            mine.0 += cases;
            mine.1 += masked;
        }
        for (row, count) in other.rows {
            *self.rows.entry(row).or_default() += count;
        }
        for (form, (count, what)) in other.unimplemented {
            self.unimplemented.entry(form).or_insert((0, what)).0 += count;
        }
        for (form, count) in other.different {
            *self.different.entry(form).or_default() += count;
        }
        self.reports.extend(other.reports);
        self.unstable += other.unstable;
    }

    /// Number of cases that differ.
    pub fn differences(&self) -> u64 {
        self.different.values().sum()
    }

    /// The report: differences, what is not implemented, and the masked share per row and form.
    pub fn print(&self) {
        for report in &self.reports {
            println!("{report}");
        }
        let name = |(mode, code): &(Mode, u32)| {
            let code = Code::try_from(*code as usize).map_or(String::new(), |c| format!("{c:?}"));
            format!("{code}/{}", mode.bits())
        };
        for (form, count) in &self.different {
            let cases = self.forms.get(form).map_or(0, |f| f.0);
            println!("different: {} {count} of {cases}", name(form));
        }
        for (form, (count, what)) in &self.unimplemented {
            println!("not implemented: {} ({what}), {count} cases", name(form));
        }
        for (row, count) in &self.rows {
            println!("masked by {}: {count} cases", ROWS[*row].id);
        }
        for (form, (cases, masked)) in &self.forms {
            if *masked > 0 {
                let share = 100.0 * *masked as f64 / *cases as f64;
                println!("masked share: {} {share:.0} %", name(form));
            }
        }
        let unimplemented: u64 = self.unimplemented.values().map(|u| u.0).sum();
        println!(
            "{} cases over {} forms: {} differ in {} forms, {} not implemented in {} forms, {} with an unsteady host",
            self.cases,
            self.forms.len(),
            self.differences(),
            self.different.len(),
            unimplemented,
            self.unimplemented.len(),
            self.unstable,
        );
    }
}

/// Whether an access of `len` bytes at `address` lies in two pages.
pub fn crosses_page(address: u64, len: u64) -> bool {
    address / PAGE != address.wrapping_add(len - 1) / PAGE
}
