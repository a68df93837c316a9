"""Which prompts a checkpoint was trained on: known by what they say, not by where they came from.

Each phase writes the hashes of its own training prompts beside `run.json`, extra data included.
Later phases ask them whether a judge is independent and whether held-out prompts really are. The
files of earlier versions are missing, and then nothing is said.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlhf.runs.errors import UserError, one_line
from rlhf.runs.run_warnings import OWNERS
from rlhf.runs.terminal import console, plain

FILE = "trained_prompts.safetensors"
HASHES = "prompts"  # the name of its only tensor

Turns = tuple[tuple[str, str], ...]  # (role, text)


def prompt_hash(turns: Turns) -> int:
    """64 bits of a SHA-256 of the dialogue up to the answer, as a signed integer."""
    digest = hashlib.sha256(json.dumps(turns).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def prompt_hashes(prompts: Iterable[Turns]) -> np.ndarray:
    """The hash of each different prompt, sorted, int64 [prompts]."""
    return np.array(sorted({prompt_hash(turns) for turns in prompts}), dtype=np.int64)


def write_trained_prompts(folder: Path, hashes: np.ndarray) -> None:
    save_file({HASHES: hashes}, folder / FILE)


def read_trained_prompts(folder: str) -> np.ndarray | None:
    """What `prompt_hashes` gave for a checkpoint; None if it is absent or of an earlier version.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        return load_file(path)[HASHES]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): train that phase again") from None


def trained_by(folders: dict[str, str | None]) -> dict[str, np.ndarray]:
    """The hashes of the prompts that each checkpoint was trained on, where they are known.

    Args:
        folders: of the checkpoints, by phase or role.
    Raises:
        UserError: such a file is damaged.
    """
    found = {role: read_trained_prompts(folder) for role, folder in folders.items() if folder}
    return {role: hashes for role, hashes in found.items() if hashes is not None}


def report_overlap(held_out: Iterable[Turns], trained: dict[str, np.ndarray]) -> list[str]:
    """Warn if prompts that should be held out were trained on.

    Args:
        trained: what `prompt_hashes` gave, by phase or role.
    Returns:
        the warning, if any, without the prompt that the terminal names: for a report.
    """
    prompts = list(dict.fromkeys(held_out))
    asked = np.array([prompt_hash(turns) for turns in prompts], dtype=np.int64)
    known = {role: np.isin(asked, hashes) for role, hashes in trained.items()}
    both = [turns for turns, *seen in zip(prompts, *known.values(), strict=True) if any(seen)]
    if not both:
        return []
    owners = ", ".join(OWNERS[role] for role, seen in known.items() if seen.any())
    warning = (
        f"{len(both)} of {len(prompts)} held-out prompts are also in the training data "
        f"(of {owners}), so the figures are too good"
    )
    first = plain(" ".join(both[0][-1][1].split()))
    first = first if len(first) <= 60 else first[:57] + "..."
    console.print(f'warning: {warning} (the first: "{first}")')
    return [warning]
