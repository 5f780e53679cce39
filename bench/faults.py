"""Faults planted into real training, one each, and healthy runs: what `diagnosis.py` measures the rules of observe/rules.py by.

Every run goes through pellucid.train: its loop, its observer, its rules. A fault only bends what it must (a batch, a
gradient, a weight), before the step it is planted at. Runs are small: seconds on one core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pellucid import run as runs
from pellucid.config import UserError, make_config
from pellucid.observe.reader import Reader
from pellucid.training import loop as loops
from pellucid.training import step as steps

PLANTED_AT = 45
HEALTHY_STEPS = 230  # so that rules that wait for 200 may be wrong as well
MODULES = {"calibration": ("ast", "argparse", "asyncio.base_events", "codecs", "configparser", "csv", "datetime", "decimal"),
           "code": ("difflib", "doctest", "fractions", "optparse", "pdb", "tarfile", "threading", "turtle", "typing", "zipfile"),
           "english": ("pydoc_data.topics",)}  # fmt: skip


@dataclass
class Fault:
    """rules: those that name the cause or its unmistakable effect. deadline: steps after `at`, with the reason where > 50."""

    rules: tuple[str, ...]
    deadline: int
    plant: Callable[[PlantedLoop, int], None] = lambda loop, step: None  # called before every step
    at: int = PLANTED_AT
    steps: int = PLANTED_AT + 51
    settings: dict = field(default_factory=dict)
    why: str = ""


class PlantedLoop(loops.Loop):
    """The loop of training, with a fault."""

    fault: Fault

    def step(self):
        self.since = self.counters.step - self.fault.at  # 0 at the step of the fault
        if self.counters.step == 0:
            self.observer.watch.judge = self._listen(self.observer.watch.judge)
            self.batches = "loader" if hasattr(self, "loader") else "train_split"
            setattr(self, self.batches, _Batches(getattr(self, self.batches)))
        if self.since >= 0:
            self.fault.plant(self, self.since)
        return super().step()

    def _listen(self, judge):
        """The run ends when the fault is found: what comes after costs time and tells nothing."""
        def judged(record, **facts):
            events = judge(record, **facts)
            if any(e["rule"] in self.fault.rules and record.step >= self.fault.at for e in events):
                self.max_steps = 0
            return events

        return judged

    def change_batches(self, change) -> None:
        getattr(self, self.batches).change = change

    def after_update(self, change) -> None:
        """`change(loop)` after each optimizer step from now on."""
        self.optimizer.register_step_post_hook(lambda *_: torch.no_grad()(change)(self))


class _Batches:
    """Where the loop takes its batches from; they may be changed on their way."""

    def __init__(self, source):
        self.source, self.change = source, None

    def __getattr__(self, name):
        return getattr(self.source, name)

    def batch(self, step, *rest, **more):
        batch = self.source.batch(step, *rest, **more)
        return batch if self.change is None else self.change(batch, step)


@contextlib.contextmanager
def _replaced(module, name, value):
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


# --------------------------------------------------------------------------------------------- the faults


def frozen_expert(loop, since):
    """One expert's weights are put back after every step."""
    if since == 0:
        moe = loop.model.layers[0].moe
        kept = [(w, w[1].detach().clone()) for w in (moe.gate_up_proj, moe.down_proj)]
        loop.after_update(lambda _: [w[1].copy_(before) for w, before in kept])


def frozen_tensor(loop, since):
    """A tensor is not in the optimizer."""
    if since == 0:
        for group in loop.optimizer.param_groups:
            keep = [i for i, name in enumerate(group["names"]) if "layers.0.attention.q_proj" not in name]
            group["params"], group["names"] = [group["params"][i] for i in keep], [group["names"][i] for i in keep]
            if "parts" in group:
                group["parts"] = [group["parts"][i] for i in keep]


def never_chosen(loop, since):
    """The router's choice leaves one expert out."""
    loop.model.layers[0].moe.balance_bias[1] = -1e4


def ghost_decay(loop, since):
    """An expert without tokens is decayed and carried on by its momentum (what training normally prevents)."""
    never_chosen(loop, since)
    steps.frozen_idle_experts = lambda *_: contextlib.nullcontext()


def always_chosen(loop, since):
    """Every token goes to the same expert (and one more)."""
    loop.model.layers[0].moe.balance_bias[2] = 1e4


def collapsed_router(loop, since):
    """Every token goes to the same two experts."""
    loop.model.layers[0].moe.balance_bias[2:4] = 1e4


