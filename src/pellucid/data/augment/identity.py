"""Picture 2, augment: what an augmentation depends on besides its settings, known without loading any of it."""

from __future__ import annotations

from typing import Any

from pellucid.config import (
    BackTranslationConfig,
    BpeDropoutConfig,
    DataConfig,
    SynonymsConfig,
    TokenMaskingConfig,
    UserError,
)
from pellucid.data.augment.bpe_dropout import REFUSAL
from pellucid.data.augment.lexicons import lexicon_fingerprint
from pellucid.data.augment.neural_translators import models_fingerprint
from pellucid.data.augment.translators import open_apertium

VERSION = 3  # of the augmenters: raise it when one gives other results for the same settings


def materialized(config: DataConfig) -> bool:
    """Whether there is anything to do before packing (token_masking belongs to the loader)."""
    return any(not isinstance(entry, TokenMaskingConfig) for entry in config.augment)


def identity(config: DataConfig) -> list[Any]:
    """For the hash of the settings: the version, lexicon contents, engine data; [] where nothing is materialized.

    Raises UserError when a lexicon or an engine is missing: before any work, not in the middle of it.
    """
    if not materialized(config):
        return []
    found: list[Any] = [VERSION]
    for entry in config.augment:
        if isinstance(entry, SynonymsConfig):
            found.append(lexicon_fingerprint(entry.source, entry.path))
        if isinstance(entry, BackTranslationConfig) and entry.engine == "apertium":
            found.append(open_apertium(entry.language, entry.pivot).fingerprint)
        elif isinstance(entry, BackTranslationConfig):
            found.append(models_fingerprint(entry.models))
        if isinstance(entry, BpeDropoutConfig) and config.tokenizer.kind in ("bytes", "characters"):
            raise UserError(REFUSAL)
    return found
