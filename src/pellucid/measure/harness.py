"""Others' yardstick: EleutherAI's lm-evaluation-harness asks a model its tasks' questions (package lm-eval, extra `harness`).

The harness knows the tasks and the measures; here a model answers its three kinds of request: how likely is a
continuation, how likely is a whole text, what comes next. As in training a document begins with eos; a whole text is read
in windows of the model's context, each token predicted once. Source: lm_eval/api/model.py, Gao et al. 2024.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from pellucid.config import UserError
from pellucid.model.generate import generate
from pellucid.model.grok import Grok1

ROWS = 16  # continuations in a forward pass
NEW_TOKENS = 256  # generated where a task does not say
Progress = Callable[[str, int, int | None], None]


def run_harness(
    model: Grok1, tokenizer: Any, tasks: Sequence[str], context: int, *, limit: int | None = None,
    few_shot: int | None = None, progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The harness's results: {task: {measure: value}}. A task is a name the harness knows, or a task file (.yaml).

    context: most tokens the model reads at once. limit: questions of each task. Raises UserError.
    """
    evaluator, TaskManager = _harness()
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_task_name(Path(task)) if Path(task) in files else task for task in tasks]
    defaults = len(files) < len(tasks)  # to know thousands of tasks takes seconds
    known = TaskManager(include_path=[str(file.parent) for file in files] or None, include_defaults=defaults)
    for name in names:
        if not known.match_tasks([name]):
            raise UserError(f"--harness {name}: the harness has no such task; give one of its names, or a task file (.yaml)")
    answerer = _answerer(model, tokenizer, context, progress or (lambda stage, done, total: None))
    try:
        found = evaluator.simple_evaluate(
            model=answerer, tasks=names, limit=limit, num_fewshot=few_shot, task_manager=known, log_samples=False, bootstrap_iters=1000)
    except UserError:
        raise
    except Exception as error:  # task files, their data and the hub raise a dozen kinds
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise UserError(f"--harness {' '.join(tasks)}: {type(error).__name__}: {reason}") from None
    plain = lambda value: value if isinstance(value, str | int | float | bool) else float(value)
    return {task: {name: plain(value) for name, value in row.items() if value is not None} for task, row in found["results"].items()}


def _harness() -> tuple[Any, Any]:
    try:
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--harness: lm-eval is not installed; pip install 'pellucid[harness]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return evaluator, TaskManager


class _TaskFile(yaml.SafeLoader):
    """Reads a task's name; the harness itself reads the file, and may load Python that lies beside it (`!function`)."""


_TaskFile.add_multi_constructor("!", lambda loader, suffix, node: None)


def _task_name(path: Path) -> str:
    try:
        name = yaml.load(path.read_text(encoding="utf-8"), _TaskFile)["task"]
    except OSError as error:
        raise UserError(f"--harness {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"--harness {path}: not a task file of the harness (no 'task:' with its name)") from None
    return str(name)


def _answerer(model: Grok1, tokenizer: Any, context: int, progress: Progress) -> Any:
    """An lm_eval LM; the class is made here because the package is optional."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    eos = tokenizer.eos_token_id

    class Answerer(TemplateLM):
        eot_token_id = eos

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return tokenizer.encode(string)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            before, after = super()._encode_pair(context, continuation)
            return [eos, *before], after

        def _loglikelihood_tokens(self, requests: Sequence[tuple], **kwargs: Any) -> list[tuple[float, bool]]:
            return log_likelihoods(model, [(before, after) for _, before, after in requests], context, tokenizer.pad_token_id, progress)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            windows, owner = [], []
            for number, request in enumerate(requests):
                rolling = get_rolling_token_windows(tokenizer.encode(request.args[0]), eos, context, 1)
                mine = [make_disjoint_window(window) for window in rolling]
                windows += mine
                owner += [number] * len(mine)
            total = [0.0] * len(requests)
            for number, (nats, _) in zip(
                owner, log_likelihoods(model, windows, context, tokenizer.pad_token_id, progress), strict=True):  # fmt: skip
                total[number] += nats
            return total

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            answers = []
            for number, request in enumerate(requests, start=1):
                answers.append(_generated(model, tokenizer, *request.args, context))
                progress("generating", number, len(requests))
            return answers

    return Answerer()


@torch.no_grad()
def log_likelihoods(
    model: Grok1, pairs: Sequence[tuple[list[int], list[int]]], context: int, pad: int, progress: Progress
) -> list[tuple[float, bool]]:
    """Of each (tokens before, continuation): (log p(continuation | before) in nats, whether it is the greedy one).

    Where both are longer than `context` and one, the first tokens are left out.
    """
    device = model.embedding.weight.device
    streams = [([*before, *after])[-(context + 1) :] for before, after in pairs]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda n: -len(streams[n]))
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        rows = [torch.tensor(streams[n][:-1]) for n in chosen]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        length = torch.tensor([len(row) for row in rows])
        segments = (torch.arange(tokens.shape[1]) < length[:, None]).int()
        hidden, _ = model.hidden_states(tokens.to(device), segment_ids=segments.to(device))
        for row, n in enumerate(chosen):
            after = torch.tensor(streams[n][max(1, len(streams[n]) - len(pairs[n][1])) :], device=device)
            scores = model.logits(hidden[row, int(length[row]) - len(after) : int(length[row])]).log_softmax(-1)
            nats = scores.gather(-1, after[:, None]).double().sum().item()
            found[n] = nats, bool((scores.argmax(-1) == after).all())
        progress("scoring", min(start + ROWS, len(order)), len(order))
    return found


def _generated(model: Grok1, tokenizer: Any, prompt: str, wanted: dict[str, Any], context: int) -> str:
    """What the model says after eos and `prompt` (their last tokens, where both are long), by the harness's settings."""
    until = wanted.get("until") or []
    stop = [mark for mark in ([until] if isinstance(until, str) else until) if mark]  # lm-eval's own models pass over "" too
    most = min(int(wanted.get("max_gen_toks", NEW_TOKENS)), context // 2)  # the question keeps at least half of the row
    ids = [tokenizer.eos_token_id, *tokenizer.encode(prompt)][-(context - most) :]
    speaker = SimpleNamespace(eos_token_id=tokenizer.eos_token_id, encode=lambda text: ids, decode=tokenizer.decode)
    temperature = float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0
    return "".join(generate(
        model, speaker, prompt, stop=stop, max_new_tokens=most, temperature=temperature, top_p=float(wanted.get("top_p", 1.0))))
