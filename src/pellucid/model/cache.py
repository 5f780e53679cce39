"""Keys and values of past tokens, so that generating one more token costs one token's work.

Keys are stored after rotation. Letters: B batch, K key/value heads, S stored tokens, d head_dim.
"""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Per layer two buffers [B, K, capacity, d] that double when full; `length` tokens of each row are filled."""

    def __init__(self) -> None:
        self.length = 0
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of one layer; return views of all keys and values [B, K, length + T, d]."""
        end = self.length + k_BKTd.shape[2]
        old = self._buffers.get(layer)
        if old is None or old[0].shape[2] < end:
            self._buffers[layer] = tuple(self._grown(old, i, new, end) for i, new in enumerate((k_BKTd, v_BKTd)))
        for buffer, new in zip(self._buffers[layer], (k_BKTd, v_BKTd), strict=True):
            buffer[:, :, self.length : end] = new
        keys, values = self._buffers[layer]
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Called once per forward pass, after every layer has appended."""
        self.length += tokens

    def _grown(self, old: tuple[Tensor, Tensor] | None, which: int, like: Tensor, end: int) -> Tensor:
        B, K, _, d = like.shape
        buffer = like.new_zeros(B, K, max(64, 2 * end), d)
        if old is not None:
            buffer[:, :, : self.length] = old[which][:, :, : self.length]
        return buffer
