"""Text to measure on is read as the training text was."""

import pytest

from pellucid.config import NormalizeConfig, UserError
from pellucid.measure.texts import file_texts, token_streams, trained_with
from pellucid.run import train


def test_files_are_normalized_as_the_text_of_the_run_was(tiny_tables, tmp_path):
    tables = tiny_tables(max_steps=1)
    run = train({**tables, "data": {**tables["data"], "normalize": {"lowercase": True}}}, run_dir=tmp_path / "run")
    file = tmp_path / "given.txt"
    file.write_text("The CAT")
    _, tokenizer = run.load()
    for place in (run.directory, run.directory / "model", run.directory / "checkpoints" / "step-1"):
        (stream,) = token_streams(str(place), str(file), tokenizer, 10**6)
        assert tokenizer.decode(stream[1:-1].tolist()) == "the cat"
        assert trained_with(place) == run.config.data
    (stream,) = token_streams("tiny", str(file), tokenizer, 10**6)
    assert tokenizer.decode(stream[1:-1].tolist()) == "The CAT", "nothing is known of other models' text"
    assert file_texts([str(file)], 10**6, "DATA", normalization=NormalizeConfig(lowercase=True)).texts == ["the cat"]


@pytest.mark.parametrize(("text", "limit", "says"), [
    (" \n ", 10**6, "given.txt holds no text$"), ("words " * 100, 1, "given.txt holds no text; raise --megabytes$")])
def test_files_without_text_are_refused(tmp_path, text, limit, says):
    file = tmp_path / "given.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^--held-out: .*{says}"):
        file_texts([str(file)], limit, "--held-out")
