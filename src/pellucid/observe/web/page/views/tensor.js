// View 7, one tensor: the sizes of its values over time, its norms, its step against theory, and the anatomy of an update.
import { Choice, Nothing, Panel, html, useEffect, useMemo, useRef, useState, useWidth } from "../ui.js";
import { select, statOf, useAnswer, useReading, useRun, useWindow, wasSkipped } from "../state.js";
import { ROLES, colourAt, roleOf, scaleOf } from "../colour.js";

import { Lines } from "../line.js";
import { describeRow } from "../rows.js";
import { capital, count, number, power } from "../format.js";

const NAMES = ["weight_norm", "gradient_norm", "clipped_norm", "update_norm", "update_ratio", "cos_descent", "cos_previous", "cos_gradient", "learning_rate", "weight_decay", "credit", "adam_rms"];

export function Tensor({ theme }) {
  const { chosen, run, index, step } = useRun();
  const rows = run.streams.param?.rows ?? [];
  const at = Math.max(0, rows.findIndex((row) => row.name === chosen.tensor));
  const row = rows[at];
  const there = (name) => (statOf(run, "param", name) ? name : null);
  const windows = Object.fromEntries(NAMES.map((name) => [name, useWindow(index, "param", there(name)).window])); // a fixed list: hooks keep their order
  const readings = useTogether(windows, index, step, there), ran = useReading(index, "run", "*", readings?.weight_norm?.to ?? step);
  if (!row) return html`<${Nothing}>This run recorded no tensors.<//>`;
  const value = (name) => readings?.[name]?.value(at) ?? null;
  const line = (name, hue, dash) => (windows[name]?.columns ? [{ label: name.replaceAll("_", " "), hue, dash, ...windows[name].line(at) }] : []);
  const any = Object.values(readings ?? {}).find(Boolean), when = any?.when ?? `at step ${count(step)}`, skipped = wasSkipped(run, ran) && any?.to === ran.to;
  const r = value("update_ratio"), theory = theoryLine(run, value("learning_rate"), value("weight_decay"));
  const choose = (name) => { const next = rows.find((x) => x.name === name); select({ tensor: name, layer: next.layer, expert: next.expert }); };
  return html`
    <${Panel} id="tensor-title" wide question=${`How does ${describeRow(row)} change?`}
      answer=${!readings ? `Reading step ${count(step)} …` : skipped ? `${capital(any.steps)} was skipped, as its loss or gradient was not finite: nothing moved.` : r !== null ? `${capital(when)} it moved by ${number(r)} of its size${theory ? `; AdamW in equilibrium would give ${number(theory)}` : ""}.` : "Its update was not measured at this step."}
      aside=${html`<label><span class="sr">tensor</span><select class="mono tensor-picker" value=${row.name} onChange=${(e) => choose(e.target.value)}>${rows.map((x) => html`<option value=${x.name} selected=${x === row}>${x.name}</option>`)}</select></label>`}>
      <p class="facts-line"><i class="swatch" style=${{ background: ROLES[roleOf(row)].hue }}></i><span class="mono">${row.name}</span><span>${row.shape}</span><span>${row.dtype}</span><span>${count(row.numel)} elements</span></p>
      <${Anatomy} value=${value} when=${when} run=${run} skipped=${skipped} />
    <//>
    <div class="columns">
      <${Panel} id="norms-title" question="How large are weight, gradient and change?" answer="All three on one logarithmic axis: their distance is what matters.">
        <${Lines} label="norms" log series=${[...line("weight_norm", "#56B4E9"), ...line("gradient_norm", "#CC79A7"), ...line("clipped_norm", "#CC79A7", [4, 3]), ...line("update_norm", "#009E73")]} height=${230} step=${step} theme=${theme} onPick=${(s) => select({ step: s })} /><//>
      <${Panel} id="ratio-title" question="Is the step the right size?" answer=${`Update over weight${theory ? ", with the line that AdamW's rates and decay lead to" : ""}; about 10⁻³ is usual.`}>
        <${Lines} label="update over weight" log series=${line("update_ratio", "#009E73")} height=${230} step=${step} theme=${theme} onPick=${(s) => select({ step: s })}
          theory=${[{ value: 1e-3, label: "rule of thumb, 10⁻³" }, ...(theory ? [{ value: theory, label: "√(2ηλ(1−β₁)/(1+β₁))" }] : [])]} /><//>
      <${Panel} id="angle-title" question="Does it keep its direction?" answer=${!readings ? "" : `cos(−g, Δw) ${number(value("cos_descent"))} ${when}: ${!Number.isFinite(value("cos_descent")) ? "no direction is known" : value("cos_descent") > 0 ? "downhill on this batch" : "momentum walks uphill on this batch"}.`}>
        <${Lines} label="directions" series=${[...line("cos_descent", "#0072B2"), ...line("cos_previous", "#E69F00"), ...line("cos_gradient", "#999999", [3, 3])].filter((s) => s.values.some((v) => v !== null))} height=${200} step=${step} theme=${theme} onPick=${(s) => select({ step: s })} theory=${[{ value: 0, label: "at right angles" }]} /><//>
      <${Panel} id="credit-title" question="Did it help?" answer="First-order change of the batch's loss by this tensor's step; below zero it helped.">
        <${Lines} label="credit" unit="nats" series=${line("credit", "#009E73")} height=${200} step=${step} theme=${theme} onPick=${(s) => select({ step: s })} theory=${[{ value: 0, label: "no effect" }]} /><//>
    </div>
    <${Histograms} index=${index} at=${at} row=${row} run=${run} theme=${theme} step=${step} />`;
}

