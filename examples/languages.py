"""In which of sixteen languages is this message? Classification of short texts, beside a scikit-learn baseline.

Data: the message catalogues that Django carries in its package (no download): each message in many languages. Messages
are held out whole, in all languages, so no test sentence has a translation in the training text. Several languages are
close relatives (Czech and Slovak; Danish, Norwegian and Swedish; Spanish, Galician, Catalan, Portuguese).

    pip install 'pellucid[examples]' && python examples/languages.py
"""

from __future__ import annotations

import argparse
import gettext
import hashlib
import json
import time
from pathlib import Path

import django
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline

import pellucid
from pellucid.measure.documents import predict_files

LANGUAGES = "ca cs da de es fr gl hr it nb nl pl pt ro sk sv".split()
TEST_SHARE = 0.2


def messages():
    """(language, message id, translation) of every catalogue; short strings without letters are left out."""
    for language in LANGUAGES:
        for path in sorted(Path(django.__file__).parent.glob(f"**/locale/{language}/LC_MESSAGES/django.mo")):
            with open(path, "rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog
            for key, text in catalogue.items():
                name = key[0] if isinstance(key, tuple) else key
                if name and text and text != name and sum(map(str.isalpha, text)) >= 8:
                    yield language, name, " ".join(text.split())


def write(folder: Path) -> tuple[Path, Path]:
    """train.jsonl and test.jsonl, each text once."""
    rows: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    for language, name, text in messages():
        held_out = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) < TEST_SHARE * 2**32
        rows["test" if held_out else "train"][text] = language
    rows["test"] = {text: language for text, language in rows["test"].items() if text not in rows["train"]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, labelled in rows.items():
        lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in labelled.items())
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "train.jsonl", folder / "test.jsonl"


def read(path: Path) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--folder", type=Path, default=Path("runs/languages-example"), help="of data and run")
    arguments.add_argument("--steps", type=int, default=600)
    given = arguments.parse_args()
    train, test = write(given.folder)
    (texts, labels), (test_texts, truth) = read(train), read(test)
    print(f"{len(texts):,} training and {len(truth):,} test messages in {len(LANGUAGES)} languages\n")

    began = time.perf_counter()
    baseline = make_pipeline(TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True),
                             LogisticRegression(C=30, max_iter=300))  # fmt: skip
    baseline.fit(texts, labels)
    found = baseline.predict(test_texts)
    results = {"TF-IDF of 1 to 4 letters + logistic regression": (found, time.perf_counter() - began)}

    began = time.perf_counter()
    run = pellucid.train({
        "model": {"preset": "tiny"},
        "data": {"sources": [str(train)], "label_field": "label", "sequence_length": 192, "validation_fraction": 0.05,
                 "tokenizer": {"kind": "bytes"}, "directory": str(given.folder / "data")},
        "training": {"task": "classification", "max_steps": given.steps, "batch_size": 16, "evaluate_every": 200},
    }, run_dir=given.folder / f"run-{len(list(given.folder.glob('run-*'))) + 1}", progress=True)  # fmt: skip
    model, tokenizer = run.load()
    found = [row["label"] for row in predict_files(model, tokenizer, str(test))]
    results["a small Grok-1, from scratch, on bytes"] = (found, time.perf_counter() - began)

    print(f"\n{'on the test messages':<48}  accuracy  macro-F1   seconds")
    for name, (labels, seconds) in results.items():
        print(f"{name:<48}  {accuracy_score(truth, labels):8.4f}  {f1_score(truth, labels, average='macro'):8.4f}  {seconds:8.0f}")


if __name__ == "__main__":
    main()
