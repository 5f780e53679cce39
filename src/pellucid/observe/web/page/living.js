// The network of a run as it trains: tokens, layers, experts, predictions. Thickness is load, colour is the size of the
// update relative to the weights; both from the newest frames, redrawn at most four times a second.
import { Nothing, Panel, html, useEffect, useMemo, useRef, useState, useWidth } from "./ui.js";
import { select, statIndex, statOf, useAnswer, useReading, useRun } from "./state.js";
import { MAGENTA, NEUTRAL, colourAt, css, scaleOf } from "./colour.js";
import { ColourBar } from "./heatmap.js";
import { capital, count, elsewhen, number, percent } from "./format.js";
import { visible } from "./play.js";
import { labelOf, taskOf } from "./task.js";

const EVERY = 250, TOKENS = 10;
const curve = (x0, y0, x1, y1) => { const m = (x0 + x1) / 2; return `M${x0} ${y0}C${m} ${y0} ${m} ${y1} ${x1} ${y1}`; };

/** A value that follows at most four times a second. */
export function useCalm(value) {
  const [shown, show] = useState(value), last = useRef(0);
  useEffect(() => {
    const timer = setTimeout(() => { last.current = performance.now(); show(value); }, Math.max(0, last.current + EVERY - performance.now()));
    return () => clearTimeout(timer);
  }, [value]);
  return shown;
}

export function LiveNetwork({ theme }) {
  const { run, index, step: newest, live } = useRun();
  const step = useCalm(newest);
  const [table, setTable] = useState(false);
  const router = useReading(index, "router", "*", step), weights = useReading(index, "param", "weight_norm", step), updates = useReading(index, "param", "update_norm", step);
  const kept = useRef(null);
  const { data } = useAnswer(`samples?run=${index}`, Math.floor((step ?? 0) / 50));
  if (data) kept.current = data;
  const scale = useMemo(() => scaleOf({ ...statOf(run, "param", "update_ratio") ?? { scale: "log", low: 1e-6, high: 1e-1 }, name: "ratio" }, theme), [run.streams, theme]);
  const parts = useMemo(() => partsOf(run), [run.streams]);
  if (!router || weights === undefined || updates === undefined) return html`<${Panel} id="live-title" wide question="How does text flow through the network?">${run.streams.router ? html`<p class="boot">Reading the network …</p>` : html`<${Nothing}>This run recorded no routers.<//>`}<//>`;
  const ratio = (rows) => relative(rows, weights, updates), load = statIndex(run, "router", "load");
  const layers = parts.layers.map((layer) => ({ ...layer, attention: ratio(layer.attentionRows), routed: ratio(layer.routerRows),
    experts: layer.expertRows.map((rows, e) => ({ load: router.value(layer.routerAt[e], load), ratio: ratio(rows) })) }));
  const sample = pickSample(kept.current?.rows ?? [], step, taskOf(run)), ends = { embedding: ratio(parts.embedding) };
  const all = layers.flatMap((l) => l.experts.map((x, e) => ({ ...x, e, layer: l.layer }))).filter((x) => x.load !== null);
  const busiest = all.reduce((a, b) => (b.load > (a?.load ?? -1) ? b : a), null);
  const sentence = busiest ? `${capital(router.when)} expert ${busiest.e} of layer ${busiest.layer} carries most, ${number(busiest.load, { digits: 3 })} times its fair share${busiest.ratio === null ? "" : `; its weights moved by ${number(busiest.ratio)} of their size${elsewhen(updates, router)}`}.` : "No router was observed at this step.";
  return html`<${Panel} id="live-title" wide question="How does text flow through the network?" answer=${sentence}
    aside=${html`<button type="button" class="quiet" aria-expanded=${table} onClick=${() => setTable(!table)}>${table ? "hide table" : "table"}</button>`}>
    <${Picture} layers=${layers} ends=${ends} sample=${sample} scale=${scale} live=${live} label=${`The network ${router.when}. ${sentence}`} />
    <div class="live-key"><span>thickness: load, tokens served against the fair share</span><span class="bar-holder">colour: size of the update, ‖Δw‖ / ‖w‖<${ColourBar} scale=${scale} unit="" /></span></div>
    ${table && html`<div class="scroll" tabindex="0" role="region" aria-label="load and update of every expert"><table><thead><tr><th scope="col" class="left">layer</th><th scope="col">attention ‖Δw‖/‖w‖</th>${layers[0].experts.map((_, e) => html`<th scope="col">expert ${e}: load</th><th scope="col">‖Δw‖/‖w‖</th>`)}</tr></thead>
      <tbody>${layers.map((l) => html`<tr><th scope="row" class="left">${l.layer}</th><td>${number(l.attention)}</td>${l.experts.map((x) => html`<td data-value=${x.load}>${number(x.load)}</td><td>${number(x.ratio)}</td>`)}</tr>`)}</tbody></table></div>`}
  <//>`;
}

