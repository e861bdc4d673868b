// What the page shows above and below the console, as a function of one state.

import { html, nothing, render, svg, type TemplateResult } from 'lit-html';
import { live } from 'lit-html/directives/live.js';
import { type MigrateActions, type MigrateState, migrateSection } from './migrate-view';
import type { Guest, Status, Vmx } from './protocol';

const MIB = 1024 * 1024;
const MEMORY_CHOICES = [64, 128, 256, 512, 1024, 2048, 3072].map((mib) => mib * MIB);
const CPU_CHOICES = [1, 2, 4];
const VMX_CHOICES: readonly Vmx[] = ['none', 'kvm', 'max'];
/** Below this share of the wall time spent executing, the guest counts as idle. */
const IDLE_LOAD = 0.03;

export interface Progress {
  readonly name: string;
  readonly loaded: number;
  readonly total: number | undefined;
}

export interface State {
  /** Guests to choose from. */
  guests: Guest[];
  /** The one chosen, as the fields have edited it. */
  guest: Guest | undefined;
  /** A machine is being built. */
  booting: boolean;
  progress: Progress | undefined;
  /** Of the machine, once there is one. */
  status: Status | undefined;
  error: string | undefined;
  /** Only the built-in guests are here: say what else can be done. */
  alone: boolean;
  migrate: MigrateState;
}

export interface Actions extends MigrateActions {
  toggle(): void;
  reset(): void;
  choose(guest: Guest): void;
  edit(change: Partial<Guest>): void;
  open(): void;
  dismiss(): void;
}

export function show(state: State, actions: Actions, bar: HTMLElement, foot: HTMLElement): void {
  const migrate = migrateSection(state.migrate, state.status?.state, actions);
  render([header(state, actions), controls(state, actions), options(state, actions), migrate, notices(state, actions)], bar);
  render(footer(state), foot);
  document.documentElement.dataset['state'] = condition(state).word;
}

function header(state: State, actions: Actions): TemplateResult {
  return html`<header>
    <h1>${logo} Hypernest</h1>
    <p class="tagline">An x86-64 machine in this tab</p>
    <label class="field guest">
      <span>Guest</span>
      <select
        @change=${(event: Event) => {
          const guest = state.guests[(event.target as HTMLSelectElement).selectedIndex];
          if (guest) actions.choose(guest);
        }}
      >
        ${state.guests.map((guest) => html`<option ?selected=${guest.name === state.guest?.name}>${guest.name}</option>`)}
      </select>
    </label>
    <button class="plain" @click=${actions.open}>Open files…</button>
  </header>`;
}

function controls(state: State, actions: Actions): TemplateResult {
  const running = state.status?.state === 'running';
  const { word, text } = condition(state);
  /** Neither here nor gone: what a Start would end. */
  const away = state.status?.state === 'receiving' || state.status?.state === 'undecided';
  const { instructions = 0, exits = 0, ticks = 0, mips = 0 } = state.status ?? {};
  const verb = running ? 'Pause' : state.status?.state === 'paused' ? 'Resume' : 'Start';
  return html`<div class="controls" role="toolbar" aria-label="Machine">
    <button class="primary" id="toggle" ?disabled=${state.booting || !state.guest || away} @click=${actions.toggle}>
      ${running ? pauseIcon : playIcon}<span>${verb}</span>
    </button>
    <button id="reset" ?disabled=${!state.guest || state.guest.kernel.from === 'elsewhere'} @click=${actions.reset}>${resetIcon}<span>Reset</span></button>
    <span class="state" role="status" data-word=${word}>${text}</span>
    <dl>
      ${metric('Speed', mips > 0 ? `${mips.toFixed(mips < 10 ? 1 : 0)} MIPS` : '–', 'speed')}
      ${metric('Instructions', count(instructions), 'instructions', instructions)}
      ${(state.guest?.vmx ?? 'none') !== 'none' ? metric('VM exits', count(exits), 'exits', exits) : nothing}
      ${metric('Guest time', seconds(ticks), 'time')}
    </dl>
  </div>`;
}

function options(state: State, actions: Actions): TemplateResult {
  const { cmdline = '', memory = 0, cpus = 1, vmx = 'none' } = state.guest ?? {};
  const memories = [...new Set([...MEMORY_CHOICES, memory])].filter((m) => m > 0).sort((a, b) => a - b);
  return html`<form
    class="options"
    @submit=${(event: Event) => {
      event.preventDefault();
      actions.reset();
    }}
  >
    <label class="field cmdline">
      <span>Command line</span>
      <input
        id="cmdline"
        type="text"
        spellcheck="false"
        autocomplete="off"
        autocapitalize="off"
        .value=${live(cmdline)}
        @input=${(event: Event) => actions.edit({ cmdline: (event.target as HTMLInputElement).value })}
      />
    </label>
    <label class="field">
      <span>Memory</span>
      <select id="memory" @change=${(event: Event) => actions.edit({ memory: Number((event.target as HTMLSelectElement).value) })}>
        ${memories.map((bytes) => html`<option value=${bytes} ?selected=${bytes === memory}>${size(bytes)}</option>`)}
      </select>
    </label>
    <label class="field">
      <span>CPUs</span>
      <select id="cpus" @change=${(event: Event) => actions.edit({ cpus: Number((event.target as HTMLSelectElement).value) })}>
        ${[...new Set([...CPU_CHOICES, cpus])].map((n) => html`<option value=${n} ?selected=${n === cpus}>${n}</option>`)}
      </select>
    </label>
    <label class="field">
      <span>VMX</span>
      <select id="vmx" @change=${(event: Event) => actions.edit({ vmx: (event.target as HTMLSelectElement).value as Vmx })}>
        ${VMX_CHOICES.map((choice) => html`<option value=${choice} ?selected=${choice === vmx}>${choice}</option>`)}
      </select>
    </label>
    <button type="submit" title="Build the machine anew with these settings and start it">Boot</button>
  </form>`;
}

