"""The hand-off between the scripts: the `run.json` that says what a folder holds.

A phase works in `NAME.partial` beside its output folder and renames it at the end, so a finished
checkpoint is either complete or not there. At the start `run.json` holds what is known before the
first step. At the end it also says when the run finished, and names the base model, the prompt
format, the data and the parents with their hashes. The next script checks all of it before it loads
anything.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.runs.device import peak_memory_gib
from rlhf.runs.errors import UserError
from rlhf.runs.folders import partial_of, place_of, put_in_place
from rlhf.runs.processes import agree, is_main, this_process
from rlhf.runs.terminal import console
from rlhf.runs.trained_prompts import trained_by, write_trained_prompts

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")
SCRIPTS = {"sft": "sft_train.py", "reward": "reward_train.py", "ppo": "ppo_train.py"}
RUN_FACTS = {
    "phase": str,
    "base": dict,
    "prompt_format": str,
    "adapter_sha256": str,
    "hyperparameters": dict,
}
BASE_FACTS = {"model": str, "revision": str | None, "config_sha256": str, "load_in_4bit": bool}
FILE_FACTS = {"size": int, "mtime": int, "sha256": str}  # of each weight file of the base
# Flags that change nothing in what a run makes.
LOGGING = frozenset(
    {
        "output_dir",
        "overwrite",
        "resume",
        "eval_only",
        "dry_run",
        "card_gb",
        "measure",
        "save_minutes",
        "save_steps",
        "save_total_limit",
        "num_printed_samples",
        "log_with",
        "eval_steps",
        "preset",
    }
)
MAX_RUN_JSON = 1 << 20  # bytes; ours have a few thousand


def is_finished(output_dir: str, hyperparameters: dict[str, Any]) -> bool:
    """Whether the run that --resume would continue is finished; if so, it is put in its place.

    All processes call it.

    Raises:
        UserError: another run has finished there.
    """
    return agree(is_main() and look_for_run(output_dir, hyperparameters))


def look_for_run(output_dir: str, hyperparameters: dict[str, Any]) -> bool:
    final = place_of(output_dir)
    partial = partial_of(final)
    folder = partial if partial.exists() else final
    if not (folder / "run.json").exists():
        if folder == final and final.is_dir() and any(final.iterdir()):
            raise UserError(
                f"--resume: {final} holds no run of this script: choose another --output-dir"
            )
        return False
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        theirs = dict(run["hyperparameters"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / 'run.json'} is damaged ({error}): train that phase again"
        ) from None
    if not run.get("finished"):
        return False
    check_same_flags(theirs, hyperparameters, LOGGING, f"{final} is finished, and")
    put_in_place(final)
    console.print(f"{final} is finished: there is nothing to resume.")
    return True


def check_same_flags(
    theirs: dict[str, Any], ours: dict[str, Any], harmless: Container[str], what: str
) -> None:
    """`check_same`, for the flags of a run that another version of the script may have begun."""
    unknown = theirs.keys() ^ ours.keys()
    other = sorted(n for n in unknown if n not in harmless and theirs.get(n) != ours.get(n))
    if other:
        raise UserError(
            f"--resume: {what} began with another version of this script, which had other flags "
            f"({', '.join(other)}): start over with --overwrite in place of --resume"
        )
    check_same(theirs, ours, harmless, what)


def check_same(
    theirs: dict[str, Any], ours: dict[str, Any], harmless: Container[str], what: str
) -> None:
    """Raise UserError if a run would resume with other flags or inputs, except `harmless` ones."""
    ours = json.loads(json.dumps(ours))  # as JSON has them
    other = [
        f"another {name} ({theirs.get(name)} there, {ours.get(name)} now)"
        for name in sorted({*ours, *theirs})
        if name not in harmless and theirs.get(name) != ours.get(name)
    ]
    if other:
        raise UserError(
            f"--resume: {what} began with {', '.join(other)}: give it what it began with, or "
            "start over with --overwrite in place of --resume"
        )


def start_run(
    folder: Path, phase: str, hyperparameters: dict[str, Any], dtype: torch.dtype, **facts: Any
) -> None:
    """Write what `run.json` can say before the first step, such as the sizes that fit the card.

    `finished` is null until `write_run`.
    """
    if is_main():
        run = {"phase": phase, **facts, "finished": None}
        write_json(folder / "run.json", run | how_it_runs(hyperparameters, dtype))


def write_run(
    folder: Path,
    phase: str,
    hyperparameters: dict[str, Any],
    dtype: torch.dtype,
    started: float,
    trained_prompts: np.ndarray,
    **facts: Any,
) -> None:
    """Write `run.json`: how the run was made, and the facts that the next phase checks.

    Args:
        folder: holds the adapter already.
        started: `time.monotonic()` when the run began.
        trained_prompts: `prompt_hashes` of the training rows, for a file of their own.
    """
    write_trained_prompts(folder, trained_prompts)
    run = {
        "phase": phase,
        **facts,
        "adapter_sha256": sha256(folder / "adapter_model.safetensors"),
        "seconds": round(time.monotonic() - started),
        **how_it_runs(hyperparameters, dtype),
        "peak_memory_gib": peak_memory_gib(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / "run.json", run)


def how_it_runs(hyperparameters: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "device": str(this_process().device),
        "dtype": str(dtype),
        "hyperparameters": hyperparameters,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES}
        | {"python": platform.python_version()},
        "commit": git_commit(),
    }


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Write a file that is either complete or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(path)


def sizes_before(output_dir: str, resume: bool) -> dict[str, Any] | None:
    """The sizes that the run to resume began with, by name; None if there is no such run.

    All processes call it.
    """
    return agree(recorded(output_dir) if is_main() else None) if resume else None


def commit_before(output_dir: str, resume: bool, model: str) -> str | None:
    """The commit of hub model `model` that the run to resume began with; None if it is not known.

    All processes call it.
    """
    return agree(recorded_commit(output_dir, model) if is_main() else None) if resume else None


def recorded_commit(output_dir: str, model: str) -> str | None:
    path = partial_of(place_of(output_dir)) / "run.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base"]
        return str(base["revision"]) if base["revision"] and base["model"] == model else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def recorded(output_dir: str) -> dict[str, Any] | None:
    path = partial_of(place_of(output_dir)) / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        sizes: dict[str, Any] = {"micro_batch_tokens": int(run["micro_batch_tokens"])}
        if "rollout_rows" in run:
            sizes["rollout_rows"] = int(run["rollout_rows"])
        if "rollout_weights" in run:
            sizes["rollout_weights"] = str(run["rollout_weights"])
            sizes["rollouts_kept"] = bool(run.get("rollouts_kept"))
        return sizes
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_run(folder: str, phase: str, flag: str | None = None) -> dict[str, Any]:
    """Read and check a finished phase's `run.json`.

    Args:
        flag: that names the folder, if it is not the usual one.
    Raises:
        UserError: the phase is missing (the error names the command that makes it), unfinished or
            damaged, or it is another phase.
    """
    path = Path(folder) / "run.json"
    todo = (
        f"run `python {SCRIPTS[phase]}` first, or name its output folder with "
        f"{flag or f'--{phase}-checkpoint'}"
    )
    if not Path(folder).exists():
        raise UserError(f"there is no {phase} checkpoint at {folder}: {todo}")
    if not path.is_file():
        raise UserError(
            f"{folder} is not a checkpoint of {SCRIPTS[phase]} (it has no run.json). Accepted is "
            f"the output folder of {SCRIPTS[phase]}, a LoRA adapter on the same base: {todo}"
        )
    try:
        if path.stat().st_size > MAX_RUN_JSON:
            raise ValueError("it is larger than 1 MiB")
        run = json.loads(path.read_text(encoding="utf-8"))
        if not run["finished"]:
            raise UserError(f"{folder} is not finished: add --resume to the command that makes it")
        check_facts(run)
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # or UnicodeDecodeError
        raise UserError(f"{path} is damaged ({error}): train that phase again") from None
    if run["phase"] != phase:
        raise UserError(
            f"{folder} holds a {run['phase']} checkpoint where a {phase} checkpoint is needed: "
            f"{todo}"
        )
    weights = Path(folder) / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors: train that phase again")
    if sha256(weights) != run["adapter_sha256"]:
        raise UserError(
            f"{weights} is not the file that its run.json describes: train that phase again"
        )
    return run


def check_facts(run: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError unless a run.json has what the next phases read."""
    for key, kind in RUN_FACTS.items():
        if not isinstance(run[key], kind):
            raise ValueError(f"{key} is not a {kind.__name__}")
    if not isinstance(run.get("parents", {}), dict):
        raise ValueError("parents is not a dict")
    if run["prompt_format"] not in ("hh", "model"):
        raise ValueError("its prompt_format is unknown")
    for key, kind in BASE_FACTS.items():
        if not isinstance(run["base"][key], kind):
            raise ValueError(f"base {key} is not as it should be")
    check_record(run["base"])


