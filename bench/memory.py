"""Whether `pellucid plan` predicts the peak of memory: a dry step against a real one, each case in a fresh process.

Three numbers of one training step on the CPU, without what the program holds before it (interpreter, libraries, warm-up):
predicted: the dry step's; counted: a Ledger's on the real step; measured: the growth of the process, from the kernel's
VmHWM. malloc is told to give freed memory back at once (MALLOC_MMAP_THRESHOLD_), so that what grows is what is used; with
--as-is it keeps what is freed, as in `pellucid train`, and so takes more where sizes change.

Run: python bench/memory.py [--only NAME] [--as-is]; writes bench/results/memory.json. With --fits 24GiB: which presets, and how
long a sequence of each, fit in that memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.json"
SMALL = ["model.preset=base", "data.tokenizer.vocab_size=4096"]
NARROW = ["model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2", "data.tokenizer.vocab_size=2048",
          "model.max_position_embeddings=131072", "training.micro_batch_size=1", "training.batch_size=1"]  # fmt: skip
CASES = {
    "base 8 x 256": [*SMALL, "training.batch_size=8"],
    "base 8 x 256, recompute attention": [*SMALL, "training.batch_size=8", "training.recompute=attention"],
    "base 8 x 256, recompute all": [*SMALL, "training.batch_size=8", "training.recompute=all"],
    "base 8 x 256, bf16 moments": [*SMALL, "training.batch_size=8", "optimizer.state_dtype=bf16"],
    "base 2 x 2 x 256, bf16": [*SMALL, "training.batch_size=4", "training.micro_batch_size=2", "training.precision=bf16"],
    "base 1 x 64, muon": [*SMALL, "training.batch_size=1", "data.sequence_length=64", "optimizer.name=muon"],
    "base 1 x 64, bf16 moments": [*SMALL, "training.batch_size=1", "data.sequence_length=64", "optimizer.state_dtype=bf16"],
    "medium 1 x 512": ["model.preset=medium", "training.batch_size=1"],
    "medium 1 x 2048, recompute all": ["model.preset=medium", "training.batch_size=1", "data.sequence_length=2048",
                                       "training.recompute=all"],
    "wide vocabulary 1 x 1024": ["model.preset=tiny", "data.tokenizer.vocab_size=131072", "data.sequence_length=1024",
                                 "training.batch_size=1"],
    "narrow 1 x 8192": [*NARROW, "data.sequence_length=8192"],
    "narrow 1 x 32768": [*NARROW, "data.sequence_length=32768"],
    "narrow 1 x 32768, recompute all": [*NARROW, "data.sequence_length=32768", "training.recompute=all", "observe.enabled=false"],
}
EXTRA = {"narrow 1 x 131072": [*NARROW, "data.sequence_length=131072", "observe.enabled=false"]}  # many minutes of one core
DEFAULTS = ["training.precision=fp32", "optimizer.name=adamw"]


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def settle() -> None:
    """Give freed memory back, and forget the largest size so far."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def case(overrides: list[str]) -> dict:
    """In a process of its own: all three numbers."""
    import torch

    from pellucid.config import load_config
    from pellucid.measure import memory
    from pellucid.measure.memory import with_vocabulary
    from pellucid.training.device import keeping_freed_memory

    torch.set_num_threads(1)
    config = with_vocabulary(load_config(None, [*DEFAULTS, *overrides]))
    device = "cpu"

    class Watched(memory.Ledger):
        def start(self):
            super().start()
            settle()

    small = memory.at_context(config, 64, config.training.recompute)
    small.model = small.model.model_copy(update={"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "vocab_size": 512})
    memory.trace_step(small, device, memory.Ledger())  # loads and compiles what a step needs
    settle()
    before = status("VmRSS")
    with contextlib.nullcontext() if any(name.startswith("MALLOC_MMAP") for name in os.environ) else keeping_freed_memory():
        counted = memory.trace_step(config, device, Watched()).peak
        measured = status("VmHWM") - before
    predicted = memory.predict_peak(config, device)
    return {"predicted": predicted.total, "counted": counted.total, "measured": measured, "phase": predicted.phase,
            "kinds": predicted.kinds, "error": predicted.total / measured - 1}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a part of the names of the cases to run; others keep their last result")
    parser.add_argument("--as-is", action="store_true", help="leave malloc as it is")
    parser.add_argument("--predict", action="store_true", help="only predict anew; what was measured stays")
    parser.add_argument("--fits", metavar="MEMORY", help="only ask which presets and contexts fit in so much")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(case(json.loads(options.case))))
        return
    if options.predict:
        return predict_anew()
    if options.fits:
        return ask_what_fits(options.fits)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if not options.as_is:
        environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    key = "cases_as_is" if options.as_is else "cases"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = results.get(key, {})
    for name, overrides in (CASES | EXTRA).items():
        if (options.only is None and name in EXTRA) or (options.only is not None and options.only not in name):
            continue
        output = subprocess.run([sys.executable, __file__, "--case", json.dumps(overrides)], env=environment, check=True,
                                stdout=subprocess.PIPE, text=True).stdout  # fmt: skip
        found[name] = json.loads(output.splitlines()[-1]) | {"settings": [*DEFAULTS, *overrides]}
        print(f"{name:<36} predicted {found[name]['predicted'] / 1e6:8.1f} MB, measured {found[name]['measured'] / 1e6:8.1f} MB, "
              f"error {found[name]['error']:+.1%}", flush=True)  # fmt: skip
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # what others have written meanwhile
        found = results.get(key, {}) | {name: found[name]}
        results |= {key: found, "about": about()}
        results[f"largest_error_{key}"] = max(abs(result["error"]) for result in found.values())
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def predict_anew() -> None:
    from pellucid.config import load_config
    from pellucid.measure import memory
    from pellucid.measure.memory import with_vocabulary

    results = json.loads(RESULTS.read_text())
    for key in {"cases", "cases_as_is"} & results.keys():
        for name, found in results[key].items():
            peak = memory.predict_peak(with_vocabulary(load_config(None, found["settings"])))
            found |= {"predicted": peak.total, "phase": peak.phase, "kinds": peak.kinds, "error": peak.total / found["measured"] - 1}
            print(f"{name:<36} error {found['error']:+.1%}", flush=True)
        results[f"largest_error_{key}"] = max(abs(found["error"]) for found in results[key].values())
    RESULTS.write_text(json.dumps(results | {"about": about()}, indent=1) + "\n")


def ask_what_fits(memory: str) -> None:
    """Of each preset, by the way to recompute: tokens of the longest sequence that trains in `memory`, the program included."""
    from pellucid.config import load_config, preset_names
    from pellucid.measure.memory import largest_context, parse_bytes, program_bytes, with_vocabulary

    there, found = parse_bytes(memory) - program_bytes("cpu"), {}
    for preset in preset_names():
        config = with_vocabulary(load_config(None, [f"model.preset={preset}", *DEFAULTS]))
        found[preset] = {mode: fit and {"tokens": fit[0], "peak": fit[1].total}
                         for mode, fit in largest_context(config, there).items()}  # fmt: skip
        print(f"{preset:<8}", *(f"{mode} {fit['tokens'] if fit else 0:>8,}" for mode, fit in found[preset].items()), flush=True)
    results = json.loads(RESULTS.read_text())  # what others have written meanwhile
    results["fits"] = results.get("fits", {}) | {memory: found}
    RESULTS.write_text(json.dumps(results | {"about": about()}, indent=1) + "\n")


def about() -> dict:
    import torch

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), platform.processor())  # fmt: skip
    return {"commit": git.stdout.strip(), "date": datetime.date.today().isoformat(), "torch": torch.__version__,
            "python": platform.python_version(), "processor": processor, "threads": 1}  # fmt: skip


if __name__ == "__main__":
    main()
