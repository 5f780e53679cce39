// Lines over steps by uPlot, with what it lacks: a sentence and a table for those who do not see it, non-finite values
// as magenta marks, the selected step, and a band from minimum to maximum where a point stands for many steps.
import "./locale.js";
import uPlot from "../vendor/uplot.mjs";
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState, useWidth } from "./ui.js";
import { count, number, power, stepsOf, whenOf } from "./format.js";

const finite = (v) => (v !== null && Number.isFinite(v) ? v : null);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** series: [{label, hue, dash?, points?, quiet?, ...Window.line()}]; theory: [{value, label}] horizontal lines. */
export function Lines({ label, series, log = false, unit = "", height = 200, step = null, onPick, theory = [], theme, from = null, to = null, zero = false }) {
  const [box, width] = useWidth();
  const holder = useRef(null), chart = useRef(null), at = useRef(step);
  const [table, setTable] = useState(false);
  at.current = step;
  const data = useMemo(() => join(series, log), [series, log]);
  const shape = series.map((s) => s.label + s.hue + (s.low ? "b" : "")).join("|") + theory.map((t) => t.value).join();

  useLayoutEffect(() => {
    if (!width || !data.x.length) return;
    chart.current?.destroy();
    chart.current = new uPlot(options({ width, height, series, log, unit, theory, at, data, from, to, zero }), data.columns, holder.current);
    const over = chart.current.over;
    over.addEventListener("click", () => { const i = chart.current.cursor.idx; if (i !== null && i !== undefined) onPick?.(Math.max(0, data.x[i])); });
    return () => { chart.current?.destroy(); chart.current = null; };
  }, [width, height, shape, log, theme, from, to, data.x.length === 0]);
  useEffect(() => { chart.current?.setData(data.columns); }, [data]);
  useEffect(() => { chart.current?.redraw(false); }, [step]);

  const last = series.map((s) => {
    const i = s.values.length - 1;
    return i < 0 ? null : `${s.label} ${number(s.values[i])}${unit ? ` ${unit}` : ""} ${whenOf(s.steps[i], s.lasts?.[i] ?? s.steps[i])}`;
  }).filter(Boolean).join("; ");
  const bad = series.reduce((sum, s) => sum + s.nonfinite, 0);
  return html`<figure class="lines" ref=${box} aria-label=${`${label}: ${last || "nothing recorded"}; ${bad} non-finite values`}>
    <div ref=${holder} style=${{ minHeight: `${height}px` }} aria-hidden="true"></div>
    <figcaption>
      ${series.filter((s) => !s.quiet).map((s) => html`<span class="key"><i style=${{ background: s.hue, ...(s.dash ? { background: `repeating-linear-gradient(90deg, ${s.hue} 0 4px, transparent 4px 7px)` } : {}) }}></i>${s.label}</span>`)}
      ${series.some((s) => s.quiet) && html`<span class="key"><i style=${{ background: "#999999" }}></i>the others</span>`}
      ${theory.map((t) => html`<span class="key theory"><i></i>${t.label}</span>`)}
      ${bad > 0 && html`<span class="key bad"><i class="swatch hatched"></i>${bad} non-finite</span>`}
      <button type="button" class="quiet" aria-expanded=${table} onClick=${() => setTable(!table)}>${table ? "hide table" : "table"}</button>
    </figcaption>
    ${table && html`<${Table} series=${series} />`}
  </figure>`;
}

function Table({ series }) {
  const rows = new Map(); // by the steps that they tell of
  series.forEach((s, column) => s.steps.forEach((step, i) => {
    const name = stepsOf(step, s.lasts?.[i] ?? step);
    if (!rows.has(name)) rows.set(name, { name, step, values: [] });
    rows.get(name).values[column] = s.values[i];
  }));
  const newest = [...rows.values()].sort((a, b) => b.step - a.step).slice(0, 25);
  return html`<div class="scroll" tabindex="0" role="region" aria-label="newest values"><table><thead><tr><th scope="col">when</th>${series.map((s) => html`<th scope="col">${s.lasts ? "mean " : ""}${s.label}</th>`)}</tr></thead>
    <tbody>${newest.map(({ name, values }) => html`<tr><th scope="row">${name}</th>${series.map((_, column) => html`<td>${number(values[column])}</td>`)}</tr>`)}</tbody></table></div>`;
}

/** Series on their own steps become columns on common ones; what cannot be drawn as a height is kept as marks. */
function join(series, log) {
  const x = [...new Set(series.flatMap((s) => Array.from(s.steps)))].sort((a, b) => a - b);
  const place = new Map(x.map((step, i) => [step, i]));
  const columns = [x], marks = [];
  const drawable = (v) => (log && v !== null && v <= 0 ? null : finite(v));
  for (const s of series) {
    const parts = s.low ? [s.values, s.low, s.high] : [s.values];
    for (const part of parts) {
      const column = new Array(x.length).fill(part === s.values && s.steps.length === x.length ? null : undefined);
      for (let i = 0; i < s.steps.length; i++) {
        column[place.get(s.steps[i])] = drawable(part[i]);
      }
      columns.push(column);
    }
    marks.push(...s.bad);
  }
  return { x, columns, marks };
}

