"""Where rows come from, which of them make a split, and what is said of those that do not.

A source is a hub id, one file, or a folder (or its folder `data`, as in a clone of a hub data set)
with `train.*` or shards `train-*`, and the same for `test` (or `validation`, or `eval`). Files are
.jsonl, .json, .csv or .parquet; all but the last may be compressed (.gz, .zst).
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.rows import (
    ANSWERS,
    COLUMNS,
    LABELS,
    LATER_LINE_STARTS_WITH_CUE,
    TALKS,
    TEST_SHARE,
    BadRow,
    Needs,
    Pair,
    columns_of,
    first_turn_sha256,
    flaw_of,
    is_test,
    read_row,
    row_sha256,
    which_half,
    why_unusable,
)
from rlhf.runs.errors import UserError, one_line
from rlhf.runs.terminal import console, plain

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")
SPLITS = {"train": ("train",), "test": ("test", "validation", "eval")}
FEW_PROMPTS = 20  # with fewer in a test split its figures are mostly chance
TRANSCRIPT = re.compile(r"(^|\n)\s*(Human|Assistant):|^\s*\[")  # or messages that became text
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
ACCEPTED = {  # by what is needed
    "pair": "accepted are the columns prompt, chosen, rejected (text or message lists), "
    "or chosen and rejected transcripts that start with '\\n\\nHuman:'",
    "answer": "accepted are prompt with chosen, completion or response (text or message lists), "
    "instruction, input and output, messages or conversations, and transcripts in chosen",
    "prompt": "accepted are prompt (text or a message list), instruction and input, "
    "messages or conversations, with or without answers, and transcripts in chosen",
}
WANTED = {
    "pair": "a reward model learns from two answers to a prompt, chosen and rejected",
    "answer": "SFT learns from a prompt with its answer",
    "prompt": "there has to be a prompt",
}
Rows = Iterable[dict[str, Any]]  # as a file has them; JSON may hold something else
MESSAGE = ("role", "content", "from", "value")  # keys that are read
MARKUP = re.compile(  # of other formats, and cues that stand where they are no cues
    r"<\|\w+\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>"
    r"|^[ \t]*(?:#+ ?)?(?:Human|User|Assistant|Instruction|Response|System):",
    re.MULTILINE,
)


# ---------------------------------------------------------------- the pairs of a split


@dataclass
class Reading:
    """What was found while the rows of a split were read, for the one line that says so."""

    what: str
    files: str
    drops: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    # columns and message keys, in their order
    ignored: dict[str, None] = field(default_factory=dict)
    markup: Counter[str] = field(default_factory=Counter)
    all_rows: int = 0  # of a file that is split by its first questions
    questions: int = 0  # how many different ones

    def note(self, row: dict[str, Any], pair: Pair) -> None:
        """Count a row that is used."""
        self.shapes[shape_of(row)] += 1
        self.ignored |= dict.fromkeys(ignored_names(row))
        answers = [answer for answer in (pair.chosen, pair.rejected) if answer is not None]
        texts = [*(text for _, text in pair.turns), *answers]
        if pair.rejected is not None:  # that it runs on may be why
            texts[-1] = LATER_LINE_STARTS_WITH_CUE.split(pair.rejected)[0]
        found = {match.strip() for text in texts for match in MARKUP.findall(text)}
        question = pair.turns[-1][1]
        if len(question) > 9 and answers and all(text.startswith(question) for text in answers):
            found.add("answers that repeat the question")
        self.markup.update(found)

    def report(self, kept: int) -> None:
        said = [f"read {self.files}"]
        if self.shapes:
            said[0] += " as " + " or ".join(self.shapes)
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

    One file without splits gives about one first question in twenty, chosen by a hash of its text,
    to the test split. With `half` "first" or "second" only the rows of that half. Bad rows are
    dropped; one line on the terminal says what was read, how many rows were dropped and why, and
    what was ignored.

    Args:
        needs: what makes a row usable: its prompt, an answer to it, or two.
        columns: the data's own names of columns, as in `prompt=question,chosen=good`.

    Raises:
        UserError: no such source, a file that cannot be read, a missing column, no usable row.
    """
    files, rows = read_rows(source, split, needs, columns)
    what = f"{source}, {split}" + (f", {half} half" if half != "both" else "")
    reading = Reading(what, files)
    pairs: list[Pair] = []
    parsed = map(Parsed.of, rows)
    if Path(source).is_file():
        parsed = one_side(list(parsed), split, reading)
    for row in parsed:
        if half not in ("both", which_half(row.digest)):
            continue
        reason = row.why_not if row.pair is None else why_unusable(row.pair, needs)
        if reason:
            reading.drops[reason] += 1
            continue
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
    """`load_rows` of those that have two answers."""
    return load_rows(source, split, "pair", columns, max_samples, half)


