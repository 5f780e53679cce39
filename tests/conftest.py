"""What tests of whole runs share: a small corpus, the settings of a model that trains in a second, one trained run.

And the rule of this suite: where PELLUCID_REQUIRE_ALL is set, what skips has failed, but for tests marked gpu.
"""

import os
import random
from pathlib import Path

import pytest
import torch

WORDS = "the cat sat on a mat while dogs ran past old trees in rain and naïve owls sang ünder the moon".split()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    return report if item.get_closest_marker("gpu") else _no_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _no_skip((yield))


def _no_skip(report):
    if os.environ.get("PELLUCID_REQUIRE_ALL") and report.skipped and not hasattr(report, "wasxfail"):
        path, line, reason = report.longrepr
        report.outcome, report.longrepr = "failed", f"{path}:{line}: {reason} (and PELLUCID_REQUIRE_ALL is set: nothing may skip)"
    return report


def write_corpus(folder: Path, documents: int = 12, lines: int = 12) -> Path:
    """Text files of different lengths, always the same ones."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = "\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(lines - number % 5))
        (folder / f"{number:02}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def tiny_settings(folder: Path, **training) -> dict:
    """Tables of a run on `folder`/corpus that takes about a second."""
    return {
        "model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "num_experts": 4, "max_position_embeddings": 64},
        "data": {"sources": [str(folder / "corpus")], "validation_fraction": 0.2, "sequence_length": 32,
                 "tokenizer": {"kind": "bytes"}, "directory": str(folder / "data")},
        "training": {"max_steps": 12, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "device": "cpu",
                     "evaluate_every": 5, "evaluate_rows": 4, **training},
        "optimizer": {"name": "muon", "learning_rate": 3e-3},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every_steps": 3},
        "observe": {"plays": 0},
    }  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors are slower on more; and sums are the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread_again():
    """Whatever a test left behind: a run that is resumed goes on with as many threads as it began with."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A folder with the corpus; prepared data is shared here."""
    folder = tmp_path_factory.mktemp("tiny")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="session")
def tiny_tables(tiny_folder):
    """A function: the settings of a tiny run, with other [training] values."""
    return lambda **training: tiny_settings(tiny_folder, **training)


@pytest.fixture(scope="session")
def tiny_run(tiny_folder, tiny_tables):
    """One finished run, for everything that only reads it."""
    from pellucid.run import train

    return train(tiny_tables(), run_dir=tiny_folder / "run")


@pytest.fixture(scope="session")
def final_state():
    """A function: file name -> sha256 of a run's newest checkpoint and of its finished model."""
    import hashlib

    from pellucid.training.checkpoint import saved_steps

    def digests(run_dir: Path) -> dict[str, str]:
        newest = list(saved_steps(run_dir / "checkpoints").values())[-1]
        files = [*newest.glob("*.safetensors"), *(run_dir / "model").glob("*.safetensors")]
        found = {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        assert len(found) == 3, found
        return found

    return digests
