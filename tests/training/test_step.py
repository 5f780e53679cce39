"""The training step against plain autograd, closed forms and bit comparisons."""

import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from pellucid.config import ModelConfig, OptimizerConfig, TrainingConfig
from pellucid.data.dataset import IGNORE, Batch
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.observe.observer import SilentObserver
from pellucid.training import step as step_module
from pellucid.training.optimizers import build_optimizer
from pellucid.training.step import training_step

OPTIMIZERS = ["sgd", "adam", "adamw", "adafactor", "lion", "muon"]
LENGTHS = (24, 3, 17, 1)  # real tokens of the rows: micro-batches weigh very differently
V, T = 50, 24


def make_model(seed=1, dtype=torch.float32):
    config = ModelConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_experts=4)  # fmt: skip
    return initialize(Grok1(config, dtype=dtype), seed)


def make_batch(lengths=LENGTHS, seed=0):
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, V, (len(lengths), T), generator=random)
    targets = torch.randint(3, V, (len(lengths), T), generator=random)
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    positions = torch.arange(T, dtype=torch.int32).expand(len(lengths), T)
    ids = torch.arange(len(lengths))
    return Batch(tokens.masked_fill(~real, 0), targets.masked_fill(~real, IGNORE), real.int(), positions, ids, ids * 0)


def settings(**values):
    return TrainingConfig(**{"balance_loss": "none", "gradient_clip": 0.0, "batch_size": 4, **values})


def take_step(model, batches, optimizer=None, observer=None, factor=1.0, **values):
    optimizer = optimizer or build_optimizer(model, OptimizerConfig(name="sgd", learning_rate=0.1))
    return training_step(model, optimizer, batches, settings(**values), factor, observer or SilentObserver())


def gradients(model):
    return {name: p.grad.double().clone() for name, p in model.named_parameters()}


