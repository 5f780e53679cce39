// One selection for all views (run, step, layer, expert, tensor, statistic), kept in the URL so that it can be shared;
// and the runs as they grow. Views read both through hooks and never keep a copy.
import { useEffect, useRef, useState } from "./ui.js";
import { ask, askWindow, isReport } from "./source.js";

const listeners = new Set();
const changed = () => listeners.forEach((listener) => listener());

function useChanges(read) {
  const [, again] = useState(0);
  useEffect(() => {
    const listener = () => again((n) => n + 1);
    listeners.add(listener);
    return () => listeners.delete(listener);
  }, []);
  return read();
}

// ------------------------------------------------------------------------------------------------ selection

const NUMBERS = new Set(["run", "compare", "step", "layer", "expert", "from", "to", "document", "phase", "token", "edge"]);
const DEFAULTS = { view: "xray", run: 0, compare: null, step: null, layer: null, expert: null, tensor: null,
  stat: "update_ratio", from: null, to: null, stage: null, document: null, phase: null, token: null, edge: null };
let selection = { ...DEFAULTS, ...read() };

function read() {
  const found = {};
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    if (NUMBERS.has(key)) { if (/^\d+$/.test(value)) found[key] = Number(value); } else found[key] = value;
  }
  return found;
}

/** Change part of the selection; null removes an entry. */
export function select(patch, { remember = "view" in patch } = {}) {
  selection = { ...selection, ...patch };
  const words = new URLSearchParams();
  for (const [key, value] of Object.entries(selection)) if (value !== null && value !== DEFAULTS[key]) words.set(key, value);
  const address = "#" + words;
  if (address !== location.hash) history[remember ? "pushState" : "replaceState"](null, "", address);
  changed();
}
addEventListener("popstate", () => { selection = { ...DEFAULTS, ...read() }; changed(); });
addEventListener("hashchange", () => { selection = { ...DEFAULTS, ...read() }; changed(); });

export const useSelection = () => useChanges(() => selection);

// ----------------------------------------------------------------------------------------------------- runs

let runs = [];
let connection = isReport ? "report" : "connecting";

export const useRuns = () => useChanges(() => ({ runs, connection }));

/** Ask for the runs, then listen to what they do. */
export async function connect() {
  try {
    runs = await ask("runs");
    connection = isReport ? "report" : "live";
  } catch (error) {
    connection = "lost";
  }
  changed();
  if (isReport) return;
  let stream = null;
  const listen = () => {
    stream ??= new EventSource("/events");
    stream.onmessage = (message) => heard(JSON.parse(message.data));
    stream.onopen = () => { if (connection === "lost") ask("runs").then((found) => { runs = found; connection = "live"; changed(); }); };
    stream.onerror = () => { connection = "lost"; changed(); };
  };
  listen();
  document.addEventListener("visibilitychange", () => { // a hidden page asks for nothing
    if (document.hidden) { stream?.close(); stream = null; } else listen();
  });
}

const PACE = 200; // milliseconds between two pictures of a run that trains
let drawn = 0, due = null;
function soon() {
  const rest = PACE - (performance.now() - drawn);
  if (rest <= 0) { drawn = performance.now(); changed(); } else due ??= setTimeout(() => { due = null; drawn = performance.now(); changed(); }, rest);
}

async function heard({ run: index, step, event, problem, files, training }) {
  const run = runs[index];
  if (!run) return;
  const more = run.files !== undefined && String(run.files) !== String(files); // it has ended, or a step was explained
  const anew = step !== null && (run.latest === null || step < run.latest); // it has begun, or was resumed from an earlier step
  if (anew) windows.clear();
  if (anew || more) runs = await ask("runs");
  runs = runs.map((known, i) => (i === index
    ? { ...known, latest: step ?? known.latest, event, problem, files, training, heard: step !== run.latest ? performance.now() : run.heard } : known));
  soon();
}

// -------------------------------------------------------------------------------------------------- answers

const windows = new Map(); // path without `since` -> {window, latest, pending}

/** A window of a stream, growing with the run. {window, problem}; window is null until the first answer. */
export function useWindow(run, stream, stat, { from = null, to = null } = {}) {
  const { runs: known } = useRuns();
  const about = known[run];
  const there = about?.streams?.[stream] !== undefined;
  if (isReport) from = to = null; // it holds every stream once, whole
  const path = there && stat ? `window?run=${run}&stream=${stream}&stat=${stat}`
    + (from !== null ? `&since=${from}` : "") + (to !== null ? `&until=${to}` : "") : null;
  const latest = about?.latest ?? null;
  const [, again] = useState(0);
  useEffect(() => {
    if (path === null) return;
    let alive = true;
    grow(path, latest, from, to).then(() => alive && again((n) => n + 1));
    return () => { alive = false; };
  }, [path, latest]);
  const entry = path === null ? null : windows.get(path);
  return { window: entry?.window ?? null, problem: entry?.problem ?? null, there, path };
}

