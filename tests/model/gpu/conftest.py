"""Where there is a GPU the kernels run on it; elsewhere Triton's interpreter runs them on the CPU."""

import os

import pytest
import torch

from pellucid.model.kernels import gpu, native

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton_serves(monkeypatch):
    if not gpu.HAS_TRITON:
        pytest.skip("needs the package triton")
    monkeypatch.setenv("PELLUCID_KERNELS", "triton")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield
    native._load.cache_clear()  # what it found under these settings is not what other tests should find
