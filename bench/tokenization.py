"""Speed and exactness of tokenizing and of training a tokenizer, with the peers on the same documents in the same run.

    python bench/tokenization.py CORPUS_DIR [--megabytes N] [--train-megabytes 50] [--out bench/results/tokenization.json]

CORPUS_DIR holds .jsonl files with a "text" a line. Encoding: one thread, cold, one pass over all documents (or every n-th,
for --megabytes), in megabytes (1e6) of UTF-8 per second of CPU time; our own lines are timed as a build uses them (arrays
out, texts for the reference included). `differ` counts documents whose ids are not the reference's. Training: each
trainer in a process of its own, wall and CPU seconds and its peak memory. `--parts exactness`: no speeds; every library on
every document of the corpus, and on 20,000 adversarial texts.
"""

from __future__ import annotations

import os

os.environ |= {"RAYON_NUM_THREADS": os.environ.get("RAYON_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}

import argparse
import hashlib
import importlib
import importlib.metadata
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import machine
import numpy as np
import sentencepiece
import tokenizers

from pellucid.config import TokenizerConfig
from pellucid.data import bpe_training
from pellucid.data.encoders import choose_encoder
from pellucid.data.sentencepiece_json import sentencepiece_to_json
from pellucid.data.tokenizer import load_tokenizer
from pellucid.data.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[1]
OFFICIAL = ROOT / "tests" / "fixtures" / "tokenizer" / "tokenizer.model"
VOCABULARY = 131072
Encode = Callable[[list[str]], list]
PACKAGES = ("sentencepiece", "tokenizers", "gigatoken", "kitoken", "splintr-rs", "gigabpe", "tiktoken", "rustbpe", "numpy")


def documents(folder: Path, megabytes: float) -> Iterator[str]:
    """Every n-th document of every file, such that there are about so many megabytes."""
    files = sorted(folder.glob("*.jsonl"))
    share = min(1.0, megabytes * 1e6 / sum(file.stat().st_size for file in files))
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if int((number + 1) * share) > int(number * share):
                    yield json.loads(line)["text"]


def batches(texts: Iterable[str], size: int = 1 << 20) -> Iterator[list[str]]:
    """As a build hands them over: about a megabyte."""
    batch, length = [], 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def measure(encode: Encode, texts: list[str]) -> tuple[float, float, list[bytes], int]:
    """(CPU seconds, wall seconds, a digest of each document's ids, tokens)."""
    cpu = wall = 0.0
    digests, tokens = [], 0
    for batch in batches(texts):
        begun, started = time.process_time(), time.perf_counter()
        ids = encode(batch)
        cpu, wall = cpu + time.process_time() - begun, wall + time.perf_counter() - started
        for item in ids:
            digests.append(hashlib.blake2b(np.asarray(item, dtype=np.uint32).tobytes(), digest_size=8).digest())
            tokens += len(item)
    return cpu, wall, digests, tokens


def compare(name: str, encoders: dict[str, Encode], texts: list[str]) -> dict[str, dict]:
    """A table of encoders; the first is the reference."""
    megabytes, rows, reference = sum(len(text.encode()) for text in texts) / 1e6, {}, None
    print(f"{name}: {len(texts)} documents, {megabytes:.1f} MB\n{'':44s}{'MB/CPU-s':>9s}{'ratio':>7s}{'differ':>8s}")
    for label, encode in encoders.items():
        cpu, wall, digests, tokens = measure(encode, texts)
        reference = reference or (digests, cpu)
        differ = sum(a != b for a, b in zip(reference[0], digests, strict=True))
        rows[label] = {"mb_per_cpu_second": round(megabytes / cpu, 2), "mb_per_wall_second": round(megabytes / wall, 2),
                       "million_tokens_per_cpu_second": round(tokens / 1e6 / cpu, 2), "documents_that_differ": differ}
        print(f"{label:44s}{megabytes / cpu:9.2f}{reference[1] / cpu:6.1f}x{differ:8d}", flush=True)
    return {"documents": len(texts), "megabytes": round(megabytes, 1), "encoders": rows}


def hugging_face(content: bytes) -> Encode:
    backend = tokenizers.Tokenizer.from_buffer(content)
    backend.encode_special_tokens = True
    return lambda texts: [item.ids for item in backend.encode_batch_fast(texts, add_special_tokens=False)]


def ours(tokenizer, library: str) -> Encode:
    choice = choose_encoder(tokenizer.engine, library)
    if choice.encoder.name != library:
        sys.exit(f"{library}: {choice.refused}")
    return choice.encoder


def official_encoders() -> dict[str, Encode]:
    """Of Grok-1's tokenizer.model; the first is the reference."""
    tokenizer = load_tokenizer(OFFICIAL)
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.engine.content)
    return {
        "sentencepiece (reference)": lambda batch: model.encode(batch, num_threads=1),
        "pellucid: gigatoken": ours(tokenizer, "gigatoken"), "pellucid: kitoken": ours(tokenizer, "kitoken"),
        "tokenizers, our tokenizer.json": hugging_face(sentencepiece_to_json(tokenizer.engine.content)),
    }


def exactness(texts: Iterable[str]) -> dict:
    """Documents whose ids differ from the reference's, library by library; nothing is kept, so any amount will do."""
    reference, *others = official_encoders().items()
    found = {"documents": 0, "bytes": 0, "tokens": 0, "differ": dict.fromkeys((name for name, _ in others), 0)}
    for batch in batches(texts):
        expected = [np.asarray(ids, dtype=np.uint32) for ids in reference[1](batch)]
        found["documents"] += len(batch)
        found["bytes"] += sum(len(text.encode()) for text in batch)
        found["tokens"] += sum(map(len, expected))
        for name, encode in others:
            found["differ"][name] += sum(not np.array_equal(a, b) for a, b in zip(expected, encode(batch), strict=True))
    return found


def adversarial_texts(count: int) -> list[str]:
    sys.path.insert(0, str(ROOT / "tests" / "data"))
    return importlib.import_module("test_encoders").adversarial_texts(count)


def byte_level(texts: list[str], path: Path) -> dict:
    tokenizer = load_tokenizer(path)
    table = {"tokenizers (reference)": hugging_face(tokenizer.engine.content), "pellucid: splintr": ours(tokenizer, "splintr")}
    try:
        import tiktoken

        specials = 4
        ranks = {tokenizer.token_bytes(n): n for n in range(specials, tokenizer.vocab_size)}
        peer = tiktoken.Encoding("ours", pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+",
                                 mergeable_ranks=ranks, special_tokens={})
        table["tiktoken"] = lambda batch: peer.encode_ordinary_batch(batch, num_threads=1)
    except ImportError:
        pass
    return compare(f"byte-level BPE, {tokenizer.vocab_size} tokens", table, texts)


# -------------------------------------------------------------------------------------------- training


def _pellucid(kind: str, use_gigabpe: bool = True) -> Callable[[list[str]], object]:
    def train(texts: list[str]) -> object:
        if not use_gigabpe:
            bpe_training.gigabpe_problem = lambda: "left out"
        return train_tokenizer(TokenizerConfig(kind=kind, vocab_size=VOCABULARY), texts)

    return train


def _tokenizers(texts: list[str]) -> object:
    from tokenizers import models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return backend


def _sentencepiece(texts: list[str]) -> object:
    model = io.BytesIO()
    lines = (line[:4000] for text in texts for line in text.split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=VOCABULARY, byte_fallback=True,
        hard_vocab_limit=False, normalization_rule_name="identity", num_threads=2, minloglevel=2)
    return model


def _rustbpe(texts: list[str]) -> object:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size=VOCABULARY)
    return trainer


