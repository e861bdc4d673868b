// Boots the first guest of the manifest in Chromium and prints, as JSON, how long it took to show a
// prompt and how fast the machine ran.
//
//     node tests/browser/bench.mjs [--dist web/dist] [--guests .cache/guests] [--until PATTERN]

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { browse, condition, fail, inState, options, seen, serve } from './harness.mjs';

const given = options({ dist: 'web/dist', guests: '.cache/guests', until: '[~/] [#$] ?$' });
for (const file of [join(given.dist, 'index.html'), join(given.guests, 'manifest.json')]) {
  if (!existsSync(file)) fail(`${file} is missing: run "cargo xtask demo --check" first`);
}

const site = await serve(given.dist, given.guests);
const browser = await browse();
const page = await browser.context.newPage();
await page.goto(site.url);
await inState(page, ['running', 'idle'], 60_000); // the images are loaded
const start = performance.now();
let fastest = 0;
const sampling = setInterval(() => {
  condition(page).then(({ mips }) => (fastest = Math.max(fastest, mips || 0)), () => {});
}, 200);
await seen(page, new RegExp(given.until, 'm'), 600_000);
const seconds = (performance.now() - start) / 1000;
clearInterval(sampling);
const { instructions } = await page.evaluate(() => ({ instructions: Number(document.querySelector('#instructions').dataset.value) }));
console.log(
  JSON.stringify({
    browser: `Chromium ${browser.context.browser()?.version() ?? ''}`.trim(),
    until: given.until,
    seconds: Number(seconds.toFixed(3)),
    instructions,
    mips: Number((instructions / seconds / 1e6).toFixed(1)),
    fastest_half_second_mips: fastest,
  }),
);
await browser.close();
site.close();