@dataclass(frozen=True)
class Parsed:
    """A row, what is read of it or why nothing is, and what decides on its split and half."""

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
        """Whether nothing is wrong with what the row has, whatever a phase needs of it."""
        return self.pair is not None and not flaw_of(self.pair)


def one_side(rows: list[Parsed], split: str, reading: Reading) -> list[Parsed]:
    """The rows of one file that are of a split: all that start with one question are in the same.

    Where the hash holds out none of at least twenty rows, those of one question are held out: the
    same one for all phases, so what a phase needs has no say in it.
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
    """`load_rows` of both splits, with a warning if prompts stand in both.

    `half` is of the training split only.
    """
    train = load_rows(source, "train", needs, columns, max_train, half)
    test = load_rows(source, "test", needs, columns, max_test)
    report_overlap(train, test)
    return train, test


def report_overlap(train: Iterable[Pair], test: Iterable[Pair]) -> None:
    """Warn of prompts of the test split that are also trained on."""
    seen = {pair.turns for pair in train}
    prompts = dict.fromkeys(pair.turns for pair in test)
    both = [turns for turns in prompts if turns in seen]
    if both:
        first = plain(" ".join(both[0][-1][1].split()))
        first = first if len(first) <= 60 else first[:57] + "..."
        console.print(
            f"warning: {len(both)} of {len(prompts)} test prompts are also in the train split, "
            f'so its figures are too good (the first: "{first}")'
        )


def nothing_to_use(reading: Reading, source: str, split: str, needs: Needs) -> str:
    """The error for a split without a usable row."""
    if reading.questions and not reading.drops:
        return (
            f"{source}: none of its {reading.all_rows} rows is in the {split} split; of one file "
            f"the test split gets about one first question in {TEST_SHARE}, and it has "
            f"{reading.questions}: give more, or a folder with train.jsonl and test.jsonl"
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
    """Which columns a row was read from, and what they hold: "prompt, chosen, rejected (text)"."""
    read = [name for name in columns_of(row).values() if row[name]]
    kinds = dict.fromkeys(
        "text" if isinstance(row[name], str) else "messages" for name in read if name not in LABELS
    )
    return f"{', '.join(read)} ({' and '.join(kinds)})"


def ignored_names(row: dict[str, Any]) -> Iterator[str]:
    """The columns of a row, and the keys of its messages, that hold something and are not read."""
    read = columns_of(row).values()
    yield from (
        plain(str(name))
        for name, cell in row.items()
        if name not in read and cell not in (None, "", [])
    )
    for name in read:
        for message in row[name] if isinstance(row[name], list) else [row[name]]:
            for key, value in message.items() if isinstance(message, dict) else ():
                if key not in MESSAGE and value not in (None, "", []):
                    yield f"{plain(str(key))} of messages"


# ---------------------------------------------------------------- sources


def read_rows(
    source: str, split: str, needs: Needs, columns: str | None = None
) -> tuple[str, Iterator[dict[str, Any]]]:
    """What a split is read from, in words, and its rows, under our names of the columns.

    Raises:
        UserError: as `load_rows` does.
    """
    names = parse_columns(columns)
    said, files = open_source(source, split)
    return said, (row for where, rows in files for row in checked_rows(rows, where, needs, names))


def open_source(source: str, split: str) -> tuple[str, Iterable[tuple[str, Rows]]]:
    """What a split is read from, in words, and each file of it: what it is called, and its rows."""
    path = Path(source)
    if not source:
        raise UserError("--dataset '': name a hub id, a folder or a file")
    if path.is_dir():
        files, others = split_files(path, split)
        said = ", ".join(str(file.relative_to(path)) for file in files[:3])
        said += f" and {len(files) - 3} more" if len(files) > 3 else ""
        said += f" (not {', '.join(file.name for file in others)})" if others else ""
        return said, ((str(file), read_file(file)) for file in files)
    if path.is_file():
        return path.name, [(str(path), read_file(path))]
    if kind_of(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(
            f"--dataset {source}: there is no such file or folder, and it is not a hub id "
            "(owner/name)"
        )
    return read_hub(source, split)


def has_rows(path: Path) -> bool:
    """Whether a file's name says that it holds rows, and not plain text."""
    return kind_of(path) is not None


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, without that of its compression, or None."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return suffix if suffix in SUFFIXES and not (suffix == ".parquet" != path.suffix) else None