/** What a stream says of a step, from its newest `recorded` ones up to it: a Reading, from the window of all steps where
 * that holds them, else asked for. null: nothing was recorded up to that step; undefined: it is still being read. */
export function useReading(run, stream, stat, step, recorded = 1) {
  const { runs: known } = useRuns();
  const { window, path } = useWindow(run, stream, stat);
  const at = step >= known[run]?.latest ? Infinity : step; // the window may be a step ahead of the newest, or behind
  const held = !window || isReport || window.span === 1 || (recorded === 1 && at >= window.header.latest);
  const question = held ? null : `${path}&until=${step}&newest=${recorded}`;
  const [, again] = useState(0);
  const line = useRef({ asking: false, path, reading: undefined }).current; // a reading is kept until the next is here: it names its step
  line.wanted = held ? null : { question, answer: () => askWindow(question).then((found) => ({ path, reading: found.reading(step, recorded) }),
    () => null) }; // a server that is gone is said above the view
  if (held && window) Object.assign(line, { path, reading: window.reading(at, recorded) });
  useEffect(() => { if (!line.asking) follow(line, () => again((n) => n + 1)); }, [question]);
  useEffect(() => () => { line.wanted = null; }, []);
  if (path === null) return null;
  return line.path === path ? line.reading : undefined;
}

/** Ask for what is wanted, one question at a time: of the steps that a drag or a training runs over, those that there is time for and the last. */
async function follow(line, changed) {
  line.asking = true;
  for (let asked = null; line.wanted !== null && line.wanted.question !== asked;) {
    const { question, answer } = line.wanted;
    asked = question;
    const found = await answer();
    if (found && line.wanted !== null) { Object.assign(line, found); changed(); }
  }
  line.asking = false;
}

async function grow(path, latest, from, to) {
  const entry = windows.get(path) ?? { window: null, latest: -1, problem: null };
  windows.set(path, entry);
  if (windows.size > 60) windows.delete(windows.keys().next().value);
  if (entry.pending) { await entry.pending; if (entry.latest >= latest) return; }
  if (entry.window && (entry.latest >= latest || to !== null)) return;
  const last = entry.window?.columns ? entry.window.steps[entry.window.columns - 1] : null;
  entry.pending = (async () => {
    try {
      const tail = path.replace(/&since=\d+/, "") + `&since=${last}&span=${entry.window?.span}`;
      const continued = last === null || isReport ? null : entry.window.extended(await askWindow(tail));
      entry.window = continued ?? (await askWindow(path));
      entry.latest = entry.window.header.latest ?? -1;
      entry.problem = null;
    } catch (error) {
      entry.problem = error.message;
    }
    entry.pending = null;
  })();
  await entry.pending;
}

/** A JSON answer: {data, problem}; asked again when `version` changes, keeping the old one meanwhile; `keep`: also when
 * the question changes, for what follows the newest step. */
export function useAnswer(path, version = 0, keep = false) {
  const question = path === null ? null : `${path} ${version}`;
  const [, again] = useState(0);
  const line = useRef({ asking: false, path: null, data: null, problem: null }).current;
  line.wanted = path === null ? null : { question, answer: () => ask(path).then((data) => ({ path, data, problem: null }), (error) => ({ path, data: null, problem: error.message })) };
  useEffect(() => { if (!line.asking) follow(line, () => again((n) => n + 1)); }, [question]);
  useEffect(() => () => { line.wanted = null; }, []);
  return line.path === path || (keep && path !== null && line.data) ? { data: line.data, problem: line.problem } : { data: null, problem: null };
}

// --------------------------------------------------------------------------------------------- conveniences

/** The run of the selection with the selected step, which is the newest until one is chosen. */
export function useRun() {
  const chosen = useSelection();
  const { runs: known, connection: link } = useRuns();
  const index = Math.min(chosen.run, Math.max(0, known.length - 1));
  const run = known[index] ?? null;
  const step = run?.latest === null || run === null ? null : chosen.step === null ? run.latest : Math.min(chosen.step, run.latest);
  return { chosen, run, index, step, live: chosen.step === null, runs: known, connection: link };
}

/** Whether the one step of a reading of the stream "run" was skipped: its loss or gradient was not finite. */
export const wasSkipped = (run, reading) => Boolean(reading) && reading.from === reading.to && reading.value(0, statIndex(run, "run", "applied")) === 0;
export const statOf = (run, stream, name) => run?.streams?.[stream]?.stats.find((stat) => stat.name === name) ?? null;
export const statIndex = (run, stream, name) => run?.streams?.[stream]?.stats.findIndex((stat) => stat.name === name) ?? -1;
