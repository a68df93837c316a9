"""The hand-off between the scripts: folders that appear whole, and the `run.json` that says what is in them.

A phase works in `NAME.partial` beside its output folder and renames it in at the end, so a finished checkpoint is
either all there or not there. `run.json` begins with what is known before the first step; at the end it says when it
was finished, and names the base model, the prompt format, the data and
the parents with their hashes; the next script checks it before it loads anything.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Container, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from rlhf.runs.cli import UserError, is_disk_full, one_line
from rlhf.runs.processes import agree, is_main, this_process, wait
from rlhf.runs.reporting import console

import torch

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")
SCRIPTS = {"sft": "sft_train.py", "reward": "reward_train.py", "ppo": "ppo_train.py"}
RUN_FACTS = {
    "phase": str,
    "base": dict,
    "prompt_format": str,
    "adapter_sha256": str,
    "hyperparameters": dict,
}
BASE_FACTS = {
    "model": str,
    "revision": str | None,
    "config_sha256": str,
    "load_in_4bit": bool,
}
FILE_FACTS = {"size": int, "mtime": int, "sha256": str}  # of each weight file of a local base
LOGGING = frozenset(  # settings that change nothing of what a run makes
    (
        "output_dir",
        "overwrite",
        "resume",
        "eval_only",
        "dry_run",
        "card_gb",
        "measure",
        "save_minutes",
        "save_steps",
    )
    + ("save_total_limit", "num_printed_samples", "log_with", "eval_steps", "preset")
)
LOCK = "lock"  # a file in the partial folder, held by the run that writes there
# What our output folders hold, as patterns: an adapter, of PPO a second one in value/, what training tells, or an export.
ADAPTER = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer*",
    "vocab.*",
)
ADAPTER += ("merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
OURS = (
    *(
        *ADAPTER,
        "run.json",
        "metrics.jsonl",
        "samples.jsonl",
        "curves.png",
        "frontier.png",
        LOCK,
        "*.partial",
    ),
    *(
        "evaluation.json",
        "evaluation.png",
        "config.json",
        "generation_config.json",
        "model*.safetensors",
    ),
    *(
        "model.safetensors.index.json",
        "export.json",
        "README.md",
        "LICEN[CS]E*",
        "NOTICE*",
        "USE_POLICY*",
    ),
)
TRACKED = ("events.out.tfevents.*", "hparams.yml")  # by TensorBoard, in folders of its own
MAX_RUN_JSON = 1 << 20  # bytes; ours have a few thousand


def check_output(folder: str, overwrite: bool, *inputs: str | None, resume: bool = False) -> None:
    """Refuse, before any work is done, an output folder that holds something, or one of the run's own `inputs`.

    A run that was cut short and can go on is not thrown away unasked either, and nothing that this project did not write
    is thrown away at all.
    """
    if Path(folder).name in ("", ".."):
        raise UserError(f"--output-dir '{folder}' must name a folder of its own")
    path = place_of(folder)
    if path.is_symlink():
        raise UserError(
            f"--output-dir {folder} is a link that leads back to itself: choose another"
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
        goes_on = partial_of(path).is_dir()  # if not, resuming replaces nothing
        replaced = not_ours(path) if overwrite or goes_on else None
        odd = replaced or not_ours(partial_of(path), finished=False)
        if odd:
            raise UserError(
                f"{odd} is no part of an earlier result, and would be removed: move it away, or choose another --output-dir"
            )
        return
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"{folder} is not empty: add --overwrite to replace it, or choose another --output-dir"
        )
    if any(partial_of(path).glob("step-*/manifest.json")):
        raise UserError(
            f"{partial_of(path)} holds a run that was cut short: add --resume to go on, or --overwrite to start anew"
        )


def place_of(folder: str) -> Path:
    """Where an output folder is: if it is a symbolic link, where that leads, even if nothing is there yet."""
    path = Path(folder)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def not_ours(folder: Path, finished: bool = True) -> Path | None:
    """The first thing in an output folder that no script of this project wrote there; None if there is none.

    Args:
        finished: only a folder with the run.json or export.json of a finished run holds a result.
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
        patterns = (
            ("*",) if within and within[0].startswith("step-") else patterns
        )  # a state to resume from
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
    """Yield `folder.partial` to write to; when the block ends well, rename it to `folder`, replacing what is there.

    When the block raises, an existing `folder` stays as it was, and the partial one stays beside it if it has a state to
    go on from, or after a crash; the next run of the phase clears it, unless it is given `resume`.
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
    """The lock of a folder that runs write to, held until it is closed; None if another run holds it."""
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
    """Remove what an earlier run has left."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def put_in_place(final: Path) -> None:
    """Rename the finished `final.partial` to `final`, replacing what is there. Done again after a crash, it does the rest."""
    partial, old = partial_of(final), final.with_name(f".{final.name}.replaced")
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


