"""One training step on a CPU: Pellucid beside Hugging Face transformers' Mixtral and litgpt's, same sizes and tokens, in turn.

    python bench/cpu_step.py [--sizes small medium large] [--precisions fp32 bf16] [--steps 9] [--threads 1]
                             [--litgpt LITGPT/bin/python]

All run forward, loss with the balance loss, backward, clipping at norm 1 and fused AdamW; Mixtral's experts run by
grouped_mm, its fastest way; litgpt has no balance loss. Pellucid runs its own training step as `pellucid train` does,
with document masks, capped attention, four norms a layer and fp32 master weights; in bf16 its peers hold everything in
bf16, their fastest way, and Pellucid Adam's moments (`optimizer.state_dtype = "bf16"`). Each has a process of its own;
their steps alternate, so that other load on the machine hits all. Time is the process's CPU time (wall time beside it);
the ratio is the median over steps of the same number. Memory is the growth of the resident peak.
Needs: pip install transformers; and for litgpt, which wants older packages, an environment of its own:

    python -m venv LITGPT && LITGPT/bin/pip install torch==2.13.0 litgpt==0.5.13

A result already in the file, of another size or precision, stays there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "cpu_step.json"
LEARNING_RATE, BETAS, CLIP, BALANCE = 1e-3, (0.9, 0.95), 1.0, 0.01
SIZES = {  # layers, hidden, intermediate, query heads, key/value heads, vocabulary, rows, sequence
    "small": dict(L=4, D=256, F=512, H=4, K=1, V=4096, B=8, T=256),
    "medium": dict(L=8, D=512, F=1024, H=8, K=2, V=8192, B=4, T=512),
    "large": dict(L=2, D=1024, F=2048, H=16, K=4, V=8192, B=4, T=512),
}
EXPERTS, EXPERTS_PER_TOKEN = 8, 2
WARM_UP = 1  # steps of each that are not timed


def make_tokens(size: dict, steps: int) -> torch.Tensor:
    """[steps, B, T + 1]: a random chain, four possible followers of each token, few tokens frequent (Zipf's law)."""
    random = torch.Generator().manual_seed(0)
    followers = (size["V"] - 3) ** torch.rand((size["V"], 4), generator=random)
    followers = followers.long() + 2
    tokens = torch.empty(steps * size["B"], size["T"] + 1, dtype=torch.int64)
    tokens[:, 0] = torch.randint(3, size["V"], (len(tokens),), generator=random)
    for t in range(size["T"]):
        choice = torch.randint(0, 4, (len(tokens),), generator=random)
        tokens[:, t + 1] = followers[tokens[:, t], choice]
    return tokens.view(steps, size["B"], -1)


def grok_config(size: dict):
    from pellucid.config import ModelConfig

    return ModelConfig(
        vocab_size=size["V"], hidden_size=size["D"], intermediate_size=size["F"], num_hidden_layers=size["L"],
        num_attention_heads=size["H"], num_key_value_heads=size["K"], num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
    )  # fmt: skip


class Unobserved:
    """Stands where the observer stands and does nothing; Mixtral's step is not observed either."""

    def __getattr__(self, name: str):
        return lambda *arguments: None


class Pellucid:
    """`training_step` on micro-batches of the whole batch, as the loop calls it."""

    def __init__(self, size: dict, precision: str):
        from pellucid.config import OptimizerConfig, TrainingConfig
        from pellucid.model.grok import Grok1
        from pellucid.model.initialize import initialize
        from pellucid.training.device import keeping_freed_memory
        from pellucid.training.optimizers import build_optimizer

        self.memory = keeping_freed_memory()  # as a run does
        self.memory.__enter__()
        self.model = initialize(Grok1(grok_config(size)), seed=0)
        self.model.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        settings = OptimizerConfig(
            name="adamw", learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], state_dtype=precision
        )
        self.optimizer = build_optimizer(self.model, settings)
        self.settings = TrainingConfig(
            batch_size=size["B"], gradient_clip=CLIP, balance_loss="mixtral", balance_loss_weight=BALANCE
        )
        self.observer = Unobserved()

    def step(self, tokens: torch.Tensor) -> float:
        from pellucid.data.dataset import Batch
        from pellucid.training.step import training_step

        inputs, rows = tokens[:, :-1].contiguous(), torch.arange(len(tokens))
        segments = torch.ones_like(inputs, dtype=torch.int32)
        positions = torch.arange(inputs.shape[1], dtype=torch.int32).expand_as(inputs).contiguous()
        batch = Batch(inputs, tokens[:, 1:].contiguous(), segments, positions, rows, rows)
        return training_step(self.model, self.optimizer, [batch], self.settings, 1.0, self.observer).loss