function notices(state: State, actions: Actions): TemplateResult {
  const stop = state.status?.state === 'stopped' ? state.status.stop : undefined;
  return html`${state.progress ? progressBar(state.progress) : nothing}
    ${state.error
      ? html`<div class="notice error" role="alert">
          <span>${state.error}</span><button class="plain" aria-label="Dismiss" @click=${actions.dismiss}>✕</button>
        </div>`
      : nothing}
    ${stop ? html`<div class="notice" id="stop">${stop.message} Start builds the machine anew.</div>` : nothing}`;
}

function progressBar({ name, loaded, total }: Progress): TemplateResult {
  const done = total ? `${size(loaded)} of ${size(total)}` : size(loaded);
  return html`<div class="notice progress">
    <span>Fetching ${name}: ${done}</span>
    <progress .value=${total ? loaded / total : 0} ?indeterminate=${!total}></progress>
  </div>`;
}

function footer(state: State): TemplateResult {
  return html`<p>
    ${state.alone
      ? html`No guest images are served beside this page: drop a Linux kernel here, with an initial RAM disk.`
      : html`Drop a kernel (bzImage, ELF) or an initial RAM disk on the page to boot it.`}
    <span class="keys"><kbd>F6</kbd> moves between console and controls.</span>
  </p>`;
}

/** The machine's condition in one word (for style sheets and tests) and as text. */
function condition({ booting, status }: State): { word: string; text: string } {
  if (booting) return { word: 'booting', text: 'Loading' };
  switch (status?.state) {
    case 'running':
      return status.load < IDLE_LOAD ? { word: 'idle', text: 'Idle' } : { word: 'running', text: 'Running' };
    case 'paused':
      return { word: 'paused', text: 'Paused' };
    case 'receiving':
      return { word: 'receiving', text: 'Waiting for a machine' };
    case 'undecided':
      return { word: 'undecided', text: 'Undecided' };
    case 'stopped':
      return { word: 'stopped', text: STOPPED[status.stop?.kind ?? ''] ?? 'Stopped' };
    default:
      return { word: 'off', text: 'Off' };
  }
}

const STOPPED: Record<string, string> = {
  'power-off': 'Powered off',
  reset: 'Guest reset',
  'triple-fault': 'Triple fault',
  'vmx-abort': 'VMX abort',
  unimplemented: 'Not implemented',
  exit: 'Guest exited',
  failed: 'Failed',
  moved: 'Moved away',
};

function metric(name: string, text: string, id: string, exact?: number): TemplateResult {
  return html`<div><dt>${name}</dt><dd id=${id} data-value=${exact ?? text}>${text}</dd></div>`;
}

function count(n: number): string {
  if (n < 1e6) return n.toLocaleString('en');
  return n < 1e9 ? `${(n / 1e6).toFixed(1)} M` : `${(n / 1e9).toFixed(2)} G`;
}

function seconds(ticks: number): string {
  const s = ticks / 1e9;
  return s < 60 ? `${s.toFixed(1)} s` : `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
}

function size(bytes: number): string {
  if (bytes < MIB) return `${Math.ceil(bytes / 1024)} KiB`;
  const mib = bytes / MIB;
  if (mib < 1024) return `${Number.isInteger(mib) ? mib : mib.toFixed(1)} MiB`;
  return `${Number((mib / 1024).toFixed(2))} GiB`;
}

const icon = (path: TemplateResult) => html`<svg viewBox="0 0 16 16" width="14" height="14" aria-hidden="true">${path}</svg>`;
const playIcon = icon(svg`<path d="M4 2.5v11l9-5.5z" fill="currentColor" />`);
const pauseIcon = icon(svg`<path d="M3.5 2.5h3v11h-3zM9.5 2.5h3v11h-3z" fill="currentColor" />`);
const resetIcon = icon(
  svg`<path d="M12.9 6A5.3 5.3 0 1 0 13.3 8.6M13.2 2.6V6.2H9.6" fill="none" stroke="currentColor" stroke-width="1.6" />`,
);
const logo = html`<svg viewBox="0 0 32 32" width="26" height="26" aria-hidden="true">
  <rect x="2" y="2" width="28" height="28" rx="7" fill="var(--accent)" />
  <rect x="8" y="8" width="16" height="16" rx="4" fill="none" stroke="var(--on-accent)" stroke-width="2.4" />
  <rect x="13.2" y="13.2" width="5.6" height="5.6" rx="1.4" fill="var(--on-accent)" />
</svg>`;
