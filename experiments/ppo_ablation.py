"""One PPO run of the ablation: the settings of `make results`, or these with one change.

    python experiments/ppo_ablation.py --variant no_kl_stop --seed 0 --dataset Dahoas/rm-static

`make results` runs them all and makes the table. From an SFT model, a reward model of the first
half of the pairs and a gold one of the second half; each run is judged on the same held-out
prompts, with the same sampling seeds, by the reward model it trained against and by the gold one.
What ppo_train.py has no flag for is taken away here, around it.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rlhf  # noqa: F401  before the libraries that it sets up

import torch

import ppo_train
from rlhf.ppo.batch import NotFinite
from rlhf.runs.cli import run
from rlhf.runs.errors import UserError
from rlhf.runs.metrics import read_jsonl
from rlhf.runs.terminal import console


def value_from_scratch(stack: ExitStack) -> None:
    """The value model starts at 0 for every token, with a blank adapter, not as the scorer."""
    load = ppo_train.load_models
    token_values = ppo_train.token_values

    def load_models(*args):
        shared, base = load(*args)
        with torch.no_grad():
            shared.heads["value"].weight.zero_()
            for name, weight in shared.peft.named_parameters():
                if ".value." in name and "lora_B" in name:
                    weight.zero_()
        shared.restack()
        return shared, base

    changes: dict[str, Callable] = {
        "load_models": load_models,
        # In centred scores from the start.
        "token_values": lambda shared, micro, lower, _: token_values(shared, micro, lower, 0.0),
    }
    stack.enter_context(mock.patch.multiple(ppo_train, **changes))


def unwhitened(stack: ExitStack) -> None:
    """Advantages as they are, neither centred nor scaled."""
    stack.enter_context(
        mock.patch.object(ppo_train, "whiten", lambda values, shift_mean=True: values)
    )


def uncentred(stack: ExitStack) -> None:
    """Scores without SFT's mean taken off."""
    advantages = ppo_train.advantages_and_returns
    token_values = ppo_train.token_values
    changes: dict[str, Callable] = {
        "advantages_and_returns": lambda batch, measured, kl, _, config: advantages(
            batch, measured, kl, 0.0, config
        ),
        "token_values": lambda shared, micro, lower, _: token_values(shared, micro, lower, 0.0),
    }
    stack.enter_context(mock.patch.multiple(ppo_train, **changes))


@dataclass(frozen=True)
class Variant:
    changes: dict[str, Any] = field(default_factory=dict)  # of ppo_train.Config
    patch: Callable[[ExitStack], None] | None = None


NEVER = 10**9
# rm-static's texts are longer than the demo's, and its scores closer together: half a standard
# deviation for an end.
PPO = {
    "max_prompt_length": 160,
    "response_length": 64,
    "missing_eos_penalty": 0.3,
    "kl_coef": 0.05,
    "num_printed_samples": 0,
}
VARIANTS = {
    "baseline": Variant(),
    "value_from_scratch": Variant(patch=value_from_scratch),
    "no_critic_warmup": Variant({"critic_warmup_updates": 0}),
    "advantages_not_whitened": Variant(patch=unwhitened),
    "scores_not_centred": Variant(patch=uncentred),
    "score_clip_1": Variant({"score_clip": 1.0}),  # the preset's 5 is never reached here
    # At the preset's 10,000 the coefficient stays within 1 % here.
    "kl_horizon_200": Variant({"kl_horizon": 200}),
    "no_kl_stop": Variant({"kl_stop": 1e9}),
    "missing_eos_penalty_1": Variant({"missing_eos_penalty": 1.0}),  # ppo_train.py's default
}
SAME = (
    "baseline",
    "scores_not_centred",
)  # but for rounding: with gamma 1 scores and values move together


@dataclass(frozen=True)
class Config:
    variant: str = "baseline"  # of VARIANTS
    seed: int = 0
    sft_checkpoint: str = "runs/results/sft_0"
    reward_checkpoint: str = "runs/results/reward_0"
    gold_checkpoint: str = "runs/results/gold_0"
    dataset: str = "Dahoas/rm-static"
    total_episodes: int = 384
    max_eval_samples: int = 128  # held-out prompts
    # a folder VARIANT_SEED and a file VARIANT_SEED.json of each run
    work: str = "runs/results/ppo_ablation"


def main(config: Config) -> None:
    if config.variant not in VARIANTS:
        raise UserError(f"--variant is one of {', '.join(VARIANTS)}")
    folder = Path(config.work) / f"{config.variant}_{config.seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_record(asdict(config), folder, lambda: train(config, folder))


def write_record(config: dict[str, Any], folder: Path, find: Callable[[], dict[str, Any]]) -> None:
    """Write what a run finds, or why it broke off, into the file beside its folder."""
    try:
        found = find()
    except NotFinite as error:  # that is a result, too
        found = {"failed": str(error)}
    settings = config | {"dataset": Path(config["dataset"]).name}
    output = folder.with_name(f"{folder.name}.json")
    output.write_text(json.dumps({"config": settings, **found}, allow_nan=False) + "\n")
    console.print(f"Saved {output}.")


def trained(folder: Path) -> dict[str, Any]:
    """Of a finished run: its metrics, the rows of its looks at the held-out prompts, each prompt's
    gains, and of each update how much of the returns' variance the values explain."""
    samples = read_jsonl(folder / "samples.jsonl")
    first, last = (
        [row for row in samples if row["update"] == at] for at in (0, samples[-1]["update"])
    )
    gains = {
        name: [b[name] - a[name] for a, b in zip(first, last, strict=True)]
        for name in ("score", "gold_score")
    }
    rows = read_jsonl(folder / "metrics.jsonl")
    return {
        "metrics": json.loads((folder / "run.json").read_text())["metrics"],
        "gains": gains,
        "looks": [row for row in rows if "eval/kl" in row],
        "explained_variance": [
            row["val/explained_variance"] for row in rows if "val/explained_variance" in row
        ],
    }


def train(config: Config, folder: Path) -> dict[str, Any]:
    variant = VARIANTS[config.variant]
    parents = {
        name: getattr(config, name)
        for name in ("sft_checkpoint", "reward_checkpoint", "gold_checkpoint")
    }
    settings = replace(
        ppo_train.PRESETS["demo"],
        **parents,
        dataset=config.dataset,
        total_episodes=config.total_episodes,
        max_train_samples=4096,
        max_eval_samples=config.max_eval_samples,
        eval_steps=NEVER,  # but before and after
        output_dir=str(folder),
        overwrite=True,
        seed=config.seed,
        **(PPO | variant.changes),
    )
    with ExitStack() as stack:
        if variant.patch:
            variant.patch(stack)
        ppo_train.main(settings)
    return trained(folder)


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
