"""`[training]`, `[optimizer]`, `[schedule]`, `[observe]`, `[checkpoint]`: the loop and what is kept of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pellucid.config.section import Section

BUDGETS = ("max_steps", "max_tokens", "max_epochs")


class TrainingConfig(Section):
    """The loop: how long, how much at once, with which losses."""

    task: Literal["language_modeling", "classification", "regression"] = "language_modeling"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="classification: share of the target spread over all classes")
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None, description="classification: factor on the loss of a class's documents; balanced: documents / (classes * its own)")
    huber_delta: float | None = Field(None, gt=0, description="regression: beyond so many standard deviations the loss is linear")
    max_steps: int | None = Field(None, ge=1, description="budget in optimizer steps")
    max_tokens: int | None = Field(None, ge=1, description="budget in predicted tokens (rows * sequence_length)")
    max_epochs: float | None = Field(None, gt=0, description="budget in passes over the data")
    batch_size: int = Field(16, ge=1, description="sequences per optimizer step, over all devices")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per forward pass; None: batch_size")
    precision: Literal["auto", "fp32", "bf16", "parity"] = Field("auto", description="of products; master weights are fp32")
    seed: int = Field(0, ge=0, le=2**63 - 1)
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    gradient_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    z_loss: float = Field(0.0, ge=0, description="weight of mean(logsumexp(logits)^2) (PaLM uses 1e-4)")
    balance_loss: Literal["switch", "mixtral", "none"] = Field("switch", description="keeps experts in use")
    balance_loss_weight: float = Field(0.01, ge=0)
    router_z_loss: float = Field(0.0, ge=0, description="weight of the router z-loss (ST-MoE uses 1e-3)")
    balance_bias_rate: float = Field(0.0, ge=0, description="DeepSeek-V3's bias step; 0 = exact Grok-1 routing")
    evaluate_every: int = Field(200, ge=0, description="steps between held-out evaluations; 0: only at the end")
    evaluate_rows: int = Field(64, ge=1, description="held-out rows per evaluation while training; the last takes all")
    recompute: Literal["none", "attention", "all"] = Field(
        "none", description="what the backward pass computes anew to save memory: norms and attention, or whole layers")
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
    weight_decay: float | None = Field(
        None, ge=0, description="on matrices only: not on norms, embedding or router; default 0.1, with adam 0: there it is part of "
        "the gradient, and where gradients are small, all of it")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD and Muon")
    nesterov: bool = Field(True, description="of SGD and Muon")
    muon_learning_rate: float = Field(0.02, gt=0, description="of Muon's matrices; the rest takes learning_rate")
    state_dtype: Literal["fp32", "bf16"] = Field("fp32", description="of the moments; bf16 halves them, rounded stochastically")
    offload: bool = Field(False, description="keep the moments in host memory beside a GPU; slower, the same numbers")

    @model_validator(mode="after")
    def _decay_of_the_rule(self) -> OptimizerConfig:
        if self.weight_decay is None:
            self.__dict__["weight_decay"] = 0.0 if self.name == "adam" else 0.1
        return self

    @model_validator(mode="after")
    def _has_moments_to_store(self) -> OptimizerConfig:
        if self.name == "adafactor" and (self.state_dtype != "fp32" or self.offload):
            raise ValueError("adafactor keeps a row and a column of each matrix: there is nothing to store smaller or elsewhere; "
                             "leave out state_dtype and offload")  # fmt: skip
        return self


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
    samples: bool = Field(True, description="at each evaluation the model continues a held-out text, to be read in the dashboard")
    plays: int = Field(1, ge=0, description="steps replayed in detail after training, at the last checkpoints before its end")
    export: list[Literal["tensorboard", "wandb", "mlflow", "parquet"]] = Field(
        default_factory=list, description="written to RUN/export/ for these tools when training ends")

    @model_validator(mode="after")
    def _recorded_before_exported(self) -> ObserveConfig:
        if self.export and not self.enabled:
            raise ValueError("export needs what observation records: set enabled = true, or leave export out")
        return self


class CheckpointConfig(Section):
    every_steps: int = Field(500, ge=0, description="0: only at the end")
    keep_last: int = Field(2, ge=1, description="older ones are removed; the best one is kept besides")
    keep_best: bool = Field(True, description="keep the one with the lowest held-out loss")
