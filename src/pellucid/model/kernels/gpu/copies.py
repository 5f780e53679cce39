"""fp32 masters as products read them: in bf16. The first reader casts; from then on an update that can writes the copy as well.

A copy is as good as the version of its master that it was made of: torch counts the changes made in place. (What is written
through `weight.data` it does not count: write under torch.no_grad instead.) It takes 2 bytes a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pellucid.model.kernels import gpu


@dataclass
class _Copy:
    dtype: torch.dtype  # in which it was asked for
    tensor: Tensor | None = None
    shows: tuple = ()  # the state of the master when an update wrote it


_COPIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by master


def copy_of(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The weight's copy in this dtype, if an update has written one that is up to date; asks for one otherwise."""
    is_master = isinstance(weight, torch.nn.Parameter) and weight.dtype != dtype
    if torch.compiler.is_compiling() or not is_master or not gpu.fits("update", weight):
        return None
    copy = _COPIES.get(weight)
    if copy is None or copy.dtype != dtype:
        _COPIES[weight] = copy = _Copy(dtype)
    return copy.tensor if copy.shows == _state(weight) else None


@torch.no_grad()
def narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in this dtype, without a gradient: its copy, if there is one, or a cast."""
    copy = copy_of(weight, dtype)
    return weight.detach().to(dtype) if copy is None else copy


def copy_to_write(weight: Tensor) -> Tensor | None:
    """What an update should write beside the weight: nothing, if nobody asked for a copy."""
    copy = _COPIES.get(weight)
    if copy is None:
        return None
    if copy.tensor is None or copy.shows[1:] != _state(weight)[1:]:
        copy.tensor = torch.empty_like(weight, dtype=copy.dtype)
    return copy.tensor


def copy_is_written(weight: Tensor) -> None:
    _COPIES[weight].shows = _state(weight)


def _state(weight: Tensor) -> tuple:
    return weight._version, weight.untyped_storage()._cdata, weight.shape, weight.device
