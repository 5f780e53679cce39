"""The whole model with every Triton kernel in place: official outputs and gradients, training's step, no graph breaks."""

import importlib.util
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pellucid.config import ModelConfig, OptimizerConfig, TrainingConfig
from pellucid.data.dataset import Batch
from pellucid.model.attention import Attention, Visibility
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.model.kernels.gpu.copies import narrowed
from pellucid.model.layers import rotary_phases
from pellucid.observe.observer import SilentObserver
from pellucid.training.losses import linear_cross_entropy
from pellucid.training.optimizers import build_optimizer
from pellucid.training.step import StepResult, training_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PARITY = Path(__file__).parents[2] / "parity" / "test_official_outputs.py"


@pytest.fixture
def official():
    spec = importlib.util.spec_from_file_location("official_outputs", PARITY)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def small_model(**settings) -> Grok1:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = ModelConfig(vocab_size=50, **sizes | settings)
    return initialize(Grok1(config, device=DEVICE))


class Log(TorchDispatchMode):
    """Keeps the names of our operators that ran."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pellucid":
            self.seen.add(function._schema.name.removeprefix("pellucid::"))
        return function(*args, **(kwargs or {}))


def test_loss_and_gradients_equal_those_of_the_plain_functions(monkeypatch):
    torch.manual_seed(0)
    tokens = torch.randint(3, 50, (2, 40), device=DEVICE)
    segments = (torch.arange(40, device=DEVICE) // 13).expand(2, 40)
    results = []
    log = Log()
    for kernels in ("plain", "triton"):
        monkeypatch.setenv("PELLUCID_KERNELS", kernels)
        model = small_model()
        with log:
            hidden, _ = model.hidden_states(tokens, segment_ids=segments)
            loss = linear_cross_entropy(hidden.reshape(80, 32), model.embedding.weight, tokens.roll(-1, 1).reshape(-1))
            loss.total.backward()
        results.append([loss.total.detach(), *(p.grad for p in model.parameters())])
    assert log.seen == {"capped_attention", "capped_attention_backward", "experts", "experts_backward", "route", "rms_norm",
                        "rms_norm_backward", "rotate", "router_scores", "router_scores_backward"}  # fmt: skip
    for plain, fast in zip(*results, strict=True):
        assert (plain - fast).abs().max() <= 1e-5 * plain.abs().max() + (1e-3 if DEVICE == "cuda" else 0)


def steps_of(model: Grok1, optimizer, observer=None, steps: int = 4, clip: float = 0.5) -> list[StepResult]:
    settings = TrainingConfig(batch_size=2, micro_batch_size=2, gradient_clip=clip)
    generator, results = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        tokens = torch.randint(3, 50, (2, 25), generator=generator).to(DEVICE)
        rows = torch.arange(2, device=DEVICE)
        positions = torch.arange(24, dtype=torch.int32, device=DEVICE).expand(2, 24)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones_like(positions), positions, rows, rows)
        results.append(training_step(model, optimizer, [batch], settings, 1.0, observer or SilentObserver()))
    return results


class Looking(SilentObserver):
    def reads_gradients(self):
        return True

    def before_update(self, result):
        self.norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item()


@pytest.mark.parametrize("rule", ["adamw", "adam"])
def test_steps_equal_those_of_torch_s_optimizer(rule):
    """Clipped at every step; one of eight experts idles now and then."""
    config, found = OptimizerConfig(name=rule, learning_rate=0.01), []
    for fused in (False, True):
        model = small_model()
        optimizer = build_optimizer(model, config)
        if not fused:
            kind = torch.optim.AdamW if rule == "adamw" else torch.optim.Adam
            optimizer = kind(optimizer.param_groups, betas=(config.beta1, config.beta2), eps=config.eps)
        assert fused == hasattr(optimizer, "gradient_factor")
        results = steps_of(model, optimizer)
        assert all(result.applied and result.clip_factor < 1 for result in results)
        found.append([*(p.detach() for p in model.parameters()), torch.tensor([result.loss for result in results])])
    losses, ours = found[0].pop(), found[1].pop()
    assert torch.allclose(losses, ours, rtol=1e-5)
    for expected, ours in zip(*found, strict=True):  # where a gradient is almost zero, its last bit decides on the direction
        assert (expected - ours).abs().mean() < 1e-6 and (expected - ours).abs().max() < 0.01


def test_gradients_are_scaled_for_who_looks_at_them_and_the_weights_are_the_same_bits():
    found = []
    for observer in (SilentObserver(), Looking()):
        model = observer.model = small_model()
        results = steps_of(model, build_optimizer(model, OptimizerConfig(learning_rate=0.01)), observer)
        found.append([p.detach().clone() for p in model.parameters()])
    assert observer.norm == pytest.approx(0.5, rel=1e-5) and results[-1].grad_norm > 0.5
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_step_that_is_left_out_does_not_scale_the_next():
    class Poison(SilentObserver):
        def before_update(self, result):
            result.applied = False

    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    before = [p.detach().clone() for p in model.parameters()]
    steps_of(model, optimizer, Poison(), steps=1)
    assert optimizer.gradient_factor < 1 and all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    steps_of(model, optimizer, steps=1, clip=0.0)
    assert optimizer.gradient_factor == 1.0


def test_products_read_the_copy_that_the_update_wrote_and_never_an_old_one():
    model = small_model()
    model.compute_dtype = torch.bfloat16
    optimizer, weight = build_optimizer(model, OptimizerConfig(learning_rate=0.01)), model.layers[0].moe.down_proj
    assert narrowed(weight, torch.bfloat16) is not narrowed(weight, torch.bfloat16)  # cast, as long as no update has written one
    steps_of(model, optimizer, steps=2)
    copies = {name: narrowed(p, torch.bfloat16) for name, p in model.named_parameters() if p.ndim > 1 and "router" not in name}
    assert len(copies) == 1 + 2 * 6 and all(narrowed(p, torch.bfloat16) is copies[name]
                                            for name, p in model.named_parameters() if name in copies)  # fmt: skip
    close = lambda copy, weight: ((copy.float() - weight).abs() <= weight.abs() * 2**-7).all()
    assert all(close(copies[name], p.detach()) for name, p in model.named_parameters() if name in copies)
    steps_of(model, optimizer, steps=1)
    table = model.embedding.weight  # no expert that may idle
    assert narrowed(table, torch.bfloat16) is copies["embedding.weight"] and close(copies["embedding.weight"], table.detach())
    others = torch.optim.AdamW([p for p in model.parameters()], lr=0.01, fused=True)  # torch does not count what its fused ones change
    changes = [others.step, lambda: weight.mul_(2), lambda: weight[3].zero_(), lambda: setattr(weight, "data", weight.data.clone() + 1),
               lambda: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})]  # fmt: skip
    for change in changes:
        with torch.no_grad():
            change()
        assert close(narrowed(weight, torch.bfloat16), weight.detach())
        steps_of(model, optimizer, steps=1)  # some experts may idle
        assert close(narrowed(weight, torch.bfloat16), weight.detach())


def test_a_model_and_its_optimizer_go_on_when_copied():
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.01))
    steps_of(model, optimizer, steps=1)
    twin, its_optimizer = deepcopy((model, optimizer))
    for each in ((model, optimizer), (twin, its_optimizer)):
        steps_of(*each, steps=1)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), twin.parameters(), strict=True))


def test_sizes_that_no_descriptor_can_hold_take_the_plain_functions(monkeypatch):
    """Rows of 18 numbers are no multiple of 16 bytes."""
    tokens = torch.randint(3, 50, (1, 12), device=DEVICE)
    torch.manual_seed(0)
    model = small_model(hidden_size=18, head_dim=18, intermediate_size=24)
    with Log() as log:
        fast = model(tokens)
    monkeypatch.setenv("PELLUCID_KERNELS", "plain")
    assert (fast - model(tokens)).abs().max() < (1e-3 if DEVICE == "cuda" else 1e-5)
    assert log.seen and not log.seen & {"experts", "capped_attention"}


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 16), (torch.float32, 144)])
def test_attention_that_a_kernel_has_no_room_for_is_plain(dtype, head_dim):
    """fp16 cannot hold e^30; tiles of 144 and more columns do not fit beside one another."""
    attention = Attention(ModelConfig(vocab_size=8, hidden_size=32, num_attention_heads=2, head_dim=head_dim), device=DEVICE)
    for weight in attention.parameters():
        torch.nn.init.constant_(weight, 1 / 32)
    hidden = torch.full((1, 6, 32), 30.0, dtype=dtype, device=DEVICE)
    visibility = Visibility(torch.ones(1, 6, dtype=torch.bool, device=DEVICE))
    with Log() as log:
        out = attention(hidden, rotary_phases(torch.zeros(1, 6, device=DEVICE), head_dim, 1e4), visibility)
    assert "capped_attention" not in log.seen and torch.isfinite(out).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the bar is that of fp32 with an exact tanh")
@pytest.mark.parametrize("folder", ["f2_gqa3_pads"])
@pytest.mark.timeout(900)  # the interpreter is slow
def test_official_logits_and_gradients(official, folder):
    official.test_fp32_logits_equal_the_official_ones(folder)
    official.test_every_gradient_equals_the_official_one(folder)


def test_a_block_compiles_without_graph_breaks():
    model = small_model()
    tokens = torch.randint(3, 50, (2, 24), device=DEVICE)
    eager = model(tokens)
    layer = model.layers[0]
    layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    compiled = model(tokens)
    assert (compiled - eager).abs().max() < 1e-5
    compiled.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
