"""fp32 masters as products read them: in bf16. The first reader casts; from then on an update that can writes the copy as well.

A copy is as good as the version of its master that it was made of: torch counts the changes made in place, but for those of its
fused optimizers, so a step of any other optimizer makes all copies old. (What is written through `weight.data` it does not count
either: write under torch.no_grad instead.) A copy takes 2 bytes a parameter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
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
    if not may_have_copy(weight, dtype):
        return None
    copy = _COPIES.get(weight)
    if copy is None or copy.dtype != dtype:
        _COPIES[weight] = copy = _Copy(dtype)
    return copy.tensor if copy.shows == _state(weight) else None


def may_have_copy(weight: Tensor, dtype: torch.dtype) -> bool:
    is_master = isinstance(weight, torch.nn.Parameter) and weight.dtype == torch.float32 != dtype
    return is_master and not torch.compiler.is_compiling() and gpu.fits("update", weight) and not weight.is_inference()


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
    if copy.tensor is None or (copy.tensor.shape, copy.tensor.device) != (weight.shape, weight.device):
        copy.tensor = torch.empty_like(weight, dtype=copy.dtype)
    _watch_other_optimizers()
    return copy.tensor


def copy_is_written(weight: Tensor) -> None:
    _COPIES[weight].shows = _state(weight)


def written_copy(weight: Tensor) -> Tensor | None:
    copy = _COPIES.get(weight)
    return None if copy is None else copy.tensor


@functools.cache
def _watch_other_optimizers() -> None:
    def make_old(optimizer: torch.optim.Optimizer, *_) -> None:
        if not hasattr(optimizer, "gradient_factor"):  # of training.optimizers.one_pass, which writes them
            for copy in _COPIES.values():
                copy.shows = ()

    register_optimizer_step_post_hook(make_old)


def _state(weight: Tensor) -> tuple:
    return weight._version, weight.untyped_storage()._cdata, weight.storage_offset(), weight.stride(), weight.shape
