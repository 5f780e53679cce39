// Preact and htm, bound once for every module of the page.
import { Component, h, render, Fragment } from "../vendor/preact.mjs";
import { useState, useEffect, useLayoutEffect, useMemo, useRef, useCallback } from "../vendor/hooks.mjs";
import htm from "../vendor/htm.mjs";

export const html = htm.bind(h);
export { render, Fragment, useState, useEffect, useLayoutEffect, useMemo, useRef, useCallback };

/** [ref, width in CSS pixels] of an element that fills its parent. */
export function useWidth(initial = 0) {
  const ref = useRef(null);
  const [width, setWidth] = useState(initial);
  useLayoutEffect(() => {
    const measure = () => ref.current && setWidth(Math.floor(ref.current.getBoundingClientRect().width));
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, []);
  return [ref, width];
}

/** A panel asks one question, answers it in a sentence, then shows it. */
export function Panel({ question, answer, aside, children, id, wide }) {
  return html`<section class=${"panel" + (wide ? " wide" : "")} aria-labelledby=${id}>
    <header><div><h2 id=${id}>${question}</h2>${answer && html`<p class="answer">${answer}</p>`}</div>
      ${aside && html`<div class="aside">${aside}</div>`}</header>
    ${children}
  </section>`;
}

/** A choice among a few, as a row of buttons. */
export function Choice({ label, value, options, onChange }) {
  return html`<div class="choice" role="group" aria-label=${label}>
    ${options.map(([key, text]) => html`<button type="button" aria-pressed=${key === value}
      onClick=${() => onChange(key)}>${text}</button>`)}
  </div>`;
}

/** Any value the user should read as "there is none, and why". */
export const Nothing = ({ children }) => html`<p class="nothing">${children}</p>`;

/** Keeps the page when a view breaks on numbers nobody foresaw, and says so. */
export class Guard extends Component {
  constructor(props) { super(props); this.state = { problem: null }; }
  static getDerivedStateFromError(error) { return { problem: error.message }; }
  componentDidCatch(error) { console.error(error); }
  render() {
    return this.state.problem === null ? this.props.children
      : html`<p class="banner" role="alert">This view cannot show the run (${this.state.problem}). The others still work, and so does the training.</p>`;
  }
}
