"""`[data.normalize]`, `[data.filter]`, `[data.deduplicate]`, `[data.decontaminate]`, `[data.tokenizer]`: the stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pellucid.config.section import Section
from pellucid.config.sources import Source


class NormalizeConfig(Section):
    """What is done to every document before anything else. Turn a step off to keep bytes as they are."""

    unicode: Literal["NFC", "NFKC", "none"] = Field("NFC", description="Unicode normalisation form")
    line_ends: bool = Field(True, description="CRLF and CR become LF")
    control_characters: bool = Field(True, description="remove control characters other than tab and newline")
    repair: bool = Field(False, description="undo wrong decodings (mojibake) with ftfy; needs the 'clean' extra")
    quotes: bool = Field(False, description="curly quotation marks become straight ones")
    whitespace: Literal["keep", "trim", "collapse"] = Field(
        "keep", description="trim: plain spaces, no trailing ones, one blank line at most; collapse: also runs of spaces")
    lowercase: bool = Field(False, description="all letters lower case")
    punctuation: bool = Field(False, description="remove punctuation")
    pii: list[Literal["email", "ip", "phone", "card"]] = Field(
        default_factory=list, description="personal data to mask as <email>, <ip>, <phone>, <card>")


def _as_filter(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class LengthFilter(Section):
    """Documents of a sensible size, in characters."""

    min_characters: int = Field(200, ge=0)
    max_characters: int = Field(1_000_000, ge=1)


class LanguageFilter(Section):
    """Documents whose most likely language is wanted, with fastText's lid.176; needs the 'clean' extra."""

    keep: list[str] = Field(default_factory=lambda: ["en"], min_length=1, description="ISO 639 codes")
    min_score: float = Field(0.65, ge=0, le=1, description="probability it must have (FineWeb: 0.65)")


class GopherQualityFilter(Section):
    """Rae et al. 2021 (arXiv 2112.11446), appendix A1.1: what ordinary prose looks like."""

    min_words: int = Field(50, ge=0)
    max_words: int = Field(100_000, ge=1)
    min_mean_word_length: float = Field(3, ge=0, description="characters")
    max_mean_word_length: float = Field(10, ge=0, description="characters")
    max_symbol_ratio: float = Field(0.1, ge=0, description="'#' per word; ellipses per word")
    max_bullet_lines: float = Field(0.9, ge=0, description="share of lines that start with a bullet")
    max_ellipsis_lines: float = Field(0.3, ge=0, description="share of lines that end with an ellipsis")
    min_alphabetic_words: float = Field(0.8, ge=0, le=1, description="share of words that hold a letter")
    min_stop_words: int = Field(2, ge=0, le=8, description="of: the be to of and that have with")


class GopherRepetitionFilter(Section):
    """Rae et al. 2021 (arXiv 2112.11446), table A1: largest shares of repeated text."""

    duplicate_lines: float = Field(0.30, ge=0)
    duplicate_line_characters: float = Field(0.20, ge=0)
    duplicate_paragraphs: float = Field(0.30, ge=0)
    duplicate_paragraph_characters: float = Field(0.20, ge=0)
    top_ngrams: dict[int, float] = Field(
        default_factory=lambda: {2: 0.20, 3: 0.18, 4: 0.16}, description="characters in the most frequent n-gram")
    duplicate_ngrams: dict[int, float] = Field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
        description="characters in n-grams that came before")


class C4Filter(Section):
    """Raffel et al. 2020 (arXiv 1910.10683), section 2.2: keeps the lines that are sentences, then judges the page."""

    terminal_punctuation: bool = Field(True, description="remove lines that do not end as a sentence does")
    min_words_per_line: int = Field(3, ge=0, description="shorter lines are removed")
    max_word_length: int = Field(1000, ge=1, description="lines with a longer word are removed")
    min_sentences: int = Field(5, ge=0, description="of the lines kept; the paper says 5, some copies 3")
    citations: bool = Field(True, description="remove [1], [edit] and [citation needed]")
    javascript: bool = Field(True, description="remove lines that mention it")
    policy: bool = Field(True, description="remove lines about cookies, terms of use and privacy policies")
    lorem_ipsum: bool = Field(True, description="drop pages with it")
    curly_bracket: bool = Field(True, description="drop pages with one: they hold code")