/** Which rows of the streams belong to which part of the picture. */
function partsOf(run) {
  const rows = run.streams.param?.rows ?? [], routers = run.streams.router?.rows ?? [], numbers = [...new Set(routers.map((r) => r.layer))];
  const find = (test) => rows.map((row, i) => [row, i]).filter(([row]) => test(row)).map(([, i]) => i);
  return { embedding: find((r) => r.role === "embedding"), layers: numbers.map((layer) => {
    const own = routers.map((r, i) => [r, i]).filter(([r]) => r.layer === layer);
    return { layer, routerAt: own.map(([, i]) => i), attentionRows: find((r) => r.layer === layer && /^[qkvo]_proj$/.test(r.role)), routerRows: find((r) => r.layer === layer && r.role === "router"),
      expertRows: own.map(([r]) => find((p) => p.layer === layer && p.expert === r.expert)) };
  }) };
}

function relative(rows, weights, updates) {
  const w = weights?.norm(rows) ?? null, dw = updates?.norm(rows) ?? null;
  return rows.length && w !== null && w !== 0 && dw !== null ? dw / w : null;
}

/** A stretch of a recorded training row: tokens, what came next, and the probability the model gave it. Of labelled documents:
 * the last token of each, and the probability of its class, or how wrong its numbers were. */
function pickSample(rows, step, task) {
  const row = rows.findLast((r) => r.step <= step) ?? rows[0];
  if (!row) return null;
  if (task.labelled) {
    const ends = row.losses.map((loss, i) => [loss, i]).filter(([, i]) => i > 0 && (row.labels?.[i] ?? null) !== null).slice(0, TOKENS);
    return { step: row.step, head: "what the text is", pick: ends.map(([loss, i]) => ({ token: row.texts[i - 1], target: labelOf(row.labels[i], task.head), p: task.share(loss) ?? Math.exp(-loss), told: task.share(loss) === null ? `${number(loss, { digits: 2 })} ${task.unit}` : percent(task.share(loss)) })) };
  }
  const letters = (i) => row.texts.slice(i, i + TOKENS).join("").replace(/[^\p{L}]/gu, "").length, starts = row.texts.map((_, i) => i).slice(1, Math.max(2, row.texts.length - TOKENS));
  const from = starts.reduce((best, i) => (letters(i) > letters(best) ? i : best), 1), pick = []; // where most can be read
  for (let i = from; i < row.texts.length && pick.length < TOKENS; i++) if (row.texts[i] !== null && typeof row.losses[i] === "number") pick.push({ token: row.texts[i - 1] ?? "", target: row.texts[i], p: Math.exp(-row.losses[i]), told: percent(Math.exp(-row.losses[i])) });
  return { step: row.step, head: "what came next", pick };
}

function Picture({ label, ...drawn }) {
  const [box, width] = useWidth(0);
  return html`<div class="scene-box" ref=${box} tabindex="0" role="figure" aria-label=${label}>${width > 0 && html`<${Drawing} ...${drawn} width=${width} />`}</div>`;
}

