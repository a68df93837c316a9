"""How a script reads its hyperparameters and how it fails: one clear line, exit code 2, no traceback."""

import argparse
import dataclasses
import errno
import inspect
import logging
import math
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

Config = TypeVar("Config")
SIZES = (  # fields that take memory
    *("micro_batch_tokens", "rollout_batch_size", "batch_size", "max_length"),
    *("max_prompt_length", "response_length", "max_new_tokens", "lora_rank"),
)
USUAL = {  # folders, data and settings that the scripts begin with, by preset
    None: {
        "sft": "checkpoints/sft",
        "reward": "checkpoints/reward",
        "ppo": "checkpoints/ppo",
        "reports": "reports",
        "dataset": "Dahoas/rm-static",
        "dtype": "auto",
        "max_prompt_length": 384,
        "role_layers": 14,
    },
    "demo": {
        "sft": "runs/demo/sft",
        "reward": "runs/demo/reward",
        "ppo": "runs/demo/ppo",
        "reports": "runs/demo/reports",
        "dataset": "demo/data",
        "dtype": "auto",
        "max_prompt_length": 128,
        "role_layers": 15,
    },
}
FOLLOWS = {"sft": "reward", "reward": "ppo", "gold": "ppo", "ppo": "reports"}
CARRIED = {  # fields that the next script is given where they are not as usual, by what was made
    "sft": ("dtype",),  # the base is in its run.json
    "reward": ("base_model", "dtype", "role_layers"),
    "gold": ("base_model", "dtype", "role_layers"),
    "ppo": ("base_model", "dtype", "max_prompt_length"),
}


class UserError(Exception):
    """Something the user can mend. The text says what is wrong, where, and what to do."""


class Stopped(Exception):
    """SIGINT or SIGTERM asked the run to end; its number is the argument."""


def parse(
    config_class: type[Config],
    presets: dict[str, Config],
    doc: str,
    args: list[str] | None = None,
    first: Sequence[str] = (),
) -> Config:
    """Read the flags of a script (`args`, or the command line's) over its defaults, or over those of `--preset NAME`.

    Unknown and abbreviated flags exit with code 2. Help texts are the comments beside the fields. A `~` is the home folder,
    also where the shell has left it alone, as in `--output-dir=~/sft`.

    Args:
        first: the fields that `--help` shows before the others, in a group of their own.
    """
    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    description = doc.strip().splitlines()[0]
    if presets:
        preset.add_argument("--preset", choices=sorted(presets), default=None)
        description += f" (--preset {{{','.join(presets)}}}: the small values of this file)"
    chosen, rest = preset.parse_known_args(args)
    default = presets[chosen.preset] if presets and chosen.preset else config_class()
    if first:
        groups = vars(tyro.cli(in_two_groups(default, first), args=rest, description=description))
        config = config_class(**vars(groups["common"]), **vars(groups["other"]))
    else:
        config = tyro.cli(config_class, default=default, args=rest, description=description)
    home = {
        name: os.path.expanduser(x)
        for name, x in vars(config).items()
        if isinstance(x, str) and x[:1] == "~"
    }
    return dataclasses.replace(config, **home, **({"preset": chosen.preset} if presets else {}))


