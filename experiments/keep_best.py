"""Over-optimisation on purpose: what `--keep best` saves of it, on prompts that chose nothing.

    python experiments/keep_best.py            # three seeds, on the demo's data
    python experiments/keep_best.py --seeds 1

From one SFT model, a reward model of few pairs, which is easy to please, and a gold one of the
other half of the pairs, each seed makes two runs of PPO with `--keep best`. The healthy one has the
demo's settings. The provoked one has four times the learning rate and no KL penalty. Before
a run takes its best policy back, the last one answers the held-out prompts, too; so best and last
are compared on the same prompts, none of which chose the policy. Writes keep_best.json and each
run's frontier.png and curves.png into the work folder. What is finished there is not done again.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import rlhf  # noqa: F401  before the libraries that it sets up

from rich.table import Table

import ppo_train
import reward_train
import sft_train
from rlhf.ppo.evaluation import Evaluation
from rlhf.ppo.state import State
from rlhf.runs.cli import run
from rlhf.runs.metrics import read_jsonl
from rlhf.runs.statistics import mean_interval
from rlhf.runs.terminal import console

# The demo's values when docs/after-training.md was written, which has what these runs found.
REWARD = {"num_train_epochs": 2.0, "learning_rate": 5e-4}
LOOKS = {"eval_steps": 4, "total_episodes": 512, "kl_coef": 0.05}
PROVOKED = {"learning_rate": 4e-3, "kl_coef": 0.0, "kl_stop": 1e9}
PAIRS = {"reward": 48, "gold": None}  # that the judges learn from; None: all of their half
RUNS = {"provoked": LOOKS | PROVOKED, "healthy": LOOKS}


@dataclass(frozen=True)
class Config:
    base_model: str = "models/SmolLM2-135M-Instruct"
    dataset: str = "demo/data"
    seeds: int = 3
    work: str = "runs/keep_best"


def main(config: Config) -> None:
    records = []
    checkpoints = train_models(config)
    for name, changes in RUNS.items():
        for seed in range(config.seeds):
            folder = Path(config.work) / f"{name}_{seed}"
            record = folder.with_name(f"{folder.name}.json")
            if not record.exists():
                found = train(checkpoints, changes, folder, seed) | {"run": name, "seed": seed}
                record.write_text(json.dumps(found, allow_nan=False) + "\n")
            records.append(json.loads(record.read_text()))
    console.print(table(records))
    output = Path(config.work) / "keep_best.json"
    output.write_text(json.dumps({"config": asdict(config), "runs": records}, indent=1) + "\n")
    console.print(f"Saved {output}.")


def train_models(config: Config) -> dict[str, Any]:
    """SFT, reward and gold model, unless they are there. Returns PPO's flags for them."""
    common = {"dataset": config.dataset, "overwrite": True}
    sft = f"{config.work}/sft"
    if not (Path(sft) / "run.json").exists():
        preset = replace(sft_train.PRESETS["demo"], base_model=config.base_model)
        sft_train.main(replace(preset, **common, output_dir=sft))
    flags = common | {"sft_checkpoint": sft}
    # Seeds that differ, else both start from the same weights and share what that makes of a text.
    for name, half, seed in (("reward", "first", 0), ("gold", "second", 1)):
        output = f"{config.work}/{name}"
        if not (Path(output) / "run.json").exists():
            settings = common | {"sft_checkpoint": sft, "seed": seed, "half": half}
            settings["max_train_samples"] = PAIRS[name]
            preset = replace(reward_train.PRESETS["demo"], **REWARD)
            reward_train.main(replace(preset, **settings, output_dir=output))
        flags[f"{name}_checkpoint"] = output
    return flags


def train(
    checkpoints: dict[str, Any], changes: dict[str, Any], folder: Path, seed: int
) -> dict[str, Any]:
    """A run with `--keep best`, and what its last policy answers to the held-out prompts."""
    settings = replace(
        ppo_train.PRESETS["demo"],
        **checkpoints | changes,
        seed=seed,
        keep="best",
        output_dir=str(folder),
        num_printed_samples=0,
    )
    looks: list[Evaluation] = []  # the first is SFT's at the held-out prompts
    asked: list[tuple] = []
    evaluate = ppo_train.evaluate
    restore_best = State.restore_best

    def evaluate_and_note(*arguments: Any) -> Evaluation:
        asked.append(arguments)
        looks.append(evaluate(*arguments))
        return looks[-1]

    def look_before_restoring(state: State) -> str:
        looks.append(evaluate(*asked[0]))
        return restore_best(state)

    with (
        mock.patch.object(ppo_train, "evaluate", evaluate_and_note),
        mock.patch.object(State, "restore_best", look_before_restoring),
    ):
        ppo_train.main(settings)
    sft = looks[0]
    last, best = looks[-2:]
    facts = json.loads((folder / "run.json").read_text())
    rows = read_jsonl(folder / "metrics.jsonl")
    return {
        "kept": facts["kept"]["update"],
        "updates": settings.num_updates,
        "gold_score": {
            "sft": sft.gold_scores.tolist(),
            "best": best.gold_scores.tolist(),
            "last": last.gold_scores.tolist(),
        },
        "score": {
            "sft": sft.scores.tolist(),
            "best": best.scores.tolist(),
            "last": last.scores.tolist(),
        },
        "kl": {"best": best.kl.mean().item(), "last": last.kl.mean().item()},
        "looks": [row for row in rows if "eval/kl" in row],
        "warnings": facts["metrics"]["warnings"],
    }


def table(records: list[dict[str, Any]]) -> Table:
    """Gains over SFT on the held-out prompts, and best less last with its 95 % interval."""
    columns = ("run", "seed", "kept", "KL: best", "last")
    columns += ("score: best", "last", "gold: best", "last", "best - last")
    shown = Table(*columns)
    for record in records:
        means = {
            judge: {who: sum(values) / len(values) for who, values in record[judge].items()}
            for judge in ("score", "gold_score")
        }
        gold = record["gold_score"]
        difference = [b - a for a, b in zip(gold["last"], gold["best"], strict=True)]
        low, high = mean_interval(difference)
        mean = sum(difference) / len(difference)
        shown.add_row(
            record["run"],
            str(record["seed"]),
            f"{record['kept']} of {record['updates']}",
            *(f"{record['kl'][who]:.1f}" for who in ("best", "last")),
            *(
                f"{means[judge][who] - means[judge]['sft']:+.2f}"
                for judge in ("score", "gold_score")
                for who in ("best", "last")
            ),
            f"{mean:+.2f} ({low:.2f} to {high:.2f})",
        )
    return shown


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
