"""What every table of the configuration is made of: sections that refuse unknown keys, and the user's error."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class UserError(Exception):
    """A mistake the user can mend: one sentence with what, where and how. The command line exits with 2."""


class Section(BaseModel):
    """A table of the configuration. Unknown keys are errors; assignments are validated."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)
