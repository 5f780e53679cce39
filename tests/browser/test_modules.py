"""The page's own modules, called in the browser with many inputs and compared with Python."""

import random
import struct

import pytest
import torch

from pellucid.training.optimizers.adafactor import adafactor
from pellucid.training.optimizers.adam import adam
from pellucid.training.optimizers.lion import lion
from pellucid.training.optimizers.muon import muon
from pellucid.training.optimizers.sgd import sgd


@pytest.fixture(scope="module")
def call(chromium, address):
    """A function: `expression` of a module m of the page, for each of some inputs x."""
    page = chromium.new_context().new_page()
    page.goto(address)
    run = "async ([name, inputs]) => {{ const m = await import(`/page/${{name}}.js`); return inputs.map((x) => {expression}); }}"
    yield lambda name, expression, inputs: page.evaluate(run.format(expression=expression), [name, inputs])
    page.context.close()


def test_numbers_are_written_with_four_significant_digits_and_a_true_minus(call, number):
    rng = random.Random(0)
    values = [rng.uniform(-10, 10) * 10.0 ** rng.randint(-9, 9) for _ in range(400)] + [1.0, -3.0, 0.001, 99999.0, 1e5, 0.5]
    assert call("format", "m.number(x)", values) == [number(value) for value in values]
    assert call("format", "m.number(x)", ["nan", "inf", "-inf", None, 0]) == ["NaN", "∞", "−∞", "–", "0"]
    assert call("format", "m.count(x, true)", [999, 4352568, -123456]) == ["999", "4.353 M", "−123.5 k"]


def test_the_exact_value_is_the_shortest_decimal_of_that_float32(call):
    rng = random.Random(1)
    values = [struct.unpack("f", struct.pack("I", rng.getrandbits(31)))[0] for _ in range(300)]
    values = [value for value in values if value == value and abs(value) < 3e38]
    shown = call("format", "m.float32(x)", values)
    as_float32 = lambda text: struct.pack("f", float(text.replace("−", "-")))
    assert [as_float32(text) for text in shown] == [struct.pack("f", value) for value in values]


def test_a_difference_holds_both_texts_whole(call):
    rng = random.Random(2)
    text = lambda: "".join(rng.choice(["cat ", "dog ", "\n", "  ", "naïve", "é", ".", "日本", "x1"]) for _ in range(rng.randint(0, 60)))
    pairs = [[text(), text()] for _ in range(60)]
    pairs += [[a, a.replace("cat", "cow")] for a, _ in pairs]
    for (before, after), parts in zip(pairs, call("diff", "m.difference(x[0], x[1])", pairs), strict=True):
        assert "".join(text for kind, text in parts if kind != "new") == before
        assert "".join(text for kind, text in parts if kind != "gone") == after
        if before == after:
            assert all(kind == "same" for kind, _ in parts)


def test_colours_span_the_fixed_domain_of_a_statistic(call):
    stat = {"name": "update_ratio", "scale": "log", "low": 1e-6, "high": 1e-1}
    at = call("colour", "m.scaleOf(x[0], 'light').at(x[1])", [[stat, 1e-6], [stat, 1e-1], [stat, 10**-3.5]])
    assert at == pytest.approx([0, 1, 0.5])
    load = {"name": "load", "low": 0, "high": 3}
    assert call("colour", "m.scaleOf(x[0], 'dark').at(x[1])", [[load, 1], [load, 0.25], [load, 4]]) == pytest.approx([0.5, 0, 1])


