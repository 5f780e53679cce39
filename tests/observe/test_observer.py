"""The observer in the real loop: complete, silent towards training, and gone when switched off."""

import contextlib
import math
import shutil
import sqlite3
import warnings

import numpy as np
import pytest
import torch
from conftest import STEPS, small_config, write_corpus

import pellucid
from pellucid.config import make_config
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.observe import observer, store
from pellucid.observe.columns import INDEX
from pellucid.observe.reader import Reader, is_missing
from pellucid.observe.web.feed import Feed
from pellucid.observe.writing import continued
from pellucid.training import checkpoint
from pellucid.training.evaluate import evaluate_batches, split_batches


def test_every_stream_has_a_frame_for_every_step(run_dir):
    with Reader(run_dir) as run:
        for stream in ("run", "param", "router", "layer", "position", "source"):
            steps, frames = run.frames(stream)
            assert steps.tolist() == list(range(STEPS)), stream
            assert frames.shape[1:] == (len(run.rows(stream)), len(run.stats(stream)))
        assert len(run.frames("evaluation")[0]) == 4  # before, after 20, 40 and all steps
        assert len(run.frames("attention")[0]) > 10 and run.samples() and run.stages()
        assert {e["rule"] for e in run.events()} >= {"text_sample"}


def test_run_frame_holds_the_step_s_own_numbers_and_nulls_what_is_undefined(run_dir):
    with Reader(run_dir) as run:
        frames = run.frames("run")[1]
        values = dict(zip([s["name"] for s in run.stats("run")], frames[:, 0].T, strict=True))
    for name in ("router_z_loss", "z_loss", "mfu", "device_memory"):
        assert is_missing(values[name]).all(), name
    assert values["loss"][0] == pytest.approx(np.log(260), rel=0.05) and values["loss"][-1] < values["loss"][0] - 0.5
    phases = np.stack([values[f"{phase}_seconds"] for phase in ("data", "forward", "loss", "backward", "clip", "update")])
    assert (phases > 0).all(), "each was measured at every step"
    whole = phases.sum(0) / values["step_seconds"]
    assert (whole <= 1).all() and np.median(whole) > 0.3, "a step that waits for the processor, between phases, is no fault"
    np.testing.assert_allclose(values["tokens_per_second"], values["tokens"] / values["step_seconds"], rtol=1e-5)
    assert np.isfinite(values["noise_scale"]).any(), "two micro-batches give a noise scale"
    assert (values["applied"] == 1).all() and values["beta1"][0] == np.float32(0.9)


@pytest.mark.parametrize("off", [{"balance_loss": "none"}, {"balance_loss_weight": 0.0}])
def test_a_balance_loss_that_is_off_is_null_not_zero(tiny_tables, tmp_path, off):
    folder = pellucid.train(tiny_tables(max_steps=1, **off), run_dir=tmp_path / "run").directory
    with Reader(folder) as run:
        assert is_missing(run.series("run", "balance_loss", stream="run")[1]).all()


def test_position_and_source_and_document_losses_add_up_to_the_step_s_loss(run_dir):
    with Reader(run_dir) as run:
        _, whole = run.frames("run")
        for stream in ("position", "source"):
            _, frames = run.frames(stream)
            loss, tokens = frames[..., 0].astype(np.float64), frames[..., 1]
            mean = np.where(tokens > 0, loss * tokens, 0).sum(1) / tokens.sum(1)
            np.testing.assert_allclose(mean, whole[:, 0, INDEX["run"]["loss"]], rtol=1e-4)
            np.testing.assert_array_equal(tokens.sum(1), whole[:, 0, INDEX["run"]["tokens"]])
        documents = run.document_losses(10)
        total = sum(d["loss"] * d["tokens"] for d in documents) / sum(d["tokens"] for d in documents)
        assert total == pytest.approx(whole[10, 0, 0], rel=1e-4)
        assert documents[0]["worst"] >= documents[0]["loss"]
        worst = run.worst_tokens(10)
        assert [w["loss"] for w in worst] == sorted((w["loss"] for w in worst), reverse=True)