function Drawing({ layers, ends, sample, scale, width, live }) {
  const E = layers[0].experts.length, H = Math.max(380, (E > 12 ? 14 : 48) * E + 70), left = 130, right = 190, W = Math.max(width, left + right + layers.length * 96);
  const each = (W - left - right) / layers.length, middle = H / 2 + 10, ye = (e) => 52 + ((H - 84) * (e + 0.5)) / E, yt = (t) => 52 + ((H - 84) * (t + 0.5)) / TOKENS;
  const paint = (ratio) => (ratio === null ? "url(#dotted)" : !Number.isFinite(ratio) ? "url(#hatched)" : ratio === 0 ? NEUTRAL[scale.theme] : css(colourAt(scale, ratio))), band = (v) => 1 + 9 * Math.min(4, v ?? 0);
  const tokens = sample?.pick ?? [], name = (text) => { const seen = visible(text); return seen.length > 11 ? seen.slice(0, 10) + "…" : seen; };
  return html`<svg class=${`scene living${live ? " is-live" : ""}`} viewBox=${`0 0 ${W} ${H}`} width=${W} height=${H} aria-hidden="true">
    <defs><pattern id="dotted" width="5" height="5" patternUnits="userSpaceOnUse"><rect width="5" height="5" fill="var(--raised)"/><circle cx="2.5" cy="2.5" r="1" fill="var(--dot)"/></pattern>
      <pattern id="hatched" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="6" height="6" fill=${css(MAGENTA.b)}/><rect width="3" height="6" fill=${css(MAGENTA.a)}/></pattern></defs>
    <text class="zone" x="8" y="22">tokens</text><text class="zone" x=${W - right + 40} y="22">${sample?.head ?? ""}</text>
    ${tokens.map((t, i) => html`<path class="ribbon faint" d=${curve(100, yt(i), left + 4, middle)} stroke-width="5"/><g class="token"><rect x="4" y=${yt(i) - 13} width="94" height="26" rx="6"/><text x="14" y=${yt(i) + 4}>${name(t.token)}</text></g>`)}
    <g class="part"><rect x=${left - 4} y=${middle - 30} width="12" height="60" rx="4" fill=${paint(ends.embedding)}><title>${`embedding: moved by ${number(ends.embedding)} of its size`}</title></rect></g>
    ${layers.map((layer, n) => { const x = left + n * each, xs = n ? x : x + 8, xa = x + each * 0.2, xr = x + each * 0.36, xe = x + each * 0.66, xo = x + each;
      return html`<g><text class="zone" x=${x + each * 0.5} y="22" text-anchor="middle">layer ${layer.layer}</text>
        <path class="ribbon residual" d=${`M${xs} ${middle}C${x + each * 0.2} ${H - 14} ${x + each * 0.8} ${H - 14} ${xo} ${middle}`}/>
        <path class="ribbon trunk" d=${`M${xs} ${middle}H${xr}`}/>
        ${layer.experts.map((x2, e) => html`<path class="ribbon" d=${curve(xr, middle, xe, ye(e))} stroke-width=${band(x2.load).toFixed(2)}/><path class="ribbon" d=${curve(xe, ye(e), xo, middle)} stroke-width=${band(x2.load).toFixed(2)}/>`)}
        <g class="part"><rect x=${xa - 13} y=${middle - 26} width="26" height="52" rx="7" fill=${paint(layer.attention)}/><text class="fine" x=${xa} y=${middle + 42} text-anchor="middle">attention</text><title>${`attention of layer ${layer.layer}: moved by ${number(layer.attention)} of its size`}</title></g>
        <g class="part"><circle cx=${xr} cy=${middle} r="9" fill=${paint(layer.routed)}/><title>${`router of layer ${layer.layer}: moved by ${number(layer.routed)} of its size`}</title></g>
        ${layer.experts.map((x2, e) => html`<g class="part pick" onClick=${() => select({ view: "experts", layer: layer.layer, expert: e })}><circle cx=${xe} cy=${ye(e)} r=${((E > 12 ? 0.4 : 1) * (6 + 7 * Math.sqrt(Math.min(4, x2.load ?? 0)))).toFixed(2)} class=${x2.load === 0 ? "idle" : ""} fill=${paint(x2.ratio)}/>
          ${each > 120 && E <= 12 && html`<text class="fine" x=${xe + 24} y=${ye(e) + 4}>${number(x2.load, { digits: 3 })}×</text>`}<title>${`expert ${e} of layer ${layer.layer}: load ${number(x2.load)}, moved by ${number(x2.ratio)} of its size`}</title></g>`)}</g>`; })}
    ${tokens.map((t, i) => html`<path class="ribbon faint" d=${curve(W - right, middle, W - right + 38, yt(i))} stroke-width=${(1 + 8 * t.p).toFixed(2)}/>
      <g class="choice-row"><text x=${W - right + 44} y=${yt(i) - 2}>${name(t.target)}</text><text class="number" x=${W - 8} y=${yt(i) - 2} text-anchor="end">${t.told}</text><rect class="bar" x=${W - right + 44} y=${yt(i) + 4} width=${Math.max(1.5, 138 * t.p).toFixed(1)} height="5" rx="2"/></g>`)}
    ${sample && html`<text class="fine" x="8" y=${H - 8}>a row of the batch of step ${count(sample.step)}</text>`}
  </svg>`;
}
