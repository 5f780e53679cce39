// View 5, what was learned: loss of training and held-out text, where in the text it falls, and the text itself.
import { Nothing, Panel, html, useMemo, useState } from "../ui.js";
import { select, statIndex, useAnswer, useReading, useRun, useWindow } from "../state.js";
import { RUNS } from "../colour.js";
import { Lines } from "../line.js";
import { epochsOf } from "../epochs.js";
import { isReport } from "../source.js";
import { capital, count, number, percent, plural, visible, when } from "../format.js";
import { visible as token } from "../play.js";
import { labelOf, taskOf } from "../task.js";

const TRAIN = "#0072B2", HELD = "#D55E00", NEAR = 10;

export function Learning({ theme }) {
  const { chosen, run, index, step, runs } = useRun();
  const range = { from: chosen.from, to: chosen.to };
  const { window } = useWindow(index, "run", "*", range), reading = useReading(index, "run", "*", step);
  const held = useWindow(index, "evaluation", "*", range).window, evaluations = useWindow(index, "evaluation", "*").window;
  const other = chosen.compare !== null && chosen.compare !== index ? runs[chosen.compare] : null;
  const otherRun = useWindow(chosen.compare ?? 0, "run", other ? "*" : null, range).window;
  const otherHeld = useWindow(chosen.compare ?? 0, "evaluation", other ? "*" : null, range).window;
  const loss = statIndex(run, "run", "loss"), heldLoss = statIndex(run, "evaluation", "loss");
  const series = useMemo(() => {
    if (!window) return [];
    const dots = (w, label, hue) => ({ label, hue, ...w.line(0, heldLoss), points: true });
    return [{ label: "training", hue: TRAIN, ...window.line(0, loss) }, held?.columns ? dots(held, "held-out", HELD) : null,
      other && otherRun ? { label: `${other.name}, training`, hue: "#56B4E9", dash: [5, 3], ...otherRun.line(0, loss) } : null,
      other && otherHeld?.columns ? dots(otherHeld, `${other.name}, held-out`, "#CC79A7") : null].filter(Boolean);
  }, [window, held, otherRun, otherHeld]);
  if (!window || !reading) return html`<p class="boot">Reading the losses …</p>`;
  const now = reading.value(0, loss), task = taskOf(run);
  const lr = statIndex(run, "run", "learning_rate"), norm = statIndex(run, "run", "gradient_norm");
  const evaluated = evaluations ? evaluations.columnOf(step) : -1;
  const measures = task.head?.problem_type === "regression" ? [["r2", "held-out R²", "#009E73"], ["spearman", "held-out rank correlation", "#CC79A7"]] : [["accuracy", "held-out accuracy", "#009E73"], ["macro_f1", "held-out macro-F1", "#CC79A7"]];
  const answer = `${capital(reading.when)} the batch's loss is ${number(now)} ${task.unit} per ${task.each}: ${task.meaning(now)}.`
    + (task.guess ? ` ${task.guess.words}` : "")
    + (evaluated >= 0 ? ` Held-out: ${number(evaluations.value(evaluated, 0, heldLoss))} ${when(evaluations.steps[evaluated])}${task.labelled ? ` (${measures.map(([stat, label]) => `${label.replace("held-out ", "")} ${number(evaluations.value(evaluated, 0, statIndex(run, "evaluation", stat)))}`).join(", ")})` : ""}.` : "");
  return html`
    <${Panel} id="loss-title" wide question="Is it learning, and does that hold for text it has not seen?" answer=${answer}
      aside=${(chosen.from !== null || chosen.to !== null) && html`<button type="button" onClick=${() => select({ from: null, to: null })}>all steps</button>`}>
      <${Lines} label="loss" series=${series} unit=${task.unit} height=${260} step=${step} theme=${theme} onPick=${(s) => select({ step: s })}
        theory=${task.guess ? [task.guess] : []} />
      <${Epochs} run=${run} index=${index} step=${step} />
      ${task.labelled && held?.columns > 0 && html`<${Lines} label="held-out measures" series=${measures.map(([stat, label, hue]) => ({ label, hue, ...held.line(0, statIndex(run, "evaluation", stat)), points: true }))}
        height=${140} step=${step} theme=${theme} onPick=${(s) => select({ step: s })} />`}
    <//>
    <div class="columns">
      <${ByPosition} run=${run} index=${index} step=${step} />
      <${Panel} id="rate-title" question="How was it driven?" answer=${`${capital(reading.when)} the learning rate${run.config?.optimizer?.name === "muon" ? " of Muon's matrices" : ""} is ${number(reading.value(0, lr))}, the gradient norm ${number(reading.value(0, norm))} before clipping.`}>
        <${Lines} label="learning rate" series=${[{ label: "learning rate", hue: "#009E73", ...window.line(0, lr) }]} height=${110} step=${step} theme=${theme} onPick=${(s) => select({ step: s })} zero />
        <${Lines} label="gradient norm" series=${[{ label: "gradient norm", hue: "#CC79A7", ...window.line(0, norm) }]} log height=${130} step=${step} theme=${theme} onPick=${(s) => select({ step: s })}
          theory=${run.config?.training?.gradient_clip ? [{ value: run.config.training.gradient_clip, label: "clipped above" }] : []} />
      <//>
    </div>
    <${BySource} run=${run} index=${index} step=${step} theme=${theme} />
    <${Documents} run=${run} index=${index} step=${step} />
    <${Samples} index=${index} run=${run} step=${step} />`;
}

