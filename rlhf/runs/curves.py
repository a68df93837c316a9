"""A run's metrics drawn as curves.png."""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlhf.runs.errors import one_line
from rlhf.runs.metrics import read_jsonl
from rlhf.runs.terminal import console

DRAW_SECONDS = 60.0  # from one drawing of curves.png to the next
SMOOTHED = 20  # curves with this many points or more get a running mean


class Panel(NamedTuple):
    """One of the plots in curves.png."""

    title: str
    unit: str  # of the vertical axis
    lines: dict[str, str]  # metric -> label


class Curves:
    """Draws curves.png from a run's metrics.jsonl, during the run and at its end.

    Only the main process draws. A picture is not worth a run: if drawing fails, the run continues
    with a warning, one during the run and one at its end.

    Args:
        folder: of the run.
        x: the metric on the horizontal axis, "step" or "update".
    """

    def __init__(self, folder: Path, x: str, panels: Sequence[Panel]):
        self.metrics = folder / "metrics.jsonl"
        self.path = folder / "curves.png"
        self.x = x
        self.panels = panels
        self.last = time.monotonic()
        self.failed = False

    def draw_when_due(self) -> None:
        """Draw if the last drawing is `DRAW_SECONDS` old."""
        if not self.failed and time.monotonic() - self.last >= DRAW_SECONDS:
            self.draw()

    def draw(self) -> None:
        self.failed = True  # until the picture is drawn
        with drawing(self.path) as partial:
            figure = plot_curves(read_jsonl(self.metrics), self.x, self.panels)
            figure.savefig(partial, dpi=130, format="png")
            self.failed = False
        self.last = time.monotonic()


@contextlib.contextmanager
def drawing(path: Path) -> Iterator[Path]:
    """Yield a place to write a picture to, then rename it to `path`. An error becomes a warning."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        why = f"could not be drawn ({one_line(error)})"
        console.print(f"warning: {path.name} {why}; the run continues without it")


def plot_curves(rows: list[dict[str, float]], x: str, panels: Sequence[Panel]):
    """A figure with a plot for each panel. Long curves are faint, behind their running mean."""
    from matplotlib.figure import Figure  # the import takes a second
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(panels))
    figure = Figure(
        figsize=(4.2 * columns, 2.9 * math.ceil(len(panels) / columns)), layout="constrained"
    )
    axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        for number, (name, label) in enumerate(panel.lines.items()):
            points = np.array([(row[x], row[name]) for row in rows if name in row]).reshape(-1, 2)
            style = {"color": f"C{number}", "label": label}
            if len(points) >= SMOOTHED:
                figure.supxlabel(f"faint: each {x}; solid: running mean", fontsize=8, color="0.4")
                axis.plot(*points.T, color=style["color"], alpha=0.25, linewidth=0.8)
                axis.plot(points[:, 0], running_mean(points[:, 1]), **style)
            elif len(points):
                axis.plot(*points.T, marker="o", markersize=3, **style)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel({"step": "optimizer step"}.get(x, x), fontsize=9)
        axis.set_ylabel(panel.unit, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(panel.lines) > 1 and axis.lines:
            axis.legend(fontsize=8)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def running_mean(values: np.ndarray) -> np.ndarray:
    """[n] each value averaged with its neighbours, over a twentieth of all values but at least 5.

    At the ends it averages those that exist.
    """
    half = max(5, len(values) // 20) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low = np.maximum(places - half, 0)
    high = np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
