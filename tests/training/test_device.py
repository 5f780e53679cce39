"""What the processor's memory and precision do around a run."""

import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from pellucid.training.device import keeping_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) >> 10
outside, before = faults(), resident()
with keeping_freed_memory():
    faults()  # until there is room
    within, kept = faults(), resident()
print(outside, within, kept - before, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
def test_memory_that_is_freed_is_used_again_within_and_given_back_at_the_end():
    """By the kernel's own counts: page faults of ten tensors of 64 MiB, and megabytes resident."""
    result = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    outside, within, kept, left = map(int, result.stdout.split())
    assert outside > 10 * 100 and within < 100, result.stdout
    assert kept > 60 and left < 10, result.stdout
