"""What the training loop tells, and the observer that writes it down: probes -> one transfer -> writer's thread.

The loop calls, for each step: begin_step, then per micro-batch micro_batch and after_backward, then before_update,
after_update and end_step; now and then evaluation, saved and text_sample; after a resume, resume. Probes leave their results
on the device; end_step packs them into one tensor and one asynchronous copy; dividing, judging (rules) and writing
happen on the writer's thread.
"""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.config import Config
from pellucid.data.river import COUNTS, river
from pellucid.model.size import flops_per_token
from pellucid.observe.attention import attention_rows, probe_attention
from pellucid.observe.budget import Budget
from pellucid.observe.columns import ATTENTION, EVALUATION, INDEX, LAYER, LOSS, PARAM, PHASES, ROUTER, RUN
from pellucid.observe.machine import device_memory, host_memory, peak_flops
from pellucid.observe.noise import NoiseScale
from pellucid.observe.reader import Reader
from pellucid.observe.routing import RoutingProbe
from pellucid.observe.rule import FRAME_EVERY
from pellucid.observe.rules import Watch
from pellucid.observe.statistics import KINDS, ParameterProbe
from pellucid.observe.store import BEFORE, FAN, FILE_NAME, MISSING, RECORDER, ROLLUP_PARTS, Record, Row, Writer
from pellucid.observe.text_losses import TextLossProbe
from pellucid.observe.writing import continued, prompt_of
from pellucid.training.checkpoint import saved_steps
from pellucid.training.schedules import budget_in_steps

DENSE_STEPS, KEEP_EVERY = 2000, 10  # later, older frames are thinned (rollups and the flight recorder keep all)
LOOK_EVERY = 100  # steps: every look but that at parameters comes that often whatever the budget
HIST_ROW = "INSERT OR REPLACE INTO hist (step, row, kind, zero, subnormal, nan, inf, first, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
STAGE_ROW = f"INSERT OR REPLACE INTO stage (id, name, {', '.join(COUNTS)}, detail) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"


class SilentObserver:
    """Records nothing (observe.enabled = false); what `run_dir` holds of steps that are done again is deleted all the same."""

    run_dir: Path | None = None

    def __init__(self, run_dir: Path | None = None):
        self.run_dir = run_dir

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def begin_step(self, step: int) -> None: ...
    def micro_batch(self, batch, routings, per_token_N, predicted_N) -> None: ...
    def after_backward(self, batch) -> None: ...
    def reads_gradients(self) -> bool:
        """Asked once a step, before clipping: whether `before_update` and `after_update` will look at the clipped gradients."""
        return False

    def before_update(self, result) -> None: ...
    def after_update(self, result) -> None: ...
    def end_step(self, step: int, result) -> None: ...
    def evaluation(self, step: int, result) -> None: ...
    def saved(self, seconds: float) -> None: ...
    def text_sample(self, step: int, prompt: str, text: str) -> None: ...
    def close(self) -> None: ...

    def resume(self, step: int) -> None:
        """Step number `step` comes next: what was recorded from there on is deleted."""
        if self.run_dir is not None and (self.run_dir / FILE_NAME).exists():
            writer = Writer(self.run_dir)
            writer.delete_after(step - 1)
            writer.close()


def open_observer(run_dir: Path, model, optimizer, config: Config, dataset) -> SilentObserver:
    """The observer that the configuration asks for."""
    return Observer(run_dir, model, optimizer, config, dataset) if config.observe.enabled else SilentObserver(run_dir)


