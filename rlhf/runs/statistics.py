"""Shares, means and differences with their 95 % intervals."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share (1927), also at 0 and 1 and for small counts.

    Halves may count as successes.
    """
    z = 1.959964
    p = successes / count
    centre = p + z * z / (2 * count)
    scale = 1 + z * z / count
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap(values: Iterable[float], seed: int = 0) -> np.ndarray:
    """The means of 10,000 draws with replacement; independent samples want different seeds."""
    values = np.asarray(list(values), dtype=float)
    random = np.random.default_rng(seed)
    block = max(1, 1_000_000 // len(values))  # draws in memory at a time
    sizes = [min(block, 10_000 - start) for start in range(0, 10_000, block)]
    return np.concatenate(
        [values[random.integers(0, len(values), (size, len(values)))].mean(1) for size in sizes]
    )


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean."""
    low, high = np.quantile(bootstrap(values), [0.025, 0.975])
    return float(low), float(high)


def at_equal_length(
    outcome: Iterable[Any], difference: Iterable[Any]
) -> tuple[float, float, float]:
    """The mean of `outcome` over prompts, if both answers were equally long, and its interval.

    A least-squares line of the outcome over the difference in length, read at 0; the interval is a
    bootstrap over prompts. Of [seeds, prompts], it is the line of their means over the seeds, and
    the bootstrap is over both.
    """
    points = np.array([list(outcome), list(difference)], dtype=float)
    points = points.reshape(2, -1, points.shape[-1])  # [2, seeds, prompts]

    def at_zero(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        from_mean = x - x.mean(-1, keepdims=True)
        square = (from_mean**2).mean(-1)
        slope = np.divide(
            (from_mean * y).mean(-1), square, out=np.zeros_like(square), where=square > 0
        )
        return y.mean(-1) - slope * x.mean(-1)

    random = np.random.default_rng(0)
    prompts, seeds = (
        random.integers(0, count, size=(2000, count)) for count in points.shape[:0:-1]
    )
    drawn = np.take_along_axis(points[:, seeds].mean(2), prompts[None], axis=2)
    low, high = np.quantile(at_zero(*drawn), [0.025, 0.975])
    return float(at_zero(*points.mean(1))), float(low), float(high)


def preference(first: Iterable[float], second: Iterable[float]) -> list[float]:
    """1 where `first` is larger, 0 where `second` is, and a tie counts half."""
    return [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(first, second, strict=True)]


def doubled(before: float, after: float, count: int) -> bool:
    """Whether a share of `count` answers has at least doubled, by more than chance.

    Chance is left behind where the 95 % intervals (Wilson) of the two do not overlap. Of 64 answers
    that happens to fewer than one run in 200 in which nothing changes; 4 % and 20 % of 80 pass.
    """
    highest_before = wilson_interval(before * count, count)[1]
    lowest_after = wilson_interval(after * count, count)[0]
    return after >= 2 * before and highest_before < lowest_after
