// How numbers are written: four significant digits, true minus, the exponent from 1e-3 down and 1e5 up, SI for counts.

const SUPER = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const minus = (text) => text.replace("-", "−");

/** A measured number; `signed` writes + as well. Non-finite values by name, never hidden. */
export function number(value, { signed = false, digits = 4 } = {}) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value === "nan" ? "NaN" : value === "inf" ? "∞" : value === "-inf" ? "−∞" : value;
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const plus = signed && value > 0 ? "+" : "";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    return plus + minus(mantissa) + "e" + minus(exponent.replace("+", ""));
  }
  const text = Number.isInteger(value) ? String(value) : value.toPrecision(digits);
  return plus + minus(text.includes("e") ? String(Math.round(value)) : text);
}

/** Powers of ten for axes: 10⁻³. */
export const power = (exponent) => "10" + [...String(exponent)].map((c) => SUPER[c]).join("");

/** Whole things: 4,352,568 or, short, 4.353 M. */
export function count(value, short = false) {
  if (value === null || value === undefined || typeof value === "string") return number(value);
  if (!short || Math.abs(value) < 1e5) return Math.round(value).toLocaleString("en-US").replace("-", "−");
  for (const unit of ["k", "M", "G", "T", "P"]) {
    value /= 1000;
    if (Math.abs(value) < 1000 || unit === "P") return `${minus(value.toPrecision(4))} ${unit}`;
  }
}

export const bytes = (value) => (value === null || value === undefined ? "–" : count(value, true) + (value < 1e5 ? " bytes" : "B"));
export const percent = (share, digits = 1) => (share === null || share === undefined || !Number.isFinite(share)
  ? "–" : minus((100 * share).toFixed(digits)) + " %");
export const milliseconds = (seconds) => (seconds === null || !Number.isFinite(seconds) ? "–" : number(seconds * 1000) + " ms");

/** The shortest decimal that is this very float32. */
export function float32(value) {
  if (!Number.isFinite(value)) return number(value);
  for (let digits = 1; digits <= 9; digits++) {
    const text = Number(value).toPrecision(digits);
    if (Math.fround(Number(text)) === Math.fround(value)) return minus(String(Number(text)));
  }
  return minus(String(value));
}

/** A measured value with its unit. */
export function withUnit(value, unit) {
  if (unit === "share") return typeof value === "number" && Number.isFinite(value) ? percent(value, 2) : number(value);
  if (unit === "s") return typeof value === "number" ? milliseconds(value) : number(value);
  if (unit === "B") return bytes(value);
  if (unit === "tokens" || unit === "elements" || unit === "steps" || unit === "experts") return `${count(value)} ${unit}`;
  return number(value) + (unit ? ` ${unit}` : "");
}

/** When an evaluation was, or a text was written: step -1 stands for before the first. */
export const when = (step) => (step < 0 ? "before training" : `after step ${count(step)}`);

export const plural = (n, one, many = one + "s") => `${count(n)} ${n === 1 ? one : many}`;

/** Which steps a number belongs to, in words: one, or all from the first to the last. */
export const stepsOf = (first, last) => (last < 0 ? "before training" : first === last ? `step ${count(first)}` : `steps ${count(first)} to ${count(last)}`);
export const whenOf = (first, last) => (last < 0 ? stepsOf(first, last) : `${first === last ? "at" : "on average over"} ${stepsOf(first, last)}`);
/** When a number was measured that stands beside others, where that is not when they were. */
export const elsewhen = (reading, beside) => (!reading || reading.when === beside.when ? "" : ` (${reading.when})`);
export const capital = (text) => text[0].toUpperCase() + text.slice(1);

/** White space of a token, made to be seen. */
export const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "→");
