"""One typed tree of settings: TOML file, presets, and key=value overrides become a `Config`.

Every field has its unit and its reason in one line and a default that works. A mistake of the user's
(an unknown key, a value out of range, shapes that do not fit) becomes one `UserError` sentence that
names the key. Nothing of ours is imported here: every other module may import this one.
"""

from pellucid.config.augment import (
    AUGMENTERS,
    BackTranslationConfig,
    BpeDropoutConfig,
    FillInTheMiddleConfig,
    NoiseConfig,
    SpanMaskingConfig,
    SynonymsConfig,
    TokenMaskingConfig,
)
from pellucid.config.data import DataConfig, MixtureSegment
from pellucid.config.model import HeadConfig, ModelConfig, grok_intermediate_size, nearest, preset, preset_names
from pellucid.config.reading import explain_validation_error, is_file_path, is_of_a_run, load_config, make_config, resolve_paths
from pellucid.config.section import Section, UserError
from pellucid.config.sources import SourceConfig
from pellucid.config.stages import (
    C4Filter,
    DecontaminateConfig,
    DeduplicateConfig,
    FilterConfig,
    FineWebFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    LengthFilter,
    NormalizeConfig,
    TokenizerConfig,
)
from pellucid.config.training import BUDGETS, CheckpointConfig, ObserveConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from pellucid.config.tree import Config

__all__ = [
    "AUGMENTERS",
    "BUDGETS",
    "BackTranslationConfig",
    "BpeDropoutConfig",
    "C4Filter",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DecontaminateConfig",
    "DeduplicateConfig",
    "FillInTheMiddleConfig",
    "FilterConfig",
    "FineWebFilter",
    "GopherQualityFilter",
    "GopherRepetitionFilter",
    "HeadConfig",
    "LanguageFilter",
    "LengthFilter",
    "MixtureSegment",
    "ModelConfig",
    "NoiseConfig",
    "NormalizeConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "Section",
    "SourceConfig",
    "SpanMaskingConfig",
    "SynonymsConfig",
    "TokenMaskingConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "UserError",
    "explain_validation_error",
    "grok_intermediate_size",
    "is_file_path",
    "is_of_a_run",
    "load_config",
    "make_config",
    "nearest",
    "preset",
    "preset_names",
    "resolve_paths",
]
