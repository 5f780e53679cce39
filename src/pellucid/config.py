"""One typed tree of settings: TOML file, presets, and key=value overrides become a `Config`.

Every field has its unit and its reason in one line and a default that works. A mistake of the user's
(an unknown key, a value out of range, shapes that do not fit) becomes one `UserError` sentence that
names the key. Nothing of ours is imported here: every other module may import this one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class UserError(Exception):
    """A mistake the user can mend: one sentence with what, where and how. The command line exits with 2."""


class Section(BaseModel):
    """A table of the configuration. Unknown keys are errors; assignments are validated."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------- model


def grok_intermediate_size(hidden_size: int, widening_factor: float = 8.0) -> int:
    """F of the official code: two thirds of widening * D, rounded up to a multiple of 8 (xai-org/grok-1, `ffn_size`)."""
    size = int(widening_factor * hidden_size) * 2 // 3
    return size + (8 - size) % 8


class ModelConfig(Section):
    """Shape of a Grok-1 model. Names are those engines already read for this architecture.

    The defaults derived from `hidden_size` (intermediate size, head_dim, multipliers) follow Grok-1's rules.
    """

    preset: str | None = Field(None, description="shape to start from; the other fields override it")
    vocab_size: int | None = Field(None, ge=5, description="tokens; None takes the tokenizer's size")
    hidden_size: int = Field(128, ge=2, description="D, width of the residual stream")
    intermediate_size: int | None = Field(None, ge=1, description="F of one expert; None: Grok-1's rule from D")
    num_hidden_layers: int = Field(4, ge=1)
    num_attention_heads: int = Field(4, ge=1, description="H, query heads")
    num_key_value_heads: int = Field(1, ge=1, description="K, key/value heads; divides H")
    head_dim: int | None = Field(None, ge=2, description="d, even (rotary halves); None: D / H")
    num_experts: int = Field(8, ge=1, description="E, experts per layer")
    num_experts_per_tok: int = Field(2, ge=1, description="k, experts that serve each token")
    max_position_embeddings: int = Field(8192, ge=1, description="longest sequence the model is meant for")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary phases")
    rms_norm_eps: float = Field(1e-5, gt=0)
    attn_output_multiplier: float | None = Field(None, gt=0, description="factor on q.k; None: head_dim^-0.5")
    max_attn_value: float = Field(30.0, gt=0, description="attention logits are capped: c*tanh(x/c)")
    embedding_multiplier_scale: float | None = Field(None, gt=0, description="factor on embeddings; None: sqrt(D)")
    output_multiplier_scale: float = Field(3**-0.5, gt=0, description="factor on the output logits")
    pad_token_id: int = Field(0, ge=0, description="masked as a key everywhere")
    bos_token_id: int = Field(1, ge=0)
    eos_token_id: int = Field(2, ge=0)
    tie_word_embeddings: Literal[True] = Field(True, description="Grok-1 ties input and output embeddings")

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset"):
            shape = preset(values["preset"])["model"]
            return {**shape, **{key: value for key, value in values.items() if value is not None}}
        return values

    @model_validator(mode="after")
    def _derive_and_check(self) -> ModelConfig:
        derive = self.__dict__  # bypasses validate_assignment, which would call this again
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: change one, or set head_dim"
                )
            derive["head_dim"] = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary embedding turns pairs of coordinates")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads {self.num_attention_heads}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        if self.vocab_size is not None and max(self.pad_token_id, self.bos_token_id, self.eos_token_id) >= self.vocab_size:
            raise ValueError(f"vocab_size {self.vocab_size} does not hold the pad, bos and eos ids")
        if self.intermediate_size is None:
            derive["intermediate_size"] = grok_intermediate_size(self.hidden_size)
        if self.attn_output_multiplier is None:
            derive["attn_output_multiplier"] = self.head_dim**-0.5
        if self.embedding_multiplier_scale is None:
            derive["embedding_multiplier_scale"] = self.hidden_size**0.5
        return self


# ----------------------------------------------------------------------------------------------- data


