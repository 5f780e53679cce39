"""One GPU: kernels beside their peers, then whole training steps, in one run and one process; ratios and model FLOPs.

    python bench/gpu_step.py                       every part; writes bench/results/gpu_step.json
    python bench/gpu_step.py --parts attention experts
    python bench/gpu_step.py --tiny                tiny sizes on any device: does it all run? Writes nothing.

Parts: ceiling (8192^3 bf16 product), steps (a full-width Grok-1 layer with the tied embedding, and a model of 2.7 B; beside
transformers' Mixtral with grouped_mm), experts (beside three torch grouped_mm), attention (beside FlexAttention with the cap and
SDPA without it), loss (beside Liger where installed). Steps run with all our kernels (PELLUCID_KERNELS=triton),
clipping, AdamW, fp32 masters and observation on; `balanced` sends every token to the next two experts in turn, `real` is the
router's own choice.
Kernels' times are medians of CUDA events after warm-up, steps' of the clock on the wall, with their spread. Peers run at a batch
that they can hold, ours also at the largest that fits, and at that with the gradients of several such micro-batches summed before
the update, as training at scale does. MFU counts model FLOPs
(`flops_per_token`: 6 per active matrix weight, causal attention at half) against 989 TFLOP/s, the dense bf16 peak of an H100 or
H200, and against the product of this run.
Needs a CUDA GPU with triton; transformers and liger-kernel are optional peers, left out with a reason.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from pellucid.config import ModelConfig, make_config
from pellucid.data.dataset import Batch
from pellucid.model.attention import Visibility, chunked_capped_attention
from pellucid.model.grok import Grok1
from pellucid.model.kernels import gpu
from pellucid.model.moe import MoE, Routing
from pellucid.model.size import flops_per_token, parameter_counts
from pellucid.observe.observer import Observer
from pellucid.training.losses import linear_cross_entropy
from pellucid.training.optimizers import build_optimizer
from pellucid.training.step import training_step

RESULTS = Path(__file__).parent / "results" / "gpu_step.json"
PEAK = 989e12
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
PARTS = ("ceiling", "steps", "experts", "attention", "loss")
REPEATS, WARM_UP = (10, 3) if CUDA else (1, 0)
STEPS, STEPS_WARM_UP = (6, 3) if CUDA else (1, 1)  # of one micro-batch
MICRO_BATCHES = 4
LEARNING_RATE = 3e-4  # of all: they should learn alike
# Layers, hidden, intermediate, query heads, key/value heads, vocabulary. Rows by sequence: with peers, as many as fit, and as many
# as fit beside a sum of gradients.
MODELS = {
    "2.7 B": dict(L=8, D=1536, F=8192, H=12, K=2, V=131072,
                  peers={2048: 16, 8192: 4}, most={2048: 48, 8192: 12}, summed={2048: 48, 8192: 12}),
    "full-width layer": dict(L=1, D=6144, F=32768, H=48, K=8, V=131072,
                             peers={2048: 8, 8192: 2}, most={2048: 16, 8192: 4}, summed={2048: 12, 8192: 3}),
}  # fmt: skip
TINY = {"tiny": dict(L=2, D=64, F=96, H=4, K=2, V=256, peers={32: 2}, most={32: 3}, summed={32: 2})}


@contextlib.contextmanager
def kernels(name: str | None):
    """PELLUCID_KERNELS for a while."""
    before = os.environ.pop("PELLUCID_KERNELS", None)
    if name is not None:
        os.environ["PELLUCID_KERNELS"] = name
    yield
    os.environ.pop("PELLUCID_KERNELS", None)
    if before is not None:
        os.environ["PELLUCID_KERNELS"] = before


def seconds(call: Callable[[], object]) -> float:
    """Median time of one call on the device."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(REPEATS):
        if CUDA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measured(part: str, contenders: dict[str, Callable[[], object]], flops: float) -> Iterator[dict]:
    """A row for each contender; one that cannot run says why."""
    for name, call in contenders.items():
        try:
            time_s = seconds(call)
        except Exception as error:  # a peer that does not run here must not cost the others their numbers
            yield {"part": part, "name": name, "left_out": f"{type(error).__name__}: {error}"[:300]}
        else:
            yield {"part": part, "name": name, "ms": round(time_s * 1e3, 4), "tflops": round(flops / time_s / 1e12, 1)}
        torch.cuda.empty_cache() if CUDA else None


def forward_backward(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], object]:
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    grad: list[Tensor] = []

    def call():
        y = function(*leaves)
        grad[:] = grad or [torch.randn_like(y)]
        return torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad[0])

    return call


