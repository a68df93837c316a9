"""People's votes on pairs of answers: a file with one JSON object a line, in rm-static's columns.

A vote for A or B is a preference pair (`prompt`, `response`, `chosen`, `rejected`). It comes with
`vote`, `ballot`, `voter` and `time`, and for each position with the `answers` shown, the `models`
that gave them and the reward model's `scores`; `checkpoints` tells one model of a name from
another. For "tie" and "both bad", `response`, `chosen` and `rejected` are null. A line
`{"undo": ballot, ...}` takes a vote back. Nothing is ever rewritten.
"""

import contextlib
import datetime
import fcntl
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.files import open_text
from rlhf.data.rows import BadRow, Pair, parse_row
from rlhf.data.splits import first_turn_sha256
from rlhf.runs.errors import UserError
from rlhf.runs.statistics import wilson_interval
from rlhf.runs.terminal import console, plain

CHOICES = ("A", "B", "tie", "both bad")
JUDGE = "judge"  # what gave the scores, among a vote's checkpoints
HELD_OUT = 5  # one prompt in this many is not trained on


@dataclass(frozen=True)
class Vote:
    ballot: str  # names one showing of two answers; it has at most one vote
    voter: str
    choice: str  # one of CHOICES
    prompt: str  # "\n\nHuman: ...\n\nAssistant:"
    answers: dict[str, str]  # by position, "A" and "B"
    models: dict[str, str]  # by position
    scores: dict[str, float] | None = None  # by position, if there was a reward model
    # hashes of what stood behind the report's names of models and behind JUDGE
    checkpoints: dict[str, str] | None = None

    def pair(self) -> dict[str, str | None]:
        """The vote in rm-static's columns."""
        chosen, rejected = (
            self.answers.get(side) for side in (self.choice, {"A": "B", "B": "A"}.get(self.choice))
        )
        return {"prompt": self.prompt, "response": chosen, "chosen": chosen, "rejected": rejected}

    def row(self) -> dict[str, Any]:
        """The vote as a line of the file, with the current time."""
        said = {"vote": self.choice, "ballot": self.ballot, "voter": self.voter, "time": now()}
        return (
            self.pair()
            | said
            | {"answers": self.answers, "models": self.models, "scores": self.scores}
            | {"checkpoints": self.checkpoints}
        )


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


# ---------------------------------------------------------------- the file


def read_votes(path: Path) -> tuple[dict[str, Vote], int]:
    """The votes that stand, by ballot, the latest last; and how many were taken back.

    Raises:
        UserError: the file cannot be read, or a line is no vote. The error names the line.
    """
    votes: dict[str, Vote] = {}
    undone = 0
    with open_text(path) as file:
        lines = file.read().split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "undo" in row:
                del votes[row["undo"]]
                undone += 1
            else:
                vote = parse_vote(row)
                if votes.setdefault(vote.ballot, vote) is not vote:
                    raise ValueError("a ballot that has a vote")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is no vote ({type(error).__name__}: {error}): fix or "
                "remove that line"
            ) from None
    return votes, undone


def parse_vote(row: dict[str, Any]) -> Vote:
    """Read the object of a line. Raises ValueError, TypeError or KeyError if it is no vote."""
    names = ("ballot", "voter", "vote", "prompt", "answers", "models")
    if not isinstance(row, dict):
        raise TypeError("it is not an object")
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    vote = Vote(*(row[name] for name in names), row.get("scores"), row.get("checkpoints"))
    texts = [vote.ballot, vote.voter, vote.prompt, *vote.answers.values(), *vote.models.values()]
    texts += (vote.checkpoints or {}).values()
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a field that is not text")
    if vote.choice not in CHOICES:
        raise ValueError(f"vote is none of {', '.join(CHOICES)}")
    for sides in (vote.answers, vote.models, vote.scores or vote.models):
        if set(sides) != {"A", "B"}:
            raise ValueError("sides other than A and B")
    if vote.scores and not all(
        isinstance(s, int | float) and math.isfinite(s) for s in vote.scores.values()
    ):
        raise ValueError("a score that is not a number")
    if vote.choice in vote.answers and row["chosen"] != vote.answers[vote.choice]:
        raise ValueError("chosen is not the answer that the vote is for")
    return vote