class SourceConfig(Section):
    """Where text comes from: a file, glob, directory, or `builtin:python` / `builtin:python-topics`."""

    path: str = Field(description="file, glob, folder, url, 'hf-dataset:NAME' or builtin; relative to the configuration file")
    text_field: str = Field("text", description="field or column with the text, for json, csv and tables")
    weight: float = Field(1.0, gt=0, description="how often each of its documents is seen per epoch")
    max_documents: int | None = Field(None, ge=1, description="cap, in documents kept; the first ones, by file and place")
    max_bytes: int | None = Field(None, ge=1, description="cap, in bytes of text kept; the document that reaches it is in")
    options: dict[str, Any] = Field(default_factory=dict, description="of the storage: endpoint_url, anon; no credentials")

    @model_validator(mode="after")
    def _no_secrets(self) -> SourceConfig:
        secret = next((name for name in self.options if name in ("key", "secret", "token", "password", "username")), None)
        if secret:
            raise ValueError(f"options.{secret}: credentials come from the environment (AWS_ACCESS_KEY_ID, ...), they would "
                             "be written into manifests")
        return self


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceConfig, BeforeValidator(_as_source)]


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

    kind: Literal["bpe", "sentencepiece", "bytes", "characters", "file"] = "bpe"
    vocab_size: int = Field(4096, ge=260, description="tokens wanted; ignored by bytes, characters and file")
    path: str | None = Field(None, description="tokenizer.model or tokenizer.json, for kind = 'file'")

    @model_validator(mode="after")
    def _file_needs_path(self) -> TokenizerConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError("path belongs to kind = 'file': set both or neither")
        return self


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


class MixtureSegment(Section):
    """Which share of the rows each source gives, from a step on."""

    from_step: int = Field(0, ge=0)
    shares: list[Annotated[float, Field(ge=0)]] = Field(min_length=1, description="one per source; need not sum to 1")

    @model_validator(mode="after")
    def _some_share(self) -> MixtureSegment:
        if not sum(self.shares) > 0:
            raise ValueError("shares must not all be 0")
        return self


class DataConfig(Section):
    """Picture 2: source -> normalize -> filter -> deduplicate -> tokenize -> pack -> loader."""

    sources: list[Source] = Field(default_factory=lambda: [SourceConfig(path="builtin:python")], min_length=1)
    validation: list[Source] = Field(default_factory=list, description="held-out sources; else a fraction of documents")
    validation_fraction: float = Field(0.02, ge=0, lt=1, description="share of documents held out, chosen by content hash")
    sequence_length: int = Field(256, ge=2, description="T, tokens per row")
    normalize: NormalizeConfig = Field(default_factory=NormalizeConfig)
    filter: FilterConfig = Field(default_factory=FilterConfig)
    deduplicate: DeduplicateConfig = Field(default_factory=DeduplicateConfig)
    decontaminate: DecontaminateConfig = Field(default_factory=DecontaminateConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    augment: list[Augmentation] = Field(default_factory=list, description="applied in this order to training documents")
    augment_epochs: int = Field(1, ge=1, description="augmented versions of each training document, each drawn anew")
    augment_originals: bool = Field(True, description="keep the documents as they are besides; False: versions instead")
    augment_seed: int = Field(0, ge=0)
    packing: Literal["best_fit", "concatenate"] = Field("best_fit", description="how documents fill rows")
    cross_document_attention: bool = Field(False, description="let a token attend into the previous document of its row")
    on_error: Literal["stop", "skip"] = Field("stop", description="what an unreadable document does; skips are counted")
    directory: str = Field("data", description="where prepared data is kept, one folder per settings hash")
    workers: int | None = Field(None, ge=1, description="processes; None: one per core for a large corpus, else one")
    mixture: list[MixtureSegment] = Field(default_factory=list, description="shares of the sources by step, instead of weights")

    @model_validator(mode="after")
    def _mixture_fits(self) -> DataConfig:
        steps = [segment.from_step for segment in self.mixture]
        if self.mixture and (steps[0] != 0 or sorted(set(steps)) != steps):
            raise ValueError("mixture: from_step must begin at 0 and increase")
        for segment in self.mixture:
            if len(segment.shares) != len(self.sources):
                raise ValueError(f"mixture: {len(segment.shares)} shares for {len(self.sources)} sources (one each, in order)")
        return self


# ------------------------------------------------------------------------------------------- training


BUDGETS = ("max_steps", "max_tokens", "max_epochs")


class TrainingConfig(Section):
    """The loop: how long, how much at once, with which losses."""

    task: Literal["language_modeling"] = "language_modeling"
    max_steps: int | None = Field(None, ge=1, description="budget in optimizer steps")
    max_tokens: int | None = Field(None, ge=1, description="budget in predicted tokens (rows * sequence_length)")
    max_epochs: float | None = Field(None, gt=0, description="budget in passes over the data")
    batch_size: int = Field(16, ge=1, description="sequences per optimizer step, over all devices")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per forward pass; None: batch_size")
    precision: Literal["auto", "fp32", "bf16", "parity"] = Field("auto", description="of products; master weights are fp32")
    seed: int = Field(0, ge=0)
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    gradient_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    z_loss: float = Field(0.0, ge=0, description="weight of mean(logsumexp(logits)^2) (PaLM uses 1e-4)")
    balance_loss: Literal["switch", "mixtral", "none"] = Field("switch", description="keeps experts in use")
    balance_loss_weight: float = Field(0.01, ge=0)
    router_z_loss: float = Field(0.0, ge=0, description="weight of the router z-loss (ST-MoE uses 1e-3)")
    balance_bias_rate: float = Field(0.0, ge=0, description="DeepSeek-V3's bias step; 0 = exact Grok-1 routing")
    evaluate_every: int = Field(200, ge=0, description="steps between held-out evaluations; 0: only at the end")
    evaluate_rows: int = Field(64, ge=1, description="held-out rows per evaluation while training; the last takes all")
    max_nonfinite_steps: int = Field(5, ge=1, description="non-finite steps in a row (each skipped) before stopping")

    @model_validator(mode="after")
    def _one_budget(self) -> TrainingConfig:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"give one budget, not {' and '.join(budgets)}")
        if not budgets:
            self.__dict__["max_steps"] = 1000
        if self.micro_batch_size is None:
            self.__dict__["micro_batch_size"] = self.batch_size
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        return self


