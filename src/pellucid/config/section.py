"""What every table of the configuration is made of: sections that refuse unknown keys, and the user's error."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class UserError(Exception):
    """A mistake the user can mend: one sentence with what, where and how. The command line exits with 2."""


class Section(BaseModel):
    """A table of the configuration. Unknown keys are errors; assignments are validated."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        for name, field in cls.model_fields.items() if isinstance(values, dict) else ():
            kinds = {field.annotation, *get_args(field.annotation)}
            if isinstance(values.get(name), bool) and kinds & {int, float}:
                raise ValueError(f"{name} must be a number, not {str(values[name]).lower()}")
        return values
