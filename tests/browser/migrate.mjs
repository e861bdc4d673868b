// Machines that move between tabs, in Chromium.
//
//     node tests/browser/migrate.mjs [--dist web/dist] [--guests .cache/guests] [--hypernest target/release/hypernest] [--only WORD]
//
// Without guest images the tests that boot Linux are skipped, without the command those that need it, with a line that says so.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { at, browse, condition, fail, inState, options, seen, serve } from './harness.mjs';

const given = options({ dist: 'web/dist', guests: '.cache/guests', hypernest: 'target/release/hypernest', only: '' });
if (!existsSync(join(given.dist, 'index.html'))) fail(`${given.dist} holds no built page: run "npm run wasm && npm run build" first`);
const hasGuests = existsSync(join(given.guests, 'manifest.json'));
const hasCommand = existsSync(given.hypernest);

const READY = /^>/m;
const BOOT_MS = 300_000;

const tests = [];
const test = (name, needs, run) => tests.push({ name, needs, run });

/** A tab that keeps every byte of serial output that the machine's Worker sends. */
async function open(context, address) {
  const page = await context.newPage();
  page.thrown = [];
  page.on('pageerror', (error) => page.thrown.push(error));
  await page.addInitScript(() => {
    window.serialBytes = [];
    const Original = window.Worker;
    window.Worker = class extends Original {
      constructor(...args) {
        super(...args);
        this.addEventListener('message', ({ data }) => {
          if (data.kind === 'serial') window.serialBytes.push(...data.bytes);
        });
      }
    };
  });
  await page.goto(address);
  return page;
}

/** All that a tab was sent by its machines, as text of one byte a character. */
const serial = (page) => page.evaluate(() => window.serialBytes.map((byte) => String.fromCharCode(byte)).join(''));

async function type(page, text) {
  await page.focus('.xterm-helper-textarea');
  await page.keyboard.type(text);
}

async function openSection(page) {
  if (!(await page.evaluate(() => document.querySelector('#migrate').open))) await page.click('#migrate > summary');
}

const phase = (page, word, timeout = 60_000) =>
  page.waitForFunction((w) => document.querySelector('#migration')?.dataset.phase === w, word, { timeout });

/** The machine of `from` goes to `to`, which waits. */
async function send(from, to) {
  await openSection(to);
  await to.click('#receive-tab');
  await openSection(from);
  await from.waitForSelector('#send-tab:not([disabled])');
  await from.click('#send-tab');
  await Promise.all([phase(from, 'done'), phase(to, 'done')]);
}

async function figures(page) {
  return page.evaluate(() => Object.fromEntries([...document.querySelectorAll('#migration dd')].map(({ id, dataset }) => [id, dataset.value])));
}

test('a machine goes from tab to tab and answers there', 'alone', async (context, site) => {
  const first = await open(context, at(site, 'Built-in greeting'));
  const second = await open(context, at(site, 'Built-in greeting'));
  await seen(first, READY, 20_000);
  await type(first, 'here');
  await seen(first, '> HERE', 5_000);
  await seen(second, READY, 20_000);
  await send(first, second);
  await inState(first, 'stopped');
  assert.match(await first.textContent('#stop'), /runs elsewhere/);
  assert.equal((await figures(first))['migration-owner'], 'another tab');
  assert.equal((await figures(second))['migration-owner'], 'this tab');
  const sent = await figures(first);
  assert.ok(Number(sent['migration-rounds']) >= 1 && Number(sent['migration-downtime']) > 0, JSON.stringify(sent));
  const before = await serial(second);
  await type(second, 'there');
  await seen(second, 'THERE', 5_000);
  // The line that was begun goes on.
  assert.match(await serial(first), /> HERE$/);
  assert.equal((await serial(second)).slice(before.length), 'THERE');
  // Nothing is left behind: the first tab's machine is built anew.
  await first.click('#toggle');
  await seen(first, READY, 20_000);
  return [first, second];
});

test('a machine goes to a tab opened for it, by a port', 'alone', async (context, site) => {
  const first = await open(context, at(site, 'Built-in greeting'));
  await seen(first, READY, 20_000);
  await type(first, 'one');
  await seen(first, '> ONE', 5_000);
  await openSection(first);
  const popup = context.waitForEvent('page');
  await first.click('#send-new-tab');
  const second = await popup;
  await phase(first, 'done');
  await phase(second, 'done');
  await type(second, 'two');
  await seen(second, 'TWO', 5_000);
  assert.ok(!second.url().includes('receive='), second.url());
  return [first, second];
});

