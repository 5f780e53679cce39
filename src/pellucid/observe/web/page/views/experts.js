// View 4, the expert ledger: who gets the tokens, who learns from them, who moves without any. Layers by experts.
import { Choice, Nothing, Panel, html, useMemo, useState } from "../ui.js";
import { select, statIndex, statOf, useAnswer, useReading, useRun, useWindow } from "../state.js";
import { ROLES, colourAt, css, scaleOf } from "../colour.js";
import { ColourBar, Heatmap } from "../heatmap.js";
import { Lines } from "../line.js";
import { capital, count, elsewhen, number, percent, plural, when as after, withUnit } from "../format.js";
import { visible } from "../play.js";

const SHOWN = [["load", "load"], ["per_token", "gradient per token"], ["ratio", "update / weight"], ["credit", "credit"], ["mean_gate", "mean gate"], ["ghost", "ghost"], ["ghost_share", "ghost share"], ["idle_steps", "idle steps"]];
/** What is measured with the tensors alone, so not at every step: shown of the newest step that has it. */
const MEASURED = new Set(["gradient_norm", "update_norm", "ghost", "ghost_share", "frozen"]), WITH_TENSORS = new Set(["per_token", ...MEASURED]);
const OWN = { // statistics formed here from recorded ones
  per_token: { name: "per_token", scale: "log", low: 1e-8, high: 1e-2, unit: "", meaning: "Norm of the expert's gradient divided by the tokens it served in the step.", formula: "||g_e|| / tokens_e" },
  ratio: { name: "ratio", scale: "log", low: 1e-6, high: 1e-1, unit: "", meaning: "Relative size of the change of the expert's matrices, together.", formula: "||dw_e|| / ||w_e||" },
  credit: { name: "credit", scale: "linear", low: -1e-3, high: 1e-3, unit: "nats", meaning: "First-order change of the batch's loss by this expert's step, all of its matrices together; negative: it helped.", formula: "g_e . dw_e" },
};

export function Experts({ theme }) {
  const { chosen, run, index, step } = useRun();
  const [shown, show] = useState("load");
  const streams = run.streams, rows = streams.router?.rows ?? [];
  const layers = [...new Set(rows.map((row) => row.layer))], experts = Math.max(0, ...rows.map((row) => row.expert)) + 1;
  const router = useWindow(index, "router", "*").window;
  const now = useReading(index, "router", "*", step), layersNow = useReading(index, "layer", "*", step);
  const weights = useReading(index, "param", "weight_norm", step), updates = useReading(index, "param", "update_norm", step), credits = useReading(index, "param", "credit", step);
  const measured = useReading(index, "router", "*", weights?.to ?? step) ?? now;
  const slices = useMemo(() => slicesOf(run), [streams]);
  const stat = OWN[shown] ?? statOf(run, "router", shown);
  const scale = useMemo(() => stat && scaleOf(stat, theme), [stat, theme]);
  if (!rows.length) return html`<${Nothing}>This run recorded no experts: its model has none, or it was trained before they were observed.<//>`;
  if (!router || now === undefined) return html`<p class="boot">Reading the routers …</p>`;
  if (now === null) return html`<${Nothing}>No router was observed up to step ${count(step)}.<//>`;
  const ledger = { run, now, measured, weights, updates, credits, slices };
  const layer = chosen.layer ?? layers[0], expert = chosen.expert ?? 0;
  const pick = (l, e) => select({ layer: l, expert: e });
  const values = rows.map((_, i) => read(ledger, shown, i)), when = ({ ratio: updates, credit: credits }[shown] ?? (WITH_TENSORS.has(shown) ? measured : now)).when;
  return html`
    <${Panel} id="ledger-title" wide question="Who does the work, and who learns from it?" answer=${sentence(ledger, rows, layers)}>
      <div class="controls"><${Choice} label="what a cell shows" value=${shown} onChange=${show} options=${SHOWN.filter(([key]) => OWN[key] || statOf(run, "router", key))} /></div>
      <div class="ledger-grid">
        <div class="scroll flat"><table class="ledger" aria-label=${`${stat.name} of every expert ${when}`}>
          <thead><tr><th scope="col" class="left">layer</th>${Array.from({ length: experts }, (_, e) => html`<th scope="col">expert ${e}</th>`)}<th scope="col">busiest</th><th scope="col">in use</th></tr></thead>
          <tbody>${layers.map((l) => html`<tr><th scope="row" class="left">layer ${l}</th>
            ${rows.map((row, i) => row.layer === l && html`<td><${Cell} value=${values[i]} scale=${scale} stat=${stat} row=${row} ledger=${ledger} index=${i}
              chosen=${l === layer && row.expert === expert} pick=${() => pick(l, row.expert)} compact=${layers.length > 12} /></td>`)}
            ${layerCells(run, layersNow, layers.indexOf(l), experts)}</tr>`)}</tbody></table></div>
        <aside class="inspector"><${ColourBar} scale=${scale} unit=${stat.unit} />
          <h3>${SHOWN.find(([key]) => key === shown)[1]} ${stat.formula && html`<code>${stat.formula}</code>`}</h3><p>${stat.meaning} Shown ${when}.</p>
          ${stat.healthy && html`<p><b>Healthy:</b> ${stat.healthy}</p>`}
          <p class="bar-key"><span><i class="swatch is-frozen"></i>served tokens, did not move</span><span><i class="swatch is-ghost"></i>moved without tokens</span>${measured.when === when ? "" : html`<span>(these ${measured.when})</span>`}</p>
        </aside>
      </div>
    <//>
    <${Movie} run=${run} index=${index} shown=${shown} rows=${rows} router=${router} theme=${theme} step=${step} pick=${pick} layer=${layer} expert=${expert} />
    <${Card} ledger=${ledger} router=${router} rows=${rows} index=${index} step=${step} layer=${layer} expert=${expert} theme=${theme} />`;
}