TRAINERS: dict[str, Callable[[list[str]], object]] = {
    "pellucid bpe: gigabpe": _pellucid("bpe"), "tokenizers BpeTrainer": _tokenizers, "rustbpe": _rustbpe,
    "sentencepiece bpe": _sentencepiece, "pellucid sentencepiece": _pellucid("sentencepiece"),
    "pellucid bpe: tokenizers alone": _pellucid("bpe", False), "pellucid unigram": _pellucid("unigram"),
}


def train_here(name: str, corpus: Path, megabytes: float, save: Path | None) -> None:
    """One trainer, in this process; prints its row."""
    os.environ["RAYON_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    texts = list(documents(corpus, megabytes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, started = time.process_time(), time.perf_counter()
    made = TRAINERS[name](texts)
    row = {"wall_seconds": round(time.perf_counter() - started, 2), "cpu_seconds": round(time.process_time() - begun, 2)}
    row["added_peak_gigabytes"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6, 2)
    row["megabytes"] = round(sum(len(text.encode()) for text in texts) / 1e6, 1)
    if save is not None:
        made.save(save)
    row["vocabulary"] = getattr(made, "vocab_size", None)
    print(json.dumps(row))


def training(corpus: Path, megabytes: float, save: Path, wanted: str) -> dict[str, dict]:
    rows = {}
    print(f"training {VOCABULARY} tokens on {megabytes:g} MB\n{'':44s}{'wall s':>8s}{'CPU s':>8s}{'GB':>6s}")
    for number, name in enumerate(TRAINERS):
        if wanted not in name:
            continue
        command = [sys.executable, __file__, str(corpus), "--train-megabytes", str(megabytes), "--train-here", name]
        environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
        environment["RAYON_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        done = subprocess.run(command + (["--save", str(save)] if number == 0 else []), capture_output=True, text=True, env=environment)
        if done.returncode:
            print(f"{name:44s} not run: {done.stderr.strip().splitlines()[-1]}")
            continue
        rows[name] = row = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:44s}{row['wall_seconds']:8.1f}{row['cpu_seconds']:8.1f}{row['added_peak_gigabytes']:6.2f}", flush=True)
    return rows


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--megabytes", type=float, default=150)
    parser.add_argument("--train-megabytes", type=float, default=50)
    parser.add_argument("--trainers", default="", help="only those whose name holds this")
    parser.add_argument("--parts", default="training,official,byte-level", help="which tables; the others are kept from --out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tokenization.json")
    parser.add_argument("--train-here", help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train_here:
        train_here(arguments.train_here, arguments.corpus, arguments.train_megabytes, arguments.save)
        return
    results = json.loads(arguments.out.read_bytes()) if arguments.out.exists() else {}
    about = {**machine.about(), "versions": versions(),
             "corpus": sorted(path.name for path in arguments.corpus.glob("*.jsonl"))}
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "bpe"
        if "training" in arguments.parts:
            rows = training(arguments.corpus, arguments.train_megabytes, trained, arguments.trainers)
            before = results.get("training", {}).get("trainers", {}) if arguments.trainers else {}
            results["training"] = {"about": about, "trainers": before | rows}
        if "exactness" in arguments.parts:
            results["exactness"] = {"about": about, "corpus": exactness(documents(arguments.corpus, float("inf"))),
                                    "adversarial": exactness(adversarial_texts(20_000))}
        timed = "official" in arguments.parts or "byte-level" in arguments.parts
        texts = list(documents(arguments.corpus, arguments.megabytes)) if timed else []
        if "official" in arguments.parts:
            results["official"] = {"about": about, **compare("Grok-1's tokenizer.model", official_encoders(), texts)}
        if "byte-level" in arguments.parts:
            if not trained.exists():
                train_tokenizer(TokenizerConfig(vocab_size=VOCABULARY), documents(arguments.corpus, 50)).save(trained)
            results["byte-level"] = {"about": about, **byte_level(texts[::3], trained)}
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