class Observer(SilentObserver):
    """Writes run.sqlite. Never changes what training computes; errors while writing stop the telemetry only."""

    def __init__(self, run_dir: Path, model, optimizer, config: Config, dataset: Any = None):
        self.model, self.optimizer, self.config, self.dataset = model, optimizer, config, dataset
        self.device = next(model.parameters()).device
        self.budget = Budget(config.observe.budget, self.device)
        shape = model.config
        self.flops = flops_per_token(shape, config.data.sequence_length)
        self.peak = peak_flops(self.device)
        self.parameters = ParameterProbe(model, optimizer)
        self.routing = RoutingProbe(shape.num_hidden_layers, shape.num_experts, shape.num_experts_per_tok)
        sources = [source.path for source in config.data.sources]
        self.text = TextLossProbe(config.data.sequence_length, sources, self._categories(shape))
        self.noise = NoiseScale()
        self._writer_worked = 0.0  # of its seconds, those already counted
        self.expert_rows = self._expert_rows()
        self.train_losses: deque[float] = deque(maxlen=32)
        epoch = dataset.train.rows_per_epoch if dataset is not None else None
        self.watch = Watch.of_run(
            config, self.parameters.rows, self.routing.L, self.routing.E, model.config.vocab_size, epoch)
        self._started: int | None = None  # first step of this session
        self._next_exact = 0
        self._count_nonfinite = False  # of weights, once a norm says there are some
        self._prompt: str | None = None
        self._written: int | None = None  # step of the last text
        self._ended, self._saved = time.perf_counter(), 0.0
        self.writer = Writer(run_dir, meta=self._meta(dataset))
        self.checkpoints = Path(run_dir) / "checkpoints"
        self.writer.resume_points = saved_steps(self.checkpoints)
        self._define(shape)
        if dataset is not None:
            self._record_river(dataset)

    # --------------------------------------------------------------------------------- what is recorded

    def _meta(self, dataset: Any) -> dict:
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        steps = budget_in_steps(self.config, dataset.train) if dataset is not None else self.config.training.max_steps
        return {"config": self.config.model_dump(mode="json"), "max_steps": steps, "budget": self.config.observe.budget,
                "device": device, "flops_per_token": self.flops, "peak_flops": self.peak, "torch": torch.__version__,
                "data_directory": str(dataset.directory) if dataset is not None else None}  # fmt: skip

    def _define(self, shape) -> None:
        router, layer = self.routing.rows()
        position, source = self.text.rows()
        heads = attention_rows(shape.num_hidden_layers, shape.num_attention_heads)
        thin = {"dense_steps": DENSE_STEPS, "keep_every": KEEP_EVERY}
        define = self.writer.define
        define("run", [Row("run")], RUN, row_is="run", about="Every step: the run as a whole.")
        define("param", self.parameters.rows, PARAM, row_is="tensor", **thin,
               about="Every step the budget allows: tensors, and each expert's slice of the stacked ones.")
        define("router", router, ROUTER, row_is="expert", about="Every step: each expert of each layer.", **thin)
        define("layer", layer, LAYER, row_is="layer", about="Every step: the router of each layer.", **thin)
        define("position", position, LOSS, row_is="position", about="Every step: loss by position in the document.", **thin)
        define("source", source, LOSS, row_is="source", about="Every step: loss by data source.", **thin)
        define("attention", heads, ATTENTION, row_is="head", about="On a cadence: one probe row, head by head.")
        define("evaluation", [Row("held-out")], EVALUATION, row_is="run", about="Held-out loss, after the step.")

    def _categories(self, shape) -> int:
        """How many things the loss is a choice among: tokens, or classes; 0: it is about numbers."""
        if shape.head is None:
            return shape.vocab_size
        return len(shape.head.labels) if shape.head.problem_type != "regression" else 0

    def _record_river(self, dataset: Any) -> None:
        rows = [(i, stage["name"], *(stage[count] for count in COUNTS), json.dumps(stage)) for i, stage in enumerate(river(dataset))]
        self.writer.insert(STAGE_ROW, rows)

    def _expert_rows(self) -> np.ndarray:
        """[L, E, tensors]: rows of `param` that are slices of each expert."""
        at: dict[tuple[int, int], list[int]] = {}
        for i, row in enumerate(self.parameters.rows):
            if row.expert is not None:
                at.setdefault((row.layer, row.expert), []).append(i)
        return np.array([[at[layer, e] for e in range(self.routing.E)] for layer in range(self.routing.L)])

    # ----------------------------------------------------------------------------------------- the step

    def resume(self, step: int) -> None:
        self._start(step)

    def _start(self, step: int) -> None:
        if self._started is None:
            self._started = step
            self.writer.flush()
            self.writer.delete_after(step - 1 if step > 0 else BEFORE - 1)
            if step > 0:
                self._recall(step)

    def _recall(self, step: int) -> None:
        """What is counted over many steps goes on from what was recorded of those before `step`."""
        with Reader(self.writer.path) as run:
            if any(event["rule"] == "text_sample" and event["step"] == step - 1 for event in run.events()):
                self._written = step
            losses = run.series("run", "loss", stream="run", since=step - 1 - RECORDER)[1]
            self.train_losses.extend(losses[np.isfinite(losses)].tolist())
            frames = run.frames("router", since=step - 1 - RECORDER)[1]
            bucket = run.rollup("router", 1, since=(step - 1) // FAN - 1)[1]  # knows the last frame, be it thinned out
            self.routing.recall(frames, bucket[:, ROLLUP_PARTS.index("last")])

    def begin_step(self, step: int) -> None:
        self._start(step)
        self.began = time.perf_counter()
        self.between, self.saving, self._saved = self.began - self._ended, self._saved, 0.0
        self._packed: dict[str, Tensor] = {}
        self._facts: dict | None = None
        self._micro = 0
        self.spent_before = self.budget.spent

    def micro_batch(self, batch, routings, per_token_N, predicted_N) -> None:
        first = self._micro == 0
        keep_row = first and self.budget.affords("sample", LOOK_EVERY)
        with self.budget.spend("micro"):
            self.routing.add(routings, batch.targets_BT.reshape(-1) >= 0)
            self.text.add(batch, per_token_N, predicted_N, keep_row)
        if first and self.budget.affords("attention", LOOK_EVERY):
            with self.budget.spend("attention"):
                self._packed["attention"] = probe_attention(self.model, batch)
        self._predictions = predicted_N.sum()[None].float()

    def after_backward(self, batch) -> None:
        several = self.config.training.micro_batch_size < self.config.training.batch_size
        if self._micro == 0 and several and self.budget.affords("noise", LOOK_EVERY):
            with self.budget.spend("noise"):
                gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
                self._packed["small"] = torch.cat([norm[None], self._predictions])
        self._micro += 1

    def reads_gradients(self) -> bool:
        self._measures = self.budget.affords("parameters", FRAME_EVERY)
        return self._measures

    def before_update(self, result) -> None:
        if not self._measures:
            self.parameters.forget()
            self._histograms = False
            return
        exact = self._take_turn() if self.budget.affords("exact", LOOK_EVERY) else None
        self._histograms = exact is not None and self.budget.affords("histogram", LOOK_EVERY)
        with self.budget.spend("exact" if exact is not None else "parameters"):
            bad = self._count_nonfinite or not np.isfinite(result.grad_norm)
            self._packed |= self.parameters.before(exact, bad)
        self._facts = {}

    def _take_turn(self):
        p = self.parameters.parameters[self._next_exact % len(self.parameters.parameters)]
        self._next_exact += 1
        return p

    def after_update(self, result) -> None:
        if self._facts is None:
            return
        with self.budget.spend("histogram" if self._histograms else "parameters"):
            measured = self.parameters.after(result.applied, self._histograms)
            self._facts = self.parameters.facts(result.clip_factor, result.applied)
            self._packed |= measured

    def end_step(self, step: int, result) -> None:
        with self.budget.spend("hand over"):
            self._packed |= {f"routing.{k}": v for k, v in self.routing.take().items()}
            self._packed |= {f"text.{k}": v for k, v in self.text.take().items()}
            pack = _Pack(self._packed)
            run = self._run_facts(result)
            facts = self._facts
            self.writer.submit(lambda: self._record(step, pack.arrays(), facts, _phases(result) | run))
        if self.device.type == "cpu":  # there the writer's thread takes its time from the step's
            worked, self._writer_worked = self._writer_worked, self.writer.worked
            self.budget.spent += self._writer_worked - worked
        self.budget.earn(time.perf_counter() - self.began - (self.budget.spent - self.spent_before))
        self._ended = time.perf_counter()

    def _run_facts(self, result) -> dict[str, float | None]:
        """The host's part of the `run` frame."""
        settings = self.config.training
        seconds = time.perf_counter() - self.began
        beta1, beta2 = next((g["betas"] for g in self.optimizer.param_groups if "betas" in g), (None, None))
        return {
            "loss": result.loss,
            "balance_loss": result.balance_loss if settings.balance_loss != "none" and settings.balance_loss_weight else None,
            "router_z_loss": result.router_z_loss if settings.router_z_loss else None,
            "z_loss": result.z_loss if settings.z_loss else None, "learning_rate": result.learning_rate,
            "gradient_norm": result.grad_norm, "clip_factor": result.clip_factor, "applied": float(result.applied),
            "tokens": result.tokens, "tokens_per_second": result.tokens / seconds, "step_seconds": seconds,
            "mfu": result.tokens * self.flops / seconds / self.peak if self.peak else None,
            "between_seconds": self.between, "host_memory": host_memory(), "device_memory": device_memory(self.device),
            "observe_seconds": self.budget.spent - self.spent_before, "observe_share": self.budget.used_share,
            "beta1": beta1, "beta2": beta2, "predictions": result.predictions, "checkpoint_seconds": self.saving,
        }  # fmt: skip

    # -------------------------------------------------------------------------- on the writer's thread

    def _record(self, step: int, device: dict[str, np.ndarray], facts: dict | None, run: dict) -> Record:
        record = Record(step)
        param = None
        if facts is not None:
            param = record.frames["param"] = self.parameters.finish(device, facts)
            self._add_histograms(record, device, facts)
            whole = dict(zip(INDEX["param"], param[-1], strict=True))
            run |= {name: whole[name] for name in ("weight_norm", "update_norm", "credit")}
            run["exact_row"] = self.parameters.row_of(facts["exact"]) if facts["exact"] is not None else None
            self._count_nonfinite = bool(device.get("weight_nonfinite", ~np.isfinite(device["norms"][0])).any())
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in device.items() if k.startswith(prefix)}
        record.frames |= self.routing.finish(part("routing."), param, self.expert_rows)
        self.text.finish(part("text."), record)
        if "attention" in device:
            record.frames["attention"] = device["attention"]
        if "small" in device:
            run["noise_scale"] = self.noise.update(*device["small"], run["gradient_norm"], run["predictions"])
        record.frames["run"] = _one_row([run.get(stat.name) for stat in RUN])
        loss = float(record.frames["run"][0, INDEX["run"]["loss"]])  # as a resumed run reads it
        if np.isfinite(loss):
            self.train_losses.append(loss)
        hashes = device["text.hashes"].view(np.int32).tolist()
        unigram = float(device["text.unigram"][0]) if "text.unigram" in device else None
        pairs = device["text.pairs"].view(np.int32) if "text.pairs" in device else None
        record.events += self.watch.judge(record, row_hashes=hashes, pairs=pairs, unigram_entropy=unigram)
        return record

    def _add_histograms(self, record: Record, device: dict[str, np.ndarray], facts: dict) -> None:
        rows = []
        for kind in KINDS:
            if f"hist.{kind}" not in device:
                continue
            p, counts = facts["exact"], device[f"hist.{kind}"].view(np.int32)
            first_row = self.parameters.row_of(p) + p.stacked  # experts' rows follow the whole tensor's
            for leaf in range(p.leaves):
                rows.append((record.step, first_row + leaf, kind, *_histogram_row(counts[leaf])))
        if rows:
            record.rows.append((HIST_ROW, rows))

    # ------------------------------------------------------------------------------- beside the steps

    def evaluation(self, step: int, result) -> None:
        """Held-out loss after `step` steps; it is recorded with the last of them, before training as step -1."""
        self._start(step)
        self.writer.flush()
        facts = result.as_dict()
        if self.train_losses:
            facts["gap"] = result.loss - sum(self.train_losses) / len(self.train_losses)
        record = Record(step - 1, {"evaluation": _one_row([facts.get(stat.name) for stat in EVALUATION])})
        record.events += self.watch.judge(record)
        self.writer.write(record)
        if self.config.observe.samples and self.dataset is not None and self.model.config.head is None:
            self._write_text(step)

    def _write_text(self, step: int) -> None:
        """What the model makes of a held-out text now. Its failure is a note, never the training's."""
        if self._written == step:
            return
        try:
            self._prompt = prompt_of(self.dataset) if self._prompt is None else self._prompt
            self.text_sample(step, self._prompt, continued(self.model, self.dataset.tokenizer, self._prompt))
        except Exception as error:
            event = {"rule": "no_text_sample", "severity": "note", "subject": "run", "text": f"no text was written: {error}"}
            self.writer.write(Record(step - 1, events=[event]))

    def saved(self, seconds: float) -> None:
        """A checkpoint was written between two steps."""
        self._saved += seconds
        self.writer.resume_points = saved_steps(self.checkpoints)

    def text_sample(self, step: int, prompt: str, text: str) -> None:
        """A text the model wrote after `step` steps; the first one of a step is kept."""
        if self._written == step:
            return
        self._written = step
        self._start(step)
        event = {"rule": "text_sample", "severity": "note", "subject": prompt, "text": text}
        self.writer.write(Record(step - 1, events=[event]))

    def close(self) -> None:
        self.writer.close()


