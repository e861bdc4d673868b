// What the page's tests and measurements share: a static server, Chromium, and the page's console.

import { createReadStream, existsSync, mkdtempSync, rmSync, statSync } from 'node:fs';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { extname, join, normalize, sep } from 'node:path';
import { chromium } from 'playwright-core';

const TYPES = {
  '.css': 'text/css',
  '.html': 'text/html; charset=utf-8',
  '.js': 'text/javascript',
  '.json': 'application/json',
  '.svg': 'image/svg+xml',
  '.wasm': 'application/wasm',
};

const CHROMIUM_ARGS = [
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--disable-dev-shm-usage',
];

/** Options of the form `--name value`. */
export function options(known) {
  const given = { ...known };
  const args = process.argv.slice(2);
  while (args.length > 0) {
    const name = args.shift().replace(/^--/, '');
    if (!(name in known)) fail(`unknown option --${name}; known: ${Object.keys(known).map((k) => `--${k}`).join(' ')}`);
    if (args.length === 0) fail(`--${name} needs a value`);
    given[name] = args.shift();
  }
  return given;
}

export function fail(message) {
  console.error(message);
  process.exit(2);
}

/** Serves `dist` at /, and `guests` (where there is one) at /guests/, on a free loopback port. */
export async function serve(dist, guests) {
  const server = createServer((request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url, 'http://x').pathname));
    const inGuests = path.startsWith(`${sep}guests${sep}`);
    const root = inGuests ? guests : dist;
    const file = root && join(root, inGuests ? path.slice('/guests'.length) : path.endsWith(sep) ? `${path}index.html` : path);
    if (!file || !existsSync(file) || !statSync(file).isFile()) {
      response.writeHead(404, { 'content-type': 'text/plain' }).end('not found');
      return;
    }
    response.writeHead(200, {
      'content-type': TYPES[extname(file)] ?? 'application/octet-stream',
      'content-length': statSync(file).size,
    });
    createReadStream(file).pipe(response);
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  return { url: `http://127.0.0.1:${server.address().port}/`, close: () => server.close() };
}

/** The address at which a site boots a guest of its list. */
export function at(site, guest) {
  return `${site}?guest=${encodeURIComponent(guest)}`;
}

/** Chromium with a user-data directory of its own. */
export async function browse(viewport = { width: 1180, height: 760 }) {
  const executablePath = [process.env.CHROMIUM, '/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome']
    .find((path) => path && existsSync(path));
  if (!executablePath) fail('Chromium was not found: install it (Debian: apt-get install chromium) or set CHROMIUM to its path');
  const profile = mkdtempSync(join(tmpdir(), 'hypernest-page-'));
  const context = await chromium.launchPersistentContext(profile, { executablePath, headless: true, args: CHROMIUM_ARGS, viewport });
  context.setDefaultNavigationTimeout(120_000); // a busy machine is no failure
  return {
    context,
    close: async () => {
      await context.close();
      rmSync(profile, { recursive: true, force: true });
    },
  };
}

/** The lines that the console shows now. */
export function consoleText(page) {
  return page.evaluate(() =>
    [...document.querySelectorAll('.xterm-rows > div')].map((row) => row.textContent.replaceAll('\u00a0', ' ').trimEnd()).join('\n'),
  );
}

/** Waits until the console shows `wanted` (text or pattern) and returns what it shows. */
export async function seen(page, wanted, timeoutMs) {
  const end = Date.now() + timeoutMs;
  for (;;) {
    const text = await consoleText(page);
    if (typeof wanted === 'string' ? text.includes(wanted) : wanted.test(text)) return text;
    if (Date.now() > end) {
      const { state, error } = await condition(page);
      throw new Error(`no ${wanted} within ${timeoutMs / 1000} s; the machine is ${state}${error ? ` (${error})` : ''}; the console shows:\n${text.trim()}`);
    }
    await page.waitForTimeout(20);
  }
}

/** What the bar says of the machine. */
export function condition(page) {
  return page.evaluate(() => ({
    state: document.documentElement.dataset.state,
    error: document.querySelector('[role=alert] span')?.textContent ?? '',
    stop: document.querySelector('#stop')?.textContent ?? '',
    mips: Number.parseFloat(document.querySelector('#speed')?.textContent ?? ''),
    instructions: Number(document.querySelector('#instructions')?.dataset.value),
    exits: Number(document.querySelector('#exits')?.dataset.value),
  }));
}

export async function inState(page, words, timeoutMs = 10_000) {
  await page.waitForFunction((w) => w.includes(document.documentElement.dataset.state), [words].flat(), { timeout: timeoutMs });
}
