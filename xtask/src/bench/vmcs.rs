//! VMPTRLD, VMCLEAR and translation of nested states.

use anyhow::Result;

use crate::run::{line, run};

/// Runs the measuring program, which says what it found.
pub fn measure() -> Result<()> {
    println!("\n== VMCS regions and nested states");
    run(&mut line(
        "cargo bench --quiet -p hypernest-machine --bench vmcs",
    ))
}
