"""Pellucid trains language models of the Grok-1 architecture and shows how every parameter is adjusted on the way.

>>> run = pellucid.train({"training": {"max_steps": 200}})
>>> model, tokenizer = pellucid.load(run.directory)
>>> logits = model(tokens)  # [B, T] -> [B, T, V]
"""

from importlib import metadata

from pellucid.config import Config, ModelConfig, UserError

__version__ = metadata.version("pellucid")
__all__ = ["Config", "ModelConfig", "Run", "UserError", "__version__", "load", "train"]


def __getattr__(name: str):
    """load, train and Run are imported when first used: the command line should not wait for torch to print its help."""
    if name in ("train", "Run"):
        from pellucid import run

        return getattr(run, name)
    if name == "load":
        from pellucid.exchange.load import load

        return load
    raise AttributeError(f"module 'pellucid' has no attribute '{name}'")
