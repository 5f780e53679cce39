"""`[model]`: the shape of a Grok-1 model. `[model] preset` starts from one of presets/*.toml."""

from __future__ import annotations

import difflib
import tomllib
from functools import cache
from importlib import resources
from typing import Any, Literal

from pydantic import Field, model_validator

from pellucid.config.section import Section, UserError


def grok_intermediate_size(hidden_size: int, widening_factor: float = 8.0) -> int:
    """F of the official code: two thirds of widening * D, rounded up to a multiple of 8 (xai-org/grok-1, `ffn_size`)."""
    size = int(widening_factor * hidden_size) * 2 // 3
    return size + (8 - size) % 8


class HeadConfig(Section):
    """The head of a model that labels documents: all that is needed to use it. The data decide it, not the user."""

    problem_type: Literal["single_label_classification", "regression"]  # Hugging Face's words
    labels: list[str] = Field(min_length=1, description="classes, or the names of the numbers")
    mean: list[float] = Field(default_factory=list, description="of each number in the training documents")
    std: list[float] = Field(default_factory=list, description="its standard deviation: the head answers in units of it")
    max_length: int = Field(ge=2, description="tokens read of a document, its start mark included: a row of training")
    truncation_side: Literal["right", "left"] = "right"


class ModelConfig(Section):
    """Shape of a Grok-1 model. Names are those engines already read for this architecture.

    The defaults derived from `hidden_size` (intermediate size, head_dim, multipliers) follow Grok-1's rules.
    """

    preset: str | None = Field(None, description="shape to start from; the other fields override it")
    init_from: str | None = Field(None, description="run, Hugging Face folder or ckpt-0 whose weights and shape to start from")
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
    head: HeadConfig | None = Field(None, description="set by training.task; None: a language model")
    tie_word_embeddings: Literal[True] = Field(True, description="Grok-1 ties input and output embeddings")

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset"):
            if values.get("init_from"):
                raise ValueError("model.init_from brings its own shape: leave model.preset out")
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


@cache
def preset_names() -> list[str]:
    """Presets, smallest first."""
    files = resources.files("pellucid.presets").iterdir()
    tables = [(tomllib.loads(f.read_text()), f.name[:-5]) for f in files if f.name.endswith(".toml")]
    return [name for _, name in sorted((t["model"]["hidden_size"], name) for t, name in tables)]


def preset(name: str) -> dict[str, Any]:
    """The tables of one preset file: `model`, and what suits a model of that size."""
    if name not in preset_names():
        raise UserError(f"model.preset: there is no preset '{name}'{nearest(str(name), preset_names())}")
    return tomllib.loads((resources.files("pellucid.presets") / f"{name}.toml").read_text())


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
