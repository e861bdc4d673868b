//! Every example runs to its end. Each checks its own results.

#[path = "../examples/custom_device.rs"]
mod custom_device;
#[path = "../examples/fuzzer.rs"]
mod fuzzer;
#[path = "../examples/hello.rs"]
mod hello;
#[path = "../examples/observers.rs"]
mod observers;
#[path = "../examples/registers_and_memory.rs"]
mod registers_and_memory;
#[path = "../examples/save_and_compare.rs"]
mod save_and_compare;
#[path = "../examples/serial_terminal.rs"]
mod serial_terminal;
#[path = "../examples/vm_exits.rs"]
mod vm_exits;

#[test]
fn custom_device_runs() {
    custom_device::main().unwrap();
}

#[test]
fn fuzzer_runs() {
    fuzzer::main().unwrap();
}

#[test]
fn hello_runs() {
    hello::main().unwrap();
}

#[test]
fn observers_runs() {
    observers::main().unwrap();
}

#[test]
fn registers_and_memory_runs() {
    registers_and_memory::main().unwrap();
}

#[test]
fn save_and_compare_runs() {
    save_and_compare::main().unwrap();
}

#[test]
fn serial_terminal_runs() {
    serial_terminal::main().unwrap();
}

#[test]
fn vm_exits_runs() {
    vm_exits::main().unwrap();
}
