// The frame of the page: views, runs, theme and the time line; every view shares the one selection in the URL.
import { Guard, html, render, useEffect, useRef, useState } from "./ui.js";
import { connect, select, useAnswer, useRun } from "./state.js";
import { isReport } from "./source.js";
import { count } from "./format.js";
import { Timeline } from "./timeline.js";
import { Experts } from "./views/experts.js";
import { Learn } from "./views/learn.js";
import { Learning } from "./views/learning.js";
import { Network } from "./views/network.js";
import { River } from "./views/river.js";
import { Tensor } from "./views/tensor.js";
import { Verdicts } from "./views/verdicts.js";
import { XRay } from "./views/xray.js";

const VIEWS = [ // in reading order; an entry's key is its name in the URL and its shape in SHAPES
  ["xray", "X-ray", XRay],
  ["network", "Network", Network],
  ["river", "Data river", River],
  ["experts", "Experts", Experts],
  ["learning", "Learning", Learning],
  ["verdicts", "Verdicts", Verdicts],
  ["tensor", "Tensor", Tensor],
  ["learn", "Learn", Learn],
];

const SYSTEM = matchMedia("(prefers-color-scheme: dark)");

/** The colours that were asked for or, while none were, those of the system; and how to ask for others. */
function useTheme() {
  const [asked, choose] = useState(() => new URLSearchParams(location.search).get("theme") ?? read("pellucid-theme"));
  const [system, follow] = useState(SYSTEM.matches ? "dark" : "light");
  useEffect(() => {
    const turned = () => follow(SYSTEM.matches ? "dark" : "light");
    SYSTEM.addEventListener("change", turned);
    return () => SYSTEM.removeEventListener("change", turned);
  }, []);
  const theme = asked === "light" || asked === "dark" ? asked : system;
  document.documentElement.dataset.theme = theme;
  return [theme, (next) => { write("pellucid-theme", next); choose(next); }];
}
const read = (key) => { try { return localStorage.getItem(key); } catch { return null; } };
const write = (key, value) => { try { localStorage.setItem(key, value); } catch { /* a report opened as a file may not remember */ } };

