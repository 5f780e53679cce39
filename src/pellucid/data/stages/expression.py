"""Picture 2, filter: the user's own rule, such as "words >= 50 and mean_word_length < 9 and language == 'en'".

The text of a rule is parsed by Python's `ast` and read by the little interpreter below, which knows numbers,
strings, the variables of VARIABLES, + - * /, comparisons, `in`, `and`, `or`, `not`: it can compute, not act.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from pellucid.config import UserError, nearest
from pellucid.data.stages.language import identifier, language_of
from pellucid.data.stages.repetition import duplicates
from pellucid.data.stages.textview import TextView

LONGEST = 2000  # characters of a rule; bounds its depth too
VARIABLES: dict[str, tuple[str, Callable[[TextView], Any]]] = {
    "characters": ("length of the text", lambda view: len(view.text)),
    "bytes": ("its size in UTF-8", lambda view: len(view.text.encode())),
    "words": ("words that are not symbols", lambda view: view.real_words),
    "symbols": ("words that are symbols", lambda view: len(view.words.symbol) - view.real_words),
    "lines": ("lines", lambda view: len(view.lines)),
    "mean_word_length": ("characters per word that is not a symbol; 0 without words", lambda view: _mean_length(view)),
    "mean_line_length": ("characters per line that is not blank; 0 without", lambda view: _mean(view.filled_lines)),
    "alphabetic_words": ("share of words that hold a letter",
                         lambda view: float(np.mean(view.words.alphabetic)) if len(view.words.length) else 0.0),
    "distinct_words": ("distinct words per word, case aside",
                       lambda view: len(np.unique(view.folded)) / len(view.folded) if view.real_words else 0.0),
    "repeated_lines": ("share of non-blank lines that are copies",
                       lambda view: duplicates(view.filled_lines)[0] / max(1, len(view.filled_lines))),
    "language": ("ISO 639 code, such as 'en'", lambda view: language_of(view)[0]),
    "language_score": ("probability of that language", lambda view: language_of(view)[1]),
}
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}


def compile_expression(rule: str) -> Callable[[TextView], str | None]:
    """A filter that keeps the documents for which the rule is true. Raises UserError for what is not such a rule.

    Where a rule divides by zero it says nothing, and the document is dropped as undefined.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of Python's about the style of the rule
            tree = ast.parse(rule.strip(), mode="eval").body if len(rule) <= LONGEST else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None:
        raise _mistake(rule, "is not one condition; an example: words >= 50 and mean_word_length < 9")
    try:
        if _kind(tree, rule) != "truth":
            raise _mistake(rule, "is no condition: compare something, as in words >= 50")
    except RecursionError:
        raise _mistake(rule, "is nested too deep") from None

    def judge(view: TextView) -> str | None:
        try:
            return None if _value(tree, view) else "expression"
        except (ZeroDivisionError, OverflowError):
            return "expression undefined"

    return judge


def _mistake(rule: str, what: str) -> UserError:
    shown = rule if len(rule) <= 80 else rule[:77] + "..."
    return UserError(f"data.filter.expression: '{shown}' {what}")


def _kind(node: ast.AST, rule: str) -> str:
    """Check a node and everything below it; returns "number", "string", "strings" or "truth"."""
    match node:
        case ast.Constant(value=bool()):
            return "truth"
        case ast.Constant(value=int() | float()):
            return "number"
        case ast.Constant(value=str()):
            return "string"
        case ast.Name(id=name):
            if name not in VARIABLES:
                raise _mistake(rule, f"names '{name}', which is no variable{nearest(name, list(VARIABLES))}")
            if name.startswith("language"):
                identifier("data.filter.expression")
            return "string" if name == "language" else "number"
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            if items and all(_kind(item, rule) == "string" for item in items):
                return "strings"
        case ast.BoolOp(values=values):
            if all(_kind(value, rule) == "truth" for value in values):
                return "truth"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            if _kind(operand, rule) == "truth":
                return "truth"
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            if _kind(operand, rule) == "number":
                return "number"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            if _kind(left, rule) == _kind(right, rule) == "number":
                return "number"
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _compared([left, *others], ops, rule)
    raise _mistake(rule, f"has something that is not allowed: {ast.unparse(node)[:60]}")


def _compared(nodes: list[ast.expr], ops: list[ast.cmpop], rule: str) -> str:
    kinds = [_kind(node, rule) for node in nodes]
    for op, a, b in zip(ops, kinds, kinds[1:], strict=False):
        if isinstance(op, ast.In | ast.NotIn):
            fits = a == "string" and b == "strings"
        else:
            fits = a == b and type(op) in OPERATORS and (a == "number" or isinstance(op, ast.Eq | ast.NotEq))
        if not fits or "truth" in (a, b):
            raise _mistake(rule, f"compares a {a} with a {b}")
    return "truth"


def _value(node: ast.AST, view: TextView) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return VARIABLES[name][1](view)
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            return [_value(item, view) for item in items]
        case ast.BoolOp(op=op, values=values):
            results = (_value(value, view) for value in values)
            return all(results) if isinstance(op, ast.And) else any(results)
        case ast.UnaryOp(op=op, operand=operand):
            value = _value(operand, view)
            return not value if isinstance(op, ast.Not) else -value
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_value(left, view), _value(right, view))
        case ast.Compare(left=left, ops=ops, comparators=others):
            values = [_value(item, view) for item in (left, *others)]
            return all(OPERATORS[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
    raise AssertionError(node)  # _kind lets nothing else through


def _mean_length(view: TextView) -> float:
    return int(view.words.length.sum(where=~view.words.symbol)) / view.real_words if view.real_words else 0.0


def _mean(lines: list[str]) -> float:
    return sum(map(len, lines)) / len(lines) if lines else 0.0