def split_files(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    """The files of a split, in order, and those whose names only begin like theirs.

    Raises:
        UserError: none; more than one kind, so that rows would be read twice; a missing shard.
    """
    near = [
        file
        for name in SPLITS[split]
        for place in (folder, folder / "data")
        for file in sorted(place.glob(f"{name}*"))
        if kind_of(file) and file.is_file()
    ]
    for name in SPLITS[split]:
        files = [file for file in near if re.match(rf"{name}[.-]", file.name)]
        if files:
            check_one_kind(folder, split, files)
            return files, [file for file in near if re.match(rf"{name}[^.-]", file.name)]
    beside = f"; it has {', '.join(file.name for file in near)}: give one of them" if near else ""
    raise UserError(
        f"--dataset {folder}: this folder has no {SPLITS[split][0]} file ({SPLITS[split][0]}.* or "
        f"{SPLITS[split][0]}-*, of {', '.join(SUFFIXES)}){beside}"
    )


def check_one_kind(folder: Path, split: str, files: list[Path]) -> None:
    """Raise UserError unless it is one file, or all the shards of one data set."""
    shards = [SHARD.search(file.name) for file in files]
    kinds = {
        (file.parent, file.name.partition(".")[2], "-" in file.name, shard and shard[2])
        for file, shard in zip(files, shards, strict=True)
    }
    if len(kinds) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:6])
        raise UserError(
            f"--dataset {folder}: each of {names} could be the {split} split: "
            "keep one of them there, or one set of shards"
        )
    if shards[0] and len(files) != int(shards[0][2]):
        raise UserError(
            f"--dataset {folder}: {len(files)} of {int(shards[0][2])} shards are there, the first "
            f"{files[0].name}: download it again"
        )


def read_file(path: Path) -> Rows:
    kind = kind_of(path)
    if kind is None:
        raise UserError(
            f"{path} is not one of {', '.join(SUFFIXES)} (all but the last also as "
            f"{' or '.join(COMPRESSED)})"
        )
    return READERS[kind](path)


def checked_rows(rows: Rows, where: str, needs: Needs, names: dict[str, str]) -> Iterator[dict]:
    """The rows under our names of the columns: objects, of which the first has what is needed.

    Args:
        names: the data's own name of a column, by ours.
    """
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"{where}, row {number + 1}: not an object with columns; {ACCEPTED[needs]}"
            )
        if number == 0:
            check_columns(row, where, needs, names)
        yield renamed(row, names)


