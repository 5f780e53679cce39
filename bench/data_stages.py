"""Speed of the data stages, with datatrove on the same documents in the same run. One process, one thread.

    python bench/data_stages.py CORPUS_DIR [--megabytes 6] [--out bench/results/data_stages.json]

CORPUS_DIR holds .jsonl files with a "text" a line; equal shares of each are taken. Unit: megabytes (1e6) of UTF-8 per
second of CPU time. Every line starts cold (no word seen before). "together" is one document through all five, as
a pipeline does it; there datatrove's own cache of the last word splits works too. Without datatrove its column is empty.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path

import machine

from pellucid import config as settings
from pellucid.data.stages import c4, quality, repetition, textview
from pellucid.data.stages.minhash import MinHash
from pellucid.data.stages.normalize import normalize
from pellucid.data.stages.textview import view

RESULTS = Path(__file__).parent / "results" / "data_stages.json"
REPETITION, QUALITY, C4, FINEWEB = (settings.GopherRepetitionFilter(), settings.GopherQualityFilter(),
                                    settings.C4Filter(), settings.FineWebFilter())
DEFAULT, MINHASH = settings.NormalizeConfig(), MinHash()
FULL = settings.NormalizeConfig(
    quotes=True, whitespace="collapse", lowercase=True, punctuation=True, pii=["email", "ip", "phone", "card"])
STAGES: dict[str, Callable[[str], object]] = {
    "gopher_repetition": lambda text: repetition.gopher_repetition(view(text), REPETITION),
    "gopher_quality": lambda text: quality.gopher_quality(view(text), QUALITY),
    "c4": lambda text: c4.c4(view(text), C4),
    "fineweb": lambda text: quality.fineweb(view(text), FINEWEB),
    "minhash": lambda text: MINHASH.signature(view(text)),
}
ALONE: dict[str, Callable[[str], object]] = {
    "normalize": lambda text: normalize(text, DEFAULT),
    "normalize, all but repair": lambda text: normalize(text, FULL),
}


def peers() -> dict[str, Callable[[str], object]]:
    """The same stages of datatrove, or nothing where it is not installed."""
    try:
        from datatrove.data import Document
        from datatrove.pipeline import filters
        from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    except ImportError:
        return {}
    judges = {
        "gopher_repetition": filters.GopherRepetitionFilter(), "gopher_quality": filters.GopherQualityFilter(),
        "c4": filters.C4QualityFilter(), "fineweb": filters.FineWebQualityFilter(char_duplicates_ratio=0.1),
    }
    signer = MinhashDedupSignature("/tmp", config=MinhashConfig(num_buckets=14, hashes_per_bucket=8, n_grams=5))

    def sign(text: str) -> object:
        shingles = signer.get_shingles(text)
        return signer.get_signature(shingles) if shingles.size else None

    def apply(judge: object) -> Callable[[str], object]:
        return lambda text: judge.filter(Document(text=text, id="0"))

    return {name: apply(judge) for name, judge in judges.items()} | {"minhash": sign}


def read_corpus(folder: Path, megabytes: float) -> list[str]:
    """Documents from every .jsonl of the folder, the same number of bytes of each."""
    files, texts = sorted(folder.glob("*.jsonl")), []
    for file in files:
        size = 0
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                texts.append(text)
                size += len(text.encode())
                if size >= megabytes * 1e6 / len(files):
                    break
    return texts


def megabytes_per_second(texts: list[str], functions: list[Callable[[str], object]]) -> float:
    """Every text through all functions, from a cold start."""
    textview.view.cache_clear()
    textview._vocabulary = textview.Vocabulary()
    start = time.process_time()
    for text in texts:
        for function in functions:
            function(text)
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--megabytes", type=float, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    about = machine.about()
    texts, theirs = read_corpus(arguments.corpus, arguments.megabytes), peers()
    for function in theirs.values():
        function("Load what is loaded once.")
    rows = {name: (list(STAGES.values()) if name == "together" else [(STAGES | ALONE)[name]],
                   (list(theirs.values()) if name == "together" else [theirs[name]] if name in theirs else []))
            for name in (*STAGES, "together", *ALONE)}
    results = {}
    print(f"{'MB per CPU-second':28s}{'pellucid':>10s}{'datatrove':>11s}{'ratio':>8s}")
    for name, (our, their) in rows.items():
        ours = megabytes_per_second(texts, our)
        peer = megabytes_per_second(texts, their) if their else None
        results[name] = {"pellucid": round(ours, 2), "datatrove": peer and round(peer, 3)}
        print(f"{name:28s}{ours:10.2f}" + (f"{peer:11.3f}{ours / peer:7.0f}x" if peer else ""), flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("numpy", *(["datatrove", "spacy"] if theirs else []))}
    corpus = {"documents": len(texts), "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 2),
              "files": [path.name for path in sorted(arguments.corpus.glob("*.jsonl"))]}
    arguments.out.write_text(json.dumps({
        "unit": "MB per CPU-second", "corpus": corpus, **about, "versions": versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
