"""The command's root, and what several commands share. Its folder: one file for each thing a user does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pellucid.config import UserError

ORDER = ("train", "watch", "report", "export", "explain", "trace", "generate", "predict", "evaluate", "measure", "data",
         "plan", "convert", "doctor", "version")  # fmt: skip


class InOrder(TyperGroup):
    """--help lists the commands in the order in which one meets them."""

    def list_commands(self, context: Any) -> list[str]:
        return sorted(super().list_commands(context), key=ORDER.index)


app = typer.Typer(
    cls=InOrder,
    name="pellucid",
    help="Train language models of the Grok-1 architecture, and see how every parameter is adjusted on the way.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import pellucid

        print(pellucid.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")] = False,
) -> None: ...


Json = Annotated[bool, typer.Option("--json", help="print the answer as JSON")]


def split_settings(settings: list[str]) -> tuple[Path | None, list[str]]:
    """A first argument without '=' is the configuration file."""
    if settings and "=" not in settings[0]:
        return Path(settings[0]), settings[1:]
    return None, settings


def load_with_tokenizer(model: str, tokenizer: Path | None, dtype: str) -> tuple[Any, Any]:
    """A model that can answer, and its tokenizer. Raises UserError, also for weights that are not finite."""
    import torch

    from pellucid.data.tokenizer import load_tokenizer
    from pellucid.exchange.folder import read_json
    from pellucid.exchange.load import load

    network, tokens = load(model, dtype=dtype)
    # The extremes tell: NaN passes through them, and they need no mask as large as the weight.
    finite = lambda weight: torch.isfinite(torch.stack(torch.aminmax(weight))).all()
    broken = next((name for name, weight in network.named_parameters() if not finite(weight)), None)
    if broken is not None:
        raise UserError(f"{model}: the weights '{broken}' hold NaN or infinity, so its answers mean nothing; use an earlier "
                        "checkpoint, or train again")
    if tokenizer is not None:
        given = load_tokenizer(tokenizer)
        if tokens is not None and given.fingerprint != tokens.fingerprint:
            raise UserError(f"{tokenizer}: not the tokenizer that {model} was trained with and brings along; leave it out")
        tokens = given
    record = Path(model) / "manifest.json"
    if tokens is not None and record.is_file():
        recorded = read_json(record).get("tokenizer")
        if isinstance(recorded, dict) and recorded.get("fingerprint", tokens.fingerprint) != tokens.fingerprint:
            raise UserError(f"{model}: the tokenizer in its folder is not the one it was trained with; put that one back")
    if tokens is None:
        raise UserError(f"{model}: brings no tokenizer; give the one it was trained with: --tokenizer FILE")
    if tokens.vocab_size > network.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokens.vocab_size} tokens but the model only {network.config.vocab_size}: "
            "it is the tokenizer of another model"
        )
    return network, tokens


def progress() -> Any:
    """On stderr, for stdout holds the answer alone: a bar on a terminal, elsewhere a line a minute."""
    from contextlib import closing

    from rich.console import Console

    from pellucid.training.progress import Shown

    return closing(Shown(Console(stderr=True, highlight=False), seconds=60.0, begin=False))


def answer(facts: Any, as_json: bool, picture: Any) -> None:
    """JSON for programs, else a picture for people."""
    if as_json:
        print(in_json(facts))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    drawn = picture()
    console.print(drawn, soft_wrap=isinstance(drawn, Text))


def in_json(facts: Any) -> str:
    """One line; a number that is not finite is its name in quotes, for JSON has none."""
    return json.dumps(_named(facts), allow_nan=False)


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_named(part) for part in value]
    return str(value) if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value
