// The rows of a run's tensors as views show them: in the order of the network, grouped by layer, coloured by role.
import { ROLES, roleOf } from "./colour.js";

export const shorten = (name) => name.replace(/^layers\.\d+\./, "").replace(/\.weight$/, "").replace(/^moe\.|^attention\./, "");

/** [{index, label, short, group, hue, role, row}] of the stream "param"; with another run, the same tensor's index there. */
export function tensorRows(run, { roles = null, experts = true, other = null } = {}) {
  const there = other ? new Map((other.streams?.param?.rows ?? []).map((row, i) => [row.name, i])) : null;
  return (run.streams.param?.rows ?? []).map((row, index) => {
    const role = roleOf(row);
    return { index, row, role, label: row.name, short: shorten(row.name), hue: ROLES[role].hue,
      group: row.layer === null ? ({ embedding: "input", final_norm: "output", model: "model" }[row.role] ?? "other") : `layer ${row.layer}`,
      other: there?.get(row.name) };
  }).filter((row) => (!roles || roles.has(row.role)) && (experts || row.row.expert === null));
}

/** A tensor's rows of experts follow it in the file; this is the plain-words name for people. */
export function describeRow(row) {
  const what = { embedding: "token embedding", q_proj: "queries", k_proj: "keys", v_proj: "values", o_proj: "attention output",
    router: "router", gate_up_proj: "experts' input (gate and up)", down_proj: "experts' output", final_norm: "final norm",
    pre_attn_norm: "norm before attention", post_attn_norm: "norm after attention", pre_moe_norm: "norm before the experts",
    post_moe_norm: "norm after the experts", model: "all parameters together" }[row.role] ?? row.role;
  const expert = row.expert === null ? "" : `, expert ${row.expert}`;
  return row.layer === null ? what : `layer ${row.layer}, ${what}${expert}`;
}