def rate_times_30(loop, since):
    """The schedule's rate is 30 times too high."""
    if since == 0:
        for group in loop.optimizer.param_groups:
            group["base_learning_rate"] *= 30


def nan_in_batch(loop, since):
    """One hidden value of one step is NaN."""
    def hook(module, inputs, output):
        output = output.clone()
        output.view(-1)[7] = math.nan
        return output

    if since == 0:
        loop.planted = loop.model.final_norm.register_forward_hook(hook)
    elif since == 1:
        loop.planted.remove()


def infinite_gradient(loop, since):
    """One tensor's gradient overflows in one step."""
    weight = loop.model.layers[-1].attention.k_proj.weight
    if since == 0:
        loop.planted = weight.register_hook(lambda g: torch.where(torch.arange(g.numel()).view(g.shape) == 3, math.inf, g))
    elif since == 1:
        loop.planted.remove()


def _times(factor):
    def plant(loop, since):
        honest = getattr(steps.forward, "honest", steps.forward)
        planted = lambda *a, **k: honest(*a, **k) * factor
        planted.honest = honest
        steps.forward = planted

    return plant


def exploded_gradient(loop, since):
    """One step's gradient is 1,000 times too large."""
    honest = getattr(steps.forward, "honest", steps.forward)
    _times(1000.0)(loop, since) if since == 0 else setattr(steps, "forward", honest)


def lagging_moment(loop, since):
    """Adam's second moment is 10,000 times too small for the gradients to come."""
    if since == 0:
        for state in loop.optimizer.state.values():
            if "exp_avg_sq" in state:
                state["exp_avg_sq"].mul_(1e-4)


def poisoned_document(loop, since):
    """One row of one batch is random bytes."""
    def poison(batch, step):
        if step != loop.fault.at:
            return batch
        noise = torch.randint(4, 250, (batch.tokens_BT.shape[1] + 1,), generator=torch.Generator().manual_seed(step))
        tokens, targets = batch.tokens_BT.clone(), batch.targets_BT.clone()
        tokens[1], targets[1] = noise[:-1].to(tokens.dtype), noise[1:].to(targets.dtype)
        return dataclasses.replace(batch, tokens_BT=tokens, targets_BT=targets)

    loop.change_batches(poison)


def shuffled_labels(loop, since):
    """Targets belong to other tokens."""
    def shuffle(batch, step):
        flat = batch.targets_BT.reshape(-1).clone()
        real = (flat >= 0).nonzero().squeeze(1)
        flat[real] = flat[real[torch.randperm(len(real), generator=torch.Generator().manual_seed(step))]]
        return dataclasses.replace(batch, targets_BT=flat.view(batch.targets_BT.shape))

    loop.change_batches(shuffle)


def other_language(loop, since):
    """From here on every byte stands for another."""
    order = torch.cat([torch.arange(4), 4 + torch.randperm(1000, generator=torch.Generator().manual_seed(1)) % 256])
    turn = lambda ids: torch.where(ids >= 4, order[(ids.long() - 4).clamp(0, 255) + 4].to(ids.dtype), ids)
    loop.change_batches(lambda batch, step: dataclasses.replace(
        batch, tokens_BT=turn(batch.tokens_BT), targets_BT=turn(batch.targets_BT)))


def stuck_loader(loop, since):
    """The same batch comes again and again."""
    kept = []
    if since == 0:
        loop.change_batches(lambda batch, step: kept[0] if kept else kept.append(batch) or batch)


def slow_loader(loop, since):
    """Each batch takes as long as the step."""
    ended = [time.perf_counter()]

    def wait(batch, step):
        time.sleep(min(time.perf_counter() - ended[0], 1.0))
        ended[0] = time.perf_counter()
        return batch

    if since == 0:
        loop.change_batches(wait)


def bf16_weights(loop, since):
    """Weights are rounded to bfloat16 after each update: no fp32 master copy."""
    if since == 0:
        loop.after_update(lambda loop: [w.copy_(w.bfloat16()) for w in loop.model.parameters()])


