"""The whole tree: what a run depends on."""

from __future__ import annotations

from typing import Any

import tomli_w
from pydantic import Field, model_validator

from pellucid.config.data import DataConfig
from pellucid.config.model import ModelConfig, preset
from pellucid.config.section import Section
from pellucid.config.training import (
    BUDGETS,
    CheckpointConfig,
    ObserveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)


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
        defaults, most = preset(model["preset"]), model.get("max_position_embeddings")
        if isinstance(most, int) and most < defaults["data"]["sequence_length"]:
            del defaults["data"]["sequence_length"]  # see `_sequence_fits_model`
        given = values.get("training")
        if isinstance(given, dict) and any(given.get(budget) is not None for budget in BUDGETS):
            defaults.get("training", {}).pop("max_steps", None)
        return {**_merge({k: v for k, v in defaults.items() if k != "model"}, values), "model": model}

    @model_validator(mode="after")
    def _sequence_fits_model(self) -> Config:
        if self.data.sequence_length > self.model.max_position_embeddings and "sequence_length" not in self.data.model_fields_set:
            self.data.sequence_length = max(2, self.model.max_position_embeddings)  # a default follows the model
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} exceeds model.max_position_embeddings "
                f"{self.model.max_position_embeddings}: lower one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _task_has_labels(self) -> Config:
        task, data = self.training.task, self.data
        if task != "language_modeling" and data.label_field is None:
            raise ValueError(f"training.task = '{task}' needs data.label_field: the field that holds each document's label")
        if task == "language_modeling" and data.label_field is not None:
            raise ValueError("data.label_field is for training.task = 'classification' or 'regression'")
        for name, owner in {"z_loss": "language_modeling", "label_smoothing": "classification", "class_weights": "classification",
                            "huber_delta": "regression"}.items():  # fmt: skip
            if getattr(self.training, name) and task != owner:
                raise ValueError(f"training.{name} is for training.task = '{owner}'")
        if task == "classification" and isinstance(data.label_field, list):
            raise ValueError("data.label_field: several fields are for several numbers (regression); a class is in one field")
        wanted = "number" if task == "regression" else "category"
        if data.label_type != wanted:
            if "label_type" in data.model_fields_set:
                raise ValueError(f"data.label_type = '{data.label_type}' does not go with training.task = '{task}'")
            data.label_type = wanted
        return self

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json"))


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged
