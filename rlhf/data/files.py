"""The rows of a file, a folder or a hub data set, under our names of their columns.

A folder (or its folder `data`, as in a clone of a hub data set) has `train.*` or shards `train-*`,
and the same for `test` (or `validation`, `eval`, `val`, `dev`). A file, and data without a test
split, are still to be split. Files are .jsonl, .json, .csv or .parquet; all but the last may be
compressed (.gz, .zst).
"""

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.rows import ANSWERS, COLUMNS, TALKS, BadRow, Needs, columns_of, is_empty
from rlhf.runs.errors import UserError, one_line
from rlhf.runs.terminal import plain

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")
SPLITS = {"train": ("train",), "test": ("test", "validation", "eval", "val", "dev")}
SPLIT_HERE = "there is no test split: divided by first questions"
TRANSCRIPT = re.compile(r"(^|\n)\s*(Human|Assistant):|^\s*\[")  # or messages spelled out as text
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
Rows = Iterable[dict[str, Any]]  # as they are in the file; in JSON they may be something else


@dataclass(frozen=True)
class Source:
    """Where the rows of a split stand."""

    said: str  # in words
    files: Iterable[tuple[str, Rows]]  # name and rows of each
    unsplit: bool = False  # there is no test split: the rows are those of both


def read_rows(
    source: str, split: str, needs: Needs, columns: str | None = None
) -> tuple[Source, Iterator[dict[str, Any]]]:
    """Where a split stands, and its rows, under our names of the columns.

    Args:
        needs: what the first row must have columns for.
        columns: the data's own names of columns, as in `prompt=question,chosen=good`.
    Raises:
        UserError: no such source, a file that cannot be read, a missing column.
    """
    names = parse_columns(columns)
    opened = open_source(source, split)
    rows = (row for where, rows in opened.files for row in checked_rows(rows, where, needs, names))
    return opened, rows


