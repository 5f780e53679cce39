// View 3, the data river: from source to batch, and the loop that drinks from it, by measured milliseconds.
import { Nothing, Panel, html } from "../ui.js";
import { useAnswer, useRun } from "../state.js";
import { bytes, count } from "../format.js";

export function River() {
  const { index } = useRun();
  const { data, problem } = useAnswer(`river?run=${index}`);
  if (problem) return html`<${Nothing}>${problem}<//>`;
  if (!data) return html`<p class="boot">Reading the stages …</p>`;
  return html`<${Panel} id="river-title" wide question="What became of the text on its way to the model?">
    <table><thead><tr><th scope="col">stage</th><th scope="col">documents in</th><th scope="col">out</th><th scope="col">text in</th><th scope="col">out</th></tr></thead>
      <tbody>${data.stages.map((stage) => html`<tr><th scope="row">${stage.name}</th><td>${count(stage.documents_in)}</td><td>${count(stage.documents_out)}</td><td>${bytes(stage.bytes_in)}</td><td>${bytes(stage.bytes_out)}</td></tr>`)}</tbody></table>
  <//>`;
}
