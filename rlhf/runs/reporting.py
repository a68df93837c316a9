"""What a run leaves to look at: metrics as JSON lines, curves as a PNG, numbers with their intervals, how texts vary."""

import contextlib
import errno
import json
import math
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.runs.cli import UserError, one_line

import numpy as np
import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

ENDINGS = {
    "eos": "ended by EOS",
    "stop_text": "ended by the next Human: turn",
    "length": "cut at the length limit",
}
SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}

LINE_SECONDS = 30.0  # between lines that say how far a run is, where there is no terminal
DRAW_SECONDS = 60.0  # between two drawings of curves.png
SMOOTHED = 20  # points of a curve that are drawn with their running mean
FORMATS = {
    "loss": "loss {:.3f}",
    "score": "score {:.2f}",
    "kl": "KL {:.2f}",
    "speed": "{:,.0f} tokens/s",
}

QUIET = os.environ.get("RANK", "0") != "0"  # one process talks
console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=QUIET)


NOT_TEXT = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"  # turns of direction; a byte order mark


def plain(text: str) -> str:
    """Text of a model or a data set, safe to print: what may drive a terminal or turn a line round becomes `\\ufffd`.

    All else stays as people wrote it: joiners of Persian words and of emoji, soft hyphens, marks of direction.
    """
    return "".join("\ufffd" if unsafe(c) else c for c in text)


def unsafe(c: str) -> bool:
    return c in NOT_TEXT or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")


class JsonLines:
    """Appends one JSON object a line, unbuffered, so that a run can be watched and nothing is lost with it."""

    def __init__(self, path: Path):
        self.file = path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Numbers that are not finite are left out: JSON has none, and fp16 skips a step now and then for such a gradient."""
        row = {
            name: value
            for name, value in row.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        if self.file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def position(self) -> int:
        """Bytes that are written, and on the disk: what rests on them may be there after a power cut."""
        if Path(self.file.name).is_file():  # /dev/null cannot be flushed
            os.fsync(self.file.fileno())
        return self.file.tell()

    def cut(self, position: int) -> None:
        """Forget what stands after the first `position` bytes."""
        if position > self.file.seek(0, os.SEEK_END):
            raise UserError(
                f"{self.file.name} has lost its end: it ended at byte {position}; start anew with --overwrite"
            )
        self.file.seek(position)
        self.file.truncate()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # splitlines would also split at U+2028 within a text
        return [json.loads(line) for line in file]


# ---------------------------------------------------------------- on the way


class Progress:
    """How far a run is: a bar on a terminal, and elsewhere, as in a log file, a line now and then.

    A line comes at the first and the last step, and every `LINE_SECONDS` between them. Its numbers
    are means over the steps since the line before.

    Args:
        name: of the run.
        unit: what it counts: "step" or "update".
        total: of them in the whole run.
    """

    def __init__(self, name: str, unit: str, total: int):
        self.name, self.unit, self.total = name, unit, total
        self.bar = bar() if console.is_terminal and not console.is_dumb_terminal else None
        self.since: dict[str, list[float]] = {}  # the last line: each number of each step
        self.said: float | None = None  # when that was
        if self.bar:
            self.task = self.bar.add_task(name, total=total, note="")
            self.bar.start()
        self.begin(0)

    def begin(self, done: int) -> None:
        """`done` steps were made earlier; the time left is reckoned from here on."""
        self.first, self.began = done, time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=done)

    def update(self, done: int, **numbers: float) -> None:
        """`done` steps are made; the last one's numbers, by names in `FORMATS`."""
        if self.bar:
            self.bar.update(self.task, completed=done, note=" ".join(in_words(numbers)))
            return
        for name, number in numbers.items():
            self.since.setdefault(name, []).append(number)
        now = time.monotonic()
        if self.said is None or now - self.said >= LINE_SECONDS or done >= self.total:
            means = {name: sum(column) / len(column) for name, column in self.since.items()}
            line = [f"{self.name}: {self.unit} {done:,} of {self.total:,}", *in_words(means)]
            if done < self.total:
                a_step = (now - self.began) / (done - self.first)
                line.append(f"{duration(a_step * (self.total - done))} left")
            console.print(", ".join(line))
            self.said = now
            self.since.clear()

    def stop(self) -> None:
        """Give the terminal back."""
        if self.bar:
            self.bar.stop()


