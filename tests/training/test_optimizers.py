"""Plain rules against the fast optimizers, torch's own as independent references, and the anatomy of updates."""

import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from pellucid.config import ModelConfig, OptimizerConfig, UserError
from pellucid.training.optimizers import (
    build_optimizer,
    explain_update,
    frozen_idle_experts,
    is_hidden_matrix,
    load_optimizer_state,
    optimizer_parameters,
    optimizer_state,
    set_learning_rate,
)
from pellucid.training.optimizers.lion import lion
from pellucid.training.optimizers.muon import COEFFICIENTS, Muon, muon, orthogonalize
from pellucid.training.optimizers.update import account

RULES = ["sgd", "adam", "adamw", "adafactor", "lion", "muon"]
E, F, D, V = 4, 6, 8, 20


class Tiny(nn.Module):
    """Parameters with the names and shapes of a Grok-1 model of one layer."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "embedding.weight": (V, D),
            "layers.0.pre_attn_norm.weight": (D,),
            "layers.0.attention.q_proj.weight": (2 * D, D),
            "layers.0.attention.k_proj.weight": (4, D),
            "layers.0.moe.router.weight": (E, D),
            "layers.0.moe.gate_up_proj": (E, 2 * F, D),
            "layers.0.moe.down_proj": (E, D, F),
        }
        for name, shape in shapes.items():
            module = self
            *folders, leaf = name.split(".")
            for folder in folders:
                if not hasattr(module, folder):
                    module.add_module(folder, nn.Module())
                module = getattr(module, folder)
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            module.register_parameter(leaf, nn.Parameter(value))

    def set_gradients(self, step):
        generator = torch.Generator().manual_seed(1000 + step)
        for weight in self.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.grad = (noise * 10.0 ** (step % 3 - 1)).to(weight.device, weight.dtype)


def config(name, **fields):
    return OptimizerConfig(**{"name": name, "learning_rate": 0.01, "weight_decay": 0.1} | fields)


VARIANTS = [(name, {}) for name in RULES] + [
    ("sgd", {"nesterov": False}),
    ("sgd", {"momentum": 0.0}),
    ("muon", {"nesterov": False}),
    ("adamw", {"weight_decay": 0.0}),
]


# ------------------------------------------------------------------ plain and fast are the same rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "fields"), VARIANTS)
def test_plain_rule_equals_fast_optimizer_over_several_steps(name, fields, dtype):
    model = Tiny(dtype)
    optimizer = build_optimizer(model, config(name, **fields))
    # A few roundings of the weight (of size about 1) and of the step a step; Muon's products and Adafactor's root mean
    # squares sum some dozens of numbers, in another order.
    tolerance = torch.finfo(dtype).eps * (100 if name in ("muon", "adafactor") else 8)
    for step in range(6):
        set_learning_rate(optimizer, 1 - step / 10)
        model.set_gradients(step)
        updates = {label: explain_update(optimizer, label) for label, _ in model.named_parameters()}
        optimizer.step()
        for label, weight in model.named_parameters():
            update = updates[label]
            assert (update.weight_after - weight).abs().max() <= tolerance * weight.abs().max(), label
            held = {key: value for key, value in optimizer.state[weight].items() if value is not None}
            assert held.keys() == update.state.keys()
            for key, value in held.items():
                assert torch.allclose(value.double(), update.state[key].double(), rtol=20 * tolerance, atol=1e-30 +
                                      tolerance * value.abs().max().item()), (label, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "fields"), VARIANTS)
def test_terms_and_rounding_sum_exactly_to_the_change(name, fields, dtype):
    model = Tiny(dtype)
    optimizer = build_optimizer(model, config(name, **fields))
    for step in range(3):
        model.set_gradients(step)
        updates = {label: explain_update(optimizer, label) for label, _ in model.named_parameters()}
        optimizer.step()
        for label, weight in model.named_parameters():
            update = updates[label]
            assert torch.equal(update.explained(), update.change()), label
            # rounding is rounding: a few ulps of the weight (Muon's and Adafactor's own sums are inside `descent`)
            assert update.rounding.abs().max() <= 4 * torch.finfo(dtype).eps * weight.abs().max(), label
            settled = update.settle(weight.detach())  # against what the fast optimizer wrote
            assert torch.equal(settled.explained(), weight.detach().double() - update.weight.double()), label


value = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e4, max_value=1e4)


@settings(max_examples=500, deadline=None)
@given(value, value, st.floats(-4, 4), st.floats(-2, 2))
@example(1.0, 1.0 + 2**-23, -1e-11, 0.0)  # the difference itself rounds here
@example(1e-30, 1.0, 1 / 3, 1 / 7)
@example(1.0, 1.0, 1e-7, 1 / 7)  # a step too small for the weight
def test_the_sum_closes_exactly_for_any_causes_within_rounding_of_the_change(weight, after, ulps, split):
    weight, after = torch.tensor([weight]), torch.tensor([after])
    causes = after.double() - weight.double() + ulps * 2**-23 * torch.maximum(weight.abs(), after.abs())
    update = account(weight, after, {"a": causes * split, "b": causes * (1 - split)}, {})
    assert torch.equal(update.explained(), update.change())


def test_adam_terms_tell_this_gradient_from_earlier_ones():
    model = Tiny()
    optimizer = build_optimizer(model, config("adamw"))
    model.set_gradients(0)
    label = "layers.0.attention.q_proj.weight"
    first = explain_update(optimizer, label)
    assert not first.terms["momentum"].any()
    assert torch.allclose(first.terms["decay"], -0.01 * 0.1 * first.weight)
    assert torch.allclose(first.terms["gradient"], -0.01 * first.quantities["slope"].sign(), rtol=1e-5)
    optimizer.step()
    model.set_gradients(1)
    second = explain_update(optimizer, label)
    m_hat = (0.9 * 0.1 * first.quantities["slope"] + 0.1 * second.quantities["slope"]) / (1 - 0.9**2)
    assert torch.allclose(second.quantities["m_hat"], m_hat)
    descent = second.terms["momentum"] + second.terms["gradient"]
    assert torch.allclose(descent, -0.01 * second.quantities["direction"])


def test_explaining_changes_nothing():
    model = Tiny()
    optimizer = build_optimizer(model, config("adamw"))
    model.set_gradients(0)
    optimizer.step()
    before = [t.clone() for t in (*model.parameters(), *optimizer_state(optimizer)[0].values())]
    explain_update(optimizer, "embedding.weight")
    after = [*model.parameters(), *optimizer_state(optimizer)[0].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_non_finite_gradient_stays_visible_in_the_anatomy():
    model = Tiny()
    optimizer = build_optimizer(model, config("adamw"))
    model.set_gradients(0)
    model.embedding.weight.grad[0, 0] = torch.nan
    update = explain_update(optimizer, "embedding.weight")
    assert update.rounding[0, 0].isnan() and update.weight_after[0, 0].isnan()
    assert update.rounding.isnan().sum() == 1


def test_explaining_an_unknown_parameter_names_it():
    optimizer = build_optimizer(Tiny(), config("adamw"))
    with pytest.raises(UserError, match=r"layers\.9"):
        explain_update(optimizer, "layers.9")
    with pytest.raises(UserError, match="no gradient"):
        explain_update(optimizer, "embedding.weight")


# ------------------------------------------------------------------------- independent references


def test_lion_by_hand():
    # m = 0.5, g = -1: blend 0.9 * 0.5 - 0.1 = 0.35 > 0, so w falls by lr; then m = 0.99 * 0.5 - 0.01
    update = lion(torch.tensor([2.0]).double(), torch.tensor([-1.0]).double(), {"exp_avg": torch.tensor([0.5]).double()},
                  learning_rate=0.1, beta1=0.9, beta2=0.99, weight_decay=0.5)
    assert torch.allclose(update.weight_after, torch.tensor([2.0 - 0.1 - 0.1 * 0.5 * 2.0]).double())
    assert torch.allclose(update.state["exp_avg"], torch.tensor([0.485]).double())


def test_orthogonalize_maps_singular_values_by_the_quintic():
    """Newton-Schulz acts on singular values alone: U p(p(...S/||S||)) V^T, computed here by an SVD."""
    stack = torch.randn(3, 2 * 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalize(stack, parts=2)
    a, b, c = COEFFICIENTS
    for expert in range(3):
        for rows in (slice(0, 5), slice(5, 10)):  # the two halves are matrices of their own
            u, s, vh = torch.linalg.svd(stack[expert, rows], full_matrices=False)
            s = s / s.norm()
            for _ in range(5):
                s = a * s + b * s**3 + c * s**5
            assert torch.allclose(found[expert, rows], u @ s.diag() @ vh, atol=1e-12)
            assert (0.5 < s).all() and (s < 1.3).all()
    tall = stack[0].T
    assert torch.allclose(orthogonalize(tall), orthogonalize(stack[0]).T, atol=1e-12)
    assert not orthogonalize(torch.zeros(2, 3, 4)).any()


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torchs_muon_on_matrices(nesterov, monkeypatch):
    """torch's works on 2-D parameters only, and rounds to bf16: without that rounding they agree in float64."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    generator = torch.Generator().manual_seed(0)
    random = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    ours = [nn.Parameter(random(shape)) for shape in ((12, 8), (8, 12), (6, 6))]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    group = {"params": ours, "names": ["a", "b", "c"], "rule": "muon", "parts": [1, 1, 1], "dtype": None}
    rest = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    fast = Muon([group], rest, lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = random(a.shape)
            b.grad = a.grad.clone()
        fast.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_bf16_newton_schulz_stays_near_the_exact_one():
    """The choice on GPUs: bf16 keeps 8 bits, and five rounds of products lose some more."""
    stack = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonalize(stack.double()), orthogonalize(stack, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 0.05


def test_stacked_experts_and_their_halves_are_matrices_of_their_own():
    """gate_up_proj [E, 2F, D] moves as 2E separate matrices would: in float64, to rounding."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, E, 2 * F, D, generator=generator, dtype=torch.float64)
    kwargs = {"learning_rate": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    whole = muon(weight, gradient, {}, parts=2, **kwargs).weight_after
    for expert in range(E):
        for rows in (slice(0, F), slice(F, 2 * F)):
            alone = muon(weight[expert, rows], gradient[expert, rows], {}, **kwargs).weight_after
            assert torch.allclose(whole[expert, rows], alone, atol=1e-13)


# -------------------------------------------------------------------------------- groups and rates


@pytest.mark.parametrize("name", RULES)
def test_decay_falls_on_hidden_matrices_only(name):
    model = Tiny()
    optimizer = build_optimizer(model, config(name))
    decays = {label: group["weight_decay"] for label, _, group in optimizer_parameters(optimizer)}
    matrices = {"attention.q_proj.weight", "attention.k_proj.weight", "moe.gate_up_proj", "moe.down_proj"}
    expected = {n: 0.1 if any(n.endswith(m) for m in matrices) else 0.0 for n, _ in model.named_parameters()}
    assert decays == expected
    assert all(model.get_parameter(n) is weight for n, weight, _ in optimizer_parameters(optimizer))


def test_groups_of_the_real_model():
    from pellucid.model.grok import Grok1

    model = Grok1(ModelConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    decayed = {name for name, weight in model.named_parameters() if is_hidden_matrix(name, weight)}
    per_layer = [*(f"attention.{m}_proj.weight" for m in "qkvo"), "moe.gate_up_proj", "moe.down_proj"]
    assert decayed == {f"layers.{i}.{m}" for i in range(2) for m in per_layer}
    names = [name for name, _, _ in optimizer_parameters(build_optimizer(model, config("adamw")))]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_learning_rate_is_the_peak_of_each_group_times_the_factor():
    optimizer = build_optimizer(Tiny(), config("muon", muon_learning_rate=0.05, learning_rate=0.001))
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    rates = {group["rule"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"muon": 0.0125, "adamw": 0.00025}


# ------------------------------------------------------------------------------------ idle experts


@pytest.mark.parametrize("idle", [[False, True, False, True], [True] * 4])
@pytest.mark.parametrize("first_idle_step", [0, 2])
@pytest.mark.parametrize("name", RULES)
def test_idle_experts_stay_bit_for_bit_and_the_others_do_as_without(name, first_idle_step, idle):
    plain, frozen = Tiny(torch.float32), Tiny(torch.float32)
    plain_optimizer, optimizer = (build_optimizer(model, config(name)) for model in (plain, frozen))
    idle_E = torch.tensor(idle)
    labels = ["layers.0.moe.gate_up_proj", "layers.0.moe.down_proj"]
    for step in range(first_idle_step + 1):
        for model in (plain, frozen):
            model.set_gradients(step)
            if step == first_idle_step:
                for label in labels:
                    model.get_parameter(label).grad[idle_E] = 0
        if step == first_idle_step:
            before = snapshot(frozen, optimizer)
            updates = {label: explain_update(optimizer, label, idle_E=idle_E) for label in labels}
            with frozen_idle_experts(optimizer, {label: idle_E for label in labels} | {"unknown": idle_E}):
                optimizer.step()
        else:
            optimizer.step()
        plain_optimizer.step()
    after, reference = snapshot(frozen, optimizer), snapshot(plain, plain_optimizer)
    for key, value in after.items():
        if key.split("@")[0] in labels and value.ndim > 1 and len(value) == E:
            assert torch.equal(value[~idle_E], reference[key][~idle_E]), key
            assert torch.equal(value[idle_E], before.get(key, torch.zeros_like(value))[idle_E]), key
        else:
            assert torch.equal(value, reference[key]), key
    for label, update in updates.items():
        assert torch.equal(update.weight_after[idle_E], update.weight[idle_E])
        assert torch.equal(update.explained(), update.change())
        assert all(not term[idle_E].any() for term in update.terms.values())
        settled = update.settle(frozen.get_parameter(label).detach())
        assert not settled.rounding[idle_E].any()
    optimizer.step()  # goes on from there


def test_without_the_guard_an_idle_expert_would_drift():
    """Why the guard exists."""
    model = Tiny()
    optimizer = build_optimizer(model, config("adamw"))
    model.set_gradients(0)
    optimizer.step()
    model.set_gradients(1)
    weight = model.get_parameter("layers.0.moe.down_proj")
    weight.grad[1] = 0
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight[1], before[1])


def test_bias_correction_of_an_early_idle_expert_is_as_documented():
    for beta2, size in ((0.95, 0.447), (0.999, 3.16)):
        model = Tiny()
        optimizer = build_optimizer(model, config("adamw", beta2=beta2, weight_decay=0.0))
        weight = model.get_parameter("layers.0.moe.down_proj")
        idle_E = torch.tensor([True, False, False, False])
        for step in range(200 if beta2 == 0.95 else 20000):
            if step % 100 and step < 19900 and beta2 == 0.999:
                optimizer.state[weight]["step"] += 1  # the count is all that matters here
                continue
            model.set_gradients(0)
            weight.grad[0] = 0
            with frozen_idle_experts(optimizer, {"layers.0.moe.down_proj": idle_E}):
                optimizer.step()
        model.set_gradients(0)
        direction = explain_update(optimizer, "layers.0.moe.down_proj").quantities["direction"][0]
        assert torch.allclose(direction.abs(), torch.full_like(direction, size), rtol=2e-3)


def snapshot(model, optimizer):
    tensors, _ = optimizer_state(optimizer)
    found = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for label, value in tensors.items():
        key, _, name = label.partition(".")
        found[f"{name}@{key}"] = value.clone()
    return found


# ------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("name", RULES)
def test_state_goes_through_named_tensors_and_training_goes_on_bit_for_bit(name):
    whole, halves = Tiny(torch.float32), Tiny(torch.float32)
    optimizer = build_optimizer(whole, config(name))
    first = build_optimizer(halves, config(name))
    for step in range(3):
        for model, o in ((whole, optimizer), (halves, first)):
            model.set_gradients(step)
            o.step()
    tensors, facts = optimizer_state(first)
    tensors = {label: value.clone() for label, value in tensors.items()}
    facts = json.loads(json.dumps(facts))
    second = build_optimizer(halves, config(name))
    load_optimizer_state(second, tensors, facts)
    for step in range(3, 6):
        for model, o in ((whole, optimizer), (halves, second)):
            model.set_gradients(step)
            o.step()
    for key, value in snapshot(whole, optimizer).items():
        assert torch.equal(value, snapshot(halves, second)[key]), key


def test_state_of_another_rule_or_model_is_refused_by_name():
    model = Tiny()
    optimizer = build_optimizer(model, config("adamw"))
    model.set_gradients(0)
    optimizer.step()
    tensors, facts = optimizer_state(optimizer)
    with pytest.raises(UserError, match=r"embedding.weight.* adamw .* lion"):
        load_optimizer_state(build_optimizer(model, config("lion")), tensors, facts)
    with pytest.raises(UserError, match=r"exp_avg\.layers\.7"):
        load_optimizer_state(optimizer, tensors | {"exp_avg.layers.7": torch.zeros(1)}, facts)
    label = next(label for label in tensors if label.startswith("exp_avg."))
    with pytest.raises(UserError, match="is of shape"):
        load_optimizer_state(optimizer, tensors | {label: tensors[label][:1]}, facts)
