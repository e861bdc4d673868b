// Runs a guest in WebAssembly to a tick, in Node, and prints as JSON where it stood.
//
//     node run-to-tick.mjs KERNEL INITRD COMMAND_LINE MEMORY_BYTES CPUS VMX TICK

import { readFileSync } from 'node:fs';
import init, { Machine } from '../../pkg/hypernest_wasm.js';

const [kernel, initrd, cmdline, memory, cpus, vmx, tick] = process.argv.slice(2);
const target = Number(tick);

await init({ module_or_path: readFileSync(new URL('../../pkg/hypernest_wasm_bg.wasm', import.meta.url)) });
const options = { memory: Number(memory), cpus: Number(cpus), cmdline, vmx };
const machine = new Machine(options, readFileSync(kernel), readFileSync(initrd));

let ticks = 0;
while (ticks < target) {
  // Slices as the page takes them: where they end must not matter.
  const report = machine.run_slice(target - ticks, 5_000_000);
  ticks = report.ticks;
  process.stderr.write(machine.take_serial());
  if (report.stop) {
    console.error(`stopped at tick ${ticks}: ${report.stop.kind}: ${report.stop.message}`);
    process.exit(1);
  }
}
console.log(JSON.stringify({ ticks, state_hash: machine.state_hash() }));
