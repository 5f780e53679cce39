// View 8, the ideas of both pictures, told with this run's own numbers. The long form is docs/learn; the formulas and the
// sources here are the same. What a run has not recorded is said in general words, never with made-up numbers.
import { Panel, html } from "../ui.js";
import { select, statIndex, useAnswer, useReading, useRun, useWindow } from "../state.js";
import { epochsOf } from "../epochs.js";
import { holds } from "../source.js";
import { Spark } from "../line.js";
import { bytes, capital, count, number, percent, plural, when } from "../format.js";
import { Mark, answerOf, derivation, fansOf, pair, percents, place, proofsOf, quoted, updateFormula, visible } from "../play.js";
import { taskOf } from "../task.js";

const SOURCES = [
  ["Rumelhart, Hinton & Williams 1986", "Learning representations by back-propagating errors", "https://doi.org/10.1038/323533a0"],
  ["Kingma & Ba 2014", "Adam: a method for stochastic optimization", "https://arxiv.org/abs/1412.6980"],
  ["Vaswani et al. 2017", "Attention is all you need", "https://arxiv.org/abs/1706.03762"],
  ["Collobert et al. 2011", "Natural language processing (almost) from scratch", "https://jmlr.org/papers/v12/collobert11a.html"],
  ["Halevy, Norvig & Pereira 2009", "The unreasonable effectiveness of data", "https://doi.org/10.1109/MIS.2009.36"],
  ["Goodfellow, Bengio & Courville 2016", "Deep Learning", "https://www.deeplearningbook.org"],
  ["xAI 2024", "Open release of Grok-1", "https://github.com/xai-org/grok-1"],
  ["Chen et al. 2023", "Symbolic discovery of optimization algorithms", "https://arxiv.org/abs/2302.06675"],
  ["Shazeer & Stern 2018", "Adafactor: adaptive learning rates with sublinear memory cost", "https://arxiv.org/abs/1804.04235"],
  ["Jordan et al. 2024", "Muon: an optimizer for hidden layers in neural networks", "https://kellerjordan.github.io/posts/muon/"],
];
const cite = (...numbers) => html`<p class="source">${numbers.map((n, i) => html`${i ? " · " : "Source: "}<a href=${SOURCES[n][2]} rel="noopener noreferrer" target="_blank">${SOURCES[n][0]}</a>`)}</p>`;
const go = (view, patch = {}) => (event) => { event.preventDefault(); select({ view, ...patch }); };
const see = (view, words, patch) => html`<a href=${`#view=${view}`} onClick=${go(view, patch)}>${words}</a>`;
const n = (value, options) => html`<b title=${String(value)} data-value=${value}>${number(value, options)}</b>`;
const p = (value, digits = 1) => html`<b data-value=${value}>${percent(value, digits)}</b>`;

/** A card: one idea, its formula, and what it is in this run. */
function Idea({ id, title, formula, children, sources }) {
  return html`<section class="panel idea" aria-labelledby=${id}><h2 id=${id}>${title}</h2><div class="formula">${formula}</div>${children}${sources.length ? cite(...sources) : ""}</section>`;
}

export function Learn() {
  const { run, index, step } = useRun();
  const plays = (useAnswer(`plays?run=${index}`, 0).data?.steps ?? []).filter((s) => holds(`play?run=${index}&step=${s}`));
  const nearest = plays.length ? plays.reduce((a, b) => (Math.abs(b - step) <= Math.abs(a - step) ? b : a)) : null;
  const play = useAnswer(nearest === null ? null : `play?run=${index}&step=${nearest}`).data;
  const river = useAnswer(`river?run=${index}`, 0).data;
  const main = useWindow(index, "run", "*").window, held = useWindow(index, "evaluation", "*").window;
  const series = (window, stream, stat) => (window?.columns ? window.series(0, statIndex(run, stream, stat)) : []);
  const measured = held?.columns ? Math.max(0, held.steps[held.columnOf(step)] ?? 0) : step; // training then is what held-out text is compared with
  const router = useReading(index, "router", "*", step), recent = useReading(index, "run", "*", measured, 32);
  const began = useReading(index, "run", "*", 0), now = useReading(index, "run", "*", step), loss = statIndex(run, "run", "loss");
  const losses = series(main, "run", "loss").slice(0, main ? main.columnOf(step) + 1 : 0), heldLosses = series(held, "evaluation", "loss");
  const labelled = taskOf(run).labelled;
  const facts = { run, index, step, play, river, losses, heldLosses, held, router, recent, began, now, loss };
  return html`
    <${Panel} id="learn-title" wide question="What is happening here, and why does it work?"
      answer=${`Two pictures: a network that predicts ${labelled ? "what a document is" : "the next token"} and is adjusted by its errors, and the river of text that teaches it. Each idea with this run's own numbers.`}>
      <p class="learn-way"><b>Picture 1.</b> tokens → layers of attention and experts → ${labelled ? "predicted label" : "predicted token"} → loss → backward → update, again and again. <b>Picture 2.</b> source → normalize → filter → augment → tokenize → pack → train.</p><//>
    <div class="ideas"><${Forward} ...${facts} /><${Attention} ...${facts} /><${Experts} ...${facts} /><${Loss} ...${facts} /><${Backward} ...${facts} /><${Update} ...${facts} /><${Data} ...${facts} /><${Generalise} ...${facts} /></div>
    <${Panel} id="sources-title" wide question="Where does this come from?" answer="The papers and the book behind the two pictures.">
      <ul class="sources">${SOURCES.map(([who, title, url]) => html`<li><b>${who}</b> <a href=${url} rel="noopener noreferrer" target="_blank">${title}</a></li>`)}</ul><//>`;
}

