// The picture of a play: tokens, layers with attention and experts, predicted tokens; one layer is opened to its hidden
// units. Geometry only: what is drawn where; numbers come from the play, words from play.js. For the eye alone: the same
// numbers stand in the tables beside it.
import { html } from "./ui.js";
import { number, percent } from "./format.js";
import { PHASES, pair, percents, taskIn, visible } from "./play.js";

const TOP = 76, ROW = 40, TOKENS = 128, OUTPUT = 208, SMALL = 84;
const sign = (v) => (v < 0 ? "negative" : "positive");
const curve = (x0, y0, x1, y1) => { const m = (x0 + x1) / 2; return `M${x0} ${y0}C${m} ${y0} ${m} ${y1} ${x1} ${y1}`; };
const mean = (matrices, t, s) => matrices.reduce((sum, head) => sum + head[t][s], 0) / matrices.length;
const cut = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

export const sceneHeight = (play) => TOP + ROW * Math.max(play.tokens.length, 12) + 40;
export const sceneWidth = (play, width) => Math.max(width, TOKENS + OUTPUT + 600 + (play.layers.length - 1) * 24);

export function Scene({ play, width, phase, layer, token, head, chosen, onEdge, onLayer, onToken }) {
  const W = sceneWidth(play, width), H = sceneHeight(play), n = play.layers.length;
  const small = n === 1 ? 0 : Math.max(24, Math.min(SMALL, (W - TOKENS - OUTPUT - 600) / (n - 1)));
  const open = W - TOKENS - OUTPUT - small * (n - 1);
  const starts = play.layers.map((_, i) => TOKENS + i * small + (i > layer ? open - small : 0));
  const y = (t) => TOP + ROW * (t + 0.5), end = W - OUTPUT, middle = (TOP + H - 40) / 2;
  const name = PHASES[phase][0], shown = { play, phase: name, token, layer, y, middle, H, chosen, onEdge };
  return html`<svg class=${`scene phase-${name}`} viewBox=${`0 0 ${W} ${H}`} width=${W} height=${H} aria-hidden="true">
    ${play.tokens.map((_, t) => html`<path class=${`rail${t === token ? " followed" : ""}`} d=${`M${TOKENS - 14} ${y(t)}H${end}`}/>`)}
    <${Tokens} ...${shown} onToken=${onToken} />
    ${play.layers.map((_, i) => (i === layer ? html`<${OpenLayer} ...${shown} n=${i} x=${starts[i]} w=${open} head=${head} />`
    : html`<${SmallLayer} ...${shown} n=${i} x=${starts[i]} w=${small} onLayer=${onLayer} />`))}
    <${Output} ...${shown} x=${end} />
    <text class="zone" x="8" y="22">tokens</text><text class="zone" x=${end + 34} y="22">${name === "after" ? "predicted, before → after" : play.shape.head ? "what the head says" : "predicted next token"}</text>
  </svg>`;
}

function Tokens({ play, token, y, phase, onToken }) {
  return play.tokens.map((here, t) => html`<g class=${`token${t === token ? " followed" : ""}${phase === "input" ? " lit" : ""}`} onClick=${() => onToken(t)}>
    <rect x="4" y=${y(t) - 14} width="92" height="28" rx="6"/><text x="12" y=${y(t) + 4}>${cut(visible(here.text), 10)}</text>
    <text class="fine" x="90" y=${y(t) + 4} text-anchor="end">${here.id}</text>
    <rect class="embedding" x="102" y=${y(t) - 10} width="7" height="20" rx="2" fill-opacity=${Math.min(1, 0.25 + 0.5 * play.layers[0].rms.entering[t])}/></g>`);
}