/** Readings of all statistics for one and the same step: the newest that every one has. Until they agree, those that last did. */
function useTogether(windows, index, step, there) {
  const latest = Math.min(step, ...Object.values(windows).filter(Boolean).map((window) => window.header.latest)), kept = useRef(null);
  const asked = Object.fromEntries(NAMES.map((name) => [name, useReading(index, "param", there(name), latest)]));
  const [first, ...others] = Object.values(asked).filter((reading) => reading !== null);
  if (first && others.every((reading) => reading?.when === first.when)) kept.current = { index, asked };
  return kept.current?.index === index ? kept.current.asked : null;
}

/** Relative step that AdamW tends to (Kosson et al. 2023); null under other rules or without decay. */
function theoryLine(run, rate, decay) {
  const settings = run.config?.optimizer;
  if (settings?.name !== "adamw" || !rate || !decay) return null;
  return Math.sqrt((2 * rate * decay * (1 - settings.beta1)) / (1 + settings.beta1));
}

/** From gradient to change, as a row of measured quantities with what stands between them. */
function Anatomy({ value, when, run, skipped }) {
  const g = value("gradient_norm"), c = value("clipped_norm"), rate = value("learning_rate"), dw = value("update_norm"), w = value("weight_norm");
  const rms = value("adam_rms"), name = run.config?.optimizer?.name ?? "the optimizer";
  const stages = [["gradient", "‖g‖", g, "after backward"], ["clipped", "c‖g‖", c, g && c !== null ? `× ${number(c / g, { digits: 3 })}` : ""],
    ["learning rate", "η", rate, rms !== null ? `Adam's step has RMS ${number(rms, { digits: 3 })}` : `${name} decides the direction`], ["change", "‖Δw‖", dw, skipped ? "the step was skipped" : rate && dw !== null ? `‖Δw‖ / η = ${number(dw / rate, { digits: 3 })}` : ""],
    ["weight", "‖w‖", w, w && dw !== null && !skipped ? `moved by ${number(dw / w, { digits: 3 })} of it` : ""]];
  return html`<ol class="anatomy" aria-label=${`anatomy of the update ${when}`}>${stages.map(([label, symbol, v, note]) => html`<li><span>${label}</span><b>${number(v)}</b><code>${symbol}</code><small>${note}</small></li>`)}</ol>`;
}

