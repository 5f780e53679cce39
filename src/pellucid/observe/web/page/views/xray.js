// View 1, the X-ray: every tensor by every step in one picture of the chosen statistic; two runs give their difference.
import { Choice, Nothing, Panel, html, useMemo, useState } from "../ui.js";
import { select, statOf, useReading, useRun, useWindow, wasSkipped } from "../state.js";
import { ROLES, scaleOf } from "../colour.js";
import { ColourBar, Heatmap, differ } from "../heatmap.js";
import { Lines } from "../line.js";
import { describeRow, tensorRows } from "../rows.js";
import { capital, count, elsewhen, float32, number, plural, withUnit } from "../format.js";

export function XRay({ theme, alarms }) {
  const { chosen, run, index, step, runs } = useRun();
  const stat = statOf(run, "param", chosen.stat) ?? statOf(run, "param", "update_ratio");
  const [hidden, hide] = useState(new Set());
  const [experts, showExperts] = useState(true);
  const [part, setPart] = useState("max");
  const [hover, setHover] = useState(null);
  const range = { from: chosen.from, to: chosen.to };
  const { window, problem } = useWindow(index, "param", stat?.name, range);
  const other = chosen.compare !== null && chosen.compare !== index ? runs[chosen.compare] : null;
  const compared = useWindow(chosen.compare ?? 0, "param", other ? stat?.name : null, range).window;
  const reading = useReading(index, "param", stat?.name, step), against = useReading(chosen.compare ?? 0, "param", other ? stat?.name : null, step);
  const skipped = wasSkipped(run, useReading(index, "run", "*", reading?.to ?? step));
  const roles = useMemo(() => new Set(Object.keys(ROLES).filter((role) => !hidden.has(role))), [hidden]);
  const rows = useMemo(() => tensorRows(run, { roles, experts, other }), [run.streams, roles, experts, other?.streams]);
  const scale = useMemo(() => stat && scaleOf(stat, theme, Boolean(other)), [stat, theme, other !== null]);
  if (!stat) return html`<${Nothing}>This run recorded no statistics of its tensors.<//>`;
  if (problem) return html`<${Nothing}>${problem}<//>`;
  if (!window) return html`<p class="boot">Reading the steps …</p>`;
  const log = stat.scale === "log", from = range.from ?? window.steps[0] ?? 0, to = range.to ?? run.latest;
  const selected = chosen.tensor ?? rows.find((row) => row.label === "all")?.label ?? rows[0]?.label ?? null;
  const describe = (row, at) => {
    const column = window.columnOf(at), value = column < 0 ? null : window.value(column, row.index, 0, part);
    const bad = column < 0 ? 0 : window.nonfinite(column, row.index);
    const there = column < 0 ? `step ${count(at)}` : window.stepsOf(column);
    const said = bad ? plural(bad, "non-finite value") : value === null ? "not measured" : withUnit(value, stat.unit);
    return `${describeRow(row.row)} · ${there} · ${said}${other ? ` · ${other.name}: ${beside(compared, row, at, part, stat, value, log)}` : ""}`;
  };
  const rowHeight = Math.max(3, Math.min(12, Math.floor(Math.max(420, innerHeight - 330) / Math.max(1, rows.length))));
  return html`<${Panel} id="xray-title" wide question=${other ? `Where does ${run.name} differ from ${other.name}?` : "What is happening in every tensor, at every step?"}
    answer=${summary({ reading, against, rows, stat, step, other, log, skipped })}>
    <div class="controls">
      <${StatPicker} run=${run} value=${stat.name} />
      ${window.parts > 1 && html`<${Choice} label="what a cell shows" value=${part} onChange=${setPart} options=${PARTS} />`}
      <label class="tick"><input type="checkbox" checked=${experts} onChange=${(e) => showExperts(e.target.checked)} />each expert</label>
      <div class="chips" role="group" aria-label="roles shown">${Object.entries(ROLES).map(([role, { hue, label }]) => html`<button type="button"
        class="chip" aria-pressed=${!hidden.has(role)} onClick=${() => hide(new Set(hidden.has(role) ? [...hidden].filter((r) => r !== role) : [...hidden, role]))}>
        <i style=${{ background: hue }}></i>${label}</button>`)}</div>
      ${(chosen.from !== null || chosen.to !== null) && html`<button type="button" onClick=${() => select({ from: null, to: null })}>all steps</button>`}
    </div>
    <div class="xray-grid">
      <div>
        ${rows.length ? html`<${Heatmap} window=${window} other=${other ? compared : null} otherEnd=${other?.latest} rows=${rows} part=${part} scale=${scale} log=${log} from=${from} to=${to}
          rowHeight=${rowHeight} label=${`${stat.name} of ${plural(rows.length, "tensor")} over steps ${count(from)} to ${count(to)}`} selected=${selected} step=${step}
          ticks=${alarms} describe=${describe}
          onHover=${(row, at) => setHover(row ? { row, step: at } : null)} onPick=${(row, at) => select({ tensor: row.label, step: at, layer: row.row.layer, expert: row.row.expert })}
          onOpen=${(row, at) => row && select({ view: "tensor", tensor: row.label, step: at, layer: row.row.layer, expert: row.row.expert })}
          onZoom=${(a, b) => select({ from: a, to: b })} />` : html`<${Nothing}>All roles are switched off.<//>`}
        <p class="hint">Click a cell to select it, drag to zoom in, double-click to open the tensor.</p>
      </div>
      <${Inspector} run=${run} window=${window} stat=${stat} scale=${scale} rows=${rows} step=${hover?.step ?? step} row=${hover?.row ?? rows.find((row) => row.label === selected)}
        theme=${theme} from=${from} to=${to} part=${part} other=${other} compared=${compared} />
    </div>
  <//>`;
}

