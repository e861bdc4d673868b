// Which guests there are: those that the server has beside the page, the one built in, and files
// that the user brings.

import type { Guest, ImageKind, Source, Vmx } from './protocol';

const MIB = 1024 * 1024;
const DEFAULT_MEMORY = 512 * MIB;
const DEFAULT_CMDLINE = 'console=ttyS0 earlyprintk=serial reboot=t';

/** Runs at once, with nothing fetched: a hypervisor that shows the exits of its guest. */
export const HYPERVISOR: Guest = {
  name: 'Built-in hypervisor',
  kernel: { from: 'builtin', name: 'hypervisor' },
  cmdline: '',
  memory: 16 * MIB,
  cpus: 1,
  vmx: 'max',
};

/** Likewise: it echoes what is typed. */
export const GREETING: Guest = {
  name: 'Built-in greeting',
  kernel: { from: 'builtin', name: 'greeting' },
  cmdline: '',
  memory: 16 * MIB,
  cpus: 1,
  vmx: 'none',
};

/** An entry of `guests/manifest.json`; addresses are relative to it. */
interface ManifestGuest {
  name: string;
  kernel: string;
  initrd?: string;
  cmdline?: string;
  /** Bytes. */
  memory?: number;
  cpus?: number;
  vmx?: Vmx;
}

/** The guests that the server offers; none where it has no manifest. */
export async function servedGuests(): Promise<Guest[]> {
  const folder = new URL('guests/', document.baseURI);
  const response = await fetch(new URL('manifest.json', folder)).catch(() => undefined);
  if (!response?.ok || !response.headers.get('content-type')?.includes('json')) return [];
  const manifest = (await response.json()) as { guests: ManifestGuest[] };
  const source = (name: string): Source => ({ from: 'url', name, url: new URL(name, folder).href });
  return manifest.guests.map((guest) => ({
    name: guest.name,
    kernel: source(guest.kernel),
    ...(guest.initrd ? { initrd: source(guest.initrd) } : {}),
    cmdline: guest.cmdline ?? '',
    memory: guest.memory ?? DEFAULT_MEMORY,
    cpus: guest.cpus ?? 1,
    vmx: guest.vmx ?? 'none',
  }));
}

/**
 * The guest that files given by the user make: a kernel, an initial RAM disk, or both. A lone RAM
 * disk goes with the kernel of `present`. Throws an Error that the user can read.
 */
export async function guestFromFiles(
  files: readonly File[],
  present: Guest | undefined,
  identify: (file: Blob) => Promise<ImageKind>,
): Promise<Guest> {
  let kernel: File | undefined;
  let initrd: File | undefined;
  for (const file of files) {
    const kind = await identify(file).catch((error: Error) => {
      throw new Error(`${file.name}: ${error.message}`);
    });
    switch (kind) {
      case 'kernel':
        if (kernel) throw new Error(`${kernel.name} and ${file.name} are both kernels. Give one kernel and at most one initial RAM disk.`);
        kernel = file;
        break;
      case 'initrd':
        if (initrd) throw new Error(`${initrd.name} and ${file.name} are both initial RAM disks. Give one kernel and at most one initial RAM disk.`);
        initrd = file;
        break;
    }
  }
  const source = (file: File): Source => ({ from: 'file', name: file.name, file });
  if (kernel) {
    return {
      name: kernel.name,
      kernel: source(kernel),
      ...(initrd ? { initrd: source(initrd) } : {}),
      cmdline: present && present.kernel.from !== 'builtin' ? present.cmdline : DEFAULT_CMDLINE,
      memory: Math.max(DEFAULT_MEMORY, present?.memory ?? 0),
      cpus: present?.cpus ?? 1,
      vmx: present && present.kernel.from !== 'builtin' ? present.vmx : 'none',
    };
  }
  if (initrd && present && present.kernel.from !== 'builtin') {
    return { ...present, name: `${present.kernel.name} + ${initrd.name}`, initrd: source(initrd) };
  }
  throw new Error(`${initrd?.name ?? 'This'} is an initial RAM disk: drop it together with the kernel it belongs to.`);
}
