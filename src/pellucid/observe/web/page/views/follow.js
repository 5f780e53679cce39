// One document followed through the whole river: its file, every stage, its tokens, its rows, the steps that read it.
import { Nothing, Panel, html, useState } from "../ui.js";
import { select, useAnswer, useSelection } from "../state.js";
import { count, plural, visible } from "../format.js";
import { Difference } from "../diff.js";

const HUES = ["#56B4E9", "#E69F00", "#009E73", "#CC79A7"];
const CHIPS = 40; // steps listed

/** As many of some steps as are listed, as near to `step` as they are. */
function around(steps, step) {
  const before = steps.filter((s) => s < step).length, first = Math.max(0, Math.min(steps.length - CHIPS, before - CHIPS / 2));
  return steps.slice(first, first + CHIPS);
}

export function Follow({ run, index, step }) {
  const chosen = useSelection(), at = chosen.document ?? 0;
  const { data, problem } = useAnswer(`document?run=${index}&split=train&index=${at}`, 0, true);
  const [typed, type] = useState(null); // not yet entered: a picture drawn meanwhile must not put the old number back
  const go = (n) => { type(null); select({ document: Math.max(0, data ? Math.min(data.documents - 1, n) : n) }); };
  const question = "What happened to one document?";
  const pager = html`<div class="pager">
      <button type="button" onClick=${() => go(at - 1)} aria-label="previous document" disabled=${at === 0}>←</button>
      <label>document <input type="number" min="0" max=${data?.documents - 1} value=${typed ?? at} onInput=${(e) => type(e.target.value)} onChange=${(e) => go(Number(e.target.value) || 0)} /></label>${data && ` of ${count(data.documents)}`}
      <button type="button" onClick=${() => go(at + 1)} aria-label="next document" disabled=${data && at >= data.documents - 1}>→</button></div>`;
  if (problem) return html`<${Panel} id="follow-title" wide question=${question} aside=${pager}><${Nothing}>${problem}<//><//>`;
  if (!data) return html`<${Panel} id="follow-title" wide question=${question}><p class="boot">Reading it again from its file …</p><//>`;
  return html`<${Panel} id="follow-title" wide question=${question} answer=${sentence(data, step)} aside=${pager}>
    <ol class="journey">
      <li><h3>Source</h3><p><span class="mono">${data.source}</span>, ${data.byte_end - data.byte_start > 0 ? `bytes ${count(data.byte_start)} to ${count(data.byte_end)}` : ""}${data.ordinal ? `, document ${count(data.ordinal)} of the file` : ""}.</p></li>
      ${data.stations.length ? data.stations.map((station) => html`<${Stop} station=${station} />`) : html`<li><h3>Stages</h3><${Nothing}>${data.problem}<//></li>`}
      <li><h3>Tokens</h3><p>${plural(data.token_count, "token")} of ${plural(data.characters, "character")}. Point at one for its number.</p><p class="tokens" tabindex="0" role="region" aria-label="tokens">${data.tokens.map((token, i) => html`<span style=${{ borderColor: HUES[i % 4] }} title=${`token ${token.id}`}>${visible(token.text)}</span>`)}${data.token_count > data.tokens.length ? " …" : ""}</p></li>
      <li><h3>Pack</h3><p>It lies in ${plural(data.row_count, "row")}: ${data.rows.slice(0, 24).map(count).join(", ")}${data.row_count > 24 ? " …" : "."}</p></li>
      <li><h3>Batch</h3>${data.steps.length ? html`<p>${plural(data.step_count, "step of this run has", "steps of this run have")} read from it${data.step_count > CHIPS ? `; the ${CHIPS} around step ${count(step)}` : ""}:</p><p class="chips">${around(data.steps, step).map((s) => html`<button type="button" class="chip" aria-pressed=${s === step ? "true" : undefined} onClick=${() => select({ step: s, stage: "batch" })}>step ${count(s)}</button>`)}</p>`
    : html`<p>No step has read it yet.</p>`}</li>
    </ol><//>`;
}

function sentence(data, step) {
  const proof = data.proven === true ? "Replayed from its file; what came out has the very hash that was trained on." : data.proven === false ? "Replayed from its file, but a stage that looks at the whole corpus, or a change of the file since, made the trained text another one." : "";
  const first = data.steps.find((s) => s > step);
  return `${data.version ? "An augmented version: made for training from an original. " : ""}${proof}${first !== undefined ? ` It is read again in step ${count(first)}.` : ""}`;
}

function Stop({ station }) {
  const [open, show] = useState(true);
  const name = station.name[0].toUpperCase() + station.name.slice(1).replaceAll("_", " ");
  if (station.dropped) return html`<li class="dropped"><h3>${name}</h3><p>Left out here today.</p></li>`;
  if (!station.changed) return html`<li class="same"><h3>${name}</h3><p>passed, unchanged</p></li>`;
  const where = station.start > 0 ? `, shown from character ${count(station.start)}` : "";
  return html`<li><h3>${name}</h3><p>${plural(station.characters, "character")}${where} <button type="button" class="quiet" aria-expanded=${open} onClick=${() => show(!open)}>${open ? "hide" : "show"}</button></p>
    ${open && (station.before === null ? html`<pre class="text" tabindex="0">${station.text}</pre>` : html`<${Difference} before=${station.before} after=${station.text} cut=${station.start + station.text.length < station.characters} />`)}</li>`;
}
