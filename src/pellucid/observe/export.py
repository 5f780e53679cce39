"""A run's telemetry for other tools: TensorBoard, Weights & Biases (offline), MLflow, Parquet.

`observe.export = ["tensorboard"]` writes RUN/export/tensorboard when training ends; `export` does it for any run. Trackers
get scalars (run, evaluation, sources, layers, and whole tensors: not each expert, which would drown them); Parquet gets
everything, one file per stream, so that DuckDB, pandas and polars read it. Not measured is null or absent; NaN stays NaN.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pellucid.config import UserError
from pellucid.observe.reader import Reader, is_missing

SCALARS = {  # stream -> statistics for trackers; None: all of them
    "run": None,
    "evaluation": None,
    "source": ("loss",),
    "layer": None,
    "param": ("weight_norm", "gradient_norm", "update_norm", "update_ratio", "adam_rms", "cos_descent", "credit"),
}
TOOLS = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}
Scalars = Iterator[tuple[int, float, dict[str, float]]]  # step, time, name -> value


def export(run_dir: str | Path, kind: str, destination: str | Path | None = None) -> Path:
    """Write a run's telemetry for one tool; returns the folder. kind: a key of EXPORTERS. Complete, or as it was before.

    Raises UserError when the tool's package is not installed or the kind is unknown.
    """
    _known(kind)
    folder = Path(destination) if destination is not None else Path(run_dir) / "export" / kind
    unfinished = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with Reader(run_dir) as run:
            unfinished.mkdir(parents=True)
            EXPORTERS[kind](run, unfinished, Path(run_dir).resolve().name)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def check_tools(kinds: Iterable[str]) -> None:
    """Raises UserError for a tool that is unknown or not installed: better before hours of training than after."""
    for kind in kinds:
        _known(kind)
        if kind in TOOLS:
            _needs(*TOOLS[kind])


def scalars(run: Reader) -> Scalars:
    """Every step's scalars under names like `run/loss` and `param/update_ratio/layers.0.attention.q_proj.weight`."""
    series: dict[int, dict[str, float]] = {}
    for stream, chosen in SCALARS.items():
        rows, stats = run.rows(stream), run.stats(stream)
        steps, frames = run.frames(stream)
        missing = is_missing(frames)
        for row in rows:
            if row["expert"] is not None:
                continue
            for stat in stats:
                if chosen is not None and stat["name"] not in chosen:
                    continue
                name = f"{stream}/{stat['name']}" + (f"/{row['name']}" if len(rows) > 1 else "")
                values, skip = frames[:, row["id"], stat["id"]], missing[:, row["id"], stat["id"]]
                for step, value in zip(steps[~skip].tolist(), values[~skip].tolist(), strict=True):
                    series.setdefault(step, {})[name] = value
    times = {r["step"]: r["time"] for r in run.query("SELECT step, max(time) AS time FROM frame GROUP BY step")}
    for step in sorted(series):
        yield step, times[step], series[step]


def _tensorboard(run: Reader, folder: Path, name: str) -> None:
    writer = _needs(*TOOLS["tensorboard"]).SummaryWriter(str(folder))
    for step, time, values in scalars(run):
        for key, value in values.items():
            writer.add_scalar(key, value, step, walltime=time)
    for event in run.events():
        writer.add_text(event["rule"], f"{event['subject']}: {event['text']}", event["step"], walltime=event["time"])
    writer.close()


def _wandb(run: Reader, folder: Path, name: str) -> None:
    wandb = _needs(*TOOLS["wandb"])
    settings = wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off", silent=True)
    with wandb.init(mode="offline", dir=str(folder), project="pellucid", name=name, config=run.meta.get("config"),
                    settings=settings, reinit="finish_previous") as session:  # fmt: skip
        for step, time, values in scalars(run):
            session.log({**values, "_timestamp": time}, step=max(step, 0))  # it has no place for what was before training


def _mlflow(run: Reader, folder: Path, name: str) -> None:
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions refuse a folder without it
    mlflow = _needs(*TOOLS["mlflow"])
    entities = importlib.import_module("mlflow.entities")
    client = mlflow.MlflowClient(tracking_uri=(folder.absolute() / "mlruns").as_uri())
    record = client.create_run(client.create_experiment("pellucid"), run_name=name)
    parameters = [entities.Param(k, str(v)[:500]) for k, v in _flat(run.meta.get("config", {}))]
    for start in range(0, len(parameters), 100):  # the most the protocol takes at once
        client.log_batch(record.info.run_id, params=parameters[start : start + 100])
    for step, time, values in scalars(run):
        metrics = [entities.Metric(k, v, int(1000 * time), step) for k, v in values.items()]
        for start in range(0, len(metrics), 1000):
            client.log_batch(record.info.run_id, metrics=metrics[start : start + 1000])
    client.set_terminated(record.info.run_id)


def _parquet(run: Reader, folder: Path, name: str) -> None:
    """STREAM.parquet: step, row, layer, expert, role, one float column per statistic. events.parquet beside them."""
    for stream in run.streams():
        rows, stats = run.rows(stream), run.stats(stream)
        steps, frames = run.frames(stream)
        repeat = lambda key, rows=rows, steps=steps: [row[key] for row in rows] * len(steps)
        columns: dict[str, Any] = {"step": np.repeat(steps, len(rows)), "row": pa.array(repeat("name")).dictionary_encode()}
        columns |= {key: pa.array(repeat(key), kind) for key, kind in (("layer", pa.int32()), ("expert", pa.int32()))}
        columns["role"] = pa.array(repeat("role")).dictionary_encode()
        for stat in stats:
            values = np.ascontiguousarray(frames[:, :, stat["id"]]).reshape(-1)
            columns[stat["name"]] = pa.array(values, pa.float32(), mask=is_missing(values))
        pq.write_table(pa.table(columns), folder / f"{stream}.parquet", compression="zstd")
    events = run.events()
    if events:
        pq.write_table(pa.Table.from_pylist(events), folder / "events.parquet")


EXPORTERS: dict[str, Callable[[Reader, Path, str], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "parquet": _parquet,
}


def _known(kind: str) -> None:
    if kind not in EXPORTERS:
        raise UserError(f"export to '{kind}': not known; choose from {', '.join(EXPORTERS)}")


def _needs(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"export: the package '{package}' is not installed; pip install {package}") from None


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