def open_source(source: str, split: str) -> Source:
    path = Path(source)
    if not source:
        raise UserError("--dataset '': name a hub id, a folder or a file")
    if path.is_dir():
        unsplit = not files_like(path, "test")
        files, others = split_files(path, "train" if unsplit else split)
        said = ", ".join(str(file.relative_to(path)) for file in files[:3])
        said += f" and {len(files) - 3} more" if len(files) > 3 else ""
        said += f" (not {', '.join(file.name for file in others)})" if others else ""
        said += f" ({SPLIT_HERE})" if unsplit else ""
        return Source(said, ((str(file), read_file(file)) for file in files), unsplit)
    if path.is_file():
        return Source(path.name, [(str(path), read_file(path))], unsplit=True)
    if kind_of(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(
            f"--dataset {source}: there is no such file or folder, and it is not a hub id "
            "(owner/name)"
        )
    return read_hub(source, split)


def facts_of_source(source: str, columns: str | None) -> dict[str, Any]:
    """What run.json says of where the rows came from.

    `local` is kept because a path may look like a hub id, and mean nothing in another folder.
    """
    return {"source": source, "columns": columns, "local": Path(source).exists()}


def has_rows(path: Path) -> bool:
    """Whether a file holds rows rather than plain text, by its name."""
    return kind_of(path) is not None


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read a file, without that of a compression; None: unknown."""
    outer = suffix_of(path)
    suffix = suffix_of(Path(path.stem)) if outer in COMPRESSED else outer
    return suffix if suffix in SUFFIXES and not (suffix == ".parquet" != outer) else None


def suffix_of(path: Path) -> str:
    """A file's suffix in lower case, as some systems write .JSONL."""
    return path.suffix.lower()


def split_files(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    """The files of a split, in order, and others with similar names, which are not read.

    Raises:
        UserError: there are none, or several kinds (rows would be read twice), or a shard is
            missing.
    """
    near = files_like(folder, split)
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


def files_like(folder: Path, split: str) -> list[Path]:
    """The files with rows whose names begin like the split's."""
    return [
        file
        for name in SPLITS[split]
        for place in (folder, folder / "data")
        for file in sorted(place.glob(f"{name}*"))
        if kind_of(file) and file.is_file()
    ]


def check_one_kind(folder: Path, split: str, files: list[Path]) -> None:
    """Raise UserError unless the files are a single one, or all shards of one data set."""
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
    """The rows under our names of the columns. Raises UserError as `read_rows` says.

    Args:
        names: the data's own name of each column, by ours.
    """
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"{where}, row {number + 1}: not an object with columns; {ACCEPTED[needs]}"
            )
        if number == 0:
            check_columns(row, where, needs, names)
        row = renamed(row, names)
        check_used(row, f"{where}, row {number + 1}", names)
        yield row


def renamed(row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    if not names:
        return row
    others = {name: cell for name, cell in row.items() if name not in names.values()}
    return others | {ours: row.get(theirs) for ours, theirs in names.items()}


def parse_columns(columns: str | None) -> dict[str, str]:
    """Parse `prompt=question,chosen=good` into the data's own name of each column, by ours.

    Raises:
        UserError: it is malformed, or names an unknown column, or one of them twice.
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
    """Raise UserError if the first row of a file lacks a column that was named or is needed."""
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


def check_used(row: dict[str, Any], where: str, names: dict[str, str]) -> None:
    """Raise UserError if a cell that `names` names would not be read, as another one goes first.

    Args:
        row: under our names of the columns.
    """
    read = ()
    if names:
        with contextlib.suppress(BadRow):  # such a row is dropped and counted
            read = columns_of(row).values()
    for ours, theirs in names.items() if read else ():
        if ours not in read and not is_empty(row[ours]):
            raise UserError(
                f"--columns {ours}={theirs}: {where} is read from {', '.join(read)}, and "
                f"'{ours}' would be ignored: give '{theirs}' one of those names, or leave it out"
            )


def missing_column(row: dict[str, Any], needs: Needs) -> str | None:
    """Our name of a column that is needed and missing; None if there is none."""
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
                    yield json.loads(line, object_pairs_hook=no_key_twice)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{path}, line {number} is not JSON ({error}): fix or remove that line"
                    ) from None


def read_json(path: Path) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        text = file.read()
    try:
        rows = json.loads(text, object_pairs_hook=no_key_twice)
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


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it has a key twice, as one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"more than one '{plain(twice)}' in an object")
    return found


def one_of_each(names: list[str], path: Path) -> None:
    """Raise UserError if a table has two columns of one name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} has more than one column '{plain(twice[0])}': keep one")


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 24)
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames or []
            one_of_each(names, path)
            for row in reader:
                if list(row.values()) == names:
                    raise UserError(
                        f"{path}, line {reader.line_num} repeats the header, as if two files were "
                        "joined: remove that line"
                    )
                yield row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.reader.line_num}: {error}") from None


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            one_of_each(file.schema_arrow.names, path)
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error})") from None


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


class open_text:
    """Like `open`, for UTF-8 text, compressed or not.

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
    if suffix_of(path) == ".gz":
        return gzip.GzipFile(fileobj=file)
    if suffix_of(path) == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return file


# ---------------------------------------------------------------- the hub


def read_hub(name: str, split: str) -> Source:
    import datasets

    from rlhf.runs.hub import hub_errors

    with hub_errors(name, "data set", "--dataset"):
        available = datasets.get_dataset_split_names(name)
        unsplit = not any(other.startswith(SPLITS["test"]) for other in available)
        needed = "train" if unsplit else split
        wanted = next((name for name in SPLITS[needed] if name in available), None)
        if wanted is None:
            raise UserError(
                f"data set {name} has no {needed} split (it has {', '.join(available)})"
            )
        rows = datasets.load_dataset(name, split=wanted)
    said = f"split {wanted}" + (f" ({SPLIT_HERE})" if unsplit else "")
    return Source(said, [(f"data set {name}, {wanted}", rows)], unsplit)
