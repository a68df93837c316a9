"""The usable pairs of a split, and a report of the rows that are left out."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.files import ACCEPTED, read_rows
from rlhf.data.rows import (
    LABELS,
    LATER_LINE_STARTS_WITH_CUE,
    BadRow,
    Needs,
    Pair,
    columns_of,
    flaw_of,
    is_empty,
    read_row,
    why_unusable,
)
from rlhf.data.splits import TEST_SHARE, first_turn_sha256, is_test, row_sha256, which_half
from rlhf.runs.errors import UserError
from rlhf.runs.terminal import console, plain

FEW_PROMPTS = 20  # with fewer in the test split, its figures are mostly chance
MESSAGE = ("role", "content", "from", "value")  # the keys that are read
MARKUP = re.compile(  # of other formats, and cues in places where we do not read them as such
    r"<\|\w+\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>"
    r"|^[ \t]*(?:#+ ?)?(?:Human|User|Assistant|Instruction|Response|System):",
    re.MULTILINE,
)
LIST_OF_TEXTS = re.compile(r"""\s*\[\s*(['"]).*\1\s*\]\s*\Z""", re.DOTALL)


@dataclass
class Reading:
    """What was found while the rows of a split were read, for the line that reports it."""

    what: str
    files: str
    drops: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    # columns and message keys, in order
    ignored: dict[str, None] = field(default_factory=dict)
    markup: Counter[str] = field(default_factory=Counter)
    repeated: int = 0  # rows that equal an earlier one
    all_rows: int = 0  # of data that is split by first questions
    questions: int = 0  # different first questions

    def note(self, row: dict[str, Any], pair: Pair) -> None:
        """Count a row that is used."""
        self.shapes[shape_of(row)] += 1
        self.ignored |= dict.fromkeys(ignored_names(row))
        answers = [answer for answer in (pair.chosen, pair.rejected) if answer is not None]
        texts = [*(text for _, text in pair.turns), *answers]
        if pair.rejected is not None:  # perhaps it was rejected because it runs on
            texts[-1] = LATER_LINE_STARTS_WITH_CUE.split(pair.rejected)[0]
        found = {match.strip() for text in texts for match in MARKUP.findall(text)}
        question = pair.turns[-1][1]
        if len(question) > 9 and answers and all(text.startswith(question) for text in answers):
            found.add("answers that repeat the question")
        if any(LIST_OF_TEXTS.match(text) for text in texts):
            found.add("lists spelled out as text")
        self.markup.update(found)

    def report(self, kept: int) -> None:
        said = [f"read {self.files}"]
        if self.shapes:
            said[0] += " as " + " or ".join(self.shapes)
        if self.repeated:
            said.append(f"repeated rows: {self.repeated}")
        if self.ignored:
            said.append(f"ignored: {', '.join(self.ignored)}")
        if self.markup:
            marks = ", ".join(f"{mark} in {rows} rows" for mark, rows in self.markup.most_common(3))
            said.append(f"looks like markup: {marks}")
        report_drops(self.what, kept, self.drops, "; ".join(said))


def load_rows(
    source: str,
    split: str,
    needs: Needs,
    columns: str | None = None,
    max_samples: int | None = None,
    half: str = "both",
) -> list[Pair]:
    """Read the usable rows of a split ("train" or "test"), at most the first `max_samples`.

    A single file, or data without a test split, gives about one in twenty first questions to the
    test split, by a hash of the question. Bad rows are dropped, and in the test split also rows
    that repeat an earlier one, as they would make its figures look surer than they are. One line on
    the terminal says what was read, how many rows were dropped and why, and what was ignored.

    Args:
        source: a hub id, a file or a folder.
        needs: what makes a row usable: a prompt, a prompt with an answer, or one with two.
        columns: the data's own names of columns, as in `prompt=question,chosen=good`.
        half: "first" or "second" reads only the rows of that half.
    Raises:
        UserError: no such source, a file that cannot be read, a missing column, no usable row.
    """
    where, rows = read_rows(source, split, needs, columns)
    what = f"{source}, {split}" + (f", {half} half" if half != "both" else "")
    reading = Reading(what, where.said)
    pairs: list[Pair] = []
    seen: set[Pair] = set()
    parsed = map(Parsed.of, rows)
    if where.unsplit:
        parsed = one_side(list(parsed), split, reading)
    for row in parsed:
        if half not in ("both", which_half(row.digest)):
            continue
        reason = row.why_not if row.pair is None else why_unusable(row.pair, needs)
        if not reason and row.pair in seen:
            if split == "test":
                reason = "repeats an earlier row"
            else:
                reading.repeated += 1
        if reason:
            reading.drops[reason] += 1
            continue
        seen.add(row.pair)
        reading.note(row.row, row.pair)
        pairs.append(row.pair)
        if len(pairs) == max_samples:
            break
    if not pairs:
        raise UserError(nothing_to_use(reading, source, split, needs))
    reading.report(len(pairs))
    prompts = len({pair.turns for pair in pairs})
    if split == "test" and prompts < FEW_PROMPTS and len(pairs) != max_samples:
        console.print(f"{what}: only {prompts} prompts, too few for figures that mean much")
    return pairs


def load_pairs(
    source: str,
    split: str,
    max_samples: int | None = None,
    half: str = "both",
    columns: str | None = None,
) -> list[Pair]:
    """`load_rows`, for rows with two answers."""
    return load_rows(source, split, "pair", columns, max_samples, half)


@dataclass(frozen=True)
class Parsed:
    """A row; the pair read from it, or why there is none; and the hash that decides its split."""

    row: dict[str, Any]
    pair: Pair | None
    why_not: str
    digest: bytes

    @staticmethod
    def of(row: dict[str, Any]) -> "Parsed":
        try:
            pair = read_row(row)
        except BadRow as reason:
            return Parsed(row, None, str(reason), row_sha256(row))
        return Parsed(row, pair, "", first_turn_sha256(pair))

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong with the row, whatever a phase needs of it."""
        return self.pair is not None and not flaw_of(self.pair)


def one_side(rows: list[Parsed], split: str, reading: Reading) -> list[Parsed]:
    """Of rows without splits, those of one. Rows with the same first question stay together.

    If the hash holds out none of at least twenty rows, the rows of one question are held out. It is
    the same question in all phases, whatever a phase needs of a row.
    """
    questions = {row.digest for row in rows if row.is_whole}
    held_out = {digest for digest in questions if is_test(digest)}
    if not held_out and len(questions) > 1 and len(rows) >= TEST_SHARE:
        held_out = {min(questions)}
    reading.all_rows = len(rows)
    reading.questions = len(questions)
    return [
        row for row in rows if (row.digest in held_out or is_test(row.digest)) == (split == "test")
    ]


def load_splits(
    source: str,
    needs: Needs,
    columns: str | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
    half: str = "both",
) -> tuple[list[Pair], list[Pair]]:
    """`load_rows` for both splits; `half` applies to the training split only."""
    train = load_rows(source, "train", needs, columns, max_train, half)
    test = load_rows(source, "test", needs, columns, max_test)
    return train, test


def nothing_to_use(reading: Reading, source: str, split: str, needs: Needs) -> str:
    """The error for a split without a usable row."""
    if reading.questions and not reading.drops:
        return (
            f"{source}: none of its {reading.all_rows} rows is in the {split} split; of data "
            f"without splits the test split gets about one first question in {TEST_SHARE}, and "
            f"these have {reading.questions}: give more, or a folder with train.jsonl and "
            "test.jsonl"
        )
    dropped = f": dropped {reasons_of(reading.drops)}" if reading.drops else ""
    where = f"{source} has no usable row in its {split} split ({reading.files})"
    return f"{where}{dropped}; {ACCEPTED[needs]}"


def report_drops(what: str, kept: int, drops: Counter[str], more: str = "") -> None:
    """Print one line: how many rows are used, how many were dropped and why."""
    dropped = f", dropped {reasons_of(drops)}" if drops else ""
    console.print(f"{what}: {kept} rows{dropped}" + (f"; {more}" if more else ""))


def reasons_of(drops: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {plain(reason)}" for reason, count in drops.most_common())
    return f"{drops.total()} ({reasons})"


def shape_of(row: dict[str, Any]) -> str:
    """The columns a row was read from and what they hold, such as "prompt, chosen (text)"."""
    read = [name for name in columns_of(row).values() if row[name] or name in LABELS]
    kinds = dict.fromkeys(
        "text" if isinstance(row[name], str) else "messages" for name in read if name not in LABELS
    )
    return f"{', '.join(read)} ({' and '.join(kinds)})"


def ignored_names(row: dict[str, Any]) -> Iterator[str]:
    """The columns of a row and the keys of its messages that hold something but are not read."""
    read = columns_of(row).values()
    yield from (
        plain(str(name)) for name, cell in row.items() if name not in read and not is_empty(cell)
    )
    for name in read:
        for message in row[name] if isinstance(row[name], list) else [row[name]]:
            for key, value in message.items() if isinstance(message, dict) else ():
                if key not in MESSAGE and not is_empty(value):
                    yield f"{plain(str(key))} of messages"
