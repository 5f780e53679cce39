// View 3, the data river (picture 2): from source to batch, drawn as wide as its text, and the loop that drinks from it.
import { Nothing, Panel, html, useWidth } from "../ui.js";
import { select, statIndex, useAnswer, useReading, useRun, useWindow } from "../state.js";
import { bytes, capital, count, number, percent, plural } from "../format.js";
import { RADIUS, Ring, phasesOf } from "../ring.js";
import { Follow } from "./follow.js";
import { Station } from "./station.js";

const WIDEST = 132, MIDDLE = 92, RING = 310; // pixels of the widest water, its middle line, the loop's place
const FILTERS = new Set(["length", "language", "gopher_quality", "gopher_repetition", "c4", "fineweb", "expression"]);
const NAMES = { normalize: "normalise", deduplicate: "deduplicate", decontaminate: "decontaminate", held_out: "decontaminate", cut_repeats: "cut repeats" };

/** Every station of this run's data, in order: {key, kind, name, into, out (bytes of text), said, stage?}. */
export function stationsOf(data, run, step) {
  const found = [];
  if (data.files) found.push({ key: "source", kind: "source", name: "source", into: data.bytes, out: data.stages[0]?.bytes_in ?? data.bytes, said: [plural(data.files, "file"), bytes(data.bytes)] });
  const held = data.splits?.validation, train = data.splits?.train;
  const split = () => held && found.push({ key: "split", kind: "split", name: "hold out", into: found.at(-1)?.out ?? 0, out: Math.max(0, (found.at(-1)?.out ?? 0) - held.text_bytes),
    said: [`${count(held.documents)} docs`, bytes(held.text_bytes)], lost: held.text_bytes, label: "held out" });
  for (const stage of data.stages) {
    const grows = stage.name === "augment";
    if (grows) split();
    const dropped = stage.documents_in - stage.documents_out, into = grows ? found.at(-1).out : stage.bytes_in;
    const out = grows ? stage.bytes_out + (stage.settings?.augment_originals ? into : 0) : stage.bytes_out;
    found.push({ key: stage.name, kind: FILTERS.has(stage.name) ? "filter" : grows ? "augment" : "stage", name: NAMES[stage.name] ?? stage.name.replaceAll("_", " "), stage, into, out,
      said: grows ? [`${count(stage.documents_out)} versions`, bytes(out)] : [`${count(stage.documents_out)} docs`, bytes(stage.bytes_out)],
      lost: grows ? 0 : Math.max(0, stage.bytes_in - stage.bytes_out), label: !grows && dropped > 0 ? `−${count(dropped)}` : null });
  }
  if (train && !data.stages.some((stage) => stage.name === "augment")) split();
  if (train) {
    const tokens = train.tokens, batch = run.config?.training?.batch_size, length = data.settings?.sequence_length;
    if (data.tokenizer && data.stages[0]?.name !== "import") found.push({ key: "tokenize", kind: "tokenize", name: "tokenise", into: train.text_bytes, out: train.text_bytes, said: [`${count(tokens, true)} tokens`, `${number(train.text_bytes / tokens, { digits: 3 })} bytes each`] });
    found.push({ key: "pack", kind: "pack", name: "pack", into: train.text_bytes, out: train.text_bytes, said: [`${count(train.packing.rows)} rows`, `${percent(train.packing.utilization, 2)} full`] });
    found.push({ key: "batch", kind: "batch", name: "batch", into: 0, out: 0, said: [`${count(batch)} × ${count(length)}`, `step ${count(step)}`] });
  }
  return found;
}

