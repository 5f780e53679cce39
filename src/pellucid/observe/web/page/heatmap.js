// Rows of numbers over steps, painted pixel by pixel: thousands of series in one canvas. A pixel that stands for several
// cells shows the extreme one, and any non-finite value under it turns it magenta: no zoom hides a spike or a NaN.
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState, useWidth } from "./ui.js";
import { MAGENTA, NEUTRAL, ROLES, colourAt, css } from "./colour.js";
import { number, power } from "./format.js";

const NEUTRAL_WORD = { light: 0xfff1f3f3, dark: 0xff2b2522 };
const DOT = 0xff8f8b87; // a sparse grid where nothing was measured
const GROUP_GAP = 6;

/** Value of a difference cell: log10 of the ratio for magnitudes, else the plain difference. */
export function differ(a, b, log) {
  if (a === null || b === null) return null;
  if (!log) return a - b;
  return a <= 0 || b <= 0 ? (a === b ? 0 : null) : Math.log10(a / b);
}

function layout(rows, rowHeight) {
  let y = 0, group = rows[0]?.group;
  const tops = rows.map((row) => {
    if (row.group !== group) { y += GROUP_GAP; group = row.group; }
    const top = y;
    y += rowHeight;
    return top;
  });
  return { tops, height: Math.max(1, y) };
}

function paint(context, { window, other, otherEnd, rows, stat, part, scale, log, from, to, width, rowHeight, tops, height, ratio }) {
  const w = Math.max(1, Math.round(width * ratio)), hpx = Math.round(height * ratio);
  const image = context.createImageData(w, hpx), pixels = new Uint32Array(image.data.buffer);
  const first = new Int32Array(w), last = new Int32Array(w), otherAt = new Int32Array(w);
  for (let x = 0; x < w; x++) {
    const a = from + (x / w) * (to - from + 1), b = from + ((x + 1) / w) * (to - from + 1);
    first[x] = window.columnOf(Math.floor(a));
    last[x] = Math.max(first[x], window.columnOf(Math.ceil(b) - 1));
    if (first[x] >= 0 && window.steps[first[x]] + window.span - 1 < Math.floor(a) && last[x] > first[x]) first[x]++;
    otherAt[x] = other && Math.floor(a) <= otherEnd ? other.columnOf(Math.floor(a)) : -1; // it may have ended before
  }
  const dots = Math.round(5 * ratio), line = new Uint32Array(w);
  const magnitude = scale.kind === "signed" || scale.kind === "ratio", low = part === "min";
  const exceeds = (value, best) => (low ? value < best : magnitude ? Math.abs(value) > Math.abs(best) : value > best);
  rows.forEach((row, r) => {
    const read = window.cells(row.index, stat, part);
    const against = other && row.other !== undefined ? other.cells(row.other, stat, part) : null;
    for (let x = 0; x < w; x++) {
      if (x > 0 && first[x] === first[x - 1] && last[x] === last[x - 1] && otherAt[x] === otherAt[x - 1]) {
        line[x] = line[x - 1]; // a column wider than a pixel
        continue;
      }
      let best = null;
      for (let c = first[x]; c >= 0 && c <= last[x]; c++) {
        let value = read(c);
        if (other && value !== null && !Number.isNaN(value)) {
          value = otherAt[x] < 0 || against === null ? null : differ(value, against(otherAt[x]), log);
        }
        if (value === null) continue;
        if (!Number.isFinite(value)) { best = NaN; break; }
        if (best === null || exceeds(value, best)) best = value;
      }
      line[x] = best === null ? 0 : Number.isNaN(best) ? 1 : scale.kind === "log" && best <= 0 ? NEUTRAL_WORD[scale.theme] : colourAt(scale, best);
    }
    const top = Math.round(tops[r] * ratio), gap = rowHeight >= 9 ? Math.round(ratio) : 0;
    const bottom = Math.max(top + 1, Math.round((tops[r] + rowHeight) * ratio) - gap);
    for (let y = top; y < bottom; y++) {
      const at = y * w;
      for (let x = 0; x < w; x++) {
        pixels[at + x] = line[x] === 1 ? ((x + y) % 6 < 3 ? MAGENTA.a : MAGENTA.b)
          : line[x] !== 0 ? line[x] : x % dots === 0 && (y - top) % dots === (dots >> 1) ? DOT : 0;
      }
    }
  });
  context.putImageData(image, 0, 0);
}