/** How far through the data the step is. */
function Epochs({ run, index, step }) {
  const river = useAnswer(`river?run=${index}`).data;
  const seen = epochsOf(river, run, step);
  if (seen === null) return null;
  const total = run.meta?.max_steps ? epochsOf(river, run, run.meta.max_steps - 1) : seen;
  return html`<p class="epochs"><span>After step ${count(step)} the model has read ${number(seen)} epochs: ${count((step + 1) * run.config.training.batch_size)} rows; an epoch has ${count(river.rows_per_epoch)}.</span>
    <progress max=${Math.max(1, total)} value=${Math.min(seen, Math.max(1, total))} aria-label="epochs read"></progress></p>`;
}

/** Means of some recorded steps: one step's position buckets hold few tokens. */
function ByPosition({ run, index, step }) {
  const near = useReading(index, "position", "*", step, NEAR), start = useReading(index, "position", "*", NEAR - 1, NEAR);
  if (!run.streams.position) return html`<${Panel} id="position-title" question="Does it use the text before?"><${Nothing}>This run did not record loss by position.<//><//>`;
  if (!near || !start) return null;
  const rows = run.streams.position.rows.map((row, i) => ({ name: row.name, now: near.value(i), then: start.value(i) })).filter((row) => row.now !== null);
  const top = Math.max(...rows.flatMap((row) => [row.now, row.then]).filter(Number.isFinite), 0.1);
  const first = rows[0], last = rows[rows.length - 1], task = taskOf(run);
  const answer = !first || !last ? "" : task.labelled ? `${capital(near.when)} the loss is ${number(first.now)} where ${first.name} tokens stand before a document's last, and ${number(last.now)} where ${last.name} do.`
    : `${capital(near.when)} the loss after ${last.name} tokens of context is ${number(last.now)}, against ${number(first.now)} without any: context is worth ${number(first.now - last.now)} nats.`;
  return html`<${Panel} id="position-title" question=${task.labelled ? "Does the length of a document matter?" : "Does it use the text before?"} answer=${answer}>
    <table class="bars"><caption class="sr">loss by position in the document</caption>
      <thead><tr><th scope="col">tokens before</th><th scope="col" class="left">loss</th><th scope="col">${task.unit}</th></tr></thead>
      <tbody>${rows.map((row) => html`<tr><th scope="row">${row.name}</th><td class="left"><div class="bar-cell"><i class=${Number.isFinite(row.now) ? "" : "hatched"} style=${Number.isFinite(row.now) ? { width: `${(100 * row.now) / top}%`, background: TRAIN } : { width: "100%" }}></i>
        ${Number.isFinite(row.then) && html`<b style=${{ left: `${(100 * row.then) / top}%` }}></b>`}</div></td><td>${number(row.now)}</td></tr>`)}</tbody></table>
    <p class="hint">Bar: ${near.when}. Mark: ${start.when}.</p>
  <//>`;
}

function BySource({ run, index, step, theme }) {
  const { window, there } = useWindow(index, "source", "*");
  const rows = run.streams.source?.rows ?? [];
  const series = useMemo(() => (window ? rows.map((row, i) => ({ label: row.name, hue: RUNS[i % RUNS.length], dash: i >= 8 ? [4, 3] : undefined, ...window.line(i) })) : []), [window]);
  if (!there || !window?.columns || rows.length < 2) return null;
  return html`<${Panel} id="source-title" wide question="Which sources are learned, and which are not?" answer=${`${rows.length} sources; the mean hides what one of them does.`}>
    <${Lines} label="loss by source" series=${series} unit=${taskOf(run).unit} height=${200} step=${step} theme=${theme} onPick=${(s) => select({ step: s })} /><//>`;
}