def bar() -> rich.progress.Progress:
    """A progress bar with the time gone and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    left = TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    return rich.progress.Progress(*columns, *left, console=console)


def in_words(numbers: dict[str, float]) -> list[str]:
    return [FORMATS[name].format(number) for name, number in numbers.items()]


def duration(seconds: float) -> str:
    """Rounded to what a reader wants to know: "45 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class TrainerLog(TrainerCallback):
    """Writes what transformers' Trainer logs to metrics.jsonl, shows how far it is, draws curves."""

    def __init__(self, folder: Path, name: str, panels: Sequence["Panel"]):
        self.metrics, self.name = JsonLines(folder / "metrics.jsonl"), name
        self.curves = Curves(folder, "step", panels)
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.progress = Progress(self.name, "step", state.max_steps)
            self.progress.begin(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.progress and state.global_step == self.progress.first:
            self.progress.begin(state.global_step)  # what came before it was an evaluation

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            # Since the last start only, and what the Trainer cannot know of batches that are lists.
            logs = {
                name: value
                for name, value in logs.items()
                if name not in ("train_loss", "total_flos")
            }
            if "eval_loss" in logs:
                before = read_jsonl(self.curves.metrics)
                console.print(describe_evaluation(state.global_step, logs, before))
            self.metrics.write({"step": state.global_step, **logs})
            if "loss" in logs:
                speed = logs.get("speed/tokens_per_second", 0.0)
                self.progress.update(state.global_step, loss=float(logs["loss"]), speed=speed)
                self.curves.draw_when_due()

    def stop(self) -> None:
        """Give the terminal back, however the training ended."""
        if self.progress:
            self.progress.stop()


def describe_evaluation(step: int, numbers: dict[str, float], rows: list[dict[str, float]]) -> str:
    """An evaluation in a line, which also says where the loss was lower before.

    Args:
        rows: the metrics of the steps before.
    """
    said = [f"loss {numbers['eval_loss']:.4f}"]
    for name in ("accuracy", "margin"):
        if f"eval_{name}" in numbers:
            said.append(f"{name} {numbers[f'eval_{name}']:.3f}")
    line = f"step {step:,}, test rows: {', '.join(said)}"
    looks = [row for row in rows if "eval_loss" in row]
    best = min(looks, key=lambda row: row["eval_loss"], default=numbers)
    if best["eval_loss"] < numbers["eval_loss"]:
        line += f"; the loss was lowest at step {best['step']:,}, {best['eval_loss']:.4f}"
    return line


# ---------------------------------------------------------------- curves


class Panel(NamedTuple):
    """One of the plots in curves.png."""

    title: str
    unit: str  # of the vertical axis
    lines: dict[str, str]  # the label of each metric


class Curves:
    """curves.png, drawn from a run's metrics.jsonl on the way and at its end, by the main process.

    A picture is not worth a run: where it cannot be drawn the run goes on, and a warning says so,
    once on the way and once at the end.

    Args:
        folder: the run's.
        x: the metric on the horizontal axis, "step" or "update".
    """

    def __init__(self, folder: Path, x: str, panels: Sequence[Panel]):
        self.metrics, self.path = folder / "metrics.jsonl", folder / "curves.png"
        self.x, self.panels = x, panels
        self.last, self.failed = time.monotonic(), False

    def draw_when_due(self) -> None:
        """Draw if the last time was `DRAW_SECONDS` ago."""
        if not self.failed and time.monotonic() - self.last >= DRAW_SECONDS:
            self.draw()

    def draw(self) -> None:
        self.failed = True  # until it is drawn
        with drawing(self.path) as partial:
            figure = plot_curves(read_jsonl(self.metrics), self.x, self.panels)
            figure.savefig(partial, dpi=130, format="png")
            self.failed = False
        self.last = time.monotonic()


@contextlib.contextmanager
def drawing(path: Path) -> Iterator[Path]:
    """Yield where to write a picture, then rename it to `path`. An error becomes a warning."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        why = f"could not be drawn ({one_line(error)})"
        console.print(f"warning: {path.name} {why}; the run goes on without it")


def plot_curves(rows: list[dict[str, float]], x: str, panels: Sequence[Panel]):
    """A figure with a plot a panel; curves of `SMOOTHED` points or more lie behind their mean."""
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
    """[n] the mean of each value and its neighbours, a twentieth of all values and 5 at least.

    At the ends it is the mean of those that are there.
    """
    half = max(5, len(values) // 20) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low = np.maximum(places - half, 0)
    high = np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


# ---------------------------------------------------------------- numbers with their intervals


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927); holds at 0 and 1 and for small counts. Halves may count as successes."""
    z, p = 1.959964, successes / count
    centre, scale = p + z * z / (2 * count), 1 + z * z / count
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap(values: Iterable[float], seed: int = 0) -> np.ndarray:
    """The means of 10,000 draws with replacement; independent samples want different seeds."""
    values, random = np.asarray(list(values), dtype=float), np.random.default_rng(seed)
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
    """The mean of `outcome`, one number a prompt, if both answers to it were equally long, and its 95 % interval.

    A least-squares line of the outcome over the difference in length, read at 0; the interval is a bootstrap over prompts.
    Of [seeds, prompts], it is the line of their means over the seeds, and the bootstrap is over both.
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


# ---------------------------------------------------------------- texts


def conclusions(report: dict[str, Any]) -> list[str]:
    """What a comparison shows, in words: a sentence for each two models, then its notes."""
    return [f"{pair['verdict']}." for pair in report["pairs"]] + report["notes"]


# Scripts that put no space between words: Thai to Tibetan, Burmese, Khmer, kana, and Chinese characters.
UNSPACED = r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """Its words; in scripts that put no space between them its characters, as in a long run without any space."""
    words = WORD.findall(text)
    return [part for word in words for part in (word if len(word) > 50 else [word])]


def repeated_3grams(text: str) -> float:
    """Of the 3-grams of words in `text`, the share that occurred in it before; 0 for fewer than 3 words."""
    words = words_of(text)
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_2(texts: Iterable[str]) -> float:
    """Of all pairs of neighbouring words in `texts`, the share that is different (1510.03055): low if all sound alike."""
    pairs = [
        pair
        for text in texts
        for words in [words_of(text)]
        for pair in zip(words, words[1:], strict=False)
    ]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
