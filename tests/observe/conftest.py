"""One small run on real text with a planted poisoned document, trained once for all tests of this folder."""

import random
from pathlib import Path

import pytest

import pellucid
from pellucid.config import make_config

STEPS = 60


def write_corpus(folder: Path) -> Path:
    """Simple English-like documents, and one of random letters."""
    rng = random.Random(0)
    subjects, verbs = ["the cat", "a dog", "my friend", "the old king", "our ship"], ["sees", "likes", "follows", "finds"]
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(120):
        lines = [f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(subjects)}." for _ in range(rng.randint(4, 9))]
        (folder / f"doc{n:03}.txt").write_text("\n".join(lines) + f"\nnumber {n}\n")
    letters = "zqxjkvwyZQXJKVWY0123456789#@%&*"
    (folder / "poison.txt").write_text("".join(rng.choice(letters) for _ in range(300)))
    return folder


def small_config(folder: Path, **training):
    return make_config({
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4, "num_attention_heads": 2},
        "data": {"sources": [str(folder / "corpus" / "*.txt")], "directory": str(folder / "data"), "sequence_length": 64,
                 "validation_fraction": 0.1, "tokenizer": {"kind": "bytes"}},
        "training": {"precision": "fp32", "max_steps": STEPS, "batch_size": 8, "micro_batch_size": 4, "evaluate_every": 20,
                     "evaluate_rows": 8, **training},
        "optimizer": {"name": "adamw", "learning_rate": 3e-3},
        "schedule": {"warmup_steps": 5},
        "checkpoint": {"every_steps": 25},
        "observe": {"budget": 1.0},
    })


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("observed")
    write_corpus(folder / "corpus")
    return pellucid.train(small_config(folder), run_dir=folder / "run").directory
