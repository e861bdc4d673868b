//! The tests of `builtin.rs` once more, in a browser's Worker, where the page runs the machine.
#![cfg(target_arch = "wasm32")]

#[path = "builtin.rs"]
mod builtin;

wasm_bindgen_test::wasm_bindgen_test_configure!(run_in_dedicated_worker);
