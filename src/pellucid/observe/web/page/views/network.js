// View 2, picture 1: the network of this run, live; and one step of it played through its seven phases with real numbers.
import { Choice, Nothing, Panel, html, useEffect, useMemo, useRef, useState, useWidth } from "../ui.js";
import { select, useAnswer, useRun } from "../state.js";
import { holds, isReport } from "../source.js";
import { count, float32, number, percent } from "../format.js";
import { LiveNetwork, useCalm } from "../living.js";
import { Scene } from "../scene.js";
import { Mark, PHASES, answerOf, derivation, fanOf, fansOf, inputName, pair, percents, place, proofsOf, quoted, sumName, taskIn, tell, visible } from "../play.js";

export function Network({ theme }) {
  return html`<${LiveNetwork} theme=${theme} /><${Theatre} />`;
}

/** Plays of the run, and the one that is being made; asked again while it is. */
function usePlays(index, step) {
  const [turn, again] = useState(0);
  const kept = useRef(null);
  const { data } = useAnswer(`plays?run=${index}`, isReport ? 0 : `${turn}.${step}`);
  if (data) kept.current = data;
  const plays = kept.current, busy = plays?.making && !plays.making.problem;
  useEffect(() => {
    if (!busy) return;
    const timer = setTimeout(() => again((n) => n + 1), 500);
    return () => clearTimeout(timer);
  }, [busy, data]);
  return [plays, () => again((n) => n + 1)];
}

function Theatre() {
  const { chosen, run, index, step: newest } = useRun();
  const step = useCalm(newest);
  const [plays, refresh] = usePlays(index, step);
  const [problem, say] = useState(null);
  const steps = (plays?.steps ?? []).filter((s) => holds(`play?run=${index}&step=${s}`));
  const nearest = steps.length ? steps.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) || (Math.abs(b - step) === Math.abs(a - step) && b > a) ? b : a)) : null;
  const { data: play, problem: unread } = useAnswer(nearest === null ? null : `play?run=${index}&step=${nearest}`);
  const make = async () => {
    say(null);
    try {
      const response = await fetch(`/api/stage?run=${index}&step=${step}`, { method: "POST", headers: { "X-Pellucid": "1" } });
      if (!response.ok) say((await response.json()).problem);
    } catch { say("The server does not answer."); }
    refresh();
  };
  const known = Math.min(step, plays?.latest); // a step that the answer is too old for is near the last that it knows
  const able = (plays?.spans ?? []).some(([first, last]) => first <= known && known <= last), making = plays?.making;
  const picker = html`<div class="controls plays">
    ${steps.length > 0 && html`<label>play of step <select value=${nearest} onChange=${(e) => select({ step: Number(e.target.value), edge: null })}>${steps.map((s) => html`<option value=${s} selected=${s === nearest}>${count(s)}</option>`)}</select></label>`}
    ${!isReport && !steps.includes(step) && (making && !making.problem
      ? html`<span class="making" role="status"><progress aria-label="progress of the replay" max=${making.total} value=${making.done}></progress> step ${count(making.step)}: ${making.phase}${making.total > 1 ? ` ${making.done} of ${making.total}` : ""}</span>`
      : html`<button type="button" onClick=${make} disabled=${!able} title=${able ? "replayed beside the training, from the nearest checkpoint" : ""}>play step ${count(step)}</button>`)}
    ${!isReport && plays && !able && html`<span class="hint">Step ${count(step)} cannot be replayed: no checkpoint lies near enough before it. Steps that can: ${spans(plays.spans)}.</span>`}
    ${(problem ?? making?.problem) && html`<span class="hint" role="alert">${problem ?? `Step ${making.step}: ${making.problem}`}</span>`}</div>`;
  const stage = useMemo(() => play && html`<${Stage} key=${`${index}.${play.step}`} play=${play} picker=${picker} chosen=${chosen} />`, [play, chosen, plays, step, problem, index]); // not at every step of a run
  if (!play) {
    return html`<${Panel} id="play-title" wide question="What happens in one step?" answer="A step, done again from the nearest checkpoint bit for bit, and shown number by number.">
      ${picker}${unread ? html`<${Nothing}>${unread}<//>` : plays && !steps.length ? html`<${Nothing}>${isReport ? "This report holds no play of a step: make one with pellucid explain RUN --step N before the report." : "No step has been played yet. Choose one on the time line and press the button; a training that runs is not disturbed."}<//>` : html`<p class="boot">Reading the play …</p>`}<//>`;
  }
  return stage;
}