const unplayed = html`<p class="hint">${see("network", "Play a step in the Network view")} and this card shows it with real numbers.</p>`;

function Forward({ run, play }) {
  const model = run.config?.model ?? {}, total = run.manifest?.parameters?.total;
  const token = play?.tokens.at(-1), output = play?.outputs.at(-1), first = output?.choices[0];
  return html`<${Idea} id="idea-forward" title="Tokens in, a prediction out" sources=${[2, 3, 6]}
    formula=${html`h = √D · E[token]<br/>h = h + norm(attention(norm(h)))<br/>h = h + norm(moe(norm(h)))`}>
    <p>A token is a number that stands for a piece of text; this run knows ${count(model.vocab_size)} of them. Each picks its row of ${count(model.hidden_size)} numbers from a table, and ${plural(model.num_hidden_layers, "layer reads those numbers and adds to them", "layers read those numbers and add to them")}${total ? html`, with ${count(total)} weights in all` : ""}. Grok-1 has the same shape, with 64 layers and 314 billion weights. There are no biases anywhere.</p>
    ${play ? html`<p>In step ${count(play.step)} it read ${play.tokens.slice(-8).map((t) => html`<span class="piece">${visible(t.text)}</span>`)} and ${play.shape.head ? html`said ${answerOf(output)}. The truth is ${quoted(token.target_text)}.` : html`thought ${quoted(first.text)} most likely, with ${p(first.p, 2)}. What came was ${quoted(token.target_text)}, to which it gave ${p(output.p, 2)}.`}</p>` : unplayed}<//>`;
}

function Attention({ run, play }) {
  let best = null;
  play?.layers.forEach((layer, l) => layer.attention.weights.forEach((head, h) => head.at(-1).forEach((weight, s) => {
    if (s < play.tokens.length - 1 && weight > (best?.weight ?? 0)) best = { l, h, s, weight }; // itself left out
  })));
  return html`<${Idea} id="idea-attention" title="Attention: read what came before" sources=${[2]}
    formula=${html`logit = 30 · tanh(q·k / √d / 30)<br/>weight = softmax(logit)<br/>output = Σ weight · v`}>
    <p>Every token asks a question (q) and offers a key (k) and a value (v). Where question and key fit, the value is read. Several heads ask different questions at once. Nobody reads a later token${run.config?.data?.cross_document_attention ? "; the documents of a row do read those before them" : ", or another document"}.</p>
    ${best ? html`<p>In step ${count(play.step)}, ${quoted(play.tokens.at(-1).text)} read ${quoted(play.tokens[best.s].text)} most: head ${best.h} of layer ${best.l} gave it ${p(best.weight)} of its attention. ${see("network", "Look at all heads", { layer: best.l, step: play.step })}.</p>` : unplayed}<//>`;
}

/** What keeps all experts in use. */
const inUse = (training) => (training.balance_loss !== "none" && training.balance_loss_weight !== 0 ? "A balance loss keeps all of them in use."
  : training.balance_bias_rate ? "A bias on the router's choice keeps all of them in use." : "Nothing keeps all of them in use: this run has no balance loss.");

const layersOf = (rows) => new Set(rows.map((row) => row.layer)).size;

