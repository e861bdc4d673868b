// The page, driven as a user does, in Chromium.
//
//     node tests/browser/page.mjs [--dist web/dist] [--guests .cache/guests] [--only WORD] [--screenshot FILE.png]
//
// Without guest images the tests that boot Linux are skipped, with a line that says so.

import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { at, browse, condition, consoleText, fail, inState, options, seen, serve } from './harness.mjs';

const given = options({ dist: 'web/dist', guests: '.cache/guests', only: '', screenshot: '' });
if (!existsSync(join(given.dist, 'index.html'))) fail(`${given.dist} holds no built page: run "npm run wasm && npm run build" first`);
const hasGuests = existsSync(join(given.guests, 'manifest.json'));

const PROMPT = /[~/] #\s*$/;
/** The greeting waits for input. */
const READY = /^>/m;
/** A boot takes seconds; a busy machine may take many times as long. */
const BOOT_MS = 180_000;

/**
 * A test gets a page: with `first` as it opens, with `alone` at the greeting, with `linux` at the first
 * guest of a site that serves guests. The others serve none.
 */
const tests = [];
const test = (name, needs, run) => tests.push({ name, needs, run });

// ---- the built-in guests ----

test('the first screen is a hypervisor that shows the exits of its guest', 'first', async (page) => {
  const text = await seen(page, /exits: 2 CPUID, 1 RDMSR/, 20_000);
  assert.match(text, /^13 +48 +EPT violation +582 .*maps a page at 203000$/m);
  assert.match(text, /L2 says: all came back right/);
  await inState(page, 'stopped');
  assert.match(await page.textContent('#stop'), /powered off/);
  assert.match(await page.textContent('footer'), /drop a Linux kernel/);
});

test('without VMX the hypervisor says so, and with it runs again', 'first', async (page) => {
  await inState(page, 'stopped', 20_000);
  await page.selectOption('#vmx', 'none');
  await page.click('text=Boot');
  await seen(page, 'has no VMX', 20_000);
  await page.selectOption('#vmx', 'kvm');
  await page.click('text=Boot');
  await seen(page, /exits: 2 CPUID, 1 RDMSR/, 20_000);
});

test('the address can name the guest', 'alone', async (page) => {
  await seen(page, 'It has counted 2262 primes', 20_000);
});

test('an address that names no guest gives a clear error', 'alone', async (page, site) => {
  await page.goto(`${site}?guest=Multics`);
  assert.match(await alert(page), /no guest Multics/);
  await page.selectOption('.guest select', { label: 'Built-in greeting' });
  await seen(page, READY, 20_000);
});

test('what is typed comes back from the guest', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  await page.keyboard.type('hello, world');
  await seen(page, '> HELLO, WORLD', 5_000);
});

test('an idle guest sleeps and wakes on input', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  await inState(page, 'idle');
  const before = (await condition(page)).instructions;
  await page.waitForTimeout(500);
  assert.equal((await condition(page)).instructions, before);
  await page.keyboard.type('x');
  await seen(page, '> X', 5_000);
});

test('guest time of an idle guest keeps pace with the wall clock', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  await inState(page, 'idle');
  const guestSeconds = async () => Number.parseFloat(await page.textContent('#time'));
  const [guest, wall] = [await guestSeconds(), Date.now()];
  await page.waitForTimeout(3_000);
  const ratio = (await guestSeconds() - guest) / ((Date.now() - wall) / 1000);
  assert.ok(ratio > 0.5 && ratio < 1.2, `guest seconds per second: ${ratio}`);
});

test('pause stops the machine and resume continues it', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  await page.click('#toggle');
  await inState(page, 'paused');
  await page.focus('.xterm-helper-textarea');
  await page.keyboard.type('later');
  await page.waitForTimeout(300);
  assert.doesNotMatch(await consoleText(page), /LATER/);
  await page.click('#toggle');
  await seen(page, '> LATER', 5_000);
});

test('reset builds the machine anew', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  await page.keyboard.type('gone');
  await seen(page, '> GONE', 5_000);
  await page.click('#reset');
  await seen(page, READY, 20_000);
  assert.doesNotMatch(await consoleText(page), /GONE/);
});

test('a reset by the guest is shown, and start boots again', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  await page.keyboard.press('Control+d');
  await inState(page, 'stopped');
  assert.match(await page.textContent('[role=status]'), /reset/i);
  await page.click('#toggle');
  await seen(page, READY, 20_000);
});

