//! Going back to where a machine was, again and again, at the cost of what changed since.

use std::sync::Arc;

use hypernest_cpu::{Tick, VcpuState};

use crate::board::{BoardRestoreError, BoardState};
use crate::engine::{Clock, EngineError};
use crate::machine::Machine;

/// A moment of a machine, to which [`Machine::go_back`] returns it. It holds the state; the machine keeps
/// what its RAM held.
#[derive(Clone, Debug)]
pub struct Mark {
    /// The same as in its machine.
    of: Arc<()>,
    vcpu: Vec<VcpuState>,
    clock: Clock,
    board: BoardState,
    /// The end of what was printed.
    tail: Vec<u8>,
}

impl Mark {
    /// Machine time at it.
    pub fn now(&self) -> Tick {
        self.clock.now
    }
}

/// A machine cannot go back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MarkError {
    /// The machine has a later mark, or none any more, or this mark is of another machine.
    #[error("the machine has no such mark any more; a machine has one at a time: make a new one")]
    Gone,
    /// A device of the library's user refuses its state.
    #[error(transparent)]
    Board(#[from] BoardRestoreError),
    /// The engine fails.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl Machine {
    /// Marks this moment. From now on the machine keeps a copy of each page of RAM before its first change,
    /// which takes at most as much memory as RAM has. A machine has one mark: an earlier one is gone.
    ///
    /// A mark is an event of the run as [`Machine::save`] is, since guests can notice that cached
    /// translations are forgotten.
    ///
    /// # Errors
    /// When the engine cannot tell what is written, or the host has no memory for the record. The machine then
    /// has no mark.
    pub fn mark(&mut self) -> Result<Mark, EngineError> {
        if !self.capabilities().dirty_tracking {
            return Err(crate::engine::missing(self.engine_name(), "marks"));
        }
        self.forget_mark();
        self.flush();
        let vcpu = (0..self.vcpus())
            .map(|vcpu| self.read_vcpu(vcpu))
            .collect::<Result<_, _>>()?;
        if let Err(error) = self.begin_mark() {
            self.end_mark();
            return Err(error);
        }
        let of = Arc::new(());
        self.mark = Some(of.clone());
        Ok(Mark {
            of,
            vcpu,
            clock: self.engine.clock(),
            board: self.board.state(),
            tail: self.board.serial_output.tail().to_vec(),
        })
    }

    /// Goes back to the mark: the machine then does exactly what it did after [`Machine::mark`], given the
    /// same input. It costs what was changed since, in RAM and on disks; the mark stays.
    ///
    /// What is no state of the machine goes on: output that was not taken, counters, events, breakpoints,
    /// coverage.
    ///
    /// # Errors
    /// When the mark is gone: the machine is then as it was. When a device refuses the state that it gave:
    /// the machine can then only go back or end.
    pub fn go_back(&mut self, mark: &Mark) -> Result<(), MarkError> {
        if !self
            .mark
            .as_ref()
            .is_some_and(|of| Arc::ptr_eq(of, &mark.of))
        {
            return Err(MarkError::Gone);
        }
        self.put_pages_back();
        for (vcpu, state) in mark.vcpu.iter().enumerate() {
            self.engine.write_state(vcpu, state)?;
        }
        self.board.restore(&mark.board)?;
        self.board.serial_output.set_tail(&mark.tail);
        self.engine.set_clock(mark.clock);
        self.engine.rewind(&mut self.ram);
        Ok(())
    }

    /// Gives up the mark, and the memory that it takes.
    pub fn forget_mark(&mut self) {
        self.end_mark();
        self.mark = None;
    }
}
