"""From a step back to its documents."""

import pytest
from rich.console import Console

from pellucid.config import UserError
from pellucid.observe.trace import render, trace, training_split


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
