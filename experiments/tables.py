"""Means with their bootstrap intervals, and how such numbers stand in a table of a page."""

from typing import Any

import numpy as np

SAMPLES = 10_000  # of a bootstrap


# ---------------------------------------------------------------- intervals


def interval(name: str, values: np.ndarray, against: np.ndarray | None = None) -> dict[str, float]:
    """Mean of `values` [seeds, pairs] less that of `against`.

    The bootstrap is over the seeds of each, and over the pairs.
    """
    random = np.random.default_rng(0)
    pairs = drawn(random, values.shape[1])
    parts = [values] if against is None else [values, -against]
    samples = sum(((drawn(random, len(part)) @ part) * pairs).sum(1) for part in parts)
    return between(name, sum(part.mean() for part in parts), samples)


def pooled_interval(
    name: str, values: np.ndarray, against: np.ndarray, spread: np.ndarray
) -> dict[str, float]:
    """Mean of `values` [runs, prompts] less that of `against`.

    The bootstrap is over the prompts, and over the runs of each by `spread`.

    Two or three runs of a variant say too little of how far such runs lie apart: what a bootstrap
    draws in place of each is the deviation of any run of the table, see `deviations`.
    """
    random = np.random.default_rng(0)
    prompts = drawn(random, values.shape[1])
    difference = values.mean(0) - against.mean(0)
    noise = drawn(random, len(spread), len(values)) - drawn(random, len(spread), len(against))
    return between(name, difference.mean(), ((difference + noise @ spread) * prompts).sum(1))


def paired_interval(name: str, differences: np.ndarray, spread: np.ndarray) -> dict[str, float]:
    """Mean of `differences` [runs, prompts], each taken within a run; else as `pooled_interval`.

    Args:
        spread: `deviations` of such differences.
    """
    random = np.random.default_rng(0)
    prompts = drawn(random, differences.shape[1])
    noise = drawn(random, len(spread), len(differences)) @ spread
    mean = differences.mean(0)
    return between(name, mean.mean(), ((mean + noise) * prompts).sum(1))


def deviations(gains: list[np.ndarray]) -> np.ndarray:
    """[runs, prompts]: each run's distance from its variant's mean, with an unbiased mean square.

    Of variants of one run nothing is known; if that is all there is, no run deviates.
    """
    found = [
        (own - own.mean(0)) * (len(own) / (len(own) - 1)) ** 0.5 for own in gains if len(own) > 1
    ]
    return np.concatenate(found or [np.zeros_like(gains[0][:1])])


def drawn(random: np.random.Generator, of: int, count: int | None = None) -> np.ndarray:
    """[SAMPLES, of] weights of a mean when `count` (all) are drawn with replacement."""
    count = count or of
    which = random.integers(0, of, (SAMPLES, count)) + of * np.arange(SAMPLES)[:, None]
    return np.bincount(which.ravel(), minlength=SAMPLES * of).reshape(SAMPLES, of) / count


def between(name: str, mean: float, samples: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(samples, [0.025, 0.975])
    return {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}


# ---------------------------------------------------------------- cells


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def share(m: dict[str, Any], key: str) -> str:
    return f"{m[key]:.3f} ({m[f'{key}_low']:.3f} to {m[f'{key}_high']:.3f})"


def percent(m: dict[str, Any], key: str) -> str:
    return f"{m[key]:.0%} ({m[f'{key}_low']:.0%} to {m[f'{key}_high']:.0%})"


def signed(m: dict[str, Any], key: str, number_format: str = ".2f") -> str:
    low, high = (f"{m[f'{key}_{end}']:+{number_format}}" for end in ("low", "high"))
    return f"{m[key]:+{number_format}} ({low} to {high})"


def span(runs: list[dict[str, Any]], key: str, number_format: str = ".2f") -> str:
    """The range over the seeds."""
    values = [format(run[key], number_format) for run in sorted(runs, key=lambda run: run[key])]
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def seeds(m: dict[str, Any]) -> str:
    return "one seed" if m["seeds"] == 1 else f"{m['seeds']} seeds"
