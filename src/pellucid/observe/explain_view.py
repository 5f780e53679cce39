"""An explanation on the terminal: the numbers in order, the sum that closes, the proofs with their ticks."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pellucid.observe.explain import Explanation, Proof, term_words

MARKS = {True: ("proven", "green"), False: ("FAILED", "bold red"), None: ("not testable", "dim")}


def render(explanation: Explanation) -> Group:
    """For `rich.print`; numbers with nine digits, as many as a float32 has."""
    e = explanation
    place = ", ".join(map(str, e.index))
    parts = [
        Text(f"step {e.step}: {e.parameter}[{place}] by {e.rule}", style="bold"),
        Text(f"loss {e.loss:.6g}" + (f" -> {e.loss_after:.6g} after this one step" if e.loss_after is not None else "")
             + f"; gradient norm of the whole model {e.gradient_norm:.6g}, clip factor {e.clip_factor:.6g}"),
        Text(", ".join(f"{name} {value}" for name, value in e.settings.items()), style="dim"),
        *([Text(e.note)] if e.note else []),
        _numbers(e),
        _proofs(e.proofs),
    ]  # fmt: skip
    if e.predictions:
        parts.append(_predictions(e))
    return Group(*parts)


def _numbers(e: Explanation) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(justify="left")
    table.add_column(justify="right")
    for label, value in e.lines:
        table.add_row(label, f"{value:.9g}")
    table.add_section()
    for label, value in e.terms.items():
        table.add_row(f"+ {term_words(label, e.rule, e.settings)}", f"{value:+.9g}")
    table.add_row(Text("= change", style="bold"), Text(f"{e.change:+.9g}", style="bold"))
    table.add_row("weight before", f"{e.weight_before:.9g}")
    table.add_row("weight after", f"{e.weight_after:.9g}")
    return table


def _proofs(proofs: list[Proof]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2))
    for proof in proofs:
        mark, style = MARKS[proof.holds]
        table.add_row(Text(mark, style=style), f"{proof.claim}\n[dim]{proof.detail}[/dim]")
    return table


def _predictions(e: Explanation) -> Table:
    table = Table(title="chance of what came, before and after the step")
    for name in ("after the text", "came", "before", "after", "model's first choice"):
        table.add_column(name, justify="right" if name in ("before", "after") else "left")
    for p in e.predictions:
        style = "green" if p.after > p.before else "red"
        change = Text(f"{p.after:.3%}", style=style)
        choice = " -> ".join(dict.fromkeys([repr(p.expected_before), repr(p.expected_after)]))
        table.add_row(Text(repr(p.context)[1:-1]), Text(repr(p.token)), f"{p.before:.3%}", change, Text(choice))
    return table
