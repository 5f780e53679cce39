"""Where there is a GPU the kernels run on it; elsewhere Triton's interpreter runs them on the CPU."""

import os
from pathlib import Path

import pytest
import torch

from pellucid.model.kernels import gpu, native

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """On a card `pytest -m gpu` runs all of this folder; elsewhere, what is too large for the interpreter is left out with it."""
    for item in items:
        if DEVICE == "cuda" and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def triton_serves(monkeypatch):
    if not gpu.HAS_TRITON:
        pytest.skip("needs the package triton")
    monkeypatch.setenv("PELLUCID_KERNELS", "triton")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield
    native._load.cache_clear()  # what it found under these settings is not what other tests should find
