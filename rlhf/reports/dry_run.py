"""What a run would do, from flags, data and checkpoints alone: rows, steps and the memory plan."""

import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.table import Table

from rlhf.data.format import PromptFormat, tokenize_prompts
from rlhf.data.sources import load_splits
from rlhf.data.splits import cut_selection
from rlhf.engine.base import base_facts, check_context, read_config, same_base
from rlhf.engine.card import CARD_OVERHEAD, Plan, deal, tokens_that_fit
from rlhf.engine.plan import OWNERS, episodes_of_a_process, ppo_plans, read_shape
from rlhf.engine.tokenizers import load_format, load_tokenizer
from rlhf.runs.advice import less_memory
from rlhf.runs.checkpoints import check_child, read_parents, read_run
from rlhf.runs.checks import check_between
from rlhf.runs.terminal import console


def show_plan(plan: Plan, longest: int, config: Any) -> None:
    """Print the plan for a card of `config.card_gb` GB: does it fit, and if not, which flags help.

    Args:
        plan: bytes by owner, from the tokens of a micro-batch.
        longest: tokens of the longest text.
    """
    room = config.card_gb * 1e9 * (1 - CARD_OVERHEAD)
    tokens = (
        tokens_that_fit(plan, longest, room)
        if config.micro_batch_tokens == "auto"
        else config.micro_batch_tokens
    )
    console.print(
        f"micro-batches of {tokens:,} tokens"
        + (", by auto" if config.micro_batch_tokens == "auto" else "")
    )
    table = Table(title="Memory plan: worked out, not measured")
    table.add_column("owner")
    table.add_column("GB", justify="right")
    for owner in OWNERS:
        table.add_row(owner, f"{plan(tokens).get(owner, 0) / 1e9:.2f}")
    total = sum(plan(tokens).values())
    table.add_row("all tensors", f"{total / 1e9:.2f}")
    console.print(table)
    fits = "fits" if total <= room else "does not fit"
    console.print(
        f"It {fits} a card of {config.card_gb:g} GB: {room / 1e9:.1f} GB of it are for tensors."
    )
    if total > room:
        console.print(f"To make it smaller, {less_memory(config)}.")


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


def earlier_runs(config: Any, **scripts: ModuleType) -> dict[str, dict[str, Any]]:
    """The run.json of each checkpoint that a dry run plans with, by role.

    Of one that is not there yet it is what a plan asks of it, as `foresee` says.

    Args:
        scripts: the earlier ones, by phase.
    Raises:
        UserError: those that are there do not fit together; one is missing, and --measure needs it.
    """
    folders = {role: vars(config).get(f"{role}_checkpoint") for role in ("sft", "reward", "gold")}
    there = {role: Path(folder).exists() for role, folder in folders.items() if folder}
    if config.measure or all(there.values()):
        return (
            read_parents(config) if "reward" in there else {"sft": read_run(folders["sft"], "sft")}
        )
    runs: dict[str, dict[str, Any]] = {}
    for role, is_there in there.items():
        phase = "sft" if role == "sft" else "reward"
        if is_there:
            runs[role] = read_run(folders[role], phase, f"--{role}-checkpoint")
            if phase == "reward" and there["sft"]:
                check_child(runs[role], folders[role], runs["sft"], folders["sft"])
        else:
            runs[role] = foresee(role, folders[role], config, scripts[phase], runs)
    return runs


def foresee(
    role: str, folder: str, config: Any, script: ModuleType, runs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What a plan needs of the run.json of a checkpoint that is not there yet, said in a line.

    It is that of the preset of `script` which writes to `folder`, or of the script's defaults.

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
        if config.base_model:
            model = config.base_model
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


def dry_run_ppo(config: Any, runs: dict[str, dict[str, Any]]) -> None:
    """What `ppo_train.py` would do with these flags and checkpoints' run.json, by role."""
    sft = runs["sft"]
    base = same_base(sft, config.sft_checkpoint, config.base_model)
    prompt_format = format_of(config.sft_checkpoint, sft)
    pairs, held_out = load_splits(
        config.dataset, "prompt", config.columns, config.max_train_samples, config.max_eval_samples
    )
    if config.keep == "best":
        pairs, selection = cut_selection(pairs, len(held_out))
        console.print(f"prompts set apart from these, to choose a policy by: {len(selection)}")
    prompts = tokenize_prompts(pairs, prompt_format, config.max_prompt_length)
    show_data("prompts", [len(prompt) for prompt in prompts])
    console.print(f"held-out prompts: {len(held_out)}")
    console.print(
        f"updates: {config.num_updates} of {config.episodes_per_update} responses of up to "
        f"{config.response_length} tokens, {config.num_ppo_epochs * config.num_mini_batches} "
        "optimizer steps each"
    )
    shape = read_shape(base, config.dtype)
    check_between(config, 0, shape.layers, "role_layers")
    longest = max(map(len, prompts))
    length = longest + config.response_length + 1
    room = config.card_gb * 1e9 * (1 - CARD_OVERHEAD)
    check_context(base, length, "--max-prompt-length", "--response-length")
    plans = ppo_plans(shape, config, runs, longest)
    rollouts = deal(plans, config, episodes_of_a_process(config.episodes_per_update), length, room)
    weights = "a merged 16-bit copy" if rollouts.merged else "the base with its adapters"
    kept = ", their keys and values kept for the next" if rollouts.kept else ""
    console.print(f"rollouts: {rollouts.rows} responses at a time, from {weights}{kept}")
    show_plan(plans(rollouts), length, config)
    if config.reward_function:
        console.print("What --reward-function takes is not in the plan.")