class Mixtral:
    """transformers' MixtralForCausalLM, experts by grouped_mm, SDPA attention, fused AdamW."""

    def __init__(self, size: dict, precision: str):
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=size["V"], hidden_size=size["D"], intermediate_size=size["F"], num_hidden_layers=size["L"],
            num_attention_heads=size["H"], num_key_value_heads=size["K"], num_local_experts=EXPERTS,
            num_experts_per_tok=EXPERTS_PER_TOKEN, tie_word_embeddings=True, output_router_logits=True,
            router_aux_loss_coef=BALANCE, use_cache=False, sliding_window=None,
        )  # fmt: skip
        self.model = MixtralForCausalLM(config).to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
        self.model.set_experts_implementation("grouped_mm")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.1, fused=True
        )

    def step(self, tokens: torch.Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        targets = tokens[:, 1:].contiguous()
        result = self.model(tokens[:, :-1], labels=targets, shift_labels=targets)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return (result.loss - BALANCE * result.aux_loss).item()


class Litgpt:
    """litgpt's GPT with its LLaMAMoE, the embedding tied as in the others; its own chunked cross-entropy."""

    def __init__(self, size: dict, precision: str):
        from litgpt.config import Config
        from litgpt.model import GPT

        torch.manual_seed(0)
        config = Config(
            name="moe", block_size=size["T"], vocab_size=size["V"], padded_vocab_size=size["V"], n_layer=size["L"],
            n_head=size["H"], n_query_groups=size["K"], n_embd=size["D"], intermediate_size=size["F"],
            rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMoE", n_expert=EXPERTS, n_expert_per_token=EXPERTS_PER_TOKEN,
        )  # fmt: skip
        self.model = GPT(config)
        self.model.lm_head.weight = self.model.transformer.wte.weight
        for parameter in self.model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)  # as transformers does
        self.model.to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.1, fused=True
        )

    def step(self, tokens: torch.Tensor) -> float:
        from litgpt.utils import chunked_cross_entropy

        self.optimizer.zero_grad(set_to_none=True)
        scores = self.model(tokens[:, :-1].contiguous(), lm_head_chunk_size=128)
        loss = chunked_cross_entropy(scores, tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.item()


CONTENDERS = {"pellucid": Pellucid, "mixtral": Mixtral, "litgpt": Litgpt}


class Worker:
    """A contender in a process of its own, which steps when told and reports loss, CPU and wall seconds, peak memory."""

    def __init__(self, name: str, size: str, precision: str, options: argparse.Namespace):
        python = options.litgpt if name == "litgpt" else sys.executable
        command = [python, __file__, "--serve", name, "--sizes", size, "--precisions", precision]
        command += ["--steps", str(options.steps), "--threads", str(options.threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.reports: list[dict] = []
        self._answer()  # wait until it is built

    def step(self) -> None:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.reports.append(self._answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def column(self, key: str) -> list[float]:
        return [report[key] for report in self.reports]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a contender died; its message is above")
        return json.loads(line)


def serve(name: str, size_name: str, precision: str, steps: int) -> None:
    """The worker's side: one line of JSON when ready, and one after each step."""
    size = SIZES[size_name]
    batches = make_tokens(size, steps + WARM_UP)
    before = resident("VmRSS")
    contender = CONTENDERS[name](size, precision)
    print(json.dumps({"ready": name}), flush=True)
    for batch, _ in zip(batches, sys.stdin, strict=False):
        cpu, start = time.process_time(), time.perf_counter()
        loss = contender.step(batch)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - start
        print(json.dumps({"loss": loss, "cpu": cpu, "wall": wall, "peak": resident("VmHWM") - before}), flush=True)


def resident(field: str) -> float:
    """Megabytes: VmRSS now, VmHWM the most so far."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024


def compare(size_name: str, precision: str, options: argparse.Namespace) -> dict:
    """Alternate steps; the first of each warm up and are not timed."""
    size = SIZES[size_name]
    names = [name for name in CONTENDERS if name != "litgpt" or options.litgpt]
    workers = {name: Worker(name, size_name, precision, options) for name in names}
    for number in range(options.steps + WARM_UP):
        for name in list(workers)[:: 1 if number % 2 else -1]:
            workers[name].step()
    for worker in workers.values():
        worker.close()
    losses = {name: worker.column("loss") for name, worker in workers.items()}
    check_losses(losses, size["V"])
    cpu = {name: worker.column("cpu")[WARM_UP:] for name, worker in workers.items()}
    wall = {name: worker.column("wall")[WARM_UP:] for name, worker in workers.items()}
    flops = model_flops(size)
    against = lambda peer: [theirs / ours for ours, theirs in zip(cpu["pellucid"], cpu[peer], strict=True)]
    ratios = {peer: against(peer) for peer in names[1:]}
    return {
        "size": size_name, **size, "precision": precision, "threads": options.threads, "steps": options.steps,
        "ratio": {peer: statistics.median(values) for peer, values in ratios.items()},
        "ratio_range": {peer: [min(values), max(values)] for peer, values in ratios.items()},
        "ratio_of_fastest": {peer: min(cpu[peer]) / min(cpu["pellucid"]) for peer in ratios},
        "cpu_seconds": {name: statistics.median(values) for name, values in cpu.items()},
        "cpu_seconds_fastest": {name: min(values) for name, values in cpu.items()},
        "wall_seconds": {name: statistics.median(values) for name, values in wall.items()},
        "gflops": {name: flops / min(values) / 1e9 for name, values in cpu.items()},
        "peak_megabytes": {name: max(worker.column("peak")) for name, worker in workers.items()}, "losses": losses,
        "machine": machine(),
    }  # fmt: skip


def check_losses(losses: dict[str, list[float]], vocabulary: int) -> None:
    """All begin at about ln V, and none falls less than a third as far as another (they start and scale differently)."""
    for name, values in losses.items():
        assert abs(values[0] - math.log(vocabulary)) < 0.5, f"{name}: first loss {values[0]}"
    falls = [values[0] - values[-1] for values in losses.values()]
    assert min(falls) > 0.1 and min(falls) > max(falls) / 2, f"the losses do not fall alike: {losses}"


def model_flops(size: dict) -> float:
    """Of one step, by NVIDIA's formula (causal attention at half); equal for both."""
    from pellucid.model.size import flops_per_token

    return flops_per_token(grok_config(size), size["T"]) * size["B"] * size["T"]


def machine() -> dict:
    run = lambda *command: subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown")
    return {
        "processor": cpu, "cores": os.cpu_count(), "platform": platform.platform(),
        "python": platform.python_version(), "capabilities": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers") if find_spec(name)},
        "commit": run("git", "rev-parse", "--short", "HEAD"), "changed": run("git", "diff", "--name-only", "--", "../src"),
        "load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def report(result: dict) -> str:
    lines = [f"{result['size']} {result['precision']}"]
    for name, seconds in result["cpu_seconds"].items():
        line = (
            f"  {name:9} cpu s {seconds:.3f}  wall s {result['wall_seconds'][name]:.3f}  GFLOP/s {result['gflops'][name]:.0f}"
            f"  peak MB {result['peak_megabytes'][name]:.0f}  last loss {result['losses'][name][-1]:.3f}"
        )
        if name in result["ratio"]:
            low, high = result["ratio_range"][name]
            line += f"  takes {result['ratio'][name]:.2f} times ours ({low:.2f}..{high:.2f})"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--litgpt", help="python of litgpt's environment; without it litgpt is left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.serve:
        serve(options.serve, options.sizes[0], options.precisions[0], options.steps)
        return
    known = json.loads(options.out.read_text()) if options.out.exists() else []
    results = {(result["size"], result["precision"]): result for result in known}
    options.out.parent.mkdir(exist_ok=True)
    for size in options.sizes:
        for precision in options.precisions:
            results[size, precision] = compare(size, precision, options)
            print(report(results[size, precision]), flush=True)
            options.out.write_text(json.dumps(list(results.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
