"""Predicted tokens, one after another: sample from the scores of the last position, append, again.

temperature 0 takes the most likely token. top_k keeps the k best, top_p the smallest set of best tokens whose
probability reaches p (Holtzman et al. 2020), both after the temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pellucid.config import UserError
from pellucid.model.grok import Grok1

LOWEST_TEMPERATURE = 1e-4  # below it the most likely token is taken: scores over it would overflow


class Decoder(Protocol):
    """What of a tokenizer is needed to speak."""

    eos_token_id: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def filter_scores(scores_V: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities [V] after temperature, top-k and top-p; what is filtered out has probability zero."""
    scores_V = scores_V / temperature
    if top_k is not None and top_k < scores_V.numel():
        scores_V = scores_V.masked_fill(scores_V < scores_V.topk(top_k).values[-1], -torch.inf)
    probabilities = torch.softmax(scores_V, dim=-1)
    if top_p < 1.0:
        ranked, index = probabilities.sort(descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p  # the token that crosses p stays in
        beyond[0] = False
        probabilities = probabilities.index_fill(0, index[beyond], 0.0)
        probabilities = probabilities / probabilities.sum()
    return probabilities


@torch.inference_mode()
def generate_ids(
    model: Grok1,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """New token ids after `prompt`; ends before eos or after `max_new_tokens`.

    A seed gives the same ids with and without the cache, up to rounding of the scores.
    """
    if not prompt:
        raise UserError("the prompt is empty: give at least one token")
    if model.config.head is not None:
        raise UserError("this model labels documents and does not continue texts: use `pellucid predict`")
    device = model.embedding.weight.device
    random = torch.Generator().manual_seed(seed)
    cache = model.new_cache() if use_cache else None
    past, new = list(prompt), list(prompt)
    for _ in range(max_new_tokens):
        hidden, _ = model.hidden_states(torch.tensor([new], device=device), cache=cache)
        scores = model.logits(hidden[0, -1]).float().cpu()
        if not torch.isfinite(scores).all():
            raise UserError("the model's scores are not finite: its weights hold NaN or infinity, or overflow")
        if temperature < LOWEST_TEMPERATURE:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(filter_scores(scores, temperature, top_k, top_p), 1, generator=random))
        if token == eos_token_id:
            return
        yield token
        past.append(token)
        new = [token] if use_cache else past


def generate(
    model: Grok1, tokenizer: Decoder, prompt: str, *, stop: Sequence[str] = (), max_new_tokens: int = 100, **sampling
) -> Iterator[str]:
    """Continue `prompt` piece by piece of text; an empty prompt starts a new document (eos begins each, see data).

    Ends at the end of the document, at `max_new_tokens`, or before the first of the `stop` strings. `sampling` is
    that of `generate_ids`: temperature, top_k, top_p, seed, use_cache.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eos_token_id]
    before = tokenizer.decode(ids) if prompt else ""
    shown = ""
    for token in generate_ids(
        model, list(ids), max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, **sampling
    ):
        ids = [*ids, token]
        text = tokenizer.decode(ids if prompt else ids[1:])[len(before) :]
        ends = [text.index(mark) for mark in stop if mark in text]
        if ends:
            yield text[len(shown) : min(ends)]
            return
        safe = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))  # an unfinished character waits for its last byte
        safe -= max((n for mark in stop for n in range(1, len(mark)) if text[:safe].endswith(mark[:n])), default=0)
        if safe > len(shown):
            yield text[len(shown) : safe]
            shown = text[:safe]
    rest = tokenizer.decode(ids if prompt else ids[1:])[len(before) + len(shown) :]
    if rest:
        yield rest