/** Attention of one layer into the followed token: a strand for each head and key, as thick as its weight. */
function Strands({ play, n, token, head, x0, x1, y, thick, phase }) {
  const { weights, slopes, earlier } = play.layers[n].attention, heads = weights.map((_, h) => h).filter((h) => head === null || h === head);
  const backward = phase === "backward", largest = Math.max(1e-30, ...heads.flatMap((h) => slopes[h][token].map(Math.abs)));
  const strands = [];
  for (let s = 0; s <= token; s++) {
    heads.forEach((h, i) => {
      const w = weights[h][token][s], size = backward ? Math.abs(slopes[h][token][s]) / largest / heads.length : w / heads.length;
      if (w > 0.004 && size > 0.001) strands.push(html`<path class=${`strand head-${h % 4}${backward ? ` ${sign(slopes[h][token][s])}` : ""}`} d=${curve(x0, y(s) + (i - (heads.length - 1) / 2) * 2, x1, y(token) + (i - (heads.length - 1) / 2) * 2)} stroke-width=${(0.5 + thick * size).toFixed(2)}><title>${`head ${h}, ${visible(play.tokens[s].text)}: weight ${number(w)}, ∂L/∂weight ${number(slopes[h][token][s], { signed: true })}`}</title></path>`);
    });
  }
  const before = earlier.reduce((sum, e) => sum + e[token], 0) / earlier.length;
  return [...strands, before > 0.004 && html`<path class="strand earlier" d=${curve(x0, TOP - 8, x1, y(token))} stroke-width=${(0.5 + thick * before).toFixed(2)}/>`];
}

function OpenLayer({ play, n, x, w, token, head, phase, y, middle, H, chosen, onEdge }) {
  const data = play.layers[n], fans = data.fans[token], router = data.router, E = play.shape.num_experts;
  const xa = x + w * 0.2, xr = x + w * 0.28, xe = x + w * 0.43, xu = x + w * 0.6, xs = x + w * 0.83, xo = x + w - 12;
  const span = H - TOP - 56, ye = (e) => TOP + (span * (e + 0.5)) / E, picked = router.chosen[token];
  const labels = data.attention.weights[0][token].map((_, s) => (head === null ? mean(data.attention.weights, token, s) : data.attention.weights[head][token][s]));
  const order = picked.map((e, i) => ({ e, i })).sort((a, b) => a.e - b.e); // drawn in the order in which the experts stand, so that nothing crosses
  const beside = picked.length % 2 ? Math.min(56, span / picked.length / 2) : 0; // an odd number of answers has one in the middle, where their sum would be
  const yo = middle + (y(token) > middle ? -beside : beside);
  return html`<g class="open-layer"><rect class="block" x=${x + 2} y="32" width=${w - 4} height=${H - 44} rx="12"/>
    <text class="zone strong" x=${x + 16} y="22">layer ${n}</text><text class="zone" x=${x + 16} y="52">attention${head === null ? ` of ${data.attention.weights.length} heads` : `, head ${head}`}</text><text class="zone" x=${xe} y="52" text-anchor="middle">router → experts</text><text class="zone" x=${xu - 8} y="52">hidden units</text>
    <${Strands} play=${play} n=${n} token=${token} head=${head} x0=${x + 14} x1=${xa} y=${y} thick=${22} phase=${phase} />
    ${labels.map((v, s) => s <= token && v >= 0.03 && html`<text class="number attention-number" x=${x + 20} y=${y(s) - 5}>${percent(v)}</text>`)}
    ${data.attention.earlier_keys[token] > 0 && html`<text class="number attention-number" x=${x + 20} y=${TOP - 4}>${percent(data.attention.earlier.reduce((sum, e) => sum + e[token], 0) / data.attention.earlier.length)} to ${data.attention.earlier_keys[token]} earlier tokens</text>`}
    <${Plus} x=${xa} y=${y(token)} />
    <path class="flow" d=${curve(xa, y(token), xr, middle)}/>
    ${router.probs[token].map((p, e) => { const lit = picked.includes(e);
      return html`<path class=${`gate${lit ? " lit" : ""}`} d=${curve(xr, middle, xe - 24, ye(e))} stroke-width=${(0.75 + 9 * p).toFixed(2)}/>
      ${E > 12 && !lit ? html`<circle class="expert-dot" cx=${xe} cy=${ye(e)} r="3"/>` : html`<g class=${`expert${lit ? " lit" : ""}`}><rect x=${xe - 24} y=${ye(e) - 17} width="48" height="34" rx="9"/><text x=${xe} y=${ye(e) - 2} text-anchor="middle">E${e}</text>
      <text class="fine" x=${xe} y=${ye(e) + 11} text-anchor="middle">${phase === "backward" ? number(router.slopes[token][e], { digits: 2 }) : percent(p)}</text></g>`}`; })}
    <circle class="router" cx=${xr} cy=${middle} r="11"/><text class="on-node" x=${xr} y=${middle + 4} text-anchor="middle">R</text>
    ${fans && order.map(({ e, i }, part) => html`<${Units} fan=${fans.experts[i]} gate=${router.gates[token][i]} xe=${xe + 24} ye=${ye(e)} xu=${xu} xs=${xs} top=${TOP + 4 + (span / picked.length) * part} height=${span / picked.length} phase=${phase} play=${play} chosen=${chosen} onEdge=${onEdge} xo=${xo} yo=${yo} channel=${fans.channel} />`)}
    ${fans ? html`<path class="flow" d=${`M${xo - 36} ${yo}C${xo} ${yo + 40} ${xo} ${(yo + y(token)) / 2} ${xo} ${y(token) - 8}`}/><g class="sum"><rect x=${xo - 72} y=${yo - 14} width="72" height="28" rx="14"/><text x=${xo - 36} y=${yo + 4} text-anchor="middle">${number(phase === "backward" ? fans.mixed_slope : fans.mixed, { digits: 3 })}</text></g>
      <${Plus} x=${xo} y=${y(token)} />` : html`<text class="zone" x=${xu} y=${middle}>the weights of this token were not kept</text>`}
  </g>`;
}

