// View 3, the data river (picture 2): from source to batch, drawn as wide as its text, and the loop that drinks from it.
import { Nothing, Panel, html, useWidth } from "../ui.js";
import { select, statIndex, useAnswer, useReading, useRun, useWindow } from "../state.js";
import { bytes, capital, count, number, percent, plural } from "../format.js";
import { RADIUS, Ring, phasesOf } from "../ring.js";
import { epochsOf } from "../epochs.js";
import { Follow } from "./follow.js";
import { Station } from "./station.js";

const WIDEST = 132, MIDDLE = 92, STATION = 79, RING = 308; // pixels of the widest water, its middle line, the places of a station and the loop
const documents = (s) => [plural(s.documents_out, "doc"), bytes(s.out)];
/** What a stage says below the river, where that is not its documents. */
const SAID = {
  source: (s) => [plural(s.files, "file"), bytes(s.into)],
  read: (s) => [`${plural(s.documents_out, "doc")}${s.cut ? `, cut in ${count(s.cut)}` : ""}`, bytes(s.out)], // its end is held out
  split: ({ splits: { validation } }) => [plural(validation.documents, "doc"), bytes(validation.text_bytes)],
  augment: (s) => [plural(s.documents_out, "version"), `+${bytes(s.bytes_out)}`],
  tokenize: ({ splits: { train } }) => [`${count(train.tokens, true)} tokens`, `${number(train.text_bytes / train.tokens, { digits: 3 })} B each`],
  pack: ({ splits: { train } }) => [plural(train.packing.rows, "row"), `${percent(train.packing.utilization, 2)} full`],
  batch: (s, run, step) => [`${count(run.config?.training?.batch_size)} × ${count(s.settings.sequence_length)}`, `step ${count(step)}`],
};
/** What leaves the river at a stage, in a word. */
const labelOf = (s) => (s.name === "split" ? "held out" : s.name !== "augment" && s.documents_in > s.documents_out ? `−${count(s.documents_in - s.documents_out)}` : null);