/** The batch of the selected step: pieces of documents with the loss on each, the worst on top. */
export function Documents({ run, index, step }) {
  const { data, problem } = useAnswer(`step?run=${index}&step=${step}`, 0, !isReport);
  const [open, show] = useState(null), name = (i) => `${data.step}.${i}`; // of this step: another has other documents
  const question = `Which documents were in step ${count(data?.step ?? step)}?`;
  if (problem || data?.problem) return html`<${Panel} id="documents-title" wide question=${question}><${Nothing}>${problem ?? data.problem}<//><//>`;
  if (!data) return null;
  const measured = data.pieces.filter((piece) => piece.loss !== null && piece.loss !== undefined), task = taskOf(run);
  return html`<${Panel} id="documents-title" wide question=${question}
    answer=${measured.length ? `${plural(data.pieces.length, "piece")} of documents; the hardest is ${measured[0].source} with ${number(measured[0].loss)} ${task.unit}${task.labelled ? "" : " per token"}.` : `${plural(data.pieces.length, "piece")} of documents; their losses were not recorded at this step.`}>
    <div class="columns">
      <div class="scroll tall" tabindex="0" role="region" aria-label="documents of the step"><table><thead><tr><th class="left" scope="col">document</th><th scope="col">bytes</th><th scope="col">tokens</th><th scope="col">loss</th><th scope="col">${task.labelled ? "label" : "worst token"}</th></tr></thead>
        <tbody>${data.pieces.map((piece, i) => html`<tr class=${open === name(i) ? "chosen" : ""}><td class="left"><button type="button" class="link" aria-expanded=${open === name(i)} onClick=${() => show(open === name(i) ? null : name(i))}>${piece.source}</button>
          ${open === name(i) && html`<p><a href="#" onClick=${(e) => { e.preventDefault(); select({ view: "river", document: piece.document }); }}>follow this document through the river</a></p><pre class="text">${piece.excerpt ?? "(its text is shown for the twelve hardest)"}</pre>`}</td>
          <td>${count(piece.byte_start)}–${count(piece.byte_end)}${piece.exact === false && html`<br /><small>of its whole document</small>`}</td><td>${piece.length}</td><td>${number(piece.loss)}</td><td>${task.labelled ? labelOf(piece.label, task.head) : number(piece.worst)}</td></tr>`)}</tbody></table></div>
      <div><h3>${task.labelled ? "The documents it was most wrong about, and what they are" : "The tokens it expected least"}</h3>
        <ol class="worst">${data.tokens.map((worst) => html`<li><span class="loss">${number(worst.loss)}</span><span class="mono">…${visible(worst.before.slice(-60))}<mark>${token(labelOf(worst.label, task.head) ?? worst.target_text)}</mark></span></li>`)}</ol></div>
    </div><//>`;
}

/** Texts the model wrote, and kept rows whose tokens carry the colour of their loss. */
function Samples({ run, index, step }) {
  const { data } = useAnswer(`samples?run=${index}`, Math.floor(step / 100));
  const held = useAnswer(`river?run=${index}`).data?.splits?.validation;
  const [at, pick] = useState(null);
  if (!data) return null;
  const rows = data.rows, row = rows[at ?? rows.length - 1], { labelled, unit, share, head } = taskOf(run);
  const told = (loss) => `${number(loss)} ${unit}${share(loss) === null ? "" : `, probability ${percent(share(loss), 2)}`}`;
  return html`<div class="columns">
    <${Panel} id="tokens-title" question=${labelled ? "Which documents is it still wrong about?" : "Where in a text is it still surprised?"} answer=${!row ? "" : labelled ? "The documents of a training row; the end of each is darker the more wrong the model was about it at that step. Point at one for its loss." : "Each token of a training row, darker the more it surprised the model at that step. Point at one for its loss."}>
      ${row ? html`<label>kept row of <select value=${at ?? rows.length - 1} onChange=${(e) => pick(Number(e.target.value))}>${rows.map((r, i) => html`<option value=${i} selected=${i === (at ?? rows.length - 1)}>step ${count(r.step)}</option>`)}</select></label>
        <p class="token-text" tabindex="0" role="region" aria-label=${`tokens of the row kept at step ${count(row.step)}`}>${row.texts.map((text, i) => text === null ? "" : html`<span style=${{ background: `color-mix(in oklab, #D55E00 ${Math.round(Math.min(70, row.losses[i] * 8))}%, transparent)` }} title=${!labelled ? `${JSON.stringify(text)}: ${told(row.losses[i])}` : (row.labels?.[i] ?? null) === null ? null : `${labelOf(row.labels[i], head)}: ${told(row.losses[i])}`}>${text}</span>`)}</p>`
    : html`<${Nothing}>No row with the loss of each token was kept yet.<//>`}<//>
    <${Panel} id="written-title" question=${labelled ? "What does it say of documents?" : "What does it write?"} answer=${data.texts.length ? `${labelled ? `${held ? "Held-out documents" : "Documents"}, what they are, and what the model says` : "The same words continued by the model"}, ${plural(data.texts.length, "time")} over the run; the newest on top.` : ""}>
      ${data.texts.length ? html`<div class="scroll tall" tabindex="0" role="region" aria-label="texts the model wrote">${data.texts.toReversed().map((text) => html`<h3>${when(text.step)}</h3>
        <pre class="text">${text.prompt}<mark class="written">${text.text}</mark></pre>`)}</div>`
    : html`<${Nothing}>No text was written during this run yet.<//>`}<//>
  </div>`;
}
