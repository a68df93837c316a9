"""What a run says on the terminal: its lines, and how far it is."""

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

LINE_SECONDS = 30.0  # between lines that say how far a run is, where there is no terminal
FORMATS = {
    "loss": "loss {:.3f}",
    "score": "score {:.2f}",
    "kl": "KL {:.2f}",
    "speed": "{:,.0f} tokens/s",
}
QUIET = os.environ.get("RANK", "0") != "0"  # one process talks
console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=QUIET)
# Changes of direction; a byte order mark.
NOT_TEXT = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"


def plain(text: str) -> str:
    """Text safe to print: what may drive a terminal or reverse a line becomes `\\ufffd`.

    All else stays as people wrote it: joiners of Persian words and of emoji, soft hyphens, marks of
    direction.
    """
    return "".join("\ufffd" if unsafe(c) else c for c in text)


def unsafe(c: str) -> bool:
    return c in NOT_TEXT or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")


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
        self.name = name
        self.unit = unit
        self.total = total
        self.bar = bar() if console.is_terminal and not console.is_dumb_terminal else None
        self.since: dict[str, list[float]] = {}  # the last line: each number of each step
        self.said: float | None = None  # when that was
        if self.bar:
            self.task = self.bar.add_task(name, total=total, note="")
            self.bar.start()
        self.begin(0)

    def begin(self, done: int) -> None:
        """`done` steps were made earlier; the time left is reckoned from here on."""
        self.first = done
        self.began = time.monotonic()
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