/** Rows of "param" that belong to an expert, by "layer.expert". */
function slicesOf(run) {
  const found = new Map();
  (run.streams.param?.rows ?? []).forEach((row, i) => {
    if (row.expert === null) return;
    const key = `${row.layer}.${row.expert}`;
    found.set(key, [...(found.get(key) ?? []), i]);
  });
  return found;
}

/** A cell of the ledger at the selected step: null where it was not measured. */
function read({ run, now, measured, weights, updates, credits, slices }, name, i) {
  const value = (stat) => (WITH_TENSORS.has(name) ? measured : now).value(i, statIndex(run, "router", stat));
  if (name === "per_token") {
    const gradient = value("gradient_norm"), tokens = value("tokens");
    return gradient === null || !tokens ? null : gradient / tokens;
  }
  const row = run.streams.router.rows[i], own = slices.get(`${row.layer}.${row.expert}`) ?? [];
  if (name === "credit") {
    const parts = own.map((r) => credits?.value(r) ?? null);
    return !parts.length || parts.some((v) => v === null) ? null : parts.reduce((sum, v) => sum + v, 0);
  }
  if (name === "ratio") {
    const weight = weights?.norm(own) ?? null, update = updates?.norm(own) ?? null;
    return !own.length || weight === null || update === null ? null : update / weight;
  }
  return value(name);
}

function Cell({ value, scale, stat, row, ledger, index, chosen, pick, compact }) {
  const flag = (name) => ledger.measured.value(index, statIndex(ledger.run, "router", name)) > 0;
  const word = value === null || !Number.isFinite(value) ? null : colourAt(scale, value);
  const light = word !== null && 0.299 * (word & 255) + 0.587 * ((word >> 8) & 255) + 0.114 * ((word >> 16) & 255) > 140;
  const text = number(value, { digits: 3 });
  const states = [flag("ghost") && "moved without tokens", flag("frozen") && "did not move"].filter(Boolean).join(", ");
  return html`<button type="button" class=${`expert-cell${chosen ? " chosen" : ""}${flag("ghost") ? " ghost" : ""}${flag("frozen") ? " frozen" : ""}${word === null ? value === null ? " missing" : " hatched" : ""}${compact ? " compact" : ""}`}
    style=${word === null ? {} : { background: css(word), color: light ? "#0b0d10" : "#fff" }} aria-pressed=${chosen} onClick=${pick} data-value=${value === null ? "" : String(value)}
    aria-label=${`${text}: ${stat.name} of layer ${row.layer}, expert ${row.expert}${states ? `, ${states}` : ""}`}>${text}</button>`;
}

