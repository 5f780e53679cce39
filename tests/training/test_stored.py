"""Moments in bf16 or on the host: the rounding is unbiased, training stays near fp32's, and goes on bit for bit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_optimizers import RULES, E, Tiny, config, snapshot

from pellucid.config import UserError, make_config
from pellucid.model.kernels import native
from pellucid.observe.explain import explain
from pellucid.run import train
from pellucid.training.optimizers import (
    build_optimizer,
    explain_update,
    frozen_idle_experts,
    load_optimizer_state,
    optimizer_state,
    stored,
)
from pellucid.training.optimizers.rounding import random_bits, round_plain, round_stochastically, rounding_key

STORED = [name for name in RULES if name != "adafactor"]
int64 = st.integers(-(2**63), 2**63 - 1)


def squares32(counter, key):
    """Widynski 2020, figure 1, in Python's integers."""
    M = 2**64 - 1
    x = y = counter * key & M
    z = y + key & M
    for add in (y, z, y):
        x = x * x + add & M
        x = (x >> 32) | (x << 32) & M
    return (x * x + z & M) >> 32


@given(st.integers(0, 2**40), int64)
def test_random_bits_are_squares32(counter, key):
    assert random_bits(key, torch.tensor([counter])).item() == squares32(counter, key % 2**64)


@given(st.floats(width=32, allow_nan=True, allow_infinity=True), int64.map(lambda key: key | 1), st.integers(0, 2**40))
def test_a_rounded_number_is_a_neighbour_and_what_bf16_holds_stays(value, key, first):
    x = torch.tensor([value, -value])
    low = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)  # towards zero
    high = ((x.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    for rounded in (round_plain(x, key, first), round_stochastically(x, key, first)):
        if math.isnan(value):
            assert rounded.isnan().all()
            continue
        exact = low == x
        assert torch.equal(rounded.float()[exact], x[exact])
        assert ((rounded.float() == low) | (rounded.float() == high)).all()


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.14159, 1e-3 + 1e-8, 7e-39, 123456.78])
def test_the_mean_over_elements_and_over_steps_is_the_number_itself(value):
    n = 2**16
    x = torch.full((n,), value)
    over_elements = round_plain(x, rounding_key(0, 1, "w")).double()
    few = torch.full((1,), value)
    over_steps = torch.cat([round_plain(few, rounding_key(0, step, "w"), 5) for step in range(4096)]).double()
    spacing = (over_elements.max() - over_elements.min()).item()
    for rounded in (over_elements, over_steps):
        # a rounding is a coin with a standard deviation of at most half the spacing: five of the mean's
        assert abs(rounded.mean().item() - x[0].double().item()) <= 5 * spacing / 2 / len(rounded) ** 0.5
    # neighbours, and the two moments of one element, are drawn independently
    ups = (over_elements > x.double()).double()
    others = (round_plain(x, rounding_key(0, 1, "v")).double() > x.double()).double()
    for a, b in ((ups[1:], ups[:-1]), (ups, others)):
        if 0 < ups.mean() < 1:
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) <= 5 / n**0.5


@pytest.mark.skipif(not native.status().startswith("compiled"), reason="no C++ compiler: the plain function serves")
def test_the_compiled_rounding_is_the_plain_one():
    x = torch.randn(70_001) * torch.logspace(-40, 30, 70_001)
    assert torch.equal(round_stochastically(x, 12345 | 1, 2**33), round_plain(x, 12345 | 1, 2**33))


@pytest.mark.skipif(not native.status().startswith("compiled"), reason="no C++ compiler: pieces serve")
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_in_one_pass_is_adam_by_pieces(name, monkeypatch):
    def updated(in_one_pass):
        monkeypatch.setattr(stored.Stored, "_in_one_pass", lambda *_: in_one_pass)
        model = torch.nn.ParameterDict({"up_proj": torch.randn(3, 57, 101, generator=torch.Generator().manual_seed(0))})
        optimizer = build_optimizer(model, config(name, state_dtype="bf16", weight_decay=0.1, beta2=0.999), seed=7)
        for step in range(20):
            weight = model["up_proj"]
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step % 5 - 3)
            if step == 19:
                weight.grad[0, 0, 0] = torch.nan
            optimizer.step()
        return weight.detach(), optimizer.state[weight]

    (weight, state), (expected, by_pieces) = updated(True), updated(False)
    assert expected[0, 0, 0].isnan() and expected.isnan().sum() == 1
    assert torch.allclose(weight, expected, rtol=1e-4, atol=2e-5, equal_nan=True)
    for key in ("exp_avg", "exp_avg_sq"):  # another last bit of fp32 may tip a draw over
        same = (state[key] == by_pieces[key]) | (state[key].isnan() & by_pieces[key].isnan())
        assert same.float().mean() > 0.999, key