def check_record(base: dict[str, Any]) -> None:
    """Raise ValueError or KeyError unless a run.json says which weights its base has.

    Records of earlier versions count too.
    """
    if "copy_of" in base:
        for key in ("model", "revision"):
            if not isinstance(base["copy_of"][key], BASE_FACTS[key]):
                raise ValueError(f"base copy_of {key} is not as it should be")
    if "weights" not in base:  # an earlier version
        if not isinstance(base["weights_sha256"], str | None):
            raise ValueError("base weights_sha256 is not as it should be")
        return
    if not isinstance(base["weights"], dict | None):
        raise ValueError("base weights is not as it should be")
    for name, facts in (base["weights"] or {}).items():
        for key, kind in FILE_FACTS.items():
            if not isinstance(facts[key], kind):
                raise ValueError(f"base weights {name} {key} is not as it should be")


def weights_of(base: dict[str, Any]) -> Any:
    """How run.json identifies the base's weights: a hash per file.

    In earlier versions one hash for a local base, and None for a hub model.
    """
    files = base.get("weights")
    return (
        base.get("weights_sha256")
        if files is None
        else {name: facts["sha256"] for name, facts in files.items()}
    )


def check_same_base(run: dict[str, Any], folder: str, base: dict[str, Any]) -> None:
    """Raise UserError if the checkpoint at `folder` was trained on another base than `base`."""
    theirs = run["base"]
    weights = weights_of(theirs), weights_of(base)
    # Earlier versions did not hash whole files.
    comparable = type(weights[0]) is type(weights[1]) and None not in weights
    if theirs["config_sha256"] != base["config_sha256"] or (
        comparable and weights[0] != weights[1]
    ):
        raise UserError(
            f"{folder} was trained on another base model ({theirs['model']}) than {base['model']}: "
            "name the same base for all phases"
        )


