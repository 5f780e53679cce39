"""lm-eval's answers against our own: local tasks on local data, no network."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from pellucid.config import UserError
from pellucid.measure.files import evaluate_files

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra 'harness')")

from pellucid.measure.harness import _answerer, run_harness

CONTEXT = 32  # of the tiny run, whose tokens are bytes
TEXTS = ["the cat sat on a mat", "dogs ran past old trees in rain " * 2, "naïve owls ünder the moon"]  # 20, 2 x 32, 28 tokens
CHOICES = ["cat", "moon", "zzzz"]
QUESTIONS = [("the ", 0), ("owls sang ünder the ", 1), ("old trees in rain and a ", 0), ("sat on a mat while a ", 2)]


def write_task(folder, name, rows, settings):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(f"task: {name}\ndataset_path: json\ntest_split: test\n"
                    f"dataset_kwargs:\n  data_files:\n    test: {folder / name}.jsonl\n{settings}")  # fmt: skip
    return str(path)


def nats(model, tokenizer, before, after):
    """-log p(after | before), from plain logits in float64."""
    ids, new = [tokenizer.eos_token_id, *tokenizer.encode(before)], tokenizer.encode(after)
    scores = model(torch.tensor([[*ids, *new]]))[0].detach().double().log_softmax(-1)
    return -sum(scores[len(ids) - 1 + n, token].item() for n, token in enumerate(new))


@pytest.fixture(scope="module")
def asked(tiny_run, tmp_path_factory):
    """(model, tokenizer, what the harness found), all tasks in one go: it takes long to start."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "cache").mkdir()
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    model, tokenizer = tiny_run.load()
    files = [
        write_task(folder, "whole_texts", [{"text": text} for text in TEXTS],
                   "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
                   "metric_list:\n  - metric: bits_per_byte\n  - metric: byte_perplexity\n"),
        write_task(folder, "choices", [{"start": start, "answer": answer} for start, answer in QUESTIONS],
                   f"output_type: multiple_choice\ndoc_to_text: '{{{{start}}}}'\ndoc_to_choice: {json.dumps(CHOICES)}\n"
                   "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"),
        write_task(folder, "words", [{"start": text, "next": said(model, tokenizer, text)} for text in TEXTS],
                   "output_type: generate_until\ndoc_to_text: '{{start}}'\ndoc_to_target: '{{next}}'\n"
                   "generation_kwargs:\n  until: [' ']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n"),
    ]  # fmt: skip
    yield model, tokenizer, run_harness(model, tokenizer, files, CONTEXT), folder
    patch.undo()


def said(model, tokenizer, prompt):
    """What the model says, greedily by plain logits, up to a space, after eos and a prompt, or their end if they are too long."""
    ids = [tokenizer.eos_token_id, *tokenizer.encode(prompt)][-(CONTEXT - 8) :]
    new = []
    while len(new) < 8:
        token = int(model(torch.tensor([[*ids, *new]]))[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return tokenizer.decode(new).split(" ")[0]


def test_perplexity_of_whole_texts_is_ours(asked, tmp_path):
    """Ours also predicts the end of each document; without it, the two agree."""
    model, tokenizer, found, _ = asked
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    ours = evaluate_files(model, tokenizer, str(tmp_path), context=CONTEXT)
    total = ours.nats
    for text in TEXTS:
        stream = [tokenizer.eos_token_id, *tokenizer.encode(text)]
        window = stream[(len(stream) - 1) // CONTEXT * CONTEXT :]  # the one in which the document ends
        total += model(torch.tensor([window]))[0, -1].detach().double().log_softmax(-1)[tokenizer.eos_token_id].item()
    bits = total / math.log(2) / ours.text_bytes
    assert found["whole_texts"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert found["whole_texts"]["byte_perplexity,none"] == pytest.approx(2**bits, rel=1e-4)


def test_choices_are_the_likeliest_by_plain_logits(asked):
    model, tokenizer, found, _ = asked
    right = [min(range(3), key=lambda n, s=start: nats(model, tokenizer, s, CHOICES[n])) == answer for start, answer in QUESTIONS]
    assert found["choices"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_generated_words_are_the_likeliest_by_plain_logits(asked):
    model, tokenizer, found, _ = asked
    answerer = _answerer(model, tokenizer, CONTEXT, lambda stage, done, total: None)
    requests = [SimpleNamespace(args=(text, {"until": [" "], "max_gen_toks": 8})) for text in TEXTS]
    expected = [said(model, tokenizer, text) for text in [*TEXTS, ""]]
    requests.append(SimpleNamespace(args=("", {"until": [" ", ""], "max_gen_toks": 8})))
    assert answerer.generate_until(requests) == expected and any(expected)
    requests[0].args[1]["until"] = [" ", ""]
    assert answerer.generate_until(requests[:1]) == expected[:1], "an empty mark ends nothing"
    assert "exact_match,none" in found["words"]


def test_what_the_harness_does_not_know_is_a_sentence(asked, tmp_path, monkeypatch):
    model, tokenizer, _, _ = asked
    (tmp_path / "broken.yaml").write_text("output_type: [")
    (tmp_path / "nameless.yaml").write_text("output_type: multiple_choice\n")
    for task, expected in {str(tmp_path / "broken.yaml"): "not a task file", str(tmp_path / "nameless.yaml"): "no 'task:'",
                           str(tmp_path / "none.yaml"): "cannot be read"}.items():  # fmt: skip
        with pytest.raises(UserError, match=expected):
            run_harness(model, tokenizer, [task], CONTEXT)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="lm-eval is not installed"):
        run_harness(model, tokenizer, ["piqa"], CONTEXT)
