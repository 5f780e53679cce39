"""What is recorded of a step equals what float64 arithmetic on copies of the whole model says."""

import math

import numpy as np
import pytest
import torch

from pellucid.config import make_config
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.observe.columns import INDEX
from pellucid.observe.reader import is_missing
from pellucid.observe.statistics import ParameterProbe, exponent_histogram
from pellucid.training.optimizers import build_optimizer

COLUMN = INDEX["param"]


def setting(name="adamw", dtype=torch.float32):
    config = make_config({
        "model": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4},
        "optimizer": {"name": name, "learning_rate": 1e-3},
    })
    model = initialize(Grok1(config.model, dtype=dtype), 0)
    return model, build_optimizer(model, config.optimizer)


def backward(model, seed):
    tokens = torch.randint(4, 300, (4, 17), generator=torch.Generator().manual_seed(seed))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    for p in model.parameters():
        p.grad = None
    loss.backward()


def measured_step(model, optimizer, probe, exact=None, clip=1.0, histograms=False):
    """One observed step: (frame, weights before, gradients as the optimizer saw them)."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(clip)
    copies = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    device = probe.before(exact, False)
    optimizer.step()
    device |= probe.after(True, histograms)
    arrays = {name: tensor.numpy() for name, tensor in device.items()}
    return probe.finish(arrays, probe.facts(clip, True)), copies, arrays


def value(frame, probe, row, stat):
    return float(frame[next(i for i, r in enumerate(probe.rows) if r.name == row), COLUMN[stat]])


def test_rows_are_every_tensor_every_expert_and_the_whole():
    model, optimizer = setting()
    rows = ParameterProbe(model, optimizer).rows
    names = [row.name for row in rows]
    assert names[-1] == "all" and len(names) == len(set(names))
    for name, weight in model.named_parameters():
        assert name in names
        if weight.ndim == 3:
            assert all(f"{name}[{e}]" in names for e in range(4))
    down = rows[names.index("layers.1.moe.down_proj[3]")]
    assert (down.layer, down.expert, down.role) == (1, 3, "down_proj") and down.numel == model.layers[1].moe.down_proj[3].numel()


@pytest.mark.parametrize("clip", [1.0, 0.25])
def test_norms_of_weight_and_gradient_are_exact_at_every_step(clip):
    model, optimizer = setting()
    probe = ParameterProbe(model, optimizer)
    backward(model, 1)
    frame, copies, _ = measured_step(model, optimizer, probe, clip=clip)
    for name, (weight, gradient) in copies.items():
        pieces = [(name, weight, gradient)]
        if weight.ndim == 3:
            pieces += [(f"{name}[{e}]", weight[e], gradient[e]) for e in range(len(weight))]
        for row, w, g in pieces:
            for stat, exact in (("weight_norm", w.double().norm()), ("clipped_norm", g.double().norm()),
                                ("gradient_norm", g.double().norm() / clip)):
                assert value(frame, probe, row, stat) == pytest.approx(exact.item(), rel=1e-5)  # float32 sums
    whole = math.sqrt(sum(w.double().square().sum().item() for w, _ in copies.values()))
    assert value(frame, probe, "all", "weight_norm") == pytest.approx(whole, rel=1e-5)


def test_the_recorded_update_is_weight_after_minus_weight_before():
    """Bit for bit on the sampled coordinates; and in its turn each tensor's norm and credit over all of them."""
    model, optimizer = setting()
    probe = ParameterProbe(model, optimizer)
    named = dict(model.named_parameters())
    for seed, p in enumerate(probe.parameters):
        backward(model, seed)
        frame, copies, _ = measured_step(model, optimizer, probe, exact=p, clip=0.5)
        for q in probe.parameters:
            change = named[q.name].detach() - copies[q.name][0]
            sampled = probe._buffers["d"][q.first : q.first + q.leaves, : q.count]
            assert torch.equal(sampled, q.samples(change.contiguous()))
        before, gradient = copies[p.name]
        change = named[p.name].detach().double() - before.double()
        assert value(frame, probe, p.name, "exact") == 1
        assert value(frame, probe, p.name, "update_norm") == pytest.approx(change.norm().item(), rel=1e-5)
        credit = (change * gradient.double() / 0.5).sum().item()
        assert value(frame, probe, p.name, "credit") == pytest.approx(credit, rel=1e-4)
        if p.leaves > 1:
            assert value(frame, probe, f"{p.name}[2]", "update_norm") == pytest.approx(change[2].norm().item(), rel=1e-5)


