"""The update rules: plain functions that explain themselves, and the fast optimizers they define."""

from pellucid.training.optimizers.build import (
    RULES,
    build_optimizer,
    explain_update,
    is_hidden_matrix,
    optimizer_parameters,
    set_learning_rate,
    update_settings,
)
from pellucid.training.optimizers.idle import frozen_idle_experts
from pellucid.training.optimizers.state import load_optimizer_state, optimizer_state
from pellucid.training.optimizers.update import Update

__all__ = [
    "RULES",
    "Update",
    "build_optimizer",
    "explain_update",
    "frozen_idle_experts",
    "is_hidden_matrix",
    "load_optimizer_state",
    "optimizer_parameters",
    "optimizer_state",
    "set_learning_rate",
    "update_settings",
]
