// One station of the data river: what it was set to, what it let through, and how texts looked before and after it.
import { Nothing, Panel, html, useMemo } from "../ui.js";
import { select, statIndex, useAnswer } from "../state.js";
import { bytes, capital, count, number, percent, plural } from "../format.js";
import { colourAt, css, scaleOf } from "../colour.js";
import { Difference } from "../diff.js";
import { Lines } from "../line.js";
import { isReport } from "../source.js";
import { PHASES } from "../ring.js";

const CHOSEN = { "content hash": "chosen by the hash of their content", tail: "the end of it", sources: "which data.validation names" };

export function Station({ stage, loop, phases, reading, window, run, index, step, theme }) {
  if (loop) return html`<${Loop} phases=${phases} reading=${reading} window=${window} run=${run} step=${step} theme=${theme} />`;
  if (!stage) return null;
  const { name, settings, splits } = stage;
  if (name === "source") return html`<${Sources} source=${stage} />`;
  if (name === "tokenize") return html`<${Tokens} tokenizer=${settings} splits=${splits} />`;
  if (name === "pack" || name === "batch") return html`<${Rows} stage=${stage} run=${run} index=${index} step=${step} theme=${theme} />`;
  if (name === "split") return html`<${Panel} id="station-title" wide question="What is held out?" answer=${`${plural(splits.validation.documents, "document is", "documents are")} never trained on: ${bytes(splits.validation.text_bytes)}, ${percent(splits.validation.text_bytes / stage.bytes_in)} of the text, ${CHOSEN[settings.method]}.`} />`;
  return html`<${Stage} stage=${stage} />`;
}

/** A stage of preparation: counts, settings, reasons, specimens. */
function Stage({ stage }) {
  const reasons = Object.entries(stage.dropped ?? {}).sort((a, b) => b[1] - a[1]), most = reasons[0]?.[1] ?? 1;
  const changed = stage.bytes_out - stage.bytes_in, versions = stage.name === "augment";
  const answer = versions ? `${plural(stage.documents_in, "training document")} went in, ${plural(stage.documents_out, "changed version")} came out (${bytes(stage.bytes_out)}); ${count(stage.dropped?.unchanged ?? 0)} came out equal and were not kept twice.`
    : `${plural(stage.documents_in, "document")} went in, ${count(stage.documents_out)} came out${changed ? `; the text became ${bytes(Math.abs(changed))} ${changed < 0 ? "shorter" : "longer"}` : ", unchanged"}${stage.cut ? `; then cut in ${count(stage.cut)}, to hold out an end` : ""}.`;
  return html`<${Panel} id="station-title" wide question=${`What did “${stage.title}” do?`} answer=${answer}>
    <div class="columns station-detail"><div>
      <h3>Settings</h3><p class="settings">${settingsOf(stage.settings).map(([key, value]) => html`<span><i>${key}</i> ${value}</span>`)}${stage.version && html`<span><i>version</i> ${stage.version}</span>`}</p>
      ${stage.augmenters?.length > 0 && html`<h3>Units changed</h3><dl>${stage.augmenters.map((a) => html`<dt>${a.name.replaceAll("_", " ")}</dt><dd>${count(a.changed)}</dd>`)}</dl>`}
      ${reasons.length > 0 && html`<h3>Left out, by reason</h3><table class="bars"><tbody>${reasons.map(([reason, n]) => html`<tr><th scope="row">${reason}</th><td class="left"><div class="bar-cell"><i style=${{ width: `${(100 * n) / most}%`, background: "var(--river)" }}></i></div></td><td>${count(n)}</td></tr>`)}</tbody></table>`}
    </div>
    <div class="specimens"><h3>Specimens</h3>${stage.samples?.length ? stage.samples.slice(0, 9).map((sample) => html`<${Specimen} sample=${sample} />`)
    : html`<${Nothing}>It changed no document and left none out.<//>`}</div></div>
  <//>`;
}

function Specimen({ sample }) {
  if (sample.message) return html`<p class="text">${sample.message}</p>`;
  return html`<details class="specimen" open=${sample.after !== null}><summary><span class="mono">${sample.source}</span>${sample.after === null && html`<em class="reason">${sample.reason}</em>`}</summary>
    ${sample.after === null ? html`<pre class="text" tabindex="0">${sample.before}</pre>` : html`<${Difference} before=${sample.before} after=${sample.after} cut=${sample.before.length >= 160 || sample.after.length >= 160} />`}</details>`;
}

function settingsOf(settings, prefix = "") {
  return Object.entries(settings ?? {}).flatMap(([key, value]) => {
    if (value === null || value === false || (Array.isArray(value) && !value.length)) return [];
    if (Array.isArray(value) && typeof value[0] === "object") return value.flatMap((entry) => settingsOf(entry, ""));
    if (typeof value === "object" && !Array.isArray(value)) return settingsOf(value, `${key.replaceAll("_", " ")} `);
    return [[prefix + key.replaceAll("_", " "), Array.isArray(value) ? value.join(", ") : value === true ? "on" : String(value)]];
  });
}