function layerCells(run, reading, row, experts) {
  const value = (name) => reading?.value(row, statIndex(run, "layer", name)) ?? null;
  const busiest = value("max_violation"), used = value("load_entropy");
  return html`<td>${busiest === null ? "–" : `${number(busiest + 1, { digits: 3 })} ×`}</td><td>${used === null ? "–" : `${number(used * experts, { digits: 3 })} of ${experts}`}</td>`;
}

function sentence(ledger, rows, layers) {
  const loads = rows.map((row, i) => [read(ledger, "load", i), row]).filter(([v]) => v !== null);
  if (!loads.length) return "No router was observed at this step.";
  loads.sort((a, b) => b[0] - a[0]);
  const idle = loads.filter(([v]) => v === 0).length, [most, busy] = loads[0], [least, slack] = loads[loads.length - 1];
  return `${capital(ledger.now.when)} expert ${busy.expert} of layer ${busy.layer} does ${number(most, { digits: 3 })} times its fair share, expert ${slack.expert} of layer ${slack.layer} ${number(least, { digits: 3 })} times; `
    + (idle ? `${plural(idle, "expert")} of ${rows.length} served no token.` : `all ${rows.length} in ${plural(layers.length, "layer")} served tokens.`);
}

/** The same statistic over all steps: the history of every expert in one picture. */
function Movie({ run, index, shown, rows, router, theme, step, pick, layer, expert }) {
  const name = OWN[shown] ? "load" : shown, stat = statOf(run, "router", name), at = statIndex(run, "router", name);
  const scale = useMemo(() => scaleOf(stat, theme), [stat, theme]), part = name === "load" ? "mean" : "max"; // a fault of one step is not averaged away
  const shownRows = useMemo(() => rows.map((row, i) => ({ index: i, row, label: row.name, short: `expert ${row.expert}`, group: `layer ${row.layer}`, hue: ROLES.experts.hue })), [rows]);
  const height = Math.max(3, Math.min(12, Math.floor(420 / rows.length)));
  const describe = (row, s) => { const c = router.columnOf(s); return `layer ${row.row.layer}, expert ${row.row.expert} · ${c < 0 ? `step ${count(s)}` : router.stepsOf(c)} · ${router.span === 1 ? "" : part === "mean" ? "on average " : "at most "}${withUnit(c < 0 ? null : router.value(c, row.index, at, part), stat.unit)}`; };
  return html`<${Panel} id="movie-title" wide question=${`How did the ${name.replaceAll("_", " ")} of each expert come about?`} answer=${(OWN[shown] ? "This cell is formed from several streams; its history is shown for the load. " : "") + (router.span > 1 ? `Of ${router.span} steps in a column you see the ${part === "mean" ? "mean" : "largest"}.` : "")}>
    <${Heatmap} window=${router} rows=${shownRows} stat=${at} part=${part} scale=${scale} log=${stat.scale === "log"} from=${router.steps[0]} to=${run.latest} rowHeight=${height}
      label=${`${name} of ${rows.length} experts over steps`} selected=${`layers.${layer}.experts.${expert}`} step=${step} describe=${describe}
      onPick=${(row, s) => { pick(row.row.layer, row.row.expert); select({ step: s }); }} gutter=${150} /><//>`;
}

