"""Stop a loader after 600 of 2,000 shuffled samples, go on with other workers, and count what was lost or seen twice.

    python -m venv peers && peers/bin/pip install grain litdata torchdata datasets torch
    python bench/data_resume.py [--peers peers/bin/python]       writes bench/results/data_resume.json

Every case runs in a process of its own: the loader gives 600 samples under `before` workers (for Pellucid: ranks that
share each batch), says its state, and one made anew with `after` workers takes that state to the end of the epoch. A
crash is reported as what it says. Pellucid needs nothing but this environment; without --peers the others run there too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import machine

SAMPLES, STOP, BATCH = 2000, 600, 20
RESULTS = Path(__file__).parent / "results" / "data_resume.json"
CHANGES = [(2, 2), (2, 1), (2, 4)]  # workers before and after


def pellucid(folder: Path, before: int, after: int) -> tuple[list[int], list[int]]:
    """Rows of one document each; the state is one of a run, not of a worker."""
    from pellucid.config import DataConfig
    from pellucid.data.build import prepare
    from pellucid.data.loader import Loader

    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"{n:07}"}) + "\n" for n in range(SAMPLES)))
    config = DataConfig(sources=[str(folder / "a.jsonl")], directory=str(folder / "data"), sequence_length=8,
                        validation_fraction=0, tokenizer={"kind": "bytes"})
    split = prepare(config).train

    def ranks(count: int, state: dict | None, batches: int) -> tuple[list[int], dict]:
        seen: list[int] = []
        loaders = [Loader(split, BATCH, rank=rank, world_size=count) for rank in range(count)]
        for loader in loaders:
            if state is not None:
                loader.restore(state)
        for _ in range(batches):
            for loader in loaders:
                seen += next(loader).sample_ids_B.tolist()
        state = loaders[0].state()
        for loader in loaders:
            loader.close()
        return seen, json.loads(json.dumps(state))

    first, state = ranks(before, None, STOP // BATCH)
    return first, ranks(after, state, (SAMPLES - STOP) // BATCH)[0]


def hugging_face(folder: Path, before: int, after: int) -> tuple[list[int], list[int]]:
    """datasets: a streamed, shuffled IterableDataset with its own state_dict (it has no workers of its own)."""
    import datasets

    def make() -> object:
        files = [str(path) for path in sorted(folder.glob("*.jsonl"))]
        stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=str(folder / "cache"))
        return stream.shuffle(seed=0, buffer_size=100)

    _numbered_files(folder)
    stream, first = make(), []
    for record in stream:
        first.append(record["id"])
        if len(first) == STOP:
            break
    state = json.loads(json.dumps(stream.state_dict()))
    stream = make()
    stream.load_state_dict(state)
    return first, [record["id"] for record in stream]


def stateful_data_loader(folder: Path, before: int, after: int) -> tuple[list[int], list[int]]:
    """The same in torchdata's StatefulDataLoader, with its workers."""
    import datasets
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make(workers: int) -> object:
        files = [str(path) for path in sorted(folder.glob("*.jsonl"))]
        stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=str(folder / "cache"))
        return StatefulDataLoader(stream.shuffle(seed=0, buffer_size=100), batch_size=BATCH, num_workers=workers)

    _numbered_files(folder)
    return _stop_and_go_on(make, before, after, lambda batch: batch["id"].tolist())


def grain(folder: Path, before: int, after: int) -> tuple[list[int], list[int]]:
    """A shuffled MapDataset, prefetched by worker processes."""
    import grain

    def make(workers: int) -> object:
        dataset = grain.MapDataset.range(SAMPLES).shuffle(seed=0).batch(BATCH).to_iter_dataset()
        return iter(dataset.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=workers)))

    iterator, first = make(before), []
    while len(first) < STOP:
        first += next(iterator).tolist()
    state = iterator.get_state()
    iterator = make(after)
    iterator.set_state(state)
    return first, [int(number) for batch in iterator for number in batch]


def litdata(folder: Path, before: int, after: int) -> tuple[list[int], list[int]]:
    """An optimized, shuffled StreamingDataset in its StreamingDataLoader."""
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    optimize(fn=_numbered, inputs=list(range(SAMPLES)), output_dir=str(folder / "out"), chunk_size=50, num_workers=1)

    def make(workers: int) -> object:
        return StreamingDataLoader(StreamingDataset(str(folder / "out"), shuffle=True, seed=0), batch_size=BATCH,
                                   num_workers=workers)

    return _stop_and_go_on(make, before, after, lambda batch: batch["id"].tolist())


def _stop_and_go_on(make: Callable, before: int, after: int, ids: Callable) -> tuple[list[int], list[int]]:
    loader, first = make(before), []
    for batch in loader:
        first += ids(batch)
        if len(first) >= STOP:
            break
    state = loader.state_dict()
    loader = make(after)
    loader.load_state_dict(state)
    return first, [number for batch in loader for number in ids(batch)]


def _numbered(number: int) -> dict:
    return {"id": number}


def _numbered_files(folder: Path, files: int = 8) -> None:
    for file in range(files):
        lines = (json.dumps({"id": n}) + "\n" for n in range(file * SAMPLES // files, (file + 1) * SAMPLES // files))
        (folder / f"{file}.jsonl").write_text("".join(lines))


SYSTEMS = {"pellucid": pellucid, "datasets": hugging_face, "datasets + StatefulDataLoader": stateful_data_loader,
           "grain": grain, "litdata": litdata}


def case(name: str, before: int, after: int) -> dict:
    """What became of every sample, in this process."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            first, rest = SYSTEMS[name](Path(folder), before, after)
        except Exception as error:  # what a user would see
            where = traceback.extract_tb(error.__traceback__)[-1]
            return {"crash": f"{type(error).__name__}: {(str(error).strip() or where.line).splitlines()[-1][:120]}"}
    counts = Counter(first + rest)
    return {"before": len(first), "after": len(rest), "lost": SAMPLES - len(counts),
            "repeated": sum(count - 1 for count in counts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=sys.executable, help="python that has the peers")
    parser.add_argument("--case", nargs=3, metavar=("SYSTEM", "BEFORE", "AFTER"), help="run one, print JSON")
    arguments = parser.parse_args()
    if arguments.case:
        name, before, after = arguments.case
        print("RESULT", json.dumps(case(name, int(before), int(after))), flush=True)
        return
    about, results, versions = machine.about(), {}, {}
    for name in SYSTEMS:
        python = sys.executable if name == "pellucid" else arguments.peers
        for before, after in CHANGES if name != "datasets" else [(1, 1)]:
            done = subprocess.run([python, __file__, "--case", name, str(before), str(after)], capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
            outcome = json.loads(lines[-1].partition(" ")[2]) if lines else {"crash": done.stderr.strip().splitlines()[-1][:120]}
            results.setdefault(name, {})[f"{before} -> {after}"] = outcome
            print(f"{name:32s}{before} -> {after}   {outcome}", flush=True)
    ask = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in %r}))"
    packages = ["datasets", "torchdata", "grain", "litdata", "torch"]
    versions = json.loads(subprocess.run([arguments.peers, "-c", ask % packages], capture_output=True, text=True).stdout or "{}")
    RESULTS.write_text(json.dumps({
        "samples": SAMPLES, "stopped_after": STOP, **about, "versions": versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
