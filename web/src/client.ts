// The page's side of the Worker: requests as promises, events of the current machine only.

import type {
  Arrived,
  EventMessage,
  Guest,
  ImageKind,
  LinkTo,
  Migration,
  MigrationOptions,
  Request,
  RequestMessage,
  Status,
} from './protocol';

export interface Listener {
  serial(bytes: Uint8Array): void;
  status(status: Status): void;
  migration(migration: Migration): void;
  arrived(arrived: Arrived): void;
  progress(name: string, loaded: number, total: number | undefined): void;
  /** The Worker itself is gone; the next boot starts another. */
  broken(message: string): void;
}

interface Waiting {
  resolve(value: unknown): void;
  reject(error: Error): void;
}

export class MachineClient {
  private worker: Worker | undefined;
  private generation = 0;
  private nextId = 0;
  private readonly waiting = new Map<number, Waiting>();

  constructor(private readonly listener: Listener) {}

  /** Builds a machine in place of the present one and starts it. */
  async boot(guest: Guest): Promise<void> {
    this.generation += 1;
    await this.ask({ kind: 'boot', guest });
  }

  run(): void {
    this.tell({ kind: 'run' });
  }

  pause(): void {
    this.tell({ kind: 'pause' });
  }

  input(bytes: Uint8Array): void {
    this.tell({ kind: 'input', bytes });
  }

  /** The terminal has shown `bytes` of serial output of the present machine. */
  shown(bytes: number): void {
    this.tell({ kind: 'shown', bytes });
  }

  /** Gives the machine to the other side. */
  async send(link: LinkTo, options: MigrationOptions): Promise<void> {
    await this.ask({ kind: 'send', link, options });
  }

  /** Takes the other side's machine in place of the present one. */
  async receive(link: LinkTo, options: MigrationOptions): Promise<void> {
    this.generation += 1;
    await this.ask({ kind: 'receive', link, options });
  }

  cancel(): void {
    this.tell({ kind: 'cancel' });
  }

  /** Settles whose an undecided machine is; the release code where it is given up. */
  async settle(keep: boolean, code: string | undefined): Promise<string | undefined> {
    return (await this.ask({ kind: 'settle', keep, code })) as string | undefined;
  }

  /** Names the machine that events now come from. */
  current(): number {
    return this.generation;
  }

  async identify(file: Blob): Promise<ImageKind> {
    return (await this.ask({ kind: 'identify', file })) as ImageKind;
  }

  async stateHash(): Promise<string> {
    return String(await this.ask({ kind: 'hash' }));
  }

  private tell(request: Request): void {
    this.ask(request).catch((error: unknown) => this.listener.broken(String(error)));
  }

  private ask(request: Request): Promise<unknown> {
    const id = this.nextId++;
    const message: RequestMessage = { ...request, id, generation: this.generation };
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      const transfer = 'link' in request && request.link.via === 'port' ? [request.link.port] : [];
      this.start().postMessage(message, transfer);
    });
  }

  private start(): Worker {
    if (this.worker) return this.worker;
    const worker = new Worker(new URL('./worker.ts', import.meta.url), { type: 'module' });
    worker.onmessage = (event: MessageEvent<EventMessage>) => this.onEvent(event.data);
    worker.onerror = (event) => {
      event.preventDefault();
      this.drop(event.message || 'The machine could not be loaded. Reload the page.');
    };
    this.worker = worker;
    return worker;
  }

  private drop(message: string): void {
    this.worker?.terminate();
    this.worker = undefined;
    for (const { reject } of this.waiting.values()) reject(new Error(message));
    this.waiting.clear();
    this.listener.broken(message);
  }

  private onEvent(event: EventMessage): void {
    if (event.kind === 'reply') {
      const waiting = this.waiting.get(event.id);
      this.waiting.delete(event.id);
      if (event.reply.ok) waiting?.resolve(event.reply.value);
      else waiting?.reject(new Error(event.reply.error));
      return;
    }
    if (event.kind === 'broken') return this.drop(event.message);
    if (event.generation !== this.generation) return;
    switch (event.kind) {
      case 'serial':
        return this.listener.serial(event.bytes);
      case 'status':
        return this.listener.status(event.status);
      case 'migration':
        return this.listener.migration(event.migration);
      case 'arrived':
        return this.listener.arrived(event.arrived);
      case 'progress':
        return this.listener.progress(event.name, event.loaded, event.total);
    }
  }
}
