// Where numbers come from: the server of `pellucid watch`, or, in a report, the answers packed into the file itself.
import { stepsOf, whenOf } from "./format.js";

const packed = window.__report__ ?? null; // {path: base64 of gzip}
export const isReport = packed !== null;
export const holds = (path) => packed === null || path in packed;

async function bytesOf(path) {
  if (!packed) {
    const response = await fetch(`/api/${path}`);
    if (!response.ok) throw new Error((await response.json().catch(() => ({}))).problem ?? `the server answered ${response.status}`);
    return response.arrayBuffer();
  }
  if (!(path in packed)) throw new Error("This report does not hold this; open the run itself with pellucid watch.");
  const zipped = Uint8Array.from(atob(packed[path]), (c) => c.charCodeAt(0));
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** A JSON answer. Throws an Error whose message is a sentence for the user. */
export async function ask(path) {
  return JSON.parse(new TextDecoder().decode(await bytesOf(path)));
}

/** A window of a stream: see Feed.window for the layout. Values keep their bits, so "not measured" differs from NaN. */
export class Window {
  constructor(buffer) {
    const size = new DataView(buffer).getUint32(0, true);
    this.header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
    const [parts, columns, rows, stats = 1] = this.header.shape;
    Object.assign(this, { parts, columns, rows, stats, span: this.header.span });
    this.steps = new Int32Array(buffer.slice(4 + size, 4 + size + 4 * columns));
    const start = 4 + size + 8 * Math.ceil(columns / 2);
    this.values = new Float32Array(buffer, start);
    this.bits = new Uint32Array(buffer, start);
  }

  /** Offset of a cell; part "min", "max", "mean", "last", "measured" or "nonfinite" (all the value itself where a column is one step). */
  at(part, column, row, stat = 0) {
    const index = this.parts === 1 ? 0 : Math.max(0, this.header.parts.indexOf(part));
    return ((index * this.columns + column) * this.rows + row) * this.stats + stat;
  }

  /** The value of a cell: a number (NaN and infinities included), or null where nothing was measured. */
  value(column, row, stat = 0, part = "mean") {
    const i = this.at(part, column, row, stat);
    return this.bits[i] === 0x7fc0ffee ? null : this.values[i];
  }

  /** How many non-finite values the cell holds. */
  nonfinite(column, row, stat = 0) {
    if (this.parts > 1) return this.values[this.at("nonfinite", column, row, stat)];
    const value = this.value(column, row, stat);
    return value !== null && !Number.isFinite(value) ? 1 : 0;
  }

  /** A function of the column: what a heatmap shows of one row and statistic. The value, or the extreme of a bucket;
   *  null: not measured; NaN: something under it is not finite. */
  cells(row, stat, part) {
    const stride = this.rows * this.stats, at = this.at(part, 0, row, stat), { values, bits } = this;
    const bad = this.parts > 1 ? this.at("nonfinite", 0, row, stat) : null;
    return (column) => {
      if (column < 0) return null;
      const i = at + column * stride, value = values[i];
      if (bad !== null && values[bad + column * stride] > 0) return NaN;
      if (bits[i] === 0x7fc0ffee) return null;
      return Number.isFinite(value) ? value : NaN;
    };
  }

  /** Column that holds `step`, or the last one before it; -1 if all are later. */
  columnOf(step) {
    let low = 0, high = this.columns - 1, found = -1;
    while (low <= high) {
      const middle = (low + high) >> 1;
      if (this.steps[middle] <= step) { found = middle; low = middle + 1; } else high = middle - 1;
    }
    return found;
  }

  /** Last step that a column holds. */
  lastOf(column) { return Math.min(this.steps[column] + this.span - 1, this.header.latest); }

  /** In words, which steps a column holds: "step 5", "steps 0 to 15". */
  stepsOf(column) { return stepsOf(this.steps[column], this.lastOf(column)); }

  /** What it says of a step, from the newest `recorded` ones up to it; null if all are later. */
  reading(step, recorded = 1) {
    const column = this.columnOf(step);
    return column < 0 ? null : new Reading(this, column, step, recorded);
  }

  /** One row over time. */
  series(row, stat = 0, part = "mean") {
    return Array.from({ length: this.columns }, (_, column) => this.value(column, row, stat, part));
  }

  /** One row over time as line.js draws it: means, their band, and where how much is not finite. */
  line(row, stat = 0) {
    const steps = Array.from(this.steps), counts = steps.map((_, column) => this.nonfinite(column, row, stat));
    return { steps, values: this.series(row, stat), bad: steps.filter((_, column) => counts[column] > 0), nonfinite: counts.reduce((a, b) => a + b, 0),
      ...(this.parts > 1 ? { lasts: steps.map((_, column) => this.lastOf(column)), low: this.series(row, stat, "min"), high: this.series(row, stat, "max") } : {}) };
  }

  /** This window continued by a newer one of the same grain, or null if they do not fit together. */
  extended(newer) {
    if (newer.columns === 0) return this;
    if (this.parts !== newer.parts || this.span !== newer.span || this.columns + newer.columns > 2048 + 64) return null;
    const keep = this.columnOf(newer.steps[0] - 1) + 1, columns = keep + newer.columns, cell = this.rows * this.stats;
    const values = new Float32Array(this.parts * columns * cell), bits = new Uint32Array(values.buffer);
    for (let p = 0; p < this.parts; p++) {
      bits.set(this.bits.subarray(p * this.columns * cell, (p * this.columns + keep) * cell), p * columns * cell);
      bits.set(newer.bits.subarray(p * newer.columns * cell, (p + 1) * newer.columns * cell), (p * columns + keep) * cell);
    }
    const steps = new Int32Array(columns);
    steps.set(this.steps.subarray(0, keep));
    steps.set(newer.steps, keep);
    const made = Object.create(Window.prototype);
    return Object.assign(made, { header: newer.header, parts: this.parts, columns, rows: this.rows, stats: this.stats,
      span: this.span, steps, values, bits });
  }
}

/** The numbers of a step: its own, or those of the last step measured before it. Where a column holds many steps, or many
 * were asked for, their mean. `when` says in words which steps these are. */
export class Reading {
  constructor(window, column, step, recorded) {
    const newest = recorded === 1 && step >= window.header.latest; // of many steps of a column the last has its own values
    this.window = window;
    this.part = newest ? "last" : "mean";
    this.first = Math.max(0, column - Math.ceil(recorded / window.span) + 1);
    this.column = column;
    const [from, to] = [newest ? window.lastOf(column) : window.steps[this.first], window.lastOf(column)];
    Object.assign(this, { from, to, when: whenOf(from, to), steps: stepsOf(from, to) });
  }

  /** A number, NaN where one of several is not finite, or null where nothing was measured. */
  value(row, stat = 0) {
    if (this.first === this.column && (this.window.parts === 1 || this.part === "last")) return this.window.value(this.column, row, stat, this.part);
    let sum = 0, measured = 0;
    for (let column = this.first; column <= this.column; column++) {
      const value = this.window.value(column, row, stat), weight = this.window.parts === 1 ? 1 : this.window.value(column, row, stat, "measured");
      if (this.window.nonfinite(column, row, stat)) return NaN;
      if (value !== null) { sum += value * weight; measured += weight; }
    }
    return measured ? sum / measured : null;
  }

  /** Norm of some rows together, of their norms; null where one was not measured. */
  norm(rows) {
    const norms = rows.map((row) => this.value(row));
    return norms.some((v) => v === null) ? null : Math.sqrt(norms.reduce((sum, v) => sum + v * v, 0));
  }
}

export async function askWindow(path) {
  return new Window(await bytesOf(path));
}