function options({ width, height, series, log, unit, theory, at, data, from, to, zero }) {
  const ink = colour("--ink-2"), grid = colour("--grid");
  const lines = [{}], bands = [];
  for (const s of series) {
    const main = lines.length;
    lines.push({ label: s.label, stroke: s.hue, width: 1.5, dash: s.dash, spanGaps: s.dots ? false : undefined, points: s.points || s.values.filter((v) => v !== null).length < 40 ? { show: true, size: s.points ? 6 : 4, fill: s.hue } : { show: undefined },
      value: (_, v) => number(v) });
    if (s.low) {
      lines.push({ label: `${s.label} smallest`, stroke: "transparent", points: { show: false } }, { label: `${s.label} largest`, stroke: "transparent", points: { show: false } });
      bands.push({ series: [main + 2, main + 1], fill: s.hue + "38" });
    }
  }
  const numbers = (values) => values.map((v) => (v === null ? "" : log ? (Math.abs(Math.log10(v) % 1) < 1e-9 ? power(Math.round(Math.log10(v))) : "") : tickText(v)));
  return {
    width, height, bands, series: lines, legend: { show: false },
    padding: [8, 16, 0, 0], // the last number of the axis is half to the right of its place
    scales: { x: { time: false, range: ({ data: [steps] }, low, high) => (from !== null ? stretch(from, to) : steps.length === 1 ? stretch(steps[0], steps[0]) : [low, high]) },
      y: { distr: log ? 3 : 1, range: (_, low, high) => (log ? decades(low, high, theory) : spread(low, high, theory, zero)) } },
    cursor: { y: false, points: { size: 7 } },
    axes: [
      { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "11px system-ui", size: 28, values: (_, v) => v.map((s) => (Number.isInteger(s) && s >= 0 ? s.toLocaleString("en-US") : "")) },
      { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "11px system-ui", size: 56, values: (_, v) => numbers(v), label: undefined },
    ],
    hooks: { draw: [(chart) => decorate(chart, { theory, at, marks: data.marks, log })] },
  };
}

/** The axis of some steps; a single one stands in its middle. */
const stretch = (first, last) => (first === last ? [first - 0.5, last + 0.5] : [first, last]);

/** A round number of an axis, without trailing zeros. */
function tickText(v) {
  const size = Math.abs(v);
  return v !== 0 && (size < 1e-3 || size >= 1e5) ? number(v, { digits: 2 }) : String(Number(v.toPrecision(6))).replace("-", "−");
}

/** Whole decades around the data and the lines of theory. */
function decades(low, high, theory) {
  if (low === null || low === undefined) return [1e-1, 1];
  const all = [low, high, ...theory.map((t) => t.value)].filter((v) => v > 0);
  return [10 ** Math.floor(Math.log10(Math.min(...all)) + 1e-9), 10 ** Math.ceil(Math.log10(Math.max(...all)) - 1e-9 + (Math.max(...all) === Math.min(...all) ? 1 : 0))];
}

function spread(low, high, theory, zero) {
  if (low === null) return [0, 1];
  const all = [low, high, ...theory.map((t) => t.value), ...(zero ? [0] : [])];
  low = Math.min(...all); high = Math.max(...all);
  const rest = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - rest, high + rest];
}

function decorate(chart, { theory, at, marks, log }) {
  const { ctx, bbox } = chart;
  const x = (v) => chart.valToPos(v, "x", true), y = (v) => chart.valToPos(v, "y", true);
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  for (const line of theory) {
    if (log && line.value <= 0) continue;
    ctx.strokeStyle = colour("--ink-2");
    ctx.setLineDash([6, 4]);
    ctx.beginPath(); ctx.moveTo(bbox.left, y(line.value)); ctx.lineTo(bbox.left + bbox.width, y(line.value)); ctx.stroke();
  }
  ctx.setLineDash([]);
  for (const step of marks) {
    ctx.fillStyle = "#E4009E";
    ctx.fillRect(x(step) - 1.5, bbox.top, 3, bbox.height);
  }
  if (at.current !== null) {
    ctx.fillStyle = colour("--ink");
    ctx.globalAlpha = 0.55;
    ctx.fillRect(Math.round(x(at.current)) - 0.5, bbox.top, 1, bbox.height);
  }
  ctx.restore();
}

/** A small line without axes, for tables and cards. */
export function Spark({ values, hue = "currentColor", width = 120, height = 24, label, log = false }) {
  const known = values.map((v) => (log ? (v > 0 ? Math.log10(v) : null) : finite(v)));
  const numbers = known.filter((v) => v !== null && Number.isFinite(v));
  if (numbers.length < 2) return html`<svg class="spark" width=${width} height=${height} aria-hidden="true"></svg>`;
  const low = Math.min(...numbers), high = Math.max(...numbers), n = known.length;
  let path = "", pen = false;
  const stride = Math.max(1, Math.floor(n / (width * 2)));
  for (let i = 0; i < n; i += stride) {
    if (known[i] === null) { pen = false; continue; }
    path += `${pen ? "L" : "M"}${((i / (n - 1)) * (width - 2) + 1).toFixed(1)} ${(height - 2 - ((known[i] - low) / (high - low || 1)) * (height - 4)).toFixed(1)}`;
    pen = true;
  }
  return html`<svg class="spark" width=${width} height=${height} role="img" aria-label=${label ?? "history"}><path d=${path} fill="none" stroke=${hue} stroke-width="1.5"/></svg>`;
}