class OptimizerConfig(Section):
    """Which update rule, with which constants. Fields a rule does not know are ignored by it (see docs)."""

    name: Literal["sgd", "adam", "adamw", "adafactor", "lion", "muon"] = "adamw"
    learning_rate: float = Field(3e-4, gt=0, description="peak; the schedule scales it")
    weight_decay: float = Field(0.1, ge=0, description="on matrices only: not on norms, embedding or router")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD and Muon")
    nesterov: bool = Field(True, description="of SGD and Muon")
    muon_learning_rate: float = Field(0.02, gt=0, description="of Muon's matrices; the rest takes learning_rate")


class ScheduleConfig(Section):
    """Learning rate over time, as a factor on the peak."""

    name: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "cosine"
    warmup_steps: int = Field(50, ge=0, description="linear from 0")
    final_factor: float = Field(0.1, ge=0, le=1, description="where linear, cosine and wsd end")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="of wsd: share of the run spent decaying")


class ObserveConfig(Section):
    """What every step did is recorded into run.sqlite."""

    enabled: bool = True
    budget: float = Field(0.02, gt=0, le=1, description="share of step time that observation may take")


class CheckpointConfig(Section):
    every_steps: int = Field(500, ge=0, description="0: only at the end")
    keep_last: int = Field(2, ge=1, description="older ones are removed; the best one is kept besides")
    keep_best: bool = Field(True, description="keep the one with the lowest held-out loss")