def check_child(
    run: dict[str, Any], folder: str, parent: dict[str, Any], parent_folder: str
) -> None:
    """Raise UserError unless `folder` was trained from the SFT checkpoint at `parent_folder`."""
    if run["prompt_format"] != parent["prompt_format"]:
        raise UserError(
            f"{folder} was trained with another prompt format ({run['prompt_format']}) than "
            f"{parent_folder} ({parent['prompt_format']}): train it again from that one"
        )
    check_same_base(run, folder, parent["base"])
    if run.get("parents", {}).get("sft") != parent["adapter_sha256"]:
        raise UserError(
            f"{folder} was not trained from the SFT checkpoint at {parent_folder}; accepted is an "
            f"adapter stacked on that one: run `python {SCRIPTS[run['phase']]} --sft-checkpoint "
            f"{parent_folder}`"
        )


def read_parents(sft: str, reward: str, gold: str | None = None) -> dict[str, dict[str, Any]]:
    """The run.json of each checkpoint that PPO starts from, by role. Checks that they fit."""
    runs = {"sft": read_run(sft, "sft"), "reward": read_run(reward, "reward")}
    check_child(runs["reward"], reward, runs["sft"], sft)
    if gold:
        runs["gold"] = read_run(gold, "reward", "--gold-checkpoint")
        check_child(runs["gold"], gold, runs["sft"], sft)
        check_other_pairs(runs["gold"], gold, runs["reward"], reward)
    return runs


def check_other_pairs(
    gold: dict[str, Any], folder: str, reward: dict[str, Any], reward_folder: str
) -> None:
    """Raise UserError if the judge at `folder` was trained on prompts of the reward model's.

    If an earlier version trained one of them, raise it if that may be so, by what their data sets
    are called and by the hashes of all their rows.
    """
    theirs = gold.get("data") or {}
    ours = reward.get("data") or {}
    halves = {theirs.get("half"), ours.get("half")} == {"first", "second"}
    other_half = (
        "train one with `python reward_train.py --half first` and the other with --half second"
    )
    trained = trained_by({"gold": folder, "reward": reward_folder})
    if len(trained) == 2:
        shared = np.intersect1d(trained["gold"], trained["reward"]).size
        # Two halves share no prompt, so votes brought it.
        todo = "train one of them again without --extra-data" if halves else other_half
        if shared:
            raise UserError(
                f"{folder} is no judge of its own: {reward_folder} was trained on {shared} of its "
                f"{trained['gold'].size} prompts; {todo}"
            )
        return
    same = theirs.get("source") == ours.get("source") or theirs.get("sha256") == ours.get("sha256")
    if same and not halves:
        raise UserError(
            f"{folder} is no judge of its own: it may have trained on the pairs of "
            f"{reward_folder}; {other_half}"
        )
    if theirs.get("votes") and ours.get("votes"):
        raise UserError(
            f"{folder} and {reward_folder} were both trained with --extra-data: leave it out of "
            "one of them"
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit() -> str | None:
    """The commit of this code, or None outside a git checkout."""
    with contextlib.suppress(OSError):
        here = Path(__file__).parent
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True
        )
        return done.stdout.strip() or None
    return None
