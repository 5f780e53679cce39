// Colours with fixed meanings (Okabe & Ito 2008), and the scales of heatmaps: domains are fixed per statistic, never
// stretched to the data, so that the same colour is the same number in every run and at every moment.

export const ROLES = {
  attention: { hue: "#0072B2", label: "attention" },
  router: { hue: "#E69F00", label: "router" },
  experts: { hue: "#009E73", label: "experts" },
  embedding: { hue: "#56B4E9", label: "embedding" },
  norms: { hue: "#999999", label: "norms" },
  model: { hue: "#CC79A7", label: "whole model" },
};
export const ALARM = "#D55E00";
export const RUNS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442"];

/** The role of a row, from the last words of its tensor's name. */
export function roleOf(row) {
  const role = row.role || "";
  if (/norm/.test(role)) return "norms";
  if (/proj$/.test(role) && !/gate_up_proj|down_proj/.test(role)) return "attention";
  if (/gate_up_proj|down_proj|expert/.test(role)) return "experts";
  return role in ROLES ? role : "model";
}

const VIRIDIS = ["#440154", "#482475", "#414487", "#355F8D", "#2A788E", "#21918C", "#22A884", "#44BF70", "#7AD151", "#BDDF26", "#FDE725"];
const BLUE = "#0072B2", VERMILION = "#D55E00";
export const NEUTRAL = { light: "#F3F3F1", dark: "#22252B" };
const MISSING_BITS = 0x7fc0ffee;

const parse = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

/** 256 colours as little-endian RGBA words, between stops. */
function ramp(stops) {
  const words = new Uint32Array(256), parts = stops.map(parse);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (parts.length - 1), low = Math.min(parts.length - 2, Math.floor(at)), rest = at - low;
    const [r, g, b] = [0, 1, 2].map((c) => Math.round(parts[low][c] * (1 - rest) + parts[low + 1][c] * rest));
    words[i] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  return words;
}
const word = (hex) => ramp([hex, hex])[0];

/** How a statistic is coloured: magnitudes on viridis, signed values and loads on blue - neutral - vermilion. */
export function scaleOf(stat, theme, difference = false) {
  const low = stat.low ?? 0, high = stat.high ?? 1;
  const neutral = NEUTRAL[theme];
  const diverging = ramp([BLUE, neutral, VERMILION]);
  if (difference && stat.scale === "log") {
    return { kind: "ratio", low: -2, high: 2, words: diverging, at: (v) => (v + 2) / 4, theme,
      ticks: [-2, -1, 0, 1, 2].map((t) => [t, t === 0 ? "equal" : `${t > 0 ? "×" : "÷"}${10 ** Math.abs(t)}`]) };
  }
  if (difference) {
    const span = (high - low) / 2;
    return { kind: "signed", low: -span, high: span, words: diverging, at: (v) => (v + span) / (2 * span), theme,
      ticks: [-span, 0, span].map((t) => [t, null]) };
  }
  if (stat.name === "load") {
    return { kind: "load", low: 1 / 4, high: 4, words: diverging, at: (v) => (v <= 0 ? 0 : (Math.log2(v) + 2) / 4), theme,
      ticks: [[0.25, "¼"], [0.5, "½"], [1, "1"], [2, "2"], [4, "4"]] };
  }
  if (low < 0) {
    const span = Math.max(-low, high);
    return { kind: "signed", low: -span, high: span, words: diverging, at: (v) => (v + span) / (2 * span), theme,
      ticks: [-span, 0, span].map((t) => [t, null]) };
  }
  if (stat.scale === "log") {
    const a = Math.log10(low || 1e-12), b = Math.log10(high);
    const ticks = [];
    for (let t = Math.ceil(a); t <= Math.floor(b); t += Math.max(1, Math.ceil((b - a) / 6))) ticks.push([10 ** t, "power"]);
    return { kind: "log", low, high, words: ramp(VIRIDIS), at: (v) => (v <= 0 ? -1 : (Math.log10(v) - a) / (b - a)), theme, ticks };
  }
  return { kind: "linear", low, high, words: ramp(VIRIDIS), at: (v) => (v - low) / (high - low || 1), theme,
    ticks: [low, (low + high) / 2, high].map((t) => [t, null]) };
}

export const isMissingBits = (bits) => bits === MISSING_BITS;
export const colourAt = (scale, value) => scale.words[Math.max(0, Math.min(255, Math.round(scale.at(value) * 255)))];
export const css = (w) => `rgb(${w & 255} ${(w >> 8) & 255} ${(w >> 16) & 255})`;
export const MAGENTA = { a: word("#E4009E"), b: word("#3A0029") };
