"""What the model writes: a held-out text continued, always from the same words and with the same seed, so that learning can be read.

Nothing here touches the training: sampling has a random generator of its own (model/generate.py).
"""

from __future__ import annotations

from typing import Any

from pellucid.model.generate import generate
from pellucid.model.grok import Grok1

PROMPT_LINES, PROMPT_CHARACTERS = 3, 200
TOKENS = 60  # written at each evaluation


def prompt_of(dataset: Any) -> str:
    """Some lines out of the first held-out document; of the first training document where none is held out."""
    lines = (dataset.validation or dataset.train).document(0)["text"].splitlines(keepends=True)
    return "".join(lines[len(lines) // 3 :][:PROMPT_LINES])[:PROMPT_CHARACTERS]


def continued(model: Grok1, tokenizer: Any, prompt: str, tokens: int = TOKENS) -> str:
    """What the model makes of the prompt. Raises UserError if its scores are not finite."""
    return "".join(generate(model, tokenizer, prompt, max_new_tokens=tokens, temperature=0.7, top_p=0.95))
