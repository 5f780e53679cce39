// Two texts, word by word: what left is marked before, what came is marked after. White space shows itself where it differs.
import { html, useMemo } from "./ui.js";

const MOST = 1200; // words compared; a longer middle is shown as replaced

/** [[kind, text]] with kind "same", "gone" or "new": common beginning and end cut off, then the longest common subsequence. */
export function difference(before, after) {
  const words = (text) => text.match(/\w+|[^\w\s]|\s/gu) ?? [];
  const a = words(before), b = words(after);
  let head = 0, tail = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  while (tail < a.length - head && tail < b.length - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail++;
  const middle = common(a.slice(head, a.length - tail), b.slice(head, b.length - tail));
  return merged([["same", a.slice(0, head).join("")], ...middle, ["same", a.slice(a.length - tail).join("")]]);
}

function common(a, b) {
  if (!a.length || !b.length || a.length > MOST || b.length > MOST) return [["gone", a.join("")], ["new", b.join("")]];
  const width = b.length + 1, length = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      length[i * width + j] = a[i] === b[j] ? length[(i + 1) * width + j + 1] + 1 : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
    }
  }
  const found = [];
  for (let i = 0, j = 0; i < a.length || j < b.length;) {
    if (i < a.length && j < b.length && a[i] === b[j]) { found.push(["same", a[i]]); i++; j++; }
    else if (j >= b.length || (i < a.length && length[(i + 1) * width + j] >= length[i * width + j + 1])) found.push(["gone", a[i++]]);
    else found.push(["new", b[j++]]);
  }
  return found;
}

function merged(parts) {
  const found = [];
  for (const [kind, text] of parts) {
    const last = found[found.length - 1];
    if (last?.[0] === kind) last[1] += text; else if (text) found.push([kind, text]);
  }
  return found;
}

const shown = (text) => text.replace(/\r/g, "␍").replace(/\n/g, "↵\n").replace(/\t/g, "⇥").replace(/ /g, "·");

/** Before and after, side by side. An excerpt that was cut at its end does not differ there. */
export function Difference({ before, after, cut = false, names = ["before", "after"] }) {
  const parts = useMemo(() => {
    const found = difference(before, after), end = found.findLastIndex(([kind]) => kind === "same");
    return cut ? found.map(([kind, text], i) => (i > end && end > 0 ? ["end", text] : [kind, text])).filter(([kind]) => kind !== "end") : found;
  }, [before, after, cut]);
  const side = (own, tag) => parts.filter(([kind]) => kind === "same" || kind === own).map(([kind, text]) => (kind === "same" ? text
    : html`<${tag} class=${own}>${shown(text)}<//>`));
  return html`<div class="difference"><div><h4>${names[0]}</h4><pre class="text" tabindex="0">${side("gone", "del")}</pre></div>
    <div><h4>${names[1]}</h4><pre class="text" tabindex="0">${side("new", "ins")}</pre></div></div>`;
}
