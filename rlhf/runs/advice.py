"""What to do next, as a command or as flags of the script at hand."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZES = (  # fields that take memory
    *("micro_batch_tokens", "rollout_batch_size", "batch_size", "max_length"),
    *("max_prompt_length", "response_length", "max_new_tokens", "lora_rank"),
)
USUAL = {  # defaults of the scripts, by preset
    None: {
        "sft": "checkpoints/sft",
        "reward": "checkpoints/reward",
        "ppo": "checkpoints/ppo",
        "reports": "reports",
        "dataset": "Dahoas/rm-static",
        "dtype": "auto",
        "max_prompt_length": 384,
        "role_layers": 14,
        "reward_weight": 1.0,
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
        "reward_weight": 1.0,
    },
}
FOLLOWS = {"sft": "reward", "reward": "ppo", "gold": "ppo", "ppo": "reports"}  # what is made next
CARRIED = {  # fields that the next script is given where they are unusual, by what was made
    "sft": ("dtype",),  # the base is in its run.json
    "reward": ("base_model", "dtype", "role_layers"),
    "gold": ("base_model", "dtype", "role_layers"),
    "ppo": ("base_model", "dtype", "max_prompt_length", "reward_function", "reward_weight"),
}


def flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def less_memory(flags: Mapping[str, Any]) -> str:
    """What to do when memory runs out: which flags of the script at hand to turn.

    Args:
        flags: all of them, by field.
    """
    names = set(flags)
    if "micro_batch_tokens" in names:
        names.discard("batch_size")  # then it takes no memory
    savers = ("gradient_checkpointing", "load_in_4bit")
    off = [flag(name) for name in savers if flags.get(name) is False]
    lower = " or ".join(flag(name) for name in SIZES if name in names)
    advice = [f"lower {lower}"] if lower else []
    advice += [f"add {' or '.join(off)}"] if off else []
    return ", or ".join(advice) or "free some memory"


def next_command(script: str, flags: Mapping[str, Any], made: str, same_data: bool = True) -> str:
    """The command of the next script, with the preset, folders, data and base of this one.

    Args:
        flags: of the script that has finished, by field.
        made: what is in its output folder: "sft", "reward", "gold" or "ppo".
        same_data: whether the next script can use the same data.
    """
    preset = flags["preset"] if flags["preset"] in USUAL else None
    usual = USUAL[preset]
    folders = {phase: flags.get(f"{phase}_checkpoint") for phase in ("sft", "reward")}
    folders[made] = flags["output_dir"]
    given: dict[str, Any] = {}
    for phase, folder in folders.items():
        if folder and folder != usual.get(phase):
            given[f"{phase}_checkpoint"] = folder
    for name in (*(("dataset", "columns") if same_data else ()), *CARRIED[made]):
        if flags[name] != usual.get(name):
            given[name] = flags[name]
    if made == "ppo" and not given.keys().isdisjoint(("dataset", "columns")):
        # or it would ask prompts of its own
        given["num_test_prompts"] = flags["max_eval_samples"] or 1000
    output = beside(flags["output_dir"], made, FOLLOWS[made])
    if flags["output_dir"] != usual.get(made) and output != usual[FOLLOWS[made]]:
        given["output_dir"] = output
    words = [script, *(("--preset", preset) if preset else ())]
    for name, value in given.items():
        words += [flag(name), str(value)]
    return f"python {shlex.join(words)}"


def beside(folder: str, made: str, wanted: str) -> str:
    """A folder for what comes next, beside the one that was `made` and named like it."""
    name = Path(folder).name
    name = name.replace(made, wanted) if made in name else f"{name}-{wanted}"
    return str(Path(folder).with_name(name))