def _one_row(values: list[float | None]) -> np.ndarray:
    """A frame of one row: [1, statistics] in float32, in which a loss that runs away may be infinite."""
    with np.errstate(over="ignore"):
        return np.array([[MISSING if value is None else value for value in values]], dtype=np.float32)


def _phases(result) -> dict[str, float | None]:
    """Seconds of each phase. On a GPU this waits for the step's end: it is the writer's thread that asks."""
    seconds = {"data": result.data_seconds, **result.clock.seconds()}
    return {f"{phase}_seconds": seconds.get(phase) for phase in PHASES}


class _Pack:
    """Everything the probes left on the device, as one float32 tensor on its way to the host."""

    def __init__(self, parts: dict[str, Tensor]):
        self.shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
        flat = [t.reshape(-1) if t.dtype == torch.float32 else t.to(torch.int32).view(torch.float32).reshape(-1)
                for t in parts.values()]  # counts travel as their bits
        self.values, self.arrived = torch.cat(flat), None
        if self.values.device.type == "cuda":
            host = torch.empty(self.values.shape, dtype=torch.float32, pin_memory=True)
            host.copy_(self.values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
            self.values = host

    def arrays(self) -> dict[str, np.ndarray]:
        if self.arrived is not None:
            self.arrived.synchronize()
        values, out, at = self.values.numpy(), {}, 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape))
            out[name] = values[at : at + size].reshape(shape)
            at += size
        return out


def _histogram_row(counts: np.ndarray) -> tuple:
    """(zero, subnormal, nan, inf, first, data) of one leaf's int32 [515] counts; see the table `hist`."""
    signs, (zeros, nans, infinities) = counts[:512].reshape(2, 256), counts[512:].tolist()
    normal = signs[:, 1:255]
    used = np.flatnonzero(normal.sum(0))
    first, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
    data = np.ascontiguousarray(normal[:, first:stop], dtype="<u4").tobytes()
    return zeros, int(signs[:, 0].sum()) - zeros, nans, infinities, first + 1, data
