//! Turns the tables in `data/` into Rust. The tables are the truth; nothing here knows a field,
//! a control or a number of its own.

mod csv;
mod enlightened;
mod fields;
mod layouts;
mod lists;
mod names;

use std::env;
use std::fs;
use std::path::Path;

use csv::Table;

fn main() {
    println!("cargo::rerun-if-changed=build");
    let fields = fields::read(&Table::read("fields"));
    emit("fields.rs", &fields::generate(&fields));
    emit(
        "controls.rs",
        &lists::controls(&Table::read("control_bits")),
    );
    emit(
        "capabilities.rs",
        &lists::capabilities(&Table::read("vmx_capability_msrs")),
    );
    emit(
        "exit_reasons.rs",
        &lists::exit_reasons(&Table::read("exit_reasons")),
    );
    emit(
        "instruction_errors.rs",
        &lists::instruction_errors(&Table::read("vmx_instruction_errors")),
    );
    emit("check_rows.rs", &lists::checks(&Table::read("vmx_checks")));
    emit(
        "nested_state.rs",
        &lists::nested_state(&Table::read("nested_state_abi")),
    );
    emit(
        "enlightened.rs",
        &enlightened::generate(&fields, &Table::read("layout_evmcs_v1")),
    );
    emit(
        "layouts.rs",
        &layouts::generate(&fields, &Table::read("layouts")),
    );
}

fn emit(name: &str, text: &str) {
    let out = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    let path = Path::new(&out).join(name);
    fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
