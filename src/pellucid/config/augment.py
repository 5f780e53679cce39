"""`[[data.augment]]`: one table for each augmenter."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from pellucid.config.section import Section


class AugmentSection(Section):
    """One augmenter. Which documents and which units it touches is drawn per (seed, document, epoch, augmenter)."""

    documents: float = Field(1.0, ge=0, le=1, description="share of documents it touches at all")


class SynonymsConfig(AugmentSection):
    """Words replaced by synonyms, or (random insertion, Wei & Zou 2019) synonyms put before them."""

    name: Literal["synonyms", "random_insertion"]
    rate: float = Field(0.1, ge=0, le=1, description="share of words")
    source: Literal["wordnet", "mythes", "moby"] = Field("wordnet", description="kind of lexicon")
    path: str | None = Field(None, description="the lexicon; None: where Debian installs it")
    dominance: float = Field(0.8, ge=0, le=1, description="share of a word's uses that its first sense must have")


class NoiseConfig(AugmentSection):
    """Word order, missing words, misspelt words; wrong keys and wrong letters."""

    name: Literal["random_swap", "random_deletion", "spelling", "keyboard", "characters"]
    rate: float = Field(0.02, ge=0, le=1, description="share of words; of letters for keyboard and characters")


class BackTranslationConfig(AugmentSection):
    """Sentences translated to another language and back (Sennrich et al. 2016)."""

    name: Literal["back_translation"]
    rate: float = Field(1.0, ge=0, le=1, description="share of sentences of prose")
    engine: Literal["apertium", "transformers", "ctranslate2", "http"] = "apertium"
    language: str = Field("en", description="of the documents, in the engine's own code")
    pivot: str = Field("eo", description="language gone through")
    models: dict[str, str] = Field(default_factory=dict, description="'en-de' and 'de-en', or '*': folder or hub name")
    url: str = Field("http://127.0.0.1:5000", description="of the server, for engine = 'http'")
    device: str = Field("cpu", description="of the model, for transformers and ctranslate2")
    sampling: bool = Field(False, description="draw instead of taking the best; each text is then translated alone")
    beams: int = Field(1, ge=1)
    chrf_low: float = Field(0.3, ge=0, le=1, description="a round trip less like the original is refused")
    chrf_high: float = Field(0.95, ge=0, le=1, description="a round trip more like the original is refused")
    length_ratio: float = Field(1.5, ge=1, description="largest factor between the lengths")


class FillInTheMiddleConfig(Section):
    """Prefix, middle and suffix rearranged so that the middle comes last (Bavarian et al. 2022)."""

    name: Literal["fill_in_the_middle"]
    rate: float = Field(0.5, ge=0, le=1, description="share of documents")
    spm: float = Field(0.5, ge=0, le=1, description="share of these in the order suffix, prefix, middle")
    sentinels: tuple[str, str, str] = Field(
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), description="before prefix, suffix and middle")


class SpanMaskingConfig(AugmentSection):
    """Spans of words moved to the end behind sentinels (Raffel et al. 2020; Aghajanyan et al. 2022)."""

    name: Literal["span_masking"]
    rate: float = Field(0.15, ge=0, lt=1, description="share of words")
    mean_length: float = Field(3.0, ge=1, description="words per span")
    sentinel: str = Field("<|mask_{}|>", pattern=r"^.+\{\}.*$", description="{} is the number of the span")


class BpeDropoutConfig(AugmentSection):
    """Merges of the tokenizer left out at random (Provilkov et al. 2020)."""

    name: Literal["bpe_dropout"]
    rate: float = Field(0.1, ge=0, le=1, description="share of merges")


class TokenMaskingConfig(Section):
    """Input tokens of training batches replaced by a random token while targets stay (Xie et al. 2017); at load time."""

    name: Literal["token_masking"]
    rate: float = Field(0.05, ge=0, le=1, description="share of input tokens")


Augmentation = Annotated[
    SynonymsConfig | NoiseConfig | BackTranslationConfig | FillInTheMiddleConfig | SpanMaskingConfig | BpeDropoutConfig
    | TokenMaskingConfig, Field(discriminator="name")]
AUGMENTERS = {name: table for table in get_args(get_args(Augmentation)[0])
              for name in get_args(table.model_fields["name"].annotation)}