test('what is printed while the machine moves is neither lost nor doubled', 'alone', async (context, site) => {
  const first = await open(context, at(site, 'Built-in greeting'));
  await seen(first, READY, 20_000);
  const text = Array.from({ length: 4000 }, (_, n) => String.fromCharCode(97 + ((n * n + (n >> 5)) % 26))).join('');
  const start = (await serial(first)).length;
  const tabs = [first];
  for (let hop = 0; hop < 3; hop += 1) {
    const from = tabs.at(-1);
    const to = await open(context, at(site, 'Built-in greeting'));
    await openSection(to);
    await to.click('#receive-tab');
    await openSection(from);
    await from.waitForSelector('#send-tab:not([disabled])');
    // It echoes while it is on its way.
    await from.focus('.xterm-helper-textarea');
    await from.keyboard.insertText(text.slice(hop * 1000, hop * 1000 + 1000));
    await from.click('#send-tab');
    await phase(to, 'done');
    tabs.push(to);
  }
  await tabs.at(-1).focus('.xterm-helper-textarea');
  await tabs.at(-1).keyboard.insertText(text.slice(3000));
  const expected = text.toUpperCase();
  const joined = async () => {
    const parts = await Promise.all(tabs.map(async (page, n) => (n === 0 ? (await serial(page)).slice(start) : afterArrival(page))));
    return parts.join('');
  };
  for (const end = Date.now() + 30_000; (await joined()).length < expected.length && Date.now() < end; ) await first.waitForTimeout(50);
  assert.equal(await joined(), expected);
  return tabs;
});

/** What a tab printed after its own machine was replaced. */
async function afterArrival(page) {
  const all = await serial(page);
  const own = all.lastIndexOf('> ');
  return own < 0 ? all : all.slice(own + 2);
}

// ---- links that break ----

const COMMIT = 6;
const OWNED = 37;

/**
 * A tab between two: it waits as a tab does, calls the one that waits in truth, and passes on what they say until a message of
 * this kind would pass. Then it says no more, and ends both links where `ends`.
 */
async function between(context, site, kind, ends) {
  const page = await context.newPage();
  await page.goto(`${site}icon-that-is-not-there`);
  const id = `between ${Math.random()}`;
  await page.evaluate(
    ({ kind, ends, id }) => {
      const tabs = new BroadcastChannel('hypernest tabs');
      let target;
      tabs.onmessage = ({ data }) => {
        if (data.kind === 'waiting' && target === undefined) {
          target = data.tab.id;
          tabs.postMessage({ kind: 'waiting', tab: { id, title: 'Between' } });
        }
        if (data.kind !== 'call' || data.id !== id) return;
        const near = new BroadcastChannel(data.call.channel);
        const far = new BroadcastChannel(`far of ${id}`);
        relay(near, far);
        relay(far, near);
        tabs.postMessage({ kind: 'call', id: target, call: { channel: far.name, guest: undefined } });
        tabs.postMessage({ kind: 'answer', channel: data.call.channel });
      };
      let cut = false;
      function relay(from, to) {
        const frames = new Frames();
        from.onmessage = ({ data }) => {
          if (cut) return;
          const keep = data.bytes ? frames.until(data.bytes, kind) : undefined;
          if (keep === undefined) return to.postMessage(data);
          cut = true;
          window.cut = true;
          to.postMessage({ bytes: data.bytes.slice(0, keep) });
          if (ends) for (const link of [from, to]) link.postMessage({ end: true });
        };
      }
      /** Finds frames in bytes: a length of 4 bytes, a kind, a checksum, the payload. */
      class Frames {
        header = [];
        payload = 0;
        /** Where a frame of this kind begins, if one does. */
        until(bytes, kind) {
          for (let at = 0; at < bytes.length; ) {
            const skip = Math.min(this.payload, bytes.length - at);
            this.payload -= skip;
            at += skip;
            if (at === bytes.length) return undefined;
            this.header.push(bytes[at]);
            at += 1;
            if (this.header.length === 5 && this.header[4] === kind) return at - 5;
            if (this.header.length === 13) {
              this.payload = this.header[0] + 256 * (this.header[1] + 256 * (this.header[2] + 256 * this.header[3]));
              this.header = [];
            }
          }
          return undefined;
        }
      }
      tabs.postMessage({ kind: 'who' });
    },
    { kind, ends, id },
  );
  return { page, id };
}

