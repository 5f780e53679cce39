"""The whole first half of picture 2 over growing corpora: speed, and whether memory grows. datatrove in the same run.

    python bench/data_pass.py CORPUS_DIR [--megabytes 50 150 500] [--peer PYTHON]    writes bench/results/data_pass.json

A build with everything on (normalize, length, language, Gopher's two, C4, FineWeb, exact and near-duplicates by MinHash;
a bytes tokenizer, so that no training is measured) in one process, for each size in a process of its own. CORPUS_DIR
holds .jsonl files with "text"; where they are too small they are read again with a fifth of the words exchanged, so that
no near-duplicates arise. Unit: MB (1e6) of text per second of CPU time; memory is the largest resident set of the process.

--peer: a python with datatrove[processing], spacy (and "xxhash<4", or its hashes fail); it puts documents of the same
corpus through the same filters and MinHash, in the same order and each until the first that drops it. It has no language
filter there: that wants a download. It reads no files and writes none, which is in its favour.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import machine

RESULTS = Path(__file__).parent / "results" / "data_pass.json"
PEER_MEGABYTES = 2
FILTERS = ("length", "language", "gopher_quality", "gopher_repetition", "c4", "fineweb")


def texts(folder: Path, megabytes: float) -> Iterator[str]:
    """So many megabytes of the corpus; documents of all files in turn, then all again with other words."""
    rng, size, again = random.Random(0), 0, 0
    while True:
        files = [open(path, encoding="utf-8") for path in sorted(folder.glob("*.jsonl"))]
        while files:
            for file in list(files):
                line = file.readline()
                if not line:
                    files.remove(file)
                    continue
                text = json.loads(line)["text"]
                if again:
                    text = " ".join(f"{word[:1]}{rng.randrange(9999)}" if rng.random() < 0.2 else word for word in text.split(" "))
                yield text
                size += len(text.encode())
                if size >= megabytes * 1e6:
                    return
        again += 1


def ours(folder: Path, megabytes: float) -> dict:
    """One build, in this process."""
    from pellucid.config import DataConfig
    from pellucid.data.build import prepare
    from pellucid.data.workers import InThisProcess

    with tempfile.TemporaryDirectory() as name:
        path, size = Path(name) / "corpus.jsonl", 0
        with open(path, "w", encoding="utf-8") as file:
            for text in texts(folder, megabytes):
                size += len(text.encode())
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        config = DataConfig(sources=[str(path)], directory=name, tokenizer={"kind": "bytes"},
                            filter=dict.fromkeys(FILTERS, True), deduplicate={"exact": True, "near": True})
        before, start, wall = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.perf_counter()
        at: dict[str, float] = {}
        stage_ended = lambda stage, *rest: at.update({stage: time.process_time()})
        dataset = prepare(config, workers=InThisProcess(), progress=stage_ended)
        cpu = time.process_time() - start
        stages = {stage["name"]: [stage["documents_in"], stage["documents_out"]] for stage in dataset.manifest["stages"]}
        clean = at["deduplicate"] - start
        return {"megabytes": round(size / 1e6, 1), "MB per CPU-second, read to deduplicated": round(size / 1e6 / clean, 2),
                "MB per CPU-second, whole build": round(size / 1e6 / cpu, 2), "CPU seconds": round(cpu, 1),
                "wall seconds": round(time.perf_counter() - wall, 1),
                "memory at start, MB": round(before / 1e3), "largest memory, MB":
                round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3), "documents in and out": stages}


def theirs(folder: Path, megabytes: float) -> dict:
    """datatrove's filters and signatures over the first documents, in this process."""
    sys.path.insert(0, str(Path(__file__).parent))
    from data_stages import peers
    from datatrove.data import Document
    from datatrove.pipeline import filters

    judges = [filters.GopherQualityFilter(), filters.GopherRepetitionFilter(), filters.C4QualityFilter(),
              filters.FineWebQualityFilter(char_duplicates_ratio=0.1)]
    sign = peers()["minhash"]
    sign("Load what is loaded once, such as the splitter into words.")
    documents = list(texts(folder, megabytes))
    size, kept, start = sum(len(text.encode()) for text in documents), 0, time.process_time()
    for text in documents:
        document = Document(text=text, id="0")
        try:
            if all(judge.filter(document) is True for judge in judges):
                kept += 1
                sign(document.text)
        except (ZeroDivisionError, AssertionError):  # of its own, on odd documents
            continue
    return {"megabytes": round(size / 1e6, 1), "documents in and out": [len(documents), kept],
            "MB per CPU-second": round(size / 1e6 / (time.process_time() - start), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[50, 150, 500])
    parser.add_argument("--peer", help="python that has datatrove")
    parser.add_argument("--one", choices=["ours", "theirs"], help="run one case here, print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT", json.dumps((ours if arguments.one == "ours" else theirs)(arguments.corpus, arguments.megabytes[0])))
        return

    def run(python: str, case: str, megabytes: float) -> dict:
        command = [python, __file__, str(arguments.corpus), "--one", case, "--megabytes", str(megabytes)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT")).partition(" ")[2])

    about = machine.about()
    results: dict = {"pellucid": []}
    if arguments.peer:
        results["datatrove"] = run(arguments.peer, "theirs", PEER_MEGABYTES)
        print("datatrove", results["datatrove"], flush=True)
    for megabytes in arguments.megabytes:
        results["pellucid"].append(run(sys.executable, "ours", megabytes))
        print("pellucid", results["pellucid"][-1], flush=True)
        RESULTS.write_text(json.dumps({
            **about,
            "versions": {name: importlib.metadata.version(name) for name in ("numpy", "pyarrow", "zstandard")},
            "corpus": [path.name for path in sorted(arguments.corpus.glob("*.jsonl"))], "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
