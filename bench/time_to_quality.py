"""Held-out loss after a fixed number of characters, and the seconds it took: Pellucid beside a plain dense transformer.

    python bench/time_to_quality.py SHAKESPEARE.txt [--seeds 0 1 2]
    python bench/time_to_quality.py SHAKESPEARE.txt --tune --seeds 0 --variants pellucid --set muon_learning_rate=0.03

The recipe is nanoGPT's for a CPU (train_shakespeare_char): the first 90 % of the text train, the rest is held out;
2,000 steps of 12 x 64 characters; 4 layers, 4 heads, width 128, 0.80 M parameters. `reference` is that recipe in plain
PyTorch. `pellucid` trains a Grok-1 model with no more active parameters on no more characters, by the product's own
model, optimizers, schedule and training step; the other variants take one of its ideas away (the ablation). Loss: nats
per character over the whole held-out text in windows of 64, side by side. Seconds: from before the model is built to the
last step, the compilation of the CPU kernels included (each process starts with an empty cache), evaluation left out.
Each runs on one thread and all at the same time, so that what else the machine does hits all alike. CPU seconds are what
the comparison rests on. --tune holds out the last tenth of the *training* text instead and
never reads the real held-out text; so do the ablation and every choice of a setting.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from cpu_step import Unobserved, machine
from torch import Tensor, nn
from torch.nn import functional as F

RESULTS = Path(__file__).parent / "results" / "time_to_quality.json"
CONTEXT, BUDGET = 64, 2000 * 12 * 64  # characters in view; characters trained on
RESERVED = 4  # ids that Pellucid's tokenizers keep free: pad, bos, eos, unk

PELLUCID = dict(
    hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
    num_experts=8, num_experts_per_tok=2, rows=64, optimizer="muon", learning_rate=0.01, muon_learning_rate=0.04,
    momentum=0.9, beta2=0.95, weight_decay=0.0, schedule="wsd", decay_fraction=0.5, warmup_steps=20, final_factor=0.0,
    gradient_clip=1.0, balance_loss_weight=0.01, order="epochs",
)  # fmt: skip
VARIANTS = {
    "reference": None,
    "pellucid": {},
    "adamw": dict(optimizer="adamw", rows=12, learning_rate=4e-3),
    "dense": dict(num_experts=1, num_experts_per_tok=1, intermediate_size=2 * PELLUCID["intermediate_size"]),
    "random windows": dict(order="random"),
}


def read_text(path: Path, tune: bool) -> tuple[Tensor, Tensor]:
    """(training characters, held-out characters), each as ids from 0."""
    text = path.read_text(encoding="utf-8")
    ids = {character: index for index, character in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[character] for character in text])
    train, held_out = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]
    return (train[: int(0.9 * len(train))], train[int(0.9 * len(train)) :]) if tune else (train, held_out)


def random_windows(text: Tensor, rows: int, steps: int, seed: int):
    """[rows, 65] a step, each from a random place."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (rows,), generator=random)
        yield text[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]


def windows_in_epochs(text: Tensor, rows: int, steps: int, seed: int):
    """[rows, 65] a step: every place once before any comes again, in random order; each epoch is cut elsewhere."""
    random, starts = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(starts) < rows:
            places = torch.arange(int(torch.randint(CONTEXT, (), generator=random)), len(text) - CONTEXT, CONTEXT)
            starts = torch.cat((starts, places[torch.randperm(len(places), generator=random)]))
        yield text[starts[:rows].unsqueeze(1) + torch.arange(CONTEXT + 1)]
        starts = starts[rows:]


class Reference(nn.Module):
    """GPT-2's shape without biases (Radford et al. 2019), as small as the recipe wants it."""

    def __init__(self, vocabulary: int, layers: int = 4, heads: int = 4, width: int = 128):
        super().__init__()
        self.heads = heads
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(width, bias=False), "qkv": linear(width, 3 * width), "out": linear(width, width),
                "norm2": nn.LayerNorm(width, bias=False), "up": linear(width, 4 * width), "down": linear(4 * width, width),
            })
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                branch = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if branch else 1))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        B, T = tokens_BT.shape
        x = self.token(tokens_BT) + self.position.weight[:T]
        for block in self.blocks:
            split = lambda y: y.view(B, T, self.heads, -1).transpose(1, 2)
            q, k, v = map(split, block["qkv"](block["norm1"](x)).chunk(3, dim=-1))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](attended.transpose(1, 2).reshape(B, T, -1))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.norm(x) @ self.token.weight.T


def train_reference(text: Tensor, vocabulary: int, seed: int):
    """nanoGPT's settings: AdamW 1e-3 -> 1e-4 by cosine after 100 warm-up steps, beta2 0.99, decay 0.1, clipping at 1."""
    torch.manual_seed(seed)
    model = Reference(vocabulary)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.99), fused=True
    )
    steps, warm_up = 2000, 100
    for step, windows in enumerate(random_windows(text, 12, steps, seed)):
        falling = (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2
        rate = 1e-3 * (step + 1) / (warm_up + 1) if step < warm_up else 1e-4 + 9e-4 * falling
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "steps": steps}
    facts["active_parameters"] = facts["parameters"]
    return model, facts


