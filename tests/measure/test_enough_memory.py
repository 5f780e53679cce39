"""Trainings that this machine cannot hold are refused, by limits of memory that are set here."""

import pytest

from pellucid.config import UserError, make_config
from pellucid.measure import enough_memory
from pellucid.measure.memory import predict_peak
from pellucid.model.size import parameter_counts


def settings(tables=None, **training):
    model = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 2}
    tables = {"model": model, "data": {"sequence_length": 128}} | (tables or {})
    return make_config(tables | {"training": {"batch_size": 2, "precision": "fp32"} | training})


def test_a_step_that_the_machine_cannot_hold_is_refused_with_one_that_it_can(monkeypatch):
    config = settings(batch_size=12)
    peaks = {rows: predict_peak(settings(batch_size=12, micro_batch_size=rows)).total for rows in (12, 6, 3, 1)}
    monkeypatch.setattr(enough_memory, "private_memory", lambda: 0)  # many times this model
    for limit, fits in ((peaks[12] - 1, max(rows for rows in (6, 3, 1) if peaks[rows] <= 0.85 * peaks[12])),
                        (peaks[3] / 0.84, 3)):  # fmt: skip
        monkeypatch.setattr(enough_memory, "memory_limit", lambda limit=limit: limit)
        with pytest.raises(UserError, match=rf"12 x 128 tokens at once need .* set training.micro_batch_size = {fits}, "):
            enough_memory.refuse_beyond_memory(config)
        enough_memory.refuse_beyond_memory(settings(batch_size=12, micro_batch_size=fits))  # is not refused
    monkeypatch.setattr(enough_memory, "memory_limit", lambda: peaks[12])
    enough_memory.refuse_beyond_memory(config)
    monkeypatch.setattr(enough_memory, "memory_limit", lambda: 8 * parameter_counts(config.model)["total"] + 1000)
    with pytest.raises(UserError, match=r"at once need .* take a smaller model or shorter sequences"):
        enough_memory.refuse_beyond_memory(config)
    monkeypatch.setattr(enough_memory, "memory_limit", lambda: 1000)
    with pytest.raises(UserError, match=r"weights and gradients alone need .* take a smaller model$"):
        enough_memory.refuse_beyond_memory(config)


def test_a_step_far_from_the_limit_is_not_planned(monkeypatch):
    monkeypatch.setattr(enough_memory, "memory_limit", lambda: 10**12)
    monkeypatch.setattr(enough_memory, "predict_peak", None)
    enough_memory.refuse_beyond_memory(settings())


def test_what_is_taken_at_a_glance_is_at_least_a_third_of_a_step():
    wide = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 16, "head_dim": 128,
            "num_experts": 16, "num_experts_per_tok": 1}  # fmt: skip
    for config in (settings(batch_size=64), settings({"data": {"sequence_length": 2048}}), settings({"model": wide}, batch_size=64)):
        assert 3 * enough_memory._rough_bytes(config) > predict_peak(config).total


def test_the_limit_of_memory_is_the_smallest_of_the_control_groups_with_their_swap_space(tmp_path):
    (own := tmp_path / "cgroup").write_text("4:memory:/job\n3:cpu:/other\n0::/user.slice/job\n")
    for path, text in {"memory.max": "max", "user.slice/memory.max": "3000", "user.slice/memory.swap.max": "200",
                       "user.slice/job/memory.max": "5000", "user.slice/job/memory.swap.max": "max",
                       "memory/memory.limit_in_bytes": "9000", "memory/job/memory.limit_in_bytes": "4000",
                       "memory/job/memory.memsw.limit_in_bytes": "4100"}.items():  # fmt: skip
        (tmp_path / "fs" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / path).write_text(text + "\n")
    assert sorted(enough_memory._group_limits(500, tmp_path / "fs", own)) == [3200, 4100, 5500, 9500]
    assert list(enough_memory._group_limits(500, tmp_path / "none", tmp_path / "none")) == []
    assert enough_memory.memory_limit() is None or enough_memory.memory_limit() > enough_memory.private_memory() > 10**7
