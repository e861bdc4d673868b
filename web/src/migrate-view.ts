// The part of the bar that sends the machine away and lets one in.

import { html, nothing, type TemplateResult } from 'lit-html';
import { live } from 'lit-html/directives/live.js';
import type { Migration, RunState } from './protocol';
import type { WaitingTab } from './tabs';

export interface MigrateState {
  /** The section is open. */
  open: boolean;
  /** Other tabs that wait for a machine, and the one chosen. */
  tabs: WaitingTab[];
  tab: string | undefined;
  /** This tab waits for a call of another one. */
  waiting: boolean;
  /** Address of a program, and the token that it demands or shows. */
  address: string;
  token: string;
  migration: Migration | undefined;
  /** Where the other side is, in words. */
  peer: string;
  /** The other side's release code, as it is typed; and ours, once told. */
  theirCode: string;
  ourCode: string | undefined;
}

export const NOTHING_MIGRATES: MigrateState = {
  open: false,
  tabs: [],
  tab: undefined,
  waiting: false,
  address: 'ws://127.0.0.1:9000',
  token: '',
  migration: undefined,
  peer: '',
  theirCode: '',
  ourCode: undefined,
};

export interface MigrateActions {
  migrate(change: Partial<MigrateState>): void;
  sendToTab(): void;
  sendToNewTab(): void;
  sendToAddress(): void;
  receiveFromTab(): void;
  receiveFromAddress(): void;
  cancelMigration(): void;
  settle(how: 'give-up' | 'with-code' | 'alone'): void;
}

export function migrateSection(
  state: MigrateState,
  machine: RunState | undefined,
  actions: MigrateActions,
): TemplateResult {
  const alive = machine === 'running' || machine === 'paused';
  const moving = state.migration?.phase === 'connecting' || state.migration?.phase === 'moving';
  const tab = state.tabs.find(({ id }) => id === state.tab) ?? state.tabs[0];
  return html`<details
    id="migrate"
    class="migrate"
    ?open=${state.open}
    @toggle=${(event: Event) => {
      const { open } = event.target as HTMLDetailsElement;
      if (open !== state.open) actions.migrate({ open });
    }}
  >
    <summary>Migrate</summary>
    <div class="ways">
      <fieldset>
        <legend>Another tab</legend>
        <select
          id="tabs"
          aria-label="Tabs that wait for a machine"
          ?disabled=${state.tabs.length === 0}
          @change=${(event: Event) => actions.migrate({ tab: (event.target as HTMLSelectElement).value })}
        >
          ${state.tabs.length === 0 ? html`<option>no tab waits</option>` : nothing}
          ${state.tabs.map(({ id, title }) => html`<option value=${id} ?selected=${id === tab?.id}>${title}</option>`)}
        </select>
        <button id="send-tab" ?disabled=${!alive || moving || !tab} @click=${actions.sendToTab}>Send</button>
        <button id="send-new-tab" ?disabled=${!alive || moving} @click=${actions.sendToNewTab}>Send to a new tab</button>
        <button id="receive-tab" aria-pressed=${state.waiting} ?disabled=${moving} @click=${actions.receiveFromTab}>
          ${state.waiting ? 'Stop waiting' : 'Receive'}
        </button>
      </fieldset>
      <fieldset>
        <legend>A program</legend>
        <input
          id="address"
          type="text"
          aria-label="Address"
          spellcheck="false"
          autocomplete="off"
          .value=${live(state.address)}
          @input=${(event: Event) => actions.migrate({ address: (event.target as HTMLInputElement).value })}
        />
        <input
          id="token"
          type="password"
          aria-label="Token"
          placeholder="token"
          autocomplete="off"
          .value=${live(state.token)}
          @input=${(event: Event) => actions.migrate({ token: (event.target as HTMLInputElement).value })}
        />
        <button id="send-address" ?disabled=${!alive || moving} @click=${actions.sendToAddress}>Send</button>
        <button id="receive-address" ?disabled=${moving} @click=${actions.receiveFromAddress}>Receive</button>
      </fieldset>
    </div>
    ${state.migration ? progress(state, state.migration, moving, actions) : nothing}
  </details>`;
}

