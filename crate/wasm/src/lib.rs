//! Hypernest for a web page: the machine behind numbers, bytes and strings.
//!
//! [`guest`] is the machine as the page drives it, in slices, [`snapshot`] keeps it in a file, [`migration`] moves
//! it while it runs, and [`vmcs`] looks at a VMCS in a file; this file binds them to JavaScript.
//! Nothing here knows of a clock, the DOM or a Worker: the page's Worker calls in, and decides how
//! long a slice is. Errors reach JavaScript as strings that a user can read.

pub mod guest;
mod js_io;
pub mod migration;
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

/** A machine in a few words. */
export interface Summary {
  memory: number;
  cpus: number;
  vmx: 'none' | 'kvm' | 'max';
}

/** How a migration is to go. */
export interface MigrationOptions {
  /** What a source shows and a destination demands; nothing when left out. */
  token?: string;
  /** Bytes per second at most. */
  bandwidth?: number;
}

/** What a side of a migration does next. */
export type MigrationNext =
  /** Let the machine run for some milliseconds, then ask again. */
  | { do: 'run' }
  /** Ask again when bytes have arrived, or after so many microseconds. The machine does not run. */
  | { do: 'wait'; micros: number }
  /** The machine is the other side's. */
  | { do: 'handed-over' }
  /** The machine is this side's. */
  | { do: 'own' }
  /** It did not happen: a source goes on with its machine, a destination has none. */
  | { do: 'failed'; reasons: string[] }
  /** Nobody here knows who owns the machine: it does not run until that is settled. */
  | { do: 'undecided'; reasons: string[] };

/** How far a source is; times in microseconds. */
export interface MigrationReport {
  rounds: number;
  pages: number;
  bytes: number;
  rate?: number;
  /** The guest's share of the time, in percent. */
  share: number;
  downtime: number;
  micros: number;
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
    /// `Summary` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "Summary")]
    pub type JsSummary;
    /// `MigrationOptions` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "MigrationOptions")]
    pub type JsMigrationOptions;
    /// `MigrationNext` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "MigrationNext")]
    pub type JsMigrationNext;
    /// `MigrationReport` of the TypeScript section.
    #[wasm_bindgen(typescript_type = "MigrationReport")]
    pub type JsMigrationReport;
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

    /// What it was built from.
    ///
    /// # Errors
    /// None.
    pub fn summary(&self) -> Result<JsSummary, String> {
        to_js(&self.0.summary())
    }

    /// Hash over the whole state, in hexadecimal. Equal runs have equal hashes on every host.
    ///
    /// # Errors
    /// None with the engine that runs here.
    pub fn state_hash(&self) -> Result<String, String> {
        self.0.state_hash()
    }
}

/// The side of a migration that gives a machine away. Times are microseconds from any moment on.
#[wasm_bindgen]
pub struct MigrationSource(migration::Source);

#[wasm_bindgen]
impl MigrationSource {
    /// Begins to give `machine` away. `id` and `release` are random numbers.
    ///
    /// # Errors
    /// What is wrong with the options, or there is no memory for it.
    #[wasm_bindgen(constructor)]
    pub fn new(
        machine: &mut Machine,
        options: JsMigrationOptions,
        id: u64,
        release: u64,
        now: f64,
    ) -> Result<MigrationSource, String> {
        let options = parse_migration(options)?;
        migration::Source::new(&mut machine.0, &options, id, release, now as u64)
            .map(MigrationSource)
    }

    /// Takes bytes that arrived.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.0.receive(bytes);
    }

    /// Nothing arrives any more.
    pub fn closed(&mut self) {
        self.0.closed();
    }

    /// Bytes to send, at most `most`: they count as sent.
    pub fn take_output(&mut self, most: usize) -> Uint8Array {
        Uint8Array::from(self.0.take_output(most).as_slice())
    }

    /// What to do next, at `now`.
    ///
    /// # Errors
    /// None.
    pub fn poll(&mut self, machine: &mut Machine, now: f64) -> Result<JsMigrationNext, String> {
        to_js(&self.0.poll(&mut machine.0, now as u64))
    }

    /// What was reached so far.
    ///
    /// # Errors
    /// None.
    pub fn report(&self) -> Result<JsMigrationReport, String> {
        to_js(&self.0.report())
    }

    /// Gives up, where the machine is still this side's: true then.
    pub fn cancel(&mut self) -> bool {
        self.0.cancel()
    }

    /// Serial output that is to be shown first when the machine goes on here.
    pub fn take_serial(&mut self) -> Uint8Array {
        Uint8Array::from(self.0.take_serial().as_slice())
    }

    /// The release code: told only when the machine is given up here.
    pub fn code(&self) -> String {
        self.0.code()
    }

    /// Whether this is the other side's release code.
    pub fn is_other_code(&self, text: &str) -> bool {
        self.0.is_other_code(text)
    }
}

/// The side of a migration that takes a machine. Times are microseconds from any moment on.
#[wasm_bindgen]
pub struct MigrationDestination(migration::Arrival);

#[wasm_bindgen]
impl MigrationDestination {
    /// Waits for a machine. `release` is a random number.
    ///
    /// # Errors
    /// What is wrong with the options.
    #[wasm_bindgen(constructor)]
    pub fn new(options: JsMigrationOptions, release: u64) -> Result<MigrationDestination, String> {
        let options = parse_migration(options)?;
        let arrival = migration::Arrival::new(&options, release);
        Ok(MigrationDestination(arrival))
    }

    /// Takes bytes that arrived.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.0.receive(bytes);
    }

    /// Nothing arrives any more.
    pub fn closed(&mut self) {
        self.0.closed();
    }

    /// Bytes to send, at most `most`: they count as sent.
    pub fn take_output(&mut self, most: usize) -> Uint8Array {
        Uint8Array::from(self.0.take_output(most).as_slice())
    }

    /// What to do next, at `now`.
    ///
    /// # Errors
    /// None.
    pub fn poll(&mut self, now: f64) -> Result<JsMigrationNext, String> {
        to_js(&self.0.poll(now as u64))
    }

    /// The machine, once it is this side's.
    pub fn take(&mut self) -> Option<Machine> {
        self.0.take().map(Machine)
    }

    /// Serial output of the guest that is to be shown first.
    pub fn take_serial(&mut self) -> Uint8Array {
        Uint8Array::from(self.0.take_serial().as_slice())
    }

    /// Gives up, where nothing can have been committed: true then.
    pub fn cancel(&mut self) -> bool {
        self.0.cancel()
    }

    /// The release code: told only when the machine is given up here.
    pub fn code(&self) -> String {
        self.0.code()
    }

    /// Whether this is the other side's release code.
    pub fn is_other_code(&self, text: &str) -> bool {
        self.0.is_other_code(text)
    }
}

fn parse_migration(options: JsMigrationOptions) -> Result<migration::Options, String> {
    serde_wasm_bindgen::from_value(options.into()).map_err(|error| format!("bad options: {error}"))
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