def snapshot(model, optimizer):
    """Every bit that a step may change."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, torch.Tensor):
                state[f"{key}.{name}"] = value.clone()
    return state


def assert_same_bits(before, after):
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].numpy().tobytes() == after[name].numpy().tobytes(), name


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_micro_batches_of_uneven_length_add_up_to_one_big_batch(size, z_loss):
    whole, parts, batch = make_model(), make_model(), make_batch()
    big = take_step(whole, [batch], z_loss=z_loss)
    small = take_step(parts, [batch[i : i + size] for i in range(0, 4, size)], z_loss=z_loss)
    assert big.tokens == small.tokens == sum(LENGTHS)
    assert small.loss == pytest.approx(big.loss, rel=1e-6) and small.z_loss == pytest.approx(big.z_loss, rel=1e-5)
    assert torch.equal(big.load_LE, small.load_LE) and int(big.load_LE.sum()) == 2 * 2 * sum(LENGTHS)
    expected = gradients(whole)
    for name, found in gradients(parts).items():
        assert relative_error(found, expected[name]) < 5e-6, name  # fp32 sums in another order


def test_gradients_of_the_whole_step_are_those_of_plain_cross_entropy():
    model, reference, batch = make_model(), make_model(), make_batch()
    result = take_step(model, [batch[0:1], batch[1:4]])
    logits = reference(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)
    loss = F.cross_entropy(logits.double().flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    expected = gradients(reference)
    for name, found in gradients(model).items():
        assert relative_error(found, expected[name]) < 1e-5, name  # fp32 products, other order of sums


def test_gradients_agree_with_finite_differences_in_float64():
    model, batch = make_model(dtype=torch.float64), make_batch()
    model.compute_dtype = torch.float64
    random = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(p.shape, generator=random, dtype=torch.float64) for n, p in model.named_parameters()}
    take_step(model, [batch[0:2], batch[2:4]], factor=0.0)
    slope = sum(float((p.grad.double() * direction[n]).sum()) for n, p in model.named_parameters())
    h, values = 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(direction[n].to(p.dtype), alpha=sign * h)
            values.append(plain_loss(model, batch))
            for n, p in model.named_parameters():
                p.sub_(direction[n].to(p.dtype), alpha=sign * h)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=3e-3)  # fp32 routers: 1e-7 / h


def plain_loss(model, batch):
    logits = model(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)
    return float(F.cross_entropy(logits.double().flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE))


def test_clipping_scales_every_gradient_to_the_largest_norm():
    free, clipped, batch = make_model(), make_model(), make_batch()
    take_step(free, [batch])
    raw = gradients(free)
    norm = math.sqrt(sum(float(g.square().sum()) for g in raw.values()))
    result = take_step(clipped, [batch], gradient_clip=norm / 4)
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    assert result.clip_factor == pytest.approx(0.25, rel=1e-6)
    found = gradients(clipped)
    assert math.sqrt(sum(float(g.square().sum()) for g in found.values())) == pytest.approx(norm / 4, rel=1e-6)
    for name in raw:
        torch.testing.assert_close(found[name], raw[name] / 4, rtol=1e-6, atol=0)


def test_gradients_below_the_limit_are_left_bit_for_bit():
    free, clipped, batch = make_model(), make_model(), make_batch()
    norm = take_step(free, [batch]).grad_norm
    result = take_step(clipped, [batch], gradient_clip=norm * 1.01)
    assert result.clip_factor == 1.0
    assert_same_bits(gradients(free), gradients(clipped))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradient_changes_nothing(name, bad):
    class Poison(SilentObserver):
        def after_backward(self, batch):
            model.layers[1].moe.down_proj.grad[0, 0, 0] = bad

    model, batch = make_model(), make_batch()
    optimizer = build_optimizer(model, OptimizerConfig(name=name))
    assert take_step(model, [batch], optimizer, balance_bias_rate=0.1).applied
    before = snapshot(model, optimizer)
    result = take_step(model, [batch], optimizer, Poison(), gradient_clip=1.0, balance_bias_rate=0.1)
    assert not result.applied and math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    assert_same_bits(before, snapshot(model, optimizer))
    assert take_step(model, [batch], optimizer).applied, "the next good step is taken"


def test_one_infinite_gradient_leaves_the_others_as_they_were_to_be_recorded():
    class Poison(SilentObserver):
        def after_backward(self, batch):
            poisoned.layers[1].moe.down_proj.grad[0, 0, 0] = math.inf

    free, poisoned, batch = make_model(), make_model(), make_batch()
    take_step(free, [batch])
    result = take_step(poisoned, [batch], observer=Poison(), gradient_clip=1.0)
    assert result.grad_norm == math.inf and result.clip_factor == 1.0
    expected = gradients(free)
    expected["layers.1.moe.down_proj"][0, 0, 0] = math.inf
    assert_same_bits(expected, gradients(poisoned))


def test_non_finite_loss_changes_nothing():
    model, batch = make_model(), make_batch()
    optimizer = build_optimizer(model, OptimizerConfig())
    take_step(model, [batch], optimizer)
    with torch.no_grad():
        model.embedding.weight[batch.tokens_BT[0, 0]] = math.nan
    before = snapshot(model, optimizer)
    result = take_step(model, [batch], optimizer, balance_loss="switch", balance_bias_rate=0.1)
    assert not result.applied and math.isnan(result.loss)
    assert_same_bits(before, snapshot(model, optimizer))


def send_away(model, expert):
    """No token chooses this expert in layer 0 any more."""
    model.layers[0].moe.balance_bias[expert] = -1e9


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_expert_without_tokens_does_not_move(name):
    model, batch = make_model(), make_batch()
    optimizer = build_optimizer(model, OptimizerConfig(name=name, weight_decay=0.5, learning_rate=0.01))
    take_step(model, [batch], optimizer, balance_loss="switch")  # every expert has momentum now
    send_away(model, 3)
    before = snapshot(model, optimizer)
    result = take_step(model, [batch[0:2], batch[2:4]], optimizer, balance_loss="switch")
    after = snapshot(model, optimizer)
    assert result.load_LE[0, 3] == 0 and (result.load_LE[0, :3] > 0).all()
    for tensor in ("gate_up_proj", "down_proj"):
        for key in (k for k in before if k.endswith(f"layers.0.moe.{tensor}") and before[k].ndim == 3):
            if len(before[key]) == 4:
                assert torch.equal(before[key][3], after[key][3]), key
                assert not torch.equal(before[key][:3], after[key][:3]), key


def test_balance_bias_moves_by_the_sign_of_each_load():
    model, batch, rate = make_model(), make_batch(), 0.01
    real = batch.targets_BT.flatten() != IGNORE
    _, routings = model.hidden_states(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)
    take_step(model, [batch[0:1], batch[1:4]], balance_bias_rate=rate)
    for layer, routing in zip(model.layers, routings, strict=True):
        load = [int((routing.expert_index_Nk[real] == expert).sum()) for expert in range(4)]
        mean = 2 * sum(LENGTHS) / 4
        expected = [rate * ((n < mean) - (n > mean)) for n in load]
        assert layer.moe.balance_bias.tolist() == pytest.approx(expected)


def test_balance_loss_is_weighted_by_real_tokens_over_micro_batches():
    from pellucid.training.balance import switch_loss

    model, batch = make_model(), make_batch()
    parts, shares = [batch[0:1], batch[1:4]], [24 / 45, 21 / 45]
    expected = 0.0
    for part, share in zip(parts, shares, strict=True):
        _, routings = model.hidden_states(part.tokens_BT, segment_ids=part.segment_ids_BT, positions=part.positions_BT)
        expected += share * switch_loss(routings, part.targets_BT.flatten() != IGNORE).item()
    result = take_step(model, parts, balance_loss="switch", router_z_loss=1e-3)
    assert result.balance_loss == pytest.approx(expected, rel=1e-5)
    assert result.router_z_loss > 0


def test_micro_batch_of_nothing_but_padding_adds_nothing():
    alone, padded = make_model(), make_model()
    one = take_step(alone, [make_batch((24, 3))], balance_loss="switch")
    two = take_step(padded, [make_batch((24, 3)), make_batch((0, 0))], balance_loss="switch")
    assert two.applied and one.loss == two.loss
    for name, gradient in gradients(padded).items():
        assert torch.equal(gradient, gradients(alone)[name]), name


def test_seconds_are_told_for_every_phase(monkeypatch):
    """With a clock whose every tick is twice as long as the one before: which ticks a phase got tells its place in the step."""
    times = (2.0**n for n in itertools.count())
    monkeypatch.setattr(step_module, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    result = take_step(make_model(), [make_batch()])
    assert result.clock.seconds() == {
        "forward": 1, "loss": 2, "backward": 8, "clip": 32, "update": 128, "observe": 4 + 16 + 64 + 256}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_seconds_on_a_gpu_are_those_of_its_own_clock():
    model, batch = make_model().cuda(), make_batch().to("cuda")
    take_step(model, [batch])
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = take_step(model, [batch])
    seconds = result.clock.seconds()
    assert min(seconds.values()) > 0 and sum(seconds.values()) <= time.perf_counter() - began
