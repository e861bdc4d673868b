// The page: one machine, its console, and the bar that starts and stops it.

import { MachineClient } from './client';
import { Console } from './console';
import { GREETING, guestFromFiles, HYPERVISOR, servedGuests } from './guests';
import { NOTHING_MIGRATES, type MigrateState } from './migrate-view';
import type { Guest, LinkTo } from './protocol';
import { askOpener, FOR_OPENER, openTab, Tabs } from './tabs';
import { type Actions, show, type State } from './view';

const element = (id: string): HTMLElement => document.getElementById(id) as HTMLElement;
const bar = element('bar');
const foot = element('foot');
const drop = element('drop');

const state: State = {
  guests: [HYPERVISOR, GREETING],
  guest: undefined,
  booting: true,
  progress: undefined,
  status: undefined,
  error: undefined,
  alone: false,
  migrate: NOTHING_MIGRATES,
};

function update(change: Partial<State>): void {
  Object.assign(state, change);
  show(state, actions, bar, foot);
}

function migrate(change: Partial<MigrateState>): void {
  update({ migrate: { ...state.migrate, ...change } });
}

const client = new MachineClient({
  serial: (bytes) => {
    const machine = client.current();
    const { length } = bytes;
    terminal.write(bytes, () => {
      if (client.current() === machine) client.shown(length);
    });
  },
  status: (status) => update({ status, booting: false, progress: undefined }),
  migration: (migration) => migrate({ migration }),
  arrived: (arrived) => {
    const name = `A machine from ${state.migrate.peer}`;
    const kernel = { from: 'elsewhere', name } as const;
    const guest = received ?? { name, kernel, cmdline: '', ...arrived };
    const others = state.guests.filter((one) => one.name !== guest.name);
    update({ guests: [...others, guest], guest, booting: false });
    terminal.focus();
  },
  progress: (name, loaded, total) => update({ progress: { name, loaded, total } }),
  broken: (error) => update({ error, status: undefined, booting: false, progress: undefined }),
});

const terminal = new Console(
  element('console'),
  (bytes) => client.input(bytes),
  () => element('toggle').focus(),
);

// ---- what the user can do ----

async function boot(guest: Guest): Promise<void> {
  if (guest.kernel.from === 'elsewhere') return update({ error: `${guest.name} cannot be built anew here: choose another guest.` });
  tabs.stop();
  update({ guest, booting: true, status: undefined, error: undefined, progress: undefined });
  migrate({ migration: undefined, waiting: false, ourCode: undefined });
  terminal.clear();
  const booted = client.boot(guest);
  const machine = client.current();
  terminal.focus();
  try {
    await booted;
  } catch (error) {
    if (client.current() === machine) update({ error: (error as Error).message, booting: false, progress: undefined });
  }
}

async function bootFiles(files: readonly File[]): Promise<void> {
  try {
    const guest = await guestFromFiles(files, state.guest, (file) => client.identify(file));
    // A guest made of files stays in the list, once per name.
    const others = state.guests.filter(({ name }) => name !== guest.name);
    update({ guests: [...others, guest], alone: false });
    await boot(guest);
  } catch (error) {
    update({ error: (error as Error).message });
  }
}

// ---- migration ----

/** What the other tab says that its machine was booted from. */
let received: Guest | undefined;

const tabs = new Tabs((waiting) => migrate({ tabs: waiting }));

async function send(peer: string, link: () => LinkTo | Promise<LinkTo>): Promise<void> {
  migrate({ open: true, migration: undefined, peer, ourCode: undefined });
  try {
    await client.send(await link(), { token: state.migrate.token });
  } catch (error) {
    update({ error: (error as Error).message });
  }
}

async function receive(peer: string, link: LinkTo, guest: Guest | undefined): Promise<void> {
  received = guest;
  tabs.stop();
  update({ error: undefined, progress: undefined, status: undefined });
  migrate({ open: true, waiting: false, migration: undefined, peer, ourCode: undefined });
  terminal.clear();
  try {
    await client.receive(link, { token: state.migrate.token });
  } catch (error) {
    update({ error: (error as Error).message });
  }
}

