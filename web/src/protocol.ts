// What the page and the machine's Worker say to each other.
//
// A request carries an `id`, which its reply repeats, and the `generation` of the machine it is
// meant for. Booting starts a new generation; whatever still arrives from an older one is dropped,
// on both sides.

/** Where the bytes of an image come from. A Blob crosses to the Worker by reference, uncopied. */
export type Source =
  | { readonly from: 'url'; readonly name: string; readonly url: string }
  | { readonly from: 'file'; readonly name: string; readonly file: Blob }
  | { readonly from: 'builtin'; readonly name: Builtin }
  /** A machine that came from elsewhere: it cannot be built anew here. */
  | { readonly from: 'elsewhere'; readonly name: string };

/** A guest that the machine brings along. */
export type Builtin = 'hypervisor' | 'greeting';

/** VMX of the processor: none, what KVM offers its guests, or all that there is. */
export type Vmx = 'none' | 'kvm' | 'max';

/** A machine to build. */
export interface Guest {
  readonly name: string;
  readonly kernel: Source;
  readonly initrd?: Source;
  readonly cmdline: string;
  /** Bytes of guest RAM. */
  readonly memory: number;
  readonly cpus: number;
  readonly vmx: Vmx;
}

/** The other side of a migration: a program, or another tab. */
export type LinkTo =
  | { readonly via: 'socket'; readonly url: string }
  | { readonly via: 'port'; readonly port: MessagePort }
  | { readonly via: 'channel'; readonly name: string };

/** How a migration is to go. */
export interface MigrationOptions {
  /** What a source shows and a destination demands. */
  readonly token?: string;
}

/** How far a migration is. */
export interface Migration {
  readonly side: 'source' | 'destination';
  readonly phase: 'connecting' | 'moving' | 'done' | 'failed' | 'undecided';
  /** Why it failed, each in one line. */
  readonly reasons: readonly string[];
  readonly rounds?: number;
  readonly pages?: number;
  readonly bytes?: number;
  /** Bytes per second. */
  readonly rate?: number;
  /** The guest's share of the time, in percent. */
  readonly share?: number;
  /** For how long no machine ran, and all of it, in microseconds. */
  readonly downtime?: number;
  readonly micros?: number;
}

/** A machine that came from elsewhere, in a few words. */
export interface Arrived {
  readonly memory: number;
  readonly cpus: number;
  readonly vmx: Vmx;
}

export type Request =
  | { kind: 'boot'; guest: Guest }
  | { kind: 'run' }
  | { kind: 'pause' }
  | { kind: 'input'; bytes: Uint8Array }
  /** The terminal has shown this many bytes of serial output. */
  | { kind: 'shown'; bytes: number }
  /** What kind of image is this? An error says why it is none. */
  | { kind: 'identify'; file: Blob }
  /** The machine goes to the other side, and runs on meanwhile. */
  | { kind: 'send'; link: LinkTo; options: MigrationOptions }
  /** A machine comes in place of this one. */
  | { kind: 'receive'; link: LinkTo; options: MigrationOptions }
  /** Gives up the migration under way. */
  | { kind: 'cancel' }
  /**
   * Whose is the machine of an undecided migration? Kept with the other side's release code, or on the word that the
   * other side is gone; given up, the reply is this side's code.
   */
  | { kind: 'settle'; keep: boolean; code: string | undefined }
  /** A hash over the whole machine's state. */
  | { kind: 'hash' };

export type RequestMessage = Request & { id: number; generation: number };

/** What an image is, by its content. */
export type ImageKind = 'kernel' | 'initrd';

export type Reply =
  | { ok: true; value?: unknown }
  | { ok: false; error: string };

/** Why the machine does not run. */
export interface StopReason {
  /** Stable word: `power-off`, `reset`, `triple-fault`, `vmx-abort`, `unimplemented`, `exit`, `failed`, `moved`. */
  readonly kind: string;
  /** One readable line. */
  readonly message: string;
}

export type RunState = 'running' | 'paused' | 'stopped' | 'receiving' | 'undecided';

export interface Status {
  readonly state: RunState;
  readonly stop?: StopReason;
  /** Instructions retired since boot. */
  readonly instructions: number;
  /** VM exits since boot. */
  readonly exits: number;
  /** Guest time since boot, in ticks (ns). */
  readonly ticks: number;
  /** Million instructions per second of time spent executing; 0 until it is known. */
  readonly mips: number;
  /** Share of wall time spent executing, 0 to 1. */
  readonly load: number;
}

export type WorkerEvent =
  | { kind: 'reply'; id: number; reply: Reply }
  | { kind: 'serial'; bytes: Uint8Array }
  | { kind: 'status'; status: Status }
  /** The Worker can no longer be used. */
  | { kind: 'broken'; message: string }
  | { kind: 'migration'; migration: Migration }
  /** A machine has come from the other side and runs here. */
  | { kind: 'arrived'; arrived: Arrived }
  | { kind: 'progress'; name: string; loaded: number; total: number | undefined };

export type EventMessage = WorkerEvent & { generation: number };