/** Two tabs and the one between them, up to the cut. */
async function cutPair(context, site, kind, ends) {
  const first = await open(context, at(site, 'Built-in greeting'));
  const second = await open(context, at(site, 'Built-in greeting'));
  await seen(first, READY, 20_000);
  await type(first, 'here');
  await seen(first, '> HERE', 5_000);
  await openSection(second);
  await second.click('#receive-tab');
  const { page: middle, id } = await between(context, site, kind, ends);
  await openSection(first);
  await first.waitForSelector(`#tabs option[value="${id}"]`, { state: 'attached' });
  await first.selectOption('#tabs', id);
  await first.click('#send-tab');
  await middle.waitForFunction(() => window.cut, undefined, { timeout: 60_000 });
  await middle.close();
  return { first, second };
}

test('a link that breaks at the commit leaves an undecided pair, which the release code settles', 'alone', async (context, site) => {
  const { first, second } = await cutPair(context, site, COMMIT, true);
  await Promise.all([phase(first, 'undecided'), phase(second, 'undecided')]);
  for (const page of [first, second]) {
    await inState(page, 'undecided');
    assert.equal((await figures(page))['migration-owner'], 'undecided');
  }
  // Nothing runs: what is typed comes back later.
  await second.fill('#their-code', '0123456789abcdef');
  await second.click('#keep');
  await second.waitForSelector('[role=alert] span');
  assert.match(await second.textContent('[role=alert] span'), /not the release code/);
  await inState(second, 'undecided');
  await first.click('#give-up');
  await first.waitForSelector('#our-code');
  await inState(first, 'stopped');
  await second.fill('#their-code', await first.textContent('#our-code'));
  await second.click('#keep');
  await inState(second, ['running', 'idle']);
  await type(second, 'there');
  await seen(second, 'THERE', 5_000);
  return [first, second];
});

test('a link that breaks after the commit never leaves two owners', 'alone', async (context, site) => {
  const { first, second } = await cutPair(context, site, OWNED, true);
  await Promise.all([phase(first, 'undecided'), phase(second, 'done')]);
  await type(second, 'there');
  await seen(second, 'THERE', 5_000);
  await inState(first, 'undecided');
  await first.click('#give-up');
  await inState(first, 'stopped');
  return [first, second];
});

test('a tab that ends in the middle settles it: the other one has the machine', 'alone', async (context, site) => {
  const { first, second } = await cutPair(context, site, COMMIT, false);
  await second.close();
  await phase(first, 'failed');
  await inState(first, ['running', 'idle']);
  await type(first, 'alive');
  await seen(first, 'ALIVE', 5_000);
  const pair = await cutPair(context, site, COMMIT, false);
  await pair.first.close();
  await phase(pair.second, 'done');
  await type(pair.second, 'there');
  await seen(pair.second, 'THERE', 5_000);
  return [first, pair.second];
});

test('a tab that ends before the commit leaves the machine where it is', 'alone', async (context, site) => {
  const READY_KIND = 36;
  const { first, second } = await cutPair(context, site, READY_KIND, false);
  await second.close();
  await phase(first, 'failed');
  assert.equal((await figures(first))['migration-owner'], 'this tab');
  await type(first, 'alive');
  await seen(first, 'ALIVE', 5_000);
  return [first];
});

test('a tab that waits can stop, and is not called any more', 'alone', async (context, site) => {
  const first = await open(context, at(site, 'Built-in greeting'));
  const second = await open(context, at(site, 'Built-in greeting'));
  await seen(first, READY, 20_000);
  await openSection(second);
  await second.click('#receive-tab');
  await openSection(first);
  await first.waitForSelector('#send-tab:not([disabled])');
  await second.click('#receive-tab');
  await first.waitForSelector('#send-tab[disabled]');
  return [first, second];
});

test('an address where nobody waits gives a clear error, and the machine stays', 'alone', async (context, site) => {
  const first = await open(context, at(site, 'Built-in greeting'));
  await seen(first, READY, 20_000);
  await openSection(first);
  await first.fill('#address', 'ws://127.0.0.1:9');
  await first.click('#send-address');
  await phase(first, 'failed');
  assert.match(await first.textContent('#reasons'), /no connection to ws:\/\/127\.0\.0\.1:9: is hypernest waiting there/);
  await type(first, 'alive');
  await seen(first, 'ALIVE', 5_000);
  await first.fill('#address', 'gopher://x');
  await first.click('#send-address');
  await first.waitForSelector('[role=alert] span');
  return [first];
});

// ---- a program at the other end ----