function App() {
  const { chosen, run, index, runs, connection, step } = useRun();
  const [theme, setTheme] = useTheme();
  const events = useAnswer(run && !run.problem ? `events?run=${index}` : null, run?.event ?? 0).data ?? [];
  const alarms = events.filter((event) => event.severity === "alarm" || event.severity === "warning" || event.severity === "error");
  const view = VIEWS.find(([key]) => key === chosen.view) ?? VIEWS[0];
  const nav = useRef(null);
  useEffect(() => { nav.current.querySelector("[aria-current]").scrollIntoView({ block: "nearest", inline: "center" }); }, [view]); // on a telephone they lie in a row
  useEffect(() => { document.title = run ? `${view[1]} · ${run.name} · Pellucid` : "Pellucid"; }, [view, run?.name]);
  return html`<a class="skip" href="#main" onClick=${(e) => { e.preventDefault(); document.getElementById("main").focus(); }}>Skip to the view</a>
    <header class="top">
      <h1 class="mark"><${Mark} />Pellucid</h1>
      <${RunPicker} runs=${runs} chosen=${chosen} />
      <${Status} run=${run} connection=${connection} />
      <button type="button" class="quiet theme" onClick=${() => setTheme(theme === "dark" ? "light" : "dark")}
        aria-label=${`switch to ${theme === "dark" ? "light" : "dark"} colours`}>${theme === "dark" ? "☀" : "☾"}</button>
    </header>
    <nav class="side" ref=${nav} aria-label="views">${VIEWS.map(([key, name]) => html`<a href=${`#view=${key}`} class="view-link"
      aria-current=${key === view[0] ? "page" : undefined} onClick=${(e) => { e.preventDefault(); select({ view: key }); }}>
      <${Glyph} name=${key} /><span>${name}</span>${key === "verdicts" && alarms.length > 0 && html`<b class="badge">${alarms.length}</b>`}</a>`)}</nav>
    <main id="main" tabindex="-1" class=${"view-" + view[0]}>
      ${connection === "lost" && html`<p class="banner" role="alert">The server of this page does not answer: it was stopped, or the machine sleeps. What is shown is the last that arrived; the page goes on by itself when it is back.</p>`}
      ${run === null ? html`<p class="boot">${connection === "lost" ? "" : "Opening the run …"}</p>`
    : run.problem && !Object.keys(run.streams).length ? html`<p class="banner" role="status">${run.problem}</p>`
    : html`${run.problem && html`<p class="banner" role="alert">${run.problem}</p>`}<${Guard} key=${view[0] + index}><${view[2]} theme=${theme} events=${events} alarms=${alarms} /><//>`}
    </main>
    ${run && !run.problem && html`<${Timeline} theme=${theme} alarms=${alarms} />`}`;
}

function RunPicker({ runs, chosen }) {
  if (!runs.length) return null;
  const pick = (key, none) => html`<label>${none ? "against" : "run"} <select value=${chosen[key] ?? ""}
    onChange=${(e) => select({ [key]: e.target.value === "" ? null : Number(e.target.value) })}>
    ${none && html`<option value="">no other run</option>`}
    ${runs.map((run, i) => (none && i === chosen.run ? null : html`<option value=${i} selected=${i === chosen[key]}>${run.name}</option>`))}
  </select></label>`;
  return html`<div class="runs">${runs.length === 1 ? html`<b>${runs[0].name}</b>` : html`${pick("run", false)}${pick("compare", true)}`}
    <span class="facts">${facts(runs[Math.min(chosen.run, runs.length - 1)])}</span></div>`;
}

function facts(run) {
  const parameters = run.manifest?.parameters?.total, optimizer = run.config?.optimizer?.name;
  return [parameters && `${count(parameters, true)} parameters`, optimizer, run.manifest?.machine?.gpu ?? (run.manifest?.machine && "CPU")].filter(Boolean).join(" · ");
}

/** Whether the run lives, as far as its own file tells. */
function Status({ run, connection }) {
  const [, tick] = useState(0);
  useEffect(() => { const timer = setInterval(() => tick((n) => n + 1), 2000); return () => clearInterval(timer); }, []);
  if (!run) return null;
  if (isReport) return html`<p class="status"><i class="dot done"></i>report up to step ${count(run.latest)}</p>`;
  const silent = run.heard ? (performance.now() - run.heard) / 1000 : run.age ?? Infinity;
  const [kind, text] = connection === "lost" ? ["lost", "no answer"] : run.latest === null ? ["wait", "waiting for the first step"]
    : run.training === false ? (run.finished ? ["done", `ended at step ${count(run.latest)}`] : ["wait", `stopped at step ${count(run.latest)}`])
    : silent < 20 ? ["live", `live, step ${count(run.latest)}`] : run.finished ? ["done", `ended at step ${count(run.latest)}`]
    : ["wait", `${run.training ? "busy" : "quiet"} since step ${count(run.latest)}`];
  return html`<p class="status" role="status" data-step=${run.latest}><i class=${"dot " + kind}></i>${text}</p>`;
}

const Mark = () => html`<svg viewBox="0 0 32 32" width="22" height="22" aria-hidden="true"><circle cx="14" cy="14" r="10" fill="none" stroke="#0072B2" stroke-width="3"/>
  <path d="M21.5 21.5 28 28" stroke="#E69F00" stroke-width="4" stroke-linecap="round"/><circle cx="14" cy="14" r="3.4" fill="#009E73"/></svg>`;

const SHAPES = {
  xray: "M3 5h4v4H3zM10 5h4v4h-4zM17 5h4v4h-4zM3 12h4v4H3zM10 12h4v4h-4zM17 12h4v4h-4z",
  network: "M5 6a2 2 0 1 0 .1 0M5 15a2 2 0 1 0 .1 0M19 10.500a2 2 0 1 0 .1 0M7 8l10 4M7 17l10-4",
  river: "M2 7c6-4 8 4 20 0M2 12c6-4 8 4 20 0M2 17c6-4 8 4 20 0",
  experts: "M4 4h6v6H4zM14 4h6v6h-6zM4 14h6v6H4zM14 14h6v6h-6z",
  learning: "M3 4c3 12 8 13 18 14M3 20h18",
  verdicts: "M12 3l9 17H3zM12 9v6M12 17.500v.5",
  tensor: "M4 20v-5M8 20v-9M12 20V5M16 20v-8M20 20v-4",
  learn: "M4 5c4-1 6 0 8 2 2-2 4-3 8-2v13c-4-1-6 0-8 2-2-2-4-3-8-2zM12 7v13",
};
const Glyph = ({ name }) => html`<svg viewBox="0 0 24 24" width="18" height="18" aria-hidden="true" fill="none" stroke="currentColor" stroke-width="1.7" stroke-linejoin="round" stroke-linecap="round"><path d=${SHAPES[name]}/></svg>`;

document.getElementById("app").replaceChildren();
render(html`<${App} />`, document.getElementById("app"));
connect();
