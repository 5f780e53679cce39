"""Reading settings: a TOML file and key=value overrides become a Config; mistakes become one sentence."""

from __future__ import annotations

import copy
import json
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pellucid.config.augment import AUGMENTERS
from pellucid.config.model import nearest
from pellucid.config.section import Section, UserError
from pellucid.config.sources import SourceConfig
from pellucid.config.training import BUDGETS
from pellucid.config.tree import Config

BRANCH = re.compile(r"(function-|literal\[|list\[|dict\[|str$)")  # what pydantic calls the branches of a union
PATHS = ("model.init_from", "data.prepared", "data.sources", "data.validation", "data.tokenizer.path", "data.augment",
         "data.decontaminate.against")  # what is read: a path, or a list of paths and of tables with a `path`


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file (or none) and apply `key=value` overrides with TOML values (bare words are strings).

    Relative paths in the file mean: beside it (sources, tokenizer, lexicons, prepared data, model.init_from); those of
    overrides, and output folders, mean: here. A run's own config.toml spells everything out; with overrides, what follows
    from other values there follows anew. Raises UserError.
    """
    tables: dict[str, Any] = {}
    overrides = list(overrides)
    names = {override.partition("=")[0].strip() for override in overrides}
    if path is not None:
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot read the configuration ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
        resolve_paths(tables, Path(path).resolve().parent)
        if overrides and is_of_a_run(path):
            if "model.init_from" in names:
                if "init_from" in tables.get("model", {}):
                    tables.get("data", {}).pop("tokenizer", None)  # it came with the old weights
                tables["model"] = {}
            tables = _in_fewest_words(tables, str(path))
            if "model.preset" in names:
                tables["model"] = {}
    if "model.init_from" not in names:
        tables.setdefault("model", {"preset": "small"})  # so that an override changes the default model, not replaces it
    budgets, as_written = [], copy.deepcopy(tables)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is neither a configuration file nor key=value (example: training.max_steps=200)")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        table = tables
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"{key}: '{parent}' is a value, not a table")
        if parents == ["training"] and leaf in BUDGETS:  # a budget given on the command line replaces the file's
            budgets.append(leaf)
            for budget in set(BUDGETS) - set(budgets):
                table.pop(budget, None)
        table[leaf] = value
    resolve_paths(tables)
    where = str(path) if path else "configuration"
    try:
        return make_config(tables, where)
    except UserError as error:
        if overrides and str(error) != _mistake(as_written, where):
            raise UserError(str(error).replace(f"{where}: ", "command line: ", 1)) from None
        raise


def _mistake(tables: dict[str, Any], where: str) -> str | None:
    try:
        make_config(tables, where)
    except UserError as error:
        return str(error)
    return None


def is_of_a_run(path: str | Path) -> bool:
    """Whether this is a run's own config.toml."""
    return Path(path).name == "config.toml" and (Path(path).resolve().parent / "manifest.json").is_file()


def _in_fewest_words(tables: dict[str, Any], where: str) -> dict[str, Any]:
    """Tables of the same configuration, without the values that follow from the others (a preset's, head_dim, weight_decay)."""
    whole = make_config(tables, where)
    for section in list(tables.values()):
        for table in [section, *(value for value in section.values() if isinstance(value, dict))]:
            for key, value in list(table.items()):
                del table[key]
                try:
                    same = Config.model_validate(tables) == whole
                except (ValidationError, UserError):
                    same = False
                if not same:
                    table[key] = value
    return tables


def make_config(tables: dict[str, Any], where: str = "configuration") -> Config:
    """Validate tables into a Config; mistakes become one UserError sentence that names the key."""
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        raise UserError(f"{where}: {explain_validation_error(error, Config)}") from None


def explain_validation_error(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake as `key: what is wrong`, with the nearest known key where one was misspelt."""
    errors = error.errors()
    start = next((n for n, part in enumerate(errors[0]["loc"]) if BRANCH.match(str(part))), None)
    alike = errors[:1] if start is None else [e for e in errors if e["loc"][:start] == errors[0]["loc"][:start]]
    first = max(alike, key=lambda e: len(e["loc"]))  # of a union's branches the one that the value fitted furthest
    if first["type"] == "missing":  # a key that is written, but misspelt, says more
        first = next((e for e in errors if e["type"] == "extra_forbidden" and e["loc"][:-1] == first["loc"][:-1]), first)
    location = [part for part in first["loc"] if isinstance(part, int) or not BRANCH.match(part)]
    chosen = next((AUGMENTERS[p] for p in location if p in AUGMENTERS and "augment" in location), None)
    location = [p for p in location if chosen is None or p not in AUGMENTERS]
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    if first["type"] == "extra_forbidden":
        section: Any = chosen or root
        for part in [] if chosen else location[:-1]:
            annotation = section.model_fields[part].annotation if isinstance(part, str) else section
            choices = [annotation, *get_args(annotation)]  # X | None is X
            section = next((choice for choice in choices if hasattr(choice, "model_fields")), SourceConfig)
        if len(location) == 1 and (home := [f"{name}.{key}" for name, field in root.model_fields.items()
                                            if key in getattr(field.annotation, "model_fields", {})]):  # fmt: skip
            return f"unknown key '{key}'; did you mean '{home[0]}'?"
        return f"unknown key '{key}'{nearest(str(location[-1]), list(section.model_fields))}"
    if first["type"] == "union_tag_invalid":
        return f"{key}: there is no '{first['ctx']['tag']}'{nearest(str(first['ctx']['tag']), list(AUGMENTERS))}"
    if first["type"] == "union_tag_not_found":
        return f"{key}: say which by its 'name'; known: {', '.join(AUGMENTERS)}"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    if first["type"] == "list_type" and isinstance(given, str):
        parts = [part.strip() for part in given.strip("[] ").split(",")] if given.startswith("[") else [given]
        whole = "; a shell takes its quotes away, unless all of it stands in single ones" if given.startswith("[") else ""
        return f"{key}: a list is needed: {key}={json.dumps(parts, ensure_ascii=False)}{whole}"
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) and first["type"] != "value_error" else ""
    return f"{key}: {message}{shown}" if key else f"{message}{shown}"


def is_file_path(source: str) -> bool:
    """Whether a source names files by their path (not builtin:..., a hub's data set, or a URL)."""
    return not source.startswith(("builtin:", "hf-dataset:")) and "://" not in source


def resolve_paths(settings: dict[str, Any] | Config, folder: Path | None = None) -> None:
    """Makes absolute, in place, every path that is read: a relative one lies in `folder`, or without one stays; `~` is the home.

    make_config says what else is wrong.
    """
    fields = lambda value: value if isinstance(value, dict) else vars(value) if isinstance(value, Section) else {}
    home = os.path.expanduser
    absolute = home if folder is None else lambda path: os.path.abspath(folder / home(path))
    resolve = lambda path: absolute(path) if is_file_path(path) else path
    for place in PATHS:
        *parents, leaf = place.split(".")
        table = fields(settings)
        for parent in parents:
            table = fields(table.get(parent))
        value = table.get(leaf)
        if isinstance(value, str):
            table[leaf] = resolve(value)
        elif isinstance(value, list):
            table[leaf] = [resolve(item) if isinstance(item, str) else item for item in value]
            for item in map(fields, value):
                if isinstance(item.get("path"), str):
                    item["path"] = resolve(item["path"])