def train_pellucid(text: Tensor, vocabulary: int, seed: int, settings: dict):
    """The product's model, optimizer, schedule and step; the batches are windows of the text."""
    from pellucid.config import ModelConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
    from pellucid.data.dataset import Batch
    from pellucid.model.grok import Grok1
    from pellucid.model.initialize import initialize
    from pellucid.model.size import parameter_counts
    from pellucid.training.optimizers import build_optimizer
    from pellucid.training.schedules import learning_rate_factor
    from pellucid.training.step import training_step

    take = lambda section: {key: value for key, value in settings.items() if key in section.model_fields}
    shape = ModelConfig(vocab_size=vocabulary + RESERVED, **take(ModelConfig))
    model = initialize(Grok1(shape), seed)
    optimizer = build_optimizer(model, OptimizerConfig(name=settings["optimizer"], **take(OptimizerConfig)))
    schedule = ScheduleConfig(name=settings["schedule"], **take(ScheduleConfig))
    training = TrainingConfig(batch_size=settings["rows"], balance_loss="switch", **take(TrainingConfig))
    rows, observer = settings["rows"], Unobserved()
    steps = BUDGET // (rows * CONTEXT)
    segments = torch.ones(rows, CONTEXT, dtype=torch.int32)
    positions = torch.arange(CONTEXT, dtype=torch.int32).expand(rows, CONTEXT).contiguous()
    windows_of = windows_in_epochs if settings["order"] == "epochs" else random_windows
    losses = []
    for step, windows in enumerate(windows_of(text + RESERVED, rows, steps, seed)):
        inputs, numbers = windows[:, :-1].contiguous(), torch.arange(rows)
        batch = Batch(inputs, windows[:, 1:].contiguous(), segments, positions, numbers, numbers)
        factor = learning_rate_factor(schedule, step, steps)
        losses.append(training_step(model, optimizer, [batch], training, factor, observer).loss)
    counts = parameter_counts(shape)
    facts = {"parameters": counts["total"], "active_parameters": counts["active"], "steps": steps}
    return lambda tokens: model(tokens + RESERVED), facts | {"train_loss": statistics.mean(losses[-50:])}


@torch.no_grad()
def held_out_loss(model, text: Tensor, offset: int) -> float:
    """Nats per character over windows of 64, side by side, the last one shorter."""
    nats, count = 0.0, 0
    length = len(text) - 1
    starts = torch.arange(0, length - CONTEXT + 1, CONTEXT)
    pieces = [text[part.unsqueeze(1) + torch.arange(CONTEXT + 1)] for part in starts.split(64)]
    if length % CONTEXT:
        pieces.append(text[len(starts) * CONTEXT :].unsqueeze(0))
    for windows in pieces:
        scores = model(windows[:, :-1]).flatten(0, 1)
        nats += F.cross_entropy(scores, windows[:, 1:].flatten() + offset, reduction="sum").item()
        count += windows[:, 1:].numel()
    assert count == length
    beginning = model(pieces[0][:4, :20]).float()
    torch.testing.assert_close(model(pieces[0][:4, :-1])[:, :20].float(), beginning, rtol=1e-3, atol=1e-3)  # nobody peeks
    return nats / count


def run(path: Path, variant: str, seed: int, tune: bool, changes: dict) -> dict:
    """Train and measure one variant in this process."""
    text, held_out = read_text(path, tune)
    vocabulary = int(max(text.max(), held_out.max())) + 1
    began, cpu = time.perf_counter(), cpu_time()
    if variant == "reference":
        model, facts = train_reference(text, vocabulary, seed)
    else:
        model, facts = train_pellucid(text, vocabulary, seed, PELLUCID | VARIANTS[variant] | changes)
    seconds, cpu = time.perf_counter() - began, cpu_time() - cpu
    loss = held_out_loss(model, held_out, 0 if variant == "reference" else RESERVED)
    facts |= {"loss": loss, "seconds": seconds, "cpu_seconds": cpu, "changes": changes, "machine": machine()}
    return {"variant": variant, "seed": seed, "tune": tune, **facts}


def cpu_time() -> float:
    """Seconds of this process and of those it started (the compiler)."""
    return sum(os.times()[:4])


def start(options: argparse.Namespace, variant: str, seed: int) -> subprocess.Popen:
    """One variant in a process of its own, with an empty cache of kernels."""
    command = [sys.executable, __file__, str(options.text), "--one", "--seeds", str(seed), "--variants", variant]
    command += ["--tune"] * options.tune + ["--set", *options.set]
    environment = {**os.environ, "XDG_CACHE_HOME": tempfile.mkdtemp(), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def report(results: list[dict]) -> str:
    """Mean and range over seeds, a line a variant."""
    lines = []
    for variant in dict.fromkeys(result["variant"] for result in results):
        mine = [result for result in results if result["variant"] == variant]
        losses, seconds = [result["loss"] for result in mine], [result["cpu_seconds"] for result in mine]
        lines.append(
            f"{variant:15} loss {statistics.mean(losses):.4f} ({min(losses):.4f}..{max(losses):.4f})  CPU s"
            f" {statistics.mean(seconds):.0f} ({min(seconds):.0f}..{max(seconds):.0f})  wall s"
            f" {statistics.mean(result['seconds'] for result in mine):.0f}  parameters {mine[0]['parameters']:,}"
            f" ({mine[0]['active_parameters']:,} active)  seeds {len(mine)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["reference", "pellucid"])
    parser.add_argument("--tune", action="store_true", help="hold out a tenth of the training text")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of Pellucid's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        changes = {key: setting(value) for key, value in (item.split("=") for item in options.set)}
        print(json.dumps(run(options.text, options.variants[0], options.seeds[0], options.tune, changes)), flush=True)
        return
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    identity = lambda result: (result["variant"], result["seed"], result["tune"], str(result["changes"]))
    jobs = [start(options, variant, seed) for seed in options.seeds for variant in options.variants]
    with ThreadPoolExecutor(len(jobs)) as pool:  # each only waits for its process
        for done in as_completed([pool.submit(job.communicate) for job in jobs]):
            found = json.loads(done.result()[0])
            results = [old for old in results if identity(old) != identity(found)] + [found]
            options.out.parent.mkdir(exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(report([result for result in results if result["tune"] == options.tune]))


def setting(text: str) -> int | float | str:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
