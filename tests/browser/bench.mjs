// Boots the first guest of the manifest in Chromium and prints, as JSON, how long it took to show a
// prompt and how fast the machine ran.
//
//     node tests/browser/bench.mjs [--dist web/dist] [--guests .cache/guests] [--until PATTERN]

import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { at, browse, condition, fail, inState, options, seen, serve } from './harness.mjs';

const given = options({ dist: 'web/dist', guests: '.cache/guests', until: '[~/] [#$] ?$' });
for (const file of [join(given.dist, 'index.html'), join(given.guests, 'manifest.json')]) {
  if (!existsSync(file)) fail(`${file} is missing: run "cargo xtask demo --check" first`);
}

const site = await serve(given.dist, given.guests);
const browser = await browse();
const manifest = JSON.parse(readFileSync(join(given.guests, 'manifest.json'), 'utf8'));
const linux = await boot(manifest, new RegExp(given.until, 'm'));
const echo = await echoTimes(linux.page, 40);
await linux.page.close();
const loop = existsSync(join(given.guests, 'loop.elf'))
  ? await boot({ guests: [{ name: 'Loop', kernel: 'loop.elf', memory: 16 << 20 }] }, undefined)
  : undefined;
console.log(
  JSON.stringify({
    browser: `Chromium ${browser.context.browser()?.version() ?? ''}`.trim(),
    until: given.until,
    seconds: linux.seconds,
    instructions: linux.instructions,
    mips: linux.mips,
    loop_mips: loop?.mips,
    echo_ms: { median: echo[echo.length >> 1], worst: echo.at(-1) },
  }),
);
await browser.close();
site.close();

/** From the start of the machine, images loaded, until the console shows `text` or the guest stops. */
async function boot(manifest, text) {
  const page = await browser.context.newPage();
  await page.route('**/manifest.json', (route) => route.fulfill({ json: manifest }));
  await page.goto(at(site.url, manifest.guests[0].name));
  await inState(page, ['running', 'idle', 'stopped'], 60_000);
  const start = performance.now();
  if (text) await seen(page, text, 600_000);
  else await inState(page, 'stopped', 600_000);
  const seconds = (performance.now() - start) / 1000;
  const { instructions } = await condition(page);
  return { page, seconds: round(seconds), instructions, mips: round(instructions / seconds / 1e6) };
}

/** Milliseconds from a key to its echo on the screen, sorted. */
async function echoTimes(page, count) {
  await page.focus('.xterm-helper-textarea');
  const times = await page.evaluate(async (count) => {
    const rows = document.querySelector('.xterm-rows');
    const area = document.querySelector('.xterm-helper-textarea');
    const times = [];
    for (let n = 0; n < count; n += 1) {
      await new Promise((resolve) => setTimeout(resolve, 60));
      const before = rows.textContent;
      const echoed = new Promise((resolve) => {
        const observer = new MutationObserver(() => {
          if (rows.textContent === before) return;
          observer.disconnect();
          resolve();
        });
        observer.observe(rows, { childList: true, subtree: true, characterData: true });
      });
      const start = performance.now();
      area.dispatchEvent(new KeyboardEvent('keypress', { key: 'x', charCode: 120, keyCode: 120, bubbles: true, cancelable: true }));
      await echoed;
      times.push(performance.now() - start);
    }
    return times;
  }, count);
  return times.map(round).sort((a, b) => a - b);
}

function round(value) {
  return Number(value.toFixed(2));
}
