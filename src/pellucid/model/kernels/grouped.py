"""One product per expert on its own rows: the heart of a mixture of experts.

The plain function is the definition; torch's grouped_mm computes the same in one call where its alignment rules allow
(rows of 16 bytes), on CPU and CUDA, forward and backward, bit-identical to the loop on CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.model.kernels import native


def grouped_linear_plain(x_MI: Tensor, weight_EOI: Tensor, rows_E: Tensor) -> Tensor:
    """Rows of x are sorted by expert, rows_E of each: y[rows of e] = x[rows of e] @ weight[e].T, shape [M, O]."""
    # unbind, not weight[e]: its gradient is one stack, where indexing would make E full-sized ones.
    parts = zip(x_MI.split(rows_E.tolist()), weight_EOI.unbind(0), strict=True)
    return torch.cat([F.linear(rows, weight) for rows, weight in parts])


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, rows_E: Tensor) -> Tensor:
    """As `grouped_linear_plain`, by the fastest way that fits these shapes and this device."""
    if not _grouped_mm_fits(x_MI, weight_EOI):
        return grouped_linear_plain(x_MI, weight_EOI, rows_E)
    ends = rows_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_MI, weight_EOI.transpose(-2, -1), offs=ends)


def _grouped_mm_fits(x_MI: Tensor, weight_EOI: Tensor) -> bool:
    # On CUDA it takes bf16 only; and in a dry run too, for torch knows the shape of no other result.
    if x_MI.dtype != torch.bfloat16 and (x_MI.device.type == "cuda" or native.dry() is not None):
        return False
    if x_MI.device.type not in ("cpu", "cuda") or x_MI.dtype not in (torch.bfloat16, torch.float32):
        return False
    return len(x_MI) > 0 and all(size * x_MI.element_size() % 16 == 0 for size in weight_EOI.shape[1:])
