// The machine's Worker: one machine, run in slices of at most 8 ms. Between slices the Worker yields
// through a MessageChannel, so that input is taken at once.

import init, { check_kernel, check_options, is_initrd, Machine } from '../../pkg/hypernest_wasm.js';
import wasmUrl from '../../pkg/hypernest_wasm_bg.wasm?url';
import { Arriving, Leaving } from './migration';
import { type Budget, Pacer, TICKS_PER_MS } from './pacer';
import type {
  EventMessage,
  Guest,
  ImageKind,
  LinkTo,
  MigrationOptions,
  Reply,
  Request,
  RequestMessage,
  RunState,
  Source,
  StopReason,
  WorkerEvent,
} from './protocol';

/** Serial output on its way to the terminal beyond which the machine waits for the terminal. */
const SERIAL_WINDOW = 128 * 1024;
const STATUS_EVERY_MS = 100;
const LOAD_WINDOW_MS = 500;
/** Execution after which the speed is told. */
const SPEED_BUSY_MS = 250;
/** A shorter slice measures waking up, not execution. */
const SPEED_MIN_INSTRUCTIONS = 100_000;
/** The longest sleep of an idle guest; input ends a sleep. */
const MAX_SLEEP_MS = 100;
/** No kernel is larger; an initial RAM disk is known by its first bytes. */
const LARGEST_KERNEL = 1024 ** 3;

const ready = init({ module_or_path: wasmUrl });
const pacer = new Pacer();

let machine: Machine | undefined;
let generation = 0;
let state: RunState = 'paused';
let stop: StopReason | undefined;
let ticks = 0;
let instructions = 0;
let exits = 0;
let serialInFlight = 0;
/** The machine is on its way to the other side, or one to this tab. */
let leaving: Leaving | undefined;
let arriving: Arriving | undefined;

// ---- messages ----

self.onmessage = (event: MessageEvent<RequestMessage>) => {
  const { id, generation: wanted, ...request } = event.data;
  const answer = (reply: Reply) => post({ kind: 'reply', id, reply }, wanted);
  if (request.kind === 'boot' || request.kind === 'receive') {
    generation = wanted;
  } else if (request.kind !== 'identify' && wanted !== generation) {
    return answer({ ok: true }); // meant for a machine that is gone
  }
  handle(request, wanted).then(
    (value) => answer({ ok: true, value }),
    (error: unknown) => (isBreakdown(error) ? breakDown(error) : answer({ ok: false, error: readable(error) })),
  );
};

async function handle(request: Request, wanted: number): Promise<unknown> {
  await ready;
  switch (request.kind) {
    case 'boot':
      return boot(request.guest, wanted);
    case 'identify':
      return identifyFile(request.file);
    case 'run':
      if (machine && state === 'paused') {
        state = 'running';
        pacer.level(performance.now(), ticks);
        speed.begin();
        sendStatus();
        wake();
      }
      return undefined;
    case 'pause':
      if (state === 'running') {
        state = 'paused';
        sendStatus();
      }
      return undefined;
    case 'input':
      machine?.send_serial(request.bytes);
      wake();
      return undefined;
    case 'shown':
      serialInFlight -= request.bytes;
      wake();
      return undefined;
    case 'send':
      return send(request.link, request.options);
    case 'receive':
      return receive(request.link, request.options);
    case 'cancel':
      leaving?.cancel();
      arriving?.cancel();
      wake();
      return undefined;
    case 'settle':
      return settle(request.keep, request.code);
    case 'hash':
      return machine?.state_hash();
  }
}

function post(event: WorkerEvent, to = generation, transfer: Transferable[] = []): void {
  const message: EventMessage = { ...event, generation: to };
  self.postMessage(message, { transfer });
}

