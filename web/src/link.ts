// Streams of bytes between the two sides of a migration: a WebSocket to a program, a MessagePort or a
// BroadcastChannel to another tab.
//
// Tabs tell each other the name of a lock that each holds as long as it lives. Who gets the other's lock
// knows that the other is gone, and with it its machine.

import type { LinkTo } from './protocol';

/** What a side does: it gives a machine away or takes one. */
export type Side = 'gives' | 'takes';

export interface Link {
  /** Whether it takes bytes now. */
  readonly ready: boolean;
  send(bytes: Uint8Array<ArrayBuffer>): void;
  /** What was sent still arrives. */
  close(): void;
}

export interface LinkListener {
  /** The other side is there. */
  open(): void;
  bytes(bytes: Uint8Array): void;
  /** Nothing arrives any more. `gone`: the other side does not exist any more, nor does its machine. */
  closed(reason: string, gone: boolean): void;
}

/** Longest wait for the other side to be there. */
const CONNECT_MS = 20_000;
/** Bytes that a WebSocket holds back beyond which it takes no more. */
const SOCKET_WINDOW = 1024 * 1024;

/** Connects to the other side. */
export function connect(to: LinkTo, side: Side, listener: LinkListener): Link {
  switch (to.via) {
    case 'socket':
      return new SocketLink(to.url, side, listener);
    case 'port':
      return new TabLink(to.port, listener);
    case 'channel':
      return new TabLink(new BroadcastChannel(to.name), listener);
  }
}

class SocketLink implements Link {
  private readonly socket: WebSocket;
  private over = false;

  constructor(url: string, side: Side, listener: LinkListener) {
    this.socket = new WebSocket(url, `hypernest.${side}.1`);
    this.socket.binaryType = 'arraybuffer';
    this.socket.onopen = () => listener.open();
    this.socket.onmessage = ({ data }: MessageEvent<ArrayBuffer | string>) => {
      if (typeof data !== 'string') listener.bytes(new Uint8Array(data));
    };
    this.socket.onclose = (event) => {
      if (this.over) return;
      this.over = true;
      // A browser does not tell a page why it was not let in.
      listener.closed(
        event.wasClean
          ? `${url} closed the connection`
          : `no connection to ${url}: is hypernest waiting there, and does its --origin name this page (${self.location.origin})?`,
        false,
      );
    };
  }

  get ready(): boolean {
    return this.socket.readyState === WebSocket.OPEN && this.socket.bufferedAmount < SOCKET_WINDOW;
  }

  send(bytes: Uint8Array<ArrayBuffer>): void {
    this.socket.send(bytes);
  }

  close(): void {
    this.over = true;
    this.socket.close();
  }
}

/** What tabs say to each other. */
type TabMessage =
  /** I am here, and hold this lock; `answer`: you need not say that you are. */
  | { here: string | undefined; answer: boolean }
  | { bytes: Uint8Array<ArrayBuffer> }
  | { end: true };

class TabLink implements Link {
  private open = false;
  private over = false;
  private readonly watch = new AbortController();
  private readonly timer: ReturnType<typeof setTimeout>;

  constructor(
    private readonly port: MessagePort | BroadcastChannel,
    private readonly listener: LinkListener,
  ) {
    this.timer = setTimeout(() => this.ended('the other tab does not answer', false), CONNECT_MS);
    port.onmessage = ({ data }: MessageEvent<TabMessage>) => this.take(data);
    void ownLock().then((lock) => this.post({ here: lock, answer: false }));
  }

  get ready(): boolean {
    return this.open && !this.over;
  }

  send(bytes: Uint8Array<ArrayBuffer>): void {
    this.post({ bytes });
  }

  close(): void {
    this.post({ end: true });
    this.end();
  }

  private post(message: TabMessage): void {
    if (this.over) return;
    // A BroadcastChannel copies; a port takes the bytes over.
    if (this.port instanceof MessagePort && 'bytes' in message) this.port.postMessage(message, [message.bytes.buffer]);
    else this.port.postMessage(message);
  }

  private take(message: TabMessage): void {
    if (this.over) return;
    if ('bytes' in message) return this.listener.bytes(message.bytes);
    if ('end' in message) return this.ended('the other tab closed the connection', false);
    if (!message.answer) void ownLock().then((lock) => this.post({ here: lock, answer: true }));
    if (this.open) return;
    this.open = true;
    clearTimeout(this.timer);
    if (message.here !== undefined) {
      navigator.locks
        .request(message.here, { signal: this.watch.signal }, () => this.ended('the other tab is gone', true))
        .catch(() => undefined); // not of interest any more
    }
    this.listener.open();
  }

  private ended(reason: string, gone: boolean): void {
    if (this.over) return;
    this.end();
    this.listener.closed(reason, gone);
  }

  private end(): void {
    this.over = true;
    clearTimeout(this.timer);
    this.watch.abort();
    this.port.close();
  }
}

let held: Promise<string | undefined> | undefined;

/** The lock that this Worker holds as long as it lives; none where there are no locks (a page that is not secure). */
function ownLock(): Promise<string | undefined> {
  held ??= new Promise((resolve) => {
    if (!('locks' in navigator)) return resolve(undefined);
    const name = `hypernest tab ${crypto.randomUUID()}`;
    void navigator.locks.request(name, () => {
      resolve(name);
      return new Promise(() => undefined);
    });
  });
  return held;
}
