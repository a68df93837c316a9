"""What to do next, as a command or as flags of the script at hand."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

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
FOLLOWS = {"sft": "reward", "reward": "ppo", "gold": "ppo", "ppo": "reports"}
CARRIED = {  # fields that the next script is given where they are not as usual, by what was made
    "sft": ("dtype",),  # the base is in its run.json
    "reward": ("base_model", "dtype", "role_layers"),
    "gold": ("base_model", "dtype", "role_layers"),
    "ppo": ("base_model", "dtype", "max_prompt_length", "reward_function", "reward_weight"),
}


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