class FineWebFilter(Section):
    """Penedo et al. 2024 (arXiv 2406.17557), section 3.6; the last is in their code only."""

    min_punctuated_lines: float = Field(0.12, ge=0, description="share of lines that end a sentence")
    max_short_lines: float = Field(0.67, ge=0, description="share of lines of at most short_line characters")
    short_line: int = Field(30, ge=1, description="characters")
    max_duplicate_characters: float = Field(0.1, ge=0, description="in repeated lines (paper: 0.1; datatrove 0.10: 0.01)")
    max_newlines_per_word: float = Field(0.3, ge=0)


class FilterConfig(Section):
    """Which documents are left out. Each filter is off until given as true or as a table of its thresholds."""

    length: Annotated[LengthFilter | None, BeforeValidator(_as_filter)] = None
    language: Annotated[LanguageFilter | None, BeforeValidator(_as_filter)] = None
    gopher_quality: Annotated[GopherQualityFilter | None, BeforeValidator(_as_filter)] = None
    gopher_repetition: Annotated[GopherRepetitionFilter | None, BeforeValidator(_as_filter)] = None
    c4: Annotated[C4Filter | None, BeforeValidator(_as_filter)] = None
    fineweb: Annotated[FineWebFilter | None, BeforeValidator(_as_filter)] = None
    expression: str | None = Field(None, description="keep what it says, e.g. 'words >= 50 and mean_word_length < 9'")


class DeduplicateConfig(Section):
    """What is said twice is kept once. All off by default; the result depends on neither order nor workers."""

    exact: bool = Field(False, description="same text but for case and whitespace")
    near: bool = Field(False, description="near-duplicates by MinHash-LSH (Broder 1997)")
    bands: int = Field(14, ge=1, le=256, description="FineWeb: 14 bands of 8 rows, half of pairs at Jaccard 0.72 found")
    rows: int = Field(8, ge=1, le=64, description="hashes per band; more: stricter")
    ngram: int = Field(5, ge=1, description="words per shingle")
    substring_words: int = Field(0, ge=0, description="cut passages of so many words seen before (Lee et al. 2022: 50)")
    seed: int = Field(1, ge=0, description="of the hash functions")


class DecontaminateConfig(Section):
    """Documents that share word n-grams with benchmarks, or with held-out text, leave the training text."""

    against: list[Source] = Field(default_factory=list, description="benchmark texts, as data.sources")
    held_out: bool = Field(False, description="also against our own validation documents")
    ngram: int = Field(13, ge=1, description="words (Brown et al. 2020, appendix C)")
    max_overlap: float = Field(0.0, ge=0, lt=1, description="share of a document's n-grams that may be shared")


class TokenizerConfig(Section):
    """How text becomes token ids. Trained kinds reserve pad 0, bos 1, eos 2, unk 3."""

    kind: Literal["bpe", "sentencepiece", "unigram", "bytes", "characters", "file"] = "bpe"
    vocab_size: int = Field(4096, ge=260, description="tokens wanted; ignored by bytes, characters and file")
    path: str | None = Field(None, description="tokenizer.model or tokenizer.json, for kind = 'file'")
    encoder: Literal["auto", "gigatoken", "kitoken", "splintr", "reference"] = Field(
        "auto", description="library that tokenizes much text; every one gives the same ids, or is refused")

    @model_validator(mode="after")
    def _file_needs_path(self) -> TokenizerConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError("path belongs to kind = 'file': set both or neither")
        return self
