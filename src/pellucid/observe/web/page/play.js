// One step's play (observe/theatre.py) as the Network view reads it: phases, fans, edges, and the words for each of them.
import { html } from "./ui.js";
import { count, number, percent } from "./format.js";
import { taskOf } from "./task.js";

export const PHASES = [["input", "Input"], ["forward", "Forward"], ["predict", "Predict"], ["loss", "Loss"], ["backward", "Backward"], ["update", "Update"], ["after", "After"]];

/** A token's text with what one cannot see made visible. */
export const visible = (text) => (text === null || text === undefined ? "–" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣").replace(/^$/, "∅"));
export const quoted = (text) => `“${visible(text)}”`;

/** Two numbers with as many digits, four at least, as it takes to see that they differ. */
export function pair(before, after) {
  for (let digits = 4; digits < 10; digits++) {
    const [a, b] = [number(before, { digits }), number(after, { digits })];
    if (a !== b || before === after) return [a, b];
  }
  return [number(before, { digits: 9 }), number(after, { digits: 9 })];
}

/** Two shares in percent, with as many decimals as it takes to see that they differ. */
export function percents(before, after) {
  for (let digits = 2; digits < 6; digits++) if (percent(before, digits) !== percent(after, digits)) return [percent(before, digits), percent(after, digits)];
  return [percent(before, 2), percent(after, 2)];
}

/** The weighted sums that are shown for one layer and token: [{key, title, fan, hue, gate}], the last one the prediction's. */
export function fansOf(play, layer, token) {
  const own = play.layers[layer].fans[token], output = play.outputs[token];
  const found = [];
  if (own) {
    found.push({ key: "attention", title: "attention", fan: own.attention, hue: "#0072B2" }, { key: "router", title: "router", fan: own.router, hue: "#E69F00" });
    own.experts.forEach((fan, i) => found.push({ key: `expert${i}`, title: `expert ${fan.index[0]}`, fan, hue: "#009E73", gate: play.layers[layer].router.gates[token][i] }));
  }
  if (output.fan) found.push({ key: "output", title: "prediction", fan: output.fan, hue: "#56B4E9" });
  return found;
}

/** The fan that holds a weight, if the chosen token's fans have it; else the first expert's. */
export function fanOf(fans, edge, key) {
  return fans.find((f) => f.fan.terms.some((term) => term.edge === edge)) ?? fans.find((f) => f.key === key) ?? fans.find((f) => f.key === "expert0") ?? fans[0];
}

/** The task of a play's run, as task.js tells it. */
export const taskIn = (play) => taskOf({ config: { model: play.shape, training: play.training } });

/** What a head says of a document: its likeliest class, or all its numbers; with `after` behind it, after the step. */
export function answerOf(output, after = "") {
  const { choices } = output;
  if (choices[0]["told" + after] !== undefined) return choices.map((c) => `${c.text} ${number(c["told" + after])}`).join(", ");
  const best = choices.reduce((a, b) => (b["p" + after] > a["p" + after] ? b : a));
  return `${quoted(best.text)} with ${percent(best["p" + after], 2)}`;
}

export const place = (edge) => `${edge.tensor}[${edge.index.join(", ")}]`;

/** What a term multiplies, in words. */
export function inputName(kind, j, play) {
  if (kind === "attention") return `head ${Math.floor(j / play.shape.head_dim)}, value ${j % play.shape.head_dim}`;
  return kind === "experts" ? `hidden unit ${j}` : `channel ${j}`;
}
export function sumName(fan, play) {
  const text = fan.kind === "output" ? quoted(play.outputs.flatMap((o) => o.choices).find((c) => c.id === fan.index[0])?.text) : "", head = play.shape.head;
  return { attention: `channel ${fan.index[0]} of what attention adds`, router: `score of expert ${fan.index[0]}`,
    experts: `channel ${fan.index[1]} of expert ${fan.index[0]}'s answer`, output: head?.problem_type === "regression" ? `the number ${text} in standard deviations` : `score of the ${head ? "class" : "token"} ${text}` }[fan.kind];
}

/** {sentence, formula} of a phase, for the followed token and one weight of it. */
export function tell(play, phase, token, layer, chosen) {
  const here = play.tokens[token], output = play.outputs[token], result = play.step_result;
  const { fan } = chosen.fan, term = chosen.term, edge = play.edges[term.edge], task = taskIn(play);
  const n = (value, options) => html`<b title=${String(value)}>${number(value, options)}</b>`;
  const router = play.layers[layer].router, [first, second] = router.chosen[token], asked = output.target >= 0, numbers = task.head?.problem_type === "regression";
  switch (PHASES[phase][0]) {
    case "input": return {
      sentence: `${play.tokens.length} tokens of row ${play.row} of the batch go in; every one is a row of the embedding table. We follow ${quoted(here.text)}${!task.labelled ? `: after it the text goes on with ${quoted(here.target_text)}` : asked ? `, the last of a document that is ${quoted(here.target_text)}` : ""}.`,
      formula: html`h = √D · E[${here.id}] <span>D = ${play.shape.hidden_size}; RMS of h = ${n(play.layers[0].rms.entering[token])}</span>` };
    case "forward": return {
      sentence: `Layer ${layer}: attention gathers from earlier tokens; the router gives this token to experts ${first} (${percent(router.probs[token][first])})${second === undefined ? "" : ` and ${second} (${percent(router.probs[token][second])})`}; each sums its hidden units.`,
      formula: html`${sumName(fan, play)} = Σ w·a = ${fan.terms.slice(0, 3).map((t, i) => html`${i ? " + " : ""}${n(t.w)}·${n(t.a)}`)} + … + ${n(fan.others.sum)} <span>(${count(fan.others.count)} others)</span> = ${n(fan.value)}` };
    case "predict": if (task.labelled) return {
      sentence: `The head reads the final state of a document's last token${asked ? `, and says ${answerOf(output)}. The truth is ${quoted(here.target_text)}.` : `. Here the document goes on; already it would say ${answerOf(output)}.`}`,
      formula: numbers ? html`${output.choices.map((c, k) => html`${k ? "; " : ""}${c.text} = mean + σ·output = ${n(task.head.mean[k])} + ${n(task.head.std[k])}·${n(c.score)} = ${n(c.told)}`)}` : html`p = exp(score) / Σ exp${asked && html` = exp(${n(output.score)} − ${n(output.normalizer)}) = ${n(output.p)}`}` };
    return {
      sentence: `The scores of all ${count(play.shape.vocab_size)} tokens become probabilities. ${output.target < 0 ? "Nothing is asked here." : `The token that came, ${quoted(here.target_text)}, gets ${percent(output.p, 2)}: rank ${output.rank}.`}`,
      formula: html`p = exp(score) / Σ exp = exp(${n(output.score)} − ${n(output.normalizer)}) = ${n(output.p)}` };
    case "loss": if (task.labelled) return {
      sentence: asked ? `How wrong is it? Loss ${number(output.loss)} ${task.unit} for this document; the mean over the step's ${count(result.tokens)} documents is ${number(result.loss)}.` : "Nothing is asked here: a document has one answer, at its end.",
      formula: !asked ? "" : output.p !== undefined && task.share(1) !== null ? html`loss = −ln p = −ln ${n(output.p)} = ${n(output.loss)}` : numbers && task.guess ? html`loss = mean of ((said − truth) / σ)² = ${n(output.loss)}` : html`loss = ${n(output.loss)}` };
    return {
      sentence: `How surprised is the model? Loss ${number(output.loss)} nats at this token; the mean over the step's ${count(result.tokens)} tokens is ${number(result.loss)}.`,
      formula: html`loss = −ln p = −ln ${n(output.p)} = ${n(output.loss)}` };
    case "backward": return {
      sentence: "Responsibility flows back, from right to left: each weight learns how the loss would change if it grew. All tokens of the step add their share.",
      formula: html`∂L/∂w = Σ slope·a = ${n(fan.slope)}·${n(term.a)} <span>(this token)</span> + ${n(edge.gradient - fan.slope * term.a)} <span>(${task.labelled ? "all" : count(result.tokens - 1)} others)</span> = ${n(edge.gradient)}` };
    case "update": { const [before, after] = pair(edge.before, edge.after); return {
      sentence: `${play.optimizer[edge.tensor].rule} moves every weight${result.clip_factor < 1 ? `, after all gradients were scaled by ${number(result.clip_factor)}` : "; nothing was clipped"}. The chosen one: ${before} → ${after}.`,
      formula: updateFormula(play, edge, n) }; }
    default: return {
      sentence: output.target < 0 ? "Nothing was asked at this token." : task.labelled ? `The same tokens again, with the new weights: the head says ${answerOf(output, "_after")} instead of ${answerOf(output)}. The batch's loss went ${play.losses.batch[1] < play.losses.batch[0] ? "down" : "up"}.` : `The same tokens again, with the new weights: ${quoted(here.target_text)} now gets ${percents(output.p, output.p_after)[1]} instead of ${percents(output.p, output.p_after)[0]}. The batch's loss went ${play.losses.batch[1] < play.losses.batch[0] ? "down" : "up"}.`,
      formula: html`L(batch) ${n(play.losses.batch[0])} → ${n(play.losses.batch[1])}${play.losses.held_out[0] !== null && html` <span>held out (${play.losses.held_out_rows} rows)</span> ${n(play.losses.held_out[0])} → ${n(play.losses.held_out[1])}`}` };
  }
}

export function updateFormula(play, edge, n) {
  const { rule, settings } = play.optimizer[edge.tensor], q = edge.quantities;
  if (rule === "adamw" || rule === "adam") {
    const decay = rule === "adamw" && settings.weight_decay > 0;
    return html`w − η·(m̂/(√v̂+ε)${decay && " + λ·w"}) = ${n(edge.before)} − ${n(settings.learning_rate)}·(${n(q.direction)}${decay && html` + ${n(settings.weight_decay)}·${n(edge.before)}`}) = ${n(edge.after, { digits: 6 })}`;
  }
  const terms = Object.entries(edge.terms);
  return html`w ${terms.map(([name]) => `+ ${name} `)} = ${n(edge.before)} ${terms.map(([, value]) => html`${value < 0 ? "−" : "+"} ${n(Math.abs(value))} `)} = ${n(edge.after, { digits: 6 })}`;
}

/** What each quantity of a rule other than Adam's is: {name: [in words, formula]}. Sources: the plain functions in training/optimizers. */
function ruleOf(rule, { momentum: μ, nesterov, beta1, beta2, weight_decay: λ }, state) {
  const rest = (share) => number(1 - share), before = (name) => number(state[name] ?? 0);
  return { sgd: {
    slope: λ ? [`with L2 decay: ĝ + ${λ}·w`, "s = ĝ + λ·w"] : [μ ? "what the momentum takes up" : "the gradient", "s = ĝ"],
    buffer: [state.momentum_buffer === undefined ? "momentum: it begins with s" : `momentum: ${μ}·${before("momentum_buffer")} + s`, "b = μ·b₀ + s"],
    direction: !μ ? ["step: no momentum", "u = s"] : nesterov ? [`step, looking ahead: s + ${μ}·b`, "u = s + μ·b"] : ["step: the momentum", "u = b"] },
  muon: {
    buffer: [`momentum: ${μ}·${before("momentum_buffer")} + ${rest(μ)}·ĝ`, "b = μ·b₀ + (1−μ)·ĝ"],
    blend: nesterov ? [`looking ahead: ${μ}·b + ${rest(μ)}·ĝ`, "c = μ·b + (1−μ)·ĝ"] : ["what the step follows", "c = b"],
    direction: ["step: the matrix of all c of this tensor, made orthogonal", "u = √max(1, out/in)·orth(c)"] },
  lion: {
    m: [`moving mean for the next step: ${beta2}·${before("exp_avg")} + ${rest(beta2)}·ĝ`, "m = β₂·m₀ + (1−β₂)·ĝ"],
    blend: [`what the step follows: ${beta1}·${before("exp_avg")} + ${rest(beta1)}·ĝ`, "c = β₁·m₀ + (1−β₁)·ĝ"],
    direction: ["step: its sign", "u = sign(c)"] },
  adafactor: {
    v: ["how large it usually is, from moving means of ĝ² by row and column", "v = row·column / mean(row)"],
    direction: ["step: scaled down where the RMS of all ĝ/√v is above 1", "u = ĝ/√v / max(1, RMS)"] } }[rule] ?? {};
}

/** Decay's term of a change: with SGD and Adam it is part of the gradient. */
function decayOf(rule, { weight_decay: λ, momentum: μ, nesterov }) {
  if (rule === "adam") return `decay, as far as it is part of this gradient, λ = ${λ}`;
  return rule === "sgd" && nesterov && μ ? `decay: −η·(1+μ)·λ·w, λ = ${λ}, μ = ${μ}` : `decay: −η·λ·w, λ = ${λ}`;
}

/** The derivation of one weight's update: [what, formula, value]. */
export function derivation(play, chosen) {
  const { fan } = chosen.fan, term = chosen.term, edge = play.edges[term.edge];
  const { rule, settings } = play.optimizer[edge.tensor], q = edge.quantities, s = edge.state, share = fan.slope * term.a;
  const lines = [
    ["weight before", "w", edge.before],
    [`input: ${inputName(fan.kind, term.j, play)}`, "a", term.a],
    [`its part of ${sumName(fan, play)}`, "w·a", term.wa],
    ["how the loss reacts to that sum", "∂L/∂Σ", fan.slope],
    ["this token's share of the gradient", "∂L/∂Σ · a", share],
    ["all other tokens' shares", "Σ", edge.gradient - share],
    ["gradient", "g", edge.gradient],
    ...(play.precision === "bf16" && edge.autograd !== null ? [["the same made in fp32, as the proofs below have it", "g in fp32", edge.autograd]] : []),
    [`clipped: × ${number(play.step_result.clip_factor)}`, "ĝ = c·g", edge.clipped],
  ];
  if (rule === "adamw" || rule === "adam") {
    const t = (s.step ?? 0) + 1, decayed = rule === "adam" && settings.weight_decay > 0, slope = decayed ? "s" : "ĝ"; // what the moments take up
    if (decayed) lines.push([`with L2 decay: ĝ + ${settings.weight_decay}·w`, "s = ĝ + λ·w", q.slope]);
    lines.push(
      [`first moment: ${settings.beta1}·${number(s.exp_avg ?? 0)} + ${number(1 - settings.beta1)}·${slope}`, "m", q.m],
      [`second moment: ${settings.beta2}·${number(s.exp_avg_sq ?? 0)} + ${number(1 - settings.beta2)}·${slope}²`, "v", q.v],
      [`bias corrections, t = ${count(t)} updates with this one: 1−β₁ᵗ = ${number(1 - settings.beta1 ** t)}, 1−β₂ᵗ = ${number(1 - settings.beta2 ** t)}`, "m̂/(√v̂+ε)", q.direction]);
  } else {
    for (const [name, value] of Object.entries(s)) if (name !== "step") lines.push([`${{ momentum_buffer: "momentum", exp_avg: "moving mean" }[name] ?? name.replaceAll("_", " ")}, before`, { momentum_buffer: "b₀", exp_avg: "m₀" }[name] ?? "", value]);
    for (const [name, value] of Object.entries(q)) lines.push([...(ruleOf(rule, settings, s)[name] ?? [`${rule}: ${name.replaceAll("_", " ")}`, ""]), value]);
  }
  const words = { decay: decayOf(rule, settings), momentum: "from earlier gradients", gradient: "from this gradient", descent: rule === "adafactor" ? "from the gradients: −ρ·u, ρ = max(10⁻³, RMS of all w)·min(η, t^−½)" : "from the gradients: −η·u", rounding: "what fp32 could not hold" };
  for (const [name, value] of Object.entries(edge.terms)) lines.push([words[name] ?? name, name === "rounding" ? "rounding" : "Δw", value]);
  lines.push([`weight after (learning rate η = ${number(settings.learning_rate)})`, "w + ΣΔw", edge.after]);
  return lines;
}

/** ✓, ✗, or – for what was not tested; in words for those who listen. */
export const Mark = ({ holds }) => html`<b><span class="sr">${holds === null ? "not tested" : holds ? "proven" : "refuted"}: </span><i aria-hidden="true">${holds === null ? "–" : holds ? "✓" : "✗"}</i></b>`;

/** Three proofs of an edge: [claim, true, false or null, detail]. The gradient of a step made in bf16 is proven in fp32. */
export function proofsOf(edge, play) {
  const made = play.precision === "bf16" ? "in fp32: " : "";
  const near = (a, b, doubt = 0) => Math.abs(a - b) <= 1e-3 * Math.abs(b) + doubt;
  const apart = (a, b) => `${number(a, { digits: 7 })} and ${number(b, { digits: 7 })}`;
  const unsure = edge.difference !== null && edge.doubt > 0.05 * Math.abs(edge.autograd);
  return [
    [`${made}chain rule by hand = autograd`, edge.by_hand === null ? null : near(edge.by_hand, edge.autograd, 1e-12), edge.by_hand === null ? "no formula here" : apart(edge.by_hand, edge.autograd)],
    [`${made}finite difference = autograd`, edge.difference === null || unsure ? null : near(edge.difference, edge.autograd, edge.doubt), edge.difference === null
      ? `not tried here: pellucid explain RUN --step N --parameter ${edge.tensor} --index ${edge.index.join(",")}` : `${apart(edge.difference, edge.autograd)}; sure to ${number(edge.doubt)}${unsure ? ", too unsure to tell" : ""}`],
    ["the plain rule gives the stored weight", edge.exact || Math.abs(edge.rule_after - edge.after) <= 4 * 2 ** -23 * Math.abs(edge.after), edge.exact ? `bit for bit: ${number(edge.after, { digits: 9 })}` : `but for the last bits: ${apart(edge.rule_after, edge.after)}`],
  ];
}