/** What another tab can boot too: a guest of files goes along as well. */
const portable = (): Guest | undefined => (state.guest?.kernel.from === 'elsewhere' ? undefined : state.guest);

const actions: Actions = {
  migrate,
  sendToTab() {
    const tab = state.migrate.tabs.find(({ id }) => id === state.migrate.tab) ?? state.migrate.tabs[0];
    if (!tab) return;
    void send('another tab', async () => ({ via: 'channel', name: await tabs.call(tab.id, portable()) }));
  },
  sendToNewTab() {
    void send('a new tab', async () => ({ via: 'port', port: await openTab(portable()) }));
  },
  sendToAddress() {
    const url = state.migrate.address;
    void send(url, () => ({ via: 'socket', url }));
  },
  receiveFromTab() {
    if (state.migrate.waiting) {
      tabs.stop();
      return migrate({ waiting: false });
    }
    const title = `Tab opened at ${new Date(performance.timeOrigin).toLocaleTimeString()}`;
    tabs.wait(title, ({ channel, guest }) => void receive('another tab', { via: 'channel', name: channel }, guest));
    migrate({ waiting: true, open: true });
  },
  receiveFromAddress() {
    const url = state.migrate.address;
    void receive(url, { via: 'socket', url }, undefined);
  },
  cancelMigration() {
    client.cancel();
  },
  settle(how) {
    const code = how === 'with-code' ? state.migrate.theirCode : undefined;
    client.settle(how !== 'give-up', code).then(
      (ourCode) => migrate({ ourCode }),
      (error: unknown) => update({ error: (error as Error).message }),
    );
  },
  toggle() {
    if (state.status?.state === 'running') client.pause();
    else if (state.status?.state === 'paused') client.run();
    else actions.reset();
  },
  reset() {
    if (state.guest) void boot(state.guest);
  },
  choose(guest) {
    void boot(guest);
  },
  edit(change) {
    if (state.guest) update({ guest: { ...state.guest, ...change } });
  },
  open() {
    const input = document.createElement('input');
    input.type = 'file';
    input.multiple = true;
    input.onchange = () => void bootFiles([...(input.files ?? [])]);
    input.click();
  },
  dismiss() {
    update({ error: undefined });
  },
};

// ---- files dropped anywhere on the page ----

const holdsFiles = (event: DragEvent): boolean => event.dataTransfer?.types.includes('Files') ?? false;

addEventListener('dragover', (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  drop.hidden = false;
});
addEventListener('dragleave', (event) => {
  if (event.relatedTarget === null) drop.hidden = true;
});
addEventListener('drop', (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  drop.hidden = true;
  void bootFiles([...(event.dataTransfer?.files ?? [])]);
});

addEventListener('keydown', (event) => {
  // From the console the key comes by way of `leave`.
  if (event.key === 'F6' && !element('console').contains(event.target as Node)) {
    event.preventDefault();
    terminal.focus();
  }
});

// ---- a running guest first, not a form: the hypervisor, or the one that `?guest=NAME` names ----

async function start(): Promise<void> {
  update({});
  const [served] = await Promise.all([servedGuests(), terminal.open()]);
  const guests = [HYPERVISOR, ...served, GREETING];
  update({ guests, alone: served.length === 0 });
  const query = new URLSearchParams(location.search);
  if (query.get('receive') === FOR_OPENER) {
    // A reload finds nobody who would give a machine again.
    history.replaceState(undefined, '', location.pathname);
    const { port, guest } = await askOpener();
    return receive('the tab that opened this one', { via: 'port', port }, guest);
  }
  const wanted = query.get('guest');
  const guest = guests.find(({ name }) => name === (wanted ?? HYPERVISOR.name));
  if (guest) await boot(guest);
  else update({ error: `There is no guest ${wanted} here: choose another.`, guest: HYPERVISOR, booting: false });
}

start().catch((error: unknown) => update({ error: `The page could not start: ${(error as Error).message}`, booting: false }));
