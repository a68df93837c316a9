"""A score of the user's own: a Python function in a file, with the signature of TRL's rewards.

    def short(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
        return [-len(text.split()) / 10 for text in completions]

It is called with keywords, once for each batch of texts, and gives one finite number per text. Only
a flag on the command line names the file; a path in a checkpoint is never run.
"""

import hashlib
import math
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.runs.errors import UserError, one_line
from rlhf.runs.processes import agree_on_error

SHOWN = 60  # characters of a text that an error names


@dataclass(frozen=True)
class RewardFunction:
    """The user's function, and the hash of its file."""

    name: str  # file.py:function, as it was given
    sha256: str
    function: Callable[..., Any]

    @property
    def path(self) -> str:
        return self.name.rpartition(":")[0]

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        """One number per text, float32 [b] on the CPU.

        Raises:
            UserError: the function fails or gives something else, on any of the processes.
        """
        scores: list[float] = []
        wrong = None
        try:
            # With fewer texts than processes, some processes have none.
            if completions:
                with torch.no_grad():
                    said = self.function(prompts=prompts, completions=completions)
                scores = numbers(said, completions)
        except UserError as error:
            wrong = str(error)
        except (Exception, SystemExit) as error:
            wrong = f"{describe(error)}{line_of(error, self.path)}"
        agree_on_error(wrong and f"--reward-function {self.name}: {wrong}")
        return torch.tensor(scores, dtype=torch.float32)


def load_reward_function(named: str | None) -> RewardFunction | None:
    """The function that `--reward-function` names as file.py:function; None without the flag.

    Raises:
        UserError: there is no such file or function, or the file does not run.
    """
    if named is None:
        return None
    path, _, name = named.rpartition(":")
    flag = f"--reward-function {named}"
    if not path or not name.isidentifier():
        raise UserError(f"{flag}: write it as file.py:function")
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be read ({error.strerror})") from None
    module = types.ModuleType(f"reward_function_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and pickle look it up there
    try:
        exec(compile(source, path, "exec"), vars(module))  # the very bytes that are hashed
    except (Exception, SystemExit) as error:
        raise UserError(f"{flag}: {describe(error)}{line_of(error, path)}") from None
    function = vars(module).get(name)
    if not callable(function):
        raise UserError(f"{flag}: {path} has no function {name}")
    return RewardFunction(named, hashlib.sha256(source).hexdigest(), function)


def facts_of(function: RewardFunction | None) -> dict[str, Any]:
    """What run.json says of the reward function."""
    if function is None:
        return {}
    return {"reward_function": {"name": function.name, "sha256": function.sha256}}


def numbers(said: Any, texts: list[str]) -> list[float]:
    """What a function returned, as finite floats, one per text.

    Raises:
        UserError: it is no row of finite numbers, one per text. A set, a dict or a text has items
            too, but not the texts' numbers in their order.
    """
    dimensions = getattr(said, "ndim", 1)
    if not isinstance(said, list | tuple | np.ndarray | Tensor) or dimensions != 1:
        shape = "" if dimensions == 1 else f" of {dimensions} dimensions"
        raise UserError(
            f"it gave a {type(said).__name__}{shape}; give a list of one number per text, in the "
            "order of the texts (or a tuple, an array or a tensor of one dimension)"
        )
    if len(said) != len(texts):
        raise UserError(f"it gave {len(said)} numbers for {len(texts)} texts; give one per text")
    scores = []
    for value, text in zip(said, texts, strict=True):
        try:
            score = torch.tensor(float(value)).item()  # in float32, where it may be infinite
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
            raise UserError(f"it gave {value!r}, not a finite number, for the text {shown!r}")
        scores.append(score)
    return scores


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def line_of(error: BaseException, path: str) -> str:
    """The line of the file at `path` where it was raised."""
    if isinstance(error, SyntaxError):
        return ""  # its own text says so
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f" (line {lines[-1]})" if lines else ""
