"""The whole model with every Triton kernel in place: official outputs and gradients, training's step, no graph breaks."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pellucid.config import ModelConfig
from pellucid.model.attention import Attention, Visibility
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.model.layers import rotary_phases
from pellucid.training.losses import linear_cross_entropy

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
    tokens = torch.randint(3, 50, (2, 40), device=DEVICE)
    segments = (torch.arange(40, device=DEVICE) // 13).expand(2, 40)
    results = []
    log = Log()
    for kernels in ("plain", "triton"):
        monkeypatch.setenv("PELLUCID_KERNELS", kernels)
        torch.manual_seed(0)
        model = small_model()
        with log:
            hidden, _ = model.hidden_states(tokens, segment_ids=segments)
            loss = linear_cross_entropy(hidden.reshape(80, 32), model.embedding.weight, tokens.roll(-1, 1).reshape(-1))
            loss.total.backward()
        results.append([loss.total.detach(), *(p.grad for p in model.parameters())])
    assert log.seen == {"capped_attention", "capped_attention_backward", "experts", "experts_backward", "route", "rms_norm",
                        "rms_norm_backward", "rotate"}  # fmt: skip
    for plain, fast in zip(*results, strict=True):
        assert (plain - fast).abs().max() <= 1e-5 * plain.abs().max() + (1e-3 if DEVICE == "cuda" else 0)


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
