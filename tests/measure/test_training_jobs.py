"""A run as a job against the same run by the front door, and the made-up texts that jobs train on."""

import math
import os
import signal

import numpy as np
import pytest
import torch

from pellucid.measure.random_tokens import RandomTokens
from pellucid.measure.training import document_losses, estimate, train_once
from pellucid.training.checkpoint import saved_steps


def job(tables, dataset, **more):
    config = {key: value for key, value in tables.items() if key not in ("data", "checkpoint")}
    config["data"] = {"sequence_length": tables["data"]["sequence_length"]}
    return {"config": config, "data": str(dataset.directory), "points": 3, "rows": 4, **more}


def test_a_job_is_the_run_of_the_same_settings(tiny_run, tiny_tables, tmp_path):
    heard = []
    result = train_once(job(tiny_tables(), tiny_run.dataset()), tmp_path / "job", heard.append)
    model, _ = tiny_run.load()
    from pellucid.training.evaluate import evaluate_batches, split_batches

    data = tiny_run.dataset()
    expected = evaluate_batches(model, split_batches(data.validation, 4), data.tokenizer.byte_lengths)
    assert result["held_out"] == pytest.approx(expected.loss, rel=1e-5), "the model on disk is the model trained"
    assert result["steps"] == 12 and heard[-1] == 1.0
    assert [point["step"] for point in result["curve"]] == [4, 8, 12]
    assert sum(result["documents"]["tokens"]) == expected.tokens
    assert result["tokens"] > 0 and result["parameters"]["total"] == sum(p.numel() for p in model.parameters())


def test_points_are_at_equal_shares_of_training_when_steps_do_not_divide(tiny_run, tiny_tables, tmp_path):
    """Or the last share that was to be a quarter is the last step alone."""
    settings = job(tiny_tables(max_steps=13), tiny_run.dataset(), points=4)
    result = train_once(settings, tmp_path / "job", lambda done: None)
    assert [point["step"] for point in result["curve"]] == [3, 6, 10, 13]


def killed():
    raise KeyboardInterrupt


def asked_to_stop():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("how", "saved"), [(asked_to_stop, 9), (killed, 5)])
def test_a_job_that_was_stopped_gives_the_result_of_an_unbroken_one(tiny_run, tiny_tables, tmp_path, how, saved):
    """With all points of its curve, also that of step 8 where steps from 5 on are done again."""
    settings = job(tiny_tables(max_steps=12), tiny_run.dataset(), points=6)
    settings["config"]["checkpoint"] = {"every_steps": 5}
    unbroken = train_once(settings, tmp_path / "unbroken", lambda share: None)
    assert [point["step"] for point in unbroken["curve"]] == [2, 4, 6, 8, 10, 12]
    with pytest.raises(KeyboardInterrupt):
        train_once(settings, tmp_path / "job", lambda share: how() if share == 9 / 12 else None)
    assert max(saved_steps(tmp_path / "job" / "checkpoints")) == saved
    assert train_once(settings, tmp_path / "job", lambda share: None) == unbroken


def test_losses_by_document_are_those_of_each_document_alone(tiny_run):
    model, tokenizer = tiny_run.load()
    split = tiny_run.dataset().validation
    nats, tokens = document_losses(model, split)
    for number in range(len(nats)):
        ids = [tokenizer.eos_token_id, *split.document(number)["token_ids"]]
        assert tokens[number] == len(ids) - 1
        if len(ids) - 1 <= split.sequence_length:  # it lies in one piece, so it sees all of itself
            logits = model(torch.tensor([ids[:-1]])).double().log_softmax(-1)[0]
            alone = -sum(float(logits[t, token]) for t, token in enumerate(ids[1:]))
            assert nats[number] == pytest.approx(alone, rel=1e-4)
    assert nats.sum() / tokens.sum() == pytest.approx(train_loss(model, split), rel=1e-5)


def train_loss(model, split):
    from pellucid.training.evaluate import evaluate_batches, split_batches

    return evaluate_batches(model, split_batches(split, 8), split.tokenizer.byte_lengths).loss


def test_random_tokens_come_once_an_epoch_and_are_uniform():
    data = RandomTokens(count=12, length=2000, vocab_size=9, seed=3)
    seen = torch.cat([data.batch(step, 5).sample_ids_B for step in range(12)])  # 60 samples: five epochs
    for epoch in range(5):
        assert sorted(seen[12 * epoch : 12 * (epoch + 1)].tolist()) == list(range(12))
    assert seen[:12].tolist() != seen[12:24].tolist()
    counts = np.bincount(data.tokens.flatten().numpy(), minlength=9)
    assert counts[0] == 0, "pad cannot be told"
    assert counts[1:] == pytest.approx(3000, abs=5 * math.sqrt(3000))
    assert data.bits == 12 * 2000 * 3
    batch = data.rows(2, 4)
    assert (batch.tokens_BT[:, 1:] == batch.targets_BT[:, :-1]).all() and (batch.targets_BT == data.tokens[2:4]).all()


def test_estimates_grow_with_the_steps(tiny_run, tiny_tables):
    known = {}
    seconds = lambda steps: estimate(job(tiny_tables(max_steps=steps), tiny_run.dataset())["config"],
                                     str(tiny_run.dataset().directory), known)
    one, ten = seconds(100), seconds(1000)
    assert len(known) == 1 and 0 < one < ten, "one shape is timed once"


def test_a_run_of_no_held_out_text_is_not_asked_for_it(tmp_path):
    settings = {"config": {"model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_experts": 1,
                                     "num_experts_per_tok": 1, "intermediate_size": 8}, "data": {"sequence_length": 16},
                           "training": {"max_steps": 3, "batch_size": 4, "precision": "fp32"}},
                "data": {"count": 8, "length": 16, "vocab_size": 32, "seed": 0}, "points": 0, "rows": 8}  # fmt: skip
    result = train_once(settings, tmp_path / "job", lambda share: None)
    assert result["train"] == pytest.approx(result["held_out"]), "the rows asked for are all rows"
    assert "documents" not in result and result["held_out"] == pytest.approx(math.log(31), abs=0.3)
