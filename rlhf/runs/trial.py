"""A few real steps of a training script, to tell how long the whole run would take."""

import dataclasses
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rlhf.runs.metrics import read_jsonl
from rlhf.runs.processes import agree, is_main, wait
from rlhf.runs.terminal import console

Config = TypeVar("Config")  # of a training script
SAMPLE = 2000  # training rows to draw from
STEPS = 4  # the first is not counted: it also makes room for the others
LEAST = {  # of what is not measured
    "max_eval_samples": 2,
    "num_printed_samples": 0,
    "critic_warmup_updates": 0,
}


def time_steps(main: Callable[[Config], None], config: Config, total: int) -> None:
    """Run a script's `main` for `STEPS` steps into a throw-away folder, and print its speed.

    All processes call it.

    Args:
        total: optimizer steps (updates in PPO) of the whole run.
    """
    folder = Path(agree(tempfile.mkdtemp() if is_main() else None))
    flags = vars(config)
    rows = max(SAMPLE, STEPS * flags.get("batch_size", 1))
    changes = {name: value for name, value in LEAST.items() if name in flags}
    changes |= {
        "max_steps": min(STEPS, total),
        "max_train_samples": min(rows, flags["max_train_samples"] or rows),
    }
    changes |= {"output_dir": str(folder / "run"), "log_with": None}
    changes |= {"dry_run": False, "measure": False, "overwrite": False, "resume": False}
    quiet = console.quiet
    console.print(f"Measuring {changes['max_steps']} steps ...")
    console.quiet = True
    try:
        main(dataclasses.replace(config, **changes))
        console.quiet = quiet
        console.print(describe(*read(folder / "run"), total))
    finally:
        console.quiet = quiet
        wait()
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)


def read(folder: Path) -> tuple[list[dict[str, float]], int]:
    """The metrics of the steps that count, and the tokens of a micro-batch at the end."""
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "speed/tokens_per_second" in row]
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return rows[1:] or rows, run["micro_batch_tokens"]


def describe(rows: list[dict[str, float]], micro_batch_tokens: int, total: int) -> str:
    """Medians over the steps, and how long `total` steps would take."""
    names = [name for name in rows[0] if name.startswith(("time/", "speed/", "memory/"))]
    middle = {name: statistics.median(row[name] for row in rows) for name in names}
    parts = {
        name.removeprefix("time/"): value
        for name, value in middle.items()
        if name.startswith("time/")
    }
    seconds = sum(parts.values())
    line = (
        f"measured on this machine, {len(rows)} steps: {middle['speed/tokens_per_second']:,.0f} "
        "tokens/s, "
    )
    line += f"{seconds:.1f} s a step"
    if len(parts) > 1:
        line += " (" + ", ".join(f"{part} {value:.1f}" for part, value in parts.items()) + ")"
    if "memory/reserved_gib" in middle:
        line += f", {middle['memory/reserved_gib']:.1f} GiB of the card reserved"
    if "speed/mfu" in middle:
        line += f", MFU {middle['speed/mfu']:.0%}"
    line += f", micro-batches of {micro_batch_tokens:,} tokens. "
    return line + f"{total:,} steps would take {hours(seconds * total)}, without evaluation."


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