def test_the_derivation_of_adam_with_decay_adds_up_as_printed(call):
    """Each moment's line, with the numbers that it names put in, gives the number beside it."""
    weight, gradient, settings = 0.5, 0.2, {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.3}
    state = {"step": 4, "exp_avg": 0.04, "exp_avg_sq": 0.002}
    exact = lambda values: {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    update = adam(torch.tensor(weight).double(), torch.tensor(gradient).double(), exact(state), **settings)
    edge = {"tensor": "w", "before": weight, "gradient": gradient, "clipped": gradient, "state": state, "terms": {},
            "after": update.weight_after.item(), "quantities": {name: value.item() for name, value in update.quantities.items()}}
    play = {"edges": [edge], "optimizer": {"w": {"rule": "adam", "settings": settings}}, "step_result": {"clip_factor": 1}, "shape": {}}
    chosen = {"fan": {"fan": {"slope": 1, "kind": "router", "index": [0]}}, "term": {"edge": 0, "a": 0.1, "j": 0, "wa": 0.05}}
    [lines] = call("play", "m.derivation(x[0], x[1])", [[play, chosen]])
    said = {what.split(":")[0]: (what, value) for what, _, value in lines}
    assert said["with L2 decay"] == ("with L2 decay: ĝ + 0.3·w", pytest.approx(gradient + 0.3 * weight))
    for name in ("first moment", "second moment"):
        text, value = said[name]
        formula = text.split(": ")[1].replace("·", "*").replace("s²", "s**2").replace("−", "-")
        assert eval(formula, {"s": said["with L2 decay"][1]}) == pytest.approx(value, rel=1e-3), formula


MOMENTUM = {"learning_rate": 0.02, "momentum": 0.9, "weight_decay": 0.1}


@pytest.mark.parametrize(("rule", "settings", "state"), [
    (sgd, {**MOMENTUM, "nesterov": True}, "momentum_buffer"), (sgd, {**MOMENTUM, "nesterov": False}, "momentum_buffer"),
    (sgd, {**MOMENTUM, "nesterov": True}, None), (sgd, {**MOMENTUM, "momentum": 0.0, "nesterov": True}, None),
    (muon, {**MOMENTUM, "nesterov": True}, "momentum_buffer"), (muon, {**MOMENTUM, "nesterov": False}, None),
    (lion, {"learning_rate": 0.02, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}, "exp_avg"),
    (adafactor, {"learning_rate": 0.02, "weight_decay": 0.1}, None)])  # fmt: skip
def test_each_line_of_a_derivation_follows_from_the_numbers_that_it_names(call, rule, settings, state):
    """A formula of scalars, with the numbers of its own line and of those before it put in, gives the number beside it."""
    tensor = lambda seed: torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight, gradient, known = tensor(0), tensor(1), {} if state is None else {state: tensor(2)}
    update, at = rule(weight, gradient, known, **settings), lambda values: {name: value[1, 2].item() for name, value in values.items()}
    edge = {"tensor": "w", "before": weight[1, 2].item(), "gradient": 0, "clipped": gradient[1, 2].item(), "state": at(known),
            "terms": at(update.terms), "after": update.weight_after[1, 2].item(), "quantities": at(update.quantities)}  # fmt: skip
    optimizer = {"w": {"rule": rule.__name__, "settings": settings}}
    play = {"edges": [edge], "optimizer": optimizer, "step_result": {"clip_factor": 1}, "shape": {}}
    chosen = {"fan": {"fan": {"slope": 1, "kind": "router", "index": [0]}}, "term": {"edge": 0, "a": 0.1, "j": 0, "wa": 0.05}}
    [lines] = call("play", "m.derivation(x[0], x[1])", [[play, chosen]])
    names = {"η": settings["learning_rate"], "λ": settings["weight_decay"], "μ": settings.get("momentum"), "β1": settings.get("beta1"),
             "β2": settings.get("beta2"), "w": edge["before"], "g": edge["clipped"], "b0": 0, "m0": 0,
             "sign": lambda v: (v > 0) - (v < 0)}  # fmt: skip
    plain = lambda text: text.translate(str.maketrans("·−₀₁₂", "*-012")).replace("ĝ", "g")
    checked = 0
    for what, formula, value in lines[8:-1]:
        if "=" in formula:
            name, formula = plain(formula).split(" = ")
            names[name] = value
        elif formula != "Δw" and formula:
            names[plain(formula)] = value
        said = formula if formula != "Δw" else what.split(": ")[1].split(", ")[0] if ": " in what else ""
        if said and not set("√ρ/^") & set(said) and "orth" not in said:
            assert eval(plain(said), names) == pytest.approx(value, rel=1e-9, abs=1e-12), (what, formula)
            checked += 1
    assert checked >= 2 - (rule is adafactor)
    assert all(formula for _, formula, _ in lines), "no line is without its formula"


@pytest.mark.parametrize(("precision", "made"), [("bf16", "in fp32: "), ("fp32", "")])
def test_a_gradient_made_in_bf16_stands_beside_the_one_that_the_proofs_have(call, precision, made):
    edge = {"tensor": "w", "index": [0], "before": 1, "after": 1, "gradient": 2.1e-4, "clipped": 2.1e-4, "autograd": 1.5e-4,
            "by_hand": 1.5e-4, "difference": None, "doubt": 0, "exact": True, "rule_after": 1, "state": {}, "terms": {},
            "quantities": {}}  # fmt: skip
    optimizer = {"w": {"rule": "sgd", "settings": {"learning_rate": 1, "weight_decay": 0}}}
    play = {"edges": [edge], "optimizer": optimizer, "precision": precision, "step_result": {"clip_factor": 1}, "shape": {}}
    chosen = {"fan": {"fan": {"slope": 1, "kind": "router", "index": [0]}}, "term": {"edge": 0, "a": 0.1, "j": 0, "wa": 0.05}}
    [lines] = call("play", "m.derivation(x[0], x[1])", [[play, chosen]])
    [proofs] = call("play", "m.proofsOf(x.edges[0], x)", [play])
    assert [value for _, formula, value in lines if formula in ("g", "g in fp32")] == ([2.1e-4, 1.5e-4] if made else [2.1e-4])
    assert [claim for claim, _, _ in proofs[:2]] == [f"{made}chain rule by hand = autograd", f"{made}finite difference = autograd"]