def is_finished(config: Any) -> bool:
    """Whether the run that --resume would go on with is finished; if a crash kept it from its place, it is put there now.

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
    """Raise UserError when a run would go on with other settings or inputs than it began with, `harmless` ones aside."""
    ours = json.loads(json.dumps(ours))  # as JSON has them
    other = [
        f"another {name} ({theirs.get(name)} there, {ours.get(name)} now)"
        for name in sorted({*ours, *theirs})
        if name not in harmless and theirs.get(name) != ours.get(name)
    ]
    if other:
        raise UserError(
            f"--resume: {what} began with {', '.join(other)}: give it what it began with, or start anew with --overwrite "
            "in the place of --resume"
        )


def start_run(
    folder: Path, phase: str, config: Any, dtype: torch.dtype, **sizes: int | str
) -> None:
    """Write what `run.json` can say before the first step, as what a card made the run choose: `sizes`, by name.

    `finished` is null until `write_run`.
    """
    if is_main():
        write_json(
            folder / "run.json",
            {"phase": phase, **sizes, "finished": None} | how_it_runs(config, dtype),
        )


def write_run(
    folder: Path, phase: str, config: Any, dtype: torch.dtype, started: float, **facts: Any
) -> None:
    """Write `run.json`: the resolved hyperparameters of `config` (a dataclass) and what else the next phase checks.

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
    """Read and check the `run.json` of a finished phase; `flag` is the one that names its folder, if not the usual one.

    Raises UserError when the phase is missing (naming the command that makes it), is another phase, or is damaged.
    """
    path = Path(folder) / "run.json"
    todo = f"run `python {SCRIPTS[phase]}` first, or name its output folder with {flag or f'--{phase}-checkpoint'}"
    if not Path(folder).exists():
        raise UserError(f"there is no {phase} checkpoint at {folder}: {todo}")
    if not path.is_file():
        raise UserError(
            f"{folder} is not a checkpoint of {SCRIPTS[phase]} (it has no run.json). Accepted is the output folder of "
            f"{SCRIPTS[phase]}, a LoRA adapter on the same base: {todo}"
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
            f"{folder} holds a {run['phase']} checkpoint where a {phase} checkpoint is needed: {todo}"
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
    """Raise ValueError or KeyError unless a run.json says which weights its base has, as this or an earlier version does."""
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
    """What a run.json knows its base's weights by: a hash of each file. None: nothing, as of a hub model."""
    files = base.get("weights")
    return (
        base.get("weights_sha256")
        if files is None
        else {name: facts["sha256"] for name, facts in files.items()}
    )


def check_same_base(run: dict[str, Any], folder: str, base: dict[str, Any]) -> None:
    """Raise UserError if the checkpoint at `folder` was trained on another base than `base` describes."""
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
    """Raise UserError unless the checkpoint at `folder` was trained from the SFT checkpoint at `parent_folder`."""
    if run["prompt_format"] != parent["prompt_format"]:
        raise UserError(
            f"{folder} was trained with another prompt format ({run['prompt_format']}) than {parent_folder} "
            f"({parent['prompt_format']}): train it again from that one"
        )
    check_same_base(run, folder, parent["base"])
    if run.get("parents", {}).get("sft") != parent["adapter_sha256"]:
        raise UserError(
            f"{folder} was not trained from the SFT checkpoint at {parent_folder}; accepted is an adapter stacked on "
            f"that one: run `python {SCRIPTS[run['phase']]} --sft-checkpoint {parent_folder}`"
        )


def read_parents(config: Any) -> dict[str, dict[str, Any]]:
    """The run.json of each checkpoint that PPO starts from, by role, after all were seen to fit together."""
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
    """Raise UserError if the judge at `folder` trained on pairs that the reward model at `reward_folder` has seen."""
    theirs, ours = gold.get("data") or {}, reward.get("data") or {}
    same = theirs.get("source") == ours.get("source") or theirs.get("sha256") == ours.get("sha256")
    if same and {theirs.get("half"), ours.get("half")} != {"first", "second"}:
        raise UserError(
            f"{folder} is no judge of its own: it may have trained on the pairs of {reward_folder}; train one with "
            "`python reward_train.py --half first` and the other with --half second"
        )
    if theirs.get("votes") and ours.get("votes"):
        raise UserError(
            f"{folder} and {reward_folder} were both trained with --extra-data: leave it out of one of them"
        )


def open_up(folder: Path) -> None:
    """Give the files the mode that the umask asks for: safetensors makes its own readable by nobody else."""
    os.umask(umask := os.umask(0))
    for path in folder.rglob("*"):
        if path.is_file():
            with contextlib.suppress(OSError):  # of file systems without modes
                path.chmod(0o666 & ~umask)


def sync(path: Path, deep: bool = True) -> None:
    """Flush a file or a folder, if `deep` with all that is in it, to the disk."""
    for part in [*(path.rglob("*") if deep else ()), path]:
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def peak_memory_gib() -> float:
    """The most that this process has held: of the card's memory if it used one, else of the machine's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)


def git_commit() -> str | None:
    """The commit of this code, or None outside a git checkout."""
    with contextlib.suppress(OSError):
        here = Path(__file__).parent
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True
        )
        return done.stdout.strip() or None
    return None
