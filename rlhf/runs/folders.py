"""Output folders, which appear whole or not at all.

A phase works in `NAME.partial` beside its output folder and renames it at the end. Nothing is ever
removed that this project did not write.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from rlhf.runs.errors import UserError, is_disk_full, one_line
from rlhf.runs.processes import agree, is_main, wait

LOCK = "lock"  # a file in the partial folder, held by the run that writes there
# Patterns of what our output folders hold: an adapter (PPO has a second one in value/), what
# training writes, or an export.
ADAPTER = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
)
OURS = (
    *ADAPTER,
    "run.json",
    "trained_prompts.safetensors",
    "metrics.jsonl",
    "samples.jsonl",
    "curves.png",
    "frontier.png",
    LOCK,
    "*.partial",
    "evaluation.json",
    "evaluation.png",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "export.json",
    "README.md",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)
TRACKED = ("events.out.tfevents.*", "hparams.yml")  # by TensorBoard, in folders of its own


def check_output(folder: str, overwrite: bool, *inputs: str | None, resume: bool = False) -> None:
    """Raise UserError, before any work, if the output folder holds something or an input.

    A run that was cut short and can be resumed is not thrown away unasked either. What this project
    did not write is never thrown away.
    """
    if Path(folder).name in ("", ".."):
        raise UserError(f"--output-dir '{folder}' must name a folder of its own")
    path = place_of(folder)
    if path.is_symlink():
        raise UserError(
            f"--output-dir {folder} is a link that leads back to itself: choose another"
        )
    if os.path.ismount(path):
        raise UserError(
            f"--output-dir {folder} is a mount point, which a finished result cannot replace: name "
            "a folder inside it"
        )
    blocked = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
    if blocked:
        raise UserError(f"--output-dir {folder}: {blocked} is a file; name a folder")
    parent = next((p for p in path.absolute().parents if p.exists()), path)
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output-dir {folder}: {parent} cannot be written to; choose another")
    for source in filter(None, inputs):
        if Path(source).exists() and Path(source).resolve().is_relative_to(path.resolve()):
            raise UserError(
                f"--output-dir {folder} holds {source}, which this run reads: choose another"
            )
    if resume or overwrite:
        goes_on = partial_of(path).is_dir()  # otherwise resuming replaces nothing
        replaced = not_ours(path) if overwrite or goes_on else None
        odd = replaced or not_ours(partial_of(path), finished=False)
        if odd:
            raise UserError(
                f"{odd} is no part of an earlier result, and would be removed: move it away, or "
                "choose another --output-dir"
            )
        return
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"{folder} is not empty: add --overwrite to replace it, or choose another --output-dir"
        )
    if any(partial_of(path).glob("step-*/manifest.json")):
        raise UserError(
            f"{partial_of(path)} holds a run that was cut short: add --resume to continue it, or "
            "--overwrite to start over"
        )


def place_of(folder: str) -> Path:
    """Where an output folder is. A symbolic link is followed, even if it leads to nothing yet."""
    path = Path(folder)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def not_ours(folder: Path, finished: bool = True) -> Path | None:
    """The first thing in an output folder that this project did not write, or None.

    Args:
        finished: whether the folder should hold a result. If it has neither run.json nor
            export.json, then nothing in it counts as ours.
    """
    if not folder.is_dir():
        return None
    paths = sorted(folder.rglob("*"))
    if finished and not is_result(folder):
        return paths[0] if paths else None
    for path in paths:
        within = path.relative_to(folder).parts[:-1]
        patterns = {
            (): OURS,
            ("value",): ADAPTER,
            ("additional_chat_templates",): ("*.jinja",),
        }.get(within, TRACKED)
        # A state to resume from may hold anything.
        patterns = ("*",) if within and within[0].startswith("step-") else patterns
        if (path.is_symlink() or not path.is_dir()) and not any(
            fnmatch(path.name, pattern) for pattern in patterns
        ):
            return path
    return None


def is_result(folder: Path) -> bool:
    for name, key in (("run.json", "phase"), ("export.json", "adapter to merged")):
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            if key in json.loads((folder / name).read_text(encoding="utf-8")):
                return True
    return False


def partial_of(folder: Path) -> Path:
    """Where a run writes until it is finished."""
    return folder.with_name(folder.name + ".partial")


@contextlib.contextmanager
def output_folder(folder: str, resume: bool = False) -> Iterator[Path]:
    """Yield `folder.partial` to write to; rename it to `folder` when the block ends well.

    If the block raises, an existing `folder` stays as it was. The partial folder stays beside it
    after a crash, or if it has a state to resume from. The next run of the phase clears it, unless
    it has `resume`.
    """
    final = place_of(folder)
    partial = partial_of(final)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"--output-dir {folder} cannot be made ({one_line(error)}): choose another"
        ) from None
    lock = hold(partial) if is_main() else None
    if agree(is_main() and not lock):
        raise UserError(
            f"another run is writing to {partial}: wait for its end, or choose another --output-dir"
        )
    try:
        if is_main() and not resume:
            clear(partial)
        wait()
        yield partial
        wait()
        if is_main():
            put_in_place(final)
        wait()
    except Exception as error:
        if (
            is_main()
            and (isinstance(error, UserError) or is_disk_full(error))
            and not any(partial.glob("step-*/manifest.json"))
        ):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock:
            (partial / LOCK).unlink(missing_ok=True)
            lock.close()


def hold(partial: Path) -> IO[str] | None:
    """Lock a partial folder until the returned file is closed; None if another run holds it."""
    lock = (partial / LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError:  # a file system without locks
        pass
    return lock


def clear(partial: Path) -> None:
    """Remove what an earlier run left."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def put_in_place(final: Path) -> None:
    """Rename the finished `final.partial` to `final`. Safe to repeat after a crash."""
    partial = partial_of(final)
    old = final.with_name(f".{final.name}.replaced")
    if partial.exists():
        open_up(partial)
        sync(partial)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        partial.rename(final)
        sync(final.parent, deep=False)
    (final / LOCK).unlink(missing_ok=True)
    for state in final.glob("step-*"):
        shutil.rmtree(state)
    shutil.rmtree(old, ignore_errors=True)


def open_up(folder: Path) -> None:
    """Give files the mode of the umask: those of safetensors are readable by the owner only."""
    os.umask(umask := os.umask(0))
    for path in folder.rglob("*"):
        if path.is_file():
            with contextlib.suppress(OSError):  # a file system without modes
                path.chmod(0o666 & ~umask)


def sync(path: Path, deep: bool = True) -> None:
    """Flush a file or folder to disk; if `deep`, with everything in it."""
    for part in [*(path.rglob("*") if deep else ()), path]:
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
