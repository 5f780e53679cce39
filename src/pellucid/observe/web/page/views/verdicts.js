// View 6, verdicts: what the rules found, with evidence, cause, remedy and the paper; a spike opens its documents.
import { Nothing, Panel, html, useMemo } from "../ui.js";
import { select, statIndex, useAnswer, useRun, useWindow } from "../state.js";
import { Spark } from "../line.js";
import { count, number, plural } from "../format.js";

const EVIDENCE = { loss_spike: "loss", loss_rising: "loss", gradient_explosion: "gradient_norm", gradient_vanishing: "gradient_norm", update_spike: "update_norm",
  clipping_always: "clip_factor", data_starvation: "data_seconds", non_finite: "gradient_norm" };

export function Verdicts({ events }) {
  const { run, index, step } = useRun();
  const rules = useAnswer(`rules?run=${index}`).data ?? [];
  const { window } = useWindow(index, "run", "*");
  const found = useMemo(() => events.filter((event) => event.severity === "alarm" || event.severity === "warning"), [events]);
  if (!window) return html`<p class="boot">Reading the steps …</p>`;
  const names = [...new Set(found.map((event) => event.rule))];
  const quiet = rules.filter((rule) => !names.includes(rule.name)), applied = appliedIn(run, window);
  const judges = (rule) => rule.steps !== null && rule.steps <= applied;
  const judged = quiet.filter(judges), unasked = quiet.filter((rule) => rule.steps === null), early = quiet.filter((rule) => rule.steps > applied);
  const soon = early.length ? ` For ${plural(early.length, "rule")} it is too early to judge.` : "";
  return html`
    <${Panel} id="verdict-title" wide question="Is anything wrong?" answer=${found.length
    ? `${plural(found.length, "finding")} by ${plural(names.length, "rule")} in ${plural((run.latest ?? 0) + 1, "step")}; ${plural(judged.length, "other")} found no fault.${soon}`
    : `Nothing so far: ${plural(judged.length, "rule")} judged ${plural((run.latest ?? 0) + 1, "step")} and found no fault.${soon}`}>
      ${names.map((name) => html`<${Card} key=${name} rule=${rules.find((rule) => rule.name === name) ?? { name, severity: "warning" }} events=${found.filter((event) => event.rule === name)}
        window=${window} run=${run} step=${step} />`)}
    <//>
    <${Panel} id="quiet-title" wide question="What is being watched?" answer="Every rule is a pure function of the recorded numbers, judged at each step while the run trains.">
      ${quiet.length ? html`<ul class="rules">${[...judged, ...early, ...unasked].map((rule) => html`<li class=${judges(rule) ? "" : "early"}><b><i class="fine" aria-hidden="true">${judges(rule) ? "✓" : "…"}</i>${rule.name.replaceAll("_", " ")}</b>
        <span>${rule.cause}${judges(rule) ? "" : `; ${whyNot(rule, applied, (run.latest ?? 0) + 1 - applied)}`}</span></li>`)}</ul>` : html`<${Nothing}>Every rule has found something.<//>`}
    <//>`;
}

const whyNot = (rule, applied, skipped) => (rule.steps === null ? `not judged: ${rule.never}`
  : `too early to judge: it takes ${plural(rule.steps, "step")}, ${count(applied)} ${applied === 1 ? "was" : "were"} done${skipped ? ` and ${count(skipped)} skipped` : ""}`);

/** How many steps were done, that is not skipped over a loss or gradient that is not finite. */
function appliedIn(run, window) {
  const stat = statIndex(run, "run", "applied");
  let sum = 0;
  for (let column = 0; column < window.columns; column++) sum += window.value(column, 0, stat) * (window.parts > 1 ? window.value(column, 0, stat, "measured") : 1);
  return Math.round(sum);
}

function Card({ rule, events, window, run }) {
  const newest = rule.name === "non_finite" ? events[0] : events[events.length - 1], alarm = rule.severity === "alarm";
  const stat = EVIDENCE[rule.name] && statIndex(run, "run", EVIDENCE[rule.name]);
  const open = (event) => select({ view: "learning", step: event.step });
  const tensor = run.streams.param?.rows.some((row) => row.name === newest.subject);
  const expert = /^layers\.(\d+)\.experts\.(\d+)$/.exec(newest.subject ?? "");
  return html`<article class=${"verdict " + rule.severity}>
    <header><span class="severity">${alarm ? "▲ alarm" : "● warning"}</span><h3>${rule.name.replaceAll("_", " ")}</h3>
      ${stat >= 0 && html`<${Spark} values=${window.series(0, stat, "max")} hue="var(--alarm)" width=${160} label=${`history of ${EVIDENCE[rule.name]}`} />`}</header>
    <p class="evidence">Step ${count(newest.step)}, ${newest.subject}: ${newest.text}.</p>
    <dl class="why"><dt>Why</dt><dd>${rule.cause}</dd><dt>Try</dt><dd>${rule.remedy}</dd><dt>After</dt><dd class="source">${rule.source}</dd></dl>
    <p class="links"><button type="button" onClick=${() => open(newest)}>documents of step ${count(newest.step)}</button>
      ${tensor && html`<button type="button" onClick=${() => select({ view: "tensor", tensor: newest.subject, step: newest.step })}>open ${newest.subject}</button>`}
      ${expert && html`<button type="button" onClick=${() => select({ view: "experts", layer: Number(expert[1]), expert: Number(expert[2]), step: newest.step })}>open the expert</button>`}</p>
    ${events.length > 1 && html`<details><summary>all ${events.length} findings</summary><ul>${events.slice(-50).reverse().map((event) => html`<li><button type="button" class="link" onClick=${() => select({ step: event.step })}>step ${count(event.step)}</button> ${event.subject}: ${event.text}${event.threshold !== null ? ` (limit ${number(event.threshold)})` : ""}</li>`)}</ul></details>`}
  </article>`;
}
