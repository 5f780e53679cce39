"""The gradient noise scale: which batch size is worth its compute.

Two unbiased estimates from the norms of one micro-batch's gradient and of the whole batch's, averaged over steps before
they are divided. Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1.
"""

from __future__ import annotations

import math

DECAY = 0.95


class NoiseScale:
    """Moving averages of |G|^2 and of the trace of the gradients' covariance."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def update(self, small_norm: float, small_tokens: float, norm: float, tokens: float) -> float | None:
        """small_norm: of the first micro-batch's gradient as accumulated, that is, times its share of the tokens.

        norm, tokens: of the whole batch. Returns tr(covariance) / |G|^2 in tokens; None while it is not positive.
        """
        small_tokens, tokens = float(small_tokens), float(tokens)
        if not (0 < small_tokens < tokens and math.isfinite(norm) and math.isfinite(small_norm)):
            return None
        small2 = (float(small_norm) * tokens / small_tokens) ** 2
        large2 = float(norm) ** 2
        signal = (tokens * large2 - small_tokens * small2) / (tokens - small_tokens)
        noise = (small2 - large2) / (1 / small_tokens - 1 / tokens)
        self.signal += (1 - DECAY) * (signal - self.signal)
        self.noise += (1 - DECAY) * (noise - self.noise)
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else None
