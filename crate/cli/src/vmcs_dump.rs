//! `--dump-vmcs-at`: the current VMCS at an exit, while the run goes on.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use hypernest_cpu::VcpuState;
use hypernest_machine::{ExitReason, Machine, Stop, Until};
use hypernest_vmcs::{Field, FieldSet, Layout, Vmcs};

use crate::args::ExitAt;
use crate::vmcs::{fields_text, write_whole};

/// What is asked for and has not come yet.
#[derive(Default)]
pub struct Dumps {
    pending: Vec<ExitAt>,
    dir: Option<PathBuf>,
}

impl Dumps {
    /// Dumps at the first exit that is `at`, to stderr and to files in `dir`, which is created.
    ///
    /// # Errors
    /// The folder cannot be created.
    pub fn open(at: &[ExitAt], dir: Option<PathBuf>) -> Result<Dumps> {
        if let Some(dir) = &dir {
            fs::create_dir_all(dir).with_context(|| {
                format!(
                    "cannot write VMCS dumps to {}: give a folder",
                    dir.display()
                )
            })?;
        }
        let pending = at.to_vec();
        Ok(Dumps { pending, dir })
    }

    /// The exits to stop at, besides those of `until`; of exits by number, the first.
    pub fn until(&self, mut until: Until, mut number: Option<u64>) -> Until {
        for at in &self.pending {
            match *at {
                ExitAt::Reason(reason) => until = until.vm_exit(reason),
                ExitAt::Number(other) => {
                    number = Some(number.map_or(other, |first| first.min(other)));
                }
            }
        }
        match number {
            Some(number) => until.vm_exit_number(number),
            None => until,
        }
    }

    /// Dumps, where the machine has stopped at an exit that is asked for.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn take(&mut self, machine: &Machine, stop: &Stop) -> Result<()> {
        let Stop::VmExit {
            vcpu,
            reason,
            number,
        } = *stop
        else {
            return Ok(());
        };
        let reason = ExitReason(reason);
        let before = self.pending.len();
        self.pending.retain(|at| !at.is(reason, number));
        if self.pending.len() == before {
            return Ok(());
        }
        let state = machine.read_vcpu(vcpu)?;
        let vmcs = current(&state);
        let tick = machine.now();
        let place = state.vmx.current.unwrap_or_default();
        eprint!(
            "VMCS at {place:#x} after VM exit {number}, {}, of processor {vcpu} at tick {tick}:\n{}",
            reason.ident(),
            fields_text(&vmcs, &FieldSet::ALL, false)
        );
        if let Some(dir) = &self.dir {
            let layout = Layout::hypernest();
            let mut region = vec![0; layout.size()];
            layout.write(&vmcs, &mut region)?;
            let path = dir.join(format!("exit-{number}.vmcs"));
            write_whole(&path, &region)?;
        }
        Ok(())
    }

    /// Says which exits there were not.
    pub fn finish(&self) {
        for at in &self.pending {
            eprintln!("hypernest: no VMCS was dumped: there was no VM exit {at}");
        }
    }
}

/// The current VMCS of a vCPU.
fn current(state: &VcpuState) -> Vmcs {
    let mut vmcs = Vmcs::new();
    for &(encoding, value) in &state.vmx.fields {
        if let Some((field, false)) = Field::from_encoding(encoding) {
            vmcs.set(field, value);
        }
    }
    vmcs.launched = state.vmx.launched;
    vmcs.shadow = state.vmx.shadow;
    vmcs
}
