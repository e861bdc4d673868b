// The page: one machine, its console, and the bar that starts and stops it.

import { MachineClient } from './client';
import { Console } from './console';
import { GREETING, guestFromFiles, HYPERVISOR, servedGuests } from './guests';
import type { Guest } from './protocol';
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
};

function update(change: Partial<State>): void {
  Object.assign(state, change);
  show(state, actions, bar, foot);
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
  update({ guest, booting: true, status: undefined, error: undefined, progress: undefined });
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

const actions: Actions = {
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
  const wanted = new URLSearchParams(location.search).get('guest');
  const guest = guests.find(({ name }) => name === (wanted ?? HYPERVISOR.name));
  if (guest) await boot(guest);
  else update({ error: `There is no guest ${wanted} here: choose another.`, guest: HYPERVISOR, booting: false });
}

start().catch((error: unknown) => update({ error: `The page could not start: ${(error as Error).message}`, booting: false }));