test('F6 moves between console and controls', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  await page.keyboard.press('F6');
  assert.equal(await page.evaluate(() => document.activeElement.id), 'toggle');
  await page.keyboard.press('F6');
  await page.keyboard.type('back');
  await seen(page, '> BACK', 5_000);
});

test('a loaded page works without a network', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  await page.context().setOffline(true);
  await page.click('#reset');
  await page.waitForTimeout(200);
  await seen(page, READY, 20_000);
  await page.keyboard.type('offline');
  await seen(page, '> OFFLINE', 5_000);
});

// ---- bad input ----

test('a garbage file gives a clear error and leaves the machine running', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  await dropFiles(page, [{ name: 'holiday.jpg', bytes: [0xff, 0xd8, 0xff, 0xe0, 1, 2, 3, 4] }]);
  const error = await alert(page);
  assert.match(error, /holiday\.jpg: .*(image|kernel)/);
  await page.focus('.xterm-helper-textarea');
  await page.keyboard.type('alive');
  await seen(page, '> ALIVE', 5_000);
});

test('an empty file gives a clear error', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  await dropFiles(page, [{ name: 'vmlinuz', bytes: [] }]);
  assert.match(await alert(page), /vmlinuz: .*empty file/);
});

test('an initial RAM disk alone asks for its kernel', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  await dropFiles(page, [{ name: 'initrd.img', bytes: [...Buffer.from('070701'.padEnd(512, '0'))] }]);
  assert.match(await alert(page), /initrd\.img is an initial RAM disk: drop it together with the kernel/);
});

test('a truncated kernel gives a clear error, and another guest can be chosen', 'alone', async (page) => {
  await seen(page, READY, 20_000);
  const kernel = Buffer.alloc(1024);
  kernel.writeUInt16LE(0xaa55, 0x1fe);
  kernel.write('HdrS', 0x202);
  kernel.writeUInt16LE(0x20f, 0x206);
  kernel[0x1f1] = 40; // setup sectors that are not there
  await dropFiles(page, [{ name: 'vmlinuz-cut', bytes: [...kernel] }]);
  const error = await alert(page);
  assert.ok(error.length > 20 && error.length < 300, error);
  assert.doesNotMatch(error, /unreachable|undefined|panic|broke down/);
  await page.selectOption('.guest select', { label: 'Built-in greeting' });
  await seen(page, READY, 20_000);
});

test('more than 3 GiB of memory is refused before anything is fetched', 'alone', async (page, site) => {
  const fetched = [];
  const manifest = { guests: [{ name: 'Huge', kernel: 'huge', memory: 3 * 2 ** 30 + 4096 }] };
  await page.route('**/guests/**', (route) => {
    fetched.push(route.request().url());
    return route.request().url().endsWith('manifest.json') ? route.fulfill({ json: manifest }) : route.abort();
  });
  await page.goto(at(site, 'Huge'));
  assert.match(await alert(page), /3 GiB/);
  assert.equal(fetched.length, 1, String(fetched));
});

test('a guest image that the server lacks gives a clear error', 'alone', async (page, site) => {
  const manifest = { guests: [{ name: 'Gone', kernel: 'gone' }] };
  await page.route('**/manifest.json', (route) => route.fulfill({ json: manifest }));
  await page.goto(at(site, 'Gone'));
  assert.match(await alert(page), /gone.*404/);
});

// ---- Linux ----

