"""Run by test_compile.py without the interpreter: compiles every kernel for a GPU target, here without a GPU.

    python compile_kernels.py cuda 90      prints one line a kernel: shared memory, what its loops became
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pellucid.model.kernels.gpu import attention, experts, loss, norm, rotary, router, routing, update


def blocks(config: dict, **letters: str) -> dict:
    """The configuration, and the signature of matrices that are described by their blocks: from the letters of their sides."""
    size = {"T": routing.TILE, **{name[-1]: value for name, value in config.items() if name.startswith("BLOCK_")}}
    return config | {name: f"tensordesc<bf16[{size[a]}, {size[b]}]>" for name, (a, b) in letters.items()}


ATTENTION = {"G": 6, "d": 128, "BLOCK_D": 128, "WIDE": False, "HARDWARE": True, "multiplier": "fp32", "cap": "fp32"}
EXPERTS = {"TILE": routing.TILE, "WIDE": False, "HARDWARE": True}
FLOATS = {"q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v", "x", "y", "weight", "gate_up", "inner", "down", "rows",
          "grad_gate_up", "residual", "products", "left", "right", "grad_x", "reached", "lost", "turned"}  # fmt: skip
FP32 = {"sums", "delta", "factor", "grad_factor", "scale", "nats", "normalizer", "logits", "bias", "probs", "gate",
        "cos", "sin", "exp_avg", "exp_avg_sq"}  # fmt: skip
ROUTER = {"weight": "*fp32", "grad": "*fp32", "scores": "*fp32"}
ADAM = ("clip", "keep", "l2", "beta1", "new1", "beta2", "new2", "rate", "root", "eps")
INT64 = {"index", "first_E", "tokens_E", "targets", "row"}
CASES = [
    (attention._forward, blocks({**ATTENTION, **attention.FORWARD[2]}, q="MD", k="ND", v="ND")),
    (attention._backward_q, blocks({**ATTENTION, **attention.BACKWARD_Q[2]}, q="MD", k="ND", v="ND", grad="MD")),
    (attention._backward_kv, blocks({**ATTENTION, **attention.BACKWARD_KV[2]}, q="MD", k="ND", v="ND", grad="MD")),
    (attention._turn_gradient, {**ATTENTION, "HEADS": attention.HEADS}),
    (attention._turn_gradient, {**ATTENTION, "HEADS": attention.HEADS, "lost": None}),  # fp32's
    (experts._up, blocks({**EXPERTS, **experts.UP[2]}, x="TI", weight="OI", inner="TO", gate_out="TO", up_out="TO")),
    (experts._product, blocks({**EXPERTS, "TRANSPOSED": True, **experts.DOWN[2]}, x="TI", weight="OI", y="TO")),
    (experts._product, blocks({**EXPERTS, "TRANSPOSED": False, **experts.DOWN[2]}, x="TI", weight="IO", y="TO")),
    (experts._open, {**EXPERTS, "BLOCK": experts.OPEN_BLOCK}),
    (experts._weight_gradient, blocks({**EXPERTS, "out": "*fp32", **experts.WEIGHT[2]}, left="MO", right="MI")),
    (experts._gather, {"BLOCK": 1024}),
    (experts._gather_sum, {"k": 2, "BLOCK": 1024, "index": "*i64"}),
    (routing._choose, {"E": 8, "k": 2, "BLOCK": routing.BLOCK, "BLOCK_E": 8}),
    (routing._count, {"E": 8, "k": 2, "BLOCK": routing.BLOCK, "BLOCK_E": 8}),
    (routing._place, {"E": 8, "k": 2, "BLOCK": routing.BLOCK, "BLOCK_E": 8}),
    (router._score, {"BLOCK_N": 4, "BLOCK_D": 8192, **ROUTER}),
    (router._score_backward_x, {"BLOCK_N": router.BLOCK_N, "BLOCK_D": router.BLOCK_D, **ROUTER}),
    (router._score_backward_weight, {"BLOCK_N": router.BLOCK_N, "BLOCK_D": router.BLOCK_D, "BLOCK_E": 16, **ROUTER}),
    (norm._forward, {"RESIDUAL": True, "BLOCK_D": 8192, "weight": "*fp32", "eps": "fp32"}),
    (norm._backward, {"BLOCK_D": 8192, "weight": "*fp32"}),
    (rotary._turn, {"G": 6, "d": 128, "BACK": False, "HEADS": 16, "PAIRS": 64}),
    (loss._rows, {"SLOPE": True, "BLOCK": 4096, "multiplier": "fp32", "z_weight": "fp32", "ignore": "i32"}),
    (update._adam, {"COPY": True, "BLOCK": update.BLOCK, "weight": "*fp32", "grad": "*fp32", "copy": "*bf16", "num_warps": 8,
                    "enable_fp_fusion": False, **dict.fromkeys(ADAM, "fp32")}),
    (update._round, {"BLOCK": update.BLOCK, "x": "*fp32", "rounded": "*bf16", "key": "i64", "first": "i64", "num_warps": 8}),
]


def kind(name: str, given: dict) -> str:
    if isinstance(given.get(name), str):
        return given[name]
    pointer = {**dict.fromkeys(FLOATS, "*bf16"), **dict.fromkeys(FP32, "*fp32"), **dict.fromkeys(INT64, "*i64")}
    others = {"key_document", "query_document", "first_key", "last_query", "token", "expert_of_tile", "counts", "before", "used",
              "run_start", "run_stop"}  # fmt: skip
    return pointer.get(name, "*i32" if name in others else "i32")


def main(backend: str, arch: str) -> None:
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    for kernel, given in CASES:
        options = {key: given[key] for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in given}
        constants = {name: given[name] for name in kernel.arg_names if name in given and not isinstance(given[name], str)}
        if backend != "cuda" and "HARDWARE" in constants:
            constants["HARDWARE"] = False
        signature = {name: "constexpr" if name in constants else kind(name, given) for name in kernel.arg_names}
        sizes = ("D", "F", "O", "I")
        aligned = [n for n, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name in sizes]
        attributes = {(n,): [["tt.divisibility", 16]] for n in aligned}  # as at run time, where sizes are multiples of 16
        compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
        code = compiled.asm["ttgir"]
        print(f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__}: {compiled.metadata.shared} bytes shared, "
              f"{code.count('warp_group_dot ')} wgmma, {code.count('async_copy_global')} async copies"
              + (", serialized" if arch == "90" and is_serialized(compiled.asm["ptx"]) else ""))  # fmt: skip


def is_serialized(ptx: str) -> bool:
    """Whether the assembler says that it lets no two wgmma run at once: they are a fifth slower then."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for ptxas in sorted(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):  # the one that knows this version
            done = subprocess.run([ptxas, "-v", "-arch=sm_90a", "-o", "/dev/null", file.name], capture_output=True, text=True)
            if done.returncode == 0:
                return "wgmma.mma_async instructions are serialized" in done.stderr + done.stdout
    raise RuntimeError("no ptxas of triton assembles what triton writes")


if __name__ == "__main__":
    main(*sys.argv[1:])