function progress(state: MigrateState, migration: Migration, moving: boolean, actions: MigrateActions): TemplateResult {
  const { side, phase, reasons, rounds, pages, bytes, rate, share, downtime } = migration;
  return html`<div class="migration" id="migration" data-phase=${phase} data-side=${side}>
    <p role="status">
      <span id="migration-text">${words(migration, state.peer)}</span>
      ${moving ? html`<button id="cancel" @click=${actions.cancelMigration}>Give up</button>` : nothing}
    </p>
    <dl>
      ${figure('Owner', owner(migration, state.peer), 'owner')}
      ${side === 'source' && rounds !== undefined ? figure('Rounds', String(rounds), 'rounds') : nothing}
      ${pages !== undefined ? figure('Pages', pages.toLocaleString('en'), 'pages') : nothing}
      ${bytes !== undefined ? figure('Sent', mebibytes(bytes), 'bytes') : nothing}
      ${rate !== undefined && moving ? figure('Link', `${mebibytes(rate)}/s`, 'rate') : nothing}
      ${share !== undefined && share < 100 && moving ? figure('Guest', `${share} %`, 'share') : nothing}
      ${phase === 'done' && downtime ? figure('Downtime', `${(downtime / 1000).toFixed(1)} ms`, 'downtime', downtime) : nothing}
    </dl>
    ${reasons.length > 0
      ? html`<ul id="reasons">${reasons.map((reason) => html`<li>${reason}</li>`)}</ul>`
      : nothing}
    ${phase === 'undecided' ? settlement(state, actions) : nothing}
    ${state.ourCode === undefined
      ? nothing
      : html`<p>The machine was given up here. The other side may keep its own with the release code <code id="our-code">${state.ourCode}</code>.</p>`}
  </div>`;
}

function settlement(state: MigrateState, actions: MigrateActions): TemplateResult {
  return html`<p>
      The link broke as the machine changed hands. It stands still here until you say whose it is: one side gives it up, and
      tells the other its release code.
    </p>
    <p class="settle">
      <button id="give-up" @click=${() => actions.settle('give-up')}>Give it up here</button>
      <input
        id="their-code"
        type="text"
        aria-label="The other side's release code"
        placeholder="the other side's release code"
        .value=${live(state.theirCode)}
        @input=${(event: Event) => actions.migrate({ theirCode: (event.target as HTMLInputElement).value })}
      />
      <button id="keep" ?disabled=${state.theirCode.trim() === ''} @click=${() => actions.settle('with-code')}>Keep it here</button>
      <button id="keep-alone" @click=${() => actions.settle('alone')}>Keep it here: the other side is gone for good</button>
    </p>`;
}

function words({ side, phase }: Migration, peer: string): string {
  const source = side === 'source';
  switch (phase) {
    case 'connecting':
      return source ? `Looking for ${peer}` : `Waiting for ${peer}`;
    case 'moving':
      return source ? `On its way to ${peer}; it runs here meanwhile` : `On its way here from ${peer}`;
    case 'done':
      return source ? `The machine went to ${peer}` : `The machine came from ${peer}`;
    case 'failed':
      return source ? `It stays here: it could not go to ${peer}` : `No machine came from ${peer}`;
    case 'undecided':
      return `It is not known whether the machine is here or at ${peer}`;
  }
}

function owner({ side, phase }: Migration, peer: string): string {
  if (phase === 'undecided') return 'undecided';
  const here = (side === 'source') !== (phase === 'done');
  if (here) return 'this tab';
  return side === 'destination' && phase === 'failed' ? '–' : peer;
}

function figure(name: string, text: string, id: string, exact?: number): TemplateResult {
  return html`<div><dt>${name}</dt><dd id="migration-${id}" data-value=${exact ?? text}>${text}</dd></div>`;
}

function mebibytes(bytes: number): string {
  const mib = bytes / 1024 / 1024;
  return mib < 10 ? `${mib.toFixed(1)} MiB` : `${Math.round(mib)} MiB`;
}
