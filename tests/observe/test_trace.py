"""From a step back to its documents."""

import shutil
import sqlite3

import numpy as np
import pytest
import torch
from rich.console import Console

from pellucid.config import UserError
from pellucid.data.dataset import Batch
from pellucid.observe.store import Record
from pellucid.observe.text_losses import TextLossProbe
from pellucid.observe.trace import render, trace, training_split
from pellucid.observe.web.feed import Feed


def step_with_poison(run_dir) -> int:
    config, _, split = training_split(run_dir)
    steps = [s for s in range(config.training.max_steps)
             if any("poison" in piece["source"] for piece in split.trace(s, config.training.batch_size))]
    assert steps, "the poisoned document was never drawn"
    return steps[-1]


def test_the_poisoned_document_comes_out_on_top_with_file_bytes_and_tokens(run_dir):
    result = trace(run_dir, step_with_poison(run_dir))
    top = result.documents[0]
    assert top.source.endswith("poison.txt") and top.loss > 1.3 * result.loss
    assert 0 <= top.byte_start < top.byte_end <= 300 and top.exact
    assert sum("poison" in token.source for token in result.tokens) > len(result.tokens) / 2
    losses = [d.loss for d in result.documents]
    assert losses == sorted(losses, reverse=True) and None not in losses


def test_every_piece_s_excerpt_is_in_its_file(run_dir):
    from pathlib import Path

    for document in trace(run_dir, 7).documents:
        path = Path(document.source.removeprefix("file://"))
        assert document.excerpt[:40].strip() in path.read_text()


def test_rendering_shows_the_top_document(run_dir):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(render(trace(run_dir, step_with_poison(run_dir))))
    assert "poison" in console.export_text()


def test_a_step_that_was_not_recorded_is_one_sentence(run_dir):
    with pytest.raises(UserError, match=r"step 999 is not recorded; steps 0 to 59 are"):
        trace(run_dir, 999)


def test_a_document_and_a_token_without_a_number_come_first_in_the_trace_and_on_the_page(run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    other, piece = trace(run_dir, 7).documents[-2:]  # the easiest
    with sqlite3.connect(folder / "run.sqlite") as run:
        of = "WHERE step = 7 AND row = ? AND segment = ?"
        run.execute(f"UPDATE document_loss SET loss = ? {of}", (np.nan, piece.row, piece.segment))
        run.execute(f"DELETE FROM document_loss {of}", (other.row, other.segment))
        run.execute("UPDATE worst_token SET loss = ? WHERE step = 7 AND rank = 0", (np.nan,))
    feed = Feed(folder)
    told, page = trace(folder, 7), feed.step(7)
    for losses in ([d.loss for d in told.documents], [d["loss"] for d in page["pieces"]]):
        assert np.isnan(losses[0]) and np.isfinite(losses[1:-1]).all() and losses[-1] is None, "one was not recorded"
    assert np.isnan(feed.reader.document_losses(7)[0]["loss"])
    assert np.isnan(told.tokens[0].loss) and np.isnan(page["tokens"][0]["loss"])


def test_a_token_of_a_loss_that_is_none_is_the_first_of_the_worst_of_all_micro_batches():
    """Two micro-batches of 2 x 16 tokens: 16 losses from 10 up in the first, one NaN in the second."""
    probe = TextLossProbe(16, ["one"], 50)
    for value in (10 + torch.arange(32.0), torch.ones(32).index_fill(0, torch.tensor([5]), torch.nan)):
        tokens = torch.arange(32).view(2, 16)
        ones, rows = torch.ones(2, 16, dtype=torch.int32), torch.arange(2)
        batch = Batch(tokens, tokens, ones, tokens % 16, rows, torch.zeros_like(rows))
        probe.add(batch, value, torch.ones(32, dtype=torch.bool), keep_row=False)
    probe.finish({name: tensor.numpy() for name, tensor in probe.take().items()}, record := Record(0))
    worst = next(rows for statement, rows in record.rows if "worst_token" in statement)
    assert worst[0][2:5] == (2, 5, 5) and np.isnan(worst[0][6]), "row 2 of the batch, position 5, token 5"
    assert [row[6] for row in worst[1:]] == [float(loss) for loss in range(41, 26, -1)]
