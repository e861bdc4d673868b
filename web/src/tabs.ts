// Which other tabs of this site wait for a machine, and how two of them agree on a channel.

import type { Guest } from './protocol';

/** A tab that waits. */
export interface WaitingTab {
  readonly id: string;
  readonly title: string;
}

/** What a tab that waits is called with. */
export interface Call {
  /** The BroadcastChannel to use. */
  readonly channel: string;
  /** What the caller says that its machine was booted from. */
  readonly guest: Guest | undefined;
}

type Message =
  /** Who waits? */
  | { kind: 'who' }
  | { kind: 'waiting'; tab: WaitingTab }
  | { kind: 'not-waiting'; id: string }
  | { kind: 'call'; id: string; call: Call }
  | { kind: 'answer'; channel: string };

const ANSWER_MS = 3000;

export class Tabs {
  private readonly channel = new BroadcastChannel('hypernest tabs');
  private readonly id = crypto.randomUUID();
  private readonly waiting = new Map<string, WaitingTab>();
  private called: ((call: Call) => void) | undefined;
  private title = '';
  private answered: ((channel: string) => void) | undefined;

  constructor(private readonly changed: (tabs: WaitingTab[]) => void) {
    this.channel.onmessage = ({ data }: MessageEvent<Message>) => this.take(data);
    addEventListener('pagehide', () => this.stop());
    addEventListener('pageshow', () => this.say({ kind: 'who' }));
    this.say({ kind: 'who' });
  }

  /** Waits for one call. */
  wait(title: string, called: (call: Call) => void): void {
    this.title = title;
    this.called = called;
    this.announce();
  }

  /** Waits no more. */
  stop(): void {
    if (this.called) this.say({ kind: 'not-waiting', id: this.id });
    this.called = undefined;
  }

  /** Calls a tab that waits; the BroadcastChannel that both use then. */
  async call(id: string, guest: Guest | undefined): Promise<string> {
    const channel = `hypernest ${crypto.randomUUID()}`;
    const answer = new Promise<string>((resolve, reject) => {
      this.answered = (name) => {
        if (name === channel) resolve(name);
      };
      setTimeout(() => reject(new Error('The other tab does not answer: it does not wait any more.')), ANSWER_MS);
    });
    this.say({ kind: 'call', id, call: { channel, guest } });
    return answer;
  }

  private say(message: Message): void {
    this.channel.postMessage(message);
  }

  private announce(): void {
    if (this.called) this.say({ kind: 'waiting', tab: { id: this.id, title: this.title } });
  }

  private take(message: Message): void {
    switch (message.kind) {
      case 'who':
        return this.announce();
      case 'waiting':
        this.waiting.set(message.tab.id, message.tab);
        return this.changed([...this.waiting.values()]);
      case 'not-waiting':
        this.waiting.delete(message.id);
        return this.changed([...this.waiting.values()]);
      case 'call': {
        const { called } = this;
        if (message.id !== this.id || !called) return;
        this.stop(); // one machine
        this.say({ kind: 'answer', channel: message.call.channel });
        return called(message.call);
      }
      case 'answer':
        return this.answered?.(message.channel);
    }
  }
}

// ---- a tab that another one opened for its machine ----

/** The address at which a tab asks the one that opened it for a machine. */
export const FOR_OPENER = 'from-opener';

interface OpenerMessage {
  readonly hypernest: 'ready' | 'port';
  readonly guest?: Guest | undefined;
}

/** Opens a tab that waits for a machine; the port to it. */
export function openTab(guest: Guest | undefined): Promise<MessagePort> {
  const address = new URL(location.pathname, location.href);
  address.searchParams.set('receive', FOR_OPENER);
  const tab = window.open(address);
  if (!tab) throw new Error('The browser does not let this page open a tab: allow it, or open one and let it receive.');
  return new Promise((resolve) => {
    const ready = (event: MessageEvent<OpenerMessage>) => {
      if (event.source !== tab || event.origin !== location.origin || event.data.hypernest !== 'ready') return;
      removeEventListener('message', ready);
      const { port1, port2 } = new MessageChannel();
      const message: OpenerMessage = { hypernest: 'port', guest };
      tab.postMessage(message, { targetOrigin: location.origin, transfer: [port2] });
      resolve(port1);
    };
    addEventListener('message', ready);
  });
}

/** Asks the tab that opened this one for its machine. */
export function askOpener(): Promise<{ port: MessagePort; guest: Guest | undefined }> {
  const { opener } = window;
  if (!opener) throw new Error('The tab that opened this one is gone.');
  return new Promise((resolve) => {
    const take = (event: MessageEvent<OpenerMessage>) => {
      const [port] = event.ports;
      if (event.source !== opener || event.origin !== location.origin || event.data.hypernest !== 'port' || !port) return;
      removeEventListener('message', take);
      resolve({ port, guest: event.data.guest });
    };
    addEventListener('message', take);
    const message: OpenerMessage = { hypernest: 'ready' };
    (opener as Window).postMessage(message, location.origin);
  });
}