def test_an_average_that_stalls_when_rounded_to_nearest_follows_when_rounded_stochastically():
    beta2, n, steps = 0.999, 4096, 1500
    exact, nearest, ours = 1.0, torch.ones(n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16)
    for step in range(steps):
        exact = beta2 * exact + (1 - beta2) * 2.0
        nearest = (nearest.float() * beta2 + (1 - beta2) * 2.0).bfloat16()
        ours = round_stochastically(ours.float() * beta2 + (1 - beta2) * 2.0, rounding_key(0, step, "v"))
    assert nearest.float().mean() == 1.0 and exact > 1.7
    # An average remembers about 500 roundings of up to a spacing (2^-7) each: 0.06 at most by element, little in the mean.
    assert abs(ours.double().mean() - exact) < 5 * 0.06 / n**0.5
    assert (ours.double() - exact).abs().max() < 5 * 0.06


def train_tiny(name, steps, seed=0, beside=None, **fields):
    model = Tiny(torch.float32)
    optimizer = build_optimizer(model, config(name, **fields), seed)
    for step in range(steps):
        model.set_gradients(step)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", STORED)
def test_weights_stay_near_those_of_fp32_moments_and_the_state_is_half(name):
    fields = {"weight_decay": 0.0, "beta2": 0.999, "learning_rate": 1e-3}
    start, (exact, full), (rounded, half) = Tiny(torch.float32), train_tiny(name, 60, **fields), train_tiny(
        name, 60, state_dtype="bf16", **fields)  # fmt: skip
    size = lambda optimizer: sum(t.nbytes for t in optimizer_state(optimizer)[0].values() if t.ndim)
    assert size(half) * 2 == size(full) > 0
    moved = torch.cat([(a - b).flatten() for a, b in zip(exact.parameters(), start.parameters(), strict=True)])
    apart = torch.cat([(a - b).flatten() for a, b in zip(exact.parameters(), rounded.parameters(), strict=True)])
    # bf16 keeps 8 bits; Lion turns a moment near zero into another sign, Muon one matrix into another near it
    assert 0 < apart.norm() < (0.1 if name in ("lion", "muon") else 0.01) * moved.norm()


@pytest.mark.parametrize("name", STORED)
def test_the_plain_rule_explains_the_update_and_the_stored_moments(name):
    model, optimizer = train_tiny(name, 3, state_dtype="bf16")
    model.set_gradients(3)
    updates = {label: explain_update(optimizer, label) for label, _ in model.named_parameters()}
    optimizer.step()
    same = total = 0
    for label, weight in model.named_parameters():
        update = updates[label]
        scale = weight.abs().max()
        assert (update.weight_after - weight).abs().max() <= 1e-5 * scale, label  # Muon's products sum in another order
        assert torch.equal(update.explained(), update.change())
        held = optimizer.state[weight]
        assert held.keys() == update.state.keys()
        for key, value in held.items():
            assert value.dtype == update.state[key].dtype == (torch.bfloat16 if value.ndim else torch.float32)
            # the same draw; another last bit of fp32 may tip it over, to the other neighbour
            assert torch.allclose(value.float(), update.state[key].float(), rtol=2**-7, atol=1e-6)
            same, total = same + int((value == update.state[key]).sum()), total + value.numel()
    assert same > 0.99 * total, "the draws are the same"


