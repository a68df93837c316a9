"""Runs that are stopped or cut short, and resume to the very result they would have had.

A state is a folder `step-N` in the run's output folder: tensors in safetensors (the SFT and reward
scripts keep their Trainer's optimizer and random numbers in its own files, read with
`weights_only`), all else in JSON. It is written beside its place, flushed to the disk and renamed,
and counts only if each of its files has the hash that its manifest, written last, names.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.runs.checkpoints import LOGGING, sha256
from rlhf.runs.folders import sync
from rlhf.runs.processes import agree, is_main, wait
from rlhf.runs.terminal import console

MANIFEST = "manifest.json"
# What may change on the way: places, as their contents are hashed; the length of the run; what it
# keeps in memory.
HARMLESS = LOGGING | {
    "base_model",
    "revision",
    "dataset",
    "extra_data",
    "sft_checkpoint",
    "reward_checkpoint",
    "gold_checkpoint",
    "max_steps",
    "num_train_epochs",
    "total_episodes",
    "gradient_checkpointing",
    "micro_batch_tokens",
    "rollout_batch_size",
    "rollout_weights",
    "cuda_graphs",
}
MAX_FACTS = 1 << 26  # bytes of facts.json; a thousand held-out responses have about a million


class SaveClock:
    """Says whether a state is due: every `save_steps` steps, or else every `save_minutes`."""

    def __init__(self, save_minutes: float, save_steps: int | None):
        self.seconds = 60 * save_minutes
        self.steps = save_steps
        self.last = time.monotonic()

    def due(self, step: int) -> bool:
        if self.steps:
            return step % self.steps == 0
        return time.monotonic() - self.last >= self.seconds

    def saved(self) -> None:
        """Start counting again."""
        self.last = time.monotonic()


@contextmanager
def new_state(folder: Path, step: int, facts: dict[str, Any], keep: int) -> Iterator[Path]:
    """Yield a folder for a state; it becomes `folder`/step-`step`, and old states but `keep` go.

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
    """The newest whole state in `folder`. Damaged ones are set aside, remnants removed."""
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