def test_router_frames_agree_with_each_other(run_dir):
    with Reader(run_dir) as run:
        _, router = run.frames("router")
        _, layer = run.frames("layer")
        _, whole = run.frames("run")
    router = router.reshape(STEPS, 2, 4, -1).astype(np.float64)
    column = INDEX["router"]
    tokens = whole[:, 0, INDEX["run"]["tokens"]]
    np.testing.assert_allclose(router[..., column["tokens"]].sum(2), np.stack([2 * tokens] * 2, 1))
    np.testing.assert_allclose(router[..., column["load"]].mean(2), 1, rtol=1e-5)
    np.testing.assert_allclose(router[..., column["probability"]].sum(2), 1, rtol=1e-4)
    np.testing.assert_allclose(router[..., column["load"]].max(2) - 1, layer[..., 0], rtol=1e-4, atol=1e-5)
    gate = router[..., column["gate_mass"]].sum(2)  # over all tokens; top_mass is the same while all tokens are looked at
    np.testing.assert_allclose(gate, layer[..., INDEX["layer"]["top_mass"]], rtol=1e-4)
    assert all((router[..., column[name]] == 0).all() for name in ("ghost", "ghost_share", "frozen"))
    assert (layer[..., INDEX["layer"]["margin"]] > 0).all()
    entropy = layer[..., INDEX["layer"]["token_entropy"]]
    assert (entropy > 0).all() and (entropy <= 1 + 1e-5).all()


@pytest.mark.parametrize("scores", [None, 2 * 20 * 7])
def test_attention_probe_agrees_with_the_formula(run_dir, scores, monkeypatch):
    """Against softmax weights computed in float64 from the hooked inputs, on one row; also seven queries at a time."""
    from pellucid.data.dataset import Batch
    from pellucid.model.kernels.rotary import rotate_plain
    from pellucid.observe import attention as module
    from pellucid.observe.attention import probe_attention

    if scores is not None:
        monkeypatch.setattr(module, "MOST_SCORES", scores)

    model, _ = pellucid.load(run_dir)
    tokens = torch.randint(4, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1] * 8 + [2] * 12], dtype=torch.int32)
    positions = torch.tensor([[*range(8), *range(12)]], dtype=torch.int32)
    batch = Batch(tokens, tokens, segments, positions, torch.zeros(1), torch.zeros(1))
    found = probe_attention(model, batch)
    caught = {}
    attention = model.layers[1].attention
    hook = attention.register_forward_pre_hook(lambda module, inputs: caught.update(x=inputs[0], rotary=inputs[1]))
    model.hidden_states(tokens, segment_ids=segments, positions=positions)
    hook.remove()
    with torch.no_grad():
        d, H = attention.config.head_dim, attention.config.num_attention_heads
        q = rotate_plain(attention.q_proj(caught["x"]).view(1, 20, 1, H, d), *caught["rotary"])[:, 0].double()
        k = rotate_plain(attention.k_proj(caught["x"]).view(1, 20, 1, 1, d), *caught["rotary"])[:, 0].double()
        for head in range(H):
            raw = (q[0, :, head] @ k[0, :, 0].T) * attention.config.attn_output_multiplier
            entropies, top = [], 0.0
            for t in range(20):
                keys = [s for s in range(t + 1) if segments[0, s] == segments[0, t]]
                row = raw[t, keys]
                top = max(top, row.abs().max().item())
                p = torch.softmax(30 * torch.tanh(row / 30), -1)
                if len(keys) > 1:
                    entropies.append((-(p * p.log()).sum() / np.log(len(keys))).item())
            assert found[H + head, 2].item() == pytest.approx(top, rel=1e-4)
            assert found[H + head, 1].item() == pytest.approx(np.mean(entropies), rel=1e-4)
            assert found[H + head, 0].item() == pytest.approx((raw.abs() > 26.442).float().mean().item(), abs=1e-6)


