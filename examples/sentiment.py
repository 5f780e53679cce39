"""How positive, and how subjective, is a word in this sense? Regression of two numbers, beside a scikit-learn baseline.

Data: the adjectives that people rated for pattern (De Smedt & Daelemans 2012), which TextBlob carries in its package (no
download): a word, the gloss of its sense, polarity from -1 to 1 and subjectivity from 0 to 1. Words are held out whole.

    pip install 'pellucid[examples]' && python examples/sentiment.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import scipy.stats
import textblob
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score, root_mean_squared_error
from sklearn.pipeline import make_pipeline, make_union

import pellucid
from pellucid.measure.documents import predict_files

FIELDS = ["polarity", "subjectivity"]
TEST_SHARE = 0.2


def write(folder: Path) -> tuple[Path, Path]:
    """train.jsonl and test.jsonl: text, polarity, subjectivity."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for word in ElementTree.parse(Path(textblob.__file__).parent / "en" / "en-sentiment.xml").getroot().iter("word"):
        form, sense = word.get("form"), word.get("sense")
        if sense:
            held_out = int.from_bytes(hashlib.blake2b(form.encode(), digest_size=4).digest()) < TEST_SHARE * 2**32
            row = {"text": f"{form}: {sense}", **{field: float(word.get(field)) for field in FIELDS}}
            lines["test" if held_out else "train"].append(json.dumps(row) + "\n")
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder / "train.jsonl", folder / "test.jsonl"


def read(path: Path) -> tuple[list[str], np.ndarray]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], np.array([[row[field] for field in FIELDS] for row in rows])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--folder", type=Path, default=Path("runs/sentiment-example"), help="of data and run")
    arguments.add_argument("--steps", type=int, default=200)
    given = arguments.parse_args()
    train, test = write(given.folder)
    (texts, numbers), (test_texts, truth) = read(train), read(test)
    print(f"{len(texts):,} training and {len(truth):,} test senses\n")

    results = {"the mean of the training senses": (np.tile(numbers.mean(0), (len(truth), 1)), 0.0)}
    began = time.perf_counter()
    baseline = make_pipeline(make_union(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
                                        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)),
                             Ridge(alpha=2.0))  # fmt: skip
    baseline.fit(texts, numbers)
    found = baseline.predict(test_texts)
    results["TF-IDF of words and letters + ridge"] = (found, time.perf_counter() - began)

    began = time.perf_counter()
    run = pellucid.train({
        "model": {"preset": "tiny"},
        "data": {"sources": [str(train)], "label_field": FIELDS, "sequence_length": 64, "validation_fraction": 0.1,
                 "directory": str(given.folder / "data")},
        "training": {"task": "regression", "max_steps": given.steps, "batch_size": 16, "evaluate_every": 50},
    }, run_dir=given.folder / f"run-{len(list(given.folder.glob('run-*'))) + 1}", progress=True)  # fmt: skip
    model, tokenizer = run.load()
    found = np.array([[row[field] for field in FIELDS] for row in predict_files(model, tokenizer, str(test))])
    results["a small Grok-1, from scratch"] = (found, time.perf_counter() - began)

    print(f"\n{'on the test senses':<36} {'':>12}    RMSE      R2  Spearman   seconds")
    for name, (found, seconds) in results.items():
        for k, field in enumerate(FIELDS):
            rank = scipy.stats.spearmanr(truth[:, k], found[:, k]).statistic if np.ptp(found[:, k]) else float("nan")
            print(f"{name:<36} {field:>12} {root_mean_squared_error(truth[:, k], found[:, k]):7.4f} "
                  f"{r2_score(truth[:, k], found[:, k]):7.4f}  {rank:8.4f}  {seconds:8.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
