// Goes on from a snapshot in WebAssembly, in Node: to a tick, where it saves, and to another, where it prints as JSON where it
// stands.
//
//     node resume-to-tick.mjs SNAPSHOT SAVE_TICK SAVE_TO TICK

import { readFileSync, writeFileSync } from 'node:fs';
import init, { Machine } from '../../pkg/hypernest_wasm.js';

const [snapshot, saveTick, saveTo, tick] = process.argv.slice(2);

await init({ module_or_path: readFileSync(new URL('../../pkg/hypernest_wasm_bg.wasm', import.meta.url)) });
const begun = performance.now();
const machine = Machine.from_snapshot(readFileSync(snapshot));
const resumed = performance.now() - begun;

function runTo(target) {
  let { ticks } = machine.run_slice(0, 0);
  while (ticks < target) {
    const report = machine.run_slice(target - ticks, 5_000_000);
    ticks = report.ticks;
    process.stderr.write(machine.take_serial());
    if (report.stop) {
      console.error(`stopped at tick ${ticks}: ${report.stop.kind}: ${report.stop.message}`);
      process.exit(1);
    }
  }
  return ticks;
}

runTo(Number(saveTick));
writeFileSync(saveTo, machine.snapshot());
const ticks = runTo(Number(tick));
console.log(JSON.stringify({ ticks, state_hash: machine.state_hash(), resume_ms: Math.round(resumed) }));