function Sources({ source }) {
  const most = source.largest[0]?.size ?? 1;
  return html`<${Panel} id="station-title" wide question="Where does the text come from?" answer=${`${plural(source.files, "file")}, ${bytes(source.into)}; ${plural(source.documents, "document was", "documents were")} read from them. The largest:`}>
    <div class="scroll" tabindex="0" role="region" aria-label="source files"><table class="bars"><thead><tr><th class="left" scope="col">file</th><th class="left" scope="col">size</th><th scope="col"></th><th scope="col">documents</th><th scope="col">sha256</th></tr></thead>
      <tbody>${source.largest.map((file) => html`<tr><td class="left mono">${file.uri}</td><td class="left narrow"><div class="bar-cell"><i style=${{ width: `${(100 * file.size) / most}%`, background: "var(--river)" }}></i></div></td><td>${bytes(file.size)}</td><td>${count(file.documents)}</td><td class="mono">${file.sha256?.slice(0, 12) ?? "–"}</td></tr>`)}</tbody></table></div><//>`;
}

function Tokens({ tokenizer, splits: { train, validation } }) {
  return html`<${Panel} id="station-title" wide question="How does text become numbers?" answer=${`A ${tokenizer.kind} tokenizer of ${plural(tokenizer.vocab_size, "token")} makes one token of ${number(train.text_bytes / train.tokens)} bytes on average. The tokens of one document are shown below.`}>
    <dl class="short"><dt>training tokens</dt><dd>${count(train.tokens)}</dd><dt>held-out tokens</dt><dd>${count(validation?.tokens)}</dd><dt>pad, bos, eos</dt><dd>${[tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id].map((id) => id ?? "none").join(", ")}</dd><dt>fingerprint</dt><dd class="mono">${tokenizer.fingerprint.slice(0, 16)}</dd></dl><//>`;
}

/** The batch of the step, row by row: each piece of a document as long as its tokens, coloured by its loss. */
function Rows({ stage, run, index, step, theme }) {
  const answer = useAnswer(`step?run=${index}&step=${step}`, 0, !isReport), length = stage.settings.sequence_length;
  const scale = useMemo(() => scaleOf({ name: "loss", scale: "linear", low: 0, high: Math.ceil(Math.log(run.config?.model?.vocab_size ?? 1000)) }, theme), [theme]);
  if (!answer.data || answer.data.problem) return html`<${Panel} id="station-title" wide question="How do documents fill the rows?"><${Nothing}>${answer.problem ?? answer.data?.problem ?? `Reading step ${count(step)} …`}<//><//>`;
  const { pieces } = answer.data, rows = [...new Set(pieces.map((piece) => piece.row))].sort((a, b) => a - b);
  return html`<${Panel} id="station-title" wide question=${`How do documents fill the ${plural(rows.length, "row")} of step ${count(answer.data.step ?? step)}?`}
    answer=${`${plural(pieces.length, "piece")} of documents; ${percent(stage.splits.train.packing.utilization, 2)} of all positions predict a token. Coloured by loss, dark is known and bright surprising; choose a piece to follow its document.`}>
    <div class="rows">${rows.map((row) => html`<div class="row"><span>${row}</span><div>${pieces.filter((piece) => piece.row === row).map((piece) => html`<button type="button" class=${piece.loss == null ? "unmeasured" : ""}
      style=${{ left: `${(100 * piece.position_start) / length}%`, width: `${(100 * piece.length) / length}%`, ...(piece.loss == null ? {} : { background: css(colourAt(scale, piece.loss)) }) }}
      aria-label=${`row ${row}: ${piece.length} tokens of ${piece.source}, loss ${number(piece.loss)}`} title=${`${piece.source}: ${piece.length} tokens, loss ${number(piece.loss)}`} onClick=${() => select({ document: piece.document })}></button>`)}</div></div>`)}</div>
    <p class="hint">Loss from 0 to ${scale.high} nats; hatched pieces have no recorded loss.</p><//>`;
}

function Loop({ phases, reading, window, run, step, theme }) {
  const whole = phases.reduce((sum, phase) => sum + phase.seconds, 0), longest = [...phases].sort((a, b) => b.seconds - a.seconds)[0];
  const series = useMemo(() => (window?.columns ? PHASES.filter(([key]) => statIndex(run, "run", key) >= 0).map(([key, name, hue]) => ({ label: name, hue, ...window.line(0, statIndex(run, "run", key)) })) : []), [window]);
  if (!longest) return html`<${Panel} id="station-title" wide question="Where does a step's time go?"><${Nothing}>No step has been timed yet.<//><//>`;
  return html`<${Panel} id="station-title" wide question="Where does a step's time go?" answer=${`${capital(reading.when)} the loop took ${number(whole * 1000)} ms; ${longest.name} is the longest part with ${percent(longest.seconds / whole)}.`}>
    <div class="columns"><table class="bars"><tbody>${phases.map((phase) => html`<tr data-phase=${phase.key}><th scope="row"><i class="swatch" style=${{ background: phase.hue }}></i> ${phase.name}</th><td class="left"><div class="bar-cell"><i style=${{ width: `${(100 * phase.seconds) / longest.seconds}%`, background: phase.hue }}></i></div></td><td>${number(phase.seconds * 1000)} ms</td><td>${percent(phase.seconds / whole)}</td></tr>`)}</tbody></table>
    <${Lines} label="seconds of each phase" log unit="s" series=${series} height=${220} step=${step} theme=${theme} onPick=${(s) => select({ step: s })} /></div><//>`;
}
