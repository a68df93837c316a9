"""SFT and reward training beside the stock `trl sft` and `trl reward` of the pinned TRL.

    python benchmarks/train_vs_trl.py --dataset Dahoas/rm-static

Same model, rows, batch, LoRA (rank 16 on all linear layers), length limit and precision; each run
is a process of its own and runs alternate. The stock commands get the pairs as plain text, prompt
and completion for SFT, whole texts for the reward model, and all else is at its default. What
counts is the speed in real tokens, those that are not padding, as TRL counts them for both
(num_tokens). Loading is not timed.

The stock SFT cuts texts from the right, end and EOS included, and the stock reward model drops
pairs that are too long; ours cut the prompt's oldest turns. Ours carry a frozen SFT adapter below
the reward model's.
"""

import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import rlhf  # noqa: F401  before the libraries that it sets up

from ppo_vs_trl import WORK
from rich.table import Table

from rlhf.data.format import PromptFormat
from rlhf.data.sources import load_pairs
from rlhf.engine.tokenizers import load_tokenizer
from rlhf.runs.cli import run
from rlhf.runs.device import hardware
from rlhf.runs.errors import UserError
from rlhf.runs.terminal import console


@dataclass(frozen=True)
class Config:
    model: str = "models/SmolLM2-135M-Instruct"
    dataset: str = "Dahoas/rm-static"
    rows: int = 1000  # the first so many training pairs
    max_length: int = 256  # tokens
    batch_size: int = 8  # rows, or pairs
    steps: int = 14  # of a run; each has a seed, and so rows, of its own
    runs: int = 3  # of each
    output: str = "benchmarks/results/train_vs_trl.json"


def main(config: Config) -> None:
    (ROOT / config.output).parent.mkdir(parents=True, exist_ok=True)
    write_data(config)
    commands = {"trl sft": stock(config, "sft"), "sft_train.py": ours(config, "sft")}
    commands |= {"trl reward": stock(config, "reward"), "reward_train.py": ours(config, "reward")}
    runs = []
    for number in range(config.runs):
        for name, command in commands.items():
            command = [*command, "--seed", str(number)]
            runs.append({"command": name, "run": number} | measure(name, command, number))
            console.print(f"{name}: {runs[-1]['tokens_per_second']:.0f} tokens/s")
    median = {
        name: statistics.median(run["tokens_per_second"] for run in runs if run["command"] == name)
        for name in commands
    }
    results = {
        "hardware": hardware(),
        "config": {name: str(value) for name, value in vars(config).items()}
        | {"dataset": Path(config.dataset).name},
        "tokens_per_second": median,
        "sft_ratio": median["sft_train.py"] / median["trl sft"],
        "reward_ratio": median["reward_train.py"] / median["trl reward"],
        "runs": runs,
    }
    (ROOT / config.output).write_text(json.dumps(results, indent=2) + "\n")
    table = Table("", "TRL, tokens/s", "ours, tokens/s", "ratio", title=results["hardware"])
    for name in ("sft", "reward"):
        row = median[f"trl {name}"], median[f"{name}_train.py"], results[f"{name}_ratio"]
        table.add_row(name, f"{row[0]:.0f}", f"{row[1]:.0f}", f"{row[2]:.2f}")
    console.print(table)
    console.print(f"Saved {config.output}.")


def write_data(config: Config) -> None:
    """The same pairs in our columns and in those that the stock commands take."""
    prompt_format = PromptFormat("hh", load_tokenizer(config.model))
    pairs = load_pairs(config.dataset, "train", config.rows)
    eos = prompt_format.tokenizer.eos_token
    rows: dict[str, list[dict[str, Any]]] = {"ours": [], "sft": [], "reward": []}
    for pair in pairs:
        prompt = prompt_format.tokenizer.decode(prompt_format.prompt_ids(pair.turns))
        rows["ours"].append({"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected})
        rows["sft"].append({"prompt": prompt, "completion": f" {pair.chosen}{eos}"})
        rows["reward"].append(
            {"chosen": f"{prompt} {pair.chosen}", "rejected": f"{prompt} {pair.rejected}"}
        )
    for name, part in rows.items():
        folder = WORK / f"pairs_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            text = "".join(
                json.dumps(row) + "\n" for row in (part if split == "train" else part[:8])
            )
            (folder / f"{split}.jsonl").write_text(text)


STOCK = (
    "--use_peft --lora_r 16 --lora_alpha 32 --lora_target_modules all-linear --dtype bfloat16 "
    "--gradient_checkpointing False --use_cpu True --learning_rate 2e-4 --save_strategy no "
    "--report_to none"
)
OURS = (
    "--overwrite --eval-steps None --lora-rank 16 --lora-alpha 32 --dtype bf16 "
    "--no-gradient-checkpointing --learning-rate 2e-4"
)


def stock(config: Config, command: str) -> list[str]:
    """The command of TRL, "sft" or "reward"."""
    flags = {
        "--model_name_or_path": ROOT / config.model,
        "--dataset_name": WORK / f"pairs_{command}",
        "--output_dir": WORK / f"stock_{command}",
        "--max_length": config.max_length,
        "--per_device_train_batch_size": config.batch_size,
        "--max_steps": config.steps,
        "--logging_steps": config.steps,
        "--lora_task_type": "CAUSAL_LM" if command == "sft" else "SEQ_CLS",
    }
    trl = str(Path(sys.executable).with_name("trl"))
    return [trl, command, *STOCK.split(), *words(flags)]


def ours(config: Config, phase: str) -> list[str]:
    """The command of our script."""
    flags = {
        "--dataset": WORK / "pairs_ours",
        "--output-dir": WORK / f"ours_{phase}",
        "--max-length": config.max_length,
        "--batch-size": config.batch_size,
        "--max-steps": config.steps,
    }
    if phase == "sft":
        special = ["--base-model", str(ROOT / config.model), "--no-load-in-4bit"]
    else:
        special = ["--sft-checkpoint", str(WORK / "ours_sft"), "--role-layers", "0"]
    return [sys.executable, str(ROOT / f"{phase}_train.py"), *special, *OURS.split(), *words(flags)]


def words(flags: dict[str, Any]) -> list[str]:
    """Flags and their values as words of a command line."""
    return [str(word) for flag in flags.items() for word in flag]


def measure(name: str, command: list[str], number: int) -> dict[str, float]:
    """Run a command; tokens and seconds of its training, by its own log."""
    path = WORK / f"{name.replace(' ', '_')}_{number}.log"
    with path.open("w") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise UserError(f"{name} failed; see {path}")
    text = path.read_text()
    if name.startswith("trl"):
        found = {
            key: re.findall(rf"'{key}': '?([\d.e+]+)", text)
            for key in ("train_runtime", "num_tokens")
        }
        seconds, tokens = (float(found[key][-1]) for key in ("train_runtime", "num_tokens"))
    else:
        phase = name.removesuffix("_train.py")
        rows = [
            json.loads(line)
            for line in (WORK / f"ours_{phase}" / "metrics.jsonl").read_text().splitlines()
        ]
        seconds = next(row["train_runtime"] for row in rows if "train_runtime" in row)
        tokens = [row["num_tokens"] for row in rows if "num_tokens" in row][-1]
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