test('Linux boots to a prompt and answers uname -a', 'linux', async (page) => {
  const start = Date.now();
  await seen(page, PROMPT, BOOT_MS);
  console.log(`     prompt after ${((Date.now() - start) / 1000).toFixed(1)} s, ${(await condition(page)).instructions} instructions`);
  await page.keyboard.type('uname -a');
  await seen(page, /# uname -a$/m, 20_000);
  await page.keyboard.press('Enter');
  const text = await seen(page, /^Linux .*x86_64/m, 20_000);
  assert.match(text, /^Linux \S+ 6\.\d+\.\S+.* x86_64/m);
  await seen(page, PROMPT, 20_000);
  await inState(page, 'idle', 20_000);
  if (given.screenshot) {
    await page.emulateMedia({ colorScheme: 'dark' });
    await page.keyboard.type('head -5 /proc/cpuinfo\nfree -m\n');
    await seen(page, /Swap:.*\n.*#\s*$/, 20_000);
    await page.screenshot({ path: given.screenshot });
  }
});

test('a booting Linux can be paused, and reset', 'linux', async (page) => {
  await seen(page, /Linux version|\[ +0\./, BOOT_MS);
  await page.click('#toggle');
  await inState(page, 'paused');
  const before = (await condition(page)).instructions;
  await page.waitForTimeout(300);
  assert.equal((await condition(page)).instructions, before);
  await page.click('#reset');
  await inState(page, 'running', 20_000);
  await seen(page, PROMPT, BOOT_MS);
});

test('Linux boots from files that the user opens, with two CPUs', 'linux', async (page) => {
  await seen(page, /Linux version|\[ +0\./, BOOT_MS);
  await page.selectOption('#cpus', '2');
  const manifest = JSON.parse(readFileSync(join(given.guests, 'manifest.json'), 'utf8'));
  const { kernel, initrd } = manifest.guests[0];
  const chooser = page.waitForEvent('filechooser');
  await page.click('text=Open files');
  await (await chooser).setFiles([join(given.guests, initrd), join(given.guests, kernel)]);
  await page.waitForFunction((name) => document.querySelector('.guest select').value === name, kernel.split('/').pop());
  await seen(page, PROMPT, BOOT_MS);
  await page.keyboard.type('nproc\n');
  await seen(page, /# nproc\n2$/m, 20_000);
});

test('Linux runs guests with KVM, whose exits are counted while they happen', 'linux', async (page, site) => {
  const { guests } = JSON.parse(readFileSync(join(given.guests, 'manifest.json'), 'utf8'));
  const { name } = guests.find(({ vmx }) => vmx === 'max');
  await page.goto(at(site, name));
  // The kernel alone makes no exits; each of these guests makes at least as many as it has been asked for.
  await seen(page, 'L2 BEGIN real_out', BOOT_MS);
  const counts = [];
  for (const test of ['real_out', 'cpuid', 'vmcall', 'long_out', 'mmio', 'touch_cold', 'spin', 'timer']) {
    await seen(page, new RegExp(`^L2 ${test} ok=1`, 'm'), BOOT_MS);
    counts.push((await condition(page)).exits);
  }
  assert.ok(counts[0] > 0 && counts.every((n, i) => i === 0 || n >= counts[i - 1]), String(counts));
  await seen(page, 'L2 DONE failures=0', BOOT_MS);
  await inState(page, 'stopped', BOOT_MS);
  const { exits } = await condition(page);
  assert.ok(exits > 5 * 2000, `${exits} exits`);
  assert.ok(new Set([...counts, exits]).size > 2, `not counted live: ${counts}`);
  console.log(`     ${exits} exits`);
});

// ---- helpers ----

/** Drops files on the page, as the browser delivers them. */
async function dropFiles(page, files) {
  const transfer = await page.evaluateHandle((given) => {
    const transfer = new DataTransfer();
    for (const { name, bytes } of given) transfer.items.add(new File([new Uint8Array(bytes)], name));
    return transfer;
  }, files);
  await page.dispatchEvent('body', 'dragover', { dataTransfer: transfer });
  await page.dispatchEvent('body', 'drop', { dataTransfer: transfer });
}

async function alert(page) {
  await page.waitForSelector('[role=alert] span', { timeout: 20_000 });
  return page.textContent('[role=alert] span');
}

// ---- the runner ----

const [bare, served] = [await serve(given.dist, undefined), await serve(given.dist, given.guests)];
const linux = hasGuests ? JSON.parse(readFileSync(join(given.guests, 'manifest.json'), 'utf8')).guests[0].name : '';
const starts = {
  first: [bare.url, bare.url],
  alone: [bare.url, at(bare.url, 'Built-in greeting')],
  linux: [served.url, at(served.url, linux)],
};
const browser = await browse();
let passed = 0;
let failed = 0;
let skipped = 0;
for (const { name, needs, run } of tests) {
  if (!name.includes(given.only)) continue;
  if (needs === 'linux' && !hasGuests) {
    console.log(`skip ${name}: no ${join(given.guests, 'manifest.json')}`);
    skipped += 1;
    continue;
  }
  const page = await browser.context.newPage();
  const thrown = [];
  page.on('pageerror', (error) => thrown.push(error));
  try {
    const [site, start] = starts[needs];
    await page.goto(start);
    await run(page, site);
    assert.deepEqual(thrown, [], 'the page threw');
    passed += 1;
    console.log(`ok   ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL ${name}\n     ${String(error.message).replaceAll('\n', '\n     ')}`);
  }
  await page.context().setOffline(false);
  await page.close();
}
await browser.close();
for (const site of [bare, served]) site.close();
console.log(`${passed} passed, ${failed} failed${skipped ? `, ${skipped} skipped` : ''}`);
process.exit(failed > 0 || passed === 0 ? 1 : 0);