def test_observation_changes_no_weight_and_can_be_switched_off(run_dir, tmp_path):
    write_corpus(tmp_path / "corpus")
    config = small_config(tmp_path)
    config.observe.enabled = False
    silent = pellucid.train(config, run_dir=tmp_path / "run").directory
    assert not (silent / "run.sqlite").exists()
    one, two = (checkpoint.newest_good(folder / "checkpoints") for folder in (silent, run_dir))
    assert one.tensors["model"].keys() == two.tensors["model"].keys()
    for name, tensor in one.tensors["model"].items():
        assert torch.equal(tensor, two.tensors["model"][name]), name


def texts(folder):
    with Reader(folder) as run:
        return [(e["step"], e["subject"], e["text"]) for e in run.events() if e["rule"] == "text_sample"]


def test_at_each_evaluation_the_same_held_out_words_are_continued(run_dir):
    written = texts(run_dir)
    assert [step for step, _, _ in written] == [-1, 19, 39, 59]
    (prompt,) = {prompt for _, prompt, _ in written}
    assert prompt and prompt in pellucid.Run(run_dir).dataset().validation.document(0)["text"]
    assert len({text for _, _, text in written}) == 4, "the model has changed"
    model, tokenizer = pellucid.load(run_dir)
    before = torch.random.get_rng_state()
    assert continued(model, tokenizer, prompt, 5) == continued(model, tokenizer, prompt, 5), "the same seed"
    assert torch.equal(torch.random.get_rng_state(), before), "which is not torch's own"


def test_what_was_measured_before_training_is_kept_beside_the_first_step_and_recorded_once(tiny_tables, tmp_path):
    config = make_config(tiny_tables(max_steps=1))
    folder = pellucid.train(config, run_dir=tmp_path / "run").directory
    model = initialize(Grok1(pellucid.Run(folder).config.model), config.training.seed)
    validation, lengths = pellucid.Run(folder).dataset().validation, pellucid.Run(folder).dataset().tokenizer.byte_lengths
    for _ in range(2):
        with Reader(folder) as run:
            shown = Feed(folder).window("evaluation", "loss")
            steps, losses = run.series("held-out", "loss", stream="evaluation")
            buckets, parts = run.rollup("evaluation", 2)
        assert shown.endswith(np.array([-1, 0], "<i4").tobytes() + losses.tobytes()), "also to the page"
        assert steps.tolist() == [-1, 0] and [step for step, _, _ in texts(folder)] == [-1, 0]
        assert losses[0] == pytest.approx(evaluate_batches(model, split_batches(validation, 2, 4), lengths).loss, rel=1e-6)
        assert losses[1] != losses[0] and buckets.tolist() == [-1, 0] and parts[:, 3, 0, 0].tolist() == losses.tolist()
        shutil.rmtree(folder / "checkpoints")
        pellucid.train(None, run_dir=folder, resume=True)  # nothing was saved: it begins anew


def test_a_text_that_fails_is_a_note_and_texts_can_be_switched_off(tiny_tables, tmp_path, monkeypatch):
    off = pellucid.train(tiny_tables(max_steps=4, evaluate_every=2) | {"observe": {"samples": False}}, run_dir=tmp_path / "off")
    assert [step for step, _, _ in texts(off.directory)] == [-1, 3], "before and after training, as printed"

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("pellucid.observe.observer.continued", fails)
    failed = pellucid.train(tiny_tables(max_steps=4, evaluate_every=2), run_dir=tmp_path / "failed").directory
    with Reader(failed) as run:
        notes = [(e["step"], e["severity"], e["text"]) for e in run.events() if e["rule"] == "no_text_sample"]
    assert notes == [(1, "note", "no text was written: out of memory"), (3, "note", "no text was written: out of memory")]