/** Exponent histograms as columns: how the sizes of the values shift over the steps. */
function Histograms({ index, at, row, run, theme, step }) {
  const [kind, pick] = useState("weight");
  const { data, problem } = useAnswer(run.histograms ? `histograms?run=${index}&row=${at}&kind=${kind}` : null, Math.floor((run.latest ?? 0) / 50));
  const columns = data?.columns ?? [];
  const column = columns.filter((c) => c.step <= step).pop() ?? columns[0];
  return html`<${Panel} id="hist-title" wide question="How are its values spread, and how did that change?"
    answer=${column ? `At step ${count(column.step)}: ${count(column.zero)} values exactly 0, ${count(column.subnormal)} below the smallest normal number, ${count(column.nan)} NaN, ${count(column.inf)} infinite.` : ""}
    aside=${html`<${Choice} label="whose values" value=${kind} onChange=${pick} options=${[["weight", "weight"], ["gradient", "gradient"], ["update", "change"]]} />`}>
    ${problem ? html`<${Nothing}>${problem}<//>` : !columns.length ? html`<${Nothing}>No histogram of the ${kind === "update" ? "change" : kind} of ${row.name} is recorded: histograms come in turns, one tensor at a time${row.expert === null && /moe\.(gate|down)/.test(row.name) ? ", and for stacked tensors by expert: choose one of its experts" : ""}.<//>`
    : html`<${Spread} columns=${columns} theme=${theme} step=${step} run=${run} />`}
  <//>`;
}

function Spread({ columns, theme, step, run }) {
  const [box, width] = useWidth();
  const canvas = useRef(null), left = 56, high = 220;
  const used = columns.flatMap((c) => (c.counts[0].length ? [c.first, c.first + c.counts[0].length - 1] : []));
  const low = Math.max(Math.min(...used), Math.max(...used) - 40), top = Math.max(...used), bins = top - low + 1;
  const scale = useMemo(() => scaleOf({ name: "share", scale: "log", low: 1e-4, high: 1 }, theme), [theme]);
  const field = Math.max(0, width - left);
  useEffect(() => {
    if (!field) return;
    const element = canvas.current, context = element.getContext("2d", { willReadFrequently: true });
    element.width = columns.length; element.height = bins;
    const image = context.createImageData(columns.length, bins), pixels = new Uint32Array(image.data.buffer);
    columns.forEach((c, x) => {
      const sum = c.counts[0].reduce((a, b) => a + b, 0) + c.counts[1].reduce((a, b) => a + b, 0) + c.zero || 1;
      c.counts[0].forEach((n, i) => {
        const y = top - (c.first + i), total = n + c.counts[1][i];
        if (total && y >= 0 && y < bins) pixels[y * columns.length + x] = colourAt(scale, total / sum);
      });
    });
    context.putImageData(image, 0, 0);
  }, [columns, field, scale]);
  const ticks = [];
  for (let e = low; e <= top; e++) { const decade = Math.log10(2 ** (e - 127)); if (Math.floor(decade) !== Math.floor(Math.log10(2 ** (e - 128)))) ticks.push([e, Math.floor(decade)]); }
  const now = columns.findIndex((c) => c.step > step), chosen = now < 0 ? columns.length - 1 : Math.max(0, now - 1);
  return html`<div ref=${box} class="spread" style=${{ height: `${high + 24}px` }}>
    <div class="spread-field" style=${{ left: `${left}px`, width: `${field}px`, height: `${high}px` }}>
      <canvas ref=${canvas} style=${{ width: `${field}px`, height: `${high}px` }} role="img" aria-label=${`${columns.length} histograms from step ${count(columns[0].step)} to ${count(columns[columns.length - 1].step)}; brighter is more values`}></canvas>
      <i class="step-line" style=${{ left: `${((chosen + 0.5) / columns.length) * field}px` }}></i></div>
    ${ticks.map(([e, d]) => html`<span class="spread-tick" style=${{ top: `${((top - e) / bins) * high}px` }}>${power(d)}</span>`)}
    <div class="step-axis" style=${{ left: `${left}px`, width: `${field}px`, top: `${high}px` }} aria-hidden="true">${columns.map((c, i) => (i % Math.ceil(columns.length / 10) === 0) && html`<span style=${{ left: `${((i + 0.5) / columns.length) * field}px` }}>${count(c.step)}</span>`)}</div>
    <p class="hint">Magnitude of each value, in powers of two, by recorded step (${columns.length} of ${count(run.latest + 1)} steps); brighter holds more of the values.</p></div>`;
}

