"""`[data]`: picture 2, from sources to packed rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pellucid.config.augment import Augmentation
from pellucid.config.section import Section
from pellucid.config.sources import Source, SourceConfig
from pellucid.config.stages import DecontaminateConfig, DeduplicateConfig, FilterConfig, NormalizeConfig, TokenizerConfig


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
    prepared: str | None = Field(None, description="folder of data build --out or data import: used as it is, instead of sources")
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
        for segment in self.mixture if self.prepared is None else ():
            if len(segment.shares) != len(self.sources):
                raise ValueError(f"mixture: {len(segment.shares)} shares for {len(self.sources)} sources (one each, in order)")
        return self