class Config(Section):
    """Everything a run depends on. `Config()` is the embedded default: small, on Python's standard library."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig(preset="small"))
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    observe: ObserveConfig = Field(default_factory=ObserveConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="before")
    @classmethod
    def _preset_settings_are_defaults(cls, values: Any) -> Any:
        """A preset also brings the vocabulary, sequence length and learning rates that suit its size."""
        if not isinstance(values, dict):
            return values
        model = values.get("model", {"preset": "small"})
        if not (isinstance(model, dict) and model.get("preset")):
            return values
        defaults = preset(model["preset"])
        given = values.get("training")
        if isinstance(given, dict) and any(given.get(budget) is not None for budget in BUDGETS):
            defaults.get("training", {}).pop("max_steps", None)
        return {**_merge({k: v for k, v in defaults.items() if k != "model"}, values), "model": model}

    @model_validator(mode="after")
    def _sequence_fits_model(self) -> Config:
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} exceeds model.max_position_embeddings "
                f"{self.model.max_position_embeddings}: lower one or raise the other"
            )
        return self

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json"))


# ------------------------------------------------------------------------------------ reading settings


def preset_names() -> list[str]:
    """Presets, smallest first."""
    files = resources.files("pellucid.presets").iterdir()
    tables = [(tomllib.loads(f.read_text()), f.name[:-5]) for f in files if f.name.endswith(".toml")]
    return [name for _, name in sorted((t["model"]["hidden_size"], name) for t, name in tables)]


def preset(name: str) -> dict[str, Any]:
    """The tables of one preset file: `model`, and what suits a model of that size."""
    if name not in preset_names():
        raise UserError(f"model.preset: there is no preset '{name}'{_nearest(name, preset_names())}")
    return tomllib.loads((resources.files("pellucid.presets") / f"{name}.toml").read_text())


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file (or none) and apply `key=value` overrides with TOML values (bare words are strings).

    Relative data paths in a file are resolved against the file's folder. Raises UserError.
    """
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot read the configuration ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
        _resolve_paths(tables, Path(path).resolve().parent)
    tables.setdefault("model", {"preset": "small"})  # so that an override changes the default model, not replaces it
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is neither a configuration file nor key=value (example: training.max_steps=200)")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        table = tables
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"{key}: '{parent}' is a value, not a table")
        if key.startswith("training.max_"):  # a budget given on the command line replaces the file's
            for budget in BUDGETS:
                table.pop(budget, None)
        table[leaf] = value
    return make_config(tables, where=str(path) if path else "configuration")


def make_config(tables: dict[str, Any], where: str = "configuration") -> Config:
    """Validate tables into a Config; mistakes become one UserError sentence that names the key."""
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        raise UserError(f"{where}: {explain_validation_error(error, Config)}") from None


def explain_validation_error(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake as `key: what is wrong`, with the nearest known key where one was misspelt."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if isinstance(part, int) or not str(part).startswith("function-")]
    chosen = next((AUGMENTERS[p] for p in location if p in AUGMENTERS and "augment" in location), None)
    location = [p for p in location if chosen is None or p not in AUGMENTERS]
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    if first["type"] == "extra_forbidden":
        section: Any = chosen or root
        for part in [] if chosen else location[:-1]:
            annotation = section.model_fields[part].annotation if isinstance(part, str) else section
            choices = [annotation, *get_args(annotation)]  # X | None is X
            section = next((choice for choice in choices if hasattr(choice, "model_fields")), SourceConfig)
        return f"unknown key '{key}'{_nearest(str(location[-1]), list(section.model_fields))}"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) and first["type"] != "value_error" else ""
    return f"{key}: {message}{shown}" if key else f"{message}{shown}"


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def is_file_path(source: str) -> bool:
    """Whether a source names files by their path (not builtin:..., a hub's data set, or a URL)."""
    return not source.startswith(("builtin:", "hf-dataset:")) and "://" not in source


def _resolve_paths(tables: dict[str, Any], folder: Path) -> None:
    """Paths in a file mean: beside that file."""

    def resolve(path: str) -> str:
        return str(folder / path) if is_file_path(path) else path  # an absolute path stays

    data = tables.get("data", {})
    if not isinstance(data, dict):
        return  # make_config says what is wrong
    benchmarks = data.get("decontaminate") if isinstance(data.get("decontaminate"), dict) else {}
    for table, name in ((data, "sources"), (data, "validation"), (benchmarks, "against")):
        if isinstance(table.get(name), list):
            table[name] = [
                resolve(item) if isinstance(item, str)
                else {**item, "path": resolve(item["path"])} if isinstance(item, dict) and isinstance(item.get("path"), str)
                else item
                for item in table[name]
            ]
    for item in data.get("augment") if isinstance(data.get("augment"), list) else []:
        if isinstance(item, dict) and isinstance(item.get("path"), str):
            item["path"] = resolve(item["path"])
    tokenizer = data.get("tokenizer", {})
    if isinstance(tokenizer, dict) and isinstance(tokenizer.get("path"), str):
        tokenizer["path"] = resolve(tokenizer["path"])
