// Runs a guest in WebAssembly, in Node, until its machine stops, and prints what it sent to its serial port.
//
//     node run-to-end.mjs KERNEL COMMAND_LINE MEMORY_BYTES VMX

import { readFileSync } from 'node:fs';
import init, { Machine } from '../../pkg/hypernest_wasm.js';

const [kernel, cmdline, memory, vmx] = process.argv.slice(2);
/** More than any guest takes that is run so. */
const LIMIT = 2e9;

await init({ module_or_path: readFileSync(new URL('../../pkg/hypernest_wasm_bg.wasm', import.meta.url)) });
const machine = new Machine({ memory: Number(memory), cpus: 1, cmdline, vmx }, readFileSync(kernel));

for (;;) {
  const report = machine.run_slice(5_000_000, 5_000_000);
  process.stdout.write(machine.take_serial());
  if (report.stop) {
    console.error(`${report.stop.kind}: ${report.stop.message}`);
    break;
  }
  if (report.ticks > LIMIT) {
    console.error(`still running at tick ${report.ticks}`);
    process.exitCode = 1;
    break;
  }
}
