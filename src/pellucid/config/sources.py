"""`[data] sources`: where text comes from."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pellucid.config.section import Section

SECRET = re.compile(r"(?:^|[_-])(?:key|secret|token|pass(?:word|wd|phrase)?|username|authorization|auth|credentials?|cookies?|"
                    r"connection_string|sas|signature)(?:$|[_-])", re.IGNORECASE)
USER_IN_URL = re.compile(r"[a-z0-9+.-]+://[^/]*:[^/]*@", re.IGNORECASE)


class SourceConfig(Section):
    """Where text comes from: a file, glob, directory, or `builtin:python` / `builtin:python-topics`."""

    path: str = Field(description="file, glob, folder, url, 'hf-dataset:NAME' or builtin; relative to the configuration file")
    text_field: str = Field("text", description="field or column with the text, for json, csv and tables")
    weight: float = Field(1.0, gt=0, description="how often each of its documents is seen per epoch of the run")
    epochs: float | None = Field(None, gt=0, description="cap, in passes over it in the whole run; then the others take its places")
    max_documents: int | None = Field(None, ge=1, description="cap, in documents kept; the first ones, by file and place")
    max_bytes: int | None = Field(None, ge=1, description="cap, in bytes of text kept; the document that reaches it is in")
    options: dict[str, Any] = Field(default_factory=dict, description="of the storage: endpoint_url, anon; no credentials")

    @model_validator(mode="after")
    def _no_secrets(self) -> SourceConfig:
        secret = "path" if USER_IN_URL.match(self.path) else _secret(self.options, "options")
        if secret:
            raise ValueError(f"{secret}: credentials come from the environment (AWS_ACCESS_KEY_ID, ...), they would "
                             "be written into manifests")
        return self


def _secret(value: Any, name: str) -> str | None:
    """The first key, at any depth, that is called as credentials are."""
    if isinstance(value, dict):
        named = ((f"{name}.{key}", item, SECRET.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(key)))) for key, item in value.items())
        return next((found for key, item, told in named if (found := key if told else _secret(item, key))), None)
    if isinstance(value, list | tuple):
        return next((found for number, item in enumerate(value) if (found := _secret(item, f"{name}[{number}]"))), None)
    return None


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceConfig, BeforeValidator(_as_source)]