export function River({ theme }) {
  const { chosen, run, index, step, live } = useRun();
  const { data, problem } = useAnswer(`river?run=${index}`);
  const { window } = useWindow(index, "run", "*"), reading = useReading(index, "run", "*", step);
  if (problem) return html`<${Nothing}>${problem}<//>`;
  if (!data || reading === undefined) return html`<p class="boot">Reading the stages …</p>`;
  const { stages } = data, phases = phasesOf(run, reading);
  const name = chosen.stage ?? stages.find((s) => s.filter || (!s.splits && s.samples?.length))?.name ?? stages[0]?.name ?? "loop";
  return html`
    <${Panel} id="river-title" wide question="What becomes of the text on its way into the model?" answer=${sentence(data, phases, reading)}>
      ${data.problem && html`<${Nothing}>${data.problem}<//>`}
      <${Diagram} data=${data} phases=${phases} chosen=${name} run=${run} step=${step} reading=${reading} live=${live && run.heard && performance.now() - run.heard < 10000} />
    <//>
    <${Station} key=${name} stage=${stages.find((s) => s.name === name)} loop=${name === "loop"} phases=${phases} reading=${reading} window=${window} run=${run} index=${index} step=${step} theme=${theme} />
    ${data.splits.train && !data.problem && html`<${Follow} run=${run} index=${index} step=${step} theme=${theme} />`}`;
}

function sentence(data, phases, reading) {
  const train = data.splits.train, first = data.stages.find((s) => s.documents_in);
  const from = first ? `Of ${plural(first.documents_in, "document")} (${bytes(first.bytes_in)}) ` : "";
  const to = train ? `${plural(train.documents, "training document remains or was made", "training documents remain or were made")}, ${count(train.tokens, true)} tokens in ${plural(train.packing.rows, "row")}. ` : "";
  const wait = phases.find((phase) => phase.key === "data_seconds"), whole = phases.reduce((sum, phase) => sum + phase.seconds, 0);
  return from + to + (whole ? `${capital(reading.when)} the loop waits ${percent(wait?.seconds / whole)} of its time for data.` : "");
}

function Diagram({ data, phases, chosen, run, step, reading, live }) {
  const [box, width] = useWidth();
  const field = Math.max(width - RING, data.stages.length * STATION), gap = field / Math.max(1, data.stages.length);
  const most = Math.max(1, ...data.stages.flatMap((s) => [s.into, s.out])), thick = (size) => (size > 0 ? Math.max(3, (size / most) * WIDEST) : 5);
  const x = (i) => (i + 0.5) * gap, flood = (s) => Math.max(3, Math.min(40, ((s.into - s.out) / most) * WIDEST));
  const drawn = data.stages.map((s, i) => ({ ...s, x: x(i), a: thick(s.into), b: thick(s.out), label: labelOf(s), said: (SAID[s.name] ?? documents)(s, run, step) }));
  const epochs = epochsOf(data, run, step);
  const tokens = reading?.value(0, statIndex(run, "run", "tokens_per_second")) ?? null;
  return html`<div class="river-scroll" ref=${box}><div class="river" style=${{ width: `${field + RING}px` }}>
    <svg width=${field + RING} height="216" role="img" aria-label=${`${drawn.length} stations from source to batch, then the loop`}>
      <defs><linearGradient id="fade" x1="0" x2="0" y1="0" y2="1"><stop offset="0" class="fade-from" /><stop offset="1" class="fade-to" /></linearGradient>
        <linearGradient id="depth" x1="0" x2="0" y1="0" y2="1"><stop offset="0" class="shore" /><stop offset=".5" class="deep" /><stop offset="1" class="shore" /></linearGradient></defs>
      ${drawn.map((s, i) => i > 0 && html`<path class="water" fill="url(#depth)" d=${band(drawn[i - 1], s)} />`)}
      ${drawn.length > 0 && html`<path class="water thin" d=${`M${x(drawn.length - 1)} ${MIDDLE}H${field + RING / 2 - RADIUS - 8}`} />`}
      ${live && drawn.length > 1 && html`<path class="current" d=${`M${x(0)} ${MIDDLE}H${field + RING / 2 - RADIUS - 8}`} />`}
      ${drawn.map((s) => s.into > s.out && s.label && html`<path class="spill" fill="url(#fade)" d=${spill(s, flood(s))} />`)}
      ${drawn.map((s) => (s.name === "augment" ? html`<path class="spring" d=${`M${s.x - 22} ${MIDDLE - s.a / 2}C${s.x - 22} ${MIDDLE - s.b / 2 - 22} ${s.x + 20} ${MIDDLE - s.b / 2 - 22} ${s.x + 20} ${MIDDLE - s.b / 2 + 2}`} />` : ""))}
      ${drawn.map((s) => html`<rect class=${"gate" + (s.name === chosen ? " chosen" : "")} x=${s.x - 4} y=${MIDDLE - Math.max(s.a, s.b) / 2 - 4} width="8" height=${Math.max(s.a, s.b) + 8} rx="4" />`)}
      ${drawn.map((s) => s.name === "pack" && epochs !== null && html`<rect class="read-so-far" x=${s.x - 2} y=${MIDDLE + s.b / 2 - s.b * Math.min(1, epochs)} width="4" height=${s.b * Math.min(1, epochs)} rx="2" />`)}
      <${Ring} phases=${phases} x=${field + RING / 2} y=${MIDDLE} chosen=${chosen === "loop"} />
    </svg>
    ${drawn.map((s) => html`<button type="button" class="station" style=${{ left: `${s.x - gap / 2}px`, width: `${gap}px` }} aria-pressed=${s.name === chosen} data-stage=${s.name} onClick=${() => select({ stage: s.name })}>
      <b>${s.filter ? html`<small>filter</small>` : ""}${s.title}</b><span>${s.said[0]}<br />${s.said[1]}</span>${s.label && html`<em style=${{ left: `calc(50% + ${24 + flood(s)}px)` }}>${s.label}</em>`}</button>`)}
    <button type="button" class="station loop" style=${{ left: `${field}px`, width: `${RING}px` }} aria-pressed=${chosen === "loop"} data-stage="loop" onClick=${() => select({ stage: "loop" })}>
      <b>the loop</b><span>${tokens === null ? "" : `${count(tokens)} tokens/s`}<br />${epochs === null ? "" : `${number(epochs, { digits: 3 })} epochs read`}</span></button>
  </div></div>`;
}

const edge = (a, b, y0, y1) => `C${(a + b) / 2} ${y0} ${(a + b) / 2} ${y1} ${b} ${y1}`;
/** The water between two stations. */
const band = (a, b) => `M${a.x} ${MIDDLE - a.b / 2}${edge(a.x, b.x, MIDDLE - a.b / 2, MIDDLE - b.a / 2)}V${MIDDLE + b.a / 2}${edge(b.x, a.x, MIDDLE + b.a / 2, MIDDLE + a.b / 2)}Z`;
/** What leaves the river at a station, fading downwards. */
function spill(s, width) {
  const top = MIDDLE + s.b / 2 - 1, left = s.x + 2;
  return `M${left} ${top}C${left + 22} ${top} ${left + 16} ${top + 20} ${left + 18} 196h${width}C${left + 20 + width} ${top + 26} ${left + 18 + width} ${top - width} ${left} ${Math.max(MIDDLE, top - width)}Z`;
}
