// The serial console: xterm.js, loaded when first needed.

import type { ITheme, Terminal } from '@xterm/xterm';

const FONT = 'ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace';

const DARK: ITheme = {
  background: '#0f1419',
  foreground: '#d5dae1',
  cursor: '#5cc8b4',
  cursorAccent: '#0f1419',
  selectionBackground: '#2c4a52',
  black: '#1c232b',
  red: '#f0717a',
  green: '#7fc98f',
  yellow: '#e0b563',
  blue: '#6cb0f2',
  magenta: '#c69cec',
  cyan: '#5cc8c8',
  white: '#c3c9d1',
  brightBlack: '#6b7785',
  brightRed: '#ff8d94',
  brightGreen: '#9be0a9',
  brightYellow: '#f2cc82',
  brightBlue: '#90c6fb',
  brightMagenta: '#dab9f7',
  brightCyan: '#83dede',
  brightWhite: '#f2f5f8',
};

const LIGHT: ITheme = {
  background: '#ffffff',
  foreground: '#26303a',
  cursor: '#0b7a68',
  cursorAccent: '#ffffff',
  selectionBackground: '#c9e6e0',
  black: '#26303a',
  red: '#b4232f',
  green: '#20753a',
  yellow: '#8a6100',
  blue: '#1d5fae',
  magenta: '#7c3fa8',
  cyan: '#0b7285',
  white: '#5c6773',
  brightBlack: '#6f7b88',
  brightRed: '#c93a45',
  brightGreen: '#2c8a4a',
  brightYellow: '#9c7208',
  brightBlue: '#2f72c4',
  brightMagenta: '#9255bd',
  brightCyan: '#1b8599',
  brightWhite: '#26303a',
};

export class Console {
  private terminal: Terminal | undefined;
  private readonly scheme = matchMedia('(prefers-color-scheme: dark)');

  /** `typed` gets what the user types; `leave` is called when the user asks to leave the console. */
  constructor(
    private readonly host: HTMLElement,
    private readonly typed: (bytes: Uint8Array) => void,
    private readonly leave: () => void,
  ) {}

  async open(): Promise<void> {
    const [{ Terminal }, { FitAddon }] = await Promise.all([
      import('@xterm/xterm'),
      import('@xterm/addon-fit'),
      import('@xterm/xterm/css/xterm.css'),
    ]);
    const terminal = new Terminal({
      fontFamily: FONT,
      fontSize: 13,
      lineHeight: 1.2,
      scrollback: 5000,
      cursorBlink: true,
      theme: this.scheme.matches ? DARK : LIGHT,
    });
    const fit = new FitAddon();
    terminal.loadAddon(fit);
    terminal.open(this.host);
    fit.fit();
    new ResizeObserver(() => fit.fit()).observe(this.host);
    this.scheme.addEventListener('change', () => {
      terminal.options.theme = this.scheme.matches ? DARK : LIGHT;
    });

    const encoder = new TextEncoder();
    terminal.onData((text) => this.typed(encoder.encode(text)));
    terminal.onBinary((text) => this.typed(Uint8Array.from(text, (c) => c.charCodeAt(0))));
    // Tab belongs to the guest, so the keyboard needs another way out.
    terminal.attachCustomKeyEventHandler((event) => {
      if (event.key !== 'F6') return true;
      if (event.type === 'keydown') this.leave();
      event.preventDefault();
      return false;
    });
    this.terminal = terminal;
  }

  /** Shows serial output; `shown` is called once it has been taken in. */
  write(bytes: Uint8Array, shown: () => void): void {
    this.terminal?.write(bytes, shown);
  }

  clear(): void {
    this.terminal?.reset();
  }

  focus(): void {
    this.terminal?.focus();
  }
}