def test_sampled_statistics_are_close_to_those_of_all_elements():
    """1,024 coordinates of each leaf: an error of a few percent (1 / sqrt(2n) = 2.2 % for a norm)."""
    model, optimizer = setting()
    probe = ParameterProbe(model, optimizer)
    named = dict(model.named_parameters())
    previous = {}
    for seed in range(3):
        backward(model, seed)
        frame, copies, _ = measured_step(model, optimizer, probe)
        changes = {n: named[n].detach().double() - w.double() for n, (w, _) in copies.items()}
        if seed:
            for name, (_, gradient) in copies.items():
                d, g = changes[name], gradient.double()
                state = optimizer.state[named[name]]
                u = (state["exp_avg"] / (1 - 0.9 ** (seed + 1))).double()
                root = (state["exp_avg_sq"] / (1 - 0.95 ** (seed + 1))).double().sqrt()
                expected = {
                    "update_norm": d.norm().item(),
                    "adam_rms": (u / (root + 1e-8)).square().mean().sqrt().item(),
                    "staleness": (g / root.clamp(min=1e-8)).square().mean().sqrt().item(),
                }
                for stat, exact in expected.items():
                    assert value(frame, probe, name, stat) == pytest.approx(exact, rel=0.12), (name, stat)
                cosines = {"cos_descent": (-g, d), "cos_previous": (d, previous[name])}
                for stat, (a, b) in cosines.items():
                    exact = ((a * b).sum() / a.norm() / b.norm()).item()
                    assert value(frame, probe, name, stat) == pytest.approx(exact, abs=0.08), (name, stat)
        else:
            assert is_missing(frame[:, COLUMN["cos_previous"]]).all(), "there was no step before"
        previous = changes


def test_small_tensors_are_measured_whole_at_every_step():
    model, optimizer = setting()
    probe = ParameterProbe(model, optimizer)
    backward(model, 0)
    before = model.layers[0].moe.router.weight.detach().double().clone()
    frame, _, _ = measured_step(model, optimizer, probe)
    change = (model.layers[0].moe.router.weight.detach().double() - before).norm().item()
    assert value(frame, probe, "layers.0.moe.router.weight", "exact") == 1
    assert value(frame, probe, "layers.0.moe.router.weight", "update_norm") == pytest.approx(change, rel=1e-5)


def test_credit_predicts_the_loss_change_of_a_small_step():
    model, optimizer = setting("sgd")
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    probe = ParameterProbe(model, optimizer)
    tokens = torch.randint(4, 300, (4, 17), generator=torch.Generator().manual_seed(0))
    loss = lambda: torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    before = loss()
    before.backward()
    frame, copies, _ = measured_step(model, optimizer, probe)
    exact = sum(((dict(model.named_parameters())[n].detach() - w) * g).sum().item() for n, (w, g) in copies.items())
    assert value(frame, probe, "all", "credit") == pytest.approx(exact, rel=0.3)  # sampled: the gradient is heavy-tailed
    assert exact == pytest.approx((loss() - before).item(), rel=0.1)  # first order


