"""One PPO run of the ablation: PPO as it comes, or with one stabiliser taken away; its metrics go to a record.

    python benchmarks/ppo_ablation.py --variant no_kl_stop --seed 0 --dataset Dahoas/rm-static

`make results` runs them all and makes the table. From an SFT model, a reward model of the first half of the pairs and a
gold one of the second half; each run is judged on the same held-out prompts, with the same sampling seeds, by the reward
model it trained against and by the gold one. What ppo_train.py has no flag for is taken away here, around it.
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

import ppo_train  # noqa: E402
from rlhf.cli import UserError, run  # noqa: E402
from rlhf.reporting import console  # noqa: E402

import torch  # noqa: E402


def value_from_scratch(stack: ExitStack) -> None:
    """The value model starts at 0 for every token instead of as the reward model."""
    load, token_values = ppo_train.load_models, ppo_train.token_values

    def load_models(*args):
        shared, base = load(*args)
        with torch.no_grad():
            shared.heads["value"].weight.zero_()
            for name, weight in shared.peft.named_parameters():
                if ".value." in name and "lora_B" in name:
                    weight.zero_()
        return shared, base

    changes: dict[str, Callable] = {
        "load_models": load_models,
        "token_values": lambda shared, micro, _: token_values(shared, micro, 0.0),  # in centred scores from the start
    }
    stack.enter_context(mock.patch.multiple(ppo_train, **changes))


def unwhitened(stack: ExitStack) -> None:
    """Advantages as they are, neither centred nor scaled."""
    stack.enter_context(mock.patch.object(ppo_train, "whiten", lambda tensors, masks, shift_mean=True: tensors))


def uncentred(stack: ExitStack) -> None:
    """Scores as they are, without SFT's mean taken off."""
    set_advantages, token_values = ppo_train.set_advantages, ppo_train.token_values
    changes: dict[str, Callable] = {
        "set_advantages": lambda batch, kl_coef, _, config: set_advantages(batch, kl_coef, 0.0, config),
        "token_values": lambda shared, micro, _: token_values(shared, micro, 0.0),
    }
    stack.enter_context(mock.patch.multiple(ppo_train, **changes))


@dataclass(frozen=True)
class Variant:
    changes: dict[str, Any] = field(default_factory=dict)  # of ppo_train.Config
    patch: Callable[[ExitStack], None] | None = None


NONE = 1e9  # a limit that is never met
NEVER = 10**9
# rm-static's texts are longer than the demo's, and its scores closer together: half a standard deviation for an end.
PPO = {"max_prompt_length": 160, "response_length": 64, "missing_eos_penalty": 0.3, "num_printed_samples": 0}
VARIANTS = {
    "as_it_comes": Variant(),
    "value_from_scratch": Variant(patch=value_from_scratch),
    "no_critic_warmup": Variant({"critic_warmup_updates": 0}),
    "advantages_not_whitened": Variant(patch=unwhitened),
    "scores_not_centred_nor_clipped": Variant({"score_clip": NONE}, uncentred),
    "fixed_kl_coef": Variant({"kl_controller": "fixed"}),
    "no_kl_stop": Variant({"kl_stop": NONE}),
    "missing_eos_penalty_1": Variant({"missing_eos_penalty": 1.0}),  # its default
}


@dataclass(frozen=True)
class Config:
    variant: str = "as_it_comes"  # of VARIANTS
    seed: int = 0
    sft_checkpoint: str = "runs/results/sft_0"
    reward_checkpoint: str = "runs/results/reward_0"
    gold_checkpoint: str = "runs/results/gold_0"
    dataset: str = "Dahoas/rm-static"
    total_episodes: int = 384
    max_eval_samples: int = 128  # held-out prompts
    work: str = "runs/results/ppo"  # a folder a run
    output: str = "runs/results/ppo/as_it_comes_0.json"  # the record


def main(config: Config) -> None:
    if config.variant not in VARIANTS:
        raise UserError(f"--variant is one of {', '.join(VARIANTS)}")
    work, output = Path(config.work), Path(config.output)
    work.mkdir(parents=True, exist_ok=True)
    folder = work / f"{config.variant}_{config.seed}"
    found: dict[str, Any] = {"config": asdict(config) | {"dataset": Path(config.dataset).name}}
    try:
        train(config, folder)
        run_json = json.loads((folder / "run.json").read_text())
        found |= {"metrics": run_json["metrics"], "seconds": run_json["seconds"]}
    except UserError as error:  # it diverged, and that is a result
        found["failed"] = str(error)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found) + "\n")
    console.print(f"Saved {output}.")


def train(config: Config, folder: Path) -> None:
    variant = VARIANTS[config.variant]
    parents = {name: getattr(config, name) for name in ("sft_checkpoint", "reward_checkpoint", "gold_checkpoint")}
    settings = replace(
        ppo_train.PRESETS["demo"],
        **parents,
        **PPO,
        dataset=config.dataset,
        total_episodes=config.total_episodes,
        max_eval_samples=config.max_eval_samples,
        eval_steps=NEVER,  # but before and after
        output_dir=str(folder),
        overwrite=True,
        seed=config.seed,
        **variant.changes,
    )
    with ExitStack() as stack:
        if variant.patch:
            variant.patch(stack)
        ppo_train.main(settings)


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
