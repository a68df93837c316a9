"""What a run leaves to look at: metrics as JSON lines, curves as a PNG, numbers with their intervals, how texts vary."""

import errno
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf.cli import UserError

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

ENDINGS = {"eos": "ended by EOS", "stop_text": "ended by the next Human: turn", "length": "cut at the length limit"}
SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}

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
        row = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
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


def progress() -> Progress:
    """A progress bar with the time gone and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console
    )


class TrainerLog(TrainerCallback):
    """Writes what transformers' Trainer logs to metrics.jsonl, and shows a progress bar with the loss."""

    def __init__(self, folder: Path, description: str):
        self.metrics, self.progress, self.description = JsonLines(folder / "metrics.jsonl"), progress(), description

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.progress.start()
            self.task = self.progress.add_task(self.description, total=state.max_steps, note="")

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            # Since the last start only, and what the Trainer cannot know of batches that are lists.
            logs = {name: value for name, value in logs.items() if name not in ("train_loss", "total_flos")}
            self.metrics.write({"step": state.global_step, **logs})
            if "eval_loss" in logs:
                self.progress.console.print(f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}")
            if "loss" in logs:
                speed = logs.get("speed/tokens_per_second", 0.0)
                self.progress.update(self.task, note=f"loss {float(logs['loss']):.3f} {speed:,.0f} tokens/s")

    def stop(self) -> None:
        """Give the terminal back, however the training ended."""
        if self.progress.live.is_started:
            self.progress.stop()


def plot_curves(folder: Path, x: str, panels: dict[str, Sequence[str]]) -> None:
    """Draw `folder`/curves.png from its metrics.jsonl: one panel a title, with the named metrics over `x`."""
    from matplotlib.figure import Figure

    rows = read_jsonl(folder / "metrics.jsonl")
    columns = min(3, len(panels))
    figure = Figure(figsize=(4.2 * columns, 2.9 * math.ceil(len(panels) / columns)), layout="constrained")
    axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flatten()
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            points = [(row[x], row[name]) for row in rows if name in row]
            if points:
                axis.plot(
                    *zip(*points, strict=True), marker="o" if len(points) < 20 else None, markersize=3, label=name
                )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.savefig(folder / "curves.png", dpi=130)


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
    return np.concatenate([values[random.integers(0, len(values), (size, len(values)))].mean(1) for size in sizes])


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean."""
    low, high = np.quantile(bootstrap(values), [0.025, 0.975])
    return float(low), float(high)


def at_equal_length(outcome: Iterable[Any], difference: Iterable[Any]) -> tuple[float, float, float]:
    """The mean of `outcome`, one number a prompt, if both answers to it were equally long, and its 95 % interval.

    A least-squares line of the outcome over the difference in length, read at 0; the interval is a bootstrap over prompts.
    Of [seeds, prompts], it is the line of their means over the seeds, and the bootstrap is over both.
    """
    points = np.array([list(outcome), list(difference)], dtype=float)
    points = points.reshape(2, -1, points.shape[-1])  # [2, seeds, prompts]

    def at_zero(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        from_mean = x - x.mean(-1, keepdims=True)
        square = (from_mean**2).mean(-1)
        slope = np.divide((from_mean * y).mean(-1), square, out=np.zeros_like(square), where=square > 0)
        return y.mean(-1) - slope * x.mean(-1)

    random = np.random.default_rng(0)
    prompts, seeds = (random.integers(0, count, size=(2000, count)) for count in points.shape[:0:-1])
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
UNSPACED = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
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
    pairs = [pair for text in texts for words in [words_of(text)] for pair in zip(words, words[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