/** rows: [{index, other?, label, group, hue}]; onPick(row, step); onHover(row, step | null). */
export function Heatmap({ window, other = null, otherEnd, rows, stat = 0, part = "max", scale, log, from, to, rowHeight = 9, label,
  gutter = 190, selected, step, onPick, onHover, onOpen, onZoom, ticks = [], describe }) {
  const [box, full] = useWidth();
  const canvas = useRef(null);
  const width = Math.max(0, full - gutter);
  const { tops, height } = useMemo(() => layout(rows, rowHeight), [rows, rowHeight]);
  const [cursor, setCursor] = useState(null);
  const [drag, setDrag] = useState(null);
  const ratio = Math.min(2, globalThis.devicePixelRatio || 1);

  useLayoutEffect(() => {
    if (!width || !window) return;
    const element = canvas.current;
    element.width = Math.round(width * ratio);
    element.height = Math.round(height * ratio);
    const context = element.getContext("2d", { willReadFrequently: true });
    paint(context, { window, other, otherEnd, rows, stat, part, scale, log, from, to, width, rowHeight, tops, height, ratio });
    element.dataset.painted = `${window.columns}:${window.header.latest}`;
  }, [window, other, otherEnd, rows, stat, part, scale, log, from, to, width, rowHeight]);

  const stepAt = (x) => Math.max(from, Math.min(to, Math.floor(from + (x / width) * (to - from + 1))));
  const xOf = (s) => ((s - from) / (to - from + 1)) * width;
  const rowAt = (y) => {
    let found = 0;
    for (let r = 0; r < tops.length && tops[r] <= y; r++) found = r;
    return found;
  };
  const place = (event) => {
    const frame = canvas.current.getBoundingClientRect();
    return { row: rows[rowAt(event.clientY - frame.top)], step: stepAt(event.clientX - frame.left), x: event.clientX - frame.left };
  };
  const move = (event) => {
    const at = place(event);
    setCursor(at);
    onHover?.(at.row, at.step);
    if (drag) setDrag({ ...drag, to: at.step });
  };
  const down = (event) => { if (event.button === 0) setDrag({ from: place(event).step, to: place(event).step, x: event.clientX }); };
  const up = (event) => {
    const at = place(event);
    if (drag && onZoom && Math.abs(event.clientX - drag.x) > 8) onZoom(Math.min(drag.from, at.step), Math.max(drag.from, at.step));
    else onPick?.(at.row, at.step);
    setDrag(null);
  };
  const selectedIndex = rows.findIndex((row) => row.label === selected);
  const at = useRef({ pressed: -Infinity });  // keys may come faster than the page is drawn with what they chose
  if (performance.now() - at.current.pressed > 300) {
    at.current = { row: Math.max(0, selectedIndex), step: step ?? to, pressed: -Infinity };
  }
  const key = (event) => {
    at.current.pressed = performance.now();
    const column = Math.max(0, window.columnOf(at.current.step));
    const sideways = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    const upDown = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (event.key === "Enter") onOpen?.(rows[at.current.row], at.current.step);
    else if (sideways || event.key === "Home" || event.key === "End") {
      const next = event.key === "Home" ? 0 : event.key === "End" ? window.columns - 1 : column + sideways;
      at.current.step = window.steps[Math.max(0, Math.min(window.columns - 1, next))];
      onPick?.(rows[at.current.row], at.current.step);
    } else if (upDown) {
      at.current.row = Math.max(0, Math.min(rows.length - 1, at.current.row + upDown));
      onPick?.(rows[at.current.row], at.current.step);
    } else return;
    event.preventDefault();
  };
  const spoken = selectedIndex >= 0 && describe ? describe(rows[selectedIndex], step) : "";
  return html`<div class="heatmap" ref=${box} style=${{ height: `${height + 22}px` }}>
    <${Gutter} rows=${rows} tops=${tops} rowHeight=${rowHeight} width=${gutter} selected=${selected}
      onPick=${(row) => onPick?.(row, step ?? to)} />
    <div class="field" style=${{ left: `${gutter}px`, width: `${width}px`, height: `${height}px` }}>
      <canvas ref=${canvas} style=${{ width: `${width}px`, height: `${height}px` }} tabindex="0" role="application"
        aria-roledescription="heatmap" aria-label=${`${label}. Arrow keys move by step and row, Enter opens the row.`}
        onMouseMove=${move} onMouseLeave=${() => { setCursor(null); setDrag(null); onHover?.(null, null); }}
        onMouseDown=${down} onMouseUp=${up} onDblClick=${() => onOpen?.(cursor?.row, cursor?.step)} onKeyDown=${key}></canvas>
      ${ticks.map((tick) => tick.step >= from && tick.step <= to && html`<i class=${"alarm-tick " + tick.severity}
        style=${{ left: `${xOf(tick.step + 0.5)}px` }} title=${tick.text}></i>`)}
      ${step !== null && step >= from && step <= to && html`<i class="step-line" style=${{ left: `${xOf(step + 0.5)}px` }}></i>`}
      ${selectedIndex >= 0 && html`<i class="row-line" style=${{ top: `${tops[selectedIndex] - 1}px`, height: `${rowHeight + 1}px` }}></i>`}
      ${drag && Math.abs(drag.to - drag.from) > 0 && html`<i class="zoom-box" style=${{ left: `${xOf(Math.min(drag.from, drag.to))}px`,
        width: `${Math.abs(xOf(drag.to) - xOf(drag.from))}px` }}></i>`}
      ${cursor && !drag && describe && html`<div class=${"tip" + (cursor.x > width / 2 ? " left" : "")} style=${{
        left: `${cursor.x}px`, top: `${tops[rows.indexOf(cursor.row)] + rowHeight + 6}px` }}>${describe(cursor.row, cursor.step)}</div>`}
    </div>
    <${StepAxis} from=${from} to=${to} left=${gutter} width=${width} top=${height} />
    <p class="sr" aria-live="polite">${spoken}</p>
  </div>`;
}

