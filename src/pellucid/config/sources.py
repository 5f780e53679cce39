"""`[data] sources`: where text comes from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pellucid.config.section import Section


class SourceConfig(Section):
    """Where text comes from: a file, glob, directory, or `builtin:python` / `builtin:python-topics`."""

    path: str = Field(description="file, glob, folder, url, 'hf-dataset:NAME' or builtin; relative to the configuration file")
    text_field: str = Field("text", description="field or column with the text, for json, csv and tables")
    weight: float = Field(1.0, gt=0, description="how often each of its documents is seen per epoch")
    max_documents: int | None = Field(None, ge=1, description="cap, in documents kept; the first ones, by file and place")
    max_bytes: int | None = Field(None, ge=1, description="cap, in bytes of text kept; the document that reaches it is in")
    options: dict[str, Any] = Field(default_factory=dict, description="of the storage: endpoint_url, anon; no credentials")

    @model_validator(mode="after")
    def _no_secrets(self) -> SourceConfig:
        secret = next((name for name in self.options if name in ("key", "secret", "token", "password", "username")), None)
        if secret:
            raise ValueError(f"options.{secret}: credentials come from the environment (AWS_ACCESS_KEY_ID, ...), they would "
                             "be written into manifests")
        return self


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceConfig, BeforeValidator(_as_source)]