function Card({ ledger, router, rows, index, step, layer, expert, theme }) {
  const { run, now, measured, updates, credits } = ledger, i = rows.findIndex((row) => row.layer === layer && row.expert === expert);
  const at = statIndex(run, "router", "load"), siblings = rows.map((row, j) => [row, j]).filter(([row]) => row.layer === layer);
  const series = useMemo(() => [...siblings.filter(([row]) => row.expert !== expert).map(([row, j]) => ({ label: `expert ${row.expert}`, quiet: true, hue: "#99999980", ...router.line(j, at), low: null })),
    { label: `expert ${expert}`, hue: ROLES.experts.hue, ...router.line(i, at) }], [router, layer, expert]);
  if (i < 0) return null;
  const facts = run.streams.router.stats.map((stat) => [stat, read(ledger, stat.name, i), MEASURED.has(stat.name) ? elsewhen(measured, now) : ""]);
  return html`<${Panel} id="expert-title" wide question=${`What about expert ${expert} of layer ${layer}?`}
    answer=${overTheRun(router, i, at)}>
    <div class="columns"><div><h3>Load, among its siblings of the layer</h3>
      <${Lines} label=${`load of expert ${expert} of layer ${layer}`} series=${series} height=${220} step=${step} theme=${theme} theory=${[{ value: 1, label: "fair share" }]} onPick=${(s) => select({ step: s })} zero /></div>
    <div><h3>${capital(now.when)}</h3><dl>${facts.map(([stat, value, other]) => html`<dt title=${stat.meaning}>${stat.name.replaceAll("_", " ")}${other}</dt><dd>${stat.unit === "tokens" ? count(value) : withUnit(value, stat.unit)}</dd>`)}
      <dt title=${OWN.ratio.meaning}>update / weight${elsewhen(updates, now)}</dt><dd>${number(read(ledger, "ratio", i))}</dd><dt title=${OWN.credit.meaning}>credit${elsewhen(credits, now)}</dt><dd>${number(read(ledger, "credit", i), { signed: true })}</dd></dl>
      <p class="links">${(ledger.slices.get(`${layer}.${expert}`) ?? []).map((r) => html`<a href="#" onClick=${(e) => { e.preventDefault(); select({ view: "tensor", tensor: run.streams.param.rows[r].name }); }}>${run.streams.param.rows[r].name}</a>`)}</p></div></div>
    <${Preference} run=${run} index=${index} layer=${layer} expert=${expert} />
  <//>`;
}

/** The load of an expert over all steps; how often it was idle is known where every step is. */
function overTheRun(router, row, stat) {
  const known = (part) => router.series(row, stat, part).filter(Number.isFinite), loads = known("mean");
  const mean = router.reading(Infinity, router.columns * router.span).value(row, stat);
  if (!loads.length) return "";
  return `Over the run its load is ${number(mean, { digits: 3 })} on average, ${number(Math.min(...known("min")), { digits: 3 })} at least and ${number(Math.max(...known("max")), { digits: 3 })} at most`
    + (router.span === 1 ? `; it was idle in ${percent(loads.filter((v) => v === 0).length / loads.length)} of the recorded steps.` : ".");
}

/** What the newest checkpoint sends to the expert, and which sibling has the weights most like its own. */
function Preference({ run, index, layer, expert }) {
  const { data, problem } = useAnswer(`preferences?run=${index}`, Math.floor((run.latest ?? 0) / Math.max(1, run.config?.checkpoint?.every_steps ?? 500)));
  if (problem ?? data?.problem) return html`<${Nothing}>${problem ?? data.problem}<//>`;
  if (run.streams.router.rows.filter((row) => row.layer === layer).length < 2) return null; // the only one has all tokens, and no sibling
  const own = data?.layers[run.streams.router.rows.findIndex((row) => row.layer === layer) < 0 ? 0 : [...new Set(run.streams.router.rows.map((row) => row.layer))].indexOf(layer)]?.[expert];
  if (!own) return html`<p class="hint">Reading the newest checkpoint …</p>`;
  return html`<h3>Tokens it prefers</h3><p class="hint">${count(data.tokens)} ${data.held_out ? "held-out" : "training"} tokens through the checkpoint ${after(data.step - 1)}; × how much more often than tokens on the whole.</p>
    <p class="preferred">${own.tokens.length ? own.tokens.map((token) => html`<span title=${`${plural(token.count, "time")}`}><code>${visible(token.text)}</code> × ${number(token.lift, { digits: 3 })}</span>`) : "none more than others"}</p>
    <p class="sibling">Its weights are most like those of <button type="button" class="link" onClick=${() => select({ layer, expert: own.sibling })}>expert ${own.sibling}</button>, cosine ${number(own.cosine, { signed: true })}${own.cosine > 0.9 ? ": nearly the same expert twice" : own.cosine < 0.2 ? ": nothing alike" : ""}.</p>`;
}
