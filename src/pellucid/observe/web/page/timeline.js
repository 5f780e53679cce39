// The time line under every view: the loss of all steps, alarms as ticks, and the selected step to drag.
import { html, useMemo, useWidth } from "./ui.js";
import { select, statIndex, useReading, useRun, useWindow } from "./state.js";
import { count, number } from "./format.js";

export function Timeline({ alarms }) {
  const { run, index, step, live } = useRun();
  const { window } = useWindow(index, "run", "*");
  const [box, width] = useWidth();
  const stat = statIndex(run, "run", "loss");
  const last = run.latest ?? 0;
  const x = (s) => ((s + 0.5) / (last + 1)) * width;
  const path = useMemo(() => (window && width > 0 ? curve(window, stat, x) : null), [window, stat, width, last]);
  const reading = useReading(index, "run", "*", step), here = reading && (live || (reading.from <= step && step <= reading.to));
  const [where, loss] = here ? [reading.steps, `${reading.from < reading.to ? "mean loss" : "loss"} ${number(reading.value(0, stat))}`] : [`step ${count(step)}`, "…"];
  return html`<footer class="timeline">
    <p class="where"><b>${where}</b><span>${loss}</span></p>
    <div class="track" ref=${box}>
      ${path !== null && html`<svg width=${width} height="40" aria-hidden="true"><path d=${path} /></svg>`}
      ${alarms.map((event) => html`<i class=${"alarm-tick " + event.severity} style=${{ left: `${x(event.step)}px` }}></i>`)}
      <i class="handle" style=${{ left: `${x(step)}px` }}></i>
      <input type="range" min="0" max=${last} step="1" value=${step} aria-label="selected step"
        aria-valuetext=${`${where} of ${count(last)}, ${loss}`} onInput=${(e) => select({ step: Number(e.target.value) })} />
    </div>
    <button type="button" class=${"follow" + (live ? " on" : "")} aria-pressed=${live} onClick=${() => select({ step: live ? step : null })}>
      ${live ? "newest step" : step < last ? `${count(last - step)} newer` : "follow"}</button>
  </footer>`;
}

/** Loss over steps; where a column holds many steps, from its largest to its smallest: no spike is left out. */
function curve(window, stat, x) {
  const low = [], high = [];
  for (let c = 0; c < window.columns; c++) {
    low.push(window.value(c, 0, stat, "min"));
    high.push(window.value(c, 0, stat, "max"));
  }
  const known = [...low, ...high].filter((v) => v !== null && Number.isFinite(v));
  if (!known.length) return "";
  const bottom = Math.min(...known), top = Math.max(...known);
  const y = (v) => (36 - ((v - bottom) / (top - bottom || 1)) * 32).toFixed(1);
  let path = "", pen = false;
  for (let c = 0; c < window.columns; c++) {
    if (high[c] === null || !Number.isFinite(high[c])) { pen = false; continue; }
    path += `${pen ? "L" : "M"}${x(window.steps[c]).toFixed(1)} ${y(high[c])}`;
    if (low[c] !== high[c]) path += `L${x(window.steps[c]).toFixed(1)} ${y(low[c])}`;
    pen = true;
  }
  return path;
}