/** Hidden units of one chosen expert, and the sum that its answer is in one channel; all units not drawn are one node. */
function Units({ fan, gate, xe, ye, xu, xs, top, height, phase, play, chosen, onEdge, xo, yo, channel }) {
  const rows = fan.terms.length + 1, step = Math.min(38, (height - 8) / rows), y = (i) => top + height / 2 + (i - (rows - 1) / 2) * step, ys = top + height / 2;
  const gradients = phase === "backward", moved = phase === "update" || phase === "after", size = (v, all) => Math.abs(v) / Math.max(1e-30, ...all.map(Math.abs));
  const values = fan.terms.map((t) => (gradients ? play.edges[t.edge].gradient : moved ? play.edges[t.edge].after - play.edges[t.edge].before : t.wa));
  const label = (t, i) => { if (!moved) return number(values[i], { signed: true, digits: 3 }); const [a, b] = pair(play.edges[t.edge].before, play.edges[t.edge].after); return `${a} → ${b}`; };
  return html`<g>${fan.terms.map((t, i) => html`<path class="to-unit" d=${curve(xe, ye, xu - 5, y(i))}/>
      <g class=${`edge ${sign(values[i])}${chosen.term.edge === t.edge ? " chosen" : ""}`} onClick=${() => onEdge(t.edge)} data-edge=${t.edge}>
        <path class="target" d=${curve(xu, y(i), xs - 33, ys)}/><path class="line" d=${curve(xu, y(i), xs - 33, ys)} stroke-width=${(0.8 + 5 * size(values[i], values)).toFixed(2)}/>
        <circle class="unit" cx=${xu} cy=${y(i)} r=${(3.5 + 4 * size(t.a, fan.terms.map((u) => u.a))).toFixed(1)}/></g>`)}
    <path class="to-unit" d=${curve(xe, ye, xu - 5, y(rows - 1))}/><path class="others" d=${curve(xu, y(rows - 1), xs - 33, ys)}/>
    ${fan.terms.map((t, i) => html`<text class=${`number on-edge${chosen.term.edge === t.edge ? " chosen" : ""}`} x=${xu + 12} y=${y(i) - 6} onClick=${() => onEdge(t.edge)}>${label(t, i)}</text>`)}<circle class="unit rest" cx=${xu} cy=${y(rows - 1)} r="5"/>
    <text class="number rest" x=${xu + 12} y=${y(rows - 1) + 12}>+${fan.others.count} others${gradients || moved ? "" : `: ${number(fan.others.sum, { signed: true, digits: 3 })}`}</text>
    <path class="flow gated" d=${curve(xs + 36, ys, xo - 35, yo)} stroke-width=${(1 + 6 * gate).toFixed(2)}/>
    <g class="sum"><rect x=${xs - 34} y=${ys - 14} width="70" height="28" rx="14"/><text x=${xs + 1} y=${ys + 4} text-anchor="middle">${number(gradients ? fan.slope : fan.value, { digits: 3 })}</text></g>
    <text class="fine" x=${xs + 1} y=${ys + 28} text-anchor="middle">channel ${channel}</text><text class="fine" x=${xs + 1} y=${ys - 20} text-anchor="middle">× ${number(gate, { digits: 3 })}</text></g>`;
}

