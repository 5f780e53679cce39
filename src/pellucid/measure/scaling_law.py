"""The scaling law L(N, D) = E + A / N^alpha + B / D^beta, fitted to runs (Hoffmann et al. 2022, approach 3).

Huber loss on log L, minimised by L-BFGS from a grid of starts, in float64; intervals by bootstrap over runs (Besiroglu et al.
2024, arXiv 2404.10102, who also found why the loss must be summed and the optimiser run to its end). N: parameters,
D: tokens, C = 6 N D: FLOPs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np

from pellucid.config import UserError
from pellucid.measure import intervals

DELTA = 1e-3  # of the Huber loss, in log L
GRID = tuple(product((0.1, 0.3, 0.5, 0.8, 1.2), repeat=2))  # pairs of alpha and beta
LEAST_RUNS = 6  # five constants, and one run more
LEAST_EACH = 3  # sizes, and amounts: through two points goes a power law with any exponent


@dataclass(frozen=True)
class Law:
    """The five constants."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: np.ndarray | float, D: np.ndarray | float) -> np.ndarray | float:
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    def optimal(self, flops: float) -> tuple[float, float]:
        """(N, D) of the lowest loss with 6 N D = flops (Hoffmann et al., equation 4)."""
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = scale * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return N, flops / 6 / N


def fit(N: Sequence[float], D: Sequence[float], loss: Sequence[float], exponents: Sequence[tuple[float, float]] = GRID) -> Law:
    """The law of the lowest Huber loss over starts from all pairs of exponents. Raises UserError for too few runs."""
    N, D, loss = (np.asarray(values, float) for values in (N, D, loss))
    if min(len(np.unique(N)), len(np.unique(D))) < LEAST_EACH or len(np.unique([N, D], axis=1).T) < LEAST_RUNS:
        raise UserError(f"a scaling law has five constants: {LEAST_RUNS} different runs or more are needed, of three sizes and three "
                        "amounts of text at least")  # fmt: skip
    best = min((_minimise(start, N, D, loss) for start in _starts(N, D, loss, exponents)), key=lambda found: found[0])
    return best[1]


def bootstrap(N, D, loss, law: Law, draws: int = 200, seed: int = 0, progress: Callable[[int], None] = lambda n: None) -> list[Law]:
    """Laws of the same runs drawn with replacement; each fitted from the exponents of `law` and two pairs beside them."""
    random, found = np.random.default_rng(seed), []
    N, D, loss = (np.asarray(values, float) for values in (N, D, loss))
    exponents = [(law.alpha, law.beta), (law.alpha * 1.5, law.beta / 1.5), (law.alpha / 1.5, law.beta * 1.5)]
    while len(found) < draws:
        drawn = random.integers(0, len(N), len(N))
        try:
            found.append(fit(N[drawn], D[drawn], loss[drawn], exponents))
        except UserError:  # too few different runs were drawn
            continue
        progress(len(found))
    return found


def interval(laws: Sequence[Law], of: Callable[[Law], float]) -> tuple[float, float]:
    """Where `of` lies for 95 % of the laws."""
    low, high = intervals.bounds(np.array([of(law) for law in laws]))
    return float(low), float(high)


def constants(law: Law, laws: Sequence[Law]) -> dict[str, dict[str, float]]:
    """Each constant with its interval."""
    table = {}
    for name, value in asdict(law).items():
        low, high = interval(laws, lambda other, name=name: getattr(other, name))
        table[name] = {"mean": value, "low": low, "high": high}
    return table


def _starts(N: np.ndarray, D: np.ndarray, loss: np.ndarray, exponents: Sequence[tuple[float, float]]) -> list[Law]:
    """For each pair of exponents the law is linear in E, A and B: least squares on relative error.

    Kept well above 0: near it their logarithms have no gradient, and a start there never leaves.
    """
    found, least = [], 1e-2 * float(loss.min())
    for alpha, beta in exponents:
        table = np.stack([np.ones_like(N), N**-alpha, D**-beta], 1)
        E, A, B = np.linalg.lstsq(table / loss[:, None], np.ones_like(loss), rcond=None)[0].tolist()
        found.append(Law(max(E, least), max(A, least * N.min() ** alpha), max(B, least * D.min() ** beta), alpha, beta))
    return found


def _minimise(start: Law, N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> tuple[float, Law]:
    """(Huber loss, law) where L-BFGS comes to rest. E, A, B are exponentials, so that they stay positive.

    N and D count from the middle of the runs, which makes the constants nearly independent of each other.
    """
    N0, D0 = math.exp(np.log(N).mean()), math.exp(np.log(D).mean())
    log_n, log_d, target = np.log(N / N0), np.log(D / D0), np.log(loss)

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        e, a, b, alpha, beta = values
        parts = np.exp(np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d]))
        total = parts.sum(0)
        error = np.log(total) - target
        inside = np.abs(error) <= DELTA
        value = np.where(inside, 0.5 * error**2, DELTA * (np.abs(error) - 0.5 * DELTA)).sum() / DELTA**2
        slope = np.where(inside, error, DELTA * np.sign(error)) / DELTA**2 * parts / total  # of the value by each log part
        by_part = slope.sum(1)
        return value, np.array([*by_part, -(slope[1] * log_n).sum(), -(slope[2] * log_d).sum()])

    begin = [math.log(start.E), math.log(start.A) - start.alpha * math.log(N0),
             math.log(start.B) - start.beta * math.log(D0), start.alpha, start.beta]  # fmt: skip
    with np.errstate(all="ignore"):
        found = _optimizer()(objective, np.array(begin), jac=True, method="L-BFGS-B",
                             options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20})  # fmt: skip
    e, a, b, alpha, beta = map(float, found.x)
    try:
        law = Law(math.exp(e), math.exp(a + alpha * math.log(N0)), math.exp(b + beta * math.log(D0)), alpha, beta)
    except OverflowError:
        return math.inf, start
    return (float(found.fun) if math.isfinite(found.fun) else math.inf), law


def _optimizer() -> Callable:
    # SciPy's BLAS asks once, when it is loaded. For matrices of 40 x 40 its threads only wait for each other: with every core in use
    # elsewhere a fit took 18 times as long.
    threads = "OPENBLAS_NUM_THREADS"
    given = os.environ.get(threads)
    os.environ[threads] = given or "1"
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise UserError("fitting a scaling law needs SciPy: pip install 'pellucid[measure]'") from None
    finally:
        if given is None:
            del os.environ[threads]
    return minimize