def renamed(row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    if not names:
        return row
    others = {name: cell for name, cell in row.items() if name not in names.values()}
    return others | {ours: row.get(theirs) for ours, theirs in names.items()}


def parse_columns(columns: str | None) -> dict[str, str]:
    """`prompt=question,chosen=good`: the data's own name of a column, by ours.

    Raises:
        UserError: it is malformed, or names a column that is not read, or one twice.
    """
    names: dict[str, str] = {}
    for part in columns.split(",") if columns else ():
        ours, equals, theirs = (text.strip() for text in part.partition("="))
        if not (ours and equals and theirs):
            raise UserError(
                f"--columns '{columns}': write NAME=COLUMN, with commas between, "
                "as in prompt=question,chosen=good"
            )
        if ours not in COLUMNS:
            raise UserError(
                f"--columns {part}: '{ours}' is none of the names that are read "
                f"({', '.join(COLUMNS)})"
            )
        if ours in names:
            raise UserError(f"--columns '{columns}' names '{ours}' twice: keep one")
        names[ours] = theirs
    return names


def check_columns(row: dict[str, Any], where: str, needs: Needs, names: dict[str, str]) -> None:
    """Raise UserError if a file, by its first row, lacks a column that was named or is needed."""
    has = f"it has {plain(', '.join(map(str, row)))}"
    for ours, theirs in names.items():
        if theirs not in row:
            raise UserError(f"--columns {ours}={theirs}: {where} has no column '{theirs}' ({has})")
    missing = missing_column(renamed(row, names), needs)
    if missing:
        raise UserError(
            f"{where} has no column '{missing}' ({has}): {WANTED[needs]}; {ACCEPTED[needs]}; "
            f"--columns {missing}=NAME reads it from column NAME"
        )


def missing_column(row: dict[str, Any], needs: Needs) -> str | None:
    """Our name of a column that has to be there and is not."""
    answer = next((row[name] for name in ANSWERS if name in row), "")
    talk = any(name in row for name in TALKS)
    if needs != "prompt" and not talk and not any(name in row for name in ANSWERS):
        return "chosen"
    if needs == "pair" and "rejected" not in row:
        return "rejected"
    asks = talk or "prompt" in row or "instruction" in row
    if not asks and isinstance(answer, str) and not TRANSCRIPT.search(answer):
        return "prompt"
    return None


# ---------------------------------------------------------------- files


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{path}, line {number} is not JSON ({error}): mend or remove that line"
                    ) from None


def read_json(path: Path) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        text = file.read()
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            raise UserError(
                f"{path} holds more than one object: if it has one a line, call it .jsonl"
            ) from None
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(rows, list):
        raise UserError(
            f"{path} must hold a list of rows; one object a line belongs in a .jsonl file"
        )
    yield from rows


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 24)
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
            if twice:
                raise UserError(f"{path} has more than one column '{plain(twice[0])}': keep one")
            yield from reader
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.reader.line_num}: {error}") from None


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error})") from None


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


class open_text:
    """`open` for UTF-8 text, also of a compressed file.

    Raises:
        UserError: the file cannot be opened, is damaged or cut off, or is not UTF-8.
    """

    def __init__(self, path: Path, newline: str | None = None):
        self.path = path
        try:
            self.file = io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None

    def __enter__(self):
        return self.file

    def __exit__(self, kind, error, trace):
        self.file.close()
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{self.path} is not UTF-8 text ({error}): save it as UTF-8") from None
        if isinstance(error, OSError | EOFError | zlib.error):
            raise UserError(f"{self.path} is damaged or cut off ({one_line(error)})") from None


def open_bytes(path: Path) -> io.BufferedIOBase:
    file = path.open("rb")
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if path.suffix == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return file


# ---------------------------------------------------------------- the hub


def read_hub(name: str, split: str) -> tuple[str, list[tuple[str, Rows]]]:
    import datasets

    from rlhf.runs.hub import hub_errors

    with hub_errors(name, "data set", "--dataset"):
        available = datasets.get_dataset_split_names(name)
        wanted = next((s for s in SPLITS[split] if s in available), None)
        if wanted is None:
            raise UserError(f"data set {name} has no {split} split (it has {', '.join(available)})")
        rows = datasets.load_dataset(name, split=wanted)
    return f"split {wanted}", [(f"data set {name}, {wanted}", rows)]