ADAMW = {"optimizer": {"name": "adamw", "learning_rate": 2e-3}}
START = {"at": 0, "steps": 51}
FAULTS = {
    "frozen expert": Fault(("frozen_tensor",), 50, frozen_expert),
    "frozen tensor": Fault(("frozen_tensor",), 50, frozen_tensor, **START),
    "ghost decay": Fault(("ghost_update",), 50, ghost_decay, settings=ADAMW),
    "learning rate x 30": Fault(("learning_rate_high", "update_spike", "loss_spike", "loss_rising", "gradient_explosion"), 50,
                                rate_times_30),
    "learning rate x 30 from the start": Fault(("learning_rate_high", "loss_rising", "loss_spike", "gradient_explosion"), 50,
                                               rate_times_30, **START),
    "learning rate 1e-9": Fault(("learning_rate_low",), 100, at=0, steps=101,
                                settings={"optimizer": {"name": "adamw", "learning_rate": 1e-9}},
                                why="a warm-up looks the same; the rule waits for its end and 20 steps, and for 3 frames"),
    "NaN in a batch": Fault(("non_finite",), 0, nan_in_batch, steps=PLANTED_AT + 5),
    "infinite gradient": Fault(("non_finite",), 0, infinite_gradient, steps=PLANTED_AT + 5),
    "gradient x 1,000 in one step": Fault(("gradient_explosion",), 0, exploded_gradient, steps=PLANTED_AT + 5),
    "gradient x 1e-9": Fault(("gradient_vanishing",), 10, _times(1e-9), steps=PLANTED_AT + 15),
    "second moment lags": Fault(("impossible_step", "update_spike", "stale_moments"), 50, lagging_moment, settings=ADAMW),
    "poisoned document": Fault(("bad_document", "loss_spike"), 0, poisoned_document, at=60, steps=63),
    "other language": Fault(("loss_spike", "loss_rising", "bad_document"), 10, other_language, steps=PLANTED_AT + 15),
    "shuffled labels": Fault(("unrelated_targets",), 50, shuffled_labels, **START),
    "labels shuffled later": Fault(("unrelated_targets", "loss_spike", "loss_rising"), 10, shuffled_labels, at=150, steps=165),
    "bf16 without master weights": Fault(("swallowed_updates",), 50, bf16_weights, **START,
                                         settings={"optimizer": {"name": "adamw", "learning_rate": 1e-4}}),
    "slow loader": Fault(("data_starvation",), 50, slow_loader),
    "stuck loader": Fault(("repeated_data",), 50, stuck_loader),
    "dead expert": Fault(("dead_expert",), 105, never_chosen, steps=PLANTED_AT + 110,
                         why="it is dead by definition after 100 steps without a token"),
    "overloaded expert": Fault(("overloaded_expert",), 60, always_chosen, steps=PLANTED_AT + 65,
                               why="the rule takes the mean of 50 steps: single batches are uneven"),
    "router collapse": Fault(("router_collapse",), 50, collapsed_router),
    "clipping always on": Fault(("clipping_always",), 105, at=0, steps=110, settings={"training": {"gradient_clip": 1e-3}},
                                why="'always' is 95 of 100 steps"),
    "overfitting": Fault(("overfitting",), 250, at=0, steps=250, settings={"corpus_files": 2, "training": {"evaluate_every": 20}},
                         why="it begins only when the text is known by heart"),
}  # fmt: skip

CALIBRATION_SHAPES = [{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 8}]
UNSEEN_SHAPES = [
    {"preset": "tiny"},
    {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6},
]
OPTIMIZERS = [("muon", 3e-3), ("adamw", 2e-3), ("adam", 2e-3), ("lion", 3e-4), ("sgd", 0.02), ("adafactor", 3e-3)]
SCHEDULES = ["cosine", "wsd", "constant", "linear", "inverse_sqrt"]


