// Both sides of a migration in the Worker: what the protocol says is done on a link, and with the machine.

import { type Machine, MigrationDestination, MigrationSource } from '../../pkg/hypernest_wasm.js';
import { connect, type Link } from './link';
import type { LinkTo, Migration, MigrationOptions } from './protocol';

/** Bytes handed to a link at once. A program takes messages of 256 KiB at most. */
const CHUNK = 128 * 1024;

/** What becomes of the machine now. */
export type Step =
  | { readonly kind: 'run' }
  | { readonly kind: 'wait'; readonly ms: number }
  /** It is this tab's: shown before it goes on. */
  | { readonly kind: 'ours'; readonly serial: Uint8Array<ArrayBuffer> }
  /** It is the other side's. */
  | { readonly kind: 'theirs' }
  /** There is none. */
  | { readonly kind: 'none' }
  /** It stands still until somebody settles whose it is. */
  | { readonly kind: 'undecided' };

/** What both sides have in common. */
interface Protocol {
  receive(bytes: Uint8Array): void;
  closed(): void;
  take_output(most: number): Uint8Array;
  take_serial(): Uint8Array;
  cancel(): boolean;
  code(): string;
  is_other_code(text: string): boolean;
  free(): void;
}

const micros = (): number => performance.now() * 1000;

function random(): bigint {
  return crypto.getRandomValues(new BigUint64Array(1))[0] as bigint;
}

abstract class Moving<P extends Protocol> {
  protected protocol: P | undefined;
  protected readonly link: Link;
  /** What arrived before the protocol was there. */
  private early: Uint8Array[] = [];
  protected linkEnded: string | undefined;
  /** The other side is known not to exist any more. */
  protected gone = false;
  protected over = false;

  constructor(
    to: LinkTo,
    private readonly side: 'source' | 'destination',
    wake: () => void,
  ) {
    this.link = connect(to, side === 'source' ? 'gives' : 'takes', {
      open: () => {
        this.opened = true;
        wake();
      },
      bytes: (bytes) => {
        if (this.protocol) this.protocol.receive(bytes);
        else this.early.push(bytes);
        wake();
      },
      closed: (reason, gone) => {
        this.linkEnded = reason;
        this.gone = gone;
        this.protocol?.closed();
        wake();
      },
    });
  }

  protected opened = false;

  protected begin(protocol: P): P {
    for (const bytes of this.early) protocol.receive(bytes);
    this.early = [];
    if (this.linkEnded !== undefined) protocol.closed();
    this.protocol = protocol;
    return protocol;
  }

  /** Hands to the link what it takes. */
  protected pump(): void {
    while (this.protocol && this.link.ready) {
      const bytes = this.protocol.take_output(CHUNK);
      if (bytes.length === 0) return;
      this.link.send(bytes as Uint8Array<ArrayBuffer>);
    }
  }

  protected end(): void {
    this.over = true;
    this.pump();
    this.link.close();
  }

  protected report(phase: Migration['phase'], more: Partial<Migration> = {}): Migration {
    return { side: this.side, phase, reasons: [], ...more };
  }

  /** What the guest had sent and nobody has shown yet. */
  takeSerial(): Uint8Array<ArrayBuffer> {
    return (this.protocol?.take_serial() ?? new Uint8Array()) as Uint8Array<ArrayBuffer>;
  }

  /** Whether this is the code by which the other side says that it has given up the machine. */
  isOtherCode(text: string): boolean {
    return this.protocol?.is_other_code(text) ?? false;
  }

  /** The code by which this side says that it has given up the machine. */
  code(): string {
    return this.protocol?.code() ?? '';
  }

  /** Nothing is moved any more, and nothing is told. */
  free(): void {
    if (!this.over) this.link.close();
    this.over = true;
    this.protocol?.free();
    this.protocol = undefined;
  }
}

/** Gives the machine away. */
export class Leaving extends Moving<MigrationSource> {
  migration: Migration = this.report('connecting');

  constructor(
    to: LinkTo,
    private readonly options: MigrationOptions,
    wake: () => void,
  ) {
    super(to, 'source', wake);
  }

  step(machine: Machine): Step {
    if (!this.protocol) {
      if (this.opened) {
        this.begin(new MigrationSource(machine, this.options, random(), random(), micros()));
      } else if (this.linkEnded !== undefined) {
        return this.stay([this.linkEnded]);
      } else {
        return { kind: 'run' };
      }
    }
    const protocol = this.protocol as MigrationSource;
    this.pump();
    const next = protocol.poll(machine, micros());
    this.pump();
    this.migration = this.report('moving', protocol.report());
    switch (next.do) {
      case 'run':
        return { kind: 'run' };
      case 'wait':
        return { kind: 'wait', ms: next.micros / 1000 };
      case 'failed':
        return this.stay(next.reasons);
      case 'handed-over':
        this.end();
        this.migration = this.report('done', protocol.report());
        return { kind: 'theirs' };
      case 'undecided':
        // The other tab is gone, and its machine with it. One that is not yet may still end.
        if (this.gone) return this.stay(next.reasons);
        this.migration = this.report('undecided', { ...protocol.report(), reasons: next.reasons });
        return { kind: 'undecided' };
      case 'own':
        return { kind: 'wait', ms: 0 }; // a source is not told so
    }
  }

  private stay(reasons: string[]): Step {
    this.end();
    this.migration = this.report('failed', { reasons });
    return { kind: 'ours', serial: this.takeSerial() };
  }

  /** Gives up, where the machine is still this tab's. */
  cancel(): void {
    if (this.protocol) this.protocol.cancel();
    else this.linkEnded = 'given up';
  }
}

/** Takes a machine. */
export class Arriving extends Moving<MigrationDestination> {
  migration: Migration = this.report('connecting');
  private bytes = 0;

  constructor(
    to: LinkTo,
    private readonly options: MigrationOptions,
    wake: () => void,
  ) {
    super(to, 'destination', wake);
  }

  step(): Step {
    if (!this.protocol) {
      if (this.opened) {
        this.begin(new MigrationDestination(this.options, random()));
      } else if (this.linkEnded !== undefined) {
        return this.nothing([this.linkEnded]);
      } else {
        return { kind: 'wait', ms: 100 };
      }
    }
    const protocol = this.protocol as MigrationDestination;
    const next = protocol.poll(micros());
    this.pump();
    this.migration = this.report('moving', { bytes: this.bytes });
    switch (next.do) {
      case 'wait':
      case 'run':
        return { kind: 'wait', ms: next.do === 'wait' ? next.micros / 1000 : 0 };
      case 'failed':
        return this.nothing(next.reasons);
      case 'own':
        return { kind: 'ours', serial: this.takeSerial() };
      case 'undecided':
        this.migration = this.report('undecided', { reasons: next.reasons });
        // The source is gone before it told whether it gave the machine away: there is no other.
        return this.gone ? { kind: 'ours', serial: this.takeSerial() } : { kind: 'undecided' };
      case 'handed-over':
        return { kind: 'wait', ms: 0 }; // a destination is not told so
    }
  }

  /** The machine, once it is this tab's; the source is told so. */
  take(): Machine | undefined {
    const machine = this.protocol?.take();
    if (!this.over) this.end();
    this.migration = this.report('done');
    return machine;
  }

  private nothing(reasons: string[]): Step {
    this.end();
    this.migration = this.report('failed', { reasons });
    return { kind: 'none' };
  }

  /** Gives up, where the machine cannot be this tab's yet. */
  cancel(): void {
    if (this.protocol) this.protocol.cancel();
    else this.linkEnded = 'given up';
  }
}
