"""What this machine can do, which kernels will be used, and why not others."""

from __future__ import annotations

import os
import platform
import shutil

import torch

from pellucid.config import TokenizerConfig
from pellucid.data.bpe_training import PROBE, gigabpe_problem
from pellucid.data.encoders import choose_encoder
from pellucid.data.tokenizer_training import train_tokenizer
from pellucid.model.kernels import gpu, native, products
from pellucid.run_files import REPORTED_PACKAGES, installed_version
from pellucid.training.device import choose_device, choose_precision, has_fast_bf16


def examine() -> dict[str, str]:
    """Facts by name, each one line."""
    device = choose_device("auto")
    dtype, _ = choose_precision("auto", device)
    bf16 = has_fast_bf16(device)
    facts = {
        "pellucid": installed_version("pellucid"),
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: installed_version(name) for name in REPORTED_PACKAGES},
        "processors": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "memory": _memory(),
        "disk free here": f"{shutil.disk_usage('.').free / 1e9:.1f} GB",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
        "device": f"{device} (training.device = 'auto')",
        "bf16": "fast on this device" if bf16 else "slow or absent on this device: fp32 is used",
        "precision": f"{'bf16, fp32 master weights' if dtype == torch.bfloat16 else 'fp32'} (training.precision = 'auto')",
        **(_on_gpu(device) if device.type == "cuda" else _on_cpu(device)),
        "tokenizer.model": _encoder("sentencepiece"),
        "tokenizer.json": _encoder("bpe"),
        "bpe training": "gigabpe" if gigabpe_problem() is None else f"tokenizers (gigabpe: {gigabpe_problem()})",
    }
    return facts


def _encoder(kind: str) -> str:
    """Which library tokenizes much text, tried on a tokenizer trained here and now; a file is tried when it is loaded."""
    choice = choose_encoder(train_tokenizer(TokenizerConfig(kind=kind, vocab_size=800), PROBE).engine)
    name = "its own library" if choice.encoder.name == "reference" else choice.encoder.name
    return "; ".join([name, *(f"{other}: {why}" for other, why in choice.refused.items())])


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _on_cpu(device: torch.device) -> dict[str, str]:
    return {"kernels": native.status(), "products": products.status(), "attention": _attention(device), "experts": _experts(device)}


def _on_gpu(device: torch.device) -> dict[str, str]:
    """Which kernel serves each part of the model, and what the plain ones are."""
    plain = {"attention": _attention(device), "experts": _experts(device), "routing": "softmax and stable sort",
             "norm": "fp32 operations", "rotary": "fp32 operations",
             "loss": "chunks of tokens, gradient in the forward pass", "scores": "an fp32 product",
             "update": "torch's, fused where it has it"}  # fmt: skip
    return {name: f"{line}" + (f": {plain[name]}" if line.startswith("plain") else "") for name, line in gpu.status().items()}


def _attention(device: torch.device) -> str:
    if device.type != "cpu" or not native.status().startswith("compiled"):
        return "chunks of queries, capped logits"
    chunks = "128 queries at a time, softmax by a compiled kernel"
    return "blocks that stay in a core's cache, by a compiled kernel" if products.own_serves(torch.float32) else chunks


def _experts(device: torch.device) -> str:
    if device.type == "cpu" and native.status().startswith("compiled"):
        return "one product per expert on its own tokens, GeGLU and gate by a compiled kernel"
    if device.type not in ("cpu", "cuda"):
        return f"one product per expert in a loop: grouped_mm is not used on {device.type}"
    only = "bf16" if device.type == "cuda" else "fp32 and bf16"
    return f"torch grouped_mm in {only} where sizes are multiples of 16 bytes, else one product per expert in a loop"
