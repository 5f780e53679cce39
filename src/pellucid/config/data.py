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
    label_field: str | list[str] | None = Field(
        None, description="field with the class or the number of a document; several for several numbers")
    label_type: Literal["category", "number"] = Field("category", description="what labels are; follows from training.task")
    truncation_side: Literal["right", "left"] = Field(
        "right", description="with labels a document is one piece; of one longer than a row, right: its end is cut off")
    normalize: NormalizeConfig = Field(default_factory=NormalizeConfig)
    filter: FilterConfig = Field(default_factory=FilterConfig)
    deduplicate: DeduplicateConfig = Field(default_factory=DeduplicateConfig)
    decontaminate: DecontaminateConfig = Field(default_factory=DecontaminateConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    augment: list[Augmentation] = Field(
        default_factory=list, description="applied in this order to training documents, but what sets sentinels comes last")
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
    def _fields_differ(self) -> DataConfig:
        fields = self.label_fields
        if self.label_field is not None and not fields:
            raise ValueError("label_field: give at least one field")
        if twice := next((field for field in fields if fields.count(field) > 1), None):
            raise ValueError(f"label_field: '{twice}' is there twice")
        return self

    @model_validator(mode="after")
    def _documents_stay_whole(self) -> DataConfig:
        """A labelled document is read by itself and from its start to its end, or the label would be of something else."""
        if self.label_field is not None and self.packing == "concatenate":
            raise ValueError("packing = 'concatenate' cuts documents, and a label belongs to a whole one: use 'best_fit'")
        if self.label_field is not None and self.cross_document_attention:
            raise ValueError("cross_document_attention would show a labelled document its neighbours: set it to false")
        return self

    @property
    def label_fields(self) -> tuple[str, ...]:
        """The fields that hold a document's label; none for plain text."""
        fields = [] if self.label_field is None else self.label_field
        return (fields,) if isinstance(fields, str) else tuple(fields)

    @model_validator(mode="after")
    def _mixture_fits(self) -> DataConfig:
        steps = [segment.from_step for segment in self.mixture]
        if self.mixture and (steps[0] != 0 or sorted(set(steps)) != steps):
            raise ValueError("mixture: from_step must begin at 0 and increase")
        for segment in self.mixture if self.prepared is None else ():
            if len(segment.shares) != len(self.sources):
                raise ValueError(f"mixture: {len(segment.shares)} shares for {len(self.sources)} sources (one each, in order)")
        return self

