"""A dry step against the real one, against numbers worked out by hand, and what `pellucid plan` makes of it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pellucid.config import UserError, make_config
from pellucid.measure import memory
from pellucid.measure.memory import DryLedger, Ledger, largest_context, parse_bytes, predict_peak, trace_step
from pellucid.model.kernels import gpu, native
from pellucid.model.size import parameter_counts

CPU = "cpu"


# Two experts, both chosen by every token: what a dry step takes to be so is so.
def settings(tables=None, **training):
    model = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 2,
             "max_position_embeddings": 131072}  # fmt: skip
    tables = {"model": model, "data": {"sequence_length": 128}, "optimizer": {"name": "adamw"}} | (tables or {})
    return make_config(tables | {"training": {"batch_size": 2, "precision": "fp32"} | training})


def test_the_ledger_counts_each_storage_once_from_birth_to_death():
    ledger = Ledger()
    with ledger:
        ledger.kind = "weights"
        a = torch.zeros(1000)
        ledger.kind = "activations"
        b = a.view(10, 100)[2:]  # no memory of its own
        c = a + 1
        assert ledger.live == {"weights": 4000, "activations": 4000} and ledger.total == 8000
        ledger.see(c, "gradients")
        assert ledger.live["gradients"] == 4000 and ledger.live["activations"] == 0
        del a
        assert ledger.total == 8000, "a view holds it"
        del b
        assert ledger.total == 4000
        c += torch.ones(1000)  # for a moment
    assert ledger.total == 4000 and ledger.peak.total == 8000


def test_what_onednn_keeps_of_a_product_is_counted_once_for_each_size():
    ledger = Ledger()
    a, b, c = (torch.ones(*shape, dtype=torch.bfloat16) for shape in ((32, 64), (64, 48), (48, 64)))
    with ledger:
        for factors in ((a, b), (a, b), (a, c.t()), (a[:16], b)):  # the third is of the same size, but read across
            torch.mm(*factors)
        torch.mm(a.float(), b.float())  # MKL's, which keeps nothing
    assert ledger.live["libraries"] == 3 * memory.KEPT


def test_onednn_keeps_no_more_than_its_caches_hold(monkeypatch):
    monkeypatch.setattr(memory, "MOST_KEPT", int(2.5 * memory.KEPT))
    factors = torch.ones(4, 2, 8, dtype=torch.bfloat16), torch.ones(4, 8, 2, dtype=torch.bfloat16)
    for ledger in (Ledger(), memory.DryLedger()):
        ledger.chunks = 6  # of which a dry run would do two
        with ledger:
            for rows in (1, 2, 3, 4):
                torch.bmm(*(factor[:rows] for factor in factors))
        assert ledger.live["libraries"] == memory.MOST_KEPT


CASES = {
    "fp32": settings(),
    "two micro-batches, bf16": settings(precision="bf16", micro_batch_size=1),
    "five chunks of queries, bf16": settings({"data": {"sequence_length": 640}}, precision="bf16", batch_size=1),
    "recompute attention": settings(recompute="attention"),
    "recompute all": settings(recompute="all"),
    "bf16 moments": settings({"optimizer": {"name": "adamw", "state_dtype": "bf16"}}),
    "muon, bf16 moments": settings({"optimizer": {"name": "muon", "state_dtype": "bf16"}, "observe": {"enabled": False}}),
    "muon, unobserved": settings({"optimizer": {"name": "muon"}, "observe": {"enabled": False}}, balance_loss="mixtral", z_loss=1e-4),
}


@pytest.mark.parametrize("name", CASES)
def test_a_dry_step_allocates_and_frees_what_a_real_one_does(name):
    dry, real = (trace_step(CASES[name], CPU, ledger) for ledger in (DryLedger(), Ledger()))
    assert dry.peaks.keys() == real.peaks.keys() == {"forward", "backward", "update"}
    for phase, peak in real.peaks.items():
        # seeds and single numbers, which the real step makes as tensors and the dry one as none
        assert dry.peaks[phase].total == pytest.approx(peak.total, rel=0.002, abs=4096), phase
    for kind in ("weights", "gradients", "moments"):
        assert dry.peaks["update"].kinds[kind] == real.peaks["update"].kinds[kind], kind


def test_in_a_dry_step_experts_get_unequal_numbers_of_tokens_and_others_in_every_layer():
    ledger, found = DryLedger(), set()
    with FakeTensorMode(), ledger:
        for ledger.layer in range(5):
            rows = torch.bincount(torch.zeros(1000, dtype=torch.int64), minlength=8).tolist()
            assert sum(rows) == 1000 and rows[memory.BUSIEST] == max(rows) == int(memory.BUSY * 1000 / 8)
            found.add(tuple(rows))
    assert len(found) == 5 and min(map(min, found)) >= 0
    assert trace_step(CASES["fp32"], CPU, DryLedger()).layer == 1, "the last of two layers told the ledger that it is at work"


def test_weights_gradients_and_moments_are_what_arithmetic_says():
    for dtype, size in (("fp32", 8), ("bf16", 4)):
        config = settings({"optimizer": {"name": "adamw", "state_dtype": dtype}})
        count = parameter_counts(config.model)["total"]
        kinds = trace_step(config, CPU, DryLedger()).peaks["update"].kinds
        biases, phases = 2 * 2 * 4, 4 * 2 * len(list(_tensors(config)))  # balance biases; a count of steps a tensor
        assert kinds["weights"] == 4 * count + biases
        assert kinds["gradients"] == 4 * count
        assert size * count <= kinds["moments"] <= size * count + phases


def _tensors(config):
    from pellucid.model.grok import Grok1

    return Grok1(config.model, device="meta").parameters()


def test_nothing_grows_with_the_square_of_the_context_nor_holds_all_logits():
    model = settings().model.model_dump(exclude_none=True) | {"vocab_size": 4096}
    config = settings({"model": model, "observe": {"enabled": False}})
    at = {tokens: predict_peak(memory.at_context(config, tokens, "none")).total for tokens in (2048, 4096, 8192)}
    slope = (at[4096] - at[2048]) / 2048
    assert (at[8192] - at[4096]) / 4096 == pytest.approx(slope, rel=0.01)
    assert at[8192] < 8192**2 * 4 / 2  # half a table of one head; all logits would be as much


def test_observing_a_long_context_needs_little_more_than_training_on_it():
    config, unobserved = settings(), settings({"observe": {"enabled": False}})
    seen, unseen = (predict_peak(memory.at_context(c, 8192, "all")).total for c in (config, unobserved))
    assert seen < unseen + 80_000_000  # some tables of attention.MOST_SCORES; of T x T they would be gigabytes


def test_many_layers_are_as_many_times_one():
    config = settings({"model": settings().model.model_dump(exclude_none=True) | {"num_hidden_layers": 7}})
    whole = trace_step(config, CPU, DryLedger()).peak
    quick = predict_peak(config)
    assert (quick.total, quick.phase, quick.kinds) == (whole.total, whole.phase, whole.kinds)


def test_the_longest_context_fits_and_a_longer_one_does_not():
    config, budget = settings({"observe": {"enabled": False}}), 24_000_000
    found = largest_context(config, budget)
    lengths = [found[mode][0] for mode in ("none", "attention", "all")]
    assert lengths == sorted(lengths) and lengths[0] < lengths[2]
    for mode, (tokens, peak) in found.items():
        assert tokens % 128 == 0 and peak.total <= budget
        longer = memory.at_context(config, tokens + max(128, tokens // 50 // 128 * 128), mode)
        assert predict_peak(longer).total > budget, mode
    assert largest_context(config, 100_000) == {"none": None, "attention": None, "all": None}


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("512m", 512 * 10**6), ("1e9", 10**9)])
def test_amounts_of_memory_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "3 GBytes", "nan", "inf"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(UserError, match="24GiB"):
        parse_bytes(text)


PLAN = """
import json, sys
from pellucid.config import make_config
from pellucid.measure.memory import predict_peak
print([predict_peak(make_config(tables), "cuda").total / 2**30 for tables in json.load(sys.stdin)])
"""


@pytest.mark.skipif(not gpu.HAS_TRITON, reason="needs the package triton")
def test_the_peak_on_a_gpu_is_what_an_h200_took():
    """measured: torch.cuda.max_memory_allocated of whole steps, GiB: bench/results/gpu_step.json. Here there need not be a GPU."""
    small = {"vocab_size": 131072, "hidden_size": 1536, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 12,
             "num_key_value_heads": 2, "max_position_embeddings": 131072}  # fmt: skip
    wide = small | {"hidden_size": 6144, "intermediate_size": 32768, "num_hidden_layers": 1, "num_attention_heads": 48,
                    "num_key_value_heads": 8}  # fmt: skip
    measured = {(16, 16, 2048, "small"): 60.3, (4, 4, 8192, "small"): 61.0, (48, 48, 2048, "small"): 114.9,
                (12, 12, 8192, "small"): 115.7, (192, 48, 2048, "small"): 125.6, (16, 16, 2048, "wide"): 110.3}  # fmt: skip
    cases = [
        {"model": {"small": small, "wide": wide}[shape], "data": {"sequence_length": length},
         "training": {"batch_size": rows, "micro_batch_size": at_once, "balance_loss": "mixtral"}}
        for rows, at_once, length, shape in measured
    ]  # fmt: skip
    # In a process of its own: in this one the kernels may be the interpreter's, which are smaller.
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PELLUCID_KERNELS")}
    done = subprocess.run([sys.executable, "-c", PLAN], input=json.dumps(cases), env=environment | {"CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True, timeout=250)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == pytest.approx(list(measured.values()), rel=0.025)


@pytest.mark.skipif(not gpu.HAS_TRITON, reason="needs the package triton")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plain_functions_are_planned_too(device, precision, monkeypatch):
    """On a GPU fp32 is theirs; on a CPU all is, where there is no compiler. They hold what the kernels never write down."""
    config = settings(precision=precision)
    usual = predict_peak(config, device).total
    monkeypatch.setenv("PELLUCID_KERNELS", "plain")
    monkeypatch.setattr(native, "_load", lambda: (None, "none here"))
    plain = predict_peak(config, device).total
    weights = 4 * parameter_counts(config.model)["total"]
    assert plain >= usual > 3 * weights  # weights and Adam's moments at least


@pytest.mark.skipif(not gpu.HAS_TRITON, reason="needs the package triton")
@pytest.mark.parametrize(("optimizer", "state", "bytes_each"), [("adamw", "fp32", 6), ("adamw", "bf16", 4), ("muon", "fp32", 4)])
def test_what_products_read_is_counted_where_the_update_writes_it(optimizer, state, bytes_each, monkeypatch):
    monkeypatch.setenv("PELLUCID_KERNELS", "triton")
    config = settings({"optimizer": {"name": optimizer, "state_dtype": state}}, precision="bf16")
    weights = predict_peak(config, "cuda").kinds["weights"] / parameter_counts(config.model)["total"]
    assert weights == pytest.approx(bytes_each, rel=0.05)  # norms and routers are read as they are
