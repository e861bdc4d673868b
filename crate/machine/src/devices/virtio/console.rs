//! A terminal (virtio 1.2, "Console Device") with one port: queue 0 is what the guest reads,
//! queue 1 what it prints.

use std::collections::VecDeque;

use hypernest_cpu::Ram;
use serde::{Deserialize, Serialize};

use super::queue::{Broken, QueueState};

/// What changes in a terminal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Bytes the guest has not yet offered room for.
    pub waiting: VecDeque<u8>,
}

/// The terminal. Its whole content is [`ConsoleState`].
#[derive(Debug, Default)]
pub struct Console {
    pub(crate) state: ConsoleState,
}

impl Console {
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.state.waiting.extend(bytes);
    }

    pub(super) fn receive(
        &mut self,
        ram: &mut Ram,
        queue: &mut QueueState,
    ) -> Result<bool, Broken> {
        let mut any = false;
        while !self.state.waiting.is_empty() {
            let Some(chain) = queue.pop(ram)? else { break };
            let count = chain.room().min(self.state.waiting.len());
            let bytes: Vec<u8> = self.state.waiting.drain(..count).collect();
            chain.write(ram, 0, &bytes)?;
            queue.push(ram, &chain, count as u32)?;
            any = true;
            if count == 0 {
                break; // a request without room would be offered for ever
            }
        }
        Ok(any && queue.wants_interrupt(ram)?)
    }

    pub(super) fn transmit(
        &mut self,
        ram: &mut Ram,
        queue: &mut QueueState,
        output: &mut Vec<u8>,
    ) -> Result<bool, Broken> {
        queue.serve(ram, |ram, chain| {
            output.extend(chain.read(ram)?);
            Ok(0)
        })
    }
}
