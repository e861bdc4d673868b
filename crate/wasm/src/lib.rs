//! Hypernest for a web page: the machine behind numbers, bytes and strings.
//!
//! [`guest`] is the machine as the page drives it, in slices, [`snapshot`] keeps it in a file, and [`vmcs`] looks at a VMCS in
//! a file; this file binds them to JavaScript.
//! Nothing here knows of a clock, the DOM or a Worker: the page's Worker calls in, and decides how
//! long a slice is. Errors reach JavaScript as strings that a user can read.

pub mod guest;
mod js_io;
pub mod snapshot;
pub mod vmcs;

use js_sys::Uint8Array;
use serde::Serialize;
use wasm_bindgen::prelude::*;

use guest::{Guest, Options};
use js_io::{Gather, Scatter};

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

/** A layout of a VMCS in memory. */
export interface VmcsLayout {
  name: string;
  title: string;
  /** None: any. */
  revisions: number[];
  fields: number;
  bytes: number;
  machine: boolean;
}

/** What a file is, and the layouts that it may have, best first. */
export interface VmcsIdentified {
  kind: 'region' | 'nested state' | 'log';
  revision: string | null;
  shadow: boolean;
  candidates: {
    layout: string;
    score: number;
    by_revision: boolean;
    holds: number;
    stray_bytes: number;
    broken: { field: string; value: string; rule: string }[];
  }[];
  notes: string[];
}

/** A VMCS by field; values in hexadecimal. */
export interface VmcsShown {
  layout: string | null;
  launched: boolean;
  shadow: boolean;
  abort: number;
  aliases: Record<string, string>;
  fields: Record<string, string>;
}

/** What the checks of VM entry say. */
export interface VmcsLinted {
  checks: number;
  failed: { id: string; says: string }[];
  not_judged: string[];
}

/** A VMCS in another layout. */
export interface VmcsTranslated {
  from: string;
  to: string;
  bytes: Uint8Array;
  fields: Record<string, 'copied' | 'widened' | 'converted' | 'defaulted' | 'dropped' | 'lost'>;
  lost: Record<string, string>;
}

/** In what two differ. */
export interface VmcsDifferences {
  fields: Record<string, [string | null, string | null]>;
  launched: [boolean, boolean] | null;
}

/** A nested state in a migration stream. */
export interface VmcsExtracted {
  cpu: number | null;
  offset: number;
  vmxon: string;
  vmcs: string;
  flags: number;
  bytes: Uint8Array;
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
    /// `VmcsLayout[]` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "VmcsLayout[]")]
    pub type JsLayouts;
    /// `VmcsIdentified` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "VmcsIdentified")]
    pub type JsIdentified;
    /// `VmcsShown` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "VmcsShown")]
    pub type JsShown;
    /// `VmcsLinted` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "VmcsLinted")]
    pub type JsLinted;
    /// `VmcsTranslated` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "VmcsTranslated")]
    pub type JsTranslated;
    /// `VmcsDifferences` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "VmcsDifferences")]
    pub type JsDifferences;
    /// `VmcsExtracted[]` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "VmcsExtracted[]")]
    pub type JsExtracted;
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

/// The layouts of a VMCS that are built in.
///
/// # Errors
/// None.
#[wasm_bindgen]
pub fn vmcs_layouts() -> Result<JsLayouts, String> {
    to_object(&vmcs::layouts())
}

/// A layout as a table, which can be changed and given wherever a layout is asked for.
///
/// # Errors
/// There is no such layout.
#[wasm_bindgen]
pub fn vmcs_layout_table(name: &str) -> Result<String, String> {
    vmcs::layout_table(name)
}

/// Says what a file is: a region, KVM's nested state or a kernel log; and which layout it has.
///
/// # Errors
/// It is none of them.
#[wasm_bindgen]
pub fn vmcs_identify(file: &[u8]) -> Result<JsIdentified, String> {
    to_object(&vmcs::identify(file)?)
}

/// The fields of a file, of a layout or of the likeliest.
///
/// # Errors
/// It has no VMCS of such a layout.
#[wasm_bindgen]
pub fn vmcs_show(file: &[u8], layout: Option<String>) -> Result<JsShown, String> {
    to_object(&vmcs::show(file, layout.as_deref())?)
}

/// Walks the checks of VM entry. The profile is `kvm`, `max` or the text of a dump of the IA32_VMX_* registers.
///
/// # Errors
/// There is no such profile, or no VMCS.
#[wasm_bindgen]
pub fn vmcs_lint(file: &[u8], profile: &str, layout: Option<String>) -> Result<JsLinted, String> {
    to_object(&vmcs::lint(file, profile, layout.as_deref())?)
}

/// Writes a file in layout `to`.
///
/// # Errors
/// A value would be lost that may not be, or there is no VMCS or layout.
#[wasm_bindgen]
pub fn vmcs_translate(
    file: &[u8],
    from: Option<String>,
    to: &str,
    allow_loss: bool,
) -> Result<JsTranslated, String> {
    to_object(&vmcs::translate(file, from.as_deref(), to, allow_loss)?)
}

/// Compares two files by field.
///
/// # Errors
/// One has no VMCS.
#[wasm_bindgen]
pub fn vmcs_diff(
    a: &[u8],
    b: &[u8],
    layout_a: Option<String>,
    layout_b: Option<String>,
) -> Result<JsDifferences, String> {
    to_object(&vmcs::diff(a, b, layout_a.as_deref(), layout_b.as_deref())?)
}

/// The nested states in a QEMU migration stream.
///
/// # Errors
/// A processor's is not whole.
#[wasm_bindgen]
pub fn vmcs_extract(stream: &[u8]) -> Result<JsExtracted, String> {
    to_object(&vmcs::extract(stream)?)
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

    /// Makes the machine of a snapshot, whether a page or `hypernest run --snapshot-on` wrote it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_snapshot(file: Uint8Array) -> Result<Machine, String> {
        snapshot::read(Scatter::new(file)).map(Machine)
    }

    /// A snapshot: `from_snapshot` and `hypernest resume` go on from it.
    ///
    /// # Errors
    /// None with the engine that runs here.
    pub fn snapshot(&mut self) -> Result<Uint8Array, String> {
        let mut file = Gather::default();
        snapshot::write(&mut self.0, &mut file)?;
        Ok(file.into_array())
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

/// Maps become objects, bytes a `Uint8Array`, and what is not there `null`.
fn to_object<T: JsCast>(value: &impl Serialize) -> Result<T, String> {
    let serializer = serde_wasm_bindgen::Serializer::new()
        .serialize_maps_as_objects(true)
        .serialize_missing_as_null(true);
    value
        .serialize(&serializer)
        .map(JsCast::unchecked_into)
        .map_err(|error| error.to_string())
}

fn to_js<T: JsCast>(value: &impl Serialize) -> Result<T, String> {
    serde_wasm_bindgen::to_value(value)
        .map(JsCast::unchecked_into)
        .map_err(|error| error.to_string())
}