def healthy_settings(number: int) -> dict:
    """The number-th healthy run: optimizers, schedules, shapes, batch sizes and balance losses in turn."""
    name, rate = OPTIMIZERS[number % len(OPTIMIZERS)]
    experts = (8, 4, 8)[number % 3]
    return {
        "model": {"hidden_size": (56, 36, 64, 28)[number % 4], "num_hidden_layers": 1 + (number % 4 == 3), "num_attention_heads": 2,
                  "num_experts": experts},
        "optimizer": {"name": name, "learning_rate": rate},
        "schedule": {"name": SCHEDULES[number % len(SCHEDULES)]},
        "training": {"batch_size": (8, 4, 12)[number % 3], "micro_batch_size": 4,
                     "balance_loss": ("switch", "switch", "mixtral")[number // 2 % 3]},
    }  # fmt: skip


def write_corpus(folder: Path, kind: str, seed: int, files: int) -> Path:
    """Documents of 2,000 to 4,000 characters of real text: modules of Python, or its English documentation."""
    if folder.exists():
        return folder
    modules = [importlib.import_module(name) for name in MODULES[kind]]
    text = "\n".join("\n".join(reversed(m.topics.values())) if hasattr(m, "topics") else inspect.getsource(m) for m in modules)
    rng = random.Random(seed)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")  # several processes may want the same one
    unfinished.mkdir(parents=True)
    at = rng.randrange(2000)
    for n in range(files):
        size = rng.randint(2000, 4000)
        (unfinished / f"{n:03}.txt").write_text(text[at : at + size])
        at += size
    with contextlib.suppress(OSError):  # the other was faster
        unfinished.rename(folder)
    return folder


def settings_of(fault: Fault, shape: dict, folder: Path, kind: str, seed: int, extra: dict | None = None) -> dict:
    files = fault.settings.get("corpus_files", 70)
    corpus = write_corpus(folder / f"corpus-{kind}-{seed}-{files}", kind, seed, files)
    tables = {
        "model": dict(shape),
        "data": {"sources": [str(corpus)], "directory": str(folder / f"data-{random.randrange(10**9)}"), "sequence_length": 64,
                 "validation_fraction": 0.3 if files < 10 else 0.03, "tokenizer": {"kind": "bytes"}},
        "training": {"max_steps": fault.steps, "batch_size": 8, "precision": "fp32", "device": "cpu", "seed": seed,
                     "evaluate_every": 50, "evaluate_rows": 8},
        "optimizer": {"name": "muon", "learning_rate": 3e-3}, "schedule": {"warmup_steps": 20, "name": "wsd"},
        "checkpoint": {"every_steps": 0}, "observe": {"plays": 0},
    }  # fmt: skip
    for more in (fault.settings, extra or {}):
        for table, values in more.items():
            if isinstance(values, dict):
                tables[table] |= values
    return tables


def train_with(fault: Fault, tables: dict, run_dir: Path) -> list[dict]:
    """Train; the events of its rules (notes left out)."""
    torch.set_num_threads(1)
    planted = type("Planted", (PlantedLoop,), {"fault": fault})
    with contextlib.ExitStack() as stack:
        for module, name, value in ((runs, "Loop", planted), (runs.summary, "show_sample", lambda *_: None),
                                    (runs, "save_huggingface", lambda *_, **__: None),
                                    (steps, "forward", steps.forward), (steps, "frozen_idle_experts", steps.frozen_idle_experts)):
            stack.enter_context(_replaced(module, name, value))  # and what a fault replaces is put back
        try:
            runs.train(make_config(tables), run_dir=run_dir)
        except UserError as error:
            if "not finite" not in str(error):  # a run of non-finite steps ends itself
                raise
    with Reader(run_dir) as run:
        return [e for e in run.events() if e["severity"] != "note"]


@dataclass
class Verdict:
    """What the rules said of one run. found: steps from the fault to the first right event; None: never."""

    case: str
    seed: int
    shape: int
    found: int | None
    by: str
    before: list[str]  # false alarms: alarms before the fault; in a healthy run all of them
    warnings: list[str]
    others: list[str]  # further rules that spoke after the fault


def judge(case: str, fault: Fault | None, events: list[dict], seed: int = 0, shape: int = 0) -> Verdict:
    at = fault.at if fault else 10**9
    right = [e for e in events if fault and e["step"] >= at and e["rule"] in fault.rules]
    first = min(right, key=lambda e: e["step"], default=None)
    early = lambda severity: [f"{e['rule']} ({e['subject']}) at {e['step']}: {e['text']}" for e in events
                              if e["step"] < at and e["severity"] == severity]  # fmt: skip
    others = sorted({e["rule"] for e in events if e["step"] >= at and fault and e["rule"] not in fault.rules})
    return Verdict(case, seed, shape, first["step"] - at if first else None, first["rule"] if first else "",
                   early("alarm"), early("warning"), others)  # fmt: skip


def run_case(case: str, seed: int, shape: int, folder: Path, *, unseen: bool) -> Verdict:
    """One run of the suite. case: a key of FAULTS, or 'healthy' (then `shape` is its number)."""
    turn = shape // len(OPTIMIZERS) if case == "healthy" else seed + shape
    kind = ("code", "english")[turn % 2] if unseen else "calibration"
    if case == "healthy":
        fault, extra = Fault((), 0, steps=HEALTHY_STEPS, at=10**9), healthy_settings(shape)
        tables = settings_of(fault, {}, folder, kind, seed, extra)
    else:
        fault = FAULTS[case]
        tables = settings_of(fault, (UNSEEN_SHAPES if unseen else CALIBRATION_SHAPES)[shape], folder, kind, seed)
    run_dir = folder / "runs" / f"{case.replace(' ', '-').replace(',', '')}-{seed}-{shape}"
    events = train_with(fault, tables, run_dir)
    return judge(case, None if case == "healthy" else fault, events, seed, shape)
