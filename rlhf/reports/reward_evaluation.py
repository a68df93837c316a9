"""What a reward model gets right on held-out pairs, how sure it is, and how much is length.

`evaluation.json` holds every number, `evaluation.png` shows them. A tie counts half, so a constant
scorer gets 0.5.

Shapes: n pairs.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.runs.statistics import bootstrap, mean_interval, preference, wilson_interval

BINS = 10  # of the calibration, at most, with equally many pairs each
BIN_PAIRS = 20  # in a bin, at least
LENGTHS = {  # edges of log2(tokens of the chosen response / tokens of the rejected one)
    "less than half": (-np.inf, -1.0),
    "shorter": (-1.0, -0.2),
    "alike": (-0.2, 0.2),
    "longer": (0.2, 1.0),
    "twice or more": (1.0, np.inf),
}
TURNS = {"1": (1, 2), "2": (2, 3), "3": (3, 4), "4 or more": (4, np.inf)}


@dataclass(frozen=True)
class ScoredPairs:
    """[n] each: scores and tokens of both responses, and the human's turns before them."""

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    turns: np.ndarray

    @property
    def right(self) -> np.ndarray:
        return np.array(preference(self.chosen, self.rejected))

    @property
    def longer(self) -> np.ndarray:
        """What the rule "the longer response wins" would get."""
        return np.array(preference(self.chosen_tokens, self.rejected_tokens))

    @property
    def margin(self) -> np.ndarray:
        return self.chosen - self.rejected


def judge(pairs: ScoredPairs) -> dict[str, Any]:
    """All numbers in evaluation.json. Those on its top level also go into run.json."""
    right = pairs.right
    longer = pairs.longer
    margin = pairs.margin
    scores = np.concatenate([pairs.chosen, pairs.rejected])
    tokens = np.concatenate([pairs.chosen_tokens, pairs.rejected_tokens])
    bins = calibration(margin)
    low, high = wilson_interval(right.sum(), len(right))
    # Without one more pair each way, a bootstrap of a few differences is too sure.
    above_low, above_high = mean_interval([*(right - longer), 1.0, -1.0])
    numbers = {
        "eval_accuracy": right.mean(),
        "eval_accuracy_low": low,
        "eval_accuracy_high": high,
        "longer_wins_accuracy": longer.mean(),
        "above_longer_wins": (right - longer).mean(),
        "above_longer_wins_low": above_low,
        "above_longer_wins_high": above_high,
        **length_balanced(right, longer),
        "eval_margin": margin.mean(),
        "eval_loss": np.logaddexp(0, -margin).mean(),
        "calibration_error": sum(b["pairs"] * abs(b["accuracy"] - b["confidence"]) for b in bins)
        / len(right),
        "score_mean": scores.mean(),
        "score_std": scores.std(ddof=1),
        "score_length_correlation": correlation(scores, tokens),
        "margin_length_correlation": correlation(
            margin, pairs.chosen_tokens - pairs.rejected_tokens
        ),
    }
    ratio = np.log2(pairs.chosen_tokens / pairs.rejected_tokens)
    return {name: None if value is None else float(value) for name, value in numbers.items()} | {
        "eval_pairs": len(right),
        "calibration": bins,
        "by_length": groups(right, ratio, LENGTHS),
        "by_turns": groups(right, pairs.turns, TURNS),
    }


def length_balanced(right: np.ndarray, longer: np.ndarray) -> dict[str, float | None]:
    """The mean of two accuracies: where the chosen response is longer, and where it is shorter.

    A model that looks at length alone gets 0.5. None if one of the two kinds is missing. The
    interval is a bootstrap, with one right and one wrong pair added to each kind as in Agresti and
    Caffo (2000). Without them, two right of two would seem certain.
    """
    kinds = right[longer == 1], right[longer == 0]
    if not all(map(len, kinds)):
        return dict.fromkeys(
            ("length_balanced_accuracy", "length_balanced_low", "length_balanced_high")
        )
    more = [[*kind, 0.0, 1.0] for kind in kinds]
    low, high = np.quantile((bootstrap(more[0], 0) + bootstrap(more[1], 1)) / 2, [0.025, 0.975])
    return {
        "length_balanced_accuracy": (kinds[0].mean() + kinds[1].mean()) / 2,
        "length_balanced_low": low,
        "length_balanced_high": high,
    }


