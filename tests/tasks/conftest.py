"""Labelled documents whose label can be read off their text, and one finished run of each task on them."""

import json
import random
from pathlib import Path

import pytest

from pellucid.run import train

KINDS = {"animal": "cat dog horse cow", "metal": "iron gold tin lead", "colour": "red blue green white"}


def label_of(text: str) -> str:
    """The class of a text: the kind of its words."""
    return next(kind for kind, words in KINDS.items() if any(word in text.split() for word in words.split()))


def write_documents(path: Path, documents: int = 150, seed: int = 0) -> Path:
    """text, label (its kind), words (how many) and letters (of them)."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents):
            kind = rng.choice(list(KINDS))
            words = [rng.choice(KINDS[kind].split()) for _ in range(rng.randint(1, 6))]
            text = " ".join([*words, str(number)])
            record = {"text": text, "label": kind, "words": len(words), "letters": sum(map(len, words)) / 2}
            file.write(json.dumps(record) + "\n")
    return path


def settings(folder: Path, task: str = "classification", label_field="label", **training) -> dict:
    return {
        "model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "num_experts": 4},
        "data": {"sources": [str(folder / "a.jsonl")], "label_field": label_field, "validation_fraction": 0.2,
                 "sequence_length": 48, "tokenizer": {"kind": "bytes"}, "directory": str(folder / "data")},
        "training": {"task": task, "max_steps": 12, "batch_size": 8, "micro_batch_size": 4, "precision": "fp32", "device": "cpu",
                     "evaluate_every": 5, **training},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every_steps": 3},
        "observe": {"budget": 1.0},
    }  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    write_documents(folder / "a.jsonl")
    return folder


@pytest.fixture(scope="session")
def tables(folder):
    """A function: the settings of a run on the documents."""
    return lambda *task, **training: settings(folder, *task, **training)


@pytest.fixture(scope="session")
def class_run(folder, tables):
    return train(tables(max_steps=60), run_dir=folder / "classes")


@pytest.fixture(scope="session")
def number_run(folder, tables):
    return train(tables("regression", ["words", "letters"], max_steps=60), run_dir=folder / "numbers")
