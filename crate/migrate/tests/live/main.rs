//! Live migration between two machines in this process, over a link that can be cut and counted.

#[path = "../../../../tests/guests/hypervisor.rs"]
mod hypervisor;
#[path = "../../../../tests/guests/rounds.rs"]
mod rounds;

mod chain;
mod converge;
mod cuts;
mod instants;
mod lies;
mod link;
mod moves;
