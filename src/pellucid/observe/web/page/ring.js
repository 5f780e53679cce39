// The loop as a ring: each phase of a step as long as it took.
import { html } from "./ui.js";
import { statIndex } from "./state.js";
import { number } from "./format.js";

export const PHASES = [["data_seconds", "wait for data", "#CC79A7"], ["forward_seconds", "forward", "#56B4E9"], ["loss_seconds", "loss", "#0072B2"],
  ["backward_seconds", "backward", "#E69F00"], ["clip_seconds", "clip", "#999999"], ["update_seconds", "update", "#009E73"],
  ["observe_seconds", "observe", "#F0E442"], ["between_seconds", "between steps", "#8a7f9c"]];

/** [{key, name, hue, seconds}] of a reading of the stream "run". */
export function phasesOf(run, reading) {
  return PHASES.map(([key, name, hue]) => ({ key, name, hue, seconds: reading?.value(0, statIndex(run, "run", key)) ?? null }))
    .filter((phase) => phase.seconds !== null && Number.isFinite(phase.seconds));
}

export const RADIUS = 60;

export function Ring({ phases, x, y, chosen, radius = RADIUS, width = 20 }) {
  const whole = phases.reduce((sum, phase) => sum + phase.seconds, 0);
  if (!whole) return null;
  let angle = Math.PI; // begins where the river arrives
  return html`<g class=${"ring" + (chosen ? " chosen" : "")}>
    ${phases.map((phase) => {
      const share = phase.seconds / whole, from = angle, middle = from + share * Math.PI, label = share > 0.07;
      angle += share * 2 * Math.PI;
      return html`<path d=${arc(x, y, radius, width, from, angle)} fill=${phase.hue}><title>${phase.name}: ${number(phase.seconds * 1000)} ms</title></path>
        ${label && html`<text x=${x + Math.cos(middle) * (radius + 16)} y=${y + Math.sin(middle) * (radius + 16) + 4} text-anchor=${Math.abs(Math.cos(middle)) < 0.35 ? "middle" : Math.cos(middle) > 0 ? "start" : "end"}>${phase.name}</text>`}`;
    })}
    <text class="ring-value" x=${x} y=${y + 2} text-anchor="middle">${number(whole * 1000, { digits: 4 })}</text><text x=${x} y=${y + 20} text-anchor="middle">ms a step</text>
  </g>`;
}

function arc(x, y, radius, width, from, to) {
  const gap = Math.min(0.012, (to - from) / 3), end = Math.min(to - gap, from + 2 * Math.PI - 0.02), big = end - from > Math.PI ? 1 : 0;
  const at = (angle, r) => `${(x + Math.cos(angle) * r).toFixed(2)} ${(y + Math.sin(angle) * r).toFixed(2)}`;
  const outer = radius + width / 2, inner = radius - width / 2;
  return `M${at(from, outer)}A${outer} ${outer} 0 ${big} 1 ${at(end, outer)}L${at(end, inner)}A${inner} ${inner} 0 ${big} 0 ${at(from, inner)}Z`;
}