const PARTS = [["max", "largest"], ["min", "smallest"], ["mean", "mean"]];
const GROUPS = [
  ["size of the change", ["update_ratio", "update_norm", "adam_rms", "credit"]], ["gradient", ["gradient_norm", "clipped_norm", "staleness", "gradient_zero"]],
  ["direction", ["cos_descent", "cos_previous", "cos_gradient"]], ["weight", ["weight_norm", "swallowed", "unmoved", "epsilon"]],
  ["non-finite", ["weight_nonfinite", "gradient_nan", "gradient_inf"]],
];
export const title = (name) => name.replaceAll("_", " ");

export function StatPicker({ run, value }) {
  const names = run.streams.param.stats.map((stat) => stat.name);
  const rest = names.filter((name) => !GROUPS.some(([, list]) => list.includes(name)));
  return html`<label>statistic <select class="stat-picker" value=${value} onChange=${(e) => select({ stat: e.target.value })}>
    ${[...GROUPS, ["settings", rest]].map(([group, list]) => html`<optgroup label=${group}>${list.filter((name) => names.includes(name)).map((name) => html`<option value=${name} selected=${name === value}>${title(name)}</option>`)}</optgroup>`)}
  </select></label>`;
}

/** One sentence with the numbers of the selected step. */
function summary({ reading, against, rows, stat, step, other, log, skipped }) {
  if (reading === null) return "Nothing was recorded at this step.";
  if (other && step > other.latest) return `${other.name} has no step ${count(step)}: its newest is step ${count(other.latest)}.`;
  if (reading === undefined || (other && against === undefined)) return `Reading step ${count(step)} …`;
  let bad = 0;
  const values = [];
  for (const row of rows) {
    if (row.label === "all") continue;
    let value = reading.value(row.index);
    if (other) value = against && row.other !== undefined ? differ(value, against.value(row.other), log) : null;
    if (value === null) continue;
    if (!Number.isFinite(value)) bad++; else values.push([value, row]);
  }
  const when = capital(reading.when) + (other && against && against.when !== reading.when ? ` (${other.name} ${against.when})` : "");
  if (!values.length && !bad && skipped) {
    return html`“${title(stat.name)}” was not measured ${reading.when}: the step was skipped, as its loss or gradient was not finite. <a href="#view=verdicts" onClick=${(e) => { e.preventDefault(); select({ view: "verdicts" }); }}>See the verdicts</a>.`;
  }
  if (!values.length) return bad ? `${when}, all of ${plural(bad, "tensor")} are NaN or infinite.` : `“${title(stat.name)}” was not measured ${reading.when}.`;
  values.sort((a, b) => a[0] - b[0]);
  const middle = values[values.length >> 1][0], top = values[values.length - 1];
  const warn = bad ? ` ${plural(bad, "tensor")} NaN or infinite.` : "";
  if (other) {
    const far = values.reduce((a, b) => (Math.abs(b[0]) > Math.abs(a[0]) ? b : a));
    const way = log ? `${number(10 ** middle)} times` : number(middle, { signed: true });
    return `${when} the middle tensor has ${way}${log ? ` that of ${other.name}` : ` against ${other.name}`}; largest difference: ${describeRow(far[1].row)}.${warn}`;
  }
  return `${when} the middle tensor has ${withUnit(middle, stat.unit)}; the largest is ${withUnit(top[0], stat.unit)}, in ${describeRow(top[1].row)}.${warn}`;
}

