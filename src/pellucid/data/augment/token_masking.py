"""Picture 2, augment at load time: input noise that keeps every length (Xie et al. 2017, unigram noising).

An input token becomes another token of the same row, while what is to be predicted stays: the model may not lean
on the last few tokens alone. Whether and with what is a pure function of (seed, sample of the run, position).
"""

from __future__ import annotations

import numpy as np

from pellucid.data.order import _mix


def mask_tokens(tokens_BT: np.ndarray, segment_ids_BT: np.ndarray, samples_B: np.ndarray, *, rate: float, seed: int,
                eos_token_id: int) -> np.ndarray:
    """A copy of the tokens with about `rate` of them replaced. Padding and document starts (eos) stay.

    `samples_B` (int64) are the numbers of the rows among all samples of the run: row k differs from epoch to epoch.
    """
    B, T = tokens_BT.shape
    key = _mix(_mix(np.full(B, seed % 2**64, np.uint64)) + samples_B.astype(np.uint64))
    bits = _mix(key[:, None] + np.arange(T, dtype=np.uint64))
    touched = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 < rate
    touched &= (segment_ids_BT > 0) & (tokens_BT != eos_token_id)
    filled = np.maximum(1, (segment_ids_BT > 0).sum(1))  # padding is at the end of a row
    source = (_mix(bits) % filled[:, None].astype(np.uint64)).astype(np.int64)
    other = np.take_along_axis(tokens_BT, source, axis=1)
    return np.where(touched & (other != eos_token_id), other, tokens_BT)
