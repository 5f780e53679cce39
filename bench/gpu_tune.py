"""One GPU: which tiles suit it. Each kernel's table is tried with other blocks, warps and stages, one at a time; prints times.

    python bench/gpu_tune.py                       all tables at the sizes of bench/gpu_step.py
    python bench/gpu_tune.py --tables attention.FORWARD experts.UP
    python bench/gpu_tune.py --tiny                a tiny size on any device: does it run?

A time is that of the kernel's forward and backward pass as training calls them, so that tables of one kernel compare. What wins is
written into the table by hand (model/kernels/gpu). Variants that the card has no room for, or whose results differ, say so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product

import torch
from gpu_step import CUDA, DEVICE, DTYPE, kernels, seconds
from torch import Tensor

from pellucid.config import ModelConfig
from pellucid.model.kernels.gpu import attention, experts
from pellucid.model.moe import MoE

WAYS = {  # of each table: its axes
    "attention.FORWARD": {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
    "attention.BACKWARD_Q": {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)},
    "attention.BACKWARD_KV": {"BLOCK_M": (32, 64, 128), "BLOCK_N": (64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    "experts.UP": {"BLOCK_O": (64, 128), "GROUP": (8, 16, 32), "num_warps": (4, 8), "num_stages": (3, 4)},
    "experts.DOWN": {"BLOCK_O": (128, 256), "GROUP": (8, 16), "num_warps": (4, 8), "num_stages": (3, 4)},
    "experts.WEIGHT": {"BLOCK_O": (128, 256), "BLOCK_I": (128, 256), "num_warps": (4, 8), "num_stages": (3, 4)},
    "experts.MUCH": {"flops": (0, 10**30)},  # all but the first product by cuBLAS, or none
}


def attention_pass(tiny: bool) -> Callable[[], tuple[Tensor, ...]]:
    B, K, T, G, d = (1, 2, 64, 2, 16) if tiny else (4, 2, 8192, 6, 128)
    q, k, v = (torch.randn(B, K, *s, d, device=DEVICE, dtype=DTYPE, requires_grad=True) for s in ((T, G), (T,), (T,)))
    document = torch.zeros(B, T, dtype=torch.int32, device=DEVICE)
    of, grad = attention.ranges(document, document), torch.randn(B, K, T, G, d, device=DEVICE, dtype=DTYPE)

    def run() -> tuple[Tensor, ...]:
        out = attention.capped_attention(q, k, v, document, document, of, multiplier=d**-0.5, cap=30.0)
        return (out, *torch.autograd.grad(out, [q, k, v], grad))

    return run


def experts_pass(tiny: bool) -> Callable[[], tuple[Tensor, ...]]:
    N, D, width = (96, 32, 48) if tiny else (32768, 1536, 8192)
    moe = MoE(ModelConfig(vocab_size=8, hidden_size=D, intermediate_size=width, num_attention_heads=4, head_dim=16), device=DEVICE)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    x = torch.randn(N, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
    routing, grad = moe.route(x.detach()), torch.randn(N, D, device=DEVICE, dtype=DTYPE)
    gate, weights = routing.gate_Nk.detach().requires_grad_(), [moe.gate_up_proj, moe.down_proj]

    def run() -> tuple[Tensor, ...]:
        out = experts.experts(x, gate, routing.expert_index_Nk, *weights)
        return (out, *torch.autograd.grad(out, [x, gate, *weights], grad))

    return run


def tune(name: str, axes: dict[str, tuple[int, ...]], run: Callable[[], tuple[Tensor, ...]]) -> None:
    module, table = {"attention": attention, "experts": experts}[name.split(".")[0]], name.split(".")[1]
    before = getattr(module, table)
    much = experts.MUCH
    if name in ("experts.DOWN", "experts.WEIGHT"):
        experts.MUCH = 10**30  # else cuBLAS serves at this size
    expected, found = [x.detach().float() for x in run()], []
    print(f"{name}, now {before if table == 'MUCH' else before[DTYPE.itemsize]}: {seconds(run) * 1e3:.3f} ms", flush=True)
    for values in product(*axes.values()):
        config = dict(zip(axes, values, strict=True))
        setattr(module, table, values[0] if table == "MUCH" else {DTYPE.itemsize: before[DTYPE.itemsize] | config})
        try:
            pairs = [(x.detach().float(), y) for x, y in zip(run(), expected, strict=True)]
            close = all(torch.allclose(x, y, rtol=0.02, atol=0.02 * float(y.abs().max())) for x, y in pairs)
            found.append((seconds(run) * 1e3 if close else float("inf"), config, "" if close else "other results"))
        except Exception as error:  # no room for it, mostly
            found.append((float("inf"), config, f"{type(error).__name__}: {error}"[:80]))
        torch.cuda.empty_cache() if CUDA else None
    experts.MUCH = much
    setattr(module, table, before)
    for time_ms, config, why in sorted(found, key=lambda row: row[0]):
        print(f"   {why or f'{time_ms:.3f} ms'}   {config}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--tiny", action="store_true", help="a tiny size, two variants of each table, on any device")
    options = parser.parse_args()
    if not CUDA and not options.tiny:
        parser.exit(2, "gpu_tune: no CUDA GPU that torch can use here; --tiny checks on any device that it runs\n")
    torch.manual_seed(0)
    with kernels("triton"):
        runs = {"attention": attention_pass(options.tiny), "experts": experts_pass(options.tiny)}
        for name in options.tables:
            axis = "BLOCK_N" if name.startswith("attention") else "BLOCK_O"
            few = options.tiny and name != "experts.MUCH"
            tune(name, {axis: (16, 32)} if few else WAYS[name], runs[name.split(".")[0]])


if __name__ == "__main__":
    main()
