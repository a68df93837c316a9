"""What a run prints: its lines, and its progress."""

import os
import time
import unicodedata

import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 30.0  # between progress lines, where there is no terminal
# What a progress line may show; whoever logs passes these names.
FORMATS = {
    "loss": "loss {:.3f}",
    "score": "score {:.2f}",
    "kl": "KL {:.2f}",
    "speed": "{:,.0f} tokens/s",
}
QUIET = os.environ.get("RANK", "0") != "0"  # one process talks
console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=QUIET)
# Characters that change the direction of text, and the byte order mark.
NOT_TEXT = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"


def plain(text: str) -> str:
    """Text that is safe to print: what could control a terminal or reverse a line is `\\ufffd`.

    Everything else stays as people wrote it: the joiners in Persian and in emoji, soft hyphens,
    direction marks.
    """
    return "".join("\ufffd" if unsafe(c) else c for c in text)


def unsafe(c: str) -> bool:
    return c in NOT_TEXT or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")


class Progress:
    """A run's progress: a bar on a terminal, and elsewhere (in a log file) a line now and then.

    A line is printed at the first and last step, and every `LINE_SECONDS` in between. Its numbers
    are means over the steps since the line before.

    Args:
        name: of the run.
        unit: what it counts: "step" or "update".
        total: how many of them the whole run has.
    """

    def __init__(self, name: str, unit: str, total: int):
        self.name = name
        self.unit = unit
        self.total = total
        self.bar = bar() if console.is_terminal and not console.is_dumb_terminal else None
        self.since: dict[str, list[float]] = {}  # the last line: the numbers of each step
        self.said: float | None = None  # when the last line was printed
        if self.bar:
            self.task = self.bar.add_task(name, total=total, note="")
            self.bar.start()
        self.begin(0)

    def begin(self, done: int) -> None:
        """`done` steps were made before; the time left is estimated from here on."""
        self.first = done
        self.began = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=done)

    def update(self, done: int, **numbers: float) -> None:
        """`done` steps are made; the numbers are the last one's, by names in `FORMATS`."""
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
    """A progress bar with the time elapsed and the time left."""
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
    """A rounded duration: "45 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
