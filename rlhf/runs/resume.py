"""Runs that are stopped or cut short, and resume to the very result they would have had.

A state is a folder `step-N` in the run's output folder: tensors in safetensors, everything else in
JSON. (SFT and reward training keep the Trainer's optimizer and random numbers in its own files,
which are read with `weights_only`.) A state is written beside its place, flushed to disk and
renamed. It counts only if every file has the hash in its manifest, which is written last.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.runs.checkpoints import LOGGING, check_same, check_same_flags, sha256
from rlhf.runs.folders import sync
from rlhf.runs.processes import agree, is_main, wait, world
from rlhf.runs.terminal import console

MANIFEST = "manifest.json"
# Flags that may change when a run resumes: places, as their contents are hashed; the length of the
# run; what it keeps in memory.
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


class States:
    """The states of a run. It goes on only with the flags (except HARMLESS) and inputs it had.

    Args:
        folder: of the run.
        flags: of the run, by field, among them resume, save_minutes, save_steps and
            save_total_limit.
        inputs: what it starts from, by name, such as hashes of data and checkpoints.
    """

    def __init__(self, folder: Path, flags: dict[str, Any], inputs: dict[str, Any]):
        self.folder = folder
        self.flags = flags
        self.inputs = inputs | world()
        self.clock = SaveClock(flags["save_minutes"], flags["save_steps"])

    def newest(self) -> tuple[Path | None, dict[str, Any]]:
        """The state to go on from, and its facts; None if there is none. All processes call it.

        Raises:
            UserError: the run began with other flags or inputs.
        """
        state = newest_state(self.folder) if self.flags["resume"] else None
        if state is None:
            return None, {}
        facts = read_facts(state)
        where = f"the run in {self.folder}"
        check_same_flags(facts["hyperparameters"], self.flags, HARMLESS, where)
        check_same(facts["inputs"], self.inputs, (), where)
        return state, facts

    @contextmanager
    def new(self, step: int, facts: dict[str, Any]) -> Iterator[Path]:
        """Yield a folder for the state after `step`. All processes come here, and may write to it.

        Args:
            facts: what JSON can hold; finite numbers only.
        """
        facts = {"hyperparameters": self.flags, "inputs": self.inputs, **facts}
        with new_state(self.folder, step, facts, self.flags["save_total_limit"]) as folder:
            yield folder
        self.clock.saved()


@contextmanager
def new_state(folder: Path, step: int, facts: dict[str, Any], keep: int) -> Iterator[Path]:
    """Yield a folder for a state, then rename it to `folder`/step-`step`.

    Of the states in `folder`, only the newest `keep` stay. All processes come here.
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
    """The states in a run's folder, intact or not, the newest first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix == ""), reverse=True)


def newest_state(folder: Path) -> Path | None:
    """The newest intact state in `folder`. Damaged ones are set aside, remnants removed."""
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