function Experts({ run, play, router }) {
  const rows = run.streams.router?.rows ?? [], load = statIndex(run, "router", "load");
  const loads = router ? rows.map((row, i) => ({ row, load: router.value(i, load) })).filter((x) => x.load !== null) : [];
  const most = loads.reduce((a, b) => (b.load > (a?.load ?? -1) ? b : a), null), least = loads.reduce((a, b) => (b.load < (a?.load ?? Infinity) ? b : a), null);
  const own = play?.layers.at(-1).router, chosen = own?.chosen.at(-1), probs = own?.probs.at(-1);
  const model = run.config?.model ?? {};
  return html`<${Idea} id="idea-experts" title="Experts: many specialists, few at work" sources=${[6]}
    formula=${html`p = softmax(x Wᵀ) over ${plural(model.num_experts ?? 0, "expert")}, the best ${count(model.num_experts_per_tok)} ${model.num_experts_per_tok === 1 ? "serves" : "serve"}<br/>y = Σ p · down(gelu(gate(x)) · up(x))`}>
    <p>${model.num_experts === 1 ? "Each layer of this run has one expert, and every token goes to it: the router has nothing to choose. With more of them a model can know more without every token paying for all of it." : html`Each layer holds ${count(model.num_experts)} small networks, and a router that sends every token to ${count(model.num_experts_per_tok)} of them. So the model can know more without every token paying for all of it. ${inUse(run.config?.training ?? {})}`}</p>
    ${most && loads.length > layersOf(rows) && html`<p>${capital(router.when)}, expert ${most.row.expert} of layer ${most.row.layer} carried ${n(most.load, { digits: 3 })} times its fair share, expert ${least.row.expert} of layer ${least.row.layer} ${n(least.load, { digits: 3 })} times. ${see("experts", "See the ledger")}.</p>`}
    ${play ? html`<p>For ${quoted(play.tokens.at(-1).text)} the last layer's router chose ${chosen.map((e, i) => html`${i ? " and " : ""}expert ${e} (${p(probs[e])})`)}.</p>` : ""}<//>`;
}

function Loss({ run, play, losses, began, now, loss: at }) {
  const vocabulary = run.config?.model?.vocab_size, output = play?.outputs.at(-1), loss = now?.value(0, at) ?? null, task = taskOf(run);
  const first = html`This run began at ${n(began?.value(0, at) ?? null)}${began && began.from < began.to ? ` ${began.when}` : ""}`;
  if (task.labelled) {
    return html`<${Idea} id="idea-loss" title="Loss: how wrong was it?" sources=${[5]}
      formula=${task.head.problem_type === "regression" ? (task.guess ? "loss = mean of ((said − truth) / σ)²" : "loss = mean of Huber((said − truth) / σ)") : task.guess ? "loss = −ln p(the right class)" : "loss = −Σ target · ln p, smoothed or weighted"}>
      <p>A document has one answer, read by the head from the state of its last token. ${task.guess?.words ?? ""} ${first}${loss !== null ? html` and stands at ${n(loss)} ${task.unit} ${now.when}: ${task.meaning(loss)}` : ""}.</p>
      <p class="spark-line"><${Spark} values=${losses} hue="#0072B2" width=${220} height=${36} label="loss of every step so far" /> ${see("learning", "the whole curve")}</p><//>`;
  }
  return html`<${Idea} id="idea-loss" title="Loss: how wrong was it?" sources=${[5]}
    formula=${html`loss = −ln p(the token that came)${output ? html`<br/>−ln ${n(output.p)} = ${n(output.loss)}` : ""}`}>
    <p>The loss is the surprise. A model that knows nothing spreads its bets evenly over ${count(vocabulary)} tokens: ln ${count(vocabulary)} = ${n(Math.log(vocabulary))}. ${first}${loss !== null ? html` and stands at ${n(loss)} ${now.when}: as if it hesitated between ${n(Math.exp(loss), { digits: 3 })} tokens` : ""}.</p>
    <p class="spark-line"><${Spark} values=${losses} hue="#0072B2" width=${220} height=${36} label="loss of every step so far" /> ${see("learning", "the whole curve")}</p><//>`;
}

const example = (play) => {
  const fans = play ? fansOf(play, play.layers.length - 1, play.tokens.length - 1) : [], fan = fans.find((f) => f.key === "expert0");
  return fan ? { fan, term: fan.fan.terms[0] } : null;
};

/** The slope where the chain begins; nothing where the loss is smoothed, weighted or Huber's. */
const slopeOf = (task) => (!task.guess && task.labelled ? "" : task.head?.problem_type === "regression" ? "∂loss/∂output_k = 2 · error_k / K" : "∂loss/∂logit_j = p_j − [j is the target]");

