"""Tokens a second that a loader gives, from one process: Pellucid's, and plain ways of doing it in the same run.

    python bench/loader.py [--megabytes 20] [--seconds 3]       writes bench/results/loader.json

Text made here (documents of 20 to 20,000 bytes), tokenized to bytes, packed in rows of 2,048; batches of 16 rows in
global random order. Pellucid's hold tokens, targets, segment ids and positions; "memmap windows" is what small trainers
do (random windows of one flat file: no documents, no segments, no epoch); "datasets" are the same rows in a shuffled,
memory-mapped Hugging Face dataset. Unit: million tokens per CPU-second of the whole process, threads included.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
import numpy as np
import torch

from pellucid.config import DataConfig
from pellucid.data.build import prepare
from pellucid.data.dataset import Split
from pellucid.data.loader import Loader

RESULTS = Path(__file__).parent / "results" / "loader.json"
T, B = 2048, 16


def write_corpus(folder: Path, megabytes: float) -> Path:
    rng, path, size = random.Random(0), folder / "corpus.jsonl", 0
    words = [f"{a}{b}" for a in ("ri", "hou", "let", "se", "gre", "wal") for b in ("ver", "se", "ters", "ven", "en", "king")]
    with open(path, "w") as file:
        while size < megabytes * 1e6:
            text = " ".join(rng.choices(words, k=round(4 * 10 ** rng.uniform(0, 3))))
            size += file.write(json.dumps({"text": text}) + "\n")
    return path


def ours(split: Split, prefetch: int) -> Iterator[None]:
    with Loader(split, B, prefetch=prefetch) as loader:
        for _ in loader:
            yield


def memmap_windows(path: Path) -> Iterator[None]:
    """nanoGPT's get_batch."""
    while True:
        data = np.memmap(path, dtype="<u4", mode="r")
        at = torch.randint(len(data) - T, (B,))
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in at])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in at])
        yield x, y


def hugging_face(split: Split, folder: Path) -> Iterator[None]:
    import datasets

    rows = split.rows(0, len(split))
    columns = {"input_ids": rows.tokens_BT.numpy(), "labels": rows.targets_BT.numpy(),
               "segment_ids": rows.segment_ids_BT.numpy(), "position_ids": rows.positions_BT.numpy()}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "hf"))
    stored = datasets.load_from_disk(str(folder / "hf"))
    while True:
        yield from stored.shuffle(seed=0).with_format("torch").iter(batch_size=B)


def speed(make: Callable[[], Iterator[None]], seconds: float) -> float:
    batches, count = make(), 0
    next(batches)
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count * B * T / (time.process_time() - cpu) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--seconds", type=float, default=3)
    arguments = parser.parse_args()
    about = machine.about()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = DataConfig(sources=[str(write_corpus(folder, arguments.megabytes))], directory=str(folder / "data"),
                            sequence_length=T, tokenizer={"kind": "bytes"}, validation_fraction=0)
        dataset = prepare(config)
        split = dataset.train
        ways = {"pellucid": lambda: ours(split, 0), "pellucid, made ahead in a thread": lambda: ours(split, 2),
                "memmap windows": lambda: memmap_windows(dataset.directory / "shards" / "00000.tok"),
                "datasets": lambda: hugging_face(split, folder)}
        results = {}
        for way, make in ways.items():
            results[way] = round(speed(make, arguments.seconds), 1)
            print(f"{way:36s}{results[way]:8.1f} M tokens per CPU-second", flush=True)
        pieces = split.plan.rows and len(split.plan.length) / split.plan.rows
    RESULTS.write_text(json.dumps({
        "unit": "million tokens per CPU-second", "rows_of": T, "batch": B, "pieces_in_a_row": round(pieces, 2),
        "megabytes": arguments.megabytes, **about,
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "torch", "datasets")},
        "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