def calibration(margin: np.ndarray) -> list[dict[str, float]]:
    """Is it right as often as it is sure? Bins of pairs by their confidence, sigmoid(|margin|)."""
    order = np.argsort(np.abs(margin), kind="stable")
    bins = []
    for rows in np.array_split(order, max(1, min(BINS, len(order) // BIN_PAIRS))):
        right = np.where(margin[rows] == 0, 0.5, margin[rows] > 0)
        low, high = wilson_interval(right.sum(), len(rows))
        confidence = (1 / (1 + np.exp(-np.abs(margin[rows])))).mean()
        accuracy = {"accuracy": float(right.mean()), "accuracy_low": low, "accuracy_high": high}
        bins.append({"pairs": len(rows), "confidence": float(confidence), **accuracy})
    return bins


def groups(
    right: np.ndarray, by: np.ndarray, edges: dict[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    """Accuracy in each group, lower edge included; empty groups are left out."""
    rows = []
    for name, (low, high) in edges.items():
        inside = right[(by >= low) & (by < high)]
        if len(inside):
            interval = dict(
                zip(
                    ("accuracy_low", "accuracy_high"),
                    wilson_interval(inside.sum(), len(inside)),
                    strict=True,
                )
            )
            rows.append(
                {"group": name, "pairs": len(inside), "accuracy": float(inside.mean()), **interval}
            )
    return rows


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's correlation; None if one of the two is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None


# ---------------------------------------------------------------- what is shown


def describe(m: dict[str, Any], what: str = "test pairs") -> str:
    """What `judge` found, in words."""
    lines = [
        f"{what} {m['eval_pairs']}: accuracy {m['eval_accuracy']:.3f} (95 % interval "
        f"{m['eval_accuracy_low']:.3f} to {m['eval_accuracy_high']:.3f}; a tie counts half), mean "
        f"margin {m['eval_margin']:.3f}, loss {m['eval_loss']:.4f}, calibration error "
        f"{m['calibration_error']:.3f}",
        f'"the longer response wins" would score {m["longer_wins_accuracy"]:.3f}: the model is '
        f"{m['above_longer_wins']:+.3f} from it ({m['above_longer_wins_low']:+.3f} to "
        f"{m['above_longer_wins_high']:+.3f})",
    ]
    if m["length_balanced_accuracy"] is not None:
        lines.append(
            f"accuracy {m['length_balanced_accuracy']:.3f} ({m['length_balanced_low']:.3f} to "
            f"{m['length_balanced_high']:.3f}) with longer and shorter winners weighted equally, "
            "where length alone gets 0.5"
        )
    correlated = m["score_length_correlation"]
    lines.append(
        f"scores have mean {m['score_mean']:.2f}, standard deviation {m['score_std']:.2f}"
        + ("" if correlated is None else f", correlation with length {correlated:.2f}")
    )
    return "\n".join(lines)


def write_evaluation(folder: Path, metrics: dict[str, Any], pairs: ScoredPairs) -> None:
    """Write evaluation.json and evaluation.png, each beside its place, and rename them."""
    with (folder / "evaluation.json.partial").open("w", encoding="utf-8") as file:
        json.dump(metrics, file, indent=2)
        file.write("\n")
    draw(metrics, pairs).savefig(folder / "evaluation.png.partial", dpi=130, format="png")
    for name in ("evaluation.json", "evaluation.png"):
        os.replace(folder / f"{name}.partial", folder / name)


def draw(metrics: dict[str, Any], pairs: ScoredPairs):
    """Plots of calibration, accuracy by length and by turns, and margin against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.6), layout="constrained")
    (sure, length), (turns, scatter) = figure.subplots(2, 2)
    bars(sure, [b["confidence"] for b in metrics["calibration"]], metrics["calibration"])
    sure.plot([0.5, 1], [0.5, 1], "k--", linewidth=0.8)
    sure.set(
        title=f"Calibration, error {metrics['calibration_error']:.3f}",
        xlabel="confidence",
        ylabel="accuracy",
    )
    for axis, by, title in (
        (length, metrics["by_length"], "length of the chosen response, against the rejected one"),
        (turns, metrics["by_turns"], "turns of the human"),
    ):
        bars(axis, range(len(by)), by)
        axis.set_xticks(
            range(len(by)), [f"{row['group']}\n{row['pairs']} pairs" for row in by], fontsize=7
        )
        axis.axhline(metrics["eval_accuracy"], color="k", linestyle="--", linewidth=0.8)
        axis.set(title="Accuracy (dashed: of all pairs)", xlabel=title, ylabel="accuracy")
    scatter.scatter(pairs.chosen_tokens - pairs.rejected_tokens, pairs.margin, s=8, alpha=0.5)
    scatter.axhline(0, color="k", linestyle="--", linewidth=0.8)
    correlated = metrics["margin_length_correlation"]
    note = "" if correlated is None else f", correlation {correlated:.2f}"
    scatter.set(title=f"Margin{note}", xlabel="chosen - rejected, tokens", ylabel="margin")
    for axis in (sure, length, turns, scatter):
        axis.grid(alpha=0.3)
    return figure


def bars(axis, x, rows: list[dict[str, Any]]) -> None:
    """Draw accuracies with their 95 % intervals."""
    y = np.array([row["accuracy"] for row in rows])
    spread = [y - [row["accuracy_low"] for row in rows], [row["accuracy_high"] for row in rows] - y]
    axis.errorbar(x, y, yerr=np.abs(spread), fmt="o", markersize=4, capsize=2)