/** A port of the loopback interface that nobody uses. */
async function freePort() {
  const server = createServer();
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** The command, what it has said so far, and waiting for what it says. */
function command(args) {
  const child = spawn(given.hypernest, args, { stdio: ['pipe', 'pipe', 'pipe'] });
  const run = { child, out: '', err: '', ended: new Promise((resolve) => child.on('exit', resolve)) };
  child.stdout.on('data', (bytes) => (run.out += bytes.toString('latin1')));
  child.stderr.on('data', (bytes) => (run.err += bytes));
  run.says = async (stream, text, timeoutMs = 60_000) => {
    for (const end = Date.now() + timeoutMs; !run[stream].includes(text); await new Promise((resolve) => setTimeout(resolve, 20))) {
      if (Date.now() > end || child.exitCode !== null) throw new Error(`no ${text} in ${stream} of ${args.join(' ')}: ${run.out}${run.err}`);
    }
  };
  return run;
}

test('a machine goes from the page to a program and from there to another page', 'native', async (context, site) => {
  const first = await open(context, at(site, 'Built-in greeting'));
  const second = await open(context, at(site, 'Built-in greeting'));
  await seen(first, READY, 20_000);
  await type(first, 'page');
  await seen(first, '> PAGE', 5_000);
  const [from, to] = [await freePort(), await freePort()];
  const origin = new URL(site).origin;
  const folder = mkdtempSync(join(tmpdir(), 'hypernest-migrate-'));
  const secret = join(folder, 'token');
  writeFileSync(secret, 'sesame\n');
  const arrive = `ws://127.0.0.1:${from}`;
  const leave = `ws://127.0.0.1:${to}`;
  const program = command(['receive', arrive, '--origin', origin, '--token-file', secret, '--migrate-on', 'PROGRAM', '--to', leave]);
  await program.says('err', `waiting for a page's machine on ${arrive}`);

  // A wrong token is refused, and the machine stays.
  await openSection(first);
  await first.fill('#address', arrive);
  await first.click('#send-address');
  await phase(first, 'failed');
  assert.match(await first.textContent('#reasons'), /token/);
  await first.fill('#token', 'sesame');
  await first.click('#send-address');
  await phase(first, 'done');
  assert.equal((await figures(first))['migration-owner'], arrive);

  program.child.stdin.write('program');
  await program.says('err', `waiting for a page on ${leave}`);
  await openSection(second);
  await second.fill('#address', leave);
  await second.fill('#token', 'sesame');
  await second.click('#receive-address');
  await phase(second, 'done');
  assert.equal(await program.ended, 0, program.err);
  await type(second, 'back');
  await seen(second, 'BACK', 5_000);
  const joined = (await serial(first)) + program.out + (await afterArrival(second));
  assert.match(joined, /> PAGEPROGRAMBACK$/);
  rmSync(folder, { recursive: true });
  return [first, second];
});

test('a page whose origin is not on the list is not let in', 'native', async (context, site) => {
  const first = await open(context, at(site, 'Built-in greeting'));
  await seen(first, READY, 20_000);
  const address = `ws://127.0.0.1:${await freePort()}`;
  const program = command(['receive', address, '--origin', 'https://elsewhere.example']);
  await program.says('err', 'waiting');
  await openSection(first);
  await first.fill('#address', address);
  await first.click('#send-address');
  await phase(first, 'failed');
  assert.match(await first.textContent('#reasons'), new RegExp(`no connection to ${address}.*--origin.*${new URL(site).origin}`));
  await program.says('err', `allow it with --origin ${new URL(site).origin}`);
  await type(first, 'alive');
  await seen(first, 'ALIVE', 5_000);
  program.child.kill();
  return [first];
});

// ---- Linux, and Linux in it ----

const LINUX = {
  name: 'Linux in Linux',
  kernel: '6.1/vmlinuz',
  initrd: '6.1/initramfs-l2.cpio',
  cmdline: 'console=ttyS0 cryptomgr.notests reboot=t panic=-1 mitigations=off anchor.tests=- anchor.l2opt=cryptomgr.notests',
  memory: 2 ** 29,
  cpus: 1,
  vmx: 'max',
};

/** A site whose first guest is Linux with KVM, which boots Linux in it. */
async function nested(context, site) {
  await context.route('**/guests/manifest.json', (route) => route.fulfill({ json: { guests: [LINUX] } }));
  return open(context, at(site, LINUX.name));
}

/** What a tab printed after the greeting of its own machine. */
const afterGreeting = async (page) => (await serial(page)).replace(/^[^]*? resets\.\r?\n> /, '');

const printed = (page, text) =>
  page.waitForFunction((t) => String.fromCharCode(...window.serialBytes.slice(-20_000)).includes(t), text, { timeout: BOOT_MS });

/** Each line of L2's log comes once, in its order, and none is broken where the parts join, which is in the middle of it. */
function whole(parts) {
  const joined = parts.join('');
  const begin = joined.indexOf('L2LINUX START');
  const log = joined.slice(begin, joined.indexOf('L2LINUX END'));
  const boot = log.slice(0, log.indexOf('Run /init')); // which prints some of it again
  const lines = boot.split('\r\n').filter((line) => line.startsWith('['));
  const times = lines.map((line) => Number(/^\[ *(\d+\.\d{6})\] /.exec(line)?.[1]));
  const wrong = times.findIndex((time, n) => n > 0 && !(time >= times[n - 1]));
  assert.equal(wrong, -1, `out of order: ${lines.slice(Math.max(0, wrong - 2), wrong + 2).join('\n')}`);
  assert.ok(times.length > 100, `${times.length} lines`);
  let place = -begin;
  for (const part of parts.slice(0, -1)) {
    place += part.length;
    assert.ok(place > 0 && place < log.length, `it moved in the middle: ${place} of ${log.length}`);
  }
}

test('Linux in KVM in Linux goes to another tab in the middle of its boot, and reaches its end', 'linux', async (context, site) => {
  const first = await nested(context, site);
  const second = await open(context, at(site, 'Built-in greeting'));
  await first.bringToFront();
  await printed(first, 'L2LINUX START');
  await printed(first, '[    0.000000] Linux version');
  await send(first, second);
  await printed(second, 'L2LINUX END');
  whole([await serial(first), await afterGreeting(second)]);
  console.log(`     ${JSON.stringify(await figures(first))}`);
  return [first, second];
});

test('Linux in KVM in Linux goes from a program to the page and on to a program in the middle of its boot', 'linux native', async (context, site) => {
  const [from, to] = [await freePort(), await freePort()].map((port) => `ws://127.0.0.1:${port}`);
  const origin = ['--origin', new URL(site).origin];
  const page = await open(context, at(site, 'Built-in greeting'));
  await seen(page, READY, 20_000);
  const machine = ['--append', LINUX.cmdline, '--memory', '512M', '--vmx', LINUX.vmx, '--timeout', '300'];
  const image = [join(given.guests, LINUX.kernel), '--initrd', join(given.guests, LINUX.initrd)];
  const first = command(['run', ...image, ...machine, '--migrate-on', 'L2LINUX START', '--to', from, ...origin]);
  await first.says('err', `waiting for a page on ${from}`, BOOT_MS);
  await openSection(page);
  await page.fill('#address', from);
  await page.click('#receive-address');
  await phase(page, 'done');
  assert.equal(await first.ended, 0, first.err);
  // The kernel inside goes on here.
  const arrived = (await serial(page)).length;
  await page.waitForFunction((n) => window.serialBytes.length > n + 500, arrived, { timeout: BOOT_MS });
  const last = command(['receive', to, '--timeout', '300', ...origin]);
  await last.says('err', `waiting for a page's machine on ${to}`);
  await page.fill('#address', to);
  await page.click('#send-address');
  await phase(page, 'done');
  await last.says('out', 'L2LINUX END', BOOT_MS);
  whole([first.out, await afterGreeting(page), last.out]);
  last.child.kill();
  return [page];
});

// ---- the runner ----

const served = await serve(given.dist, given.guests);
const browser = await browse();
let passed = 0;
let failed = 0;
let skipped = 0;
for (const { name, needs, run } of tests) {
  if (!name.includes(given.only)) continue;
  const lacks = needs.includes('linux') && !hasGuests ? join(given.guests, 'manifest.json') : needs.includes('native') && !hasCommand ? given.hypernest : '';
  if (lacks) {
    console.log(`skip ${name}: no ${lacks}`);
    skipped += 1;
    continue;
  }
  try {
    const pages = await run(browser.context, served.url);
    for (const page of pages) assert.deepEqual(page.thrown ?? [], [], 'a page threw');
    passed += 1;
    console.log(`ok   ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL ${name}\n     ${String(error.stack ?? error.message).replaceAll('\n', '\n     ')}`);
    for (const page of browser.context.pages()) {
      const text = await page.evaluate(() => document.querySelector('#migration')?.textContent.replace(/\s+/g, ' ') ?? '').catch(() => '');
      if (text) console.log(`     ${text}`);
    }
  }
  for (const page of browser.context.pages().slice(1)) await page.close();
}
await browser.close();
served.close();
console.log(`${passed} passed, ${failed} failed${skipped ? `, ${skipped} skipped` : ''}`);
process.exit(failed > 0 || passed === 0 ? 1 : 0);