/** The machine reports errors as strings. */
function readable(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** A trap in the machine's own code, which must not be entered again. */
function isBreakdown(error: unknown): error is WebAssembly.RuntimeError {
  return error instanceof WebAssembly.RuntimeError;
}

function breakDown(error: WebAssembly.RuntimeError): void {
  state = 'stopped';
  post({ kind: 'broken', message: `The machine broke down (${error.message}). The browser's console says more.` });
}

// ---- booting ----

/** Nothing of the machine that was, nor of one on its way, stays. */
function drop(): void {
  leaving?.free();
  arriving?.free();
  leaving = arriving = undefined;
  machine?.free(); // its RAM first: two machines may not fit
  machine = undefined;
  state = 'paused';
  stop = undefined;
  ticks = instructions = exits = serialInFlight = 0;
}

async function boot(guest: Guest, wanted: number): Promise<void> {
  if (guest.kernel.from === 'elsewhere') throw `${guest.kernel.name}: its images are not here; choose another guest`;
  drop();

  const { memory, cpus, cmdline, vmx } = guest;
  const builtin = guest.kernel.from === 'builtin' ? { builtin: guest.kernel.name } : {};
  const options = { memory, cpus, cmdline, vmx, ...builtin };
  check_options(options); // before anything is fetched
  const kernel = await load(guest.kernel, wanted);
  const initrd = guest.initrd ? await load(guest.initrd, wanted) : undefined;
  if (wanted !== generation) return; // another boot overtook this one
  machine = new Machine(options, kernel, initrd);
  pacer.level(performance.now(), 0);
  speed.begin();
  state = 'running';
  sendStatus();
  wake();
}

async function identifyFile(file: Blob): Promise<ImageKind> {
  const bytes = async (blob: Blob) =>
    new Uint8Array(
      await blob.arrayBuffer().catch((error: unknown) => {
        throw `it cannot be read (${readable(error)}); is it a folder?`;
      }),
    );
  if (is_initrd(await bytes(file.slice(0, 512)))) return 'initrd';
  if (file.size > LARGEST_KERNEL) throw 'it is too large for a kernel (more than 1 GiB)';
  check_kernel(await bytes(file));
  return 'kernel';
}

/** Images of the guest booted last, so that a reset needs no network. */
const loaded = new Map<string, Uint8Array>();

async function load(source: Source, wanted: number): Promise<Uint8Array | undefined> {
  if (source.from === 'builtin' || source.from === 'elsewhere') return undefined;
  if (source.from === 'file') return new Uint8Array(await source.file.arrayBuffer());
  const known = loaded.get(source.url);
  if (known) return known;
  const bytes = await download(source.url, source.name, wanted);
  loaded.set(source.url, bytes);
  return bytes;
}

async function download(url: string, name: string, wanted: number): Promise<Uint8Array> {
  const response = await fetch(url).catch((error: unknown) => {
    throw `Cannot fetch ${name}: ${readable(error)}. Is the server still running?`;
  });
  if (!response.ok || !response.body) throw `Cannot fetch ${name}: the server answered ${response.status} ${response.statusText}`;
  const length = Number(response.headers.get('content-length'));
  const total = length > 0 && !response.headers.get('content-encoding') ? length : undefined;
  const parts: Uint8Array[] = [];
  let loadedBytes = 0;
  let reported = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    loadedBytes += value.length;
    if (loadedBytes - reported > 256 * 1024) {
      reported = loadedBytes;
      post({ kind: 'progress', name, loaded: loadedBytes, total }, wanted);
    }
  }
  const bytes = new Uint8Array(loadedBytes);
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

// ---- running ----

const channel = new MessageChannel();
channel.port1.onmessage = () => {
  scheduled = false;
  slice();
};
let scheduled = false;
let timer: ReturnType<typeof setTimeout> | undefined;

/** Run a slice as soon as waiting messages have been taken. */
function wake(): void {
  if (timer !== undefined) {
    clearTimeout(timer);
    timer = undefined;
  }
  if (!scheduled && (state === 'running' || leaving || arriving)) {
    scheduled = true;
    channel.port2.postMessage(0);
  }
}

function sleep(ms: number): void {
  timer ??= setTimeout(() => {
    timer = undefined;
    wake();
  }, ms);
}

function slice(): void {
  if (arriving && !arrive(arriving)) return;
  if (leaving && machine && !leave(leaving, machine)) return;
  if (!machine || state !== 'running' || serialInFlight > SERIAL_WINDOW) return;
  const begin = performance.now();
  const budget = pacer.plan(begin, ticks);
  if (budget && !run(machine, budget, begin)) return;
  if (budget && pacer.plan(performance.now(), ticks)) {
    wake();
  } else {
    const idle = machine.idle_ticks() / TICKS_PER_MS;
    sleep(leaving ? 1 : Math.max(1, Math.min(idle, MAX_SLEEP_MS)));
  }
  if (performance.now() - lastStatus > STATUS_EVERY_MS) sendStatus();
}

/** One slice. False when the machine cannot go on. */
function run(machine: Machine, budget: Budget, begin: number): boolean {
  let report;
  try {
    report = machine.run_slice(budget.ticks, budget.instructions);
  } catch (error) {
    if (isBreakdown(error)) breakDown(error);
    else stopWith({ kind: 'failed', message: readable(error) });
    return false;
  }
  const ms = performance.now() - begin;
  const executed = report.instructions - instructions;
  pacer.took(ms, executed);
  speed.add(executed, ms);
  ticks = report.ticks;
  instructions = report.instructions;
  exits = report.exits;

  show(machine.take_serial());
  if (report.stop) {
    stopWith(report.stop);
    return false;
  }
  return true;
}

/** Serial output goes to the console. */
function show(output: Uint8Array): void {
  if (output.length === 0) return;
  serialInFlight += output.length;
  post({ kind: 'serial', bytes: output }, generation, [output.buffer]);
}

function stopWith(reason: StopReason): void {
  state = 'stopped';
  stop = reason;
  sendStatus();
}

// ---- migration ----

function send(link: LinkTo, options: MigrationOptions): void {
  if (!machine || (state !== 'running' && state !== 'paused')) throw 'There is no machine that runs: start one first.';
  if (leaving) throw 'The machine is on its way already.';
  leaving = new Leaving(link, options, wake);
  wake();
}

function receive(link: LinkTo, options: MigrationOptions): void {
  drop();
  state = 'receiving';
  arriving = new Arriving(link, options, wake);
  sendStatus();
  wake();
}

/** Whether the machine may run now. */
function leave(moving: Leaving, machine: Machine): boolean {
  const step = moving.step(machine);
  switch (step.kind) {
    case 'run':
      if (state === 'running' && serialInFlight <= SERIAL_WINDOW) return true;
      sleep(1);
      break;
    case 'wait':
      later(step.ms);
      break;
    case 'ours':
      show(step.serial);
      leaving = undefined;
      tell(moving);
      moving.free();
      if (state === 'undecided') state = 'running';
      pacer.level(performance.now(), ticks);
      sendStatus();
      wake();
      return false;
    case 'theirs':
      tell(moving);
      drop();
      stopWith({ kind: 'moved', message: 'The machine runs elsewhere now.' });
      return false;
    default:
      tell(moving);
      state = 'undecided';
      return sendStatus(), false;
  }
  if (performance.now() - lastStatus > STATUS_EVERY_MS) {
    tell(moving);
    sendStatus();
  }
  return false;
}

/** Whether the machine is here now. */
function arrive(moving: Arriving): boolean {
  const step = moving.step();
  switch (step.kind) {
    case 'wait':
      if (performance.now() - lastStatus > STATUS_EVERY_MS) {
        tell(moving);
        sendStatus();
      }
      later(step.ms);
      return false;
    case 'ours':
      adopt(moving, step.serial);
      return true;
    case 'undecided':
      tell(moving);
      state = 'undecided';
      sendStatus();
      return false;
    default:
      tell(moving);
      drop();
      stopWith({ kind: 'failed', message: 'No machine has come.' });
      return false;
  }
}

/** The machine that has come is this tab's. */
function adopt(moving: Arriving, serial: Uint8Array): void {
  const came = moving.take();
  arriving = undefined;
  tell(moving);
  moving.free();
  if (!came) return stopWith({ kind: 'failed', message: 'No machine has come.' });
  machine = came;
  post({ kind: 'arrived', arrived: came.summary() });
  show(serial);
  const report = came.run_slice(0, 0); // where it is
  ({ ticks, instructions, exits } = report);
  pacer.level(performance.now(), ticks);
  speed.begin();
  state = 'running';
  sendStatus();
  wake();
}

function settle(keep: boolean, code: string | undefined): string | undefined {
  const moving = leaving ?? arriving;
  if (state !== 'undecided' || !moving) throw 'There is nothing to settle.';
  if (!keep) {
    const ours = moving.code();
    drop();
    stopWith({ kind: 'moved', message: 'The machine was given up here.' });
    return ours;
  }
  if (code !== undefined && !moving.isOtherCode(code)) throw 'This is not the release code of the other side.';
  if (moving instanceof Arriving) {
    adopt(moving, moving.takeSerial());
  } else {
    show(moving.takeSerial());
    leaving = undefined;
    moving.free();
    pacer.level(performance.now(), ticks);
    state = 'running';
    sendStatus();
    wake();
  }
  return undefined;
}

function tell(moving: Leaving | Arriving): void {
  post({ kind: 'migration', migration: moving.migration });
}

function later(ms: number): void {
  if (ms < 1) wake();
  else sleep(ms);
}

// ---- status ----

/** Speed is measured over a stretch of execution, load over a stretch of wall time. */
class Speed {
  private since = 0;
  private busyMs = 0;
  private measuredMs = 0;
  private measured = 0;
  mips = 0;
  load = 1;

  /** The machine starts to run: taken as busy until it is known. */
  begin(): void {
    this.load = 1;
    this.since = performance.now();
    this.busyMs = 0;
  }

  add(instructions: number, ms: number): void {
    this.busyMs += ms;
    if (instructions < SPEED_MIN_INSTRUCTIONS) return;
    this.measuredMs += ms;
    this.measured += instructions;
    if (this.measuredMs > SPEED_BUSY_MS) {
      this.mips = this.measured / this.measuredMs / 1000;
      this.measuredMs = this.measured = 0;
    }
  }

  measureLoad(): void {
    const now = performance.now();
    if (now - this.since < LOAD_WINDOW_MS) return;
    this.load = Math.min(1, this.busyMs / (now - this.since));
    this.since = now;
    this.busyMs = 0;
  }
}

const speed = new Speed();
let lastStatus = 0;

function sendStatus(): void {
  lastStatus = performance.now();
  speed.measureLoad();
  post({
    kind: 'status',
    status: { state, ...(stop ? { stop } : {}), instructions, exits, ticks, mips: speed.mips, load: speed.load },
  });
}
