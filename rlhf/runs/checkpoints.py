"""The hand-off between the scripts: the `run.json` that says what a folder holds.

A phase works in `NAME.partial` beside its output folder and renames it in at the end, so a finished
checkpoint is either all there or not there. `run.json` begins with what is known before the first
step; at the end it says when it was finished, and names the base model, the prompt format, the data
and the parents with their hashes; the next script checks it before it loads anything.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from rlhf.runs.device import peak_memory_gib
from rlhf.runs.errors import UserError
from rlhf.runs.folders import partial_of, place_of, put_in_place
from rlhf.runs.processes import agree, is_main, this_process
from rlhf.runs.terminal import console

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
FILE_FACTS = {"size": int, "mtime": int, "sha256": str}  # of each weight file of a local base
# Settings that change nothing of what a run makes.
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


def is_finished(config: Any) -> bool:
    """Whether the run that --resume would continue is finished; if so it is put in its place.

    Raises UserError when what is finished is another run.
    """
    return config.resume and agree(is_main() and look_for_run(config))


def look_for_run(config: Any) -> bool:
    final = place_of(config.output_dir)
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
    check_same(theirs, dataclasses.asdict(config), LOGGING, f"{final} is finished, and")
    put_in_place(final)
    console.print(f"{final} is finished: there is nothing to resume.")
    return True


def check_same(
    theirs: dict[str, Any], ours: dict[str, Any], harmless: Container[str], what: str
) -> None:
    """Raise UserError if a run would resume with other settings or inputs but `harmless` ones."""
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


def start_run(folder: Path, phase: str, config: Any, dtype: torch.dtype, **facts: Any) -> None:
    """Write what `run.json` can say before the first step, such as the sizes a card allowed.

    `finished` is null until `write_run`.
    """
    if is_main():
        write_json(
            folder / "run.json",
            {"phase": phase, **facts, "finished": None} | how_it_runs(config, dtype),
        )


def write_run(
    folder: Path, phase: str, config: Any, dtype: torch.dtype, started: float, **facts: Any
) -> None:
    """Write `run.json`: the hyperparameters in `config`, and what else the next phase checks.

    Args:
        folder: holds the adapter already.
        started: `time.monotonic()` when the run began.
    """
    run = {
        "phase": phase,
        **facts,
        "adapter_sha256": sha256(folder / "adapter_model.safetensors"),
        "seconds": round(time.monotonic() - started),
        **how_it_runs(config, dtype),
        "peak_memory_gib": peak_memory_gib(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / "run.json", run)


def how_it_runs(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "device": str(this_process().device),
        "dtype": str(dtype),
        "hyperparameters": dataclasses.asdict(config),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES}
        | {"python": platform.python_version()},
        "commit": git_commit(),
    }


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(path)


def recorded(output_dir: str) -> dict[str, Any] | None:
    """The sizes that an unfinished run has begun with, by name; None if there is no such run."""
    try:
        run = json.loads(
            (partial_of(place_of(output_dir)) / "run.json").read_text(encoding="utf-8")
        )
        sizes = {
            name: int(run[name]) for name in ("micro_batch_tokens", "rollout_rows") if name in run
        }
        if "rollout_weights" in run:
            sizes["rollout_weights"] = str(run["rollout_weights"])
            sizes["rollouts_kept"] = bool(run.get("rollouts_kept"))
        return sizes if "micro_batch_tokens" in sizes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_run(folder: str, phase: str, flag: str | None = None) -> dict[str, Any]:
    """Read and check a finished phase's `run.json`; `flag` names its folder, if not the usual one.

    Raises UserError when the phase is missing (naming the command that makes it), is another phase,
    or is damaged.
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
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:  # UnicodeDecodeError is a ValueError
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


def check_record(base: dict[str, Any]) -> None:
    """Raise ValueError or KeyError unless a run.json says which weights its base has.

    Records of earlier versions count, too.
    """
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
    """What run.json knows its base's weights by: a hash a file. None: nothing (a hub model)."""
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
    # What an earlier version knows weights by is no hash of a file.
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
    """Raise UserError unless the checkpoint at `folder` comes from SFT's at `parent_folder`."""
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


def read_parents(config: Any) -> dict[str, dict[str, Any]]:
    """run.json of each checkpoint that PPO starts from, by role, once they are seen to fit."""
    runs = {
        "sft": read_run(config.sft_checkpoint, "sft"),
        "reward": read_run(config.reward_checkpoint, "reward"),
    }
    check_child(runs["reward"], config.reward_checkpoint, runs["sft"], config.sft_checkpoint)
    if config.gold_checkpoint:
        runs["gold"] = read_run(config.gold_checkpoint, "reward", "--gold-checkpoint")
        check_child(runs["gold"], config.gold_checkpoint, runs["sft"], config.sft_checkpoint)
        check_other_pairs(
            runs["gold"], config.gold_checkpoint, runs["reward"], config.reward_checkpoint
        )
    return runs


def check_other_pairs(
    gold: dict[str, Any], folder: str, reward: dict[str, Any], reward_folder: str
) -> None:
    """Raise UserError if the judge at `folder` trained on pairs that the reward model has seen."""
    theirs = gold.get("data") or {}
    ours = reward.get("data") or {}
    same = theirs.get("source") == ours.get("source") or theirs.get("sha256") == ours.get("sha256")
    if same and {theirs.get("half"), ours.get("half")} != {"first", "second"}:
        raise UserError(
            f"{folder} is no judge of its own: it may have trained on the pairs of "
            f"{reward_folder}; train one with `python reward_train.py --half first` and the other "
            "with --half second"
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