class VoteFile:
    """A file of votes that one process appends to, from any thread. A vote counts once on disk.

    Opening it locks the file for the life of the process. It also cuts off a last line that was
    left unfinished, as that vote was never acknowledged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+b", buffering=0)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"votes at {path} are being written by another server: stop it, or name other "
                "--votes"
            ) from None
        except OSError as error:
            raise UserError(
                f"votes cannot be written to {path} ({error.strerror}): name other --votes"
            ) from None
        self.repair()
        self.votes, self.undone = read_votes(path)

    def repair(self) -> None:
        self.file.seek(0)
        whole, newline, rest = self.file.read().rpartition(b"\n")
        if not rest:
            return
        try:
            json.loads(rest)
            self.append(b"\n")  # which an editor left out
        except ValueError:
            self.file.truncate(len(whole) + len(newline))
            console.print(f"{self.path}: cut off an unfinished last line of {len(rest)} bytes.")

    def append(self, line: bytes) -> None:
        """Write and sync `line`, or nothing at all."""
        end = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(line) < len(line):
                raise OSError("the disk is full")
            os.fsync(self.file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self.file.truncate(end)
            raise

    def write(self, row: dict[str, Any]) -> None:
        self.append((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))

    def add(self, vote: Vote) -> None:
        """Keep a vote. A ballot keeps its first vote, so repeating after a lost reply is safe."""
        with self.lock:
            if vote.ballot not in self.votes:
                self.write(vote.row())
                self.votes[vote.ballot] = vote

    def undo(self, ballot: str, voter: str) -> None:
        """Take back a voter's vote, if it stands."""
        with self.lock:
            if ballot in self.votes and self.votes[ballot].voter == voter:
                self.write({"undo": ballot, "voter": voter, "time": now()})
                del self.votes[ballot]
                self.undone += 1

    def standing(self) -> list[Vote]:
        """The votes that count now, the latest last."""
        with self.lock:
            return list(self.votes.values())


# ---------------------------------------------------------------- results


def win_rates(votes: Iterable[Vote]) -> list[dict[str, Any]]:
    """For each pair of models, how often people preferred the first, with a 95 % interval.

    "tie" and "both bad" count half. Votes on the same prompt are taken as independent.
    """
    points: dict[tuple[str, str], list[float]] = {}
    for vote in votes:
        first, second = sorted(vote.models.values())
        if first != second:
            won = vote.models.get(vote.choice)
            points.setdefault((first, second), []).append(
                0.5 if won is None else float(won == first)
            )
    rows = []
    for (first, second), wins in sorted(points.items()):
        low, high = wilson_interval(sum(wins), len(wins))
        rate = {"win_rate": sum(wins) / len(wins), "win_rate_low": low, "win_rate_high": high}
        rows.append({"first": first, "second": second, "votes": len(wins)} | rate)
    return rows


def agreement(votes: Iterable[Vote]) -> dict[str, float] | None:
    """How often the reward model agrees with a vote for A or B; None without such votes."""
    right = [
        0.5
        if v.scores["A"] == v.scores["B"]
        else float((v.scores["A"] > v.scores["B"]) == (v.choice == "A"))
        for v in votes
        if v.scores and v.choice in v.scores
    ]
    if not right:
        return None
    low, high = wilson_interval(sum(right), len(right))
    return {
        "votes": len(right),
        "agreement": sum(right) / len(right),
        "agreement_low": low,
        "agreement_high": high,
    }


# ---------------------------------------------------------------- as preference data


@dataclass(frozen=True)
class VotePairs:
    train: list[Pair]
    held_out: list[Pair]  # on one prompt in HELD_OUT, the same ones every time
    counts: dict[str, int]  # of everything that was read


def load_votes(path: str) -> VotePairs:
    """The pairs in a file of votes. "tie" and "both bad" teach nothing and are only counted.

    Raises:
        UserError: no such file, a line that is no vote, or nothing to learn from.
    """
    votes, undone = read_votes(Path(path))
    train = []
    held_out = []
    drops = Counter()
    for vote in votes.values():
        if vote.choice not in vote.answers:
            continue
        try:
            pair = parse_row(vote.pair())
        except BadRow as reason:
            drops[str(reason)] += 1
            continue
        (held_out if first_turn_sha256(pair)[2] % HELD_OUT == 0 else train).append(pair)
    said = Counter(vote.choice for vote in votes.values())
    counts = {
        "votes": len(votes),
        "ties": said["tie"],
        "both_bad": said["both bad"],
        "undone": undone,
    }
    counts |= {"unusable": drops.total(), "train": len(train), "held_out": len(held_out)}
    reasons = ", ".join(f"{count} {plain(reason)}" for reason, count in drops.most_common())
    console.print(
        f"{path}: {len(votes)} votes, {len(train)} to train on, {len(held_out)} held out; not "
        f"used: {said['tie']} ties, "
        f"{said['both bad']} both bad" + (f", {reasons}" if drops else "")
    )
    if not train and not held_out:
        raise UserError(f"--extra-data {path}: no vote there prefers one answer to another")
    return VotePairs(train, held_out, counts)
