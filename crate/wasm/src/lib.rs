//! Hypernest for a web page: the machine behind numbers, bytes and strings.
//!
//! [`guest`] is the machine as the page drives it, in slices; this file binds it to JavaScript.
//! Nothing here knows of a clock, the DOM or a Worker: the page's Worker calls in, and decides how
//! long a slice is. Errors reach JavaScript as strings that a user can read.

pub mod guest;

use js_sys::Uint8Array;
use serde::Serialize;
use wasm_bindgen::prelude::*;

use guest::{Guest, Options};

#[wasm_bindgen(typescript_custom_section)]
const TYPES: &str = r#"
/** What machine to build. */
export interface Options {
  /** Bytes of guest RAM: a multiple of 4096, at most 3 GiB. */
  memory: number;
  cpus: number;
  /** CPU model; the default when left out. */
  model?: string;
  /** Command line for the kernel. */
  cmdline: string;
  /** VMX of the processor; none when left out. */
  vmx?: 'none' | 'kvm' | 'max';
  /** What runs when there is no kernel: the hypervisor (which needs VMX) unless given. */
  builtin?: 'hypervisor' | 'greeting';
}

/** The machine after a slice. */
export interface SliceReport {
  /** Guest time since boot, in ticks (ns). */
  ticks: number;
  /** Instructions retired since boot. */
  instructions: number;
  /** VM exits since boot: of guests inside the guest. */
  exits: number;
  /** Why the machine cannot go on. */
  stop?: { kind: string; message: string };
}
"#;

#[wasm_bindgen]
extern "C" {
    /// `Options` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "Options")]
    pub type JsOptions;
    /// `SliceReport` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "SliceReport")]
    pub type JsSliceReport;
}

/// Panics become messages on the browser's console, with a stack, instead of a bare `unreachable`.
#[wasm_bindgen(start)]
pub fn start() {
    console_error_panic_hook::set_once();
}

/// Checks options without building anything: before images are fetched for them.
///
/// # Errors
/// What is wrong with them.
#[wasm_bindgen]
pub fn check_options(options: JsOptions) -> Result<(), String> {
    parse(options)?.check()
}

/// Whether a file that begins with `head` (512 bytes suffice) is an initial RAM disk.
#[wasm_bindgen]
pub fn is_initrd(head: &[u8]) -> bool {
    guest::is_initrd(head)
}

/// Checks that `image` is of a kind that can be booted.
///
/// # Errors
/// What it is instead, or what is wrong with it.
#[wasm_bindgen]
pub fn check_kernel(image: &[u8]) -> Result<(), String> {
    guest::check_kernel(image)
}

/// A machine that boots one guest.
#[wasm_bindgen]
pub struct Machine(Guest);

#[wasm_bindgen]
impl Machine {
    /// Builds a machine and loads `kernel` (a built-in guest when it is left out) and `initrd`.
    ///
    /// # Errors
    /// What is wrong with the options or the images.
    #[wasm_bindgen(constructor)]
    pub fn new(
        options: JsOptions,
        kernel: Option<Uint8Array>,
        initrd: Option<Uint8Array>,
    ) -> Result<Machine, String> {
        let options = parse(options)?;
        options.check()?; // before the images are copied
        let kernel = kernel.map(|bytes| bytes.to_vec());
        let initrd = initrd.map(|bytes| bytes.to_vec());
        Guest::new(&options, kernel.as_deref(), initrd.as_deref()).map(Machine)
    }

    /// Runs until `ticks` have passed, about `instructions` have been executed, or the machine
    /// stops.
    pub fn run_slice(&mut self, ticks: f64, instructions: f64) -> Result<JsSliceReport, String> {
        // Saturating conversions: a negative or absurd budget is an empty or a long slice.
        let report = self.0.run_slice(ticks as u64, instructions as u64);
        to_js(&report)
    }

    /// Ticks for which the machine has nothing to do unless input arrives; 0 while it is busy.
    pub fn idle_ticks(&self) -> f64 {
        self.0.idle_ticks() as f64
    }

    /// Takes what the guest has written to its serial port since the last call.
    pub fn take_serial(&mut self) -> Uint8Array {
        Uint8Array::from(self.0.take_serial().as_slice())
    }

    /// Sends `bytes` to the guest's serial port; they arrive as fast as the guest reads them.
    pub fn send_serial(&mut self, bytes: &[u8]) {
        self.0.send_serial(bytes);
    }

    /// Hash over the whole state, in hexadecimal. Equal runs have equal hashes on every host.
    ///
    /// # Errors
    /// None with the engine that runs here.
    pub fn state_hash(&self) -> Result<String, String> {
        self.0.state_hash()
    }
}

fn parse(options: JsOptions) -> Result<Options, String> {
    serde_wasm_bindgen::from_value(options.into()).map_err(|error| format!("bad options: {error}"))
}

fn to_js<T: JsCast>(value: &impl Serialize) -> Result<T, String> {
    serde_wasm_bindgen::to_value(value)
        .map(JsCast::unchecked_into)
        .map_err(|error| error.to_string())
}
