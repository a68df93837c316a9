"""What a run would do, from flags, data and checkpoints alone: rows, steps and the memory plan."""

import shlex
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rich.table import Table

from rlhf.data.format import PromptFormat
from rlhf.engine.base import base_facts, read_config
from rlhf.engine.card import CARD_OVERHEAD, Plan, tokens_that_fit
from rlhf.engine.plan import OWNERS
from rlhf.engine.tokenizers import load_format, load_tokenizer
from rlhf.runs.checkpoints import check_child, read_parents, read_run
from rlhf.runs.terminal import console


def room_of(card_gb: float) -> float:
    """Bytes for tensors on a card of this size."""
    return card_gb * 1e9 * (1 - CARD_OVERHEAD)


def show_plan(
    plan: Plan, asked: int | Literal["auto"], longest: int, card_gb: float, advice: str
) -> None:
    """Print the plan, whether it fits the card, and if not, what to do.

    Args:
        asked: what --micro-batch-tokens says.
        longest: tokens of the longest text.
    """
    room = room_of(card_gb)
    tokens = tokens_that_fit(plan, longest, room) if asked == "auto" else asked
    console.print(f"micro-batches of {tokens:,} tokens" + (", by auto" if asked == "auto" else ""))
    table = Table(title="Memory plan: worked out, not measured")
    table.add_column("owner")
    table.add_column("GB", justify="right")
    for owner in OWNERS:
        table.add_row(owner, f"{plan(tokens).get(owner, 0) / 1e9:.2f}")
    total = sum(plan(tokens).values())
    table.add_row("all tensors", f"{total / 1e9:.2f}")
    console.print(table)
    fits = "fits" if total <= room else "does not fit"
    console.print(f"It {fits} a card of {card_gb:g} GB: {room / 1e9:.1f} GB of it are for tensors.")
    if total > room:
        console.print(f"To make it smaller, {advice}.")


def show_data(what: str, lengths: list[int]) -> None:
    """Print how many rows training would use, and how long they are in tokens."""
    mean = sum(lengths) / len(lengths)
    longest = max(lengths)
    console.print(
        f"{what}: {len(lengths)}, {mean:.0f} tokens each on average, {longest} at most, "
        f"{sum(lengths):,} in all"
    )


def show_end(measured: bool) -> None:
    loaded = "a few steps were made and thrown away" if measured else "no weights were loaded"
    console.print(f"Dry run: {loaded}, and nothing was written.")


def earlier_runs(
    folders: dict[str, str | None],
    scripts: dict[str, ModuleType],
    base_model: str | None,
    measure: bool,
) -> dict[str, dict[str, Any]]:
    """The run.json of each checkpoint that a dry run plans with, by role.

    For a checkpoint that is not there yet, what a plan needs of it (`foresee`).

    Args:
        folders: of the checkpoints, by role: sft, and for PPO reward and perhaps gold.
        scripts: that make them, by phase.
        base_model: as the flag says.
        measure: whether all of them must be there.
    Raises:
        UserError: those that are there do not fit together, or one is missing with `measure`.
    """
    named = {role: folder for role, folder in folders.items() if folder}
    there = {role: Path(folder).exists() for role, folder in named.items()}
    if measure or all(there.values()):
        return (
            read_parents(**named) if "reward" in named else {"sft": read_run(named["sft"], "sft")}
        )
    runs: dict[str, dict[str, Any]] = {}
    for role, folder in named.items():
        phase = "sft" if role == "sft" else "reward"
        if there[role]:
            runs[role] = read_run(folder, phase, f"--{role}-checkpoint")
            if phase == "reward" and there["sft"]:
                check_child(runs[role], folder, runs["sft"], named["sft"])
        else:
            runs[role] = foresee(role, folder, scripts[phase], base_model, runs)
    return runs


def foresee(
    role: str,
    folder: str,
    script: ModuleType,
    base_model: str | None,
    runs: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """What a plan needs of the run.json of a checkpoint that is not there yet. Says so in a line.

    It comes from the preset of `script` that writes to `folder`, or from the script's defaults.

    Args:
        runs: the run.json of the SFT checkpoint, for a later one.
    """
    made = {preset.output_dir: (name, preset) for name, preset in script.PRESETS.items()}
    name, maker = made.get(folder, (None, script.Config()))
    command = f"python {script.__name__}.py" + (f" --preset {name}" if name else "")
    sizes = {"lora_rank": maker.lora_rank}
    if role == "sft":
        model = maker.base_model
        revision = maker.revision
        if base_model:
            model = base_model
            revision = None
            command += f" --base-model {shlex.quote(model)}"
        base = base_facts(model, revision, maker.load_in_4bit)
        run = {"base": base, "prompt_format": maker.prompt_format, "hyperparameters": sizes}
        of = f" of {model}"
    else:
        layers = read_config(runs["sft"]["base"]).num_hidden_layers
        run = {"hyperparameters": sizes | {"role_layers": min(maker.role_layers, layers)}}
        of = ""
    command += f" --output-dir {shlex.quote(folder)}" if folder != maker.output_dir else ""
    console.print(
        f"There is no {role} checkpoint at {folder} yet: this plan is for the one that `{command}` "
        f"would make{of}."
    )
    return run


def format_of(folder: str, run: dict[str, Any]) -> PromptFormat:
    """An SFT checkpoint's prompt format, with the base's tokenizer if it is not there yet."""
    if Path(folder).exists():
        return load_format(folder, run)
    tokenizer = load_tokenizer(run["base"]["model"], run["base"]["revision"])
    return PromptFormat(run["prompt_format"], tokenizer)
