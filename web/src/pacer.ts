// How much guest time to run now, so that a slice stays short and an idle guest keeps wall time.
//
// A tick is a nanosecond of guest time and, while the guest executes, one instruction. No guest
// executes a thousand million instructions a second here, so a busy one lags behind the wall clock;
// an idle one skips ahead and must be held back. A lag beyond MAX_LAG_MS is forgiven: guest time
// then runs slow, it never jumps.

export const TICKS_PER_MS = 1e6;

/** What a slice aims to take; the limit is 8 ms. */
const SLICE_MS = 5;
/** Idle time that may be skipped at once to catch up with the wall clock. */
const MAX_LAG_MS = 250;
/** Below this the guest is level with the wall clock. */
const LEVEL_MS = 0.5;
const FIRST_SLICE = 200_000;
const SHORTEST_SLICE = 10_000;

/** The end of a slice, whichever comes first. */
export interface Budget {
  readonly ticks: number;
  readonly instructions: number;
}

export class Pacer {
  private originWall = 0;
  private originTick = 0;
  private instructions = FIRST_SLICE;

  /** Guest time `tick` is level with wall time `wall` (ms): at boot and after a pause. */
  level(wall: number, tick: number): void {
    this.originWall = wall;
    this.originTick = tick;
  }

  /** What to run now; nothing when the guest is level with the wall clock and has to wait. */
  plan(wall: number, tick: number): Budget | undefined {
    let lag = this.originTick + (wall - this.originWall) * TICKS_PER_MS - tick;
    if (lag > MAX_LAG_MS * TICKS_PER_MS) {
      lag = MAX_LAG_MS * TICKS_PER_MS;
      this.level(wall, tick + lag);
    }
    if (lag < LEVEL_MS * TICKS_PER_MS) return undefined;
    return { ticks: Math.floor(lag), instructions: Math.floor(this.instructions) };
  }

  /** A slice took `ms` for `instructions`: size the next one. */
  took(ms: number, instructions: number): void {
    if (instructions < 1000 || ms <= 0) return;
    // Grow gently, shrink at once: a slice that is too long is what the user feels.
    const ideal = (instructions / ms) * SLICE_MS;
    this.instructions = Math.max(SHORTEST_SLICE, Math.min(ideal, this.instructions * 1.5));
  }
}