def in_two_groups(default: Any, first: Sequence[str]) -> type:
    """A class of two groups of fields, `common` and `other`, for which tyro has the same flags as for `default`."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(type(default)), re.M))
    types = {field.name: field.type for field in dataclasses.fields(default)}

    def group(name: str, description: str, fields: Sequence[str]) -> tuple[str, Any, Any]:
        knobs = []
        for field in fields:
            kind = Annotated[types[field], tyro.conf.arg(help=comments.get(field))]
            knobs.append((field, kind, dataclasses.field(default=getattr(default, field))))
        made = dataclasses.make_dataclass(
            name, knobs, namespace={"__doc__": description}, frozen=True
        )
        return name, tyro.conf.OmitArgPrefixes[made], dataclasses.field(default=made())

    rest = [name for name in types if name not in first]
    common = group("common", "What people change first.", first)
    return dataclasses.make_dataclass("Flags", [common, group("other", "All the rest.", rest)])


def run(
    main: Callable[[Config], None],
    config_class: type[Config],
    presets: dict[str, Config],
    doc: str,
    first: Sequence[str] = (),
) -> None:
    """Parse the flags and call `main`; turn what the user can mend into one line and exit code 2."""
    config = parse(config_class, presets, doc, first=first)
    quiet_libraries()
    try:
        main(config)
    except UserError as error:
        fail(str(error))
    except Stopped as stopped:
        number = stopped.args[0]
        print(
            f"\nStopped by {signal.Signals(number).name}. To go on: add --resume to the same command.",
            file=sys.stderr,
        )
        sys.exit(128 + number)
    except Exception as error:
        if is_disk_full(error):
            later = (
                "then --resume goes on from the last state"
                if hasattr(config, "resume")
                else "nothing was replaced"
            )
            fail(f"the disk is full: free some space or choose another --output-dir; {later}")
        if is_out_of_memory(error):
            fail(f"the memory ran out ({one_line(error)}): {less_memory(config)}")
        raise
    except KeyboardInterrupt:
        later = (
            "; --resume goes on from the last state, if there was one"
            if hasattr(config, "resume")
            else ""
        )
        print(f"\nStopped; nothing was saved{later}.", file=sys.stderr)
        sys.exit(130)


def flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def less_memory(config: Any) -> str:
    """What to do when memory runs out: which flags of the script to turn, if it has such."""
    names = {field.name for field in dataclasses.fields(config)}
    if "micro_batch_tokens" in names:
        names.discard("batch_size")  # then it takes no memory
    off = [
        flag(name)
        for name in ("gradient_checkpointing", "load_in_4bit")
        if name in names and not vars(config)[name]
    ]
    lower = " or ".join(flag(name) for name in SIZES if name in names)
    advice = [f"lower {lower}"] if lower else []
    advice += [f"add {' or '.join(off)}"] if off else []
    return ", or ".join(advice) or "free some memory"


def next_command(script: str, config: Any, made: str, same_data: bool = True) -> str:
    """The command of the next script, with the preset, folders, data and base of this one.

    Args:
        config: of the script that has finished.
        made: what is in its output folder: "sft", "reward", "gold" or "ppo".
        same_data: whether the next script can use its data.
    """
    preset = config.preset if config.preset in USUAL else None
    usual = USUAL[preset]
    folders = {phase: getattr(config, f"{phase}_checkpoint", None) for phase in ("sft", "reward")}
    folders[made] = config.output_dir
    flags: dict[str, Any] = {}
    for phase, folder in folders.items():
        if folder and folder != usual.get(phase):
            flags[f"{phase}_checkpoint"] = folder
    for name in (*(("dataset", "columns") if same_data else ()), *CARRIED[made]):
        value = getattr(config, name)
        if value != usual.get(name):
            flags[name] = value
    if made == "ppo" and "dataset" in flags:  # or it asks prompts of its own
        flags["num_test_prompts"] = config.max_eval_samples or 1000
    output = beside(config.output_dir, made, FOLLOWS[made])
    if config.output_dir != usual.get(made) and output != usual[FOLLOWS[made]]:
        flags["output_dir"] = output
    words = [script, *(("--preset", preset) if preset else ())]
    for name, value in flags.items():
        words += [flag(name), str(value)]
    return f"python {shlex.join(words)}"


def beside(folder: str, made: str, wanted: str) -> str:
    """A folder for what comes next, beside that of what was `made` and named like it."""
    name = Path(folder).name
    name = name.replace(made, wanted) if made in name else f"{name}-{wanted}"
    return str(Path(folder).with_name(name))


def check_at_least_one(config: Any, *names: str) -> None:
    """Raise UserError unless each named field is None or a number of at least 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} must be at least 1, not {value}")


def check_above_zero(config: Any, *names: str) -> None:
    """Raise UserError unless each named field is a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise UserError(f"{flag(name)} must be above 0 and finite, not {value}")


def check_between(config: Any, low: float, high: float, *names: str) -> None:
    """Raise UserError unless each named field is a finite number from `low` to `high`."""
    for name in names:
        value = getattr(config, name)
        if not (low <= value <= high and math.isfinite(value)):
            most = "finite" if high == math.inf else f"at most {high:g}"
            raise UserError(f"{flag(name)} must be at least {low:g} and {most}, not {value}")


def check_tracker(name: str | None) -> None:
    """Raise UserError when the tracker that --log-with names is not installed."""
    if name and find_spec(name) is None:
        raise UserError(
            f"--log-with {name}: it is not installed; run `pip install {name}`, or leave the flag out"
        )


def fail(message: str) -> None:
    who = "" if os.environ.get("RANK", "0") == "0" else f"process {os.environ['RANK']}: "
    print(f"{who}error: {message}", file=sys.stderr)
    sys.exit(2)


def is_disk_full(error: BaseException) -> bool:
    """True when `error`, or what caused it, is ENOSPC; safetensors and pyarrow report it only in their text."""
    return any(
        getattr(cause, "errno", None) == errno.ENOSPC or "No space left on device" in str(cause)
        for cause in causes_of(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """True when a device had no memory left for a tensor; for the CPU's, torch says so only in the text."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """The first line of an exception's text, or its name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def causes_of(error: BaseException) -> list[BaseException]:
    """An exception, what caused it, what caused that, and so on."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def quiet_libraries() -> None:
    """Leave the terminal to our own lines: no library progress bars and no advice meant for library authors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rlhf.runs.hub import quiet_hub

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    quiet_hub()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of the fonts that it finds
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|peft|trl|accelerate)\..*"
    )
