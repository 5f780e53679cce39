"""One GPU: where the time of a whole training step goes: phases by the card's clock, kernels by torch's profiler. Only prints.

    python bench/gpu_profile.py                the models of bench/gpu_step.py, at their largest batches of 2,048 tokens a row
    python bench/gpu_profile.py --rows 16      so many rows instead
    python bench/gpu_profile.py --kernels plain
    python bench/gpu_profile.py --tiny         a tiny model on any device: does it run?
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import gpu_step
import torch
from torch.profiler import ProfilerActivity, profile

from pellucid.model.size import flops_per_token

STEPS, WARM_UP, SHOWN = 7, 2, 30


def measure(name: str, size: dict, B: int, T: int) -> None:
    results = []
    original, gpu_step.training_step = gpu_step.training_step, lambda *given: results.append(original(*given)) or results[-1]
    with tempfile.TemporaryDirectory() as folder:
        torch.cuda.reset_peak_memory_stats() if gpu_step.CUDA else None
        step = gpu_step.ours_step(size, B, T, 1, Path(folder))
        times = [seconds(step) for _ in range(STEPS)]
        middle = statistics.median(times[WARM_UP:])
        share = flops_per_token(gpu_step.model_config(size), T) * B * T / middle / gpu_step.PEAK
        print(f"{name}, {B} x {T}: {middle * 1e3:.1f} ms, {share:.4f} of {gpu_step.PEAK / 1e12:.0f} TFLOP/s; gradient norm "
              f"{results[-1].grad_norm:.3f}, clipped to {results[-1].clip_factor:.3f}")  # fmt: skip
        print("   steps, ms:", [round(t * 1e3, 1) for t in times])
        print("   phases, ms:", {phase: round(t * 1e3, 1) for phase, t in results[-1].clock.seconds().items()})
        if gpu_step.CUDA:
            print(f"   memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
            for milliseconds, launches, kernel in kernels_of(step):
                print(f"   {milliseconds:9.2f} ms {launches:5d}  {kernel[:110]}", flush=True)
        step.close()
    gpu_step.training_step = original


def seconds(step) -> float:
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize() if gpu_step.CUDA else None
    return time.perf_counter() - begin


def kernels_of(step) -> list[tuple[float, int, str]]:
    """(ms, launches, name) of one step, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        seconds(step)
    sums: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            sums[event.name].append(event.time_range.elapsed_us() / 1e3)
    return sorted(((sum(times), len(times), name) for name, times in sums.items()), reverse=True)[:SHOWN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="rows of a batch; default: as many as fit")
    parser.add_argument("--kernels", choices=["triton", "plain", "default"], default="triton",
                        help="which serve (PELLUCID_KERNELS); triton: also those that have not run on a card")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="a tiny model on any device")
    options = parser.parse_args()
    if not gpu_step.CUDA and not options.tiny:
        parser.exit(2, "gpu_profile: no CUDA GPU that torch can use here; --tiny checks on any device that it runs\n")
    with gpu_step.kernels(None if options.kernels == "default" else options.kernels):
        for name, size in (gpu_step.TINY if options.tiny else gpu_step.MODELS).items():
            T = min(size["most"])
            measure(name, size, options.rows or size["most"][T], T)
            gc.collect()
            torch.cuda.empty_cache() if gpu_step.CUDA else None


if __name__ == "__main__":
    main()