function SmallLayer({ play, n, x, w, token, y, phase, middle, H, onLayer }) {
  const router = play.layers[n].router, E = play.shape.num_experts, span = H - TOP - 56, ye = (e) => TOP + (span * (e + 0.5)) / E, xe = x + w * 0.7;
  const picked = router.chosen[token];
  return html`<g class="small-layer" onClick=${() => onLayer(n)}><rect class="block" x=${x + 2} y="32" width=${w - 4} height=${H - 44} rx="10"/>
    <text class="zone" x=${x + w / 2} y="22" text-anchor="middle">${w > 60 ? "layer " : ""}${n}</text>
    <${Strands} play=${play} n=${n} token=${token} head=${null} x0=${x + 4} x1=${x + w * 0.4} y=${y} thick=${9} phase=${phase} />
    ${picked.map((e) => html`<path class="gate lit" d=${`${curve(x + w * 0.4, y(token), xe, ye(e))}${curve(xe, ye(e), x + w - 4, y(token))}`} stroke-width=${(0.75 + 5 * router.probs[token][e]).toFixed(2)}/>`)}
    ${router.probs[token].map((p, e) => html`<circle class=${`expert-dot${picked.includes(e) ? " lit" : ""}`} cx=${xe} cy=${ye(e)} r=${(2.5 + 12 * Math.sqrt(p) * Math.min(1, w / SMALL) * 0.9).toFixed(1)}/>`)}
  </g>`;
}

function Output({ play, token, y, phase, middle, x, H }) {
  const output = play.outputs[token], after = phase === "after", early = phase === "input" || phase === "forward";
  const rows = output.choices.length, step = Math.min(46, (H - TOP - 60) / rows), yc = (i) => middle + (i - (rows - 1) / 2) * step, most = Math.max(...output.choices.flatMap((c) => [c.p, c.p_after ?? 0]));
  if (output.choices[0].told !== undefined) return html`<g class=${early ? "output dim" : "output"}>${output.choices.map((c, i) => html`<path class=${`vote${c.id === output.target ? " came" : ""}`} d=${curve(x, y(token), x + 32, yc(i))} stroke-width="2"/>
      <g class=${`choice-row${c.id === output.target ? " came" : ""}`}><text x=${x + 34} y=${yc(i)}>${cut(visible(c.text), 12)}</text><text class="number" x=${x + 190} y=${yc(i)} text-anchor="end">${after ? pair(c.told, c.told_after).join(" → ") : number(c.told)}</text>
      ${c.true !== undefined && html`<text class="fine" x=${x + 34} y=${yc(i) + 14}>truth ${number(c.true)}</text>`}</g>`)}
    ${output.loss !== undefined && !early && html`<text class="loss" x=${x + 34} y=${H - 14}>loss ${number(output.loss)}${after ? ` → ${number(output.loss_after)}` : ""}</text>`}</g>`;
  return html`<g class=${early ? "output dim" : "output"}>${output.choices.map((c, i) => { const came = c.id === output.target;
    return html`<path class=${`vote${came ? " came" : ""}`} d=${curve(x, y(token), x + 32, yc(i))} stroke-width=${(0.6 + (9 * c.p) / most).toFixed(2)}/>
      <g class=${`choice-row${came ? " came" : ""}`}><rect class="bar" x=${x + 34} y=${yc(i) + 5} width=${Math.max(1.5, (150 * c.p) / most).toFixed(1)} height="7" rx="2"/>
      ${after && html`<rect class="bar after" x=${x + 34} y=${yc(i) + 13} width=${Math.max(1.5, (150 * c.p_after) / most).toFixed(1)} height="4" rx="2"/>`}
      <text x=${x + 34} y=${yc(i)}>${cut(visible(c.text), after ? 8 : 13)}${came ? " ✓" : ""}</text>
      <text class="number" x=${x + 190} y=${yc(i)} text-anchor="end">${after ? percents(c.p, c.p_after).join(" → ") : percent(c.p, 2)}</text></g>`; })}
    ${(phase === "loss" || phase === "backward") && output.loss !== undefined ? html`<text class="loss" x=${x + 34} y=${H - 14}>${taskIn(play).share(1) === null ? "loss" : `−ln ${number(output.p)} =`} ${number(output.loss)}</text>` : ""}
    ${after && output.loss !== undefined ? html`<text class="loss" x=${x + 34} y=${H - 14}>loss ${number(output.loss)} → ${number(output.loss_after)}</text>` : ""}</g>`;
}

const Plus = ({ x, y }) => html`<g class="plus"><circle cx=${x} cy=${y} r="8"/><path d=${`M${x - 4} ${y}h8M${x} ${y - 4}v8`}/></g>`;