/** Names of rows where there is room, else of runs of one role and of the chosen row; a bar in the colour of their role; names of groups. */
function Gutter({ rows, tops, rowHeight, width, selected, onPick }) {
  const named = rowHeight >= 9, pick = useRef(onPick);
  pick.current = onPick;
  return useMemo(() => drawGutter({ rows, tops, rowHeight, width, selected, named, pick }), [rows, tops, rowHeight, width, selected]);
}

function drawGutter({ rows, tops, rowHeight, width, selected, named, pick }) {
  const runsOf = (name) => rows.reduce((runs, row, r) => {
    const open = runs[runs.length - 1];
    if (open?.name === name(row) && open.group === row.group) open.bottom = tops[r] + rowHeight;
    else runs.push({ name: name(row), group: row.group, top: tops[r], bottom: tops[r] + rowHeight });
    return runs;
  }, []);
  const groups = runsOf((row) => row.group), chosen = (tops[rows.findIndex((row) => row.label === selected)] ?? -Infinity) - (12 - rowHeight) / 2;
  const roles = named ? [] : runsOf((row) => ROLES[row.role]?.label).map((run) => ({ ...run, at: (run.top + run.bottom) / 2 - 6 }));
  return html`<div class="gutter" style=${{ width: `${width}px` }} aria-hidden="true">
    ${groups.map((group) => html`<span class="group" style=${{ top: `${group.top}px`, height: `${group.bottom - group.top}px` }}>
      ${group.bottom - group.top >= 8 ? group.name : ""}</span>`)}
    ${rows.map((row, r) => html`<i style=${{ top: `${tops[r]}px`, height: `${Math.max(1, rowHeight - (rowHeight >= 9 ? 1 : 0))}px`, background: row.hue }}></i>`)}
    ${roles.filter((run) => run.name && run.bottom - run.top >= 10 && Math.abs(run.at - chosen) > 12).map((run) => html`<em style=${{ top: `${run.at}px` }}>${run.name}</em>`)}
    ${rows.map((row, r) => (named || row.label === selected) && html`<b class=${row.label === selected ? "chosen" : ""} style=${{ top: `${tops[r] - (12 - rowHeight) / 2}px` }}
      onClick=${() => pick.current(row)}>${row.short ?? row.label}</b>`)}
  </div>`;
}

export function niceSteps(from, to, most) {
  const span = Math.max(1, to - from), rough = span / most, base = 10 ** Math.floor(Math.log10(rough));
  const gap = Math.max(1, [1, 2, 5, 10].map((m) => m * base).find((g) => g >= rough));
  const found = [];
  for (let s = Math.ceil(from / gap) * gap; s <= to; s += gap) found.push(s);
  return found;
}

export function StepAxis({ from, to, left, width, top }) {
  if (!width) return null;
  return html`<div class="step-axis" style=${{ left: `${left}px`, width: `${width}px`, top: `${top}px` }} aria-hidden="true">
    ${niceSteps(from, to, Math.max(2, width / 90)).map((s) => html`<span style=${{ left: `${((s - from + 0.5) / (to - from + 1)) * width}px` }}>${s.toLocaleString("en-US")}</span>`)}
  </div>`;
}

/** The legend of a scale: its fixed domain, with marks where the smallest and largest shown value lie. */
export function ColourBar({ scale, unit, extent }) {
  const canvas = useRef(null);
  useEffect(() => {
    const context = canvas.current.getContext("2d", { willReadFrequently: true });
    const image = context.createImageData(256, 1);
    new Uint32Array(image.data.buffer).set(scale.words);
    context.putImageData(image, 0, 0);
  }, [scale]);
  const at = (v) => `${100 * Math.max(0, Math.min(1, scale.at(v)))}%`;
  const name = ([value, text]) => (text === "power" ? power(Math.round(Math.log10(value))) : text ?? number(value));
  return html`<div class="colour-bar">
    <div class="bar"><canvas ref=${canvas} width="256" height="1" role="img"
      aria-label=${`colour scale from ${number(scale.low)} to ${number(scale.high)} ${unit ?? ""}`}></canvas>
      ${extent && extent.map((v, i) => v !== null && html`<i class=${i ? "mark high" : "mark low"} style=${{ left: at(v) }}
        title=${`${i ? "largest" : "smallest"} shown: ${number(v)}`}></i>`)}</div>
    <div class="bar-ticks">${scale.ticks.map((tick) => html`<span style=${{ left: at(tick[0]) }}>${name(tick)}</span>`)}</div>
    <div class="bar-key"><span><i class="swatch hatched"></i>NaN or ∞</span><span><i class="swatch dotted"></i>not measured</span>
      ${scale.kind === "log" && html`<span><i class="swatch" style=${{ background: NEUTRAL[scale.theme] }}></i>exactly 0</span>`}</div>
  </div>`;
}

export { css };