def bench_attention(tiny: bool) -> Iterator[dict]:
    for B, T, H, K, d in ((1, 64, 4, 2, 16),) if tiny else ((2, 8192, 48, 8, 128), (16, 2048, 12, 2, 128)):
        q, k, v = (torch.randn(B, K, *s, d, device=DEVICE, dtype=DTYPE) for s in ((T, H // K), (T,), (T,)))
        document = torch.zeros(B, T, dtype=torch.int32, device=DEVICE)
        settings = {"multiplier": d**-0.5, "cap": 30.0}

        def ours(q, k, v, document=document, settings=settings):
            from pellucid.model.kernels.gpu.attention import capped_attention, ranges

            return capped_attention(q, k, v, document, document, ranges(document, document), **settings)

        def plain(q, k, v, document=document, settings=settings):
            visible = Visibility(torch.ones_like(document, dtype=torch.bool))
            return chunked_capped_attention(q.transpose(2, 3), k, v, visible, exact=False, chunk_size=512, **settings)

        def by_head(q):
            return q.permute(0, 1, 3, 2, 4).flatten(1, 2)

        def flex(q, k, v):
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            if not hasattr(flex, "compiled"):
                flex.compiled = torch.compile(flex_attention, dynamic=False)
            if getattr(flex, "length", None) != q.shape[2]:
                flex.length = q.shape[2]
                flex.mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, flex.length, flex.length, device=DEVICE)
            capped = lambda score, b, h, i, j: 30.0 * torch.tanh(score / 30.0)
            return flex.compiled(by_head(q), k, v, score_mod=capped, block_mask=flex.mask, enable_gqa=True)

        sdpa = lambda q, k, v: F.scaled_dot_product_attention(by_head(q), k, v, is_causal=True, enable_gqa=True)
        contenders = {"ours (Triton)": ours, "ours (plain, chunked)": plain, "FlexAttention, tanh": flex,
                      "SDPA without the cap": sdpa}  # fmt: skip
        flops = 3 * 2 * B * H * T * T * d  # forward 4 T^2 d a head, halved by causality; backward counted at twice that
        shape = f"attention, forward and backward, B{B} T{T} {H}/{K} heads of {d}"
        yield from measured(shape, {name: forward_backward(f, q, k, v) for name, f in contenders.items()}, flops)


def bench_experts(tiny: bool) -> Iterator[dict]:
    for N, D, width in ((96, 32, 48),) if tiny else ((16384, 6144, 32768), (32768, 1536, 8192)):
        config = ModelConfig(vocab_size=8, hidden_size=D, intermediate_size=width, num_attention_heads=4, head_dim=16)
        moe = MoE(config, device=DEVICE)
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        x = torch.randn(N, D, device=DEVICE, dtype=DTYPE)
        for name, routing in (("real routing", moe.route(x)), ("balanced", balanced(N, x.device))):
            def mix(x, routing=routing, moe=moe):
                return moe.mix_plain(x, Routing(None, None, routing.expert_index_Nk, routing.gate_Nk.detach()))

            def ours(x, routing=routing, moe=moe):
                from pellucid.model.kernels.gpu.experts import experts

                return experts(x, routing.gate_Nk.detach(), routing.expert_index_Nk, moe.gate_up_proj, moe.down_proj)

            flops = 3 * 2 * (N * 2) * 3 * D * width
            calls = {"ours (Triton)": whole(ours, x, moe), "torch grouped_mm": whole(mix, x, moe)}
            yield from measured(f"experts, forward and backward, {N} tokens, {D} -> {width}, {name}", calls, flops)
        del moe


def whole(function: Callable[[Tensor], Tensor], x: Tensor, module: torch.nn.Module) -> Callable[[], object]:
    """Forward and backward with the gradients of the input and of the experts' weights."""
    leaf, weights = x.detach().requires_grad_(), [module.gate_up_proj, module.down_proj]
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(function(leaf), [leaf, *weights], grad)


def balanced(N: int, device: torch.device) -> Routing:
    first = torch.arange(N, device=device) % 8
    index = torch.stack([first, (first + 1) % 8], 1)
    scores = torch.full((N, 8), 0.125, device=device)
    return Routing(scores.log(), scores, index, scores.gather(1, index))


def bench_loss(tiny: bool) -> Iterator[dict]:
    for N, D, V in ((64, 32, 512),) if tiny else ((8192, 1536, 131072), (8192, 6144, 131072)):
        hidden = torch.randn(N, D, device=DEVICE, dtype=DTYPE)
        table, targets = torch.randn(V, D, device=DEVICE) / D**0.5, torch.randint(0, V, (N,), device=DEVICE)

        def ours(hidden, table, targets=targets):
            return linear_cross_entropy(hidden, table, targets).total

        def liger(hidden, table, targets=targets):
            from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

            return LigerFusedLinearCrossEntropyLoss(reduction="sum")(table.to(hidden.dtype), hidden, targets)

        for name, function, choice in (("ours (Triton rows)", ours, "triton"), ("ours (plain rows)", ours, "plain"),
                                       ("Liger fused linear cross-entropy", liger, None)):  # fmt: skip
            with kernels(choice):
                shape = f"linear cross-entropy, forward and backward, {N} tokens, {D} -> {V}"
                yield from measured(shape, {name: forward_backward(function, hidden, table)}, 6 * N * D * V)


def model_config(size: dict) -> ModelConfig:
    return ModelConfig(vocab_size=size["V"], hidden_size=size["D"], intermediate_size=size["F"], num_hidden_layers=size["L"],
                       num_attention_heads=size["H"], num_key_value_heads=size["K"], max_position_embeddings=131072)  # fmt: skip


def ours_step(size: dict, B: int, T: int, micro_batches: int, folder: Path) -> Callable[[], float]:
    """A whole step of ours on fresh tokens, as the loop makes it; returns its loss."""
    training = {"batch_size": B * micro_batches, "micro_batch_size": B, "balance_loss": "mixtral"}
    config = make_config({"model": model_config(size).model_dump(exclude={"preset"}), "data": {"sequence_length": T},
                          "training": training, "optimizer": {"name": "adamw", "learning_rate": LEARNING_RATE}})  # fmt: skip
    model = started(Grok1(config.model, device=DEVICE))
    model.compute_dtype, model.parity = DTYPE, False
    optimizer = build_optimizer(model, config.optimizer)
    observer = Observer(folder, model, optimizer, config)
    at = [0]

    def step() -> float:
        observer.begin_step(at[0])
        batches = [make_batch(B, T, size["V"]) for _ in range(micro_batches)]
        result = training_step(model, optimizer, batches, config.training, 1.0, observer)
        observer.end_step(at[0], result)
        at[0] += 1
        return result.loss

    step.close = observer.close
    return step


@torch.no_grad()
def started(model: Grok1) -> Grok1:
    """Starting weights of the scale that `initialize` gives, drawn on the device: seconds, not minutes."""
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.fill_((2 * len(model.layers)) ** -0.5 if ".post_" in name else 1.0)
        else:
            scale = 0.25 if name == "embedding.weight" else 0.1 if name.endswith("router.weight") else 1.0
            weight.normal_(0.0, scale * weight.shape[-1] ** -0.5)
    return model


def make_batch(B: int, T: int, V: int) -> Batch:
    """Rows that count upwards, each from its own start: quickly learnt, and no two alike."""
    tokens = (torch.randint(3, V, (B, 1), device=DEVICE) + torch.arange(T + 1, device=DEVICE)) % (V - 3) + 3
    positions = torch.arange(T, device=DEVICE, dtype=torch.int32).expand(B, T).contiguous()
    rows = torch.arange(B, device=DEVICE)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones_like(positions), positions, rows, rows)


def mixtral_step(size: dict, B: int, T: int, _micro_batches: int, _folder: Path, masters: bool = False) -> Callable[[], float]:
    """transformers' model, weights, gradients and moments all in bf16; masters: fp32 weights and moments beside them, as ours has."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=size["V"], hidden_size=size["D"], intermediate_size=size["F"], num_hidden_layers=size["L"],
                           num_attention_heads=size["H"], num_key_value_heads=size["K"], num_local_experts=8, num_experts_per_tok=2,
                           tie_word_embeddings=True, output_router_logits=True, use_cache=False, sliding_window=None)  # fmt: skip
    with torch.device(DEVICE):
        model = MixtralForCausalLM(config).to(DTYPE).train()
    model.set_experts_implementation("grouped_mm")
    weights = list(model.parameters())
    updated = [weight.detach().float().requires_grad_() for weight in weights] if masters else weights
    optimizer = torch.optim.AdamW(updated, lr=LEARNING_RATE, fused=True)

    def step() -> float:
        batch = make_batch(B, T, size["V"])
        optimizer.zero_grad(set_to_none=True)
        loss = model(batch.tokens_BT, labels=batch.targets_BT, shift_labels=batch.targets_BT).loss
        loss.backward()
        if masters:
            for weight, master in zip(weights, updated, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(updated, 1.0)
        optimizer.step()
        if masters:
            with torch.no_grad():
                torch._foreach_copy_(weights, updated)
        return loss.item()

    step.close = lambda: None
    return step


REAL, BALANCED = {"ours (Triton), real routing": False}, {"ours (Triton), balanced": True}
PEERS = ((ours_step, 1, REAL), (mixtral_step, 1, {"transformers Mixtral, grouped_mm, all in bf16": False}),
         (partial(mixtral_step, masters=True), 1, {"transformers Mixtral, grouped_mm, fp32 masters": False}))  # fmt: skip
CONTENDERS = {"peers": PEERS, "most": ((ours_step, 1, REAL | BALANCED),), "summed": ((ours_step, MICRO_BATCHES, REAL),)}


def bench_steps(tiny: bool) -> Iterator[dict]:
    for name, size in (TINY if tiny else MODELS).items():
        for T in size["peers"]:
            for rows, contenders in CONTENDERS.items():
                for make, micro_batches, kinds in contenders:
                    with kernels("triton"), tempfile.TemporaryDirectory() as folder:
                        yield from steps_of(name, size, size[rows][T], T, micro_batches, make, kinds, Path(folder))


def steps_of(
    model: str, size: dict, B: int, T: int, micro_batches: int, make: Callable, kinds: dict[str, bool], folder: Path
) -> Iterator[dict]:
    """A row for each kind of routing of one contender; its model is made once."""
    tokens, counts = micro_batches * B * T, parameter_counts(model_config(size))
    flops, step = flops_per_token(model_config(size), T) * tokens, None
    part = f"step, {model}, {f'{micro_batches} x ' if micro_batches > 1 else ''}{B} x {T}"
    for name, forced in kinds.items():
        row = {"part": part, "name": name, "parameters": counts["total"], "active": counts["active"]}
        with balanced_routing(forced):
            try:
                step = step or make(size, B, T, micro_batches, folder)
                losses = [step() for _ in range(STEPS_WARM_UP if micro_batches == 1 else 1)]
                torch.cuda.reset_peak_memory_stats() if CUDA else None
                time_s, spread = timed_steps(lambda step=step, losses=losses: losses.append(step()), micro_batches)
            except Exception as error:  # a peer that does not run here must not cost the others their numbers
                row["left_out"] = f"{type(error).__name__}: {error}"[:300]
            else:
                row |= {"ms": round(time_s * 1e3, 2), "spread": round(spread, 4), "tokens_per_second": round(tokens / time_s),
                        "tflops": round(flops / time_s / 1e12, 1), "mfu_989": round(flops / time_s / PEAK, 4),
                        "first_loss": losses[0], "last_loss": losses[-1],
                        "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if CUDA else None}  # fmt: skip
        yield row
    if step is not None:
        step.close()
    step = None
    gc.collect()
    torch.cuda.empty_cache() if CUDA else None


def timed_steps(step: Callable[[], object], micro_batches: int) -> tuple[float, float]:
    """(median seconds of whole steps, (slowest - fastest) / median)."""
    times = []
    for _ in range(STEPS if micro_batches == 1 else min(3, STEPS)):
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize() if CUDA else None
        times.append(time.perf_counter() - begin)
    middle = statistics.median(times)
    return middle, (max(times) - min(times)) / middle


@contextlib.contextmanager
def balanced_routing(forced: bool):
    original = MoE.route
    if forced:
        MoE.route = lambda self, x_ND: balanced(len(x_ND), x_ND.device)
    yield
    MoE.route = original


def bench_ceiling(tiny: bool) -> Iterator[dict]:
    n = 256 if tiny else 8192
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=DTYPE)
    yield from measured(f"product of {n}^3", {"torch.mm": lambda: a @ b}, 2 * n**3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on any device; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not CUDA and not options.tiny:
        sys.exit("gpu_step: no CUDA GPU that torch can use here; --tiny checks on any device that every part runs")
    rows = []
    for part in options.parts:
        print(part, flush=True)
        for row in globals()[f"bench_{part}"](options.tiny):
            rows.append(row)
            print("  ", row, flush=True)
            if not options.tiny:
                write(options.out, rows)
    if not options.tiny:
        print(f"written: {options.out}")


def write(path: Path, rows: list[dict]) -> None:
    ceiling = next((row["tflops"] for row in rows if row["part"].startswith("product")), None)
    for row in rows:
        if "mfu_989" in row and ceiling:
            row["share_of_product"] = round(row["tflops"] / ceiling, 4)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    versions = {}
    for name in ("torch", "triton", "transformers", "liger-kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    facts = {"machine": torch.cuda.get_device_name(), "python": platform.python_version(), "versions": versions, "commit": commit,
             "command": " ".join(["python", *sys.argv]), "kernels": gpu.KERNELS, "rows": rows}  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
