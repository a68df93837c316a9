"""Runs that can be stopped, or cut short, and go on to the very result that they would have had.

A state is a folder `step-N` in the run's output folder: tensors in safetensors (the SFT and reward scripts keep their
Trainer's optimizer and random numbers in its own files, read with `weights_only`), all else in JSON. It is written
beside its place, flushed to the disk and renamed, and counts only if each of its files has the hash that its manifest,
written last, names.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.runs.checkpoints import LOGGING, sha256, sync
from rlhf.runs.cli import Stopped
from rlhf.engine.micro_batches import MicroBatchSize
from rlhf.runs.processes import agree, is_main, num_processes, wait
from rlhf.runs.reporting import console

from accelerate.utils import gather_object

MANIFEST = "manifest.json"
HARMLESS = (
    LOGGING
    | {  # may change on the way: places, as what is there is hashed, how long it goes on, what it keeps
        *(
            "base_model",
            "revision",
            "dataset",
            "extra_data",
            "sft_checkpoint",
            "reward_checkpoint",
            "gold_checkpoint",
        ),
        *(
            "max_steps",
            "num_train_epochs",
            "total_episodes",
            "gradient_checkpointing",
            "micro_batch_tokens",
        ),
        *("rollout_batch_size", "rollout_weights", "cuda_graphs"),
    }
)
MAX_FACTS = 1 << 26  # bytes of facts.json; a thousand held-out responses have about a million

_asked: list[int] = []  # signals that came


@contextmanager
def stop_when_asked() -> Iterator[None]:
    """Within it the first SIGINT or SIGTERM is noted, for `check_stop`; a second one ends the process at once."""

    def ask(number: int, _frame: Any) -> None:
        if _asked:
            os._exit(128 + number)
        _asked.append(number)
        print(
            "\nStopping as soon as it can go on from there; once more to stop at once.",
            file=sys.stderr,
            flush=True,
        )

    _asked.clear()
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop() -> int:
    """The number of the signal that asked the run to end, at whichever process; 0 for none. All processes call it."""
    return after_step(False, 0)[0]


class SaveClock:
    """Says after each step whether a state is due: every `save_steps` of them, or without that every `save_minutes`."""

    def __init__(self, save_minutes: float, save_steps: int | None):
        self.seconds, self.steps, self.last = 60 * save_minutes, save_steps, time.monotonic()

    def due(self, step: int) -> bool:
        if self.steps:
            return step % self.steps == 0
        return time.monotonic() - self.last >= self.seconds

    def saved(self) -> None:
        """Begin to count anew."""
        self.last = time.monotonic()


def after_step(due: bool, tokens: int) -> tuple[int, bool, int]:
    """What the processes settle after each step, in one message. All processes call it.

    Args:
        due: whether this process finds that a state is due: the main one decides.
        tokens: of this process's micro-batches.
    Returns:
        the signal that asked the run to end, at whichever process, or 0; whether to save; the least tokens.
    """
    number = _asked[0] if _asked else 0
    if num_processes() == 1:
        return number, due, tokens
    signals, dues, sizes = zip(*gather_object([(number, due, tokens)]), strict=True)
    return max(signals), dues[0], min(sizes)


def keep_tokens(config: Any, micro_batch: MicroBatchSize, facts: dict[str, Any]) -> None:
    """Go on with micro-batches of the size that the state's `facts` name, unless the flag names another."""
    before = facts["micro_batch_tokens"]
    if config.micro_batch_tokens == "auto":
        micro_batch.tokens = before
    elif micro_batch.tokens != before:
        console.print(
            f"A micro-batch has {micro_batch.tokens:,} tokens from now on, not {before:,}."
        )


def check_stop(together: bool = False) -> None:
    """Raise Stopped if a signal has asked the run to end.

    Several processes must end at the same place: there only the calls count that all make, those with `together`.
    """
    if together or num_processes() == 1:
        number = asked_to_stop()
        if number:
            raise Stopped(number)


@contextmanager
def new_state(folder: Path, step: int, facts: dict[str, Any], keep: int) -> Iterator[Path]:
    """Yield a folder to write a state to; then it becomes `folder`/step-`step`, and all but the newest `keep` states go.

    All processes come here, and may write to it.

    Args:
        facts: what JSON can hold; finite numbers only.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    wait()
    yield partial
    wait()
    if is_main():
        finish_state(partial, final, facts, keep)
    wait()


def finish_state(partial: Path, final: Path, facts: dict[str, Any], keep: int) -> None:
    (partial / "facts.json").write_text(json.dumps(facts, allow_nan=False), encoding="utf-8")
    hashes = {path.name: sha256(path) for path in files(partial)}
    (partial / MANIFEST).write_text(json.dumps(hashes), encoding="utf-8")
    sync(partial)
    partial.rename(final)
    sync(final.parent, deep=False)
    for old in states(final.parent)[keep:]:
        gone = old.with_suffix(".partial")
        old.rename(gone)
        shutil.rmtree(gone)


def files(state: Path) -> list[Path]:
    return sorted(path for path in state.iterdir() if path.name != MANIFEST)


def states(folder: Path) -> list[Path]:
    """The states in a run's folder, whole or not, the newest first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix == ""), reverse=True)


def newest_state(folder: Path) -> Path | None:
    """The newest whole state in `folder`. Damaged ones are named and put aside; what a crash left half-written goes."""
    return agree(look_for_state(folder) if is_main() else None)


def look_for_state(folder: Path) -> Path | None:
    for path in folder.glob("step-*.partial"):
        shutil.rmtree(path)
    for path in states(folder):
        try:
            hashes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            found = {file.name: sha256(file) for file in files(path)}
            odd = sorted(name for name in {*hashes, *found} if hashes.get(name) != found.get(name))
            if not odd and (path / "facts.json").stat().st_size <= MAX_FACTS:
                return path
            why = (
                f"{odd[0]} is not the file that its manifest names"
                if odd
                else "its facts.json is too large"
            )
        except (OSError, ValueError, AttributeError, TypeError) as error:
            why = str(error)
        aside = path.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        console.print(
            f"warning: {path} is damaged ({why}); it is skipped, and kept as {aside.name}"
        )
    return None


def read_facts(state: Path) -> dict[str, Any]:
    return json.loads((state / "facts.json").read_text(encoding="utf-8"))