function Backward({ run, play }) {
  const chosen = example(play), edge = chosen && play.edges[chosen.term.edge], share = chosen && chosen.fan.fan.slope * chosen.term.a;
  const proofs = edge ? proofsOf(edge, play).slice(0, 2).filter(([, holds]) => holds !== null) : [];
  return html`<${Idea} id="idea-backward" title="Backward: who was responsible?" sources=${[0]}
    formula=${html`∂loss/∂x = ∂loss/∂y · ∂y/∂x<br/>${slopeOf(taskOf(run))}`}>
    <p>Change a weight a little and the loss changes a little; the ratio is its gradient. Back-propagation finds the gradients of all weights in one sweep from right to left, by the chain rule. A weight's share is <em>how wrong its output was</em> times <em>how active its input was</em>.</p>
    ${edge ? html`<p>The weight <span class="mono">${place(edge)}</span> in step ${count(play.step)}: ${n(chosen.fan.fan.slope)} · ${n(chosen.term.a)} = ${n(share)} from this token, ${n(edge.gradient - share)} from ${play.shape.head ? "all" : html`the ${count(play.step_result.tokens - 1)}`} others, together ${n(edge.gradient)}.</p>
      ${proofs.length ? html`<ul class="proofs">${proofs.map(([claim, holds, detail]) => html`<li class=${holds ? "holds" : "fails"}><${Mark} holds=${holds} /><span>${claim}<small>${detail}</small></span></li>`)}</ul>` : ""}` : unplayed}<//>`;
}

/** What a rule makes of the gradient, in a sentence, and which of SOURCES it is from. */
const ADAM = ["Adam keeps what the gradient usually is (m) and how large it usually is (v): weights whose gradients agree move, those whose gradients cancel hardly do.", [1]];
const RULES = { adam: ADAM, adamw: ADAM, sgd: ["Plain gradient descent takes the gradient itself; with momentum, what earlier gradients agreed on as well.", [0]],
  muon: ["Muon makes all directions of a matrix's momentum equally long, so that no few of them take the whole step.", [9]],
  lion: ["Lion takes the sign of a moving mean of the gradients: every weight moves by the same η, whatever the size of its gradient.", [7]],
  adafactor: ["Adafactor divides the gradient by how large it usually is, of which it keeps means by row and column alone; its steps are relative to the size of the weights.", [8]] };

/** The rule itself, decay left out. */
function ruleOf(rule, { momentum: μ, nesterov } = {}) {
  if (RULES[rule] === ADAM) return html`m ← β₁ m + (1−β₁) g<br/>v ← β₂ v + (1−β₂) g²<br/>w ← w − η m̂ / (√v̂ + ε)`;
  if (rule === "sgd") return μ === 0 ? "w ← w − η g" : html`b ← μ b + g<br/>w ← w − η ${nesterov === false ? "b" : "(g + μ b)"}`;
  if (rule === "muon") return html`b ← μ b + (1−μ) g<br/>w ← w − η · √max(1, out/in) · orthogonal(${nesterov === false ? "b" : "μ b + (1−μ) g"})`;
  if (rule === "lion") return html`w ← w − η sign(β₁ m + (1−β₁) g)<br/>m ← β₂ m + (1−β₂) g`;
  if (rule === "adafactor") return html`v ← row · column / mean(row), of means of g²<br/>u ← g / √v, divided by max(1, RMS(g / √v))<br/>w ← w − ρ u<br/>ρ = max(10⁻³, RMS(w)) · min(η, t^−½)`;
  return html`w ← w − η · step of ${rule ?? "the optimizer"}`;
}

function Update({ run, play }) {
  const chosen = example(play), edge = chosen && play.edges[chosen.term.edge], rule = edge ? play.optimizer[edge.tensor].rule : run.config?.optimizer?.name;
  const [before, after] = edge ? pair(edge.before, edge.after) : [], output = play?.outputs.at(-1), [about, sources] = RULES[rule] ?? ["", []];
  const terms = edge ? derivation(play, chosen).filter(([, formula]) => formula === "Δw") : [];
  return html`<${Idea} id="idea-update" title="Update: what is adjusted, and by how much" sources=${sources}
    formula=${ruleOf(rule, run.config?.optimizer)}>
    <p>Each weight takes a small step against its gradient. ${about} ${edge ? html`The weight below is moved by ${rule}` : html`This run uses ${rule}`}.</p>
    ${edge ? html`<p>The same weight went from ${n(edge.before)} to <b data-value=${edge.after}>${after}</b> (${terms.map(([what, , value], i) => html`${i ? ", " : ""}${what.replace(/:.*/, "")} ${n(value, { signed: true })}`)}).</p><div class="formula">${updateFormula(play, edge, n)}</div>
      <p>With all weights moved, ${play.shape.head ? html`the head says ${answerOf(output, "_after")} instead of ${answerOf(output)}` : html`${quoted(play.tokens.at(-1).target_text)} went from ${percents(output.p, output.p_after)[0]} to ${percents(output.p, output.p_after)[1]}`}. ${see("network", "Play it", { step: play.step, phase: 5 })}.</p>` : unplayed}<//>`;
}