@pytest.mark.parametrize("pieces", [{}, {"cpu": 32}])
@pytest.mark.parametrize("name", STORED)
def test_moments_on_the_host_give_the_same_bits(name, pieces, monkeypatch):
    monkeypatch.setattr(stored, "PIECE", stored.PIECE | pieces)
    plain, ordinary = train_tiny(name, 5)
    model, optimizer = train_tiny(name, 5, offload=True)
    assert type(optimizer) is not type(ordinary)
    found = snapshot(model, optimizer)
    for key, value in snapshot(plain, ordinary).items():
        assert torch.equal(value, found[key]), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_moments_beside_a_gpu_give_the_same_bits_in_pinned_memory(name, state_dtype, monkeypatch):
    monkeypatch.setattr(stored, "PIECE", {"cuda": 64})
    found = []
    for offload in (True, False):
        model = Tiny(torch.float32).cuda()
        optimizer = stored.Stored(
            build_optimizer(model, config(name, offload=True)).param_groups,
            dtype=torch.bfloat16 if state_dtype == "bf16" else None, offload=offload, seed=0)  # fmt: skip
        for step in range(5):
            model.set_gradients(step)
            optimizer.step()
        moments = [value for value in optimizer_state(optimizer)[0].values() if value.ndim]
        assert all(value.is_pinned() if offload else value.is_cuda for value in moments)
        found.append({key: value.cpu() for key, value in snapshot(model, optimizer).items()})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("name", STORED)
def test_resumed_is_unbroken_bit_for_bit_and_the_seed_matters(name):
    whole, optimizer = train_tiny(name, 6, state_dtype="bf16")
    model, first = train_tiny(name, 3, state_dtype="bf16")
    tensors = {label: value.clone() for label, value in optimizer_state(first)[0].items()}
    second = build_optimizer(model, config(name, state_dtype="bf16"))
    load_optimizer_state(second, tensors, optimizer_state(first)[1])
    for step in range(3, 6):
        model.set_gradients(step)
        second.step()
    found = snapshot(model, second)
    for key, value in snapshot(whole, optimizer).items():
        assert torch.equal(value, found[key]), key
    other = snapshot(*train_tiny(name, 6, seed=1, state_dtype="bf16"))
    assert any(not torch.equal(value, other[key]) for key, value in found.items())


@pytest.mark.parametrize("idle", [[False, True, False, True], [True, False, False, False], [True] * 4])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", STORED)
def test_idle_experts_stay_bit_for_bit_with_stored_moments_and_the_others_do_as_without(name, before, idle):
    label, idle_E = "layers.0.moe.down_proj", torch.tensor(idle)
    (model, optimizer), (free, unguarded) = (train_tiny(name, before, state_dtype="bf16", offload=True) for _ in range(2))
    for each in (model, free):
        each.set_gradients(before)
        each.get_parameter(label).grad[idle_E] = 0
    then, update = snapshot(model, optimizer), explain_update(optimizer, label, idle_E=idle_E)
    unguarded.step()
    with frozen_idle_experts(optimizer, {label: idle_E}):
        optimizer.step()
    reference = snapshot(free, unguarded)
    for key, value in snapshot(model, optimizer).items():
        if key.startswith(label) and value.ndim and len(value) == E:
            assert torch.equal(value[idle_E], then.get(key, torch.zeros_like(value))[idle_E]), key
            assert torch.equal(value[~idle_E], reference[key][~idle_E]), key
        else:
            assert torch.equal(value, reference[key]), key
    assert torch.equal(update.weight_after[idle_E], then[label][idle_E])
    for key, value in update.state.items():
        if value.ndim:
            assert torch.equal(value[idle_E], then.get(f"{label}@{key}", torch.zeros_like(value))[idle_E]), key


# ------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_with_bf16_moments_resumes_bit_for_bit_and_its_steps_are_explained(name, tiny_tables, tmp_path, final_state):
    def tables(**training):
        settings = tiny_tables(**training)
        return settings | {"optimizer": settings["optimizer"] | {"name": name, "state_dtype": "bf16"}}

    unbroken = train(tables(), run_dir=tmp_path / "unbroken")
    train(tables(max_steps=6), run_dir=tmp_path / "broken")
    broken = train(tables(max_steps=12), run_dir=tmp_path / "broken", resume=True)
    assert final_state(broken.directory)["step-12/optimizer.safetensors"]
    explanation = explain(unbroken.directory, 10, "layers.0.moe.down_proj")
    assert [proof for proof in explanation.proofs if proof.holds is False] == []
    with pytest.raises(UserError, match=r"cannot resume.*optimizer\.state_dtype was .*bf16"):
        train(tables(max_steps=14) | {"optimizer": {"name": name}}, run_dir=tmp_path / "broken", resume=True)


def test_a_rule_without_whole_moments_refuses_to_store_them():
    with pytest.raises(UserError, match="adafactor"):
        make_config({"optimizer": {"name": "adafactor", "state_dtype": "bf16"}})