export function River({ theme }) {
  const { chosen, run, index, step, live } = useRun();
  const { data, problem } = useAnswer(`river?run=${index}`);
  const { window } = useWindow(index, "run", "*"), reading = useReading(index, "run", "*", step);
  if (problem) return html`<${Nothing}>${problem}<//>`;
  if (!data || reading === undefined) return html`<p class="boot">Reading the stages …</p>`;
  const stations = stationsOf(data, run, step), phases = phasesOf(run, reading);
  const stage = chosen.stage ?? stations.find((s) => s.kind === "filter" || s.stage?.samples?.length)?.key ?? stations[0]?.key ?? "loop";
  return html`
    <${Panel} id="river-title" wide question="What becomes of the text on its way into the model?" answer=${sentence(data, stations, phases, reading)}>
      ${data.problem && html`<${Nothing}>${data.problem}<//>`}
      <${Diagram} stations=${stations} phases=${phases} chosen=${stage} data=${data} run=${run} step=${step} reading=${reading} live=${live && run.heard && performance.now() - run.heard < 10000} />
    <//>
    <${Station} key=${stage} station=${stations.find((s) => s.key === stage)} loop=${stage === "loop"} phases=${phases} reading=${reading} window=${window} data=${data} run=${run} index=${index} step=${step} theme=${theme} />
    ${data.splits?.train && !data.problem && html`<${Follow} run=${run} index=${index} step=${step} theme=${theme} />`}`;
}

function sentence(data, stations, phases, reading) {
  const train = data.splits?.train, first = data.stages[0];
  const from = first ? `Of ${plural(first.documents_in, "document")} (${bytes(first.bytes_in)}) ` : "";
  const to = train ? `${plural(train.documents, "training document")} remain or were made, ${count(train.tokens, true)} tokens in ${count(train.packing.rows)} rows. ` : "";
  const wait = phases.find((phase) => phase.key === "data_seconds"), whole = phases.reduce((sum, phase) => sum + phase.seconds, 0);
  return from + to + (whole ? `${capital(reading.when)} the loop waits ${percent(wait?.seconds / whole)} of its time for data.` : "");
}

function Diagram({ stations, phases, chosen, data, run, step, reading, live }) {
  const [box, width] = useWidth();
  const field = Math.max(width - RING, stations.length * 84), gap = field / Math.max(1, stations.length);
  const most = Math.max(1, ...stations.flatMap((s) => [s.into, s.out])), thick = (size) => (size > 0 ? Math.max(3, (size / most) * WIDEST) : 5);
  const flood = (s) => Math.max(3, Math.min(40, (s.lost / most) * WIDEST)), x = (i) => (i + 0.5) * gap, drawn = stations.map((s, i) => ({ ...s, x: x(i), a: thick(s.into), b: thick(s.out) }));
  const rows = data.splits?.train?.packing?.rows, batch = run.config?.training?.batch_size, epochs = rows && batch ? ((step + 1) * batch) / rows : null;
  const tokens = reading?.value(0, statIndex(run, "run", "tokens_per_second")) ?? null;
  return html`<div class="river-scroll" ref=${box}><div class="river" style=${{ width: `${field + RING}px` }}>
    <svg width=${field + RING} height="216" role="img" aria-label=${`${stations.length} stations from source to batch, then the loop`}>
      <defs><linearGradient id="fade" x1="0" x2="0" y1="0" y2="1"><stop offset="0" class="fade-from" /><stop offset="1" class="fade-to" /></linearGradient>
        <linearGradient id="depth" x1="0" x2="0" y1="0" y2="1"><stop offset="0" class="shore" /><stop offset=".5" class="deep" /><stop offset="1" class="shore" /></linearGradient></defs>
      ${drawn.map((s, i) => i > 0 && html`<path class="water" fill="url(#depth)" d=${band(drawn[i - 1], s)} />`)}
      ${drawn.length > 0 && html`<path class="water thin" d=${`M${x(drawn.length - 1)} ${MIDDLE}H${field + RING / 2 - RADIUS - 8}`} />`}
      ${live && drawn.length > 1 && html`<path class="current" d=${`M${x(0)} ${MIDDLE}H${field + RING / 2 - RADIUS - 8}`} />`}
      ${drawn.map((s) => s.lost > 0 && s.label && html`<path class="spill" fill="url(#fade)" d=${spill(s, flood(s))} />`)}
      ${drawn.map((s) => (s.kind === "augment" ? html`<path class="spring" d=${`M${s.x - 22} ${MIDDLE - s.a / 2}C${s.x - 22} ${MIDDLE - s.b / 2 - 22} ${s.x + 20} ${MIDDLE - s.b / 2 - 22} ${s.x + 20} ${MIDDLE - s.b / 2 + 2}`} />` : ""))}
      ${drawn.map((s) => html`<rect class=${"gate" + (s.key === chosen ? " chosen" : "")} x=${s.x - 4} y=${MIDDLE - Math.max(s.a, s.b) / 2 - 4} width="8" height=${Math.max(s.a, s.b) + 8} rx="4" />`)}
      ${drawn.map((s) => s.kind === "pack" && epochs !== null && html`<rect class="read-so-far" x=${s.x - 2} y=${MIDDLE + s.b / 2 - s.b * Math.min(1, epochs)} width="4" height=${s.b * Math.min(1, epochs)} rx="2" />`)}
      <${Ring} phases=${phases} x=${field + RING / 2} y=${MIDDLE} chosen=${chosen === "loop"} />
    </svg>
    ${drawn.map((s) => html`<button type="button" class="station" style=${{ left: `${s.x - gap / 2}px`, width: `${gap}px` }} aria-pressed=${s.key === chosen} data-stage=${s.key} onClick=${() => select({ stage: s.key })}>
      <b>${s.kind === "filter" ? html`<small>filter</small>` : ""}${s.name}</b><span>${s.said[0]}<br />${s.said[1]}</span>${s.label && html`<em style=${{ left: `calc(50% + ${24 + flood(s)}px)` }}>${s.label}</em>`}</button>`)}
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