function Data({ run, river, step }) {
  const stages = (river?.stages ?? []).filter((s) => s.documents_in !== undefined && !s.splits), train = river?.splits?.train;
  const read = stages.find((s) => s.cut), epochs = epochsOf(river, run, step);
  return html`<${Idea} id="idea-data" title="Data: what text becomes before it teaches" sources=${[4, 3]}
    formula="source → normalize → (filter, deduplicate, augment) → tokenize → pack → loader">
    <p>Simple models with much text beat clever ones with little; so nothing of the text may disappear unseen.</p>
    ${stages.length ? html`<table class="stages"><thead><tr><th scope="col" class="left">stage</th><th scope="col">documents in</th><th scope="col">out</th></tr></thead><tbody>${stages.map((s) => html`<tr><th scope="row" class="left">${s.name}</th><td data-value=${s.documents_in}>${count(s.documents_in)}</td><td data-value=${s.documents_out}>${count(s.documents_out)}</td></tr>`)}</tbody></table>` : html`<p class="hint">${river?.problem ?? "This run's stages are not recorded."}</p>`}
    ${read ? html`<p>Once read, ${plural(read.documents_out, "document was", "documents were")} cut into ${count(read.cut)}: the end of the text is held out.</p>` : ""}
    ${train ? html`<p>${bytes(train.text_bytes)} of text became ${count(train.tokens)} tokens in ${plural(train.documents, "document")}, packed into ${plural(train.packing.rows, "row")} with ${p(train.packing.utilization, 2)} of their places filled${epochs === null ? "" : html`; ${plural(run.config.training.batch_size, "row")} a step make ${n(epochs, { digits: 3 })} epochs so far`}. ${see("river", "Follow a document")}.</p>` : ""}<//>`;
}

/** What the losses tell of that, in a sentence; first: the held-out loss of the first measure, where `out` is of a later one. */
export function verdict({ guess, unit, each, out, train, first }) {
  const ignorant = Math.min(guess?.value ?? Infinity, first ?? Infinity); // the loss of who has learned nothing
  if (![ignorant, out, train].every(Number.isFinite)) return "";
  const than = ignorant !== guess?.value ? "the first measure" : guess.label === "guessing" ? "guessing" : "always saying the mean";
  if (train >= ignorant) return `Training is no better than ${than}: there is nothing that could hold for new text.`;
  if (out >= ignorant) return `On new text that is no better than ${than}: what it gained on the training text, it only remembers.`;
  return html`Against ${than}, training gained ${n(ignorant - train)} ${unit} per ${each}; ${p(Math.min(1, (ignorant - out) / (ignorant - train)))} of that holds for new text.`;
}

function Generalise({ run, heldLosses, held, recent, loss, step }) {
  const at = held?.columns ? held.columnOf(step) : -1, train = recent?.value(0, loss) ?? null, out = at < 0 ? null : heldLosses[at], task = taskOf(run);
  const said = at < 0 ? "" : held.steps[at] < 0 ? "Then nothing was learned yet." : verdict({ ...task, out, train, first: at > 0 ? heldLosses[0] : null });
  return html`<${Idea} id="idea-generalise" title="Learning or memorising?" sources=${[5]}
    formula=${html`gap = held-out loss − training loss${out !== null && train !== null ? html` = ${n(out)} − ${n(train)} = ${n(out - train, { signed: true })}` : ""}`}>
    <p>A model can find what holds for the language, or remember these very sentences. On text it never saw, only the first helps. So a part of the documents is held out and measured again and again.</p>
    ${out !== null ? html`<p>The held-out loss was ${n(out)} ${task.unit} per ${task.each} ${when(held.steps[at])}${at > 0 ? html`; ${when(held.steps[0])} it was ${n(heldLosses[0])}` : ""}. The training loss was ${n(train)} ${recent?.when ?? ""}. ${said}</p>` : html`<p class="hint">Nothing is held out in this run.</p>`}<//>`;
}