/** What the other run has in a cell, and how far apart the two are, in words. */
function beside(window, row, step, part, stat, own, log) {
  const column = window && row.other !== undefined ? window.columnOf(step) : -1, value = column < 0 ? null : window.value(column, row.other, 0, part);
  if (value === null) return "not measured";
  const apart = differ(own, value, log), when = `${withUnit(value, stat.unit)}, ${window.stepsOf(column)}`;
  return apart === null || !Number.isFinite(apart) ? when : `${when}; ${log ? `× ${number(10 ** apart)}` : `${number(apart, { signed: true })} apart`}`;
}

/** What the cell under the pointer, or the selected one, says; and the meaning of the statistic, from the run's own file. */
function Inspector({ run, window, stat, scale, row, step, theme, from, to, part, other, compared }) {
  const extent = useMemo(() => (other ? null : extremes(window)), [window, other]);
  const column = window.columnOf(step);
  const value = row && column >= 0 ? window.value(column, row.index, 0, part) : null;
  const series = useMemo(() => (row ? line(window, row, compared, other, theme) : []), [window, row, compared, theme]);
  return html`<aside class="inspector" aria-label="selected cell">
    <${ColourBar} scale=${scale} unit=${stat.unit} extent=${extent} />
    <h3>${title(stat.name)} ${stat.formula && html`<code>${stat.formula}</code>`}</h3>
    <p>${stat.meaning}</p>
    ${stat.healthy && html`<p class="healthy"><b>Healthy:</b> ${stat.healthy}</p>`}
    ${stat.source && html`<p class="source">${stat.source}</p>`}
    ${row ? html`<dl class="cell">
      <dt>tensor</dt><dd class="name">${row.label}</dd>
      <dt>shape</dt><dd>${row.row.shape || "–"} ${row.row.dtype}</dd>
      <dt>when</dt><dd>${column < 0 ? "–" : window.stepsOf(column)}</dd>
      <dt>${window.parts > 1 ? PARTS.find(([key]) => key === part)[1] : "value"}</dt><dd class="value" data-value=${value === null ? "" : String(value)}>${withUnit(value, stat.unit)}</dd>
      <dt>exactly</dt><dd>${value === null ? "not measured" : float32(value)}</dd>
      ${other && html`<dt>${other.name}</dt><dd>${step > other.latest ? `its newest is step ${count(other.latest)}` : beside(compared, row, step, part, stat, value, stat.scale === "log")}</dd>`}
      ${window.parts > 1 && column >= 0 && html`<dt>from … to</dt><dd>${number(window.value(column, row.index, 0, "min"))} … ${number(window.value(column, row.index, 0, "max"))}</dd>
        <dt>non-finite</dt><dd>${window.nonfinite(column, row.index)} of ${window.value(column, row.index, 0, "measured")}</dd>`}
    </dl>` : html`<p class="hint">Point at a cell to read it.</p>`}
    ${row && html`<${Lines} label=${`${title(stat.name)} of ${row.label}`} series=${series} log=${stat.scale === "log"} unit=${stat.unit} height=${150}
      step=${step} theme=${theme} from=${from} to=${to} onPick=${(s) => select({ step: s })} />
      <p class="links"><a href="#" onClick=${(e) => { e.preventDefault(); select({ view: "tensor", tensor: row.label }); }}>open the tensor</a>
      <a href="#" onClick=${(e) => { e.preventDefault(); select({ view: "learning" }); }}>documents of this step</a></p>`}
  </aside>`;
}

/** A row as a line; what is not finite is counted and marked. */
function line(window, row, compared, other) {
  const found = [{ label: row.short, hue: row.hue, ...window.line(row.index) }];
  if (other && compared && row.other !== undefined) found.push({ label: other.name, hue: "#CC79A7", dash: [5, 3], ...compared.line(row.other) });
  return found;
}

/** Smallest and largest finite value of a window. */
function extremes(window) {
  let low = null, high = null;
  for (let i = 0; i < window.columns * window.rows * (window.parts > 1 ? 2 : 1); i++) {
    const value = window.values[i];
    if (Number.isFinite(value) && value !== 0) {
      if (low === null || value < low) low = value;
      if (high === null || value > high) high = value;
    }
  }
  return [low, high];
}

export { extremes, line };