def test_a_resumed_run_s_telemetry_has_no_step_twice_and_none_missing_in_rollups_of_thinned_frames_either(tmp_path, monkeypatch):
    monkeypatch.setattr(observer, "DENSE_STEPS", 0)
    monkeypatch.setattr(store, "RECORDER", 16)
    write_corpus(tmp_path / "corpus")
    folder = pellucid.train(small_config(tmp_path, max_steps=45, evaluate_every=0), run_dir=tmp_path / "run").directory
    with Reader(folder) as run:
        before, rollup = run.frames("run")[1][:, 0, INDEX["run"]["loss"]], run.rollup("layer", 1)[1]
        thinned = run.frames("layer")[0].tolist()
    assert thinned[:4] == [0, 10, 16, 17], "of the steps before the checkpoint at 25 those of its open bucket are all there"
    shutil.rmtree(folder / "checkpoints" / "step-45")
    pellucid.train(None, run_dir=folder, resume=True)
    with Reader(folder) as run:
        steps, frames = run.frames("run")
        assert steps.tolist() == list(range(45))
        np.testing.assert_array_equal(frames[:, 0, INDEX["run"]["loss"]], before)
        np.testing.assert_array_equal(run.rollup("layer", 1)[1], rollup)


@pytest.mark.parametrize("thinned", [False, True])
def test_a_resumed_run_counts_on_where_it_stopped(tiny_tables, tmp_path, monkeypatch, thinned):
    """Idle steps, the gap to the last 32 losses, and the way that experts went without tokens, against the unbroken run."""
    if thinned:  # the frame before the checkpoint is gone by then, but for what the rollups keep of it
        monkeypatch.setattr(observer, "DENSE_STEPS", 0)
        monkeypatch.setattr(store, "RECORDER", 16)
    else:  # idle experts go on by their momentum, which is an alarm and keeps the frames
        monkeypatch.setattr("pellucid.training.step.frozen_idle_experts", lambda *_: contextlib.nullcontext())
    tables = tiny_tables(max_steps=40, batch_size=1, micro_batch_size=1, balance_loss="none")
    tables["model"] |= {"num_experts": 8, "num_experts_per_tok": 1}  # each slice so small that all of it is measured
    tables["data"] |= {"sequence_length": 8}
    tables |= {"optimizer": {"name": "adamw"}, "checkpoint": {"every_steps": 16, "keep_last": 3}}
    tables["observe"] |= {"budget": 1.0}
    folder = pellucid.train(tables, run_dir=tmp_path / "run").directory

    def recorded():
        with Reader(folder) as run:
            assert (15 in run.frames("router")[0]) == (not thinned)
            parts = run.rollup("router", 1)[1]
            return parts[..., INDEX["router"]["idle_steps"]], parts[..., INDEX["router"]["ghost_share"]], run.frames("evaluation")[1]

    idle, ghost, evaluations = recorded()
    for step in (32, 40):
        shutil.rmtree(folder / "checkpoints" / f"step-{step}")
    pellucid.train(None, run_dir=folder, resume=True)
    again = recorded()
    assert (idle[0, 3] > 1).any(), "some experts were idle when it stopped"
    np.testing.assert_array_equal(again[0], idle)
    np.testing.assert_array_equal(again[2], evaluations)
    if not thinned:
        assert ghost[0, 3].max() > 0.1, "and moved"
        np.testing.assert_allclose(again[1], ghost, rtol=1e-5)  # its frames hold float32


def test_sqlite_alone_reads_what_the_reader_reads(run_dir):
    run = sqlite3.connect(run_dir / "run.sqlite")
    query = "SELECT step, value FROM value WHERE stream = 'run' AND stat = 'loss' ORDER BY step"
    steps, losses = zip(*run.execute(query), strict=True)
    with Reader(run_dir) as reader:
        expected = reader.series("run", "loss", stream="run")
    assert list(steps) == expected[0].tolist() and list(losses) == [float(v) for v in expected[1]]


def test_a_loss_beyond_float32_is_recorded_as_infinite_and_warns_nobody():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert observer._one_row([1e39, None, 2.0]).tolist()[0][::2] == [math.inf, 2.0]