def test_nan_and_infinities_are_counted_exactly_where_they_are():
    model, optimizer = setting()
    probe = ParameterProbe(model, optimizer)
    backward(model, 0)
    model.layers[0].moe.down_proj.grad[2, 0, :3] = math.nan
    model.layers[1].attention.q_proj.weight.grad[0, :2] = -math.inf
    model.final_norm.weight.data[1] = math.nan
    device = {k: t.numpy() for k, t in (probe.before(None, True) | probe.after(False, False)).items()}
    frame = probe.finish(device, probe.facts(1.0, False))
    assert value(frame, probe, "layers.0.moe.down_proj[2]", "gradient_nan") == 3
    assert value(frame, probe, "layers.0.moe.down_proj[1]", "gradient_nan") == 0
    assert value(frame, probe, "layers.1.attention.q_proj.weight", "gradient_inf") == 2
    assert value(frame, probe, "all", "gradient_nan") == 3 and value(frame, probe, "all", "gradient_inf") == 2
    assert value(frame, probe, "final_norm.weight", "weight_nonfinite") == 1
    assert math.isnan(value(frame, probe, "layers.0.moe.down_proj", "gradient_norm"))
    assert value(frame, probe, "all", "update_norm") == 0, "a skipped step moves nothing"
    uncounted = probe.finish({"norms": device["norms"]}, probe.facts(1.0, False))
    at = next(i for i, r in enumerate(probe.rows) if r.name == "all")
    assert is_missing(uncounted[at, COLUMN["gradient_nan"]][None])[0], "not counted is missing, not zero"


def test_without_adam_its_statistics_are_missing_never_zero():
    model, optimizer = setting("sgd")
    probe = ParameterProbe(model, optimizer)
    backward(model, 0)
    frame, _, _ = measured_step(model, optimizer, probe)
    for stat in ("adam_rms", "staleness", "epsilon"):
        assert is_missing(frame[:, COLUMN[stat]]).all()
    assert not is_missing(frame[:, COLUMN["update_norm"]]).any()


def test_bf16_weights_that_do_not_move_are_counted():
    model, optimizer = setting(dtype=torch.bfloat16)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    probe = ParameterProbe(model, optimizer)
    backward(model, 0)
    frame, _, _ = measured_step(model, optimizer, probe)
    name = "layers.0.attention.q_proj.weight"
    assert value(frame, probe, name, "unmoved") > 0.9 and value(frame, probe, name, "swallowed") > 0.9


def test_a_tensor_outside_the_optimizer_is_seen_not_to_move():
    model, optimizer = setting()
    for group in optimizer.param_groups:
        keep = [i for i, name in enumerate(group["names"]) if "layers.0.attention.q_proj" not in name]
        group["params"], group["names"] = [group["params"][i] for i in keep], [group["names"][i] for i in keep]
    probe = ParameterProbe(model, optimizer)
    backward(model, 0)
    frame, _, _ = measured_step(model, optimizer, probe)
    name = "layers.0.attention.q_proj.weight"
    assert value(frame, probe, name, "update_norm") == 0 and value(frame, probe, name, "gradient_norm") > 0
    assert math.isnan(value(frame, probe, name, "learning_rate"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponent_histograms_count_every_element_once_and_keep_the_special_ones_apart(dtype):
    values = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)) * 10
    values[0, :6] = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-39])
    values = values.to(dtype)
    counts = exponent_histogram(values, leaves=2).numpy()
    assert counts[:, :512].sum(1).tolist() == [500, 500]
    assert counts[0, 512:].tolist() == [2, 1, 2] and counts[1, 512:].tolist() == [int((values[1] == 0).sum()), 0, 0]
    finite = values[1].float().numpy()
    _, exponents = np.frexp(finite[finite > 0])
    expected = np.bincount(exponents - 1 + 127, minlength=256)
    np.testing.assert_array_equal(counts[1, :256], expected)


def test_probing_changes_nothing_in_training():
    plain, optimizer = setting()
    for seed in range(3):
        backward(plain, seed)
        optimizer.step()
    model, optimizer = setting()
    probe = ParameterProbe(model, optimizer)
    for seed in range(3):
        backward(model, seed)
        measured_step(model, optimizer, probe, exact=probe.parameters[seed], histograms=True)
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_settings_of_the_tensor_s_group_are_in_the_frame():
    model, optimizer = setting()
    probe = ParameterProbe(model, optimizer)
    backward(model, 0)
    frame, _, _ = measured_step(model, optimizer, probe)
    assert value(frame, probe, "layers.0.attention.q_proj.weight", "weight_decay") == pytest.approx(0.1)
    assert value(frame, probe, "embedding.weight", "weight_decay") == 0
    assert value(frame, probe, "embedding.weight", "learning_rate") == pytest.approx(1e-3)