const spans = (list) => list.map(([first, last]) => `${count(first)} to ${count(last)}`).join(", ") || "none yet";

function Stage({ play, picker, chosen: selection }) {
  const [box, width] = useWidth(0);
  const [head, setHead] = useState(null);
  const [playing, setPlaying] = useState(false);
  const within = (value, size, otherwise) => (value !== null && value >= 0 && value < size ? value : otherwise);
  const phase = within(selection.phase, PHASES.length, 1), layer = within(selection.layer, play.layers.length, play.layers.length - 1);
  const playable = useMemo(() => Object.keys(play.layers[0].fans).map(Number), [play]); // of big models the followed token alone
  const token = playable.includes(selection.token) ? selection.token : playable.at(-1);
  const follow = (t) => playable.includes(t) && select({ token: t, edge: null });
  const fans = useMemo(() => fansOf(play, layer, token), [play, layer, token]);
  const fan = fans.length ? fanOf(fans, selection.edge, null) : null;
  const chosen = fan && { fan, term: fan.fan.terms.find((term) => term.edge === selection.edge) ?? fan.fan.terms[0] };
  const go = (next) => select({ phase: Math.max(0, Math.min(PHASES.length - 1, next)) });
  useEffect(() => {
    if (!playing) return;
    const timer = setTimeout(() => (phase + 1 < PHASES.length ? go(phase + 1) : setPlaying(false)), 3000);
    return () => clearTimeout(timer);
  }, [playing, phase]);
  const keys = (event) => {
    if (/^(INPUT|SELECT)$/.test(event.target.tagName) || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    event.preventDefault();
    go(phase + (event.key === "ArrowRight" ? 1 : -1));
  };
  const story = chosen && tell(play, phase, token, layer, chosen), here = play.tokens[token], output = play.outputs[token];
  const words = phase === 4 ? ["growing it raises the loss", "growing it lowers the loss"] : phase > 4 ? ["grows", "shrinks"] : ["adds", "takes away"];
  const pickEdge = (edge) => select({ edge });
  return html`<div class="theatre" onKeyDown=${keys}>
    <${Panel} id="play-title" wide question=${`What happens in step ${count(play.step)}?`}
      answer=${`${!play.shape.head ? `After ${quoted(here.text)} comes ${quoted(here.target_text)}: the model gives it ${percents(output.p, output.p_after)[0]}, and ${percents(output.p, output.p_after)[1]} after the step.`
    : output.target < 0 ? `After ${quoted(here.text)} the document goes on.` : `A document that is ${quoted(here.target_text)}: the model says ${answerOf(output)}, and after the step ${answerOf(output, "_after")}.`} ${play.proofs.every((p) => p.holds) ? "Replayed bit for bit." : ""}`}>
      ${picker}
      <div class="stepper" role="group" aria-label="phases of the step; left and right arrow keys go through them">
        <button type="button" class="turn" onClick=${() => { if (!playing && phase === PHASES.length - 1) go(0); setPlaying(!playing); }} aria-label=${playing ? "pause" : "play all phases"}>${playing ? "❚❚" : "▶"}</button>
        ${PHASES.map(([key, title], i) => html`<button type="button" class=${`phase is-${key}`} aria-current=${i === phase ? "step" : undefined} onClick=${() => go(i)}><b>${i + 1}</b> ${title}</button>`)}
      </div>
      <div class="story" aria-live="polite"><p>${story?.sentence}</p></div>
      <p class="formula">${story?.formula}</p>
      <div class="scene-box" ref=${box} tabindex="0" role="figure" aria-label=${`The network in step ${play.step}, phase ${phase + 1} of 7, ${PHASES[phase][1]}. ${story?.sentence ?? ""} The numbers stand in the tables below.`}>
        ${width > 0 && chosen && html`<${Scene} play=${play} width=${width} phase=${phase} layer=${layer} token=${token} head=${head} chosen=${chosen}
          onEdge=${pickEdge} onLayer=${(n) => select({ layer: n, edge: null })} onToken=${follow} />`}</div>
      <div class="controls under">
        <label>token <select value=${token} onChange=${(e) => follow(Number(e.target.value))}>${playable.map((i) => html`<option value=${i} selected=${i === token}>${i + 1}: ${visible(play.tokens[i].text)}</option>`)}</select></label>
        <${Choice} label="layer" value=${layer} onChange=${(n) => select({ layer: n, edge: null })} options=${play.layers.map((_, n) => [n, `layer ${n}`])} />
        <${Choice} label="attention heads" value=${head} onChange=${setHead} options=${[[null, "all heads"], ...play.layers[0].attention.weights.map((_, h) => [h, `head ${h}`])]} />
        <span class="legend"><i class="key-positive"></i>${words[0]}<i class="key-negative"></i>${words[1]}</span></div>
    <//>
    ${chosen && html`<div class="columns lens"><${Lens} play=${play} fans=${fans} chosen=${chosen} layer=${layer} token=${token} phase=${phase} onEdge=${pickEdge} />
      <${Calculator} play=${play} chosen=${chosen} /></div>`}
    <${Outcome} play=${play} token=${token} />
  </div>`;
}

/** One weighted sum as a table: the same numbers as on the picture's edges, and the node of all others. */
function Lens({ play, fans, chosen, layer, token, phase, onEdge }) {
  const { fan, title, gate } = chosen.fan, rounded = play.precision === "bf16", rows = fan.terms, sum = rows.reduce((total, t) => total + t.wa, 0);
  const shown = { forward: "wa", backward: "gradient", update: "after", after: "after" }[PHASES[phase][0]], mark = (name) => name + (name === shown ? " now" : "");
  return html`<${Panel} id="lens-title" question=${`How is ${sumName(fan, play)} made?`} answer=${fan.kind === "output" ? `From the final state, by its row of the ${play.shape.head ? "head" : "embedding table"}.` : `In layer ${layer}, for ${quoted(play.tokens[token].text)}: the largest terms of the sum, and all others as one.`}>
    <${Choice} label="which sum" value=${chosen.fan.key} onChange=${(key) => onEdge(fans.find((f) => f.key === key).fan.terms[0].edge)} options=${fans.map((f) => [f.key, f.title])} />
    <div class="scroll whole" tabindex="0" role="region" aria-label=${`terms of ${sumName(fan, play)}, ${title}`}><table class="terms"><thead><tr><th scope="col" class="left">from</th><th scope="col">w${rounded ? " in bf16" : ""}</th><th scope="col">a</th><th scope="col" class=${mark("wa")}>w·a</th><th scope="col" class=${mark("gradient")}>∂L/∂w</th><th scope="col" class=${mark("after")}>w after</th></tr></thead>
      <tbody>${rows.map((t) => { const edge = play.edges[t.edge], after = pair(edge.before, edge.after)[1];
        return html`<tr class=${chosen.term.edge === t.edge ? "chosen" : ""}><th scope="row" class="left"><button type="button" class="link" aria-pressed=${chosen.term.edge === t.edge} onClick=${() => onEdge(t.edge)}>${inputName(fan.kind, t.j, play)}</button></th>
          <td title=${float32(t.w)}>${number(t.w)}</td><td title=${float32(t.a)}>${number(t.a)}</td><td class=${mark("wa")} data-value=${t.wa}>${number(t.wa, { signed: true })}</td><td class=${mark("gradient")} title=${float32(edge.gradient)}>${number(edge.gradient, { signed: true })}</td><td class=${mark("after")} title=${float32(edge.after)}>${after}</td></tr>`; })}
        <tr class="others-row"><th scope="row" class="left">+ ${count(fan.others.count)} others</th><td></td><td></td><td class=${mark("wa")} data-value=${fan.others.sum}>${number(fan.others.sum, { signed: true })}</td><td></td><td></td></tr></tbody>
      <tfoot><tr><th scope="row" class="left">= sum</th><td></td><td></td><td data-value=${sum + fan.others.sum}>${number(sum + fan.others.sum)}</td><td></td><td></td></tr>
        <tr><th scope="row" class="left">the model computed</th><td></td><td></td><td data-value=${fan.value}>${number(fan.value)}</td><td></td><td></td></tr></tfoot></table></div>
    <p class="hint">${Math.abs(fan.rounding) > 1e-14 ? `The two differ by ${number(fan.rounding)}: rounding of ${play.precision}.` : "The sum is taken in float64, as the model's own kernel keeps its parts to itself."}${gate === undefined ? "" : ` The answer counts ${number(gate)} times, the router's probability of this expert.`}${rounded ? " The products read the fp32 weights rounded to bf16; what the step adds to them, and the proofs, are in fp32." : ""}</p>
  <//>`;
}

function Calculator({ play, chosen }) {
  const edge = play.edges[chosen.term.edge], [exact, show] = useState(false), lines = derivation(play, chosen), proofs = proofsOf(edge, play);
  const change = edge.after - edge.before;
  return html`<${Panel} id="calculator-title" question="How was this weight adjusted?" answer=${html`<span class="mono">${place(edge)}</span> by ${play.optimizer[edge.tensor].rule}: ${number(change, { signed: true })}, ${percent(change / (edge.before || 1), 3)} of it.`}
    aside=${html`<button type="button" class="quiet" aria-pressed=${exact} onClick=${() => show(!exact)}>${exact ? "four digits" : "all digits"}</button>`}>
    <div class="scroll whole" tabindex="0" role="region" aria-label="derivation of the update"><table class="derivation"><tbody>${lines.map(([what, formula, value], i) => html`<tr class=${i === lines.length - 1 ? "result" : ""}><th scope="row" class="left">${what}</th><td class="left"><code>${formula}</code></td><td data-value=${value}>${exact ? number(value, { digits: 9 }) : number(value)}</td></tr>`)}</tbody></table></div>
    <ul class="proofs">${proofs.map(([claim, holds, detail]) => html`<li class=${holds === null ? "untested" : holds ? "holds" : "fails"}><${Mark} holds=${holds} /><span>${claim}<small>${detail}</small></span></li>`)}</ul>
  <//>`;
}

/** Before and after, and whether the replayed step is the one that was trained. */
function Outcome({ play, token }) {
  const { losses } = play, output = play.outputs[token], task = taskIn(play), asked = output.target >= 0;
  const rows = [...(asked || !task.labelled ? [[`this ${task.each}, ${quoted(play.tokens[token].target_text)}`, losses.tokens[0][token], losses.tokens[1][token]]] : []), ["its row", ...losses.row], [`the batch, ${count(play.step_result.tokens)} ${task.each}s`, ...losses.batch],
    ...(losses.held_out[0] === null ? [] : [[`held out, ${losses.held_out_rows} rows`, ...losses.held_out]])];
  return html`<${Panel} id="outcome-title" wide question="Did the step help?" answer=${`Loss before and after this one step, in ${task.unit} per ${task.each}; a step may help its own batch and not the rest.`}>
    <div class="columns"><table class="outcome"><thead><tr><th scope="col" class="left">loss of</th><th scope="col">before</th><th scope="col">after</th><th scope="col">change</th></tr></thead>
      <tbody>${rows.map(([what, before, after]) => { const [a, b] = pair(before, after); return html`<tr><th scope="row" class="left">${what}</th><td data-value=${before}>${a}</td><td data-value=${after}>${b}</td><td class=${after < before ? "better" : "worse"}>${number(after - before, { signed: true })}</td></tr>`; })}
      ${output.p === undefined ? "" : html`<tr><th scope="row" class="left">p(${visible(play.tokens[token].target_text)})</th><td data-value=${output.p}>${percent(output.p, 3)}</td><td data-value=${output.p_after}>${percent(output.p_after, 3)}</td><td class=${output.p_after > output.p ? "better" : "worse"}>${number(output.p_after - output.p, { signed: true })}</td></tr>`}</tbody></table>
    <div><ul class="proofs">${play.proofs.map((p) => html`<li class=${p.holds ? "holds" : "fails"}><${Mark} holds=${p.holds} /><span>${p.claim}<small>${p.detail}</small></span></li>`)}</ul>
      <p class="hint">Row ${play.row} of the batch, tokens ${play.window[0]} to ${play.window[1] - 1}${play.document.source ? html`, from <span class="mono">${play.document.source}</span>, bytes ${count(play.document.byte_start)} to ${count(play.document.byte_end)}` : ""}. The followed ${task.each} is the one whose loss was nearest to the batch's mean, among those whose whole context fits the picture.</p></div></div><//>`;
}
