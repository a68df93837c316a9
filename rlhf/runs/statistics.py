"""Shares, means and differences with their 95 % intervals."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval (1927) of a share; it also works at 0, at 1 and for small counts.

    Half a success is allowed.
    """
    z = 1.959964
    p = successes / count
    centre = p + z * z / (2 * count)
    scale = 1 + z * z / count
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap(values: Iterable[float], seed: int = 0) -> np.ndarray:
    """The means of 10,000 resamples. Use different seeds for independent samples."""
    values = np.asarray(list(values), dtype=float)
    random = np.random.default_rng(seed)
    block = max(1, 1_000_000 // len(values))  # resamples in memory at a time
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
    """What the mean outcome over prompts would be at equal length, and its 95 % interval.

    A least-squares line of the outcome over the difference in length, read at 0. The interval is a
    bootstrap over prompts. With [seeds, prompts], the line is fitted to means over seeds, and the
    bootstrap is over both.
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
    """1 where `first` is larger, 0 where `second` is, one half where they are equal."""
    return [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(first, second, strict=True)]


def doubled(before: float, after: float, count: int) -> bool:
    """Whether a share of `count` answers has at least doubled, beyond chance.

    It is beyond chance if the two 95 % Wilson intervals do not overlap. With 64 answers and no real
    change, that happens in fewer than one run of 200. From 4 % to 20 % of 80 answers counts.
    """
    highest_before = wilson_interval(before * count, count)[1]
    lowest_after = wilson_interval(after * count, count)[0]
    return after >= 2 * before and highest_before < lowest_after
